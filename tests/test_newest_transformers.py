# SPDX-License-Identifier: Apache-2.0

"""The second environment: the pinned transformers, the main environment's torch, none of our code."""

from __future__ import annotations

import json
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from tests.newest_transformers import REQUIREMENTS, newest_python, newest_variables

LOOK = """
import importlib.util, json, tokenizers, torch, transformers
print(json.dumps({
    "transformers": transformers.__version__, "tokenizers": tokenizers.__version__,
    "torch": torch.__file__, "ours": importlib.util.find_spec("gmai_xtuner") is not None,
}))
"""


def test_it_is_newer_shares_torch_and_has_none_of_our_code(tmp_path):
    done = subprocess.run(
        [newest_python(), "-c", LOOK],
        cwd=tmp_path,
        env=newest_variables(),
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    pins = dict(
        line.split("==") for line in REQUIREMENTS.read_text().splitlines() if "==" in line[:40]
    )
    assert found == {
        "transformers": pins["transformers"],
        "tokenizers": pins["tokenizers"],
        "torch": torch.__file__,
        "ours": False,
    }
    assert int(found["transformers"].split(".")[0]) >= 5
    assert version("transformers") == "4.48.0", "the main environment must stay as it was"
    assert (newest_python().parent / "transformers").is_file()
    assert Path(found["torch"]).is_file()
