"""Every workaround for xtuner 0.2.0, mmengine 0.10.6, DeepSpeed 0.16.2 and torch, in one place.

Each says what goes wrong, and until when it is needed. :func:`apply` (all but the last) is called by
``import gmai_xtuner.plugin``: a string-style config imports it before xtuner looks at anything else,
and there is no later place that all ``xtuner`` commands pass.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gmai_xtuner.checkpoint.pickles import install_safe_reader
from gmai_xtuner.core.errors import GMAIError

DEEPSPEED_NAMES = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


def apply() -> None:
    """Install all workarounds; calling it again changes nothing."""
    tell_own_errors_plainly()
    keep_standard_output_clean()
    name_deepspeed_configs()
    install_safe_reader()
    answer_bf16_on_cpu()
    launch_without_gpu()
    skip_shared_memory_op()
    wait_for_gathered_weights()
    read_zero_checkpoints_exactly()
    read_frozen_weights()
    resume_from_a_work_dir()
    import_bitsandbytes_without_triton_ops()
    accumulate_all_gradients_in_fp32()
    convert_checked_and_exact()


def tell_own_errors_plainly() -> None:
    """``xtuner``'s commands end with the text of our errors, which says what to do, and without a traceback.

    ``GMAI_TRACEBACK=1`` shows it; other programs that import this package are left alone. xtuner has no
    errors of its own that could be told so: permanent.
    """
    main: Any = sys.modules["__main__"]
    (xtuner,) = importlib.util.find_spec("xtuner").submodule_search_locations  # type: ignore[union-attr, misc]
    tools = Path(xtuner, "tools").resolve()
    if not Path(getattr(main, "__file__", None) or "").resolve().is_relative_to(tools):
        return
    if os.environ.get("GMAI_TRACEBACK", "0") != "0" or sys.excepthook is not sys.__excepthook__:
        return

    def tell(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if isinstance(error, GMAIError):
            print(f"error: {error}", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = tell


def keep_standard_output_clean() -> None:
    """DeepSpeed's log goes to standard error.

    Its logger takes the standard output when it is imported, and at once says which accelerator it has
    found: no command could print a JSON object alone. Until DeepSpeed logs to standard error.
    """
    with contextlib.redirect_stdout(sys.stderr):
        importlib.import_module("deepspeed")


def name_deepspeed_configs() -> None:
    """``--deepspeed zero2`` means our bf16 file.

    xtuner looks names up in ``cfgs_name_path``, after the config file has been loaded; it only knows
    its own ``deepspeed_zero2``, whose ``"auto"`` precision asks the device. Not a defect: permanent.
    """
    from xtuner.configs import cfgs_name_path

    folder = Path(__file__).parent / "train" / "deepspeed"
    for name in DEEPSPEED_NAMES:
        cfgs_name_path[name] = str(folder / f"{name}.json")


def answer_bf16_on_cpu() -> None:
    """xtuner asks ``torch.cpu.is_bf16_supported()``, which torch does not have.

    It does when a DeepSpeed file of xtuner's own says bf16 ``"auto"`` on a machine without a GPU. Until
    xtuner asks differently.
    """
    if not hasattr(torch.cpu, "is_bf16_supported"):
        torch.cpu.is_bf16_supported = lambda: True  # type: ignore[attr-defined]


def launch_without_gpu() -> None:
    """Several processes on a machine without a GPU talk through gloo.

    mmengine's ``init_dist`` calls ``torch.cuda.set_device`` and takes the config's ``nccl`` whatever the
    machine has. Until mmengine looks first.
    """
    if torch.cuda.is_available():
        return
    import mmengine.dist.utils as dist_utils

    original: Callable[..., None] = dist_utils._init_dist_pytorch
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def init_dist_pytorch(backend: str, init_backend: str = "torch", **kwargs: Any) -> None:
        if init_backend == "deepspeed":
            import deepspeed

            deepspeed.init_distributed(dist_backend="gloo", **kwargs)
        else:
            torch.distributed.init_process_group(backend="gloo", **kwargs)

    dist_utils._init_dist_pytorch = init_dist_pytorch


def skip_shared_memory_op() -> None:
    """No C++ compiler is needed on a machine without a GPU.

    DeepSpeed builds its ``shm_comm`` operator when it starts on a CPU (half a minute, and it fails without
    a compiler). Only its inference all-reduce uses it. Until DeepSpeed builds it on first use.
    """
    if torch.cuda.is_available():
        return
    # Not `import deepspeed.comm.torch`: the attribute of that name is torch itself.
    module: Any = importlib.import_module("deepspeed.comm.torch")
    module.build_shm_op = lambda: None


def wait_for_gathered_weights() -> None:
    """ZeRO-3 on several processes without a GPU reads no weight that is still on its way.

    DeepSpeed gathers the weights of a list one by one and waits for the last alone
    (``zero/partition_parameters.py``, ``_allgather_params_coalesced``). NCCL keeps the order; gloo does not,
    and now and then a weight holds what was in memory before. Until DeepSpeed waits for each.
    """
    if torch.cuda.is_available():
        return
    module: Any = importlib.import_module("deepspeed.comm")
    original: Callable[..., Any] = module.all_gather_into_tensor
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def all_gather_into_tensor(*args: Any, **kwargs: Any) -> Any:
        handle = original(*args, **kwargs)
        if handle is not None:
            handle.wait()
        return handle

    module.all_gather_into_tensor = all_gather_into_tensor


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

    original = zero_to_any_dtype.get_state_dict_from_zero_checkpoint
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def with_frozen_weights(checkpoint_dir: str, tag: str, *args: Any, **kwargs: Any) -> Any:
        from gmai_xtuner.checkpoint.llava import read_frozen

        state = original(checkpoint_dir, tag, *args, **kwargs)
        return {**state, **read_frozen(Path(checkpoint_dir) / tag)}

    zero_to_any_dtype.get_state_dict_from_zero_checkpoint = with_frozen_weights


def resume_from_a_work_dir() -> None:
    """``xtuner train ... --resume DIR`` takes a work dir, also one that has no checkpoint yet.

    xtuner reads the seed out of the path that it is given, with all weights around it, on every rank; of a
    work dir it says "can't find files matching *_model_states.pt". ``xtuner/tools/train.py`` runs as the main
    module and has its own name for that function. :func:`gmai_xtuner.train.resume.choose_checkpoint`
    says what the path means. Until xtuner takes a work dir.
    """
    from xtuner.tools import utils

    original: Callable[[str], int | None] = utils.get_seed_from_checkpoint
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def get_seed_from_checkpoint(path: str) -> int | None:
        from gmai_xtuner.train.resume import seed_of

        seed = seed_of(Path(path))
        if seed is not None:
            return seed
        # Nothing to resume from: the seed of a first start.
        arguments = main.parse_args()
        if arguments.seed is not None:
            return arguments.seed
        config = Config.fromfile(arguments.config)
        config.merge_from_dict(arguments.cfg_options or {})
        return config.get("randomness", {}).get("seed")

    from mmengine.config import Config

    main: Any = sys.modules["__main__"]
    utils.get_seed_from_checkpoint = get_seed_from_checkpoint
    if getattr(main, "get_seed_from_checkpoint", None) is original:
        main.get_seed_from_checkpoint = get_seed_from_checkpoint


def convert_checked_and_exact() -> None:
    """``xtuner convert pth_to_hf`` keeps a checkpoint's precision, and refuses one that does not fit.

    It puts weights into the model one by one, each rounded to the dtype of the config, so that ``--fp32``
    wrote bf16. What the checkpoint lacks keeps the base's weights without a word, and another geometry is
    an error about one tensor without its name. A work dir is taken as its newest whole checkpoint.
    ``pth_to_hf.py`` runs as the main module and has its own names for what it calls. Until xtuner checks.
    """
    main: Any = sys.modules["__main__"]
    if not str(getattr(main, "__file__", "")).endswith(os.path.join("", "pth_to_hf.py")):
        return
    put = main.set_module_tensor_to_device
    if hasattr(put, "__wrapped__"):
        return
    state: dict[str, torch.Tensor] = {}
    checked: list[object] = []

    @functools.wraps(main.guess_load_checkpoint)
    def guess_load_checkpoint(path: str) -> dict[str, torch.Tensor]:
        from gmai_xtuner.checkpoint.training import load_checkpoint_state

        state.update(load_checkpoint_state(path))
        return state

    @functools.wraps(put)
    def set_module_tensor_to_device(
        model: Any, name: str, device: str, value: torch.Tensor, **kwargs: Any
    ) -> None:
        from gmai_xtuner.checkpoint.training import check_trained_state

        if not checked:
            check_trained_state(model, state, source="the checkpoint")
            checked.append(model)
        put(model, name, device, value, **{"dtype": value.dtype, **kwargs})

    main.guess_load_checkpoint = guess_load_checkpoint
    main.set_module_tensor_to_device = set_module_tensor_to_device


def import_bitsandbytes_without_triton_ops() -> None:
    """``import bitsandbytes`` works beside the Triton of torch 2.6 and newer; peft needs it for any LoRA.

    bitsandbytes 0.45.0 (xtuner pins it) imports ``triton.ops``, which Triton 3.2 dropped. It is told that
    there is no Triton, which only turns off 8-bit layers that nobody uses here. Until xtuner takes
    bitsandbytes 0.45.1, which does not import it (its pull request 1413).
    """
    installed = importlib.util.find_spec("bitsandbytes") and importlib.util.find_spec("triton")
    if not installed or "bitsandbytes" in sys.modules or importlib.util.find_spec("triton.ops"):
        return
    if importlib.metadata.version("bitsandbytes") != "0.45.0":
        return
    name = "bitsandbytes.triton.triton_utils"
    module: Any = types.ModuleType(name)
    module.is_triton_available = lambda: False
    sys.modules[name] = module


def accumulate_all_gradients_in_fp32() -> None:
    """Under ZeRO-2 the gradients of a step are summed in fp32, and with offloading all of them.

    DeepSpeed 0.16.2 does not honour ``data_types.grad_accum_dtype`` under ZeRO-2: in bf16 the sum of 128
    micro-batches is 1 % off, that of 512, as on one GPU, 14 %. And with the optimiser offloaded it drops
    every micro-batch of a step but the first and the last (its pull request 7967, April 2026). Until xtuner
    takes a DeepSpeed that does neither.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as Zero

    original = Zero.get_flat_partition
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def get_flat_partition(self: Any, *args: Any, **kwargs: Any) -> Any:
        flat = original(self, *args, **kwargs)
        if isinstance(flat, list):
            return [part.to(self.gradient_accumulation_dtype) for part in flat]
        return flat

    def accumulate(self: Any, param: torch.Tensor) -> None:
        number = self.get_param_id(param)
        gradient = self.get_param_gradient_attribute(param).data.view(-1)
        total = self.accumulated_grads_in_cpu.get(number)
        if total is None:
            total = torch.empty(param.numel(), dtype=torch.float32, device=self.device)
            self.accumulated_grads_in_cpu[number] = total
        here = gradient.to(total.device, torch.float32)
        # Not every parameter need have a gradient in the first micro-batch, and ZeRO-1 calls this in the
        # last one only.
        begun: set[int] = self.__dict__.setdefault("_begun_in_this_step", set())
        total.copy_(here) if self.micro_step_id == 0 or number not in begun else total.add_(here)
        begun.add(number)
        if self.is_gradient_accumulation_boundary:
            gradient.copy_(total)  # what norm, overflow check and optimiser read
            begun.discard(number)

    Zero.get_flat_partition = get_flat_partition
    Zero.async_accumulate_grad_in_cpu_via_gpu = accumulate
