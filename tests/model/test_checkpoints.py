# SPDX-License-Identifier: Apache-2.0

"""Starting from the stage before: which checkpoint is meant, and strict loading of its parts."""

from __future__ import annotations

import os

import pytest
import torch

from gmai_xtuner.checkpoint.training import (
    STAGE,
    check_stage,
    check_trained_state,
    load_checkpoint_state,
    load_parts,
    resolve_checkpoint,
)
from gmai_xtuner.core.errors import ModelLoadError
from tests.model.test_checkpoint_folder import write_checkpoint
from tests.model.test_llava import build_model


def test_a_file_and_a_deepspeed_directory_mean_themselves(tmp_path):
    file = tmp_path / "projector.pth"
    torch.save({"state_dict": {"projector.model.0.bias": torch.zeros(2)}}, file)
    assert resolve_checkpoint(file) == file
    directory = write_checkpoint(tmp_path / "iter_3.pth")
    assert resolve_checkpoint(directory) == directory


def test_without_that_note_the_highest_iteration_that_is_whole(tmp_path):
    for iteration in (2, 10):
        write_checkpoint(tmp_path / f"iter_{iteration}.pth")
    (tmp_path / "iter_30.pth").mkdir()  # begun, never written
    assert resolve_checkpoint(tmp_path).name == "iter_10.pth"
    (tmp_path / "last_checkpoint").write_text(os.fspath(tmp_path / "iter_30.pth"))
    assert resolve_checkpoint(tmp_path).name == "iter_10.pth"


def test_a_checkpoint_that_is_named_is_not_replaced_by_another(tmp_path):
    write_checkpoint(tmp_path / "iter_2.pth", sequence=1)
    broken = write_checkpoint(tmp_path / "iter_4.pth", sequence=2)
    next(broken.glob("*_optim_states.pt")).unlink()
    with pytest.raises(ModelLoadError, match=r"iter_4\.pth' is incomplete: .*optim_states"):
        resolve_checkpoint(broken)
    assert resolve_checkpoint(tmp_path).name == "iter_2.pth"


def test_nothing_there_says_what_to_do(tmp_path):
    with pytest.raises(
        ModelLoadError, match=r"to convert, .* CHECKPOINT; to train, as GMAI_STAGE1"
    ):
        resolve_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ModelLoadError, match="no checkpoint"):
        resolve_checkpoint(tmp_path)
    (tmp_path / "iter_30.pth").mkdir()
    with pytest.raises(ModelLoadError, match=r"whole: iter_30\.pth can't be used"):
        resolve_checkpoint(tmp_path)


def parts_of(model, *names):
    return {
        key: torch.randn_like(value)
        for key, value in model.state_dict().items()
        if key.split(".")[0] in names
    }


def test_loads_the_parts_that_are_there_and_leaves_the_rest():
    model = build_model()
    before = model.llm.lm_head.weight.clone()
    state = parts_of(model, "projector", "visual_encoder")
    assert load_parts(model, state, required=["projector"], source="s") == [
        "projector",
        "visual_encoder",
    ]
    after = model.state_dict()
    for key, value in state.items():
        assert torch.equal(after[key], value), key
    assert torch.equal(model.llm.lm_head.weight, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.update({"projector.model.9.weight": torch.zeros(1)}),
            "projector.model.9.weight",
        ),
        (lambda s: s.pop("projector.model.2.bias"), r"lacks 1 keys: projector\.model\.2\.bias"),
        (lambda s: s.update({"projector.model.2.bias": torch.zeros(3)}), r"\(3,\) instead of"),
        (lambda s: [s.pop(k) for k in list(s)], "no weights of projector"),
    ],
)
def test_a_checkpoint_that_does_not_fit_names_its_keys_and_changes_nothing(change, message):
    model = build_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = parts_of(model, "projector")
    change(state)
    with pytest.raises(ModelLoadError, match=message):
        load_parts(model, state, required=["projector"], source="stage 1")
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_stage_three_refuses_a_stage_one_checkpoint():
    model = build_model()
    with pytest.raises(ModelLoadError, match="no weights of visual_encoder"):
        load_parts(
            model,
            parts_of(model, "projector"),
            required=["projector", "visual_encoder"],
            source="work_dirs/stage1_shallow",
        )


def test_a_file_that_holds_no_weights_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "empty.pth")
    with pytest.raises(ModelLoadError, match="no model weights"):
        load_checkpoint_state(tmp_path / "empty.pth")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_checkpoint_that_is_not_of_the_config_is_refused_by_names_and_shapes(device):
    """What ``xtuner convert pth_to_hf`` asks before it puts anything into the model."""
    model = build_model(freeze_llm=True).to(device)
    right = {key: torch.zeros(value.shape) for key, value in model.state_dict().items()}
    check_trained_state(model, right, source="s")
    # More than the stage trains may be there, if no other stage has learnt it.
    norm = "llm.model.norm.weight"
    more = right | {norm: torch.zeros(32)}
    check_trained_state(model, more, source="s", brought_along=[norm])
    with pytest.raises(ModelLoadError, match=r"s has learnt 1 weights of llm .* would be lost"):
        check_trained_state(model, more, source="s")

    first = "projector.model.0.weight"
    stage1 = {key: value for key, value in right.items() if key.startswith("projector.")}
    with pytest.raises(ModelLoadError, match=r"s has no weights for \d+ of \d+ .*visual_encoder\."):
        check_trained_state(model, stage1, source="s")
    with pytest.raises(
        ModelLoadError, match=r"1 weights that this config's model does not have: x\.y"
    ):
        check_trained_state(model, right | {"x.y": torch.zeros(1)}, source="s")
    with pytest.raises(ModelLoadError, match=r"model\.0\.weight \(3, 3\) instead of \("):
        check_trained_state(model, right | {first: torch.zeros(3, 3)}, source="s")


@pytest.mark.parametrize(
    ("written", "refused"), [("stage3", True), ("stage2", False), (None, False)]
)
def test_a_config_of_another_stage_than_the_checkpoints_is_refused(tmp_path, written, refused):
    folder = write_checkpoint(tmp_path / "iter_2.pth")
    file = folder / "mp_rank_00_model_states.pt"
    hub = {"runtime_info": {} if written is None else {STAGE: written}}
    torch.save({"module": {}, "message_hub": hub}, file)
    if refused:
        with pytest.raises(ModelLoadError, match=r"was trained as stage3, .* one of stage2"):
            check_stage(folder, "stage2")
    else:
        check_stage(folder, "stage2")
