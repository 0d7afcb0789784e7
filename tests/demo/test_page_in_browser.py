# SPDX-License-Identifier: Apache-2.0

"""The page as a visitor meets it: the real command, a real browser, small models."""

import base64
import io
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from gmai_xtuner.demo.boxes import Box, draw_boxes
from gmai_xtuner.demo.i18n import PRESETS
from gmai_xtuner.loading import load_model
from tests import medical_files as made
from tests.demo.browsing import WAIT, ask, at, done, upload
from tests.demo.conftest import BOX, CT_EXAMPLE, ENDLESS, NO_BOX, WHERE

pytestmark = pytest.mark.slow

UPLOAD_MB = 2


@dataclass(frozen=True)
class Served:
    url: str
    log: Path


@pytest.fixture(scope="module")
def served(models, tmp_path_factory) -> Iterator[Served]:
    """The command with both models, until the module's tests are done; it must end well and quietly."""
    folder = tmp_path_factory.mktemp("served")
    log = folder / "log"
    with log.open("w") as errors:
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "gmai_xtuner.demo", *map(str, models)),
                *("--port", "0", "--device", "cpu", "--max-upload-mb", str(UPLOAD_MB)),
            ],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert server.stdout is not None
    said = ""
    try:
        for line in server.stdout:
            said += line
            if found := re.match(r"open (http://127\.0\.0\.1:\d+/)", line):
                break
        else:
            pytest.fail(f"the page did not start: {said}\n{log.read_text()[-3000:]}")
        assert "model_a: 1.3 M parameters · float32" in said
        yield Served(found[1], log)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=30)
    assert server.returncode == 0
    assert "Traceback" not in log.read_text()
    assert [path.name for path in folder.iterdir()] == ["log"], "the page writes nothing"


@pytest.fixture
def page(browser, served) -> Iterator[Page]:
    """The page, open; nothing may be asked of another machine, and the browser may have no complaint."""
    context = browser.new_context(viewport={"width": 1360, "height": 900})
    context.set_default_timeout(WAIT)
    opened = context.new_page()
    asked: list[str] = []
    complaints: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("websocket", lambda socket: asked.append(socket.url))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on(
        "console",
        lambda said: said.type == "error" and complaints.append(f"{said.text} {said.location}"),
    )
    opened.goto(served.url)
    expect(at(opened, "ask")).to_be_visible(timeout=WAIT)
    yield opened
    context.close()
    assert len(asked) > 5
    outside = [url for url in asked if urlsplit(url).hostname not in ("127.0.0.1", None)]
    assert outside == []
    assert {urlsplit(url).scheme for url in asked} <= {"http", "ws", "data", "blob"}
    assert complaints == []


