# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gmai_xtuner.core.constants import IGNORE_INDEX
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.data.dataset import PackRef, collate_packs
from gmai_xtuner.data.packing import Packs
from gmai_xtuner.data.plan import EpochPlan
from gmai_xtuner.data.sampler import MicroBatchSampler, PackSampler


@dataclass
class Dataset:
    """As much of a packed dataset as a sampler reads; is its own plan.

    ``labels[pack]`` are the numbers of supervised tokens of the pack's conversations.
    """

    labels: list[list[int]]

    @property
    def plan(self) -> Dataset:
        return self

    def __len__(self) -> int:
        return len(self.labels)

    def epoch(self, epoch: int) -> EpochPlan:
        """The packs turn by one place an epoch, so that epochs differ."""
        rows = [
            (0, 0, len(pack), sum(pack), sum(number**0.5 for number in pack))
            for pack in np.roll(np.array(self.labels, dtype=object), epoch)
        ]
        return EpochPlan(
            Packs(np.zeros(len(self) + 1), np.zeros(0)), np.array(rows, dtype=float), str(epoch)
        )

    def item(self, ref: PackRef) -> dict:
        """The pack as the packed dataset gives it, without text: one context token each."""
        numbers = np.roll(np.array(self.labels, dtype=object), ref.epoch)[ref.pack]
        labels = [label for number in numbers for label in [IGNORE_INDEX] + [7] * number]
        return {
            "input_ids": torch.full((len(labels),), 7),
            "labels": torch.tensor([IGNORE_INDEX] * len(labels) if ref.filler else labels),
            "lengths": [number + 1 for number in numbers],
            "pixel_values": torch.zeros(0, 3, 2, 2),
            "ids": [f"{ref.pack}" for _ in numbers],
            "num_tokens": len(labels),
            "capacity": 100,
        }


def toy_dataset(packs: int) -> Dataset:
    rng = np.random.default_rng(packs)
    return Dataset([rng.integers(1, 9, rng.integers(1, 4)).tolist() for _ in range(packs)])


def samplers(packs: int, *, world: int, batch: int, accumulation: int, weighting: str = "token"):
    """One sampler a rank, each with its own PackSampler as in a real run."""
    dataset = toy_dataset(packs)
    return dataset, [
        MicroBatchSampler(
            PackSampler(dataset),
            batch,
            accumulative_counts=accumulation,
            weighting=weighting,
            rank=rank,
            world_size=world,
        )
        for rank in range(world)
    ]


def packs_of(batch: list[PackRef]) -> list[int]:
    return [ref.pack for ref in batch if not ref.filler]


@st.composite
def runs(draw) -> dict[str, int]:
    return {
        "packs": draw(st.integers(1, 40)),
        "world": draw(st.integers(1, 4)),
        "batch": draw(st.integers(1, 4)),
        "accumulation": draw(st.integers(1, 4)),
    }


def test_the_modules_drawing():
    _, ranks = samplers(11, world=2, batch=2, accumulation=2)
    drawn = [
        [(packs_of(batch), sampler.step_ends(number)) for number, batch in enumerate(sampler)]
        for sampler in ranks
    ]
    assert drawn == [
        [([0, 2], False), ([4, 6], True), ([8, 10], True)],
        [([1, 3], False), ([5, 7], True), ([9], True)],
    ]
    assert [(len(sampler), sampler.steps, sampler.packs_per_step) for sampler in ranks] == [
        (3, 2, 8)
    ] * 2


@given(runs())
def test_every_pack_is_trained_on_once_and_ranks_agree(run):
    _, ranks = samplers(**run)
    epoch = [list(sampler) for sampler in ranks]
    trained = Counter(pack for batches in epoch for batch in batches for pack in packs_of(batch))
    assert trained == dict.fromkeys(range(run["packs"]), 1)
    assert {len(batches) for batches in epoch} == {len(ranks[0])}
    for across in zip(*epoch, strict=True):
        assert all(batch for batch in across)  # a rank without packs still runs the pass
        assert all(len(batch) <= run["batch"] for batch in across)
    for number in range(len(ranks[0])):
        assert (
            len({(rank.loss_denominator(0, number), rank.step_ends(number)) for rank in ranks}) == 1
        )
    ends = [ranks[0].step_ends(number) for number in range(len(ranks[0]))]
    assert sum(ends) == ranks[0].steps
    assert ends[-1]
    made = [ranks[0].steps_after(iterations) for iterations in range(2 * len(ends) + 1)]
    assert np.diff(made).tolist() == ends * 2


