# SPDX-License-Identifier: Apache-2.0

"""One request: its body, its key in the ledger, the attached image, and what it can cost.

Before a request is sent it is counted at what it can cost at most; the server's own count replaces that as
soon as it is known.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, ImageDraw

from data_tools.items import Item, Task
from data_tools.options import ImageOptions, OpenAIOptions
from data_tools.records import Box
from data_tools.writers.ledger import Expense, Reply
from data_tools.writers.prompts import Prompt
from gmai_xtuner.core.errors import CorpusError, ImageError, is_unicode
from gmai_xtuner.core.files import sha256_of_file
from gmai_xtuner.core.http import RequestRefused, first_message
from gmai_xtuner.core.imaging.images import opened

T = TypeVar("T")
STRUCTURES = ("json_schema", "json_object", "text")
MAX_TOKENS_NAMES = ("max_completion_tokens", "max_tokens")
# Words by which servers say that they don't know JSON schemas (OpenAI, Azure, vLLM, llama.cpp, TGI, Ollama).
SCHEMA_WORDS = ("response_format", "json_schema", "json_object", "structured output", "guided",
                "grammar")  # fmt: skip
CONTENT_FILTER = ("content_filter", "content_policy_violation", "responsibleaipolicyviolation")
TOO_LONG = ("context_length_exceeded", "maximum context length", "max_model_len", "context window")

AS_IT_IS = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}
"""First bytes of files that are sent unchanged -> media type; other formats are encoded anew."""
REFUSED_REQUEST = "request refused by the server"
BOX_COLOUR = (255, 0, 0)
# Tokens that a chat template adds to a message and to a request; OpenAI's cookbook counts 3 and 3
# ("How to count tokens with tiktoken"), open models' templates up to about 10.
TOKENS_A_MESSAGE = 10
_SINGLE = re.compile(rb"[0-9!-/:-@\[-`{-~]")


@dataclass(frozen=True, slots=True)
class Traits:
    """What a server understands: how the answer's form is asked for, the name of its greatest length."""

    structured: str
    max_tokens_name: str

    @classmethod
    def of(cls, options: OpenAIOptions, known: Mapping[str, str]) -> Traits:
        """Take the job's own word first, then what the ledger knows, then the best."""
        best = {"structured": STRUCTURES[0], "max_tokens_name": MAX_TOKENS_NAMES[0], **known}
        own = {name: str(getattr(options, name)) for name in ("structured", "max_tokens_name")}
        return cls(**{name: best[name] if said == "auto" else said for name, said in own.items()})

    def lesson(self, refusal: RequestRefused, options: OpenAIOptions) -> dict[str, str]:
        """Return the traits that a refusal teaches; empty: these were not at fault."""
        text = f"{refusal.code} {refusal.message}".lower()
        if reason_of(refusal) != REFUSED_REQUEST:
            return {}
        if (
            self.structured != STRUCTURES[-1]
            and options.structured == "auto"
            and any(word in text for word in SCHEMA_WORDS)
        ):
            return {"structured": STRUCTURES[STRUCTURES.index(self.structured) + 1]}
        if options.max_tokens_name == "auto" and self.max_tokens_name in text:
            (other,) = set(MAX_TOKENS_NAMES) - {self.max_tokens_name}
            return {"max_tokens_name": other}
        return {}


def reason_of(refusal: RequestRefused) -> str:
    """Return why a request was refused, in words that are the same for all of the kind."""
    text = f"{refusal.code} {refusal.message}".lower()
    if any(word in text for word in CONTENT_FILTER):
        return "request held back by the server's content filter"
    return "prompt too long for the model" if any(w in text for w in TOO_LONG) else REFUSED_REQUEST


