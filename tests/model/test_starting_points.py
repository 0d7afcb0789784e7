# SPDX-License-Identifier: Apache-2.0

"""An export in xtuner's layout is checked as a LLaVA is before a stage starts from its projector."""

import json
import shutil

import pytest

from gmai_xtuner.checkpoint.layouts import read_export
from gmai_xtuner.core.errors import ModelLoadError
from gmai_xtuner.loading import load_model
from tests.model.exporting import export, stage_config, trained_model
from tests.tables import tables

TABLES = tables(__file__)


@pytest.fixture(scope="module")
def stage1(tiny_bases, tmp_path_factory):
    """(stage 1's model, its export in xtuner's layout)."""
    cfg = stage_config(tiny_bases, "stage1_shallow")
    model = trained_model(cfg)
    folder = tmp_path_factory.mktemp("stage1") / "export"
    return model, export(model, cfg, folder, save_format="xtuner")


@pytest.mark.parametrize(("file", "change", "match"), TABLES["another_layer_or_form_is_refused"])
def test_another_layer_or_form_is_refused(stage1, file, change, match):
    model, folder = stage1
    file = folder / file
    before = file.read_text(encoding="utf-8")
    file.write_text(json.dumps(json.loads(before) | change), encoding="utf-8")
    try:
        with pytest.raises(ModelLoadError, match=match):
            read_export(folder, model)
    finally:
        file.write_text(before, encoding="utf-8")


def test_xtuners_own_config_says_the_layer_and_silence_is_no_contradiction(stage1):
    model, folder = stage1
    (folder / "gmai_vl.json").rename(folder / "kept.json")
    try:
        read_export(folder, model)
        (folder / "xtuner_config.py").write_text("model = dict(visual_select_layer=-1)\n")
        with pytest.raises(ModelLoadError, match=r"Set model\.visual_select_layer=-1"):
            read_export(folder, model)
    finally:
        (folder / "xtuner_config.py").unlink(missing_ok=True)
        (folder / "kept.json").rename(folder / "gmai_vl.json")


def test_all_bases_that_are_missing_are_named_at_once_for_shell_and_python(
    stage1, tiny_bases, tmp_path
):
    shutil.copytree(stage1[1] / "projector", tmp_path / "projector")
    both = "no language model and no vision tower: .*--llm BASE --vision BASE .*llm=.*, vision="
    with pytest.raises(ModelLoadError, match=both):
        load_model(tmp_path)
    with pytest.raises(ModelLoadError, match=r"no vision tower: .* it\. .*: --vision BASE in the"):
        load_model(tmp_path, llm=str(tiny_bases / "llm"))
