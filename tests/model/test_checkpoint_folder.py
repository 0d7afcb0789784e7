# SPDX-License-Identifier: Apache-2.0

"""Which checkpoint is whole, and which is the newest."""

import os
from pathlib import Path

import pytest
import torch

from gmai_xtuner.checkpoint.training import (
    STAGE,
    Manifest,
    check_stage,
    check_trained_state,
    checkpoints_in,
    files_of_ranks_that_are_wrong,
    iteration_of,
    load_checkpoint_state,
    load_parts,
    newest_whole,
    resolve_checkpoint,
    what_is_wrong,
)
from gmai_xtuner.core.errors import ModelLoadError
from tests.model.test_llava import build_model


def write_checkpoint(path: Path, *, ranks: int = 2, sequence: int | None = None) -> Path:
    """A DeepSpeed folder; with a manifest if ``sequence`` is given."""
    path.mkdir(parents=True)
    torch.save({"module": {}, "meta": {"seed": 5}}, path / "mp_rank_00_model_states.pt")
    for rank in range(ranks):
        file = path / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": torch.arange(100)}, file)
    if sequence is not None:
        files = {file.name: file.stat().st_size for file in path.iterdir()}
        manifest = Manifest(iteration_of(path) or 0, sequence, ranks, 5, files)
        (path / "manifest.json").write_text(manifest.to_json())
    return path


