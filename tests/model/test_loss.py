# SPDX-License-Identifier: Apache-2.0

"""The chunked loss against torch's own cross entropy."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama import modeling_llama

from gmai_xtuner.checkpoint.llava import GMAILLaVAModel
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.data.dataset import collate_packs
from gmai_xtuner.model import liger
from gmai_xtuner.model.loss import install_loss_head, weighted_cross_entropy
from tests.model.test_llava import (
    ADAPTERS,
    build_model,
    loss_and_gradients,
    make_pack,
)


def example(*, requires_grad=True):
    torch.manual_seed(0)
    hidden = torch.randn(8, 6, dtype=torch.float64, requires_grad=requires_grad)
    weight = torch.randn(11, 6, dtype=torch.float64, requires_grad=requires_grad)
    return hidden, weight, torch.randint(0, 11, (8,)), torch.rand(8)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 8, 100])
def test_chunked_equals_plain_in_value_and_gradients(chunk_size):
    hidden, weight, targets, weights = example()
    losses = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    plain = 0.7 * (losses * weights).sum()
    expected = torch.autograd.grad(plain, (hidden, weight))

    total = 0.7 * weighted_cross_entropy(hidden, weight, targets, weights, chunk_size=chunk_size)
    got = torch.autograd.grad(total, (hidden, weight))

    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), plain, rtol=1e-6, atol=1e-6)
    for mine, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6)


class LargestWithVocabulary(TorchDispatchMode):
    """Rows of the largest tensor with a vocabulary's columns that any operation gives."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows, self.dtypes = vocabulary, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (self.vocabulary,):
                self.rows = max(self.rows, tensor.numel() // self.vocabulary)
                self.dtypes.add(tensor.dtype)
        return result


@pytest.mark.parametrize("chunk_size", [3, 64])
def test_only_a_chunk_of_logits_exists_at_a_time(chunk_size):
    torch.manual_seed(0)
    hidden = torch.randn(200, 2, requires_grad=True)
    weight = torch.randn(97, 2, requires_grad=True)  # `weight.T` has 2 rows of 97
    targets, weights = torch.randint(0, 97, (200,)), torch.rand(200)
    with LargestWithVocabulary(97) as chunked:
        weighted_cross_entropy(hidden, weight, targets, weights, chunk_size=chunk_size).backward()
    with LargestWithVocabulary(97) as plain:
        (F.cross_entropy(hidden @ weight.T, targets, reduction="none") * weights).sum().backward()
    assert chunked.rows == chunk_size
    assert plain.rows == 200


def test_the_scale_of_the_gradients_is_not_rounded_to_bf16():
    torch.manual_seed(0)
    hidden = torch.randn(64, 32).bfloat16().requires_grad_()
    weight = torch.randn(50, 32).bfloat16()
    targets, weights = torch.randint(0, 50, (64,)), torch.ones(64)
    weighted_cross_entropy(hidden, weight, targets, weights).backward()
    unscaled, hidden.grad = hidden.grad.double(), None
    # 1 / 2.99 lies almost half a bf16 step beside the next bf16 number.
    (weighted_cross_entropy(hidden, weight, targets, weights) / 2.99).backward()
    ratio = (hidden.grad.double() * unscaled).sum() / unscaled.square().sum()
    assert ratio.item() == pytest.approx(1 / 2.99, rel=2e-4)


def test_no_gradient_is_made_where_none_is_recorded():
    hidden, weight, targets, weights = example()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        weighted_cross_entropy(hidden, weight, targets, weights)
    assert counter.get_total_flops() == 2 * 8 * 6 * 11


def test_nothing_to_learn_gives_zero_and_keeps_the_graph():
    hidden = torch.randn(0, 4, requires_grad=True)
    weight = torch.randn(5, 4, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    loss = weighted_cross_entropy(hidden, weight, none, torch.zeros(0), chunk_size=4)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(weight.grad, torch.zeros(5, 4))


def test_the_head_gives_logits_or_the_loss():
    hidden, weight, targets, weights = example()
    head = torch.nn.Linear(6, 11, bias=False).double()
    head.weight.data.copy_(weight)
    install_loss_head(head)
    torch.testing.assert_close(head(hidden), hidden @ weight.T)
    expected = weighted_cross_entropy(hidden, weight, targets, weights)
    torch.testing.assert_close(head(hidden, targets, weights), expected)
    with pytest.raises(ValueError, match="bias"):
        install_loss_head(torch.nn.Linear(2, 2))


# --- How many of the language model's layers are recomputed: the same gradients, other work ---


def test_kept_layers_are_the_last_and_are_not_run_again():
    batch = collate_packs([make_pack((1, 3, 4), (0, 5, 2))])
    runs, flops = {}, {}
    for layers in (0, 1, 2, None):
        model = build_model(use_activation_checkpointing=True, recomputed_layers=layers)
        runs[layers] = calls = [0, 0]
        for index, layer in enumerate(model.llm.model.layers):
            layer.register_forward_pre_hook(
                lambda *_, index=index, calls=calls: calls.__setitem__(index, calls[index] + 1)
            )
        with FlopCounterMode(display=False) as counter:
            model(**batch)["loss"].backward()
        flops[layers] = counter.get_total_flops()
    assert runs == {0: [1, 1], 1: [2, 1], 2: [2, 2], None: [2, 2]}
    assert flops[0] < flops[1] < flops[2] == flops[None]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("layers", "adapters"), [(1, {}), (None, {}), (None, ADAPTERS)])
def test_gradients_stay_the_same(layers, adapters, reentrant, monkeypatch):
    # re-entrant is what ZeRO-3 gets
    monkeypatch.setattr("gmai_xtuner.model.llava.use_reentrant", lambda: reentrant)
    batch = collate_packs([make_pack((1, 3, 4), (2, 5, 2))])
    expected = loss_and_gradients(build_model(dtype=torch.float64, **adapters), [batch])
    model = build_model(
        dtype=torch.float64,
        **adapters,
        use_activation_checkpointing=True,
        recomputed_layers=layers,
        loss_chunk_size=2,
    )
    got = loss_and_gradients(model, [batch])
    assert got[0] == pytest.approx(expected[0], rel=1e-6)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=1e-5, atol=1e-8, msg=name)


