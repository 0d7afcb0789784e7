# SPDX-License-Identifier: Apache-2.0

"""Is it a conversation in the item's language that neither refuses nor speaks of its instructions?"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pydantic import Field, model_validator

from data_tools.checks.terms import Said
from data_tools.items import IMAGE, TEXT_FORMS, Conversation, Item, Problem
from data_tools.options import Options

_CHINESE = re.compile(r"[\u3400-\u9fff]")
_LETTERS = re.compile(r"[A-Za-z]+|[\u3400-\u9fff]")
_SENTENCE = re.compile(r"[^.。!！?？\n]{24,}[.。!！?？\n]")
# Forms whose answers are sentences; of perception a letter may be enough.
_SENTENCES = ("caption", "region_caption", "instruction", "dialogue", *TEXT_FORMS)
# Compared in lower case with single spaces. What a model says when it has read annotations and shows it.
LEAKS = (
    "according to the annotation", "based on the annotation", "the annotation", "annotations provided",
    "annotated as", "annotated by", "bounding box", "bounding-box", "bbox", "the provided label",
    "the given label", "provided information", "information provided", "given information",
    "the label indicates", "the label is", "labelled as", "labeled as", "as labeled", "as labelled",
    "ground truth", "ground-truth", "the metadata", "provided metadata", "the provided context",
    "the prompt", "as instructed", "the provided coordinates", "given coordinates",
    "the highlighted box", "the red box", "the red rectangle", "red outline", "drawn rectangle",
    "根据标注", "标注信息", "根据注释", "标注框", "边界框", "检测框", "所给标签", "提供的标签", "给定的标签",
    "提供的信息", "给定的信息", "根据提示", "元数据", "红框", "红色方框", "真实标签",
)  # fmt: skip
REFUSALS = (
    "as an ai", "as a language model", "i'm sorry", "i am sorry", "i apologize", "i cannot", "i can't",
    "i can not", "i am unable", "i'm unable", "i am not able", "i'm not able", "unable to assist",
    "cannot assist", "can't assist", "unable to view", "unable to see the image", "not able to see",
    "no image was provided", "no image provided", "cannot provide medical", "can't provide medical",
    "cannot provide a diagnosis", "作为一个ai", "作为人工智能", "作为语言模型", "抱歉", "对不起",
    "我无法", "我不能", "无法提供医疗", "没有看到图像", "未提供图像",
)  # fmt: skip

# A text without Chinese has none of the Chinese phrases; most texts have none.
_ENGLISH_LEAKS = tuple(filter(str.isascii, LEAKS))
_ENGLISH_REFUSALS = tuple(filter(str.isascii, REFUSALS))


class CheckOptions(Options):
    """The section ``checks``: bounds of an accepted conversation.

    Lengths are in words; a Chinese character counts as one.

    Args:
        agreement: the label or a synonym is named, and no other label of the set is claimed.
        modality: no other modality is claimed.
        side: left and right are not contradicted where the annotation has a side.
        figures: numbers of regions, and sizes, are not contradicted.
        boxes: coordinates in an answer are those of the record.
        leaks: an answer doesn't speak of the annotation that it was given.
        min_words: of all answers of a caption or a text form together.
        max_words: of one answer.
        language_share: of the letters of all answers, at least so many are of the item's language.
        allowed_phrases: phrases that would count as a leak or a refusal, and don't for this corpus.
        further_leaks: phrases that count as a leak as well.
    """

    agreement: bool = True
    modality: bool = True
    side: bool = True
    figures: bool = True
    boxes: bool = True
    leaks: bool = True
    min_words: int = Field(4, ge=1)
    max_words: int = Field(400, ge=1)
    language_share: float = Field(0.5, ge=0, le=1)
    allowed_phrases: tuple[str, ...] = ()
    further_leaks: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _sensible(self) -> CheckOptions:
        if self.min_words > self.max_words:
            raise ValueError(f"min_words is {self.min_words} and max_words {self.max_words}")
        return self


def turns(conversation: Conversation, item: Item) -> Iterator[Problem]:
    """Want human and gpt in turn, nothing empty, one image mark at the head or none in a text form."""
    if not conversation or len(conversation) % 2:
        yield Problem("turns don't alternate", f"{len(conversation)} turns; give an answer to each")
        return
    for number, turn in enumerate(conversation):
        if turn.speaker != ("human", "gpt")[number % 2]:
            yield Problem("turns don't alternate", f"turn {number + 1} is of {turn.speaker!r}")
            return
        if not turn.text.strip() or turn.text.strip() == IMAGE:
            yield Problem("empty turn", f"turn {number + 1} says nothing")
    marks = sum(turn.text.count(IMAGE) for turn in conversation)
    expected = 0 if item.form in TEXT_FORMS else 1
    if marks != expected:
        yield Problem("wrong number of image marks", f"{marks} of {IMAGE} instead of {expected}")
    elif expected and not conversation[0].text.startswith(IMAGE):
        yield Problem("image mark isn't first", f"{IMAGE} stands in the middle of a turn")


def length(what: Said, item: Item, options: CheckOptions) -> Iterator[Problem]:
    """Want lengths within the bounds; Chinese characters count as words."""
    numbers = [_number_of_words(answer) for answer in what.answers]
    if item.form in _SENTENCES and sum(numbers) < options.min_words:
        yield Problem(
            "answer too short", f"{sum(numbers)} words, at least {options.min_words} wanted"
        )
    if max(numbers, default=0) > options.max_words:
        yield Problem(
            "answer too long", f"{max(numbers)} words, at most {options.max_words} wanted"
        )


def language(what: Said, item: Item, options: CheckOptions) -> Iterator[Problem]:
    """Want the item's language; a name or an option letter in another is none of it."""
    if what.text.isascii() and (item.language == "en" or item.form == "perception"):
        return
    letters = _LETTERS.findall(what.text)
    if not letters or (item.form == "perception" and len(letters) < 4):
        return
    chinese = sum(1 for letter in letters if letter >= "\u3400") / len(letters)
    share = chinese if item.language == "zh" else 1 - chinese
    if share < options.language_share:
        name = {"en": "English", "zh": "Chinese"}[item.language]
        yield Problem("wrong language", f"only {share:.0%} of it is {name}; write {name}")


