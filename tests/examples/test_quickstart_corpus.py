# SPDX-License-Identifier: Apache-2.0

"""The quickstart's corpus: true labels, and not one pixel in both training and held-out set."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import corpus
import numpy as np
import pytest
import sources
from PIL import Image
from report import chance_level


@pytest.fixture(scope="module")
def planes() -> list[sources.Plane]:
    return sources.load_planes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("quickstart") / "corpus"
    corpus.write_corpus(target, seed=0, train=300, heldout=128)
    return target


def read(folder: Path, split: str) -> list[dict]:
    lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def images_of(record: dict) -> list[str]:
    image = record.get("image", [])
    return [image] if isinstance(image, str) else image


def draw_all(planes: list[sources.Plane], split: str, count: int) -> list[corpus.Crop]:
    cropper = corpus.Cropper(planes, split, generator=np.random.default_rng(0))
    return [cropper.draw(sources.MODALITIES[n % 4]) for n in range(count)]


def test_crops_of_the_splits_share_no_pixel(planes):
    touched: dict[str, dict[tuple[str, int], np.ndarray]] = {}
    for split, count in (("train", 800), ("heldout", 128)):
        masks = touched.setdefault(split, {})
        for crop in draw_all(planes, split, count):
            key = (crop.plane.source, crop.plane.index)
            mask = masks.setdefault(key, np.zeros(crop.plane.pixels.shape[:2], dtype=bool))
            left, top, right, bottom = crop.box
            assert 0 <= left < right <= mask.shape[1]
            assert 0 <= top < bottom <= mask.shape[0]
            mask[top:bottom, left:right] = True
    both = set(touched["train"]) & set(touched["heldout"])
    assert {source for source, _ in both} >= {"skimage-retina", "pydicom-ct-head"}  # it occurs
    for key in both:
        assert not (touched["train"][key] & touched["heldout"][key]).any(), key
    brain = {split: {z for name, z in masks if "brain" in name} for split, masks in touched.items()}
    assert len(brain["train"]) > 10
    assert len(brain["heldout"]) == 4
    assert min(abs(a - b) for a in brain["train"] for b in brain["heldout"]) >= 2


def test_no_stored_image_is_in_both_sets_or_twice(folder):
    seen = Counter(
        Image.open(path).convert("RGB").tobytes() for path in folder.glob("images/*/*/*.png")
    )
    assert len(seen) > 400
    assert max(seen.values()) == 1


def test_no_training_record_names_a_heldout_image(folder):
    names = {
        split: {n for r in read(folder, split) for n in images_of(r)} for split in sources.SPLITS
    }
    assert names["train"].isdisjoint(names["heldout"])
    assert all(name.startswith("train/") for name in names["train"])
    assert all((folder / "images" / name).is_file() for name in names["train"] | names["heldout"])


def test_heldout_crops_are_shown_as_they_are(planes):
    compared = 0
    for crop in draw_all(planes, "heldout", 32):
        left, top, right, bottom = crop.box
        if right - left <= corpus.STORED_SIDE:
            shown = np.asarray(crop.image())
            assert (shown == crop.plane.pixels[top:bottom, left:right]).all()
            compared += 1
    assert compared > 10


def test_the_mixture_names_the_training_set_only(folder):
    text = (folder / "mixture.yaml").read_text(encoding="utf-8")
    assert "annotations: train.jsonl" in text
    assert "heldout.jsonl" not in text


def test_whoever_does_not_look_gets_one_in_four(folder):
    records = read(folder, "heldout")
    turns = [record["conversations"] for record in records]
    assert chance_level([(turn[0]["value"], turn[1]["value"]) for turn in turns]) == 0.25
    assert Counter(record["id"].split("#")[2] for record in records) == dict.fromkeys(
        sources.MODALITIES, 32
    )


def test_every_source_meets_several_wordings(folder):
    met: dict[tuple[str, str], set[str]] = {}
    for split in sources.SPLITS:
        for record in read(folder, split):
            _, form, _, source, *_ = record["id"].split("#")
            if form == "cls":
                met.setdefault((split, source), set()).add(record["conversations"][0]["value"])
    assert len(met) == 12
    assert min(len(questions) for questions in met.values()) >= 3


def test_all_forms_and_both_languages_occur(folder):
    records = read(folder, "train")
    assert len(records) == 300
    forms = Counter(record["id"].split("#")[1] for record in records)
    assert forms == {"cls": 192, "caption": 30, "dialogue": 30, "compare": 30, "qa": 18}
    chinese = sum(not record["conversations"][0]["value"].isascii() for record in records)
    assert 0.15 < chinese / len(records) < 0.35
    assert len({record["id"] for record in records}) == 300


def test_marks_images_and_sizes_agree(folder):
    for record in read(folder, "train") + read(folder, "heldout"):
        turns = record["conversations"]
        names = images_of(record)
        assert turns[0]["value"].count("<image>") == len(names)
        assert not any("<image>" in turn["value"] for turn in turns[1:])
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        if len(names) == 1:
            with Image.open(folder / "images" / names[0]) as image:
                assert image.size == (record["width"], record["height"])
            kind, _, modality, source, *path = record["id"].split("#")
            assert (kind, "/".join(path)) == ("2d", names[0])
            assert names[0].split("/")[1:] == [modality, path[-1]]
            assert path[-1].startswith(source)


def test_the_same_seed_writes_the_same_corpus_and_another_another(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        corpus.write_corpus(tmp_path / name, seed=seed, train=40, heldout=16)
    files = {
        name: {
            path.relative_to(tmp_path / name).as_posix(): path.read_bytes()
            for path in (tmp_path / name).rglob("*.*")
        }
        for name in "abc"
    }
    assert files["a"] == files["b"]
    assert files["a"]["train.jsonl"] != files["c"]["train.jsonl"]


def test_head_ct_shows_air_black_brain_gray_and_bone_white(planes):
    brain = next(p for p in planes if p.source == "pydicom-ct-head" and p.window == "brain")
    assert brain.pixels[:8, :8].max() == 0  # padding outside the field of view
    values, header = sources.read_dicom(
        Path(sources.pydicom.__file__).parent / "data/test_files/J2K_pixelrep_mismatch.dcm"
    )
    assert header.BodyPartExamined == "HEAD"
    assert header.Modality == "CT"
    assert set(np.unique(brain.pixels[values > 200])) == {255}
    assert set(np.unique(brain.pixels[values < -100])) == {0}
    assert 100 < np.median(brain.pixels[(values > 20) & (values < 50)]) < 140


def test_ct_values_are_hounsfield_units():
    values, _ = sources.read_dicom(
        Path(sources.pydicom.__file__).parent / "data/test_files/CT_small.dcm"
    )
    assert (values.min(), values.max()) == (-896.0, 1167.0)  # stored 128..2191, intercept -1024


def test_low_values_of_monochrome1_are_bright():
    header = sources.pydicom.Dataset()
    header.PhotometricInterpretation = "MONOCHROME1"
    levels = np.array([[0, 200]], dtype=np.uint8)
    assert sources._grey(levels, header)[0, :, 0].tolist() == [255, 55]


@pytest.mark.parametrize(
    ("left", "right", "expected"), [(90, 10, "left"), (10, 90, "right"), (50, 53, "equal")]
)
def test_brighter_half_is_measured(left, right, expected):
    levels = np.full((6, 7, 3), left, dtype=np.uint8)
    levels[:, 4:] = right
    assert corpus.brighter_half(Image.fromarray(levels)) == expected


def test_overlap_of_two_boxes():
    assert corpus.overlap((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert corpus.overlap((0, 0, 2, 2), (2, 0, 4, 2)) == 0.0


def test_what_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "old.png").touch()
    with pytest.raises(corpus.CorpusError, match="not empty"):
        corpus.write_corpus(tmp_path)
    with pytest.raises(corpus.CorpusError, match="multiple of 16"):
        corpus.write_corpus(tmp_path / "new", train=4, heldout=20)
    assert corpus.main([str(tmp_path)]) == 1
    assert "not empty" in capsys.readouterr().err


def test_a_missing_picture_says_which_package_lacks_it():
    with pytest.raises(sources.SourceError, match=r"nibabel .* does not carry tests/data/none"):
        sources._carried(sources.nibabel, "tests/data/none.nii")
