# SPDX-License-Identifier: Apache-2.0

"""Released and foreign folders give the logits of code that we did not write, in chat and in training."""

import copy
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import init_empty_weights
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionModel, LlavaConfig, LlavaForConditionalGeneration
from xtuner._lite.modelings.internlm2 import InternLM2Config, InternLM2ForCausalLM
from xtuner.model.modules import ProjectorConfig, ProjectorModel

from gmai_xtuner.checkpoint.bases import load_language_model, load_vision_tower
from gmai_xtuner.checkpoint.llava import GMAILLaVAModel
from gmai_xtuner.checkpoint.tokenizer import load_tokenizer
from gmai_xtuner.checkpoint.weights import add_adapter, read_state_dict
from gmai_xtuner.core.constants import IMAGE_TOKEN_INDEX
from gmai_xtuner.core.conversation import Turn
from gmai_xtuner.core.errors import ModelLoadError
from gmai_xtuner.import_model import main
from gmai_xtuner.loading import load_model
from gmai_xtuner.preflight.checks import check_base_weights
from gmai_xtuner.preflight.run_config import Findings

TURNS = (Turn("user", "<image>\nCompare with <image>."),)


def speak(module, *, by=2.0):
    """Make random weights say different things."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(by)
    return module.eval()


def random_projector():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128))


@pytest.fixture(scope="module")
def tower(tiny_bases):
    return CLIPVisionModel.from_pretrained(tiny_bases / "vision").eval()


@pytest.fixture(scope="module")
def internlm2(tiny_bases):
    """The tiny InternLM2 by the reference code."""
    config = json.loads((tiny_bases / "llm" / "config.json").read_text())
    config = InternLM2Config(**{**config, "attn_implementation": "eager", "rope_scaling": None})
    model = InternLM2ForCausalLM(config)
    model.load_state_dict(read_state_dict(tiny_bases / "llm"), strict=False)
    return speak(model)


def pictures():
    return [
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (*size, 3), dtype=np.uint8))
        for n, size in enumerate([(200, 120), (60, 90)])
    ]


def inputs_of(predictor):
    """ids [T] with -200 at each image token, and pixels."""
    ids = predictor.encoder.encode_prompt(TURNS).astype(np.int64)
    ids = torch.from_numpy(np.repeat(ids, np.where(ids == IMAGE_TOKEN_INDEX, 64, 1)))
    return ids, torch.stack([predictor.transform(image) for image in pictures()])


def our_logits(predictor):
    ids, pixels = inputs_of(predictor)
    model = predictor.model
    with torch.no_grad():
        embeds = model.embed(ids[None], pixels, torch.nonzero(ids == IMAGE_TOKEN_INDEX).flatten())
        return model.llm(inputs_embeds=embeds, attention_mask=torch.ones(1, len(ids))).logits[0]


def reference_logits(predictor, llm, tower, projector, *, layer=-2):
    """By the parts' own code, glued together here."""
    ids, pixels = inputs_of(predictor)
    with torch.no_grad():
        hidden = tower(pixels, output_hidden_states=True).hidden_states[layer][:, 1:]
        embeds = llm.get_input_embeddings()(ids.clamp(min=0))[None]
        embeds[0, ids == IMAGE_TOKEN_INDEX] = projector(hidden).flatten(0, 1)
        mask = torch.ones(1, len(ids), dtype=torch.long)
        return llm(inputs_embeds=embeds, attention_mask=mask).logits[0]


