"""The main path by the real commands, on all real images of ``../shared/data``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from gmai_xtuner.loading import load_model
from gmai_xtuner.models.checkpoints import load_checkpoint_state
from tests.commands.runner import Xtuner, last_checkpoint, scalars
from tests.real_corpus import write_mixture

pytestmark = pytest.mark.slow

# Stage -> DeepSpeed name and ranks: other names than the quickstart's as well.
STAGES = {
    "stage1_shallow": ("zero1", 1),
    "stage2_deep": ("zero2", 2),
    "stage3_instruct": ("zero3_offload", 1),
}
SHORT = (
    "train_dataloader.batch_size=2",
    "default_hooks.logger.interval=1",
)
LOSS_KEYS = {"loss", "lr", "grad_norm", "tokens_per_second", "pack_fill", "images_per_second"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_bases, shared_data):
    """Three stages, the second on two ranks: (folder, what each printed, the command)."""
    folder = tmp_path_factory.mktemp("three_stages")
    xtuner = Xtuner(
        GMAI_LLM=tiny_bases / "llm",
        GMAI_VISION=tiny_bases / "vision",
        GMAI_MIXTURE=write_mixture(shared_data, folder / "corpus"),
        GMAI_CACHE=folder / "cache",
        GMAI_STAGE1=folder / "stage1_shallow",
        GMAI_STAGE2=folder / "stage2_deep",
    )
    printed = {
        stage: xtuner.train(stage, folder / stage, *SHORT, deepspeed=deepspeed, ranks=ranks)
        for stage, (deepspeed, ranks) in STAGES.items()
    }
    return folder, printed, xtuner


def test_every_stage_trains_on_every_dataset(trained):
    folder, printed, _ = trained
    for stage in STAGES:
        logged = scalars(folder / stage)
        assert len(logged) >= 2, printed[stage][-2000:]
        steps = [row for row in logged if "loss" in row]
        assert all(torch.isfinite(torch.tensor(row["loss"])) for row in steps)
        assert set(steps[-1]) >= LOSS_KEYS
        assert "eta:" in printed[stage]
        assert list((folder / stage).rglob("events.out.tfevents*")), "no TensorBoard file"
        for name in ("authors-example", "hannover", "bccd", "membranes", "pixel-formats", "dicom"):
            assert f"{name}: " in printed[stage]
        assert "conversations of a pack never see each other" in printed[stage]
    assert "slake-text" not in printed["stage1_shallow"]
    assert "slake-text: 400 conversations x 1" in printed["stage3_instruct"]


def test_the_cache_is_made_once_and_read_by_the_later_stages(trained):
    _, printed, _ = trained
    assert "Tokenised hannover: 40 of 40 records kept" in printed["stage1_shallow"]
    assert "Tokenised hannover" not in printed["stage2_deep"] + printed["stage3_instruct"]


def test_a_checkpoint_holds_what_its_stage_trains(trained):
    folder, _, _ = trained
    parts = {}
    for stage in STAGES:
        parts[stage] = {key.split(".")[0] for key in load_checkpoint_state(folder / stage)}
    assert parts == {
        "stage1_shallow": {"projector"},
        "stage2_deep": {"projector", "visual_encoder"},
        "stage3_instruct": {"projector", "visual_encoder", "llm"},
    }


def test_convert_every_stage_and_chat_with_the_last(trained, tiny_bases, shared_data):
    folder, _, xtuner = trained
    exports = {}
    for stage in STAGES:
        exports[stage] = folder / f"{stage}-export"
        xtuner.convert(
            stage, last_checkpoint(folder / stage), exports[stage], "--fp32", "--safe-serialization"
        )
    assert not (exports["stage1_shallow"] / "visual_encoder").exists()
    assert not (exports["stage2_deep"] / "config.json").exists()
    final = exports["stage3_instruct"]
    for file in ("model.safetensors", "tokenizer.json", "gmai_vl.json"):
        assert (final / file).is_file()
    for file in ("model.safetensors", "preprocessor_config.json"):
        assert (final / "visual_encoder" / file).is_file()
    assert not list(final.rglob("*.bin")), "--safe-serialization was not honoured"
    config = json.loads((final / "config.json").read_text())
    assert (config["architectures"], config["rope_scaling"]) == (["LlamaForCausalLM"], None)
    assert "gmai_attention" not in config

    # Stock transformers reads the parts, with none of our code.
    llm = LlamaForCausalLM.from_pretrained(final)
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert llm.config.vocab_size >= len(tokenizer)

    image = shared_data / "gmai_vl_samples" / "examples" / "example.tif"
    predictor = load_model(final)
    answer = predictor.answer("What is shown?", [image], max_new_tokens=12)
    printed = xtuner(
        "chat", final, "--llava", final, "--image", image, "--torch-dtype", "fp32",
        "--prompt-template", "internlm2_chat", "--temperature", "0", "--max-new-tokens", "12",
        stdin="What is shown?\n\nEXIT\n\n",
    )  # fmt: skip
    assert answer
    assert answer in printed

    # Stages 1 and 2 need the bases that they did not train.
    early = load_model(
        exports["stage1_shallow"], llm=str(tiny_bases / "llm"), vision=str(tiny_bases / "vision")
    )
    assert isinstance(early.answer("What is shown?", [image], max_new_tokens=4), str)


def test_convert_refuses_a_checkpoint_of_another_stage_and_writes_nothing(trained):
    folder, _, xtuner = trained
    out = folder / "wrong"
    printed = xtuner(
        "convert", "pth_to_hf", "configs/gmai_vl/stage3_instruct.py",
        last_checkpoint(folder / "stage1_shallow"), out,
    )  # fmt: skip
    assert "Use the config of the stage that made the checkpoint" in printed
    assert not out.exists() or not list(Path(out).iterdir())


def test_a_stage_refuses_to_start_from_the_wrong_one(trained):
    folder, _, xtuner = trained
    work_dir = folder / "wrong_start"
    printed = xtuner(
        "train", "configs/gmai_vl/stage3_instruct.py", "--deepspeed", "zero2",
        "--work-dir", work_dir,
        "--cfg-options", f"model.pretrained_pth={folder / 'stage1_shallow'}",
    )  # fmt: skip
    assert "has no weights of visual_encoder" in printed
    assert not (work_dir / "last_checkpoint").exists()


def test_training_without_deepspeed_is_refused_with_the_remedy(trained):
    folder, _, xtuner = trained
    printed = xtuner(
        "train", "configs/gmai_vl/stage1_shallow.py", "--work-dir", folder / "no_deepspeed"
    )
    assert "add --deepspeed zero2" in printed
