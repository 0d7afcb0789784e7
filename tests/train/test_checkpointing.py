# SPDX-License-Identifier: Apache-2.0

"""Writing aside, naming, tidying up and choosing; real runs that are killed are in ``tests/commands``."""

import errno
import json
import logging
import os
import shutil
import stat
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from mmengine.logging import MessageHub
from torch import nn
from xtuner.tools import utils as xtuner_tools

from gmai_xtuner.checkpoint.training import MANIFEST, newest_whole, what_is_wrong
from gmai_xtuner.core import files
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.train import background, checkpointing, on_disk, resume
from gmai_xtuner.train.background import BackgroundWriter, host_memory
from gmai_xtuner.train.checkpointing import (
    StepCheckpointHook,
    check_work_dir_is_shared,
    publish,
    remove,
)
from gmai_xtuner.train.resume import (
    choose_checkpoint,
    rank_state,
    restore_rank_state,
    seed_of,
    tidy_up,
)
from tests.model.test_checkpoint_folder import write_checkpoint


@pytest.fixture
def told(monkeypatch):
    lines: list[str] = []
    for module, name in (
        (checkpointing, "warn"),
        (on_disk, "warn"),
        (resume, "warn"),
        (resume, "info"),
    ):
        monkeypatch.setattr(module, name, lines.append)
    return lines


def runner(work_dir, *, resume=False, load_from=None):
    strategy = SimpleNamespace(config={})
    return SimpleNamespace(
        work_dir=str(work_dir), _resume=resume, _load_from=load_from, strategy=strategy
    )


def write_aside(work_dir, iteration, *, ranks=1):
    aside = work_dir / f"iter_{iteration}.pth.writing"
    write_checkpoint(aside, ranks=ranks)
    for rank in range(ranks):
        torch.save({}, aside / f"rank_{rank:05d}.pt")
    return aside, work_dir / f"iter_{iteration}.pth"


def refuse(monkeypatch, function, name, code=errno.ENOTEMPTY):
    """Let a function of the file system refuse the paths named ``name*``."""
    owner, attribute = function
    original = getattr(owner, attribute)

    def refusing(path, *args, **kwargs):
        if not os.path.basename(path).startswith(name):
            original(path, *args, **kwargs)
        elif not kwargs.get("ignore_errors"):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(owner, attribute, refusing)


RMTREE = (shutil, "rmtree")
RENAME = (Path, "rename")


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
        "Removed iter_8.pth.writing",
        "Removed iter_2.pth.removing",
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


class Hub(dict):
    def update_info(self, name, value):
        self[name] = value


class Runner(SimpleNamespace):
    """Writes like DeepSpeed; ``fails`` stands for what goes wrong on the way."""

    def save_checkpoint(self, out_dir, filename, *args, **kwargs):
        assert self.hooks == []
        write_checkpoint(self.folder / filename, ranks=1)
        self.seen.append(names(self.folder))
        if self.fails:
            raise self.fails


def hook_and_runner(folder):
    """A hook that keeps two checkpoints, and has written none."""
    hook = StepCheckpointHook(by_epoch=False, interval=4, max_keep_ckpts=2)
    hook.out_dir = str(folder)
    run = Runner(
        folder=folder,
        work_dir=str(folder),
        message_hub=Hub(),
        seen=[],
        hooks=[],
        seed=0,
        epoch=0,
        train_loop=SimpleNamespace(_iter=0),
        fails=None,
    )
    return hook, run


def write(folder, iterations, *, fails=None):
    """Write ``iterations``, keeping two; the last one fails with ``fails``."""
    hook, run = hook_and_runner(folder)
    for iteration in iterations:
        run.fails = fails if iteration == iterations[-1] else None
        hook._save_checkpoint_with_step(run, iteration, {"iter": iteration})
    hook.finish()
    return run


def test_an_old_checkpoint_goes_only_when_the_new_one_is_whole(tmp_path):
    run = write(tmp_path, [4, 8, 12])
    assert {"iter_4.pth", "iter_8.pth", "iter_12.pth.writing"} <= set(run.seen[-1])
    assert names(tmp_path) == ["iter_12.pth", "iter_8.pth", "last_checkpoint"]
    assert (tmp_path / "last_checkpoint").read_text() == str(tmp_path / "iter_12.pth")


