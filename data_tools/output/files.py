# SPDX-License-Identifier: Apache-2.0

"""The corpus' JSON Lines and Parquet files, written a few megabytes at a time, and its mixture files.

A conversation is a line in LLaVA's form, as GMAI-VL's own data has it (uni-medical/GMAI-VL,
examples/example_data.json); text without an image has neither ``image`` nor ``width`` and ``height``. A
training takes the corpus by ``mixture.yaml``, an evaluation by ``held_out.yaml``. Categories and ratios are
those of the paper's own sub-datasets (GMAI-VL, arXiv 2411.14522, table 7): text without an image is seen in
stage 3 only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import Any

import msgspec
import yaml

from data_tools.items import FILES, TEXT_FORMS, Conversation
from data_tools.store import StoredConversation
from gmai_xtuner.core.errors import CorpusError

CATEGORIES = {
    "caption.jsonl": "Medical Captioning",
    "instruct.jsonl": "Medical Instruction",
    "percept.jsonl": "Medical Instruction",
    "text_single.jsonl": "Medical Text",
    "text_multi.jsonl": "Medical Text",
}
CONVERSATION_FILES = tuple(CATEGORIES)
HELD_OUT = "held_out"
_ORDER = ("records.jsonl", *CONVERSATION_FILES, *(f"{HELD_OUT}/{name}" for name in CONVERSATION_FILES),
          "rejected.jsonl", "dropped.jsonl", "prompts.jsonl")  # fmt: skip
_BUFFER = 1 << 20  # bytes
_ROW_GROUP = 100  # as `datasets` writes images, so that one can be read without many others
_SHARD = 10_000  # conversations of a Parquet file
_encode = msgspec.json.Encoder().encode


def turns_of(conversation: Conversation | None) -> list[dict[str, str]]:
    """Return a conversation's turns in LLaVA's form."""
    return [{"from": turn.speaker, "value": turn.text} for turn in conversation or ()]


def conversation_line(kept: StoredConversation) -> dict[str, Any]:
    """Return the line of an accepted conversation."""
    record = kept.record
    image = {"image": record.image, "width": record.width, "height": record.height}
    return {
        "id": kept.item.id,
        **({} if kept.item.form in TEXT_FORMS else image),
        "conversations": turns_of(kept.conversation),
    }


def rejected_line(kept: StoredConversation) -> dict[str, Any]:
    """Return the line of a conversation that was set aside, with the reason and its record."""
    item = kept.item
    return {
        "id": item.id,
        "form": item.form,
        "kind": item.kind,
        "language": item.language,
        "reason": reason(kept),
        "problems": kept.problems,
        "record": kept.record.to_json(),
        "prompt": kept.prompt,
        "answer": kept.answer,
        "conversations": turns_of(kept.conversation),
    }


def reason(kept: StoredConversation) -> str:
    """Return the first reason why a conversation was set aside."""
    return kept.problems[0].reason if kept.problems else "no conversation"


class JsonLines:
    """A JSON Lines file; ``lines``, ``bytes`` and ``digest`` say what is in it so far."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.lines, self.bytes, self.digest = path, 0, 0, sha256()
        self.file = open(path, "wb", buffering=_BUFFER)  # noqa: SIM115

    def write(self, values: Mapping[str, Any]) -> bytes:
        """Write a line and return it, without its end."""
        try:
            line = _encode(values)
        except (UnicodeEncodeError, TypeError) as error:
            raise CorpusError(
                f"{self.path.name}: {values.get('id')!r} can't be written as JSON ({error}). A name or a "
                "text in it isn't valid Unicode; rename the file or correct the label in the source."
            ) from error
        self.file.write(line + b"\n")
        self.digest.update(line + b"\n")
        self.lines += 1
        self.bytes += len(line) + 1
        return line


class CorpusFiles(dict[str, JsonLines]):
    """The files of conversations and records below a folder, by name; each is made with its first line.

    To be used in a ``with`` block.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __missing__(self, name: str) -> JsonLines:
        made = self[name] = JsonLines(self._folder / name)
        return made

    def __enter__(self) -> CorpusFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.values():
            file.file.close()

    def write(self, kept: StoredConversation, *, held_out: bool) -> bytes:
        """Write an accepted conversation to the file of its form and side; return its line."""
        name = FILES[kept.item.form]
        return self[f"{HELD_OUT}/{name}" if held_out else name].write(conversation_line(kept))

    def contents(self) -> dict[str, dict[str, Any]]:
        """Return ``lines``, ``bytes`` and ``sha256`` of each file; final after the ``with`` block."""
        return {
            name: {"lines": file.lines, "bytes": file.bytes, "sha256": file.digest.hexdigest()}
            for name in _ORDER
            if (file := self.get(name))
        }

    def write_parquet(self, images: Path) -> None:
        """Write conversations as Parquet too, with what lies below ``images``; after the ``with`` block."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        stored = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        image = [("image", stored), ("width", pa.int32()), ("height", pa.int32())]
        turn = pa.struct([("from", pa.string()), ("value", pa.string())])
        feature = json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})
        for path in (file.path for file in self.values() if file.path.name in CONVERSATION_FILES):
            own = [] if path.name.startswith("text_") else image
            schema = pa.schema([("id", pa.string()), *own, ("conversations", pa.list_(turn))])
            schema = schema.with_metadata({"huggingface": feature} if own else None)
            with open(path, "rb") as lines:
                for number, first in enumerate(lines):
                    shard = path.with_name(f"{path.stem}-{number:05}.parquet")
                    rows = chain([first], islice(lines, _SHARD - 1))
                    with pq.ParquetWriter(shard, schema, compression="zstd") as writer:
                        while some := list(map(msgspec.json.decode, islice(rows, _ROW_GROUP))):
                            for row in some if own else ():
                                content = (images / row["image"]).read_bytes()
                                row["image"] = {"bytes": content, "path": row["image"]}
                            writer.write_table(pa.Table.from_pylist(some, schema=schema))


def write_mixtures(folder: Path, *, title: str, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Write ``mixture.yaml`` of the training files, and ``held_out.yaml`` of the others, into ``folder``.

    Names of datasets begin with the corpus' title, so that several corpora can be put into one mixture. Only
    ``files``, as of `CorpusFiles.contents`, are listed; a mixture without any isn't written.
    """
    short = "-".join(re.findall(r"\w+", title.lower())) or "corpus"
    for name, prefix, what in (
        ("mixture.yaml", "", "for training; copy its datasets into a larger mixture as they are"),
        ("held_out.yaml", f"{HELD_OUT}/", "held out: never to be trained on"),
    ):
        datasets = {}
        for file, category in CATEGORIES.items():
            if prefix + file in files:
                text = file.startswith("text_")
                datasets[f"{short}-{Path(file).stem.replace('_', '-')}"] = {
                    "annotations": prefix + file,
                    **({} if text else {"image_root": "."}),
                    "category": category,
                    "quality": "high",
                    "ratio": {"stage1": int(not text), "stage2": int(not text), "stage3": 1},
                    "size": files[prefix + file]["lines"],
                }
        if datasets:
            body = yaml.safe_dump({"datasets": datasets}, sort_keys=False, allow_unicode=True)
            (folder / name).write_text(f"# Conversations {what}.\n{body}", encoding="utf-8")
