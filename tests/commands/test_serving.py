# SPDX-License-Identifier: Apache-2.0

"""Who else serves, transformers' own server with the plain export; and our clients with our server.

``transformers serve`` runs in the environment of the newest transformers, without a line of our code. A test
of what it does that a hospital should know (docs/serving.md) tells when it no longer does.
"""

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import httpx2
import numpy as np
import openai
import pytest
import yaml
from PIL import Image

from gmai_xtuner.chat.__main__ import main as chat
from gmai_xtuner.core.conversation import Turn
from gmai_xtuner.evaluate.answerers import ModelOptions
from gmai_xtuner.evaluate.answerers.endpoint import EndpointAnswerer
from gmai_xtuner.evaluate.store import Job
from gmai_xtuner.generate import Predictor, user_turn
from gmai_xtuner.loading import load_model
from tests.commands.serving import transformers_serve
from tests.data_tools.conftest import draw, generate, source_of
from tests.exports import write_export
from tests.test_serve import CASES as ANSWERS
from tests.test_serve import picture, serving, user

pytestmark = pytest.mark.slow

LENGTH = 12


@pytest.fixture(scope="module")
def exports(tiny_bases, tmp_path_factory) -> tuple[Path, Path]:
    """The same model in xtuner's layout and as a plain LLaVA."""
    folder = tmp_path_factory.mktemp("serving")
    ours, plain = folder / "ours", folder / "plain"
    write_export(tiny_bases, ours, plain, save_formats=("xtuner", "huggingface"))
    return ours, plain


@pytest.fixture(scope="module")
def predictor(exports) -> Predictor:
    return load_model(exports[0])


@pytest.fixture(scope="module")
def client(exports) -> Iterator[openai.OpenAI]:
    """Of ``transformers serve PLAIN``, which calls the model by its path."""
    with transformers_serve(exports[1]) as made:
        yield made


