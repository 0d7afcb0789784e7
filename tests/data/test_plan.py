# SPDX-License-Identifier: Apache-2.0

import hashlib
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from gmai_xtuner.core.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.data import plan as plan_module
from gmai_xtuner.data.dataset import collate_packs
from gmai_xtuner.data.plan import TOTALS, DataPlan, _open_epoch
from tests.data.conftest import run_at_once
from tests.data.test_held_out import write_cache


@dataclass
class Cache:
    """As much of a token cache as a plan reads: the folder's name, what it holds, and the counts."""

    folder: Path
    counts: np.ndarray  # int32 [conversations, 3]: tokens, supervised tokens, images

    @property
    def meta(self) -> dict[str, str]:
        return {"content": hashlib.sha256(self.counts.tobytes()).hexdigest()}

    def __len__(self) -> int:
        return len(self.counts)


def toy_cache(name: str, size: int, *, seed: int = 0) -> Cache:
    rng = np.random.default_rng([seed, size])
    images = rng.integers(0, 3, size)
    labels = rng.integers(1, 40, size)
    tokens = labels + 20 + 8 * images
    return Cache(Path(name), np.stack([tokens, labels, images], axis=1).astype(np.int32))


SIZES = {"one": 100, "two": 60, "three": 30, "new": 10}


def toy_plan(cache_dir: Path, *caches: Cache, names=("one", "two"), **changes) -> DataPlan:
    fixed = {"seed": 0, "max_length": 128, "max_images": 3, "cache_dir": cache_dir}
    made = caches or [toy_cache(name, SIZES[name]) for name in names]
    return DataPlan(made, names=names, **{**fixed, "ratios": (2.5, 0.5), **changes})


def drawn(plan: DataPlan, name: str) -> list[int]:
    """Rows of one dataset that the plan trains on."""
    number = plan.names.index(name)
    return plan.samples[plan.samples[:, 0] == number, 1].tolist()


def test_ratio_of_two_and_a_half_is_each_conversation_twice_or_three_times(tmp_path):
    plan = toy_plan(tmp_path)
    times = Counter(drawn(plan, "one"))
    assert len(times) == 100
    assert Counter(times.values()) == {2: 50, 3: 50}
    once = Counter(drawn(plan, "two"))
    assert len(once) == 30
    assert set(once.values()) == {1}


def test_a_further_dataset_leaves_the_samples_of_the_others(tmp_path):
    two = toy_plan(tmp_path)
    three = toy_plan(tmp_path, names=("one", "two", "three"), ratios=(2.5, 0.5, 1.0))
    first = toy_plan(tmp_path, names=("new", "one"), ratios=(1.0, 2.5))
    assert two.folder != three.folder
    assert len(three.samples) == len(two.samples) + 30
    for name in ("one", "two"):
        assert drawn(three, name) == drawn(two, name)
    assert drawn(first, "one") == drawn(two, "one")  # its number is another, its name decides


def test_totals_are_those_of_the_packs(tmp_path):
    plan = toy_plan(tmp_path)
    epoch = plan.epoch(1)
    assert TOTALS == ("tokens", "images", "conversations", "labels", "sqrt_labels")
    seen: list[int] = []
    for number in range(len(epoch.packs)):
        members = epoch.packs[number].tolist()
        seen += members
        counts = [
            plan.caches[dataset].counts[row].tolist() for dataset, row in plan.samples[members]
        ]
        expected = [
            sum(tokens for tokens, _, _ in counts),
            sum(images for _, _, images in counts),
            len(members),
            sum(labels for _, labels, _ in counts),
            sum(labels**0.5 for _, labels, _ in counts),
        ]
        assert epoch.totals[number] == pytest.approx(expected)
        assert epoch.total("labels")[number] == expected[3]
    assert sorted(seen) == list(range(len(plan.samples)))
    assert epoch.total("tokens").max() <= 128
    assert epoch.total("images").max() == 3  # the bound binds


