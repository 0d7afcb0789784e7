"""The tables of VLMEvalKit, in which any of the benchmarks may come.

Format as `vlmeval/dataset/image_base.py` loads it (github.com/open-compass/VLMEvalKit, commit e8e78f05f3):
``index``, ``image`` (base64, a list of them, or the index of another row) or ``image_path``, ``question``,
``hint``, ``A``, ``B``, ..., ``answer`` (letter of an option, or the answer's text), ``category``,
``l2-category``, ``split``.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gmai_xtuner.evaluate.benchmarks.benchmark import Benchmark, BenchmarkError
from gmai_xtuner.evaluate.benchmarks.reading import (
    Collector,
    UnreadableOptions,
    gold_option,
    mark_images,
)
from gmai_xtuner.evaluate.benchmarks.table import IMAGE, Row, images_of, paths_of, read_table
from gmai_xtuner.evaluate.questions import ImageSource, Question


def read_tables(
    paths: Sequence[Path],
    collector: Collector,
    *,
    groups: Mapping[str, str],
    keep: Callable[[Mapping[str, str]], bool] | None = None,
    answers_hidden: bool = False,
) -> Benchmark:
    """Questions of one or several tables.

    Args:
        paths: the tables, in their order.
        collector: takes the questions.
        groups: column of the table, in lower case -> name of the group.
        keep: which rows belong to the variant; all where None.
        answers_hidden: the authors keep the answers; a column ``answer`` is not looked at.

    Raises:
        BenchmarkError: a table without ``index``, ``question`` or images, or one that can't be read.
    """
    sources = []
    for path in paths:
        columns, rows, source = read_table(path)
        missing = {"index", "question"} - set(columns)
        if missing or not {IMAGE, "image_path"} & set(columns):
            raise BenchmarkError(
                f"{str(path)!r} is no table of VLMEvalKit: columns index, question, and image or image_path "
                f"were expected, it has {', '.join(columns) or 'none'}."
            )
        sources.append(source)
        by_index = {row.values["index"]: row for row in rows}
        folders = (path.parent, path.parent / "images", path.parent / "images" / path.stem)
        for row in rows:
            if keep is None or keep(row.values):
                _add(row, by_index, folders, collector, groups, answers_hidden)
    return collector.benchmark(sources)


def _add(
    row: Row,
    by_index: dict[str, Row],
    folders: tuple[Path, ...],
    collector: Collector,
    groups: Mapping[str, str],
    answers_hidden: bool,
) -> None:
    values = row.values
    index = values["index"].strip() or f"line {row.line}"
    images: tuple[ImageSource, ...]
    try:
        images = images_of(row, by_index)
        if not images:
            images = paths_of(values.get("image_path", ""), folders)
    except KeyError as error:
        collector.problem("missing_image", index, str(error.args[0]))
        return
    except UnreadableOptions as error:
        collector.problem("bad_image_path", index, str(error))
        return
    lettered = {
        letter: values[letter] for letter in string.ascii_uppercase if values.get(letter, "")
    }
    question = values["question"]
    if hint := values.get("hint", ""):
        question = f"Hint: {hint}\n{question}"
    try:
        (text, *options), images = mark_images(
            (question, *lettered.values()), dict(enumerate(images, start=1))
        )
    except KeyError as error:
        collector.problem("missing_image", index, f"the text names image {error.args[0]}")
        return
    answer: str | None = None
    if not answers_hidden and (raw := values.get("answer", "")):
        letters = dict(zip(lettered, options, strict=True))
        answer = letters.get(raw.strip()) or gold_option(tuple(options), raw)
    letters_in_order = "".join(lettered)
    named = values.get("answer", "").strip()
    collector.add(
        Question(
            id=index,
            text=text,
            images=images,
            options=tuple(options),
            answer=answer,
            groups={
                group: values[column] for column, group in groups.items() if values.get(column, "")
            },
            letters=""
            if letters_in_order == string.ascii_uppercase[: len(lettered)]
            else letters_in_order,
            gold_letter=named if answer is not None and named in lettered else "",
        )
    )
