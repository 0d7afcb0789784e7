# SPDX-License-Identifier: Apache-2.0

"""Tiny base models in the hub's layouts, with random weights: no download, a few seconds.

``python -m gmai_xtuner.tiny_bases DIR`` writes ``DIR/llm``, an InternLM2.5 with its sentencepiece
tokenizer, and ``DIR/vision``, a CLIP vision tower with its image processor. The code that loads
the 7B loads them too; tests and the quickstart train them from scratch. The same seed and options
give the same bytes.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import gmai_xtuner.plugin  # noqa: F401  (makes xtuner and torch work together)
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.model.internlm2 import as_dtype, internlm2_shapes, llama_config

#: InternLM2.5's special tokens in the order of their ids, the last six of the vocabulary.
SPECIAL_TOKENS = (
    "<|plugin|>",
    "<|interpreter|>",
    "<|action_end|>",
    "<|action_start|>",
    "<|im_end|>",
    "<|im_start|>",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_MAX_LENGTH = 1000000000000000019884624838656  # what the hub writes for "no limit"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class TinyLLM:
    """Geometry and form of the language model; the defaults are InternLM2.5's but for the sizes.

    Args:
        vocab_size: all ids, the special tokens included, which are the last six.
        unused_ids: of these, ids before the special tokens that no text uses; the tiny text gives some 1,500.
        rope_scaling_factor: of dynamic scaling; None writes no scaling.
        add_dummy_prefix: flag of the sentencepiece proto; InternLM2's is False.
        shards: number of weight files; with 1 there is no index.
        safe_serialization: safetensors, or ``pytorch_model*.bin``.
    """

    vocab_size: int = 1536
    unused_ids: int = 0
    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 32768
    bias: bool = False
    tie_word_embeddings: bool = False
    rope_theta: float = 1000000
    rope_scaling_factor: float | None = 2.0
    torch_dtype: str = "float32"
    add_dummy_prefix: bool = False
    shards: int = 2
    safe_serialization: bool = True


@dataclass(frozen=True)
class TinyVision:
    """Geometry and form of the vision tower: ``(image_size // patch_size) ** 2`` tokens, 64.

    Args:
        whole: write the whole CLIP with its text tower, as ``openai/clip-vit-large-patch14-336``.
        safe_serialization: safetensors, or ``pytorch_model.bin``.
        siglip: SigLIP, as ``google/medsiglip-448``, and not CLIP.
    """

    image_size: int = 336
    patch_size: int = 42
    hidden_size: int = 64
    intermediate_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    whole: bool = False
    safe_serialization: bool = True
    siglip: bool = False


def write_tiny_bases(
    directory: str | Path,
    *,
    seed: int = 0,
    llm: TinyLLM | None = None,
    vision: TinyVision | None = None,
) -> None:
    """Write ``directory/llm`` and ``directory/vision``, replacing what an earlier call wrote.

    Each folder is made aside and renamed, so that none is ever half there.

    Raises:
        GMAIError: a folder of that name exists and is no checkpoint, or a size is impossible.
    """
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    for name in ("llm", "vision"):
        if (root / name).exists() and not (root / name / "config.json").is_file():
            raise GMAIError(f"{root / name} exists and is no checkpoint. Give another folder.")
    with tempfile.TemporaryDirectory(dir=root, prefix=".tiny_bases_") as aside:
        write_tiny_llm(Path(aside) / "llm", llm or TinyLLM(), seed=seed)
        write_tiny_vision(Path(aside) / "vision", vision or TinyVision(), seed=seed)
        for name in ("llm", "vision"):
            if (root / name).exists():
                shutil.rmtree(root / name)
            os.replace(Path(aside) / name, root / name)


def write_tiny_llm(directory: Path, llm: TinyLLM, *, seed: int) -> None:
    """Write an InternLM2.5 checkpoint with its tokenizer into a new folder."""
    directory.mkdir()
    config = _llm_config(llm)
    _write_json(directory / "config.json", config)
    _write_json(
        directory / "generation_config.json",
        {"bos_token_id": 1, "eos_token_id": [2, llm.vocab_size - 2], "pad_token_id": 2},
    )
    _write_tokenizer(directory, llm)
    names = [
        name
        for name in internlm2_shapes(llama_config(config))
        if not (config["tie_word_embeddings"] and name == "output.weight")
    ]
    _write_weights(directory, names, _llm_weights(config, seed=seed), llm)


def _llm_config(llm: TinyLLM) -> dict[str, Any]:
    scaling = llm.rope_scaling_factor
    return {
        "architectures": ["InternLM2ForCausalLM"],
        "attn_implementation": "eager",
        "auto_map": {
            "AutoConfig": "configuration_internlm2.InternLM2Config",
            "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
            "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
        },
        "bias": llm.bias,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": llm.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": llm.intermediate_size,
        "max_position_embeddings": llm.max_position_embeddings,
        "model_type": "internlm2",
        "num_attention_heads": llm.num_attention_heads,
        "num_hidden_layers": llm.num_hidden_layers,
        "num_key_value_heads": llm.num_key_value_heads,
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None if scaling is None else {"type": "dynamic", "factor": scaling},
        "rope_theta": llm.rope_theta,
        "tie_word_embeddings": llm.tie_word_embeddings,
        "torch_dtype": llm.torch_dtype,
        "transformers_version": "4.41.0",
        "use_cache": True,
        "vocab_size": llm.vocab_size,
    }


def _llm_weights(config: Mapping[str, Any], *, seed: int) -> Iterator[torch.Tensor]:
    """One after the other: normal of 0.02, less where a layer adds to the residual, as in GPT-2."""
    generator = torch.Generator().manual_seed(seed)
    residual = 0.02 / math.sqrt(2 * config["num_hidden_layers"])
    dtype = as_dtype(config["torch_dtype"])
    for name, shape in internlm2_shapes(llama_config(config)).items():
        if "norm" in name:
            yield torch.ones(shape, dtype=dtype)
        elif config["tie_word_embeddings"] and name == "output.weight":
            continue
        else:
            adds = name.endswith(("attention.wo.weight", "feed_forward.w2.weight"))
            std = residual if adds else 0.02
            yield torch.randn(shape, generator=generator).mul_(std).to(dtype)


def _write_weights(
    directory: Path, names: list[str], weights: Iterator[torch.Tensor], llm: TinyLLM
) -> None:
    """Split the weights in their order over ``llm.shards`` files, with the hub's index.

    The weights of one file are in memory at a time.
    """
    stem, suffix = ("model", "safetensors") if llm.safe_serialization else ("pytorch_model", "bin")
    if not 1 <= llm.shards <= len(names):
        raise GMAIError(f"shards should be 1 to {len(names)}, the number of weights.")
    weight_map = {}
    total = 0
    for shard in range(llm.shards):
        part = names[shard * len(names) // llm.shards : (shard + 1) * len(names) // llm.shards]
        file = f"{stem}-{shard + 1:05d}-of-{llm.shards:05d}.{suffix}"
        if llm.shards == 1:
            file = f"{stem}.{suffix}"
        content = {name: next(weights) for name in part}
        _save(content, directory / file)
        total += sum(weight.nbytes for weight in content.values())
        del content
        weight_map.update(dict.fromkeys(part, file))
    if llm.shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(directory / f"{stem}.{suffix}.index.json", index)


def _save(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    if path.suffix == ".safetensors":
        save_file(dict(weights), path, metadata={"format": "pt"})
    else:
        torch.save(dict(weights), path)


def _write_tokenizer(directory: Path, llm: TinyLLM) -> None:
    """InternLM2.5's files: the sentencepiece model and what names its special tokens."""
    (directory / "tokenizer.model").write_bytes(_train_sentencepiece(llm))
    first = llm.vocab_size - len(SPECIAL_TOKENS)
    special = {0: "<unk>", 1: "<s>", 2: "</s>"}
    special.update({first + index: name for index, name in enumerate(SPECIAL_TOKENS)})
    names = {
        "additional_special_tokens": list(reversed(SPECIAL_TOKENS)),
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
    }
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(index): {"content": name, **flags, "special": True}
            for index, name in special.items()
        },
        "auto_map": {
            "AutoTokenizer": [
                "tokenization_internlm2.InternLM2Tokenizer",
                "tokenization_internlm2_fast.InternLM2TokenizerFast",
            ]
        },
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "decode_with_prefix_space": False,
        "model_max_length": NO_MAX_LENGTH,
        "sp_model_kwargs": None,
        "tokenizer_class": "InternLM2Tokenizer",
        **names,
    }
    _write_json(directory / "tokenizer_config.json", config)
    _write_json(directory / "special_tokens_map.json", names)


