# SPDX-License-Identifier: Apache-2.0

"""Files that run a program when plain pickle reads them, through all that opens a checkpoint: none runs."""

import argparse
import importlib
import importlib.util
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import types
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging.history_buffer import HistoryBuffer

from gmai_xtuner.checkpoint.bases import load_language_model, load_vision_tower
from gmai_xtuner.checkpoint.llava import read_frozen
from gmai_xtuner.checkpoint.tokenizer import load_tokenizer
from gmai_xtuner.checkpoint.training import load_checkpoint_state
from gmai_xtuner.checkpoint.weights import (
    FOREIGN_READERS,
    add_adapter,
    read_state_dict,
    read_training_state,
    read_weights,
)
from gmai_xtuner.cli import add_model_arguments
from gmai_xtuner.core.errors import GMAIError, ModelLoadError
from gmai_xtuner.core.hub import resolve_directory
from gmai_xtuner.data.images import ImageTransform
from gmai_xtuner.evaluate.answerers import ModelOptions
from gmai_xtuner.evaluate.answerers.local import load_local
from gmai_xtuner.loading import load_model
from gmai_xtuner.preflight.checks import checkpoint_shapes
from gmai_xtuner.train.resume import random_state, restore_rank_state, seed_of, set_random_state


def of(name: str) -> bytes:
    return pickle.GLOBAL + "\n".join([*name.rsplit(".", 1), ""]).encode()


def value(one: Any) -> bytes:
    """The instructions that make a value; bytes are instructions already."""
    match one:
        case bytes():
            return one
        case None | True | False:
            return {None: pickle.NONE, True: pickle.NEWTRUE, False: pickle.NEWFALSE}[one]
        case int():
            return pickle.BININT2 + struct.pack("<H", one)
        case str():
            return pickle.BINUNICODE + struct.pack("<I", len(one.encode())) + one.encode()
        case dict():
            return pickle.EMPTY_DICT + marked(
                *(x for item in one.items() for x in item), end=pickle.SETITEMS
            )
        case list():
            return pickle.EMPTY_LIST + marked(*one, end=pickle.APPENDS)
        case tuple():
            return marked(*one, end=pickle.TUPLE)
    raise TypeError(one)


def marked(*items: Any, end: bytes) -> bytes:
    return pickle.MARK + b"".join(map(value, items)) + end


def call(function: bytes, *arguments: Any) -> bytes:
    return function + value(arguments) + pickle.REDUCE


def new(kind: str, *arguments: Any) -> bytes:
    return of(kind) + value(arguments) + pickle.NEWOBJ


def build(one: bytes, state: Any) -> bytes:
    return one + value(state) + pickle.BUILD


def attribute(owner: bytes, *names: str) -> bytes:
    for name in names:
        owner = call(of("builtins.getattr"), owner, name)
    return owner


def binary(content: bytes) -> bytes:
    return pickle.BINBYTES + struct.pack("<I", len(content)) + content


def program(body: bytes) -> bytes:
    return pickle.PROTO + b"\x02" + body + pickle.STOP


OPEN, TENSOR = of("builtins.open"), of("torch._utils._rebuild_tensor_v2")
BUFFER = of("mmengine.logging.history_buffer.HistoryBuffer")
SCALER = "deepspeed.runtime.fp16.loss_scaler."
ORDERED = of("collections.OrderedDict")


