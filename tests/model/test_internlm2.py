# SPDX-License-Identifier: Apache-2.0

"""InternLM2 checkpoints through LlamaForCausalLM, against xtuner's own InternLM2 modeling."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from xtuner._lite.modelings.internlm2.configuration_internlm2 import InternLM2Config
from xtuner._lite.modelings.internlm2.modeling_internlm2 import InternLM2ForCausalLM

from examples.tiny_bases import TinyLLM, write_tiny_llm
from gmai_xtuner.checkpoint.bases import load_language_model
from gmai_xtuner.checkpoint.weights import read_state_dict
from gmai_xtuner.core.errors import ModelLoadError
from gmai_xtuner.model.internlm2 import convert_state_dict, llama_config

SMALL = TinyLLM(hidden_size=32, intermediate_size=48)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_tiny_llm(tmp_path / "llm", SMALL, seed=1)
    return tmp_path / "llm"


def reference_logits(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    raw = json.loads((directory / "config.json").read_text())
    raw["attn_implementation"] = "eager"
    model = InternLM2ForCausalLM(InternLM2Config(**raw))
    missing, unexpected = model.load_state_dict(read_state_dict(directory), strict=False)
    assert not unexpected
    assert set(missing) <= {"output.weight"}
    model.tie_weights()
    with torch.no_grad():
        return model.eval().float()(input_ids=ids, use_cache=False).logits


def logits(directory: Path, ids: torch.Tensor, attention: str = "sdpa") -> torch.Tensor:
    model = load_language_model(str(directory))
    model.config._attn_implementation = attention
    with torch.no_grad():
        return model(input_ids=ids).logits


def redraw(directory: Path, *, seed: int, std: float = 0.2) -> None:
    """Large random weights, norms and biases too, so that nothing hides behind zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    for path in directory.glob("model*.safetensors"):
        weights = {
            name: torch.randn(weight.shape, generator=generator) * std
            for name, weight in load_file(path).items()
        }
        save_file(weights, path, metadata={"format": "pt"})


def ids_of(vocab_size: int, *, length: int = 24, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (2, length), generator=generator)


@pytest.mark.parametrize(
    "geometry",
    [
        pytest.param({}, id="gqa-2"),
        pytest.param({"num_attention_heads": 8, "num_key_value_heads": 2}, id="gqa-4"),
        pytest.param({"num_key_value_heads": 1}, id="mqa"),
        pytest.param({"num_key_value_heads": 4}, id="mha"),
        pytest.param({"bias": True}, id="bias"),
        pytest.param({"tie_word_embeddings": True}, id="tied"),
        pytest.param({"rope_scaling_factor": None, "rope_theta": 10000}, id="plain-rope"),
        pytest.param({"num_hidden_layers": 3, "shards": 1}, id="three-layers"),
        pytest.param({"max_position_embeddings": 16}, id="beyond-the-trained-length"),
    ],
)
def test_same_logits_as_xtuners_internlm2(tmp_path, geometry):
    llm = replace(SMALL, **geometry)
    write_tiny_llm(tmp_path / "llm", llm, seed=0)
    redraw(tmp_path / "llm", seed=5)
    ids = ids_of(llm.vocab_size)
    expected = reference_logits(tmp_path / "llm", ids)
    assert expected.std() > 0.1  # the comparison means something
    for attention in ("eager", "sdpa"):
        got = logits(tmp_path / "llm", ids, attention)
        assert (got - expected).abs().max() < 1e-5


def test_bin_equals_safetensors_and_sharded_equals_single(tmp_path, monkeypatch):
    monkeypatch.setenv("GMAI_ALLOW_PICKLE", "1")
    models = {}
    for shards in (1, 3):
        for safe in (True, False):
            directory = tmp_path / f"{shards}-{safe}"
            write_tiny_llm(
                directory, replace(SMALL, shards=shards, safe_serialization=safe), seed=0
            )
            models[shards, safe] = load_language_model(str(directory)).state_dict()
    first = models.pop((1, True))
    for other in models.values():
        assert other.keys() == first.keys()
        assert all(torch.equal(other[key], first[key]) for key in first)


def test_is_a_plain_llama_with_the_checkpoints_own_settings(checkpoint):
    model = load_language_model(str(checkpoint))
    assert type(model) is LlamaForCausalLM
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    config = model.config
    assert (config.model_type, config.architectures) == ("llama", ["LlamaForCausalLM"])
    assert not hasattr(config, "auto_map")
    assert not hasattr(config, "bias")
    assert (config.rope_theta, config.rope_scaling["factor"]) == (1e6, 2.0)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert config.name_or_path == str(checkpoint)
    assert model.generation_config.eos_token_id == [2, SMALL.vocab_size - 2]


@pytest.mark.parametrize(
    ("stored", "wanted", "expected"),
    [
        ("float32", None, torch.float32),
        ("bfloat16", None, torch.bfloat16),
        ("float32", "bfloat16", torch.bfloat16),
        ("bfloat16", torch.float32, torch.float32),
    ],
)
def test_dtype_is_the_checkpoints_own_or_the_one_asked_for(tmp_path, stored, wanted, expected):
    write_tiny_llm(tmp_path / "llm", replace(SMALL, torch_dtype=stored), seed=0)
    model = load_language_model(str(tmp_path / "llm"), torch_dtype=wanted)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert model.config.torch_dtype == expected


def test_dtype_of_a_config_that_names_none_is_that_of_the_weights(tmp_path):
    write_tiny_llm(tmp_path / "llm", replace(SMALL, torch_dtype="bfloat16"), seed=0)
    edit_config(tmp_path / "llm", torch_dtype=None)
    assert load_language_model(str(tmp_path / "llm")).dtype == torch.bfloat16


