# SPDX-License-Identifier: Apache-2.0

"""The whole command against a server on loopback: prompts, checks, retries, budget, ablation, batches."""

import json
import re
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from data_tools.generate import main
from tests.api_server import ApiServer

MAKE = {
    "caption": 1, "region_caption": 0, "instruction": 1, "dialogue": 1, "perception": 1,
    "text_single": 1, "text_multi": 0, "chinese": 0, "perception_kinds": ["modality"],
}  # fmt: skip
ASKED = 4 * 6  # forms that a model writes, six pictures


def answer(text: str) -> str:
    """What a careful model says: the finding that it was told, in the form that was asked for."""
    found = re.search(r"- finding: (\w+)", text)
    said = f"The image shows {found[1] if found else 'nothing'} in the whole field."
    turns = [{"question": f"Question {n}?", "answer": f"{said} Part {n}."} for n in range(2)]
    if '"turns"' in text:
        return json.dumps({"turns": turns})
    return json.dumps({"caption": said} if '"caption"' in text else turns[0])


@pytest.fixture
def job(classes, make_job, tmp_path):
    def make(server: ApiServer, **writer) -> Path:
        settings = {
            "name": "openai", "model": "m", "base_url": server.url, "key_variable": "KEY_OF_THE_TEST",
            "cache": str(tmp_path / "answers.sqlite"), "structured": "json_object",
            "seeded": True,
        }  # fmt: skip
        corpus = {"held_out": 0, "prompts": True}
        return make_job({}, make=MAKE, writer=settings | writer, corpus=corpus)

    return make


@pytest.fixture
def run(monkeypatch, capfd):
    """Run the command in this process: what is asked of it here needs none of its own."""
    monkeypatch.setenv("KEY_OF_THE_TEST", "secret")

    def start(path: Path, *options: str) -> CompletedProcess[str]:
        capfd.readouterr()
        status = main([str(path), *options])
        told = capfd.readouterr()
        return CompletedProcess([], status, told.out, told.err)

    return start


def lines(folder: Path, name: str) -> list[dict]:
    path = folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def made(folder: Path) -> int:
    """Accepted answers: those in the files, and texts without a picture that are there already."""
    found = sum(len(lines(folder, name)) for name in ("caption", "instruct", "text_single"))
    if not (folder / "summary.json").is_file():
        return found
    summary = json.loads((folder / "summary.json").read_text())
    return found + summary["conversations"]["repeated"]


def test_a_corpus_by_a_model(job, run, tmp_path):
    with ApiServer(answer=answer, key="secret") as server:
        path = job(server, price={"input": 1, "output": 2})
        done = run(path)
        assert done.returncode == 0, done.stderr
        assert len(server.requests) == ASKED
        out = tmp_path / "out"
        assert made(out) == ASKED
        captions = lines(out, "caption")
        assert {turn["value"] for line in captions for turn in line["conversations"][1:]} == {
            "The image shows NORM in the whole field.",
            "The image shows TUM in the whole field.",
        }
        for line in captions:
            name = "NORM" if "#NORM#" in line["id"] else "TUM"
            assert name in line["conversations"][1]["value"]
        usage = json.loads((out / "summary.json").read_text())["usage"]
        assert usage["requests"] == ASKED
        assert usage["dollars"] == pytest.approx(ASKED * (100 * 1 + 20 * 2) / 1e6)
        again = run(path)
        assert again.returncode == 0
        assert len(server.requests) == ASKED
    everything = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert b"secret" not in everything


def test_without_annotations_nothing_of_them_is_sent_and_anything_is_taken(job, run, tmp_path):
    with ApiServer(answer=answer) as server:
        done = run(job(server), "--without-annotations")
        assert done.returncode == 0, done.stderr
        sent = json.dumps(server.requests)
    assert len(server.requests) == ASKED
    assert "TUM" not in sent
    assert "NORM" not in sent
    assert made(tmp_path / "out") == ASKED


def test_a_dry_run_asks_nothing_and_says_what_it_would_cost(job, run, tmp_path):
    with ApiServer(answer=answer) as server:
        done = run(job(server, price={"input": 1, "output": 2}), "--dry-run")
        assert done.returncode == 0, done.stderr
        assert not server.requests
    assert "$" in done.stdout
    assert "- finding: " in done.stdout
    assert not (tmp_path / "out").exists()


