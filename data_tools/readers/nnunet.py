# SPDX-License-Identifier: Apache-2.0

"""Sets with a ``dataset.json``: nnU-Net v2 (``reader: nnunet``) and the Medical Segmentation Decathlon.

nnU-Net has ``imagesTr/CASE_0000.nii.gz`` for each channel and ``labelsTr/CASE.nii.gz``:

    {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "ignore": 2},
     "file_ending": ".nii.gz"}

Region-based labels, ``"whole tumor": [1, 2, 3]``, are regions here as well: they overlap, and each gives its
own masks. ``ignore`` marks voxels that nobody decided on; slices that hold one are dropped. Sets with a
``dataset`` table name their files there. Two-dimensional sets (.png, .tif) are for ``reader: masks``.

The Decathlon (``reader: decathlon``), and nnU-Net v1, list the cases, whose channels lie in one file:

    {"modality": {"0": "FLAIR", "1": "T1w"}, "labels": {"0": "background", "1": "edema"},
     "training": [{"image": "./imagesTr/BRATS_001.nii.gz", "label": "./labelsTr/BRATS_001.nii.gz"}]}

Labels have the names of ``dataset.json``; the job's ``labels`` rename those. The ``test`` list has no labels
and is not read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
from pydantic import Field

from data_tools.preprocess.volumes import Structure, Volume
from data_tools.readers.files import file_below, file_of, folder_of
from data_tools.readers.volume import maps_on
from data_tools.readers.volume_samples import Origin, VolumeOptions, samples
from data_tools.records import ANYTHING, Drops, Sample, Unit
from gmai_xtuner.core.errors import SourceError, Unusable
from gmai_xtuner.core.imaging.volumes import SUFFIXES, Grid, load

UNKNOWN_VALUE = "label map with a value that dataset.json doesn't name"

# Names that published sets give to their channels -> DICOM code of the modality.
CHANNEL_MODALITIES = {
    **dict.fromkeys(("ct", "cta", "cect", "ncct", "ldct"), "CT"),
    **dict.fromkeys(("mr", "mri", "flair", "t1", "t1w", "t1c", "t1ce", "t1gd", "t1n"), "MR"),
    **dict.fromkeys(("t2", "t2w", "t2f", "t2*", "pd", "adc", "dwi", "swi", "cine-mri"), "MR"),
    **dict.fromkeys(("pet", "suv"), "PT"),
}


class Options(VolumeOptions):
    """Keys of ``reader: nnunet`` and ``reader: decathlon``.

    Args:
        channels: names (or numbers) of the channels that images are made of. Default: all.
    """

    reader: Literal["nnunet", "decathlon"]
    channels: tuple[str | int, ...] | None = Field(None, min_length=1)


def units(options: Options) -> Iterator[Unit]:
    """Yield a unit for each case: of nnU-Net sorted, of the Decathlon in the order of ``training``.

    Raises:
        SourceError: ``dataset.json`` is missing, not of this form, or of a two-dimensional set.
    """
    content = _read_json(options)
    yield from (_decathlon if options.reader == "decathlon" else _nnunet)(options, content)


def _unit(
    options: Options,
    key: str,
    images: Mapping[int, tuple[str, int | None]],
    label_file: str,
    *,
    names: Mapping[int, str],
    labels: Mapping[str, tuple[int, ...]],
    ignored: int | None = None,
) -> Unit:
    """Return the unit of a case.

    Args:
        options: of the source.
        key: names the case, and is its group.
        images: of each channel, path below the root and index along the file's fourth axis.
        label_file: path below the root.
        names: of the channels.
        labels: name -> the values that it is made of. With more than one value it is a region.
        ignored: value of voxels that nobody decided on.
    """
    chosen = [(names[channel], *images[channel]) for channel in _chosen_channels(options, names)]
    return Unit(
        key, {"images": chosen, "label": label_file, "labels": dict(labels), "ignored": ignored}
    )


def read(options: Options, unit: Unit, drops: Drops) -> Iterator[Sample]:
    """Yield the slices of each wanted channel of a case."""
    payload = unit.payload
    for shown, name, index in payload["images"]:
        with drops.image(name):
            path = file_below(options, name)
            grid = load(path, channel=index, max_voxels=options.max_voxels, within=options.roots)
            found = maps_on(grid, options, payload["label"], drops, channel=index)
            modality = CHANNEL_MODALITIES.get(shown.casefold())
            named = modality == "MR" and shown.casefold() not in ("mr", "mri")
            origin = Origin(
                path.relative_to(options.root).as_posix(),
                part={"channel": shown} if index is not None else {},
                group=unit.key,
                modality=modality,
                attributes={"sequence": shown} if named else {},
                preprocessing=grid.notes | found.notes,
                examined=(ANYTHING,),  # dataset.json names the labels of every case
            )
            volume = _volume(grid, found.layers[0], payload["labels"], payload["ignored"])
            yield from samples(volume, origin, options, drops)


def _volume(
    grid: Grid, values: np.ndarray, labels: Mapping[str, tuple[int, ...]], ignored: int | None
) -> Volume:
    """Return the volume: single labels stay in one map; regions, which may overlap, get a layer each."""
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


def _read_json(options: Options) -> dict[str, Any]:
    """Return the set's ``dataset.json``.

    Raises:
        SourceError: there is none, or it is no JSON object.
    """
    path = file_of(options, "dataset.json", key="root")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"Source {options.name}: {path} is no JSON ({error}).") from error
    if not isinstance(content, dict):
        raise SourceError(
            f"Source {options.name}: {path} holds no JSON object but a {type(content).__name__}."
        )
    return content


def _chosen_channels(options: Options, names: Mapping[int, str]) -> list[int]:
    """Return the numbers of the wanted channels.

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


