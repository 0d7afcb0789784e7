# SPDX-License-Identifier: Apache-2.0

"""Base folders that hold a ``config.json`` each and no weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

INTERNLM2_5_7B = {
    "model_type": "internlm2",
    "vocab_size": 92544,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "bias": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
CLIP_VIT_L_14_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
    "torch_dtype": "float32",
}


def write_true_geometry(folder: Path, *, tiny: Path | None = None) -> None:
    """Write ``folder/llm`` and ``folder/vision``.

    Args:
        folder: is made.
        tiny: tiny bases whose tokenizer and image processor are put beside the configs, so that data can
            be planned.
    """
    for part, config in (("llm", INTERNLM2_5_7B), ("vision", CLIP_VIT_L_14_336)):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config))
        for name in ("tokenizer.model", "tokenizer_config.json", "preprocessor_config.json"):
            if tiny is not None and (tiny / part / name).is_file():
                shutil.copy(tiny / part / name, folder / part / name)
