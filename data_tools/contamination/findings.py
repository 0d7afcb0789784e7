# SPDX-License-Identifier: Apache-2.0

"""The result in numbers and lists, and the names that a training should leave out."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.contamination.compare import CorpusImage, Overlap
from data_tools.contamination.hashing import LEVELS
from gmai_xtuner.core.errors import CorpusError
from gmai_xtuner.core.templates import environment

NEAR_COLUMNS = (
    *("decision", "relation", "bits", "benchmark_picture", "questions"),
    *("dataset", "image", "excluded_by_mixture"),
)
"""Columns of ``near.tsv``; people's files have these names."""
EXCLUDE, KEEP = "exclude", "keep"
SAME_PIXELS = "same pixels"

PairKey = tuple[str, str, str]
"""Benchmark's image, dataset, image: by which people's decisions are kept."""
Decisions = dict[PairKey, str]
"""Decisions of a person: ``exclude`` or ``keep``."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two images that are to be looked at: the benchmark's by number and name, the corpus' whole.

    ``relation`` is ``same pixels``, ``looks the same``, ``same case`` if only the names are alike, or ``looks
    the same, same case``; ``bits`` how far the hashes differ, None: not known to be near.
    """

    theirs: int
    picture: str
    ours: CorpusImage
    relation: str
    bits: int | None

    @property
    def key(self) -> PairKey:
        return self.picture, self.ours.dataset, self.ours.name


def pairs(overlap: Overlap) -> list[Pair]:
    """Return all pairs, the surest first: same pixels, then those of one case, then by distance."""
    cases = {(theirs, ours) for theirs, images in overlap.same_case.items() for ours in images}
    exact = {
        (theirs, ours): (SAME_PIXELS, 0)
        for theirs, images in sorted(overlap.matches.exact.items())
        for ours in images
    }
    near = [((one.theirs, one.ours), one.distance) for one in overlap.matches.near]
    near.sort(key=lambda one: (one[0] not in cases, one[1]))
    found: list[tuple[tuple[int, int], tuple[str, int | None]]] = [*exact.items()]
    for both, bits in near:
        also = ", same case" if both in cases else ""
        found.append((both, (f"looks the same{also}", bits)))
    cases -= {both for both, _ in found}
    found += [(both, ("same case", None)) for both in sorted(cases)]
    names = [image.name for image in overlap.benchmark.images]
    return [Pair(n, names[n], overlap.image(ours), *how) for (n, ours), how in found]


def summary(overlap: Overlap, listed: Sequence[Pair], exclude: ExcludeList) -> dict[str, Any]:
    """Return all numbers, as JSON."""
    corpus, benchmark = overlap.corpus, overlap.benchmark
    matches, questions = overlap.matches, overlap.questions
    items = len(benchmark.items)
    found = set(matches.exact) | set(np.flatnonzero(matches.nearest < 255).tolist())
    with_image = {n for n, item in enumerate(benchmark.items) if found.intersection(item.images)}
    with_question = {number for text in questions.hits for number in questions.of_text[text]}
    levels = [level for level in LEVELS if level < overlap.distance] + [overlap.distance]
    why = images_not_compared(overlap)
    values: dict[str, Any] = {
        "corpus": {
            "path": str(corpus.path),
            "taken_for": corpus.kind,
            "datasets": [dataset.name for dataset in corpus.datasets],
            "conversations": overlap.conversations,
            "left_out_by_the_mixture": overlap.excluded,
            "no_conversation": sum(corpus.refused.values()),
            "refused_by_reason": dict(sorted(corpus.refused.items())),
            "pictures": len(overlap.names),
            "distinct_pictures": overlap.distinct_images(),
            "pictures_by_state": overlap.corpus_states,
            "files_passed_over": corpus.passed_over,
        },
        "benchmark": {
            "path": str(benchmark.path),
            "files": benchmark.files,
            "questions": items,
            "rows_left_out": benchmark.left_out,
            "pictures": len(benchmark.images),
            "pictures_by_state": overlap.benchmark_states,
            "pictures_not_found": len(benchmark.not_found),
            "picture_files_unnamed": benchmark.unnamed,
            "files_passed_over": benchmark.passed_over,
        },
        "pictures": {
            "compared": not why,
            "not_compared_because": why,
            "same_pixels": len(matches.exact),
            "same_pixels_in_corpus": len({i for images in matches.exact.values() for i in images}),
            "within_bits": {str(level): matches.within(level) for level in levels},
            "same_case": len(overlap.same_case),
        },
        "questions": {
            "compared": bool(questions.texts) and overlap.conversations > 0,
            "texts": len(questions.texts),
            "equal": sum(hits.equal > 0 for hits in questions.hits.values()),
            "near": sum(hits.equal == 0 and hits.near > 0 for hits in questions.hits.values()),
            "jaccard": overlap.threshold,
        },
        "items": {
            "all": items,
            "picture_and_question": len(questions.both),
            "picture": len(with_image - set(questions.both)),
            "question": len(with_question - with_image),
            "neither": items - len(with_image | with_question),
        },
        "to_look_at": sum(pair.relation != SAME_PIXELS for pair in listed),
        "undecided": exclude.undecided,
        "exclude": {
            "images": len(exclude.images),
            "conversations": len(exclude.ids),
            "by_decision": exclude.decided,
            "not_in_the_mixture_yet": exclude.fresh,
        },
        "warnings": [],
        "seconds": round(overlap.seconds, 1),
    }
    warnings = environment("data_tools.contamination").get_template("warnings.txt.j2")
    told = warnings.render(n=values).splitlines()
    values["warnings"] = [*benchmark.notes, *filter(None, told)]
    return values


