"""A request of the Chat Completions API, checked, and what it asks the model.

What this server can't do is refused by name, never left out in silence.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gmai_xtuner.core.constants import IMAGE_TOKEN
from gmai_xtuner.core.conversation import Turn
from gmai_xtuner.core.errors import ImageError
from gmai_xtuner.core.imaging.images import decode_rgb
from gmai_xtuner.generate import Prompt, Sampling
from gmai_xtuner.serve.errors import ApiError

_DATA_URL = re.compile(r"data:(?P<kind>[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[^;,]*)*;base64,", re.ASCII)
_VOLUMES = ("dicom", "nifti", "nrrd")


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


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """``detail`` is taken and changes nothing: the model sees every image at one size."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Strict):
    """The last five are what clients repeat of an answer; they have to be empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    refusal: None = None
    annotations: list[None] | None = Field(default=None, max_length=0)
    audio: None = None
    function_call: None = None
    tool_calls: list[None] | None = Field(default=None, max_length=0)


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class TextFormat(_Strict):
    type: Literal["text"]


class ChatRequest(_Strict):
    """The fields that are understood. ``repetition_penalty`` is vLLM's; the last group changes nothing.

    Without a temperature the answer is the likeliest one, not drawn as OpenAI's default has it.
    """

    model: str
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    n: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    logit_bias: dict[str, float] | None = Field(default=None, max_length=0)
    tools: list[Any] | None = Field(default=None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None

    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: str | None = None

    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        found = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(found) > 16 or not all(found):
            raise ApiError("stop must be up to 16 texts, none of them empty", param="stop")
        return found

    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return Sampling(
            temperature=self.temperature or 0.0,
            top_p=self.top_p or 1.0,
            seed=self.seed,
            repetition_penalty=self.repetition_penalty or 1.0,
        )

    def new_tokens(self, *, default: int, limit: int) -> int:
        """Length of the answer at the most.

        Raises:
            ApiError: more than the server allows.
        """
        name = "max_completion_tokens" if self.max_completion_tokens else "max_tokens"
        wanted = self.max_completion_tokens or self.max_tokens or min(default, limit)
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
            for place, part in enumerate(
                [TextPart(type="text", text=parts)] if isinstance(parts, str) else parts
            ):
                if isinstance(part, TextPart):
                    texts.append(_checked(part.text, role, where))
                    continue
                param = f"{where}.content[{place}].image_url.url"
                if role != "user":
                    raise ApiError(f"images belong in user messages, not the {role}'s", param=param)
                if len(images) == limits.images:
                    raise ApiError(
                        f"more than {limits.images} images, which is this server's limit",
                        code="too_many_images",
                        param=param,
                    )
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
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
    first = problems[0]["loc"][:1]
    # A text where a list may stand as well has an error for each; the deepest is the one that was meant.
    problem = max(problems, key=lambda one: len(one["loc"]) if one["loc"][:1] == first else 0)
    param = _param(problem["loc"])
    if problem["type"] == "json_invalid":
        raise ApiError(f"the body is not JSON: {problem['msg']}")
    if not param:
        raise ApiError(f"the body must be a JSON object, got {_short(problem['input'])}")
    if problem["type"] == "extra_forbidden":
        raise ApiError(
            f"unknown field {param}: this server doesn't know it, or can't do what it asks",
            code="unknown_parameter",
            param=param,
        )
    raise ApiError(
        f"{param}: {problem['msg']}, got {_short(problem['input'])}",
        code="missing_required_parameter" if problem["type"] == "missing" else "invalid_value",
        param=param,
    )


def _param(place: tuple[int | str, ...]) -> str:
    """``messages[0].content[1].image_url``, without the names that pydantic adds for unions."""
    names: list[str] = []
    for number, name in enumerate(place):
        is_tag = number > 1 and str(place[number - 2]).startswith("list[tagged-union")
        if isinstance(name, int):
            names.append(f"[{name}]")
        elif name != "str" and not name.startswith("list[") and not is_tag:
            names.append(f".{name}")
    return "".join(names).removeprefix(".")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


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

    Args:
        url: ``data:image/png;base64,...``.
        param: the field, for errors.
        limits: see there.

    Raises:
        ApiError: another address, no base64, no image, or a too large one.
    """
    found = _DATA_URL.match(url)
    if found is None:
        shown = url[:40] + ("..." if len(url) > 40 else "")
        raise ApiError(
            f"expected a data URL (data:image/png;base64,...), got {shown!r}. This server fetches nothing "
            "and opens no files: send the image itself",
            code="invalid_image_url",
            param=param,
        )
    kind = (found["kind"] or "").lower()
    if any(name in kind for name in _VOLUMES):
        raise ApiError(
            f"{kind} is not an image: choose slice and window, and send a PNG. The corpus builder and the "
            "page (python -m gmai_xtuner.demo) do so",
            code="unsupported_image",
            param=param,
        )
    encoded = url[found.end() :]
    if len(encoded) // 4 * 3 > limits.image_bytes + 2:
        raise ApiError(
            f"the image's file is larger than {limits.image_bytes} bytes, this server's limit",
            status=413,
            code="image_too_large",
            param=param,
        )
    try:
        content = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(
            f"the data URL is not base64: {error}", code="invalid_image_url", param=param
        ) from error
    try:
        return decode_rgb(content, param, max_pixels=limits.pixels)
    except ImageError as error:
        raise ApiError(
            str(error),
            status=413 if error.reason == "enormous_image" else 400,
            code="image_too_large" if error.reason == "enormous_image" else error.reason,
            param=param,
        ) from error
