# SPDX-License-Identifier: Apache-2.0

"""DICOM and NIfTI as studies: orientation, windows, frames, series, and what is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from pydicom.data import get_testdata_file

from data_tools.preprocess.volumes import Volume as CorpusVolume
from data_tools.preprocess.volumes import take
from gmai_xtuner.core.imaging.dicom import is_dicom
from gmai_xtuner.core.imaging.volume_headers import is_nifti
from gmai_xtuner.core.imaging.volumes import load
from gmai_xtuner.core.imaging.windows import Window, window_for
from gmai_xtuner.demo.files import open_dicom, open_nifti
from gmai_xtuner.demo.i18n import PageError
from gmai_xtuner.demo.studies import Frames, Limits, View, Volume, first_view
from tests import medical_files as made

LIMITS = Limits()
WHOLE = Window(500, 1000)


def grey(study, view=None):
    return np.asarray(study.render(view or first_view(study)))[..., 0]


def one(path: Path):
    (study,) = open_dicom([path], LIMITS)
    if isinstance(study, PageError):
        raise study
    return study


# --- DICOM ---


def test_monochrome1_is_turned_round(tmp_path):
    values = np.array([[0, 500, 1000]], dtype=np.int16)
    normal = one(made.save(made.dicom(values, WindowCenter=500, WindowWidth=1001), tmp_path / "a"))
    turned = one(
        made.save(
            made.dicom(
                values, PhotometricInterpretation="MONOCHROME1", WindowCenter=500, WindowWidth=1001
            ),
            tmp_path / "b",
        )
    )
    assert grey(normal).tolist() == [[0, 128, 255]]
    assert grey(turned).tolist() == [[255, 127, 0]]
    assert grey(turned, View(window=WHOLE)).tolist() == [[255, 127, 0]]


def test_each_frame_is_shown_by_its_own_look_up_table(tmp_path):
    tables = ([4, 0, 8], [0, 255, 10, 20]), ([4, 0, 8], [20, 10, 255, 0])
    frames = [
        {
            "FrameVOILUTSequence": {
                "VOILUTSequence": {"LUTDescriptor": descriptor, "LUTData": levels}
            }
        }
        for descriptor, levels in tables
    ]
    data = made.enhanced(np.array([[[0, 1, 2, 3]]] * 2, dtype=np.int16), frames=frames)
    for group in data.PerFrameFunctionalGroupsSequence:
        table = group.FrameVOILUTSequence[0].VOILUTSequence[0]
        table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
    study = one(made.save(data, tmp_path / "a"))
    shown = [grey(study, View("frame", at)).tolist() for at in (0, 1)]
    assert shown == [[[0, 255, 10, 20]], [[20, 10, 255, 0]]]


def test_a_cine_keeps_its_colours():
    study = one(Path(get_testdata_file("examples_ybr_color.dcm", download=False)))
    assert (study.length("frame"), study.axes) == (30, ("frame",))
    pixels = np.asarray(study.render(View("frame", 29)))
    assert pixels.shape == (240, 320, 3)
    assert study.window is None


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("MR_truncated.dcm", "pixels"),
        ("JPEG-lossy.dcm", "pixels"),  # 12 bit, which no decoder of a free licence takes
        ("rtdose.dcm", "no_picture"),
        ("rtplan.dcm", "no_picture"),
        ("rtstruct.dcm", "no_picture"),
        ("test-SR.dcm", "no_picture"),
        ("waveform_ecg.dcm", "no_picture"),
    ],
)
def test_what_is_no_picture_is_said_in_words(name, key):
    path = Path(get_testdata_file(name, download=False))
    assert is_dicom(path)
    with pytest.raises(PageError) as error:
        one(path)
    assert error.value.key == key


def test_nothing_of_a_damaged_file_gets_out_but_a_message(tmp_path):
    whole = Path(get_testdata_file("CT_small.dcm", download=False)).read_bytes()
    draw = np.random.default_rng(0)
    outcomes = set()
    for number in range(60):
        damaged = bytearray(whole)
        for at in draw.integers(132, 6000, 8):
            damaged[at] = draw.integers(256)
        path = tmp_path / str(number)
        path.write_bytes(damaged)
        (study,) = open_dicom([path], LIMITS)
        if isinstance(study, PageError):
            outcomes.add(study.key)
        else:
            study.render(first_view(study))
            outcomes.add("opened")
    assert {"opened", "damaged"} <= outcomes


def test_a_series_becomes_a_volume_whatever_the_order(tmp_path):
    slices = made.series()
    paths = [made.save(slices[at], tmp_path / str(at)) for at in (3, 0, 4, 1, 2)]
    (study,) = open_dicom(paths, LIMITS)
    assert isinstance(study, Volume)
    assert study.axes == ("z", "y", "x")
    assert [study.length(axis) for axis in study.axes] == [5, 3, 4]
    assert study.spacing == (1, 1, 2)
    # axial: as a viewer shows it, patient's right on the left, anterior on top
    shown = grey(study, View("z", 4, window=WHOLE))
    assert shown.shape == (3, 4)
    assert shown[0, 0] == 255
    assert shown[1, 1] == 102  # 400 of 1000
    # coronal through the front: superior on top, 2 mm slices stretched to 1 mm
    front = grey(study, View("y", 2, window=WHOLE))
    assert front.shape == (10, 4)
    assert (front[:, 0] == 255).all()
    assert front[0, 3] == 102
    assert front[-1, 3] == 0


def test_an_uneven_series_is_shown_in_its_own_direction_only(tmp_path):
    paths = [
        made.save(data, tmp_path / str(at))
        for at, data in enumerate(made.series(places=(0, 2, 4, 9)))
    ]
    (study,) = open_dicom(paths, LIMITS)
    assert (study.axes, study.facts.notes) == (("z",), ("uneven",))


def test_slices_that_are_no_stack_are_pages(tmp_path):
    slices = made.series(places=(0, 0, 2))
    paths = [made.save(slices[at], tmp_path / str(at)) for at in (2, 0, 1)]
    (study,) = open_dicom(paths, LIMITS)
    assert isinstance(study, Frames)
    # by their number
    assert [int(grey(study, View("frame", at, window=WHOLE))[1, 1]) for at in range(3)] == [
        0,
        26,
        51,
    ]


def test_real_series(shared_data):
    root = shared_data / "dicom_samples" / "dicomdirtests"
    for folder, kind, axes in (
        ("98892001/CT5N", Volume, ("z", "y", "x")),
        ("77654033/CT2", Volume, ("z",)),
        ("98892003/MR700", Frames, ("frame",)),
    ):
        (study,) = open_dicom(sorted((root / folder).iterdir()), LIMITS)
        assert (type(study), study.axes) == (kind, axes)


def test_the_patient_is_nowhere(tmp_path):
    paths = [made.save(data, tmp_path / str(at)) for at, data in enumerate(made.series())]
    odd = made.dicom(np.zeros((2, 2), np.int16), Modality=made.PATIENT, series="9")
    studies = open_dicom([*paths, made.save(odd, tmp_path / "odd")], LIMITS)
    for study in studies:
        assert "Erika" not in repr(study.facts)
        assert "4711" not in repr(study.facts)
    assert [study.facts.modality for study in studies] == ["CT", ""]


def test_sizes_are_limited_before_pixels_are_decoded(tmp_path):
    path = made.save(made.dicom(np.zeros((4, 30, 40), np.int16)), tmp_path / "a")
    (study,) = open_dicom([path], Limits(pixels=1000))
    assert study.said("en") == (
        "40 × 30 pixels; at most 1,000 are taken. Shrink it, or cut out the part that matters."
    )
    (study,) = open_dicom([path], Limits(voxels=4000))
    assert study.key == "too_many_voxels"


# --- NIfTI ---


def marked() -> np.ndarray:
    """One voxel at the patient's right, in front, at the top, of 4 x 3 x 2 in RAS+."""
    values = np.zeros((4, 3, 2), dtype=np.int16)
    values[3, 2, 1] = 1000
    return values


