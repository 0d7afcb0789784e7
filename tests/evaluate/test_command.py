# SPDX-License-Identifier: Apache-2.0

"""The command as a user runs it: on a tiny export, killed, on two processes, against a server, compared."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gmai_xtuner.evaluate.__main__ import main
from tests import warm
from tests.api_server import ApiServer, error, user_text
from tests.evaluate.sets import write_omnimedvqa, write_pmc_vqa, write_vqa_rad
from tests.tables import tables

TABLES = tables(__file__)

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OPENAI_API_KEY": "top-secret"}
# The tiny model never ends an answer of its own accord.
SHORT = ("--max-new-tokens", "8", "--max-unread", "1")
EVALUATE = (sys.executable, "-m", "gmai_xtuner.evaluate")


def evaluate(
    *arguments: str | Path, launcher: tuple[str, ...] = EVALUATE
) -> subprocess.CompletedProcess[str]:
    return warm.run([*launcher, *arguments], environment=ENVIRONMENT, folder=ROOT)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with three benchmarks in their authors' files."""
    folder = tmp_path_factory.mktemp("benchmarks")
    write_vqa_rad(folder / "VQA-RAD")
    write_omnimedvqa(folder / "OmniMedVQA", each=8)
    write_pmc_vqa(folder / "PMC-VQA")
    return folder


def answers_in(folder: Path) -> dict[str, str]:
    lines = [
        json.loads(line)
        for file in folder.glob("answers-*.jsonl")
        for line in file.read_text().splitlines()
    ]
    assert len({line["id"] for line in lines}) == len(lines), "a question was asked twice"
    return {line["id"]: line["answer"] for line in lines}