def test_a_checkpoint_is_also_due_by_the_clock(tmp_path, monkeypatch):
    """Every second step or after ten minutes; steps end at these minutes since the start."""
    saved, minutes = [], [0.0]
    monkeypatch.setattr(checkpointing.time, "monotonic", lambda: 60 * minutes[-1])
    hook, run = hook_and_runner(tmp_path)
    hook.interval, hook.every_minutes, hook._written = 2, 10, 0.0
    hook.stop = SimpleNamespace(agreed=lambda: None)
    hook.is_last_train_iter = lambda _: False
    run.logger, run.iter = SimpleNamespace(info=lambda _: None), 0

    def save(_):
        saved.append(minutes[-1])
        hook._save_checkpoint_with_step(run, run.train_loop.step, {})

    hook._save_checkpoint = save
    for step, end in enumerate((9.0, 9.5, 19.4, 20.0, 30.0, 31.0, 40.9, 41.0), 1):
        run.train_loop.step = step
        minutes.append(end)
        hook.after_step(run)
    assert saved == [9.5, 20.0, 30.0, 31.0, 41.0]
    with pytest.raises(GMAIError, match="every_minutes must be above 0, or 0 for never, got -1"):
        StepCheckpointHook(every_minutes=-1)


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
    assert names(tmp_path) == ["iter_12.pth.writing", "iter_4.pth", "iter_8.pth", "last_checkpoint"]
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
    torch.save(rank_state(run), tmp_path / "rank_00000.pt")
    hook.count = 0
    restore_rank_state(run, tmp_path)
    assert (hook.count, told) == (7, [])
    restore_rank_state(run, tmp_path / "written_by_xtuner_alone")
    assert "has no rank_00000.pt: random numbers" in told[0]


def test_machines_that_do_not_share_the_work_dir_are_told_before_training(tmp_path, monkeypatch):
    check_work_dir_is_shared(tmp_path / "new", patience=0)
    assert names(tmp_path / "new") == []
    answers = iter([[".shared-token"], [True, False, False]])
    monkeypatch.setattr(checkpointing, "all_gather_object", lambda mine: next(answers))
    with pytest.raises(GMAIError, match=r"ranks \[1, 2\] do not see .* all machines share"):
        check_work_dir_is_shared(tmp_path, patience=0)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("function", [RENAME, (os, "fsync"), (Path, "mkdir")])
