# SPDX-License-Identifier: Apache-2.0

import json
import math
import os
import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from gmai_xtuner.checkpoint.llava import GMAILLaVAModel
from gmai_xtuner.checkpoint.training import Manifest
from gmai_xtuner.preflight import checks, survey
from gmai_xtuner.preflight.__main__ import main
from gmai_xtuner.preflight.memory import Memory
from gmai_xtuner.preflight.report import as_json, as_text
from gmai_xtuner.preflight.survey import Preflight
from tests import warm
from tests.preflight.conftest import ROOT
from tests.preflight.test_data import SMALL, edit_mixture, problems
from tests.toy import record


def test_base_without_weights(preflight, corpus, true_bases):
    found = preflight(corpus.mixture, bases=true_bases)
    assert "llm: " in problems(found)
    assert "visual_encoder: " in problems(found)
    assert problems(found).count("has no weights") == 2
    assert problems(preflight(corpus.mixture, bases=true_bases, need_weights=False)) == ""


def test_base_weights_that_do_not_fit(preflight, corpus, tiny_bases, tmp_path):
    import shutil

    bases = tmp_path / "bases"
    shutil.copytree(tiny_bases, bases)
    config = json.loads((bases / "llm" / "config.json").read_text())
    (bases / "llm" / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    path = bases / "vision" / "model.safetensors"
    weights = load_file(path)
    weights.pop(next(name for name in weights if "k_proj.weight" in name))
    save_file(weights, path, metadata={"format": "pt"})
    told = problems(preflight(corpus.mixture, bases=bases))
    assert "other shapes than config.json says" in told
    assert "don't fit config.json: 1 missing" in told
    assert "k_proj.weight" in told


@pytest.fixture
def stage_1(tiny_bases, tmp_path):
    """Save parts of a tiny model as a checkpoint of stage 1."""

    def save(*parts: str, change=lambda state: state) -> None:
        from xtuner.registry import BUILDER

        model = GMAILLaVAModel(
            BUILDER.build(
                {
                    "type": "gmai_xtuner.checkpoint.bases.load_language_model",
                    "pretrained_model_name_or_path": str(tiny_bases / "llm"),
                }
            ),
            BUILDER.build(
                {
                    "type": "gmai_xtuner.checkpoint.bases.load_vision_tower",
                    "pretrained_model_name_or_path": str(tiny_bases / "vision"),
                }
            ),
        )
        state = torch.nn.Module.state_dict(model)
        kept = {key: value for key, value in state.items() if key.startswith(parts)}
        folder = tmp_path / "stage1"
        folder.mkdir()
        torch.save({"state_dict": change(kept)}, folder / "iter_4.pth")

    return save


def test_the_stage_before_fits(preflight, corpus, stage_1):
    assert "there is no checkpoint or work dir" in problems(
        preflight(corpus.mixture, "stage2_deep", options=SMALL)
    )
    stage_1("projector")
    assert problems(preflight(corpus.mixture, "stage2_deep", options=SMALL)) == ""


@pytest.mark.parametrize(
    ("parts", "change", "told"),
    [
        (("visual_encoder",), dict, "no weights of projector, which this stage starts from"),
        (("projector",), lambda state: dict(list(state.items())[1:]), "lacks 1 keys"),
        (
            ("projector",),
            lambda state: {key: value.T.contiguous() for key, value in state.items()},
            "does not fit the model",
        ),
        (("projector", "llm"), dict, "has a whole language model"),
    ],
    ids=["other-part", "key-lost", "other-shape", "language-model"],
)
def test_the_stage_before_that_does_not_fit(preflight, corpus, stage_1, parts, change, told):
    stage_1(*parts, change=change)
    assert told in problems(preflight(corpus.mixture, "stage2_deep", options=SMALL))


@pytest.mark.parametrize(
    ("summed", "interval", "keep", "room", "number", "why", "lower"),
    [
        (1, 1, 4, 2, 5, "max_keep_ckpts 4, and one being written", 1),
        (1, 1, 2, 1, 3, "max_keep_ckpts 2, and one being written", None),
        (1, 1, -1, 4, 5, "all that the run writes; max_keep_ckpts -1", 3),
        (2, 1, -1, 2, 3, "all that the run writes; max_keep_ckpts -1", 1),
        (1, 10**6, 2, 0, 1, "all that the run writes; max_keep_ckpts 2", None),
    ],
    ids=["lower", "no-lower-helps", "all-are-kept", "steps-count", "one-alone"],
)
def test_too_little_disk_says_why_and_what_would_help(
    preflight, corpus, monkeypatch, summed, interval, keep, room, number, why, lower
):
    """Of a run of five micro-batches of one epoch."""
    usage = namedtuple("usage", "free")
    hook = "default_hooks.checkpoint"
    options = {**SMALL, f"{hook}.interval": interval, f"{hook}.max_keep_ckpts": keep}
    options["optim_wrapper.accumulative_counts"] = summed
    size = sum(p.trainable for p in preflight(corpus.mixture, options=options).counts.values()) * 14
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: usage(room * size))
    told = problems(preflight(corpus.mixture, options=options))
    assert f"holds {number} x" in told
    assert f"({why})" in told
    assert (f"or --cfg-options {hook}.max_keep_ckpts={lower}" in told) is (lower is not None)
    assert ("max_keep_ckpts=" in told) is (lower is not None)
    elsewhere = preflight(corpus.mixture, options=options, need_weights=False)
    assert problems(elsewhere) == ""
    assert "On the machine that trains, this room is needed" in problems(elsewhere, "warn")


