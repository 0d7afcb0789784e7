# SPDX-License-Identifier: Apache-2.0

"""A request of the Chat Completions API, checked, and what it asks the model.

What this server can't do is refused by name, never left out in silence.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import torch
from msgspec import Meta
from PIL import Image

from gmai_xtuner.core.constants import IMAGE_TOKEN
from gmai_xtuner.core.conversation import Turn
from gmai_xtuner.core.errors import ImageError
from gmai_xtuner.core.imaging.images import decode_rgb
from gmai_xtuner.generate import Prompt, Sampling

MAX_OBJECTS = 20_000
"""Objects that a request may have; more would not fit into a model's positions."""
_DEFAULT_TOKENS = 512
MAX_TEXTS = 200_000
"""The same of texts and keys."""
_DATA_URL = re.compile(r"data:(?P<kind>[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[^;,]*)*;base64,", re.ASCII)
_MISSING = re.compile("missing required field `(.*)`")
_UNKNOWN = re.compile("unknown field `(.*)`", re.DOTALL)
_VOLUMES = ("dicom", "nifti", "nrrd")


class ApiError(Exception):
    """A request that is not answered.

    Args:
        message: what was expected, what came, and what to do.
        status: of HTTP.
        code: short stable name of the kind of error.
        param: which field of the request it is about.
        retry_after: seconds after which to come again.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.code, self.param = message, status, code, param
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """Return the error as the API has it."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": self.message, "type": kinds.get(self.status, kind)}
        return {"error": {**error, "param": self.param, "code": self.code}}


def busy(why: str) -> ApiError:
    """Return the error of a server that has too much to do."""
    message = f"{why}; come again later"
    return ApiError(message, status=503, code="server_busy", retry_after=10)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may bring.

    Args:
        body_bytes: the whole request.
        images: of one request, all turns together.
        image_bytes: of one image's file.
        pixels: width x height of one image.
    """

    body_bytes: int = 64 * 2**20
    images: int = 16
    image_bytes: int = 20 * 2**20
    pixels: int = 100_000_000


class _Strict(msgspec.Struct, forbid_unknown_fields=True):
    """Read by msgspec: the types hold as they are, and the first wrong value ends the reading."""


class TextPart(_Strict, tag_field="type", tag="text"):
    text: str


class ImageUrl(_Strict):
    """``detail`` is taken and changes nothing: the model sees every image at one size."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Strict, tag_field="type", tag="image_url"):
    image_url: ImageUrl


Nothing = Annotated[list[None], Meta(max_length=0)]
"""An empty list."""
Zero = Annotated[float, Meta(ge=0, le=0)]


