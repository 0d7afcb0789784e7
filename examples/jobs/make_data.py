# SPDX-License-Identifier: Apache-2.0

"""Small data sets in the format of every reader, from images that come with installed packages.

    python examples/jobs/make_data.py [FOLDER]

Nothing is downloaded. The images are real tissue; what is said of them is computed here and true by that:
where a section is stained, where a volume holds more than background. It is not a physician's finding.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import av
import nibabel
import nrrd
import numpy as np
import pydicom
import skimage
import tifffile
from PIL import Image
from pydicom.pixels import pixel_array
from scipy import ndimage
from skimage.color import rgb2hed
from skimage.filters import gaussian

FOLDER = Path(__file__).resolve().parents[2] / "work_dirs" / "example_data"
TILE = 128  # pixels of a tile of the section
STAINED = 0.054  # of the smoothed DAB channel; Otsu's threshold of the whole section
SMALLEST = 400  # pixels of a stained region that is written down
HEAD = 0.12  # of the 99.5th percentile: more is the head, less is air


@dataclass(frozen=True, slots=True)
class Tile:
    """``pixels``: uint8 ``[H, W, 3]``; ``regions``: int ``[H, W]``, 0 and the number of a stained region."""

    name: str
    pixels: np.ndarray
    regions: np.ndarray

    def boxes(self) -> list[tuple[int, int, int, int]]:
        """x1, y1, x2, y2 of each region, half-open."""
        found = ndimage.find_objects(self.regions)
        return [(x.start, y.start, x.stop, y.stop) for y, x in found]


def section() -> np.ndarray:
    """scikit-image's ``ihc.png``: colonic glands, FHL2 shown in brown by DAB, nuclei in blue."""
    with Image.open(Path(skimage.__file__).parent / "data/ihc.png") as picture:
        return np.asarray(picture.convert("RGB"))


def stain(pixels: np.ndarray) -> np.ndarray:
    """bool ``[H, W]``: where the section is brown."""
    return np.asarray(gaussian(rgb2hed(pixels)[:, :, 2], 4) > STAINED)


def tiles() -> Iterator[Tile]:
    """The section in sixteen tiles."""
    pixels = section()
    brown = stain(pixels)
    for y in range(0, pixels.shape[0], TILE):
        for x in range(0, pixels.shape[1], TILE):
            part = np.s_[y : y + TILE, x : x + TILE]
            numbers, count = ndimage.label(brown[part], structure=np.ones((3, 3)))
            sizes = ndimage.sum_labels(numbers > 0, numbers, range(1, count + 1))
            kept = [n for n, size in enumerate(np.atleast_1d(sizes), 1) if size >= SMALLEST]
            regions = np.zeros_like(numbers)
            for new, old in enumerate(kept, 1):
                regions[numbers == old] = new
            yield Tile(f"ihc_{x:03d}_{y:03d}", pixels[part], regions)


def write_image_folder(folder: Path) -> None:
    """A folder for each class; a tile that is neither one nor the other is left out."""
    for tile in tiles():
        share = (tile.regions > 0).mean()
        if share > 0.6 or share < 0.2:
            _save(tile, folder / ("stained" if share > 0.6 else "unstained"))


def write_coco(folder: Path) -> None:
    """Regions as run lengths, counted down the columns from background, as COCO does."""
    images, annotations = [], []
    for number, tile in enumerate(tiles(), 1):
        _save(tile, folder / "images")
        size = {"width": TILE, "height": TILE}
        images.append({"id": number, "file_name": f"images/{tile.name}.png", **size})
        for region, (x1, y1, x2, y2) in enumerate(tile.boxes(), 1):
            flat = (tile.regions == region).T.ravel()
            changes = np.flatnonzero(np.diff(flat)) + 1
            runs = np.diff([0, *changes, len(flat)]).tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": 7,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": int(flat.sum()),
                    "iscrowd": 0,
                    "segmentation": {
                        "size": [TILE, TILE],
                        "counts": [0, *runs] if flat[0] else runs,
                    },
                }
            )
    categories = [{"id": 7, "name": "stained tissue"}]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(document), encoding="utf-8")


