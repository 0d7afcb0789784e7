# SPDX-License-Identifier: Apache-2.0

"""Ask an exported folder with stock transformers and nothing of ours; any version from 4.48 on.

``python plain_llava.py FOLDER REQUEST OUT``: REQUEST is a JSON list of ``{"messages", "images"}``; OUT gets
a dict a request: ids, pixels, pixels of the exact backend (where there is a choice) and the logits with
those, ids of the greedy answer, text of the answer.
With ``--save-again`` the model and the processor are saved into OUT's folder as this version does it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration


def ask(folder: str, requests: list[dict], *, max_new_tokens: int = 12) -> list[dict]:
    processor = AutoProcessor.from_pretrained(folder)
    model, info = LlavaForConditionalGeneration.from_pretrained(
        folder, torch_dtype=torch.float32, output_loading_info=True
    )
    wrong = {key: list(value) for key, value in info.items() if len(value)}
    assert not wrong, wrong
    exact = None
    if int(transformers.__version__.split(".")[0]) >= 5:
        exact = AutoProcessor.from_pretrained(folder, backend="pil")
    answers = []
    for request in requests:
        images = [Image.open(path).convert("RGB") for path in request["images"]] or None
        prompt = processor.apply_chat_template(request["messages"], add_generation_prompt=True)
        inputs = processor(text=prompt, images=images, return_tensors="pt")
        seen = dict(inputs)
        if images and exact:
            seen["pixel_values"] = exact(text=prompt, images=images, return_tensors="pt")[
                "pixel_values"
            ]
        with torch.no_grad():
            logits = model.eval()(**seen).logits[0]
            made = model.generate(**inputs, max_new_tokens=max_new_tokens)[0]
        made = made[inputs["input_ids"].shape[1] :]
        answer = {
            "ids": inputs["input_ids"][0],
            "logits": logits,
            "made": made,
            "answer": processor.decode(made, skip_special_tokens=True).strip(),
        }
        if images:
            answer["pixels"] = inputs["pixel_values"]
            answer["exact_pixels"] = seen["pixel_values"]
        answers.append(answer)
    return answers


def main() -> None:
    folder, request, out = sys.argv[1:4]
    torch.save(ask(folder, json.loads(Path(request).read_text())), out)
    if "--save-again" in sys.argv:
        again = str(Path(out).parent / "again")
        LlavaForConditionalGeneration.from_pretrained(folder).save_pretrained(again)
        AutoProcessor.from_pretrained(folder).save_pretrained(again)


if __name__ == "__main__":
    main()
