"""Questions and conversations without a picture: the facts of a record told in words, and questions on them.

They teach the language of records, not new medicine: the question holds the facts that its answer is about.
"""

from __future__ import annotations

from data_tools.forms.teller import Teller, without_image
from data_tools.items import Conversation, Item, SourceContext
from data_tools.records import Record
from data_tools.taxonomy import Taxonomy

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


def write(item: Item, record: Record, context: SourceContext, taxonomy: Taxonomy) -> Conversation:
    """One question; as many as ``item.kind`` says where the form is ``text_multi``."""
    teller = Teller(item, record, context, taxonomy)
    picture, names = teller.picture(), teller.names(record.names)
    first = picture if teller.chinese else f"{picture[:1].upper()}{picture[1:]}"
    has_department = record.department != "None"
    if item.form == "text_single" and has_department and teller.dice.below(2):
        question = teller.pick(_WHO, _WHO_ZH).format(first, names, teller.department())
        return without_image(question, teller.joined(_result(teller), _department(teller)))
    question = teller.pick(_LINE, _LINE_ZH).format(first, names)
    turns = [*without_image(question, _result(teller))]
    if item.form == "text_single":
        return tuple(turns)
    zh = teller.chinese
    modality = teller.modality()
    more = [
        (
            "其中提到的成像方式是什么？" if zh else "Which modality is named in it?",
            f"成像方式是{modality}。" if zh else f"The modality is {modality}.",
        ),
        (
            "结果是什么？" if zh else "And what was the result?",
            f"结果为{names}。" if zh else f"The result was {names}.",
        ),
    ]
    if has_department:
        more.insert(
            1,
            (
                f"如果由{teller.department()}开具，请补充这一点。"
                if zh
                else f"Add that the department was {teller.department()}.",
                teller.joined(_result(teller), _department(teller)),
            ),
        )
    for question, answer in more[: max(1, int(item.kind or "3") - 1)]:
        turns += without_image(question, answer)
    return tuple(turns)


def _result(teller: Teller) -> str:
    names = teller.names(teller.record.names)
    if teller.chinese:
        return f"{teller.modality()}图像的结果为{names}。"
    picture = teller.picture()
    return f"{picture[:1].upper()}{picture[1:]} with the result {names}."


def _department(teller: Teller) -> str:
    if teller.chinese:
        return f"科室为{teller.department()}。"
    return f"The department is {teller.department()}."