def payloads(marker: str) -> dict[str, bytes]:
    """Pickles that write ``marker`` when plain pickle reads them: name -> body of the program."""
    write = call(OPEN, marker, "w")
    then = pickle.POP + write
    partial = call(of("functools.partial"), OPEN, marker, "w")
    reach = attribute(BUFFER, "update", "__globals__", "get")
    array = call(of("numpy.core.multiarray._reconstruct"), of("numpy.ndarray"), (0,), "b")
    objects = call(of("numpy.dtype"), "O8", False, True)
    stacked = value("builtins") + value("open") + pickle.STACK_GLOBAL
    keywords = of("functools.partial") + value((OPEN, marker)) + value({"mode": "w"})
    found = {
        "open": write,
        "open, stacked name": call(stacked, marker, "w"),
        "open, python 2 name": call(of("__builtin__.open"), marker, "w"),
        "open by INST": marked(marker, "w", end=pickle.INST) + b"io\nFileIO\n",
        "open by OBJ": marked(of("io.FileIO"), marker, "w", end=pickle.OBJ),
        "open by NEWOBJ": new("subprocess.Popen", ["true"]) + then,
        "open by NEWOBJ_EX": call(keywords + pickle.NEWOBJ_EX),
        "eval": call(of("builtins.eval"), f"open({marker!r}, 'w').close()"),
        "nested pickle": call(of("pickle.loads"), binary(program(write))),
        "partial": call(partial),
        # Each permitted name as a stepping stone to what it reaches.
        "HistoryBuffer's globals": call(attribute(reach, "__call__"), "__builtins__") + then,
        "HistoryBuffer's builtins": call(
            call(attribute(call(reach, "__builtins__"), "get"), "open"), marker, "w"
        ),
        "HistoryBuffer fills a method": build(
            call(BUFFER), {"statistics_methods": {}, "update": partial}
        ),
        "HistoryBuffer's statistics": build(call(BUFFER), {"statistics_methods": {"mean": write}}),
        "BUILD on a class": build(BUFFER, (None, {"update": partial})),
        "BUILD on a function": build(TENSOR, (None, {"__wrapped__": partial})),
        "OrderedDict's attributes": build(
            call(ORDERED), dict.fromkeys(("items", "keys", "get"), partial)
        ),
        "defaultdict's factory": call(
            attribute(call(of("collections.defaultdict"), partial), "__missing__"), "x"
        ),
        "LossScaler's attributes": build(
            new(SCALER + "DynamicLossScaler"), {"update_scale": partial, "cur_scale": write}
        ),
        "LossScaler's globals": attribute(of(SCALER + "LossScaler"), "backward", "__globals__")
        + then,
        "fragment_address": new("deepspeed.utils.tensor_fragment.fragment_address", write, 0),
        "ZeroStageEnum": build(
            call(of("deepspeed.runtime.zero.config.ZeroStageEnum"), 1), {"x": write}
        ),
        "ConfigDict with a lazy object": call(
            of("mmengine.config.config.ConfigDict"),
            {"x": call(of("mmengine.config.lazy.LazyObject"), "os", "sys")},
        )
        + then,
        "dtype of objects": array + value((1, (1,), objects, False, write)) + pickle.POP,
        "array of objects": build(array, (1, (1,), objects, False, [write])),
        "scalar of objects": call(of("numpy.core.multiarray.scalar"), objects, write),
        "dtype's fields": call(of("numpy.dtype"), [("x", "O")]) + then,
        "_codecs": call(of("_codecs.decode"), binary(b"x"), "latin1") + then,
        "torch.Size of a map": call(
            of("torch.Size"), call(of("builtins.map"), of("os.mkdir"), (marker,))
        ),
        "tensor of another type": call(
            of("torch._tensor._rebuild_from_type_v2"), OPEN, of("torch.Tensor"), (marker, "w"), {}
        ),
        "tensor's hooks": call(TENSOR, write, 0, (1,), (1,), False, write),
        "persistent id of a module": value(("module", OPEN, "a", "b")) + pickle.BINPERSID + then,
        "textual persistent id": pickle.PERSID + b"storage\n" + then,
        "list's append": call(of("collections.deque")) + write + pickle.APPEND,
        "EXT": write + pickle.EXT1 + b"\x01",
    }
    return {name: value({"state_dict": {"x": body}, "meta": {}}) for name, body in found.items()}