@given(runs(), st.sampled_from(["token", "sample", "square"]), st.integers(0, 2))
def test_weights_of_a_step_sum_to_one_after_the_engines_means(run, weighting, epoch):
    """DeepSpeed divides by the accumulation, whatever the step holds, and averages over ranks."""
    dataset, ranks = samplers(**run, weighting=weighting)
    sums: Counter[int] = Counter()
    for sampler in ranks:
        sampler.set_position(epoch, 0)
        step = 0
        for number, refs in enumerate(sampler):
            packs = [dataset.item(ref) for ref in refs]
            weights = collate_packs(packs, weighting=weighting)["data"]["label_weights"]
            sums[step] += float(weights.double().sum()) / sampler.loss_denominator(epoch, number)
            step += sampler.step_ends(number)
    assert len(sums) == ranks[0].steps
    for total in sums.values():
        assert total / (run["accumulation"] * run["world"]) == pytest.approx(1, rel=1e-5)


@given(runs())
def test_micro_batch_weighting_is_the_mean_of_each_micro_batch(run):
    dataset, ranks = samplers(**run, weighting="micro_batch")
    for sampler in ranks:
        for number, refs in enumerate(sampler):
            data = collate_packs([dataset.item(ref) for ref in refs])["data"]
            weight = float(data["label_weights"].sum()) / sampler.loss_denominator(0, number)
            assert weight == pytest.approx(0.0 if refs[0].filler else 1.0)


@given(runs(), st.integers(0, 3), st.data())
def test_set_position_gives_exactly_the_rest_of_the_epoch(run, epoch, data):
    _, ranks = samplers(**run)
    _, resumed = samplers(**run)
    position = data.draw(st.integers(0, len(ranks[0]) - 1))
    for whole, rest in zip(ranks, resumed, strict=True):
        whole.set_position(epoch, 0)
        rest.set_position(epoch, position)
        assert list(rest) == list(whole)[position:]
        assert [batch[0].epoch for batch in rest] == [epoch] * len(rest)  # next: from the start


@pytest.mark.parametrize("packs", [16, 21])
def test_batch_and_accumulation_trade_against_each_other(packs):
    """1 x 8, 2 x 4 and 8 x 1 take the same packs in each optimiser step."""

    def steps(batch: int, accumulation: int) -> list[set[int]]:
        _, (sampler,) = samplers(packs, world=1, batch=batch, accumulation=accumulation)
        taken: list[set[int]] = [set()]
        for number, refs in enumerate(sampler):
            taken[-1] |= set(packs_of(refs))
            if sampler.step_ends(number):
                taken.append(set())
        return taken[:-1]

    assert steps(1, 8) == steps(2, 4) == steps(8, 1)
    assert steps(1, 8)[0] == set(range(8))


@pytest.mark.parametrize(("asked", "trained"), [(1, 2), (2, 2), (3, 4), (5, 5), (6, 7), (10, 10)])
def test_a_run_never_ends_inside_a_step(asked, trained):
    """Five micro-batches an epoch in steps of two: the last step is short."""
    _, (sampler,) = samplers(5, world=1, batch=1, accumulation=2)
    assert sampler.run_length(None, asked) == trained
    assert sampler.run_length(asked / 5, None) == trained
    assert sampler.steps_after(9) == 3 + 2


@pytest.mark.parametrize("lengths", [(None, None), (1, 10)])
def test_a_run_has_one_length(lengths):
    _, (sampler,) = samplers(5, world=1, batch=1, accumulation=2)
    with pytest.raises(GMAIError, match="needs either max_iters or max_epochs"):
        sampler.run_length(*lengths)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 1, "weighting": "tokens"}, "weighting must be one of token, sample"),
        ({"batch_size": 0}, "must be at least 1, got 0 and 1"),
        ({"batch_size": 1, "accumulative_counts": 0}, "must be at least 1, got 1 and 0"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(GMAIError, match=message):
        MicroBatchSampler(PackSampler(toy_dataset(3)), **options)
