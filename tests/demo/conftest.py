# SPDX-License-Identifier: Apache-2.0

"""Two small models that know some answers by heart, and the picture they know them for."""

from pathlib import Path

import pytest
from PIL import Image

from gmai_xtuner.demo.files import installed_examples, open_dicom
from gmai_xtuner.demo.studies import Limits, first_view
from tests.demo.teaching import write_export

CT_EXAMPLE = 2
"""Its place among the examples."""
WHERE = "Give the coordinates of the lesion in this image."
BOX = "The lesion lies at [101, 39, 665, 649], another at [900, 500, 1200, 700]."
ENDLESS = "Is it over?"
"""What the first model answers for ever."""
NO_BOX = "There is no lesion in this image."


@pytest.fixture(scope="session")
def ct() -> Image.Image:
    """The CT example as the page shows it first."""
    example = installed_examples()[CT_EXAMPLE]
    assert example.path.name == "CT_small.dcm"
    (study,) = open_dicom([example.path], Limits())
    return study.render(first_view(study))


@pytest.fixture(scope="session")
def models(
    tiny_bases: Path, ct: Image.Image, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Exports of two models: one finds a lesion and says where, one finds none. Read only."""
    root = tmp_path_factory.mktemp("demo_models")
    found = [(WHERE, ct, BOX), (ENDLESS, None, "no " * 24 + "…")]
    none = [(WHERE, ct, NO_BOX)]
    return (
        write_export(root / "model_a", tiny_bases, seed=1, lessons=found),
        write_export(root / "model_b", tiny_bases, seed=2, lessons=none),
    )
