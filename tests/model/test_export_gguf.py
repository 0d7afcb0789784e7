# SPDX-License-Identifier: Apache-2.0

"""What vLLM and llama.cpp make of our exports: the same greedy answers, in fp32."""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from gmai_xtuner.checkpoint.export_gguf import _vocabulary_kind
from gmai_xtuner.core.conversation import Turn
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.generate import Prompt
from gmai_xtuner.import_model import main as import_model
from gmai_xtuner.loading import load_model
from tests.engines import PYTHON, needs_engines, run
from tests.exports import write_export
from tests.model.ask_engine import LENGTH
from tests.model.exporting import export, stage_config, trained_model

SCRIPT = Path(__file__).with_name("ask_engine.py")
TEXTS = ("Is it CT?", "图中显示什么？ 12 mm  left", "What is shown? 胸部X光片")


@pytest.fixture(scope="module")
def exported(tiny_bases, tmp_path_factory):
    """(folder of the plain export, folder of the GGUF files)."""
    folder = tmp_path_factory.mktemp("engines")
    formats = ("huggingface", "gguf")
    write_export(tiny_bases, *(folder / name for name in formats), save_formats=formats)
    return folder / "huggingface", folder / "gguf"


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """The last one with an image that no reader has to resize."""
    image = tmp_path_factory.mktemp("image") / "image.png"
    pixels = np.random.default_rng(1).integers(0, 256, (336, 336, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(image)
    return [{"text": text, "images": []} for text in TEXTS[:2]] + [
        {"text": TEXTS[2], "images": [str(image)]}
    ]


def greedy(predictor, question, *, features=None):
    """Ids of our own answer, or of that to other features of the image."""
    turns = (Turn("user", "<image>\n" * len(question["images"]) + question["text"]),)
    ids = predictor.encode(Prompt(turns, tuple(question["images"])))
    arguments = predictor._arguments(ids, question["images"], LENGTH)
    if features is not None:
        start = ids.tolist().index(-200)
        arguments["inputs_embeds"][0, start : start + len(features)] = features
    return predictor.model.llm.generate(**arguments, do_sample=False)[0].tolist()


def ask(engine, folder, questions):
    printed = run(PYTHON, SCRIPT, engine, folder, given=json.dumps(questions))
    return json.loads(printed.splitlines()[-1])


def tensors(file):
    """Names are llama.cpp's; shapes in torch's order."""
    return {one.name: torch.from_numpy(one.data.copy()) for one in gguf.GGUFReader(file).tensors}


def projected(weights, pixels, *, class_first=True):
    """``[P, D]`` of one image by llama.cpp's graph for LLaVA, 4 heads."""

    def linear(name, x):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    patches = F.conv2d(pixels[None], weights["v.patch_embd.weight"], stride=42).flatten(2)[0].T
    row = weights["v.class_embd"][None]
    x = torch.cat([row, patches] if class_first else [patches, row])
    x = norm("v.pre_ln", x + weights["v.position_embd.weight"])
    for layer in range(3):
        name = f"v.blk.{layer}"
        y = norm(f"{name}.ln1", x)
        heads = [linear(f"{name}.attn_{part}", y).unflatten(1, (4, 16)) for part in "qkv"]
        mixed = F.scaled_dot_product_attention(*(head.transpose(0, 1) for head in heads))
        x = x + linear(f"{name}.attn_out", mixed.transpose(0, 1).flatten(1))
        y = linear(f"{name}.ffn_up", norm(f"{name}.ln2", x))
        x = x + linear(f"{name}.ffn_down", y * torch.sigmoid(1.702 * y))
    return linear("mm.2", F.gelu(linear("mm.0", x[1:])))


def test_transformers_reads_the_language_model_back(exported):
    ours = load_model(exported[0], dtype=torch.float32).model.llm
    theirs = load_gguf_checkpoint(
        exported[1] / "model.gguf", return_tensors=True, model_to_load=ours
    )
    assert theirs["config"]["rope_theta"] == ours.config.rope_theta == 1e6
    assert theirs["config"]["num_key_value_heads"] == 2
    for key, value in ours.state_dict().items():
        assert torch.equal(theirs["tensors"][key], value), key


def test_tower_and_projector_compute_what_training_did(exported, questions):
    predictor = load_model(exported[0], dtype=torch.float32)
    pixels = predictor.pixels(questions[2]["images"][0])
    weights = tensors(exported[1] / "mmproj.gguf")
    assert not [name for name in weights if name.startswith(("v.blk.3", "v.post_ln"))]
    with torch.no_grad():
        expected = predictor.model.encode_images(pixels[None])
    torch.testing.assert_close(
        projected(weights, pixels), expected.reshape(64, -1), rtol=0, atol=1e-4
    )


@pytest.mark.slow
@needs_engines
def test_vllm_says_what_we_say(exported, questions):
    predictor = load_model(exported[0], dtype=torch.float32)
    expected = [greedy(predictor, one) for one in questions]
    assert len({tuple(answer) for answer in expected}) == 3
    assert ask("vllm", exported[0], questions) == expected


@needs_engines
def test_llama_cpp_says_what_we_say(exported, questions):
    predictor = load_model(exported[0], dtype=torch.float32)

    def whole(ids):
        return [number for number in ids if number > 258]  # it reports no single bytes

    answers = [whole(ids) for ids in ask("llama", exported[1], questions)]
    assert answers[:2] == [whole(greedy(predictor, one)) for one in questions[:2]]
    # With its class token behind the patches (issue 25814) it sees an image otherwise. Until that is mended,
    # its answer is the one that training would give to such features: the files are right.
    pixels = predictor.pixels(questions[2]["images"][0])
    weights = tensors(exported[1] / "mmproj.gguf")
    right = whole(greedy(predictor, questions[2]))
    shifted = projected(weights, pixels, class_first=False)
    last = whole(greedy(predictor, questions[2], features=shifted))
    assert last != right
    assert answers[2] in (right, last)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_an_export_becomes_gguf_in_the_dtype_that_is_asked_for(exported, tmp_path, dtype):
    out = tmp_path / "out"
    arguments = [str(exported[0]), str(out), "--save-format", "gguf", "--dtype", dtype]
    assert import_model(arguments) == 0
    assert {file.name for file in out.iterdir()} == {"model.gguf", "mmproj.gguf", "gmai_vl.json"}
    kinds = {
        one.name: one.tensor_type.name
        for file in ("model.gguf", "mmproj.gguf")
        for one in gguf.GGUFReader(out / file).tensors
    }
    wanted = dtype.upper().replace("FP", "F")
    assert {kinds[name] for name in ("token_embd.weight", "mm.0.weight", "output.weight")} == {
        wanted
    }
    assert {kinds[name] for name in ("output_norm.weight", "v.patch_embd.weight")} == {"F32"}
    if dtype == "fp32":
        for file in ("model.gguf", "mmproj.gguf"):
            first, again = tensors(exported[1] / file), tensors(out / file)
            assert all(torch.equal(first[name], again[name]) for name in first)


def test_what_gguf_can_not_say_is_refused_before_anything_is_written(
    tiny_bases, tmp_path, monkeypatch
):
    cfg = stage_config(tiny_bases, "stage3_instruct")
    model = trained_model(cfg)
    model.llm.config.rope_scaling = {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(GMAIError, match="can't write rope_scaling of the language model"):
        export(model, cfg, tmp_path / "out", save_format="gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(GMAIError, match=r"needs the package gguf: pip install"):
        export(model, cfg, tmp_path / "out", save_format="gguf")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_llama_cpp_would_split_otherwise_is_refused(tokenizer):
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    with pytest.raises(GMAIError, match="is none that --save-format gguf knows"):
        _vocabulary_kind(PreTrainedTokenizerFast(tokenizer_object=backend))
