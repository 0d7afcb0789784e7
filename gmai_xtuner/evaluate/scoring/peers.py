# SPDX-License-Identifier: Apache-2.0

"""The rules of other evaluation kits, for comparison with the scores that they publish.

Each is written anew from the kit's code at the commit that docs/benchmarks.md (Scorers) links, which says
where they differ from ours. What a kit gives to a judge, to a random choice or to an exception is "not
understood" here.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher

from gmai_xtuner.evaluate.questions import Question, Score, Scorer
from gmai_xtuner.evaluate.scoring.choice import has_options
from gmai_xtuner.evaluate.scoring.free_text import is_closed
from gmai_xtuner.evaluate.scoring.text import NUMBER_WORDS, TABLES


def _score_first(question: Question, letter: str | None) -> Score:
    """Compare with the file's one letter, as the kits do, though another option may read the same."""
    right = letter is not None and letter == question.target
    return Score(float(right), letter)


def _letter_scorer(
    name: str, description: str, read: Callable[[str, dict[str, str]], str | None]
) -> Scorer:
    rule = lambda question, answer: _score_first(question, read(answer, question.lettered()))  # noqa: E731
    return Scorer(name, 1, description, rule, has_options)


# VLMEvalKit

REFUSED = "Z"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_API_FAILED = "Failed to obtain answer via API"
_PUNCTUATION_SPACES = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_ANSWER_IS = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_FROM_THE_END = 5


def infer(answer: str, options: dict[str, str]) -> str | None:
    """Return what ``can_infer`` does: a letter, ``Z`` for a refusal, None where it says False."""
    return _inferred_letter(answer, options) or _inferred_text(answer, options)


def _inferred_letter(answer: str, options: dict[str, str]) -> str | None:
    if _API_FAILED in answer:
        return None
    if any(refusal in answer for refusal in _REFUSALS):
        return REFUSED
    words = answer.translate(_PUNCTUATION_SPACES).split()
    present = [letter for letter in options if letter in words]
    if len(present) == 1 and words.index(present[0]) > len(words) - _FROM_THE_END:
        return present[0]
    if not present and REFUSED in words:
        return REFUSED
    match = _ANSWER_IS.search(answer)
    return match[1].upper() if match and match[1].upper() in options else None


def _inferred_text(answer: str, options: dict[str, str]) -> str | None:
    answer = answer.lower()
    if len(answer) > 2 * sum(len(option) for option in options.values()):
        return None
    present = [letter for letter, option in options.items() if option.lower() in answer]
    return present[0] if len(present) == 1 else None


VLMEVALKIT = _letter_scorer(
    "vlmevalkit", "the rules of VLMEvalKit's can_infer, without judge and random choice", infer
)


# HuatuoGPT-Vision

_FIRST_LETTER = re.compile(r"(?:is |[是为]|\W|^)(?![aA] )([a-nA-N])(?:\W|$)")


def first_letter(answer: str) -> str | None:
    """Return the letter that their scorer takes, in its case; None where it raises."""
    match = _FIRST_LETTER.search(answer)
    return match[1] if match else None


HUATUOGPT = _letter_scorer(
    "huatuogpt",
    "the rule of HuatuoGPT-Vision's scorer: the first letter that stands alone",
    lambda answer, _: first_letter(answer),
)


# MMMU

_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = (":", ",", ".", "!", "?", ";", "'")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


_FORMS = (("({})", "({})"), (" {} ", " {} "))


def parse_choice(
    answer: str, options: Mapping[str, str], forms: Sequence[tuple[str, str]] = _FORMS
) -> str | None:
    """Return the letter that their parser takes; None where it takes a random one.

    A letter counts in the first of ``forms`` that occurs; of several the one that stands last in the form
    beside it.
    """
    for sign in (",", ".", "!", "?", ";", ":", "'"):
        answer = answer.strip(sign)
    text = f" {answer} "
    for form, placed in forms:
        if found := [one for one in options if form.format(one) in text]:
            return max(found, key=lambda one: text.rfind(placed.format(one)))
    lower = text.lower()
    named = [one for one, option in options.items() if option.lower() in lower]
    if len(text.split()) > 5 and named:
        return max(named, key=lambda one: lower.rfind(options[one].lower()))
    return None


