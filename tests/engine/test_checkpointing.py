"""Writing aside, naming, tidying up and choosing; real runs that are killed are in ``tests/commands``."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from xtuner.tools import utils as xtuner_tools

from gmai_xtuner.engine import checkpointing
from gmai_xtuner.engine.checkpointing import (
    StepCheckpointHook,
    check_work_dir_is_shared,
    choose_checkpoint,
    publish,
    remove,
    replace_text,
    restore_rank_state,
    seed_of,
    tidy_up,
)
from gmai_xtuner.errors import GMAIError
from gmai_xtuner.models.checkpoint_folder import MANIFEST, newest_whole, what_is_wrong
from tests.models.test_checkpoint_folder import write_checkpoint


@pytest.fixture
def told(monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(
        checkpointing, "print_log", lambda text, *args, **kwargs: lines.append(text)
    )
    return lines


def runner(work_dir, *, resume=False, load_from=None):
    return SimpleNamespace(work_dir=str(work_dir), _resume=resume, _load_from=load_from)


def write_aside(work_dir, iteration):
    aside = work_dir / f"iter_{iteration}.pth.writing"
    return write_checkpoint(aside), work_dir / f"iter_{iteration}.pth"


def names(work_dir):
    return sorted(path.name for path in work_dir.iterdir())


def test_a_published_checkpoint_vouches_for_its_files(tmp_path):
    aside, final = write_aside(tmp_path, 8)
    publish(aside, final, iteration=8, seed=3)
    manifest = json.loads((final / MANIFEST).read_text())
    files = manifest.pop("files")
    assert manifest == {"iteration": 8, "sequence": 1, "world_size": 1, "seed": 3}
    assert sorted([*files, MANIFEST]) == names(final)
    assert names(tmp_path) == ["iter_8.pth"]
    assert what_is_wrong(final) is None


def test_every_checkpoint_of_a_work_dir_has_a_higher_number_also_one_written_again(tmp_path):
    for iteration in (4, 8, 6, 8):
        publish(*write_aside(tmp_path, iteration), iteration=iteration, seed=0)
    assert newest_whole(tmp_path)[0].name == "iter_8.pth"
    assert json.loads((tmp_path / "iter_8.pth" / MANIFEST).read_text())["sequence"] == 4
    assert names(tmp_path) == ["iter_4.pth", "iter_6.pth", "iter_8.pth"]


def test_a_single_file_is_published_without_a_manifest(tmp_path):
    aside = tmp_path / "iter_8.pth.writing"
    torch.save({"state_dict": {}}, aside)
    publish(aside, tmp_path / "iter_8.pth", iteration=8, seed=0)
    assert (tmp_path / "iter_8.pth").is_file()


def test_the_next_start_removes_what_was_half_written_or_half_removed(tmp_path, told):
    write_checkpoint(tmp_path / "iter_4.pth", sequence=1)
    write_aside(tmp_path, 8)
    write_checkpoint(tmp_path / "iter_2.pth.removing", sequence=1)
    (tmp_path / "notes.writing").mkdir()
    tidy_up(tmp_path)
    assert names(tmp_path) == ["iter_4.pth", "notes.writing"]
    assert [line.split(",")[0] for line in told] == [
        "Removed iter_2.pth.removing",
        "Removed iter_8.pth.writing",
    ]


def test_a_checkpoint_killed_between_manifest_and_name_is_finished(tmp_path, told):
    write_checkpoint(tmp_path / "iter_4.pth", sequence=1)
    ready = write_checkpoint(tmp_path / "iter_8.pth", sequence=2)
    ready.rename(tmp_path / "iter_8.pth.writing")
    tidy_up(tmp_path)
    assert newest_whole(tmp_path)[0] == tmp_path / "iter_8.pth"
    assert told == ["iter_8.pth.writing was whole: it is iter_8.pth now"]


def test_an_old_checkpoint_that_is_half_removed_is_none(tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path / "iter_4.pth", sequence=1)
    monkeypatch.setattr(shutil, "rmtree", lambda path: None)  # killed there
    remove(checkpoint)
    assert names(tmp_path) == ["iter_4.pth.removing"]
    remove(checkpoint)  # nothing there: nothing to do


def test_the_pointer_is_never_half_written(tmp_path, monkeypatch):
    pointer = tmp_path / "last_checkpoint"
    replace_text(pointer, "iter_4.pth")

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_text(pointer, "iter_8.pth")
    assert pointer.read_text() == "iter_4.pth"


class Hub(dict):
    def update_info(self, name, value):
        self[name] = value


class Runner(SimpleNamespace):
    """Writes like DeepSpeed; ``fails`` stands for what goes wrong on the way."""

    def save_checkpoint(self, out_dir, filename, *args, **kwargs):
        assert self.hooks == []
        write_checkpoint(self.folder / filename)
        self.seen.append((names(self.folder), self.message_hub["keep_ckpt_ids"]))
        if self.fails:
            raise self.fails


def write(folder, iterations, *, fails=None):
    """A hook that has written ``iterations``, keeping two; the last one fails with ``fails``."""
    hook = StepCheckpointHook(by_epoch=False, interval=4, max_keep_ckpts=2)
    hook.out_dir = str(folder)
    hook.keep_ckpt_ids = deque(maxlen=2)
    run = Runner(
        folder=folder,
        work_dir=str(folder),
        message_hub=Hub(),
        seen=[],
        hooks=[],
        seed=0,
        fails=None,
    )
    for iteration in iterations:
        run.fails = fails if iteration == iterations[-1] else None
        hook._save_checkpoint_with_step(run, iteration, {"iter": iteration})
    return run


def test_an_old_checkpoint_goes_only_when_the_new_one_is_whole(tmp_path):
    run = write(tmp_path, [4, 8, 12])
    while_writing, listed = run.seen[-1]
    assert {"iter_4.pth", "iter_8.pth", "iter_12.pth.writing"} <= set(while_writing)
    assert listed == [4, 8, 12], "a run killed before the removal would never remove iter_4.pth"
    assert names(tmp_path) == ["iter_12.pth", "iter_8.pth", "last_checkpoint"]
    assert (tmp_path / "last_checkpoint").read_text() == str(tmp_path / "iter_12.pth")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("basic_ios::clear: iostream error"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
    ],
)
def test_a_full_disk_says_so_and_leaves_the_older_checkpoints(tmp_path, error):
    with pytest.raises(GMAIError, match=r"iter_12\.pth could not be written, .* GiB are free"):
        write(tmp_path, [4, 8, 12], fails=error)
    assert names(tmp_path) == [
        "iter_12.pth.writing",
        "iter_4.pth",
        "iter_8.pth",
        "last_checkpoint",
    ]
    assert newest_whole(tmp_path)[0].name == "iter_8.pth"


def test_another_error_keeps_its_name(tmp_path):
    with pytest.raises(RuntimeError, match="NCCL"):
        write(tmp_path, [4], fails=RuntimeError("NCCL error"))


@pytest.mark.parametrize("asked", [True, "path"])
def test_a_resumed_run_takes_the_newest_whole_checkpoint_of_its_work_dir(tmp_path, told, asked):
    write_checkpoint(tmp_path / "iter_4.pth", sequence=1)
    broken = write_checkpoint(tmp_path / "iter_8.pth", sequence=2)
    (broken / "mp_rank_00_model_states.pt").unlink()
    run = runner(tmp_path, resume=True, load_from=str(tmp_path) + "/" if asked == "path" else None)
    assert choose_checkpoint(run) == tmp_path / "iter_4.pth"
    # DeepSpeed takes folder and tag out of the path: no trailing slash, no relative name.
    assert (run._resume, run._load_from) == (True, str(tmp_path / "iter_4.pth"))
    assert told[0].startswith(f"{broken} is incomplete: mp_rank_00_model_states.pt is not there")


def test_the_same_command_begins_at_the_beginning_where_there_is_nothing_yet(tmp_path, told):
    run = runner(tmp_path / "new", resume=True, load_from=str(tmp_path / "new"))
    assert choose_checkpoint(run) is None
    assert (run._resume, run._load_from) == (False, None)
    assert told == [f"No checkpoint in {tmp_path / 'new'} yet: beginning at the beginning"]


def test_another_work_dir_without_a_checkpoint_is_a_mistake(tmp_path):
    with pytest.raises(GMAIError, match=r"no whole checkpoint in .*wrong to resume from"):
        choose_checkpoint(runner(tmp_path, resume=True, load_from=str(tmp_path / "wrong")))


def test_a_broken_checkpoint_that_was_named_is_refused(tmp_path):
    write_checkpoint(tmp_path / "iter_4.pth", sequence=1)
    (tmp_path / "iter_8.pth").mkdir()
    named = str(tmp_path / "iter_8.pth")
    with pytest.raises(GMAIError, match=rf"can't resume from {named}: it is incomplete"):
        choose_checkpoint(runner(tmp_path, resume=True, load_from=named))
    with pytest.raises(GMAIError, match="it is incomplete"):
        seed_of(tmp_path / "iter_8.pth")


def test_without_resume_weights_to_load_stay_what_they_are(tmp_path):
    run = runner(tmp_path, load_from="base.pth")
    assert choose_checkpoint(run) is None
    assert (run._resume, run._load_from) == (False, "base.pth")


def test_the_seed_of_a_run_is_read_without_its_weights(tmp_path):
    assert seed_of(tmp_path) is None
    write_checkpoint(tmp_path / "iter_4.pth")
    assert seed_of(tmp_path) == seed_of(tmp_path / "iter_4.pth") == 5
    newer = write_checkpoint(tmp_path / "iter_8.pth", sequence=1)
    text = (newer / MANIFEST).read_text()
    (newer / MANIFEST).write_text(text.replace('"seed": 5', '"seed": 6'))
    assert seed_of(tmp_path) == 6


def test_xtuner_is_given_the_seed_of_a_first_start_where_there_is_no_checkpoint_yet(
    tmp_path, monkeypatch
):
    config = tmp_path / "config.py"
    config.write_text("randomness = dict(seed=9)")
    asked = SimpleNamespace(config=str(config), cfg_options=None, seed=None)
    monkeypatch.setattr(sys.modules["__main__"], "parse_args", lambda: asked, raising=False)
    assert xtuner_tools.get_seed_from_checkpoint(str(tmp_path)) == 9
    asked.cfg_options = {"randomness.seed": 10}
    assert xtuner_tools.get_seed_from_checkpoint(str(tmp_path)) == 10
    asked.seed = 11
    assert xtuner_tools.get_seed_from_checkpoint(str(tmp_path)) == 11
    write_checkpoint(tmp_path / "iter_4.pth")
    assert xtuner_tools.get_seed_from_checkpoint(str(tmp_path)) == 5


def test_each_rank_gets_its_own_counters_back(tmp_path, told):
    class Counter:
        count = 0

        def rank_state_dict(self):
            return {"count": self.count}

        def load_rank_state_dict(self, state):
            self.count = state["count"]

    hook = Counter()
    hook.count = 7
    run = SimpleNamespace(hooks=[hook, object()])
    torch.save(checkpointing.rank_state(run), tmp_path / "rank_00000.pt")
    hook.count = 0
    restore_rank_state(run, tmp_path)
    assert (hook.count, told) == (7, [])
    restore_rank_state(run, tmp_path / "written_by_xtuner_alone")
    assert "has no rank_00000.pt: random numbers" in told[0]


def test_machines_that_do_not_share_the_work_dir_are_told_before_training(tmp_path, monkeypatch):
    check_work_dir_is_shared(tmp_path / "new", patience=0)
    assert names(tmp_path / "new") == []
    answers = iter([["token"], [True, False, False]])
    monkeypatch.setattr(checkpointing, "all_gather_object", lambda mine: next(answers))
    with pytest.raises(GMAIError, match=r"ranks \[1, 2\] do not see .* all machines share"):
        check_work_dir_is_shared(tmp_path, patience=0)