def write_voc(folder: Path) -> None:
    """One XML a tile, corners as edges."""
    (folder / "Annotations").mkdir(parents=True, exist_ok=True)
    for tile in tiles():
        _save(tile, folder / "JPEGImages")
        root = ElementTree.Element("annotation")
        ElementTree.SubElement(root, "filename").text = f"{tile.name}.png"
        size = ElementTree.SubElement(root, "size")
        for key, value in (("width", TILE), ("height", TILE), ("depth", 3)):
            ElementTree.SubElement(size, key).text = str(value)
        for box in tile.boxes():
            found = ElementTree.SubElement(root, "object")
            ElementTree.SubElement(found, "name").text = "stained tissue"
            corners = ElementTree.SubElement(found, "bndbox")
            for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True):
                ElementTree.SubElement(corners, key).text = str(value)
        ElementTree.ElementTree(root).write(folder / "Annotations" / f"{tile.name}.xml")


def write_yolo(folder: Path) -> None:
    """One text a tile: class, middle and size as fractions."""
    (folder / "labels").mkdir(parents=True, exist_ok=True)
    for tile in tiles():
        _save(tile, folder / "images")
        lines = [
            f"0 {(x1 + x2) / 2 / TILE:.6f} {(y1 + y2) / 2 / TILE:.6f} "
            f"{(x2 - x1) / TILE:.6f} {(y2 - y1) / TILE:.6f}\n"
            for x1, y1, x2, y2 in tile.boxes()
        ]
        (folder / "labels" / f"{tile.name}.txt").write_text("".join(lines), encoding="utf-8")
    (folder / "data.yaml").write_text("names:\n  0: stained tissue\n", encoding="utf-8")


def write_masks(folder: Path) -> None:
    """A grey image beside each tile: 255 where it is stained."""
    (folder / "masks").mkdir(parents=True, exist_ok=True)
    for tile in tiles():
        _save(tile, folder / "images")
        mask = np.where(tile.regions > 0, 255, 0).astype(np.uint8)
        Image.fromarray(mask).save(folder / "masks" / f"{tile.name}.png")


def write_labelme(folder: Path) -> None:
    """One JSON beside each tile, with a rectangle for each region."""
    for tile in tiles():
        _save(tile, folder)
        shapes = [
            {"label": "stained tissue", "points": [[x1, y1], [x2, y2]], "shape_type": "rectangle"}
            for x1, y1, x2, y2 in tile.boxes()
        ]
        content = {
            "version": "5.5.0",
            "flags": {},
            "shapes": shapes,
            "imagePath": f"{tile.name}.png",
            "imageData": None,
            "imageHeight": TILE,
            "imageWidth": TILE,
        }
        (folder / f"{tile.name}.json").write_text(json.dumps(content), encoding="utf-8")


def write_arrays(folder: Path) -> None:
    """One NPZ a tile with the names of MedSAM: ``imgs`` and ``gts``, 1 where it is stained."""
    folder.mkdir(parents=True, exist_ok=True)
    for tile in tiles():
        mask = (tile.regions > 0).astype(np.uint8)
        np.savez(folder / f"{tile.name}.npz", imgs=tile.pixels, gts=mask)


def brain() -> tuple[nibabel.Nifti1Image, np.ndarray]:
    """nibabel's ``example4d.nii.gz``, MR of a head, two time points; and where the head is."""
    path = Path(nibabel.__file__).parent / "tests/data/example4d.nii.gz"
    image = nibabel.Nifti1Image.from_filename(path)
    values = np.asarray(image.dataobj, dtype=np.float32)
    top = np.percentile(values[values > 0], 99.5)
    head = ndimage.binary_fill_holes(gaussian(values[..., 0], 1) > HEAD * top)
    numbers, _ = ndimage.label(head)
    largest = np.bincount(numbers.ravel())[1:].argmax() + 1
    return image, (numbers == largest).astype(np.uint8)


def _write_case(image: Path, label: Path, time: int) -> None:
    volume, head = brain()
    values = np.asarray(volume.dataobj[..., time], dtype=np.float32)
    for path, data in ((image, values), (label, head)):
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(data, volume.affine), path)


def write_volume(folder: Path) -> None:
    """A volume and its label map."""
    _write_case(folder / "head.nii.gz", folder / "head_label.nii.gz", 0)


