# SPDX-License-Identifier: Apache-2.0

"""Sets with a ``dataset.json``: nnU-Net v2 (``reader: nnunet``) and the Medical Segmentation Decathlon.

nnU-Net v2 has ``imagesTr/CASE_0000.nii.gz`` for each channel and ``labelsTr/CASE.nii.gz``, or names its files
in a ``dataset`` table. Region-based labels, ``"whole tumor": [1, 2, 3]``, are regions here as well: they
overlap, and each gives its own masks. ``ignore`` marks voxels that nobody decided on; slices that hold one
are dropped. Two-dimensional sets (.png, .tif) are for ``reader: masks``. The Decathlon (``reader:
decathlon``), and nnU-Net v1, list the cases under ``training``, whose channels lie in one file; the ``test``
list isn't read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, TypeVar

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt, ValidationError

from data_tools.preprocess.volumes import Structure, Volume
from data_tools.readers.files import file_below, file_of, folder_of, read_json, wrong
from data_tools.readers.volume import EMPTY, NO_PIXELS, VolumeOptions, maps_on, samples
from data_tools.records import ANYTHING, Drops, Sample, Unit
from gmai_xtuner.core.errors import SourceError, Unusable
from gmai_xtuner.core.imaging.volume_headers import SUFFIXES
from gmai_xtuner.core.imaging.volumes import Grid, load

UNKNOWN_VALUE = "label map with a value that dataset.json doesn't name"

# Names that published sets give to their channels -> DICOM code of the modality.
CHANNEL_MODALITIES = {
    **dict.fromkeys(("ct", "cta", "cect", "ncct", "ldct"), "CT"),
    **dict.fromkeys(("mr", "mri", "flair", "t1", "t1w", "t1c", "t1ce", "t1gd", "t1n"), "MR"),
    **dict.fromkeys(("t2", "t2w", "t2f", "t2*", "pd", "adc", "dwi", "swi", "cine-mri"), "MR"),
    **dict.fromkeys(("pet", "suv"), "PT"),
}


class Options(VolumeOptions):
    """Keys of ``reader: nnunet`` and ``decathlon``: ``channels`` by name or number; default: all."""

    channels: tuple[str | int, ...] | None = Field(None, min_length=1)


Value = Annotated[StrictInt, Field(ge=0)]
Names = Annotated[dict[int, str], Field(min_length=1)]
BelowRoot = Annotated[str, AfterValidator(lambda path: path.removeprefix("./"))]


class _File(BaseModel):
    """A ``dataset.json``; keys that are not named here are not read."""

    model_config = ConfigDict(coerce_numbers_to_str=True)


class _Case(_File):
    images: list[BelowRoot]
    label: BelowRoot


class _NnUnet(_File):
    channel_names: Names
    labels: dict[str, Value | Annotated[list[Value], Field(min_length=1)]]
    file_ending: str = Field(pattern=r"^\.")
    dataset: dict[str, _Case] | None = Field(None, min_length=1)


class _TrainingCase(_File):
    image: BelowRoot
    label: BelowRoot


class _Decathlon(_File):
    modality: Names
    labels: Names
    training: list[_TrainingCase] = Field(min_length=1)


Form = TypeVar("Form", bound=_File)


def _read_json(options: Options, form: type[Form]) -> Form:
    content = read_json(options, file_of(options, "dataset.json", key="root"))
    try:
        return form.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        is_of_v1 = isinstance(content, dict) and "modality" in content
        other = "decathlon" if is_of_v1 else "nnunet"
        hint = "" if options.reader == other else f". Is it a set for `reader: {other}`?"
        problem = f"{first['msg']}, got {first['input']!r}"[:300]
        raise _wrong(options, where, problem + hint) from None


def _wrong(options: Options, key: str, problem: str) -> SourceError:
    return wrong(options, f"{options.root / 'dataset.json'}: `{key}`: {problem}")


def units(options: Options) -> Iterator[Unit]:
    """Yield a unit for each case: of nnU-Net sorted, of the Decathlon in the order of ``training``."""
    yield from (_decathlon if options.reader == "decathlon" else _nnunet)(options)


def _nnunet(options: Options) -> Iterator[Unit]:
    content = _read_json(options, _NnUnet)
    channels = _chosen_channels(options, content.channel_names)
    count = len(content.channel_names)
    if sorted(content.channel_names) != list(range(count)):
        raise _wrong(options, "channel_names", "numbers from 0 without gaps are expected")
    labels = {
        name: tuple(values) if isinstance(values, list) else (values,)
        for name, values in content.labels.items()
    }
    ignored = labels.pop("ignore", None)
    background = labels.pop("background", None)
    if background != (0,) or any(0 in values for values in labels.values()):
        raise _wrong(options, "labels", "0 is expected for `background`, and for it alone")
    if ignored is not None and len(ignored) != 1:
        raise _wrong(options, "labels.ignore", f"one number is expected, got {list(ignored)}")
    ending = content.file_ending
    if ending.lower() not in SUFFIXES:
        problem = f"volumes end in {', '.join(SUFFIXES)}, got {ending!r}"
        raise _wrong(options, "file_ending", f"{problem}. Images and masks are for `reader: masks`")
    for name, case in sorted((content.dataset or _cases(options, ending, count)).items()):
        if len(case.images) != count:
            raise _wrong(options, f"dataset.{name}.images", f"{count} paths are expected")
        images = [(content.channel_names[number], case.images[number], None) for number in channels]
        payload = {"images": images, "label": case.label, "labels": labels}
        yield Unit(name, {**payload, "ignored": ignored[0] if ignored else None})


def _cases(options: Options, ending: str, channels: int) -> dict[str, _Case]:
    """Return the cases whose files lie in ``imagesTr`` and ``labelsTr``; one of them may be missing."""
    names = set()
    for folder, last in (("labelsTr", ending), ("imagesTr", f"_0000{ending}")):
        for path in folder_of(options, folder, key="root").iterdir():
            if path.name.endswith(last) and not path.name.startswith("."):
                names.add(path.name.removesuffix(last))
    if not names:
        raise wrong(options, f"no *{ending} in {options.root / 'labelsTr'}.")
    return {
        name: _Case(
            images=[f"imagesTr/{name}_{number:04d}{ending}" for number in range(channels)],
            label=f"labelsTr/{name}{ending}",
        )
        for name in names
    }


def _decathlon(options: Options) -> Iterator[Unit]:
    content = _read_json(options, _Decathlon)
    names = content.modality
    labels = {name.strip(): (value,) for value, name in content.labels.items() if value}
    if 0 not in content.labels or len(labels) != len(content.labels) - 1:
        raise _wrong(options, "labels", "0, the background, and names that occur once are expected")
    channels = _chosen_channels(options, names)
    seen = set()
    for number, case in enumerate(content.training):
        if case.image in seen:
            raise _wrong(options, f"training.{number}", f"{case.image!r} was named before")
        seen.add(case.image)
        images = [(names[at], case.image, at if len(names) > 1 else None) for at in channels]
        payload = {"images": images, "label": case.label, "labels": labels}
        yield Unit(case.image, {**payload, "ignored": None})


def _chosen_channels(options: Options, names: Mapping[int, str]) -> list[int]:
    numbers = {str(number): number for number in names}
    numbers |= {name.casefold(): number for number, name in names.items()}
    wanted = sorted(names) if options.channels is None else options.channels
    for name in wanted:
        if str(name).casefold() not in numbers:
            known = ", ".join(f"{number} ({name})" for number, name in sorted(names.items()))
            raise wrong(options, f"`channels` names {name!r}; dataset.json has {known}.")
    return [numbers[str(name).casefold()] for name in wanted]


def read(options: Options, unit: Unit, drops: Drops) -> Iterator[Sample]:
    """Yield the slices of each wanted channel of a case.

    A unit has of each channel its name, path and index along the fourth axis, the path of the label map, the
    values that each label is made of (several: a region), and the value of voxels that nobody decided on.
    """
    payload = unit.payload
    for shown, name, index in payload["images"]:
        with drops.image(name):
            path = file_below(options, name)
            grid = load(path, channel=index, max_voxels=options.max_voxels, within=options.roots)
            labels = payload["labels"]
            found = maps_on(grid, options, payload["label"], drops, channel=index, labels=labels)
            if (count := len(found.layers)) > 1:
                raise Unusable("label map of several layers", f"{count}; one is expected")
            modality = CHANNEL_MODALITIES.get(shown.casefold())
            named = modality == "MR" and shown.casefold() not in ("mr", "mri")
            origin = Sample(
                NO_PIXELS,
                path.relative_to(options.root).as_posix(),
                part={"channel": shown} if index is not None else {},
                group=unit.key,
                modality=modality,
                attributes={"sequence": shown} if named else {},
                preprocessing=grid.notes | found.notes,
                examined=(ANYTHING,),  # dataset.json names the labels of every case
            )
            volume = _volume(grid, found.layers[0], labels, payload["ignored"])
            yield from samples(volume, origin, options, drops)


def _volume(
    grid: Grid, values: np.ndarray, labels: Mapping[str, tuple[int, ...]], ignored: int | None
) -> Volume:
    """Return the volume: single labels stay in one map; regions, which may overlap, get a layer each."""
    present = set(np.unique(values).tolist()) - {0}
    named = {value for parts in labels.values() for value in parts}
    if unknown := sorted(present - named - {ignored}):
        raise Unusable(UNKNOWN_VALUE, ", ".join(map(str, unknown[:8])))
    layers = [values]
    held = {name: parts for name, parts in labels.items() if present & set(parts)}
    structures = [Structure(name, 0, parts[0]) for name, parts in held.items()]
    if any(len(parts) > 1 for parts in labels.values()):
        layers = [np.isin(values, parts).astype(np.uint8) for parts in held.values()]
        structures = [Structure(name, layer, 1) for layer, name in enumerate(held)]
    if not structures:
        raise Unusable(EMPTY)
    unclear = None if ignored is None or ignored not in present else values == ignored
    return Volume(grid.array, grid.affine, tuple(layers), tuple(structures), unclear)