def parse_open(answer: str) -> set[str | float]:
    """Return the texts and numbers that their parser finds in an answer to an open question."""
    # in lower case their split before a capital never happens
    parts = answer.strip().strip(".").lower().split("\n")
    found: list[str] = []
    for number, part in enumerate(parts, start=1):
        keys = _KEYS if number < len(parts) else (*_KEYS, "=")
        behind = [part.split(key)[-1].strip() for key in keys if key in part]
        shortest = min(behind, key=len, default="")
        if shortest and shortest not in _TRIVIAL:
            found.append(shortest)
    found = found or [answer.strip().strip(".").lower()]
    numbers = [number for text in found for form in _NUMBERS for number in form.findall(text)]
    return {one for text in (*found, *numbers) for one in _as_number_or_text(text)}


def _as_number_or_text(text: str) -> tuple[str | float, ...]:
    """Round a number to two decimals; lower a text, one sign alone twice, beside a space."""
    text = text.strip()
    try:
        return (round(float(text.replace(",", "")), 2),)
    except ValueError:
        pass
    text = text.lower()
    return (f" {text}", f"{text} ") if len(text) == 1 else (text,)


def _score_mmmu(question: Question, answer: str) -> Score:
    if question.options:
        return _score_first(question, parse_choice(answer, question.lettered()))
    said = parse_open(answer)
    texts = (question.answer or "", *question.answers)
    golds = [one for text in texts for one in _as_number_or_text(text)]
    right = any(
        gold in one if isinstance(gold, str) and isinstance(one, str) else gold == one
        for one in said
        for gold in golds
    )
    return Score(float(right), " | ".join(sorted(str(one) for one in said)) or None)


_OWN = "the rules of MMMU's own evaluation, without its random choice"
MMMU = Scorer("mmmu", 1, _OWN, _score_mmmu)


# LLaVA-Med

_PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_NUMBER_WORDS = {"none": "0", **dict(list(NUMBER_WORDS.items())[:11])}
_CONTRACTIONS = {word.replace("'", ""): word for word in TABLES["contracted"].split()}
_PERIODS_AT_ONCE = re.UNICODE.value  # they pass the flag as the count of `sub`


def _normalise_word(text: str) -> str:
    """Do as their ``normalize_word``, but for contractions of three words."""
    stripped = text
    for sign in _PUNCTUATION:
        beside_space = f"{sign} " in text or f" {sign}" in text or _COMMA_IN_NUMBER.search(text)
        stripped = stripped.replace(sign, "" if beside_space else " ")
    stripped = _PERIOD.sub("", stripped, count=_PERIODS_AT_ONCE)
    kept = (_NUMBER_WORDS.get(word, word) for word in stripped.lower().split())
    kept = (_CONTRACTIONS.get(word, word) for word in kept if word not in ("a", "an", "the"))
    return " ".join(kept).replace(",", "")


def open_recall(answer: str, gold: str) -> float:
    """Do as their ``recall``: hits of gold words in the answer, over these and the gold words it lacks."""
    twice = (_normalise_word(_normalise_word(text.lower())) for text in (answer, gold))
    said, expected = (Counter(text.split()) for text in twice)
    hit = sum(said[word] for word in said if word in expected)
    missed = sum(count for word, count in expected.items() if word not in said)
    return hit / (hit + missed) if said and expected and hit else 0.0


def _score_llava_med(question: Question, answer: str) -> Score:
    said, gold = _normalise_word(answer.lower()), question.answer
    if gold is None or not is_closed(question):
        return Score(None if gold is None else open_recall(answer, gold), said or None)
    answers = "yes" in said or "no" in said
    right = answers and _normalise_word(gold.lower()) in said
    return Score(float(right), said if answers else None)


LLAVA_MED = Scorer(
    "llava_med",
    1,
    "the rules of LLaVA-Med: substring for closed questions, recall with repetitions for open ones",
    _score_llava_med,
    lambda question: not question.options,
)


# MedEvalKit

