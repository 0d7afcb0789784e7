# SPDX-License-Identifier: Apache-2.0

"""Answers that other kits have stored, and what the differences between scores are made of."""

import json
import shutil

import openpyxl
import pytest
import yaml

from gmai_xtuner.evaluate.__main__ import main
from gmai_xtuner.evaluate.questions import Question, Score
from gmai_xtuner.evaluate.results import Scored, _score_line
from gmai_xtuner.evaluate.scoring import SCORERS
from gmai_xtuner.evaluate.store import Answer
from tests.evaluate.files import json_file, jsonl_file, tsv_file

WORDS = {"1": "Which colour is the first?", "2": "And the second?", "3": "Third?", "4": "Last?"}
FIRST = {"1": "A", "2": "B", "3": "A", "4": "a"}  # A is right; VLMEvalKit takes no small letter
SECOND = {"1": "B", "2": "a", "3": "B"}


@pytest.fixture
def benchmark(tmp_path):
    """Four questions with the options red and blue, of which red is right."""
    rows = [
        {"id": name, "question": text, "A": "red", "B": "blue", "answer": "A"}
        for name, text in WORDS.items()
    ]
    jsonl_file(tmp_path / "colours.jsonl", rows)
    keys = "question: question\nid: id\noptions: [A, B]\nanswer: answer\nanswer_is: letter\n"
    (tmp_path / "colours.yaml").write_text(f"name: colours\nfiles: colours.jsonl\n{keys}")
    return tmp_path / "colours.yaml"


def vlmevalkit(file, answers):
    rows = [[name, WORDS[name], text] for name, text in answers.items()]
    if file.suffix == ".tsv":
        return tsv_file(file, ["index", "question", "prediction"], rows)
    book = openpyxl.Workbook()
    book.active.append(["index", "question", "prediction"])
    for name, words, text in rows:
        book.active.append([int(name), words, text])
    book.save(file)
    return file


def lmms_eval(file, answers):
    return jsonl_file(
        file,
        [
            {"doc_id": 7, "doc": {"id": name, "question": f"<image 1>\n{WORDS[name]}"}, "resps": [[text]]}
            for name, text in answers.items()
        ],
    )  # fmt: skip


def mmmu(file, answers):
    return json_file(file, [{"id": name, "response": text} for name, text in answers.items()])


def llava(file, answers):
    return jsonl_file(file, [{"question_id": n, "text": text} for n, text in answers.items()])


def evaluate(benchmark, out, *files, more=()):
    files = list(map(str, files))
    arguments = ["a-model", "--benchmark", str(benchmark), "--out", str(out)]
    options = ["--report-questions", "0", "--scorer", "vlmevalkit"]
    return main([*arguments, *options, "--answers", *files, *more])


def scores(out):
    found = {}
    for file in out.rglob("result.json"):
        result = json.loads(file.read_text())
        found[result["scorer"]] = result["averages"]["micro"]["value"]
    return found


@pytest.mark.parametrize(
    ("write", "suffix"),
    [(vlmevalkit, ".xlsx"), (vlmevalkit, ".tsv"), (lmms_eval, ".jsonl"), (mmmu, ".json"), (llava, ".jsonl")],
)  # fmt: skip
def test_answers_of_each_kit_are_scored(write, suffix, benchmark, tmp_path):
    file = write(tmp_path / f"theirs{suffix}", FIRST)
    assert evaluate(benchmark, tmp_path / "run", file) == 0
    assert scores(tmp_path / "run") == {"choice": 0.75, "vlmevalkit": 0.5}


def test_several_files_and_columns_of_any_name(benchmark, tmp_path):
    one, two = (
        jsonl_file(tmp_path / f"{part}.jsonl", [{"q": n, "said": FIRST[n]} for n in part])
        for part in ("12", "34")
    )
    evaluate(benchmark, tmp_path / "run", one, two, more=["--answer-columns", "q", "said"])
    assert scores(tmp_path / "run")["choice"] == 0.75


def test_a_question_without_a_stored_answer_is_counted(benchmark, tmp_path, capfd):
    assert evaluate(benchmark, tmp_path / "run", mmmu(tmp_path / "a.json", SECOND)) == 1
    assert (
        "1 questions (not_stored 1) without an answer, not in the score" in capfd.readouterr().out
    )


