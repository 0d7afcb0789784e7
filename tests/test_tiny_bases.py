# SPDX-License-Identifier: Apache-2.0

"""The tiny bases: hub layout, reproducible bytes, and weights that can learn."""

import json
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from transformers import CLIPImageProcessor

from examples.tiny_bases import SPECIAL_TOKENS, TinyLLM, TinyVision, write_tiny_bases
from gmai_xtuner.checkpoint.bases import load_language_model, load_vision_tower
from gmai_xtuner.checkpoint.tokenizer import load_tokenizer
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.model.llava import num_image_tokens
from gmai_xtuner.tiny_bases import main


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bases")
    write_tiny_bases(directory)
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.mark.parametrize("safe_serialization", [True, False])
def test_same_seed_gives_same_bytes_and_another_seed_other_weights(tmp_path, safe_serialization):
    options = {
        "llm": TinyLLM(safe_serialization=safe_serialization),
        "vision": TinyVision(safe_serialization=safe_serialization),
    }
    for state, (name, seed) in enumerate((("first", 3), ("again", 3), ("other", 4))):
        torch.manual_seed(state)  # the caller's generator must not matter
        write_tiny_bases(tmp_path / name, seed=seed, **options)
    first = contents(tmp_path / "first")
    assert first == contents(tmp_path / "again")
    other = contents(tmp_path / "other")
    changed = {name for name in first if first[name] != other[name]}
    assert changed
    assert all(name.endswith((".safetensors", ".bin")) for name in changed)


def test_callers_random_state_is_left_alone(tmp_path):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    write_tiny_bases(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_language_model_has_the_hubs_files_names_and_layout(bases):
    files = {path.name for path in (bases / "llm").iterdir()}
    assert files == {
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "special_tokens_map.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    config = json.loads((bases / "llm" / "config.json").read_text())
    assert config["model_type"] == "internlm2"
    assert config["rope_scaling"] == {"type": "dynamic", "factor": 2.0}
    index = json.loads((bases / "llm" / "model.safetensors.index.json").read_text())
    layer = "model.layers.1.attention.wqkv.weight"
    shard = load_file(bases / "llm" / index["weight_map"][layer])
    assert shard[layer].shape == ((4 + 2 * 2) * 32, 128)
    assert len(index["weight_map"]) == 3 + 2 * 7


def test_special_tokens_are_the_last_six_ids(bases):
    tokenizer = load_tokenizer(str(bases / "llm"))
    assert len(tokenizer) == 1536
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(1530, 1536))
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") == 1535
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 1534


@pytest.mark.parametrize("add_dummy_prefix", [False, True])
def test_proto_has_internlm2_flags(tmp_path, add_dummy_prefix):
    write_tiny_bases(tmp_path, llm=TinyLLM(add_dummy_prefix=add_dummy_prefix))
    from sentencepiece import sentencepiece_model_pb2

    data = (tmp_path / "llm" / "tokenizer.model").read_bytes()
    spec = sentencepiece_model_pb2.ModelProto.FromString(data).normalizer_spec
    assert spec.name == "identity"
    assert not spec.remove_extra_whitespaces
    assert spec.add_dummy_prefix is add_dummy_prefix


def test_medical_words_are_short_in_both_languages(bases):
    processor = sentencepiece.SentencePieceProcessor(str(bases / "llm" / "tokenizer.model"))
    assert processor.encode("▁pneumonia", out_type=str) == ["▁pneumonia"]
    assert len(processor.encode("请描述这张医学图像。")) <= 6


def test_chat_template_is_internlm2s(bases):
    tokenizer = load_tokenizer(str(bases / "llm"))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Which organ?"}], tokenize=False, add_generation_prompt=True
    )
    expected = "<s><|im_start|>user\nWhich organ?<|im_end|>\n<|im_start|>assistant\n"
    assert text == expected


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("safe_serialization", [False, True])
def test_vision_loads_whole_or_alone(tmp_path, whole, safe_serialization, monkeypatch):
    monkeypatch.setenv("GMAI_ALLOW_PICKLE", "1")
    vision = TinyVision(whole=whole, safe_serialization=safe_serialization)
    write_tiny_bases(tmp_path, vision=vision)
    config = json.loads((tmp_path / "vision" / "config.json").read_text())
    assert config["model_type"] == ("clip" if whole else "clip_vision_model")
    tower = load_vision_tower(str(tmp_path / "vision"))
    assert num_image_tokens(tower.config) == 64
    processor = CLIPImageProcessor.from_pretrained(tmp_path / "vision")
    assert processor.crop_size == {"height": 336, "width": 336}
    assert processor.size == {"shortest_edge": 336}


def test_the_command_writes_both_bases(tmp_path, capsys):
    main([str(tmp_path), "--seed", "2", "--bfloat16"])
    assert load_language_model(str(tmp_path / "llm")).dtype == torch.bfloat16
    assert (tmp_path / "vision" / "model.safetensors").is_file()
    assert "wrote" in capsys.readouterr().out


def test_nothing_is_left_behind_when_a_size_is_impossible(tmp_path):
    with pytest.raises(GMAIError, match="vocab_size"):
        write_tiny_bases(tmp_path, llm=TinyLLM(vocab_size=100_000))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_checkpoint_is_not_overwritten(tmp_path):
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "notes.txt").write_text("mine")
    with pytest.raises(GMAIError, match="no checkpoint"):
        write_tiny_bases(tmp_path)
    assert (tmp_path / "llm" / "notes.txt").read_text() == "mine"


def test_first_loss_is_that_of_a_uniform_guess_and_falls(bases):
    tokenizer = load_tokenizer(str(bases / "llm"))
    model = load_language_model(str(bases / "llm"))
    ids = tokenizer("The lung shows a nodule. 肺可见结节。", return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(torch.log(torch.tensor(1536.0)).item(), abs=0.3)
    assert losses[-1] < 0.2


def test_vision_tower_tells_patches_and_places_apart_from_the_start(bases):
    embeddings = load_vision_tower(str(bases / "vision")).vision_model.embeddings
    pixels = torch.randn(2, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    patches = embeddings.patch_embedding(pixels)
    assert 0.8 < patches.std().item() < 1.2
    assert embeddings.position_embedding.weight.std().item() == pytest.approx(0.125, rel=0.1)
