"""The model card of an export: what it is, what it takes, how to use it, what it is not for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig

from gmai_xtuner.model.costs import cache_bytes, folder_bytes, size
from gmai_xtuner.model.lora import adapter_layers

USAGE = """```python
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

processor = AutoProcessor.from_pretrained(FOLDER)
model = LlavaForConditionalGeneration.from_pretrained(FOLDER, torch_dtype=torch.{dtype}).eval()

content = [{{"type": "image"}}, {{"type": "text", "text": "What is shown?"}}]
messages = [{{"role": "user", "content": content}}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(text=prompt, images=[Image.open("chest.png").convert("RGB")], return_tensors="pt")
inputs = inputs.to(model.device, model.dtype)
answer = model.generate(**inputs, max_new_tokens=256)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))
```"""

PADDING = """In training each picture was padded to a square with the mean colour {colour} and then resized
to {side} x {side}. transformers 4.49 and newer do the same by themselves: up to 4.57 bit for bit, 5.x up to
one of 255 levels, and bit for bit with `AutoProcessor.from_pretrained(FOLDER, backend="pil")`. transformers
4.48 can't pad: it stretches pictures that are not square (nothing is cut off). There, pad first:

```python
def square(image):
    side = max(image.size)
    ground = Image.new("RGB", (side, side), {colour})
    ground.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return ground
```"""

RESIZING = """In training each picture was resized to {side} x {side} without padding; every transformers
from 4.48 on does the same."""

CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
license: other
license_name: see-bases-and-data
language:
- en
- zh
{bases_yaml}tags:
- llava
- medical
- gmai-vl
---

# GMAI-VL, {stage}

A medical vision-language model in the form of LLaVA (`LlavaForConditionalGeneration`): CLIP vision tower,
two linear layers with GELU, Llama-shaped language model. Trained with GMAI-VL for XTuner after *GMAI-VL &
GMAI-VL-5.5M* ([arXiv 2411.14522](https://arxiv.org/abs/2411.14522)).

**Not for clinical use.** It makes mistakes, states things that are not in the picture, and has not been
evaluated for any diagnostic or therapeutic purpose. It is no medical device. Do not send it pictures or
texts of patients without the right to do so.

## What it is

| | |
|---|---|
| stage | {stage} |
| trained in this stage | {trained} |
| language model's base | {llm} |
| vision tower's base | {vision} |
| dtype | {dtype} |
| image tokens | {image_tokens} an image, {side} x {side} pixels |
| vocabulary | {vocabulary:,}, `<image>` is {image_id} |
| longest training sequence | {max_length:,} tokens, image tokens counted |
| prompt template | `{template}`, {bos} |

```
{costs}
```

{memory}

## How to use it

With transformers 4.48 or newer, and none of our code (`FOLDER` is this folder):

{usage}

`[{{"type": "image"}}, {{"type": "text", ...}}]` or `<image>` marks in the text stand for the pictures, in
order; several are possible, and several turns. Messages may also begin with a `system` turn.
`processor(...)` adds no `<s>` by itself; the chat template writes it where training had it. Servers: `vllm
serve FOLDER`, `transformers serve`, and others that load LLaVA.

{pixels}

Send 8-bit pictures. Of 16-bit PNG and TIFF files, as scanners write them, `convert("RGB")` makes white ones:
map the window that matters to 0..255 first.

## Licence and data

This folder has no licence of its own: what may be done with it follows from the licences of the bases named
above and of the datasets it was trained on. Ask who trained it which datasets these were, and check them
before you pass it on. The code that made it is under Apache-2.0.
"""


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a model comes from.

    Args:
        stage: name of the stage, for the title.
        trained: what that stage trained.
        llm: folder or hub name of the language model's base.
        vision: the same of the vision tower.
    """

    stage: str
    trained: str
    llm: str
    vision: str


def provenance_of(model: Any, cfg: Mapping[str, Any]) -> Provenance:
    """By a stage's config and its ``GMAILLaVAModel``."""
    return Provenance(
        stage=str(cfg["train_dataloader"]["dataset"].get("stage", "stage unknown")),
        trained=_trained(model),
        llm=str(cfg["model"]["llm"]["pretrained_model_name_or_path"]),
        vision=str(cfg["model"]["visual_encoder"]["pretrained_model_name_or_path"]),
    )


def write_model_card(
    folder: Path,
    *,
    provenance: Provenance,
    costs: str,
    settings: Mapping[str, Any],
    dtype: torch.dtype,
    config: LlavaConfig,
    mean_colour: tuple[int, ...],
) -> None:
    """Write ``README.md``.

    Args:
        folder: the export, its weights already written.
        provenance: where the model comes from.
        costs: the table of parameters, dtype and memory.
        settings: what inference must do as training did.
        dtype: of the weights.
        config: of the whole.
        mean_colour: with which pictures are padded, 0 to 255.
    """
    side = config.vision_config.image_size
    pixels = PADDING if settings["image_mode"] == "pad" else RESIZING
    name = str(dtype).removeprefix("torch.")
    tokens = settings["max_length"]
    cache = cache_bytes(config.text_config, tokens=tokens, dtype=dtype)
    text = CARD.format(
        bases_yaml=_bases_yaml(provenance.llm, provenance.vision),
        stage=provenance.stage,
        trained=provenance.trained,
        llm=_shown(provenance.llm),
        vision=_shown(provenance.vision),
        dtype=name,
        image_tokens=config.image_seq_length,
        side=side,
        vocabulary=config.text_config.vocab_size,
        image_id=config.image_token_index,
        max_length=tokens,
        template=settings["prompt_template"],
        bos="`<s>` at the beginning" if settings["add_bos"] else "no `<s>`",
        costs=costs,
        memory=(
            f"Weights take {size(folder_bytes(folder))} on disk. A conversation of {tokens:,} tokens adds "
            f"{size(cache)} of keys and values."
        ),
        usage=USAGE.format(dtype=name),
        pixels=pixels.format(side=side, colour=mean_colour),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _trained(model: Any) -> str:
    def how(part: Any, frozen: bool, name: str) -> str | None:
        if adapter_layers(part):
            return f"{name} (LoRA, merged)"
        return None if frozen else name

    return ", ".join(
        text
        for text in (
            "projector",
            how(model.visual_encoder, model.freeze_visual_encoder, "vision tower"),
            how(model.llm, model.freeze_llm, "language model"),
        )
        if text
    )


def _shown(base: str) -> str:
    """A hub name as it is; of a folder its last part, since a card is passed on and paths are not."""
    return f"`{base}`" if _is_hub_name(base) else f"`{Path(base).name}` (a folder)"


def _is_hub_name(base: str) -> bool:
    return base.count("/") == 1 and not Path(base).exists() and not base.startswith((".", "~"))


def _bases_yaml(*bases: str) -> str:
    names = [base for base in bases if _is_hub_name(base)]
    return "base_model:\n" + "".join(f"- {name}\n" for name in names) if names else ""
