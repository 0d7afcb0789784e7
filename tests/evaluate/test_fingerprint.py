# SPDX-License-Identifier: Apache-2.0

"""The hash of a model changes with its weights, and with nothing else."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from gmai_xtuner.core.errors import EvaluationError
from gmai_xtuner.evaluate import answerers as fingerprint
from gmai_xtuner.evaluate.answerers import hash_files
from gmai_xtuner.evaluate.answerers.local import bases_of


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
