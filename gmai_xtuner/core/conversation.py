# SPDX-License-Identifier: Apache-2.0

"""Record -> Conversation: the two forms of docs/data.md, LLaVA's and OpenAI's, become one, checked.

The parts of one message are joined with a line break, an image being ``<image>``, as the authors' code does
(uni-medical/GMAI-VL, chat messages). Other keys of a record are not read. Nothing is mended: a record is
right, or a DataError says what is wrong, where, and what to do.
"""

from __future__ import annotations

import base64
import math
import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gmai_xtuner.core.constants import DATA_URL, IMAGE_TOKEN
from gmai_xtuner.core.errors import DataError
from gmai_xtuner.core.records import IMAGE_KEY, RawRecord

_ROLES = {"system": "system", "user": "user", "human": "user"}
_ROLES |= {"assistant": "assistant", "gpt": "assistant"}
_REMOTE = re.compile(r"(data:|[A-Za-z][A-Za-z0-9+.-]*://)")
_WINDOWS_ROOT = re.compile(r"[A-Za-z]:[\\/]")
_FILE_NAME = re.compile(
    r"\.(png|jpe?g|tiff?|bmp|webp|gif|dcm|dicom|nii|nii\.gz|mha|npy)$", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Turn:
    """The text of one side, ``system``, ``user`` or ``assistant``, as written.

    ``<image>`` marks, in user turns only, stand at the images' places.
    """

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """A checked conversation: ``[system] (user assistant)+``.

    ``id`` is the record's own, or ``"<file>:<line or position>"``; ``images`` are paths relative to the image
    root, with ``/``, one an ``<image>`` mark, in order;
    of a ``data:`` URL `DATA_URL` and its content.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...]


def user_texts(record: Mapping[str, Any]) -> list[str]:
    """Return the texts of the user's turns, of a record that may lack the answers, as a benchmark's does."""
    messages = record.get("conversations") or record.get("messages")
    texts = []
    for message in messages if isinstance(messages, list | tuple) else ():
        try:
            turn = _read_turn(message, 0, [], _Place("", ""))
        except DataError:
            continue
        if turn.role == "user":
            texts.append(turn.text)
    return texts


def parse_raw(
    raw: RawRecord, *, dataset: str, image_root: Path | None = None, images_first: bool = False
) -> Conversation:
    """Read and check one record of either form.

    An absolute image path inside of ``image_root`` is taken as one relative to it. With ``images_first`` the
    images of a record whose text has no ``<image>`` stand before its first question.

    Raises:
        DataError: reasons ``not_utf8``, ``not_json``, ``not_an_object``, ``bad_id``, ``bad_turn``,
            ``unknown_role``, ``empty_conversation``, ``empty_turn``, ``bad_turn_order``, ``bad_text``,
            ``misplaced_image_mark``, ``image_count``, ``bad_image``, ``remote_image``,
            ``path_outside_root``, ``unread_image_key``.
    """
    record, place = raw.decode(dataset=dataset), _Place(dataset, raw.where)
    if not isinstance(record, Mapping):
        raise place.error(
            "not_an_object",
            f"expected an object, got {_kind(record)}",
            "A list of records belongs in a .json file, an object a line in a .jsonl file.",
        )
    identifier = _read_id(record, place) or raw.default_id or raw.where
    if record.get("id") is not None or record.get("question_id") is not None:
        place = _Place(dataset, f"{identifier} ({raw.where})")

    messages = _find_messages(record, place)
    turns: list[Turn] = []
    inline_images: list[object] = []
    for number, message in enumerate(messages, start=1):
        turns.append(_read_turn(message, number, inline_images, place))
    _check_order(turns, place)
    images = _images(record, inline_images, place)
    if not images:
        _check_no_image_is_meant(record, messages, place)
    number_of_marks = sum(turn.text.count(IMAGE_TOKEN) for turn in turns)
    if images and images_first and not number_of_marks:
        first = next(number for number, turn in enumerate(turns) if turn.role == "user")
        turns[first] = Turn("user", f"{IMAGE_TOKEN}\n" * len(images) + turns[first].text)
    elif number_of_marks != len(images):
        remedy = f"Write one {IMAGE_TOKEN} for each image, where it belongs."
        if not number_of_marks:
            remedy += " Where all belong before the first question, set image_marks: first for the dataset."
        told = f"{number_of_marks} {IMAGE_TOKEN} mark(s) in the text, but {len(images)} image(s)"
        raise place.error("image_count", told, remedy)
    paths = tuple(_relative_path(image, place, image_root) for image in images)
    return Conversation(identifier, tuple(turns), paths)


def _check_no_image_is_meant(
    record: Mapping[str, Any], messages: Sequence[object], place: _Place
) -> None:
    """Ask about a key that looks like the image's, rather than train the record as text alone.

    An explicit ``"image": null`` says that the record has none.
    """
    own = ("image", "images")
    if any(key in record and record[key] is None for key in own):
        return
    for holder in (record, *messages):
        for key, value in holder.items() if isinstance(holder, Mapping) else ():
            if not IMAGE_KEY.search(str(key)) or (holder is record and key in own):
                continue
            names = value if isinstance(value, list | tuple) else [value]
            if any(
                isinstance(name, Mapping)
                or (isinstance(name, str) and (_FILE_NAME.search(name) or _REMOTE.match(name)))
                for name in names
            ):
                raise place.error(
                    "unread_image_key",
                    f"{key!r} is not read there, and the record has no 'image': it would be trained as text "
                    "alone",
                    "Give it as the record's 'image', or say that there is none: \"image\": null.",
                )


@dataclass(frozen=True, slots=True)
class _Place:
    dataset: str
    record: str

    def error(self, reason: str, problem: str, remedy: str) -> DataError:
        return DataError(
            problem, dataset=self.dataset, record=self.record, remedy=remedy, reason=reason
        )


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _read_id(record: Mapping[str, Any], place: _Place) -> str | None:
    for key in ("id", "question_id"):
        value = record.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            told = f"{key} must be a text or a whole number, got {value!r}"
            raise place.error("bad_id", told, "Correct it, or leave it out.")
        _check_text(str(value), key, place)
        return str(value)
    return None


def _find_messages(record: Mapping[str, Any], place: _Place) -> Sequence[object]:
    known = ("conversations", "messages", "conversatons")  # the last one is LLaVA-Med's
    found = [key for key in known if record.get(key) is not None]
    if len(found) != 1:
        keys = ", ".join(map(str, record)) or "none"
        raise place.error(
            "empty_conversation" if not found else "bad_turn",
            f"expected 'conversations' or 'messages', got {' and '.join(found) or 'neither'} "
            f"(keys: {keys})",
            "Give the turns under one of the two.",
        )
    messages = record[found[0]]
    if not isinstance(messages, list | tuple):
        problem = f"{found[0]} must be a list of turns, got {_kind(messages)}"
        raise place.error("bad_turn", problem, "Write a list of objects.")
    if not messages:
        raise place.error("empty_conversation", f"{found[0]} is empty", "Remove the record.")
    return messages


def _read_turn(message: object, number: int, images: list[object], place: _Place) -> Turn:
    """One turn; images that are parts of the message are appended to ``images``."""
    if not isinstance(message, Mapping):
        raise place.error(
            "bad_turn",
            f"turn {number} must be an object, got {_kind(message)}",
            'Write {"from": ..., "value": ...} or {"role": ..., "content": ...}.',
        )
    name = message.get("from") if message.get("from") is not None else message.get("role")
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        told, remedy = f"turn {number} has the unknown role {name!r}", ", ".join(_ROLES)
        raise place.error("unknown_role", told, f"Use one of {remedy}.")
    content = message.get("value") if message.get("value") is not None else message.get("content")
    if isinstance(content, str):
        text = content
    elif isinstance(content, list | tuple):
        text = "\n".join(_read_part(part, number, images, place) for part in content)
    else:
        raise place.error(
            "empty_turn" if content is None else "bad_turn",
            f"turn {number} ({role}) has {_kind(content)} where its text belongs",
            "Write a text, or a list of text and image parts.",
        )
    _check_text(text, f"turn {number}", place)
    if not text.strip():
        remedy = "Write its text, or remove the record."
        raise place.error("empty_turn", f"turn {number} ({role}) is empty", remedy)
    if role != "user" and IMAGE_TOKEN in text:
        raise place.error(
            "misplaced_image_mark",
            f"turn {number} has {text.count(IMAGE_TOKEN)} image(s) in the {role}'s text",
            f"{IMAGE_TOKEN} belongs in user turns only.",
        )
    return Turn(role, text)


def _read_part(part: object, number: int, images: list[object], place: _Place) -> str:
    fields: Mapping[str, Any] = part if isinstance(part, Mapping) else {}
    kind = fields.get("type")
    if kind == "text" and isinstance(fields.get("text"), str):
        return str(fields["text"])
    if kind == "image_url":
        url = fields.get("image_url")
        images.append(url.get("url") if isinstance(url, Mapping) else url)
        return IMAGE_TOKEN
    if kind == "image":
        sources = [fields[key] for key in ("image", "url", "path") if fields.get(key) is not None]
        if len(sources) > 1:
            problem = f"turn {number} has an image part with {len(sources)} sources"
            raise place.error("bad_image", problem, "Give one of image, url and path.")
        images.extend(sources)  # none: the file stands in the record's images
        return IMAGE_TOKEN
    raise place.error(
        "bad_turn",
        f"turn {number} has a part of type {kind!r} that can't be read",
        'Parts are {"type": "text", "text": ...}, {"type": "image_url", "image_url": ...} and '
        '{"type": "image", "image": ...}.',
    )


def _check_text(text: str, what: str, place: _Place) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"({text[error.start]!r}) at character {error.start + 1}"
        problem = f"{what} has half a surrogate pair {half}"
        raise place.error("bad_text", problem, "Write the whole character.") from error


def _check_order(turns: Sequence[Turn], place: _Place) -> None:
    first = 1 if turns[0].role == "system" else 0
    for position in range(first, len(turns)):
        expected = "assistant" if (position - first) % 2 else "user"
        if turns[position].role != expected:
            raise place.error(
                "bad_turn_order",
                f"turn {position + 1} is the {turns[position].role}'s, expected the {expected}'s",
                "After an optional system turn, user and assistant take turns.",
            )
    if turns[-1].role != "assistant":
        raise place.error(
            "bad_turn_order",
            f"the last turn is the {turns[-1].role}'s, so there is no answer to learn",
            "End with an assistant turn, or remove the record.",
        )


def _images(record: Mapping[str, Any], inline: list[object], place: _Place) -> list[object]:
    """Return the record's images: those that it lists, or those inside of its messages."""
    found = [key for key in ("image", "images") if not _is_missing(record.get(key))]
    if len(found) == 2:
        raise place.error("bad_image", "has both image and images", "Give one of the two.")
    if not found:
        return inline
    value = record[found[0]]
    listed = list(value) if isinstance(value, list | tuple) else [value]
    if listed and inline:
        raise place.error(
            "bad_image",
            f"{len(listed)} image(s) listed for the record and {len(inline)} inside its messages, so their "
            "order is not known",
            "Give all images in one of the two ways.",
        )
    return listed or inline


def _is_missing(image: object) -> bool:
    """Tell whether a record says that it has no image: null, an empty text, or the NaN of a table."""
    return image is None or image == "" or (isinstance(image, float) and math.isnan(image))


def _relative_path(image: object, place: _Place, root: Path | None) -> str:
    if not isinstance(image, str) or not image.strip() or "\0" in image:
        shown = repr(image) if isinstance(image, str) else _kind(image)
        raise place.error(
            "bad_image",
            f"an image must be the path of a file, got {shown}",
            "Write the image to a file and give its path below the image root.",
        )
    _check_text(image, "an image path", place)
    if image.startswith("data:"):
        return _of_data_url(image, place)
    if _REMOTE.match(image):
        raise place.error(
            "remote_image",
            f"image {image[:80]!r} is not a file below the image root",
            "Download it or decode it to a file, and give its path.",
        )
    path = posixpath.normpath(image)
    for start in (root.absolute(), root.resolve()) if root and path.startswith("/") else ():
        if PurePosixPath(path).is_relative_to(start):
            return PurePosixPath(path).relative_to(start).as_posix()
    is_windows_path = _WINDOWS_ROOT.match(image) or ".." in image.split("\\")
    if path.startswith(("/", "\\")) or path.split("/")[0] == ".." or is_windows_path:
        raise place.error(
            "path_outside_root",
            f"image path {image!r} leaves the image root",
            "Give a path relative to image_root in the mixture file, without '..', or an absolute "
            "one inside of it.",
        )
    return path


def _of_data_url(url: str, place: _Place) -> str:
    head, _, encoded = url.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError("it has no base64")
        if not encoded:
            raise ValueError("it is empty")
        content = base64.b64decode(encoded, validate=True)
    except ValueError as error:
        told = f"image {url[:40]!r}... is no image in base64 ({error})"
        raise place.error("bad_image", told, "Write data:image/png;base64,...") from error
    return DATA_URL + base64.urlsafe_b64encode(content).decode()
