# SPDX-License-Identifier: Apache-2.0

"""Asking, resuming, scoring again, judging and comparing, with a stand-in that answers by a rule."""

import re
from pathlib import Path

import numpy as np
import pytest
from openpyxl import load_workbook
from PIL import Image

from gmai_xtuner.core.errors import EvaluationError, ImageError
from gmai_xtuner.core.imaging.images import open_rgb
from gmai_xtuner.evaluate.answerers import World
from gmai_xtuner.evaluate.compare import as_text, compare_runs, reconcile
from gmai_xtuner.evaluate.judge import verdict_of
from gmai_xtuner.evaluate.protocols import ProtocolError
from gmai_xtuner.evaluate.questions import Benchmark, SourceFile, open_image
from gmai_xtuner.evaluate.runner import ALL, Options, Target, ask, prepare, score
from gmai_xtuner.evaluate.scoring import SCORERS
from tests.evaluate.files import gmai_test_part
from tests.evaluate.sets import FakeAnswerer, draw, write_omnimedvqa, write_pmc_vqa, write_vqa_rad

ALONE = World()


def always(text: str):
    return lambda job: text


@pytest.fixture
def rad(tmp_path):
    return Target("vqa_rad", write_vqa_rad(tmp_path / "VQA-RAD"))


@pytest.fixture
def pmc(tmp_path):
    return Target("pmc_vqa", write_pmc_vqa(tmp_path / "PMC-VQA"))


def run(target, answerer, out, *, judge=None, **options):
    """Do what the command does with one benchmark."""
    how = Options(out, **options)
    prepared = prepare(target, how, require_images=answerer is not None)
    answers = ask(prepared, answerer, how, world=ALONE)
    return score(prepared, answers, how, world=ALONE, judge=judge)


def test_a_letter_scores_what_the_protocol_says(pmc, tmp_path):
    (result,) = run(pmc, FakeAnswerer(always("The answer is B.")), tmp_path / "out")
    assert (result.n, result.headline.value, result.headline.unparsed) == (4, 0.25, 0.0)
    folder = tmp_path / "out" / "pmc_vqa-test_clean" / "clean-2000"
    tables = {f"tables.{suffix}" for suffix in ("md", "csv", "tex")}
    assert {file.name for file in folder.iterdir()} == tables | {
        *("result.json", "scores.jsonl", "report.html")
    }
    assert "| **fake** | – | – | 25.0 | – |" in (folder / "tables.md").read_text()


