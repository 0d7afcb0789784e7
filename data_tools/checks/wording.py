"""Does an answer speak of what it was told, or refuse?"""

from __future__ import annotations

from collections.abc import Iterator

from data_tools.checks.options import CheckOptions
from data_tools.checks.said import Said
from data_tools.items import Problem

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


def leaks(what: Said, options: CheckOptions) -> Iterator[Problem]:
    """Phrases that speak of the annotation."""
    phrases = _ENGLISH_LEAKS if what.plain.isascii() else LEAKS
    if options.further_leaks:
        phrases += tuple(map(str.lower, options.further_leaks))
    phrase = _said(phrases, what.plain, options)
    if phrase is not None:
        yield Problem("speaks of the annotation", f"it says {phrase!r}; don't mention it")


def refusal(what: Said, options: CheckOptions) -> Iterator[Problem]:
    """Phrases of a model that won't."""
    phrases = _ENGLISH_REFUSALS if what.plain.isascii() else REFUSALS
    phrase = _said(phrases, what.plain, options)
    if phrase is not None:
        yield Problem("the model refused", f"it says {phrase!r}")


def _said(phrases: tuple[str, ...], text: str, options: CheckOptions) -> str | None:
    """The first phrase that is in a text and not in one that is allowed."""
    for phrase in phrases:
        if phrase in text and not any(
            phrase in allowed.lower() for allowed in options.allowed_phrases
        ):
            return phrase
    return None