def test_digest_tells_which_conversations_share_a_pack(tmp_path):
    first = toy_plan(tmp_path / "a").epoch(0)
    same, other = toy_plan(tmp_path / "b").epoch(0), toy_plan(tmp_path / "a").epoch(1)
    assert first.digest == same.digest != other.digest
    assert len(first.digest) == 64


def test_an_epoch_of_another_version_is_refused(tmp_path, monkeypatch):
    plan = toy_plan(tmp_path)
    plan.epoch(0)
    original = plan_module.pack
    monkeypatch.setattr(
        plan_module,
        "pack",
        lambda lengths, **options: original(lengths, **{**options, "max_length": 100}),
    )
    with pytest.raises(GMAIError, match=r"epoch 1 has \d+ packs, epoch 0 \d+.*Remove .*plans"):
        plan.epoch(1)


def test_a_second_plan_opens_the_first_ones_files(tmp_path, monkeypatch):
    first = toy_plan(tmp_path)
    items = first.epoch(0).packs.items.tolist()

    def refuse(*_, **__):
        raise AssertionError("built again")

    monkeypatch.setattr(plan_module, "pack", refuse)
    monkeypatch.setattr(plan_module, "sample_indices", refuse)
    second = toy_plan(tmp_path)
    assert second.epoch(0).packs.items.tolist() == items
    assert isinstance(second.epoch(0).packs.items, np.memmap)
    with pytest.raises(AssertionError, match="built again"):
        second.epoch(1)  # was never made, so the guard above does stand in the way


@pytest.mark.parametrize(
    "change", ["ratios", "seed", "cache", "max_length", "max_images", "at_most"]
)
def test_whatever_the_plan_depends_on_makes_another_one(tmp_path, change):
    def build(cache: str = "one-0123", **changes) -> DataPlan:
        one = {"names": ["one"], "ratios": [1.0]}
        return toy_plan(tmp_path, toy_cache(cache, 100), **{**one, **changes})

    changed = {
        "ratios": [2.0],
        "seed": 1,
        "cache": "one-4567",
        "max_length": 127,
        "max_images": 4,
        "at_most": 9,
    }
    assert build().folder == build().folder
    assert build().folder != build(**{change: changed[change]}).folder


