# SPDX-License-Identifier: Apache-2.0

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from data_tools.items import Problem
from data_tools.options import OpenAIBatchOptions
from data_tools.writers.asking import BatchesPending, BudgetReached, Outcome
from data_tools.writers.openai_batch import OpenAIBatchWriter
from gmai_xtuner.core.agreements import Origin
from gmai_xtuner.core.errors import CorpusError, EndpointError
from tests.api_server import Act, completion, error, user_text
from tests.data_tools.writers.stand_ins import (
    AT_MOST,
    ORIGINS,
    Prompts,
    options,
    spent,
    tasks,
    write_images,
)


def writer(folder: Path, url: str, *, prompts: Any = None, **more: Any) -> OpenAIBatchWriter:
    job = more.pop("job", "job")
    values = options(folder, url).model_dump() | {"name": "openai_batch", "poll": 0.01} | more
    return OpenAIBatchWriter(
        OpenAIBatchOptions(**values), prompts or Prompts(), folder=folder, job=job, origins=ORIGINS
    )


def run(made: OpenAIBatchWriter, *, count: int = 10) -> tuple[list[Outcome], Exception | None]:
    """The outcomes and what ended the run."""
    outcomes: list[Outcome] = []
    try:
        for outcome in made.write(tasks(count)):
            outcomes.append(outcome)
    except CorpusError as caught:
        return outcomes, caught
    return outcomes, None


def leftovers(folder: Path) -> tuple[int, int, list[Path]]:
    """Shards and their keys in the ledger, and shard files."""
    with sqlite3.connect(folder / "cache" / "answers.sqlite") as connection:
        (shards,) = connection.execute("SELECT count(*) FROM shards").fetchone()
        (keys,) = connection.execute("SELECT count(*) FROM shard_keys").fetchone()
    return shards, keys, list((folder / "cache").glob("*.shards/*.jsonl"))


def test_submitted_by_one_run_and_collected_by_the_next(serve, tmp_path):
    server = serve()
    price = {"input": 1000.0, "output": 1000.0}
    made = writer(tmp_path, server.url, price=price)
    outcomes, stop = run(made)
    assert outcomes == []
    assert isinstance(stop, BatchesPending)
    assert "10 conversations wait for 1 batches" in str(stop)
    ((_, data),) = server.files.values()
    lines = [json.loads(line) for line in data.splitlines()]
    assert {(line["method"], line["url"]) for line in lines} == {("POST", "/v1/chat/completions")}
    assert len({line["custom_id"] for line in lines}) == 10
    assert lines[0]["body"]["response_format"]["type"] == "json_schema"
    assert server.requests == []  # nothing by the dear way
    outcomes, stop = run(made)
    assert stop is None
    assert {outcome.conversation[-1].text for outcome in outcomes} == {
        f"It is item{number}." for number in range(10)
    }
    assert sum(outcome.dollars for outcome in outcomes) == pytest.approx(10 * 0.120 / 2)
    assert spent(tmp_path).dollars == pytest.approx(10 * 0.120 / 2)
    assert set(server.payloads.values()) == {1}
    assert leftovers(tmp_path) == (0, 0, [])
    outcomes, stop = run(made)
    assert (len(server.batches), {outcome.cached for outcome in outcomes}) == (1, {1})


def test_a_run_that_is_told_to_wait_does_all_at_once(serve, tmp_path):
    """Failed checks go into a next batch, with their reason."""
    wrong = completion('{"answer": "wrong"}')
    server = serve(
        lambda body, n: (
            wrong if user_text(body) in ("item1", "item3") or "item4" in user_text(body) else None
        )
    )
    outcomes, stop = run(writer(tmp_path, server.url, wait=1))
    assert stop is None
    found = {outcome.item.id: outcome for outcome in outcomes}
    assert len(outcomes) == len(found) == 10
    assert [found[f"item{n}"].attempts for n in range(5)] == [1, 2, 1, 2, 3]
    assert found["item4"].problems == (Problem("bad label"),)
    assert found["item1"].conversation[-1].text == "It is item1 Not again: bad label.."
    assert [len(server.lines(batch)) for batch in server.batches.values()] == [10, 3, 1]


def test_shards_by_count_and_by_bytes(serve, tmp_path):
    server = serve()
    run(writer(tmp_path, server.url, max_requests=4))
    assert [len(server.lines(batch)) for batch in server.batches.values()] == [4, 4, 2]
    server = serve()
    other = tmp_path / "other"
    run(writer(other, server.url, max_bytes=1600))
    sizes = [len(server.files[b["input_file_id"]][1]) for b in server.batches.values()]
    assert max(sizes) <= 1600 < 2 * min(sizes[:-1])
    assert sum(len(server.lines(batch)) for batch in server.batches.values()) == 10
    write_images(tmp_path, size=(40, 40))
    made = writer(tmp_path, server.url, prompts=Prompts(images=True), max_bytes=2000, job="b")
    _, stop = run(made)
    assert "a batch may have 2,000; make writer.image.longest_side smaller" in str(stop)
    assert leftovers(other)[2] == []


