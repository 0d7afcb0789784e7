# SPDX-License-Identifier: Apache-2.0

import dataclasses
import email.utils
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_tools.items import Problem
from data_tools.writers import openai_writer
from data_tools.writers.asking import BudgetReached, Outcome
from data_tools.writers.ledger import Expense, Ledger, Reply
from gmai_xtuner.core import http
from gmai_xtuner.core.errors import CorpusError, EndpointError
from tests.api_server import Act, completion, error, user_text
from tests.data_tools.writers.stand_ins import (
    AT_MOST,
    Prompts,
    spent,
    tasks,
    write_images,
    writer,
)


@pytest.fixture(autouse=True)
def _quick_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "back_off", lambda attempt: 0.01)


def by_id(outcomes: list[Outcome]) -> dict[str, Outcome]:
    assert len({outcome.item.id for outcome in outcomes}) == len(outcomes)
    return {outcome.item.id: outcome for outcome in outcomes}


def decided(outcomes: list[Outcome]) -> dict[str, tuple[Any, Any]]:
    return {
        name: (outcome.conversation, outcome.problems) for name, outcome in by_id(outcomes).items()
    }


def open_rows(path: Path) -> set[str]:
    with sqlite3.connect(path / "cache" / "answers.sqlite") as connection:
        return {row[0] for row in connection.execute("SELECT key FROM under_way")}


def test_every_task_gets_its_answer_and_a_second_run_asks_nothing(serve, tmp_path):
    server = serve(latency=0.02)
    first = list(writer(tmp_path, server.url).write(tasks(100)))
    assert {name: outcome.conversation[-1].text for name, outcome in by_id(first).items()} == {
        f"item{number}": f"It is item{number}." for number in range(100)
    }
    assert {(o.requests, o.cached, o.prompt_tokens, o.completion_tokens) for o in first} == {
        (1, 0, 100, 20)
    }
    assert (len(server.requests), server.most) == (100, 8)
    second = list(writer(tmp_path, server.url, job="another job").write(tasks(100)))
    assert decided(second) == decided(first)
    assert {(o.requests, o.cached, o.prompt_tokens, o.dollars) for o in second} == {(0, 1, 0, 0.0)}
    assert len(server.requests) == 100
    assert open_rows(tmp_path) == set()


def test_tasks_are_taken_as_they_are_needed(serve, tmp_path):
    """A million records don't pass through memory at once."""
    taken = 0

    def counted() -> Iterator[Any]:
        nonlocal taken
        for task in tasks(500):
            taken += 1
            yield task

    ahead = 0
    for number, _ in enumerate(writer(tmp_path, serve().url).write(counted())):
        ahead = max(ahead, taken - number)
    assert taken == 500
    assert ahead <= 64 + 1


def test_a_failed_check_is_asked_again_with_its_reason(serve, tmp_path):
    def script(body: dict, number: int) -> Any:
        text = user_text(body)
        if text.startswith("item0"):
            return completion('{"answer": "wrong"}')
        return completion('{"answer": "wrong"}') if "Not again" not in text else None

    server = serve(script)
    outcomes = by_id(list(writer(tmp_path, server.url).write(tasks(2))))
    never, second = outcomes["item0"], outcomes["item1"]
    assert never.conversation is None
    assert (never.problems, never.attempts) == ((Problem("bad label"),), 3)
    assert never.answer == '{"answer": "wrong"}'
    assert not never.pending
    assert second.conversation[-1].text == "It is item1 Not again: bad label.."
    assert (second.attempts, second.requests, second.completion_tokens) == (2, 2, 40)
    # The two repetitions of item0 have the same text and still are two payloads in the ledger.
    assert server.texts["item0 Not again: bad label."] == 2


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (completion('{"answer": "cut', finish="length"), "answer cut at its greatest length"),
        (
            completion(None, finish="content_filter"),
            "answer held back by the server's content filter",
        ),
        (completion(None, refusal="I can't help with that."), "the model refused"),
        (completion("  "), "empty answer"),
        (completion('{"answer": '), "not the JSON that was asked for"),
        ({**completion("x"), "choices": []}, "answer without a choice"),
        ({**completion("x"), "choices": [None]}, "answer without a choice"),
    ],
)
def test_spoilt_answers_are_named_kept_and_paid_for(serve, tmp_path, answer, reason):
    server = serve(lambda body, number: answer)
    (outcome,) = writer(tmp_path, server.url, retries=1).write(tasks(1))
    assert outcome.problems[0].reason == reason
    assert (outcome.conversation, outcome.pending) == (None, False)
    assert (outcome.attempts, outcome.prompt_tokens) == (2, 200)
    (again,) = writer(tmp_path, server.url, retries=1).write(tasks(1))
    assert again.problems == outcome.problems
    assert len(server.requests) == 2


