# SPDX-License-Identifier: Apache-2.0

"""Parameters and memory, by hand for InternLM2.5-7B and CLIP ViT-L/14-336, on the meta device."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import init_empty_weights
from mmengine.logging import MessageHub
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)
from xtuner.model.modules import ProjectorConfig, ProjectorModel

from gmai_xtuner.checkpoint.export_huggingface import llava_config
from gmai_xtuner.data.dataset import collate_packs
from gmai_xtuner.model.costs import (
    ModelFlops,
    Work,
    cache_bytes,
    describe_parts,
    part_cost,
    peak_flops,
)
from gmai_xtuner.train import hooks
from gmai_xtuner.train.hooks import ProgressHook
from tests.model.test_llava import build_model, make_pack
from tests.tables import tables

TABLES = tables(__file__)

TEXT = LlamaConfig(
    vocab_size=92544,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=32768,
    rope_theta=1e6,
    rope_scaling={"type": "dynamic", "factor": 2.0},
)
VISION = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)


@pytest.fixture(scope="module")
def parts():
    with init_empty_weights(), torch.device("meta"):
        return {
            "llm": LlamaForCausalLM(TEXT).bfloat16(),
            "visual_encoder": CLIPVisionModel(VISION).bfloat16(),
            "projector": ProjectorModel(
                ProjectorConfig(visual_hidden_size=1024, llm_hidden_size=4096)
            ).bfloat16(),
        }


def test_the_7b_in_numbers(parts):
    assert describe_parts(parts).splitlines() == [
        "                    parameters  dtype          memory",
        "vision tower       303,507,456  bfloat16    578.9 MiB",
        "projector           20,979,712  bfloat16     40.0 MiB",
        "language model   7,737,708,544  bfloat16     14.4 GiB",
        "all              8,062,195,712               15.0 GiB",
    ]
    # 32 layers x (keys and values) x 8 heads x 128 x 2 bytes = 128 KiB a token
    assert cache_bytes(TEXT, tokens=2048, dtype=torch.bfloat16) == 2048 * 128 * 1024


def test_the_plain_form_of_the_7b():
    class Tokenizer(SimpleNamespace):
        def __len__(self):
            return 92545

        def convert_tokens_to_ids(self, token):
            return {"<image>": 92544}[token]

    tokenizer = Tokenizer(pad_token_id=2, bos_token_id=1, eos_token_id=2)
    config = llava_config(TEXT, VISION, tokenizer, torch.bfloat16)
    assert config.image_token_index == 92544
    assert config.image_seq_length == 576
    assert config.text_config.vocab_size == 92608
    assert config.text_config.rope_scaling is None
    assert TEXT.rope_scaling["factor"] == 2.0, "the argument is not changed"
    with init_empty_weights():
        llava = LlavaForConditionalGeneration(config)
    # 64 more rows of 4,096 in embedding and head
    assert part_cost(llava).parameters == 8_062_195_712 + 2 * 64 * 4096


def test_tied_weights_count_once_and_mixed_dtypes_are_named():
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, second, nn.Linear(4, 1).half())
    cost = part_cost(model)
    assert (cost.parameters, cost.dtypes, cost.bytes) == (21, ("float16", "float32"), 74)


# --- FLOPs from the geometry against torch's own counter, and peaks by device name ---


STAGES = {1: {"freeze_llm": True, "freeze_visual_encoder": True}, 2: {"freeze_llm": True}, 3: {}}
HEAD_WIDTH = 8


def counted_by_torch(model, batch) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch)["loss"].backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("chunk", [3, 2048])
def test_counts_what_torch_counts_but_for_the_rotary_angles(stage, chunk):
    model = build_model(loss_chunk_size=chunk, **STAGES[stage])
    batch = collate_packs([make_pack((1, 3, 4), (0, 5, 2)), make_pack((2, 4, 9))])
    data = batch["data"]
    assert len(data["lengths"]) == 3
    expected = counted_by_torch(model, batch)

    # The outer product of positions and frequencies, T x HEAD_WIDTH / 2, is no work of the model.
    rotary = 2 * sum(data["lengths"]) * HEAD_WIDTH // 2
    # torch's counter knows no causal mask.
    counted = ModelFlops.of(model).flops(data["lengths"], learnt_tokens=15, images=3, causal=False)
    assert counted == expected - rotary


@pytest.mark.parametrize("stage", STAGES)
def test_recomputation_is_not_counted(stage):
    batch = collate_packs([make_pack((1, 30, 4), (2, 5, 12))])
    plain = ModelFlops.of(build_model(**STAGES[stage]))
    model = build_model(use_activation_checkpointing=True, **STAGES[stage])
    assert ModelFlops.of(model) == plain
    data = batch["data"]
    counted = plain.flops(data["lengths"], learnt_tokens=16, images=3)
    assert counted_by_torch(model, batch) > 1.1 * counted


def test_adapters_are_counted_and_the_weights_under_them_learn_nothing():
    model = build_model(llm_lora={"type": "peft.LoraConfig", "r": 4}, freeze_visual_encoder=True)
    batch = collate_packs([make_pack((1, 3, 4), (0, 5, 2))])
    lengths = batch["data"]["lengths"]
    counted = ModelFlops.of(model).flops(lengths, learnt_tokens=6, images=1, causal=False)
    assert counted == counted_by_torch(model, batch) - sum(lengths) * HEAD_WIDTH
    adapters = sum(p.numel() for n, p in model.llm.named_parameters() if "lora_" in n)
    assert ModelFlops.of(model).token.weight_gradient == adapters > 0


def test_what_is_frozen_costs_less():
    """4N instead of 6N for a frozen language model, 2N instead of 6N for a frozen tower."""
    one, two, three = (ModelFlops.of(build_model(**STAGES[stage])) for stage in (1, 2, 3))
    # two layers: q and o 32x32, k and v 32x16, three of 32x48; a head of 32x50
    layers, head = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48), 32 * 50
    assert one.token == two.token == Work(layers, layers, 0)
    assert three.token == Work(layers, layers, layers)
    assert (one.token.flops, three.token.flops) == (4 * layers, 6 * layers)
    assert one.learnt_token.flops == 4 * head
    assert three.learnt_token.flops == 6 * head
    assert one.pair == three.pair == Work(2 * 2 * 32, 4 * 2 * 32, 0)
    # The projector learns 16x32 and 32x32; nothing flows into a frozen tower.
    assert one.image.weight_gradient == 4 * (16 * 32 + 32 * 32)
    assert one.image.input_gradient == 4 * 32 * 32
    assert two.image == three.image
    assert one.image.forward == two.image.forward


def test_attention_is_causal_and_within_a_conversation():
    flops = ModelFlops(Work(), Work(), Work(1, 2, 0), Work())
    assert flops.flops([4, 3], learnt_tokens=0, images=0) == 2 * 3 * (10 + 6)
    assert flops.flops([4, 3], learnt_tokens=0, images=0, causal=False) == 2 * 3 * (16 + 9)
    assert flops.flops([7], learnt_tokens=0, images=0) == 2 * 3 * 28


def test_layers_above_the_selected_hidden_state_do_not_count():
    model = build_model()
    before_last = ModelFlops.of(model).image.forward
    model.visual_select_layer = -1
    one_layer = 5 * (4 * 16 * 16 + 2 * 16 * 24) + 5 * 5 * 2 * 16
    assert ModelFlops.of(model).image.forward - before_last == one_layer


def test_a_model_without_weights_will_do():
    with torch.device("meta"):
        empty = build_model()
    assert ModelFlops.of(empty) == ModelFlops.of(build_model())


@pytest.mark.parametrize(("name", "tera"), TABLES["peak_by_device_name"])
def test_peak_by_device_name(name, tera):
    assert peak_flops(name) == (None if tera is None else pytest.approx(tera * 1e12))


def progress(monkeypatch, model, batches, *, peak: float | None) -> MessageHub:
    """What the training log gets of these micro-batches, trained in two seconds."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(hooks.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(hooks, "device_peak_flops", lambda: peak)
    hub = MessageHub.get_instance(f"flops_{peak}_{len(batches)}")
    runner = SimpleNamespace(
        hooks=[],
        iter=0,
        max_iters=len(batches),
        model=SimpleNamespace(module=model, get_global_grad_norm=lambda: None),
        train_loop=SimpleNamespace(weighted_sum=torch.tensor(1.0), step_end=True),
        message_hub=hub,
        train_dataloader=batches,
        log_processor=SimpleNamespace(),
    )
    hook = ProgressHook()
    hook.before_train(runner)
    for index, batch in enumerate(batches):
        clock.now += 2 / len(batches)
        runner.iter = index
        hook.after_train_iter(runner, index, batch, {})
    return hub


def test_the_training_log_has_mfu_of_the_batches_of_the_rank(monkeypatch):
    model = build_model(freeze_llm=True)
    batches = [
        collate_packs([make_pack((1, 3, 4), (0, 5, 2))]),
        collate_packs([make_pack((2, 4, 9))]),
    ]
    filler = collate_packs([{**make_pack((1, 3, 4)), "num_tokens": 0}])
    flops = ModelFlops.of(model)
    work = flops.flops([11, 7], learnt_tokens=6, images=1) + flops.flops(
        [21], learnt_tokens=9, images=2
    )
    hub = progress(monkeypatch, model, [*batches, filler], peak=1e9)
    assert hub.get_scalar("train/mfu").current() == pytest.approx(work / 2 / 1e9)


def test_a_device_with_an_unknown_peak_has_no_mfu(monkeypatch):
    hub = progress(monkeypatch, build_model(), [collate_packs([make_pack((1, 3, 4))])], peak=None)
    assert "train/tokens_per_second" in hub.log_scalars
    assert "train/mfu" not in hub.log_scalars
