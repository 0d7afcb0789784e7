# SPDX-License-Identifier: Apache-2.0

"""A trained model as two files for llama.cpp: ``model.gguf`` and ``mmproj.gguf``.

The first is the language model with its tokenizer and chat template, the second the vision tower up to the
layer that the projector reads, and the projector. Names of tensors and keys are llama.cpp's, most of them
from its own package ``gguf``; the projector's are those of its converter for LLaVA (commit 51eff66,
``tools/mtmd/legacy-models/convert_image_encoder_to_gguf.py``). Tensors are converted one at a time.

llama.cpp rotates neighbouring elements of a head, transformers those half a head apart: rows of the query
and key weights are reordered. What it computes otherwise than training did stands in docs/release.md.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig, PreTrainedTokenizerFast

from gmai_xtuner.checkpoint.export import converting, write_json
from gmai_xtuner.checkpoint.export_huggingface import Source, Whole, whole_model
from gmai_xtuner.checkpoint.layouts import SETTINGS_FILE
from gmai_xtuner.checkpoint.tokenizer import WORD_MARK
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.data.images import ImageTransform
from gmai_xtuner.data.log import warn
from gmai_xtuner.model.llava import num_class_tokens

PROJECTOR = {"linear_1": "mm.0", "linear_2": "mm.2"}
ACTIVATIONS = {"quick_gelu": False, "gelu": True, "gelu_pytorch_tanh": True}
"""Of the vision tower, and whether llama.cpp is told ``use_gelu``, which is the one by tanh."""
_DIGITS = {"type": "Digits", "individual_digits": True}
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: tuple[tuple[str, list[Mapping[str, Any]]], ...] = (
    ("gpt-2", [{"type": "ByteLevel", "use_regex": True}]),
    ("smollm", [_DIGITS, {"type": "ByteLevel", "use_regex": True}]),
    ("llama-bpe", [{"type": "Split", "pattern": {"Regex": _LLAMA3}}, {"type": "ByteLevel"}]),
)
"""llama.cpp's name of how words are split, and what the steps of ``tokenizer.json`` say then."""


def write_gguf(folder: Path, source: Source) -> None:
    """Write both files, each in one piece, and ``gmai_vl.json`` into an empty folder.

    Raises:
        GMAIError: the package ``gguf`` is missing, or llama.cpp has no place for something.
    """
    try:
        import gguf
    except ImportError as error:
        raise GMAIError(
            "--save-format gguf needs the package gguf: pip install 'gmai-xtuner[gguf]'"
        ) from error
    _vocabulary_kind(source.tokenizer)  # before weights are read, merged and converted
    whole = whole_model(source)
    _check(whole.config)
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    kind = gguf.GGMLQuantizationType[kinds[source.dtype]]
    language, image = _names(whole)
    text = gguf.GGUFWriter(folder / "model.gguf", "llama")
    _describe_text(text, whole.config.text_config)
    _add_vocabulary(text, source.tokenizer, whole)
    _write(text, language, whole, kind)
    vision = gguf.GGUFWriter(folder / "mmproj.gguf", "clip")
    _describe_vision(vision, whole.config, source.transform)
    _write(vision, image, whole, kind)
    warn(
        "llama.cpp has, since May 2025, put CLIP's class token behind the patches and not before them "
        "(https://github.com/ggml-org/llama.cpp/issues/25814): it answers texts as training did, but sees "
        "images otherwise. Ask it questions that you know the answers to before you use it with images"
    )
    write_json(folder / SETTINGS_FILE, source.settings)


def _check(config: LlavaConfig) -> None:
    text, vision = config.text_config, config.vision_config
    for what, found, fits in (
        ("a vision tower", vision.model_type, num_class_tokens(vision) == 1),
        ("rope_scaling of the language model", text.rope_scaling, not text.rope_scaling),
        ("hidden_act of the language model", text.hidden_act, text.hidden_act == "silu"),
        ("hidden_act of the vision tower", vision.hidden_act, vision.hidden_act in ACTIVATIONS),
    ):
        if not fits:
            raise GMAIError(
                f"--save-format gguf can't write {what} {found!r}. Export with --save-format "
                "huggingface and convert that folder with llama.cpp's own convert_hf_to_gguf.py"
            )


def _describe_text(writer: Any, config: Any) -> None:
    writer.add_name("GMAI-VL")
    writer.add_description("Medical vision-language model of GMAI-VL. Not for clinical use.")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _describe_vision(writer: Any, config: LlavaConfig, transform: ImageTransform) -> None:
    vision = config.vision_config
    writer.add_name("GMAI-VL vision tower and projector")
    writer.add_type("mmproj")
    writer.add_clip_has_vision_encoder(True)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_block_count(_layers(config))
    writer.add_array("clip.vision.feature_layer", [_layers(config)])
    writer.add_vision_use_gelu(ACTIVATIONS[vision.hidden_act])
    writer.add_vision_image_mean(list(transform.mean))
    writer.add_vision_image_std(list(transform.std))


def _layers(config: LlavaConfig) -> int:
    """Layers of the tower up to the hidden state that the projector reads."""
    layer, layers = config.vision_feature_layer, config.vision_config.num_hidden_layers
    return layer if layer >= 0 else layers + 1 + layer


