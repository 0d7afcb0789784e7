# SPDX-License-Identifier: Apache-2.0

"""Unpicklers that call nothing but their own makers; see :mod:`gmai_xtuner.checkpoint.weights`."""

from __future__ import annotations

import importlib
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch
from torch.storage import TypedStorage


@dataclass(frozen=True, slots=True)
class _Maker:
    """Stand for a class or function that a file names; only the reader calls it."""

    name: str
    make: Callable[..., Any]


def _refuse(reader: Any) -> NoReturn:
    raise pickle.UnpicklingError("it holds an instruction that torch.save does not write")


def _expect(condition: bool, what: str) -> None:
    if not condition:
        raise pickle.UnpicklingError(f"it holds {what}")


def _tensor(
    storage: Any,
    offset: int,
    size: Any,
    stride: Any,
    grad: Any = False,
    hooks: Any = (),
    _: Any = None,
) -> torch.Tensor:
    _expect(isinstance(storage, TypedStorage) and not hooks, "a tensor of another form")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    inside = offset >= 0 and min((*size, *stride), default=0) >= 0 and last < storage._size()
    _expect(inside or 0 in size, "a tensor that reaches beyond its storage")
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, bool(grad), OrderedDict())


def _parameter(data: Any, grad: Any, hooks: Any = (), _: Any = None) -> torch.Tensor:
    _expect(isinstance(data, torch.Tensor) and not hooks, "a parameter of another form")
    return torch.nn.Parameter(data, requires_grad=bool(grad))


def _tensor_with_attributes(build: Any, kind: Any, arguments: Any, _: Any) -> torch.Tensor:
    """Build a tensor without its attributes: DeepSpeed's describe the process that saved it."""
    known = {name: make for name, make in _TENSORS.items() if name.startswith("torch.")}
    plain = isinstance(kind, _Maker) and kind.name in _TENSOR_TYPES
    _expect(plain and isinstance(build, _Maker) and build.name in known, "a tensor of another type")
    return known[build.name](*arguments)


_KEYS = (str, bytes, int, float, bool, type(None))


def _keys(keys: Iterable[Any]) -> None:
    """Refuse keys of dictionaries and items of sets whose hash could take for ever, or end the process."""
    plain = all(
        type(key) in _KEYS or (type(key) is tuple and all(type(one) in _KEYS for one in key))
        for key in keys
    )
    _expect(plain, "a key of another form")


def _pairs(kind: Callable[..., Any]) -> Callable[..., Any]:
    """Return a maker of a dictionary from nothing, a dictionary or a list of pairs."""
    plain = _plain(kind, list, dict)

    def make(*arguments: Any) -> Any:
        if arguments and type(arguments[0]) is list:
            _keys(key for key, _ in arguments[0])
        return plain(*arguments)

    return make


def _set(*arguments: Any) -> set[Any]:
    _expect(len(arguments) == 1 and type(arguments[0]) in (list, tuple), "a set of another form")
    _keys(arguments[0])
    return set(arguments[0])


def _latin1(text: Any, encoding: Any) -> bytes:
    _expect(isinstance(text, str) and encoding == "latin1", "an encoded string of another form")
    return text.encode("latin1")


def _plain(kind: Callable[..., Any], *types: type) -> Callable[..., Any]:
    """Return a maker that calls ``kind`` with at most one argument of the given types."""

    def make(*arguments: Any) -> Any:
        known = len(arguments) <= 1 and all(type(value) in types for value in arguments)
        _expect(known, f"a {getattr(kind, '__name__', kind)} of another form")
        return kind(*arguments)

    return make


_TENSORS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": _pairs(OrderedDict),
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
}
_TENSOR_TYPES = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter")
_REFUSED = "INST OBJ NEWOBJ_EX PERSID DICT FROZENSET EXT1 EXT2 EXT4 NEXT_BUFFER READONLY_BUFFER"


def _checked_addition(
    name: str,
    kind: type,
    target: Callable[[Any], Any] = lambda self: self.metastack[-1][-1],
    keys: Callable[[list[Any]], list[Any]] = lambda stack: [],
) -> Callable[[Any], None]:
    """Return an instruction of Python's unpickler that adds items, to a container of one kind alone."""
    load = getattr(pickle._Unpickler, name)  # type: ignore[attr-defined]

    def add(self: Any) -> None:
        _keys(keys(self.stack))
        _expect(isinstance(target(self), kind), f"items for a {type(target(self)).__name__}")
        load(self)

    return add


