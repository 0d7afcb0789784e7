# SPDX-License-Identifier: Apache-2.0

"""What each protocol asks, of which questions, and how it scores."""

import re
from pathlib import Path

import pytest

from gmai_xtuner.evaluate.benchmarks import built_in
from gmai_xtuner.evaluate.benchmarks.maps import Map
from gmai_xtuner.evaluate.protocols import Average, ProtocolError
from gmai_xtuner.evaluate.questions import Question, Score
from gmai_xtuner.evaluate.scoring import SCORERS
from tests.evaluate.files import find_protocol

CHOICE = Question("1", "What is <image>?", options=("Liver", "Lung"), answer="Lung")
CLOSED = Question("2", "Is it?", answer="No", groups={"answer_type": "CLOSED"})
WHICH = Question("3", "Lung or liver?", answer="Lung", groups={"answer_type": "CLOSED"})
OPEN = Question("4", "Where?", answer="left lung", groups={"answer_type": "OPEN"})


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("closed-416", [CLOSED, WHICH]),
        ("closed-355", [CLOSED]),
        ("open-645", [OPEN]),
        ("full-1061", [CLOSED, WHICH, OPEN]),
    ],
)
def test_which_questions_count(name: str, chosen: list[Question]) -> None:
    assert find_protocol("slake", name).select([CLOSED, WHICH, OPEN]) == tuple(chosen)


def test_open_questions_of_mmmu_do_not_count_in_closed_145() -> None:
    assert find_protocol("mmmu_health", "closed-145").select([CHOICE, OPEN]) == (CHOICE,)
    assert find_protocol("mmmu_health", "full-150").select([CHOICE, OPEN]) == (CHOICE, OPEN)


def test_the_words() -> None:
    assert find_protocol("gmai_mmbench").prompt(CHOICE) == (
        "What is <image>?\nA. Liver\nB. Lung\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert find_protocol("gmai_mmbench", "val-4550-vlmevalkit").prompt(CHOICE) == (
        "Question: What is <image>?\nOptions:\nA. Liver\nB. Lung\n"
        "Please select the correct answer from the options above. "
    )
    assert find_protocol("vqa_rad").prompt(CLOSED) == (
        "Is it?\nAnswer the question using a single word or phrase."
    )
    assert find_protocol("slake", variant="zh").prompt(OPEN) == "Where?\n请用一个词或短语回答问题。"
    gap = Question("1", "Which?", options=("Liver", "Lung"), letters="AD")
    assert "A. Liver\nD. Lung\n" in find_protocol("omnimedvqa").prompt(gap)


def test_defaults_and_names() -> None:
    assert find_protocol("vqa_rad").name == "closed-251"
    assert find_protocol("slake").name == "closed-416"
    assert find_protocol("slake", variant="zh").name == "full-1033"
    assert find_protocol("slake", "full-1033").variant == "zh"
    assert find_protocol("omnimedvqa").averages == (
        Average("micro"),
        Average("macro", "question_type"),
        Average("macro", "modality"),
    )
    assert find_protocol("huatuo").name == "collection-17298"
    counts = [one.expected for one in built_in()["huatuo"].asked()]
    assert counts == [17298, 251, 416, 3362, 2000, 11124, 145]


@pytest.mark.parametrize(
    ("benchmark", "name", "variant", "message"),
    [
        (
            "slake",
            "closed-1",
            None,
            r"slake has no protocol 'closed-1'. There are closed-416 \(en\)",
        ),
        ("slake", "full-1061", "zh", "no protocol 'full-1061' for the variant 'zh'"),
    ],
)
def test_unknown(benchmark: str, name: str | None, variant: str | None, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        find_protocol(benchmark, name, variant=variant)


def test_several_scorers_on_one_answer() -> None:
    asked = find_protocol("huatuo")
    assert asked.score(CHOICE, "lung") == Score(1.0, "B")
    assert asked.score(CHOICE, "lung", scorer="vlmevalkit") == Score(1.0, "B")
    assert asked.score(CHOICE, "lung", scorer="huatuogpt") == Score(0.0, None)
    assert asked.score(CHOICE, "lung", scorer="option_letter") == Score(0.0, None)
    with pytest.raises(ProtocolError, match=r"no scorer is called 'best'\. There are choice"):
        asked.score(CHOICE, "lung", scorer="best")
    with pytest.raises(
        ProtocolError, match=r"yes_no can't score question 1 of huatuo collection-17298"
    ):
        asked.score(CHOICE, "lung", scorer="yes_no")
    with pytest.raises(ProtocolError, match="the scorer choice can't score question 4"):
        asked.score(OPEN, "lung")


@pytest.mark.parametrize("found", built_in().values(), ids=list(built_in()))
def test_every_protocol_is_whole(found: Map) -> None:
    protocols = found.asked()
    assert len({one.name for one in protocols}) == len(protocols)
    assert {one.variant for one in protocols} == set(found.variants)
    for one in protocols:
        assert one.benchmark == found.name
        assert {one.scorer, *one.also} <= set(SCORERS)
        assert one.averages[0] == Average("micro")
        # the number in the name is the number of questions
        if one.expected is not None:
            assert re.search(rf"-{one.expected}\b", one.name)


def test_the_page_names_every_protocol_and_scorer() -> None:
    page = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for found in built_in().values():
        for one in found.asked():
            assert f"`{one.name}`" in page, one.name
    for name in SCORERS:
        assert f"`{name}`" in page, name
