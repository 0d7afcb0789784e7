# SPDX-License-Identifier: Apache-2.0

"""The server, asked by OpenAI's own client over real HTTP."""

import base64
import gc
import importlib
import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx2
import numpy as np
import openai
import pytest
import uvicorn
from PIL import Image
from starlette.testclient import TestClient

from gmai_xtuner.core import addresses
from gmai_xtuner.core.addresses import impatient_protocol
from gmai_xtuner.core.conversation import Turn
from gmai_xtuner.generate import Predictor, user_turn
from gmai_xtuner.serve import app
from gmai_xtuner.serve.app import Server, StopTexts
from gmai_xtuner.serve.protocol import ApiError, Limits
from tests.commands.runner import ROOT

LENGTH = 12
SMALL = Limits(body_bytes=200_000, images=2, image_bytes=40_000, pixels=100 * 100)


@contextmanager
def serving(predictor: Predictor, **options) -> Iterator[openai.OpenAI]:
    """A client of a server on loopback."""
    application = Server(predictor, name="my-model", **options).app
    server = uvicorn.Server(
        uvicorn.Config(
            application,
            port=0,
            http=impatient_protocol(),
            log_level="critical",
            timeout_graceful_shutdown=1,
        )
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1",
            api_key=options.get("key", "none"),
            max_retries=0,
            timeout=30,
        )
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def client(predictor) -> Iterator[openai.OpenAI]:
    with serving(predictor, limits=SMALL, max_new_tokens=5_000) as made:
        yield made


