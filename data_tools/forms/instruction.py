"""Free instructions on a picture: one request and its answer."""

from __future__ import annotations

from data_tools.forms.teller import Teller, about_image
from data_tools.items import Conversation, Item, SourceContext
from data_tools.records import Record
from data_tools.taxonomy import Taxonomy

_REPORT = (
    "Write a short report on this image.",
    "Report the findings in this image.",
    "Explain this image to a student.",
    "State modality and findings of this image.",
)
_REPORT_ZH = ("请为这张图像写一份简短报告。", "请报告这张图像的所见。", "请向学生讲解这张图像。")
_LIST = (
    "List the findings in this image.",
    "Name everything that has been identified in this image.",
    "Which findings does this image hold?",
)
_LIST_ZH = ("请列出这张图像中的所见。", "这张图像中有哪些所见？")
_WHERE = ("Where in this image {}?", "Look at this image: where {}?")
_WHERE_ZH = ("请说明{}位于图像的何处。", "{}在图像的什么位置？")
_WHO = (
    "Which department deals with this image, and what does it show?",
    "To which department does this image belong, and why?",
)
_WHO_ZH = ("这张图像属于哪个科室，显示了什么？", "这张图像应归哪个科室？请说明依据。")


def write(item: Item, record: Record, context: SourceContext, taxonomy: Taxonomy) -> Conversation:
    """One of the requests that the record can answer."""
    teller = Teller(item, record, context, taxonomy)
    regions = teller.regions()
    kinds = ["report", "list", *(["where"] if regions else [])]
    if record.department != "None":
        kinds.append("department")
    match teller.dice.pick(kinds):
        case "report":
            question = teller.pick(_REPORT, _REPORT_ZH)
            answer = teller.joined(teller.what(), *teller.attributes(), teller.findings())
        case "list":
            question = teller.pick(_LIST, _LIST_ZH)
            answer = (
                f"图像中的所见为：{teller.names(record.names)}。"
                if teller.chinese
                else teller.identified("The following is identified in this image: {}.")
            )
        case "where":
            name = teller.dice.pick(list(regions))
            question = teller.pick(_WHERE, _WHERE_ZH).format(
                teller.name(name) if teller.chinese else teller.where(name)
            )
            answer = teller.located_one(name, regions[name])
        case _:
            question = teller.pick(_WHO, _WHO_ZH)
            department = (
                f"该图像属于{teller.department()}。"
                if teller.chinese
                else f"It belongs to {teller.department()}."
            )
            answer = teller.joined(department, teller.what(), teller.findings())
    return about_image(question, answer)
