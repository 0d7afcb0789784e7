# SPDX-License-Identifier: Apache-2.0

"""How often the rules agree with a reader, on the answers of ``answers.txt``, beside this file.

Every second answer was not looked at while the rules were written; ``docs/benchmarks.md`` has the figures.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from gmai_xtuner.evaluate.questions import Question
from gmai_xtuner.evaluate.scoring import SCORERS

FILE = Path(__file__).with_name("answers.txt")


def readings(half: int) -> list[tuple[str, str, str, str]]:
    """Return key, answer, a reader's reading and ours of a half: 0 the tuned, 1 the untouched."""
    questions: dict[str, Question] = {}
    found = []
    for line in FILE.read_text(encoding="utf-8").splitlines():
        kind, key = line[:1], line[2:].partition(":")[0]
        if kind == "=":
            options = tuple(text.strip() for text in line.partition(":")[2].split(" | "))
            questions[key] = Question(key, "?", options=options, answer=options[0])
        elif kind == "?":
            questions[key] = Question(key, line.partition(":")[2].strip(), answer="Yes")
        elif kind == "#" and line[3:4] == " ":
            questions[line[2]] = Question(line[2], "?", answer=line[4:])
        elif kind != "#":
            key, reading, answer = line.split(" ", 2)
            found.append((questions[key], answer.replace(r"\n", "\n"), reading))
    return [
        (question.id, answer, reading, read(question, answer))
        for question, answer, reading in found[half::2]
    ]


def read(question: Question, answer: str) -> str:
    name = "choice" if question.options else "yes_no" if question.answer == "Yes" else "exact_match"
    score = SCORERS[name].score(question, answer)
    return f"{score.value:.0f}" if name == "exact_match" else score.parsed or "-"


@pytest.mark.parametrize("half", [0, 1], ids=["tuned", "untouched"])
def test_the_rules_agree_with_a_reader(half: int) -> None:
    found = readings(half)
    wrong = [one for one in found if one[2] != one[3] and one[3] != "-"]
    unread = [one for one in found if one[2] != one[3] and one[3] == "-"]
    readable = Counter(one[2] != "-" for one in found)[True]
    assert len(found) > 250
    assert not wrong, "\n".join(map(str, wrong))
    assert len(unread) <= 0.05 * readable, "\n".join(map(str, unread))