def _train_sentencepiece(llm: TinyLLM) -> bytes:
    """A BPE model with InternLM2's flags and, at its end, InternLM2's reserved pieces.

    The flags of InternLM2's own proto: identity normalisation, no dummy prefix, all white space
    kept, digits split, byte fallback; line feed, tab and carriage return are pieces.
    """
    white_space = ("\n", "\t", "\r")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(),
            model_writer=model,
            model_type="bpe",
            vocab_size=llm.vocab_size - llm.unused_ids - len(SPECIAL_TOKENS) - len(white_space),
            character_coverage=1.0,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=llm.add_dummy_prefix,
            remove_extra_whitespaces=False,
            split_digits=True,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise GMAIError(
            f"The tiny text does not give a vocabulary of {llm.vocab_size} ids: {error}. "
            "Choose another vocab_size; 1000 to 2000 work."
        ) from error
    proto = sentencepiece_model_pb2.ModelProto.FromString(  # type: ignore[attr-defined]
        model.getvalue()
    )
    lowest = min(piece.score for piece in proto.pieces)
    kinds = type(proto.pieces[0])
    for index, piece in enumerate(white_space):
        proto.pieces.add(piece=piece, score=lowest - 1 - index, type=kinds.NORMAL)
    for index in range(llm.unused_ids):
        proto.pieces.add(piece=f"[unused {index}]", score=lowest - 4 - index, type=kinds.NORMAL)
    for index in range(len(SPECIAL_TOKENS)):
        # On the hub these are [UNUSED_TOKEN_141] to 146, which tokenizer_config.json renames.
        kind = kinds.NORMAL if llm.add_dummy_prefix else kinds.USER_DEFINED
        proto.pieces.add(piece=f"[UNUSED_TOKEN_{141 + index}]", score=0.0, type=kind)
    proto.trainer_spec.vocab_size = llm.vocab_size
    return proto.SerializeToString(deterministic=True)


