# SPDX-License-Identifier: Apache-2.0

"""The model: what it computes, what learns, and that conversations of a pack never touch."""

from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from examples.tiny_bases import TinyVision, write_tiny_vision
from gmai_xtuner.checkpoint.bases import load_vision_tower
from gmai_xtuner.checkpoint.llava import GMAILLaVAModel
from gmai_xtuner.core.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from gmai_xtuner.core.errors import GMAIError, ModelLoadError
from gmai_xtuner.data.dataset import collate_packs
from gmai_xtuner.model.llava import ImageFeatureMismatch

IMAGE_SIZE, PATCHES, VOCABULARY = 28, 4, 50


def build_model(*, seed=0, dtype=torch.float32, **options) -> GMAILLaVAModel:
    torch.manual_seed(seed)
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            rope_theta=1e6,
        )
    )
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=IMAGE_SIZE,
            patch_size=14,
        )
    )
    options.setdefault("use_activation_checkpointing", False)
    return GMAILLaVAModel(llm, tower, **options).to(dtype).train()


def make_batch(*packs: dict, denominator: float, weighting: str = "token") -> dict:
    """A batch as the training loop has it."""
    batch = collate_packs(packs, weighting=weighting)
    batch["data"]["loss_denominator"] = denominator
    return batch


def make_pack(*conversations: tuple[int, int, int], seed=0) -> dict:
    """A pack of conversations (images, context tokens, learnt tokens), with random content."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels, lengths, images = [], [], [], 0
    for pictures, context, learnt in conversations:
        text = torch.randint(1, VOCABULARY, (context + learnt,), generator=generator)
        picture = torch.full((pictures * PATCHES,), IMAGE_TOKEN_INDEX)
        ids.append(torch.cat([text[:1], picture, text[1:]]))
        label = torch.full_like(ids[-1], IGNORE_INDEX)
        label[-learnt:] = ids[-1][-learnt:]
        labels.append(label)
        lengths.append(len(ids[-1]))
        images += pictures
    return {
        "input_ids": torch.cat(ids),
        "labels": torch.cat(labels),
        "lengths": lengths,
        "pixel_values": torch.randn(images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
        "ids": [str(index) for index in range(len(conversations))],
        "num_tokens": sum(lengths),
        "capacity": 2048,
    }


def split_pack(pack: dict) -> list[dict]:
    """The conversations of a pack, each as a pack of its own."""
    parts, start, image = [], 0, 0
    for length in pack["lengths"]:
        piece = slice(start, start + length)
        images = int((pack["input_ids"][piece] == IMAGE_TOKEN_INDEX).sum()) // PATCHES
        parts.append(
            {
                **pack,
                "input_ids": pack["input_ids"][piece],
                "labels": pack["labels"][piece].clone(),
                "lengths": [length],
                "pixel_values": pack["pixel_values"][image : image + images],
            }
        )
        start, image = start + length, image + images
    return parts


def instances_of_xtuner(pack: dict) -> list[dict]:
    """The conversations of a pack, each with one image, as xtuner's dataset gives them."""
    instances = []
    for part in split_pack(pack):
        ids, labels = part["input_ids"], part["labels"]
        # xtuner has one placeholder an image and widens it in the model.
        keep = ~((ids == IMAGE_TOKEN_INDEX) & (ids.roll(1) == IMAGE_TOKEN_INDEX))
        instances.append(
            {
                "input_ids": ids[keep].tolist(),
                "labels": labels[keep].tolist(),
                "pixel_values": part["pixel_values"][0],
            }
        )
    return instances