@pytest.fixture(scope="module")
def whole(data, export, tmp_path_factory):
    """A run of everything in the folder, and what it printed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = evaluate(export, "--benchmark", "all", "--data", data, "--out", out, "--json", *SHORT)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done


def test_all_benchmarks_of_a_folder_end_in_the_tables(whole):
    out, done = whole
    summary = json.loads(done.stdout)  # and nothing else on standard output
    assert summary["complete"] is True
    assert [
        (one["benchmark"], one["n"] + one["unanswered"].get("cut", 0)) for one in summary["results"]
    ] == [("omnimedvqa", 40), ("pmc_vqa", 4), ("vqa_rad", 3)]
    (model,) = {one["model"] for one in summary["results"]}
    assert re.fullmatch("sha256:[0-9a-f]{64}", model)
    text = (out / "tables.md").read_text()
    assert "## Medical VQA benchmarks, in the shape of Table 4" in text
    assert "## OmniMedVQA by question type, in the shape of Table 5" in text
    assert "| *GMAI-VL (quoted)* | 98.64 |" in text
    assert "the authors' have 88996" in text
    for name in ("tables.csv", "tables.tex"):
        assert "tiny-export" in (out / name).read_text()
    page = (out / "omnimedvqa-open-access" / "open-88996" / "report.html").read_text()
    assert page.count("<article") == 40
    assert re.search(r"omnimedvqa \(open-access\): .* 40/40 ", done.stderr)


def test_the_same_command_again_asks_nothing(whole, data, export, capfd, caplog):
    out, done = whole
    assert run(export, "--benchmark", "all", "--data", data, "--out", out, "--json", *SHORT) == 0
    again = capfd.readouterr()
    assert json.loads(again.out) == json.loads(done.stdout)
    assert "all 40 answers are stored already" in caplog.text


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(whole, data, export, tmp_path):
    arguments = [export, "--benchmark", "omnimedvqa", "--data", data / "OmniMedVQA"]
    arguments += ["--out", tmp_path, "--batch-size", "1", *SHORT]
    folder = tmp_path / "omnimedvqa-open-access"
    process = subprocess.Popen(
        [*EVALUATE, *map(str, arguments)],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    file, deadline = folder / "answers-0.jsonl", time.monotonic() + 120
    while not file.exists() or file.read_bytes().count(b"\n") < 3:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stored = file.read_bytes()[: file.read_bytes().rindex(b"\n") + 1]
    assert 3 <= stored.count(b"\n") < 40
    file.write_bytes(stored + b'{"id": "half a li')  # as a kill within a write leaves it
    assert run(*arguments) == 0
    assert file.read_bytes().startswith(stored)
    assert answers_in(folder) == answers_in(whole[0] / "omnimedvqa-open-access")


@pytest.mark.slow
def test_two_processes_share_the_questions_and_give_the_same_answers(whole, data, export, tmp_path):
    torchrun = ("torchrun", "--nproc_per_node=2", "-m", "gmai_xtuner.evaluate")
    arguments = [export, "--benchmark", "omnimedvqa", "--data", data / "OmniMedVQA", *SHORT]
    done = evaluate(*arguments, "--out", tmp_path, "--batch-size", "4", "--json", launcher=torchrun)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "omnimedvqa-open-access"
    sizes = [len(file.read_text().splitlines()) for file in sorted(folder.glob("answers-*"))]
    assert sizes == [20, 20]
    assert answers_in(folder) == answers_in(whole[0] / "omnimedvqa-open-access")
    (line,) = done.stdout.splitlines()  # the first process alone reports
    (result,) = json.loads(line)["results"]
    assert (result["n"] + result["unanswered"].get("cut", 0), result["complete"]) == (40, True)


# What needs no model runs in this process.


def run(*arguments: str | Path) -> int:
    return main([str(one) for one in arguments])


def test_an_endpoint_is_asked_scored_again_and_compared(data, tmp_path, capfd):
    def gold(text):
        return "ABCD"[int(re.search(r"number (\d+)", text)[1]) % 4]

    base = ["--benchmark", "omnimedvqa", "--data", data / "OmniMedVQA"]
    with ApiServer(answer=gold) as server:
        good = [*("good", "--endpoint", server.url), *base, "--out", tmp_path / "good"]
        assert run(*good) == 0
    with ApiServer(answer=lambda text: "(A)") as server:
        assert run("bad", "--endpoint", server.url, *base, "--out", tmp_path / "bad") == 0
    text = capfd.readouterr().out
    assert (
        "| **good, open-88996** | 100.00 | 100.00 | 100.00 | 100.00 | 100.00 | – | 100.00 |" in text
    )
    assert "| **bad, open-88996** | 25.00 |" in text
    # The server is gone: nothing is asked.
    assert run(*good, "--score-only", "--scorer", "all", "--json") == 0
    summary = json.loads(capfd.readouterr().out)
    assert len(summary["results"]) == 6
    assert run("compare", tmp_path / "good", tmp_path / "bad", "--json") == 0
    (found,) = json.loads(capfd.readouterr().out)
    assert (found["n"], found["difference"], found["first_better"]) == (40, 0.75, 30)
    assert found["p_value"] == pytest.approx(2 / 2**30)
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or b"top-secret" not in file.read_bytes()


def test_questions_without_an_answer_end_in_status_1_with_tables(data, tmp_path, capfd, caplog):
    def script(body, number):
        return error(400, "filtered") if "figure 2" in user_text(body) else None

    with ApiServer(script, answer=lambda text: "A") as server:
        status = run(
            *("m", "--endpoint", server.url, "--benchmark", "pmc_vqa"),
            *("--data", data, "--out", tmp_path, "--max-unread", "0.5"),
        )
    captured = capfd.readouterr()
    assert status == 1
    assert "1 questions (refused_by_server 1) without an answer" in captured.out
    assert "the first is question 2: HTTP 400: filtered" in caplog.text


def test_a_benchmark_that_cannot_be_read_does_not_stop_the_others(data, tmp_path, capfd):
    copy = shutil.copytree(data, tmp_path / "data")
    broken = copy / "OmniMedVQA" / "QA_information" / "Open-access" / "X-Ray.json"
    broken.write_text('[{"dataset": ')
    with ApiServer(answer=lambda text: "yes") as server:
        status = run(
            *("m", "--endpoint", server.url, "--benchmark", "all", "--data", copy),
            *("--out", tmp_path / "out", "--json"),
        )
    summary = json.loads(capfd.readouterr().out)
    assert status == 1
    assert [one["benchmark"] for one in summary["results"]] == ["pmc_vqa", "vqa_rad"]
    assert len(summary["failures"]) == 1
    assert "X-Ray.json" in summary["failures"][0]


def test_answers_of_another_run_for_one_benchmark_do_not_stop_the_others(data, tmp_path, capfd):
    with ApiServer(answer=lambda text: "A") as server:
        common = ["--endpoint", server.url, "--data", data, "--out", tmp_path, "--max-unread", "1"]
        assert run("first", "--benchmark", "vqa_rad", *common) == 0
        capfd.readouterr()
        assert run("second", "--benchmark", "all", *common) == 1
    told = capfd.readouterr()
    assert "vqa_rad-test holds answers of another run" in told.err
    assert "**second, open-88996**" in told.out


def test_the_benchmark_is_read_before_a_model_is_loaded(tmp_path, capfd):
    assert run("no/such/model", "--benchmark", "vqa_rad", "--data", tmp_path / "nowhere") == 1
    told = capfd.readouterr()
    assert "nowhere' does not exist" in told.err
    assert "no/such/model" not in told.err
    assert told.out == ""


@pytest.mark.parametrize(("arguments", "told"), TABLES["a_command_line_that_cannot_be_understood"])
def test_a_command_line_that_cannot_be_understood(arguments, told, capfd):
    with pytest.raises(SystemExit) as caught:
        run("m", "--data", "x", *arguments)
    assert caught.value.code == 2
    assert told in capfd.readouterr().err


def test_protocols_are_listed(capfd):
    assert run("protocols") == 0
    listed = capfd.readouterr().out
    assert "vqa_rad test: closed-251/2, n = 251, scorer yes_no" in listed
    assert "mmmu_health validation: full-150/2, n = 150" in listed