def repetition(what: Said) -> Iterator[Problem]:
    """Want no sentence twice within one answer."""
    for answer in what.answers:
        if len(answer) < 48:
            continue
        sentences = [sentence.strip().lower() for sentence in _SENTENCE.findall(answer)]
        if len(set(sentences)) < len(sentences):
            again = next(sentence for sentence in sentences if sentences.count(sentence) > 1)
            yield Problem("sentence repeated", again[:120])
            return


def _number_of_words(text: str) -> int:
    if text.isascii():
        return text.count(" ") + 1
    return len(_CHINESE.findall(text)) + len(_CHINESE.sub(" ", text).split())


def leaks(what: Said, options: CheckOptions) -> Iterator[Problem]:
    """Yield phrases that speak of the annotation."""
    phrases = _ENGLISH_LEAKS if what.plain.isascii() else LEAKS
    if options.further_leaks:
        phrases += tuple(map(str.lower, options.further_leaks))
    phrase = _first(phrases, what.plain, options)
    if phrase is not None:
        yield Problem("speaks of the annotation", f"it says {phrase!r}; don't mention it")


def refusal(what: Said, options: CheckOptions) -> Iterator[Problem]:
    """Yield phrases of a model that won't answer."""
    phrases = _ENGLISH_REFUSALS if what.plain.isascii() else REFUSALS
    phrase = _first(phrases, what.plain, options)
    if phrase is not None:
        yield Problem("the model refused", f"it says {phrase!r}")


def _first(phrases: tuple[str, ...], text: str, options: CheckOptions) -> str | None:
    """Return the first phrase that is in a text and not in one that is allowed."""
    for phrase in phrases:
        if phrase in text and not any(
            phrase in allowed.lower() for allowed in options.allowed_phrases
        ):
            return phrase
    return None
