"""Medical Segmentation Decathlon: ``dataset.json`` with ``modality``, ``labels`` and the ``training`` list.

    {"modality": {"0": "FLAIR", "1": "T1w"}, "labels": {"0": "background", "1": "edema"},
     "training": [{"image": "./imagesTr/BRATS_001.nii.gz", "label": "./labelsTr/BRATS_001.nii.gz"}]}

Labels have the names of ``dataset.json``; the job's ``labels`` rename those. The ``test`` list has no labels
and is not read. nnU-Net v1 wrote the same form.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from data_tools.readers.dataset_json import (
    ChannelOptions,
    chosen_channels,
    read_case,
    read_json,
    wrong,
)
from data_tools.records import Drops, Sample, Unit
from gmai_xtuner.core.errors import SourceError


class Options(ChannelOptions):
    """Keys of ``reader: decathlon``; those of `dataset_json.ChannelOptions`."""

    reader: Literal["decathlon"]


def units(options: Options) -> Iterator[Unit]:
    """A unit for each entry of ``training``, in its order.

    Raises:
        SourceError: ``dataset.json`` is missing or not of this form.
    """
    content = read_json(options)
    names = _numbered(options, content, "modality")
    labels = _numbered(options, content, "labels")
    training = content.get("training")
    if not isinstance(training, list) or not training:
        raise wrong(options, "training", "a list of cases", training)
    wanted = chosen_channels(options, names)
    seen = set()
    for number, entry in enumerate(training):
        image = entry.get("image") if isinstance(entry, dict) else None
        label = entry.get("label") if isinstance(entry, dict) else None
        if not isinstance(image, str) or not isinstance(label, str):
            raise wrong(options, f"training[{number}]", "{image: path, label: path}", entry)
        image, label = image.removeprefix("./"), label.removeprefix("./")
        if image in seen:
            raise wrong(options, f"training[{number}]", "a case not named before", image)
        seen.add(image)
        yield Unit(
            image,
            {
                "label": label,
                "channels": wanted,
                "names": {str(key): name for key, name in names.items()},
                "labels": {name: value for value, name in labels.items() if value},
            },
        )


def read(options: Options, unit: Unit, drops: Drops) -> Iterator[Sample]:
    """One case."""
    names = {int(key): name for key, name in unit.payload["names"].items()}
    several = len(names) > 1
    images = {
        channel: (unit.key, channel if several else None) for channel in unit.payload["channels"]
    }
    labels = {name: (value,) for name, value in unit.payload["labels"].items()}
    yield from read_case(
        options,
        unit.key,
        images,
        unit.payload["label"],
        channel_names=names,
        labels=labels,
        drops=drops,
    )


def _numbered(options: Options, content: dict[str, Any], key: str) -> dict[int, str]:
    """``{"0": name}`` as numbers and distinct names.

    Raises:
        SourceError: it is something else.
    """
    table = content.get(key)
    expected = '{"0": name, "1": name, ...}'
    if not isinstance(table, dict) or not table:
        raise wrong(options, key, expected, table)
    try:
        named = {int(number): str(name).strip() for number, name in table.items()}
    except ValueError:
        hint = " (a set of nnU-Net v2? Then `reader: nnunet`)" if key == "labels" else ""
        raise SourceError(str(wrong(options, key, expected, table)) + hint) from None
    if len(set(named.values())) != len(named) or len(named) != len(table):
        raise wrong(options, key, "numbers and names that occur once", table)
    if key == "labels" and 0 not in named:
        raise wrong(options, key, "a table with 0, the background", table)
    return named
