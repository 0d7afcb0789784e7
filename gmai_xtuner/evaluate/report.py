# SPDX-License-Identifier: Apache-2.0

"""A page to look at: tables, and questions with their images and answers, wrong ones first.

One file that asks nothing of any other: images are in it, small, and its script is named by its hash in the
page's own policy, which allows no other script and no request.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from gmai_xtuner.core.errors import ImageError
from gmai_xtuner.core.files import replace_text
from gmai_xtuner.core.templates import environment
from gmai_xtuner.evaluate.questions import open_image
from gmai_xtuner.evaluate.results import Result, Scored
from gmai_xtuner.evaluate.tables import Table

TEMPLATE = "report.html.j2"
SCRIPT = "report.js"
_SIDE = 360
_MANY = 60
"""A group with more values than that has no menu."""


def write_report(
    file: Path, result: Result, tables: Sequence[Table], scored: Sequence[Scored], *, shown: int
) -> None:
    """Write the page, with ``shown`` of the scored questions, wrong ones first, then those not understood."""
    ordered = sorted(scored, key=lambda one: _RANK[verdict_of(one)])
    items = [_shown(one) for one in ordered[:shown]]
    counts = Counter(map(verdict_of, scored))
    script = Path(__file__).with_name(SCRIPT).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = environment("gmai_xtuner.evaluate", html=True).get_template(TEMPLATE)
    page = template.render(
        result=result,
        tables=tables,
        items=items,
        counts={name: counts[name] for name in _RANK if counts[name]},
        total=len(scored),
        menus=_menus(items),
        # The file is part of this package, and its hash stands in the policy.
        script=Markup(script),
        digest=digest,
    )
    replace_text(file, page)


_RANK = {"wrong": 0, "unparsed": 1, "partly": 2, "right": 3, "unscored": 4}


def verdict_of(one: Scored) -> str:
    """Return what became of a question, in a word."""
    value = one.score.value
    if value is None or one.score.parsed is None:
        return "unscored" if value is None else "unparsed"
    return "right" if value >= 1 else "partly" if value > 0 else "wrong"


def _shown(one: Scored) -> dict[str, Any]:
    """Return what the template shows of a question; an image is (data URL, width, height)."""
    question, gold = one.question, one.question.gold_letters()
    images, problems = [], []
    for number, source in enumerate(question.images, 1):
        try:
            image = open_image(source, f"image {number} of question {question.id}")
        except ImageError as error:
            problems.append(str(error))
        else:
            images.append(_thumbnail(image))
    return {
        "id": question.id,
        "verdict": verdict_of(one),
        "value": one.score.value,
        "question": question.text,
        "options": [(letter, text, letter in gold) for letter, text in question.lettered().items()],
        "gold": question.answer,
        "answer": one.answer.answer,
        "parsed": one.score.parsed,
        "images": images,
        "problems": problems,
        "groups": {key: value for key, value in question.groups.items() if value},
    }


def _thumbnail(image: Image.Image) -> tuple[str, int, int]:
    image.thumbnail((_SIDE, _SIDE))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=82)
    url = f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"
    return url, *image.size


def _menus(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the groups that the questions on the page can be chosen by."""
    values: dict[str, set[str]] = {}
    for item in items:
        for key, value in item["groups"].items():
            values.setdefault(key, set()).add(value)
    chosen = {key: sorted(found) for key, found in values.items() if 1 < len(found) <= _MANY}
    return [{"key": key, "values": found} for key, found in chosen.items()]