def in_zip(
    body: bytes, *, extra: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED
) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        members = {
            "data.pkl": program(body),
            "byteorder": b"little",
            "data/0": b"\0" * 64,
            "version": b"3\n",
        }
        for name, content in (members | (extra or {})).items():
            archive.writestr(f"archive/{name}", content)
    return out.getvalue()


def in_legacy(body: bytes) -> bytes:
    parts = (
        torch.serialization.MAGIC_NUMBER,
        torch.serialization.PROTOCOL_VERSION,
        {"little_endian": True},
    )
    return (
        b"".join(pickle.dumps(part, protocol=2) for part in parts)
        + program(body)
        + pickle.dumps([])
    )


def in_tar(body: bytes, *, first: str = "storages") -> bytes:
    out = io.BytesIO()
    empty = pickle.dumps(0) + pickle.dumps([])
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in {
            first: empty,
            "storages": empty,
            "tensors": empty,
            "pickle": program(body),
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def gadgets(marker: Path) -> dict[str, bytes]:
    """Files: each payload in PyTorch's zip format, and some in every other container."""
    bodies = payloads(str(marker))
    files = {f"{name} in a zip": in_zip(body) for name, body in bodies.items()}
    for name in ("open", "eval", "HistoryBuffer's builtins"):
        body = bodies[name]
        inner = in_zip(body)
        files |= {
            f"{name} in the old format": in_legacy(body),
            f"{name} in a tar": in_tar(body),
            f"{name} in a tar that begins like the old format": in_tar(
                body, first=pickle.dumps(torch.serialization.MAGIC_NUMBER, 2).decode("latin1")
            ),
            f"{name}, bare": program(body),
            f"{name} in TorchScript": in_zip(body, extra={"constants.pkl": program(body)}),
            f"{name} in a zip in a zip": in_zip(
                value("x"), extra={"data/0": inner, "data.pkl": inner}
            ),
            f"{name} in a compressed zip": in_zip(body, compression=zipfile.ZIP_DEFLATED),
            f"{name} after a harmless pickle": program(pickle.EMPTY_DICT) + program(body),
        }
    return files


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], Path]:
    folder = tmp_path_factory.mktemp("gadgets")
    return gadgets(folder / "it-ran"), folder / "it-ran"


TRAPS = {
    "BUILD on a class",
    "BUILD on a function",
    "HistoryBuffer fills a method",
    "OrderedDict's attributes",
    "persistent id of a module",
    "textual persistent id",
}
"""Payloads that run only once other code uses what they left, or in torch's own reader."""
PLAIN_PICKLE = """
import contextlib, json, pathlib, pickle, sys
marker = pathlib.Path(sys.argv[1])
for name, body in pickle.load(sys.stdin.buffer).items():
    with contextlib.suppress(Exception):
        pickle.loads(body)
    if marker.exists() or marker.is_symlink():
        print(json.dumps(name))
        marker.rmdir() if marker.is_dir() and not marker.is_symlink() else marker.unlink()
"""


@pytest.mark.slow  # a process that imports whatever the gadgets name
def test_plain_pickle_runs_the_gadgets(tmp_path):
    bodies = {name: program(body) for name, body in payloads(str(tmp_path / "ran")).items()}
    command = [sys.executable, "-c", PLAIN_PICKLE, str(tmp_path / "ran")]
    child = subprocess.run(command, input=pickle.dumps(bodies), capture_output=True, check=True)
    ran = {json.loads(line) for line in child.stdout.splitlines() if line.startswith(b'"')}
    assert set(bodies) - ran == TRAPS
    assert len(ran) >= 25


def _as(*names: str) -> Callable[[Path, bytes], Path]:
    def write(folder: Path, content: bytes) -> Path:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder / names[0]

    return write


def foreign(module: str, names: str, **options: Any) -> Callable[[Path], Any]:
    """A function of a package that opens checkpoints."""

    def read(path: Path) -> Any:
        one: Any = importlib.import_module(module)
        for name in names.split("."):
            one = getattr(one, name)
            one = one() if isinstance(one, type) and name == "TorchCheckpointEngine" else one
        return getattr(one, "__wrapped__", one)(str(path), **options)

    return read


