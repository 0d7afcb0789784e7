"""A conversation as a ZIP: records in the form that training reads, with the pictures as the models got them.

``conversation.json`` is a list with a record for each model. No name of a file and nothing of a header is in
it.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from gmai_xtuner.core.constants import IMAGE_TOKEN
from gmai_xtuner.demo.conversation import Session
from gmai_xtuner.demo.i18n import BANNER, PageError

RECORDS = "conversation.json"


def as_zip(session: Session, names: Sequence[str], *, now: datetime | None = None) -> bytes:
    """The ZIP's bytes.

    Args:
        session: whose conversation; failed answers are left out with their questions.
        names: of the models.
        now: for tests.

    Raises:
        PageError: there is no answer yet.
    """
    pictures: dict[str, bytes] = {}
    records = [
        record(session, number, name, pictures, now=now) for number, name in enumerate(names)
    ]
    records = [one for one in records if one["conversations"]]
    if not records:
        raise PageError("nothing_to_save")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        text = json.dumps(records, ensure_ascii=False, indent=1)
        archive.writestr(RECORDS, text + "\n")
        archive.writestr("README.txt", "".join(f"{line}\n" for line in BANNER.values()))
        for name, data in pictures.items():
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
    return buffer.getvalue()


def record(
    session: Session,
    model: int,
    name: str,
    pictures: dict[str, bytes],
    *,
    now: datetime | None = None,
) -> dict[str, Any]:
    """One model's side of the conversation.

    Questions that were not answered are left out, as they were for the model. It ends before the first
    answer that no record can hold: one with an ``<image>`` mark.

    Args:
        session: see `as_zip`.
        model: its number.
        name: what it is called.
        pictures: files that the record names are added, each once.
        now: for tests.
    """
    turns: list[dict[str, str]] = []
    images: list[str] = []
    stopped: list[int] = []
    made_with: list[dict[str, Any]] = []
    left_out = 0
    ended = False
    for exchange in session.exchanges:
        answer = exchange.answers[model]
        if not answer.counts:
            left_out += 1
            continue
        ended = ended or IMAGE_TOKEN in answer.text
        if ended:
            left_out += 1
            continue
        for shown in exchange.images:
            data = _png(shown.picture)
            file = next((known for known, old in pictures.items() if old == data), None)
            if file is None:
                file = f"images/{len(pictures) + 1}.png"
                pictures[file] = data
            images.append(file)
        made_with.append(exchange.made_with)
        turns.append({"from": "human", "value": exchange.turn.text})
        turns.append({"from": "gpt", "value": answer.text})
        if answer.state == "stopped":
            stopped.append(len(turns) - 1)
    system = session.settings.system.strip()
    if turns and system:
        turns.insert(0, {"from": "system", "value": system})
        stopped = [turn + 1 for turn in stopped]
    made = (now or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "id": f"demo-{made}-{model + 1}",
        "image": images,
        "conversations": turns,
        "model": name,
        "settings": made_with,
        "stopped_turns": stopped,
        "exchanges_left_out": left_out,
        "notice": BANNER["en"],
    }


def _png(picture: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
