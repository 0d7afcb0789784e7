"""An export of this project, in any layout that :func:`gmai_xtuner.loading.load_model` reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from gmai_xtuner.evaluation.answerers.local import LocalAnswerer, Pictures
from gmai_xtuner.evaluation.fingerprint import hash_files
from gmai_xtuner.inference import Predictor, Prompt, user_turn


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
    bases = {"llm": llm, "vision": vision}
    parts = {"model": folder, **{key: local_folder(base) for key, base in bases.items() if base}}
    return OurAnswerer(
        predictor, name=name, model=hash_files(parts, cache=cache), batch_size=batch_size
    )


def local_folder(name: str) -> Path:
    """Where the files of a folder or of a hub name lie that has just been loaded."""
    if Path(name).exists():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, local_files_only=True))