class TensorReader(pickle._Unpickler):  # type: ignore[name-defined]
    """Unpickle tensors in dictionaries, lists and tuples.

    The base is Python's own unpickler, since the one in C sets attributes on whatever a file names. The
    instructions that call, fill in, look up or add items are replaced; the others build plain values.
    """

    sizes: ClassVar[Mapping[str, int] | None] = None
    """Bytes of each storage of a zip file, by key."""
    makers: ClassVar[Mapping[str, Callable[..., Any]]] = _TENSORS
    stack: list[Any]
    append: Callable[[Any], None]

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module.replace('__builtin__', 'builtins')}.{name}".replace(
            "numpy._core", "numpy.core"
        )
        if full in self.makers:
            return _Maker(full, self.makers[full])
        if module == "torch" and isinstance(found := vars(torch).get(name), torch.dtype):
            return found
        if full == "torch.storage.UntypedStorage":
            return torch.UntypedStorage
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a checkpoint never needs")

    def load_reduce(self) -> None:
        arguments, maker = self.stack.pop(), self.stack.pop()
        _expect(
            isinstance(maker, _Maker) and type(arguments) is tuple, "a call of what is no class"
        )
        self.append(maker.make(*arguments))

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        self.fill(target, state)

    def fill(self, target: Any, state: Any) -> None:
        """Fill in the fields of an object that a maker has built."""
        metadata = state.get("_metadata") if type(state) is dict else None
        known = type(target) is OrderedDict and type(metadata) is OrderedDict and len(state) == 1
        _expect(known, f"fields for a {type(target).__name__}")
        target._metadata = metadata

    def load_binpersid(self) -> None:
        identity = self.stack.pop()
        _expect(type(identity) is tuple and len(identity) in (5, 6), "a reference of another form")
        word, kind, key, location, number, *_ = identity
        dtype = torch.uint8 if kind is torch.UntypedStorage else getattr(kind, "dtype", None)
        _expect(
            word == "storage"
            and isinstance(dtype, torch.dtype)
            and type(key) is type(location) is str
            and type(number) is int
            and number >= 0,
            "a reference to something that is no storage",
        )
        if self.sizes is not None:
            enough = number * torch._utils._element_size(dtype) <= self.sizes.get(key, -1)
            _expect(enough, f"storage {key!r}, which the file does not have in full")
        self.append(self.persistent_load(identity))

    _REPLACED: ClassVar[Mapping[bytes, Callable[[Any], None]]] = {
        pickle.REDUCE: load_reduce,
        pickle.NEWOBJ: load_reduce,
        pickle.BUILD: load_build,
        pickle.BINPERSID: load_binpersid,
        pickle.APPEND: _checked_addition("load_append", list, lambda self: self.stack[-2]),
        pickle.APPENDS: _checked_addition("load_appends", list),
        pickle.SETITEM: _checked_addition(
            "load_setitem", dict, lambda self: self.stack[-3], lambda stack: stack[-2:-1]
        ),
        pickle.SETITEMS: _checked_addition("load_setitems", dict, keys=lambda stack: stack[::2]),
        pickle.ADDITEMS: _checked_addition("load_additems", set, keys=lambda stack: stack),
        **{getattr(pickle, name): _refuse for name in _REFUSED.split()},
    }
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch,  # type: ignore[attr-defined]
        **{opcode[0]: load for opcode, load in _REPLACED.items()},
    }


def _of_package(module: str, name: str, *kinds: type, fixed: tuple[Any, ...] = ()) -> Any:
    """Return a maker of a package's class; a file gives these types, or nothing for the fixed arguments."""

    def make(*arguments: Any) -> Any:
        _expect(tuple(map(type, arguments)) == kinds, f"a {name} of another form")
        return getattr(importlib.import_module(module), name)(*(arguments or fixed))

    return make


def _statistic(owner: Any, name: Any) -> str:
    """Answer mmengine's ``getattr(HistoryBuffer, "mean")`` with the name; the buffer has its own methods."""
    _expect(
        isinstance(owner, _Maker)
        and owner.name == "mmengine.logging.history_buffer.HistoryBuffer"
        and type(name) is str
        and name in ("min", "max", "mean", "current"),
        "a call of getattr",
    )
    return name


def _default_dict(factory: Any, *values: Any) -> Any:
    plain = {"builtins.dict": dict, "builtins.list": list}
    _expect(isinstance(factory, _Maker) and factory.name in plain, "a defaultdict of another form")
    return defaultdict(plain[factory.name], *values)