def test_checkpoints_that_are_there_need_no_more_room(preflight, corpus, monkeypatch, tmp_path):
    usage = namedtuple("usage", "free")
    many = {**SMALL, "default_hooks.checkpoint.interval": 1}
    trainable = sum(
        part.trainable for part in preflight(corpus.mixture, options=many).counts.values()
    )
    size = trainable * 14
    (tmp_path / "work").mkdir()

    def least(*, taken: int) -> None:
        need = max(size, 3 * size - taken)
        for free, fails in ((need, False), (need - 1, True)):
            monkeypatch.setattr(checks.shutil, "disk_usage", lambda _, free=free: usage(free))
            found = preflight(corpus.mixture, options=many)
            assert ("GiB free, but holds 3 x about" in problems(found)) is fails

    def write(name: str, number: int, *, manifest_says: int) -> None:
        folder = tmp_path / "work" / name
        folder.mkdir()
        with (folder / "states.pt").open("wb") as file:
            file.truncate(number)
        manifest = Manifest(1, 1, 1, None, {"states.pt": manifest_says})
        (folder / "manifest.json").write_text(manifest.to_json().ljust(200))

    least(taken=0)
    write("iter_1.pth", size, manifest_says=size)
    write("iter_2.pth", size - 5, manifest_says=size)  # not whole: it is not one of those kept
    least(taken=size + 200)
    write("iter_3.pth", size, manifest_says=size)
    write("iter_4.pth", size, manifest_says=size)
    least(taken=3 * size)  # the one being written still needs its room


def test_too_little_gpu_memory_comes_with_what_would_fit(preflight, corpus, true_bases):
    run = {"bases": true_bases, "need_weights": False, "stage": "stage3_instruct"}
    found = preflight(corpus.mixture, gpus=8, gpu_memory=30.0, **run)
    told = problems(found, "warn")
    assert "are more than the 30 GiB of a GPU" in told
    assert "--deepspeed zero3 (" in told
    assert "LoRA on the language model" in told
    assert not found.findings.of("fail") or "disk" in problems(found)
    small = preflight(corpus.mixture, gpus=8, gpu_memory=1.0, **run)
    assert "alone would do" in problems(small, "warn")


def test_the_fewest_recomputed_layers_that_fit(preflight, corpus, true_bases):
    """Of a micro-batch of four packs a layer keeps 4 GiB here, see the fixture."""

    def look(gpu_memory: float, **options) -> Preflight:
        run = {"bases": true_bases, "need_weights": False, "stage": "stage2_deep"}
        return preflight(corpus.mixture, gpu_memory=gpu_memory, options=options, **run)

    whole = look(80.0)
    base = whole.memory.total / 2**30 - 4
    told = problems(whole, "note")
    layers = math.ceil(33 - (0.95 * 80 - base) / 4)
    gib = f"{base + 4 * (33 - layers):.0f} GiB"
    assert f"model.recomputed_layers={layers} ({gib}) fits, too, and saves" in told
    assert f"{32 - layers} of 32 layers would not" in told
    # A frozen layer is computed forward, backward, and forward again; tower and head add a little.
    share = int(re.search(r"saves (\d+)%", told)[1]) / 100
    assert share == pytest.approx((32 - layers) / 32 / 3, abs=0.015)
    assert "recomputed_layers=0 (" in problems(look(200.0), "note")
    assert "recomputed" not in problems(look((base + 7) / 0.95), "note")

    few = {"model.recomputed_layers": 4}
    assert f"would fit: model.recomputed_layers={layers} ({gib})" in problems(
        look(80.0, **few), "warn"
    )
    none = look(80.0, **{"model.use_activation_checkpointing": False})
    assert "recomputed" not in problems(none, "warn")


@pytest.mark.parametrize(("room", "fewest"), [(39, None), (40, 15), (60, 10), (98, 1), (100, 0)])
def test_the_fewest_layers_are_found_where_another_moment_hides_what_they_save(room, fewest):
    def size(layers: int) -> SimpleNamespace:
        kept = 100 - 4 * layers
        return SimpleNamespace(total=max(40, kept), kept=kept)

    assert survey._fewest_layers(size, 32, room) == fewest