def _adapter(path: Path) -> Any:
    config = {"peft_type": "LORA", "lora_alpha": 1}
    (path.parent / "adapter_config.json").write_text(json.dumps(config))
    return add_adapter({}, path.parent)


def _whole_model(path: Path) -> Any:
    (path.parent / "config.json").write_text(
        json.dumps({"mm_hidden_size": 1, "mm_projector_type": "linear", "mm_vision_tower": "x"})
    )
    return load_model(path.parent)


SHARDS = (
    "iter_1.pth/mp_rank_00_model_states.pt",
    "iter_1.pth/zero_pp_rank_0_mp_rank_00_optim_states.pt",
)
OPENERS: dict[str, tuple[Callable[[Path, bytes], Path], Callable[[Path], Any]]] = {
    "a file of weights": (_as("x.bin"), read_weights),
    "a state of training": (_as("x.pth"), read_training_state),
    "the same, mapped": (_as("x.pth"), lambda path: read_training_state(path, mmap=True)),
    "a base": (_as("pytorch_model.bin"), lambda path: read_state_dict(path.parent)),
    "an adapter": (_as("adapter_model.bin"), _adapter),
    "a released model": (_as("pytorch_model.bin"), _whole_model),
    "pretrained_pth, a file": (_as("iter_1.pth"), load_checkpoint_state),
    "pretrained_pth, DeepSpeed's folder": (
        _as(*SHARDS),
        lambda path: load_checkpoint_state(path.parent),
    ),
    "the seed to resume with": (_as("iter_1.pth"), seed_of),
    "the seed in DeepSpeed's folder": (_as(*SHARDS), lambda path: seed_of(path.parent)),
    "a rank's random state": (
        _as("rank_00000.pt"),
        lambda path: restore_rank_state(types.SimpleNamespace(hooks=[]), path.parent),
    ),
    "frozen weights": (_as("mp_rank_00_model_states.pt"), lambda path: read_frozen(path.parent)),
    "preflight": (_as("iter_1.pth"), checkpoint_shapes),
    "DeepSpeed": (
        _as("x.pt"),
        foreign(
            "deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine",
            "TorchCheckpointEngine.load",
            map_location="cpu",
        ),
    ),
    "mmengine": (
        _as("x.pth"),
        foreign(
            "mmengine.runner.checkpoint", "CheckpointLoader.load_checkpoint", map_location="cpu"
        ),
    ),
    "xtuner": (_as("x.pth"), foreign("xtuner.model.utils", "guess_load_checkpoint")),
    "xtuner's seed": (_as("x.pth"), foreign("xtuner.tools.utils", "get_seed_from_checkpoint")),
}


@pytest.mark.parametrize("opener", OPENERS)
def test_no_gadget_runs(opener, corpus, tmp_path, monkeypatch):
    files, marker = corpus
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GMAI_ALLOW_PICKLE", "1")
    write, read = OPENERS[opener]
    reached = 0
    for number, (name, content) in enumerate(files.items()):
        (tmp_path / str(number)).mkdir()
        path = write(tmp_path / str(number), content)
        with pytest.raises(GMAIError) as caught:
            read(path)
        reached += "Nothing in it was run" in str(caught.value)
        assert not os.path.lexists(marker), f"{name} ran"
    assert reached >= 40


