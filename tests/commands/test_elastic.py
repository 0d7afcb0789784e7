# SPDX-License-Identifier: Apache-2.0

"""Killed, and gone on with other ranks, ZeRO stages and micro-batches, a run equals one never stopped."""

import json
from pathlib import Path

import pytest
import torch

from gmai_xtuner.checkpoint.training import load_checkpoint_state
from tests.commands.killing import CONFIG, OPTIONS, samples_of_steps
from tests.commands.runner import ROOT, Xtuner
from tests.toy import record, write_corpus

pytestmark = pytest.mark.slow


def norms(work_dir: Path) -> list[float]:
    """Return the gradient norms that were logged, without repetitions: one a step."""
    files = sorted(work_dir.glob("*/vis_data/scalars.json"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    found = [row["grad_norm"] for row in rows if "grad_norm" in row]
    return [
        value
        for n, value in enumerate(found)
        if not n or value != pytest.approx(found[n - 1], 1e-5)
    ]


def test_one_rank_then_two_then_one_with_a_kill_between_equals_one_never_stopped(
    tmp_path, tiny_bases
):
    names = [f"{number}.png" for number in range(10)]
    question = (
        "<image>\nWhich number? " + "Look closely. " * 5
    )  # two of these are too long for a pack
    records = [record(name, question, f"It is {name}.", image=name) for name in names]
    corpus = write_corpus(tmp_path / "corpus", {"toy": records}, images=names)
    (tmp_path / "config.py").write_text(CONFIG)

    def run(
        name: str, zero: int, batch: int, count: int, kill: str = "none:0:0", ranks: int = 1
    ) -> str:
        xtuner = Xtuner.tiny(
            tiny_bases, corpus.mixture, tmp_path / "cache", GMAI_TEST_KILL=kill, PYTHONPATH=ROOT
        )
        return xtuner(
            "train", tmp_path / "config.py", "--work-dir", tmp_path / name, "--resume", tmp_path / name,
            "--deepspeed", Path(__file__).with_name(f"zero{zero}_fp32.json"), "--cfg-options", *OPTIONS,
            f"train_dataloader.batch_size={batch}", f"optim_wrapper.accumulative_counts={count}", ranks=ranks,
        )  # fmt: skip

    run("whole", 2, 1, 4)
    order = [file.read_text().splitlines() for file in (tmp_path / "whole").glob("*/seen-0.jsonl")]
    ids = [name for line in order[0] for name in json.loads(line)[1]]
    # Ten packs an epoch in steps of four, four and two; each pack of one micro-batch on one rank.
    cuts = (0, 4, 8, 10, 14, 18, 20)
    expected = {n + 1: sorted(ids[cuts[n] : cuts[n + 1]]) for n in range(6)}
    assert sorted(ids) == sorted(2 * [f"toy/{name}" for name in names])

    run("cut", 2, 1, 4, kill="between:10:0")  # in step 3, which is made again
    said = run("cut", 3, 1, 2, kill="between:8:1", ranks=2)  # in step 5
    assert "iter_8.pth is divided anew: GPUs: 1 -> 2, ZeRO stage: 2 -> 3" in said
    assert "step 2, iteration 8 until now, is iteration 4 from here on" in said
    said = run("cut", 2, 2, 2)
    assert "iter_7.pth is divided anew: GPUs: 2 -> 1, ZeRO stage: 3 -> 2" in said
    assert "step 4, iteration 7 until now, is iteration 7 from here on" in said

    assert samples_of_steps(tmp_path / "whole") == samples_of_steps(tmp_path / "cut") == expected
    assert norms(tmp_path / "cut") == pytest.approx(norms(tmp_path / "whole"), rel=1e-5)
    one, other = (load_checkpoint_state(tmp_path / name) for name in ("whole", "cut"))
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-5, atol=1e-6, msg=key)
