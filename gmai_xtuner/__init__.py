"""GMAI-VL for XTuner.

Importing this package registers its datasets, samplers, model, loop and hooks in xtuner's ``BUILDER``
and ``MAP_FUNC`` and in mmengine's registries, and makes xtuner 0.2.0 work where it does not
(:mod:`gmai_xtuner.compat`). A config does it by ``custom_imports = dict(imports=["gmai_xtuner"])``.
"""

from gmai_xtuner import compat

compat.apply()

from xtuner.registry import MAP_FUNC  # noqa: E402

from gmai_xtuner.datasets.collate import collate_packs  # noqa: E402
from gmai_xtuner.datasets.sampler import MicroBatchSampler, PackSampler  # noqa: E402
from gmai_xtuner.datasets.soft_packed import SoftPackedDataset  # noqa: E402
from gmai_xtuner.datasets.tokenization import soft_packing_map_fn  # noqa: E402
from gmai_xtuner.engine import PackedTrainLoop, WarmupCosineLR  # noqa: E402
from gmai_xtuner.models import (  # noqa: E402
    GMAILLaVAModel,
    load_language_model,
    load_tokenizer,
    load_vision_tower,
)

if "soft_packing_map_fn" not in MAP_FUNC:
    MAP_FUNC.register_module(module=soft_packing_map_fn, name="soft_packing_map_fn")

__version__ = "0.1.0"

__all__ = [
    "GMAILLaVAModel",
    "MicroBatchSampler",
    "PackSampler",
    "PackedTrainLoop",
    "SoftPackedDataset",
    "WarmupCosineLR",
    "collate_packs",
    "load_language_model",
    "load_tokenizer",
    "load_vision_tower",
    "soft_packing_map_fn",
]
