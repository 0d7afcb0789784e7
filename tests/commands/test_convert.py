# SPDX-License-Identifier: Apache-2.0

"""``xtuner convert pth_to_hf`` itself: exact, and refused before anything is written."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from examples.tiny_bases import TinyVision, write_tiny_vision
from gmai_xtuner.loading import load_model
from tests.commands.runner import Xtuner
from tests.model.exporting import stage_config, trained_model

pytestmark = pytest.mark.slow

STAGE1, STAGE3 = "configs/gmai_vl/stage1_shallow.py", "configs/gmai_vl/stage3_instruct.py"


@pytest.fixture(scope="module")
def checkpoints(tiny_bases, tmp_path_factory):
    """A checkpoint of stages 1 and 3, as training would leave it, but without training."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for stage in ("stage1_shallow", "stage3_instruct"):
        model = trained_model(stage_config(tiny_bases, stage))
        torch.save({"state_dict": model.state_dict()}, folder / f"{stage}.pth")
    return folder


@pytest.fixture(scope="module")
def xtuner(tiny_bases):
    return Xtuner(GMAI_LLM=tiny_bases / "llm", GMAI_VISION=tiny_bases / "vision")


def test_fp32_is_exact_in_both_formats_though_the_config_says_bf16(xtuner, checkpoints, tmp_path):
    file = checkpoints / "stage3_instruct.pth"
    state = torch.load(file)["state_dict"]
    printed = xtuner(
        "convert", "pth_to_hf", STAGE3, file, tmp_path / "ours", "--fp32", "--safe-serialization"
    )
    written = load_file(tmp_path / "ours" / "model.safetensors")
    for key, value in written.items():
        assert torch.equal(value, state[f"llm.{key}"]), key
    assert f"on disk: 4.9 MiB in {tmp_path / 'ours'}" in printed

    printed = xtuner(
        "convert", "pth_to_hf", STAGE3, file, tmp_path / "plain", "--fp32",
        "--save-format", "huggingface", "--max-shard-size", "1MB",
    )  # fmt: skip
    assert "vocabulary 1,600" in printed
    assert "1,256,704" in printed
    assert len(list((tmp_path / "plain").glob("model-*.safetensors"))) > 1
    llava = LlavaForConditionalGeneration.from_pretrained(tmp_path / "plain")
    for key, value in llava.language_model.state_dict().items():
        assert torch.equal(value[: len(state[f"llm.{key}"])], state[f"llm.{key}"]), key
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "plain").convert_tokens_to_ids("<image>") == 1536
    )
    ours, plain = load_model(tmp_path / "ours"), load_model(tmp_path / "plain")
    answer = ours.answer("Is it CT?", max_new_tokens=8)
    assert answer
    assert plain.answer("Is it CT?", max_new_tokens=8) == answer


def refused(xtuner, out, match, *arguments):
    printed = xtuner("convert", "pth_to_hf", *arguments, "--save-format", "huggingface")
    error = printed.rstrip().rsplit("error: ", 1)[-1]  # the last that it says, and no traceback
    assert match in error, printed[-3000:]
    assert "Traceback" not in printed
    assert not out.exists() or not any(out.iterdir())
    assert not list(out.parent.glob(f".{out.name}.*"))


def test_another_geometry_is_refused(checkpoints, tiny_bases, tmp_path):
    write_tiny_vision(tmp_path / "vision", TinyVision(hidden_size=32), seed=0)
    other = Xtuner(GMAI_LLM=tiny_bases / "llm", GMAI_VISION=tmp_path / "vision")
    out = tmp_path / "out"
    refused(
        other, out,
        "is of another geometry in 1 weights: projector.model.0.weight (128, 64) instead of (128, 32)",
        STAGE1, checkpoints / "stage1_shallow.pth", out,
    )  # fmt: skip
    other.environment["GMAI_TRACEBACK"] = "1"
    printed = other("convert", "pth_to_hf", STAGE1, checkpoints / "stage1_shallow.pth", out)
    assert "Traceback" in printed
    assert "ModelLoadError: " in printed


def test_the_config_of_another_stage_would_lose_what_was_learnt(xtuner, checkpoints, tmp_path):
    refused(
        xtuner, tmp_path / "out", "weights of llm that this config does not train",
        STAGE1, checkpoints / "stage3_instruct.pth", tmp_path / "out",
    )  # fmt: skip