def test_a_second_run_says_the_same(benchmark, tmp_path, capfd):
    for _ in range(2):
        assert evaluate(benchmark, tmp_path / "run", mmmu(tmp_path / "a.json", SECOND)) == 1
        assert "1 questions (not_stored 1)" in capfd.readouterr().out


def llava(file, answers, **more):
    return jsonl_file(file, [{"question_id": n, "text": one, **more} for n, one in answers.items()])


def test_answers_to_no_question_are_told(benchmark, tmp_path, caplog):
    evaluate(benchmark, tmp_path / "run", llava(tmp_path / "a.jsonl", {**FIRST, "zz": "A"}))
    assert "1 of 5 stored answers are to no question that is asked, such as 'zz'" in caplog.text


def test_answers_are_not_taken_for_those_of_the_next_question(benchmark, tmp_path, capfd):
    shifted = {str(int(n) - 1): one for n, one in FIRST.items()}
    assert evaluate(benchmark, tmp_path / "run", llava(tmp_path / "a.jsonl", shifted)) == 1
    assert "an answer has the id 0, and the questions count from 1" in capfd.readouterr().err


def test_a_kit_s_words_and_how_an_answer_ended_are_looked_at(benchmark, tmp_path, capfd):
    file = llava(tmp_path / "a.jsonl", FIRST, question="Another?")
    assert evaluate(benchmark, tmp_path / "run", file) == 1
    assert "is to another question" in capfd.readouterr().err
    cut = llava(tmp_path / "b.jsonl", FIRST, finish_reason="length")
    assert evaluate(benchmark, tmp_path / "cut", cut) == 3
    assert "4 questions (cut 4" in capfd.readouterr().out


def test_a_score_without_the_empty_answers_is_not_published(benchmark, tmp_path, capfd):
    file = llava(tmp_path / "a.jsonl", {**FIRST, "1": ""})
    evaluate(benchmark, tmp_path / "run", file, more=["--scorer", "choice"])
    to_hub = ["--format", "eval_results", "--dataset", "me/colours"]
    assert main(["export", str(tmp_path / "run"), *to_hub]) == 1
    assert "1 questions (empty 1) without an answer" in capfd.readouterr().err


def test_a_result_is_exported_to_other_kits(benchmark, tmp_path, capfd):
    """Inspect's log was read once by inspect_ai 0.3.285, the hub's file by huggingface_hub 2.4.0."""

    def export(how, *more, folder):
        return main(["export", str(folder), "--format", how, *more])

    run = tmp_path / "run"
    evaluate(benchmark, run, mmmu(tmp_path / "a.json", FIRST))
    assert export("inspect", folder=run) == 1
    assert "has 2 results. Export one of them" in capfd.readouterr().err
    shutil.copytree(run, tmp_path / "models" / "one")
    shutil.copytree(run, tmp_path / "models" / "other")
    for arguments in (["export", "--format", "inspect"], ["reconcile"], ["compare", str(run)]):
        assert main([*arguments, str(tmp_path / "models")]) == 1
        assert "are two results of one benchmark" in capfd.readouterr().err
    (folder,) = {one.parent for one in run.rglob("result.json") if '"choice"' in one.read_text()}

    assert export("lmms-eval", "--out", str(tmp_path / "s.jsonl"), folder=folder) == 0
    evaluate(benchmark, tmp_path / "again", tmp_path / "s.jsonl")
    assert scores(tmp_path / "again") == scores(run)

    assert export("inspect", folder=folder) == 0
    log = json.loads((folder / "inspect.json").read_text())
    assert log["results"]["scores"][0]["metrics"]["micro"]["value"] == 0.75
    last = log["samples"][-1]
    said = (last["choices"], last["target"], last["output"]["completion"])
    assert said == (["red", "blue"], "A", "a")
    assert last["scores"] == {"choice": {"value": 1.0, "answer": "A"}}

    assert export("eval_results", folder=folder) == 1
    assert "name it (--dataset OWNER/NAME" in capfd.readouterr().err
    assert export("eval_results", "--dataset", "me/colours", folder=folder) == 0
    (entry,) = yaml.safe_load((folder / "eval_results.yaml").read_text())
    assert (entry["dataset"], entry["value"]) == ({"id": "me/colours", "task_id": "default"}, 75.0)
    assert "n = 4" in entry["notes"]