def test_at_most_so_many_batches_at_once(serve, tmp_path):
    server = serve()
    made = writer(tmp_path, server.url, max_requests=4, max_batches=2)
    run(made)
    assert [len(server.lines(batch)) for batch in server.batches.values()] == [4, 4]
    outcomes, stop = run(made)
    assert (len(outcomes), isinstance(stop, BatchesPending), len(server.batches)) == (8, True, 3)
    assert len(run(made)[0]) == 10


@pytest.mark.parametrize("status", ["expired", "cancelled"])
def test_what_was_done_of_a_batch_that_ended_early_is_kept(serve, tmp_path, status):
    server = serve()
    server.work = lambda batch, lines: server.finish(
        batch, lines, status=status, done=6 if batch["id"] == "batch_0" else None
    )
    made = writer(tmp_path, server.url)
    run(made)
    outcomes, stop = run(made)
    assert (len(outcomes), isinstance(stop, BatchesPending)) == (6, True)
    assert [len(server.lines(batch)) for batch in server.batches.values()] == [10, 4]
    server.work = server.finish
    outcomes, stop = run(made)
    assert (len(outcomes), stop) == (10, None)
    assert set(server.payloads.values()) == {1}


def test_a_batch_that_is_refused_is_one_error(serve, tmp_path):
    server = serve()

    def refuse(batch: dict, lines: list) -> None:
        batch["status"] = "failed"
        batch["errors"] = {"object": "list", "data": [{"code": "invalid", "message": "bad model"}]}

    server.work = refuse
    made = writer(tmp_path, server.url)
    run(made)
    _, stop = run(made)
    assert isinstance(stop, EndpointError)
    assert "has refused the batch batch_0: bad model" in str(stop)
    assert (leftovers(tmp_path), len(server.batches)) == ((0, 0, []), 1)


def test_a_full_queue_is_waited_for(serve, tmp_path):
    server = serve()

    def full(batch: dict, lines: list) -> None:
        batch["status"] = "failed"
        batch["errors"] = {"data": [{"code": "token_limit_exceeded", "message": "enqueued"}]}
        server.work = server.finish

    server.work = full
    made = writer(tmp_path, server.url)
    run(made)
    outcomes, stop = run(made)
    assert (outcomes, isinstance(stop, BatchesPending)) == ([], True)
    outcomes, stop = run(made)
    assert (len(outcomes), stop) == (10, None)


def test_lines_that_failed_are_refused_or_asked_again(serve, tmp_path):
    acts = {"item1": error(400, "odd picture"), "item2": error(500, "oops")}
    server = serve(lambda body, number: acts.get(user_text(body)) if number == 0 else None)
    outcomes, stop = run(writer(tmp_path, server.url, wait=1))
    assert stop is None
    found = {outcome.item.id: outcome for outcome in outcomes}
    assert found["item1"].problems == (Problem("request refused by the server", "odd picture"),)
    assert found["item2"].conversation is not None
    assert [len(server.lines(batch)) for batch in server.batches.values()] == [10, 1]


def test_a_server_without_schemas_gets_the_next_batch_in_text(serve, tmp_path):
    server = serve(
        lambda body, n: (
            error(400, "response_format not known") if "response_format" in body else None
        )
    )
    outcomes, stop = run(writer(tmp_path, server.url, wait=1))
    assert (len(outcomes), stop) == (10, None)
    assert all(outcome.conversation for outcome in outcomes)
    assert len(server.batches) == 3  # json_schema, json_object, text


@pytest.mark.parametrize("by", ["tokens", "dollars"])
def test_the_budget_counts_batches_under_way(serve, tmp_path, by):
    price = {"input": 1000.0, "output": 1000.0}
    # Four at their most, 700; when they turn out to have been 480, one more; after 600 none.
    budget = {"tokens": 4 * AT_MOST} if by == "tokens" else {"dollars": 4 * AT_MOST / 2000}
    server = serve()
    made = writer(tmp_path, server.url, price=price, budget=budget)
    outcomes, stop = run(made)
    assert (outcomes, isinstance(stop, BatchesPending)) == ([], True)
    assert [len(server.lines(batch)) for batch in server.batches.values()] == [4]
    outcomes, stop = run(made)
    assert (len(outcomes), isinstance(stop, BatchesPending)) == (4, True)
    assert [len(server.lines(batch)) for batch in server.batches.values()] == [4, 1]
    outcomes, stop = run(made)
    assert (len(outcomes), isinstance(stop, BudgetReached)) == (5, True)
    assert spent(tmp_path).tokens == 600
    assert len(server.batches) == 2


