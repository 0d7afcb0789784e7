# SPDX-License-Identifier: Apache-2.0

"""A real server that answers, is busy, breaks, refuses, cuts connections and comes back."""

import base64
import time
from email.utils import formatdate

import numpy as np
import pytest
from PIL import Image

from gmai_xtuner.core.errors import EvaluationError
from gmai_xtuner.evaluate.answerers import ModelOptions
from gmai_xtuner.evaluate.answerers.endpoint import EndpointAnswerer, data_url
from gmai_xtuner.evaluate.store import Job
from tests.api_server import Act, ApiServer, completion, error, images_of, user_text


def serve(script=None, *, answer="A", **more) -> ApiServer:
    return ApiServer(script, answer=lambda text: answer, **more)


def jobs(number: int) -> list[Job]:
    return [Job(f"q{n}", f"Question {n}?", (), 16, "p/1") for n in range(number)]


def answerer(server, **options) -> EndpointAnswerer:
    defaults = {"model": "tiny", "endpoint": server.url, "in_flight": 4, "retries": 3}
    return EndpointAnswerer(ModelOptions(**{**defaults, **options}))


def ask(server, asked, **options):
    found = answerer(server, **options).answers(asked)
    return {one.job.id: one for batch in found for one in batch}


def test_texts_images_and_settings_arrive(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    png, jpeg, deep = (tmp_path / name for name in ("a.png", "b.jpg", "deep.png"))
    Image.fromarray(pixels).save(png)
    Image.fromarray(pixels).save(jpeg)
    Image.fromarray(np.arange(72, dtype=np.uint16).reshape(8, 9) * 900).save(deep)
    asked = [
        Job("first", "What?", (png,), 16, "p/1"),
        Job("two", "Is <image> newer than <image>?", (jpeg, deep), 7, "p/1"),
        Job("bytes", "None of a file", (png.read_bytes(),), 16, "p/1"),
    ]
    with serve(answer="  to you\n", key="secret") as server:
        found = ask(server, asked, api_key_env="SOME_KEY")
    assert found["first"].text == "to you"
    assert found["first"].seconds > 0
    by_text = {user_text(body): body for body in server.requests}
    first = by_text["What?"]
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("tiny", 0.0, 16)
    assert [part["type"] for part in first["messages"][0]["content"]] == ["image_url", "text"]
    ((kind, image),) = images_of(first)
    assert kind == "image/png"
    assert (np.asarray(image) == pixels).all()
    two = next(body for text, body in by_text.items() if "newer" in text)
    kinds = [part["type"] for part in two["messages"][0]["content"]]
    assert kinds == [*["text", "image_url"] * 2, "text"]
    (first_kind, _), (second_kind, eight) = images_of(two)
    # 16 bits as our own models see them
    assert (first_kind, second_kind, eight.mode) == ("image/jpeg", "image/png", "RGB")


def test_a_jpeg_goes_as_it_is_unless_it_must_be_turned(tmp_path):
    image = Image.new("RGB", (8, 4))
    image.save(tmp_path / "plain.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    plain = data_url(tmp_path / "plain.jpg", "x")
    assert base64.b64decode(plain.split(",")[1]) == (tmp_path / "plain.jpg").read_bytes()
    assert data_url(tmp_path / "turned.jpg", "x").startswith("data:image/png")


def test_a_busy_or_broken_server_is_asked_again():
    date = formatdate(time.time() + 1, usegmt=True)
    trouble = {
        "Question 0?": error(429, "slow down", Retry_After="0.9"),
        "Question 1?": error(500, "oops"),
        "Question 2?": Act(kind="cut"),
        "Question 3?": completion("B") | {"choices": []},
        "Question 4?": error(503, "down", Retry_After=date),
    }

    def script(body, number):
        return trouble.get(user_text(body)) if number == 0 else None

    with serve(script) as server:
        found = ask(server, jobs(6))
    assert {one.text for one in found.values()} == {"A"}
    assert server.texts == {**{f"Question {n}?": 2 for n in range(5)}, "Question 5?": 1}
    times = zip(server.times, server.requests, strict=True)
    first, second = (moment for moment, body in times if user_text(body) == "Question 0?")
    # As the server asked; our own first wait is half a second at most.
    assert second - first >= 0.88


@pytest.mark.parametrize(("said", "detail"), [("filter", "filter"), ("bad \ud800", r"bad \ud800")])
def test_a_question_that_the_server_refuses_is_counted_and_the_others_asked(said, detail):
    refused = error(400, said)
    with serve(lambda body, n: refused if user_text(body) == "Question 1?" else None) as server:
        found = ask(server, jobs(4))
    assert (found["q1"].text, found["q1"].problem) == (None, "refused_by_server")
    assert found["q1"].detail == f"HTTP 400: {detail}"
    assert sum(one.text == "A" for one in found.values()) == 3
    assert server.texts["Question 1?"] == 1


@pytest.mark.parametrize(
    ("status", "told"),
    [(401, "OPENAI_API_KEY"), (403, "this model"), (404, "model tiny"), (402, "no money")],
)
def test_what_refuses_every_request_stops_at_once(status, told):
    with serve(lambda body, n: error(status, "no")) as server:
        with pytest.raises(EvaluationError, match=f"HTTP {status}") as caught:
            ask(server, jobs(50))
        assert len(server.requests) <= 4
    assert told in str(caught.value)


def test_a_server_that_refuses_the_first_requests_is_not_asked_50_times():
    with serve(lambda body, n: error(400, "no images here")) as server:
        with pytest.raises(EvaluationError, match=r"has refused the first . .*no images here"):
            ask(server, jobs(50))
        assert len(server.requests) <= 8


def test_a_server_that_fails_half_way_stops_the_run_and_what_was_answered_stands():
    with serve(lambda body, n: error(500, "gone") if len(server.requests) > 5 else None) as server:
        found, answers = [], answerer(server, in_flight=1, retries=0).answers(jobs(20))
        with pytest.raises(EvaluationError, match="run the same command again when the server"):
            found.extend(one for batch in answers for one in batch)
    assert [one.text for one in found] == [*["A"] * 5, None, None]
    assert found[-1].problem == "server_failed"


def test_a_newer_model_takes_the_length_under_its_new_name():
    refusal = error(400, "Unsupported parameter: use 'max_completion_tokens' instead.")
    with serve(lambda body, n: refusal if "max_tokens" in body else None) as server:
        found = ask(server, jobs(12), temperature=None)
    assert all(one.text == "A" for one in found.values())
    assert "temperature" not in server.requests[0]
    assert sum("max_tokens" in body for body in server.requests) <= 4
    assert server.requests[-1]["max_completion_tokens"] == 16


def test_as_many_requests_are_under_way_as_wanted():
    with serve(latency=0.3) as server:
        found = ask(server, jobs(24), in_flight=8)
    assert len(found) == 24
    assert server.most == 8


def test_an_unreadable_image_is_counted_and_nothing_is_sent(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n....")
    with serve() as server:
        found = ask(server, [Job("bad", "?", (tmp_path / "bad.png",), 8, "p/1"), *jobs(1)])
    assert found["bad"].problem == "damaged_image"
    assert server.texts == {"Question 0?": 1}


def test_leaving_early_ends_the_requests():
    with serve(latency=0.05) as server:
        answers = answerer(server, in_flight=2).answers(jobs(200))
        next(answers)
        answers.close()
        asked = len(server.requests)
        time.sleep(0.2)
    assert asked <= 8
    assert len(server.requests) == asked


def test_the_address_and_the_name_are_what_stands_for_the_model():
    pairs = [
        ("m", "http://a/v1/"),
        ("m", "http://a/v1"),
        ("n", "http://a/v1"),
        ("m", "http://b/v1"),
    ]
    one, same, *others = (
        EndpointAnswerer(ModelOptions(model=model, endpoint=url)).model for model, url in pairs
    )
    assert one == same
    assert len({one, *others}) == 3


def test_half_a_surrogate_pair_is_a_failed_reply():
    odd = completion("left \ud800 lung")
    with serve(lambda body, n: odd if "1?" in user_text(body) else None) as server:
        found = ask(server, jobs(3))
    assert [found[f"q{n}"].text for n in range(3)] == ["A", None, "A"]
    assert found["q1"].problem == "not_text"
    assert found["q1"].detail == r"no UTF-8 can hold the reply left \ud800 lung"
