# SPDX-License-Identifier: Apache-2.0

"""A plain LLaVA folder says in stock transformers, old and new, what the trained model says."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from examples.tiny_bases import TinyLLM, write_tiny_llm
from gmai_xtuner.checkpoint.bases import load_language_model
from gmai_xtuner.checkpoint.tokenizer import load_tokenizer
from gmai_xtuner.checkpoint.tokenizer_files import (
    chat_template,
    differing_prompts,
    plain_tokenizer,
    prompt_text,
)
from gmai_xtuner.checkpoint.weights import read_state_dict
from gmai_xtuner.core.constants import IMAGE_TOKEN_INDEX
from gmai_xtuner.core.conversation import Turn
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.data.tokenization import ChatTemplate, ConversationTokenizer
from gmai_xtuner.loading import load_model
from tests.model.exporting import export, predictor_of, stage_config, trained_model
from tests.model.plain_llava import ask
from tests.newest_transformers import newest_python, newest_variables

LENGTH = 12
IMAGE = {"type": "image"}


def text(content):
    return {"type": "text", "text": content}


#: Of each prompt the turns of our own code, and the same as OpenAI messages.
PROMPTS = [
    (
        (Turn("user", "<image>\nWhat is shown?"),),
        [{"role": "user", "content": [IMAGE, text("What is shown?")]}],
        ["wide"],
    ),
    (
        (Turn("user", "Where?\n<image>"),),
        [{"role": "user", "content": [text("Where?"), IMAGE]}],
        ["square"],
    ),
    ((Turn("user", "Is it CT?"),), [{"role": "user", "content": "Is it CT?"}], []),
    (
        (
            Turn("system", "You are a radiologist."),
            Turn("user", "<image>\n<image>\n比较 these  two."),
            Turn("assistant", "\n胸部 are alike.\n"),
            Turn("user", "And <image>?"),
        ),
        [
            {"role": "system", "content": "You are a radiologist."},
            {"role": "user", "content": [IMAGE, IMAGE, text("比较 these  two.")]},
            {"role": "assistant", "content": [text("\n胸部 are alike.\n")]},
            {"role": "user", "content": "And <image>?"},
        ],
        ["square", "tall", "wide"],
    ),
]
SIZES = {"wide": (500, 180), "tall": (40, 97), "square": (336, 336)}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number, (name, (width, height)) in enumerate(SIZES.items()):
        noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{name}.png")
    return {name: folder / f"{name}.png" for name in SIZES}


@pytest.fixture(scope="module")
def stage3(tiny_bases, tmp_path_factory):
    """(the training model as it is asked by our code, its config, its export)."""
    cfg = stage_config(tiny_bases, "stage3_instruct")
    model = trained_model(cfg)
    folder = export(
        model,
        cfg,
        tmp_path_factory.mktemp("stage3") / "export",
        save_pretrained_kwargs={"max_shard_size": "1MB", "safe_serialization": False},
    )
    return predictor_of(model, tiny_bases), cfg, folder


@pytest.fixture(scope="module")
def requests(images):
    return [
        {"messages": messages, "images": [str(images[name]) for name in names]}
        for _, messages, names in PROMPTS
    ]


@pytest.fixture(scope="module")
def newest(stage3, requests, tmp_path_factory):
    """(what the newest transformers says, the folder that it saved the model into)."""
    folder = tmp_path_factory.mktemp("newest")
    (folder / "requests.json").write_text(json.dumps(requests))
    script = Path(__file__).with_name("plain_llava.py")
    done = subprocess.run(
        [
            newest_python(), script, stage3[2], folder / "requests.json", folder / "out.pt",
            "--save-again",
        ],
        cwd=folder, env=newest_variables(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "out.pt"), folder / "again"


def logits_of_training(predictor, turns, paths):
    """ids with one id an image token, and logits [T, V], by the model's training forward."""
    ids = predictor.encoder.encode_prompt(turns).astype(np.int64)
    widened = torch.from_numpy(np.repeat(ids, np.where(ids == IMAGE_TOKEN_INDEX, 64, 1)))
    pixels = [predictor.transform.read(path) for path in paths]
    length = len(widened)
    with torch.no_grad():
        logits = predictor.model(
            {
                "input_ids": widened[None],
                "position_ids": torch.arange(length)[None],
                "cu_seqlens": torch.tensor([0, length], dtype=torch.int32),
                "lengths": (length,),
                "pixel_values": torch.stack(pixels) if pixels else torch.zeros(0, 3, 336, 336),
                "image_positions": torch.nonzero(widened == IMAGE_TOKEN_INDEX).flatten(),
            },
            mode="tensor",
        )[0]
    return widened, logits, pixels


