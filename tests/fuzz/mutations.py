# SPDX-License-Identifier: Apache-2.0

"""Valid files -> damaged and hostile ones, by steps that hypothesis can draw and make smaller."""

import json
import re
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

NUMBERS = (
    *(b"0", b"-1", b"1e999", b"nan", b"-0.5", b"99999999999999999999", b"9" * 5000, b"1e-320"),
    *(b"", b"true", b"4294967296", b"2147483647", b"0x7f", b"1_0", b"2024-02-30", b"?"),
)
WORDS = (
    *(b"\x00", b"\xff" * 4, b"\xff" * 8, b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00", b"\x00" * 8),
    *(
        b'"',
        b"\n",
        b"[" * 300,
        b"{",
        b"<",
        b"]]>",
        b"&a;",
        b"../../etc/passwd",
        b"<image>",
        b"\xef\xbb\xbf",
    ),
    *(
        b"\xed\xa0\x80",
        b"!!python/object/apply:os.system",
        b"&a [*a]",
        b"\\ud800",
        b"PK\x03\x04",
        b"\x1f\x8b",
    ),
)
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1.5, 10**20, 10**400, float("nan"), float("inf"), "", "x" * 300, "\ud800"),
    *(
        "../../x",
        "/etc/passwd",
        "\0",
        "<image>",
        [],
        {},
        [[]],
        [None],
        {"": {}},
        [[1, 2], [3]],
        "auto",
    ),
    *(
        [0] * 3,
        [1e30] * 4,
        ["a"] * 9,
        {"counts": "a", "size": [1, 10**9]},
        "2024-01-01",
        "n" * 5000,
    ),
)
_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?")
Step = tuple[str, int, int, int]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ("value", "value", "number", "bit", "word", "cut", "drop", "again", "head", "key")
        ),
        *[st.integers(0, 2**24)] * 3,
    ),
    min_size=1,
    max_size=4,
)


def mutated(content: bytes, steps: list[Step]) -> bytes:
    """Take the steps one after the other; one that has nothing to work on does nothing."""
    for kind, place, choice, length in steps:
        content = _STEPS[kind](content, place, choice, length)
    return content


def _value(content: bytes, place: int, choice: int, length: int) -> bytes:
    """Replace one value of JSON; in a JSONL file, of one line."""
    lines = content.split(b"\n")
    for number, part in ((None, content), (place % len(lines), lines[place % len(lines)])):
        try:
            tree = json.loads(part)
        except ValueError:
            continue
        spots: list[tuple[Any, Any]] = []
        _walk(tree, spots)
        if not spots:
            return content
        owner, key = spots[place % len(spots)]
        owner[key] = VALUES[choice % len(VALUES)]
        try:
            made = json.dumps(tree).encode()
        except ValueError:  # deeper than json goes
            return content
        return made if number is None else b"\n".join([*lines[:number], made, *lines[number + 1 :]])
    return _number(content, place, choice, length)


def _walk(tree: Any, spots: list[tuple[Any, Any]]) -> None:
    for key in (
        tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    ):
        spots.append((tree, key))
        _walk(tree[key], spots)


def _key(content: bytes, place: int, choice: int, length: int) -> bytes:
    """Take one key of JSON out."""
    try:
        tree = json.loads(content)
    except ValueError:
        return content
    spots: list[tuple[Any, Any]] = []
    _walk(tree, spots)
    spots = [(owner, key) for owner, key in spots if isinstance(owner, dict)]
    if spots:
        owner, key = spots[place % len(spots)]
        del owner[key]
    return json.dumps(tree).encode()


def _number(content: bytes, place: int, choice: int, length: int) -> bytes:
    """Replace a number that is written in digits."""
    found = list(_NUMBER.finditer(content[: 2**16]))
    if not found:
        return content
    start, end = found[place % len(found)].span()
    return content[:start] + NUMBERS[choice % len(NUMBERS)] + content[end:]


def _at(content: bytes, place: int) -> int:
    """Half of all places lie in the first 512 bytes, where headers are."""
    return place // 2 % (min(len(content), 512) + 1 if place % 2 else len(content) + 1)


def _bit(content: bytes, place: int, choice: int, length: int) -> bytes:
    at = min(_at(content, place), len(content) - 1)
    return (
        content[:at] + bytes([content[at] ^ 1 << choice % 8]) + content[at + 1 :]
        if content
        else content
    )


def _word(content: bytes, place: int, choice: int, length: int) -> bytes:
    """Write a word over what is there, or between."""
    at, word = _at(content, place), WORDS[choice % len(WORDS)]
    return content[:at] + word + content[at + (len(word) if length % 2 else 0) :]


def _cut(content: bytes, place: int, choice: int, length: int) -> bytes:
    return content[: _at(content, place)]


def _drop(content: bytes, place: int, choice: int, length: int) -> bytes:
    at = _at(content, place)
    return content[:at] + content[at + 1 + length % 64 :]


def _again(content: bytes, place: int, choice: int, length: int) -> bytes:
    at = _at(content, place)
    part = content[at : at + 1 + length % 256]
    return content[:at] + part * (2 + choice % 40) + content[at:]


def _head(content: bytes, place: int, choice: int, length: int) -> bytes:
    """Write a whole number over two, four or eight bytes of the head."""
    size, at = 2 << length % 3, place % (min(len(content), 512) + 1)
    number = (0, 1, 2**31 - 1, 2**16 - 1, 2**63 - 1, 2**32 - 1, choice)[choice % 7] % 2 ** (
        8 * size
    )
    return (
        content[:at] + number.to_bytes(size, ("little", "big")[length % 2]) + content[at + size :]
    )


_STEPS: dict[str, Callable[[bytes, int, int, int], bytes]] = {
    "value": _value, "number": _number, "bit": _bit, "word": _word, "cut": _cut,
    "drop": _drop, "again": _again, "head": _head, "key": _key,
}  # fmt: skip
