# SPDX-License-Identifier: Apache-2.0

"""Prompts for a model about a record, and the conversation in its answer.

Annotation-guided generation, as GMAI-VL (arXiv 2411.14522, figure 2) describes it: the prompt states
modality, department, label and, for detection and segmentation sets, the region, and the model puts them
into words. Sets of classes are described as whole images, sets of regions by what lies in the region.
With ``grounded=False`` nothing of the annotation is in the prompt, and everything else stays: the paper's
comparison.

A prompt holds no path, no name of a set, no group, no id: whom an image shows can't be read from it.
Its words are in ``system.j2``, ``ask.j2`` and ``translate.j2``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any

import msgspec
from jinja2 import Template

from data_tools.checks import CheckOptions, check
from data_tools.forms.coordinates import write_box
from data_tools.forms.language import language
from data_tools.items import IMAGE, TEXT_FORMS, Conversation, Problem, Task, Turn
from data_tools.records import Label
from data_tools.taxonomy import Taxonomy
from gmai_xtuner.core.templates import environment

PROMPT_VERSION = 3
"""Raise it with any change of a prompt or of how answers are read: models are then asked anew."""
MAX_REGIONS = 12
"""Regions of a record that a prompt about the whole image lists; the rest is counted."""
MAX_TOKENS = dict.fromkeys(("caption", "instruction", "text_single"), 400)
MAX_TOKENS |= {"region_caption": 300, "dialogue": 900, "text_multi": 900}
"""Of the answer of each form."""


def _object(**properties: Any) -> dict[str, Any]:
    made = {"type": "object", "properties": properties}
    return made | {"required": list(properties), "additionalProperties": False}


_TEXT = {"type": "string"}
_CAPTION = _object(caption=_TEXT)
_PAIR = _object(question=_TEXT, answer=_TEXT)
_TURNS = _object(turns={"type": "array", "items": _PAIR})
_SCHEMAS = {
    **dict.fromkeys(("caption", "region_caption"), _CAPTION),
    **dict.fromkeys(("instruction", "text_single"), _PAIR),
    **dict.fromkeys(("dialogue", "text_multi"), _TURNS),
}
_Said = Annotated[str, msgspec.Meta(pattern=r"\S")]
_FENCE = re.compile(r"^\s*```(?:json)?\s*\n(.*)\n\s*```\s*$", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request: its messages, the path of its image below the corpus, and the JSON schema of the answer.

    ``box_image``: the item's region may be drawn into the copy of the image that is sent.
    """

    system: str
    user: str
    image: str | None
    box_image: bool
    schema: dict[str, Any] | None
    max_tokens: int


class Prompts:
    """Writes the prompts of a job and judges the answers.

    ``grounded``: prompts hold the annotation, and checks may use it.
    """

    def __init__(self, checks: CheckOptions, taxonomy: Taxonomy, *, grounded: bool) -> None:
        self.checks, self.taxonomy, self.grounded = checks, taxonomy, grounded

    def build(self, task: Task, *, problems: Sequence[Problem] = ()) -> Prompt:
        """Return the question about an item, in any form but ``perception``, which follows from the labels.

        ``problems`` are those of the answer before, so that it is not given again.
        """
        item, record = task.item, task.record
        if item.form not in _SCHEMAS:
            raise ValueError(f"{item.form!r} is never asked of a model")
        text_only = item.form in TEXT_FORMS
        facts = _Facts(task, self.taxonomy)
        user = _template("ask").render(
            form=item.form,
            language=item.language,
            seed=item.seed,
            turns=item.kind or "3",
            text_only=text_only,
            modality=record.modality,
            facts=facts.all() if self.grounded else None,
            region=facts.region(record.labels[item.focus]) if item.focus is not None else None,
            problems=problems,
        )
        return Prompt(
            _template("system").render(text_only=text_only),
            user,
            None if text_only else record.image,
            item.form == "region_caption",
            _SCHEMAS[item.form],
            MAX_TOKENS[item.form],
        )

    def translate(
        self, conversation: Conversation, task: Task, *, problems: Sequence[Problem] = ()
    ) -> Prompt:
        """Return the question for a translation of ``conversation`` into the item's language."""
        turns = [
            {"question": ask.text.removeprefix(f"{IMAGE}\n"), "answer": answer.text}
            for ask, answer in zip(conversation[::2], conversation[1::2], strict=True)
        ]
        record, chinese = task.record, task.context.chinese
        modality = self.taxonomy.terms(record.modality).chinese
        terms = {name: chinese[name] for name in record.names if name in chinese}
        if modality:
            terms[record.modality] = modality
        return Prompt(
            "You are a medical translator. You answer with one JSON object of the same form and "
            "nothing else.",
            _template("translate").render(
                terms=terms,
                turns=json.dumps({"turns": turns}, ensure_ascii=False),
                problems=problems,
            ),
            None,
            False,
            _TURNS,
            2 * MAX_TOKENS[task.item.form],
        )

    def read_answer(self, text: str, task: Task) -> Conversation | Problem:
        """Return the conversation in an answer, or why there is none in it. Nothing is guessed.

        The text is JSON of the form that was asked for, bare or fenced; a translation comes as turns.
        """
        fenced = _FENCE.match(text)
        try:
            answer = msgspec.json.decode(fenced[1] if fenced else text, type=_Answer)
            pairs = _pairs(answer, task)
        except msgspec.ValidationError as error:
            return Problem("answer has another form", str(error))
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            return Problem("answer isn't JSON", str(error)[:200])
        turns = [
            Turn(speaker, said.strip())
            for pair in pairs
            for speaker, said in zip(("human", "gpt"), pair, strict=True)
        ]
        if any(IMAGE in turn.text for turn in turns):
            return Problem("answer has an image mark", f"{IMAGE} isn't to be written")
        if task.item.form not in TEXT_FORMS:
            turns[0] = Turn("human", f"{IMAGE}\n{turns[0].text}")
        return tuple(turns)

    def check(self, conversation: Conversation, task: Task) -> list[Problem]:
        """Return what is wrong with a conversation."""
        return check(conversation, task, self.taxonomy, self.checks, grounded=self.grounded)


