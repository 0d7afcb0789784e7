"""Questions for the tasks that the corpus trains, in the words that it uses."""

from __future__ import annotations

from dataclasses import dataclass

from gmai_xtuner.demo.words import Language


@dataclass(frozen=True, slots=True)
class Preset:
    """A task.

    Args:
        key: stable name.
        name: on its button.
        question: what it asks; may be changed before it is sent.
    """

    key: str
    name: dict[Language, str]
    question: dict[Language, str]


PRESETS: tuple[Preset, ...] = (
    Preset(
        "caption",
        {"en": "Caption", "zh": "图像描述"},
        {"en": "Describe this image.", "zh": "请描述这张图像。"},
    ),
    Preset(
        "question",
        {"en": "Question", "zh": "问答"},
        {"en": "What is the finding in this image?", "zh": "这张图像的所见是什么？"},
    ),
    Preset(
        "report",
        {"en": "Report", "zh": "报告"},
        {"en": "Write a short report on this image.", "zh": "请为这张图像写一份简短报告。"},
    ),
    Preset(
        "localisation",
        {"en": "Localisation", "zh": "定位"},
        {
            "en": "Give the coordinates of the lesion in this image.",
            "zh": "请给出图像中病变的坐标。",
        },
    ),
    Preset(
        "differential",
        {"en": "Differential diagnosis", "zh": "鉴别诊断"},
        {
            "en": "Which differential diagnoses fit this image? Name them in order, each with its reason.",
            "zh": "这张图像应考虑哪些鉴别诊断？请按可能性排列，并分别说明依据。",
        },
    ),
)
