# SPDX-License-Identifier: Apache-2.0

"""The corpus' JSON Lines and Parquet files, written a few megabytes at a time, and its mixture files.

A conversation is a line in LLaVA's form, as GMAI-VL's own data has it (uni-medical/GMAI-VL,
examples/example_data.json)::

    {"id": ..., "image": "images/...", "width": 640, "height": 480,
     "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": "..."}]}

Text without an image has neither ``image`` nor ``width`` and ``height``.

A training takes the corpus by ``mixture.yaml``, an evaluation by ``held_out.yaml``. Categories and ratios are
those of the paper's own sub-datasets (GMAI-VL, arXiv 2411.14522, table 7): text without an image is seen in
stage 3 only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec
import yaml

from data_tools.items import FILES, TEXT_FORMS
from gmai_xtuner.core.errors import CorpusError

if TYPE_CHECKING:
    from data_tools.store import Kept

CONVERSATION_FILES = tuple(dict.fromkeys(FILES.values()))
HELD_OUT = "held_out"
_BUFFER = 1 << 20  # bytes
_PARQUET_ROWS = 20_000
_TEXT_FORMS = frozenset(TEXT_FORMS)
_encode = msgspec.json.Encoder().encode
NO_CONVERSATION = (
    "no conversation"  # reason of an answer that is none, without a problem of its own
)


def conversation_line(kept: Kept) -> dict[str, Any]:
    """Return the line of an accepted conversation."""
    item, record = kept.item, kept.record
    turns = [{"from": turn.speaker, "value": turn.text} for turn in kept.conversation or ()]
    if item.form in _TEXT_FORMS:
        return {"id": item.id, "conversations": turns}
    return {
        "id": item.id,
        "image": record.image,
        "width": record.width,
        "height": record.height,
        "conversations": turns,
    }


def rejected_line(kept: Kept) -> dict[str, Any]:
    """Return the line of a conversation that was set aside, with the reason and its record."""
    item = kept.item
    return {
        "id": item.id,
        "form": item.form,
        "kind": item.kind,
        "language": item.language,
        "reason": reason(kept),
        "problems": [
            {"reason": problem.reason, "detail": problem.detail} for problem in kept.problems
        ],
        "record": kept.record.to_json(),
        "prompt": kept.prompt,
        "answer": kept.answer,
        "conversations": [
            {"from": turn.speaker, "value": turn.text} for turn in kept.conversation or ()
        ],
    }


def reason(kept: Kept) -> str:
    """Return the first reason why a conversation was set aside."""
    return kept.problems[0].reason if kept.problems else NO_CONVERSATION


class JsonLines:
    """A JSON Lines file that exists once it has a line.

    ``lines``, ``bytes`` and ``sha256`` say what is in it so far.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = 0
        self.bytes = 0
        self._digest = sha256()
        self._buffer = bytearray()
        self._file: Any = None

    def write(self, values: Mapping[str, Any]) -> None:
        try:
            line = _encode(values)
        except (UnicodeEncodeError, TypeError) as error:
            raise CorpusError(
                f"{self.path.name}: {values.get('id')!r} can't be written as JSON ({error}). A name or a "
                "text in it isn't valid Unicode; rename the file or correct the label in the source."
            ) from error
        self._buffer += line
        self._buffer += b"\n"
        self.lines += 1
        if len(self._buffer) > _BUFFER:
            self._flush()

    def close(self) -> None:
        self._flush()
        if self._file is not None:
            self._file.close()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def _flush(self) -> None:
        if not self._buffer:
            return
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "wb")  # noqa: SIM115
        self._file.write(self._buffer)
        self._digest.update(self._buffer)
        self.bytes += len(self._buffer)
        self._buffer.clear()


class ParquetRows:
    """The same lines as a Parquet file, in row groups of 20,000."""

    def __init__(self, path: Path, *, with_image: bool) -> None:
        import pyarrow as pa

        picture = [("image", pa.string()), ("width", pa.int32()), ("height", pa.int32())]
        turn = pa.struct([("from", pa.string()), ("value", pa.string())])
        self._schema = pa.schema(
            [
                ("id", pa.string()),
                *(picture if with_image else []),
                ("conversations", pa.list_(turn)),
            ]
        )
        self._path = path
        self._rows: list[Mapping[str, Any]] = []
        self._writer: Any = None

    def write(self, values: Mapping[str, Any]) -> None:
        self._rows.append(values)
        if len(self._rows) == _PARQUET_ROWS:
            self._flush()

    def close(self) -> None:
        self._flush()
        if self._writer is not None:
            self._writer.close()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self._rows:
            return
        if self._writer is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(self._path, self._schema, compression="zstd")
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows.clear()