@lru_cache
def _template(name: str) -> Template:
    return environment("data_tools.writers").get_template(f"{name}.j2")


class _Facts:
    """The annotation, in the words of the item's language where it has them."""

    def __init__(self, task: Task, taxonomy: Taxonomy) -> None:
        self.item, self.record, self.context = task.item, task.record, task.context
        self.taxonomy, self.translated = taxonomy, language(task.item.language).translated

    def all(self) -> dict[str, Any]:
        record = self.record
        whole = [label for label in record.labels if label.box is None]
        regions = [label for label in record.labels if label.box is not None]
        text_only = self.item.form in TEXT_FORMS
        many = len(regions) > MAX_REGIONS
        return {
            "modality": self.term(record.modality),
            "attributes": record.attributes,
            "department": "" if record.department == "None" else self.term(record.department),
            "findings": [self.finding(label) for label in whole],
            "subjects": dict.fromkeys(map(self.finding, regions)) if text_only else (),
            "regions": () if text_only else map(self.region, regions[:MAX_REGIONS]),
            "counts": Counter(label.name for label in regions) if many and not text_only else {},
            "incomplete": ()
            if text_only
            else sorted({label.name for label in regions} - self.context.known_in(record)),
        }

    def region(self, label: Label) -> dict[str, str] | None:
        if label.box is None:
            return None
        size = {"width": self.record.width, "height": self.record.height}
        return {
            "finding": self.finding(label),
            "place": language("en").where([label.box], **size),
            "box": write_box(label.box, **size),
        }

    def finding(self, label: Label) -> str:
        words = self._with(label.name, self.context.chinese.get(label.name))
        more = ", ".join(f"{name} {value}" for name, value in label.attributes.items())
        return f"{words}, {more}" if more else words

    def term(self, name: str) -> str:
        return self._with(name, self.taxonomy.terms(name).chinese)

    def _with(self, name: str, translation: str | None) -> str:
        return f"{name} ({translation})" if self.translated and translation else name


class _Pair(msgspec.Struct):
    question: _Said
    answer: _Said


class _Answer(msgspec.Struct):
    """The keys that an answer may have, in any of the forms that are asked for."""

    turns: Annotated[list[_Pair], msgspec.Meta(min_length=1)] | None = None
    caption: _Said | None = None
    question: _Said | None = None
    answer: _Said | None = None


def _pairs(found: _Answer, task: Task) -> list[tuple[str, str]]:
    if found.turns is not None:
        return [(pair.question, pair.answer) for pair in found.turns]
    item, record = task.item, task.record
    wanted = _SCHEMAS[item.form]["required"]
    said: list[Any] = [getattr(found, key) for key in wanted]
    if None in said:
        raise msgspec.ValidationError(f"expected the key(s) {', '.join(wanted)}")
    if len(said) == 2:
        return [(said[0], said[1])]
    asked = language(item.language).sentences[f"by_model.{item.form}"]
    question = asked[item.seed % len(asked)]
    if item.focus is not None:
        box = record.labels[item.focus].box
        assert box is not None
        question = question.format(box=write_box(box, width=record.width, height=record.height))
    return [(question, said[0])]
