# SPDX-License-Identifier: Apache-2.0

"""A second environment with the newest transformers, which costs seconds and not gigabytes.

xtuner 0.2.0 pins transformers 4.48, but what we export must also load in the newest one. The packages of
``tests/newest_transformers.txt`` go into ``.venv-newest/env``; everything else (torch, torchvision, numpy,
...) is the main environment's, whose ``site-packages`` a ``.pth`` file appends *after* its own. Of this
project nothing is there: an editable install is a ``.pth`` file of the main environment, which is not
read again. In tests::

    from tests.newest_transformers import newest_python, newest_variables

    subprocess.run([newest_python(), "-c", "import transformers"], env=newest_variables(), ...)
    subprocess.run([newest_python().parent / "transformers", "serve", ...], env=newest_variables(), ...)

``make env-newest``, which ``make test`` calls first, is ``python -m tests.newest_transformers``: it makes
the environment while there is a network, so that the tests need none. They make it themselves otherwise.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".venv-newest"
REQUIREMENTS = Path(__file__).with_suffix(".txt")
# Read after site-packages itself: what is installed there comes first on the path.
SHARED = "packages-of-the-main-environment.pth"


def newest_python() -> Path:
    """The interpreter of the environment, which is made if it is not there or made of something else.

    Processes that ask at the same time wait for the one that makes it.

    Raises:
        RuntimeError: it can't be made; with what pip said.
    """
    FOLDER.mkdir(exist_ok=True)
    python = FOLDER / "env" / "bin" / "python"
    stamp = FOLDER / "env" / "made-of"
    with FileLock(FOLDER / "lock"):
        if not stamp.is_file() or stamp.read_text() != _ingredients():
            shutil.rmtree(FOLDER / "env", ignore_errors=True)
            _make(python)
            stamp.write_text(_ingredients())
    return python


def newest_variables(**further: str | Path) -> dict[str, str]:
    """Variables for a process of it: no path of ours, no hub, one thread, and what ``further`` says."""
    own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # It sees what the main environment has installed but this project, whose entry point torch would load.
    own["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**own, **quiet, **{key: str(value) for key, value in further.items()}}


def _ingredients() -> str:
    pins = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    return f"{sys.version_info[:3]}\n{pins}\n" + "\n".join(_main_packages())


def _main_packages() -> list[str]:
    paths = sysconfig.get_paths()
    return list(dict.fromkeys((paths["purelib"], paths["platlib"])))


def _make(python: Path) -> None:
    _run(sys.executable, "-m", "venv", "--without-pip", FOLDER / "env")
    site = Path(
        _run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip()
    )
    # Without dependencies and whatever is installed already: pip must not touch the main environment.
    _run(
        sys.executable, "-m", "pip", "--python", python, "install", "--quiet",
        "--disable-pip-version-check", "--no-deps", "--ignore-installed", "-r", REQUIREMENTS,
    )  # fmt: skip
    (site / SHARED).write_text("\n".join(_main_packages()) + "\n")
    wanted = next(
        line.split("==")[1].strip()
        for line in REQUIREMENTS.read_text().splitlines()
        if line.startswith("transformers==")
    )
    found = _run(python, "-c", "import transformers; print(transformers.__version__)").split()[-1]
    if found != wanted:
        raise RuntimeError(f"{python} has transformers {found}, not {wanted}")


def _run(*command: str | Path) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=FOLDER,  # not the repository's root, where `import gmai_xtuner` would find our code
        env=newest_variables(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(
            f"the environment of the newest transformers can't be made; {' '.join(map(str, command))} "
            f"said:\n{done.stdout}{done.stderr}"
        )
    return done.stdout


if __name__ == "__main__":
    print(newest_python())
