"""``python -m gmai_xtuner.tiny_bases DIR``: write tiny random base models, by ``examples/tiny_bases.py``."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(
        str(Path(__file__).parents[1] / "examples" / "tiny_bases.py"), run_name="__main__"
    )