CUSTOM = {
    "model_type": "custom",
    "architectures": ["Custom"],
    "tokenizer_class": "Custom",
    "processor_class": "Custom",
    "image_processor_type": "Custom",
    "auto_map": {
        **{f"Auto{name}": "custom.Custom" for name in ("Config", "Model", "Processor", "ImageProcessor")},
        **dict.fromkeys(("AutoModelForCausalLM", "AutoModelForImageTextToText"), "custom.Custom"),
        "AutoTokenizer": ["custom.Custom", "custom.Custom"],
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "read",
    [
        lambda folder: load_local(ModelOptions(str(folder), loader="transformers"), cache=folder),
        lambda folder: load_model(folder),
        lambda folder: load_tokenizer(str(folder), trust_remote_code=True),
        lambda folder: load_language_model(str(folder)),
        lambda folder: load_vision_tower(str(folder)),
        ImageTransform.from_pretrained,
    ],
    ids=["transformers", "a model", "tokenizer", "language model", "vision tower", "images"],
)
@pytest.mark.parametrize("model_type", ["custom", "llama", "llava"])
def test_code_that_comes_with_a_model_does_not_run_even_for_who_would_say_yes(
    tmp_path, monkeypatch, read, model_type
):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for name in (
        "config",
        "tokenizer_config",
        "processor_config",
        "preprocessor_config",
        "tokenizer",
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(CUSTOM | {"model_type": model_type}))
    ran = f"open({str(tmp_path / 'it-ran')!r}, 'w').close()"
    (tmp_path / "custom.py").write_text(f"{ran}\nclass Custom: pass\n")
    with pytest.raises(GMAIError):
        read(tmp_path)
    assert not (tmp_path / "it-ran").exists()


def training_state() -> dict[str, Any]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    buffer = HistoryBuffer([1.0, 2.0], [1, 1])
    buffer.update(6.0)
    weight = torch.arange(12.0).reshape(3, 4)
    attributed = weight.clone()
    attributed.attribute = True
    return {
        "attributed": attributed,
        "buffer": buffer,
        "config": ConfigDict(a={"b": 1}, c=[ConfigDict(x=1)]),
        "scaler": LossScaler(8.0),
        "dynamic": DynamicLossScaler(2.0**16, 1000, 2.0, 1000.0, 0.25),
        "stage": ZeroStageEnum(2),
        "address": fragment_address(3, 4),
        "nested": defaultdict(dict, {1: {2: 3}}),
        "names": {"a", "b"},
        "number": np.float64(3.5),
        "flag": np.bool_(True),
        "array": np.arange(6).reshape(2, 3),
        "texts": np.array(["ab", "c"]),
        "bytes": b"\xff\x00",
        "nothing": b"",
        "size": weight.shape,
        "device": torch.device("cpu"),
        "dtype": torch.bfloat16,
        "weight": weight,
        "transposed": weight.t(),
        "rows": weight[1:],
        "half": weight.bfloat16(),
        "scalar": torch.tensor(1.0),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(weight),
        "state_dict": OrderedDict(a=weight),
        "large": 2**70,
    }


def equal(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor | np.ndarray | np.generic):
        return (
            left.dtype == right.dtype and left.shape == right.shape and bool((left == right).all())
        )
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if type(left).__name__ in ("HistoryBuffer", "LossScaler", "DynamicLossScaler"):
        fields = {key: value for key, value in vars(left).items() if key != "statistics_methods"}
        return all(equal(value, getattr(right, key)) for key, value in fields.items())
    return left == right


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "old format"])
@pytest.mark.parametrize("mmap", [True, False])
def test_training_state_comes_back_as_it_was_saved(as_zip, mmap, tmp_path):
    saved = training_state()
    torch.save(saved, tmp_path / "x.pth", _use_new_zipfile_serialization=as_zip)
    read = read_training_state(tmp_path / "x.pth", mmap=mmap)
    assert saved.keys() == read.keys()
    assert [key for key in saved if not equal(saved[key], read[key])] == []
    assert (read["buffer"].mean(), read["buffer"].statistics("max")) == (3.0, 6.0)
    read["buffer"].update(7.0)
    assert read["buffer"].current() == 7.0