FAULTS = [
    (Act(status=500), "server error 500", False),
    (Act(status=502, body="<html>bad gateway</html>"), "server error 502", False),
    (Act(kind="cut"), "connection cut", True),
    (Act(kind="cut_at_once"), "connection cut", True),
    (Act(kind="stall"), "no answer in time", True),
    (Act(kind="body", body=b'{"id": "chatcmpl-1", '), "an answer that isn't the API's", True),
    (Act(kind="body", body=b"[]"), "an answer that isn't the API's", True),
    (Act(kind="body", body=b'{"error": {"message": "x"}}'), "an answer that isn't the API's", True),
]


@pytest.mark.parametrize(("fault", "reason", "billed"), FAULTS)
def test_the_servers_faults_are_asked_again(serve, tmp_path, fault, reason, billed):
    """One fault is got over, an item that always has it is kept for the next run."""

    def script(body: dict, number: int) -> Any:
        text = user_text(body)
        return fault if text == "item2" or (text == "item1" and number == 0) else None

    server = serve(script)
    made = writer(tmp_path, server.url, timeout=0.3)
    outcomes = by_id(list(made.write(tasks(4))))
    assert [outcomes[f"item{n}"].conversation is not None for n in range(4)] == [
        True,
        True,
        False,
        True,
    ]
    assert (outcomes["item2"].pending, outcomes["item2"].problems[0].reason) == (True, reason)
    assert server.texts == {"item0": 1, "item1": 2, "item2": 3, "item3": 1}
    # What the server may have billed is counted as if it had.
    assert spent(tmp_path).tokens == 3 * 120 + (4 * AT_MOST if billed else 0)
    server.script = None
    (later,) = [o for o in writer(tmp_path, server.url).write(tasks(4)) if o.requests]
    assert later.item.id == "item2"
    assert later.conversation is not None


@pytest.mark.parametrize(
    ("header", "seconds"),
    [({"Retry-After": "1"}, 1.0), ({"retry-after-ms": "400"}, 0.4), ({}, 0.0)],
)
def test_429_is_waited_for_and_fewer_are_sent(serve, tmp_path, monkeypatch, header, seconds):
    """Half a second in which the server takes nothing, more often than server_retries."""
    lowered = []
    monkeypatch.setattr(http.Concurrency, "lower", lambda _, seen: lowered.append(seen))
    end = [0.0]

    def script(body: dict, number: int) -> Any:
        if user_text(body) == "item0":
            end[0] = time.monotonic() + max(seconds, 0.3)
            return None
        if time.monotonic() < end[0]:
            return error(429, "slow down", "rate_limit_exceeded", **header)
        return None

    server = serve(script)
    made = writer(tmp_path, server.url, server_retries=0)
    assert all(outcome.conversation for outcome in made.write(tasks(60)))
    assert lowered
    assert spent(tmp_path).tokens == 60 * 120  # a 429 costs nothing
    if seconds:
        first = server.times[1]  # of those that got a 429: at most those that were in flight
        early = [t for t in server.times[1:] if t < first + seconds * 0.98]
        assert len(early) <= 8


