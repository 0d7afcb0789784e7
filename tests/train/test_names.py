# SPDX-License-Identifier: Apache-2.0

"""The names of configs in the plain ``xtuner`` commands, and the folder they have in a wheel."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import Config

import gmai_xtuner.train
import gmai_xtuner_autoload
from gmai_xtuner.core.mixture import load_mixture
from gmai_xtuner.train.names import CONFIGS, packaged_names

ROOT = Path(__file__).parents[2]


def test_every_config_has_a_name_and_one_with_gmai():
    names = packaged_names()
    for file in (*CONFIGS.glob("*.py"), *CONFIGS.glob("variants/*.py")):
        assert names[file.stem] == names[f"gmai_vl/{file.stem}"] == str(file)
    assert {"zero2", "zero3_offload", "gmai_vl_5_5m"} <= set(names)
    assert not {"model", "data", "runtime", "schedule"} & set(names)


@pytest.mark.parametrize(
    "name", ["stage1_shallow", "stage2_deep", "stage3_qlora_one_24gb", "small_data"]
)
def test_a_copied_config_is_the_same_config(name, tmp_path):
    copied = tmp_path / f"{name}_copy.py"
    copied.write_text(Path(packaged_names()[name]).read_text())
    here = Config.fromfile(copied, import_custom_modules=False)
    assert (
        here.to_dict()
        == Config.fromfile(packaged_names()[name], import_custom_modules=False).to_dict()
    )


def test_a_base_beside_the_config_goes_before_that_of_the_package(tmp_path):
    (tmp_path / "stage1_shallow.py").write_text("mine = 1\n")
    (tmp_path / "child.py").write_text('_base_ = ["stage1_shallow.py"]\n')
    assert Config.fromfile(tmp_path / "child.py").to_dict() == {"mine": 1}


def test_import_torch_survives_a_package_without_names(monkeypatch):
    monkeypatch.setitem(sys.modules, "gmai_xtuner.train.names", None)
    monkeypatch.delattr(gmai_xtuner.train, "names")
    gmai_xtuner_autoload.wait_for_xtuner()


@pytest.mark.slow
def test_the_installed_package_brings_its_configs_to_the_plain_xtuner_commands(tmp_path):
    package, empty = tmp_path / "package", tmp_path / "empty"
    package.mkdir()
    empty.mkdir()
    build = ["setup.py", "-q", "build", "--build-base", str(tmp_path / "build")]
    build += ["--build-lib", str(package), "egg_info", "--egg-base", str(package)]
    subprocess.run([sys.executable, *build], cwd=ROOT, check=True)
    folder = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "PYTHONPATH": str(package),
        "PATH": f"{folder}:{os.environ['PATH']}",
    }
    for name in [name for name in environment if name.startswith("GMAI_")]:
        del environment[name]

    def run(*command: str) -> str:
        options = {"cwd": empty, "env": environment, "text": True, "stdout": subprocess.PIPE}
        return subprocess.run(command, check=True, **options).stdout

    # The tool behind `xtuner copy-cfg`; then as that behind `xtuner train` reads the file.
    code = (
        "import runpy, sys\nsys.argv = ['copy-cfg', 'stage1_shallow', '.']\n"
        "runpy.run_module('xtuner.tools.copy_cfg', run_name='__main__')\n"
        "from mmengine.config import Config\nfrom xtuner.configs import cfgs_name_path as names\n"
        "import gmai_xtuner.tiny_bases\n"
        "config = Config.fromfile('stage1_shallow_copy.py', import_custom_modules=False)\n"
        "print(names['zero2'], config.train_dataloader.dataset.mixture, sep='\\n')"
    )
    zero2, mixture = run(sys.executable, "-c", code).splitlines()[-2:]
    assert Path(zero2).is_relative_to(package)
    assert Path(mixture).is_relative_to(package)
    assert len(load_mixture(Path(mixture), check_files=False).entries) == 47
    (empty / "mine.py").write_text("# of gmai\nmodel = dict(\n")
    run("xtuner", "train", "mine.py", "--deepspeed", "zero2")
    status = json.loads((empty / "work_dirs" / "mine" / "status.json").read_text())
    assert (status["state"], status["iteration"]) == ("failed", 0)
    assert "'(' was never closed" in status["reason"]
    assert status["reason"].endswith("(mine.py, line 2)")