def _wrong(options: Options, key: str, expected: str, came: object) -> SourceError:
    path = options.root / "dataset.json"
    return SourceError(
        f"Source {options.name}: {path}: `{key}` should be {expected}, it is {str(came)[:200]!r}."
    )


# --- nnU-Net v2 -----------------------------------------------------------------------------------


def _nnunet(options: Options, content: dict[str, Any]) -> Iterator[Unit]:
    names = _channel_names(options, content)
    labels, ignored = _labels(options, content)
    ending = content.get("file_ending")
    if not isinstance(ending, str) or not ending.startswith("."):
        raise _wrong(options, "file_ending", 'a suffix such as ".nii.gz"', ending)
    if ending.lower() not in SUFFIXES:
        raise SourceError(
            f"Source {options.name}: dataset.json has `file_ending` {ending!r}; volumes end in "
            f"{', '.join(SUFFIXES)}. A set of pictures and masks is for `reader: masks`."
        )
    for case, files, label_file in _cases(options, content, ending, len(names)):
        images = {channel: (name, None) for channel, name in enumerate(files)}
        yield _unit(options, case, images, label_file, names=names, labels=labels, ignored=ignored)


def _channel_names(options: Options, content: Mapping[str, Any]) -> dict[int, str]:
    table = content.get("channel_names")
    if table is None and "modality" in content:
        raise SourceError(
            f"Source {options.name}: dataset.json has `modality` and no `channel_names`: it is of the "
            "Decathlon or nnU-Net v1. Say `reader: decathlon`."
        )
    expected = '{"0": name, "1": name, ...} without gaps'
    if not isinstance(table, dict) or not table:
        raise _wrong(options, "channel_names", expected, table)
    try:
        names = {int(number): str(name) for number, name in table.items()}
    except ValueError:
        raise _wrong(options, "channel_names", expected, table) from None
    if sorted(names) != list(range(len(table))):
        raise _wrong(options, "channel_names", expected, table)
    return names


def _labels(
    options: Options, content: Mapping[str, Any]
) -> tuple[dict[str, tuple[int, ...]], int | None]:
    """Return name -> values, without the background; value of ``ignore`` or None."""
    table = content.get("labels")
    expected = '{"background": 0, "name": 1, "region": [1, 2], ...}'
    if not isinstance(table, dict) or not table:
        raise _wrong(options, "labels", expected, table)
    labels: dict[str, tuple[int, ...]] = {}
    for name, values in table.items():
        parts = values if isinstance(values, list) else [values]
        if not parts or not all(type(value) is int and value >= 0 for value in parts):
            raise _wrong(options, f"labels.{name}", "a whole number or a list of them", values)
        labels[str(name)] = tuple(parts)
    if labels.pop("background", None) != (0,):
        raise _wrong(options, "labels.background", "0", table.get("background"))
    ignore = labels.pop("ignore", None)
    if ignore is not None and len(ignore) != 1:
        raise _wrong(options, "labels.ignore", "a whole number", table["ignore"])
    if any(0 in values for values in labels.values()):
        raise _wrong(options, "labels", "0 for the background alone", table)
    return labels, ignore[0] if ignore else None


