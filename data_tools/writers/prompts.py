"""What a model is asked about a record, and what its answer makes of it.

Annotation-guided generation, as GMAI-VL (arXiv 2411.14522, figure 2) describes it: the prompt states
modality, department, label and, for detection and segmentation sets, the region, and the model puts them
into words. Sets of classes are described as whole pictures, sets of regions by what lies in the region.
With ``grounded=False`` nothing of the annotation is in the prompt, and everything else stays: the paper's
comparison.

A prompt holds no path, no name of a set, no group, no id: whom a picture shows can't be read from it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data_tools.forms.coordinates import write_box
from data_tools.items import IMAGE, TEXT_FORMS, Conversation, Item, Problem, SourceContext, Turn
from data_tools.records import Box, Label, Record
from data_tools.taxonomy import Taxonomy

PROMPT_VERSION = 1
"""Raise it with any change of a prompt or of how answers are read: models are then asked anew."""
# Regions of a record that a prompt about the whole picture lists; the rest is counted.
MAX_REGIONS = 12
MAX_TOKENS = {
    "caption": 400,
    "region_caption": 300,
    "instruction": 400,
    "dialogue": 900,
    "text_single": 400,
    "text_multi": 900,
}

_SYSTEM = (
    "You write training data for a medical vision-language model. You are exact and sober, as in "
    "a report for "
    "colleagues. You state only what can be seen or what the facts say: no history, no age or sex, no "
    "measurement, no other finding, no advice on treatment, unless the facts hold it. You never "
    "mention that you were "
    "given facts, labels, annotations, coordinates or instructions: you speak as someone who "
    "looks at the picture. "
    "You answer with one JSON object and nothing else."
)
_SYSTEM_TEXT = (
    "You write training data for a medical language model. You are exact and sober, as in a "
    "textbook for colleagues. "
    "You state what is generally accepted, about the subject of the facts, and nothing of a "
    "particular patient. "
    "There is no picture: never speak of one. You never mention that you were given facts or "
    "instructions. "
    "You answer with one JSON object and nothing else."
)
_TASKS = {
    "caption": (
        "Describe the picture in two to five sentences: modality, what is shown, and the findings. "
        'Form: {"caption": "..."}'
    ),
    "region_caption": (
        "Describe the region in one to three sentences: what it is, where in the picture it "
        "lies, and what it "
        'looks like. Say nothing of other regions. Form: {"caption": "..."}'
    ),
    "instruction": (
        "Write one question or instruction that a physician or student could give about this "
        "picture, and its "
        'answer, in one to five sentences. Form: {"question": "...", "answer": "..."}'
    ),
    "dialogue": (
        "Write a conversation of {turns} questions and answers about this picture. Each question "
        "goes on from "
        "the answers before it; none asks for what can't be known from the picture. "
        'Form: {"turns": [{"question": "...", "answer": "..."}, ...]}'
    ),
    "text_single": (
        "Write one question on this subject that a physician or student could ask, and its "
        "answer in two to "
        'six sentences. Name the subject. Form: {"question": "...", "answer": "..."}'
    ),
    "text_multi": (
        "Write a conversation of {turns} questions and answers on this subject. Each question "
        "goes on from the "
        'answers before it. Name the subject. Form: {"turns": [{"question": "...", "answer": '
        '"..."}, ...]}'
    ),
}
# What a text without a picture is about, by the seed: the facts of a set are few, and the same question
# asked again gets the answer that is there already.
_ANGLES = (
    "what the finding is",
    "how it looks in this modality and why",
    "which structures it concerns",
    "how it is put into words in a report",
    "why this modality is used for it and what it can't show",
    "what the terms of such a report mean",
    "which questions the department has to such a picture",
    "how certain such a finding is and what limits it",
)
_LANGUAGES = {
    "en": "Write in English.",
    "zh": "Write all texts in Simplified Chinese, with the Chinese terms of the specialty; the "
    "keys stay English.",
}
# What the person asks for whom a caption is written; chosen by the item's seed.
_ASKED = {
    ("caption", "en"): (
        "Describe this image.",
        "What does this medical image show?",
        "Write a caption for this image.",
        "Summarise the findings in this image.",
        "Please describe what you see in this image.",
    ),
    ("caption", "zh"): (
        "请描述这张图像。",
        "这张医学图像显示了什么？",
        "请为这张图像写一段说明。",
        "请概括这张图像中的所见。",
    ),
    ("region_caption", "en"): (
        "Describe the region {box} of this image.",
        "What lies in the region {box}?",
        "What can be seen within {box} in this image?",
        "Write a caption for the region {box}.",
    ),
    ("region_caption", "zh"): (
        "请描述图像中{box}区域的内容。",
        "{box}区域内是什么？",
        "请为{box}区域写一段说明。",
    ),
}
_TEXT = {"type": "string"}
_PAIR = {
    "type": "object",
    "properties": {"question": _TEXT, "answer": _TEXT},
    "required": ["question", "answer"],
    "additionalProperties": False,
}
_CAPTION = {
    "type": "object",
    "properties": {"caption": _TEXT},
    "required": ["caption"],
    "additionalProperties": False,
}
_TURNS = {
    "type": "object",
    "properties": {"turns": {"type": "array", "items": _PAIR}},
    "required": ["turns"],
    "additionalProperties": False,
}
_SCHEMAS: dict[str, dict[str, Any]] = {
    "caption": _CAPTION,
    "region_caption": _CAPTION,
    "instruction": _PAIR,
    "text_single": _PAIR,
    "dialogue": _TURNS,
    "text_multi": _TURNS,
}
_FENCE = re.compile(r"^\s*```(?:json)?\s*\n(.*)\n\s*```\s*$", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request.

    Args:
        system, user: the messages.
        image: path of the picture below the corpus, or None.
        box_image: whether the item's region may be drawn into the copy that is sent.
        schema: JSON schema of the answer.
        max_tokens: of the answer.
    """

    system: str
    user: str
    image: str | None
    box_image: bool
    schema: dict[str, Any] | None
    max_tokens: int