def write(folder, config, weights):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, default=str))
    tensors = {key: value.detach().contiguous().clone() for key, value in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def under_other_names(folder, *names):
    """The weights of a folder; of each name the beginning is replaced."""
    weights = {}
    for key, value in load_file(folder / "model.safetensors").items():
        old, new = next(pair for pair in names if key.startswith(pair[0]))
        weights[new + key.removeprefix(old)] = value
    return weights


def copy_tokenizer(source, folder):
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(source / name, folder)


def copy_files(tiny_bases, folder, *, processor=True):
    copy_tokenizer(tiny_bases / "llm", folder)
    if processor:
        shutil.copy(tiny_bases / "vision" / "preprocessor_config.json", folder)
    return folder


# --- the authors' release --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authors(tiny_bases, internlm2, tower, tmp_path_factory):
    """As ``LlavaForConditionalGeneration`` of uni-medical/GMAI-VL saves itself."""
    projector = random_projector()
    text = json.loads((tiny_bases / "llm" / "config.json").read_text())
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "auto_map": {"AutoConfig": "configuration_llava.EnhancedLlavaConfig"},
        "model_type": "enhanced_llava",
        "ignore_index": -100,
        "image_token_index": 1535,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "torch_dtype": "float32",
        "text_config": {**text, "rope_scaling": None},
        "vision_config": tower.config.to_dict(),
    }
    weights = {f"language_model.{key}": value for key, value in internlm2.state_dict().items()}
    weights |= {f"vision_tower.{key}": value for key, value in tower.state_dict().items()}
    for ours, theirs in (("0", "linear_1"), ("2", "linear_2")):
        for kind in ("weight", "bias"):
            value = projector.state_dict()[f"{ours}.{kind}"]
            weights[f"multi_modal_projector.{theirs}.{kind}"] = value
    assert "language_model.model.layers.0.attention.wqkv.weight" in weights
    folder = write(tmp_path_factory.mktemp("authors") / "release", config, weights)
    return copy_files(tiny_bases, folder), projector


def test_the_authors_release_gives_the_logits_of_internlm2s_own_code(authors, internlm2, tower):
    folder, projector = authors
    predictor = load_model(folder)
    expected = reference_logits(predictor, internlm2, tower, projector)
    torch.testing.assert_close(our_logits(predictor), expected, rtol=0, atol=1e-4)
    assert predictor.encoder.template.add_bos is False, "the authors train without <s>"
    assert load_model(folder, add_bos=True).encoder.template.add_bos is True


def test_sizes_that_a_nested_config_leaves_out_are_internlm2s(authors, tmp_path):
    shutil.copytree(authors[0], tmp_path / "release")
    file = tmp_path / "release" / "config.json"
    config = json.loads(file.read_text())
    for size in ("num_hidden_layers", "num_attention_heads"):
        del config["text_config"][size]
    file.write_text(json.dumps(config))
    # 32 layers are InternLM2's default, so this folder's two are told apart by their weights.
    with pytest.raises(ModelLoadError, match=r"model\.layers\.10\.attention"):
        load_model(tmp_path / "release")


# --- plain LLaVA -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tiny_bases, tower, tmp_path_factory):
    """As transformers saves a LLaVA-1.5 with a Llama of another geometry than ours."""
    torch.manual_seed(5)
    config = LlavaConfig(
        vision_config=tower.config.to_dict(),
        text_config={
            "model_type": "llama", "vocab_size": 1600, "hidden_size": 128, "intermediate_size": 192,
            "num_hidden_layers": 3, "num_attention_heads": 4, "rope_theta": 500000.0,
        },
        image_token_index=1536,
        vision_feature_layer=-1,
    )  # fmt: skip
    model = speak(LlavaForConditionalGeneration(config))
    folder = tmp_path_factory.mktemp("plain") / "llava"
    model.save_pretrained(folder)
    return copy_files(tiny_bases, folder), model


def logits_of_llava(model, predictor):
    ids, pixels = inputs_of(predictor)
    ids = torch.where(ids == IMAGE_TOKEN_INDEX, 1536, ids)[None]
    with torch.no_grad():
        return model(
            input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)
        ).logits[0]


def test_a_plain_llava_gives_the_logits_of_transformers(plain):
    folder, model = plain
    predictor = load_model(folder)
    assert predictor.model.visual_select_layer == -1
    torch.testing.assert_close(
        our_logits(predictor), logits_of_llava(model, predictor), rtol=0, atol=1e-4
    )
    assert load_model(folder, prompt_template="vicuna").encoder.template.user.startswith("USER:")