def test_a_file_system_that_does_not_suit_is_told_before_training(
    tmp_path, monkeypatch, function, code
):
    def refusing(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(*function, refusing)
    with pytest.raises(GMAIError, match=r"can't be written to .*: rank 0: \[Errno .* --work-dir"):
        check_work_dir_is_shared(tmp_path, patience=0)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_without_fsync_of_directories_will_do(tmp_path, monkeypatch, code):
    original = os.fsync

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(code, os.strerror(code))
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    check_work_dir_is_shared(tmp_path, patience=0)
    publish(*write_aside(tmp_path, 8), iteration=8, seed=0)
    assert names(tmp_path) == ["iter_8.pth"]


def test_a_disk_that_fails_to_sync_a_directory_is_not_ignored(tmp_path, monkeypatch):
    def fsync(handle):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        files.directory_to_disk(tmp_path)


def test_training_goes_on_when_an_old_checkpoint_cannot_be_deleted(tmp_path, monkeypatch, told):
    refuse(monkeypatch, RMTREE, "iter_4.pth")
    write(tmp_path, [4, 8, 12, 16])
    assert names(tmp_path) == [
        "iter_12.pth",
        "iter_16.pth",
        "iter_4.pth.removing",
        "last_checkpoint",
    ]
    assert told == [
        f"{tmp_path / 'iter_4.pth.removing'} is no longer needed and can't be removed: [Errno 39] "
        "Directory not empty. The next start tries again"
    ]
    tidy_up(tmp_path)  # still refused
    assert "iter_4.pth.removing" in names(tmp_path)
    monkeypatch.undo()
    tidy_up(tmp_path)
    assert "iter_4.pth.removing" not in names(tmp_path)


def test_what_can_be_deleted_of_an_old_checkpoint_is(tmp_path, monkeypatch, told):
    checkpoint = write_checkpoint(tmp_path / "iter_4.pth", ranks=2)
    refused = checkpoint / ".nfs01"
    refused.touch()
    original = os.unlink

    def unlink(path, *args, **kwargs):
        if os.path.basename(path) == ".nfs01":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        original(path, *args, **kwargs)

    monkeypatch.setattr(os, "unlink", unlink)
    remove(checkpoint)
    assert names(tmp_path / "iter_4.pth.removing") == [".nfs01"]
    assert "Device or resource busy" in told[0]


def test_an_old_checkpoint_that_cannot_be_renamed_is_tried_again_each_time(
    tmp_path, monkeypatch, told
):
    with monkeypatch.context() as patched:
        refuse(patched, RENAME, "iter_4.pth", errno.EACCES)
        hook, run = hook_and_runner(tmp_path)
        publish(*write_aside(tmp_path, 8), iteration=8, seed=0)
        write_checkpoint(tmp_path / "iter_4.pth", sequence=1)
        for iteration in (12, 16):
            hook._save_checkpoint_with_step(run, iteration, {"iter": iteration})
        hook.finish()
        assert names(tmp_path) == ["iter_12.pth", "iter_16.pth", "iter_4.pth", "last_checkpoint"]
        assert [line.split(" is no")[0] for line in told] == [str(tmp_path / "iter_4.pth")] * 2
    hook._save_checkpoint_with_step(run, 20, {"iter": 20})
    hook.finish()
    assert names(tmp_path) == ["iter_16.pth", "iter_20.pth", "last_checkpoint"]


def test_a_start_removes_nothing_by_the_list_of_an_earlier_version(tmp_path):
    """Perhaps the checkpoint that the run is about to go on from; the next save removes what is too many."""
    write_checkpoint(tmp_path / "iter_4.pth", sequence=1)
    hub = MessageHub("listed_at_start")
    hub.update_info("keep_ckpt_ids", [4, 8, 12])
    hook = StepCheckpointHook(by_epoch=False, interval=4, max_keep_ckpts=2)
    hook.before_train(
        SimpleNamespace(work_dir=str(tmp_path), message_hub=hub, logger=logging.getLogger())
    )
    hook.stop.restore()
    assert names(tmp_path) == ["iter_4.pth"]


def test_a_checkpoint_written_again_stands_even_if_the_older_one_cannot_be_deleted(
    tmp_path, monkeypatch, told
):
    publish(*write_aside(tmp_path, 8), iteration=8, seed=0)
    refuse(monkeypatch, RMTREE, "iter_8.pth")
    publish(*write_aside(tmp_path, 8), iteration=8, seed=1)
    publish(*write_aside(tmp_path, 8), iteration=8, seed=2)
    assert names(tmp_path) == ["iter_8.pth", "iter_8.pth.1.removing", "iter_8.pth.removing"]
    assert seed_of(tmp_path) == 2
    monkeypatch.undo()
    tidy_up(tmp_path)
    assert names(tmp_path) == ["iter_8.pth"]


def test_a_checkpoint_that_cannot_get_its_name_leaves_the_older_one_there(tmp_path, monkeypatch):
    publish(*write_aside(tmp_path, 8), iteration=8, seed=3)
    aside, final = write_aside(tmp_path, 8)
    refuse(monkeypatch, RENAME, "iter_8.pth.writing", errno.EACCES)
    with pytest.raises(GMAIError, match=r"iter_8\.pth could not be written.*Permission denied"):
        publish(aside, final, iteration=8, seed=4)
    assert names(tmp_path) == ["iter_8.pth", "iter_8.pth.writing"]
    assert seed_of(final) == 3


def test_a_pointer_that_cannot_be_written_is_no_failed_checkpoint(tmp_path, monkeypatch, told):
    original = checkpointing.replace_text

    def refusing(file, text):
        if file.name == "last_checkpoint":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(file, text)

    monkeypatch.setattr(checkpointing, "replace_text", refusing)
    write(tmp_path, [4])
    assert newest_whole(tmp_path)[0] == tmp_path / "iter_4.pth"
    assert "iter_4.pth is whole, but" in told[0]


@pytest.mark.parametrize(
    "missing",
    [
        "rank_00001.pt",
        "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "mp_rank_00_model_states.pt",
    ],
)
def test_a_checkpoint_that_lacks_a_rank_is_not_published(tmp_path, monkeypatch, missing):
    aside, final = write_aside(tmp_path, 8, ranks=2)
    monkeypatch.setattr(checkpointing, "get_world_size", lambda: 2)
    (aside / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(GMAIError, match=r"rank 0: iter_8\.pth\.writing is incomplete: it has"):
        publish(aside, final, iteration=8, seed=0, patience=0)
    assert not final.exists()
    assert not (aside / MANIFEST).exists()


def test_a_network_file_system_is_given_time_to_show_the_files_of_other_ranks(
    tmp_path, monkeypatch
):
    aside, final = write_aside(tmp_path, 8, ranks=2)
    monkeypatch.setattr(checkpointing, "get_world_size", lambda: 2)
    late = (aside / "rank_00001.pt").rename(tmp_path / "late")
    monkeypatch.setattr(time, "sleep", lambda seconds: late.rename(aside / "rank_00001.pt"))
    publish(aside, final, iteration=8, seed=0, patience=60)
    assert "rank_00001.pt" in json.loads((final / MANIFEST).read_text())["files"]


def test_the_manifest_does_not_vouch_for_hidden_files_that_vanish(tmp_path):
    aside, final = write_aside(tmp_path, 8)
    (aside / ".nfs0001").touch()
    publish(aside, final, iteration=8, seed=0)
    (final / ".nfs0001").unlink()
    assert what_is_wrong(final) is None


@pytest.fixture
def slow(tmp_path):
    """A hook, its runner with a state that training changes, and an event that writing waits for."""
    hook, run = hook_and_runner(tmp_path)
    state, may_write = {"moment": torch.zeros(3), "step": [0]}, threading.Event()

    def save(state, path):
        assert may_write.wait(60)
        torch.save(state, path)

    def save_checkpoint(out_dir, filename, *args, **kwargs):
        write_checkpoint(tmp_path / filename, ranks=1)
        engine.checkpoint_engine.save(state, str(tmp_path / filename / "state.pt"))
        run.seen.append(names(tmp_path))

    # What stands in for a method is deleted afterwards, so these are methods of classes.
    methods = {"save": staticmethod(save)} | dict.fromkeys(
        ("makedirs", "commit", "_copy_recovery_script"), print
    )
    engine = type("Engine", (), methods)()
    engine.checkpoint_engine = engine
    run.strategy, run.save_checkpoint = SimpleNamespace(model=engine), save_checkpoint
    yield hook, run, state, may_write
    may_write.set()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, slow):
    hook, run, state, may_write = slow
    for iteration in (1, 2):
        publish(*write_aside(tmp_path, iteration), iteration=iteration, seed=0)
    hook._save_checkpoint_with_step(run, 4, {})
    state["moment"].add_(1)  # the next step
    state["step"][0] += 1
    hook._finish_if_written()
    assert names(tmp_path) == ["iter_1.pth", "iter_2.pth", "iter_4.pth.writing"]
    may_write.set()
    hook._save_checkpoint_with_step(run, 8, {})
    assert run.seen[-1] == ["iter_2.pth", "iter_4.pth", "iter_8.pth.writing", "last_checkpoint"]
    hook.after_train_epoch(run)
    assert names(tmp_path) == ["iter_4.pth", "iter_8.pth", "last_checkpoint"]
    for iteration, value in ((4, 0), (8, 1)):
        assert what_is_wrong(tmp_path / f"iter_{iteration}.pth") is None
        written = torch.load(tmp_path / f"iter_{iteration}.pth" / "state.pt")
        assert written["moment"].tolist() == [value] * 3
        assert written["step"] == [value]


def test_a_request_to_stop_waits_until_the_checkpoint_is_whole(tmp_path, slow):
    hook, run, _, may_write = slow
    hook.stop = SimpleNamespace(agreed=lambda: "SIGTERM came", stop_file=tmp_path / "stop")
    hook.is_last_train_iter = lambda _: False
    said, run.iter, run.max_iters, run.train_loop.step = [], 3, 9, 1

    def warned(text):
        said.append((text, names(tmp_path)))

    run.logger = SimpleNamespace(info=lambda _: may_write.set(), warning=warned)
    hook.after_step(run)
    assert run.train_loop.stop_training
    assert said[0][1] == ["iter_4.pth", "last_checkpoint"]


def test_without_room_for_a_copy_training_waits_and_says_so(tmp_path, slow, monkeypatch):
    hook, run, _, may_write = slow
    told = []
    monkeypatch.setattr(background, "warn", told.append)
    monkeypatch.setattr(background, "host_memory", lambda: (100, 20))
    may_write.set()
    hook._save_checkpoint_with_step(run, 4, {})
    assert names(tmp_path) == ["iter_4.pth", "last_checkpoint"]
    hook._save_checkpoint_with_step(run, 8, {})
    assert what_is_wrong(tmp_path / "iter_8.pth") is None
    assert len(told) == 1
    assert told[0].startswith(
        "Training waits from now on while checkpoints are written: for copies"
    )


def test_what_a_thread_writes_of_a_copy_is_the_same_to_the_byte(tmp_path):
    flat = torch.arange(20.0).bfloat16()
    weight = nn.Parameter(torch.ones(2, 3))
    state = {"views": [flat[4:10].view(2, 3).t(), flat, flat], "empty": torch.empty(0)}
    state |= {"weight": weight, "detached": weight.detach(), "step": torch.tensor(3), "n": [1, "a"]}
    files = []
    for on in (False, True, True):
        writer = BackgroundWriter(on=on)
        writer.save(torch.save, state, tmp_path / "state.pt")
        writer.wait()
        files.append((tmp_path / "state.pt").read_bytes())
        (tmp_path / "state.pt").unlink()
    assert files[0] == files[1] == files[2]


def test_the_memory_of_copies_is_taken_once(tmp_path, monkeypatch):
    writer = BackgroundWriter(on=True)
    for value in (1.0, 2.0):
        writer.save(torch.save, {"a": torch.full((5,), value)}, tmp_path / "state.pt")
        writer.wait()
        assert torch.load(tmp_path / "state.pt")["a"].tolist() == [value] * 5
        monkeypatch.setattr(background, "host_memory", lambda: (0, 0))


def test_free_host_memory_is_that_of_the_tightest_group(tmp_path):
    assert host_memory(tmp_path) == (0, 0)
    group = tmp_path / "sys/fs/cgroup/jobs/one"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 1000 kB\nMemAvailable: 900 kB\nPages: 3\n")
    (tmp_path / "proc/self/cgroup").write_text("1:name=systemd:/jobs\n0::/jobs/one\n")
    for folder, limit in ((group, "max"), (group.parent, "1000")):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("700\n")
        (folder / "memory.stat").write_text("anon 500\ninactive_file 200\n")
    assert host_memory(tmp_path) == (1000, 500)


class Engine:
    """DeepSpeed's, as far as its barriers and files go."""

    def __init__(self, folder, fails_on, full_at):
        self.folder, self.fails_on, self.full_at = folder, fails_on, full_at
        self.checkpoint_engine = self

    def makedirs(self, path, exist_ok=False):
        path.mkdir(exist_ok=exist_ok)

    def save(self, state, path):
        assert threading.current_thread() is not threading.main_thread()
        if dist.get_rank() == self.fails_on and self.full_at == "save":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        torch.save(state, path)

    def _copy_recovery_script(self, folder):
        if self.full_at == "script":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def commit(self, tag):
        raise AssertionError("says that the checkpoint is ready")

    def save_checkpoint(self, folder, filename, *args, **kwargs):
        rank = dist.get_rank()
        if rank == 0:
            self.makedirs(self.folder / filename, exist_ok=True)
        dist.barrier()
        if rank == 0:
            self.save({}, self.folder / filename / "mp_rank_00_model_states.pt")
        dist.barrier()
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        self.save({}, self.folder / filename / name)
        if rank == 0:
            self._copy_recovery_script(self.folder / filename)
        self.checkpoint_engine.commit("tag")
        dist.barrier()


def write_as_rank(rank, folder, fails_on, full_at, answers):
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder.with_suffix(".store")), 2),
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=20),
    )
    engine = Engine(folder, fails_on, full_at)
    if full_at == "rename" and rank == fails_on:
        on_disk._move_away = refuse_to_move
    hook, run = hook_and_runner(folder)
    run.save_checkpoint = engine.save_checkpoint
    # as mmengine wraps it
    wrapper = SimpleNamespace(model=engine, checkpoint_engine=engine)
    run.strategy = SimpleNamespace(model=wrapper)
    try:
        hook._save_checkpoint_with_step(run, 4, {"iter": 4})
        hook.finish()
        answers.put((rank, "written"))
    except Exception as error:
        answers.put((rank, f"{type(error).__name__} {error}"))


def refuse_to_move(path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("fails_on", "full_at"),
    [(None, "save"), (0, "save"), (1, "save"), (0, "script"), (0, "rename")],
)
def test_when_one_rank_cannot_write_all_ranks_say_so_at_once(tmp_path, fails_on, full_at):
    folder = tmp_path / "work"
    folder.mkdir()
    # Not "fork": this process may have threads of OpenMP, without which its fork waits for ever.
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    answers = context.Queue()
    processes = [
        context.Process(target=write_as_rank, args=(rank, folder, fails_on, full_at, answers))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        said = dict(answers.get(timeout=60) for _ in processes)
    finally:
        for process in processes:
            process.kill()
            process.join()
    if fails_on is None:
        assert said == {0: "written", 1: "written"}
        assert what_is_wrong(folder / "iter_4.pth") is None
        return
    for rank in range(2):
        assert said[rank].startswith(f"GMAIError the checkpoint {folder / 'iter_4.pth'} could not")
        assert f"rank {fails_on}: [Errno 28] No space left on device" in said[rank]
    assert names(folder) == ["iter_4.pth.writing"]