class Message(_Strict):
    """The last five are what clients repeat of an answer; they have to be empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart | ImagePart]
    refusal: None = None
    annotations: Nothing | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Nothing | None = None


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class TextFormat(_Strict, tag_field="type", tag="text"):
    pass


class ChatRequest(_Strict):
    """The fields that are understood. ``repetition_penalty`` is vLLM's; the last group changes nothing.

    Without a temperature the answer is the likeliest one, not drawn as OpenAI's default has it.
    """

    model: str
    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    repetition_penalty: float | None = None
    stop: str | Annotated[list[str], Meta(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    n: Literal[1] | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logprobs: bool | None = None
    top_logprobs: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Meta(max_length=0)] | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None

    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None

    def stops(self) -> tuple[str, ...]:
        """Return the texts that end the answer."""
        found = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if not all(0 < len(text) <= 400 for text in found):
            message = "stop must be texts of 1 to 400 characters, none of them empty"
            raise ApiError(message, param="stop")
        return found

    def sampling(self) -> Sampling:
        """Return how tokens are chosen; refuse values with which no model can compute."""
        penalty = self.repetition_penalty
        try:
            return Sampling(
                temperature=self.temperature or 0.0,
                top_p=self.top_p or 1.0,
                seed=self.seed,
                repetition_penalty=1.0 if penalty is None else penalty,
            )
        except ValueError as error:
            raise ApiError(str(error), code="invalid_value") from error

    def new_tokens(self, *, limit: int) -> int:
        """Return the length of the answer at the most; refuse more than the server allows."""
        name = "max_completion_tokens" if self.max_completion_tokens else "max_tokens"
        wanted = self.max_completion_tokens or self.max_tokens or min(_DEFAULT_TOKENS, limit)
        if wanted > limit:
            raise ApiError(f"{name} is {wanted}, this server allows {limit}", param=name)
        return wanted

    def prompt(self, limits: Limits, pixels: Callable[[Image.Image], torch.Tensor]) -> Prompt:
        """Turns and images, of which only the pixel values are kept.

        Parts of a message are joined with a line break, an image being ``<image>``, as in training.

        Raises:
            ApiError: the turns are not ``[system] (user assistant)* user``, or an image can't be used.
        """
        turns: list[Turn] = []
        images: list[torch.Tensor] = []
        for number, message in enumerate(self.messages):
            where = f"messages[{number}]"
            role = "system" if message.role == "developer" else message.role
            parts = message.content
            texts = []
            for place, part in enumerate([TextPart(parts)] if isinstance(parts, str) else parts):
                if isinstance(part, TextPart):
                    texts.append(_checked(part.text, role, where))
                    continue
                param = f"{where}.content[{place}].image_url.url"
                if role != "user":
                    raise ApiError(f"images belong in user messages, not the {role}'s", param=param)
                if len(images) == limits.images:
                    message_text = f"more than {limits.images} images, which is this server's limit"
                    raise ApiError(message_text, code="too_many_images", param=param)
                images.append(pixels(image_of(part.image_url.url, param, limits)))
                texts.append(IMAGE_TOKEN)
            text = "\n".join(texts)
            if not text.strip():
                raise ApiError(f"the {role}'s message is empty", param=f"{where}.content")
            turns.append(Turn(role, text))
        _check_order(turns)
        return Prompt(tuple(turns), tuple(images))


def read_request(body: bytes) -> ChatRequest:
    """The request in a body of JSON.

    Raises:
        ApiError: it is none; names the first field that is wrong.
    """
    if body.count(b"{") > MAX_OBJECTS or body.count(b'"') > MAX_TEXTS:
        raise ApiError(
            f"the body has more than {MAX_OBJECTS} objects or {MAX_TEXTS} quotation marks",
            status=413,
            code="request_too_large",
        )
    try:
        asked = msgspec.json.decode(body, type=ChatRequest)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at `$")
        param = place.rstrip("`").removeprefix(".")
        if missing := _MISSING.search(what):
            param = f"{param}.{missing[1]}".removeprefix(".")
        elif unknown := _UNKNOWN.search(what):
            param = f"{param}.{unknown[1]}".removeprefix(".")[:200]
            raise ApiError(
                f"unknown field {param}: this server doesn't know it, or can't do what it asks",
                code="unknown_parameter",
                param=param,
            ) from error
        raise ApiError(
            f"{param or 'the body'}: {what[:300]}",
            code="missing_required_parameter" if missing else "invalid_value",
            param=param or None,
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ApiError(f"the body is not JSON: {str(error)[:300]}") from error
    for name in ("logprobs", "store"):
        if getattr(asked, name):
            raise ApiError(f"{name}: must be false here", code="invalid_value", param=name)
    return asked


def _checked(text: str, role: str, where: str) -> str:
    if role != "assistant" and IMAGE_TOKEN in text:
        raise ApiError(
            f"{IMAGE_TOKEN} in a text, where it would stand for an image. Send images as parts of type "
            "image_url, in their places between parts of type text",
            code="image_count",
            param=f"{where}.content",
        )
    return text


def _check_order(turns: list[Turn]) -> None:
    first = 1 if turns[0].role == "system" else 0
    for place in range(first, len(turns)):
        expected = "assistant" if (place - first) % 2 else "user"
        if turns[place].role != expected:
            raise ApiError(
                f"messages[{place}] is the {turns[place].role}'s, expected the {expected}'s: after an "
                "optional system message, user and assistant take turns",
                param=f"messages[{place}].role",
            )
    if turns[-1].role != "user":
        raise ApiError(
            "the last message must be the user's", param=f"messages[{len(turns) - 1}].role"
        )


def image_of(url: str, param: str, limits: Limits) -> Image.Image:
    """Decode the image in a data URL, as training does; nothing is fetched, no file is opened.

    Another address, no base64, no image, or a too large one is an ``ApiError`` about ``param``.
    """

    def refused(message: str, code: str) -> ApiError:
        status = 413 if code == "image_too_large" else 400
        return ApiError(message, status=status, code=code, param=param)

    found = _DATA_URL.match(url[:1_000])
    if found is None:
        shown = url[:40] + ("..." if len(url) > 40 else "")
        raise refused(
            f"expected a data URL (data:image/png;base64,...), got {shown!r}. This server fetches nothing "
            "and opens no files: send the image itself",
            "invalid_image_url",
        )
    kind = (found["kind"] or "").lower()
    if any(name in kind for name in _VOLUMES):
        raise refused(
            f"{kind} is not an image: choose slice and window, and send a PNG. The corpus builder and the "
            "page (python -m gmai_xtuner.demo) do so",
            "unsupported_image",
        )
    encoded, most = url[found.end() :], limits.image_bytes
    if len(encoded) // 4 * 3 > most + 2:
        message = f"the image's file is larger than {most} bytes, this server's limit"
        raise refused(message, "image_too_large")
    try:
        return decode_rgb(base64.b64decode(encoded, validate=True), param, max_pixels=limits.pixels)
    except ImageError as error:
        large = error.reason == "enormous_image"
        raise refused(str(error), "image_too_large" if large else error.reason) from error
    except ValueError as error:
        raise refused(f"the data URL is not base64: {error}", "invalid_image_url") from error
