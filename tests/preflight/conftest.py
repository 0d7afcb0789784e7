# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable
from pathlib import Path

import pytest

from gmai_xtuner.preflight import survey
from gmai_xtuner.preflight.memory import GIB, Memory, Step
from gmai_xtuner.preflight.run_config import load_run
from gmai_xtuner.preflight.survey import Preflight, look_at
from tests.preflight.bases import write_true_geometry
from tests.toy import Corpus, record

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def true_bases(tmp_path_factory, tiny_bases) -> Path:
    """InternLM2.5-7B's and CLIP ViT-L/14-336's config.json; a tiny tokenizer, no weights. Read only."""
    folder = tmp_path_factory.mktemp("true")
    write_true_geometry(folder / "bases", tiny=tiny_bases)
    return folder / "bases"


@pytest.fixture
def corpus(make_corpus) -> Corpus:
    """Two datasets of 30 records, 20 of them with an image."""
    pictures = [f"{index}.png" for index in range(20)]
    records = {
        name: [
            *(
                record(f"{name}{index}", "<image>\nWhat?", "A CT scan.", image=picture)
                for index, picture in enumerate(pictures[10 * half : 10 * half + 10])
            ),
            *(record(f"{name}-text{index}", "Why? " * index, "No.") for index in range(1, 6)),
        ]
        for half, name in enumerate(("a", "b"))
    }
    return make_corpus(records, images=pictures)


@pytest.fixture
def preflight(monkeypatch, tiny_bases, tmp_path) -> Callable[..., Preflight]:
    """Look at a stage's run on tiny bases, in this process."""

    def run(
        mixture: Path,
        stage: str = "stage1_shallow",
        *,
        bases: Path = tiny_bases,
        deepspeed: str = "zero2",
        gpus: int = 1,
        options: dict | None = None,
        count: Callable[[Step], Memory] | None = None,
        **looks,
    ) -> Preflight:
        for name, value in {
            "GMAI_LLM": bases / "llm",
            "GMAI_VISION": bases / "vision",
            "GMAI_MIXTURE": mixture,
            "GMAI_CACHE": tmp_path / "cache",
            "GMAI_STAGE1": tmp_path / "stage1",
            "GMAI_STAGE2": tmp_path / "stage2",
        }.items():
            monkeypatch.setenv(name, str(value))

        # Counting takes seconds, and has tests of its own. A layer that isn't recomputed keeps 1 GiB here.
        def counted(step: Step) -> Memory:
            kept = (33 - step.model.get("recomputed_layers", 32)) * step.batch.packs * GIB
            weights = 16 * GIB // (step.gpus if step.zero.stage == 3 else 1)
            return Memory(weights, 12 * GIB, kept, {"backward pass": kept + GIB}, 0)

        monkeypatch.setattr(survey, "count_memory", count or counted)
        config = load_run(
            str(ROOT / "configs" / "gmai_vl" / f"{stage}.py"),
            deepspeed=deepspeed,
            gpus=gpus,
            options={
                "train_dataloader.dataset.num_workers": 1,
                "train_dataloader.dataset.held_out": 0.0,
                **(options or {}),
            },
            work_dir=str(tmp_path / "work"),
        )
        return look_at(config, **looks)

    return run
