# SPDX-License-Identifier: Apache-2.0

"""How often the scorers and other kits' rules read an answer as a reader does, on lists of answers.

A list says its own form at its top; by default it is the one that no rule was tuned on. "Misread" is a part
of all answers: something else was understood, or something where the answer says nothing. "Unread" is a part
of those that a reader understands.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from printing import REPOSITORY, parser, show

from gmai_xtuner.evaluate.questions import Question
from gmai_xtuner.evaluate.scoring import SCORERS

FOLDER = REPOSITORY / "tests" / "evaluate" / "scoring"
OURS = {"=": "choice", "?": "yes_no", "~": "closed", "#": "exact_match"}
KITS = ("vlmevalkit", "huatuogpt", "mmmu", "lmms_eval", "medevalkit")
_POLARITY = {"yes": "Yes", "no": "No"}


def readings(file: Path) -> list[tuple[str, Question, str, str]]:
    """Return kind (a key of :data:`OURS`), question, answer and a reader's reading of each line."""
    kinds: dict[str, tuple[str, Question]] = {}
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        kind, (key, _, text) = line[:1], line[2:].partition(":")
        if kind == "=":
            options = tuple(one.strip() for one in text.split(" | "))
            kinds[key] = kind, Question(key, "?", options=options, answer=options[0])
        elif kind == "?":
            kinds[key] = kind, Question(key, text.strip(), answer="Yes")
        elif kind == "~":
            key, gold = key.split(" ", 1)
            groups = {"answer_type": "CLOSED"}
            kinds[key] = kind, Question(key, text.strip(), answer=gold, groups=groups)
        elif kind == "#" and line[3:4] == " ":
            kinds[line[2]] = kind, Question(line[2], "?", answer=line[4:])
        elif kind != "#":
            key, reading, answer = line.split(" ", 2)
            found.append((*kinds[key], answer.replace(r"\n", "\n"), reading))
    return found


def outcome(scorer: str, kind: str, question: Question, answer: str, reading: str) -> str:
    """Return ``agrees``, ``unread`` or ``misread``."""
    gold = question.answer
    if kind == "=" and reading != "-":
        gold = question.lettered()[reading]
    elif kind == "?":
        gold = _POLARITY.get(reading, "Yes")
    asked = Question(
        question.id, question.text, options=question.options, answer=gold, groups=question.groups
    )
    score = SCORERS[scorer].score(asked, answer)
    if reading == "-":
        return "agrees" if score.parsed is None else "misread"
    if score.parsed is None and kind != "#":
        return "unread"
    return "agrees" if score.value == float(reading != "0") else "misread"


def measure(
    scorer: str, kinds: str, found: list[tuple[str, Question, str, str]]
) -> dict[str, object]:
    """Return the shares of a scorer (empty: our own of each kind) on the questions of some kinds."""
    counts: Counter[str] = Counter()
    for kind, question, answer, reading in found:
        if kind in kinds:
            counts[outcome(scorer or OURS[kind], kind, question, answer, reading)] += 1
            counts["readable"] += reading != "-"
    n = counts.total() - counts["readable"]
    return {
        "scorer": scorer or "ours",
        "n": n,
        "agrees": counts["agrees"] / n,
        "misread": counts["misread"] / n,
        "unread": counts["unread"] / counts["readable"],
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--list", type=Path, default=FOLDER / "held_back.txt")
    arguments = options.parse_args()
    found = readings(arguments.list)
    tables = {
        "all": [measure("", "=?~#", found)],
        "options": [measure(one, "=", found) for one in ("", *KITS)],
        "yes_no": [measure(one, "?", found) for one in ("", "medevalkit", "mmmu")],
        "open": [measure(one, "#", found) for one in ("", "mmmu", "lmms_eval", "medevalkit")],
    }
    show({"list": arguments.list.name, **tables}, as_json=arguments.json)


if __name__ == "__main__":
    main()
