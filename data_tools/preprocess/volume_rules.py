"""The three-dimensional part of the cleaning rules, on a volume's label maps before it is cut into slices.

Connected components are those of cc3d, all labels of a map at once.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np

from data_tools.preprocess.rules import Rules
from data_tools.preprocess.volumes import Structure, Volume
from data_tools.records import Drops
from gmai_xtuner.core.errors import Unusable


@dataclass(frozen=True, slots=True)
class _Component:
    """``first`` and ``last``: corners of its bounding box in voxels of the map, half-open."""

    number: int
    value: int
    voxels: int
    first: tuple[int, ...]
    last: tuple[int, ...]


def clean(volume: Volume, rules: Rules, *, drops: Drops, where: str) -> Volume:
    """Return the volume with what the rules leave of its structures.

    Args:
        volume: in RAS+; its arrays are not changed.
        rules: `min_voxels`, `min_volume_mm3`, `min_side_mm` and `keep_largest` apply to each 26-connected
            (or as `connectivity_3d` says) component; `max_background` to the volume, before anything is
            taken away; `split_left_right` to what is left.
        drops: takes each component that is left out.
        where: the volume, for the drops.

    Raises:
        Unusable: the volume is left out as a whole.
    """
    if rules.max_background < 1.0 and volume.structures:
        share = _background(volume)
        if share > rules.max_background:
            reason = f"volume of more than {100 * rules.max_background:g} % background"
            raise Unusable(reason, f"{100 * share:.3f} %")
    if not _any(rules):
        return volume
    layers: list[np.ndarray] = []
    structures: list[Structure] = []
    for number, layer in enumerate(volume.layers):
        own = [item for item in volume.structures if item.layer == number]
        cleaned, left = _clean_layer(layer, own, volume.spacing, rules, drops, where)
        layers.append(cleaned)
        structures += left
    return replace(volume, layers=tuple(layers), structures=tuple(structures))


def _any(rules: Rules) -> bool:
    return bool(
        rules.min_voxels
        or rules.min_volume_mm3
        or rules.min_side_mm
        or rules.keep_largest
        or rules.split_left_right
    )


def _background(volume: Volume) -> float:
    """Share of the voxels that no structure holds."""
    held = np.zeros(volume.voxels.shape, dtype=bool)
    for number, layer in enumerate(volume.layers):
        values = [item.value for item in volume.structures if item.layer == number]
        held |= np.isin(layer, values)
    return 1.0 - float(np.count_nonzero(held)) / held.size


def _clean_layer(
    layer: np.ndarray,
    structures: list[Structure],
    spacing: tuple[float, float, float],
    rules: Rules,
    drops: Drops,
    where: str,
) -> tuple[np.ndarray, list[Structure]]:
    import cc3d

    box = _bounding_box(layer)
    if box is None:
        return layer, structures
    part = np.where(np.isin(layer[box], [item.value for item in structures]), layer[box], 0)
    numbers = cc3d.connected_components(
        np.ascontiguousarray(part), connectivity=rules.connectivity_3d
    )
    by_value: dict[int, list[_Component]] = defaultdict(list)
    for component in _components(numbers, part):
        by_value[component.value].append(component)
    names = {item.value: item for item in structures}
    new_value = np.zeros(int(numbers.max()) + 1, dtype=np.uint16)
    left: list[Structure] = []
    offset = box[0].start
    for value, components in sorted(by_value.items()):
        kept = _kept(names[value].label, components, spacing, rules, drops, where)
        middle = (layer.shape[0] - 1) / 2 - offset
        sides = _sides(kept, middle) if rules.split_left_right else {}
        if sides:
            for side in ("left", "right"):
                left.append(_of_side(names[value], side, len(left) + 1))
                for component in kept:
                    if sides[component.number] == side:
                        new_value[component.number] = len(left)
        elif kept:
            left.append(replace(names[value], value=len(left) + 1))
            for component in kept:
                new_value[component.number] = len(left)
    cleaned = np.zeros(layer.shape, dtype=np.uint8 if len(left) < 256 else np.uint16)
    cleaned[box] = new_value[numbers]
    return cleaned, left


def _of_side(structure: Structure, side: str, value: int) -> Structure:
    return replace(structure, value=value, attributes={**structure.attributes, "side": side})


def _components(numbers: np.ndarray, part: np.ndarray) -> list[_Component]:
    import cc3d

    statistics = cc3d.statistics(numbers)
    found = []
    for number in range(1, int(numbers.max()) + 1):
        box = statistics["bounding_boxes"][number]
        value = int(part[box][numbers[box] == number][0])
        first, last = tuple(side.start for side in box), tuple(side.stop for side in box)
        voxels = int(statistics["voxel_counts"][number])
        found.append(_Component(number, value, voxels, first, last))
    return found


def _kept(
    label: str,
    components: list[_Component],
    spacing: tuple[float, float, float],
    rules: Rules,
    drops: Drops,
    where: str,
) -> list[_Component]:
    """Those large enough, largest first."""
    volume = float(np.prod(spacing))
    kept: list[_Component] = []
    for component in sorted(components, key=lambda item: (-item.voxels, item.number)):
        sides = [
            (stop - start) * length
            for start, stop, length in zip(component.first, component.last, spacing, strict=True)
        ]
        size = component.voxels * volume
        if component.voxels < rules.min_voxels:
            reason, had = f"smaller than {rules.min_voxels} voxels", f"{component.voxels} voxels"
        elif size < rules.min_volume_mm3:
            reason, had = f"smaller than {rules.min_volume_mm3:g} mm3", f"{size:.1f} mm3"
        elif min(sides) < rules.min_side_mm:
            reason, had = f"with a side under {rules.min_side_mm:g} mm", f"{min(sides):.1f} mm"
        elif rules.keep_largest and len(kept) >= rules.keep_largest:
            reason = f"beyond the {rules.keep_largest} largest"
            had = f"{component.voxels} voxels"
        else:
            kept.append(component)
            continue
        drops.add(f"component {reason}", where, f"{label}: {had}", lost=[label])
    return kept


def _sides(components: list[_Component], middle: float) -> dict[int, str]:
    """Component -> side, if each lies wholly on one side of the volume's middle and both sides have one.

    ``X`` grows towards the patient's right. A component across the middle means that the structure is not
    a pair, or the volume not centred on the body: then nothing is said.
    """
    sides = {}
    for component in components:
        if component.first[0] > middle:
            sides[component.number] = "right"
        elif component.last[0] - 1 < middle:
            sides[component.number] = "left"
        else:
            return {}
    return sides if len(set(sides.values())) == 2 else {}


def _bounding_box(layer: np.ndarray) -> tuple[slice, slice, slice] | None:
    """Of everything that is not 0; None if all is."""
    box = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        held = np.flatnonzero(layer.any(axis=others))
        if not held.size:
            return None
        box.append(slice(int(held[0]), int(held[-1]) + 1))
    return box[0], box[1], box[2]