def test_a_plan_of_which_a_file_is_cut_off_is_made_anew(tmp_path):
    plan = toy_plan(tmp_path)
    plan.epoch(1)
    whole = {path.name: path.read_bytes() for path in plan.folder.glob("*.npy")}
    assert len(whole) >= 6
    for name, content in whole.items():
        (plan.folder / name).write_bytes(content[: len(content) // 2])
        _open_epoch.cache_clear()
        again = toy_plan(tmp_path)
        again.epoch(1)
        assert (plan.folder / name).read_bytes() == content


def test_two_processes_at_once_build_one_plan(tmp_path, monkeypatch):
    builds = tmp_path / "builds"
    builds.mkdir()

    def slow_pack(*args, **kwargs):
        (builds / str(os.getpid())).touch()
        time.sleep(0.5)  # long enough for the other to find the files missing
        return original(*args, **kwargs)

    original = plan_module.pack
    monkeypatch.setattr(plan_module, "pack", slow_pack)

    def build() -> tuple[list[int], list[int]]:
        plan = toy_plan(tmp_path / "cache")
        return plan.samples.tolist(), plan.epoch(0).packs.items.tolist()

    first, second = run_at_once(build)
    assert first == second
    assert len(list(builds.iterdir())) == 1


def test_a_cache_that_was_made_anew_with_other_rows_gets_a_new_plan(tmp_path):
    """An image was mended and the cache removed, as the log advises: same key, one more row."""
    plans = []
    for size in (29, 30):
        cache = toy_cache("same-folder", size)
        plan = toy_plan(tmp_path, cache, names=["one"], ratios=[1.0], max_images=8)
        assert plan.epoch(0).total("tokens").sum() == cache.counts[:, 0].sum()
        plans.append(plan.folder)
    assert plans[0] != plans[1]


def split_cache(folder: Path, name: str, images: int, *, each: int) -> Cache:
    """``images * each`` conversations, ``each`` of an image."""
    rows = [(f"{name}{number}", [f"{number // each}.png"]) for number in range(images * each)]
    counts = np.tile(np.array([[30, 10, 1]], dtype=np.int32), (len(rows), 1))
    if not (folder / name).is_dir():
        write_cache(folder / name, rows)
    return Cache(folder / name, counts)


def split_plan(tmp_path: Path, **changes) -> DataPlan:
    caches = [split_cache(tmp_path, "one", 100, each=2), split_cache(tmp_path, "two", 150, each=3)]
    return toy_plan(tmp_path / "plans", *caches, **{"held_out": 0.1, **changes})


def images_of(plan: DataPlan) -> set[int]:
    each = np.array([2, 3])
    return set((plan.samples[:, 1] // each[plan.samples[:, 0]]).tolist())


def test_no_image_is_trained_on_and_held_out(tmp_path):
    train, held = split_plan(tmp_path), split_plan(tmp_path, split="held_out")
    assert train.folder != held.folder
    assert not images_of(train) & images_of(held)
    assert len(images_of(held)) > 5
    # Both sides together are everything, in both datasets.
    for number, size in ((0, 200), (1, 450)):
        rows = [plan.samples[plan.samples[:, 0] == number, 1] for plan in (train, held)]
        assert len(set(rows[1].tolist())) == len(rows[1]), "held-out ones are taken once"
        available = size - len(rows[1])
        assert len(rows[0]) == round(available * train.ratios[number])
        if number == 0:
            assert set(rows[0].tolist()) | set(rows[1].tolist()) == set(range(size))
    counts = train.held_out_counts()
    assert counts.tolist() == held.held_out_counts().tolist()
    assert counts.tolist() == [[(held.samples[:, 0] == number).sum(), 0] for number in (0, 1)]


def test_at_most_bounds_each_dataset(tmp_path):
    held = split_plan(tmp_path, split="held_out", at_most=4)
    assert np.bincount(held.samples[:, 0]).tolist() == [4, 4]
    everything = split_plan(tmp_path, split="held_out")
    assert set(map(tuple, held.samples.tolist())) < set(map(tuple, everything.samples.tolist()))


def test_held_out_conversations_depend_on_neither_seed_nor_ratios(tmp_path):
    one = split_plan(tmp_path, split="held_out")
    two = split_plan(tmp_path, split="held_out", seed=1, ratios=[0.1, 3.0])
    assert one.folder != two.folder
    assert one.samples.tolist() == two.samples.tolist()


def test_nothing_is_held_out_unless_asked_for(tmp_path):
    plan = split_plan(tmp_path, held_out=0.0)
    assert plan.held_out_counts().tolist() == [[0, 0], [0, 0]]
    assert len(plan.samples) == 500 + 225
    assert len(split_plan(tmp_path, held_out=0.0, split="held_out").samples) == 0


@pytest.mark.parametrize("changes", [{"held_out": 1.0}, {"held_out": -0.1}, {"split": "test"}])
def test_shares_and_splits_that_make_no_sense_are_refused(tmp_path, changes):
    with pytest.raises(GMAIError, match="held_out must be a share of at least 0 and below 1"):
        split_plan(tmp_path, **changes)


X = IGNORE_INDEX


def pack(input_ids: list[int], labels: list[int], lengths: list[int], *, images: int = 0) -> dict:
    """An item of the packed dataset; its pixel values are its first id."""
    return {
        "input_ids": torch.tensor(input_ids),
        "labels": torch.tensor(labels),
        "lengths": lengths,
        "pixel_values": torch.full((images, 3, 2, 2), float(input_ids[0])),
        "ids": [f"toy/{length}" for length in lengths],
        "num_tokens": sum(lengths),
        "capacity": 10,
    }


def drawing() -> list[dict]:
    """The module's drawing: context 1, 2, 3 of A, B, C; supervised 11, 12, 13."""
    return [pack([1, 11, 11, 2, 12], [X, 11, 11, X, 12], [3, 2]), pack([3, 3, 13], [X, X, 13], [3])]


def test_the_modules_drawing():
    data = collate_packs(drawing())["data"]
    assert data["input_ids"].tolist() == [[1, 11, 11, 2, 12, 3, 3, 13]]
    assert data["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert data["cu_seqlens"].tolist() == [0, 3, 5, 8]
    assert data["cu_seqlens"].dtype == torch.int32
    assert data["lengths"] == [3, 2, 3]
    assert data["label_positions"].tolist() == [0, 1, 3, 6]
    assert data["label_targets"].tolist() == [11, 11, 12, 13]
    assert (data["num_tokens"], data["capacity"]) == (8, 20)
    assert data["ids"] == ["toy/3", "toy/2", "toy/3"]


def test_first_label_of_each_conversation_is_masked():
    """Else the end of one conversation would be made to predict the beginning of the next."""
    packs = [pack([1, 11, 2, 12], [1, 11, 2, 12], [2, 2]), pack([3, 13], [3, 13], [2])]
    data = collate_packs(packs)["data"]
    assert data["label_targets"].tolist() == [11, 12, 13]
    assert data["label_positions"].tolist() == [0, 2, 4]  # each within its own conversation
    assert packs[0]["labels"].tolist() == [1, 11, 2, 12]  # the caller's are left alone
    collate_packs(packs[1:])
    assert packs[1]["labels"].tolist() == [3, 13]  # even of a single one


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("token", [1, 1, 1, 1, 1, 1, 1]),
        ("micro_batch", [1, 1, 1, 1, 1, 1, 1]),
        ("sample", [0.25, 0.25, 0.25, 0.25, 1, 0.5, 0.5]),
        ("square", [0.5, 0.5, 0.5, 0.5, 1, 2**-0.5, 2**-0.5]),
    ],
)
def test_weights_of_conversations_with_4_1_and_2_supervised_tokens(weighting, expected):
    packs = [
        pack([1, 11, 11, 11, 11, 2, 12], [X, 11, 11, 11, 11, X, 12], [5, 2]),
        pack([3, 13, 13], [X, 13, 13], [3]),
    ]
    data = collate_packs(packs, weighting=weighting)["data"]
    assert data["label_targets"].tolist() == [11, 11, 11, 11, 12, 13, 13]
    assert data["label_weights"].tolist() == pytest.approx(expected)
    assert data["label_weights"].dtype == torch.float32


def test_images_stand_at_their_placeholders_in_the_order_of_the_packs():
    mark = IMAGE_TOKEN_INDEX
    packs = [
        pack([1, mark, mark, 11, 2, 12], [X, X, X, 11, X, 12], [4, 2], images=1),
        pack([5, 13], [X, 13], [2]),
        pack([3, mark, mark, mark, mark, 13], [X, X, X, X, X, 13], [6], images=2),
    ]
    data = collate_packs(packs)["data"]
    assert data["image_positions"].tolist() == [1, 2, 9, 10, 11, 12]
    assert data["pixel_values"].shape == (3, 3, 2, 2)
    assert data["pixel_values"][:, 0, 0, 0].tolist() == [1, 3, 3]


@pytest.mark.parametrize(
    ("labels", "lengths", "message"),
    [
        ([X, 11, 11], [2], "3 tokens, 3 labels and lengths of 2 in a batch"),
        ([X, 11], [3], "3 tokens, 2 labels and lengths of 3 in a batch"),
    ],
)
def test_boundaries_that_do_not_fit_are_an_error_with_all_numbers(labels, lengths, message):
    with pytest.raises(GMAIError, match=message):
        collate_packs([pack([1, 11, 11], labels, lengths)])


def test_unknown_weighting_is_refused():
    with pytest.raises(GMAIError, match="unknown weighting 'tokens'"):
        collate_packs(drawing(), weighting="tokens")
