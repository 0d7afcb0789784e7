# SPDX-License-Identifier: Apache-2.0

"""A trained stage as a plain ``LlavaForConditionalGeneration`` folder: no code of ours is needed to use it.

Parts that the stage did not train come from their bases, so that the folder is whole after every stage.
Weights are named as in transformers up to 4.51 and on the hub (``language_model.model.``,
``vision_tower.``, ``multi_modal_projector.``), which newer transformers and servers read as well.

``<image>`` has no place in a vocabulary such as InternLM2's 92,544 ids. It gets the next one, and the
matrices grow to a multiple of 64 (92,608), which tensor cores and tensor parallelism like. The new rows are
the mean of the old ones: the logit of a new id is the mean of all logits, never the largest, so
greedy answers are those of the model that was trained; ``generation_config.json`` suppresses those ids too.

Of the image processor the files say what training did: pad to a square with the mean colour, then
resize. They name no class, so that each transformers takes its own for LLaVA: from 4.49 on
``LlavaImageProcessor``, which pads; 4.48 ``CLIPImageProcessor``, which can't, and resizes both edges at
once (nothing is cut off, but the image is stretched unless it is square).
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)
from xtuner.registry import BUILDER

from gmai_xtuner.checkpoint.export import (
    all_parts,
    check_shard_size,
    converting,
    export_dtype,
    export_settings,
    new_folder,
    without_dynamic_rope,
    write_json,
)
from gmai_xtuner.checkpoint.layouts import SETTINGS_FILE, plain_weights
from gmai_xtuner.checkpoint.tokenizer_files import plain_tokenizer
from gmai_xtuner.core.config import image_processor_config, tokenizer_config
from gmai_xtuner.core.constants import IMAGE_TOKEN
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.core.templates import environment
from gmai_xtuner.data.images import ImageTransform
from gmai_xtuner.data.log import info
from gmai_xtuner.data.tokenization import ChatTemplate
from gmai_xtuner.model.costs import cache_bytes, describe_parts, folder_bytes, size
from gmai_xtuner.model.internlm2 import as_dtype
from gmai_xtuner.model.llava import num_class_tokens, num_image_tokens
from gmai_xtuner.model.lora import adapter_layers

VOCABULARY_MULTIPLE = 64
_GROWN = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
_NOT_EXPORTED = [
    "_name_or_path",
    "name_or_path",
    "gmai_attention",
    "auto_map",
    "transformers_version",
]


class Provenance(NamedTuple):
    """Where a model comes from, for its card: stage, what that trained, and both bases."""

    stage: str
    trained: str
    llm: str
    vision: str

    @classmethod
    def of(cls, model: Any, cfg: Mapping[str, Any]) -> Provenance:
        """Return the provenance of a stage, by its config and its ``GMAILLaVAModel``."""
        trained = ["projector"]
        for part, frozen, name in (
            (model.visual_encoder, model.freeze_visual_encoder, "vision tower"),
            (model.llm, model.freeze_llm, "language model"),
        ):
            if adapter_layers(part):
                trained.append(f"{name} (LoRA, merged)")
            elif not frozen:
                trained.append(name)
        return cls(
            stage=str(cfg["train_dataloader"]["dataset"].get("stage", "stage unknown")),
            trained=", ".join(trained),
            llm=str(cfg["model"]["llm"]["pretrained_model_name_or_path"]),
            vision=str(cfg["model"]["visual_encoder"]["pretrained_model_name_or_path"]),
        )


def _shown(base: str) -> str:
    """Return a hub name as it is; of a folder its last part, since a card is passed on and paths are not."""
    return f"`{base}`" if _is_hub_name(base) else f"`{Path(base).name}` (a folder)"


def _is_hub_name(base: str) -> bool:
    return base.count("/") == 1 and not Path(base).exists() and not base.startswith((".", "~"))


class Source(NamedTuple):
    """A model that is to be written as a whole.

    Args:
        parts: gives ``llm``, ``visual_encoder`` and ``projector`` as plain models, once all else is known
            to fit. They are turned into ``dtype``.
        projector_depth: linear layers of the projector.
        tokenizer, transform: the language model's; image to pixels, as in training.
        settings, provenance: as in ``gmai_vl.json``; for the model card.
        dtype: of the weights.
        max_shard_size: of a file of weights, e.g. ``"2GB"``.
    """

    parts: Callable[[], Mapping[str, Any]]
    projector_depth: int
    tokenizer: PreTrainedTokenizerFast
    transform: ImageTransform
    settings: Mapping[str, Any]
    provenance: Provenance
    dtype: torch.dtype
    max_shard_size: str


class Whole(NamedTuple):
    """A model as an export of the whole has it; ``stored`` has LLaVA's names, and weights as they were read.

    Each is converted when it is written: a copy of the whole would need as much memory as the model.
    """

    parts: Mapping[str, Any]
    config: LlavaConfig
    stored: dict[str, torch.Tensor]
    tokenizer: PreTrainedTokenizerFast
    template: ChatTemplate
    dtype: torch.dtype

    def shape(self, key: str) -> torch.Size:
        """Return the shape that a weight is written in."""
        rows = (self.config.text_config.vocab_size,) if key in _GROWN else ()
        return torch.Size([*rows, *self.stored[key].shape[len(rows) :]])

    def weight(
        self, key: str, convert: Callable[[str, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Return a weight as it is written; further rows are the mean of the old ones."""
        weight, rows = convert(key, self.stored[key].detach()), self.shape(key)[0]
        if rows > weight.shape[0]:
            mean = weight.mean(dim=0, dtype=torch.float32).to(weight.dtype)
            weight = torch.cat([weight, mean.expand(rows - weight.shape[0], -1)])
        return weight.contiguous()


