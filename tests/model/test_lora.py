# SPDX-License-Identifier: Apache-2.0

"""LoRA: what learns, that it changes nothing before it has learnt, and that merging changes nothing after."""

import copy

import pytest
import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from xtuner.registry import BUILDER

from gmai_xtuner.checkpoint.bases import load_language_model
from gmai_xtuner.checkpoint.llava import PREFIX, GMAILLaVAModel
from gmai_xtuner.core.errors import GMAIError, ModelLoadError
from gmai_xtuner.data.dataset import collate_packs
from gmai_xtuner.loading import load_model
from gmai_xtuner.model.lora import adapter_layers, is_adapter_key, is_quantized, plain_key
from tests.model.exporting import stage_config
from tests.model.test_llava import (
    build_model,
    instances_of_xtuner,
    loss_and_gradients,
    make_pack,
)

LLM_LORA = {"type": "peft.LoraConfig", "r": 4, "lora_alpha": 8}
TOWER_LORA = {"type": "peft.LoraConfig", "r": 2, "lora_alpha": 8}
BOTH = {"freeze_llm": True, "llm_lora": LLM_LORA, "visual_encoder_lora": TOWER_LORA}
LLM_TARGETS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
TOWER_TARGETS = {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
CONVERSATIONS = (1, 3, 4), (0, 5, 2), (2, 4, 3)


def learn_something(model, *, seed=1):
    """Random values for every ``B``, which start at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def batch(**options):
    return collate_packs([make_pack(*CONVERSATIONS, **options)])


def logits_of(model):
    with torch.no_grad():
        return model.eval()(**batch(), mode="tensor")


@pytest.mark.parametrize("part", ["llm", "visual_encoder"])
def test_default_targets_are_the_linear_layers_of_the_layers_that_run(part):
    model = build_model(**BOTH)
    targets = LLM_TARGETS if part == "llm" else TOWER_TARGETS
    adapted = adapter_layers(getattr(model, part))
    assert {name.rpartition(".")[2] for name in adapted} == targets
    # Of the tower's three layers, hidden state -2 needs two.
    assert len(adapted) == 2 * len(targets)
    assert not any("lm_head" in name for name in adapted)
    assert not any("encoder.layers.2." in name for name in adapted)


def test_before_it_has_learnt_the_output_is_the_base_models():
    assert torch.equal(logits_of(build_model(**BOTH)), logits_of(build_model()))
    changed = logits_of(learn_something(build_model(**BOTH)))
    assert (changed - logits_of(build_model())).abs().max() > 0.01


@pytest.mark.parametrize("freeze_llm", [False, True])
def test_only_adapters_and_projector_learn_and_are_saved(freeze_llm):
    model = learn_something(build_model(**{**BOTH, "freeze_llm": freeze_llm}))
    before = {name: value.clone() for name, value in model.named_parameters()}
    _, gradients = loss_and_gradients(model, [batch()])
    for name in before:
        assert (name in gradients) == (is_adapter_key(name) or name.startswith("projector.")), name
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    assert set(model.state_dict()) == set(gradients)
    # 2 layers x 7 linear x (A, B); 2 layers x 6 linear x (A, B); 2 linear x (weight, bias)
    assert len(gradients) == 28 + 24 + 4


def test_same_loss_and_gradients_as_xtuner_with_the_same_adapters():
    from xtuner.dataset.collate_fns import default_collate_fn
    from xtuner.model import LLaVAModel

    ours = learn_something(build_model(**BOTH))
    reference = build_model()
    reference.llm.config._attn_implementation = "eager"
    del reference.llm.model._update_causal_mask
    theirs = LLaVAModel(
        reference.llm,
        reference.visual_encoder,
        freeze_llm=True,
        freeze_visual_encoder=True,
        llm_lora=LoraConfig(r=4, lora_alpha=8),
        visual_encoder_lora=LoraConfig(r=2, lora_alpha=8),
        use_activation_checkpointing=False,
    ).eval()
    theirs.projector.load_state_dict(ours.projector.state_dict())
    peers = {
        name.replace("base_model.model.", ""): value for name, value in theirs.named_parameters()
    }
    adapters = {name: value for name, value in ours.named_parameters() if is_adapter_key(name)}
    with torch.no_grad():
        for name, value in adapters.items():
            peers[name].copy_(value)

    pack = make_pack((1, 3, 4), (1, 5, 2), (1, 2, 6))
    expected = theirs(**default_collate_fn(instances_of_xtuner(pack)))["loss"]
    expected.backward()
    loss, gradients = loss_and_gradients(ours, [collate_packs([pack])])
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for name in adapters:
        torch.testing.assert_close(gradients[name], peers[name].grad, rtol=1e-4, atol=1e-6)
    # What xtuner adapts beyond ours is the tower's last layer, which never runs.
    extra = {name for name in peers if is_adapter_key(name)} - set(adapters)
    assert extra
    assert all("encoder.layers.2." in name and peers[name].grad is None for name in extra)


def test_a_given_target_list_is_taken_and_the_callers_config_not_changed():
    config = {**LLM_LORA, "target_modules": ["q_proj", "v_proj"], "use_rslora": True}
    given = copy.deepcopy(config)
    model = build_model(llm_lora=config)
    assert config == given
    assert {name.rpartition(".")[2] for name in adapter_layers(model.llm)} == {"q_proj", "v_proj"}
    assert adapter_layers(model.llm)["model.layers.0.self_attn.q_proj"].scaling == {"default": 4.0}
    assert {p.requires_grad for n, p in model.named_parameters() if n.startswith("visual")} == {
        True
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ["q_proj", "gate_prj"]}, "gate_prj can't have an adapter; .*gate_proj"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head can't have an adapter"),
        ({"target_modules": ".*(q_proj|embed_tokens)"}, "embed_tokens can't have an adapter"),
        ({"bias": "all"}, "sets bias, which is not supported"),
        ({"modules_to_save": ["norm"], "use_dora": True}, "sets modules_to_save, use_dora"),
        ({"init_lora_weights": "pissa"}, "'pissa' rewrites the base weights"),
        ({"type": "peft.IA3Config"}, "must be a peft.LoraConfig, got IA3Config"),
    ],
)
def test_what_could_go_wrong_unnoticed_is_refused(config, message):
    lora = {**LLM_LORA, **config}
    if lora["type"] != LLM_LORA["type"]:
        lora = {"type": lora["type"]}
    with pytest.raises(GMAIError, match=f"llm_lora.*{message}"):
        build_model(llm_lora=lora)


def test_adapters_of_a_half_precision_base_are_fp32():
    llm = build_model(dtype=torch.bfloat16).llm
    model = GMAILLaVAModel(llm, build_model().visual_encoder, llm_lora=LLM_LORA)
    kinds = {is_adapter_key(n): p.dtype for n, p in model.llm.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}


# --- from stage to stage ---------------------------------------------------------------------------


def save(model, path):
    torch.save({"state_dict": model.state_dict()}, path)
    return str(path)


def saved(state, path):
    torch.save({"state_dict": state}, path)
    return str(path)


def whole(model, *parts):
    return {
        name: value.detach().clone()
        for name, value in model.named_parameters()
        if name.split(".")[0] in parts
    }


def as_read(state):
    """A checkpoint as ``xtuner convert`` and :func:`load_checkpoint_state` see a DeepSpeed one."""
    return {key.removeprefix(PREFIX): value for key, value in state.items()}


def test_a_lora_run_starts_from_a_stage_without_adapters(tmp_path):
    stage2 = build_model(seed=5, freeze_llm=True)
    path = save(stage2, tmp_path / "stage2.pth")
    model = build_model(
        **BOTH, pretrained_pth=path, pretrained_parts=["projector", "visual_encoder"]
    )
    tower = {plain_key(name): value for name, value in model.visual_encoder.named_parameters()}
    for name, value in stage2.visual_encoder.named_parameters():
        assert torch.equal(tower[name], value), name
    assert (
        adapter_layers(model.llm)["model.layers.0.mlp.up_proj"].lora_B.default.weight.abs().sum()
        == 0
    )


@pytest.mark.parametrize(
    "tower", [{"visual_encoder_lora": TOWER_LORA}, {"freeze_visual_encoder": True}]
)
def test_a_frozen_tower_of_an_earlier_stage_goes_along_and_the_run_can_be_continued(
    tmp_path, tower
):
    stage2 = build_model(seed=5, freeze_llm=True)
    options = {"freeze_llm": True, "llm_lora": LLM_LORA, **tower}
    first = build_model(**options, pretrained_pth=save(stage2, tmp_path / "stage2.pth"))
    learn_something(first)
    state = first.state_dict()
    brought = {key for key in state if key.startswith(PREFIX)}
    assert len(brought) == len(whole(stage2, "visual_encoder"))

    path = saved(as_read(state), tmp_path / "lora.pth")
    again = build_model(
        seed=9, **options, pretrained_pth=path, pretrained_parts=["projector", "visual_encoder"]
    )
    again.llm.load_state_dict(  # the language model's base is read from its folder
        {k: v for k, v in first.llm.state_dict().items() if not is_adapter_key(k)}, strict=False
    )
    assert torch.equal(logits_of(again), logits_of(first))
    assert again.state_dict().keys() == state.keys()


def test_a_resumed_run_must_stand_on_the_same_frozen_tower(tmp_path):
    path = tmp_path / "stage2.pth"
    save(build_model(seed=5, freeze_llm=True), path)
    run = build_model(**BOTH, pretrained_pth=str(path))
    state = run.state_dict()
    run.load_state_dict(state, strict=False)
    save(build_model(seed=6, freeze_llm=True), path)  # stage 2 has been trained again
    other = build_model(**BOTH, pretrained_pth=str(path))
    with pytest.raises(
        ModelLoadError, match=r"other frozen weights than pretrained_pth=.*stage2\.pth"
    ):
        other.load_state_dict(state, strict=False)
    with pytest.raises(ModelLoadError, match="other frozen weights"):
        build_model(**BOTH).load_state_dict(state, strict=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"llm_lora": {**LLM_LORA, "r": 8}}, r"r 4 on 14 layers, .* instead of r 8 on 14 layers"),
        (
            {"llm_lora": {**LLM_LORA, "target_modules": ["q_proj"]}},
            r"r 4 on 14 layers, .* instead of r 4 on 2 layers, q_proj",
        ),
        ({}, "has LoRA adapters of llm .* but the config has no llm_lora"),
        ({"llm_lora": LLM_LORA}, r"e\.g\. llm\.model\.layers\.1\.mlp\.up_proj\.lora_B"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_with_both_descriptions(tmp_path, options, message):
    state = build_model(llm_lora=LLM_LORA, freeze_visual_encoder=True).state_dict()
    if options == {"llm_lora": LLM_LORA}:  # only some of the adapters
        del state["llm.model.layers.1.mlp.up_proj.lora_B.default.weight"]
    path = saved(state, tmp_path / "lora.pth")
    with pytest.raises(ModelLoadError, match=message):
        build_model(**options, freeze_visual_encoder=True, pretrained_pth=path)


def test_a_whole_language_model_is_not_put_under_adapters(tmp_path):
    path = saved(whole(build_model(seed=5), "llm", "projector"), tmp_path / "stage3.pth")
    with pytest.raises(ModelLoadError, match=r"whole language model.*GMAI_LLM"):
        build_model(llm_lora=LLM_LORA, pretrained_pth=path)


# --- out -------------------------------------------------------------------------------------------


def convert(cfg, state, out, *, fp32=True):
    """What ``xtuner convert pth_to_hf`` does (its lines 107-163)."""
    with init_empty_weights():
        model = BUILDER.build({**cfg["model"], "pretrained_pth": None})
    for name, value in state.items():
        set_module_tensor_to_device(model, name, "cpu", value)
    model.to_hf(cfg, str(out), fp32=fp32, save_pretrained_kwargs={"safe_serialization": True})


def answers(model):
    """Logits of a sequence with one image of 64 tokens."""
    ids = torch.arange(3, 90)[None]
    size = model.image_size
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    places = torch.arange(5, 5 + (size // model.visual_encoder.config.patch_size) ** 2)
    with torch.no_grad():
        embeds = model.eval().embed(ids, pixels, places)
        return model.llm(inputs_embeds=embeds, attention_mask=torch.ones_like(ids)).logits


@pytest.fixture(scope="module")
def lora_run(tiny_bases, tmp_path_factory):
    """A stage 3 with adapters on both that started from a stage 2: (config, model, its checkpoint)."""
    folder = tmp_path_factory.mktemp("lora_run")
    torch.manual_seed(3)
    stage2 = BUILDER.build(stage_config(tiny_bases, "stage3_instruct", freeze_llm=True)["model"])
    with torch.no_grad():
        for parameter in stage2.visual_encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    cfg = stage_config(
        tiny_bases, "stage3_instruct", **BOTH, pretrained_pth=save(stage2, folder / "stage2.pth")
    )
    model = learn_something(BUILDER.build(cfg["model"]))
    return cfg, model, as_read(model.state_dict())


def test_merged_equals_unmerged(lora_run, tmp_path):
    cfg, model, state = lora_run
    convert(cfg, state, tmp_path / "export")
    merged = load_model(tmp_path / "export").model
    assert type(merged.llm) is LlamaForCausalLM
    assert not adapter_layers(merged)
    torch.testing.assert_close(answers(merged), answers(model), rtol=1e-4, atol=2e-5)
    base = BUILDER.build({**cfg["model"], "llm_lora": None, "visual_encoder_lora": None})
    assert (answers(base) - answers(model)).abs().max() > 0.1
    # Nothing in the folder that `xtuner chat` would apply on top.
    names = {path.name for path in (tmp_path / "export").iterdir()}
    assert {"projector", "visual_encoder", "adapters", "config.json"} <= names
    assert not {"llm_adapter", "visual_encoder_adapter"} & names


def test_a_model_in_memory_exports_the_same_and_keeps_its_adapters(lora_run, tmp_path):
    cfg, model, state = lora_run
    convert(cfg, state, tmp_path / "converted")
    model.to_hf(
        cfg,
        str(tmp_path / "direct"),
        fp32=True,
        save_pretrained_kwargs={"safe_serialization": True},
    )
    assert len(adapter_layers(model.llm)) == 14
    for file in ("model.safetensors", "visual_encoder/model.safetensors"):
        first, second = (tmp_path / name / file for name in ("converted", "direct"))
        assert first.read_bytes() == second.read_bytes()


def test_fp16_export_rounds_the_sum_once(lora_run, tmp_path):
    cfg, model, state = lora_run
    convert(cfg, state, tmp_path / "export", fp32=False)
    got = LlamaForCausalLM.from_pretrained(tmp_path / "export", torch_dtype="auto")
    assert got.dtype == torch.float16
    layer = adapter_layers(model.llm)["model.layers.1.mlp.down_proj"]
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    expected = (layer.base_layer.weight + 2.0 * (b @ a)).half()  # alpha / r = 8 / 4
    difference = (got.model.layers[1].mlp.down_proj.weight - expected).abs().max()
    assert difference <= expected.abs().max() * 2**-11


def test_adapters_alone_fit_the_llama_form_of_the_base_by_peft(lora_run, tiny_bases, tmp_path):
    cfg, model, state = lora_run
    convert(cfg, state, tmp_path / "export")
    llama = load_language_model(str(tiny_bases / "llm"))
    llama.save_pretrained(tmp_path / "llama")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    both = PeftModel.from_pretrained(base, str(tmp_path / "export" / "adapters" / "llm"))
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        expected = model.eval().llm(ids, attention_mask=torch.ones_like(ids)).logits
        torch.testing.assert_close(both.eval()(ids).logits, expected, rtol=1e-4, atol=2e-5)


def test_convert_refuses_a_checkpoint_without_its_adapters(lora_run, tmp_path):
    cfg, _, state = lora_run
    lost = {key: value for key, value in state.items() if not key.startswith("llm.")}
    with pytest.raises(GMAIError, match=r"no weights for 28 parameters of llm.*lora"):
        convert(cfg, lost, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_inference_refuses_adapters_that_it_would_leave_out(lora_run, tmp_path):
    cfg, _, state = lora_run
    convert(cfg, state, tmp_path / "export")
    (tmp_path / "export" / "llm_adapter").mkdir()
    with pytest.raises(ModelLoadError, match="llm_adapter"):
        load_model(tmp_path / "export")


# --- 4 bit -----------------------------------------------------------------------------------------

FOUR_BIT = {
    "type": "transformers.BitsAndBytesConfig",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_use_double_quant": True,
}
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


@without_gpu
def test_four_bit_without_a_gpu_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ModelLoadError, match=r"need an NVIDIA GPU.*quantization_config=None"):
        load_language_model(str(tmp_path / "nowhere"), quantization_config=FOUR_BIT)


@without_gpu
def test_a_bitsandbytes_that_does_not_run_is_told_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ModelLoadError, match=r"bitsandbytes does not run here.*--no-deps"):
        load_language_model(str(tmp_path / "nowhere"), quantization_config=FOUR_BIT)


def test_four_bit_under_zero3_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("gmai_xtuner.model.lora.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ModelLoadError, match="ZeRO-3 can't partition 4-bit weights"):
        load_language_model(str(tmp_path / "nowhere"), quantization_config=FOUR_BIT)


@pytest.mark.parametrize(
    "config", [{**FOUR_BIT, "load_in_4bit": False, "load_in_8bit": True}, LLM_LORA]
)
def test_other_quantisations_are_refused(tmp_path, config):
    with pytest.raises(ModelLoadError, match="with load_in_4bit=True"):
        load_language_model(str(tmp_path / "nowhere"), quantization_config=config)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_qlora_learns_on_a_four_bit_base_and_merges_into_the_full_one(tiny_bases, tmp_path):
    cfg = stage_config(tiny_bases, "stage3_instruct", **BOTH)
    cfg["model"]["llm"].update(quantization_config=FOUR_BIT, torch_dtype="bfloat16")
    model = BUILDER.build(cfg["model"])
    device = model.llm.device
    learn_something(model.to(device))
    assert is_quantized(model.llm)
    assert model.llm.model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.uint8
    assert model.llm.lm_head.weight.dtype == torch.bfloat16
    ids = torch.arange(3, 60, device=device)[None]
    loss = model.llm(ids, labels=ids).loss
    loss.backward()
    learnt = {n for n, p in model.llm.named_parameters() if p.grad is not None}
    assert len(learnt) == 28
    assert all(is_adapter_key(name) for name in learnt)
    assert not any("absmax" in key or "quant" in key for key in model.state_dict())

    model.to_hf(
        cfg, str(tmp_path / "x"), fp32=True, save_pretrained_kwargs={"safe_serialization": True}
    )
    got = LlamaForCausalLM.from_pretrained(tmp_path / "x").model.layers[0].mlp.up_proj.weight
    full = load_language_model(str(tiny_bases / "llm")).model.layers[0].mlp.up_proj.weight
    layer = adapter_layers(model.llm)["model.layers.0.mlp.up_proj"]
    delta = 2.0 * layer.lora_B.default.weight.float() @ layer.lora_A.default.weight.float()
    torch.testing.assert_close(got, full + delta.cpu(), rtol=1e-4, atol=1e-5)
