"""What Decathlon and nnU-Net sets share: a ``dataset.json``, channels, and cases of one label map."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from data_tools.preprocess.volumes import Structure, Volume
from data_tools.readers.files import file_of
from data_tools.readers.volume import map_on, path_of
from data_tools.readers.volume_samples import Origin, VolumeOptions, samples
from data_tools.records import Drops, Sample
from gmai_xtuner.core.errors import SourceError, Unusable
from gmai_xtuner.core.imaging.volumes import Grid, load

UNKNOWN_VALUE = "label map with a value that dataset.json doesn't name"

# Names that published sets give to their channels -> DICOM code of the modality.
CHANNEL_MODALITIES = {
    **dict.fromkeys(("ct", "cta", "cect", "ncct", "ldct"), "CT"),
    **dict.fromkeys(("mr", "mri", "flair", "t1", "t1w", "t1c", "t1ce", "t1gd", "t1n"), "MR"),
    **dict.fromkeys(("t2", "t2w", "t2f", "t2*", "pd", "adc", "dwi", "swi", "cine-mri"), "MR"),
    **dict.fromkeys(("pet", "suv"), "PT"),
}


class ChannelOptions(VolumeOptions):
    """Keys of readers of ``dataset.json``.

    Args:
        channels: names (or numbers) of the channels that pictures are made of. Default: all.
    """

    channels: tuple[str | int, ...] | None = Field(None, min_length=1)


def read_json(options: VolumeOptions) -> dict[str, Any]:
    """The set's ``dataset.json``.

    Raises:
        SourceError: there is none, or it is no JSON object.
    """
    path = file_of(options.root, "dataset.json", source=options.name, key="root")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"Source {options.name}: {path} is no JSON ({error}).") from error
    if not isinstance(content, dict):
        raise SourceError(
            f"Source {options.name}: {path} holds no JSON object but a {type(content).__name__}."
        )
    return content


def chosen_channels(options: ChannelOptions, names: Mapping[int, str]) -> list[int]:
    """Numbers of the wanted channels.

    Raises:
        SourceError: the job names one that the set hasn't.
    """
    if options.channels is None:
        return sorted(names)
    folded = {name.casefold(): number for number, name in names.items()}
    found = []
    for wanted in options.channels:
        number = folded.get(str(wanted).casefold())
        if number is None and str(wanted).isdigit() and int(wanted) in names:
            number = int(wanted)
        if number is None:
            known = ", ".join(f"{number} ({name})" for number, name in sorted(names.items()))
            raise SourceError(
                f"Source {options.name}: `channels` names {wanted!r}; dataset.json has {known}."
            )
        found.append(number)
    return found


def read_case(
    options: VolumeOptions,
    key: str,
    images: Mapping[int, tuple[str, int | None]],
    label_file: str,
    *,
    channel_names: Mapping[int, str],
    labels: Mapping[str, tuple[int, ...]],
    drops: Drops,
    ignored: int | None = None,
) -> Iterator[Sample]:
    """The pictures of each wanted channel of a case.

    Args:
        options: of the source.
        key: names the case, and is its group.
        images: channel -> path below the root and index along the file's fourth axis.
        label_file: path below the root.
        channel_names: of the whole set; with one channel its name goes into no part.
        labels: name -> the values that it is made of. With more than one value it is a region.
        ignored: value of voxels that nobody decided on.
    """
    for channel, (name, index) in images.items():
        with drops.image(name):
            grid = load(path_of(options.root, name), channel=index, max_voxels=options.max_voxels)
            mask = path_of(options.root, label_file)
            values = map_on(grid, mask, label_file, max_voxels=options.max_voxels)
            shown = channel_names[channel]
            modality = CHANNEL_MODALITIES.get(shown.casefold())
            named = modality == "MR" and shown.casefold() not in _MR
            origin = Origin(
                name,
                part={"channel": shown} if index is not None else {},
                group=key,
                modality=modality,
                attributes={"sequence": shown} if named else {},
                preprocessing=grid.notes,
            )
            yield from samples(_volume(grid, values, labels, ignored), origin, options, drops)


_MR = ("mr", "mri")


def _volume(
    grid: Grid, values: np.ndarray, labels: Mapping[str, tuple[int, ...]], ignored: int | None
) -> Volume:
    """A value of one label stays in the map; regions, which may overlap, get a layer each."""
    present = set(np.unique(values).tolist()) - {0}
    named = {value for parts in labels.values() for value in parts}
    unknown = sorted(present - named - {ignored})
    if unknown:
        raise Unusable(UNKNOWN_VALUE, ", ".join(str(value) for value in unknown[:8]))
    layers: list[np.ndarray] = []
    structures: list[Structure] = []
    if all(len(parts) == 1 for parts in labels.values()):
        layers.append(values)
        structures = [
            Structure(name, 0, parts[0]) for name, parts in labels.items() if parts[0] in present
        ]
    else:
        for name, parts in labels.items():
            layer = np.isin(values, parts).astype(np.uint8)
            if layer.any():
                structures.append(Structure(name, len(layers), 1))
                layers.append(layer)
    if not structures:
        raise Unusable("empty label map")
    unclear = None if ignored is None or ignored not in present else values == ignored
    return Volume(grid.array, grid.affine, tuple(layers), tuple(structures), unclear)


def wrong(options: VolumeOptions, key: str, expected: str, came: object) -> SourceError:
    """The error for a key of ``dataset.json``."""
    path: Path = options.root / "dataset.json"
    return SourceError(
        f"Source {options.name}: {path}: `{key}` should be {expected}, it is {str(came)[:200]!r}."
    )