def test_a_part_of_a_benchmark_is_not_published_as_its_score(benchmark, tmp_path, capfd):
    evaluate(benchmark, tmp_path / "run", mmmu(tmp_path / "a.json", SECOND))
    (folder,) = {
        one.parent
        for one in (tmp_path / "run").rglob("result.json")
        if '"choice"' in one.read_text()
    }
    assert main(["export", str(folder), "--format", "eval_results", "--dataset", "me/colours"]) == 1
    assert "is no score of colours as a whole: 1 questions (not_stored 1)" in capfd.readouterr().err
    assert not (folder / "eval_results.yaml").exists()


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"index": "1", "prediction": "A", "question": "Another?"}], "is to another question"),
        ([{"id": "x", "response": "A"}], "has the id of a question: theirs is 'x', asked is '"),
        ([{"key": "1", "response": "A"}], "has the columns key, response, and none of these pairs"),
        ([{"id": "1", "response": "A"}, {"id": "1", "response": "B"}], "1 has been answered before"),
        ([{"id": "1", "response": ["A", "B"]}], "record 1 has several answers in response"),
        ([{"id": "1", "response": "A"}, {"response": "A"}], "record 2 has no id"),
        ([], "has the columns of no record"),
    ],
)  # fmt: skip
def test_answers_that_fit_no_question_are_refused(rows, said, benchmark, tmp_path, capfd):
    assert evaluate(benchmark, tmp_path / "run", json_file(tmp_path / "a.json", rows)) == 1
    assert said in capfd.readouterr().err
    assert not scores(tmp_path / "run")


def test_answers_need_no_images(tmp_path):
    """Questions of MMMU's example outputs name images that aren't there, and some have no options."""
    rows = [
        {
            "id": "1",
            "type": "multiple-choice",
            "choices": {"A": "<image 1>", "B": "2"},
            "answer": "A",
        },
        {"id": "2", "type": "short-answer", "answer": "7"},
    ]
    json_file(tmp_path / "q.json", rows)
    keys = 'question: "{id}"\nid: id\noptions: choices\nno_options: open\nanswer: answer\n'
    benchmark = tmp_path / "own.yaml"
    benchmark.write_text(f"name: own\nfiles: q.json\n{keys}answer_is: letter\nscorer: mmmu\n")
    answers = mmmu(tmp_path / "a.json", {"1": "A", "2": "It is 7."})
    assert (
        main(
            [
                "m",
                "--benchmark",
                str(benchmark),
                "--out",
                str(tmp_path / "r"),
                "--answers",
                str(answers),
            ]
        )
        == 0
    )
    assert scores(tmp_path / "r") == {"mmmu": 1.0}


@pytest.mark.parametrize("scorer", ["mmmu", "vlmevalkit", "huatuogpt"])
def test_kits_compare_letters_though_options_read_the_same(scorer):
    """Electronics_13 of MMMU's validation part has the same text under A and C; C is its letter."""
    question = Question("1", "?", options=("x", "y", "x"), answer="x", gold_letter="C")
    given = [SCORERS[scorer].score(question, letter).value for letter in "ABC"]
    assert given == [0.0, 0.0, 1.0]
    assert SCORERS["choice"].score(question, "A").value == 1.0  # what was said is right


def test_a_damaged_sheet_is_one_error(benchmark, tmp_path, capfd):
    file = tmp_path / "a.xlsx"
    file.write_bytes(b"PK\3\4 no sheet")
    assert evaluate(benchmark, tmp_path / "run", file) == 1
    assert f"{file} can't be read as an Excel sheet" in capfd.readouterr().err