def test_batches_are_submitted_by_one_run_and_collected_by_another(job, run, tmp_path):
    with ApiServer(answer=answer) as server:
        path = job(server, name="openai_batch", wait=0)
        assert run(path).returncode == 3
        assert len(server.batches) == 1
        for _ in range(4):
            done = run(path)
            if done.returncode == 0:
                break
        assert done.returncode == 0, done.stderr
        assert len(server.batches) == 1
        assert not server.requests
    assert made(tmp_path / "out") == ASKED


def test_a_missing_key_is_told_before_anything_is_read(job, run, tmp_path, monkeypatch):
    monkeypatch.delenv("KEY_OF_THE_TEST")
    with ApiServer(answer=answer, key="secret") as server:
        done = run(job(server))
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        told = "error: the environment variable KEY_OF_THE_TEST holds no key"
        assert line.startswith(told)
        assert not server.requests
    assert not (tmp_path / "out").exists()


CLOSED = {"licence": "PhysioNet Credentialed Health Data License 1.5.0"}
ELSEWHERE = "http://203.0.113.7:9/v1"  # of RFC 5737: no machine of anyone's


@pytest.mark.parametrize("name", ["openai", "openai_batch"])
@pytest.mark.parametrize("command", [(), ("--dry-run",)])
def test_a_closed_source_is_refused_before_it_is_read(
    classes, make_job, run, tmp_path, name, command
):
    writer = {"name": name, "model": "m", "base_url": ELSEWHERE, "key_variable": None}
    done = run(make_job(CLOSED, writer=writer), *command)
    assert done.returncode == 1
    assert "the source tissue may not be sent to 203.0.113.7: PhysioNet" in done.stderr
    assert not (tmp_path / "out").exists()
    unknown = run(make_job({"licence": "ask Anna"}, writer=writer))
    assert "the licence 'ask Anna': the terms are not known" in unknown.stderr
    none = run(make_job(CLOSED, writer=writer, corpus={"publishable": True}), *command)
    assert "corpus.publishable leaves no source: tissue: PhysioNet" in none.stderr


def test_a_closed_source_is_written_here_and_not_published(classes, make_job, run, tmp_path):
    with ApiServer(answer=answer) as server:
        writer = {"name": "openai", "model": "m", "base_url": server.url, "key_variable": None,
                  "cache": str(tmp_path / "answers.sqlite"), "structured": "json_object"}  # fmt: skip
        path = make_job(CLOSED, make=MAKE, writer=writer)
        assert run(path).returncode == 0
        assert server.requests
        card = (tmp_path / "out" / "README.md").read_text()
        assert "**What is made of tissue may not be published or passed on**: PhysioNet" in card
        assert "may not be published" in (tmp_path / "out" / "report.html").read_text()
        # The answers are in the cache, and the job goes on elsewhere: it is refused all the same.
        writer["base_url"] = ELSEWHERE
        assert "may not be sent" in run(make_job(CLOSED, make=MAKE, writer=writer)).stderr
        open_one = {"name": "other", "labels": {"TUM": "tumour"}}
        both = make_job(CLOSED, open_one, make=MAKE, corpus={"publishable": True})
        assert run(both).returncode == 0
        found = lines(tmp_path / "out", "records") + lines(tmp_path / "out", "dropped")
        assert {one.get("source") or one["provenance"]["source"] for one in found} == {"other"}
        stored = {
            path.name for path in (tmp_path / "out" / "images").rglob("*.*") if path.is_file()
        }
        assert stored == {Path(one["image"]).name for one in lines(tmp_path / "out", "records")}
        assert b"tissue" not in (tmp_path / "out" / "summary.json").read_bytes()


def test_an_agreement_of_the_job_is_checked(classes, make_job, run):
    ours = {"name": "Ours", "third_parties": True, "publish": False, "licences": ["ask anna"]}
    assert run(make_job({"licence": "ask Anna"}, agreements=[ours])).returncode == 0
    done = run(make_job({}, agreements=[ours | {"third_partys": 1}, {"name": "x"}]))
    assert "agreements[0].third_partys" in done.stderr
    assert "agreements[1]" in done.stderr