def check_answers(predictor, answers, images, *, pads):
    said = set()
    for (turns, _, names), answer in zip(PROMPTS, answers, strict=True):
        paths = [images[name] for name in names]
        ids, logits, pixels = logits_of_training(predictor, turns, paths)
        expected = torch.where(ids == IMAGE_TOKEN_INDEX, 1536, ids)
        assert torch.equal(answer["ids"], expected)
        as_in_training = pads or all(name == "square" for name in names)
        if pixels and as_in_training:
            # A backend may round otherwise: one of 255 levels, divided by the least deviation.
            assert (answer["pixels"] - torch.stack(pixels)).abs().max() <= 1 / 255 / 0.26
            assert torch.equal(answer["exact_pixels"], torch.stack(pixels))
        if as_in_training:
            torch.testing.assert_close(answer["logits"][:, :1536], logits, rtol=0, atol=1e-4)
            whole = predictor.generate(turns, paths, max_new_tokens=LENGTH)
            assert answer["answer"] == whole
            said.add(whole)
    return said


@pytest.mark.slow
def test_the_newest_transformers_says_what_training_says(stage3, newest, images):
    said = check_answers(stage3[0], newest[0], images, pads=True)
    assert len(said) == len(PROMPTS), "the model must tell the prompts apart, or this shows nothing"


def test_stock_transformers_of_xtuner_says_it_too_where_it_need_not_pad(stage3, requests, images):
    predictor, _, folder = stage3
    check_answers(predictor, ask(str(folder), requests), images, pads=False)


@pytest.mark.slow
def test_what_the_newest_transformers_saves_again_loads_here(stage3, newest, images):
    turns, _, names = PROMPTS[3]
    paths = [images[name] for name in names]
    again = load_model(newest[1])
    assert again.model.llm.config.rope_theta == 1e6
    expected = stage3[0].generate(turns, paths, max_new_tokens=LENGTH)
    # It saves no gmai_vl.json; the tokenizer's <|im_end|> says which prompts.
    assert not (newest[1] / "gmai_vl.json").exists()
    assert again.generate(turns, paths, max_new_tokens=LENGTH) == expected


def test_the_folder_says_what_servers_read(stage3):
    folder = stage3[2]
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert {key: config[key] for key in (
        "model_type", "image_token_index", "image_seq_length", "vision_feature_layer",
        "vision_feature_select_strategy", "projector_hidden_act", "multimodal_projector_bias",
    )} == {
        "model_type": "llava", "image_token_index": 1536, "image_seq_length": 64,
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu", "multimodal_projector_bias": True,
    }  # fmt: skip
    assert config["text_config"]["model_type"] == "llama"
    assert config["text_config"]["rope_scaling"] is None
    assert config["text_config"]["vocab_size"] == 1600  # 1,537 to a multiple of 64
    assert config["vision_config"]["model_type"] == "clip_vision_model"
    assert json.loads((folder / "processor_config.json").read_text()) == {
        "processor_class": "LlavaProcessor", "patch_size": 42, "image_token": "<image>",
        "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1,
    }  # fmt: skip
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 1534]  # </s>, <|im_end|>
    assert generation["suppress_tokens"] == list(range(1536, 1600))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 1
    assert not list(folder.glob("*.bin"))
    assert {"language_model.model.norm.weight", "multi_modal_projector.linear_1.bias"} <= set(
        index["weight_map"]
    )
    for file in folder.iterdir():
        assert file.stat().st_mode & 0o044 == 0o044, f"{file.name} can be read by its owner only"


def test_nothing_in_the_folder_names_a_path_of_this_machine(stage3, tiny_bases):
    for file in stage3[2].iterdir():
        if file.suffix != ".safetensors":
            assert str(tiny_bases.parent) not in file.read_text(encoding="utf-8"), file.name


def test_new_rows_are_the_mean_so_that_no_new_id_is_ever_the_likeliest(stage3):
    state = read_state_dict(stage3[2])
    trained = stage3[0].model.llm.state_dict()
    for theirs, ours in (
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("language_model.model.embed_tokens.weight", "model.embed_tokens.weight"),
    ):
        assert torch.equal(state[theirs][:1536], trained[ours])
        mean = trained[ours].mean(0)
        torch.testing.assert_close(state[theirs][1536:], mean.expand(64, -1))