def save_whole_model(
    model: Any,
    cfg: Mapping[str, Any],
    save_dir: str,
    *,
    fp32: bool,
    save_kwargs: Mapping[str, Any],
    write: Callable[[Path, Source], None],
) -> None:
    """Write the whole model; all of it or nothing.

    Arguments and errors as in :func:`gmai_xtuner.checkpoint.export.save_xtuner_layout`. What the stage has
    not trained is read from its base; ``save_kwargs`` may have ``max_shard_size``; ``write`` is
    :func:`write_llava` or :func:`gmai_xtuner.checkpoint.export_gguf.write_gguf`.

    Raises:
        GMAIError: also where the format has no place for something.
    """
    dtype = export_dtype(cfg, fp32=fp32)
    max_shard_size = save_kwargs.get("max_shard_size", "2GB")
    check_shard_size(max_shard_size)
    with new_folder(save_dir) as aside:
        settings = export_settings(model, cfg)
        tower = image_processor_config(cfg)["pretrained_model_name_or_path"]
        source = Source(
            lambda: all_parts(model, cfg, dtype=dtype),
            model.projector.config.depth,
            BUILDER.build(tokenizer_config(cfg)),
            ImageTransform.from_pretrained(tower, mode=settings["image_mode"]),
            settings,
            Provenance.of(model, cfg),
            dtype,
            max_shard_size,
        )
        write(aside, source)
    info(f"Saved the whole model to {save_dir}")


def whole_model(source: Source) -> Whole:
    """Bring the parts into LLaVA's form.

    Raises:
        GMAIError: LLaVA has no place for something.
    """
    if source.projector_depth != 2:
        raise GMAIError(
            f"LLaVA's projector has two linear layers, this model's has {source.projector_depth}; export in "
            "xtuner's layout (--save-format xtuner)"
        )
    settings, side = source.settings, source.transform.image_size
    template = ChatTemplate.from_xtuner(settings["prompt_template"], add_bos=settings["add_bos"])
    tokenizer = plain_tokenizer(source.tokenizer, template)  # before weights are read and merged
    parts = source.parts()
    text, vision = parts["llm"].config, parts["visual_encoder"].config
    if side != vision.image_size:
        raise GMAIError(
            f"the image processor makes images of {side} pixels, the vision tower takes "
            f"{vision.image_size}. Take both from the same checkpoint"
        )
    tokenizer.model_max_length = text.max_position_embeddings
    config = llava_config(text, vision, tokenizer, source.dtype)
    config.vision_feature_layer = settings["visual_select_layer"]
    states = {name: part.state_dict() for name, part in parts.items()}
    stored = plain_weights(states)
    if config.tie_word_embeddings:
        del stored[_GROWN[1]]
    return Whole(parts, config, stored, tokenizer, template, source.dtype)


def write_llava(folder: Path, source: Source) -> None:
    """Write every file of the folder, which is empty.

    Raises:
        GMAIError: LLaVA has no place for something.
    """
    whole = whole_model(source)
    config, tokenizer = whole.config, whole.tokenizer
    with init_empty_weights():
        llava = LlavaForConditionalGeneration(config)
    expected = {key: value.shape for key, value in llava.state_dict().items()}
    if config.tie_word_embeddings:
        del expected[_GROWN[1]]
    assert expected == {key: whole.shape(key) for key in whole.stored}
    _write_weights(folder, whole, source.max_shard_size)
    config.architectures = [type(llava).__name__]
    config.save_pretrained(folder)
    generation = _generation(whole.parts["llm"], tokenizer, whole.template, config)
    generation.save_pretrained(folder)
    _write_config(folder, config)
    tokenizer.save_pretrained(folder)
    _write_processor(folder, source.transform, tokenizer, config)
    write_json(folder / SETTINGS_FILE, source.settings)
    costs = describe_parts(whole.parts, dtype=whole.dtype)
    _write_card(folder, source, costs, config)
    info(
        f"The whole model as {type(llava).__name__}, vocabulary {config.text_config.vocab_size:,}:\n"
        f"{costs}\n{size(folder_bytes(folder))} on disk"
    )