class _Dtype:
    """Hold a dtype of plain values; its byte order comes later in the file."""

    __slots__ = ("dtype",)

    def __init__(self, name: Any, *_: Any) -> None:
        # Text such as "f8", never "O" (objects) or the fields of a structure.
        known = type(name) is str and name[:1] in tuple("?biufcUS") and name[1:].isdigit()
        _expect(known, "a dtype of objects")
        self.dtype = np.dtype(name)


def _scalar(kind: Any, content: Any) -> Any:
    _expect(isinstance(kind, _Dtype) and type(content) is bytes, "a number of another form")
    return np.frombuffer(content, kind.dtype, count=1)[0]


def _empty_array(kind: Any, *_: Any) -> np.ndarray:
    _expect(isinstance(kind, _Maker) and kind.name == "numpy.ndarray", "an array of another form")
    return np.empty(0, np.int8)


_LOSS_SCALER = "deepspeed.runtime.fp16.loss_scaler"
_CLASSES: tuple[tuple[str, str, tuple[type, ...], tuple[Any, ...]], ...] = (
    ("mmengine.logging.history_buffer", "HistoryBuffer", (), ()),
    ("mmengine.config.config", "ConfigDict", (dict,), ()),
    (_LOSS_SCALER, "LossScaler", (), ()),
    (_LOSS_SCALER, "DynamicLossScaler", (), ()),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum", (int,), ()),
    ("deepspeed.utils.tensor_fragment", "fragment_address", (), (0, 0)),
)
"""Module, class, the types of what a file gives it, and what it gets otherwise."""
_SCALER = """cur_scale dynamic dtype cur_iter last_overflow_iter scale_factor min_scale scale_window
delayed_shift cur_hysteresis consecutive_hysteresis raise_error_at_min_scale"""
_NUMBERS = (int, float, bool, type(None), torch.dtype)
_FIELDS: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    "mmengine.logging.history_buffer.HistoryBuffer": {
        "max_length": (int,),
        "_log_history": (np.ndarray,),
        "_count_history": (np.ndarray,),
        "statistics_methods": (dict,),
    },
    "deepspeed.utils.tensor_fragment.fragment_address": {"numel": (int,), "start": (int,)},
    **{
        f"{_LOSS_SCALER}.{name}": dict.fromkeys(_SCALER.split(), _NUMBERS)
        for name in ("LossScaler", "DynamicLossScaler")
    },
}
"""Class -> the fields that a file may fill in, and the types of their values."""


class StateReader(TensorReader):
    """Unpickle what mmengine and DeepSpeed keep in a checkpoint beside tensors."""

    makers: ClassVar[Mapping[str, Callable[..., Any]]] = {
        **_TENSORS,
        "torch._tensor._rebuild_from_type_v2": _tensor_with_attributes,
        **dict.fromkeys(_TENSOR_TYPES, _refuse),
        "torch.Size": _plain(torch.Size, tuple, list),
        "torch.device": lambda *place: torch.device(*place),
        "_codecs.encode": _latin1,
        "builtins.bytes": _plain(bytes),
        "builtins.set": _set,
        "builtins.dict": _plain(dict),
        "builtins.list": _plain(list),
        "builtins.getattr": _statistic,
        "collections.defaultdict": _default_dict,
        **{
            f"{module}.{name}": _of_package(module, name, *kinds, fixed=fixed)
            for module, name, kinds, fixed in _CLASSES
        },
        "numpy.dtype": _Dtype,
        "numpy.ndarray": _refuse,
        "numpy.core.multiarray.scalar": _scalar,
        "numpy.core.multiarray._reconstruct": _empty_array,
    }

    def fill(self, target: Any, state: Any) -> None:
        fields = _FIELDS.get(f"{type(target).__module__}.{type(target).__qualname__}")
        if type(target) is np.ndarray:
            version, shape, kind, fortran, content = state
            _expect(isinstance(kind, _Dtype) and type(content) is bytes, "an array of objects")
            target.__setstate__((version, shape, kind.dtype, fortran, content))
        elif type(target) is _Dtype:
            order, fields_of_structure = state[1], state[2:5]
            _expect(
                order in ("<", ">", "|", "=") and not any(fields_of_structure), "a dtype of objects"
            )
            target.dtype = target.dtype.newbyteorder(order)
        elif fields is not None:
            _expect(type(state) is dict, f"fields for a {type(target).__name__}")
            for name, value in state.items():
                _expect(isinstance(value, fields.get(name, ())), f"field {name!r} of another form")
                if name != "statistics_methods":
                    setattr(target, name, value)
        else:
            super().fill(target, state)
