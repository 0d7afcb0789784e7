# SPDX-License-Identifier: Apache-2.0

"""Weights on disk: safetensors or pickles, in one file or in shards, and LoRA adapters on top of them.

A pickle is a program: it names functions, calls them and sets attributes. PyTorch's ``weights_only`` reader
has one list of permitted names for the whole process; mmengine's and DeepSpeed's state needs ``getattr`` and
classes with methods on it, from which any function can be reached. Here a name in a file stands for one of
the makers of :mod:`gmai_xtuner.checkpoint.unpickler`, which build plain values from checked arguments, and
fields are filled in by name. Every other name, instruction and archive is refused before anything happens.

Adapters of peft are added to the weights of their base without building it. xtuner's own ``llm_adapter`` and
``visual_encoder_adapter`` stand on the base's own names, for InternLM2 with queries, keys and values in one
matrix (``attention.wqkv``), so they are added before anything is renamed.
"""

from __future__ import annotations

import importlib
import io
import math
import os
import pickle
import re
import struct
import types
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from gmai_xtuner.checkpoint.unpickler import StateReader, TensorReader
from gmai_xtuner.core.errors import ModelLoadError
from gmai_xtuner.core.hub import WEIGHT_FILES, check_pickle_allowed, read_json, shorten

_PREFIX = "base_model.model."
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_OTHER_FORMS = ("use_dora", "fan_in_fan_out", "modules_to_save", "alora_invocation_tokens")
_STARTS = (True, False, None, "gaussian", "eva")
"""``init_lora_weights`` that leave the base as it is; pissa, olora, loftq, ... learn on a rewritten one."""


def read_state_dict(directory: Path) -> dict[str, torch.Tensor]:
    """Read all weights of a checkpoint folder: safetensors or bin, in one file or in shards.

    The tensors are memory-mapped, so that ranks of one machine share the pages and a tensor that
    is never touched is never read.

    Raises:
        ModelLoadError: no weights, a missing or damaged shard, or a key that the index promises
            and no shard has.
    """
    for index_name, single_name in WEIGHT_FILES:
        if (directory / index_name).is_file():
            return _read_shards(directory, directory / index_name)
        if (directory / single_name).is_file():
            return read_weights_file(directory / single_name)
    expected = ", ".join(name for pair in WEIGHT_FILES for name in pair)
    raise ModelLoadError(f"{directory} has no weights. Expected one of {expected}.")