def pixels(picture: Locator) -> np.ndarray:
    """Of an ``<img>``, as sent."""
    source = picture.get_attribute("src") or ""
    assert source.startswith("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))


def slide(page: Page, name: str, key: str, times: int = 1) -> None:
    """Move a slider by the keyboard."""
    handle = at(page, name).locator("[tabindex='0']")
    handle.focus()
    for _ in range(times):
        handle.press(key)


def test_two_models_answer_an_example_in_pieces_with_the_box_drawn(page, models, ct):
    at(page, f"example-{CT_EXAMPLE}").click()
    expect(at(page, "image-facts")).to_have_text("Image 1 · DICOM · CT · 128 × 128")
    at(page, "preset-localisation").click()
    expect(at(page, "question")).to_have_value(PRESETS[3].question["en"])
    assert PRESETS[3].question["en"] == WHERE
    page.evaluate(
        """() => { window.parts = new Set(); new MutationObserver(() => {
          const text = document.querySelector('[data-testid=answer-0] [data-testid=text]');
          if (text) window.parts.add(text.textContent);
        }).observe(document.body, {childList: true, subtree: true, characterData: true}); }"""
    )
    at(page, "ask").click()
    first, second = done(page, 0), done(page, 1)
    texts = [one.get_by_test_id("text").inner_text() for one in (first, second)]
    for folder, text in zip(models, texts, strict=True):
        assert text == load_model(folder, device="cpu").answer(WHERE, [ct])
    assert texts == [BOX, NO_BOX]
    parts = page.evaluate("() => [...window.parts]")
    assert len(parts) > 2, "the answer came at once, not in pieces"
    assert all(BOX.startswith(part) for part in parts)
    # on the picture the model got; the second box lies partly outside
    expect(at(page, "boxes")).to_have_count(1)
    caption = first.get_by_test_id("boxes-caption")
    expect(caption).to_have_text(
        "Boxes drawn on image 1: 2. Numbers are read as thousandths of the sides."
    )
    drawn = [
        Box((0.101 * 128, 0.039 * 128, 0.665 * 128, 0.649 * 128), "", False),
        Box((0.9 * 128, 0.5 * 128, 128, 0.7 * 128), "", True),
    ]
    assert np.array_equal(pixels(at(page, "boxes")), np.asarray(draw_boxes(ct, drawn)))
    expect(first.get_by_test_id("box-note")).to_have_text(
        "[900, 500, 1200, 700]: a part lies outside the image"
    )
    at(page, "settings").click()
    at(page, "setting-unit").click()
    page.get_by_role("option", name="pixels").click()
    expect(caption).to_have_text("Boxes drawn on image 1: 1. Numbers are read as pixels.")
    expect(first.get_by_test_id("box-note").last).to_have_text(
        "[900, 500, 1200, 700]: not drawn, outside the image"
    )


def test_a_conversation_goes_on_and_begins_anew(page):
    at(page, f"example-{CT_EXAMPLE}").click()
    expect(at(page, "send")).to_have_text("Goes with the next question")
    ask(page, WHERE)
    done(page, 0, nth=0), done(page, 1, nth=0)
    expect(at(page, "send")).to_have_text("Sent already; tick to send it again")
    at(page, "question").fill("Are you sure?")
    at(page, "question").press("Enter")
    done(page, 0, nth=1), done(page, 1, nth=1)
    at(page, "new").click()
    expect(at(page, "answer-0")).to_have_count(0)
    expect(at(page, "send")).to_have_text("Goes with the next question")


def test_a_series_has_sliders_for_slice_direction_and_window(page, tmp_path):
    slices = enumerate(made.series())
    upload(page, *(made.save(data, tmp_path / f"IM{n}.dcm") for n, data in slices))
    expect(at(page, "image-facts")).to_have_text("Image 1 · DICOM · CT · 4 × 3 × 5")
    picture = at(page, "picture")
    # the middle slice holds 200, shown by soft tissue, -160 to 240
    assert pixels(picture)[1, 1].tolist() == [230] * 3

    def shows(level: int) -> None:
        for _ in range(100):
            if pixels(picture)[1, 1, 0] == level:
                return
            page.wait_for_timeout(50)
        pytest.fail(f"expected {level}, the picture has {pixels(picture)[1, 1, 0]}")

    slide(page, "slice", "ArrowLeft")
    shows(166)  # slice of 100
    at(page, "window").click()
    page.get_by_role("option", name="bone 400/1800").click()
    shows(85)  # 100 of -500 to 1300
    slide(page, "center", "ArrowLeft", 10)
    shows(86)  # 100 of -510 to 1290
    expect(at(page, "window").locator("xpath=ancestor-or-self::label")).to_contain_text("by hand")
    expect(at(page, "left-side")).to_have_text("R")
    at(page, "axis").get_by_text("sagittal").click()
    expect(at(page, "left-side")).to_have_text("A")
    at(page, "axis").get_by_text("coronal").click()
    page.wait_for_function(
        "() => document.querySelector('[data-testid=picture]').naturalHeight === 10"
    )
    expect(at(page, "send")).to_have_text("Goes with the next question")
    assert "Erika" not in page.content()
    assert "Musterfrau" not in page.content()


def test_a_turned_image_is_what_the_model_gets(page, tmp_path):
    slices = enumerate(made.series())
    upload(page, *(made.save(data, tmp_path / f"IM{n}.dcm") for n, data in slices))
    slide(page, "slice", "End")
    page.wait_for_timeout(300)
    shown = pixels(at(page, "picture"))
    ask(page, "What is shown?")
    done(page, 0), done(page, 1)
    assert np.array_equal(pixels(at(page, "sent-picture")), shown)
    slide(page, "slice", "ArrowLeft", 4)
    expect(at(page, "send")).to_have_text("Goes with the next question")
    assert np.array_equal(pixels(at(page, "sent-picture")), shown)


def test_bad_files_are_named_and_good_ones_stay(page, tmp_path):
    (tmp_path / "notes.png").write_text("this is no picture")
    Image.new("RGB", (30, 20), "red").save(tmp_path / "photo.png")
    volume = np.zeros((6, 5, 4), dtype=np.int16)
    made.nifti(tmp_path / "head.nii.gz", volume, np.diag([1.0, 1, 1, 1]))
    upload(page, tmp_path / "notes.png", tmp_path / "photo.png", tmp_path / "head.nii.gz")
    notice = at(page, "image-notice")
    expect(notice).to_have_count(1)
    expect(notice).to_contain_text("notes.png: This is no picture that can be opened here.")
    expect(at(page, "tray-2")).to_be_visible()
    expect(at(page, "image-facts")).to_have_text("Image 2 · NIfTI · 6 × 5 × 4")
    at(page, "language").get_by_text("中文").click()
    expect(notice).to_contain_text("notes.png: 无法打开此文件。")
    at(page, "remove").click()
    expect(at(page, "image-facts")).to_have_text("图像 1 · 30 × 20")
    assert "Traceback" not in page.content()


def test_an_upload_that_is_too_large_is_refused_in_the_browser_and_by_the_server(
    page, served, tmp_path
):
    large = tmp_path / "large.png"
    large.write_bytes(bytes(UPLOAD_MB * 2**20 + 1))
    upload(page, large)
    expect(at(page, "image-notice")).to_have_text(re.compile(f"More than {UPLOAD_MB} MB at once"))
    # who goes round the browser's own check
    address = page.evaluate(
        "() => [...document.querySelectorAll('.q-uploader')].map(e => e.__vueParentComponent)"
        ".map(c => { while (c && !c.props.url) c = c.parent; return c && c.props.url; })[0]"
    )
    connection = HTTPConnection(urlsplit(served.url).netloc, timeout=30)
    connection.putrequest("POST", address)
    connection.putheader("Content-Length", str((UPLOAD_MB + 1) * 2**20))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_a_stop_button_ends_an_endless_answer(page):
    at(page, "settings").click()
    at(page, "setting-max_new_tokens").fill("4000")
    ask(page, ENDLESS)
    answer = at(page, "answer-0")
    expect(answer.get_by_test_id("text")).to_contain_text("no no no no", timeout=WAIT)
    expect(at(page, "ask")).to_be_hidden()
    at(page, "stop").click()
    expect(done(page, 0, state="stopped")).to_contain_text("Stopped by you")
    done(page, 1, state="stopped")
    length = len(answer.get_by_test_id("text").inner_text())
    assert length < 4000 * 3
    page.wait_for_timeout(300)
    assert len(answer.get_by_test_id("text").inner_text()) == length
    expect(at(page, "ask")).to_be_visible()


def test_two_visitors_do_not_see_each_other_and_both_are_answered(page, browser, served):
    context = browser.new_context()
    context.set_default_timeout(WAIT)
    other = context.new_page()
    other.goto(served.url)
    for visitor in (page, other):
        at(visitor, f"example-{CT_EXAMPLE}").click()
        expect(at(visitor, "picture")).to_be_visible()
        at(visitor, "question").fill(WHERE)
    at(page, "ask").click()
    at(other, "ask").click()
    for visitor in (page, other):
        assert done(visitor, 0).get_by_test_id("text").inner_text() == BOX
        expect(at(visitor, "answer-0")).to_have_count(1)
    context.close()


def test_the_chinese_page(page):
    at(page, "language").get_by_text("中文").click()
    expect(at(page, "ask")).to_have_text(re.compile("提问"))
    at(page, "preset-report").click()
    expect(at(page, "question")).to_have_value("请为这张图像写一份简短报告。")
    # written, not yet sent: what is in the field survives the change of language
    at(page, "language").get_by_text("English").click()
    expect(at(page, "ask")).to_have_text(re.compile("Ask"))
    expect(at(page, "question")).to_have_value("请为这张图像写一份简短报告。")
    for words in ("not for clinical use", "不得用于临床"):
        expect(at(page, "banner")).to_contain_text(words)


def test_mistakes_are_said_in_the_page(page):
    at(page, "ask").click()
    expect(at(page, "chat-notice")).to_contain_text("Write a question, or choose a task.")
    ask(page, "What does <image> show?")
    expect(at(page, "chat-notice")).to_contain_text("1 <image> mark(s), but 0 image(s)")
    at(page, "settings").click()
    at(page, "setting-max_new_tokens").fill("")
    ask(page, "Hello")
    expect(at(page, "chat-notice")).to_contain_text(
        "Longest answer, tokens: a number from 1 to 4096 is expected."
    )
    expect(at(page, "answer-0")).to_have_count(0)


@pytest.mark.parametrize("width", [1360, 390])
def test_nothing_sticks_out_on_wide_and_narrow_screens(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    at(page, f"example-{CT_EXAMPLE}").click()
    ask(page, WHERE)
    done(page, 0), done(page, 1)
    overflow = page.evaluate(
        "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )
    assert overflow <= 0
    outside = page.evaluate(
        """width => [...document.querySelectorAll('.demo *')].filter(e =>
          e.getClientRects().length && e.getBoundingClientRect().right > width + 1 &&
          !e.closest('.q-uploader__list, .q-slider, .q-ripple')).length""",
        width,
    )
    assert outside == 0
