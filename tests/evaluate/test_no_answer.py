# SPDX-License-Identifier: Apache-2.0

"""Answers that are none, servers that moved, keys that must not be seen."""

from __future__ import annotations

import json

import pytest

from gmai_xtuner.core.errors import EndpointError
from gmai_xtuner.core.http import ChatServer, key_of, message_text
from gmai_xtuner.evaluate.__main__ import main
from gmai_xtuner.evaluate.answerers import ModelOptions
from gmai_xtuner.evaluate.answerers.endpoint import EndpointAnswerer
from gmai_xtuner.evaluate.results import read_result, read_scores
from tests.api_server import ApiServer, completion
from tests.evaluate.sets import write_pmc_vqa


def run(server, data, out, *more):
    common = ["--benchmark", "pmc_vqa", "--data", str(data), "--out", str(out)]
    common += ["--report-questions", "0"]
    return main(["m", "--endpoint", server.url, *common, *more])


def test_cut_empty_and_refused_answers_are_counted_not_scored_and_asked_again(tmp_path, capfd):
    data, out = write_pmc_vqa(tmp_path / "PMC-VQA"), tmp_path / "out"
    replies = {
        "figure 0": completion("Thing 0A seems", finish="length"),
        "figure 1": completion(None),
        "figure 2": completion(None, refusal="I won't."),
    }

    def script(body, number):
        text = json.dumps(body)
        return next((value for name, value in replies.items() if name in text), None)

    with ApiServer(script, answer=lambda text: "D") as server:
        assert run(server, data, out) == 3
        captured = capfd.readouterr()
        assert "75.0 % of the answers were cut, empty, refused or not understood" in captured.err
        assert "question 0 (cut): 'Thing 0A seems'" in captured.err
        folder = out / "pmc_vqa-test_clean" / "clean-2000"
        result = read_result(folder)
        assert dict(result.unanswered) == {"cut": 1, "empty": 1, "declined": 1}
        assert (result.n, result.headline.value) == (1, 1.0)
        ended = {name: (one["value"], one["ended"]) for name, one in read_scores(folder).items()}
        assert ended["0"] == (None, "length")
        replies.clear()
        assert run(server, data, out) == 0
    assert read_result(folder).n == 4


def test_another_limit_asks_anew_and_stored_answers_keep_their_own(tmp_path):
    data, out = write_pmc_vqa(tmp_path / "PMC-VQA"), tmp_path / "out"
    limits = []
    with ApiServer(
        lambda body, n: limits.append(body["max_tokens"]), answer=lambda t: "A"
    ) as server:
        assert run(server, data, out, "--max-new-tokens", "64") == 0
        assert run(server, data, out, "--score-only") == 0
        assert run(server, data, out) == 0
    assert limits == [64] * 4 + [2048] * 4
    folder = out / "pmc_vqa-test_clean" / "clean-2000"
    assert read_result(folder).generation["max_new_tokens"] == 2048


def test_a_server_that_moved_goes_on_with_its_answers(tmp_path):
    data, out = write_pmc_vqa(tmp_path / "PMC-VQA"), tmp_path / "out"
    with ApiServer(answer=lambda text: "A") as server:
        assert run(server, data, out) == 0
        before = server.url
    with ApiServer(answer=lambda text: pytest.fail("asked again")) as server:
        assert run(server, data, out) == 1
        assert run(server, data, out, "--moved-from", before) == 0


def test_the_text_of_a_message_may_come_in_parts():
    parts = [{"type": "text", "text": "The "}, {"type": "image"}, {"type": "text", "text": "lung "}]
    assert message_text({"content": parts}) == "The lung"
    assert message_text({"content": None}) == ""


def test_a_key_is_stripped_and_never_told(monkeypatch):
    monkeypatch.setenv("MY_KEY", " very-secret-key\n")
    assert key_of("MY_KEY") == "very-secret-key"
    server = ChatServer(
        "http://x/v1", model="m", key="very-secret-key\n", key_variable="K", timeout=1
    )
    for form in ("very-secret-key", "Bearer very-secret-key.", '{"k": "very-secret-key"}'):
        assert "secret" not in server.clean(form)
    monkeypatch.setenv("MY_KEY", "two\nwords")
    with pytest.raises(EndpointError, match="one word of ASCII") as told:
        key_of("MY_KEY")
    assert "two" not in str(told.value)
    with pytest.raises(EndpointError, match="environment variable UNSET_KEY holds no key"):
        EndpointAnswerer(ModelOptions("m", endpoint="http://x/v1", api_key_env="UNSET_KEY"))
    assert key_of(None) is None or "OPENAI_API_KEY"