class Killed(BaseException):
    """As a kill: no handler of the program sees to anything after it."""


@pytest.mark.parametrize("moment", ["before upload", "after upload", "before batch", "after batch"])
def test_no_shard_is_submitted_twice_after_a_kill(serve, tmp_path, monkeypatch, moment):
    """The process dies just before or after the server has heard of it, and before the ledger has."""
    from data_tools.writers import openai_batch

    server = serve()
    # Others' batches and files, on other pages of the lists.
    for number in range(3):
        server.files[f"file-x{number}"] = (f"x{number}.jsonl", b"")
    what, name = moment.split()
    method = {"upload": "upload", "batch": "create"}[name]
    kept = getattr(openai_batch._Server, method)

    def killed(self: Any, *arguments: Any) -> None:
        if what == "after":
            kept(self, *arguments)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(openai_batch._Server, method, killed)
        with pytest.raises(Killed):
            run(writer(tmp_path, server.url))
    for number in range(3):
        server.files[f"file-y{number}"] = (f"y{number}.jsonl", b"")
        server.batches[f"batch_y{number}"] = {
            "id": f"batch_y{number}",
            "object": "batch",
            "status": "completed",
            "created_at": 1,
            "endpoint": "e",
            "input_file_id": "f",
            "completion_window": "24h",
            "metadata": None,
        }
    outcomes, stop = run(writer(tmp_path, server.url))
    if stop is not None:
        outcomes, stop = run(writer(tmp_path, server.url))
    assert (len(outcomes), stop) == (10, None)
    own = [batch for batch in server.batches.values() if batch["metadata"]]
    assert [len(server.lines(batch)) for batch in own] == [10]
    assert set(server.payloads.values()) == {1}
    uploads = [name for name, data in server.files.values() if data and "file_id" not in name]
    assert len(uploads) == 1
    assert leftovers(tmp_path) == (0, 0, [])


def test_a_file_of_a_killed_run_is_not_sent_once_that_is_forbidden(serve, tmp_path, monkeypatch):
    from data_tools.writers import openai_batch
    from gmai_xtuner.core import sending

    server = serve()
    with monkeypatch.context() as patch:
        patch.setattr(openai_batch._Server, "upload", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run(writer(tmp_path, server.url))
    monkeypatch.setattr(sending, "_is_loopback", lambda address: False)  # as if it were elsewhere
    monkeypatch.setitem(ORIGINS, ("toy", "MIT"), Origin("the source toy", "an agreement"))
    outcomes, stop = run(writer(tmp_path, server.url))
    assert outcomes == []
    assert "the source toy may not be sent to" in str(stop)
    assert not server.files


def test_a_batch_whose_answer_was_lost_is_found(serve, tmp_path):
    """The server makes the batch and the connection is cut."""
    server = serve()
    server.on_batch = lambda body: Act(kind="cut_at_once")
    outcomes, stop = run(writer(tmp_path, server.url))
    assert isinstance(stop, BatchesPending)
    outcomes, stop = run(writer(tmp_path, server.url))
    assert (len(outcomes), stop, len(server.batches)) == (10, None, 1)


def test_a_server_without_a_batch_api_is_one_error(serve, tmp_path):
    server = serve()
    server.on_batch = lambda body: error(404, "no such path")
    _, stop = run(writer(tmp_path, server.url))
    assert isinstance(stop, EndpointError)
    assert "a batch can't be submitted" in str(stop)
    server.on_batch = lambda body: None
    run(writer(tmp_path, server.url))
    assert (len(run(writer(tmp_path, server.url))[0]), len(server.batches)) == (10, 1)


def test_two_jobs_share_what_a_batch_brings(serve, tmp_path):
    server = serve()
    run(writer(tmp_path, server.url, job="a"))
    outcomes, stop = run(writer(tmp_path, server.url, job="b"))
    assert (outcomes, isinstance(stop, BatchesPending), len(server.batches)) == ([], True, 1)
    assert len(run(writer(tmp_path, server.url, job="a"))[0]) == 10
    outcomes, stop = run(writer(tmp_path, server.url, job="b"))
    assert (len(outcomes), stop, len(server.batches)) == (10, None, 1)


def test_the_other_writers_answers_are_used(serve, tmp_path):
    from tests.data_tools.writers.stand_ins import writer as at_once

    server = serve()
    list(at_once(tmp_path, server.url).write(tasks(6)))
    run(writer(tmp_path, server.url))
    assert [len(server.lines(batch)) for batch in server.batches.values()] == [4]