def test_stage_1_is_whole_with_the_untrained_parts_of_the_bases(tiny_bases, tmp_path, images):
    cfg = stage_config(tiny_bases, "stage1_shallow")
    model = trained_model(cfg)
    # The shipped config reads the base in bf16; fp32 is written from the base itself.
    cfg.model.llm.torch_dtype = "bfloat16"
    model.llm.bfloat16()
    folder = export(model, cfg, tmp_path / "export")
    state = read_state_dict(folder)
    base = load_language_model(str(tiny_bases / "llm"), torch_dtype="float32").state_dict()
    for key, value in base.items():
        assert torch.equal(state[f"language_model.{key}"][: len(value)], value), key
    for key, value in model.visual_encoder.state_dict().items():
        assert torch.equal(state[f"vision_tower.{key}"], value), key
    assert torch.equal(
        state["multi_modal_projector.linear_2.weight"], model.projector.model[2].weight
    )
    card = (folder / "README.md").read_text()
    assert "| trained in this stage | projector |" in card
    assert "# GMAI-VL, stage1" in card


def test_lora_is_merged(tiny_bases, tmp_path, images, requests):
    lora = {"type": "peft.LoraConfig", "r": 4, "lora_alpha": 8}
    cfg = stage_config(
        tiny_bases, "stage3_instruct", freeze_llm=True, llm_lora=lora, visual_encoder_lora=lora
    )
    model = trained_model(cfg)
    folder = export(model, cfg, tmp_path / "export")
    assert not [key for key in read_state_dict(folder) if "lora" in key]
    predictor = predictor_of(model, tiny_bases)
    (answer,) = ask(str(folder), requests[2:3])
    _, logits, _ = logits_of_training(predictor, PROMPTS[2][0], [])
    torch.testing.assert_close(answer["logits"][:, :1536], logits, rtol=0, atol=1e-4)
    assert (
        "vision tower (LoRA, merged), language model (LoRA, merged)"
        in (folder / "README.md").read_text()
    )


def test_a_head_that_is_tied_to_the_embedding_stays_tied(tiny_bases, tmp_path, requests):
    write_tiny_llm(tmp_path / "llm", TinyLLM(tie_word_embeddings=True), seed=0)
    shutil.copytree(tiny_bases / "vision", tmp_path / "vision")
    cfg = stage_config(tmp_path, "stage3_instruct")
    model = trained_model(cfg)
    folder = export(model, cfg, tmp_path / "export")
    assert "language_model.lm_head.weight" not in read_state_dict(folder)
    (answer,) = ask(str(folder), requests[2:3])
    predictor = predictor_of(model, tmp_path)
    _, logits, _ = logits_of_training(predictor, PROMPTS[2][0], [])
    torch.testing.assert_close(answer["logits"][:, :1536], logits, rtol=0, atol=1e-4)
    again = load_model(folder).generate(PROMPTS[2][0], [], max_new_tokens=LENGTH)
    assert again == answer["answer"]


@pytest.mark.parametrize(
    ("fp32", "named", "dtype"),
    [(False, None, "float16"), (False, "bfloat16", "bfloat16"), (True, "float32", "float32")],
)
def test_the_dtype_that_is_asked_for(tiny_bases, tmp_path, fp32, named, dtype):
    cfg = stage_config(tiny_bases, "stage3_instruct")
    if named:
        cfg.export_dtype = named
    folder = export(trained_model(cfg), cfg, tmp_path / "export", fp32=fp32)
    state = load_file(folder / "model.safetensors")
    assert {value.dtype for value in state.values()} == {getattr(torch, dtype)}
    config = json.loads((folder / "config.json").read_text())
    assert config["torch_dtype"] == config["text_config"]["torch_dtype"] == dtype
    model = LlavaForConditionalGeneration.from_pretrained(folder, torch_dtype="auto")
    assert model.dtype == getattr(torch, dtype)


def test_images_that_training_resized_are_resized_and_bos_is_as_in_training(
    tiny_bases, tmp_path, images
):
    cfg = stage_config(tiny_bases, "stage3_instruct")
    cfg.train_dataloader.dataset.update(image_mode="resize", add_bos=False)
    model = trained_model(cfg)
    folder = export(model, cfg, tmp_path / "export")
    predictor = predictor_of(model, tiny_bases, add_bos=False)
    predictor.transform.mode = "resize"
    request = {"messages": PROMPTS[0][1], "images": [str(images["wide"])]}
    (answer,) = ask(str(folder), [request])
    ids, _, pixels = logits_of_training(predictor, PROMPTS[0][0], [images["wide"]])
    assert torch.equal(answer["ids"], torch.where(ids == IMAGE_TOKEN_INDEX, 1536, ids))
    assert answer["ids"][0] != 1
    assert torch.equal(answer["pixels"], torch.stack(pixels))
    assert "without padding" in (folder / "README.md").read_text()


