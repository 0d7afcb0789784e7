# SPDX-License-Identifier: Apache-2.0

"""How many planted faults the checks catch, and how many true texts they stop.

Every case is a made-up record, a true text about it, by the template writer or in other words (`OTHERWISE`,
written for this benchmark after the checks), and the same text with one fault: another organ, side,
number, modality or size. English and Chinese. ``--json`` prints one object.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from printing import parser, quiet_stdout, show

from data_tools import taxonomy
from data_tools.checks import CheckOptions, check
from data_tools.checks.claims import mirror
from data_tools.forms import MakeOptions, plan, write
from data_tools.items import Conversation, Item, SourceContext, Task, Turn
from data_tools.records import Label, Provenance, Record
from gmai_xtuner.core.rng import Rng

TAXONOMY = taxonomy.load()
CHINESE = {
    "liver": "肝脏", "spleen": "脾脏", "kidney": "肾脏", "pancreas": "胰腺", "stomach": "胃",
    "nodule": "结节",
    "cyst": "囊肿", "platelet": "血小板", "neutrophil": "中性粒细胞", "lymphocyte": "淋巴细胞",
    "polyp": "息肉",
    "fracture": "骨折", "pneumonia": "肺炎", "lymph node": "淋巴结", "rib": "肋骨",
}  # fmt: skip
NAMES = tuple(sorted(CHINESE))
CONTEXT = SourceContext("set", "Set", NAMES, {}, CHINESE, known=NAMES)
MODALITIES = (
    "CT",
    "MR",
    "X-ray",
    "Ultrasound",
    "Endoscopy",
    "Microscopy",
    "Fundus photography",
    "PET",
)
NUMBERS = ("two", "three", "four", "five", "six", "seven")
MAKE = MakeOptions(
    caption=2, region_caption=2, instruction=2, dialogue=2, perception=6, text_single=0, text_multi=0,
    chinese=0.5,
)  # fmt: skip
# Texts in a writer's own words: language, text. Fields of the first label, which has `count` regions.
OTHERWISE = (
    (
        "en",
        "On this {modality} image one can make out {number} {names} on the patient's {side} side.",
    ),
    (
        "en",
        "{modality} study. The {side}-sided {name} is the main feature; nothing else is marked.",
    ),
    (
        "en",
        "There appear to be {number} separate {names}, all of them {side}-sided, in this {modality} scan.",
    ),
    (
        "en",
        "A {name} is outlined. The largest one takes up roughly {percent}% of the width of the image.",
    ),
    (
        "en",
        "The examination is {modality}; it demonstrates {number} {names}, without further abnormality.",
    ),
    ("zh", "本例为{modality}检查，患者{side}可见{number}个{name}。"),
    ("zh", "{modality}图像示{side}{name}，共{number}个，边界清楚。"),
    ("zh", "图中可辨{number}个{name}，最大者宽约占图像的{percent}%。"),
    ("zh", "{side}{name}显示清晰，检查方式为{modality}，其余未作标记。"),
)


def records(count: int) -> Iterator[Record]:
    for number in range(count):
        rng = Rng(number)
        names = rng.sample(NAMES, 1 + rng.below(2))
        labels = []
        for name in names:
            for at in range(2 + rng.below(4)):
                x, y = 20 + 100 * at, rng.below(300)
                box = (x, y, x + 40 + rng.below(50), y + 60 + rng.below(100))
                labels.append(Label(name, box))
        yield Record(
            f"2d#{number}", "images/x.png", 640, 480, rng.pick(MODALITIES), "None", None, "2D detection",
            tuple(labels), {"side": rng.pick(("left", "right"))},
            Provenance("set", "Set", "MIT", "", "x.png", "0" * 64, {}, f"set/{number}"),
        )  # fmt: skip


def texts(record: Record) -> Iterator[tuple[str, Item, Conversation]]:
    """Yield true texts: origin, item, conversation."""
    for item in plan(record, CONTEXT, MAKE, seed=1):
        yield "template", item, write(Task(item, record, CONTEXT), TAXONOMY)
    first = record.labels[0]
    assert first.box
    of = [label.box for label in record.labels if label.name == first.name]
    side = record.attributes["side"]
    for number, (language, text) in enumerate(OTHERWISE):
        zh = language == "zh"
        modality = TAXONOMY.terms(record.modality).chinese if zh else record.modality
        said = text.format(
            modality=modality,
            name=CHINESE[first.name] if zh else first.name,
            names=first.name + ("s" if not first.name.endswith("s") else ""),
            number=len(of) if zh else NUMBERS[len(of) - 2],
            side={"left": "左侧", "right": "右侧"}[side] if zh else side,
            percent=round(100 * max(box[2] - box[0] for box in of if box) / record.width),
        )
        turns = (
            Turn("human", "<image>\n请描述。" if zh else "<image>\nDescribe it."),
            Turn("gpt", said),
        )
        yield "other words", Item(f"{record.id}#caption-{number}", "caption", language), turns


def faults(record: Record, item: Item, made: Conversation) -> Iterator[tuple[str, Conversation]]:
    """Yield the text with one fault of each kind that it has room for; only answers are changed."""
    rng = Rng(item.seed + len(made[1].text))
    zh = item.language == "zh"
    others = [name for name in NAMES if name not in record.names]
    other = rng.pick(others)
    for name in record.names:
        old, new = (CHINESE[name], CHINESE[other]) if zh else (name, other)
        yield "organ", _changed(made, old, new)
    modality = rng.pick([name for name in MODALITIES if name != record.modality])
    for old in (
        (TAXONOMY.terms(record.modality).chinese,)
        if zh
        else (record.modality, "radiograph", "fundus photograph")
    ):
        new = TAXONOMY.terms(modality).chinese if zh else modality
        yield "modality", _changed(made, old, new)
        if not zh:
            yield "modality", _changed(made, old.lower(), new)
    # Sides of the image are positions, no sides of the body.
    body = (
        r"(患者|示|^|，)([左右])侧"
        if zh
        else r"(patient's |the |The |them )(left|right)(?= side[ .]| breast|-sided)"
    )
    yield (
        "side",
        _replaced(made, body, lambda found: found[1] + mirror(found[2]) + ("侧" if zh else "")),
    )
    if zh:
        yield (
            "count",
            _replaced(
                made,
                r"([两\d]+)(?=[个处根])",
                lambda found: str((2 if found[1] == "两" else int(found[1])) + 1),
            ),
        )
    else:
        number = rf"\b({'|'.join(NUMBERS)})\b"
        yield (
            "count",
            _replaced(
                made, number, lambda found: NUMBERS[(NUMBERS.index(found[1].lower()) + 1) % 6], re.I
            ),
        )
    if item.kind == "counting":
        yield "count", _replaced(made, r"^(\d+)$", lambda found: str(int(found[1]) + 1))
    yield "size", _replaced(made, r"(\d+)%", lambda found: f"{min(99, 2 * int(found[1]) + 9)}%")


def _changed(made: Conversation, old: str, new: str) -> Conversation:
    return _replaced(made, rf"(?<![a-z]){re.escape(old)}(?!光)", lambda _: new)


def _replaced(made: Conversation, pattern: str, new: Any, flags: Any = 0) -> Conversation:
    """Change the first place in the answers."""
    turns, done = [], False
    for turn in made:
        if turn.speaker == "gpt" and not done:
            text, count = re.subn(pattern, new, turn.text, count=1, flags=flags)
            turn, done = replace(turn, text=text), bool(count)
        turns.append(turn)
    return tuple(turns)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--records", type=int, default=400)
    options = made.parse_args()
    planted: Counter[tuple[str, str]] = Counter()
    caught: Counter[tuple[str, str]] = Counter()
    true: Counter[tuple[str, str]] = Counter()
    stopped: Counter[tuple[str, str]] = Counter()
    missed: dict[str, str] = {}
    with quiet_stdout():
        for record in records(options.records):
            for origin, item, text in texts(record):
                key = origin, item.language
                true[key] += 1
                if problems := check(text, Task(item, record, CONTEXT), TAXONOMY, CheckOptions()):
                    stopped[key] += 1
                    missed.setdefault(
                        f"stopped, {origin}, {item.language}: {problems[0].reason}", text[-1].text
                    )
                    continue
                for kind, wrong in faults(record, item, text):
                    if wrong == text:
                        continue
                    planted[kind, item.language] += 1
                    if check(wrong, Task(item, record, CONTEXT), TAXONOMY, CheckOptions()):
                        caught[kind, item.language] += 1
                    else:
                        missed.setdefault(
                            f"missed, {origin}, {item.language}: {kind}",
                            " | ".join(t.text for t in wrong),
                        )
    result: dict[str, Any] = {
        "planted": planted.total(),
        "caught_share": round(caught.total() / planted.total(), 4),
        "true_texts": true.total(),
        "stopped_share": round(stopped.total() / true.total(), 4),
        "kinds": {f"{k} {c}": [caught[k, c], n] for (k, c), n in sorted(planted.items())},
        "true": {f"{o} {c}": [stopped[o, c], n] for (o, c), n in sorted(true.items())},
        "examples": missed,
    }
    show(result, as_json=options.json)


if __name__ == "__main__":
    main()
