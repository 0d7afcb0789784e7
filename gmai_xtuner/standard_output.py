"""The standard output belongs to the report, or the answers, that were asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


@contextmanager
def only_the_report_on_stdout() -> Iterator[TextIO]:
    """Standard output, in UTF-8; everything else that is printed goes to standard error.

    Importing DeepSpeed prints, and libraries written in C print past ``sys.stdout``; a script that reads
    a report or an answer must not read that.
    """
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(real), "w", encoding="utf-8") as stdout:
            yield stdout
    finally:
        sys.stdout.flush()
        os.dup2(real, 1)
        os.close(real)