def test_tied_llama_loads_without_an_output_matrix(tmp_path):
    write_tiny_llm(tmp_path / "llm", replace(SMALL, tie_word_embeddings=True), seed=0)
    load_language_model(str(tmp_path / "llm")).save_pretrained(tmp_path / "llama")
    model = load_language_model(str(tmp_path / "llama"))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_meta_build_has_the_structure_and_reads_no_weight(checkpoint):
    for path in checkpoint.glob("*.safetensors*"):
        path.unlink()
    with init_empty_weights():
        model = load_language_model(str(checkpoint), torch_dtype="bfloat16")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.device.type == "cpu"
    with pytest.raises(ModelLoadError, match="no weights"):
        load_language_model(str(checkpoint))


def test_xtuners_uninitialised_build_does_not_disturb(checkpoint):
    from xtuner.model.utils import LoadWoInit

    expected = load_language_model(str(checkpoint)).state_dict()
    with LoadWoInit():
        got = load_language_model(str(checkpoint)).state_dict()
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_training_in_place_leaves_the_files_alone(checkpoint):
    before = [path.read_bytes() for path in sorted(checkpoint.glob("*.safetensors"))]
    model = load_language_model(str(checkpoint))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert before == [path.read_bytes() for path in sorted(checkpoint.glob("*.safetensors"))]


def test_argument_is_not_changed_and_old_rotary_buffers_are_left_out(checkpoint):
    config = llama_config(json.loads((checkpoint / "config.json").read_text()))
    weights = read_state_dict(checkpoint)
    weights["model.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(4)
    keys = list(weights)
    converted = convert_state_dict(weights, config)
    assert list(weights) == keys
    assert not any("rotary" in key for key in converted)


def edit_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(directory: Path, change) -> None:
    """Apply ``change`` to the dict of all weights, stored as one file."""
    weights = {key: value.clone() for key, value in read_state_dict(directory).items()}
    for path in directory.glob("model*.safetensors*"):
        path.unlink()
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def rename_norm(weights):
    weights["model.layers.1.attention_norm.weigth"] = weights.pop(
        "model.layers.1.attention_norm.weight"
    )


def cut_wqkv(weights):
    name = "model.layers.0.attention.wqkv.weight"
    weights[name] = weights[name][:-1].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("output.weight"), r"1 missing \(output.weight\)"),
        (rename_norm, r"1 missing .*attention_norm.weight\); 1 unexpected .*weigth"),
        (cut_wqkv, r"wqkv.weight \(63, 32\) instead of \(64, 32\)"),
    ],
    ids=["missing", "renamed", "shape"],
)
def test_weights_that_do_not_fit_are_named(checkpoint, change, message):
    edit_weights(checkpoint, change)
    with pytest.raises(ModelLoadError, match=message):
        load_language_model(str(checkpoint))


def test_missing_and_damaged_files_are_named(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "cut")
    shard = "model-00002-of-00002.safetensors"
    (tmp_path / "cut" / shard).write_bytes((checkpoint / shard).read_bytes()[:-100])
    with pytest.raises(ModelLoadError, match=f"{shard}.*cut short"):
        load_language_model(str(tmp_path / "cut"))
    (checkpoint / shard).unlink()
    with pytest.raises(ModelLoadError, match=f"1 of 2 weight files.*{shard}"):
        load_language_model(str(checkpoint))


def test_index_that_promises_too_much_is_an_error(checkpoint):
    index = checkpoint / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.ghost.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ModelLoadError, match=r"no file holds: model\.ghost\.weight"):
        load_language_model(str(checkpoint))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "'qwen2' is not supported.*'internlm2'.*'llama'"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_key_value_heads": 3}, "don't divide"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "'linear' or 'dynamic'"),
        ({"bias": True}, "missing .*wo.bias"),
        ({"tie_word_embeddings": True}, "output.weight differs"),
        ({"torch_dtype": "float33"}, "'float33' is unknown"),
    ],
)
def test_config_that_does_not_fit_is_an_error(checkpoint, changes, message):
    edit_config(checkpoint, **changes)
    with pytest.raises(ModelLoadError, match=message):
        load_language_model(str(checkpoint))


def test_no_config_and_no_such_name_are_errors(checkpoint, monkeypatch):
    (checkpoint / "config.json").unlink()
    with pytest.raises(ModelLoadError, match=r"config\.json is missing"):
        load_language_model(str(checkpoint))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/no-such-model", "./no/such/folder"):
        with pytest.raises(ModelLoadError, match="is no folder"):
            load_language_model(name)


@pytest.mark.slow  # the first run compiles DeepSpeed's CPU communication, about a minute
def test_zero3_partitions_the_same_weights(checkpoint, monkeypatch):
    deepspeed = pytest.importorskip("deepspeed")
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    expected = {k: v.clone() for k, v in load_language_model(str(checkpoint)).state_dict().items()}
    address = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": 0}
    for key, value in {**address, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(key, str(value))
    deepspeed.init_distributed("gloo", verbose=False)
    settings = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
    alive = HfDeepSpeedConfig(settings)  # it acts only while it is referenced
    try:
        model = load_language_model(str(checkpoint))
        assert all(parameter.numel() == 0 for parameter in model.parameters())
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            got = {key: value.clone() for key, value in model.state_dict().items()}
    finally:
        unset_hf_deepspeed_config()
        torch.distributed.destroy_process_group()
        del alive
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)
