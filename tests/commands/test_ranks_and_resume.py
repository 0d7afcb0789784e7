# SPDX-License-Identifier: Apache-2.0

"""One rank, two ranks, other accumulations, an interrupted run: the same weights come out.

In fp32, so that a difference is a defect and not rounding.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from gmai_xtuner.checkpoint.training import load_checkpoint_state
from gmai_xtuner.data.dataset import SoftPackedDataset
from gmai_xtuner.data.sampler import MicroBatchSampler, PackSampler
from tests.commands.runner import TINY_RUN, Xtuner, scalars
from tests.toy import record, write_corpus

pytestmark = pytest.mark.slow

FP32 = Path(__file__).with_name("zero2_fp32.json")
MAX_LENGTH = 160
EACH = (
    f"train_dataloader.dataset.max_length={MAX_LENGTH}",
    "model.llm.torch_dtype=float32",
    "default_hooks.logger.interval=1",
    "param_scheduler.warmup_ratio=0.2",
    # No rounding in the optimiser either: Adam divides tiny gradients by their own size.
    "optim_wrapper.optimizer.eps=1e-4",
    "optim_wrapper.optimizer.lr=1e-3",
)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory, tiny_bases):
    """A corpus in which few packs have an image, and the command that trains on it from a stage 1."""
    folder = tmp_path_factory.mktemp("sparse")
    records = [
        record(f"r{n}", "Which number? " + "Look closely. " * 12, f"It is number {n}.")
        if n % 6
        else record(f"r{n}", "<image>\nWhich number?", f"It is number {n}.", image=f"{n}.png")
        for n in range(24)
    ]
    corpus = write_corpus(
        folder / "corpus", {"sparse": records}, images=[f"{n}.png" for n in range(0, 24, 6)]
    )
    xtuner = Xtuner.tiny(tiny_bases, corpus.mixture, folder / "cache")
    xtuner.train("stage1_shallow", folder / "stage1", *EACH, *layout(2, 2), deepspeed=FP32)
    return folder, xtuner


def layout(batch_size: int, accumulation: int) -> tuple[str, ...]:
    return (
        f"train_dataloader.batch_size={batch_size}",
        f"optim_wrapper.accumulative_counts={accumulation}",
    )


def weights(work_dir: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint_state(work_dir)


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], start) -> None:
    assert first.keys() == second.keys()
    moved = [key for key in first if key in start and not torch.equal(first[key], start[key])]
    assert moved, "training changed nothing, the comparison would be empty"
    exact = torch.cat([value.flatten() for value in first.values()])
    assert not torch.equal(exact, exact.half().float()), "the checkpoint was read in half precision"
    for key in first:
        torch.testing.assert_close(
            first[key], second[key], rtol=1e-4, atol=5e-6, msg=lambda m, key=key: f"{key}: {m}"
        )


def packs_of_ranks(folder: Path, tiny_bases: Path, stage: str) -> list[list[list[int]]]:
    """Images of each micro-batch of each of two ranks."""
    dataset = SoftPackedDataset(
        str(folder / "corpus" / "mixture.yaml"),
        stage,
        tokenizer={
            "type": "gmai_xtuner.checkpoint.tokenizer.load_tokenizer",
            "pretrained_model_name_or_path": str(tiny_bases / "llm"),
            "padding_side": "right",
        },
        vision=str(tiny_bases / "vision"),
        cache_dir=str(folder / "cache"),
        max_length=MAX_LENGTH,
    )
    images = dataset.plan.epoch(0).total("images")
    return [
        [
            sum(int(images[ref.pack]) for ref in refs)
            for refs in MicroBatchSampler(
                PackSampler(dataset), 1, accumulative_counts=2, rank=rank, world_size=2
            )
        ]
        for rank in range(2)
    ]


def test_two_ranks_equal_one_where_a_micro_batch_has_no_image(sparse, tiny_bases):
    """Stage 3, in which everything learns; stage 2 runs on two ranks in ``test_three_stages``."""
    folder, xtuner = sparse
    stage = "stage3_instruct"
    first, second = packs_of_ranks(folder, tiny_bases, stage.split("_")[0])
    # The case that could hang: one rank has an image, the other has none.
    assert any((a == 0) != (b == 0) for a, b in zip(first, second, strict=True))

    start = (f"model.pretrained_pth={folder / 'stage1'}", "model.pretrained_parts=[projector]")
    one, two = folder / f"{stage}-one", folder / f"{stage}-two"
    xtuner.train(stage, one, *EACH, *layout(1, 4), *start, deepspeed=FP32)
    xtuner.train(stage, two, *EACH, *layout(1, 2), *start, deepspeed=FP32, ranks=2)
    assert_same(weights(one), weights(two), weights(folder / "stage1"))


def test_zero3_equals_zero2(sparse):
    """Every weight partitioned, as the large ones of the 7B are; loads, recomputes and saves alike."""
    folder, xtuner = sparse
    start = (f"model.pretrained_pth={folder / 'stage1'}", "model.pretrained_parts=[projector]")
    two, three = folder / "zero2", folder / "zero3"
    options = (*EACH, *layout(4, 1), *start, "model.loss_chunk_size=8")
    xtuner.train("stage3_instruct", two, *options, deepspeed=FP32)
    printed = xtuner.train(
        "stage3_instruct", three, *options, deepspeed=FP32.with_name("zero3_fp32.json")
    )
    assert "Loaded projector from" in printed
    assert_same(weights(two), weights(three), weights(folder / "stage1"))


def test_accumulation_does_not_change_what_is_trained(sparse):
    folder, xtuner = sparse
    runs = {}
    for batch_size, accumulation in ((1, 8), (8, 1)):
        work_dir = folder / f"accumulate-{accumulation}"
        xtuner.train(
            "stage1_shallow", work_dir, *EACH, *layout(batch_size, accumulation), deepspeed=FP32
        )
        runs[accumulation] = weights(work_dir)
    assert_same(runs[8], runs[1], weights(folder / "stage1"))


def test_a_resumed_run_equals_one_never_stopped(sparse):
    folder, xtuner = sparse
    run = folder / "resumed"
    # 24 packs in steps of 10: each epoch ends with a short step of one micro-batch.
    options = (*EACH, *layout(5, 2), "train_cfg.max_epochs=2", "train_dataloader.dataset.seed=3")
    saved = ("default_hooks.checkpoint.interval=2", "default_hooks.checkpoint.max_keep_ckpts=9")
    xtuner.train("stage1_shallow", run, *options, *saved, deepspeed=FP32)
    # Checkpoints after every second optimiser step, losses of every micro-batch.
    assert {path.name for path in run.glob("iter_*.pth")} == {
        "iter_4.pth", "iter_7.pth", "iter_10.pth"
    }  # fmt: skip
    whole = {row["step"]: row["loss"] for row in scalars(run) if "loss" in row}
    undisturbed = weights(run)
    # Every supervised token of an epoch counts once in the logged losses: their mean is near ln(1536).
    assert np.mean(list(whole.values())) == pytest.approx(np.log(1536), abs=0.3)

    resumed_from = run / "iter_4.pth"
    printed = xtuner.train("stage1_shallow", run, *options, deepspeed=FP32, resume=resumed_from)
    resumed = {row["step"]: row["loss"] for row in scalars(run) if "loss" in row}
    assert (min(resumed), max(resumed)) == (5, 10), "a resumed run begins with the next batch"
    assert "Advance dataloader" not in printed
    assert resumed == pytest.approx({k: v for k, v in whole.items() if k > 4}, rel=1e-6)
    assert_same(undisturbed, weights(run), weights(folder / "stage1"))

    # With another layout the same iteration would mean other data.
    refused = xtuner(
        "train", "configs/gmai_vl/stage1_shallow.py", "--deepspeed", FP32,
        "--work-dir", folder / "other", "--resume", resumed_from,
        "--cfg-options", *TINY_RUN, *options, *layout(2, 2),
    )  # fmt: skip
    assert "can't go on from iteration 4: batch_size: 5 -> 2" in refused
    assert not (folder / "other" / "last_checkpoint").exists()
