"""A request's body and its name in the ledger."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_tools.records import Record
from data_tools.writers.asking import Ask
from data_tools.writers.options import OpenAIBatchOptions, OpenAIOptions
from data_tools.writers.pictures import Picture, read
from data_tools.writers.prices import Expense, expense, text_tokens

STRUCTURES = ("json_schema", "json_object", "text")
MAX_TOKENS_NAMES = ("max_completion_tokens", "max_tokens")


@dataclass(frozen=True, slots=True)
class Traits:
    """What a server understands."""

    structured: str
    max_tokens_name: str

    @classmethod
    def of(cls, options: OpenAIOptions, known: Mapping[str, str]) -> Traits:
        """The job's own word first, then what the ledger knows, then the best."""
        structured, name = options.structured, options.max_tokens_name
        if structured == "auto":
            structured = known.get("structured", STRUCTURES[0])  # type: ignore[assignment]
        if name == "auto":
            name = known.get("max_tokens_name", MAX_TOKENS_NAMES[0])  # type: ignore[assignment]
        return cls(structured, name)


@dataclass(frozen=True, slots=True)
class Payload:
    """One request.

    Args:
        key: SHA-256 of all that the answer can depend on: model, texts, the picture's content, the form that
            is asked for, parameters, the number of the attempt. Not the server's address, and not how the
            form is asked for, so that a server that learns or forgets JSON schemas doesn't cost twice.
        at_most: what it can cost.
    """

    key: str
    at_most: Expense
    ask: Ask
    picture: Picture | None
    options: OpenAIOptions = field(repr=False)

    def body(self, traits: Traits) -> dict[str, Any]:
        """As JSON values; reads and encodes the picture.

        Raises:
            CorpusError: the picture can't be read.
        """
        prompt, options = self.ask.prompt, self.options
        system = prompt.system
        if prompt.schema is not None and traits.structured != "json_schema":
            schema = json.dumps(prompt.schema, ensure_ascii=False, sort_keys=True)
            system += f"\n\nAnswer with one JSON object and nothing else. It fits this JSON schema:\n{schema}"
        content: str | list[dict[str, Any]] = prompt.user
        if self.picture is not None:
            url: dict[str, Any] = {"url": self.picture.url(options.image)}
            if options.image.detail:
                url["detail"] = options.image.detail
            content = [
                {"type": "image_url", "image_url": url},
                {"type": "text", "text": prompt.user},
            ]
        body: dict[str, Any] = {
            "model": options.model,
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": content},
            ],
            traits.max_tokens_name: prompt.max_tokens,
            **_sampling(options, self.ask),
        }
        if prompt.schema is not None and traits.structured == "json_schema":
            form = {"name": "answer", "schema": prompt.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        elif prompt.schema is not None and traits.structured == "json_object":
            body["response_format"] = {"type": "json_object"}
        return body


def payload(ask: Ask, record: Record, options: OpenAIOptions, folder: Path) -> Payload:
    """The request that asks ``ask``; pictures lie below ``folder``.

    Raises:
        CorpusError: the picture can't be read.
    """
    prompt = ask.prompt
    picture, image_tokens = None, 0
    if prompt.image is not None:
        focus = ask.item.focus
        box = record.labels[focus].box if prompt.box_image and focus is not None else None
        path = folder / prompt.image
        stat = path.stat() if path.is_file() else None
        digest = _digest(path, stat.st_mtime_ns if stat else 0, stat.st_size if stat else 0)
        picture = Picture(path, record.width, record.height, box, digest)
        image_tokens = options.image.tokens.count(
            *picture.size(options.image), detail=options.image.detail
        )
    described = {
        "version": 1,
        "model": options.model,
        "system": prompt.system,
        "user": prompt.user,
        "image": picture.identity(options.image) if picture else None,
        "schema": prompt.schema,
        "max_tokens": prompt.max_tokens,
        "parameters": _sampling(options, ask),
        "attempt": ask.attempt,
    }
    text = json.dumps(described, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    schema = json.dumps(prompt.schema) if prompt.schema is not None else ""
    prompt_tokens = text_tokens(prompt.system, prompt.user, schema) + image_tokens
    discount = options.discount if isinstance(options, OpenAIBatchOptions) else 1.0
    at_most = expense(prompt_tokens, prompt.max_tokens, options.price, discount=discount)
    return Payload(key, at_most, ask, picture, options)


def _sampling(options: OpenAIOptions, ask: Ask) -> dict[str, Any]:
    values: dict[str, Any] = {
        "temperature": options.temperature,
        "top_p": options.top_p,
        "seed": ask.item.seed % 2**31 if options.seeded else None,
    }
    return {name: value for name, value in values.items() if value is not None} | options.parameters


@lru_cache(maxsize=1024)
def _digest(path: Path, modified: int, size: int) -> str:
    """Of the file's bytes; a picture has several items, one after the other."""
    return hashlib.sha256(read(path)).hexdigest()