RAS = np.diag([2.0, 2.0, 2.0, 1.0])
# the same voxels stored as LPS, and as superior, right, anterior
LPS = np.diag([-2.0, -2.0, 2.0, 1.0])
SRA = np.array([[0, 2, 0, 0], [0, 0, 2, 0], [2, 0, 0, 0], [0, 0, 0, 1.0]])


@pytest.mark.parametrize(
    ("values", "affine"),
    [(marked(), RAS), (marked()[::-1, ::-1], LPS), (marked().transpose(2, 0, 1), SRA)],
    ids=["RAS", "LPS", "SRA"],
)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_orientation(tmp_path, values, affine, suffix):
    path = made.nifti(tmp_path / f"v{suffix}", values, affine)
    plain = path.rename(tmp_path / "upload")
    assert is_nifti(plain)
    study = open_nifti(plain, LIMITS)
    axial = grey(study, View("z", 1, window=WHOLE))
    assert (axial.shape, axial[0, 0], axial.sum()) == ((3, 4), 255, 255)  # anterior, right
    coronal = grey(study, View("y", 2, window=WHOLE))
    assert (coronal.shape, coronal[0, 0], coronal.sum()) == ((2, 4), 255, 255)  # superior, right
    sagittal = grey(study, View("x", 3, window=WHOLE))
    assert (sagittal.shape, sagittal[0, 0], sagittal.sum()) == (
        (2, 3),
        255,
        255,
    )  # superior, anterior
    assert not grey(study, View("z", 0, window=WHOLE)).any()


