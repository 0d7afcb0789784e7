# SPDX-License-Identifier: Apache-2.0

"""What the commands share: exit status, every error as one message, progress as a line on stderr."""

from __future__ import annotations

import argparse
import math
import sqlite3
import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from gmai_xtuner.core.errors import GMAIError

DONE, FAILED, INTERRUPTED = 0, 1, 130


def number(
    kind: type[int] | type[float], low: float, high: float = math.inf
) -> Callable[[str], Any]:
    """Return the type of an option that takes a number from ``low`` to ``high``."""

    def read(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            bounds = f"{low} or more" if high == math.inf else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"expected {bounds}, got {value}")
        return value

    return read


def exit_status(run: Callable[[], int]) -> int:
    """Return what ``run`` returns, `FAILED` after an error, which is printed, or `INTERRUPTED`."""
    try:
        return run()
    except GMAIError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where it was", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # of `| head`
        sys.stderr.close()
        return FAILED
    except (OSError, sqlite3.Error) as error:
        print(
            f"error: {error}. What was done is kept: make room or check the rights, and run it again",
            file=sys.stderr,
        )
        return FAILED


class Bar:
    """Shows one bar a stage, with the cost if there is one; in a log file, a line in ten seconds."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bar: tqdm[Any] | None = None
        self._sums: dict[str, float] = {}

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def note(self, text: str) -> None:
        """Say something between two stages."""
        self._close()
        if not self._quiet:
            print(text, file=sys.stderr)

    def stage(self, name: str, *, total: int | None = None) -> None:
        """Begin a stage of ``total`` steps; None: unknown."""
        self._close()
        self._sums = {}
        interval = 0.2 if sys.stderr.isatty() else 10.0
        if not self._quiet:
            self._bar = tqdm(
                desc=name, total=total, unit="", mininterval=interval, dynamic_ncols=True
            )

    def advance(self, count: int = 1, **facts: Any) -> None:
        """Count steps that are done. Facts are summed up; ``dollars`` come with what the stage will cost."""
        bar = self._bar
        if bar is None:
            return
        for name, value in facts.items():
            self._sums[name] = self._sums.get(name, 0) + value
        if self._sums:
            bar.set_postfix_str(self._facts(bar.n + count), refresh=False)
        bar.update(count)

    def _facts(self, done: float) -> str:
        shown = []
        for name, value in self._sums.items():
            if name == "dollars":
                total = self._bar.total if self._bar is not None else None
                of = f" of about ${value / done * total:.2f}" if total and done else ""
                shown.append(f"${value:.2f}{of}")
            else:
                shown.append(f"{value:,} {name}")
        return ", ".join(shown)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