def _cases(
    options: Options, content: Mapping[str, Any], ending: str, channels: int
) -> Iterator[tuple[str, list[str], str]]:
    """Yield name, image of each channel, and label map."""
    listed = content.get("dataset")
    if listed is not None:
        if not isinstance(listed, dict) or not listed:
            raise _wrong(options, "dataset", "{case: {images: [...], label: path}}", listed)
        for case, entry in sorted(listed.items()):
            images = entry.get("images") if isinstance(entry, dict) else None
            label = entry.get("label") if isinstance(entry, dict) else None
            if (
                not isinstance(images, list)
                or len(images) != channels
                or not all(isinstance(name, str) for name in images)
                or not isinstance(label, str)
            ):
                expected = f"{{images: [{channels} paths], label: path}}"
                raise _wrong(options, f"dataset.{case}", expected, entry)
            yield case, [name.removeprefix("./") for name in images], label.removeprefix("./")
        return
    folder = folder_of(options, "labelsTr", key="root")
    folder_of(options, "imagesTr", key="root")
    cases = {
        path.name[: -len(ending)]
        for path in folder.iterdir()
        if path.name.endswith(ending) and not path.name.startswith(".")
    }
    last = f"_0000{ending}"
    cases |= {
        path.name[: -len(last)]
        for path in (options.root / "imagesTr").iterdir()
        if path.name.endswith(last) and not path.name.startswith(".")
    }
    if not cases:
        raise SourceError(f"Source {options.name}: no *{ending} in {str(folder)!r}.")
    for case in sorted(cases):
        images = [f"imagesTr/{case}_{channel:04d}{ending}" for channel in range(channels)]
        yield case, images, f"labelsTr/{case}{ending}"


# --- Decathlon ------------------------------------------------------------------------------------


def _decathlon(options: Options, content: dict[str, Any]) -> Iterator[Unit]:
    names = _numbered(options, content, "modality")
    values = _numbered(options, content, "labels")
    labels = {name: (value,) for value, name in values.items() if value}
    training = content.get("training")
    if not isinstance(training, list) or not training:
        raise _wrong(options, "training", "a list of cases", training)
    seen = set()
    for number, entry in enumerate(training):
        image = entry.get("image") if isinstance(entry, dict) else None
        label = entry.get("label") if isinstance(entry, dict) else None
        if not isinstance(image, str) or not isinstance(label, str):
            raise _wrong(options, f"training[{number}]", "{image: path, label: path}", entry)
        image, label = image.removeprefix("./"), label.removeprefix("./")
        if image in seen:
            raise _wrong(options, f"training[{number}]", "a case not named before", image)
        seen.add(image)
        images = {index: (image, index if len(names) > 1 else None) for index in names}
        yield _unit(options, image, images, label, names=names, labels=labels)


def _numbered(options: Options, content: dict[str, Any], key: str) -> dict[int, str]:
    """Return ``{"0": name}`` as numbers and distinct names.

    Raises:
        SourceError: it is something else.
    """
    table = content.get(key)
    expected = '{"0": name, "1": name, ...}'
    if not isinstance(table, dict) or not table:
        raise _wrong(options, key, expected, table)
    try:
        named = {int(number): str(name).strip() for number, name in table.items()}
    except ValueError:
        hint = " (a set of nnU-Net v2? Then `reader: nnunet`)" if key == "labels" else ""
        raise SourceError(str(_wrong(options, key, expected, table)) + hint) from None
    if len(set(named.values())) != len(named) or len(named) != len(table):
        raise _wrong(options, key, "numbers and names that occur once", table)
    if key == "labels" and 0 not in named:
        raise _wrong(options, key, "a table with 0, the background", table)
    return named
