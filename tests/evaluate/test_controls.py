# SPDX-License-Identifier: Apache-2.0

"""Questions asked in other ways: what is asked, what is shared, and numbers worked out by hand."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gmai_xtuner.evaluate.answerers import ModelOptions, World
from gmai_xtuner.evaluate.answerers.endpoint import EndpointAnswerer, label_shares
from gmai_xtuner.evaluate.benchmarks import load_benchmark
from gmai_xtuner.evaluate.controls import NONE_ABOVE, controls_of, measure
from gmai_xtuner.evaluate.protocols import ask_for
from gmai_xtuner.evaluate.questions import Question, open_image
from gmai_xtuner.evaluate.results import Scored, read_result
from gmai_xtuner.evaluate.runner import Options, Target, ask, prepare, score
from gmai_xtuner.evaluate.scoring import SCORERS
from gmai_xtuner.evaluate.statistics import area_under_risk_coverage, calibration_error
from gmai_xtuner.evaluate.store import Answer, Job
from gmai_xtuner.generate import FirstTokens
from tests.api_server import ApiServer, completion, error
from tests.evaluate.files import find_protocol
from tests.evaluate.sets import FakeAnswerer, write_omnimedvqa, write_pmc_vqa


def run(data: Path, answerer, out: Path, **options):
    how = Options(out, **{"controls": True, "report_questions": 1, **options})
    prepared = prepare(Target("omnimedvqa", data), how)
    answers = ask(prepared, answerer, how, world=World())
    return score(prepared, answers, how, world=World())[0]


@pytest.fixture(scope="module")
def omni(tmp_path_factory) -> Path:
    """60 questions of four options, whose image file is named by the number of the question."""
    return write_omnimedvqa(tmp_path_factory.mktemp("omni"), each=12)


def looking(job: Job) -> str:
    """Answer what the image shows; of a blank one, or where that is no option, say A."""
    options = {text: letter for letter, text in re.findall(r"^([A-D])\. (.+)$", job.prompt, re.M)}
    number = int(job.images[0].stem) if isinstance(job.images[0], Path) else 0
    shown = f"choice {number} {'ABCD'[number % 4]}"
    known = isinstance(job.images[0], Path)
    return options.get(shown, options.get(NONE_ABOVE, "A") if known else "A")


def test_each_control_changes_one_thing(tmp_path):
    questions = load_benchmark("pmc_vqa", write_pmc_vqa(tmp_path)).questions
    asked = ask_for(find_protocol("pmc_vqa"), questions, limit=2)
    controls = controls_of(asked, questions)
    assert list(controls) == ["blank_image", "other_image", "shuffled", "none_of_the_above"]
    assert {control.origins for control in controls.values()} == {("0", "1")}
    new = {name: control.asked.questions[1] for name, control in controls.items()}
    first = questions[1]
    blank = open_image(new["blank_image"].images[0], "x")
    assert (blank.size, blank.getcolors()) == ((32, 24), [(32 * 24, (127, 127, 127))])
    assert replace(new["blank_image"], id=first.id, images=first.images) == first
    assert new["other_image"].images != first.images
    assert new["other_image"].id == f"1#image_of={new['other_image'].images[0].stem[3:]}"
    assert sorted(new["shuffled"].options) == sorted(first.options)
    (letter,) = new["shuffled"].gold_letters()
    assert new["shuffled"].lettered()[letter] == first.answer
    assert new["none_of_the_above"].options == ("thing 1A", NONE_ABOVE, "thing 1C", "thing 1D")
    assert new["none_of_the_above"].gold_letters() == {"B"}
    whole = controls_of(ask_for(find_protocol("pmc_vqa"), questions), questions)
    assert whole["other_image"].asked.questions[:2] == controls["other_image"].asked.questions


@pytest.mark.parametrize("options", [("yes", "no"), ("liver", "lung", "eye", "ear")])
def test_the_files_letter_moves_with_its_option(options):
    """The kits' rules compare with the letter that the file names."""
    question = Question("q", "Which?", options=options, answer=options[1], gold_letter="B")
    for name, control in controls_of(
        ask_for(find_protocol("pmc_vqa"), [question]), [question]
    ).items():
        (new,) = control.asked.questions
        meant = {"none_of_the_above": NONE_ABOVE, "negated": options[0]}.get(name, options[1])
        assert new.lettered()[new.target] == meant, name
        scorer = SCORERS["vlmevalkit"]
        assert scorer.score(new, new.target).value == 1.0, name


