# SPDX-License-Identifier: Apache-2.0

"""Workarounds for xtuner 0.2.0: what goes wrong, and until when each is needed."""

from __future__ import annotations

import errno
import functools
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gmai_xtuner.compat.deepspeed import wrap_once
from gmai_xtuner.core.errors import GMAIError

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors that say what to do by themselves, without a traceback."""


def xtuner_tool() -> str | None:
    """Return which of ``xtuner``'s commands this process runs (``train``); ``None`` for another program."""
    main: Any = sys.modules["__main__"]
    (xtuner,) = importlib.util.find_spec("xtuner").submodule_search_locations  # type: ignore[union-attr, misc]
    file = Path(getattr(main, "__file__", None) or "").resolve()
    return file.stem if file.is_relative_to(Path(xtuner, "tools").resolve()) else None


def own_the_command() -> None:
    """``xtuner``'s commands end with the text of our errors, and ``xtuner train`` owns its work dir.

    The text says what to do, so that there is no traceback; ``GMAI_TRACEBACK=1`` shows it. Other programs
    that import this package are left alone. Permanent: xtuner has no errors of its own that could be told
    so, and nothing in it watches a work dir.

    Raises:
        GMAIError: another run has the work dir, see :func:`gmai_xtuner.train.start.begin`.
    """
    from gmai_xtuner.train import start, status

    tool = xtuner_tool()
    if tool is None or sys.excepthook not in (sys.__excepthook__, status.record_failed_start):
        return
    plainly = os.environ.get("GMAI_TRACEBACK", "0") == "0"

    def tell(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        status.record_failure(error)
        of_disk = isinstance(error, OSError) and error.errno in DISK_ERRORS
        if not plainly or not (isinstance(error, GMAIError) or of_disk):
            sys.__excepthook__(kind, error, trace)
        print(f"error: {status.in_plain_words(error)}", file=sys.stderr)

    sys.excepthook = tell
    if tool == "train":
        start.begin(sys.modules["__main__"].parse_args())


def read_zero_checkpoints_exactly() -> None:
    """DeepSpeed checkpoints come back in fp32, as they were saved.

    xtuner's reader, which ``xtuner convert pth_to_hf`` uses even with ``--fp32``, rounds every weight to
    fp16 by default: each stage would start from rounded weights, and values that bf16 holds but fp16 does
    not would become 0 or infinite. Until xtuner's default changes.
    """
    from xtuner.utils import zero_to_any_dtype

    read = inspect.unwrap(zero_to_any_dtype.get_state_dict_from_zero_checkpoint)
    read.__defaults__ = (None, False, torch.float32)


def read_frozen_weights() -> None:
    """Frozen weights that a checkpoint brings along come back as well.

    xtuner's reader takes what has been trained, and buffers. A stage may also keep weights that it found
    in the checkpoint before it and does not train, see :mod:`gmai_xtuner.checkpoint.llava`. Not a defect:
    permanent.
    """
    from xtuner.utils import zero_to_any_dtype

    def make(read: Callable[..., Any]) -> Callable[..., Any]:
        def with_frozen_weights(checkpoint_dir: str, tag: str, *args: Any, **kwargs: Any) -> Any:
            from gmai_xtuner.checkpoint.llava import read_frozen

            state = read(checkpoint_dir, tag, *args, **kwargs)
            return {**state, **read_frozen(Path(checkpoint_dir) / tag)}

        return with_frozen_weights

    wrap_once(zero_to_any_dtype, "get_state_dict_from_zero_checkpoint", make)


def resume_from_a_work_dir() -> None:
    """``xtuner train ... --resume DIR`` takes a work dir, also one that has no checkpoint yet.

    xtuner reads the seed out of the path that it is given, with all weights around it, on every rank; of a
    work dir it says "can't find files matching *_model_states.pt". ``xtuner/tools/train.py`` runs as the main
    module and has its own name for that function. :func:`gmai_xtuner.train.resume.choose_checkpoint`
    says what the path means. Until xtuner takes a work dir.
    """
    from xtuner.tools import utils

    original: Callable[[str], int | None] = utils.get_seed_from_checkpoint
    main: Any = sys.modules["__main__"]

    def get_seed_from_checkpoint(path: str) -> int | None:
        from gmai_xtuner.train.resume import seed_of

        seed = seed_of(Path(path))
        if seed is not None:
            return seed
        # Nothing to resume from: the seed of a first start.
        arguments = main.parse_args()
        if arguments.seed is not None:
            return arguments.seed
        return command_config(arguments).get("randomness", {}).get("seed")

    from gmai_xtuner.train.start import command_config

    wrap_once(utils, "get_seed_from_checkpoint", lambda _: get_seed_from_checkpoint)
    if getattr(main, "get_seed_from_checkpoint", None) is original:
        main.get_seed_from_checkpoint = utils.get_seed_from_checkpoint


def check_before_anything_is_built() -> None:
    """``xtuner train`` stops on settings that nothing reads, and DeepSpeed gets what was settled.

    ``check_cfg`` is what it calls first with the whole config, and ``auto_dtype_of_deepspeed_config`` what it
    hands the DeepSpeed file through. Until xtuner checks.
    """
    main: Any = sys.modules["__main__"]
    if xtuner_tool() != "train":
        return

    def make(original: Callable[..., None]) -> Callable[..., None]:
        def check_cfg(cfg: Any, args: Any) -> None:
            from gmai_xtuner.train.start import add_trackers, check

            settled = check(cfg, options=args.cfg_options, deepspeed=args.deepspeed)
            add_trackers(cfg, args.work_dir or cfg.get("work_dir") or Path(args.config).stem)
            main.auto_dtype_of_deepspeed_config = lambda _: settled.settings
            original(cfg, args)

        return check_cfg

    wrap_once(main, "check_cfg", make)


def convert_checked_and_exact() -> None:
    """``xtuner convert pth_to_hf`` keeps a checkpoint's precision, and refuses one that does not fit.

    It puts weights into the model one by one, each rounded to the dtype of the config, so that ``--fp32``
    wrote bf16. What the checkpoint lacks keeps the base's weights without a word, and another geometry is
    an error about one tensor without its name. What another stage has learnt is dropped. A work dir is taken
    as its newest whole checkpoint.
    ``pth_to_hf.py`` runs as the main module and has its own names for what it calls. Until xtuner checks.
    """
    main: Any = sys.modules["__main__"]
    if xtuner_tool() != "pth_to_hf":
        return
    put = main.set_module_tensor_to_device
    if hasattr(put, "__wrapped__"):
        return
    state: dict[str, torch.Tensor] = {}
    unchecked: list[str] = []

    @functools.wraps(main.guess_load_checkpoint)
    def guess_load_checkpoint(path: str) -> dict[str, torch.Tensor]:
        from gmai_xtuner.checkpoint.training import load_checkpoint_state

        state.update(load_checkpoint_state(path))
        unchecked.append(path)
        return state

    @functools.wraps(put)
    def set_module_tensor_to_device(
        model: Any, name: str, device: str, value: torch.Tensor, **kwargs: Any
    ) -> None:
        from gmai_xtuner.checkpoint.llava import check_convertible
        from gmai_xtuner.train.start import command_config

        while unchecked:
            check_convertible(model, state, unchecked.pop(), command_config(main.parse_args()))
        put(model, name, device, value, **{"dtype": value.dtype, **kwargs})

    main.guess_load_checkpoint = guess_load_checkpoint
    main.set_module_tensor_to_device = set_module_tensor_to_device