@dataclass(frozen=True, slots=True)
class AttachedImage:
    """An image to be attached: the stored one, or a copy, scaled or with the box drawn in.

    Two files of the same ``digest`` are the same image. Sizes are in pixels.
    """

    path: Path
    width: int
    height: int
    box: Box | None
    digest: str

    def size(self, options: ImageOptions) -> tuple[int, int]:
        """Return width and height as it is sent."""
        scale = min(1.0, options.longest_side / max(self.width, self.height))
        return max(1, round(self.width * scale)), max(1, round(self.height * scale))

    def identity(self, options: ImageOptions) -> dict[str, object]:
        """Describe it for the ledger's key, without the bytes as some version of an encoder writes them."""
        described: dict[str, object] = {"sha256": self.digest, "detail": options.detail}
        if self.box is not None:
            described["box"] = list(self.box)
        if self.is_encoded(options):
            described |= {"size": list(self.size(options)), "quality": options.quality}
        return described

    def is_encoded(self, options: ImageOptions) -> bool:
        return self.box is not None or self.size(options) != (self.width, self.height)

    def url(self, options: ImageOptions) -> str:
        """Return a data URL of the file, encoded anew if it is too large or gets a box.

        A `CorpusError` if the file can't be read or is not the one that was hashed.
        """
        data = _read(self.path, Path.read_bytes)
        if hashlib.sha256(data).hexdigest() != self.digest:
            raise CorpusError(
                f"{self.path}: the picture changed while the job was running; run it again"
            )
        kind = next((kind for start, kind in AS_IT_IS.items() if data.startswith(start)), None)
        if kind is None or self.is_encoded(options):
            data, kind = self._encode(data, options)
        return f"data:{kind};base64,{base64.b64encode(data).decode()}"

    def _encode(self, data: bytes, options: ImageOptions) -> tuple[bytes, str]:
        try:
            with opened(data, str(self.path)) as stored:
                image = stored.convert("L" if stored.mode in ("1", "L") and not self.box else "RGB")
        except ImageError as error:
            raise CorpusError(f"{self.path}: the stored picture can't be read ({error})") from error
        width, height = self.size(options)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        if self.box is not None:
            x, y = width / self.width, height / self.height
            line = max(2, round(max(width, height) / 256))
            x1, y1, x2, y2 = self.box
            # Around the region, not over its edge: the corners are those of the half-open box.
            corners = (x1 * x - line, y1 * y - line, x2 * x - 1 + line, y2 * y - 1 + line)
            ImageDraw.Draw(image).rectangle(corners, outline=BOX_COLOUR, width=line)
        stream, kind = io.BytesIO(), "jpeg" if options.quality else "png"
        image.save(stream, kind, quality=options.quality)
        return stream.getvalue(), f"image/{kind}"


