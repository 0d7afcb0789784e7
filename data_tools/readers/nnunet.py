"""nnU-Net v2 sets: ``dataset.json``, ``imagesTr/CASE_0000.nii.gz`` a channel, ``labelsTr/CASE.nii.gz``.

    {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "ignore": 2},
     "file_ending": ".nii.gz"}

Region-based labels, ``"whole tumor": [1, 2, 3]``, are regions here as well: they overlap, and each gives its
own masks. ``ignore`` marks voxels that nobody decided on; slices that hold one are dropped. Sets with a
``dataset`` table name their files there. Two-dimensional sets (.png, .tif) are for ``reader: masks``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from data_tools.readers.dataset_json import (
    ChannelOptions,
    chosen_channels,
    read_case,
    read_json,
    wrong,
)
from data_tools.readers.files import folder_of
from data_tools.records import Drops, Sample, Unit
from gmai_xtuner.core.errors import SourceError
from gmai_xtuner.core.imaging.volumes import SUFFIXES


class Options(ChannelOptions):
    """Keys of ``reader: nnunet``; those of `dataset_json.ChannelOptions`."""

    reader: Literal["nnunet"]


def units(options: Options) -> Iterator[Unit]:
    """A unit for each case, sorted.

    Raises:
        SourceError: ``dataset.json`` is missing, not of this form, or of a two-dimensional set.
    """
    content = read_json(options)
    names = _channel_names(options, content)
    labels, ignored = _labels(options, content)
    ending = content.get("file_ending")
    if not isinstance(ending, str) or not ending.startswith("."):
        raise wrong(options, "file_ending", 'a suffix such as ".nii.gz"', ending)
    if ending.lower() not in SUFFIXES:
        raise SourceError(
            f"Source {options.name}: dataset.json has `file_ending` {ending!r}; volumes end in "
            f"{', '.join(SUFFIXES)}. A set of pictures and masks is for `reader: masks`."
        )
    wanted = chosen_channels(options, names)
    common = {
        "names": {str(key): name for key, name in names.items()},
        "labels": {name: list(values) for name, values in labels.items()},
        "ignored": ignored,
    }
    for case, images, label in _cases(options, content, ending, len(names)):
        chosen = {str(channel): images[channel] for channel in wanted}
        yield Unit(case, {"images": chosen, "label": label, **common})


def read(options: Options, unit: Unit, drops: Drops) -> Iterator[Sample]:
    """One case."""
    payload = unit.payload
    images = {int(channel): (name, None) for channel, name in payload["images"].items()}
    yield from read_case(
        options,
        unit.key,
        images,
        payload["label"],
        channel_names={int(key): name for key, name in payload["names"].items()},
        labels={name: tuple(values) for name, values in payload["labels"].items()},
        drops=drops,
        ignored=payload["ignored"],
    )


def _channel_names(options: Options, content: Mapping[str, Any]) -> dict[int, str]:
    table = content.get("channel_names")
    if table is None and "modality" in content:
        raise SourceError(
            f"Source {options.name}: dataset.json has `modality` and no `channel_names`: it is of the "
            "Decathlon or nnU-Net v1. Say `reader: decathlon`."
        )
    expected = '{"0": name, "1": name, ...} without gaps'
    if not isinstance(table, dict) or not table:
        raise wrong(options, "channel_names", expected, table)
    try:
        names = {int(number): str(name) for number, name in table.items()}
    except ValueError:
        raise wrong(options, "channel_names", expected, table) from None
    if sorted(names) != list(range(len(table))):
        raise wrong(options, "channel_names", expected, table)
    return names


def _labels(
    options: Options, content: Mapping[str, Any]
) -> tuple[dict[str, tuple[int, ...]], int | None]:
    """Name -> values, without the background; value of ``ignore`` or None."""
    table = content.get("labels")
    expected = '{"background": 0, "name": 1, "region": [1, 2], ...}'
    if not isinstance(table, dict) or not table:
        raise wrong(options, "labels", expected, table)
    labels: dict[str, tuple[int, ...]] = {}
    for name, values in table.items():
        parts = values if isinstance(values, list) else [values]
        if not parts or not all(type(value) is int and value >= 0 for value in parts):
            raise wrong(options, f"labels.{name}", "a whole number or a list of them", values)
        labels[str(name)] = tuple(parts)
    if labels.pop("background", None) != (0,):
        raise wrong(options, "labels.background", "0", table.get("background"))
    ignore = labels.pop("ignore", None)
    if ignore is not None and len(ignore) != 1:
        raise wrong(options, "labels.ignore", "a whole number", table["ignore"])
    if any(0 in values for values in labels.values()):
        raise wrong(options, "labels", "0 for the background alone", table)
    return labels, ignore[0] if ignore else None


def _cases(
    options: Options, content: Mapping[str, Any], ending: str, channels: int
) -> Iterator[tuple[str, list[str], str]]:
    """Name, image of each channel, label map."""
    listed = content.get("dataset")
    if listed is not None:
        if not isinstance(listed, dict) or not listed:
            raise wrong(options, "dataset", "{case: {images: [...], label: path}}", listed)
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
                raise wrong(options, f"dataset.{case}", expected, entry)
            yield case, [name.removeprefix("./") for name in images], label.removeprefix("./")
        return
    folder = folder_of(options.root, "labelsTr", source=options.name, key="root")
    folder_of(options.root, "imagesTr", source=options.name, key="root")
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
