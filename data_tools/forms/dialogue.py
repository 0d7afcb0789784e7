"""Conversations of several turns about a picture: from what it is to where things lie."""

from __future__ import annotations

from data_tools.forms.teller import Teller, about_image, without_image
from data_tools.items import Conversation, Item, SourceContext
from data_tools.records import Record
from data_tools.taxonomy import Taxonomy

_WHAT = ("What kind of image is this?", "Which modality was used for this image?")
_WHAT_ZH = ("这是什么类型的图像？", "这张图像采用了哪种成像方式？")
_FINDINGS = ("What does it show?", "What is seen in it?", "And what are the findings?")
_FINDINGS_ZH = ("图像显示了什么？", "有哪些所见？")
_WHERE = ("Where in the picture {}?", "And where {}?")
_WHERE_ZH = ("{}位于图像的什么位置？", "{}在图像的何处？")
_MANY = ("How many regions of {} are there?", "And how many regions of {} can be counted?")
_MANY_ZH = ("{}有几处？", "可以数出几处{}？")
_WHO = ("Which department does it concern?", "Which department would look at it?")
_WHO_ZH = ("涉及哪个科室？", "这属于哪个科室？")
_SUM = ("Please sum that up.", "Can you put that into one summary?")
_SUM_ZH = ("请总结一下。", "请用一段话概括。")


def write(item: Item, record: Record, context: SourceContext, taxonomy: Taxonomy) -> Conversation:
    """As many questions as ``item.kind`` says, or as many as the record can answer."""
    teller = Teller(item, record, context, taxonomy)
    what = teller.what()
    pairs = [(teller.pick(_WHAT, _WHAT_ZH), what)]
    if teller.chinese:
        found = f"图像显示{teller.names(record.names)}。"
    else:
        found = teller.identified("The findings in it: {}.")
    pairs.append((teller.pick(_FINDINGS, _FINDINGS_ZH), found))
    more = []
    for name, regions in teller.regions().items():
        spoken = teller.name(name)
        more.append(
            (
                teller.pick(_WHERE, _WHERE_ZH).format(
                    spoken if teller.chinese else teller.where(name)
                ),
                teller.located_one(name, regions),
            )
        )
        if len(regions) > 1 and name not in record.incomplete:
            number = len(regions)
            counted = (
                f"共有{number}处{spoken}。"
                if teller.chinese
                else f"There are {number} regions of {spoken}."
            )
            more.append((teller.pick(_MANY, _MANY_ZH).format(spoken), counted))
    if record.department != "None":
        department = teller.department()
        concerns = f"涉及{department}。" if teller.chinese else f"It concerns {department}."
        more.append((teller.pick(_WHO, _WHO_ZH), concerns))
    more.append((teller.pick(_SUM, _SUM_ZH), teller.joined(what, teller.findings())))
    pairs += more[: max(0, int(item.kind or "3") - len(pairs))]
    (question, answer), *others = pairs
    turns = [*about_image(question, answer)]
    for question, answer in others:
        turns += without_image(question, answer)
    return tuple(turns)
