"""The plugin that a config imports: ``custom_imports = dict(imports=["gmai_xtuner.plugin"])``.

Importing it registers the datasets, samplers, model, loop and hooks in xtuner's ``BUILDER`` and
``MAP_FUNC`` and in mmengine's registries, and makes xtuner 0.2.0 work where it does not
(:mod:`gmai_xtuner.compat`). No other module has effects on import.
"""

from gmai_xtuner import compat

compat.apply()

from xtuner.registry import MAP_FUNC  # noqa: E402

from gmai_xtuner.data.collate import collate_packs  # noqa: E402
from gmai_xtuner.data.sampler import MicroBatchSampler, PackSampler  # noqa: E402
from gmai_xtuner.data.soft_packed import SoftPackedDataset  # noqa: E402
from gmai_xtuner.data.tokenization import soft_packing_map_fn  # noqa: E402
from gmai_xtuner.model import (  # noqa: E402
    GMAILLaVAModel,
    load_language_model,
    load_tokenizer,
    load_vision_tower,
)
from gmai_xtuner.train import PackedTrainLoop, WarmupCosineLR  # noqa: E402

if "soft_packing_map_fn" not in MAP_FUNC:
    MAP_FUNC.register_module(module=soft_packing_map_fn, name="soft_packing_map_fn")

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