def test_of_few_layers_all_are_recomputed_and_fewer_than_none_is_refused():
    model = build_model(use_activation_checkpointing=True, recomputed_layers=13)
    assert model.llm.model.recomputed_layers == 2
    with pytest.raises(GMAIError, match="must be 0 or more, got -1"):
        build_model(use_activation_checkpointing=True, recomputed_layers=-1)


# --- The forward and backward pass never need a value from the device, for which the host would wait ---


LEARNING = {
    "stage 1": {"freeze_llm": True, "freeze_visual_encoder": True},
    "stage 2": {"freeze_llm": True},
    "stage 3": {},
}
aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense,  # item(), bool(), int(), float()
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.equal,
    aten.is_nonzero,
    aten.bincount,
    aten.repeat_interleave,  # with a tensor of counts
}


class Waited(Exception):
    pass


class NeverWait(TorchDispatchMode):
    """On the CPU, raise where a CUDA tensor would make the host wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = func.overloadpacket is aten.index and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in tree_leaves(args[1])
        )
        if func.overloadpacket in WAITS or masks:
            raise Waited(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def _no_direct_reading(monkeypatch):
    """These two read memory without asking the dispatcher."""

    def refuse(*_):
        raise Waited

    monkeypatch.setattr(torch.Tensor, "tolist", refuse)
    monkeypatch.setattr(torch.Tensor, "numpy", refuse)


@pytest.mark.usefixtures("_no_direct_reading")
@pytest.mark.parametrize("stage", LEARNING)
@pytest.mark.parametrize("recomputed_layers", [0, 1, None])
@pytest.mark.parametrize("packs", [((2, 3, 4), (0, 5, 2)), ((0, 4, 3), (0, 2, 2))])
def test_forward_and_backward_need_no_value_from_the_device(stage, recomputed_layers, packs):
    model = build_model(
        use_activation_checkpointing=True,
        recomputed_layers=recomputed_layers,
        loss_chunk_size=3,
        **LEARNING[stage],
    )
    batch = collate_packs([make_pack(*packs)])
    with NeverWait():
        model(**batch)["loss"].backward()
    assert sum(parameter.grad is not None for parameter in model.parameters()) >= 4


@pytest.mark.usefixtures("_no_direct_reading")
@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.tolist(),
        lambda x: torch.equal(x, x),
    ],
)
def test_a_wait_is_noticed(wait):
    with NeverWait(), pytest.raises(Waited):
        wait(torch.ones(3))


# --- Liger's kernels: parity with transformers' own code, and errors before weights are read ---


needs_liger = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None or importlib.util.find_spec("triton") is None,
    reason="needs the extra 'liger' (liger-kernel and triton)",
)


def run_parity(device: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.liger_parity", device],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("parity")


@needs_liger
@pytest.mark.slow
def test_same_loss_and_gradients_as_transformers_through_tritons_interpreter():
    run_parity("cpu", TRITON_INTERPRET="1")


@needs_liger
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_same_loss_and_gradients_as_transformers_on_cuda():
    run_parity("cuda")


def test_without_a_gpu_the_error_comes_before_weights_are_read(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    nowhere = {"type": "gmai_xtuner.checkpoint.bases.load_language_model"}
    with pytest.raises(GMAIError, match=r"liger=True needs a CUDA device.*liger=False"):
        GMAILLaVAModel(nowhere, nowhere, liger=True)


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    for name in list(sys.modules):
        if name.startswith("liger_kernel."):
            monkeypatch.delitem(sys.modules, name)
    with pytest.raises(GMAIError, match=r"liger-kernel .*gmai-xtuner\[liger\]"):
        liger.require_liger()


def test_a_model_on_the_meta_device_needs_no_kernels(monkeypatch):
    """``xtuner convert pth_to_hf`` builds the model of the config on machines without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with init_empty_weights():
        model = build_model(liger=True)
    assert model.llm.lm_head.weight.device.type == "meta"


def test_other_models_are_refused():
    with pytest.raises(GMAIError, match="got Linear"):
        liger.install_liger(torch.nn.Linear(2, 2))
    model = build_model()
    model.llm.config.hidden_act = "gelu"
    with pytest.raises(GMAIError, match="with gelu"):
        liger.install_liger(model.llm)


def test_another_transformers_is_noticed():
    with pytest.raises(GMAIError, match=r"transformers 4\.48"):
        liger._with_global(modeling_llama.LlamaAttention.forward, "rotate_half", None)