# --- the tokenizer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("add_bos", [True, False])
def test_every_conversation_has_the_ids_of_training(tokenizer, add_bos):
    template = ChatTemplate.from_xtuner("internlm2_chat", add_bos=add_bos)
    plain = plain_tokenizer(tokenizer, template)
    training = ConversationTokenizer.from_pretrained(tokenizer, template)
    generator = np.random.default_rng(0)
    pieces = [
        "<image>",
        "\n",
        " ",
        "  ",
        "CT",
        "胸部X光片",
        "é",
        "assistant",
        "user",
        "1.5 mm",
        "\t",
    ]
    for _ in range(200):
        words = ["".join(generator.choice(pieces, size=4)) + "x" for _ in range(4)]
        turns = (
            Turn("system", words[0].replace("<image>", "")),
            Turn("user", words[1]),
            Turn("assistant", words[2].replace("<image>", "")),
            Turn("user", words[3]),
        )
        expected = training.encode_prompt(turns)
        expected = np.where(expected == IMAGE_TOKEN_INDEX, 1536, expected).tolist()
        assert plain(prompt_text(plain, turns)).input_ids == expected, turns


def test_an_answer_is_split_from_what_opens_it(tokenizer):
    """In a vocabulary with a piece over that border, one text would have other ids than training."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = backend["model"]["vocab"]
    rare = next(word for word in vocabulary if word == "中" or "\u4e00" <= word[0] <= "\u9fff")
    number = vocabulary.pop(rare)
    vocabulary["\nN"] = number
    backend["model"]["merges"] = [["\n", "N"]] + [
        pair for pair in backend["model"]["merges"] if rare not in ("".join(pair), *pair)
    ]
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    changed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>",
    )  # fmt: skip
    template = ChatTemplate.from_xtuner("internlm2_chat")
    turns = (Turn("user", "Is\nN it?"), Turn("assistant", "No."), Turn("user", "Why?"))
    expected = ConversationTokenizer.from_pretrained(changed, template).encode_prompt(turns)
    assert expected.tolist().count(number) == 1, "in the question it is one piece"
    plain = plain_tokenizer(changed, template)
    assert plain(prompt_text(plain, turns)).input_ids == expected.tolist()


@pytest.mark.parametrize(("name", "differ"), [("internlm2_chat", False), ("vicuna", True)])
def test_a_tokenizer_that_puts_a_mark_before_each_text(tmp_path, name, differ, monkeypatch):
    """Llama 2's way: an answer encoded apart begins with the mark, within one text it would not."""
    write_tiny_llm(tmp_path / "llm", TinyLLM(add_dummy_prefix=True), seed=0)
    base = load_tokenizer(str(tmp_path / "llm"))
    template = ChatTemplate.from_xtuner(name)
    told = []
    monkeypatch.setattr("gmai_xtuner.checkpoint.tokenizer_files.warn", told.append)
    plain = plain_tokenizer(base, template)
    training = ConversationTokenizer.from_pretrained(base, template)
    assert bool(differing_prompts(plain, training)) is differ
    # vicuna's turns begin with no token, so its earlier answers can't be told from questions.
    assert [text for text in told if "earlier answers" in text] == told
    assert bool(told) is differ


@pytest.mark.parametrize("dummy_prefix", [False, True])
def test_a_stage_that_starts_from_an_export_tokenises_as_the_base_does(tmp_path, dummy_prefix):
    write_tiny_llm(tmp_path / "llm", TinyLLM(add_dummy_prefix=dummy_prefix), seed=0)
    base = load_tokenizer(str(tmp_path / "llm"))
    template = ChatTemplate.from_xtuner("internlm2_chat")
    plain = plain_tokenizer(base, template)
    assert plain.backend_tokenizer.pre_tokenizer is not None
    plain.save_pretrained(tmp_path / "once")
    twice = plain_tokenizer(load_tokenizer(str(tmp_path / "once")), template)
    twice.save_pretrained(tmp_path / "export")
    again = load_tokenizer(str(tmp_path / "export"))
    assert again.backend_tokenizer.pre_tokenizer is None
    ours = ConversationTokenizer.from_pretrained(again, template)
    theirs = ConversationTokenizer.from_pretrained(base, template)
    assert type(ours._encode) is type(theirs._encode), "words are remembered as before"
    turns = (Turn("user", "<image>assistant\nCT 中"), Turn("assistant", "No."), Turn("user", " x"))
    assert ours.encode_prompt(turns).tolist() == theirs.encode_prompt(turns).tolist()
    assert not differing_prompts(AutoTokenizer.from_pretrained(tmp_path / "export"), theirs)