def loss_and_gradients(model, batches) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(**batch)["loss"]
        loss.backward()
        total += loss.item()
    return total, {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


ADAPTERS = {
    f"{part}_lora": {"type": "peft.LoraConfig", "r": 2, "lora_alpha": 8, "init_lora_weights": False}
    for part in ("llm", "visual_encoder")
}
"""With random values on both sides, so that all of them have gradients."""


@pytest.mark.parametrize(
    ("options", "learning"),
    [({}, 40), ({"use_activation_checkpointing": True}, 40), (ADAPTERS, 28 + 24 + 4)],
    ids=["plain", "checkpointing", "adapters"],
)
@pytest.mark.parametrize("weighting", ["token", "sample", "square"])
def test_packed_equals_one_by_one_in_loss_and_every_gradient(options, learning, weighting):
    model = build_model(dtype=torch.float64, **options)
    assert model.llm.model.gradient_checkpointing is ("use_activation_checkpointing" in options)
    conversations = (1, 3, 4), (0, 5, 2), (2, 4, 3), (0, 2, 1)
    pack = make_pack(*conversations)
    assert len(pack["lengths"]) == 4

    scale = {"denominator": 7.0, "weighting": weighting}
    packed = loss_and_gradients(model, [make_batch(pack, **scale)])
    single = loss_and_gradients(model, [make_batch(part, **scale) for part in split_pack(pack)])

    assert packed[0] == pytest.approx(single[0], rel=1e-6)
    assert packed[1].keys() == single[1].keys()
    assert len(packed[1]) >= learning
    for name, gradient in packed[1].items():
        torch.testing.assert_close(
            gradient, single[1][name], rtol=1e-6, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_pixels_of_one_conversation_do_not_reach_another():
    model = build_model()
    pack = make_pack((1, 3, 4), (1, 3, 4))
    batch = collate_packs([pack])
    pixels = batch["data"]["pixel_values"].requires_grad_()
    second = batch["data"]["label_positions"] >= pack["lengths"][0]
    assert second.any()
    assert not second.all()
    batch["data"]["label_weights"] = second.float()  # only the second conversation's loss
    model(**batch)["loss"].backward()
    assert pixels.grad[0].abs().max() == 0
    assert pixels.grad[1].abs().max() > 0


def test_same_loss_as_xtuner_with_the_same_weights_and_batch():
    from xtuner.dataset.collate_fns import default_collate_fn
    from xtuner.model import LLaVAModel

    ours = build_model()
    reference = build_model()
    reference.llm.config._attn_implementation = "eager"
    del reference.llm.model._update_causal_mask
    theirs = LLaVAModel(
        reference.llm, reference.visual_encoder, use_activation_checkpointing=False
    ).eval()
    theirs.projector.load_state_dict(ours.projector.state_dict())

    pack = make_pack((1, 3, 4), (1, 5, 2), (1, 2, 6))
    expected = theirs(**default_collate_fn(instances_of_xtuner(pack)))["loss"]
    got = ours(**collate_packs([pack]))["loss"]
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)


def test_features_are_those_of_the_hidden_state_before_the_last():
    model = build_model().eval()
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    states = model.visual_encoder(pixels, output_hidden_states=True).hidden_states
    for layer in (-2, -1, 1):
        model.visual_select_layer = layer
        torch.testing.assert_close(
            model.encode_images(pixels), model.projector(states[layer][:, 1:])
        )


def test_a_batch_without_image_touches_every_parameter_and_changes_no_gradient():
    model = build_model(dtype=torch.float64)
    text = collate_packs([make_pack((0, 4, 3), (0, 2, 2))])
    _, gradients = loss_and_gradients(model, [text])
    with_image = collate_packs([make_pack((1, 4, 3))])
    _, reference = loss_and_gradients(model, [with_image])
    assert gradients.keys() == reference.keys()
    for name, gradient in gradients.items():
        if not name.startswith("llm."):
            assert gradient.abs().max() == 0, name
    # Against the language model alone, without any vision path.
    model.zero_grad()
    data = text["data"]
    logits = torch.cat(
        [
            model.llm(ids[None], attention_mask=torch.ones_like(ids)[None]).logits[0]
            for ids in data["input_ids"][0].split(data["lengths"])
        ]
    )
    losses = torch.nn.functional.cross_entropy(
        logits[data["label_positions"]], data["label_targets"]
    )
    losses.backward()
    for name, parameter in model.llm.named_parameters():
        torch.testing.assert_close(
            gradients[f"llm.{name}"], parameter.grad, rtol=1e-5, atol=1e-7, msg=name
        )


@pytest.mark.parametrize("images", [0, 1, 3])
def test_counts_that_differ_raise_with_both_numbers(images):
    model = build_model()
    batch = collate_packs([make_pack((2, 3, 4))])
    batch["data"]["pixel_values"] = torch.zeros(images, 3, IMAGE_SIZE, IMAGE_SIZE)
    with pytest.raises(ImageFeatureMismatch, match=rf"{images * PATCHES or 'no image'}.* 8 places"):
        model(**batch)


@pytest.mark.parametrize(
    ("options", "learning"),
    [
        ({"freeze_llm": True, "freeze_visual_encoder": True}, {"projector"}),
        ({"freeze_llm": True}, {"projector", "visual_encoder"}),
        ({}, {"projector", "visual_encoder", "llm"}),
    ],
)
def test_what_learns_in_each_stage(options, learning):
    model = build_model(**options)
    trainable = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == learning
    _, gradients = loss_and_gradients(model, [collate_packs([make_pack((1, 3, 4))])])
    assert {name.split(".")[0] for name in gradients} == learning
    assert gradients["projector.model.0.weight"].abs().max() > 0


def test_bf16_engine_does_not_round_the_rotary_frequencies():
    model = build_model()
    exact = model.llm.model.rotary_emb.inv_freq.clone()
    model.bfloat16()
    assert model.llm.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    with torch.no_grad():
        model(**collate_packs([make_pack((1, 3, 4))]))
    assert torch.equal(model.llm.model.rotary_emb.inv_freq, exact)


def test_unknown_mode_is_refused():
    with pytest.raises(GMAIError, match="'loss', 'tensor' or 'predict', got 'test'"):
        build_model()(**collate_packs([make_pack((0, 3, 4))]), mode="test")


# --- The CLIP vision tower: whole or vision part, safetensors or bin, and what may be left over ---


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


def write(directory: Path, **options) -> str:
    write_tiny_vision(directory, TinyVision(**SMALL, **options), seed=0)
    return str(directory)


def edit(directory: Path, change) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def test_whole_clip_gives_the_same_features_as_its_own_vision_model(tmp_path):
    whole = write(tmp_path / "whole", whole=True)
    pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = load_vision_tower(whole)(pixels, output_hidden_states=True).hidden_states[-2]
        clip = CLIPModel.from_pretrained(whole).vision_model
        expected = clip(pixels, output_hidden_states=True).hidden_states[-2]
    assert got.shape == (1, 1 + 64, 32)
    assert torch.equal(got, expected)


def test_bin_equals_safetensors_even_with_the_hubs_old_buffers(tmp_path, monkeypatch):
    monkeypatch.setenv("GMAI_ALLOW_PICKLE", "1")
    expected = load_vision_tower(write(tmp_path / "safe", whole=True)).state_dict()
    other = write(tmp_path / "bin", whole=True, safe_serialization=False)
    path = tmp_path / "bin" / "pytorch_model.bin"
    weights = torch.load(path)
    weights["vision_model.embeddings.position_ids"] = torch.arange(65)[None]
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    torch.save(weights, path)
    got = load_vision_tower(other).state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [(None, torch.float32), ("bfloat16", torch.bfloat16), (torch.float16, torch.float16)],
)
def test_dtype(tmp_path, wanted, expected):
    tower = load_vision_tower(write(tmp_path / "vision"), torch_dtype=wanted)
    assert {parameter.dtype for parameter in tower.parameters()} == {expected}


