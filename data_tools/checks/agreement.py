"""Does an answer name what the expert named, and claim nothing else of the set?"""

from __future__ import annotations

from collections.abc import Iterator

from data_tools.checks.said import Said
from data_tools.checks.terms import Hit, TermFinder, words_of
from data_tools.items import Item, Problem, SourceContext
from data_tools.records import Record

# A label that is an everyday adjective is a claim about the picture only before one of these words, or where
# nothing follows that it could describe: "a normal chest radiograph" against "a normal heart size".
_ADJECTIVES = frozenset(
    ("normal", "healthy", "abnormal", "positive", "negative", "other", "background")
)
_WHOLE = frozenset(
    (
        "image", "picture", "scan", "study", "examination", "radiograph", "x", "ct", "mri", "mr", "chest",
        "fundus", "retina", "film", "slide", "view", "case", "and", "or", "without", "with", "for", "as",
    )
)  # fmt: skip
_NAMING = ("caption", "region_caption", "instruction", "dialogue", "text_single", "text_multi")


class LabelFinder:
    """The labels of a set in all their names.

    Args:
        context: of the set; its vocabulary, synonyms and Chinese names.
    """

    def __init__(self, context: SourceContext) -> None:
        terms: dict[str, str] = {}
        for name in context.vocabulary:
            chinese = context.chinese.get(name)
            for spoken in (*context.synonyms.get(name, ()), *([chinese] if chinese else ())):
                terms.setdefault(spoken, name)
        terms.update((name, name) for name in context.vocabulary)
        self._finder = TermFinder(terms)
        self._words = {name: tuple(words_of(name)) for name in context.vocabulary}

    def find(self, what: Said) -> list[Hit]:
        """Labels of the set in what was said."""
        if what.chinese:
            return self._finder.find_chinese(what.text)
        return [hit for hit in self._finder.find(what.words) if self._is_claim(hit, what.words)]

    def covers(self, longer: str, shorter: str) -> bool:
        """Whether naming ``longer`` names ``shorter`` as well, as "lung nodule" does "nodule"."""
        outer, inner = self._words[longer], self._words[shorter]
        return any(
            outer[at : at + len(inner)] == inner for at in range(len(outer) - len(inner) + 1)
        )

    @staticmethod
    def _is_claim(hit: Hit, words: list[str]) -> bool:
        if hit.end - hit.start > 1 or words[hit.start] not in _ADJECTIVES or hit.end >= len(words):
            return True
        following = words[hit.end]
        return following in _WHOLE or not following.isalnum()


def agreement(what: Said, item: Item, record: Record, finder: LabelFinder) -> Iterator[Problem]:
    """Problems with what an answer names.

    A form of sentences has to name a label of the record, that of its region if it is about one. No
    other label of the set may be claimed; a perceived "no" in `perception` is a denial and no claim.
    """
    own = set(record.names)
    wanted = {record.labels[item.focus].name} if item.focus is not None else own
    hits = finder.find(what)
    claimed = {hit.meaning for hit in hits if not hit.denied}
    if item.form in _NAMING and not (wanted & claimed):
        named = sorted(wanted)
        if wanted & {hit.meaning for hit in hits}:
            yield Problem("label denied", f"it denies {', '.join(named)}, which is there")
        else:
            yield Problem("label not named", f"it has to name {' or '.join(named)}")
    foreign = sorted(
        name
        # What was left out of the record is in the picture all the same.
        for name in claimed - own - set(record.incomplete)
        if not any(finder.covers(label, name) for label in own)
    )
    if foreign:
        yield Problem(
            "another label claimed",
            f"it claims {', '.join(foreign)}, which is not among the findings",
        )
