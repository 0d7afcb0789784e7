# SPDX-License-Identifier: Apache-2.0

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from gmai_xtuner.core.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from gmai_xtuner.core.errors import DataError, ImageError, MixtureError
from gmai_xtuner.core.imaging.images import open_rgb
from gmai_xtuner.data.dataset import PackRef, SoftPackedDataset, collate_packs
from gmai_xtuner.data.images import ImageTransform
from gmai_xtuner.data.sampler import MicroBatchSampler, PackSampler
from tests.toy import record

TOKENS = 64  # of one image of the tiny vision tower

RECORDS = [
    record("one", "<image>\nWhat is shown?", "A CT scan.", image="a.png"),
    record("two", "<image>\n<image>\nSame?", "No.", image=["b.png", "a.png"]),
    record("none", "图中显示什么？", "肝脏。", "Sure?", "Yes."),
    *(record(f"text{number}", "Why? " * number, "No. " * number) for number in range(1, 12)),
]


@pytest.fixture
def corpus(make_corpus):
    return make_corpus({"toy": RECORDS}, images=("a.png", "b.png"))


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[key], right[key])
        if isinstance(left[key], torch.Tensor)
        else left[key] == right[key]
        for key in left
    )


def read_all(dataset: SoftPackedDataset) -> list[dict]:
    return [dataset[number] for number in range(len(dataset))]


def test_items_are_the_cached_conversations_with_widened_images(build, corpus):
    dataset = build(corpus.mixture)
    items = read_all(dataset)
    assert any(len(item["lengths"]) > 1 for item in items)  # several in one pack
    assert any(len(item["pixel_values"]) for item in items)
    seen = []
    for item in items:
        start = 0
        assert sum(item["lengths"]) == len(item["input_ids"]) == len(item["labels"]) <= 256
        for name, length in zip(item["ids"], item["lengths"], strict=True):
            ids = item["input_ids"][start : start + length]
            labels = item["labels"][start : start + length]
            start += length
            row = [RECORDS[row]["id"] for row in range(len(RECORDS))].index(name.split("/")[1])
            expected = dataset.caches[0][row]
            marks = expected.input_ids == IMAGE_TOKEN_INDEX
            assert (ids == IMAGE_TOKEN_INDEX).sum() == TOKENS * marks.sum()
            text = ids != IMAGE_TOKEN_INDEX
            assert ids[text].tolist() == expected.input_ids[~marks].tolist()
            assert labels[text].tolist() == expected.labels[~marks].tolist()
            assert (labels[~text] == IGNORE_INDEX).all()
            seen.append(name)
        assert (item["input_ids"] == IMAGE_TOKEN_INDEX).sum() == TOKENS * len(item["pixel_values"])
        assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
        assert item["capacity"] == 256
    assert sorted(seen) == sorted(f"toy/{item['id']}" for item in RECORDS)


def test_placeholders_of_an_image_lie_together_at_its_mark(build, make_corpus):
    corpus = make_corpus(
        {"toy": [record("r", "Left <image> right <image>", "Yes.", image=["a.png", "b.png"])]},
        images=("a.png", "b.png"),
    )
    dataset = build(corpus.mixture)
    marks = np.flatnonzero(dataset.caches[0][0].input_ids == IMAGE_TOKEN_INDEX)
    places = torch.nonzero(dataset[0]["input_ids"] == IMAGE_TOKEN_INDEX).flatten().tolist()
    first, second = marks[0], marks[1] + TOKENS - 1
    assert places == [*range(first, first + TOKENS), *range(second, second + TOKENS)]


def test_pixels_are_the_transformed_images_in_the_order_of_the_marks(build, corpus, tiny_bases):
    dataset = build(corpus.mixture)
    transform = ImageTransform.from_pretrained(tiny_bases / "vision")
    item = next(item for item in read_all(dataset) if "toy/two" in item["ids"])
    paths = []
    for name in item["ids"]:
        image = next(record["image"] for record in RECORDS if f"toy/{record['id']}" == name)
        paths += [image] if isinstance(image, str) else image or []
    assert "b.png" in paths
    expected = torch.stack([transform(open_rgb(corpus.images / path)) for path in paths])
    assert torch.equal(item["pixel_values"], expected)


