"""Is another modality claimed than the picture's?"""

from __future__ import annotations

from collections.abc import Iterator

from data_tools.checks.said import Said
from data_tools.checks.terms import TermFinder
from data_tools.items import Problem
from data_tools.records import Record
from data_tools.taxonomy import Taxonomy

# Modalities that name the same picture at different depth.
FAMILIES = (
    ("X-ray", "Mammography", "Angiography", "Fluoroscopy", "Dental X-ray", "Bone densitometry"),
    ("CT", "Angiography"),
    ("MR", "Angiography"),
    ("Pathology", "Microscopy", "Cytology", "Electron microscopy", "Fluorescence microscopy"),
    ("Ultrasound", "Echocardiography", "Endoscopy"),
    ("Endoscopy", "Colonoscopy", "Laparoscopy", "Bronchoscopy", "Surgical video"),
    ("Fundus photography", "Fluorescein angiography", "Angiography", "Clinical photography"),
    ("Fundus photography", "Infrared reflectance imaging"),
    ("Dermoscopy", "Clinical photography"),
    ("Slit-lamp photography", "Clinical photography"),
    ("PET", "SPECT", "Scintigraphy", "CT"),
)
# Names that are everyday words of anatomy and of the work: "gastric fundus", "histology is needed".
_AMBIGUOUS = frozenset(
    ("fundus", "histology", "smear", "photograph", "surgical scene", "照片", "涂片", "透视")
)
# A sentence with one of these speaks of another examination, not of the picture.
_ELSEWHERE = frozenset(
    (
        "recommend", "recommended", "recommends", "suggest", "suggested", "follow", "followup", "correlate",
        "correlation", "correlated", "compare", "compared", "comparison", "prior", "previous", "further",
        "additional", "confirm", "confirmed", "confirmation", "could", "may", "might", "would", "should",
        "biopsy", "consider", "considered", "need", "needed", "often", "usually", "typically", "such",
        "other", "alternatively", "subsequent", "if", "can", "complementary", "modalities",
    )
)  # fmt: skip
_ELSEWHERE_ZH = (
    "建议",
    "进一步",
    "对比",
    "比较",
    "复查",
    "结合",
    "必要时",
    "可考虑",
    "其他",
    "既往",
    "可行",
    "通常",
    "也可",
)


class ModalityFinder:
    """All modalities of a taxonomy in all their names."""

    def __init__(self, taxonomy: Taxonomy) -> None:
        terms: dict[str, str] = {}
        for name in taxonomy.modalities:
            known = taxonomy.terms(name)
            for spoken in (name, *known.synonyms, known.chinese, *known.chinese_synonyms):
                if spoken and spoken.lower() not in _AMBIGUOUS:
                    terms.setdefault(spoken, name)
        self._finder = TermFinder(terms)
        self.compatible = {
            name: {name}.union(*(family for family in FAMILIES if name in family))
            for name in taxonomy.modalities
        }

    def claims(self, what: Said) -> Iterator[str]:
        """Modalities that are said of the picture itself."""
        if not what.chinese:
            for hit in self._finder.find(what.words):
                if not hit.denied and not _elsewhere(what.words, hit.start):
                    yield hit.meaning
        else:
            for hit in self._finder.find_chinese(what.text):
                sentence = _sentence_around(what.text, hit.start)
                if not hit.denied and not any(word in sentence for word in _ELSEWHERE_ZH):
                    yield hit.meaning


def modality(what: Said, record: Record, finder: ModalityFinder) -> Iterator[Problem]:
    """Another modality than the record's, or one that can't be another name for it."""
    compatible = finder.compatible[record.modality]
    for claimed in finder.claims(what):
        if claimed not in compatible:
            yield Problem("another modality claimed", f"it says {claimed}; it is {record.modality}")
            return


def _elsewhere(words: list[str], at: int) -> bool:
    ends = (".", "!", "?", "\n", ";")
    first = at
    while first > 0 and words[first - 1] not in ends:
        first -= 1
    for word in words[first:]:
        if word in ends:
            return False
        if word in _ELSEWHERE:
            return True
    return False


def _sentence_around(text: str, at: int) -> str:
    first = max(text.rfind(mark, 0, at) for mark in "。；！？\n") + 1
    ends = [end for end in (text.find(mark, at) for mark in "。；！？\n") if end >= 0]
    return text[first : min(ends, default=len(text))]