def images_not_compared(overlap: Overlap) -> str:
    """Return why no image could be compared, or ""."""
    named = len(overlap.benchmark.not_found)
    if not overlap.benchmark.images and named:
        return f"none of the {named} images that the benchmark names was found; give --benchmark-images"
    for there, problem in (
        (overlap.benchmark.images, "no image of the benchmark was recognised"),
        (overlap.benchmark_states.get("read"), "no image of the benchmark could be read"),
        (overlap.names, "the corpus names no image"),
        (
            overlap.corpus_states.get("read"),
            "no image of the corpus could be read; is image_root right?",
        ),
    ):
        if not there:
            return problem
    return ""


@dataclass(frozen=True, slots=True)
class ExcludeList:
    """Names to leave out: ``(dataset, name)``, the dataset "" where the corpus is no mixture.

    ``decided`` of the images are there by decision of a person; ``fresh`` of all names are not in a list of
    the mixture yet. ``undecided`` pairs wait for a person: nobody said what they are, and their image is left
    out by no other pair and no list.
    """

    images: tuple[tuple[str, str], ...]
    ids: tuple[tuple[str, str], ...]
    decided: int
    fresh: int
    undecided: int

    def text(self, *, title: str) -> str:
        """Return the list as ``exclude`` of a mixture takes it."""
        lines, now = [f"# {title}"], ""
        entries = [(dataset, "image", name) for dataset, name in self.images]
        entries += [(dataset, "id", name) for dataset, name in self.ids]
        for dataset, kind, name in sorted(entries):
            if dataset != now:
                lines.append(f"dataset: {_quoted(dataset)}")
                now = dataset
            lines.append(f"{kind}: {_quoted(name)}")
        return "\n".join(lines) + "\n"


def _quoted(name: str) -> str:
    """As it is, or as JSON where it would be read otherwise."""
    if name != name.strip() or name[:1] in ('"', "") or "\n" in name or "\r" in name or name == "*":
        return json.dumps(name, ensure_ascii=False)
    return name


