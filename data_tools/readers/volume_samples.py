# SPDX-License-Identifier: Apache-2.0

"""What the readers of volumes share: keys of the job, and the way from a volume to samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from data_tools.options import Options
from data_tools.preprocess.clean import clean_volume
from data_tools.preprocess.rules import resolve
from data_tools.preprocess.slicing import Slicing, slices
from data_tools.preprocess.volumes import Volume
from data_tools.readers import SourceOptions
from data_tools.readers.files import UNKNOWN, listed
from data_tools.records import Annotation, Drops, Sample
from gmai_xtuner.core.errors import Unusable
from gmai_xtuner.core.imaging import windows
from gmai_xtuner.core.imaging.slicing import PLANES
from gmai_xtuner.core.imaging.windows import Scale

UNCLEAR = "slice with voxels marked as ignored"
EMPTY = "empty label map"


class LevelAndWidth(Options):
    """``{level: 40, width: 400}`` shows -160 to 240."""

    level: float
    width: float = Field(gt=0)


class Range(Options):
    """``{low: -160, high: 240}``; in a job also ``[-160, 240]``."""

    low: float
    high: float

    @model_validator(mode="before")
    @classmethod
    def _from_pair(cls, value: object) -> object:
        if isinstance(value, list | tuple) and len(value) == 2:
            return {"low": value[0], "high": value[1]}
        return value

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"a window runs from low to high, not from {self.low} to {self.high}")
        return self


Window = (
    Literal["auto", "slice", "volume", "percentile", "soft tissue", "lung", "brain", "bone"]
    | Literal["biomedparse abdomen", "biomedparse lung", "biomedparse pelvis"]
    | Literal["biomedparse liver", "biomedparse colon", "biomedparse pancreas"]
    | LevelAndWidth
    | Range
)
FileWindow = Literal["file"] | Window
"""As `Window`; ``file`` is the file's own VOI LUT or window, without one ``auto``."""


class VolumeOptions(SourceOptions):
    """Keys of every reader of volumes.

    Args:
        slices: which become images, see `preprocess.slicing`.
        window: how intensities become grey levels, see `gmai_xtuner.core.imaging.windows`.
        max_voxels: a file that declares more is dropped before it is read. The default is 4 GiB of float32.
    """

    default_source_task: ClassVar[str] = "3D segmentation"

    slices: Slicing = Slicing()
    window: Window = "auto"
    max_voxels: int = Field(2**30, ge=1)


def scale_for(window: Window, voxels: np.ndarray, *, modality: str | None) -> Scale:
    """Return the scale of a job's ``window``, see `windows.scale_for`."""
    plain: str | tuple[float, float] | windows.Window
    if isinstance(window, LevelAndWidth):
        plain = windows.Window(window.level, window.width)
    else:
        plain = (window.low, window.high) if isinstance(window, Range) else window
    return windows.scale_for(plain, voxels, modality=modality)


@dataclass(frozen=True, slots=True)
class Origin:
    """What all samples of a volume have in common; the fields are those of `samples.Sample`.

    Without ``examined`` a label is known where a slice holds it, and nowhere else.
    """

    source_file: str
    part: Mapping[str, int | str] = field(default_factory=dict)
    group: str | None = None
    modality: str | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)
    preprocessing: Mapping[str, str] = field(default_factory=dict)
    sha256: str = ""
    whole: tuple[Annotation, ...] = ()
    examined: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """For drops."""
        return "#".join([self.source_file, *(str(value) for value in self.part.values())])

    def sample(
        self,
        image: np.ndarray,
        done: Mapping[str, str],
        *,
        annotations: tuple[Annotation, ...] = (),
        part: Mapping[str, int | str] | None = None,
    ) -> Sample:
        """Return one image's sample.

        Args:
            image: uint8.
            done: preprocessing of this image.
            annotations: beside those of the whole.
            part: further pieces of it.
        """
        return Sample(
            image,
            self.source_file,
            self.whole + annotations,
            part={**self.part, **(part or {})},
            group=self.group,
            modality=self.modality,
            attributes=self.attributes,
            preprocessing={**self.preprocessing, **done},
            examined=self.examined or tuple(item.label for item in annotations),
            sha256=self.sha256,
        )


def samples(
    volume: Volume,
    origin: Origin,
    options: VolumeOptions,
    drops: Drops,
    *,
    scale: Scale | None = None,
) -> Iterator[Sample]:
    """Yield the volume's slices after the three-dimensional rules; one image in memory at a time.

    Args:
        volume: with its label maps.
        origin: of all of its samples; ``origin.whole`` is said of each image as a whole.
        options: of the source.
        drops: takes what is left out. Which slices a component that is left out reaches isn't known: its
            label is lost in all of them.
        scale: instead of what ``options.window`` says.
    """
    rules = resolve(options.clean)
    with drops.image(origin.where):
        if volume.layers and not volume.structures:
            raise Unusable(EMPTY)
        volume = _known(volume, options, drops, origin.where)
        cleaned = clean_volume(volume, rules, drops=drops, where=origin.where)
        if volume.structures and not cleaned.structures:
            return
        modality = options.modality or origin.modality
        scale = scale or scale_for(options.window, cleaned.voxels, modality=modality)
        for cut in slices(cleaned, scale, options.slices):
            with drops.image(f"{origin.where}#{cut.axis}{cut.index}"):
                height, width = cut.image.shape
                if cut.unclear:
                    raise Unusable(UNCLEAR)
                if min(height, width) < rules.min_edge_ratio * max(height, width):
                    share = f"{rules.min_edge_ratio:g} of the long one"
                    reason = f"slice with a short edge under {share}"
                    raise Unusable(reason, f"{width} x {height}")
                done = {"window": scale.text, "orientation": f"{PLANES[cut.axis]}, from RAS+"}
                if cut.stretched is not None:
                    done["pixels"] = f"square, {cut.stretched:g} mm"
                part: dict[str, int | str] = {"axis": cut.axis, "slice": cut.index}
                yield origin.sample(cut.image, done, annotations=cut.annotations, part=part)


def _known(volume: Volume, options: VolumeOptions, drops: Drops, where: str) -> Volume:
    """Return the volume with those structures that the job's ``labels`` know, if it has any."""
    names = {label.strip() for label in options.labels or {}}
    known = tuple(item for item in volume.structures if item.label.strip() in names)
    if options.labels is None or len(known) == len(volume.structures):
        return volume
    unknown = [item.label for item in volume.structures if item not in known]
    detail = f"{listed(unknown, at_most=200)} not in the job's `labels`"
    if not known:
        raise Unusable(UNKNOWN, detail)
    drops.add(UNKNOWN, where, detail, lost=unknown)
    return replace(volume, structures=known)