def write_tiny_vision(directory: Path, vision: TinyVision, *, seed: int) -> None:
    """Write a CLIP or SigLIP checkpoint, whole or its vision part, with its image processor."""
    sizes = {
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.num_hidden_layers,
        "num_attention_heads": vision.num_attention_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "projection_dim": vision.hidden_size,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if vision.whole:
            text = {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "vocab_size": 64,
                "projection_dim": vision.hidden_size,
                "bos_token_id": 62,
                "eos_token_id": 63,
            }
            if vision.siglip:
                model = SiglipModel(SiglipConfig(text_config=text, vision_config=sizes))
            else:
                width = vision.hidden_size
                both = CLIPConfig(text_config=text, vision_config=sizes, projection_dim=width)
                model = CLIPModel(both)
        elif vision.siglip:
            model = SiglipVisionModel(SiglipVisionConfig(**sizes))
        else:
            model = CLIPVisionModel(CLIPVisionConfig(**sizes))
        _spread_embeddings(model.vision_model.embeddings)
    model.save_pretrained(directory, safe_serialization=vision.safe_serialization)
    if vision.siglip:
        halves, side = [0.5, 0.5, 0.5], {"height": vision.image_size, "width": vision.image_size}
        flags = dict.fromkeys(("do_normalize", "do_rescale", "do_resize"), True)
        kind = {"image_processor_type": "SiglipImageProcessor", "resample": 3, "size": side}
        _write_json(
            directory / "preprocessor_config.json",
            {**flags, **kind, "image_mean": halves, "image_std": halves, "rescale_factor": 1 / 255},
        )
        return
    _write_json(
        directory / "preprocessor_config.json",
        {
            "crop_size": vision.image_size,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
            "resample": 3,
            "size": vision.image_size,
        },
    )


def _spread_embeddings(embeddings: torch.nn.Module) -> None:
    """Let patches and places start on one scale; CLIP's 0.02 for the places would drown."""
    weights = dict(embeddings.named_parameters())
    patch = weights["patch_embedding.weight"]  # [D, 3, P, P]
    torch.nn.init.normal_(patch, std=patch[0].numel() ** -0.5)
    place = weights["position_embedding.weight"]  # [tokens + 1, D]
    torch.nn.init.normal_(place, std=place.shape[1] ** -0.5)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


MODALITIES = (
    ("a CT scan", "CT"),
    ("an MR image", "磁共振"),
    ("a chest X-ray", "胸部X光片"),
    ("a colour fundus photograph", "眼底彩照"),
    ("a histopathology patch", "病理切片"),
    ("an ultrasound image", "超声"),
    ("an endoscopy frame", "内镜"),
    ("a dermoscopy image", "皮肤镜"),
    ("an OCT scan", "光学相干断层扫描"),
    ("a microscopy image", "显微镜图像"),
    ("a PET scan", "正电子发射断层扫描"),
    ("a mammogram", "乳腺钼靶"),
)
ORGANS = (
    ("brain", "大脑"),
    ("lung", "肺"),
    ("liver", "肝脏"),
    ("kidney", "肾脏"),
    ("heart", "心脏"),
    ("retina", "视网膜"),
    ("optic disc", "视盘"),
    ("skin", "皮肤"),
    ("breast", "乳腺"),
    ("colon", "结肠"),
    ("stomach", "胃"),
    ("spine", "脊柱"),
    ("prostate", "前列腺"),
    ("spleen", "脾脏"),
    ("pancreas", "胰腺"),
    ("bone", "骨骼"),
    ("thyroid", "甲状腺"),
    ("blood vessel", "血管"),
)
FINDINGS = (
    ("no abnormality", "未见异常"),
    ("a nodule", "结节"),
    ("a mass", "肿块"),
    ("a cyst", "囊肿"),
    ("a polyp", "息肉"),
    ("a fracture", "骨折"),
    ("haemorrhage", "出血"),
    ("oedema", "水肿"),
    ("pneumonia", "肺炎"),
    ("pleural effusion", "胸腔积液"),
    ("a tumour", "肿瘤"),
    ("an infarct", "梗死"),
    ("diabetic retinopathy", "糖尿病视网膜病变"),
    ("glaucoma", "青光眼"),
    ("adenocarcinoma", "腺癌"),
    ("melanoma", "黑色素瘤"),
    ("inflammation", "炎症"),
    ("calcification", "钙化"),
)
ENGLISH = (
    "What imaging modality was used to take this image?",
    "Which modality is shown here? Answer with one word.",
    "Which of the following best describes the image?",
    "Answer with the letter of the right option from the given choices directly.",
    "Answer the question using a single word or phrase.",
    "Describe the image in detail. Please describe what you see in this picture.",
    "Is there anything abnormal in this image? Yes. No. Normal. Abnormal.",
    "You are a helpful medical assistant. This answer does not replace a doctor.",
    "The patient is a 65 year old man with cough, fever and shortness of breath.",
    "The patient is a 42 year old woman with headache and blurred vision for 3 weeks.",
    "The image shows the left side and the right side, the upper lobe and the lower lobe.",
    "The slice is taken in the axial plane; the coronal and sagittal planes are not shown.",
    "The lesion is round, well defined, about 12 mm across and brighter than its surroundings.",
    "The lesion is irregular, poorly defined and darker than the tissue around it.",
    "Where in the body was this image taken? Head, neck, chest, abdomen, pelvis, arm or leg.",
    "How many lesions can be seen? One, two, three, four, five or none.",
    "There is one region of interest. It lies in the centre of the image, near the border.",
    "What is the most likely diagnosis? What treatment would you suggest next?",
    "Which stain was used? Haematoxylin and eosin. The nuclei are purple, the stroma is pink.",
    "The optic disc, the macula and the vessels can be seen in the fundus photograph.",
    "The background is dark, the bright area is bone, the grey area is soft tissue.",
    "Immunohistochemistry shows brown staining of the glands; the lumen is white.",
    "Bounding box: [10, 24, 136, 248]. Coordinates are given in pixels from 0 to 1000.",
    "A. CT B. MR C. fundus D. histology E. X-ray F. ultrasound",
    "(A) yes (B) no (C) cannot be determined (D) none of the above",
    "Compare the first image with the second image and say what has changed.",
    "Follow up in 6 months is recommended, because the finding is probably benign.",
    "The finding suggests a malignant process, therefore a biopsy should be taken.",
    "Blood pressure 120/80 mmHg, temperature 37.5 degrees, heart rate 72 per minute.",
    "Train, test and validation images come from different regions and different patients.",
)
CHINESE = (
    "这张图像是用什么成像方式拍摄的?请用一个词回答。",
    "图中显示的是哪个器官?请从下列选项中选择正确的答案。",
    "请详细描述这张医学图像。请描述你在图片中看到的内容。",
    "这张图像中有异常吗?有。没有。是。否。正常。异常。",
    "你是一名有帮助的医学助手。本回答不能代替医生的诊断。",
    "患者,男,六十五岁,因咳嗽、发热、呼吸困难入院。",
    "患者,女,四十二岁,头痛、视物模糊三周。",
    "病灶呈圆形,边界清楚,直径约12毫米,信号高于周围组织。",
    "病灶形态不规则,边界不清,密度低于周围组织。",
    "最可能的诊断是什么?下一步应如何治疗?",
    "图像为横断面,未显示冠状面和矢状面。",
    "左侧、右侧、上叶、下叶、前方、后方、中央、边缘。",
    "细胞核呈紫色,间质呈粉红色,腺体排列紊乱。",
    "眼底彩照可见视盘、黄斑和血管,未见明显出血。",
    "建议六个月后复查,必要时进行活检。",
    "该表现提示恶性病变,应进一步检查。",
    "背景为黑色,亮区为骨骼,灰色区域为软组织。",
    "请比较第一张图像和第二张图像,说明有什么变化。",
    "选项:一、二、三、四、五、六、七、八、九、十。",
    "血压一百二十,体温三十七度,心率每分钟七十二次。",
)


def sentences() -> Iterator[str]:
    """Sentences in a fixed order, each without a line break."""
    for _ in range(8):
        yield from ENGLISH
        yield from CHINESE
    for (modality, image), (organ, part) in product(MODALITIES, ORGANS):
        yield f"This is {modality} of the {organ}. What does the image show?"
        yield f"这是一张{part}的{image}图像。图像显示了什么?"
    for (organ, part), (finding, sign) in product(ORGANS, FINDINGS):
        yield f"The {organ} shows {finding}. There is {finding} in the {organ}."
        yield f"{part}可见{sign}。{part}:{sign}。"
