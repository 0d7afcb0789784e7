# SPDX-License-Identifier: Apache-2.0

"""Answers in pieces, one question at a time, stopped, failed, too long; with a real small model."""

import asyncio
import io
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gmai_xtuner.core.imaging.images import open_rgb
from gmai_xtuner.demo.conversation import Answering, LoadedModel, Session, counted
from gmai_xtuner.demo.files import open_files
from gmai_xtuner.demo.i18n import ERRORS, WORDS, PageError
from gmai_xtuner.demo.studies import Limits, Memory, View, Volume, photograph
from gmai_xtuner.inference_queue import InferenceQueue
from gmai_xtuner.loading import load_model
from tests import medical_files as made
from tests.demo.conftest import BOX, ENDLESS, NO_BOX, WHERE


@pytest.fixture(scope="module")
def loaded(models) -> list[LoadedModel]:
    return [LoadedModel(folder.name, load_model(folder, device="cpu")) for folder in models]


def visitor(answering: Answering, ct=None, *, question: str = WHERE, tokens: int = 64):
    session = Session(len(answering.models), Limits())
    session.settings.max_new_tokens = tokens
    if ct is not None:
        session.attach(photograph(ct))
    exchange = session.ask(question)
    session.exchanges.append(exchange)
    return session, exchange


def test_both_models_answer_in_pieces_what_they_answer_alone(loaded, ct):
    answering = Answering(loaded, max_waiting=4)
    session, exchange = visitor(answering, ct)
    seen: list[tuple[int, str]] = []

    def changed(model: int) -> None:
        seen.append((model, exchange.answers[model].text))

    answering.check(session, exchange)
    asyncio.run(answering.answer(session, exchange, changed))
    assert [answer.text for answer in exchange.answers] == [BOX, NO_BOX]
    for model, answer in zip(loaded, exchange.answers, strict=True):
        assert answer.text == model.predictor.answer(WHERE, [ct], max_new_tokens=64)
        assert answer.state == "done"
        assert not answer.is_cut
    parts = [text for model, text in seen if model == 0 and text]
    assert len(parts) > 5
    assert all(BOX.startswith(part) for part in parts)


def test_visitors_wait_for_each_other(loaded, ct):
    answering = Answering(loaded[:1], max_waiting=4)
    visitors = [visitor(answering, ct, tokens=64) for _ in range(3)]
    order: list[int] = []
    ahead: list[set[int]] = [set() for _ in visitors]

    async def one(number: int) -> None:
        session, exchange = visitors[number]

        def changed(_: int) -> None:
            order.append(number)
            ahead[number].add(exchange.answers[0].ahead)

        await answering.answer(session, exchange, changed)

    async def all_of_them() -> None:
        await asyncio.gather(*(one(number) for number in range(3)))

    asyncio.run(all_of_them())
    assert [exchange.answers[0].text for _, exchange in visitors] == [BOX] * 3
    assert [max(places) for places in ahead] == [0, 1, 2]
    writing = [number for number in order if order.count(number) > 3]
    last = {number: len(writing) - writing[::-1].index(number) for number in range(3)}
    assert last[0] < last[1] < last[2]


def test_a_full_queue_says_so(loaded, ct):
    answering = Answering(loaded[:1], max_waiting=0)
    visitors = [visitor(answering, ct, tokens=5) for _ in range(3)]

    async def all_of_them() -> None:
        await asyncio.gather(*(answering.answer(*one, lambda _: None) for one in visitors))

    asyncio.run(all_of_them())
    states = [exchange.answers[0].state for _, exchange in visitors]
    assert visitors[0][1].answers[0].is_cut
    assert states == ["done", "failed", "failed"]
    assert visitors[1][1].answers[0].failure.key == "busy"


def test_stopping_ends_the_model_and_lets_the_next_one_in(loaded, ct):
    answering = Answering(loaded, max_waiting=4)
    session, exchange = visitor(answering, question=ENDLESS, tokens=4000)
    waiting = visitor(answering, ct)

    def changed(model: int) -> None:
        if len(exchange.answers[0].text) > 20:
            session.stop.set()

    async def both() -> None:
        await asyncio.gather(
            answering.answer(session, exchange, changed), answering.answer(*waiting, lambda _: None)
        )

    begin = time.monotonic()
    asyncio.run(both())
    assert time.monotonic() - begin < 20
    assert [answer.state for answer in exchange.answers] == ["stopped", "stopped"]
    assert len(exchange.answers[0].text) > 20
    assert exchange.answers[1].text == ""
    assert waiting[1].answers[0].text == BOX


def test_who_gives_up_while_waiting_is_not_answered():
    async def run() -> list[bool]:
        queue, given_up, mine = InferenceQueue(max_waiting=5), threading.Event(), []
        async with queue.turn(give_up=threading.Event()) as first:
            mine.append(first)

            async def second() -> None:
                async with queue.turn(give_up=given_up) as turn:
                    mine.append(turn)

            task = asyncio.create_task(second())
            await asyncio.sleep(0.15)
            given_up.set()
            await task
        return mine

    assert asyncio.run(run()) == [True, False]


