"""Visual perception: questions that the labels alone answer, made without any model.

GMAI-MM-Percept of GMAI-VL (arXiv 2411.14522, table 1). `kinds` says which questions a record can answer,
`write` asks one of them.
"""

from __future__ import annotations

from data_tools.forms.grammar import definite, denies, thirds
from data_tools.forms.options import MakeOptions
from data_tools.forms.teller import Teller, about_image
from data_tools.items import Conversation, Item, SourceContext
from data_tools.records import Label, Record
from data_tools.taxonomy import Taxonomy
from gmai_xtuner.core.rng import Rng

LETTERS = "ABCD"
# Labels that begin so are about the picture as a whole.
_OF_ALL = frozenset(("no", "normal", "without", "negative", "healthy"))
# Kinds about one region, which `Item.focus` names.
OF_A_REGION = ("region", "localisation")

_CLASS = (
    "How is this image classified?",
    "What is the finding in this image?",
    "Name the class of this image.",
)
_CLASS_ZH = ("这张图像属于哪一类？", "这张图像的所见是什么？")
_BOXES = (
    "Locate every region of {} in this image.",
    "Give the coordinates of every region of {} in this image.",
    "Detect all regions of {} in this image.",
)
_BOXES_ZH = ("请给出图像中{}的坐标。", "请检测图像中的{}。")
_WHERE = ("In which part of the picture is {}?", "Where in the picture is {}?")
_WHERE_ZH = ("{}位于图像的哪个部位？", "{}在图像的何处？")
_REGION = ("What is in the region {}?", "Name what lies at {}.")
_REGION_ZH = ("{}区域内是什么？", "请说出{}处的内容。")
_IS_THERE = ("Does this image show any {}?", "Is any {} present in this image?")
_IS_THERE_ZH = ("这张图像中有{}吗？", "图像中是否可见{}？")
_IS_CLASS = ("Is this image classified as {}?", "Is {} the finding in this image?")
_IS_CLASS_ZH = ("这张图像是否归类为{}？", "这张图像的类别是{}吗？")
_CHOOSE = ("Which of these does this image show?", "Which answer is right for this image?")
_CHOOSE_ZH = ("下列哪一项符合这张图像？", "这张图像显示的是哪一项？")
_LETTER = "Answer with the option's letter from the given choices directly."
_LETTER_ZH = "请直接回答选项的字母。"
_MANY = (
    "How many regions of {} are there in this image?",
    "Count the regions of {} in this image.",
)
_MANY_ZH = ("这张图像中有几处{}？", "请数出图像中{}的处数。")
_MODALITY = ("Which imaging modality is this?", "Name the modality of this image.")
_MODALITY_ZH = ("这是哪种成像方式？", "请说出这张图像的成像方式。")
_DEPARTMENT = ("Which department does this image concern?", "Name the department of this image.")
_DEPARTMENT_ZH = ("这张图像涉及哪个科室？", "请说出这张图像所属的科室。")


def kinds(
    record: Record, context: SourceContext, options: MakeOptions, *, chinese: bool
) -> list[str]:
    """Kinds of questions that this record can answer, in a fixed order."""
    whole = [label for label in record.labels if label.box is None]
    counts: dict[str, int] = {}
    for label in record.labels:
        if label.box is not None:
            counts[label.name] = counts.get(label.name, 0) + 1
    able = []
    if whole:
        able.append("classification")
    if counts:
        able.append("region")
        # "Every", "how many" and "where" ask for all regions of a label.
        whole_counts = [n for name, n in counts.items() if name not in record.incomplete]
        if whole_counts:
            able.append("counting")
        if any(count <= options.max_boxes for count in whole_counts):
            able.append("detection")
        if 1 in whole_counts:
            able.append("localisation")
    if options.negatives and absent(record, context, chinese=chinese):
        able += ["yes_no", "multiple_choice"]
    able.append("modality")
    if record.department != "None":
        able.append("department")
    return [kind for kind in able if options.perception_kinds.get(kind, 0) > 0]


def absent(record: Record, context: SourceContext, *, chinese: bool) -> list[str]:
    """Labels of the set that this picture doesn't have, and that can't be taken for one that it has."""
    own = (*record.names, *record.incomplete)
    words = [set(name.lower().split()) for name in own]
    return [
        name
        for name in context.vocabulary
        if name not in own
        and (not chinese or name in context.chinese)
        and not any(
            set(name.lower().split()) <= known or known <= set(name.lower().split())
            for known in words
        )
    ]


def focus_of(kind: str, record: Record, options: MakeOptions, dice: Rng) -> int | None:
    """The label that a question of this kind is about, for kinds that need one."""
    if kind not in (*OF_A_REGION, "detection", "counting"):
        return None
    counts: dict[str, int] = {}
    for label in record.labels:
        if label.box is not None:
            counts[label.name] = counts.get(label.name, 0) + 1
    fits = [
        at
        for at, label in enumerate(record.labels)
        if label.box is not None
        and (kind == "region" or label.name not in record.incomplete)
        and (kind != "localisation" or counts[label.name] == 1)
        and (kind != "detection" or counts[label.name] <= options.max_boxes)
    ]
    if kind in ("detection", "counting"):
        # By label, not by region: a rare label is asked for as often as a frequent one.
        name = dice.pick(list(dict.fromkeys(record.labels[at].name for at in fits)))
        return next(at for at in fits if record.labels[at].name == name)
    return dice.pick(fits)