def test_weights_come_back_and_nothing_but_tensors_by_name_is_read(tmp_path):
    layer = torch.nn.Linear(2, 3)
    torch.save(layer.state_dict(), tmp_path / "x.bin")
    read = read_weights(tmp_path / "x.bin")
    assert equal(dict(read), dict(layer.state_dict()))
    assert read._metadata == layer.state_dict()._metadata
    for content in (
        [1],
        {"a": 1},
        {1: torch.ones(1)},
        {"a": {"b": torch.ones(1)}},
        training_state(),
    ):
        torch.save(content, tmp_path / "x.bin")
        with pytest.raises(ModelLoadError, match="can't be read"):
            read_weights(tmp_path / "x.bin")


def test_storages_are_read_within_their_size(tmp_path):
    def tensor(number: int, size: int) -> bytes:
        storage = value(("storage", of("torch.FloatStorage"), "0", "cpu", number))
        return call(TENSOR, storage + pickle.BINPERSID, 0, (size,), (1,), False, call(ORDERED))

    path = tmp_path / "x.bin"
    path.write_bytes(in_zip(value({"a": tensor(16, 16)})))
    assert read_weights(path)["a"].tolist() == [0.0] * 16
    for number, size in ((17, 17), (16, 17), (60000, 1)):
        path.write_bytes(in_zip(value({"a": tensor(number, size)})))
        with pytest.raises(ModelLoadError, match=r"in full|beyond its storage"):
            read_weights(path)


def test_a_file_with_two_directories_is_refused(tmp_path):
    """PyTorch reads ZIP64's record where its locator says, Python just before the locator."""
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(1)}, path)
    whole = path.read_bytes()
    for content in (whole[:-34] + bytes(8) + whole[-26:], b"PK\3\4" + whole, whole + b"x"):
        path.write_bytes(content)
        with pytest.raises(
            ModelLoadError, match=r"directory is not at its end|PytorchStreamReader"
        ):
            read_weights(path)
    path.write_bytes(whole)
    assert read_weights(path)["a"].item() == 1


def test_pickled_bases_are_read_only_when_asked_for(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"--allow-pickle.*GMAI_ALLOW_PICKLE=1"):
        read_state_dict(tmp_path)
    monkeypatch.setenv("GMAI_ALLOW_PICKLE", "")  # put back afterwards
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    parser.parse_args(["x", "--allow-pickle"])
    assert read_state_dict(tmp_path)["a"].item() == 1


def test_pickled_weights_of_the_hub_are_not_even_downloaded(tmp_path, monkeypatch):
    asked: list[Any] = []

    def download(name: str, patterns: Any) -> Path:
        asked.extend(patterns)
        return tmp_path

    monkeypatch.setattr("gmai_xtuner.core.hub._download", download)
    with pytest.raises(ModelLoadError, match="owner/model"):
        resolve_directory("owner/model", weights=True)
    assert "*.bin" not in asked
    monkeypatch.setenv("GMAI_ALLOW_PICKLE", "1")
    resolve_directory("owner/model", weights=True)
    assert "*.bin" in asked


def test_checkpoints_are_local_files():
    from mmengine.runner.checkpoint import CheckpointLoader

    for url in ("https://example.org/x.pth", "torchvision://resnet50"):
        with pytest.raises(Exception, match=r"local file|torchvision"):
            CheckpointLoader.load_checkpoint(url, map_location="cpu")


def test_the_config_of_a_checkpoint_is_not_handed_on(tmp_path):
    """mmengine's ``resume`` executes it as Python, to look for a key that no config has any more."""
    meta = {"iter": 3, "config": "__import__('os').system('touch ran')"}
    torch.save({"meta": meta, "state_dict": {}}, tmp_path / "iter_3.pth")
    assert read_training_state(tmp_path / "iter_3.pth")["meta"] == {"iter": 3}
    module = importlib.import_module("mmengine.runner.checkpoint")
    assert module.torch.load(str(tmp_path / "iter_3.pth"))["meta"] == {"iter": 3}


