# SPDX-License-Identifier: Apache-2.0

"""Write the quickstart's corpus: real image crops with true labels, as conversations in LLaVA form.

    python examples/quickstart/corpus.py OUT [--seed 0] [--train 2400] [--heldout 128]

OUT gets ``train.jsonl``, ``heldout.jsonl``, ``images/`` and ``mixture.yaml``, which names the
training set only. Training and held-out crops come from different regions or slices of each source
(`sources.Plane.regions`), so no pixel is in both. Held-out questions ask for the modality, as many
of each modality under each wording: whoever does not look at the image gets one in four right.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import phrases
from PIL import Image
from sources import MODALITIES, Box, Plane, load_planes

# Side of a crop in pixels of its plane: smallest and largest.
CROP_SIDES = {
    "skimage-retina": (180, 360),
    "skimage-ihc": (96, 176),
    "pydicom-ct-small": (36, 60),
    "pydicom-ct-head": (110, 200),
    "pydicom-mr-abdomen": (90, 190),
    "nibabel-mr-brain": (56, 92),
}
# How often a source is drawn from in one round of its modality; 1 unless named. The held-out part of
# the head has room for more crops that differ.
TURNS: dict[str, dict[str, int]] = {"train": {}, "heldout": {"pydicom-ct-head": 3}}
STORED_SIDE = 160  # pixels; a larger crop is reduced to it, a smaller one is stored as it is
MIN_TISSUE = 0.6  # share of a crop that shows tissue
MAX_HELDOUT_OVERLAP = 0.7  # intersection over union of two held-out crops of one plane
EQUAL_BRIGHTNESS = 6.0  # grey levels; halves closer than this count as equally bright
MR_GAINS = (0.75, 1.25)
TRIES = 4000
# The modalities of training conversations, in turn: CT and MR, both gray, are the hard ones to tell.
TRAIN_TURNS = ("ct", "mr", "fundus", "ct", "mr", "histology")

# How many of 100 training conversations have each form.
FORMS = {"modality": 64, "caption": 10, "dialogue": 10, "compare": 10, "text": 6}


class CorpusError(ValueError):
    """The corpus that was asked for cannot be made."""


@dataclass(frozen=True, slots=True)
class Crop:
    """A square cut of one plane: where it lies, on which side of the split, and how it is shown.

    Training crops vary: half are mirrored, and MR grey levels, which have no unit, are multiplied
    by ``gain``, as with another display window. Held-out crops are shown as they are.
    """

    plane: Plane
    box: Box
    split: str
    mirrored: bool = False
    gain: float = 1.0

    def image(self) -> Image.Image:
        """The crop as RGB, reduced to at most `STORED_SIDE` pixels a side."""
        left, top, right, bottom = self.box
        pixels = self.plane.pixels[top:bottom, left:right]
        if self.gain != 1.0:
            pixels = np.rint(np.clip(pixels * self.gain, 0, 255)).astype(np.uint8)
        image = Image.fromarray(pixels)
        if self.mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        side = min(image.width, STORED_SIDE)
        return image.resize((side, side), Image.Resampling.LANCZOS)


def overlap(first: Box, second: Box) -> float:
    """Intersection over union of two boxes, 0 to 1."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return shared / (sum(areas) - shared)


class Cropper:
    """Draws crops of one split, each modality's sources in turn; ``generator`` says where."""

    def __init__(self, planes: list[Plane], split: str, *, generator: np.random.Generator) -> None:
        self.split = split
        self.generator = generator
        self.taken: dict[tuple[str, int], list[Box]] = {}
        self.turn = dict.fromkeys(MODALITIES, 0)
        self.rounds: dict[str, list[list[Plane]]] = {}
        for modality in MODALITIES:
            sources: dict[str, list[Plane]] = {}
            for plane in planes:
                if plane.modality == modality and split in plane.regions:
                    sources.setdefault(plane.source, []).append(plane)
            self.rounds[modality] = [
                group for name, group in sources.items() for _ in range(TURNS[split].get(name, 1))
            ]

    def draw(self, modality: str) -> Crop:
        """A new crop of a modality; no two have the same box, held-out ones overlap little."""
        groups = self.rounds[modality]
        position = self.turn[modality] % len(groups)
        if position == 0:  # a new order each round, or a source would always meet one wording
            groups = [groups[i] for i in self.generator.permutation(len(groups))]
            self.rounds[modality] = groups
        planes = groups[position]
        self.turn[modality] += 1
        for _ in range(TRIES):
            plane = planes[int(self.generator.integers(len(planes)))]
            box = self._box(plane)
            left, top, right, bottom = box
            if plane.tissue[top:bottom, left:right].mean() < MIN_TISSUE:
                continue
            taken = self.taken.setdefault((plane.source, plane.index), [])
            if box in taken or (
                self.split == "heldout"
                and any(overlap(box, other) > MAX_HELDOUT_OVERLAP for other in taken)
            ):
                continue
            taken.append(box)
            if self.split == "heldout":
                return Crop(plane, box, self.split)
            mirrored = bool(self.generator.integers(2))
            gain = float(self.generator.uniform(*MR_GAINS)) if modality == "mr" else 1.0
            return Crop(plane, box, self.split, mirrored=mirrored, gain=gain)
        raise CorpusError(
            f"no room for another {self.split} crop of {planes[0].source} after {TRIES} tries "
            f"({sum(self.turn.values())} crops drawn): ask for fewer --{self.split} conversations"
        )

    def _box(self, plane: Plane) -> Box:
        left, top, right, bottom = plane.regions[self.split]
        smallest, largest = CROP_SIDES[plane.source]
        largest = min(largest, right - left, bottom - top)
        side = int(self.generator.integers(min(smallest, largest), largest + 1))
        x = int(self.generator.integers(left, right - side + 1))
        y = int(self.generator.integers(top, bottom - side + 1))
        return x, y, x + side, y + side


