# SPDX-License-Identifier: Apache-2.0

"""The page of a result in a real browser: wrong answers first, chosen by groups, nothing asked of anybody."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gmai_xtuner.evaluate.questions import Question, Score
from gmai_xtuner.evaluate.report import verdict_of, write_report
from gmai_xtuner.evaluate.results import Scored
from gmai_xtuner.evaluate.store import Answer
from gmai_xtuner.evaluate.tables import group_tables, tables_like_the_papers
from tests.data_tools.output.test_report_in_browser import BROWSERS, FLAGS
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


MEASURE = """
<script>
function state(page) {
  return {
    shown: [...page.querySelectorAll('article')].filter(a => a.getClientRects().length)
      .map(a => a.querySelector('.id').textContent),
    told: page.getElementById('count').textContent,
  };
}
function act(page, change) { change(page); return state(page); }
function fire(element) { element.dispatchEvent(new Event('input')); }
addEventListener('load', () => {
  const frame = document.querySelector('iframe'), page = frame.contentDocument;
  const width = page.documentElement.clientWidth;
  const found = {
    overflow: page.documentElement.scrollWidth - width,
    pictures: [...page.images].filter(i => i.complete && i.naturalWidth).length,
    first: state(page),
    right: act(page, p => { for (const b of p.querySelectorAll('input[data-verdict]'))
      { b.checked = b.dataset.verdict === 'right'; fire(b); } }),
    mr: act(page, p => { const s = p.querySelector('select[data-key=modality]'); s.value = 'MR "x"';
        fire(s); }),
    word: act(page, p => { const s = p.getElementById('search'); s.value = 'answer 9'; fire(s); }),
    title: document.title + '/' + page.title,
    scripts: page.scripts.length,
  };
  document.body.dataset.found = JSON.stringify(found);
});
</script>
"""


@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_questions_can_be_chosen_and_the_page_fits(tmp_path, width):
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is installed")
    page, _ = write(tmp_path)
    content = html.escape(page.read_text())
    outer = tmp_path / "look.html"
    outer.write_text(
        f"<!doctype html><title>look</title><body>{MEASURE}"
        f'<iframe style="border:0;width:{width}px;height:6000px" srcdoc="{content}"></iframe>'
    )
    done = subprocess.run(
        [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", outer.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    match = re.search(r'data-found="([^"]*)"', done.stdout)
    assert match, done.stderr[-2000:]
    found = json.loads(html.unescape(match[1]))
    assert (found["overflow"], found["pictures"], found["scripts"]) == (0, 12, 1)
    assert found["first"]["shown"][:4] == ["q1", "q4", "q7", "q10"]
    assert found["first"]["told"] == "12 of 12 shown"
    assert found["right"]["shown"] == ["q0", "q3", "q6", "q9"]
    assert found["mr"]["shown"] == ["q3", "q9"]
    assert found["word"] == {"shown": ["q9"], "told": "1 of 12 shown"}
    assert found["title"] == "look/tiny on omnimedvqa open-access"