def test_images_in_an_archive_are_those_of_the_folder(build, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("GMAI_CACHE", str(tmp_path / "cache"))
    loose = read_all(build(corpus.mixture))
    file = Path(shutil.make_archive(str(corpus.folder / "images"), "zip", corpus.images))
    mixture = corpus.mixture.read_text()
    corpus.mixture.write_text(mixture.replace("image_root: images", "images: images.zip"))
    packed = build(corpus.mixture, check_images="decode")
    assert all(map(same, loose, read_all(packed)))
    # Another image: other content under the same name is another cache.
    (corpus.images / "a.png").write_bytes((corpus.images / "b.png").read_bytes())
    shutil.make_archive(str(file.with_suffix("")), "zip", corpus.images)
    assert build(corpus.mixture).caches[0].folder != packed.caches[0].folder


def test_image_mode_reaches_the_transform(build, corpus):
    refs = range(len(build(corpus.mixture)))
    padded, resized = build(corpus.mixture), build(corpus.mixture, image_mode="resize")
    pairs = [(padded[ref]["pixel_values"], resized[ref]["pixel_values"]) for ref in refs]
    assert any(len(left) for left, _ in pairs)
    assert all(not torch.equal(left, right) for left, right in pairs if len(left))
    assert build(corpus.mixture, image_decoding="scaled").transform.decoding == "scaled"


def test_a_filler_has_no_supervised_tokens(build, corpus):
    dataset = build(corpus.mixture)
    learning, filling = dataset[PackRef(epoch=0, pack=0)], dataset[PackRef(0, 0, filler=True)]
    assert (learning["labels"] != IGNORE_INDEX).any()
    assert (filling["labels"] == IGNORE_INDEX).all()
    assert filling["labels"].shape == filling["input_ids"].shape
    assert torch.equal(filling["input_ids"], learning["input_ids"])
    assert (filling["num_tokens"], filling["capacity"]) == (0, 0)


@pytest.mark.parametrize("reason", ["missing_image", "damaged_image"])
def test_an_image_that_a_header_does_not_show_as_bad_is_named_and_can_be_skipped(
    build, corpus, reason
):
    path = corpus.images / "b.png"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    dataset = build(corpus.mixture)
    if reason == "missing_image":
        path.unlink()
    with pytest.raises(ImageError, match=r"b\.png.*check_images='decode'") as caught:
        read_all(dataset)
    found = (caught.value.dataset, caught.value.record, caught.value.reason)
    assert found == ("toy", "two", reason)
    rest = build(corpus.mixture, check_images="decode", on_bad_sample="skip")
    assert sum(len(item["ids"]) for item in read_all(rest)) == len(RECORDS) - 1


def test_pickled_dataset_is_small_and_gives_equal_items(build, corpus):
    """What a spawned data-loader worker gets."""
    dataset = build(corpus.mixture)
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 100_000  # no token array travels to a worker
    copy = pickle.loads(pickled)
    assert len(copy) == len(dataset)
    refs = [PackRef(1, pack) for pack in range(len(dataset))]
    assert all(same(copy[ref], dataset[ref]) for ref in refs)


def test_a_data_loader_with_workers_gives_the_batches_of_this_process(build, corpus):
    dataset = build(corpus.mixture)
    batches = [
        list(
            DataLoader(
                dataset,
                batch_sampler=MicroBatchSampler(PackSampler(dataset), 2, rank=0, world_size=1),
                collate_fn=collate_packs,
                num_workers=workers,
            )
        )
        for workers in (0, 2)
    ]
    assert len(batches[0]) == -(-len(dataset) // 2)
    for here, there in zip(*batches, strict=True):
        assert same(here["data"], there["data"])


def test_ratios_and_datasets_of_the_stage_make_the_sample(build, make_corpus, logged):
    corpus = make_corpus(
        {"double": RECORDS[3:], "stage3-only": RECORDS[3:5]},
        fields={
            "double": {"ratio": 2.0, "category": "General Text"},
            "stage3-only": {"ratio": {"stage1": 0, "stage2": 0, "stage3": 1}},
        },
    )
    dataset = build(corpus.mixture)
    assert dataset.metainfo == {"datasets": ["double"], "categories": ["General Text"]}
    seen = [name for item in read_all(dataset) for name in item["ids"]]
    assert len(seen) == 22
    assert len(set(seen)) == 11
    assert "double: 11 conversations x 2 (General Text)" in logged[-1]
    assert logged[-1].startswith("stage1: 22 conversations, 0 images, ")


def test_mixture_decides_over_the_config_about_bad_samples(build, make_corpus):
    bad = record("bad", "<image>?", "Yes.", image="gone.png")
    lenient = {"toy": {"on_bad_sample": "skip"}}
    corpus = make_corpus({"toy": [*RECORDS[3:], bad]}, fields=lenient)
    assert build(corpus.mixture, on_bad_sample="raise").caches[0].meta["skipped"] == {
        "missing_image": 1
    }
    corpus = make_corpus({"toy": [*RECORDS[3:], bad]}, fields={"toy": {"on_bad_sample": "raise"}})
    with pytest.raises(DataError, match="record bad"):
        build(corpus.mixture, on_bad_sample="skip")


def test_a_ratio_that_samples_nothing_is_an_error(build, make_corpus):
    corpus = make_corpus({"toy": RECORDS[3:5]}, fields={"toy": {"ratio": 0.05}})
    with pytest.raises(MixtureError, match=r"no conversation of toy \(ratio 0.05 of 2\)"):
        build(corpus.mixture)


def test_the_authors_example_list_is_trained_on(build, shared_data, monkeypatch, logged):
    monkeypatch.chdir(shared_data / "gmai_vl_samples")
    dataset = build("examples/example_list.json", max_length=2048)
    assert len(dataset) == 1
    item = dataset[0]
    assert item["ids"] == ["FILE1/2d#cls#histopathology#crc100k#images#NORM#example.tif"]
    assert item["pixel_values"].shape == (1, 3, 336, 336)
    assert (item["input_ids"] == IMAGE_TOKEN_INDEX).sum() == TOKENS
    assert (item["labels"] != IGNORE_INDEX).sum() > 100  # the caption is supervised
    assert "the mixture says 38276 records for FILE1, its files hold 1" in logged[-1]


def test_held_out_part_is_what_training_does_not_see(build, make_corpus, logged):
    records = [
        record(f"r{number}", "<image>\nWhat?", "This.", image=f"{number // 3}.png")
        for number in range(60)
    ]
    images = [f"{number}.png" for number in range(20)]
    corpus = make_corpus({"toy": records}, images=images, fields={"toy": {"ratio": 2.0}})
    dataset = build(corpus.mixture, held_out=0.2)
    part = dataset.held_out_part()
    train = [name for item in read_all(dataset) for name in item["ids"]]
    held = [name for item in read_all(part) for name in item["ids"]]
    assert len(held) == len(set(held))
    assert set(train) | set(held) == {f"toy/r{number}" for number in range(60)}

    def image(name: str) -> int:
        return int(name.removeprefix("toy/r")) // 3

    assert held
    assert not {image(name) for name in train} & {image(name) for name in held}
    assert f"toy: 60 conversations x 2, {len(held)} of them held out" in logged[-1]
    assert f"held out for validation: {len(held)} of 60 conversations (share 0.2" in logged[-1]
    assert len(dataset.held_out_part(2).plan.samples) == 2
    assert pickle.loads(pickle.dumps(part)).plan.samples.tolist() == part.plan.samples.tolist()