def _names(whole: Whole) -> tuple[dict[str, str], dict[str, str]]:
    """llama.cpp's name -> name in the state: of the language model; of projector and tower."""
    import gguf

    layers = whole.config.text_config.num_hidden_layers
    text = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    vision = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, _layers(whole.config))
    language: dict[str, str] = {}
    image: dict[str, str] = {}
    for key in whole.stored:
        if (plain := key.removeprefix("language_model.")) != key:
            name = text.get_name(plain, try_suffixes=(".weight", ".bias"))
            assert name is not None, key
            language[name] = key
        elif key.startswith("multi_modal_projector."):
            _, layer, suffix = key.split(".")
            image[f"{PROJECTOR[layer]}.{suffix}"] = key
        elif ".post_layernorm." not in key:
            name = vision.get_name(key, try_suffixes=(".weight", ".bias"))
            if name is not None:  # None: of a later layer
                image[name] = key
    return language, image


def _write(writer: Any, names: Mapping[str, str], whole: Whole, kind: Any) -> None:
    import gguf

    full = gguf.GGMLQuantizationType.F32
    # As llama.cpp has it: vectors, and what pixels and places become, always in full precision.
    kinds = {
        name: full
        if len(whole.shape(key)) == 1 or name.startswith(("v.patch", "v.position"))
        else kind
        for name, key in names.items()
    }
    writer.add_file_type({"F32": 0, "F16": 1, "BF16": 32}[kind.name])
    for name, key in names.items():
        shape = tuple(whole.shape(key))
        size = math.prod(shape) * (4 if kinds[name] == full else 2)
        writer.add_tensor_info(name, shape, torch.empty(0).numpy().dtype, size, kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    text = whole.config.text_config
    heads = {"q": text.num_attention_heads, "k": text.num_key_value_heads}
    with converting(whole.dtype) as convert:
        for name, key in names.items():
            tensor = whole.weight(key, convert).float()
            if rotated := re.search(r"^blk.*attn_([qk])\.", name):
                parts = tensor.reshape(heads[rotated[1]], 2, -1, *tensor.shape[1:])
                tensor = parts.transpose(1, 2).reshape(tensor.shape)
            data = gguf.quants.quantize(tensor.contiguous().numpy(), kinds[name])
            writer.write_tensor_data(data)
    writer.close()


def _vocabulary_kind(tokenizer: PreTrainedTokenizerFast) -> tuple[str, str, bool]:
    """llama.cpp's names of a tokenizer and of how it splits words, and whether texts begin with a mark."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model, normalizer, before = state["model"], state["normalizer"], state["pre_tokenizer"]
    steps = (before or {}).get("pretokenizers", [before] if before else [])
    marks = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    if model["type"] == "BPE" and model.get("byte_fallback") and not steps:
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": WORD_MARK}
        first = [step for step in marks if step != spaces]
        if first in ([], [{"type": "Prepend", "prepend": WORD_MARK}]) and spaces in marks:
            return "llama", "default", bool(first)
    if model["type"] == "BPE" and not model.get("byte_fallback") and not marks:
        for name, wanted in SPLITS:
            if len(wanted) == len(steps) and all(
                want.items() <= step.items() and not step.get("add_prefix_space")
                for want, step in zip(wanted, steps, strict=True)
            ):
                return "gpt2", name, False
    raise GMAIError(
        f"the tokenizer of {tokenizer.name_or_path!r} is none that --save-format gguf knows in llama.cpp: "
        "sentencepiece BPE with byte fallback, GPT-2, SmolLM or Llama 3. Export with --save-format "
        "huggingface and convert that folder with llama.cpp's own convert_hf_to_gguf.py"
    )


def _add_vocabulary(writer: Any, base: PreTrainedTokenizerFast, whole: Whole) -> None:
    from gguf import TokenType

    kind, split, prefix = _vocabulary_kind(base)
    tokenizer = whole.tokenizer
    tokens: list[str] = []
    types: list[int] = []
    added = tokenizer.added_tokens_decoder
    for number in range(whole.config.text_config.vocab_size):
        token = tokenizer.convert_ids_to_tokens(number)
        tokens.append(f"[PAD{number}]" if token is None else token)
        if token is None:
            types.append(TokenType.UNUSED)
        elif token == tokenizer.unk_token and kind == "llama":
            types.append(TokenType.UNKNOWN)
        elif number in added:
            types.append(TokenType.CONTROL if added[number].special else TokenType.USER_DEFINED)
        elif kind == "llama" and re.fullmatch("<0x[0-9A-F]{2}>", token):
            types.append(TokenType.BYTE)
        else:
            types.append(TokenType.NORMAL)
    pairs = json.loads(base.backend_tokenizer.to_str())["model"]["merges"]
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in pairs]
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if kind == "llama":
        rank: dict[str, int] = {}
        for number, (left, right) in enumerate(merges):
            rank.setdefault(left + right, number)
        writer.add_token_scores([float(-rank.get(token, 0)) for token in tokens])
        writer.add_add_space_prefix(prefix)
        writer.add_remove_extra_whitespaces(False)
        writer.add_unk_token_id(tokenizer.unk_token_id)
    else:
        writer.add_token_merges([f"{left} {right}" for left, right in merges])
    for name in ("bos", "eos", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    if whole.template.suffix_is_eos:
        writer.add_eot_token_id(tokenizer.convert_tokens_to_ids(whole.template.suffix))
    # The chat template writes <s> where training had it.
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_chat_template(tokenizer.chat_template)