def test_a_smaller_micro_batch_is_summed_up_and_makes_the_same_step(preflight, corpus, true_bases):
    asked = []

    def count(step):
        asked.append(step.accumulation)
        return Memory(0, 0, 0, {"backward pass": 2**40}, 0)

    options = {"train_dataloader.batch_size": 10, "optim_wrapper.accumulative_counts": 1}
    run = {"bases": true_bases, "need_weights": False, "stage": "stage3_instruct"}
    preflight(corpus.mixture, gpus=8, gpu_memory=1.0, options=options, count=count, **run)
    assert set(asked) == {1, 2, 5, 10}  # not 10 // 3: three packs make another step


def test_model_option_that_does_not_exist(preflight, corpus):
    found = preflight(corpus.mixture, options={**SMALL, "model.freze_llm": True})
    assert "freze_llm" in problems(found)
    assert as_json(found)["parameters"] is None
    assert found.summary is not None  # the data are looked at all the same
    assert "Model: could not be built" in as_text(found)


def test_nothing_trainable(preflight, corpus, monkeypatch):
    build = checks.build_on_meta

    def frozen(config):
        return build(config).requires_grad_(False)

    monkeypatch.setattr("gmai_xtuner.preflight.survey.build_on_meta", frozen)
    assert "nothing is trainable" in problems(preflight(corpus.mixture, options=SMALL))


def test_rates_by_part_and_the_best_checkpoint_are_counted(preflight, corpus):
    rate = "optim_wrapper.optimizer.lr_by_part"
    options = {
        **SMALL,
        "default_hooks.checkpoint.interval": 1,
        "default_hooks.best.keep": True,
        f"{rate}.projector": 0.01,
    }
    found = preflight(corpus.mixture, options=options)
    assert "learning rate by part: projector 0.01; " in problems(found, "note")
    assert found.disk["at_a_time"] == 4  # two are kept, one is being written, and the best
    wrong = preflight(
        corpus.mixture, options={**options, f"{rate}.llm": 0.01, f"{rate}.projector": 0}
    )
    assert "lr_by_part.llm: llm does not learn in this stage" in problems(wrong)
    assert "lr_by_part.projector must be a learning rate above 0" in problems(wrong)
    assert "nothing reads" in problems(preflight(corpus.mixture, options={f"{rate}.head": 0.1}))


# --- The command as a user runs it; its exit status is what a job script looks at ---


KEYS = {"parameters", "trainable", "packs", "fill", "iterations", "missing", "memory_gib"}
SHORT = (
    "train_dataloader.dataset.max_length=256",
    "train_dataloader.dataset.held_out=0",
    "train_dataloader.batch_size=2",
)


@pytest.fixture
def command(tiny_bases, tmp_path):
    def run(mixture: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "GMAI_LLM": str(tiny_bases / "llm"),
            "GMAI_VISION": str(tiny_bases / "vision"),
            "GMAI_MIXTURE": str(mixture),
            "GMAI_CACHE": str(tmp_path / "cache"),
        }
        line = [sys.executable, "-m", "gmai_xtuner.preflight", "configs/gmai_vl/stage1_shallow.py"]
        line += [*arguments, "--work-dir", str(tmp_path / "work"), "--cfg-options", *SHORT]
        return warm.run(line, environment=environment, folder=ROOT, timeout=120)

    return run


@pytest.mark.slow
def test_good_run_exits_0_with_one_json_object(command, corpus):
    done = command(corpus.mixture, "--json", "--gpus", "2")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report.keys() >= KEYS
    assert report["verdict"] == "would run"
    assert (report["packs"], report["iterations"], report["images"]) == (10, 3, 20)
    assert report["missing"] == {"datasets": [], "images": [], "images_left_out": 0}
    assert report["trainable"]["total"] == report["parameters"]["projector"]
    assert "Tokenised a: 15 of 15 records" in done.stderr


@pytest.mark.slow
def test_what_is_missing_or_damaged_exits_1_and_is_named(command, corpus):
    edit_mixture(corpus, "lost", annotations="lost.jsonl")
    whole = (corpus.images / "4.png").read_bytes()
    (corpus.images / "4.png").write_bytes(whole[:-400])
    with corpus.annotations("b").open("a") as file:
        file.write(json.dumps(record("late", "<image>?", "Yes.", image="none.png")) + "\n")
    done = command(corpus.mixture)
    assert done.returncode == 1
    assert "a.jsonl, line 5: image" in done.stdout
    assert "none.png" in done.stdout
    assert "lost.jsonl" in done.stdout
    assert done.stdout.splitlines()[-1] == "Verdict: this run would fail (data)."


@pytest.mark.parametrize(
    "line",
    [
        ["nowhere.py"],
        ["configs/gmai_vl/stage1_shallow.py", "--deepspeed", "zero9"],
        ["configs/gmai_vl/stage1_shallow.py", "--gpus", "0"],
        ["configs/gmai_vl/_base_/data.py"],
        [],
    ],
)
def test_usage_errors_exit_2(line, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as caught:
        main(line)
    assert caught.value.code == 2
    out, error = capfd.readouterr()
    assert out == ""
    assert "error: " in error