def brighter_half(image: Image.Image) -> str:
    """``left``, ``right`` or ``equal``: measured on the grey levels of the stored image."""
    levels = np.asarray(image.convert("L"), dtype=np.float64)
    middle = levels.shape[1] // 2
    difference = levels[:, :middle].mean() - levels[:, -middle:].mean()
    if abs(difference) < EQUAL_BRIGHTNESS:
        return "equal"
    return "left" if difference > 0 else "right"


@dataclass(slots=True)
class Stored:
    """A crop that has been written: its labels and its path below ``images/``."""

    crop: Crop
    path: str
    width: int
    height: int
    brighter: str

    @property
    def modality(self) -> str:
        return self.crop.plane.modality


class Writer:
    """Writes crops as PNG and turns them into records of one split."""

    def __init__(self, folder: Path, cropper: Cropper, *, generator: np.random.Generator) -> None:
        self.images = folder / "images"
        self.cropper = cropper
        self.generator = generator
        self.count = 0

    def store(self, modality: str) -> Stored:
        """Draw a crop of a modality and write it."""
        crop = self.cropper.draw(modality)
        image = crop.image()
        relative = f"{crop.split}/{modality}/{crop.plane.source}-{self.count:05d}.png"
        self.count += 1
        target = self.images / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(target, compress_level=3)
        return Stored(crop, relative, image.width, image.height, brighter_half(image))

    def modality(self, modality: str, language: str, *, wording: int) -> dict:
        stored = self.store(modality)
        questions = phrases.MODALITY_QUESTIONS[language]
        question = questions[wording % len(questions)]
        return _record("cls", [stored], [(question, phrases.MODALITY_NAMES[language][modality])])

    def caption(self, modality: str, language: str) -> dict:
        stored = self.store(modality)
        plane = stored.crop.plane
        text = phrases.caption(
            language,
            modality=modality,
            anatomy=plane.anatomy,
            window=plane.window,
            brighter=stored.brighter,
        )
        return _record("caption", [stored], [(phrases.CAPTION_QUESTIONS[language], text)])

    def dialogue(self, modality: str, language: str) -> dict:
        """Modality, then what else is known of this image, then what can be measured on it."""
        stored = self.store(modality)
        plane = stored.crop.plane
        color = modality in ("fundus", "histology")
        turns = [
            (
                phrases.MODALITY_QUESTIONS[language][0],
                phrases.MODALITY_NAMES[language][modality],
            )
        ]
        if plane.anatomy:
            anatomy = phrases.ANATOMY_NAMES[language][plane.anatomy]
            turns.append((phrases.ANATOMY_QUESTIONS[language], anatomy))
        if modality == "histology":
            turns.append((phrases.STAIN_QUESTIONS[language], phrases.STAIN_ANSWERS[language]))
        if plane.window:
            window = phrases.WINDOW_NAMES[language][plane.window]
            turns.append((phrases.WINDOW_QUESTIONS[language], window))
        turns.append((phrases.COLOR_QUESTIONS[language], phrases.COLOR_ANSWERS[language][color]))
        brighter = phrases.HALF_NAMES[language][stored.brighter]
        turns.append((phrases.HALF_QUESTIONS[language], brighter))
        return _record("dialogue", [stored], turns)

    def compare(self, modality: str, language: str) -> dict:
        """Two images: half of the pairs are of one modality."""
        others = [name for name in MODALITIES if name != modality]
        same = bool(self.generator.integers(2))
        second = modality if same else others[int(self.generator.integers(len(others)))]
        pair = [self.store(modality), self.store(second)]
        text = phrases.comparison(language, modality, second)
        return _record("compare", pair, [(phrases.COMPARE_QUESTIONS[language], text)])

    def text(self, language: str) -> dict:
        facts = phrases.TEXT_FACTS[language]
        question, answer = facts[int(self.generator.integers(len(facts)))]
        number = self.count
        self.count += 1
        return {
            "id": f"text#qa#general#quickstart#{number:05d}",
            "conversations": [
                {"from": "human", "value": question},
                {"from": "gpt", "value": answer},
            ],
        }