def test_names_and_rope_of_newer_transformers_mean_the_same(plain, tmp_path):
    folder, _ = plain
    config = json.loads((folder / "config.json").read_text())
    theta = config["text_config"].pop("rope_theta")
    config["text_config"]["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"}
    weights = under_other_names(
        folder,
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.vision_model.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    )
    newer = write(tmp_path / "newer", config, weights)
    copy_tokenizer(folder, newer)
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    (newer / "processor_config.json").write_text(json.dumps({"image_processor": processor}))
    assert torch.equal(our_logits(load_model(newer)), our_logits(load_model(folder)))


def test_the_llava_repositorys_own_form(plain, tiny_bases, tmp_path):
    """What ``xtuner convert pth_to_hf --save-format official`` writes, with and without a tower."""
    folder, model = plain
    config = {
        **model.config.text_config.to_dict(), "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama", "mm_hidden_size": 64, "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -1, "mm_vision_select_feature": "patch",
        "mm_vision_tower": str(tiny_bases / "vision"),
    }  # fmt: skip
    weights = under_other_names(
        folder,
        ("language_model.", ""),
        ("vision_tower.", "model.vision_tower.vision_tower."),
        ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
    )
    with_tower = copy_files(tiny_bases, write(tmp_path / "with", config, weights))
    predictor = load_model(with_tower)
    expected = our_logits(load_model(folder))
    torch.testing.assert_close(our_logits(predictor), expected, rtol=0, atol=1e-4)
    without = {key: value for key, value in weights.items() if "vision_tower" not in key}
    config["mm_vision_tower"] = str(folder)
    bare = load_model(copy_files(tiny_bases, write(tmp_path / "w", config, without)))
    torch.testing.assert_close(our_logits(bare), expected, rtol=0, atol=1e-4)
    config["mm_projector_type"] = "resampler"
    write(tmp_path / "w", config, without)
    with pytest.raises(ModelLoadError, match="mm_projector_type 'resampler' is not supported"):
        load_model(tmp_path / "w")


# --- xtuner's own LLaVA, with adapters -------------------------------------------------------------


@pytest.fixture(scope="module")
def xtuners(tiny_bases, internlm2, tower, tmp_path_factory):
    """(folder, base, peft's models, projector): QLoRA as in xtuner's llava_internlm2_chat configs."""
    root = tmp_path_factory.mktemp("xtuner")
    base = copy_files(tiny_bases, root, processor=False) / "base"
    shutil.copytree(tiny_bases / "llm", base)
    for file in base.glob("model*"):
        file.unlink()
    write(base, json.loads((base / "config.json").read_text()), internlm2.state_dict())
    torch.manual_seed(7)
    targets = ["wqkv", "wo", "w1", "w2", "w3"]
    llm = get_peft_model(
        copy.deepcopy(internlm2), LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    )
    vision = get_peft_model(
        copy.deepcopy(tower), LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "fc1"])
    )
    for model in (llm, vision):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
    folder = root / "export"
    llm.save_pretrained(folder / "llm_adapter")
    vision.save_pretrained(folder / "visual_encoder_adapter")
    projector = ProjectorModel(ProjectorConfig(visual_hidden_size=64, llm_hidden_size=128))
    projector.save_pretrained(folder / "projector")
    (folder / "xtuner_config.py").write_text(
        "from xtuner.utils import PROMPT_TEMPLATE\n"
        "prompt_template = PROMPT_TEMPLATE.internlm2_chat\n"
        "model = dict(visual_select_layer=-1)\nraise SystemExit('this must never run')\n"
    )
    return folder, base, llm.eval(), vision.eval(), projector


def test_xtuners_adapters_on_internlm2s_own_names_are_merged(xtuners, tiny_bases):
    folder, base, llm, vision, projector = xtuners
    predictor = load_model(folder, llm=str(base), vision=str(tiny_bases / "vision"))
    expected = reference_logits(
        predictor, llm.base_model.model, vision.base_model.model, projector, layer=-1
    )
    torch.testing.assert_close(our_logits(predictor), expected, rtol=0, atol=1e-4)


