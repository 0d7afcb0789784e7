# SPDX-License-Identifier: Apache-2.0

"""LoRA by the real commands: train stage 3 with adapters, resume, convert, ask, merge."""

import runpy
import sys
from unittest.mock import patch

import pytest
import torch
from mmengine.config import Config
from transformers import AutoTokenizer, LlamaForCausalLM
from xtuner.registry import BUILDER

from gmai_xtuner.checkpoint.training import load_checkpoint_state
from gmai_xtuner.llama_base import write_llama_base
from gmai_xtuner.loading import load_model
from gmai_xtuner.model.lora import adapter_layers, is_adapter_key
from tests.commands.runner import Xtuner, last_checkpoint, scalars
from tests.model.exporting import predictor_of
from tests.toy import record, write_corpus

pytestmark = pytest.mark.slow

LORA = "variants/stage3_lora_one_80gb"
QUESTION = "Which number?"
SHORT = (
    "train_dataloader.batch_size=2",
    "optim_wrapper.accumulative_counts=2",
    "train_dataloader.dataset.max_length=160",
    "default_hooks.logger.interval=1",
    "default_hooks.sample_answer.interval=0",
    "train_cfg.max_epochs=3",
    # so that a few steps teach the adapters enough to change the answer
    "optim_wrapper.optimizer.lr=1e-2",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_bases):
    """Stage 2, then stage 3 with adapters: (folder, the command, what training printed)."""
    folder = tmp_path_factory.mktemp("lora")
    records = [
        record(
            f"r{number}",
            f"<image>\n{QUESTION}",
            f"It is number {number % 3}.",
            image=f"{number}.png",
        )
        for number in range(16)
    ]
    corpus = write_corpus(
        folder / "corpus", {"numbers": records}, images=[f"{number}.png" for number in range(16)]
    )
    xtuner = Xtuner.tiny(
        tiny_bases, corpus.mixture, folder / "cache", GMAI_STAGE2=folder / "stage2"
    )
    # From nothing: only that the tower moves away from its base matters here.
    xtuner.train("stage2_deep", folder / "stage2", *SHORT, "model.pretrained_pth=None")
    saved = ("default_hooks.checkpoint.interval=8", "default_hooks.checkpoint.max_keep_ckpts=9")
    printed = xtuner.train(LORA, folder / "stage3", *SHORT, *saved)
    return folder, xtuner, printed


def trained_model(folder):
    """The model as it was trained, adapters unmerged, from the run's own config and checkpoint."""
    cfg = Config.fromfile(folder / "stage3" / "stage3_lora_one_80gb.py")
    cfg.model.pretrained_pth = str(folder / "stage3")
    cfg.model.llm.torch_dtype = "float32"
    return BUILDER.build(cfg.model)


def test_the_checkpoint_has_adapters_projector_and_the_tower_underneath(run):
    folder, _, printed = run
    assert "Loaded projector, visual_encoder from" in printed
    state = load_checkpoint_state(folder / "stage3")
    kinds = {(key.split(".")[0], is_adapter_key(key)) for key in state}
    assert kinds == {
        ("projector", False),
        ("llm", True),
        ("visual_encoder", True),
        ("visual_encoder", False),
    }
    stage2 = load_checkpoint_state(folder / "stage2")
    for key, value in state.items():
        if key.startswith("visual_encoder.") and not is_adapter_key(key):
            assert torch.equal(value, stage2[key.replace(".base_layer.", ".")]), key
    learnt = [value for key, value in state.items() if ".lora_B." in key]
    assert len(learnt) == 14 + 3 * 6  # of the four layers of the tower three run
    assert all(value.abs().max() > 0 for value in learnt)
    losses = [row["loss"] for row in scalars(folder / "stage3") if "loss" in row]
    assert losses[-1] < losses[0]


def test_same_greedy_answer_unmerged_and_from_the_export_and_in_chat(run, tiny_bases):
    folder, xtuner, _ = run
    export = folder / "export"
    xtuner.convert(
        LORA, last_checkpoint(folder / "stage3"), export, "--fp32", "--safe-serialization"
    )
    image = folder / "corpus" / "images" / "0.png"
    model = trained_model(folder)
    assert len(adapter_layers(model.llm)) == 14
    unmerged = predictor_of(model, tiny_bases)
    answer = unmerged.answer(QUESTION, [image], max_new_tokens=12)
    assert answer
    assert load_model(export).answer(QUESTION, [image], max_new_tokens=12) == answer
    printed = xtuner.chat(export, image, QUESTION, 12)
    assert answer in printed
    assert "adapter" not in printed, "an adapter was applied on top of the merged weights"

    # The adapter alone, by xtuner's own merge on the base in Llama form.
    write_llama_base(str(tiny_bases / "llm"), folder / "llama")
    convert_merge(folder / "llama", export / "adapters" / "llm", folder / "merged")
    ours, theirs = (
        LlamaForCausalLM.from_pretrained(path).state_dict() for path in (export, folder / "merged")
    )
    for key, value in ours.items():  # xtuner merges in fp16
        torch.testing.assert_close(theirs[key].float(), value, rtol=2e-3, atol=1e-3, msg=key)
    tokenizer = AutoTokenizer.from_pretrained(folder / "merged")
    assert tokenizer("CT of the chest").input_ids == unmerged.tokenizer("CT of the chest").input_ids


def convert_merge(base, adapter, out):
    """The program behind ``xtuner convert merge``, beside bitsandbytes 0.45.0 (see docs/lora.md)."""
    arguments = ["merge", base, adapter, out, "--device", "cpu", "--safe-serialization"]
    with patch.object(sys, "argv", [str(argument) for argument in arguments]):
        runpy.run_module("xtuner.tools.model_converters.merge", run_name="__main__")


def test_a_run_resumes_with_its_adapters(run):
    folder, xtuner, _ = run
    whole = {row["step"]: row["loss"] for row in scalars(folder / "stage3") if "loss" in row}
    part = folder / "part"
    xtuner.train(LORA, part, *SHORT, resume=folder / "stage3" / "iter_16.pth")
    resumed = {row["step"]: row["loss"] for row in scalars(part) if "loss" in row}
    assert (min(resumed), max(resumed)) == (17, 24)
    assert resumed == pytest.approx({step: whole[step] for step in resumed}, rel=1e-4)
