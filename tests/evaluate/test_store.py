# SPDX-License-Identifier: Apache-2.0

"""Answers on disk survive a stop, and are never mixed up with those of another run."""

import json
import os
import shutil
from dataclasses import replace

import pytest

from gmai_xtuner.core.errors import EndpointError, EvaluationError
from gmai_xtuner.core.http import ChatServer, key_of, message_text
from gmai_xtuner.evaluate import answerers as fingerprint
from gmai_xtuner.evaluate.__main__ import main
from gmai_xtuner.evaluate.answerers import ModelOptions, hash_files
from gmai_xtuner.evaluate.answerers.endpoint import EndpointAnswerer
from gmai_xtuner.evaluate.answerers.local import bases_of
from gmai_xtuner.evaluate.results import read_result, read_scores
from gmai_xtuner.evaluate.store import Answer, AnswerStore, Identity, Job
from tests.api_server import ApiServer, completion
from tests.evaluate.sets import write_pmc_vqa

IDENTITY = Identity(
    "slake", "en", "sha256:one", "one", {"decoding": "greedy"}, {"test.json": "ab" * 32}
)


def answer(number: int, **changes) -> Answer:
    made = Answer(
        f"q{number}",
        f"What is {number}?\nAnswer, bitte: 中",
        f"answer {number}\nmore ☃",
        0.25,
        "sha256:one",
        "full-1061/1",
        {"decoding": "greedy", "max_new_tokens": 8},
    )
    return replace(made, **changes)


def test_what_was_added_is_read_with_all_it_depends_on(tmp_path):
    store = AnswerStore(tmp_path, IDENTITY)
    store.create()
    with store.writer(0) as first, store.writer(1) as second:
        first([answer(0), answer(1)])
        second([answer(2)])
    found = AnswerStore(tmp_path, IDENTITY).read()
    assert list(found.values()) == [answer(0), answer(1), answer(2)]
    assert found[Job("q1", answer(1).prompt, (), 8, "p/1").key].answer == "answer 1\nmore ☃"
    line = json.loads((tmp_path / "answers-1.jsonl").read_text())
    assert set(line) == set(Answer.__dataclass_fields__)


def test_the_same_question_in_other_words_or_of_another_length_is_another(tmp_path):
    keys = [Job("q", *one, "p/1").key for one in (("a", (), 8), ("b", (), 8), ("a", (), 16))]
    assert len(set(keys)) == 3


@pytest.mark.parametrize("cut", [1, 7, 60])
def test_a_line_that_a_stop_has_cut_off_is_asked_again(tmp_path, cut):
    store = AnswerStore(tmp_path, IDENTITY)
    store.create()
    with store.writer() as write:
        write([answer(0), answer(1)])
    file = tmp_path / "answers-0.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    assert [one.id for one in store.read().values()] == ["q0"]
    with store.writer() as write:
        write([answer(1)])
    assert list(store.read().values()) == [answer(0), answer(1)]


def test_a_damaged_line_is_named(tmp_path):
    store = AnswerStore(tmp_path, IDENTITY)
    store.create()
    (tmp_path / "answers-0.jsonl").write_text('{"id": "q0"}\n')
    with pytest.raises(EvaluationError, match=r"answers-0\.jsonl, line 1 is not an answer"):
        store.read()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": "sha256:two"}, 'model: "sha256:one" there, "sha256:two" now'),
        ({"generation": {"decoding": "sampled"}}, '"greedy"} there, {"decoding": "sampled"} now'),
        ({"variant": "zh"}, 'variant: "en" there, "zh" now'),
        ({"source": {"test.json": "cd" * 32}}, "source: "),
    ],
)
def test_a_store_of_another_run_is_refused(tmp_path, changes, told):
    AnswerStore(tmp_path, IDENTITY).create()
    with pytest.raises(EvaluationError) as caught:
        AnswerStore(tmp_path, replace(IDENTITY, **changes))
    assert told in str(caught.value)
    assert "Give another --out" in str(caught.value)