def test_retry_after_as_a_date_and_too_far_ahead(serve, tmp_path):
    when = email.utils.formatdate(time.time() + 7200, usegmt=True)
    server = serve(lambda body, number: error(503, "maintenance", **{"Retry-After": when}))
    with pytest.raises(EndpointError, match=r"asks to wait 7,[12]\d\d s .*server error 503"):
        list(writer(tmp_path, server.url).write(tasks(20)))
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("status", "code", "match"),
    [
        (401, "invalid_api_key", "set the environment variable THE_KEY to a valid key"),
        (403, None, "may not use this model"),
        (404, "model_not_found", "check the model's name and the address"),
        (429, "insufficient_quota", "has no money left"),
        (402, None, "has no money left"),
        (405, None, "check the address"),
    ],
)
def test_what_refuses_every_request_is_one_error_after_one_request(
    serve, tmp_path, monkeypatch, status, code, match
):
    monkeypatch.setenv("THE_KEY", "very-secret-key")
    server = serve(lambda body, number: error(status, "no: very-secret-key, sk-other", code))
    with pytest.raises(EndpointError, match=match) as caught:
        list(writer(tmp_path, server.url, key_variable="THE_KEY").write(tasks(1000)))
    assert len(server.requests) == 1
    assert "secret" not in str(caught.value)
    assert "no: [key], [key]" in str(caught.value)