CASES = {
    **{case: ANSWERS[case] for case in ("text", "image", "two images")},
    "several turns": (
        [
            {"role": "system", "content": "You are a radiologist."},
            user(picture(0), "图中显示什么？"),
            {"role": "assistant", "content": "胸部X光片。"},
            {"role": "user", "content": "有气胸吗？"},
        ],
        [
            Turn("system", "You are a radiologist."),
            user_turn("图中显示什么？", 1),
            Turn("assistant", "胸部X光片。"),
            Turn("user", "有气胸吗？"),
        ],
        [0],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_transformers_serve_gives_the_greedy_answer_of_ours(client, exports, predictor, case):
    messages, turns, images = CASES[case]
    expected = predictor.generate(turns, [picture(n) for n in images], max_new_tokens=LENGTH)
    asked = {"model": str(exports[1]), "messages": messages, "max_tokens": LENGTH, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    assert expected
    assert whole.choices[0].message.content.strip() == expected
    assert whole.usage.completion_tokens == LENGTH
    chunks = list(client.chat.completions.create(**asked, stream=True))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert len([piece for piece in pieces if piece]) > 1
    # Its streams decode half a character otherwise, which only a model without training ends in.
    assert readable("".join(pieces)) == readable(expected)
    assert chunks[-1].choices[0].finish_reason == "length"


def readable(answer: str) -> str:
    return answer.split("\ufffd")[0].strip()


@pytest.mark.parametrize("layout", [0, 1])
def test_chat_gives_the_same_answer_from_both_layouts(exports, predictor, capfd, tmp_path, layout):
    paths = [tmp_path / "tall.png", tmp_path / "wide.png"]
    picture(1).save(paths[0])
    picture(2).save(paths[1])
    images = [argument for path in paths for argument in ("--image", str(path))]
    options = ["--question", "比较。", "--max-new-tokens", str(LENGTH)]
    assert chat([str(exports[layout]), *images, *options]) == 0
    expected = predictor.answer("比较。", paths, max_new_tokens=LENGTH)
    assert capfd.readouterr().out == expected + "\n"


def about(image: str | Path, words: str = "x") -> list[dict]:
    """A question about an image at an address."""
    part = {"type": "image_url", "image_url": {"url": str(image)}}
    return [{"role": "user", "content": [part, {"type": "text", "text": words}]}]


def inline(path: Path, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def test_what_a_hospital_should_know_of_transformers_serve(client, exports, tmp_path):
    """docs/serving.md says these; where one fails, the page has to change."""

    def post(**fields) -> httpx2.Response:
        body = {"model": str(exports[1]), "max_tokens": 1, "temperature": 0} | fields
        with httpx2.Client(timeout=60) as connection:
            return connection.post(f"{client.base_url}chat/completions", json=body)

    path = tmp_path / "of_the_server.png"
    picture(0).save(path)
    assert post(messages=about(path)).status_code == 200, "opens files"
    answer = post(messages=about("data:image/png;base64,AAAA"))
    assert (answer.status_code, answer.text) == (500, "Internal Server Error")
    picture(0).save(path, "TIFF")
    assert post(messages=about(inline(path, "tiff"))).status_code == 500, "reads no TIFF"
    other = post(model="other", messages=[{"role": "user", "content": "x"}])
    assert (other.status_code, "error" in other.json()) == (400, False)


def test_16_bit_images_are_not_scaled_by_transformers_serve(client, exports, predictor, tmp_path):
    """Its model sees values of up to 65,535 where it knows 0 to 255; ours sees what training saw."""
    path = tmp_path / "16_bits.png"
    values = np.random.default_rng(0).integers(0, 4096, (40, 40), dtype=np.uint16)
    Image.fromarray(values).save(path)
    answer = client.chat.completions.create(
        model=str(exports[1]),
        messages=about(inline(path, "png"), "What is shown?"),
        max_tokens=LENGTH,
        temperature=0,
    )
    said = answer.choices[0].message.content.strip()

    def ours(image) -> str:
        return predictor.answer("What is shown?", [image], max_new_tokens=LENGTH)

    assert ours(path) == ours(
        Image.fromarray(np.rint(values * (255 / values.max())).astype(np.uint8))
    )
    white, high_byte = (
        Image.open(path).convert("RGB"),
        Image.fromarray((values >> 8).astype("uint8")),
    )
    assert said not in (ours(path), ours(white), ours(high_byte))


def test_the_evaluator_gets_the_answers_of_the_model_from_our_server(predictor, tmp_path):
    for number in range(3):
        picture(number, (30, 20 + 20 * number)).save(tmp_path / f"{number}.png")
    jobs = [
        Job("one", "What is shown? 图中显示什么？", (tmp_path / "0.png",), LENGTH, "test/1"),
        Job("two", "Compare.", (tmp_path / "1.png", tmp_path / "2.png"), LENGTH, "test/1"),
        Job("none", "Is it CT?", (), LENGTH, "test/1"),
    ]
    with serving(predictor) as served:
        options = ModelOptions("my-model", endpoint=str(served.base_url), in_flight=2)
        given = [one for some in EndpointAnswerer(options).answers(jobs) for one in some]
    assert {one.job.id: one.text for one in given} == {
        job.id: predictor.answer(job.prompt, job.images, max_new_tokens=LENGTH) for job in jobs
    }


def test_the_corpus_builder_asks_our_server(predictor, tmp_path):
    """It asks for a form that the server refuses, learns that, and gets an answer for every request."""
    for number in range(2):
        draw(tmp_path / "classes" / ("NORM", "TUM")[number] / f"{number}.png", number)
    with serving(predictor) as served:
        writer = {
            "name": "openai", "model": "my-model", "base_url": str(served.base_url),
            "key_variable": None, "cache": str(tmp_path / "answers.sqlite"), "retries": 0,
            "seeded": True, "parameters": {"repetition_penalty": 1.1},
        }  # fmt: skip
        make = {
            "caption": 1, "region_caption": 0, "instruction": 1, "dialogue": 0, "perception": 0,
            "text_single": 0, "text_multi": 0, "chinese": 0,
        }  # fmt: skip
        job = tmp_path / "job.yaml"
        job.write_text(
            yaml.safe_dump(
                {
                    "output": "out",
                    "workers": 1,
                    "sources": [source_of(tmp_path / "classes")],
                    "make": make,
                    "writer": writer,
                    "corpus": {"held_out": 0},
                }
            )
        )
        done = generate(job)
    assert done.returncode == 0, done.stderr
    usage = json.loads((tmp_path / "out" / "summary.json").read_text())["usage"]
    assert usage["requests"] == 4
    assert usage["prompt_tokens"] > 4 * 64, "no image arrived"
    # A model without training writes no JSON; each of its answers is kept with the reason.
    lines = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    reasons = [json.loads(line)["reason"] for line in lines]
    assert len(reasons) == 4
    assert set(reasons) <= {"answer cut at its greatest length", "answer isn't JSON"}
