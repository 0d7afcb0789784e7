"""An export of this project, in any layout that :func:`gmai_xtuner.loading.load_model` reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from gmai_xtuner.checkpoint.adapters import adapter_base
from gmai_xtuner.checkpoint.layouts import layout_of
from gmai_xtuner.checkpoint.starting_points import is_xtuner_layout
from gmai_xtuner.checkpoint.weight_files import read_json
from gmai_xtuner.evaluate.answerers.local import LocalAnswerer, Pictures
from gmai_xtuner.evaluate.fingerprint import hash_files
from gmai_xtuner.generate import Predictor, Prompt, user_turn


class OurAnswerer(LocalAnswerer):
    """Asks with the template and the image path of training.

    Args:
        predictor: the model.
        name: as tables call it.
        model: its hash.
        batch_size: questions asked together.
    """

    def __init__(self, predictor: Predictor, *, name: str, model: str, batch_size: int) -> None:
        super().__init__(
            name=name,
            model=model,
            generation={
                "decoding": "greedy",
                "precision": str(next(predictor.model.parameters()).dtype).removeprefix("torch."),
            },
            batch_size=batch_size,
        )
        self.predictor = predictor

    def generate(
        self, prompts: Sequence[str], pictures: Sequence[Pictures], max_new_tokens: int
    ) -> list[str]:
        return self.predictor.generate_batch(
            [
                Prompt((user_turn(prompt, len(own)),), tuple(own))
                for prompt, own in zip(prompts, pictures, strict=True)
            ],
            max_new_tokens=max_new_tokens,
        )


def load_ours(
    folder: Path,
    *,
    name: str,
    llm: str | None,
    vision: str | None,
    dtype: torch.dtype | None,
    device: torch.device,
    batch_size: int,
    cache: Path,
) -> OurAnswerer:
    """Load an export and hash what it was loaded from.

    Args:
        folder: the export.
        name: as tables call it.
        llm, vision: bases, where the export has none.
        dtype: None: bf16 on a GPU, fp32 on the CPU.
        device: where it runs.
        batch_size: questions asked together.
        cache: folder where hashes are remembered.

    Raises:
        ModelLoadError: see :func:`gmai_xtuner.loading.load_model`.
    """
    from gmai_xtuner.loading import load_model

    predictor = load_model(folder, llm=llm, vision=vision, dtype=dtype, device=device)
    parts = {"model": folder} | {
        key: local_folder(base) for key, base in bases_of(folder, llm, vision).items()
    }
    return OurAnswerer(
        predictor, name=name, model=hash_files(parts, cache=cache), batch_size=batch_size
    )


def bases_of(folder: Path, llm: str | None, vision: str | None) -> dict[str, str]:
    """Part -> base outside an export that it is loaded from: named by the caller, or by its own files.

    An adapter names its base, a folder in LLaVA's layout its vision tower.

    Args:
        folder: an export that has just been loaded.
        llm, vision: bases as the caller named them.
    """
    found = {"llm": llm, "vision": vision}
    if is_xtuner_layout(folder):
        for part, name in (("llm", "llm_adapter"), ("vision", "visual_encoder_adapter")):
            if found[part] is None and (folder / name).is_dir():
                found[part] = adapter_base(folder / name)
    else:
        config = read_json(folder / "config.json")
        if layout_of(config) != "plain":
            found["vision"] = vision or config.get("mm_vision_tower")
    return {part: base for part, base in found.items() if base}


def local_folder(name: str) -> Path:
    """Where the files of a folder or of a hub name lie that has just been loaded."""
    if Path(name).exists():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, local_files_only=True))
