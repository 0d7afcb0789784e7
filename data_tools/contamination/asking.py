"""Questions of the benchmark that the corpus asks as well, and whether about the same picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from data_tools.contamination.benchmark import Item
from data_tools.contamination.records import Conversation
from data_tools.contamination.texts import GRAM, TextIndex, normalised

EXAMPLES = 3
_REMEMBERED = (
    200_000  # questions of the corpus whose answer is still known: templates come again and again
)


@dataclass(frozen=True, slots=True)
class Asked:
    """A turn of the corpus that asks what the benchmark asks.

    ``same_answer``: it is also answered alike; ``same_picture``: about a picture of that question.
    """

    dataset: str
    id: str
    question: str
    answer: str
    jaccard: float
    same_answer: bool
    same_picture: bool


@dataclass(slots=True)
class TextHits:
    """What is known of one text of the benchmark: conversations that ask it, and some of them."""

    equal: int = 0
    near: int = 0
    examples: list[Asked] = field(default_factory=list)

    def add(self, asked: Asked) -> None:
        if asked.jaccard == 1:
            self.equal += 1
        else:
            self.near += 1
        self.examples.append(asked)
        if len(self.examples) > EXAMPLES:
            self.examples.sort(
                key=lambda one: (
                    -one.same_picture,
                    -one.same_answer,
                    -one.jaccard,
                    one.dataset,
                    one.id,
                )
            )
            del self.examples[EXAMPLES:]


class Questions:
    """The benchmark's questions, ready to be found.

    Args:
        items: of the benchmark.
        threshold: smallest Jaccard index of texts that are near.
    """

    def __init__(self, items: Sequence[Item], *, threshold: float) -> None:
        self.items = items
        of_text: defaultdict[str, list[int]] = defaultdict(list)
        for number, item in enumerate(items):
            for text in dict.fromkeys(normalised(text) for text in item.texts):
                if text:
                    of_text[text].append(number)
        self.texts = list(of_text)
        self.of_text = [of_text[text] for text in self.texts]
        self._answers = [
            {normalised(items[number].answer) for number in numbers} - {""}
            for numbers in self.of_text
        ]
        self._index = TextIndex(self.texts, threshold=threshold)
        self._known: dict[str, list[tuple[int, float]]] = {}
        self.hits: dict[int, TextHits] = {}
        self.both: dict[int, Asked] = {}
        self.whole: list[tuple[int, str]] = []

    def look_at(
        self, dataset: int, name: str, conversation: Conversation, pictures: frozenset[int]
    ) -> None:
        """Note what a conversation has in common with the benchmark.

        Args:
            dataset, name: the conversation's dataset.
            conversation: of the corpus.
            pictures: of the benchmark that are among, or look like, the conversation's.
        """
        whole = False
        for turn in conversation.turns:
            text = normalised(turn.question)
            found = self._find(text)
            if not found:
                continue
            answer = normalised(turn.answer)
            for number, jaccard in found:
                same_answer = answer in self._answers[number]
                shared = [
                    item
                    for item in (self.of_text[number] if pictures else ())
                    if pictures.intersection(self.items[item].images)
                ]
                asked = Asked(
                    name,
                    conversation.id,
                    turn.question,
                    turn.answer,
                    jaccard,
                    same_answer,
                    bool(shared),
                )
                self.hits.setdefault(number, TextHits()).add(asked)
                for item in shared:
                    if item not in self.both or jaccard > self.both[item].jaccard:
                        self.both[item] = asked
                whole |= (
                    jaccard == 1
                    and same_answer
                    and not conversation.images
                    and len(text.split()) >= GRAM
                    and self._without_picture(number, answer)
                )
        if whole:
            self.whole.append((dataset, conversation.id))

    def _find(self, text: str) -> list[tuple[int, float]]:
        found = self._known.get(text)
        if found is None:
            equal = self._index.equal(text)
            near = self._index.near(text)
            # Other texts may have the same 3-grams in another order: near, but not equal.
            found = [(number, 1.0) for number in (equal,) if number is not None]
            found += [(number, min(j, 0.9999)) for number, j in near if number != equal]
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[text] = found
        return found

    def _without_picture(self, text: int, answer: str) -> bool:
        """Whether an item is this question and answer and no more."""
        return any(
            not self.items[number].images and normalised(self.items[number].answer) == answer
            for number in self.of_text[text]
        )

    def asked_items(self) -> Iterator[int]:
        """Items of which one text at least is asked in the corpus."""
        yield from {number for text in self.hits for number in self.of_text[text]}
