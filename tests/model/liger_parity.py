# SPDX-License-Identifier: Apache-2.0

"""Run by ``test_loss.py`` in a process of its own: ``python -m tests.model.liger_parity cpu|cuda``.

With Liger's kernels and without: same loss and gradients. On the CPU through Triton's interpreter
(``TRITON_INTERPRET=1``), with two gaps filled: it lacks CUDA's own ``rsqrt``, and its loop counters are
arrays of one element, which numpy 2.4 no longer takes for numbers.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
import triton
import triton.language as tl

from gmai_xtuner.model.liger import install_liger
from tests.model.test_llava import build_model, loss_and_gradients, make_batch, make_pack


@triton.jit
def rsqrt(x):
    return 1.0 / tl.sqrt(x)


def fill_gaps_of_the_interpreter() -> None:
    from triton.runtime import interpreter

    kernels: Any = importlib.import_module("liger_kernel.ops.rms_norm")
    kernels.rsqrt = rsqrt
    patch = interpreter._patch_lang_tensor

    def patch_and_index(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_index


def main(device: str) -> None:
    if device == "cpu":
        fill_gaps_of_the_interpreter()
    plain, liger = (build_model(use_activation_checkpointing=True).to(device) for _ in range(2))
    for model in (plain, liger):
        # As from a checkpoint; all ones would hide a forgotten weight.
        torch.manual_seed(1)
        for name, parameter in model.llm.named_parameters():
            if "norm" in name:
                parameter.data.uniform_(0.5, 1.5)
    install_liger(liger.llm)
    batch = make_batch(make_pack((1, 3, 4), (0, 5, 2)), denominator=9.0)
    batch["data"] = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in batch["data"].items()
    }
    # The plain model runs after Liger has been installed in the other: it must not notice.
    (got, gradients), (expected, reference) = (
        loss_and_gradients(model, [batch]) for model in (liger, plain)
    )
    assert abs(got - expected) < 1e-5 * abs(expected), (got, expected)
    assert gradients.keys() == reference.keys()
    for name, gradient in reference.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    # The kernels really ran: they round differently.
    assert any(not torch.equal(gradients[name], reference[name]) for name in reference)
    print("parity")


if __name__ == "__main__":
    main(sys.argv[1])