def test_what_is_stored_is_not_asked_again_and_a_stop_loses_nothing(rad, tmp_path):
    stopped = FakeAnswerer(always("Yes"), stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        run(rad, stopped, tmp_path, protocols=("full-451",))
    second = FakeAnswerer(always("Yes"))
    (result,) = run(rad, second, tmp_path, protocols=("full-451",))
    assert len(stopped.asked) == 2
    assert set(stopped.asked) | set(second.asked) == {str(number) for number in range(6)}
    assert len(second.asked) == 4
    whole = FakeAnswerer(always("Yes"))
    assert run(rad, whole, tmp_path, protocols=("full-451",)) == [result]
    assert whole.asked == []


def test_protocols_that_ask_in_the_same_words_share_answers(rad, tmp_path):
    answerer = FakeAnswerer(always("Yes"))
    results = run(rad, answerer, tmp_path, protocols=(ALL,))
    assert [(one.protocol, one.n) for one in results] == [
        ("closed-251", 3),
        ("closed-272", 3),
        ("open-179", 3),
        ("full-451", 6),
    ]
    assert sorted(answerer.asked) == [str(number) for number in range(6)]


def test_a_limit_is_told(rad, tmp_path):
    answerer = FakeAnswerer(always("Yes"))
    (result,) = run(rad, answerer, tmp_path, limit=2)
    assert answerer.asked == ["0", "2"]
    assert result.problems[0] == "limited to 2 of 3 questions"
    assert result.complete


def test_stored_answers_are_scored_by_several_scorers_without_asking(pmc, tmp_path):
    run(pmc, FakeAnswerer(always("b")), tmp_path)
    results = run(pmc, None, tmp_path, scorers=(ALL,))
    by = {one.scorer: one.headline for one in results}
    assert set(by) == {
        "choice",
        "option_letter",
        "option_text",
        "vlmevalkit",
        "huatuogpt",
        "medevalkit",
    }
    # A lower-case letter: VLMEvalKit's rule does not understand it, HuatuoGPT-Vision's calls it wrong.
    assert (by["choice"].value, by["vlmevalkit"].unparsed) == (0.25, 1)
    assert (by["huatuogpt"].value, by["huatuogpt"].unparsed) == (0.0, 0.0)
    assert (tmp_path / "pmc_vqa-test_clean" / "clean-2000.vlmevalkit" / "result.json").is_file()


def test_a_scorer_that_does_not_fit_is_told_before_anything_is_asked(rad, tmp_path):
    for scorer, told in (("huatuogpt", "can't score question 0"), ("nope", "no scorer is called")):
        answerer = FakeAnswerer(always("Yes"))
        with pytest.raises(ProtocolError, match=told):
            run(rad, answerer, tmp_path, scorers=(scorer,))
        assert answerer.asked == []


def test_scoring_again_does_not_need_the_images(pmc, tmp_path):
    run(pmc, FakeAnswerer(always("B")), tmp_path)
    for image in (pmc.data / "images").iterdir():
        image.unlink()
    (result,) = run(pmc, None, tmp_path)
    assert (result.n, result.headline.value, result.complete) == (4, 0.25, True)


def test_scoring_what_was_never_asked_is_refused(rad, pmc, tmp_path):
    with pytest.raises(EvaluationError, match="no answers are stored in"):
        run(rad, None, tmp_path)
    run(rad, FakeAnswerer(always("Yes")), tmp_path, protocols=("closed-251",))
    with pytest.raises(EvaluationError) as caught:
        run(rad, None, tmp_path, protocols=("open-179",))
    assert "no answer to a prompt of the protocol open-179/2" in str(caught.value)
    assert "it has answers to those of closed-251/2 3" in str(caught.value)


def test_other_files_than_those_that_were_asked_are_refused(rad, tmp_path):
    run(rad, FakeAnswerer(always("Yes")), tmp_path)
    write_vqa_rad(rad.data, questions=8)
    with pytest.raises(EvaluationError, match="source: "):
        run(rad, None, tmp_path)
    with pytest.raises(EvaluationError, match="source: "):
        run(rad, FakeAnswerer(always("Yes")), tmp_path)


def test_a_question_without_an_answer_is_counted_and_asked_the_next_time(pmc, tmp_path):
    def not_the_third(job):
        return None if "figure 2" in job.prompt else "C"

    (result,) = run(pmc, FakeAnswerer(not_the_third), tmp_path)
    assert (result.n, dict(result.unanswered), result.complete) == (3, {"refused": 1}, False)
    assert result.headline.value == 0.0
    # As a cut answer does, a failed request leaves the comparison, and is told.
    run(pmc, FakeAnswerer(always("C"), model="sha256:b"), tmp_path / "b")
    (found,) = compare_runs(tmp_path / "pmc_vqa-test_clean", tmp_path / "b")
    assert (found.test.n, found.unanswered, found.only_second) == (3, 1, 0)
    assert "1 questions that a run has no answer to are left out" in as_text([found])
    second = FakeAnswerer(always("C"))
    (result,) = run(pmc, second, tmp_path)
    assert len(second.asked) == 1
    assert (result.n, result.headline.value, result.complete) == (4, 0.25, True)


def test_files_of_one_name_in_two_folders_both_count():
    files = [SourceFile(Path(part) / "test.parquet", part, 1) for part in ("b", "a")]
    same = Benchmark("mmmu_health", "validation", (), tuple(files))
    assert same.hashes() == {"test.parquet": "a", "test.parquet (2)": "b"}


def test_a_missing_image_is_counted_and_named(pmc, tmp_path, caplog):
    (pmc.data / "images" / "PMC1.jpg").unlink()
    (result,) = run(pmc, FakeAnswerer(always("A")), tmp_path)
    assert (result.n, dict(result.left_out), result.complete) == (3, {"missing_image": 1}, False)
    assert "pmc_vqa (test_clean): missing_image 1; the first is " in caplog.text
    assert "PMC1.jpg" in caplog.text
    draw(pmc.data / "images" / "PMC1.jpg", 1)
    later = FakeAnswerer(always("A"))
    (result,) = run(pmc, later, tmp_path)
    assert (len(later.asked), result.n, result.complete) == (1, 4, True)


# The judge


def test_only_what_the_rules_leave_open_is_judged_once_and_named(rad, tmp_path):
    answerer = FakeAnswerer(lambda job: "Maybe so" if "there" in job.prompt else "in the left one")
    judge = FakeAnswerer(
        lambda job: "CORRECT" if "in the left one" in job.prompt else "It is wrong.",
        name="judge-7b",
        model="sha256:judge",
    )
    rules, judged = run(rad, answerer, tmp_path, protocols=("full-451",), judge=judge)
    assert judged.scorer == f"{rules.scorer}+judge:judge-7b/3"

    assert len(judge.asked) == 6
    assert judged.headline.value == 0.5
    assert rules.headline.value == pytest.approx(3 * 0.5 / 6)  # "left" of "left lung"
    assert judged.headline.unparsed == 0.0
    again = FakeAnswerer(always("CORRECT"), name="judge-7b", model="sha256:judge")
    assert run(rad, None, tmp_path, protocols=("full-451",), judge=again)[1] == judged
    assert again.asked == []


def test_a_right_answer_and_an_understood_letter_are_not_judged(pmc, tmp_path):
    judge = FakeAnswerer(always("CORRECT"), name="j", model="sha256:j")
    _, judged = run(pmc, FakeAnswerer(always("B")), tmp_path, judge=judge)
    assert (judge.asked, judged.headline.value) == ([], 0.25)


def test_a_reply_that_is_no_verdict_leaves_the_score_of_the_rules(rad, tmp_path):
    judge = FakeAnswerer(always("CORRECT or WRONG, who knows"), name="j", model="sha256:j")
    rules, judged = run(
        rad, FakeAnswerer(always("left")), tmp_path, protocols=("open-179",), judge=judge
    )
    assert judged.headline.value == rules.headline.value == 0.5
    assert judged.findings == {"no_verdict": 3}


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("CORRECT", "CORRECT"),
        ("**Wrong.**", "WRONG"),
        ("correct, yes: CORRECT", "CORRECT"),
        ("INCORRECT", None),
        ("not WRONG but CORRECT", None),
        ("", None),
    ],
)
def test_verdicts(reply, verdict):
    assert verdict_of(reply) == verdict


