# SPDX-License-Identifier: Apache-2.0

"""The page of a result in a real browser: wrong answers first, chosen by groups, nothing asked of anybody."""

import re
from pathlib import Path

import pytest

from gmai_xtuner.evaluate.questions import Question, Score
from gmai_xtuner.evaluate.report import verdict_of, write_report
from gmai_xtuner.evaluate.results import Scored
from gmai_xtuner.evaluate.store import Answer
from gmai_xtuner.evaluate.tables import group_tables, tables_like_the_papers
from tests.evaluate.files import find_protocol
from tests.evaluate.sets import TYPES, draw
from tests.evaluate.test_results import result

HOSTILE = "<script>document.title='attacked'</script><img src=http://127.0.0.1:9/x>"


def answers(folder: Path, number: int = 12) -> list[Scored]:
    """Right, wrong, not understood, in turn; with images, and hostile text."""
    found = []
    for n in range(number):
        draw(folder / f"{n}.png", n)
        question = Question(
            f"q{n}",
            f"Which one is {n}? {HOSTILE if n == 1 else ''}",
            images=(folder / f"{n}.png",),
            options=("lung", "heart", HOSTILE if n == 1 else "liver"),
            answer="heart",
            groups={
                "question_type": TYPES[n % 5],
                "modality": ("CT", 'MR "x"')[n % 2],
                "dataset": "d",
            },
        )
        value, parsed = ((1.0, "B"), (0.0, "A"), (0.0, None))[n % 3]
        text = HOSTILE if n == 1 else f"answer {n}"
        answer = Answer(question.id, "?", text, 0.1, "sha256:m", "p/1", {"max_new_tokens": 8})
        found.append(Scored(question, answer, Score(value, parsed)))
    return found


def write(folder: Path, **options) -> tuple[Path, list[Scored]]:
    scored = answers(folder)
    made = result(find_protocol("omnimedvqa"), scored, name="tiny")
    tables = [*tables_like_the_papers([made]), *group_tables(made)]
    write_report(folder / "report.html", made, tables, scored, **{"shown": 300, **options})
    return folder / "report.html", scored


def test_wrong_ones_come_first_then_what_was_not_understood(tmp_path):
    page, scored = write(tmp_path)
    text = page.read_text()
    verdicts = re.findall(r'<article class="card (\w+)"', text)
    assert verdicts == [*["wrong"] * 4, *["unparsed"] * 4, *["right"] * 4]
    assert [verdict_of(one) for one in scored[:3]] == ["right", "wrong", "unparsed"]
    assert "4 wrong, 4 unparsed, 4 right in all" in text


def test_a_large_benchmark_gives_a_page_of_bounded_size(tmp_path):
    page, _ = write(tmp_path, shown=5)
    text = page.read_text()
    assert text.count("<article") == 5
    assert "5 of 12 questions, wrong ones first" in text


def test_nothing_of_others_is_asked_for_and_text_stays_text(tmp_path):
    text = write(tmp_path)[0].read_text()
    assert "<script>document.title" not in text
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    assert not re.search(r"url\(|@import", text)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith(
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-"
    )


STATE = """() => [
  [...document.querySelectorAll('article')].filter(one => one.getClientRects().length)
    .map(one => one.querySelector('.id').textContent),
  document.getElementById('count').textContent,
]"""


@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_questions_can_be_chosen_and_the_page_fits(browser, tmp_path, width):
    file, _ = write(tmp_path)
    page = browser.new_page(viewport={"width": width, "height": 6000})
    page.goto(file.as_uri())
    sizes = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    wide, screen = page.evaluate(sizes)
    assert wide == screen
    assert page.evaluate("[...document.images].filter(one => one.naturalWidth).length") == 12
    shown, told = page.evaluate(STATE)
    assert shown[:4] == ["q1", "q4", "q7", "q10"]
    assert told == "12 of 12 shown"
    for box in page.locator("input[data-verdict]").all():
        box.set_checked(box.get_attribute("data-verdict") == "right")
    assert page.evaluate(STATE)[0] == ["q0", "q3", "q6", "q9"]
    page.locator("select[data-key=modality]").select_option('MR "x"')
    assert page.evaluate(STATE)[0] == ["q3", "q9"]
    page.fill("#search", "answer 9")
    assert page.evaluate(STATE) == [["q9"], "1 of 12 shown"]
    assert page.title() == "tiny on omnimedvqa open-access"
    assert page.evaluate("document.scripts.length") == 1
