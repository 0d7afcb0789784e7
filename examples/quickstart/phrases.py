# SPDX-License-Identifier: Apache-2.0

"""What the quickstart's conversations say, in English and in Chinese.

Every sentence is a fact of general knowledge, or has its slots filled with known labels and
measured values.
"""

from __future__ import annotations

LANGUAGES = ("en", "zh")
CHINESE_SHARE = 4  # one conversation in four

MODALITY_NAMES = {
    "en": {"ct": "CT", "mr": "MRI", "fundus": "fundus photography", "histology": "histology"},
    "zh": {"ct": "CT", "mr": "磁共振", "fundus": "眼底照相", "histology": "组织病理"},
}
ANATOMY_NAMES = {
    "en": {
        "head": "head",
        "brain": "brain",
        "abdomen": "abdomen",
        "retina": "retina",
        "colon": "colon",
    },
    "zh": {"head": "头部", "brain": "脑", "abdomen": "腹部", "retina": "视网膜", "colon": "结肠"},
}
HALF_NAMES = {
    "en": {"left": "the left half", "right": "the right half", "equal": "neither half"},
    "zh": {"left": "左半部分", "right": "右半部分", "equal": "两半相同"},
}

MODALITY_QUESTIONS = {
    "en": (
        "What is the imaging modality: CT, MRI, fundus photography or histology?",
        "Which modality was used to take this image?",
        "Name the imaging modality.",
    ),
    "zh": ("这张图像属于哪种成像方式？",),
}
ANATOMY_QUESTIONS = {"en": "Which part of the body is shown?", "zh": "图中显示的是哪个部位？"}
COLOR_QUESTIONS = {"en": "Is the image in color or in gray?", "zh": "图像是彩色还是灰度？"}
COLOR_ANSWERS = {"en": {True: "color", False: "gray"}, "zh": {True: "彩色", False: "灰度"}}
STAIN_QUESTIONS = {
    "en": "How was the tissue stained?",
    "zh": "组织使用了什么染色？",
}
STAIN_ANSWERS = {
    "en": "DAB immunohistochemistry with a haematoxylin counterstain",
    "zh": "DAB 免疫组化染色，苏木精复染",
}
WINDOW_QUESTIONS = {"en": "Which CT window is used?", "zh": "使用的是哪种 CT 窗？"}
WINDOW_NAMES = {
    "en": {"brain": "brain window", "soft tissue": "soft tissue window"},
    "zh": {"brain": "脑窗", "soft tissue": "软组织窗"},
}
HALF_QUESTIONS = {"en": "Which half of the image is brighter?", "zh": "图像哪一半更亮？"}
CAPTION_QUESTIONS = {"en": "Describe the image in one sentence.", "zh": "请用一句话描述这张图像。"}
COMPARE_QUESTIONS = {
    "en": "Were these two images taken with the same modality?",
    "zh": "这两张图像的成像方式相同吗？",
}

TEXT_FACTS = {
    "en": (
        ("What does CT stand for?", "Computed tomography."),
        ("What does MRI stand for?", "Magnetic resonance imaging."),
        (
            "What does a fundus photograph show?",
            "The back of the eye, with the retina and its vessels.",
        ),
        ("Which unit do CT values have?", "Hounsfield units."),
        ("What is the CT value of water?", "0 Hounsfield units."),
        ("Does MRI use ionizing radiation?", "No, it uses a magnetic field and radio waves."),
        ("Does CT use ionizing radiation?", "Yes, it uses X-rays."),
        ("What does haematoxylin stain?", "Cell nuclei, in blue."),
        ("What is histology?", "The study of tissue under a microscope."),
    ),
    "zh": (
        ("CT 是什么的缩写？", "计算机断层扫描。"),
        ("CT 值的单位是什么？", "亨氏单位。"),
        ("磁共振使用电离辐射吗？", "不使用，它使用磁场和射频波。"),
        ("眼底照相显示什么？", "眼球后部的视网膜和血管。"),
    ),
}


def caption(
    language: str, *, modality: str, anatomy: str | None, window: str | None, brighter: str
) -> str:
    """A sentence from the known labels, another from the measured brightness of the halves."""
    name = MODALITY_NAMES[language][modality]
    half = HALF_NAMES[language][brighter]
    if language == "zh":
        place = ANATOMY_NAMES["zh"][anatomy] if anatomy else ""
        shown = f"，{WINDOW_NAMES['zh'][window]}" if window else ""
        bright = "左右两半亮度相同。" if brighter == "equal" else f"{half}更亮。"
        return f"{place}{name}图像{shown}。{bright}"
    kind = "A " + {"fundus": "fundus photograph", "histology": "histology image"}.get(
        modality, f"{name} image"
    )
    kind = kind.replace("A MRI", "An MRI")
    place = f" of the {ANATOMY_NAMES['en'][anatomy]}" if anatomy else ""
    shown = f" in the {WINDOW_NAMES['en'][window]}" if window else ""
    bright = "Both halves are equally bright." if brighter == "equal" else f"{half} is brighter."
    return f"{kind}{place}{shown}. {bright[0].upper()}{bright[1:]}"


def comparison(language: str, first: str, second: str) -> str:
    """Whether two modalities are the same, and which they are."""
    names = MODALITY_NAMES[language]
    if language == "zh":
        same = f"相同，都是{names[first]}。"
        return (
            same if first == second else f"不同，第一张是{names[first]}，第二张是{names[second]}。"
        )
    if first == second:
        return f"Yes, both are {names[first]}."
    return f"No, the first is {names[first]}, the second is {names[second]}."