@pytest.mark.parametrize(
    ("question", "negated"),
    [
        (Question("q", "CT?", answer="Yes"), ('Is "no" the right answer to the question "CT?"?', "No")),
        (Question("q", "有气胸吗？", answer="没有"), ("对于问题“有气胸吗？”，回答“否”正确吗？", "是")),
        (
            Question("q", "CT?", options=("no", "yes"), answer="no"),
            ('Is "no" the right answer to the question "CT?"?', "yes"),
        ),
        (Question("q", "CT?", options=("no", "yes", "maybe"), answer="no"), None),
        (Question("q", "Where?", answer="left lung"), None),
    ],
)  # fmt: skip
def test_a_question_answered_by_yes_or_no_is_negated(question, negated):
    protocol = find_protocol("vqa_rad", "full-451")
    found = controls_of(ask_for(protocol, [question]), [question]).get("negated")
    (new,) = found.asked.questions if found else (None,)
    assert (new and (new.text, new.answer)) == negated


def test_answers_that_are_held_are_shared_and_nothing_is_asked_twice(omni, tmp_path):
    plain = FakeAnswerer(looking)
    before = run(omni, plain, tmp_path, controls=False)
    more = FakeAnswerer(looking)
    result = run(omni, more, tmp_path)
    assert len(plain.asked) == 60
    assert not set(plain.asked) & set(more.asked)
    assert replace(result, controls=(), flags=()) == before
    again = FakeAnswerer(looking)
    assert run(omni, again, tmp_path) == result
    assert again.asked == []
    assert read_result(tmp_path / "omnimedvqa-open-access" / "open-88996") == result


def test_a_model_that_looks_is_not_flagged(omni, tmp_path):
    result = run(omni, FakeAnswerer(looking), tmp_path)
    found = {one.name: one for one in result.controls}
    assert result.flags == ()
    # Of a blank image it says A, which is right for a quarter.
    assert found["image-blind score (blank image)"].value == 0.25
    assert found["gain over a blank image"].value == found["grounded accuracy"].value == 0.75
    assert found["gain over a blank image"].p_value == pytest.approx(2 / 2**45)
    assert found["consistency (options shuffled)"].value == 1
    assert found["score where none of the above is right"].value == 1
    assert abs(next(one.value for name, one in found.items() if "position" in name)) < 0.15


def test_a_model_that_always_says_b_is_flagged_in_result_tables_and_page(omni, tmp_path):
    result = run(omni, FakeAnswerer(lambda job: "B"), tmp_path)
    found = {one.name: one for one in result.controls}
    assert found["gain over another image"].value == found["grounded accuracy"].value == 0
    assert found["position bias (B chosen over its share)"].value == 0.75
    assert [flag.split(" (")[0] for flag in result.flags] == ["image-blind", "position-biased"]
    folder = tmp_path / "omnimedvqa-open-access" / "open-88996"
    for name in ("result.json", "tables.md", "tables.csv", "tables.tex", "report.html"):
        assert "position-biased" in (folder / name).read_text() or name == "tables.csv"
    assert "grounded accuracy" in (folder / "tables.csv").read_text()


def test_a_control_that_the_server_refuses_is_counted_and_leaves_its_pair_out(omni, tmp_path):
    refusing = FakeAnswerer(lambda job: None if "blank" in job.id else looking(job))
    result = run(omni, refusing, tmp_path)
    assert (dict(result.controls_unanswered), result.complete) == ({"refused": 60}, False)
    assert "60 questions (refused 60) of the controls without an answer" in result.problems
    assert not any("blank" in one.name for one in result.controls)