def test_a_judge_that_refuses_stops_the_judging_and_keeps_verdicts(rad, tmp_path):
    judge = FakeAnswerer(
        lambda job: None if "at 3" in job.prompt else "WRONG", name="j", model="sha256:j"
    )
    with pytest.raises(EvaluationError, match="gave no verdict on 1 of 3 answers"):
        run(rad, FakeAnswerer(always("x")), tmp_path, protocols=("open-179",), judge=judge)
    second = FakeAnswerer(always("WRONG"), name="j", model="sha256:j")
    run(rad, None, tmp_path, protocols=("open-179",), judge=second)
    assert second.asked == ["3"]


# Two runs


def test_two_runs_are_compared_question_by_question(tmp_path):
    target = Target("omnimedvqa", write_omnimedvqa(tmp_path / "Omni", each=4))
    # Of 20 questions the gold letters are A, B, C, D, A, ...: five each.
    right = lambda job: "ABCD"[int(re.search(r"number (\d+)", job.prompt)[1]) % 4]  # noqa: E731
    run(target, FakeAnswerer(right, name="good"), tmp_path / "a")
    run(target, FakeAnswerer(always("A"), name="bad", model="sha256:b"), tmp_path / "b")
    (found,) = compare_runs(tmp_path / "a", tmp_path / "b")
    test = found.test
    assert (test.method, test.n, test.first_better, test.second_better) == ("mcnemar", 20, 15, 0)
    assert test.p_value == pytest.approx(2 / 2**15)
    assert test.difference == 0.75
    text = as_text([found])
    assert "| 20 | 100.00 | 25.00 | +75.00 |" in text
    assert "| first less second |" in text
    assert "First: good (sha256:fake)" in text
    assert "every answer of the" not in text
    (same,) = compare_runs(tmp_path / "a", tmp_path / "a")
    assert (same.test.p_value, same.test.difference) == (1.0, 0.0)


