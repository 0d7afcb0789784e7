"""A real server that answers, is busy, breaks, refuses, cuts connections and comes back."""

from __future__ import annotations

import threading
import time
from email.utils import formatdate

import numpy as np
import pytest
from PIL import Image

from gmai_xtuner.core.errors import EvaluationError
from gmai_xtuner.evaluate.answerers import ModelOptions
from gmai_xtuner.evaluate.answerers.endpoint import EndpointAnswerer, data_url
from gmai_xtuner.evaluate.store import Job
from tests.evaluate.api_server import Reply, pictures_of, serve


def jobs(number: int, **changes) -> list[Job]:
    return [Job(f"q{n}", f"Question {n}?", (), 16, "p/1", **changes) for n in range(number)]


def ask(server, asked, **options):
    defaults = {"model": "tiny", "endpoint": server.url, "in_flight": 4, "retries": 3}
    answerer = EndpointAnswerer(ModelOptions(**{**defaults, **options}))
    return {one.job.id: one for batch in answerer.answers(asked) for one in batch}


def test_texts_images_and_settings_arrive(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).save(tmp_path / "b.jpg")
    deep = (np.arange(72, dtype=np.uint16).reshape(8, 9) * 900).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    asked = [
        Job("first", "What?", (tmp_path / "a.png",), 16, "p/1"),
        Job(
            "two",
            "Is <image> newer than <image>?",
            (tmp_path / "b.jpg", tmp_path / "deep.png"),
            7,
            "p/1",
        ),
        Job("bytes", "None of a file", ((tmp_path / "a.png").read_bytes(),), 16, "p/1"),
    ]
    with serve(lambda text, before, request: Reply(text=f"  to {text}\n")) as server:
        found = ask(server, asked, api_key_env="SOME_KEY")
    assert found["first"].text == "to What?"
    assert found["first"].seconds > 0
    by_text = dict(zip(server.texts(), server.requests, strict=True))
    first = by_text["What?"]
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("tiny", 0.0, 16)
    assert [part["type"] for part in first["messages"][0]["content"]] == ["image_url", "text"]
    ((kind, picture),) = pictures_of(first)
    assert kind == "image/png"
    assert (np.asarray(picture) == pixels).all()
    two = next(one for text, one in by_text.items() if "newer" in text)
    assert [part["type"] for part in two["messages"][0]["content"]] == [
        *["text", "image_url"] * 2,
        "text",
    ]
    (jpeg, _), (png, eight) = pictures_of(two)
    assert (jpeg, png, eight.mode) == ("image/jpeg", "image/png", "RGB")  # 16 bits as ours see them
    assert set(server.keys) == {"Bearer secret"}


def test_a_jpeg_goes_as_it_is_unless_it_must_be_turned(tmp_path):
    import base64

    picture = Image.new("RGB", (8, 4))
    picture.save(tmp_path / "plain.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    plain = data_url(tmp_path / "plain.jpg", "x")
    assert base64.b64decode(plain.split(",")[1]) == (tmp_path / "plain.jpg").read_bytes()
    assert data_url(tmp_path / "turned.jpg", "x").startswith("data:image/png")


def test_a_busy_or_broken_server_is_asked_again():
    trouble = {
        "Question 0?": Reply(429, "slow down", (("Retry-After", "0.9"),)),
        "Question 1?": Reply(500, "oops"),
        "Question 2?": Reply(cut=True),
        "Question 3?": Reply(body={"choices": []}),
        "Question 4?": Reply(
            503, "down", (("Retry-After", formatdate(time.time() + 1, usegmt=True)),)
        ),
    }
    with serve(
        lambda text, before, request: trouble.get(text, Reply()) if not before else Reply(text="B")
    ) as server:
        found = ask(server, jobs(6))
    assert {name: one.text for name, one in found.items()} == {
        **{f"q{n}": "B" for n in range(5)},
        "q5": "A",
    }
    assert server.seen == {**{f"Question {n}?": 2 for n in range(5)}, "Question 5?": 1}
    first, second = (
        moment
        for moment, text in zip(server.times, server.texts(), strict=True)
        if text == "Question 0?"
    )
    assert (
        second - first >= 0.88
    )  # as the server asked; our own first wait is half a second at most


def test_a_question_that_the_server_refuses_is_counted_and_the_others_asked():
    def behave(text, before, request):
        return Reply(400, "content filter") if text == "Question 1?" else Reply()

    with serve(behave) as server:
        found = ask(server, jobs(4))
    assert (found["q1"].text, found["q1"].problem) == (None, "refused_by_server")
    assert found["q1"].detail == "HTTP 400: content filter"
    assert sum(one.text == "A" for one in found.values()) == 3
    assert server.seen["Question 1?"] == 1


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (401, "Is the key in the environment variable OPENAI_API_KEY right?"),
        (403, "May the key in OPENAI_API_KEY use this model?"),
        (404, "Is there a model 'tiny'?"),
    ],
)
def test_a_wrong_key_or_address_stops_at_once(status, told):
    with serve(lambda text, before, request: Reply(status, "no")) as server:
        with pytest.raises(EvaluationError) as caught:
            ask(server, jobs(50))
        assert len(server.requests) <= 4
    assert told in str(caught.value)
    assert f"HTTP {status}" in str(caught.value)


