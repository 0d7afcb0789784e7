# SPDX-License-Identifier: Apache-2.0

"""What is kept of masks, slices and volumes; presets as published by the sets and models that are named.

A preset is taken by name, ``clean: sa-med2d``, or changed in places, ``clean: {preset: sa-med2d,
min_area_pixels: 20}``.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from data_tools.options import Options


class Rules(Options):
    """Rules for masks and what they lie in; docs/corpus.md explains them.

    A rule that is 0, 1 or None in its default removes nothing.
    """

    preset: str | None = None
    split: bool = True
    connectivity: Literal[4, 8] = 8
    connectivity_3d: Literal[6, 18, 26] = 26
    min_area_share: float = Field(default=0.0, ge=0, lt=1)
    min_area_pixels: int = Field(default=0, ge=0)
    keep_largest: int | None = Field(default=None, ge=1)
    clip_boxes: bool = False
    min_edge_ratio: float = Field(default=0.0, ge=0, le=1)
    min_voxels: int = Field(default=0, ge=0)
    min_volume_mm3: float = Field(default=0.0, ge=0)
    min_side_mm: float = Field(default=0.0, ge=0)
    max_background: float = Field(default=1.0, ge=0, le=1)
    split_left_right: bool = False

    @model_validator(mode="before")
    @classmethod
    def _start_from_the_preset(cls, values: Any) -> Any:
        name = values.get("preset") if isinstance(values, dict) else values
        if not isinstance(name, str):
            return values
        if name not in PRESETS:
            raise ValueError(f"{name!r} is no preset; there are {', '.join(PRESETS)}")
        return PRESETS[name].model_dump() | (values if isinstance(values, dict) else {})


PRESETS: dict[str, Rules] = {
    "none": Rules(),
    # SA-Med2D-20M (Ye et al. 2023, arXiv 2311.11969), section on preprocessing; no code was published.
    # Slices whose short edge is under half of the long edge and masks under 0.153 % = 100 / 256**2 of the
    # image are left out. The demo data shows the connectivity (a vertebra that is one component would be
    # three under 4) and that each component counts for itself; its smallest mask has 0.169 %.
    "sa-med2d": Rules(min_area_share=100 / 256**2, min_edge_ratio=0.5),
    # MedSAM (Ma et al. 2024, Nature Communications 15, 654) and its pre_CT_MR.py: under 1000 voxels in a
    # volume or 100 pixels in a slice is left out. Its masks are not split.
    "medsam": Rules(split=False, min_area_pixels=100, min_voxels=1000),
    # SAM-Med3D (Wang et al. 2023, arXiv 2310.15161): under 1 cm3 or with a side under 1.5 cm is left out, as
    # is a volume of more than 99 % background; the five largest components stay; pairs are told apart.
    "sam-med3d": Rules(
        min_volume_mm3=1000,
        min_side_mm=15,
        max_background=0.99,
        keep_largest=5,
        split_left_right=True,
    ),
    # BiomedParse (Zhao et al. 2025, Nature Methods 22, 166): one mask an object type and slice, not split.
    # Its CT ranges are windows, which the readers of volumes offer; no cut by size is known.
    "biomedparse": Rules(split=False),
}
for _name, _rules in PRESETS.items():
    PRESETS[_name] = _rules.model_copy(update={"preset": _name})