def test_xtuners_own_layout_without_adapters(xtuners, tiny_bases, internlm2, tower, tmp_path):
    """The language model on top as InternLM2, which xtuner saves under its own names."""
    _, base, _, _, projector = xtuners
    folder = tmp_path / "export"
    shutil.copytree(base, folder)
    shutil.copytree(tiny_bases / "vision", folder / "visual_encoder")
    projector.save_pretrained(folder / "projector")
    predictor = load_model(folder)
    expected = reference_logits(predictor, internlm2, tower, projector)
    torch.testing.assert_close(our_logits(predictor), expected, rtol=0, atol=1e-4)
    started = start(folder, vision=tiny_bases / "vision", freeze_llm=True)
    assert torch.equal(started.llm.lm_head.weight, internlm2.output.weight)
    assert torch.equal(started.projector.model[0].weight, projector.model[0].weight)
    with pytest.raises(ModelLoadError, match=f"GMAI_LLM={folder}"):
        start(folder, llm=base, vision=tiny_bases / "vision")


def test_an_adapter_that_says_its_base_needs_no_other(xtuners, tiny_bases, tmp_path):
    folder, base, *_ = xtuners
    shutil.copytree(folder, tmp_path / "export")
    for name, path in (("llm_adapter", base), ("visual_encoder_adapter", tiny_bases / "vision")):
        file = tmp_path / "export" / name / "adapter_config.json"
        file.write_text(
            json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(path)})
        )
    expected = load_model(folder, llm=str(base), vision=str(tiny_bases / "vision"))
    assert torch.equal(our_logits(load_model(tmp_path / "export")), our_logits(expected))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"use_dora": True}, "only LoRA without biases can be merged.*use_dora"),
        ({"bias": "all"}, "only LoRA without biases.*bias 'all'"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),
    ],
)
def test_other_adapters_are_refused(xtuners, tiny_bases, tmp_path, change, match):
    folder, base, *_ = xtuners
    shutil.copytree(folder, tmp_path / "export")
    file = tmp_path / "export" / "llm_adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ModelLoadError, match=match):
        load_model(tmp_path / "export", llm=str(base), vision=str(tiny_bases / "vision"))


def test_scales_by_layer_are_those_of_peft(tmp_path):
    names = ("proj", "down_proj", "up0")
    base = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in names})
    scales = {"proj": 8, r"up\d": 16, "up0": 4}
    config = LoraConfig(
        r=2, lora_alpha=2, target_modules=[*names], alpha_pattern=scales, init_lora_weights=False
    )
    get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    ours = add_adapter(base.state_dict(), tmp_path)
    for key, value in theirs.merge_and_unload().state_dict().items():
        torch.testing.assert_close(ours[key], value)


def test_an_adapter_of_another_base_or_cut_short_is_refused(xtuners, plain, tiny_bases, tmp_path):
    folder, base, *_ = xtuners
    vision = str(tiny_bases / "vision")
    with pytest.raises(ModelLoadError, match="layers that the base does not have"):
        load_model(folder, llm=str(plain[0]), vision=vision)
    shutil.copytree(folder, tmp_path / "export")
    file = tmp_path / "export" / "llm_adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    first = next(key for key in weights if "lora_B" in key)
    save_file({key: value for key, value in weights.items() if key != first}, file)
    with pytest.raises(ModelLoadError, match="no whole LoRA adapter"):
        load_model(tmp_path / "export", llm=str(base), vision=vision)
    file.unlink()
    with pytest.raises(ModelLoadError, match=r"has neither adapter_model\.safetensors"):
        load_model(tmp_path / "export", llm=str(base), vision=vision)


# --- as what a stage starts from -------------------------------------------------------------------


