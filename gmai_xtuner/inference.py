"""Ask a trained model.

Shapes: ``T`` tokens of the prompt, image tokens counted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModel, PreTrainedTokenizerFast

from gmai_xtuner.constants import IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from gmai_xtuner.datasets.conversation import Turn
from gmai_xtuner.datasets.images import ImageTransform, open_rgb
from gmai_xtuner.datasets.tokenization import ChatTemplate, ConversationTokenizer
from gmai_xtuner.errors import ModelLoadError
from gmai_xtuner.models.export import SETTINGS, SETTINGS_FILE
from gmai_xtuner.models.internlm2 import load_language_model
from gmai_xtuner.models.llava import GMAILLaVAModel
from gmai_xtuner.models.tokenizer import load_tokenizer
from gmai_xtuner.models.vision import load_vision_tower, num_image_tokens

ImageLike = str | Path | Image.Image


class Predictor:
    """Answers questions about images, greedily.

    Args:
        model: the model, in evaluation mode on its device.
        tokenizer: its tokenizer.
        template: how turns become text; the one of training.
        transform: image to pixels; the one of training.
    """

    def __init__(
        self,
        model: GMAILLaVAModel,
        *,
        tokenizer: PreTrainedTokenizerFast,
        template: ChatTemplate,
        transform: ImageTransform,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.transform = transform
        self.encoder = ConversationTokenizer.from_pretrained(tokenizer, template)
        stop = tokenizer.convert_tokens_to_ids(template.suffix) if template.suffix_is_eos else None
        self.stop_ids = [i for i in (stop, tokenizer.eos_token_id) if i is not None]

    def answer(
        self,
        question: str,
        images: Sequence[ImageLike] = (),
        *,
        system: str | None = None,
        max_new_tokens: int = 256,
    ) -> str:
        """Answer one question.

        Args:
            question: text; may hold ``<image>`` marks. Without any, the images come first, each on a
                line, as in training.
            images: paths or opened images.
            system: system turn.
            max_new_tokens: length of the answer at the most.

        Raises:
            ValueError: marks and images differ in number.
        """
        turns = (Turn("system", system),) if system else ()
        text = question if IMAGE_TOKEN in question else f"{IMAGE_TOKEN}\n" * len(images) + question
        return self.generate((*turns, Turn("user", text)), images, max_new_tokens=max_new_tokens)

    def generate(
        self, turns: Sequence[Turn], images: Sequence[ImageLike], *, max_new_tokens: int = 256
    ) -> str:
        """The assistant's next turn, greedily."""
        marks = sum(turn.text.count(IMAGE_TOKEN) for turn in turns)
        if marks != len(images):
            raise ValueError(f"{marks} {IMAGE_TOKEN} marks in the text, but {len(images)} images")
        ids = self.encoder.encode_prompt(turns)
        return self.go_on(ids, images, max_new_tokens=max_new_tokens)

    # Not inference_mode: weights that ZeRO-3 gathers inside could not be trained afterwards.
    @torch.no_grad()
    def go_on(
        self,
        ids: np.ndarray,
        images: Sequence[ImageLike],
        *,
        max_new_tokens: int = 256,
        synced_gpus: bool = False,
    ) -> str:
        """What follows a tokenised prompt, greedily.

        Args:
            ids: the prompt with one placeholder an image.
            images: paths or opened images.
            max_new_tokens: length of the answer at the most.
            synced_gpus: every rank runs as many passes as the longest of them, as ZeRO-3 needs.
        """
        arguments = self._arguments(ids.astype(np.int64), images, max_new_tokens)
        output = self.model.llm.generate(**arguments, synced_gpus=synced_gpus)[0]
        return self.tokenizer.decode(output, skip_special_tokens=True).strip()

    def _arguments(
        self, ids: np.ndarray, images: Sequence[ImageLike], max_new_tokens: int
    ) -> dict[str, object]:
        device = self.model.llm.device
        tokens = num_image_tokens(self.model.visual_encoder.config)
        widened = torch.from_numpy(
            np.repeat(ids, np.where(ids == IMAGE_TOKEN_INDEX, tokens, 1))
        ).to(device)
        size = self.transform.image_size
        pixels = [
            self.transform(
                image.convert("RGB") if isinstance(image, Image.Image) else open_rgb(image)
            )
            for image in images
        ]
        embeds = self.model.embed(
            widened[None],
            torch.stack(pixels).to(device)
            if pixels
            else torch.zeros(0, 3, size, size, device=device),
            torch.nonzero(widened == IMAGE_TOKEN_INDEX).flatten(),
        )
        return {
            "inputs_embeds": embeds,
            "attention_mask": torch.ones(embeds.shape[:2], dtype=torch.long, device=device),
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            "temperature": None,
            "top_p": None,
            "top_k": None,
            "use_cache": True,
            "eos_token_id": self.stop_ids,
            "pad_token_id": self.stop_ids[-1],
        }


def load_export(
    folder: str | Path,
    *,
    llm: str | None = None,
    vision: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Predictor:
    """Load what ``xtuner convert pth_to_hf`` wrote.

    Args:
        folder: the export. Stage 3 has all parts; stages 1 and 2 lack those they did not train.
        llm: the language model's base, where the export has none.
        vision: the vision tower's base, where the export has none.
        dtype: default: bf16 on a GPU, fp32 on the CPU.
        device: default: the GPU if there is one.

    Raises:
        ModelLoadError: a part is missing; says which base to name.
    """
    folder = Path(folder)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    if not (folder / "projector").is_dir():
        raise ModelLoadError(
            f"{str(folder)!r} is not an export in xtuner's layout (it has no projector/). "
            "Make one with: xtuner convert pth_to_hf CONFIG CHECKPOINT FOLDER"
        )
    for name in ("llm_adapter", "visual_encoder_adapter"):
        if (folder / name).exists():
            raise ModelLoadError(
                f"{str(folder)!r} has {name}/, which is not merged and would be left out. Merge it with "
                "xtuner convert merge; exports of this project are merged already"
            )
    llm_path = _part(folder, folder / "config.json", llm, "language model", "llm")
    vision_path = _part(
        folder / "visual_encoder", folder / "visual_encoder", vision, "vision tower", "vision"
    )
    file = folder / SETTINGS_FILE
    settings: dict[str, Any] = {**SETTINGS, "visual_select_layer": -2}
    if file.is_file():
        settings.update(json.loads(file.read_text(encoding="utf-8")))
    model = GMAILLaVAModel(
        llm=load_language_model(llm_path, torch_dtype=dtype),
        visual_encoder=load_vision_tower(vision_path, torch_dtype=dtype),
        visual_select_layer=settings["visual_select_layer"],
        use_activation_checkpointing=False,
    )
    model.projector = AutoModel.from_pretrained(folder / "projector", torch_dtype=dtype)
    return Predictor(
        model.to(device),
        tokenizer=load_tokenizer(llm_path),
        template=ChatTemplate.from_xtuner(settings["prompt_template"], add_bos=settings["add_bos"]),
        transform=ImageTransform.from_pretrained(vision_path, mode=settings["image_mode"]),
    )


def _part(inside: Path, proof: Path, base: str | None, what: str, option: str) -> str:
    if proof.exists():
        if base is not None:
            raise ModelLoadError(f"the export has its own {what}; leave {option} out")
        return str(inside)
    if base is None:
        raise ModelLoadError(
            f"the export has no {what} (its stage did not train it); name the base with {option}=..."
        )
    return base