DEEP = b"".join([pickle.EMPTY_TUPLE, *[pickle.TUPLE1] * 3000])
"""A key that takes for ever to hash."""


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (pickle.EMPTY_DICT + DEEP + pickle.NONE + pickle.SETITEM, "a key of another form"),
        (pickle.EMPTY_DICT + marked(DEEP, None, end=pickle.SETITEMS), "a key of another form"),
        (marked(DEEP, None, end=pickle.DICT), "an instruction that torch"),
        (call(of("builtins.set"), marked(DEEP, end=pickle.LIST)), "key of another|instruction"),
        (call(ORDERED, marked((DEEP, None), end=pickle.LIST)), "key of another|instruction"),
        (pickle.EMPTY_SET + marked(DEEP, end=pickle.ADDITEMS), "a key of another form"),
        (marked(DEEP, end=pickle.FROZENSET), "an instruction that torch"),
        (call(BUFFER) + pickle.NONE + pickle.APPEND, "items for a HistoryBuffer"),
        (call(BUFFER) + marked(None, end=pickle.APPENDS), "items for a HistoryBuffer"),
        (call(BUFFER) + value("a") + pickle.NONE + pickle.SETITEM, "items for a HistoryBuffer"),
        (call(BUFFER, "x"), "HistoryBuffer of another form"),
        (call(of(SCALER + "LossScaler"), []), "LossScaler of another form"),
    ],
)
def test_no_endless_key_is_hashed_and_no_packages_class_filled_or_called_as_a_file_likes(
    program, says, tmp_path
):
    (tmp_path / "x.pth").write_bytes(in_zip(program))
    with pytest.raises(ModelLoadError, match=says):
        read_training_state(tmp_path / "x.pth")


def test_every_foreign_module_that_opens_a_checkpoint_is_known():
    """A new version of a pinned package that opens files elsewhere has to be looked at."""
    not_reached = {
        *("deepspeed.inference.engine", "deepspeed.inference.v2.engine_factory"),
        "deepspeed.inference.v2.model_implementations.inference_policy_base",
        "deepspeed.module_inject.replace_module",
        "deepspeed.runtime.checkpoint_engine.nebula_checkpoint_engine",
        *("deepspeed.runtime.fp16.fused_optimizer", "deepspeed.runtime.fp16.unfused_optimizer"),
        *("deepspeed.runtime.zero.partition_parameters", "deepspeed.runtime.zero.stage_1_and_2"),
        *("mmengine.utils.dl_utils.hub", "xtuner.dataset.moss_sft"),
        *("xtuner._lite.patches.base", "xtuner.tools.model_converters.split"),
    }
    found = set()
    for package in ("deepspeed", "mmengine", "xtuner"):
        (root,) = importlib.util.find_spec(package).submodule_search_locations
        for file in Path(root).rglob("*.py"):
            if re.search(r"torch\.load\(", file.read_text(encoding="utf-8", errors="replace")):
                found.add(".".join((package, *file.relative_to(root).with_suffix("").parts)))
    assert found - not_reached == set(FOREIGN_READERS)
    for name in FOREIGN_READERS:
        assert isinstance(importlib.import_module(name).torch, types.ModuleType)
        assert importlib.import_module(name).torch is not torch


def test_weights_are_read_safely_without_the_plugin_too(tmp_path, monkeypatch):
    """A program may read a checkpoint without having imported what applies the workarounds."""
    foreign = importlib.import_module("xtuner.model.utils")
    monkeypatch.setattr(foreign, "torch", torch)
    torch.save({"state_dict": {"weight": torch.ones(2)}}, tmp_path / "iter_1.pth")
    assert load_checkpoint_state(tmp_path / "iter_1.pth")["weight"].tolist() == [1, 1]
    assert foreign.torch is not torch


@pytest.mark.parametrize(("position", "keys"), [(-1, 624), (625, 624), (0, 100)])
def test_numpys_random_state_is_checked_before_it_is_set(position, keys):
    state = random_state()
    name, numbers, _, *rest = state["numpy"]
    state["numpy"] = (name, numbers[:keys], position, *rest)
    with pytest.raises(GMAIError, match="random numbers is damaged"):
        set_random_state(state)
