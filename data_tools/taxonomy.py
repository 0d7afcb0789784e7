# SPDX-License-Identifier: Apache-2.0

"""The vocabulary of records: modalities, departments, clinical tasks, original tasks, each with its names.

The built-in one is ``taxonomy.yaml`` beside this module; a job may name a file of the same form that adds
terms, or adds synonyms, codes and Chinese names to terms that are there.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gmai_xtuner.core.errors import CorpusError
from gmai_xtuner.core.yaml_lines import Document, Section

KINDS = {
    "modalities": "modality",
    "departments": "department",
    "clinical_tasks": "clinical task",
    "source_tasks": "source task",
}
"""Kind of terms -> what one of them is called; a source task is what a set was annotated for."""
_LISTS = ("synonyms", "chinese_synonyms", "codes")
_FIELDS = (*_LISTS, "chinese")
_BUILT_IN = Path(__file__).with_name("taxonomy.yaml")


@dataclass(frozen=True, slots=True)
class Terms:
    """One term by its name in records, and what else it is called; ``codes`` are DICOM's, as (0008,0060)."""

    name: str
    synonyms: tuple[str, ...] = ()
    chinese: str = ""
    chinese_synonyms: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()

    @property
    def all_names(self) -> tuple[str, ...]:
        """All that it is called, once each."""
        own = (self.name, *self.synonyms, *self.codes, self.chinese, *self.chinese_synonyms)
        return tuple(dict.fromkeys(filter(None, own)))


@dataclass(frozen=True, eq=False)
class Taxonomy:
    """All terms by kind, in their order; immutable, small, can be pickled."""

    kinds: Mapping[str, tuple[Terms, ...]]

    def names(self, kind: str) -> tuple[str, ...]:
        """Return the names of all terms of a kind, in their order."""
        return tuple(terms.name for terms in self.kinds[kind])

    def find(self, kind: str, text: str) -> str:
        """Return the name of the term with this name, synonym or DICOM code, in any case.

        A `CorpusError` with the nearest names if there is none.
        """
        names = self._by_any_name[kind]
        if found := names.get(_key(text)):
            return found
        near = difflib.get_close_matches(_key(text), names, n=3)
        candidates = list(dict.fromkeys(names[key] for key in near)) or self.names(kind)
        hint = "Did you mean" if near else "Known are"
        raise CorpusError(
            f"there is no {KINDS[kind]} {text!r}. {hint} {', '.join(candidates)}? "
            "A file named under 'taxonomy' in the job can add terms."
        )

    def terms(self, name: str) -> Terms:
        """Return what a modality, department or task of this very name is called.

        A `KeyError` if no term has this name.
        """
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Terms]:
        return {terms.name: terms for kind in KINDS for terms in self.kinds[kind]}

    @cached_property
    def _by_any_name(self) -> dict[str, dict[str, str]]:
        return {
            kind: {_key(name): terms.name for terms in of_kind for name in terms.all_names}
            for kind, of_kind in self.kinds.items()
        }


def load(extra: Path | None = None) -> Taxonomy:
    """Return the built-in vocabulary, extended by a job's file in the form of ``taxonomy.yaml``.

    A name that is there already gains synonyms, codes and Chinese names (its ``chinese`` is replaced); any
    other is a new term. A `CorpusError`, with file and line, if the file can't be read, has another form, or
    gives one name to two terms of a kind.
    """
    kinds: dict[str, dict[str, Terms]] = {kind: {} for kind in KINDS}
    taken: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
    for path in (_BUILT_IN, *([extra] if extra else [])):
        for kind, name, values, line in _entries(path):
            before = kinds[kind].get(name, Terms(name))
            terms = kinds[kind][name] = _merged(before, values, f"{path}:{line}")
            for other in terms.all_names:
                owner = taken[kind].setdefault(_key(other), name)
                if owner != name:
                    taken_by = f"{other!r} already names the {KINDS[kind]} {owner!r}"
                    raise CorpusError(f"{path}:{line}: {taken_by}. Leave it out of {name!r}.")
    return Taxonomy({kind: tuple(terms.values()) for kind, terms in kinds.items()})


def _entries(path: Path) -> Iterable[tuple[str, str, dict[str, Any], int]]:
    """(kind, name, fields, line) of each term in a file."""
    document = Document(path, what="taxonomy", error=CorpusError)
    if document.data is None:
        return
    top = Section(document, title="the taxonomy")
    top.check_keys(KINDS)
    for kind in top.values:
        terms = top.section(kind, title=kind)
        for name, fields in terms.values.items():
            if not name.strip():
                raise terms.error("a name is empty", "Write name: value.", key=name)
            if not isinstance(fields, dict | None):
                expected = f"a mapping of {', '.join(_FIELDS)} was expected. Write {{}} for none."
                raise document.fault((kind, name), f"{name!r}: {expected}")
            yield kind, name, fields or {}, document.line((kind, name))


def _merged(before: Terms, values: Mapping[str, Any], where: str) -> Terms:
    for key, value in values.items():
        if key not in _FIELDS:
            known = ", ".join(_FIELDS)
            raise CorpusError(f"{where}: {before.name!r}: unknown key {key!r}. Known: {known}.")
        texts = value if key in _LISTS else [value]
        if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
            form = "a list of texts" if key in _LISTS else "a text"
            raise CorpusError(f"{where}: {before.name!r}: {key} must be {form}.")
    lists = {
        key: tuple(dict.fromkeys([*getattr(before, key), *values.get(key, [])])) for key in _LISTS
    }
    return Terms(before.name, chinese=values.get("chinese", before.chinese), **lists)


def _key(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())
