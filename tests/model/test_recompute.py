# SPDX-License-Identifier: Apache-2.0

"""How many of the language model's layers are recomputed: the same gradients, other work."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.data.collate import collate_packs
from tests.model.test_llava import build_model, loss_and_gradients, make_pack


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
@pytest.mark.parametrize("layers", [1, None])
def test_gradients_stay_the_same(layers, reentrant, monkeypatch):
    # re-entrant is what ZeRO-3 gets
    monkeypatch.setattr("gmai_xtuner.model.llava.use_reentrant", lambda: reentrant)
    batch = collate_packs([make_pack((1, 3, 4), (2, 5, 2))])
    expected = loss_and_gradients(build_model(dtype=torch.float64), [batch])
    model = build_model(
        dtype=torch.float64,
        use_activation_checkpointing=True,
        recomputed_layers=layers,
        loss_chunk_size=2,
    )
    got = loss_and_gradients(model, [batch])
    assert got[0] == pytest.approx(expected[0], rel=1e-6)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize("layers", [-1, 3])
def test_a_number_of_layers_that_the_model_lacks_is_refused(layers):
    with pytest.raises(GMAIError, match=rf"must be 0 to 2, .* got {layers}"):
        build_model(use_activation_checkpointing=True, recomputed_layers=layers)
