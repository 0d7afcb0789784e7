# SPDX-License-Identifier: Apache-2.0

"""JSON that others have written: whatever is wrong with it is a ``ValueError``."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        key = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {key!r} is there twice in one object")
    return found


class _Decoder(json.JSONDecoder):
    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        try:
            return super().raw_decode(s, idx)
        except RecursionError as error:
            raise ValueError("objects nested too deeply") from error


STRICT_JSON = _Decoder(object_pairs_hook=_unique)
"""Its ``decode`` and ``raw_decode`` refuse a key that is there twice, of which ``json`` takes the last, and
say of objects nested too deeply what they are: ``json`` raises a ``RecursionError``, which nobody expects."""