def start(folder, *, llm=None, vision=None, **options):
    """A stage's model, as its config builds it with GMAI_LLM, GMAI_VISION and GMAI_STAGE2."""
    load = {"type": "gmai_xtuner.checkpoint.bases.load_language_model", "torch_dtype": "float32"}
    return GMAILLaVAModel(
        llm={**load, "pretrained_model_name_or_path": str(llm or folder)},
        visual_encoder={
            "type": "gmai_xtuner.checkpoint.bases.load_vision_tower",
            "pretrained_model_name_or_path": str(vision or folder),
        },
        pretrained_pth=str(folder),
        pretrained_parts=["projector", "visual_encoder"],
        use_activation_checkpointing=False,
        **options,
    )


@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3"])
def test_every_stage_starts_from_the_authors_release(authors, tiny_bases, stage):
    folder, _ = authors
    frozen = {"freeze_llm": stage != "stage3", "freeze_visual_encoder": stage == "stage1"}
    model = start(folder, vision=tiny_bases / "vision", **frozen)
    loaded = load_model(folder).model
    for key, value in nn.Module.state_dict(loaded).items():
        assert torch.equal(nn.Module.state_dict(model)[key], value), key
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 1534


def test_a_plain_llava_is_a_starting_point_under_its_own_layer(plain, tiny_bases):
    folder, model = plain
    started = start(folder, visual_select_layer=-1)
    assert torch.equal(started.llm.lm_head.weight, model.language_model.lm_head.weight)
    assert torch.equal(started.projector.model[2].bias, model.multi_modal_projector.linear_2.bias)
    with pytest.raises(ModelLoadError, match=r"Set model\.visual_select_layer=-1"):
        start(folder)
    with pytest.raises(ModelLoadError, match=f"GMAI_LLM={folder}"):
        start(folder, llm=tiny_bases / "llm", visual_select_layer=-1)
    with pytest.raises(ModelLoadError, match="depth 2, gelu, bias True"):
        start(folder, visual_select_layer=-1, projector_depth=3)


def test_preflight_knows_the_parts_of_a_llava(authors, plain, tiny_bases, tmp_path):
    for folder in (authors[0], plain[0]):
        part = {"pretrained_model_name_or_path": str(folder)}
        run = SimpleNamespace(cfg=SimpleNamespace(model={"llm": part, "visual_encoder": part}))
        findings = Findings()
        with init_empty_weights():
            model = GMAILLaVAModel(
                llm=load_language_model(str(folder)), visual_encoder=load_vision_tower(str(folder))
            )
        check_base_weights(run, model, findings)
        assert not findings.would_fail
        broken = spoilt(folder, tmp_path / folder.name, without("vision_tower.vision_model.post"))
        part["pretrained_model_name_or_path"] = str(broken)
        check_base_weights(run, model, findings)
        assert findings.would_fail


def test_adapters_must_be_merged_before_training(xtuners, tiny_bases):
    folder, base, *_ = xtuners
    with pytest.raises(ModelLoadError, match=f"import_model {folder} OUT"):
        start(folder, llm=base, vision=tiny_bases / "vision")