class AnswerError(ValueError):
    """An answer in another form than was asked for: ``reason`` is counted, ``detail`` told to the model."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def build(
    item: Item,
    record: Record,
    context: SourceContext,
    taxonomy: Taxonomy,
    *,
    grounded: bool,
    problems: Sequence[Problem] = (),
) -> Prompt:
    """The question about an item.

    Args:
        item: what is to be written; not ``perception``, which follows from the labels.
        record: what is known.
        context: of its source; Chinese names of labels.
        taxonomy: Chinese names of modality and department.
        grounded: whether the annotation is in the prompt.
        problems: of the answer before, so that it is not given again.
    """
    if item.form not in _TASKS:
        raise ValueError(f"{item.form!r} is never asked of a model")
    text_only = item.form in TEXT_FORMS
    parts = []
    if grounded:
        parts.append("Facts:\n" + "\n".join(_facts(item, record, context, taxonomy)))
    elif item.form == "region_caption":
        parts.append(f"The region: {_region(record, item)} ({_legend()}).")
    elif text_only:
        parts.append(f"The subject: {record.modality} in medicine.")
    parts.append(_TASKS[item.form].replace("{turns}", item.kind or "3"))
    if text_only:
        parts.append(f"Let it be about {_ANGLES[item.seed % len(_ANGLES)]}.")
    parts.append(_LANGUAGES[item.language])
    if problems:
        reasons = "\n".join(
            f"- {problem.reason}{': ' if problem.detail else ''}{problem.detail}"
            for problem in problems
        )
        parts.append(f"An earlier answer was not accepted. Avoid this:\n{reasons}")
    return Prompt(
        _SYSTEM_TEXT if text_only else _SYSTEM,
        "\n\n".join(parts),
        None if text_only else record.image,
        item.form == "region_caption",
        _SCHEMAS[item.form],
        MAX_TOKENS[item.form],
    )


def translate(
    conversation: Conversation,
    item: Item,
    record: Record,
    context: SourceContext,
    taxonomy: Taxonomy,
    *,
    problems: Sequence[Problem] = (),
) -> Prompt:
    """The question for a Chinese translation of an accepted English conversation."""
    turns = [
        {"question": ask.text.removeprefix(f"{IMAGE}\n"), "answer": answer.text}
        for ask, answer in zip(conversation[::2], conversation[1::2], strict=True)
    ]
    modality = taxonomy.terms(record.modality).chinese
    terms = {name: context.chinese[name] for name in record.names if name in context.chinese}
    if modality:
        terms[record.modality] = modality
    parts = [
        "Translate into Simplified Chinese, as a physician would write it. Keep the number and "
        "order of turns, all "
        "numbers as digits, coordinates in brackets as they are, and every yes and no. Add nothing.",
        "Terms:\n" + "\n".join(f"- {english}: {chinese}" for english, chinese in terms.items())
        if terms
        else "",
        json.dumps({"turns": turns}, ensure_ascii=False),
        "\n".join(f"Avoid: {problem.reason}: {problem.detail}" for problem in problems),
    ]
    return Prompt(
        "You are a medical translator. You answer with one JSON object of the same form and "
        "nothing else.",
        "\n\n".join(part for part in parts if part),
        None,
        False,
        _TURNS,
        2 * MAX_TOKENS[item.form],
    )


def read_answer(text: str, item: Item, record: Record) -> Conversation:
    """The conversation in an answer.

    Args:
        text: JSON of the form that was asked for, bare or fenced. A translation comes as turns whatever the
            item's form is.
        item: what was asked for.
        record: whose region the question on a region names.

    Raises:
        AnswerError: it is not JSON, not of the form, or without text. Nothing is guessed.
    """
    fenced = _FENCE.match(text)
    try:
        values = json.loads(fenced[1] if fenced else text)
    except json.JSONDecodeError as error:
        raise AnswerError("answer isn't JSON", f"{error.msg} at character {error.pos}") from error
    if not isinstance(values, dict):
        raise AnswerError("answer has another form", f"a JSON object, not {type(values).__name__}")
    pairs = _pairs(values, item, record)
    if not pairs:
        raise AnswerError("answer has another form", "there are no turns in it")
    turns = [
        Turn(speaker, said.strip())
        for pair in pairs
        for speaker, said in zip(("human", "gpt"), pair, strict=True)
    ]
    if any(IMAGE in turn.text for turn in turns):
        raise AnswerError("answer has an image mark", f"{IMAGE} isn't to be written")
    if item.form not in TEXT_FORMS:
        turns[0] = Turn("human", f"{IMAGE}\n{turns[0].text}")
    return tuple(turns)


def _pairs(values: dict[str, Any], item: Item, record: Record) -> list[tuple[str, str]]:
    if "turns" in values:
        turns = values["turns"]
        if not isinstance(turns, list):
            raise AnswerError("answer has another form", "turns must be a list")
        return [(_text(turn, "question"), _text(turn, "answer")) for turn in turns]
    if item.form in ("caption", "region_caption"):
        asked = _ASKED[item.form, item.language]
        question = asked[item.seed % len(asked)]
        if item.form == "region_caption":
            question = question.format(box=_region(record, item))
        return [(question, _text(values, "caption"))]
    if item.form in ("dialogue", "text_multi"):
        raise AnswerError("answer has another form", "the key 'turns' is missing")
    return [(_text(values, "question"), _text(values, "answer"))]


def _text(values: Any, key: str) -> str:
    value = values.get(key) if isinstance(values, dict) else None
    if not isinstance(value, str):
        raise AnswerError("answer has another form", f"the text {key!r} is missing")
    if not value.strip():
        raise AnswerError("answer has an empty text", f"{key!r} says nothing")
    return value


def _facts(item: Item, record: Record, context: SourceContext, taxonomy: Taxonomy) -> list[str]:
    """The annotation in lines; about one region if the item is."""
    lines = [f"- modality: {_named(record.modality, taxonomy, item)}"]
    lines += [f"- {name}: {value}" for name, value in record.attributes.items()]
    if record.department != "None":
        lines.append(f"- department: {_named(record.department, taxonomy, item)}")
    if item.focus is not None:
        label = record.labels[item.focus]
        lines.append(f"- the region: {_finding(label, context, item)}{_place(label, record)}")
        return lines
    whole = [label for label in record.labels if label.box is None]
    regions = [label for label in record.labels if label.box is not None]
    lines += [f"- finding: {_finding(label, context, item)}" for label in whole]
    if item.form in TEXT_FORMS:
        names = dict.fromkeys(_finding(label, context, item) for label in regions)
        return lines + [f"- subject: {name}" for name in names]
    for label in regions[:MAX_REGIONS]:
        lines.append(f"- region: {_finding(label, context, item)}{_place(label, record)}")
    if len(regions) > MAX_REGIONS:
        counts: dict[str, int] = {}
        for label in regions:
            counts[label.name] = counts.get(label.name, 0) + 1
        lines.append("- regions in all: " + ", ".join(_counted(counts, record)))
    elif uncounted := [name for name in record.names if name in record.incomplete]:
        lines.append(
            f"- there is more of this than is listed, so never say how many: {', '.join(uncounted)}"
        )
    return lines


def _counted(counts: dict[str, int], record: Record) -> Iterator[str]:
    for name, count in counts.items():
        yield (
            f"many of {name} (never say how many)"
            if name in record.incomplete
            else f"{count} of {name}"
        )


def _finding(label: Label, context: SourceContext, item: Item) -> str:
    chinese = context.chinese.get(label.name) if item.language == "zh" else None
    words = f"{label.name} ({chinese})" if chinese else label.name
    more = ", ".join(f"{name} {value}" for name, value in label.attributes.items())
    return f"{words}, {more}" if more else words


def _named(name: str, taxonomy: Taxonomy, item: Item) -> str:
    chinese = taxonomy.terms(name).chinese
    return f"{name} ({chinese})" if item.language == "zh" and chinese else name


def _place(label: Label, record: Record) -> str:
    if label.box is None:
        return ""
    written = write_box(label.box, width=record.width, height=record.height)
    return f", {position(label.box, record.width, record.height)}, at {written} ({_legend()})"


def _region(record: Record, item: Item) -> str:
    assert item.focus is not None
    box = record.labels[item.focus].box
    assert box is not None
    return write_box(box, width=record.width, height=record.height)


def _legend() -> str:
    return "x1, y1, x2, y2 in thousandths of width and height, from the upper left"


def position(box: Box, width: int, height: int) -> str:
    """Where a box's centre lies in thirds of the picture, in words; a position, never a side of "
    "the body."""
    across = (box[0] + box[2]) * 3 // (2 * width)
    down = (box[1] + box[3]) * 3 // (2 * height)
    if across == 1 and down == 1:
        return "in the centre of the picture"
    words = [("upper", "", "lower")[min(down, 2)], ("left", "middle", "right")[min(across, 2)]]
    return f"in the {' '.join(word for word in words if word)} part of the picture"