def test_runs_of_different_questions_are_compared_only_on_request(rad, tmp_path):
    run(rad, FakeAnswerer(always("Yes")), tmp_path / "a")
    run(rad, FakeAnswerer(always("No")), tmp_path / "b", limit=2)
    with pytest.raises(
        EvaluationError, match="1 are only in the first, 0 only in the second, 2 in"
    ):
        compare_runs(tmp_path / "a", tmp_path / "b")
    (found,) = compare_runs(tmp_path / "a", tmp_path / "b", common=True)
    assert (found.test.n, found.only_first) == (2, 1)
    assert "1 questions that only one run has are left out." in as_text([found])


def test_a_run_of_wrong_and_unparsed_answers_is_told(rad, tmp_path):
    """Gold: yes, no, yes."""
    run(rad, FakeAnswerer(always("Yes")), tmp_path / "a")
    run(rad, FakeAnswerer(always("hm")), tmp_path / "b")
    found = compare_runs(tmp_path / "a", tmp_path / "b")
    assert (found[0].means, found[0].unparsed) == ((2 / 3, 0.0), (0.0, 1.0))
    assert as_text(found).splitlines()[-1] == (
        "- vqa_rad closed-251 yes_no: every answer of the second counts as wrong, 100.00 % of them since "
        "they were not understood."
    )


def test_questions_of_one_id_that_are_others_are_not_compared(rad, tmp_path):
    run(rad, FakeAnswerer(always("Yes")), tmp_path / "a")
    file = next(rad.data.glob("*.json"))
    file.write_text(file.read_text().replace("finding 2", "another finding"))
    run(rad, FakeAnswerer(always("Yes")), tmp_path / "b")
    for common in (False, True):
        with pytest.raises(
            EvaluationError, match="1 of 3 that have one id differ in words"
        ) as told:
            compare_runs(tmp_path / "a", tmp_path / "b", common=common)
        assert "the first is 2." in str(told.value)
    scores = tmp_path / "b" / "vqa_rad-test" / "closed-251" / "scores.jsonl"
    scores.write_text(re.sub('"question": "[0-9a-f]{16}", ', "", scores.read_text()))
    with pytest.raises(EvaluationError, match="Score its answers again"):
        compare_runs(tmp_path / "a", tmp_path / "b")


def test_scores_by_other_versions_of_a_rule_are_not_compared(rad, tmp_path):
    for name in "ab":
        run(rad, FakeAnswerer(always("Yes")), tmp_path / name)
    (compared,) = compare_runs(tmp_path / "a", tmp_path / "b")
    version = compared.first.scorer_version
    assert version == SCORERS[compared.first.scorer].version
    file = tmp_path / "b" / "vqa_rad-test" / "closed-251" / "result.json"
    file.write_text(file.read_text().replace(f'"scorer_version": {version}', '"scorer_version": 1'))
    for read in (compare_runs, lambda *runs: reconcile(runs)):
        with pytest.raises(
            EvaluationError, match=f"yes_no/{version} .*--score-only|version 1 of yes_no"
        ):
            read(tmp_path / "a", tmp_path / "b")


def test_nothing_in_common_and_no_run_are_errors(rad, pmc, tmp_path):
    run(rad, FakeAnswerer(always("Yes")), tmp_path / "a")
    run(pmc, FakeAnswerer(always("A")), tmp_path / "b")
    with pytest.raises(EvaluationError, match="no protocol and scorer of one version in common"):
        compare_runs(tmp_path / "a", tmp_path / "b")
    with pytest.raises(EvaluationError, match=r"no result\.json in or under"):
        compare_runs(tmp_path / "a", tmp_path / "VQA-RAD")


# GMAI-MMBench TEST