_ANSWER_MARKS = (
    *("**answer**:", "**answer**", "*answer*:", "**answer:**", "answer is", "answer:", "答案:"),
    *("final answer", "final answer is"),
)


def _boxed(text: str) -> str:
    """Return what stands in the last box, "None" where there is none, as their package does."""
    depth, (_, box, content) = 0, text.rpartition("\\boxed{")
    for place, sign in enumerate(content if box else ""):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        if depth < 0:
            return content[:place].strip()
    return "None"


def _tagged(text: str) -> str:
    parts = re.findall("<answer>(.*?)</answer>", text, re.DOTALL)
    return " ".join(parts).strip() or text


def _behind_marks(text: str) -> str:
    text = text.lower()
    if "boxed" in text:
        text = _boxed(text)
    elif "<answer>" in text:
        text = _tagged(text)
    for mark in _ANSWER_MARKS:
        text = text.rpartition(mark)[2]
    return text


def most_similar(answer: str, options: Mapping[str, str]) -> str:
    """Return the letter that their ``judge_multi_choice`` takes; it takes one of any answer."""
    by_letter = {letter.lower(): option.lower() for letter, option in options.items()}
    text = answer.lower()
    first, last = text.split("\n\n")[0], text.split("\n\n")[-1].split(".")[0]
    text = first if first in by_letter else last if last in by_letter else text
    text = _behind_marks(text).strip().replace("\n", "")
    said = text.split(".")[0].split(":")[-1]
    if said in by_letter:
        return said.upper()
    likeness = {
        letter: float(option == said) * 2 or SequenceMatcher(None, option, text).ratio()
        for letter, option in by_letter.items()
    }
    return max(likeness, key=lambda letter: likeness[letter]).upper()


def _score_medevalkit(question: Question, answer: str) -> Score:
    if question.options:
        return _score_first(question, most_similar(answer, question.lettered()))
    if question.answer is None:
        return Score(None, answer or None)
    is_slake = "content_type" in question.groups  # its gold answers keep their case there
    gold, polar = question.answer, question.answer
    if not is_slake:
        gold = polar = gold.lower().strip()
    said = _boxed(answer)
    said = said if said != "None" else _tagged(answer) if "<answer>" in answer else answer
    said = _behind_marks(said if is_slake else said.lower().strip())
    closed = (
        question.groups.get("answer_type", "") != "OPEN" if is_slake else polar in ("yes", "no")
    )
    if not closed:
        return Score(float(said == gold.lower()), said or None)
    said = said.replace("\n", "").replace(".", "")
    if polar not in ("yes", "no"):
        return Score(float(said == gold.lower()), said or None)
    one_of_both = ("yes" in said) != ("no" in said)
    return Score(float(one_of_both and gold in said), said if one_of_both else None)


MEDEVALKIT = Scorer(
    "medevalkit", 1, "the rules of MedEvalKit, without its judge", _score_medevalkit
)


# lmms-eval

_PUNCTUATION_OF_BOTH = (
    string.punctuation
    + "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～、，。；：《》？【】（）"
)
_TO_SPACES = str.maketrans(dict.fromkeys(_PUNCTUATION_OF_BOTH, " "))
_SAME_AS = {word: said for said, words in TABLES["lmms_eval"].items() for word in words}


_LMMS_FORMS = (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} "))


def _plain_words(text: str) -> str:
    text = re.sub(r"\([^)]*\)|（[^）]*）", " ", text.strip().lower())
    text = " ".join(text.translate(_TO_SPACES).split())
    return _SAME_AS.get(text, text)


def _score_lmms_eval(question: Question, answer: str) -> Score:
    if question.options:
        return _score_first(question, parse_choice(answer, question.lettered(), _LMMS_FORMS))
    if "answer_type" not in question.groups:
        return _score_mmmu(question, answer)
    said = _plain_words(answer)
    right = None if question.answer is None else float(said == _plain_words(question.answer))
    return Score(right, said or None)


_LMMS = "the rules of lmms-eval's MMMU and SLAKE, without its random choice"
LMMS_EVAL = Scorer("lmms_eval", 1, _LMMS, _score_lmms_eval)