def exclude_list(overlap: Overlap, listed: Sequence[Pair], decisions: Decisions) -> ExcludeList:
    """List what is certain: the same pixels; conversations that are a question without an image, word for
    word with its answer; and whatever a person has decided on. What only looks alike is for eyes.

    One ``exclude`` is enough to leave an image out. An image of the same pixels is taken back if all its
    pairs are ``keep``: that it is no copy of one image says nothing of another."""
    certain = {pair.key[1:] for pair in listed if pair.relation == SAME_PIXELS}
    not_all_kept = {pair.key[1:] for pair in listed if decisions.get(pair.key) != KEEP}
    excluded = {key[1:] for key, decision in decisions.items() if decision == EXCLUDE}
    decided = len(excluded - certain)
    images = (certain & not_all_kept) | excluded
    undecided = sum(
        pair.relation != SAME_PIXELS
        and pair.key not in decisions
        and pair.key[1:] not in images
        and not pair.ours.is_excluded
        for pair in listed
    )
    datasets = overlap.corpus.datasets
    ids = {(datasets[number].name, name) for number, name in overlap.questions.whole}
    left_images = {(dataset.name, name) for dataset in datasets for name in dataset.excluded.images}
    left_ids = {(dataset.name, name) for dataset in datasets for name in dataset.excluded.ids}
    fresh = len(images - left_images) + len(ids - left_ids)
    if not overlap.corpus.is_mixture:  # datasets are called after files, which no mixture knows
        images, ids = ({("", name) for _, name in names} for names in (images, ids))
    return ExcludeList(tuple(sorted(images)), tuple(sorted(ids)), decided, fresh, undecided)


def read_decisions(path: Path) -> Decisions:
    """Read the decisions in ``near.tsv``; of two rows of one pair ``exclude`` wins.

    A `CorpusError` if another word stands there, a column or cell is missing, or it isn't UTF-8.
    """
    found: Decisions = {}
    if not path.is_file():
        return found
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path} is not UTF-8 ({error}); it holds your decisions. Save it as UTF-8 with tabs."
        ) from error
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t")
    missing = {"decision", "benchmark_picture", "dataset", "image"} - set(reader.fieldnames or ())
    if missing:
        raise CorpusError(
            f"{path} lacks the column(s) {', '.join(sorted(missing))}; it holds your decisions. Restore it, "
            "or move it away to begin anew."
        )
    for number, row in enumerate(reader, 2):
        decision = (row["decision"] or "").strip().lower()
        if decision not in ("", EXCLUDE, KEEP):
            raise CorpusError(
                f"{path}, line {number}: the decision must be {EXCLUDE}, {KEEP} or empty, got "
                f"{row['decision']!r}."
            )
        key = (row["benchmark_picture"], row["dataset"], row["image"])
        if decision and None in key:
            raise CorpusError(
                f"{path}, line {number}: {decision} of what? Cells are missing; tabs separate columns."
            )
        if decision and found.get(key) != EXCLUDE:
            found[key] = decision
    return found


def near_table(overlap: Overlap, listed: Sequence[Pair], decisions: Decisions) -> str:
    """Return ``near.tsv``: pairs to look at, then those of the same pixels; with the decisions made so far,
    also those on pairs no longer there."""
    buffer = io.StringIO()
    table = csv.writer(buffer, delimiter="\t", lineterminator="\n")
    table.writerow(NEAR_COLUMNS)
    asked = Counter(number for item in overlap.benchmark.items for number in item.images)
    gone = dict(decisions)
    for pair in sorted(listed, key=lambda one: one.relation == SAME_PIXELS):
        picture, *image = pair.key
        left_out = "yes" if pair.ours.is_excluded else ""
        row = [pair.relation, pair.bits, picture, asked[pair.theirs], *image, left_out]
        table.writerow([decisions.get(pair.key, ""), *row])
        gone.pop(pair.key, None)
    for (picture, *image), decision in gone.items():
        table.writerow([decision, "not found this time", "", picture, "", *image, ""])
    return buffer.getvalue()


def question_hits(overlap: Overlap, *, at_most: int) -> list[dict[str, Any]]:
    """Return the questions that the corpus asks as well, the surest first."""
    questions = overlap.questions
    found: list[tuple[tuple[float, ...], dict[str, Any]]] = []
    for number, hits in questions.hits.items():
        items = questions.of_text[number]
        first = overlap.benchmark.items[items[0]]
        best = hits.examples[0]
        order = (-best.same_picture, -best.same_answer, -best.jaccard, -len(items), number)
        hit = {
            "question": first.texts[0],
            "answer": first.answer,
            "items": len(items),
            "first_item": first.name,
            "equal": hits.equal,
            "near": hits.near,
            "examples": [asdict(one) for one in hits.examples],
        }
        found.append((order, hit))
    found.sort(key=lambda one: one[0])
    return [hit for _, hit in found[:at_most]]