def write_dicom(folder: Path) -> None:
    """The volume as a DICOM series, and its label map as 3D Slicer saves one."""
    image, head = brain()
    values = np.clip(np.asarray(image.dataobj[..., 0]), 0, 2**15 - 1).astype(np.uint16)
    lps = np.diag([-1, -1, 1, 1]) @ image.affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    (folder / "head" / "mr").mkdir(parents=True, exist_ok=True)
    for number in range(values.shape[2]):
        data = pydicom.Dataset()
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        data.SOPClassUID, data.Modality = pydicom.uid.MRImageStorage, "MR"
        data.SOPInstanceUID = f"1.2.826.0.1.3680043.8.498.{number + 1}"
        data.StudyInstanceUID = data.SeriesInstanceUID = "1.2.826.0.1.3680043.8.498"
        data.ImageOrientationPatient = [f"{x:.10g}" for x in (lps[:3, :2] / spacing[:2]).T.ravel()]
        data.ImagePositionPatient = [f"{x:.10g}" for x in (lps @ (0, 0, number, 1))[:3]]
        data.PixelSpacing = [f"{x:.10g}" for x in spacing[[1, 0]]]
        data.Columns, data.Rows = values.shape[:2]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
        data.PixelRepresentation, data.InstanceNumber = 0, number + 1
        data.PixelData = np.ascontiguousarray(values[..., number].T).tobytes()
        path = folder / "head" / "mr" / f"{number:03d}.dcm"
        data.save_as(path, enforce_file_format=True)
    header = {"space": "left-posterior-superior", "space directions": lps[:3, :3].T}
    header |= {"space origin": lps[:3, 3], "Segment0_Name": "head", "Segment0_LabelValue": "1"}
    nrrd.write(str(folder / "head" / "head.seg.nrrd"), head, header | {"Segment0_Layer": "0"})


def write_decathlon(folder: Path) -> None:
    """The layout of the Medical Segmentation Decathlon."""
    names = ["head_000.nii.gz", "head_001.nii.gz"]
    for time, name in enumerate(names):
        _write_case(folder / "imagesTr" / name, folder / "labelsTr" / name, time)
    document = {
        "name": "Head",
        "description": "MR of a head at two times",
        "licence": "see nibabel's COPYING",
        "tensorImageSize": "3D",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "head"},
        "numTraining": 2,
        "numTest": 0,
        "training": [
            {"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in names
        ],
        "test": [],
    }
    (folder / "dataset.json").write_text(json.dumps(document, indent=2), encoding="utf-8")


def write_nnunet(folder: Path) -> None:
    """The layout of nnU-Net's raw data, version 2."""
    for time in range(2):
        case = f"head_{time:03d}"
        _write_case(
            folder / "imagesTr" / f"{case}_0000.nii.gz",
            folder / "labelsTr" / f"{case}.nii.gz",
            time,
        )
    document = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "head": 1},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(document, indent=2), encoding="utf-8")


def write_video(folder: Path) -> None:
    """pydicom's ``examples_ybr_color.dcm``: an echocardiogram, 30 frames, as H.264 in MP4."""
    source = Path(pydicom.__file__).parent / "data/test_files/examples_ybr_color.dcm"
    frames = pixel_array(source)
    path = folder / "echocardiogram" / "clip.mp4"
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "18"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_slide(folder: Path) -> None:
    """The section as a pyramid of tiles, and a label map: 1 where it is stained."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = section()
    with tifffile.TiffWriter(folder / "colon.tif") as tiff:
        tiff.write(pixels, tile=(128, 128), subifds=1, photometric="rgb", compression="deflate")
        half = np.asarray(Image.fromarray(pixels).reduce(2))
        tiff.write(half, tile=(128, 128), subfiletype=1, photometric="rgb", compression="deflate")
    mask = stain(pixels).astype(np.uint8)
    tifffile.imwrite(folder / "colon_mask.tif", mask, tile=(128, 128), compression="deflate")


WRITERS = {
    "image_folder": write_image_folder,
    "coco": write_coco,
    "voc": write_voc,
    "yolo": write_yolo,
    "masks": write_masks,
    "labelme": write_labelme,
    "arrays": write_arrays,
    "volume": write_volume,
    "dicom": write_dicom,
    "decathlon": write_decathlon,
    "nnunet": write_nnunet,
    "video": write_video,
    "slide": write_slide,
}


def main(arguments: list[str] | None = None) -> None:
    """Write every set below the folder that is named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "folder", type=Path, nargs="?", default=FOLDER, help=f"default {FOLDER.name}"
    )
    folder = parser.parse_args(arguments).folder
    for name, write in WRITERS.items():
        write(folder / name)
        count = sum(path.is_file() for path in (folder / name).rglob("*"))
        print(f"{folder / name}: {count} files")


def _save(tile: Tile, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(tile.pixels).save(folder / f"{tile.name}.png")


if __name__ == "__main__":
    main()