def test_an_import_with_everything_merged_is_a_starting_point_and_a_plain_llava(
    xtuners, tiny_bases, tmp_path, capsys
):
    folder, base, *_ = xtuners
    bases = ["--llm", str(base), "--vision", str(tiny_bases / "vision"), "--dtype", "float32"]
    expected = our_logits(load_model(folder, llm=str(base), vision=str(tiny_bases / "vision")))
    assert main([str(folder), str(tmp_path / "ours"), *bases]) == 0
    printed = capsys.readouterr().out
    assert f"on disk in {tmp_path / 'ours'}" in printed
    assert "language model         688,768" in printed
    torch.testing.assert_close(
        our_logits(load_model(tmp_path / "ours")), expected, rtol=0, atol=1e-5
    )
    started = start(
        tmp_path / "ours", vision=tmp_path / "ours" / "visual_encoder", visual_select_layer=-1
    )
    assert torch.equal(
        started.llm.lm_head.weight, load_model(tmp_path / "ours").model.llm.lm_head.weight
    )

    plain_form = ["--save-format", "huggingface"]
    assert main([str(tmp_path / "ours"), str(tmp_path / "plain"), *bases[4:], *plain_form]) == 0
    llava = LlavaForConditionalGeneration.from_pretrained(tmp_path / "plain").eval()
    predictor = load_model(tmp_path / "plain")
    torch.testing.assert_close(
        logits_of_llava(llava, predictor)[:, :1536], expected, rtol=0, atol=1e-4
    )
    # Exported once more, the vocabulary stays, and so does the template.
    assert main([str(tmp_path / "plain"), str(tmp_path / "twice"), *bases[4:], *plain_form]) == 0
    for name in ("config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "twice" / name).read_text() == (tmp_path / "plain" / name).read_text()

    assert main([str(folder), str(tmp_path / "ours"), *bases]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert main([str(folder), str(tmp_path / "none")]) == 1
    assert "does not say which base it was trained on" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


# --- what is refused -------------------------------------------------------------------------------


def spoilt(folder, tmp_path, change):
    shutil.copytree(folder, tmp_path / "spoilt")
    change(tmp_path / "spoilt")
    return tmp_path / "spoilt"


def without(*parts):
    def change(folder):
        weights = load_file(folder / "model.safetensors")
        kept = {key: value for key, value in weights.items() if not key.startswith(parts)}
        save_file(kept, folder / "model.safetensors")

    return change


def renamed(old, new):
    def change(folder):
        weights = load_file(folder / "model.safetensors")
        weights[new] = weights.pop(old)
        save_file(weights, folder / "model.safetensors")

    return change


def configured(**values):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        for key, value in values.items():
            place = config
            *path, last = key.split("__")
            for name in path:
                place = place[name]
            place[last] = value
        (folder / "config.json").write_text(json.dumps(config))

    return change


def missing_shard(folder):
    index = {"weight_map": {"language_model.lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (missing_shard, "1 of 1 weight files named in model.safetensors.index.json are missing"),
        (without("vision_tower.vision_model.encoder.layers.1."), r"missing \(vision_model\.enc"),
        (without("multi_modal_projector."), "no weights of the projector"),
        (without("multi_modal_projector.linear_2.bias"), r"does not fit between .*model\.2\.bias"),
        (without("language_model.model.norm"), r"1 missing \(model\.norm\.weight\)"),
        (renamed("language_model.model.norm.weight", "image_newline"), "does not have: image_newline"),
        (configured(text_config__intermediate_size=256), r"\(192, 128\) instead of \(256, 128\)"),
        (configured(vision_config__hidden_size=32), "other shapes than config.json says"),
        (configured(vision_feature_layer=[-2, -1]), r"one layer's patch tokens.*\[-2, -1\]"),
        (configured(vision_feature_select_strategy="full"), "got -1 and 'full'"),
        (configured(text_config__model_type="qwen2"), "model_type 'qwen2' is not supported"),
        (configured(vision_config__model_type="dinov2"), "'dinov2'"),
    ],
)  # fmt: skip
def test_a_folder_whose_parts_do_not_belong_together_is_refused(plain, tmp_path, change, match):
    folder = spoilt(plain[0], tmp_path, change)
    with pytest.raises(ModelLoadError, match=match):
        load_model(folder)


def test_a_base_that_the_folder_has_itself_is_refused(plain, tiny_bases):
    with pytest.raises(ModelLoadError, match="its own language model; leave llm out"):
        load_model(plain[0], llm=str(tiny_bases / "llm"))
    with pytest.raises(ModelLoadError, match="its own vision tower; leave vision out"):
        load_model(plain[0], vision=str(tiny_bases / "vision"))


def test_what_is_no_model_is_told_apart(tiny_bases, tmp_path):
    with pytest.raises(ModelLoadError, match="there is no folder"):
        load_model(tmp_path / "nothing")
    with pytest.raises(ModelLoadError, match="says model_type 'internlm2'"):
        load_model(tiny_bases / "llm")
    (tmp_path / "last_checkpoint").write_text("iter_8.pth")
    with pytest.raises(ModelLoadError, match=r"checkpoints of training\. Export one first"):
        load_model(tmp_path)