def test_the_key_goes_to_the_server_and_nowhere_else(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("THE_KEY", "very-secret-key")
    server = serve(key="very-secret-key")
    made = writer(tmp_path, server.url, key_variable="THE_KEY")
    outcomes = list(made.write(tasks(3)))
    assert all(outcome.conversation for outcome in outcomes)
    assert "very-secret-key" not in repr(outcomes) + repr(made.options)
    for file in (tmp_path / "cache").rglob("*"):
        assert file.is_dir() or b"very-secret-key" not in file.read_bytes()


def test_a_server_that_isnt_there_is_one_error(tmp_path):
    with pytest.raises(EndpointError, match="has answered no request: no connection"):
        list(writer(tmp_path, "http://127.0.0.1:9/v1").write(tasks(1000)))


def test_a_server_that_dies_stops_the_run(serve, tmp_path):
    server = serve(lambda body, number: None if len(server.requests) < 20 else Act(status=500))
    made = writer(tmp_path, server.url, patience=0.5)
    outcomes = []
    with pytest.raises(EndpointError, match=r"has given no answer for \d+ s"):
        outcomes += made.write(tasks(100_000))
    assert len(server.requests) < 5_000


def test_a_server_that_takes_no_request_is_one_error(serve, tmp_path):
    server = serve(lambda body, number: error(400, "no pictures here"))
    with pytest.raises(EndpointError, match=r"has refused the first 5 requests.*no pictures here"):
        list(writer(tmp_path, server.url).write(tasks(1000)))
    assert len(server.requests) == 5


def test_a_request_that_is_refused_is_the_items_problem(serve, tmp_path):
    refusals = {
        "item1": error(400, "no", "content_filter"),
        "item2": error(400, "too many", "context_length_exceeded"),
        "item3": error(422, "odd"),
    }
    server = serve(lambda body, number: refusals.get(user_text(body)))
    outcomes = by_id(list(writer(tmp_path, server.url).write(tasks(5))))
    assert [
        outcome.problems[0].reason if outcome.problems else None
        for _, outcome in sorted(outcomes.items())
    ] == [
        None,
        "request held back by the server's content filter",
        "prompt too long for the model",
        "request refused by the server",
        None,
    ]
    assert {server.texts[name] for name in refusals} == {1}
    assert not any(outcome.pending for outcome in outcomes.values())


def test_a_server_without_schemas_is_asked_in_text_and_remembered(serve, tmp_path):
    def script(body: dict, number: int) -> Any:
        form = body.get("response_format")
        if form and form["type"] == "json_schema":
            return error(400, "Invalid parameter: 'response_format' of type 'json_schema'")
        if form:
            return error(400, "response_format.type: json_object is not supported")
        if "max_completion_tokens" in body:
            return error(400, "Unrecognized request argument supplied: max_completion_tokens")
        return None

    server = serve(script)
    outcomes = list(writer(tmp_path, server.url).write(tasks(30)))
    assert all(outcome.conversation for outcome in outcomes)
    assert len(server.requests) == 33  # three were needed to learn it, all by the first item
    last = server.requests[-1]
    assert "response_format" not in last
    assert last["max_tokens"] == 50
    assert '"required": ["answer"]' in last["messages"][0]["content"]
    more = list(writer(tmp_path, server.url).write(tasks(30, start=30)))
    assert all(outcome.conversation for outcome in more)
    assert len(server.requests) == 63
    # A server that has learnt it isn't paid again for what it has answered.
    forced = writer(tmp_path, server.url, structured="json_schema")
    assert all(outcome.cached for outcome in forced.write(tasks(60)))
    assert len(server.requests) == 63


def test_the_form_that_the_job_asks_for_isnt_given_up(serve, tmp_path):
    server = serve(lambda body, number: error(400, "response_format: unknown"))
    with pytest.raises(EndpointError, match="response_format: unknown"):
        list(writer(tmp_path, server.url, structured="json_schema").write(tasks(10)))
    assert all(body["response_format"]["type"] == "json_schema" for body in server.requests)


@pytest.mark.parametrize("by", ["tokens", "dollars"])
def test_the_budget_is_never_exceeded_and_the_next_run_goes_on(serve, tmp_path, by):
    price = {"input": 1000.0, "output": 1000.0}  # a tenth of a cent a token
    budget = {"tokens": 1500} if by == "tokens" else {"dollars": 1.5}
    server = serve(latency=0.01)
    outcomes: list[Outcome] = []

    def run(budget: dict[str, float]) -> Any:
        made = writer(tmp_path, server.url, price=price, budget=budget)
        outcomes.clear()
        with pytest.raises(BudgetReached, match="Nothing is lost") as caught:
            outcomes.extend(made.write(tasks(100)))
        return caught

    caught = run(budget)
    # Each costs 120 and is reserved at 175: the 12th begins with 1,320 spent.
    assert len(server.requests) == 12
    assert spent(tmp_path).tokens == 1440
    assert spent(tmp_path).dollars == pytest.approx(1.44)
    assert open_rows(tmp_path) == set()
    assert len([o for o in outcomes if o.conversation]) == 12
    assert "1,440 tokens, $1.4400 spent" in str(caught.value)
    # The same budget is still reached, what was paid for is there.
    run(budget)
    assert len(server.requests) == 12
    # Not always all twelve: the run may stop at a task before the last of them.
    assert 0 < len(outcomes) <= 12
    assert all(outcome.cached and outcome.dollars == 0 for outcome in outcomes)
    run({"tokens": 3000} if by == "tokens" else {"dollars": 3.0})
    assert len(server.requests) == 24
    assert max(server.payloads.values()) == 1


def test_a_server_that_doesnt_count_is_counted_at_the_most(serve, tmp_path):
    server = serve(lambda body, number: completion('{"answer": "yes"}', usage=None))
    made = writer(tmp_path, server.url)
    list(made.write(tasks(5)))
    assert spent(tmp_path).tokens == 5 * AT_MOST


def test_cached_prompt_tokens_have_their_own_price(serve, tmp_path):
    reply = completion('{"answer": "yes"}')
    reply["usage"]["prompt_tokens_details"] = {"cached_tokens": 60}
    server = serve(lambda body, number: reply)
    price = {"input": 10.0, "cached_input": 1.0, "output": 100.0}
    (outcome,) = writer(tmp_path, server.url, price=price).write(tasks(1))
    assert outcome.dollars == pytest.approx((40 * 10 + 60 * 1 + 20 * 100) / 1e6)


def test_the_same_question_is_asked_once(serve, tmp_path):
    server = serve(latency=0.05)
    same = [dataclasses.replace(task, item=next(tasks(1)).item) for task in tasks(20)]
    outcomes = list(writer(tmp_path, server.url).write(same))
    assert len(outcomes) == 20
    assert len(server.requests) == 1
    list(writer(tmp_path, server.url, seeded=True).write(tasks(2)))
    assert [body.get("seed") for body in server.requests[1:]] == [0, 1]


def test_chinese_by_translation_asks_twice(serve, tmp_path):
    server = serve()
    made = writer(tmp_path, server.url, chinese="translate")
    (outcome,) = made.write(tasks(1, language="zh"))
    assert outcome.conversation[-1].text == "It is zh It is item0.."
    assert (outcome.item.language, outcome.attempts, outcome.requests) == ("zh", 2, 2)
    (direct,) = writer(tmp_path, server.url).write(tasks(1, language="zh"))
    assert (direct.attempts, direct.conversation[-1].text) == (1, "It is item0.")
    assert len(server.requests) == 2  # the stand-in asks the same in both languages


def test_a_failed_first_step_isnt_translated(serve, tmp_path):
    server = serve(answer=lambda text: '{"answer": "wrong"}')
    made = writer(tmp_path, server.url, chinese="translate", retries=0)
    (outcome,) = made.write(tasks(1, language="zh"))
    assert outcome.problems == (Problem("bad label"),)
    assert outcome.item.language == "zh"
    assert len(server.requests) == 1


def test_the_picture_is_attached_clean(serve, tmp_path):
    import base64

    write_images(tmp_path)
    server = serve()
    made = writer(tmp_path, server.url, prompts=Prompts(images=True), image={"detail": "low"})
    (outcome,) = made.write(tasks(1))
    part = server.requests[0]["messages"][1]["content"][0]["image_url"]
    assert part["detail"] == "low"
    kind, data = part["url"].split(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == (tmp_path / "images" / "0.png").read_bytes()
    assert outcome.prompt == "Be exact.\n\n[picture images/0.png]\nitem0"


def test_a_picture_that_is_gone_stops_the_job(serve, tmp_path):
    server = serve()
    with pytest.raises(CorpusError, match=r"images/0\.png: the stored picture can't be read"):
        list(writer(tmp_path, server.url, prompts=Prompts(images=True)).write(tasks(5)))
    assert server.requests == []


def test_who_leaves_early_keeps_what_was_in_flight(serve, tmp_path):
    server = serve(latency=0.2)
    answers = writer(tmp_path, server.url).write(tasks(40))
    next(answers)
    time.sleep(0.1)
    answers.close()
    sent = len(server.requests)
    assert 2 <= sent <= 17
    assert open_rows(tmp_path) == set()
    list(writer(tmp_path, server.url).write(tasks(40)))
    assert (len(server.requests), max(server.payloads.values())) == (40, 1)


def test_a_fault_of_the_checks_stops_the_run_with_the_items_name(serve, tmp_path):
    class Broken(Prompts):
        def check(self, *arguments: Any) -> Any:
            raise ZeroDivisionError("by nought")

    with pytest.raises(CorpusError, match="item0: ZeroDivisionError: by nought"):
        list(writer(tmp_path, serve().url, prompts=Broken()).write(tasks(1)))


def test_requests_are_paced(serve, tmp_path):
    """600 a minute with a second's burst: 20 take at least 0.9 s."""
    server = serve()
    start = time.monotonic()
    list(writer(tmp_path, server.url, requests_a_minute=600).write(tasks(20)))
    assert time.monotonic() - start >= 0.9
    for first, later in zip(server.times, server.times[15:], strict=False):
        assert later - first > 0.3


def test_two_runs_at_once_share_the_ledger(serve, tmp_path):
    """Each asks what the other doesn't, and both have everything."""
    import threading

    server = serve(latency=0.05)
    results: dict[str, dict] = {}

    def run(job: str) -> None:
        results[job] = decided(list(writer(tmp_path, server.url, job=job).write(tasks(60))))

    threads = [threading.Thread(target=run, args=(job,)) for job in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results["a"] == results["b"]
    assert len(results["a"]) == 60
    assert set(server.payloads.values()) == {1}


def test_an_estimate_asks_nothing_and_knows_the_ledger(serve, tmp_path):
    server = serve()
    price = {"input": 1000.0, "output": 2000.0}
    made = writer(tmp_path, server.url, price=price)
    before = made.estimate(tasks(10))
    assert (before["requests"], before["cached"]) == (10, 0)
    most = pytest.approx(10 * ((AT_MOST - 50) * 1e-3 + 50 * 2e-3))
    assert [before["dollars"], before["dollars_at_most"]] == [most, most]
    assert server.requests == []
    list(made.write(tasks(4)))
    after = made.estimate(tasks(10))
    assert (after["requests"], after["cached"]) == (6, 4)
    assert (after["prompt_tokens"], after["completion_tokens"]) == (600, 120)
    assert after["dollars"] == pytest.approx(6 * (0.1 + 0.04))


def test_options_reach_the_body(serve, tmp_path):
    server = serve()
    made = writer(
        tmp_path, server.url, temperature=0.7, top_p=0.9, parameters={"reasoning_effort": "low"}
    )
    list(made.write(tasks(1)))
    body = server.requests[0]
    assert (body["temperature"], body["top_p"], body["reasoning_effort"]) == (0.7, 0.9, "low")
    assert body["response_format"]["json_schema"]["strict"] is True
    list(writer(tmp_path, server.url, temperature=0.8).write(tasks(1)))
    assert len(server.requests) == 2  # another temperature is another question


COST = Expense(100, 50, 0.5)


def test_what_a_dead_run_left_is_lost_money_and_free_again(tmp_path):
    """Another process claims two keys and dies without a word."""
    path = tmp_path / "answers.sqlite"
    program = f"""
import os, signal
from pathlib import Path
from data_tools.writers.ledger import Expense, Ledger
ledger = Ledger(Path({str(path)!r}), job="a")
ledger.claim("k", Expense(100, 50, 0.5)); ledger.claim("l", Expense(10, 5, 0.25))
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -9
    with Ledger(path, job="b") as ledger:
        assert ledger.claim("k", COST) is None
        assert ledger.spent() == Expense()  # it isn't b's loss
    with Ledger(path, job="a") as ledger:
        assert ledger.spent() == Expense(110, 55, 0.75)
    # Only the lock of a run that lives is left.
    assert list((tmp_path / "answers.sqlite.runs").iterdir()) == []


def test_a_run_that_dies_while_another_waits_for_it_is_buried(serve, tmp_path, monkeypatch):
    """The run that has waited asks, and the other job bears what may have been spent."""
    claim, tries = Ledger.claim, []

    def claim_after_a_run_that_died(self: Ledger, key: str, at_most: Expense) -> str | None:
        if not tries:
            self._rows("INSERT INTO under_way VALUES (?, 'dead', 'other', ?, ?, ?)", key, *at_most)
        tries.append(at_most)
        assert len(tries) < 9, "it is waited for"
        return claim(self, key, at_most)

    monkeypatch.setattr(openai_writer, "OTHER_RUN_SECONDS", 0.01)
    monkeypatch.setattr(Ledger, "claim", claim_after_a_run_that_died)
    (outcome,) = writer(tmp_path, serve().url).write(tasks(1))
    assert outcome.conversation[-1].text == "It is item0."
    assert spent(tmp_path, "other") == tries[0]
    assert open_rows(tmp_path) == set()


def test_a_living_runs_claim_stands(tmp_path):
    path = tmp_path / "answers.sqlite"
    with Ledger(path, job="a") as first:
        assert first.claim("k", COST) is None
        with Ledger(path, job="b") as second:
            run = second.claim("k", COST)
            assert run == first.run
            assert second.is_alive(run)
            assert second.under_way("k")
            second.release("k", None)  # not its own
            assert first.claim("k", COST) == first.run
        first.release("k", COST)
        assert first.spent() == COST
        assert not first.under_way("k")


def test_a_transaction_is_all_or_nothing(tmp_path):
    with Ledger(tmp_path / "answers.sqlite", job="a") as ledger:

        def half() -> None:
            with ledger.transaction():
                ledger.claim("k", COST)
                ledger.settle("k", "m", Reply("x"), COST)
                raise KeyError

        with pytest.raises(KeyError):
            half()
        assert ledger.answer("k") is None
        assert ledger.spent() == Expense()


def test_files_that_are_no_ledger_are_told(tmp_path):
    path = tmp_path / "answers.sqlite"
    path.write_bytes(b"no database at all, " * 100)
    with pytest.raises(CorpusError, match=r"answers\.sqlite: the ledger .* name another file"):
        Ledger(path, job="a")
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version=99")
    with pytest.raises(CorpusError, match="a ledger of version 99, this program writes version 1"):
        Ledger(path, job="a")


def test_money_survives_a_power_cut(tmp_path):
    with Ledger(tmp_path / "answers.sqlite", job="a") as ledger:
        assert ledger._connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
        assert ledger._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
