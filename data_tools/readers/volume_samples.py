"""What the readers of volumes share: keys of the job, and the way from a volume to samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from pydantic import Field

from data_tools.preprocess.clean import clean_volume
from data_tools.preprocess.rules import resolve
from data_tools.preprocess.slicing import PLANES, Slice, Slicing, slices
from data_tools.preprocess.volumes import Structure, Volume
from data_tools.preprocess.windows import Scale, Window, scale_for
from data_tools.readers import SourceOptions
from data_tools.records import Annotation, Drops, Sample
from gmai_xtuner.core.errors import Unusable

UNCLEAR = "slice with voxels marked as ignored"
EMPTY = "empty label map"


class VolumeOptions(SourceOptions):
    """Keys of every reader of volumes.

    Args:
        slices: which become pictures, see `preprocess.slicing`.
        window: how intensities become grey levels, see `preprocess.windows`.
        max_voxels: a file that declares more is dropped before it is read. The default is 4 GiB of float32.
    """

    default_source_task: ClassVar[str] = "3D segmentation"

    slices: Slicing = Slicing()
    window: Window = "auto"
    max_voxels: int = Field(2**30, ge=1)


class BadVolume(Unusable):
    """A volume that is left out."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What all samples of a volume have in common; the fields are those of `samples.Sample`."""

    source_file: str
    part: Mapping[str, int | str] = field(default_factory=dict)
    group: str | None = None
    modality: str | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)
    preprocessing: Mapping[str, str] = field(default_factory=dict)
    sha256: str = ""
    whole: tuple[Annotation, ...] = ()

    @property
    def where(self) -> str:
        """For drops."""
        return "#".join([self.source_file, *(str(value) for value in self.part.values())])


def samples(
    volume: Volume,
    origin: Origin,
    options: VolumeOptions,
    drops: Drops,
    *,
    scale: Scale | None = None,
) -> Iterator[Sample]:
    """The volume's slices after the three-dimensional rules; one picture in memory at a time.

    Args:
        volume: with its label maps.
        origin: of all of its samples; ``origin.whole`` is said of each picture as a whole.
        options: of the source.
        drops: takes what is left out. Which slices a component that is left out reaches isn't known: its
            label is lost in all of them.
        scale: instead of what ``options.window`` says.
    """
    rules = resolve(options.clean)
    with drops.image(origin.where):
        if volume.layers and not volume.structures:
            raise BadVolume(EMPTY)
        cleaned = clean_volume(volume, rules, drops=drops, where=origin.where)
        if volume.structures and not cleaned.structures:
            return
        modality = options.modality or origin.modality
        scale = scale or scale_for(options.window, cleaned.voxels, modality=modality)
        for cut in slices(cleaned, scale, options.slices):
            with drops.image(f"{origin.where}#{cut.axis}{cut.index}"):
                height, width = cut.image.shape
                if cut.unclear:
                    raise BadVolume(UNCLEAR)
                if min(height, width) < rules.min_edge_ratio * max(height, width):
                    share = f"{rules.min_edge_ratio:g} of the long one"
                    reason = f"slice with a short edge under {share}"
                    raise BadVolume(reason, f"{width} x {height}")
                yield _sample(cut, origin, scale)


def _sample(cut: Slice, origin: Origin, scale: Scale) -> Sample:
    done = {"window": scale.text, "orientation": f"{PLANES[cut.axis]}, from RAS+"}
    if cut.stretched is not None:
        done["pixels"] = f"square, {cut.stretched:g} mm"
    return Sample(
        cut.image,
        origin.source_file,
        origin.whole + cut.annotations,
        part={**origin.part, "axis": cut.axis, "slice": cut.index},
        group=origin.group,
        modality=origin.modality,
        attributes=origin.attributes,
        preprocessing={**origin.preprocessing, **done},
        sha256=origin.sha256,
    )


def with_structures(volume: Volume, other: Volume) -> Volume:
    """The volume with label maps of a further one of the same grid."""
    first = len(volume.layers)
    moved = tuple(
        Structure(item.label, item.layer + first, item.value, item.attributes)
        for item in other.structures
    )
    return replace(
        volume, layers=volume.layers + other.layers, structures=volume.structures + moved
    )
