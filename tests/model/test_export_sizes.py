# SPDX-License-Identifier: Apache-2.0

"""Exported files hold the weights and nothing else, whatever buffer the checkpoint's tensors lie in."""

import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from gmai_xtuner.checkpoint.export import as_written, new_folder
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.import_model import main
from tests.model.exporting import export, stage_config, trained_model

WEIGHTS = ("*.bin", "*.safetensors")
KIB = 1024


def from_flat_buffer(tiny_bases):
    """(stage 3's model, its config), weights as DeepSpeed gives them back: views of one flat tensor."""
    cfg = stage_config(tiny_bases, "stage3_instruct")
    model = trained_model(cfg)
    parameters = list(model.parameters())
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    start = 0
    for parameter in parameters:
        parameter.data = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    return model, cfg


def written(folder):
    return [file for pattern in WEIGHTS for file in folder.glob(pattern)]


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("fp32", [False, True])
def test_views_of_one_flat_buffer_take_no_more_than_their_own_bytes(
    tiny_bases, tmp_path, fp32, safe
):
    model, cfg = from_flat_buffer(tiny_bases)
    bytes_of = {
        name: sum(value.numel() for value in getattr(model, name).parameters()) * 4
        for name in ("llm", "visual_encoder", "projector")
    }
    if not fp32:
        bytes_of["llm"] //= 2
    limit = 1_500_000  # the largest matrix has 1.35 MB
    model.to_hf(
        cfg=cfg,
        save_dir=str(tmp_path / "out"),
        fp32=fp32,
        save_pretrained_kwargs={"safe_serialization": safe, "max_shard_size": "1500KB"},
    )
    folders = {"llm": "", "visual_encoder": "visual_encoder", "projector": "projector"}
    for name, folder in folders.items():
        files = written(tmp_path / "out" / folder)
        size = sum(file.stat().st_size for file in files)
        # Names, shapes and alignment come on top.
        assert bytes_of[name] <= size < bytes_of[name] + 32 * KIB * len(files), name
        assert all(file.stat().st_size < limit + 32 * KIB for file in files), name
        assert len(files) >= bytes_of[name] / limit, name


def test_the_whole_llava_is_converted_file_by_file(stage1, tmp_path, monkeypatch):
    """No second copy of the model: at the 7B's size there would be no memory for it."""
    model, cfg = stage1
    alive: list[weakref.ref] = []
    most = [0]

    def converted(name, weight, dtype):
        result = as_written(name, weight, dtype)
        alive.append(weakref.ref(result[0]))
        most[0] = max(most[0], sum(one.nbytes for ref in alive if (one := ref()) is not None))
        return result

    monkeypatch.setattr("gmai_xtuner.checkpoint.export.as_written", converted)
    model.to_hf(
        cfg=cfg,
        save_dir=str(tmp_path / "out"),
        save_format="huggingface",
        save_pretrained_kwargs={"max_shard_size": "500KB"},
    )
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    largest = max(file.stat().st_size for file in written(tmp_path / "out"))
    assert (
        0 < most[0] <= 2 * largest < sum(file.stat().st_size for file in written(tmp_path / "out"))
    )


@pytest.fixture(scope="module")
def stage1(tiny_bases):
    cfg = stage_config(tiny_bases, "stage1_shallow")
    return trained_model(cfg), cfg


@pytest.mark.parametrize("save_format", ["xtuner", "huggingface"])
@pytest.mark.parametrize("size", ["nonsense", "5", "0GB", "-2GB"])
def test_a_shard_size_that_is_none_is_refused_before_anything_is_written(
    tmp_path, save_format, size, stage1
):
    model, cfg = stage1
    with pytest.raises(GMAIError, match=f"such as 2GB; got '{size}'"):
        model.to_hf(
            cfg=cfg,
            save_dir=str(tmp_path / "out"),
            save_format=save_format,
            save_pretrained_kwargs={"max_shard_size": size},
        )
    assert not any(tmp_path.iterdir())


# --- An import writes what was stored, or says what does not fit; options are read before the model is ---


NAMES = {
    "llm": "language_model.model.norm.weight",
    "visual_encoder": "vision_tower.vision_model.post_layernorm.weight",
    "projector": "multi_modal_projector.linear_1.bias",
}


@pytest.fixture(scope="module")
def release(tiny_bases, tmp_path_factory):
    """A whole LLaVA in fp32."""
    cfg = stage_config(tiny_bases, "stage3_instruct")
    return export(trained_model(cfg), cfg, tmp_path_factory.mktemp("release") / "whole")


def with_value(release, folder, part, value):
    shutil.copytree(release, folder)
    weights = load_file(folder / "model.safetensors")
    changed = weights[NAMES[part]].clone()
    changed[:3] = value
    save_file({**weights, NAMES[part]: changed}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("part", list(NAMES))
@pytest.mark.parametrize("save_format", ["xtuner", "huggingface"])
def test_what_is_beyond_fp16_is_refused_and_fp32_keeps_it(
    release, tmp_path, capsys, part, save_format
):
    folder = with_value(release, tmp_path / "release", part, 1e5)
    arguments = [str(folder), str(tmp_path / "out"), "--save-format", save_format]
    assert main(arguments) == 1
    told = capsys.readouterr().err
    assert "beyond the range of fp16" in told
    assert "import_model with --dtype float32" in told
    assert [path.name for path in tmp_path.iterdir()] == ["release"]
    if part == "projector":
        assert main([*arguments, "--dtype", "float32"]) == 0
        values = torch.cat(
            [
                tensor.flatten()
                for file in (tmp_path / "out").rglob("*.safetensors")
                for tensor in load_file(file).values()
            ]
        )
        assert values.dtype == torch.float32
        assert int((values == 1e5).sum()) == 3


def test_what_is_no_number_is_refused_in_its_own_dtype_too(release, tmp_path, capsys):
    folder = with_value(release, tmp_path / "release", "projector", float("inf"))
    assert main([str(folder), str(tmp_path / "out"), "--dtype", "float32"]) == 1
    assert "no numbers (NaN or infinite)" in capsys.readouterr().err


@pytest.mark.parametrize("save_format", ["xtuner", "huggingface", "gguf"])
def test_what_becomes_0_is_counted(release, tmp_path, monkeypatch, save_format):
    told = []
    monkeypatch.setattr("gmai_xtuner.checkpoint.export.warn", told.append)
    folder = with_value(release, tmp_path / "release", "projector", 1e-9)
    assert main([str(folder), str(tmp_path / "out"), "--save-format", save_format]) == 0
    assert [text.split()[0] for text in told] == ["3"]


def test_a_shard_size_that_is_none_is_refused_before_the_model_is_read(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("gmai_xtuner.loading.load_model", None)  # to call it would be an error
    assert main([str(tmp_path), str(tmp_path / "out"), "--max-shard-size", "nonsense"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: --max-shard-size must be")
    assert "'nonsense'" in told


def test_errors_of_files_are_one_line_too(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gmai_xtuner.loading.load_model", full)
    assert main([str(tmp_path), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(28, "No space left on device"), GMAIError),
        (Exception("No space left on device (os error 28)"), GMAIError),  # tokenizers'
        (KeyError("layer"), KeyError),
    ],
)
def test_an_export_that_fails_leaves_nothing_and_says_what_can_be_done(tmp_path, error, kind):
    def half_written() -> None:
        with new_folder(tmp_path / "model") as folder:
            (folder / "weights").write_bytes(b"half")
            raise error

    with pytest.raises(kind) as caught:
        half_written()
    assert kind is KeyError or "No space left" in str(caught.value)
    assert not list(tmp_path.iterdir())