def test_a_failure_is_said_without_its_details_and_the_next_question_is_answered(
    loaded, ct, monkeypatch
):
    answering = Answering(loaded[:1], max_waiting=4)
    session, exchange = visitor(answering, ct)

    def fail(*args, **kwargs):
        raise RuntimeError("secret path")

    with monkeypatch.context() as patched:
        patched.setattr(loaded[0].predictor.model.llm, "forward", fail)
        asyncio.run(answering.answer(session, exchange, lambda _: None))
    answer = exchange.answers[0]
    assert (answer.state, answer.failure.key) == ("failed", "model_failed")
    assert "secret" not in answer.failure.said("en")

    def out_of_memory(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(loaded[0].predictor.model.llm, "forward", out_of_memory)
        asyncio.run(answering.answer(session, exchange, lambda _: None))
    assert exchange.answers[0].failure.key == "out_of_memory"
    session, exchange = visitor(answering, ct)
    asyncio.run(answering.answer(session, exchange, lambda _: None))
    assert exchange.answers[0].text == BOX


def test_a_conversation_that_does_not_fit_is_refused_before_it_is_asked(loaded, ct):
    answering = Answering(loaded, max_waiting=4)
    session, exchange = visitor(answering, ct)
    # <s>, the template and the question, and 64 tokens of the image
    prompt = len(loaded[0].predictor.encoder.encode_prompt((exchange.turn,))) + 63
    assert loaded[0].tokens(*session.history(0, exchange)) == prompt
    limit = loaded[0].predictor.context_length
    session.settings.max_new_tokens = 4096
    answering.check(session, exchange)
    session.settings.system = "word " * limit
    with pytest.raises(PageError) as error:
        answering.check(session, exchange)
    assert error.value.key == "too_long"
    assert error.value.values["limit"] == limit


def test_an_iterator_in_a_thread_is_closed_when_nobody_reads_on():
    closed = threading.Event()

    def pieces():
        try:
            for number in range(1000):
                yield str(number)
                time.sleep(0.01)
        finally:
            closed.set()

    async def read_two() -> list[str]:
        read = []
        reader = InferenceQueue(max_waiting=0).pieces(pieces())
        async for piece in reader:
            read.append(piece)
            if len(read) == 2:
                break
        await reader.aclose()
        return read

    assert asyncio.run(read_two()) == ["0", "1"]
    assert closed.is_set()


def test_shapes_are_told(loaded):
    assert loaded[0].facts == "1.3 M parameters · float32 · 4.8 MiB of weights on cpu"
    assert [counted(n) for n in (7_757_000_000, 303_500_000, 20_979_712, 914_000, 12)] == [
        "7.76 B",
        "303.5 M",
        "21.0 M",
        "914.0 k",
        "12",
    ]


# --- Uploads, opened by their content, and the limits ---


def opened(tmp_path: Path, limits: Limits | None = None, **contents: bytes):
    uploads = []
    for number, (name, content) in enumerate(contents.items()):
        path = tmp_path / str(number)
        path.write_bytes(content)
        uploads.append((name, path))
    return open_files(uploads, limits or Limits())


def png(size=(8, 6), mode="RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, **options).save(buffer, "PNG")
    return buffer.getvalue()


def test_sixteen_bits_are_read_as_in_training(tmp_path):
    ramp = np.linspace(1000, 3000, 48).astype(np.uint16).reshape(6, 8)
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, "TIFF")
    (one,) = opened(tmp_path, scan=buffer.getvalue())
    pixels = np.asarray(one.study.render(View()))
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert np.array_equal(pixels, np.asarray(open_rgb(tmp_path / "0")))


def test_bad_files_do_not_keep_good_ones_out(tmp_path):
    archive = io.BytesIO()
    zipfile.ZipFile(archive, "w").writestr("a.png", png())
    contents = {"text": b"hello, this is no picture", "zip": archive.getvalue()}
    found = opened(tmp_path, good=png(), empty=b"", cut=png()[:40], **contents)
    assert [(one.name, getattr(one.study, "key", "opened")) for one in found] == [
        ("good", "opened"),
        ("empty", "empty_file"),
        ("cut", "damaged"),
        ("text", "unsupported"),
        ("zip", "zip"),
    ]


def test_pixels_are_limited(tmp_path):
    (one,) = opened(tmp_path, Limits(pixels=40), big=png((8, 6)))
    assert one.study.said("en") == (
        "The picture has more than 40 pixels. Shrink it, or cut out the part that matters."
    )
    assert "40" in one.study.said("zh")


def test_files_of_a_series_that_come_together_are_one_volume(tmp_path):
    slices = {f"IM{at}": made.as_bytes(data) for at, data in enumerate(made.series())}
    found = opened(tmp_path, **slices, photo=png())
    assert [one.name for one in found] == ["photo", "IM0"]
    assert isinstance(found[1].study, Volume)


def test_memory_is_counted():
    memory = Memory(100)
    memory.take(60)
    with pytest.raises(PageError, match="no room"):
        memory.take(41)
    memory.give_back(60)
    memory.take(100)
    assert memory.used == 100


def test_every_word_has_both_languages():
    for key, pair in {**WORDS, **ERRORS}.items():
        english, chinese = pair["en"], pair["zh"]
        assert english, key
        assert chinese, key
        fields = [
            sorted(part.split("}")[0] for part in text.split("{")[1:])
            for text in (english, chinese)
        ]
        assert fields[0] == fields[1], key
        if key not in ("top_p",):
            assert any("\u4e00" <= letter <= "\u9fff" for letter in chinese), key