def _record(task: str, images: list[Stored], turns: list[tuple[str, str]]) -> dict:
    """A record in the authors' form; its id names the (first) image's modality, source and path."""
    first = images[0]
    source = first.crop.plane.source
    name = first.path.replace("/", "#")
    conversations = []
    for number, (question, answer) in enumerate(turns):
        marks = "<image>\n" * len(images) if number == 0 else ""
        conversations.append({"from": "human", "value": marks + question})
        conversations.append({"from": "gpt", "value": answer})
    one = len(images) == 1
    return {
        "id": f"2d#{task}#{first.modality}#{source}#{name}",
        "image": first.path if one else [stored.path for stored in images],
        "width": first.width if one else [stored.width for stored in images],
        "height": first.height if one else [stored.height for stored in images],
        "conversations": conversations,
    }


def train_records(writer: Writer, count: int) -> Iterator[dict]:
    """``count`` conversations: forms by `FORMS`, modalities in turn, one in four in Chinese."""
    shares = np.array(list(FORMS.values())) / sum(FORMS.values())
    edges = np.rint(np.cumsum(shares) * count).astype(int)
    number = 0
    for form, end in zip(FORMS, edges, strict=True):
        for position in range(int(end) - number):
            modality = TRAIN_TURNS[position % len(TRAIN_TURNS)]
            round_ = position // len(TRAIN_TURNS)
            chinese = round_ % phrases.CHINESE_SHARE == phrases.CHINESE_SHARE - 1
            language = "zh" if chinese else "en"
            if form == "modality":
                yield writer.modality(modality, language, wording=round_ % phrases.CHINESE_SHARE)
            elif form == "text":
                yield writer.text(language)
            else:
                yield getattr(writer, form)(modality, language)
        number = int(end)


def heldout_records(writer: Writer, count: int) -> Iterator[dict]:
    """``count`` modality questions: under each wording as many of every modality."""
    wordings = [("en", 0), ("en", 1), ("en", 2), ("zh", 0)]
    block = len(wordings) * len(MODALITIES)
    if count < block or count % block:
        raise CorpusError(
            f"--heldout {count}: must be a multiple of {block} ({len(wordings)} wordings x "
            f"{len(MODALITIES)} modalities), or chance would not be one in {len(MODALITIES)}"
        )
    for number in range(count):
        language, wording = wordings[number // len(MODALITIES) % len(wordings)]
        yield writer.modality(MODALITIES[number % len(MODALITIES)], language, wording=wording)


MIXTURE = """\
# The quickstart's training set; the held-out questions are not named here on purpose.
datasets:
  quickstart-train:
    annotations: train.jsonl
    image_root: images
    category: Medical Instruction
    quality: high
    ratio: 1.0
    over_length: cut
"""


def write_corpus(folder: Path, *, seed: int = 0, train: int = 2400, heldout: int = 128) -> dict:
    """Write the whole corpus below ``folder``.

    Args:
        folder: is made; must be empty or absent, so that no older image stays among the new ones.
        seed: of all random choices; the same seed gives the same files.
        train: number of training conversations.
        heldout: number of held-out questions, a multiple of 16.

    Returns:
        The numbers of ``train`` and ``heldout`` records and of ``images``.

    Raises:
        CorpusError: ``folder`` is not empty, or the numbers cannot be had.
        SourceError: a dependency does not carry an image.
    """
    if folder.exists() and any(folder.iterdir()):
        raise CorpusError(f"{folder} is not empty: name another folder or remove it first")
    if train < 1:
        raise CorpusError(f"--train {train}: must be 1 or more")
    planes = load_planes()
    summary = {"images": 0}
    jobs = (("train", train, train_records), ("heldout", heldout, heldout_records))
    for number, (split, count, make) in enumerate(jobs):
        generator = np.random.default_rng([seed, number])
        cropper = Cropper(planes, split, generator=generator)
        writer = Writer(folder, cropper, generator=generator)
        records = list(make(writer, count))
        if split == "train":
            generator.shuffle(records)  # type: ignore[arg-type]
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        summary[split] = len(records)
        summary["images"] += sum(cropper.turn.values())
    (folder / "mixture.yaml").write_text(MIXTURE, encoding="utf-8")
    return summary


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the quickstart's corpus of real images.")
    parser.add_argument("out", type=Path, help="folder to write, absent or empty")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=2400, help="training conversations")
    parser.add_argument("--heldout", type=int, default=128, help="held-out questions, 16 x n")
    options = parser.parse_args(arguments)
    try:
        summary = write_corpus(
            options.out, seed=options.seed, train=options.train, heldout=options.heldout
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(", ".join(f"{count} {name}" for name, count in summary.items()), "in", options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
