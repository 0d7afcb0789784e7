"""Questions and conversations without a picture: the facts of a record told in words, and questions on them.

They teach the language of records, not new medicine: the question holds the facts that its answer is about.
"""

from __future__ import annotations

from data_tools.forms.teller import Teller, without_image
from data_tools.items import Conversation, Item, SourceContext
from data_tools.records import Record
from data_tools.taxonomy import Taxonomy

# A result is what a reader concluded (a class, a grade), in a sentence of its own.
_LINE = (
    "{0} has been read, with this result: {1}. Put that into one sentence of a report.",
    "Write one line of a report: {0}, result {1}.",
)
_LINE_ZH = (
    "一幅{0}的结果为{1}。请写成报告中的一句话。",
    "请将以下内容写成一句报告：{0}，结果为{1}。",
)
_WHO = (
    "{0} has been read with the result {1}, in the department {2}. Say what was examined, where, "
    "and the result.",
    "A note says: {0}, {2}, result {1}. Read it out as full sentences.",
)
_WHO_ZH = (
    "{2}的一幅{0}结果为{1}。请用完整的句子复述检查、科室和结果。",
    "记录为：{0}，{2}，结果{1}。请用完整的句子表述。",
)
# What is seen in a picture (an organ, cells) is no result.
_SHOWN_LINE = (
    "{0} has been read and shows the following: {1}. Put that into one sentence of a report.",
    "Write one line of a report: {0}, shown in it: {1}.",
)
_SHOWN_LINE_ZH = (
    "一幅{0}显示{1}。请写成报告中的一句话。",
    "请将以下内容写成一句报告：{0}，显示{1}。",
)
_SHOWN_WHO = (
    "{0} has been read in the department {2} and shows the following: {1}. Say what was examined, "
    "where, and what is seen.",
    "A note says: {0}, {2}, shown in it: {1}. Read it out as full sentences.",
)
_SHOWN_WHO_ZH = (
    "{2}的一幅{0}显示{1}。请用完整的句子复述检查、科室和所见。",
    "记录为：{0}，{2}，显示{1}。请用完整的句子表述。",
)
_OF_THINGS = ("Organ Recognition", "Blood Vessels", "Bone", "Cell", "Microorganism", "Muscle",
              "Nervous Tissue", "Surgical Instrument")  # fmt: skip


def write(item: Item, record: Record, context: SourceContext, taxonomy: Taxonomy) -> Conversation:
    """One question; as many as ``item.kind`` says where the form is ``text_multi``."""
    teller = Teller(item, record, context, taxonomy)
    picture, names = teller.picture(), teller.names(record.names)
    first = picture if teller.chinese else f"{picture[:1].upper()}{picture[1:]}"
    has_department = record.department != "None"
    shown = _is_shown(record)
    if item.form == "text_single" and has_department and teller.dice.below(2):
        who = (_SHOWN_WHO, _SHOWN_WHO_ZH) if shown else (_WHO, _WHO_ZH)
        question = teller.pick(*who).format(first, names, teller.department())
        return without_image(question, teller.joined(_result(teller), _department(teller)))
    line = (_SHOWN_LINE, _SHOWN_LINE_ZH) if shown else (_LINE, _LINE_ZH)
    question = teller.pick(*line).format(first, names)
    turns = [*without_image(question, _result(teller))]
    if item.form == "text_single":
        return tuple(turns)
    zh = teller.chinese
    modality = teller.modality_within()
    if shown:
        what = (
            ("图像显示什么？", f"显示{names}。")
            if zh
            else ("And what did it show?", f"It showed the following: {names}.")
        )
    else:
        what = (
            ("结果是什么？", f"结果为{names}。")
            if zh
            else ("And what was the result?", f"The result was {names}.")
        )
    more = [
        (
            "其中提到的成像方式是什么？" if zh else "Which modality is named in it?",
            f"成像方式是{modality}。" if zh else f"The modality is {modality}.",
        ),
        what,
    ]
    if has_department:
        more.insert(
            1,
            (
                f"科室为{teller.department()}，请补充这一点。"
                if zh
                else f"Add that the department was {teller.department()}.",
                teller.joined(_result(teller), _department(teller)),
            ),
        )
    for question, answer in more[: max(1, int(item.kind or "3") - 1)]:
        turns += without_image(question, answer)
    return tuple(turns)


def _is_shown(record: Record) -> bool:
    """Whether the labels are things that are seen, not what was concluded from them."""
    if record.clinical_task is not None:
        return record.clinical_task.startswith(_OF_THINGS)
    return all(label.box is not None for label in record.labels)


def _result(teller: Teller) -> str:
    names = teller.names(teller.record.names)
    if _is_shown(teller.record):
        if teller.chinese:
            return f"{teller.modality()}图像显示{names}。"
        return f"The {teller.picture().split(' ', 1)[1]} shows the following: {names}."
    if teller.chinese:
        return f"{teller.modality()}图像的结果为{names}。"
    return f"The result of the {teller.picture().split(' ', 1)[1]} is {names}."


def _department(teller: Teller) -> str:
    if teller.chinese:
        return f"科室为{teller.department()}。"
    return f"The department is {teller.department()}."