def test_calibration_by_hand():
    sure, right = np.array([0.95, 0.95, 0.65, 0.65]), np.array([1.0, 0.0, 1.0, 1.0])
    value, interval = calibration_error(sure, right)
    assert value == pytest.approx((0.45 + 0.35) / 2)
    assert 0 <= interval.low <= value <= interval.high <= 1
    # Risks of the 1, 2, 3, 4 surest; the two equally sure ones count with their mean.
    assert area_under_risk_coverage(sure, right) == pytest.approx((0.5 + 0.5 + 1 / 3 + 0.25) / 4)


@pytest.mark.parametrize(("sure", "flags"), [(0.97, ["overconfident"]), (0.6, [])])
def test_a_model_too_sure_of_itself_is_flagged(sure, flags):
    protocol = find_protocol("pmc_vqa")
    scored = []
    for number in range(100):
        question = Question(f"q{number}", "?", options=("x", "y"), answer="xy"[number % 5 > 2])
        shares = {"A": sure, "B": 1 - sure}
        answer = Answer(question.id, "?", "A", 0.0, "m", "p", {"max_new_tokens": 8}, "stop", shares)
        scored.append(Scored(question, answer, protocol.score(question, "A")))
    measures, found, _ = measure(scored, {}, {}, {})
    assert [flag.split(" (")[0] for flag in found] == flags
    by_name = {one.name: one.value for one in measures}
    assert by_name["calibration error (ECE)"] == pytest.approx(abs(sure - 0.6))


def first_token(token: str, **others: float):
    top = [{"token": name, "logprob": float(np.log(value))} for name, value in others.items()]
    return {"content": [{"token": token, "logprob": -0.1, "top_logprobs": top}]}


def test_a_servers_logprobs_become_shares_of_the_labels():
    reply = completion("A")
    reply["choices"][0]["logprobs"] = first_token(
        "A", **{"A": 0.5, " A": 0.1, "B": 0.2, "The": 0.2}
    )
    assert label_shares(reply, ("A", "B", "C")) == {"A": 0.75, "B": 0.25, "C": 0.0}
    assert label_shares(reply, ("C", "D")) is None
    for odd in (None, {}, {"content": []}, {"content": [{"token": "A"}]}):
        reply["choices"][0]["logprobs"] = odd
        assert label_shares(reply, ("A", "B")) is None


@pytest.mark.parametrize("refuses", [False, True])
def test_a_server_is_asked_for_logprobs_until_it_refuses_them(refuses):
    refusal = error(400, "logprobs are not supported by this model")
    reply = completion("A")
    reply["choices"][0]["logprobs"] = first_token("A", A=0.6, B=0.2)

    def script(body, number):
        return (refusal if refuses else reply) if "logprobs" in body else None

    jobs = [Job(f"q{n}", f"Question {n}?", (), 8, "p/1", ("A", "B")) for n in range(8)]
    with ApiServer(script, answer=lambda text: "A") as server:
        options = ModelOptions("m", endpoint=server.url, in_flight=2, logprobs=True)
        given = [one for batch in EndpointAnswerer(options).answers(jobs) for one in batch]
    expected = None if refuses else {"A": 0.75, "B": 0.25}
    assert [(one.text, one.probabilities) for one in given] == [("A", expected)] * 8


def test_first_tokens_give_shares_where_the_likeliest_is_a_label():
    ids = {"A": 1, "▁A": 2, "B": 3}
    tokenizer = SimpleNamespace(
        unk_token_id=0, convert_tokens_to_ids=lambda tokens: [ids.get(one, 0) for one in tokens]
    )
    first = FirstTokens(tokenizer)
    scores = torch.log(torch.tensor([[0.1, 0.2, 0.4, 0.2, 0.1], [0.1, 0.1, 0.1, 0.1, 0.6]]))
    assert first(torch.zeros(2, 1), scores) is scores
    first(torch.zeros(2, 2), scores + 1)  # later tokens change nothing
    assert first.shares(0, ("A", "B")) == pytest.approx({"A": 0.75, "B": 0.25})
    assert first.shares(1, ("A", "B")) is None