def _read(path: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(path)
    except OSError as error:
        raise CorpusError(f"{path}: the stored picture can't be read ({error})") from error


@dataclass(frozen=True, slots=True)
class Request:
    """One request.

    Args:
        key: SHA-256 of all that the answer can depend on: model, texts, the image's content, the form that
            is asked for, parameters, the number of the attempt. Not the server's address, and not how the
            form is asked for, so that a server that learns or forgets JSON schemas doesn't cost twice.
        at_most: what it can cost.
    """

    key: str
    at_most: Expense
    item: Item
    prompt: Prompt
    image: AttachedImage | None
    options: OpenAIOptions = field(repr=False)
    source: tuple[str, str]

    @classmethod
    def of(
        cls, task: Task, prompt: Prompt, attempt: int, options: OpenAIOptions, folder: Path
    ) -> Request:
        """Make the ``attempt``-th request (from 0) about an item; images lie below ``folder``.

        A `CorpusError` if the image can't be read.
        """
        item, record = task.item, task.record
        image, image_tokens = None, 0
        if prompt.image is not None:
            focus = item.focus if prompt.box_image else None
            box = record.labels[focus].box if focus is not None else None
            path = folder / prompt.image
            image = AttachedImage(
                path, record.width, record.height, box, _read(path, sha256_of_file)
            )
            size, detail = image.size(options.image), options.image.detail
            image_tokens = options.image.tokens.count(*size, detail=detail)
        described = {
            "version": 1,
            "model": options.model,
            "system": prompt.system,
            "user": prompt.user,
            "image": image.identity(options.image) if image else None,
            "schema": prompt.schema,
            "max_tokens": prompt.max_tokens,
            "parameters": _sampling(options, item),
            "attempt": attempt,
        }
        source = record.provenance.source, record.provenance.licence
        text = json.dumps(described, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        schema = json.dumps(prompt.schema) if prompt.schema is not None else ""
        tokens = text_tokens(prompt.system, prompt.user, schema) + image_tokens
        return cls(
            key, expense(tokens, prompt.max_tokens, options), item, prompt, image, options, source
        )

    def body(self, traits: Traits) -> dict[str, Any]:
        """Return the body as JSON values; reads and encodes the image.

        A `CorpusError` if the image can't be read.
        """
        prompt, options = self.prompt, self.options
        system = prompt.system
        if prompt.schema is not None and traits.structured != "json_schema":
            schema = json.dumps(prompt.schema, ensure_ascii=False, sort_keys=True)
            system += f"\n\nAnswer with one JSON object and nothing else. It fits this JSON schema:\n{schema}"
        content: str | list[dict[str, Any]] = prompt.user
        if self.image is not None:
            url: dict[str, Any] = {"url": self.image.url(options.image)}
            if options.image.detail:
                url["detail"] = options.image.detail
            text = {"type": "text", "text": prompt.user}
            content = [{"type": "image_url", "image_url": url}, text]
        messages = [{"role": "system", "content": system}, {"role": "user", "content": content}]
        body = {"model": options.model, "messages": messages, **_sampling(options, self.item)}
        body[traits.max_tokens_name] = prompt.max_tokens
        if prompt.schema is not None and traits.structured == "json_schema":
            form = {"name": "answer", "schema": prompt.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        elif prompt.schema is not None and traits.structured == "json_object":
            body["response_format"] = {"type": "json_object"}
        return body


def _sampling(options: OpenAIOptions, item: Item) -> dict[str, Any]:
    values: dict[str, Any] = {
        "temperature": options.temperature,
        "top_p": options.top_p,
        "seed": item.seed % 2**31 if options.seeded else None,
    }
    return {name: value for name, value in values.items() if value is not None} | options.parameters


def reply_of(answer: Mapping[str, Any], options: OpenAIOptions, at_most: Expense) -> Reply:
    """Return a Chat Completions answer as a reply, at its most where the server doesn't count tokens."""
    usage = answer.get("usage") or {}
    prompt_tokens, completion_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
    cost = at_most
    if isinstance(prompt_tokens, int) and isinstance(completion_tokens, int):
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        cost = expense(prompt_tokens, completion_tokens, options, cached_tokens=cached)
    message, finish = first_message(answer)
    if message is None:
        return Reply("", "no choice", cost=cost)
    said = (message.get("content"), message.get("refusal"))
    text, refusal = (part if isinstance(part, str) else "" for part in said)
    if not is_unicode(text + refusal):
        return Reply("", "no text", cost=cost)
    return Reply(text, str(finish), refusal, cost)


def text_tokens(*texts: str) -> int:
    """Return an upper bound of the tokens of messages, with the template's own.

    Each ASCII digit and punctuation mark is counted as one token, as many vocabularies have them, and the
    rest as one token for two bytes of UTF-8. InternLM2's vocabulary needs one for 4.3 bytes of English prose,
    3.8 of Chinese and 1.5 of a list of coordinates, so that prose is counted at about twice the truth. Only
    words of a script that the vocabulary lacks could be more. OpenAI's own tokeniser would have to be
    downloaded and says nothing of other models.
    """
    data = "".join(texts).encode("utf-8", "surrogatepass")
    single = len(_SINGLE.findall(data))
    return single + math.ceil((len(data) - single) / 2) + TOKENS_A_MESSAGE * (len(texts) + 1)


def expense(
    prompt_tokens: int, completion_tokens: int, options: OpenAIOptions, *, cached_tokens: int = 0
) -> Expense:
    """Return the cost of one request; ``cached_tokens`` of the prompt may have their own price."""
    price = options.price
    if price is None:
        return Expense(prompt_tokens, completion_tokens)
    cached_price = price.input if price.cached_input is None else price.cached_input
    cached_tokens = min(max(cached_tokens, 0), prompt_tokens)
    dollars = (prompt_tokens - cached_tokens) * price.input + cached_tokens * cached_price
    dollars += completion_tokens * price.output
    discount = getattr(options, "discount", 1.0)  # of a batch
    return Expense(prompt_tokens, completion_tokens, dollars * discount / 1_000_000)