class CorpusFiles:
    """All files of conversations and records below a folder; to be used in a ``with`` block.

    Args:
        folder: an empty folder.
        parquet: write each conversation file as Parquet too.
    """

    def __init__(self, folder: Path, *, parquet: bool = False) -> None:
        self.records = JsonLines(folder / "records.jsonl")
        self.rejected = JsonLines(folder / "rejected.jsonl")
        self.prompts = JsonLines(folder / "prompts.jsonl")
        self.dropped = JsonLines(folder / "dropped.jsonl")
        names = [*CONVERSATION_FILES, *(f"{HELD_OUT}/{name}" for name in CONVERSATION_FILES)]
        self._conversations = {name: JsonLines(folder / name) for name in names}
        self._parquet = {
            name: ParquetRows(
                (folder / name).with_suffix(".parquet"),
                with_image=not Path(name).name.startswith("text_"),
            )
            for name in (names if parquet else ())
        }
        self._sides = tuple(
            {form: self._conversations[prefix + name] for form, name in FILES.items()}
            for prefix in ("", f"{HELD_OUT}/")
        )

    def __enter__(self) -> CorpusFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files().values():
            file.close()
        for rows in self._parquet.values():
            rows.close()

    def write(self, kept: Kept, *, held_out: bool) -> None:
        """Write an accepted conversation to the file of its form and side."""
        line = conversation_line(kept)
        self._sides[held_out][kept.item.form].write(line)
        if self._parquet:
            name = FILES[kept.item.form]
            self._parquet[f"{HELD_OUT}/{name}" if held_out else name].write(line)

    def contents(self) -> dict[str, dict[str, int | str]]:
        """Return ``lines``, ``bytes`` and ``sha256`` of each file that has a line.

        Complete only after the ``with`` block. Parquet files are not listed: they hold the same.
        """
        return {
            name: {"lines": file.lines, "bytes": file.bytes, "sha256": file.sha256}
            for name, file in self._files().items()
            if file.lines
        }

    def _files(self) -> dict[str, JsonLines]:
        return {
            "records.jsonl": self.records,
            **self._conversations,
            "rejected.jsonl": self.rejected,
            "dropped.jsonl": self.dropped,
            "prompts.jsonl": self.prompts,
        }


CATEGORIES = {
    "caption.jsonl": "Medical Captioning",
    "instruct.jsonl": "Medical Instruction",
    "percept.jsonl": "Medical Instruction",
    "text_single.jsonl": "Medical Text",
    "text_multi.jsonl": "Medical Text",
}
_WITH_IMAGES = {"stage1": 1, "stage2": 1, "stage3": 1}
_TEXT = {"stage1": 0, "stage2": 0, "stage3": 1}


def write_mixtures(folder: Path, *, title: str, lines: dict[str, int]) -> None:
    """Write ``mixture.yaml`` of the training files and ``held_out.yaml`` of the held-out ones.

    Args:
        folder: where the corpus is being written.
        title: of the corpus; dataset names begin with it, so that several corpora can be put into one
            mixture.
        lines: conversations in each file, named below the folder; only these files are listed, and
            a mixture without any isn't written.
    """
    short = "-".join(re.findall(r"\w+", title.lower())) or "corpus"
    for name, prefix, what in (
        ("mixture.yaml", "", "for training; copy its datasets into a larger mixture as they are"),
        ("held_out.yaml", f"{HELD_OUT}/", "held out: never to be trained on"),
    ):
        datasets = {
            f"{short}-{Path(file).stem.replace('_', '-')}": _dataset(file, prefix, lines)
            for file in CONVERSATION_FILES
            if lines.get(prefix + file)
        }
        if datasets:
            text = yaml.safe_dump({"datasets": datasets}, sort_keys=False, allow_unicode=True)
            (folder / name).write_text(f"# Conversations {what}.\n{text}", encoding="utf-8")


def _dataset(file: str, prefix: str, lines: dict[str, int]) -> dict[str, Any]:
    text = file.startswith("text_")
    return {
        "annotations": prefix + file,
        **({} if text else {"image_root": "."}),
        "category": CATEGORIES[file],
        "quality": "high",
        "ratio": dict(_TEXT if text else _WITH_IMAGES),
        "size": lines[prefix + file],
    }
