from __future__ import annotations

from pathlib import Path

import pytest

from tests.exports import write_export


@pytest.fixture(scope="session")
def export(tiny_bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny export that tells its prompts apart. Read only."""
    return write_export(tiny_bases, tmp_path_factory.mktemp("evaluated") / "tiny-export")