def write(item: Item, record: Record, context: SourceContext, taxonomy: Taxonomy) -> Conversation:
    """The question of ``item.kind`` and its answer."""
    teller = Teller(item, record, context, taxonomy)
    question, answer = _WRITERS[item.kind](teller)
    return about_image(question, answer)


def _classification(teller: Teller) -> tuple[str, str]:
    return teller.pick(_CLASS, _CLASS_ZH), teller.names(teller.whole())


def _detection(teller: Teller) -> tuple[str, str]:
    label = _focus(teller)
    found = sorted(_same(teller, label), key=lambda region: _reading_order(region, teller.record))
    boxes = ", ".join(teller.box(region.box) for region in found if region.box)
    return teller.pick(_BOXES, _BOXES_ZH).format(teller.name(label.name)), boxes


def _localisation(teller: Teller) -> tuple[str, str]:
    label = _focus(teller)
    assert label.box is not None
    where = teller.place(label.box)
    name = teller.name(label.name)
    asked = name if teller.chinese else definite(name)
    return teller.pick(_WHERE, _WHERE_ZH).format(asked), (
        where if teller.chinese else f"In {where}"
    )


def _region(teller: Teller) -> tuple[str, str]:
    label = _focus(teller)
    assert label.box is not None
    question = teller.pick(_REGION, _REGION_ZH).format(teller.box(label.box))
    return question, teller.name(label.name)


def _counting(teller: Teller) -> tuple[str, str]:
    label = _focus(teller)
    question = teller.pick(_MANY, _MANY_ZH).format(teller.name(label.name))
    return question, str(len(_same(teller, label)))


def _yes_no(teller: Teller) -> tuple[str, str]:
    whole = teller.whole()
    yes = teller.dice.below(2) == 0
    own = whole or teller.record.names
    others = absent(teller.record, teller.context, chinese=teller.chinese)
    label = teller.dice.pick(own if yes else others)
    asked = teller.name(label)
    # Of a set of regions with pictures of none: "any no finding" is no question.
    of_all = whole or label.lower().split(" ", 1)[0] in _OF_ALL
    question = (
        teller.pick(_IS_CLASS[:1] if denies(label) else _IS_CLASS, _IS_CLASS_ZH)
        if of_all
        else teller.pick(_IS_THERE, _IS_THERE_ZH)
    )
    if teller.chinese:
        return question.format(asked), "是" if yes else "否"
    return question.format(asked), "Yes" if yes else "No"


def _multiple_choice(teller: Teller) -> tuple[str, str]:
    right = teller.dice.pick(teller.whole() or teller.record.names)
    others = absent(teller.record, teller.context, chinese=teller.chinese)
    choices = _apart(teller.dice.sample(others, len(others)))[: len(LETTERS) - 1]
    at = teller.dice.below(len(choices) + 1)
    choices.insert(at, right)
    lines = [
        f"{letter}. {teller.name(choice)}" for letter, choice in zip(LETTERS, choices, strict=False)
    ]
    question = teller.pick(_CHOOSE, _CHOOSE_ZH)
    how = _LETTER_ZH if teller.chinese else _LETTER
    return "\n".join([question, *lines, how]), LETTERS[at]


def _modality(teller: Teller) -> tuple[str, str]:
    return teller.pick(_MODALITY, _MODALITY_ZH), teller.modality()


def _department(teller: Teller) -> tuple[str, str]:
    return teller.pick(_DEPARTMENT, _DEPARTMENT_ZH), teller.department()


_WRITERS = {
    "classification": _classification,
    "detection": _detection,
    "localisation": _localisation,
    "region": _region,
    "counting": _counting,
    "yes_no": _yes_no,
    "multiple_choice": _multiple_choice,
    "modality": _modality,
    "department": _department,
}


def _focus(teller: Teller) -> Label:
    assert teller.item.focus is not None
    return teller.record.labels[teller.item.focus]


def _same(teller: Teller, label: Label) -> list[Label]:
    return [other for other in teller.record.labels if other.box and other.name == label.name]


def _apart(names: list[str]) -> list[str]:
    """Names none of which holds another's words: both could be right."""
    kept: list[str] = []
    for name in names:
        words = set(name.lower().split())
        if not any(
            words <= set(other.lower().split()) or set(other.lower().split()) <= words
            for other in kept
        ):
            kept.append(name)
    return kept


def _reading_order(label: Label, record: Record) -> tuple[int, int, int, int]:
    assert label.box is not None
    across, down = thirds(label.box, record.width, record.height)
    return (down, across, label.box[1], label.box[0])