def test_a_server_that_refuses_every_request_is_not_asked_50_times():
    with serve(lambda text, before, request: Reply(400, "no images here")) as server:
        with pytest.raises(EvaluationError, match=r"has refused the first . requests") as caught:
            ask(server, jobs(50))
        assert len(server.requests) <= 8
    assert "no images here" in str(caught.value)


def test_a_server_that_fails_half_way_stops_the_run_and_what_was_answered_stands():
    def behave(text, before, request):
        return Reply() if len(server.requests) <= 5 else Reply(500, "gone")

    with serve(behave) as server:
        answerer = EndpointAnswerer(
            ModelOptions(model="tiny", endpoint=server.url, in_flight=1, retries=0)
        )
        found, answers = [], answerer.answers(jobs(20))
        with pytest.raises(EvaluationError, match="run the same command again when the server"):
            found.extend(one for batch in answers for one in batch)
    assert [one.text for one in found] == [*["A"] * 5, None, None]
    assert found[-1].problem == "server_failed"


def test_nobody_there():
    with pytest.raises(EvaluationError, match="gives no answer: 2 attempts"):
        ask(type("Nobody", (), {"url": "http://127.0.0.1:9/v1"}), jobs(2), retries=1)


def test_a_newer_model_takes_the_length_under_its_new_name():
    def behave(text, before, request):
        if "max_tokens" in request:
            return Reply(400, "Unsupported parameter: use 'max_completion_tokens' instead.")
        return Reply()

    with serve(behave) as server:
        found = ask(server, jobs(12), temperature=None)
    assert all(one.text == "A" for one in found.values())
    assert "temperature" not in server.requests[0]
    assert sum("max_tokens" in request for request in server.requests) <= 4
    assert server.requests[-1]["max_completion_tokens"] == 16


def test_as_many_requests_are_under_way_as_wanted():
    eight = threading.Barrier(8, timeout=20)  # nobody is answered before eight are there

    def behave(text, before, request):
        eight.wait()
        return Reply()

    with serve(behave) as server:
        found = ask(server, jobs(24), in_flight=8)
    assert len(found) == 24
    assert server.most_at_once == 8


def test_an_unreadable_image_is_counted_and_nothing_is_sent(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n....")
    with serve(lambda text, before, request: Reply()) as server:
        found = ask(server, [Job("bad", "?", (tmp_path / "bad.png",), 8, "p/1"), *jobs(1)])
    assert found["bad"].problem == "damaged_image"
    assert server.texts() == ["Question 0?"]


def test_leaving_early_ends_the_requests():
    with serve(lambda text, before, request: Reply(seconds=0.05)) as server:
        answerer = EndpointAnswerer(ModelOptions(model="tiny", endpoint=server.url, in_flight=2))
        answers = answerer.answers(jobs(200))
        next(answers)
        answers.close()
        asked = len(server.requests)
        time.sleep(0.2)
    assert asked <= 8
    assert len(server.requests) == asked


def test_the_address_and_the_name_are_what_stands_for_the_model():
    def digest(**options):
        return EndpointAnswerer(ModelOptions(**options)).model

    one = digest(model="m", endpoint="http://a/v1/")
    assert one == digest(model="m", endpoint="http://a/v1")
    assert (
        len(
            {
                one,
                digest(model="n", endpoint="http://a/v1"),
                digest(model="m", endpoint="http://b/v1"),
            }
        )
        == 3
    )


def test_half_a_surrogate_pair_is_a_failed_reply():
    def behave(text, before, request):
        return Reply(text="left \ud800 lung" if "1?" in text else "yes")

    with serve(behave) as server:
        found = ask(server, jobs(3))
    assert [found[f"q{n}"].text for n in range(3)] == ["yes", None, "yes"]
    assert found["q1"].problem == "not_text"
    assert found["q1"].detail == r"no UTF-8 can hold the reply left \ud800 lung"


def test_half_a_surrogate_pair_in_an_error_is_told_readably():
    with (
        serve(lambda text, before, request: Reply(400, "bad \ud800")) as server,
        pytest.raises(EvaluationError, match=r"HTTP 400: bad \\ud800"),
    ):
        ask(server, jobs(6), in_flight=1)
