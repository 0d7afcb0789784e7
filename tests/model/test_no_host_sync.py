# SPDX-License-Identifier: Apache-2.0

"""The forward and backward pass never need a value from the device, for which the host would wait."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gmai_xtuner.data.collate import collate_packs
from tests.model.test_llava import build_model, make_pack

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