def test_the_test_set_gives_the_authors_submission_file_and_no_score(tmp_path):
    for part in range(1, 12):
        gmai_test_part(tmp_path, part, part, question=f"Question {part}?")
    answerer = FakeAnswerer(lambda job: "no idea" if "3" in job.prompt else "(C) cow")
    target = Target("gmai_mmbench", tmp_path, "test")
    (result,) = run(target, answerer, tmp_path / "out")
    assert (result.headline.value, result.n, result.complete) == (None, 11, True)
    assert result.headline.unparsed == pytest.approx(1 / 11)
    folder = tmp_path / "out" / "gmai_mmbench-test"
    sheet = load_workbook(folder / "fake_GMAI-MMBench_TEST.xlsx").active
    rows = [[cell.value for cell in row] for row in sheet]
    assert (rows[0][0], rows[0][-1]) == ("index", "prediction")
    assert [(row[0], row[-1]) for row in rows[1:4]] == [
        ("1", "(C) cow"),
        ("2", "(C) cow"),
        ("3", "no idea"),
    ]
    page = (folder / "test-21281" / "report.html").read_text()
    assert page.count('data-verdict="unscored"') == 12  # eleven questions and a box to tick


def test_without_all_parts_there_is_no_submission_file_and_it_is_said(tmp_path, caplog):
    for part in (1, 2):
        gmai_test_part(tmp_path, part, part)
    target = Target("gmai_mmbench", tmp_path, "test")
    (result,) = run(target, FakeAnswerer(always("A")), tmp_path / "out")
    assert not result.complete
    assert "No submission file: the submission needs every question of the 11 parts" in caplog.text
    assert not list((tmp_path / "out").rglob("*.xlsx"))


def test_all_protocols_pass_over_those_without_a_question(rad, tmp_path, caplog):
    file = next(rad.data.glob("*.json"))
    file.write_text(file.read_text().replace('"OPEN"', '"CLOSED"').replace("left lung", "Yes"))
    results = run(rad, FakeAnswerer(always("Yes")), tmp_path, protocols=(ALL,))
    assert [one.protocol for one in results] == ["closed-251", "closed-272", "full-451"]
    assert "passed over: vqa_rad (test) has no question for the protocol 'open-179'" in caplog.text
    # Of stored answers, over those that were never asked; and over those that a scorer doesn't fit.
    write_vqa_rad(rad.data)
    run(rad, FakeAnswerer(always("Yes")), tmp_path / "c", protocols=("closed-272",))
    results = run(rad, None, tmp_path / "c", protocols=(ALL,))
    assert [one.protocol for one in results] == ["closed-251", "closed-272", "full-451"]
    assert "nothing of them is answered: open-179/2" in caplog.text
    results = run(rad, None, tmp_path / "c", protocols=(ALL,), scorers=("yes_no",))
    assert {one.protocol for one in results} == {"closed-251", "closed-272"}


# --- An image inside another file is read as one that lies in a file of its own ---


RGB = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
DEEP = (np.arange(120, dtype=np.uint16).reshape(12, 10) * 500).astype(np.uint16)


@pytest.mark.parametrize(
    "name", ["a.png", "a.jpg", "a.tif", "a.bmp", "a.webp", "a.gif", "deep.png", "turned.jpg"]
)
def test_bytes_give_the_image_of_the_file(tmp_path, name):
    exif = Image.Exif()
    if name == "turned.jpg":
        exif[0x0112] = 6
    Image.fromarray(DEEP if name == "deep.png" else RGB).save(tmp_path / name, exif=exif)
    expected = np.asarray(open_rgb(tmp_path / name))
    assert expected.shape[:2] == ((10, 12) if name == "turned.jpg" else (12, 10))
    for source in (tmp_path / name, (tmp_path / name).read_bytes()):
        assert (np.asarray(open_image(source, "x")) == expected).all()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "damaged_image"),
        (b"GIF?", "unsupported_image"),
        (b"\x89PNG\r\n\x1a\n", "damaged_image"),
    ],
)
def test_errors_name_the_image_not_its_bytes(content, reason):
    with pytest.raises(ImageError) as caught:
        open_image(content, "image 2 of question q7")
    assert caught.value.reason == reason
    assert "image 'image 2 of question q7'" in str(caught.value)
