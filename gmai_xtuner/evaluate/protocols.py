"""Named, versioned ways to ask and score each benchmark.

A score is comparable only with scores of the same protocol: the same questions, the same words around them,
the same rules of scoring. Published numbers mix protocols; ``docs/benchmarks.md`` says whose is which.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.evaluate.benchmarks import NAMES, VARIANTS
from gmai_xtuner.evaluate.benchmarks.gmai_mmbench import TASK
from gmai_xtuner.evaluate.benchmarks.huatuo import COUNTS
from gmai_xtuner.evaluate.questions import Question, Score
from gmai_xtuner.evaluate.scoring import SCORERS, Scorer
from gmai_xtuner.evaluate.scoring.closed import is_closed
from gmai_xtuner.evaluate.scoring.polarity import polarity


class ProtocolError(GMAIError):
    """No such protocol or scorer, or one that does not fit the question."""


@dataclass(frozen=True, slots=True)
class Average:
    """How scores become one number.

    Args:
        kind: ``micro`` is the mean over questions, ``macro`` the mean over the means of groups.
        over: the key of ``Question.groups`` that a macro average is over; None for micro.
    """

    kind: Literal["micro", "macro"]
    over: str | None = None


MICRO = Average("micro")

Questions = Literal["all", "yes_no", "closed", "open", "options"]
"""Which questions count: all; those answered by yes or no; those that the authors call closed, or open; those
with options."""

Words = Literal["llava", "vlmevalkit", "short", "short_zh"]
"""The words of a prompt: see :meth:`Protocol.prompt`."""

LETTER_INSTRUCTION = "Answer with the option's letter from the given choices directly."
SHORT_INSTRUCTION = "Answer the question using a single word or phrase."
SHORT_INSTRUCTION_ZH = "请用一个词或短语回答问题。"
VLMEVALKIT_INSTRUCTION = "Please select the correct answer from the options above. "


@dataclass(frozen=True)
class Protocol:
    """One way to ask and score one benchmark.

    Args:
        name: e.g. ``"closed-251"``, unique in its benchmark.
        version: grows when a question, a prompt or a score changes.
        benchmark: name of the benchmark.
        variant: the variant of the benchmark that it is for.
        description: whose protocol it is and what it counts.
        expected: number of questions that the authors' files give; None where unknown.
        scorer: name of the scorer whose score is the protocol's.
        also: names of further scorers that the same stored answers can be scored by.
        averages: the first is the headline.
        table: keys of ``Question.groups`` that the tables are over.
        max_new_tokens: the longest answer, in tokens.
        questions: which questions count.
        words: the words of the prompt.
    """

    name: str
    version: int
    benchmark: str
    variant: str
    description: str
    expected: int | None
    scorer: str
    also: tuple[str, ...] = ()
    averages: tuple[Average, ...] = (MICRO,)
    table: tuple[str, ...] = ()
    max_new_tokens: int = 64
    questions: Questions = "all"
    words: Words = "llava"

    def select(self, questions: Iterable[Question]) -> tuple[Question, ...]:
        """The questions that count, in their order."""
        return tuple(question for question in questions if self._counts(question))

    def prompt(self, question: Question) -> str:
        """What is asked: question, options and instruction; ``<image>`` where the authors name an image.

        ``llava`` (LLaVA-1.5, MMMU and HuatuoGPT-Vision): question, lines "A. ...", then
        :data:`LETTER_INSTRUCTION`; without options :data:`SHORT_INSTRUCTION`. ``vlmevalkit``: its default
        for multiple choice, "Question: ...", "Options:", lines, :data:`VLMEVALKIT_INSTRUCTION`. ``short``:
        without options, in English or Chinese (``short_zh``).
        """
        if not question.options:
            instruction = SHORT_INSTRUCTION_ZH if self.words == "short_zh" else SHORT_INSTRUCTION
            return f"{question.text}\n{instruction}"
        options = "\n".join(f"{letter}. {text}" for letter, text in question.lettered().items())
        if self.words == "vlmevalkit":
            return f"Question: {question.text}\nOptions:\n{options}\n{VLMEVALKIT_INSTRUCTION}"
        return f"{question.text}\n{options}\n{LETTER_INSTRUCTION}"

    def score(self, question: Question, answer_text: str, *, scorer: str | None = None) -> Score:
        """Score one stored answer, by the protocol's scorer or by another of ``SCORERS``.

        Raises:
            ProtocolError: there is no such scorer, or it can't score this question, e.g. one of letters a
                question without options.
        """
        return self._rule(scorer or self.scorer, [question]).score(question, answer_text)

    def check_scorer(self, scorer: str, questions: Iterable[Question]) -> None:
        """Before questions are asked: whether their answers can be scored so.

        Raises:
            ProtocolError: as :meth:`score`, with the first question that can't be.
        """
        self._rule(scorer, questions)

    def _rule(self, name: str, questions: Iterable[Question]) -> Scorer:
        if name not in SCORERS:
            raise ProtocolError(f"no scorer is called {name!r}. There are {', '.join(SCORERS)}.")
        rule = SCORERS[name]
        for question in questions:
            if not rule.applies(question):
                raise ProtocolError(
                    f"the scorer {name} can't score question {question.id} of {self.benchmark} {self.name}: "
                    f"it is for other questions ({rule.description}). Take one of "
                    f"{', '.join((self.scorer, *self.also))}."
                )
        return rule

    def _counts(self, question: Question) -> bool:
        match self.questions:
            case "all":
                return True
            case "yes_no":
                return question.answer is not None and polarity(question.answer) is not None
            case "closed":
                return is_closed(question)
            case "open":
                return not is_closed(question)
            case "options":
                return bool(question.options)


_CHOICE_ALSO = ("option_letter", "option_text", "vlmevalkit", "huatuogpt")
_CLOSED_ALSO = ("exact_match", "llava_med")
_OPEN_ALSO = ("exact_match", "token_f1", "llava_med")
_FULL_ALSO = ("closed_or_exact", "closed_or_f1", "token_recall", "exact_match", "llava_med")


def _vqa(
    benchmark: str,
    variant: str,
    table: tuple[str, ...],
    counts: Mapping[Questions, tuple[str, int]],
    *,
    words: Words = "short",
) -> tuple[Protocol, ...]:
    """Protocols of a set without options, closed ones first."""
    told: Mapping[Questions, str] = {
        "yes_no": "questions answered by yes or no, as HuatuoGPT-Vision counts them",
        "closed": "questions that the authors call CLOSED, as LLaVA-Med counts them",
        "open": "questions that are not closed: share of the gold answer's words that were said",
        "all": "all questions: closed ones right or wrong, open ones by token recall",
    }
    scorers: Mapping[Questions, tuple[str, tuple[str, ...]]] = {
        "yes_no": ("yes_no", _CLOSED_ALSO),
        "closed": ("closed", _CLOSED_ALSO),
        "open": ("token_recall", _OPEN_ALSO),
        "all": ("closed_or_recall", _FULL_ALSO),
    }
    macro = (Average("macro", "answer_type"),) if "answer_type" in table else ()
    return tuple(
        Protocol(
            name=name,
            version=1,
            benchmark=benchmark,
            variant=variant,
            description=told[kind],
            expected=expected,
            scorer=scorers[kind][0],
            also=scorers[kind][1],
            averages=(MICRO, *macro) if kind == "all" else (MICRO,),
            table=table,
            questions=kind,
            words=words,
        )
        for kind, (name, expected) in counts.items()
    )


def _choice(
    benchmark: str,
    variant: str,
    name: str,
    expected: int | None,
    description: str,
    *,
    macro: tuple[str, ...] = (),
    table: tuple[str, ...] = (),
    max_new_tokens: int = 64,
    questions: Questions = "options",
    words: Words = "llava",
) -> Protocol:
    """A protocol of a set with options."""
    return Protocol(
        name=name,
        version=1,
        benchmark=benchmark,
        variant=variant,
        description=description,
        expected=expected,
        scorer="choice",
        also=_CHOICE_ALSO,
        averages=(MICRO, *(Average("macro", over) for over in macro)),
        table=table or macro,
        max_new_tokens=max_new_tokens,
        questions=questions,
        words=words,
    )


_SLAKE_TABLE = ("answer_type", "content_type", "modality", "location")
_GMAI_TABLE = (TASK, "department", "perceptual granularity", "modality")
_MMMU_ALSO = ("mmmu",)


def _gmai() -> tuple[Protocol, ...]:
    protocols = []
    for variant, expected in (("val", 4550), ("test", 21281)):
        hidden = "; the authors keep the answers" if variant == "test" else ""
        protocols.append(
            _choice(
                "gmai_mmbench",
                variant,
                f"{variant}-{expected}",
                expected,
                f"all questions, asked as LLaVA is; the published overall is the mean over questions{hidden}",
                macro=(TASK,),
                table=_GMAI_TABLE,
            )
        )
        protocols.append(
            _choice(
                "gmai_mmbench",
                variant,
                f"{variant}-{expected}-vlmevalkit",
                expected,
                f"the same in the default words of VLMEvalKit, by which the authors evaluate{hidden}",
                macro=(TASK,),
                table=_GMAI_TABLE,
                max_new_tokens=256,
                words="vlmevalkit",
            )
        )
    return tuple(protocols)


def _mmmu() -> tuple[Protocol, ...]:
    def one(
        variant: str, name: str, expected: int | None, told: str, questions: Questions
    ) -> Protocol:
        has_open = questions == "all"
        return Protocol(
            name=name,
            version=1,
            benchmark="mmmu_health",
            variant=variant,
            description=told,
            expected=expected,
            scorer="closed_or_exact" if has_open else "choice",
            also=_MMMU_ALSO if has_open else (*_CHOICE_ALSO, *_MMMU_ALSO),
            averages=(MICRO, Average("macro", "subject")),
            table=("subject", "topic_difficulty"),
            questions=questions,
        )

    return (
        one(
            "validation",
            "closed-145",
            145,
            "multiple-choice questions alone, as HuatuoGPT-Vision counts them (28, 30, 30, 27, 30)",
            "options",
        ),
        one("validation", "full-150", 150, "all questions, as the paper counts them", "all"),
        one("dev", "dev-25", 25, "the five worked examples of each subject", "all"),
        one("test", "test", None, "the test part, whose answers the authors keep", "all"),
    )


def _huatuo() -> tuple[Protocol, ...]:
    told = "as HuatuoGPT-Vision's eval.py asks: letters, greedy, at most 256 tokens"
    return (
        _choice(
            "huatuo",
            "all",
            f"collection-{sum(COUNTS.values())}",
            sum(COUNTS.values()),
            f"the whole collection, {told}",
            macro=("dataset",),
            table=("dataset", "subset"),
            max_new_tokens=256,
        ),
        *(
            _choice(
                "huatuo",
                dataset,
                f"{dataset}-{count}",
                count,
                f"its part {dataset}, {told}",
                table=("subset",),
                max_new_tokens=256,
            )
            for dataset, count in COUNTS.items()
        ),
    )


PROTOCOLS: Mapping[str, tuple[Protocol, ...]] = {
    "vqa_rad": _vqa(
        "vqa_rad",
        "test",
        ("answer_type", "phrase_type", "question_type", "image_organ"),
        {
            "yes_no": ("closed-251", 251),
            "closed": ("closed-272", 272),
            "open": ("open-179", 179),
            "all": ("full-451", 451),
        },
    ),
    "slake": (
        *_vqa(
            "slake",
            "en",
            _SLAKE_TABLE,
            {
                "closed": ("closed-416", 416),
                "yes_no": ("closed-355", 355),
                "open": ("open-645", 645),
                "all": ("full-1061", 1061),
            },
        ),
        *_vqa(
            "slake",
            "zh",
            _SLAKE_TABLE,
            {
                "all": ("full-1033", 1033),
                "closed": ("closed-420", 420),
                "open": ("open-613", 613),
            },
            words="short_zh",
        ),
    ),
    "pmc_vqa": (
        _choice(
            "pmc_vqa", "test_clean", "clean-2000", 2000, "the 2,000 questions checked by people"
        ),
        _choice(
            "pmc_vqa", "test_2", "test_2", None, "the second, larger test file, not checked by hand"
        ),
    ),
    "omnimedvqa": (
        _choice(
            "omnimedvqa",
            "open-access",
            "open-88996",
            88996,
            "all open-access questions; mean over questions (micro) and over the five types (macro)",
            macro=("question_type", "modality"),
            table=("question_type", "modality", "dataset"),
        ),
        _choice(
            "omnimedvqa",
            "restricted-access",
            "restricted",
            None,
            "the questions whose images each dataset's owner must permit",
            macro=("question_type", "modality"),
            table=("question_type", "modality", "dataset"),
        ),
    ),
    "gmai_mmbench": _gmai(),
    "mmmu_health": _mmmu(),
    "path_vqa": (
        *_vqa(
            "path_vqa",
            "test",
            ("answer_type",),
            {
                "yes_no": ("closed-3362", 3362),
                "open": ("open-3357", 3357),
                "all": ("full-6719", 6719),
            },
        ),
        *_vqa("path_vqa", "val", ("answer_type",), {"all": ("val-6259", 6259)}),
        *_vqa("path_vqa", "train", ("answer_type",), {"all": ("train-19654", 19654)}),
    ),
    "huatuo": _huatuo(),
}
"""Protocols by benchmark; the first of each variant is its default."""


def protocol(benchmark: str, name: str | None = None, *, variant: str | None = None) -> Protocol:
    """Look a protocol up.

    Args:
        benchmark: one of :data:`gmai_xtuner.evaluate.benchmarks.NAMES`.
        name: as in :data:`PROTOCOLS`; None takes the default of the variant.
        variant: None takes the one that the name belongs to, or the benchmark's first.

    Raises:
        ProtocolError: no such benchmark, protocol or variant; the message lists those there are.
    """
    if benchmark not in PROTOCOLS:
        raise ProtocolError(f"no benchmark is called {benchmark!r}. There are {', '.join(NAMES)}.")
    there = PROTOCOLS[benchmark]
    if name is None:
        variant = variant or VARIANTS[benchmark][0]
    fitting = [
        one
        for one in there
        if (name is None or one.name == name) and (variant is None or one.variant == variant)
    ]
    if not fitting:
        listed = ", ".join(f"{one.name} ({one.variant})" for one in there)
        wanted = f"protocol {name!r}" if name else "protocol"
        of_variant = f" for the variant {variant!r}" if variant else ""
        raise ProtocolError(f"{benchmark} has no {wanted}{of_variant}. There are {listed}.")
    return fitting[0]