def test_a_real_volume_looks_as_in_the_corpus(shared_data, tmp_path):
    original = next((shared_data / "spleen_ct_nifti").glob("sub-*/ct/*.nii.gz"))
    grid = load(original, max_voxels=10**8)
    scale = window_for("soft tissue", grid.array, modality="CT")
    study = open_nifti(Path(shutil.copy(original, tmp_path / "upload")), LIMITS)
    for axis in ("x", "y", "z"):
        index = study.length(axis) // 3
        theirs = take(CorpusVolume(grid.array, grid.affine), scale, axis, index, square_pixels=True)
        ours = grey(study, View(axis, index, window=Window(40, 400)))
        assert np.array_equal(ours, theirs.image)


def test_time_points_are_channels(tmp_path):
    values = np.zeros((4, 3, 2, 5), dtype=np.float32)
    values[..., 3] = 900
    study = open_nifti(made.nifti(tmp_path / "v.nii", values, RAS), LIMITS)
    assert study.channels == 5
    assert grey(study, View("z", 0, 3, WHOLE)).min() > 200
    assert grey(study, View("z", 0, 2, WHOLE)).max() == 0


def test_what_a_file_does_not_say_is_told(tmp_path):
    study = open_nifti(made.nifti(tmp_path / "v.nii", marked()), LIMITS)
    assert study.facts.notes == ("no_orientation",)
    holes = marked().astype(np.float32)
    holes[0, 0, 0] = np.nan
    study = open_nifti(made.nifti(tmp_path / "w.nii", holes, RAS), LIMITS)
    assert study.facts.notes == ("not_finite",)
    assert study.extent == (0, 1000)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        (np.zeros((2, 2, 2, 2, 3), np.int16), "nifti_axes"),
        (np.zeros((2, 2, 2), np.complex64), "nifti_type"),
        (np.zeros((2, 2, 2), [("R", "u1"), ("G", "u1"), ("B", "u1")]), "nifti_type"),
        (np.full((2, 2, 2), np.nan, np.float32), "damaged"),
    ],
)
def test_other_volumes_are_refused(tmp_path, values, key):
    path = made.nifti(tmp_path / "v.nii", values, RAS)
    with pytest.raises(PageError) as error:
        open_nifti(path, LIMITS)
    assert error.value.key == key


@pytest.mark.parametrize("spacing", [(0.001, 1000, 1), (1e-30, 1e20, 1)])
def test_a_spacing_that_asks_for_an_endless_picture_is_refused_when_it_is_opened(tmp_path, spacing):
    affine = np.diag([*spacing, 1.0])
    path = made.nifti(tmp_path / "v.nii", np.zeros((64, 64, 8), np.int16), affine)
    with pytest.raises(PageError) as error:
        open_nifti(path, LIMITS)
    assert error.value.key == "too_stretched"
    if spacing[0] == 0.001:
        assert "0.001 × 1000 × 1 mm" in error.value.said("en")
        assert "at most 50,000,000" in error.value.said("en")


def test_the_stretched_slice_is_what_is_limited(tmp_path):
    """8 x 6 x 4 voxels: sagittal 6 x 8, coronal 8 x 8, axial 8 x 6 pixels."""
    path = made.nifti(tmp_path / "v.nii", np.zeros((8, 6, 4), np.int16), np.diag([1, 1, 2, 1.0]))
    study = open_nifti(path, Limits(pixels=64))
    sizes = [study.render(View(axis, 1)).size for axis in ("x", "y", "z")]
    assert sizes == [(6, 8), (8, 8), (8, 6)]
    with pytest.raises(PageError, match="8 × 8"):
        open_nifti(path, Limits(pixels=63))


def test_a_series_with_such_a_spacing_is_refused(tmp_path):
    paths = []
    for number, data in enumerate(made.series()):
        data.PixelSpacing = [1000, 0.00001]
        paths.append(tmp_path / str(number))
        data.save_as(paths[-1], enforce_file_format=True)
    (study,) = open_dicom(paths, LIMITS)
    assert study.key == "too_stretched"


def test_a_cut_or_boasting_file_is_refused(tmp_path):
    whole = made.nifti(tmp_path / "v.nii", np.zeros((20, 20, 20), np.int16), RAS).read_bytes()
    cut = tmp_path / "cut"
    cut.write_bytes(whole[:1000])
    with pytest.raises(PageError) as error:
        open_nifti(cut, LIMITS)
    assert error.value.key == "damaged"
    boast = bytearray(whole)
    boast[42:48] = np.array([30000, 30000, 30000], "<i2").tobytes()  # dim[1..3]
    (tmp_path / "boast").write_bytes(boast)
    with pytest.raises(PageError) as error:
        open_nifti(tmp_path / "boast", LIMITS)
    assert error.value.key == "too_many_pixels"
    whole_path = made.nifti(tmp_path / "w.nii", marked(), RAS)
    with pytest.raises(PageError) as error:
        open_nifti(whole_path, Limits(voxels=23))
    assert error.value.key == "too_many_voxels"
