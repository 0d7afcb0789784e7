# SPDX-License-Identifier: Apache-2.0

import base64
import dataclasses
import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from data_tools.options import ImageOptions
from data_tools.writers.request import AttachedImage, Request, Traits
from gmai_xtuner.core.errors import CorpusError
from tests.data_tools.writers.stand_ins import Prompts, options, record, tasks, write_images


def picture(path, size, box=None) -> AttachedImage:
    return AttachedImage(path, *size, box, hashlib.sha256(path.read_bytes()).hexdigest())


def sent(made: AttachedImage, options: ImageOptions) -> tuple[str, Image.Image]:
    kind, data = made.url(options).split(",")
    return kind, Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.fixture
def grey(tmp_path):
    path = tmp_path / "grey.png"
    Image.fromarray(np.full((60, 80), 128, dtype=np.uint8)).save(path)
    return path


def test_a_large_picture_is_scaled(grey):
    kind, image = sent(picture(grey, (80, 60)), ImageOptions(longest_side=40))
    assert (kind, image.size, image.mode) == ("data:image/jpeg;base64", (40, 30), "L")
    kind, image = sent(picture(grey, (80, 60)), ImageOptions(longest_side=40, quality=0))
    assert (kind, image.format) == ("data:image/png;base64", "PNG")


def test_the_box_is_drawn_around_the_region_and_only_into_the_copy(grey):
    before = grey.read_bytes()
    _, image = sent(picture(grey, (80, 60), (20, 10, 40, 30)), ImageOptions(quality=0))
    pixels = np.asarray(image)
    red = (pixels == [255, 0, 0]).all(axis=2)
    assert not red[10:30, 20:40].any()  # every pixel of the region can be seen
    assert red[8:32, [18, 19, 40, 41]].all()
    assert red[[8, 9, 30, 31], 18:42].all()
    assert red.sum() == 24 * 24 - 20 * 20
    assert grey.read_bytes() == before


def test_the_box_scales_with_the_picture(grey):
    _, image = sent(
        picture(grey, (80, 60), (20, 10, 40, 30)), ImageOptions(longest_side=40, quality=0)
    )
    red = (np.asarray(image) == [255, 0, 0]).all(axis=2)
    assert (image.size, red[:, 20:22].any(), red[5:15, 10:20].any()) == ((40, 30), True, False)


def test_other_formats_are_encoded_anew(tmp_path):
    path = tmp_path / "picture.bmp"
    Image.new("RGB", (8, 8)).save(path)
    assert sent(picture(path, (8, 8)), ImageOptions())[0] == "data:image/jpeg;base64"


def test_a_picture_that_changes_or_is_broken_is_an_error(grey):
    made = picture(grey, (80, 60))
    grey.write_bytes(grey.read_bytes()[:60])
    with pytest.raises(CorpusError, match="changed while the job was running"):
        made.url(ImageOptions())
    with pytest.raises(CorpusError, match="the stored picture can't be read"):
        picture(grey, (80, 60), (1, 1, 2, 2)).url(ImageOptions())


def test_keys_say_all_that_an_answer_depends_on(tmp_path):
    """The same content is the same key whatever its file's name; anything else is another one."""
    write_images(tmp_path, 2)
    (tmp_path / "images" / "copy.png").write_bytes((tmp_path / "images" / "0.png").read_bytes())
    task = next(tasks(1))

    def key(
        file: str = "images/0.png", attempt: int = 0, box: bool = False, size=(8, 6), **more
    ) -> str:
        of = dataclasses.replace(task, record=record("r", file, size))
        prompt = Prompts(images=True, box=box).build(of)
        values = options(tmp_path, "http://x/v1", **more)
        return Request.of(of, prompt, attempt, values, tmp_path).key

    assert key() == key("images/copy.png")
    assert key() == key(base_url="http://other/v1", structured="text", in_flight=3)
    others = [
        key("images/1.png"),
        key(attempt=1),
        key(box=True),
        key(model="n"),
        key(temperature=0.5),
        key(parameters={"reasoning_effort": "low"}),
        key(image={"detail": "high"}),
        key(size=(1500, 1100)),
        key(size=(1500, 1100), image={"longest_side": 512}),
        key(seeded=True),
    ]
    assert len({key(), *others}) == len(others) + 1
    # The encoder's settings are of no matter to a picture that goes as it is.
    assert key() == key(image={"longest_side": 512, "quality": 50})


def test_the_box_is_the_items_focus(tmp_path):
    write_images(tmp_path)
    task = next(tasks(1))
    prompt = Prompts(images=True, box=True).build(task)
    values = options(tmp_path, "http://x/v1")
    made = Request.of(task, prompt, 0, values, tmp_path)
    assert made.image.box == (1, 1, 5, 4)
    whole = dataclasses.replace(task, item=dataclasses.replace(task.item, focus=None))
    assert Request.of(whole, prompt, 0, values, tmp_path).image.box is None
    body = made.body(Traits("json_object", "max_tokens"))
    assert (body["response_format"], body["max_tokens"]) == ({"type": "json_object"}, 50)
    assert "fits this JSON schema" in body["messages"][0]["content"]