def test_the_same_weights_under_another_name_go_on(tmp_path):
    AnswerStore(tmp_path, IDENTITY).create()
    AnswerStore(tmp_path, replace(IDENTITY, model_name="elsewhere"))


def test_answers_of_nobody_are_refused(tmp_path):
    (tmp_path / "answers-0.jsonl").write_text("")
    with pytest.raises(EvaluationError, match=r"has answers but no run\.json"):
        AnswerStore(tmp_path, IDENTITY)


def test_a_file_of_another_model_put_among_them_is_found(tmp_path):
    store = AnswerStore(tmp_path, IDENTITY)
    store.create()
    with store.writer(3) as write:
        write([answer(0, model="sha256:two")])
    with pytest.raises(EvaluationError, match="Answers of several models were put together"):
        store.read()


def test_two_runs_do_not_write_to_one_store(tmp_path):
    store, other = AnswerStore(tmp_path, IDENTITY), AnswerStore(tmp_path, IDENTITY)
    with (
        store.locked(),
        pytest.raises(EvaluationError, match="another evaluation writes to"),
        other.locked(),
    ):
        pass
    with other.locked():
        pass


# --- Answers that are none, servers that moved, keys that must not be seen ---


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


# --- The hash of a model changes with its weights, and with nothing else ---


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    (folder / "projector").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "projector" / "config.json").write_text("{}")
    (folder / "README.md").write_text("notes")
    return folder


def test_a_copy_has_the_same_hash_and_changed_weights_another(model, tmp_path):
    first = hash_files({"model": model})
    assert first.startswith("sha256:")
    copy = shutil.copytree(model, tmp_path / "copy")
    (copy / "README.md").write_text("other notes")
    (copy / ".cache").mkdir()
    (copy / ".cache" / "x.json").write_text("1")
    assert hash_files({"model": copy}) == first
    (copy / "projector" / "config.json").write_text('{"depth": 3}')
    assert hash_files({"model": copy}) != first


def test_parts_do_not_change_places(model, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    (other / "model.safetensors").write_bytes(b"others")
    one, two = {"llm": model, "vision": other}, {"llm": other, "vision": model}
    assert hash_files(one) != hash_files(two)


def test_files_are_read_again_only_when_size_or_time_change(model, tmp_path, monkeypatch):
    cache, file = tmp_path / "cache", model / "model.safetensors"
    first = hash_files({"model": model}, cache=cache)
    stamp = os.stat(file)
    file.write_bytes(b"WEIGHTS")
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert hash_files({"model": model}, cache=cache) == first  # it was not read: nothing tells
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    assert hash_files({"model": model}, cache=cache) != first
    (cache / fingerprint.CACHE_FILE).write_text("damaged")
    assert hash_files({"model": model}, cache=cache) == hash_files({"model": model})


def test_nothing_to_hash_is_an_error(tmp_path):
    with pytest.raises(EvaluationError, match="no model files"):
        hash_files({"model": tmp_path})


def test_bases_that_an_exports_own_files_name_count(tmp_path):
    def write(file, **content):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(json.dumps(content))
        return tmp_path / file.split("/")[0]

    whole = write("whole/projector/config.json", depth=2)
    assert bases_of(whole, None, None) == {}
    adapted = write("adapted/projector/config.json", depth=2)
    write("adapted/llm_adapter/adapter_config.json", base_model_name_or_path="base/llm")
    write("adapted/visual_encoder_adapter/adapter_config.json", base_model_name_or_path="base/clip")
    assert bases_of(adapted, None, None) == {"llm": "base/llm", "vision": "base/clip"}
    assert bases_of(adapted, "other", None) == {"llm": "other", "vision": "base/clip"}
    original = {"mm_hidden_size": 8, "mm_projector_type": "linear", "mm_vision_tower": "base/clip"}
    release = write("release/config.json", **original)
    assert bases_of(release, None, None) == {"vision": "base/clip"}
    plain = write("plain/config.json", model_type="llava", text_config={}, vision_config={})
    assert bases_of(plain, None, None) == {}