def _write_weights(folder: Path, whole: Whole, max_shard_size: str) -> None:
    """Write the weights in files of the hub's names, one file in memory at a time."""
    sizes = {
        key: torch.empty(whole.shape(key), dtype=whole.dtype, device="meta") for key in whole.stored
    }
    plan = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_size)
    with converting(whole.dtype) as convert:
        for file, keys in plan.filename_to_tensors.items():
            shard = {key: whole.weight(key, convert) for key in keys}
            save_file(shard, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def _write_card(folder: Path, source: Source, costs: str, config: LlavaConfig) -> None:
    """Write the model card: what it is, what it takes, how to use it, what it is not for."""
    provenance, settings = source.provenance, source.settings
    tokens, dtype = settings["max_length"], as_dtype(config.torch_dtype)
    templates = environment("gmai_xtuner.checkpoint", keep_trailing_newline=True)
    card = templates.get_template("card.md.j2").render(
        bases=[base for base in (provenance.llm, provenance.vision) if _is_hub_name(base)],
        provenance=provenance,
        settings=settings,
        shown=_shown,
        dtype=str(dtype).removeprefix("torch."),
        image_tokens=config.image_seq_length,
        side=config.vision_config.image_size,
        tower="CLIP" if num_class_tokens(config.vision_config) else "SigLIP",
        vocabulary=config.text_config.vocab_size,
        image_id=config.image_token_index,
        costs=costs,
        on_disk=size(folder_bytes(folder)),
        cache=size(cache_bytes(config.text_config, tokens=tokens, dtype=dtype)),
        transform=source.transform,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def llava_config(
    text: LlamaConfig,
    vision: CLIPVisionConfig | SiglipVisionConfig,
    tokenizer: PreTrainedTokenizerFast,
    dtype: torch.dtype,
) -> LlavaConfig:
    """Return the configuration of the whole, with a vocabulary that has a place for ``<image>``."""
    text_values, vision_values = text.to_dict(), vision.to_dict()
    for values in (text_values, vision_values):
        for key in _NOT_EXPORTED:
            values.pop(key, None)
        values["torch_dtype"] = dtype
    vocabulary = max(text.vocab_size, len(tokenizer))
    if vocabulary > text.vocab_size:
        vocabulary = -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    text_values |= {
        "vocab_size": vocabulary,
        "use_cache": True,
        "rope_scaling": without_dynamic_rope(text.rope_scaling),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "architectures": ["LlamaForCausalLM"],
    }
    return LlavaConfig(
        vision_config=vision_values,
        text_config=text_values,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=num_image_tokens(vision),
        vision_feature_select_strategy="default" if num_class_tokens(vision) else "full",
        tie_word_embeddings=text.tie_word_embeddings,
        pad_token_id=tokenizer.pad_token_id,
        torch_dtype=dtype,
    )


def _generation(
    llm: Any, tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, config: LlavaConfig
) -> GenerationConfig:
    theirs = llm.generation_config.eos_token_id
    stop = [tokenizer.eos_token_id, *(theirs if isinstance(theirs, list) else [theirs])]
    if template.suffix_is_eos:
        stop.append(tokenizer.convert_tokens_to_ids(template.suffix))
    ids = sorted({token for token in stop if token is not None})
    never = {config.image_token_index, *range(len(tokenizer), config.text_config.vocab_size)}
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ids,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=sorted(never),
        do_sample=False,
    )


def _write_config(folder: Path, config: LlavaConfig) -> None:
    """Say each field; versions and servers differ in their defaults."""
    file = folder / "config.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    written |= {**_fields(config), "tie_word_embeddings": config.tie_word_embeddings}
    for name, kind in (
        ("text_config", "llama"),
        ("vision_config", config.vision_config.model_type),
    ):
        written[name] |= {"model_type": kind, **_fields(getattr(config, name))}
        written[name].pop("_attn_implementation_autoset", None)
    write_json(file, written)


def _fields(config: PretrainedConfig) -> dict[str, Any]:
    """Return the values of all arguments of a configuration but those that are configurations."""
    names = inspect.signature(type(config).__init__).parameters
    values = {name: getattr(config, name) for name in names if hasattr(config, name)}
    return {k: v for k, v in values.items() if not isinstance(v, PretrainedConfig)}


def _write_processor(
    folder: Path, transform: ImageTransform, tokenizer: PreTrainedTokenizerFast, config: LlavaConfig
) -> None:
    square = {"height": transform.image_size, "width": transform.image_size}
    image_processor = {  # no image_processor_type: see the module's text
        "processor_class": "LlavaProcessor",
        **dict.fromkeys(("do_convert_rgb", "do_resize", "do_rescale", "do_normalize"), True),
        "do_pad": transform.mode == "pad",
        "do_center_crop": False,
        "size": square,
        "crop_size": square,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
    }
    write_json(folder / "preprocessor_config.json", image_processor)
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": num_class_tokens(config.vision_config),
        "image_token": IMAGE_TOKEN,
    }
    write_json(folder / "processor_config.json", processor)
    template = tokenizer.chat_template
    assert isinstance(template, str)
    # The processor of 4.48 reads the first, newer ones the second, tokenizers their own config.
    write_json(folder / "chat_template.json", {"chat_template": template})
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