def _read_shards(directory: Path, index: Path) -> dict[str, torch.Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{index} has no 'weight_map'. Copy it again.")
    names = sorted(set(weight_map.values()))
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise ModelLoadError(
            f"{directory}: {len(missing)} of {len(names)} weight files named in {index.name} are "
            f"missing: {', '.join(missing)}. Finish the download or the copy."
        )
    state_dict: dict[str, torch.Tensor] = {}
    for name in names:
        state_dict.update(read_weights_file(directory / name))
    if lost := sorted(set(weight_map) - set(state_dict)):
        raise ModelLoadError(
            f"{directory}: {index.name} names weights that no file holds: {shorten(lost)}."
        )
    return state_dict


def read_weights_file(path: Path) -> dict[str, torch.Tensor]:
    """Read one file of weights, memory-mapped.

    One that is cut short or damaged, or a pickle that the user has not asked for, is a ``ModelLoadError``.
    """
    if path.suffix != ".safetensors":
        check_pickle_allowed(str(path))
        return read_weights(path)
    try:
        return load_file(path)
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ModelLoadError(
            f"{path} can't be read ({type(error).__name__}: {error}). "
            "The file is cut short or damaged: copy it again."
        ) from error


def adapter_base(folder: Path) -> str | None:
    """The base that an adapter names."""
    return read_json(folder / "adapter_config.json").get("base_model_name_or_path")


@torch.no_grad()
def add_adapter(weights: Mapping[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    """``W + alpha / r * B A`` for every matrix that the adapter has; in fp32, rounded once.

    Weights of the base have its own names; the folder holds ``adapter_config.json`` and ``adapter_model``.

    Raises:
        ModelLoadError: another kind of adapter, or one of another base; names the weights.
    """
    config = read_json(folder / "adapter_config.json")
    others = [key for key in _OTHER_FORMS if config.get(key)]
    if (start := config.get("init_lora_weights")) not in _STARTS:
        others.append(f"init_lora_weights {start!r}")
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or others:
        raise ModelLoadError(
            f"{folder}: only LoRA without biases can be merged, got peft_type "
            f"{config.get('peft_type')!r}, bias {config.get('bias')!r}"
            + (f", {', '.join(others)}" if others else "")
        )
    adapter = _read_adapter(folder)
    layers = sorted({key.split(".lora_")[0] for key in adapter})
    result = dict(weights)
    if strange := [layer for layer in layers if f"{layer}.weight" not in weights]:
        raise ModelLoadError(
            f"{folder} has adapters for {len(strange)} layers that the base does not have: "
            f"{shorten(strange, limit=4)}. Name the base that it was trained on"
        )
    for layer in layers:
        down, up = (adapter[f"{layer}.lora_{half}.weight"].float() for half in "AB")
        base = weights[f"{layer}.weight"]
        if (up.shape[0], down.shape[1]) != tuple(base.shape):
            raise ModelLoadError(
                f"{folder}: the adapter of {layer} is for a matrix of {up.shape[0]} x {down.shape[1]}, the "
                f"base has {tuple(base.shape)}. Name the base that it was trained on"
            )
        # As peft matches: the first pattern, a regular expression of whole parts of the name.
        patterns, rank = config.get("alpha_pattern") or {}, down.shape[0]
        own = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer))
        alpha = next(own, config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        result[f"{layer}.weight"] = (base.float() + scale * (up @ down)).to(base.dtype)
    return result


def _read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if file is None:
        raise ModelLoadError(f"{folder} has neither {' nor '.join(_FILES)}. Finish the copy")
    weights = {
        key.removeprefix(_PREFIX).replace(".default.", "."): value
        for key, value in read_weights_file(file).items()
    }
    layers = {key.split(".lora_")[0] for key in weights}
    wanted = {f"{layer}.lora_{half}.weight" for layer in layers for half in "AB"}
    if wrong := sorted(set(weights) ^ wanted):
        raise ModelLoadError(
            f"{folder} is no whole LoRA adapter: {shorten(wrong, limit=4)} missing or unexpected"
        )
    return weights


# --- files of torch.save ---


_ZIP_START = b"PK\x03\x04"
_LEGACY_START = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a file of tensors, such as ``pytorch_model.bin``, memory-mapped where its format permits.

    Raises:
        ModelLoadError: the file is damaged, or holds anything but tensors by name.
    """
    content = _read(path, TensorReader, map_location="cpu", mmap=True)
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items()
    ):
        raise ModelLoadError(
            f"{path} can't be read: it should hold tensors by name, and nothing else"
        )
    return content


def read_training_state(
    path: str | Path, *, map_location: Any = "cpu", mmap: bool = False
) -> dict[str, Any]:
    """Read a checkpoint of training: mmengine's ``.pth``, DeepSpeed's ``*_states.pt``, our ``rank_*.pt``.

    ``map_location`` is as in ``torch.load``; ``mmap`` maps the tensors instead of reading them.

    Raises:
        ModelLoadError: the file is damaged, or asks for what such a checkpoint does not have.
    """
    content = _read(Path(path), StateReader, map_location=map_location, mmap=mmap)
    if not isinstance(content, dict):
        raise ModelLoadError(
            f"{path} can't be read: it holds a {type(content).__name__}, no checkpoint"
        )
    if isinstance(meta := content.get("meta"), dict):
        # The run's config as Python text, which mmengine executes when it resumes, to compare GPUs that no
        # config names any more. A resumed run has its own config.
        meta.pop("config", None)
    return content


def _read(path: Path, reader: type[TensorReader], *, map_location: Any, mmap: bool) -> Any:
    if os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0").lower() in ("1", "y", "yes", "true"):
        raise ModelLoadError(
            f"{path} can't be read while TORCH_FORCE_WEIGHTS_ONLY_LOAD is set. Unset it: this reader is "
            "stricter than PyTorch's weights_only"
        )
    with path.open("rb") as file:
        start = file.read(len(_LEGACY_START))
    try:
        if start.startswith(_ZIP_START):
            sizes = _storage_sizes(path)
            source: str | io.BytesIO = os.fspath(path)
        elif start == _LEGACY_START:
            # Without a file descriptor PyTorch does not try the tar format of 2016, which unpacks files.
            sizes, source, mmap = None, io.BytesIO(path.read_bytes()), False
        else:
            raise pickle.UnpicklingError("it is no file of torch.save")
        unpickler = type("Reader", (reader,), {"sizes": sizes})
        module = SimpleNamespace(
            __name__=__name__,
            Unpickler=unpickler,
            load=lambda file, **options: unpickler(file, **options).load(),
        )
        return torch.load(source, map_location, module, weights_only=False, mmap=mmap)
    except OSError:
        raise
    except Exception as error:  # whatever a damaged or hostile file makes of it
        raise ModelLoadError(
            f"{path} can't be read ({type(error).__name__}: {error}). Nothing in it was run. "
            "If it is your own checkpoint, it is damaged: copy it again"
        ) from error


def _storage_sizes(path: Path) -> dict[str, int]:
    """Return the size in bytes of each storage in a zip file; refuse what ``torch.save`` does not write."""
    _check_directory(path)
    # torch.load would hand TorchScript to torch.jit.load; it recognises it by this name.
    if "constants.pkl" in torch._C.PyTorchFileReader(os.fspath(path)).get_all_records():
        raise pickle.UnpicklingError("it is a TorchScript archive")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise pickle.UnpicklingError("its members are compressed")
    sizes = {member.filename.partition("/")[2]: member.file_size for member in members}
    if len(sizes) != len(members):
        raise pickle.UnpicklingError("two of its members have the same name")
    return {
        name.removeprefix("data/"): size for name, size in sizes.items() if name.startswith("data/")
    }


def _check_directory(path: Path) -> None:
    """Refuse a zip file in which PyTorch could find another directory than Python, which is looked at here.

    Both take the one that the last 22 bytes name, but each reads ZIP64's record at another place.
    """
    length = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, length - 98))
        tail = file.read().rjust(98, b"\0")
    place, (size, start) = length - 22, struct.unpack("<II", tail[-10:-2])
    alone = tail[-22:-18] == b"PK\5\6"
    if tail[-42:-38] == b"PK\6\7":  # where ZIP64's record is; it stands just before
        place, (size, start) = length - 98, struct.unpack("<QQ", tail[-58:-42])
        alone &= tail[:4] == b"PK\6\6" and struct.unpack("<Q", tail[-34:-26])[0] == place
    if not alone or start + size != place:
        raise pickle.UnpicklingError("its directory is not at its end")


FOREIGN_READERS = (
    "deepspeed.checkpoint.deepspeed_checkpoint",
    "deepspeed.checkpoint.ds_to_universal",
    "deepspeed.checkpoint.universal_checkpoint",
    "deepspeed.checkpoint.zero_checkpoint",
    "deepspeed.runtime.base_optimizer",
    "deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.utils.zero_to_fp32",
    "mmengine.runner.checkpoint",
    "xtuner.model.utils",
    "xtuner.tools.utils",
    "xtuner.utils.zero_to_any_dtype",
)
"""Modules of the pinned packages that open checkpoints of training by ``torch.load``."""


def install_safe_reader() -> None:
    """Let mmengine, DeepSpeed and xtuner open checkpoints by :func:`read_training_state`.

    They call ``torch.load`` with ``weights_only=False``, or leave it to the installed torch: a file runs what
    it likes, or their own state is refused. In these modules ``torch.load`` is
    replaced, and a checkpoint is a local file. Calling it again changes nothing. Permanent.
    """
    for name in FOREIGN_READERS:
        module: Any = importlib.import_module(name)
        module.torch = _TorchWithSafeLoad("torch")
        if name == "mmengine.runner.checkpoint":
            module.load_url = _refuse_url


class _TorchWithSafeLoad(types.ModuleType):
    """``torch`` for a foreign module that opens checkpoints; its ``load`` runs nothing."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def load(self, file: Any, map_location: Any = None, mmap: bool | None = None, **_: Any) -> Any:
        if not isinstance(file, (str, os.PathLike)):
            raise ModelLoadError("a checkpoint must be a local file; it can't be read from memory")
        return read_training_state(Path(file), map_location=map_location, mmap=bool(mmap))


def _refuse_url(url: str, *_: Any, **__: Any) -> NoReturn:
    raise ModelLoadError(f"a checkpoint must be a local file, got {url!r}. Download it first")