@pytest.mark.parametrize("whole", [False, True])
def test_meta_build_has_the_structure_and_reads_no_weight(tmp_path, whole):
    directory = write(tmp_path / "vision", whole=whole)
    (tmp_path / "vision" / "model.safetensors").unlink()
    with init_empty_weights():
        tower = load_vision_tower(directory)
    assert {parameter.device.type for parameter in tower.parameters()} == {"meta"}
    assert tower.config.hidden_size == 32
    with pytest.raises(ModelLoadError, match="no weights"):
        load_vision_tower(directory)


def cut_patches(weights):
    name = "vision_model.embeddings.patch_embedding.weight"
    weights[name] = weights[name][:, :, :14, :14].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("vision_model.post_layernorm.weight"), "1 missing .*post_layernorm"),
        (lambda w: w.update({"vision_model.extra": torch.ones(1)}), "1 unexpected .*model.extra"),
        (cut_patches, "patch_embedding"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, message):
    directory = write(tmp_path / "vision", whole=True)
    edit(tmp_path / "vision", change)
    with pytest.raises(ModelLoadError, match=message):
        load_vision_tower(directory)


def test_checking_a_towers_weights_draws_no_random_numbers(tiny_bases, monkeypatch):
    """Else a run of one seed begins with another projector than before."""

    def drawn() -> float:
        torch.manual_seed(0)
        load_vision_tower(str(tiny_bases / "vision"))
        return torch.rand(1).item()

    checked = drawn()
    for name in ("check_fit", "shapes_of"):
        monkeypatch.setattr(f"gmai_xtuner.checkpoint.bases.{name}", lambda *_, **__: None)
    assert drawn() == checked