@pytest.mark.parametrize("sequence", [None, 1])
def test_a_file_that_is_cut_off_or_missing_is_named(tmp_path, sequence):
    checkpoint = write_checkpoint(tmp_path / "iter_3.pth", sequence=sequence)
    assert what_is_wrong(checkpoint) is None
    first, second = (
        checkpoint / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)
    )
    os.truncate(second, second.stat().st_size // 2)
    assert what_is_wrong(checkpoint).startswith(f"is damaged: {second.name} ")
    first.unlink()
    assert "is incomplete: " in what_is_wrong(checkpoint)


@pytest.mark.parametrize("text", ["{", "[]", '{"iteration": 3}'])
def test_a_manifest_that_can_not_be_read_is_damage(tmp_path, text):
    checkpoint = write_checkpoint(tmp_path / "iter_3.pth", sequence=1)
    (checkpoint / "manifest.json").write_text(text)
    assert what_is_wrong(checkpoint).startswith("is damaged: its manifest.json can't be read")
    assert newest_whole(tmp_path)[0] is None


def test_an_empty_folder_an_empty_file_and_nothing_are_no_checkpoints(tmp_path):
    (tmp_path / "iter_1.pth").mkdir()
    (tmp_path / "iter_2.pth").touch()
    assert "no *_model_states.pt" in what_is_wrong(tmp_path / "iter_1.pth")
    assert what_is_wrong(tmp_path / "iter_2.pth") == "is an empty file"
    assert what_is_wrong(tmp_path / "iter_3.pth") == "is not there"


def test_the_newest_is_the_one_written_last_not_the_one_of_the_highest_iteration(tmp_path):
    """A run that went back from iteration 8 to 4 and wrote 6 goes on from 6."""
    for sequence, iteration in enumerate((4, 8, 6), start=1):
        write_checkpoint(tmp_path / f"iter_{iteration}.pth", sequence=sequence)
    (tmp_path / "last_checkpoint").write_text("iter_8.pth")  # killed before it was replaced
    assert [path.name for path in checkpoints_in(tmp_path)] == [
        "iter_6.pth",
        "iter_8.pth",
        "iter_4.pth",
    ]


def test_without_manifests_the_pointer_counts_then_the_iteration(tmp_path):
    for iteration in (2, 10, 9):
        write_checkpoint(tmp_path / f"iter_{iteration}.pth")
    assert newest_whole(tmp_path)[0].name == "iter_10.pth"
    (tmp_path / "last_checkpoint").write_text("/moved/since/iter_2.pth")
    assert newest_whole(tmp_path)[0].name == "iter_2.pth"


def test_broken_ones_that_are_newer_are_passed_over_and_named(tmp_path):
    for sequence, iteration in enumerate((4, 8, 12), start=1):
        write_checkpoint(tmp_path / f"iter_{iteration}.pth", sequence=sequence)
    (tmp_path / "iter_12.pth" / "mp_rank_00_model_states.pt").unlink()
    found, passed_over = newest_whole(tmp_path)
    assert found == tmp_path / "iter_8.pth"
    assert passed_over == {"iter_12.pth": "is incomplete: mp_rank_00_model_states.pt is not there"}


def test_a_folder_copied_in_part_is_named_though_nothing_says_that_it_is_newer(tmp_path):
    write_checkpoint(tmp_path / "iter_4.pth", sequence=1)
    (tmp_path / "iter_2.pth").mkdir()
    (tmp_path / "iter_6.pth").mkdir()
    found, passed_over = newest_whole(tmp_path)
    assert (found.name, list(passed_over)) == ("iter_4.pth", ["iter_6.pth"])


def test_other_things_in_a_work_dir_are_no_checkpoints(tmp_path):
    for name in ("20261124_022728", "iter_4.pth.writing", "iter_4.pth.removing", "best_iter_4.pth"):
        (tmp_path / name).mkdir()
    assert checkpoints_in(tmp_path) == []
    assert newest_whole(tmp_path / "nowhere") == (None, {})


def of_two_ranks(*kinds: str) -> list[str]:
    return ["mp_rank_00_model_states.pt", *(kind.format(rank) for kind in kinds for rank in (0, 1))]


RANDOM = "rank_{:05d}.pt"
SHARD = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
WEIGHTS = "zero_pp_rank_{}_mp_rank_00_model_states.pt"


@pytest.mark.parametrize(
    "kinds", [(RANDOM,), (RANDOM, f"bf16_{SHARD}"), (RANDOM, SHARD), (RANDOM, SHARD, WEIGHTS)]
)
def test_what_deepspeed_writes_is_complete_with_every_rank_and_with_no_other(kinds):
    names = of_two_ranks(*kinds)
    assert files_of_ranks_that_are_wrong(names, 2) is None
    for name in names[1:]:
        rest = [other for other in names if other != name]
        assert "is incomplete: it has " in files_of_ranks_that_are_wrong(rest, 2)
    assert "of ranks [0, 1], not of the 3 that" in files_of_ranks_that_are_wrong(names, 3)
    assert "of ranks [0, 1], not of the 1 that" in files_of_ranks_that_are_wrong(names, 1)


# --- Starting from the stage before: which checkpoint is meant, and strict loading of its parts ---


def test_a_file_and_a_deepspeed_directory_mean_themselves(tmp_path):
    file = tmp_path / "projector.pth"
    torch.save({"state_dict": {"projector.model.0.bias": torch.zeros(2)}}, file)
    assert resolve_checkpoint(file) == file
    directory = write_checkpoint(tmp_path / "iter_3.pth")
    assert resolve_checkpoint(directory) == directory


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


def test_a_file_that_holds_no_weights_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "empty.pth")
    with pytest.raises(ModelLoadError, match="no model weights"):
        load_checkpoint_state(tmp_path / "empty.pth")


@pytest.mark.parametrize("both", [True, False])
def test_a_tied_output_matrix_may_stand_under_both_names_in_a_checkpoint(both):
    model = build_model()
    model.llm.lm_head.weight = model.llm.model.embed_tokens.weight
    state = {key: torch.full(value.shape, 2.0) for key, value in model.state_dict().items()}
    if both:
        load_parts(model, state, required=["llm"], source="s")
        assert (model.llm.lm_head.weight == 2).all()
    else:
        del state["llm.lm_head.weight"]
    check_trained_state(model, state, source="s")


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