def test_differences_between_scores_add_up(benchmark, tmp_path, capfd):
    """Values by hand: 3 of 4 and 2 of 4 right in the first run, 1 of 3 and 0 of 3 in the second."""
    evaluate(benchmark, tmp_path / "one", mmmu(tmp_path / "1.json", FIRST))
    evaluate(benchmark, tmp_path / "two", mmmu(tmp_path / "2.json", SECOND))
    judged = tmp_path / "one" / "judged"
    shutil.copytree(next((tmp_path / "one").rglob("result.json")).parents[1], judged)
    for file in list(judged.rglob("result.json")):
        result = json.loads(file.read_text())
        if result["scorer"] != "choice":
            shutil.rmtree(file.parent)
            continue
        result["scorer"] = "choice+judge:j/3"
        result["averages"]["micro"]["value"] = 1.0
        file.write_text(json.dumps(result))
        lines = file.with_name("scores.jsonl").read_text().replace('"value": 0.0', '"value": 1.0')
        file.with_name("scores.jsonl").write_text(lines)
    capfd.readouterr()
    assert main(["reconcile", str(tmp_path / "one"), str(tmp_path / "two"), "--json"]) == 0
    found = {one["second"]: one for one in json.loads(capfd.readouterr().out)}
    expected = {  # split, judge, prompt, reading against the choice of the first run
        "one colours-test all vlmevalkit": (0, 0, 0, -1 / 4),
        "one colours-test all choice+judge:j/3": (0, 1 / 4, 0, 0),
        "two colours-test all choice": (2 / 3 - 3 / 4, 0, 1 / 3 - 2 / 3, 0),
        "two colours-test all vlmevalkit": (2 / 3 - 3 / 4, 0, 1 / 3 - 2 / 3, 0 - 1 / 3),
    }
    assert set(found) == set(expected)
    for name, parts in expected.items():
        told = [found[name][part] for part in ("split", "judge", "prompt", "reading")]
        assert told == pytest.approx(parts), name
        assert found[name]["difference"] == pytest.approx(sum(parts)), name
    assert main(["reconcile", str(tmp_path / "two")]) == 0
    assert "| two colours-test all vlmevalkit |" in capfd.readouterr().out


def test_a_step_that_was_never_scored_is_asked_for(benchmark, tmp_path, capfd):
    evaluate(benchmark, tmp_path / "one", mmmu(tmp_path / "1.json", FIRST))
    evaluate(benchmark, tmp_path / "two", mmmu(tmp_path / "2.json", SECOND))
    for file in list((tmp_path / "two").rglob("result.json")):
        if json.loads(file.read_text())["scorer"] == "choice":
            shutil.rmtree(file.parent)
    assert main(["reconcile", str(tmp_path / "one"), str(tmp_path / "two")]) == 1
    assert "--score-only --protocol all --scorer choice" in capfd.readouterr().err


def test_answers_that_protocols_share_need_no_rules_in_common(benchmark, tmp_path, capfd):
    """Two protocols that ask in the same words differ in the questions and the reading alone."""
    protocols = (
        "protocols:\n- {name: all, questions: all, scorer: closed_or_recall}\n"
        "- {name: options, questions: options, scorer: choice}\n"
    )
    benchmark.write_text(benchmark.read_text() + protocols)
    file = mmmu(tmp_path / "1.json", FIRST)
    arguments = ["m", "--benchmark", str(benchmark), "--out", str(tmp_path / "one")]
    assert main([*arguments, "--protocol", "all", "--answers", str(file)]) == 0
    capfd.readouterr()
    assert main(["reconcile", str(tmp_path / "one"), "--json"]) == 0
    (found,) = json.loads(capfd.readouterr().out)
    assert found["second"] == "one colours-test options choice"
    assert found["difference"] == found["prompt"] == found["reading"] == 0


def test_an_empty_first_answer_leaves_the_kit_as_it_is(benchmark, tmp_path):
    file = vlmevalkit(tmp_path / "a.xlsx", {**FIRST, "1": None})
    assert evaluate(benchmark, tmp_path / "run", file) == 3  # one of four is empty
    assert scores(tmp_path / "run")["choice"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("text", ["<image>", "lung"])
def test_the_target_of_an_export_is_the_files_letter(text):
    pictures = Question("q", "Which?", options=(text,) * 3, answer=text, gold_letter="B")
    assert (
        _score_line(Scored(pictures, Answer("q", "", "B", 0, "", "", {}), Score(1.0, "B")))[
            "target"
        ]
        == "B"
    )


def test_scores_of_an_earlier_version_are_refused(benchmark, tmp_path, capfd):
    evaluate(benchmark, tmp_path / "one", mmmu(tmp_path / "1.json", FIRST))
    for file in (tmp_path / "one").rglob("scores.jsonl"):
        file.write_text(file.read_text().replace('"question":', '"asked":'))
    for arguments in (["reconcile", "one"], ["compare", "one", "one"]):
        verb, *runs = arguments
        assert main([verb, *(str(tmp_path / run) for run in runs)]) == 1
        assert "is of an earlier version. Score its answers again" in capfd.readouterr().err