def test_a_tokenizer_that_would_change_questions_is_refused(tokenizer, monkeypatch):
    template = ChatTemplate.from_xtuner("internlm2_chat")
    monkeypatch.setattr(
        "gmai_xtuner.checkpoint.tokenizer_files.chat_template",
        lambda template: chat_template(template).replace("|>user", "|>User"),
    )
    with pytest.raises(GMAIError, match="has other ids than in training from token 2 on"):
        plain_tokenizer(tokenizer, template)


def test_a_tokenizer_without_pad_gets_one_and_unknown_roles_are_refused(tokenizer, tmp_path):
    from transformers import PreTrainedTokenizerFast

    base = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    template = ChatTemplate.from_xtuner("internlm2_chat")
    plain_tokenizer(base, template).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.pad_token, loaded.pad_token_id) == ("<pad>", 1537)
    assert loaded("a<image>b").input_ids.count(1536) == 1
    with pytest.raises(Exception, match="roles are system, user and assistant, got tool"):
        loaded.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)
    content = [{"type": "video"}]
    with pytest.raises(Exception, match="content parts must be text or image, got video"):
        loaded.apply_chat_template([{"role": "user", "content": content}], tokenize=False)


# --- the card --------------------------------------------------------------------------------------


def test_the_card_says_what_it_is_and_its_code_runs(stage3, images, tmp_path, capsys, monkeypatch):
    card = (stage3[2] / "README.md").read_text(encoding="utf-8")
    assert "**Not for clinical use.**" in card
    assert "| stage | stage3 |" in card
    assert "| language model's base | `llm` (a folder) |" in card
    assert re.search(r"language model +688,768 +float32 +2\.6 MiB", card)
    assert re.search(r"all +1,256,704 +4\.8 MiB", card)
    # 2 layers x (keys and values) x 2 heads x 32 x 4 bytes x 2,048 tokens
    assert "A conversation of 2,048 tokens adds 2.0 MiB of keys and values" in card
    usage, square = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    Image.open(images["wide"]).save(tmp_path / "chest.png")
    monkeypatch.chdir(tmp_path)
    names: dict = {"FOLDER": str(stage3[2])}
    exec(square, {**names, "Image": Image}, names)
    padded = names["square"](Image.open(images["wide"]))
    predictor = stage3[0]
    # Padded by hand, 4.48 gives the pixels of training as well.
    padded.save(tmp_path / "chest.png")
    exec(usage, names)
    printed = capsys.readouterr().out.strip()
    with Image.open(images["wide"]) as image:
        expected = predictor.answer("What is shown?", [image], max_new_tokens=256)
    assert printed == expected


# --- what is refused -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_stage3(tiny_bases):
    cfg = stage_config(tiny_bases, "stage3_instruct")
    return cfg, trained_model(cfg)


def refused(model, cfg, folder, match, **options):
    with pytest.raises(GMAIError, match=match):
        export(model, cfg, folder, **options)
    assert not folder.exists() or not any(folder.glob("*.json"))
    assert not list(folder.parent.glob(".*.partial")), "something was left behind"


def test_a_folder_that_is_not_empty_is_refused(plain_stage3, tmp_path):
    cfg, model = plain_stage3
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    refused(model, cfg, tmp_path / "out", "is not empty. Choose a new folder")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
    refused(model, cfg, tmp_path / "out" / "thesis.txt", "is a file")


def test_what_llava_has_no_place_for_is_refused(plain_stage3, tiny_bases, tmp_path):
    cfg, model = plain_stage3
    refused(model, cfg, tmp_path / "out", "use xtuner or huggingface", save_format="official")
    deep = trained_model(stage_config(tiny_bases, "stage3_instruct", projector_depth=3))
    refused(deep, cfg, tmp_path / "out", "two linear layers, this model's has 3")
    other = stage_config(tiny_bases, "stage3_instruct")
    other.export_dtype = "bfloat16"
    refused(model, other, tmp_path / "out", "contradict each other")
    other.export_dtype = "int8"
    refused(model, other, tmp_path / "out", "must be float32, float16 or bfloat16")