def picture(number: int, size: tuple[int, int] | None = None) -> Image.Image:
    size = size or ((30, 40), (50, 20))[number % 2]  # neither is square
    noise = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def url(image: Image.Image) -> str:
    content = io.BytesIO()
    image.save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def user(*parts: str | Image.Image) -> dict:
    """A message of texts and images."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": url(part)}}
        for part in parts
    ]
    return {"role": "user", "content": content}


def ask(client: openai.OpenAI, *messages: dict, **options):
    settings = {"model": "my-model", "max_tokens": LENGTH} | options
    return client.chat.completions.create(messages=list(messages), **settings)


SYSTEM = "You are a radiologist."
CASES = {
    "text": ([{"role": "user", "content": "Is it CT?"}], [user_turn("Is it CT?", 0)], []),
    "image": ([user(picture(0), "What is shown?")], [user_turn("What is shown?", 1)], [0]),
    "two images": ([user(picture(0), picture(1), "比较。")], [user_turn("比较。", 2)], [0, 1]),
    "between texts": (
        [user("First", picture(0), "then", picture(1), "?")],
        [Turn("user", "First\n<image>\nthen\n<image>\n?")],
        [0, 1],
    ),
    "several turns": (
        [
            {"role": "system", "content": SYSTEM},
            user(picture(0), "图中显示什么？"),
            {"role": "assistant", "content": "胸部X光片，<image>。"},
            user(picture(1), "And here?"),
        ],
        [
            Turn("system", SYSTEM),
            user_turn("图中显示什么？", 1),
            Turn("assistant", "胸部X光片，<image>。"),
            user_turn("And here?", 1),
        ],
        [0, 1],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_answer_is_the_one_of_the_model(client, predictor, case):
    messages, turns, images = CASES[case]
    expected = predictor.generate(turns, [picture(n) for n in images], max_new_tokens=LENGTH)
    whole = ask(client, *messages)
    assert expected
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == LENGTH
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + LENGTH
    assert whole.usage.prompt_tokens > 64 * len(images)
    chunks = list(ask(client, *messages, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content for chunk in chunks[:-1] if chunk.choices]
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(piece or "" for piece in pieces) == expected
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage


def test_an_answer_that_ends_by_itself_says_so(client, predictor, monkeypatch):
    first = ask(client, user("Is it CT?"), max_tokens=1).choices[0].message.content
    ids = predictor.tokenizer(first, add_special_tokens=False).input_ids
    monkeypatch.setattr(predictor, "stop_ids", ids[:1])
    done = ask(client, user("Is it CT?"))
    assert (done.choices[0].finish_reason, done.usage.completion_tokens) == ("stop", 1)


def test_a_16_bit_image_is_seen_as_in_training(client, predictor, tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (40, 40), dtype=np.uint16)
    path = tmp_path / "twelve_bits.png"
    Image.fromarray(values).save(path)
    sent = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    message = user("What is shown?")
    message["content"].insert(0, {"type": "image_url", "image_url": {"url": sent, "detail": "low"}})
    expected = predictor.answer("What is shown?", [path], max_new_tokens=LENGTH)
    assert ask(client, message).choices[0].message.content == expected
    clipped = Image.open(path).convert("RGB")
    assert expected != predictor.answer("What is shown?", [clipped], max_new_tokens=LENGTH)


def test_sampling_repeats_with_a_seed_and_is_greedy_without_temperature(client):
    def say(**options):
        return ask(client, user("Is it CT?"), **options).choices[0].message.content

    assert say(temperature=1.5, seed=1, top_p=0.9) == say(temperature=1.5, seed=1, top_p=0.9)
    assert say(temperature=1.5, seed=1) != say(temperature=1.5, seed=2)
    assert say() == say() == say(temperature=0, seed=5)
    long = {"max_tokens": 200}
    assert say(**long) != say(**long, extra_body={"repetition_penalty": 3.0})


def test_a_stop_text_ends_the_answer(client):
    whole = ask(client, user("Is it CT?")).choices[0].message.content
    stop = whole[4:6]
    done = ask(client, user("Is it CT?"), stop=[stop, "never"])
    assert done.choices[0].message.content == whole[: whole.index(stop)]
    assert done.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 50])
def test_stop_texts_are_found_however_the_pieces_are_cut(size):
    text = "abcab##abd##END tail"
    stops = StopTexts(["#END", "##E"])
    told = "".join(stops.add(text[at : at + size]) for at in range(0, len(text), size))
    assert (told, stops.found) == ("abcab##abd", True)
    stops = StopTexts(["tail!"])
    told = "".join(stops.add(text[at : at + size]) for at in range(0, len(text), size))
    assert (told + stops.rest(), stops.found) == (text, False)


def with_url(address: str) -> list[dict]:
    part = {"type": "image_url", "image_url": {"url": address}}
    return [{"role": "user", "content": [part, {"type": "text", "text": "x"}]}]


TEXT = [{"role": "user", "content": "x"}]
TRUNCATED = url(picture(0))[:-400]
DICOM = "data:application/dicom;base64,AAAA"


@pytest.mark.parametrize(
    ("options", "status", "code", "said"),
    [
        ({"model": "other"}, 404, "model_not_found", "no model 'other' here, only 'my-model'"),
        ({"messages": with_url("https://a.b/c.png")}, 400, "invalid_image_url", "fetches nothing"),
        ({"messages": with_url("/etc/passwd")}, 400, "invalid_image_url", "opens no files"),
        ({"messages": with_url("file:///a.png")}, 400, "invalid_image_url", "opens no files"),
        ({"messages": with_url("data:image/png,xyz")}, 400, "invalid_image_url", "expected a data"),
        ({"messages": with_url("data:image/png;base64,*")}, 400, "invalid_image_url", "not base64"),
        ({"messages": with_url("data:;base64,AAAA")}, 400, "unsupported_image", "none of the form"),
        ({"messages": with_url("data:;base64,")}, 400, "damaged_image", "is empty"),
        ({"messages": with_url(TRUNCATED)}, 400, "damaged_image", "is damaged"),
        ({"messages": with_url(DICOM)}, 400, "unsupported_image", "gmai_xtuner.demo"),
        ({"messages": [user(picture(0, (101, 100)), "x")]}, 413, "image_too_large", "10100 pixels"),
        ({"messages": with_url(f"data:;base64,{'A' * 60_000}")}, 413, "image_too_large", "40000 by"),
        ({"messages": [user(*[picture(0)] * 3)]}, 400, "too_many_images", "more than 2 images"),
        ({"messages": [{"role": "user", "content": "x" * 300_000}]}, 413, "request_too_large", "20"),
        ({"messages": [user("<image>", picture(0))]}, 400, "image_count", "parts of type image_url"),
        ({"messages": []}, 400, "invalid_value", "of length >= 1"),
        ({"messages": [*TEXT, *TEXT]}, 400, None, "expected the assistant's"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, None, "expected the user's"),
        ({"messages": [{"role": "user", "content": " "}]}, 400, None, "message is empty"),
        ({"messages": [{"role": "user", "content": "x " * 33_000}]}, 400,
         "context_length_exceeded", "the model has 32768 positions"),
        ({"max_tokens": 5_001}, 400, None, "max_tokens is 5001, this server allows 5000"),
        ({"n": 2}, 400, "invalid_value", "n: Invalid enum value 2"),
        ({"logprobs": True}, 400, "invalid_value", "logprobs"),
        ({"response_format": {"type": "json_object"}}, 400, "invalid_value", "response_format"),
        ({"extra_body": {"guided_json": {}}}, 400, "unknown_parameter", "unknown field guided_json"),
        ({"stop": [""]}, 400, None, "none of them empty"),
        ({"temperature": 3}, 400, "invalid_value", "temperature: Expected `float` <= 2"),
        ({"temperature": 1e-38}, 400, "invalid_value", "temperature must be 0, or"),
        ({"extra_body": {"repetition_penalty": 1e-320}}, 400, "invalid_value", "repetition_penalty"),
        ({"extra_body": {"repetition_penalty": 1e-40}}, 400, "invalid_value", "repetition_penalty"),
        ({"extra_body": {"repetition_penalty": 0}}, 400, "invalid_value", "repetition_penalty"),
        ({"max_tokens": "12"}, 400, "invalid_value", "max_tokens: Expected `int"),
        ({"max_tokens": True}, 400, "invalid_value", "max_tokens: Expected `int"),
        ({"extra_body": {"seed": 10**30}}, 400, "invalid_value", "seed"),
        ({"extra_body": {"stop": ["x" * 500]}}, 400, None, "1 to 400 characters"),
        ({"messages": [{"role": "user"}]}, 400, "missing_required_parameter", "`content`"),
    ],
)  # fmt: skip
def test_what_cant_be_answered_is_an_error_of_the_api(client, options, status, code, said):
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**{"model": "my-model", "messages": TEXT, **options})
    assert caught.value.status_code == status
    assert caught.value.code == code
    assert said in caught.value.body["message"]
    assert caught.value.type == "invalid_request_error"
    assert ask(client, *TEXT).choices[0].message.content, "the next request is answered"


def test_requests_that_are_none(client):
    address = f"{client.base_url}chat/completions"
    broken = httpx2.post(address, content=b"{", headers={"content-type": "application/json"})
    assert (broken.status_code, "not JSON" in broken.text) == (400, True)
    form = httpx2.post(address, content=json.dumps({"model": "my-model", "messages": TEXT}))
    assert (form.status_code, "must be application/json" in form.text) == (415, True)
    assert httpx2.get(address).json()["error"]["message"].endswith("Method Not Allowed")
    assert httpx2.get(f"{client.base_url}nothing").status_code == 404


ATTACKS = {
    "wrong items": b'{"model": "my-model", "messages": [' + b"1," * 100_000 + b"1]}",
    "wrong objects": b'{"model": "my-model", "messages": [' + b"{}," * 60_000 + b"{}]}",
    "many parts": b'{"model": "my-model", "messages": [{"role": "user", "content": ['
    + b'{"type":"text","text":""},' * 7_000
    + b'{"type":"text","text":""}]}]}',
    "nested": b'{"model": "my-model", "messages": ' + b"[" * 190_000,
    "unknown and nested": b'{"model": "my-model", "x": ' + b"[" * 190_000,
    "digits": b'{"model": "my-model", "messages": [], "seed": ' + b"1" * 190_000 + b"}",
    "half a character": b'{"model": "my-model", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "not UTF-8": b'{"model": "my-model", "messages": [{"role": "user", "content": "\xff"}]}',
    "long text": b'{"model": "my-model", "messages": [{"role": "user", "content": "'
    + b"x" * 190_000
    + b'"}]}',
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_body_that_costs_much_is_refused_at_once(client, predictor, name, monkeypatch):
    """Nothing of it is tokenised, and the loop is free meanwhile."""
    if name == "long text":
        monkeypatch.setattr(predictor, "_longest_token", 5)
        monkeypatch.setattr(predictor.encoder, "encode_prompt", lambda _: pytest.fail("tokenised"))
    began = time.monotonic()
    answer = httpx2.post(
        f"{client.base_url}chat/completions",
        content=ATTACKS[name],
        headers={"content-type": "application/json"},
    )
    assert answer.status_code in (400, 413)
    assert len(answer.text) < 2_000
    assert time.monotonic() - began < 1


def raw_connection(client: openai.OpenAI, sent: bytes) -> socket.socket:
    made = socket.create_connection(("127.0.0.1", client.base_url.port), timeout=10)
    made.sendall(sent)
    return made


HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
)


@pytest.mark.parametrize("sent", [b"", b"GET /hea", HEAD, HEAD + b"Content-Length: 5000\r\n\r\n{"])
def test_what_never_arrives_is_given_up(predictor, monkeypatch, sent):
    monkeypatch.setattr(addresses, "IDLE_SECONDS", 0.3)
    with serving(predictor, timeout=0.3) as client, raw_connection(client, sent) as waiting:
        began = time.monotonic()
        said = b""
        while more := waiting.recv(1000):
            said += more
        assert time.monotonic() - began < 5
        assert (b"408" in said) == (b"Length" in sent)
        assert ask(client, *TEXT).choices[0].message.content


def test_bodies_that_arrive_together_are_bounded(predictor):
    small = Limits(body_bytes=10_000)
    length = b"Content-Length: 9999\r\n\r\n"
    with serving(predictor, limits=small) as client:
        waiting = [raw_connection(client, HEAD + length + b"{" * 9_990) for _ in range(5)]
        assert any(b"503" in one.recv(100) for one in waiting[-1:])
        for one in waiting:
            one.close()


def test_a_request_that_takes_too_long_to_read_ends_and_others_are_answered(
    predictor, monkeypatch, caplog
):
    def slow(self, image):
        time.sleep(1.5)
        raise ApiError("a fault of the request, which nobody waits for any more")

    monkeypatch.setattr(Predictor, "pixels", slow)
    with serving(predictor, timeout=0.3) as client:
        with pytest.raises(openai.InternalServerError, match="could not be read within"):
            ask(client, user(picture(0), "x"))
        assert (
            httpx2.get(str(client.base_url).replace("/v1/", "/health"), timeout=1).status_code
            == 200
        )
        time.sleep(2)
        gc.collect()
    assert "never retrieved" not in caplog.text


def test_the_model_does_not_wait_for_a_client_that_does_not_read(client, predictor, monkeypatch):
    """An unread stream fills the socket; its turn must end all the same."""
    original = app._sent
    monkeypatch.setattr(app, "_sent", lambda event: original(event) + ":" + "x" * 500_000 + "\n\n")
    body = json.dumps({"model": "my-model", "messages": TEXT, "stream": True, "max_tokens": 60})
    length = f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        deaf.connect(("127.0.0.1", client.base_url.port))
        deaf.sendall(HEAD + length)
        time.sleep(0.1)
        assert ask(client, *TEXT).choices[0].message.content


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == ["my-model"]
    assert client.models.retrieve("my-model").max_model_len == 32768
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *(("127.0.0.1:8000", 200), ("localhost", 200), ("LocalHost:1", 200), ("[::1]:8000", 200)),
        *(("evil.example", 403), ("127.0.0.1.evil.example:8000", 403), ("[::1", 403)),
    ],
)
def test_without_a_key_no_other_site_can_point_its_name_here(predictor, host, status):
    application = Server(predictor, name="my-model", only_loopback_names=True).app
    with TestClient(application) as visitor:
        for path in ("/health", "/v1/models"):
            answer = visitor.get(path, headers={"host": host})
            assert answer.status_code == status
            if status == 403:
                assert answer.json()["error"]["code"] == "host_not_allowed"
            page = visitor.get(path, headers={"host": host, "origin": "https://evil.example"})
            assert page.status_code == 403


@pytest.mark.parametrize(
    ("arguments", "checked"),
    [((), True), (("--without-key",), False), (("--api-key-env", "K"), False)],
)
def test_the_command_checks_names_where_it_has_no_key(export, monkeypatch, arguments, checked):
    from gmai_xtuner.serve import __main__ as served

    class Made(Exception):
        pass

    def made(*_, only_loopback_names, **__):
        raise Made(only_loopback_names)

    monkeypatch.setenv("K", "secret")
    monkeypatch.setattr(served, "load_from_arguments", lambda _: None)
    monkeypatch.setattr(app, "Server", made)
    with pytest.raises(Made) as found:
        served.main([str(export), "--port", "0", *arguments])
    assert found.value.args == (checked,)


def test_a_key_is_wanted_where_one_is_set(predictor):
    with serving(predictor, key="secret") as client:
        assert ask(client, *TEXT).choices[0].message.content
        other = client.with_options(api_key="wrong")
        for call in (other.models.list, lambda: ask(other, *TEXT)):
            with pytest.raises(openai.AuthenticationError, match="Bearer KEY"):
                call()
        assert httpx2.get(f"{client.base_url}models").status_code == 401
        assert httpx2.get(str(client.base_url).replace("/v1/", "/health")).json() == {
            "status": "ok"
        }


@pytest.fixture
def steps(predictor, monkeypatch) -> list[int]:
    """One entry a step of the language model, which never ends by itself: how many threads are in it."""
    made: list[int] = []
    inside = 0
    original = predictor.model.llm.forward

    def forward(*args, **kwargs):
        nonlocal inside
        inside += 1
        made.append(inside)
        try:
            time.sleep(0.002)
            return original(*args, **kwargs)
        finally:
            inside -= 1

    monkeypatch.setattr(predictor.model.llm, "forward", forward)
    monkeypatch.setattr(predictor, "stop_ids", [1_000_000])
    return made


def test_a_stream_that_is_closed_stops_the_model(client, steps):
    stream = ask(client, *TEXT, stream=True, max_tokens=5_000)
    for _, _chunk in zip(range(4), stream, strict=False):
        pass
    stream.close()
    assert_stops(client, steps)


def test_a_client_that_leaves_stops_the_model(client, steps):
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=2), *TEXT, max_tokens=5_000)
    assert_stops(client, steps)


def assert_stops(client, steps):
    ask(client, *TEXT, max_tokens=1)  # waits for its turn, so the other one has ended
    made = len(steps)
    assert 1 < made < 2_500
    time.sleep(0.1)
    assert len(steps) == made


def test_concurrent_requests_are_computed_one_after_the_other(client, predictor, steps):
    questions = [f"Question {number}?" for number in range(6)]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda text: ask(client, user(text)), questions))
    assert set(steps) == {1}
    assert [answer.choices[0].message.content for answer in answers] == [
        predictor.answer(question, max_new_tokens=LENGTH) for question in questions
    ]


def test_requests_beyond_the_queue_are_turned_away(predictor, steps):
    with serving(predictor, max_waiting=1) as client:
        streams = [ask(client, *TEXT, stream=True, max_tokens=4_000) for _ in range(2)]
        next(streams[0])
        next(streams[1])
        with pytest.raises(openai.InternalServerError, match="come again later") as caught:
            ask(client, *TEXT)
        assert (caught.value.status_code, caught.value.code) == (503, "server_busy")
        assert caught.value.response.headers["retry-after"] == "10"
        for stream in streams:
            stream.close()
        deadline = time.monotonic() + 20
        while True:
            try:
                assert ask(client, *TEXT).choices[0].message.content
                break
            except openai.InternalServerError:
                assert time.monotonic() < deadline
                time.sleep(0.05)


def test_a_model_that_fails_is_an_error_and_the_server_lives(client, predictor, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(predictor.model.llm, "forward", fail)
        with pytest.raises(openai.InternalServerError, match="the model failed: out of memory"):
            ask(client, *TEXT)
        with pytest.raises(openai.APIError, match="the model failed: out of memory"):
            list(ask(client, *TEXT, stream=True))
    assert ask(client, *TEXT).choices[0].message.content


@pytest.mark.parametrize("name", ["chat", "serve"])
def test_the_commands_of_the_page_can_be_understood(name):
    """docs/serving.md; whether they do what it says, the other tests show."""
    parser = importlib.import_module(f"gmai_xtuner.{name}.__main__")._parser()
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    lines = re.findall(rf"python -m gmai_xtuner\.{name} (my_model[^`#<\n]*)", page)
    assert len(lines) >= 2
    for line in lines:
        assert parser.parse_args(shlex.split(line)).model == "my_model"
    for option in parser._option_string_actions:
        assert option in page or option == "-h", f"the page lacks {option}"


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "gmai_xtuner.serve", *map(str, arguments)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.slow
def test_the_command_serves_until_ctrl_c(export, predictor):
    port = free_port()
    process = subprocess.Popen(
        command(export, "--port", port, "--name", "hospital", "--api-key-env", "KEY_OF_THE_TEST"),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "KEY_OF_THE_TEST": "secret"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(port, process)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret")
        answer = ask(client, user(picture(0), "What is shown?"), model="hospital")
        assert answer.choices[0].message.content == predictor.answer(
            "What is shown?", [picture(0)], max_new_tokens=LENGTH
        )
        process.send_signal(signal.SIGINT)
        _, log = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, log
    assert "1,256,704" in log, "parameters and memory"
    assert f"serving 'hospital' at http://127.0.0.1:{port}/v1, with a key" in log
    assert "secret" not in log


def wait_for(port: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        try:
            if httpx2.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return
        except httpx2.TransportError:
            time.sleep(0.1)
    raise AssertionError("the server did not start")


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--host", "0.0.0.0"), 2, "can be reached from other machines"),
        (("--api-key-env", "NOT_SET_BY_ANYONE"), 2, "NOT_SET_BY_ANYONE has no key"),
        (("--max-images", "0"), 2, "must be above 0"),
        (("--llm", "base"), 1, "leave llm out"),
    ],
)
def test_a_command_that_cant_serve_says_why(export, capsys, arguments, status, said):
    from gmai_xtuner.serve.__main__ import main

    try:
        returned = main([str(export), *arguments])
    except SystemExit as left:
        returned = left.code
    assert returned == status
    assert said in capsys.readouterr().err


def test_a_port_that_is_taken_is_an_error_before_the_model_is_loaded(export, capfd, monkeypatch):
    from gmai_xtuner.serve import __main__ as served

    monkeypatch.setattr(served, "load_from_arguments", lambda _: pytest.fail("loaded"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert served.main([str(export), "--port", str(port)]) == 1
    assert capfd.readouterr().err == (
        f"error: port {port} of 127.0.0.1 can't be had (Address already in use). "
        "Choose another with --port\n"
    )
