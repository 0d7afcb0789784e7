# SPDX-License-Identifier: Apache-2.0

"""One screen of a run: a bar in a terminal, a line now and then elsewhere, made of what ``xtuner`` prints."""

from __future__ import annotations

import re
import sys
import time

from tqdm import tqdm

LINE_EVERY = 10.0
"""Seconds between two lines of progress where there is no terminal."""

_ENTRY = re.compile(r"(?:^|  )[\d/]+ [\d:]+ - mmengine - (\w+) - (.*)")
_PROGRESS = re.compile(r"Iter\(train\)\s*\[\s*(\d+)/(\d+)\]")
_SHOWN = re.compile(
    r"Iter\(val\)|Sample answer |No sample answers|Saving checkpoint|\d+ micro-batches and|  held out for"
)
_KNOWN_NOISE = re.compile(r"Failed to search registry|\"?(FileClient|HardDiskBackend)\"? ")
_VALUES = (("loss", "loss"), ("lr", "rate"), ("tokens_per_second", "tokens/s"), ("eta", "eta"))
_ERRORS = re.compile(r"(?:error: |(?:[\w]+\.)*\w*(?:Error|Exception)\b|KeyboardInterrupt)")


class Screen:
    """Takes each line that a trainer prints and shows what matters: progress, warnings, answers, validation.

    Args:
        title: of the run.
    """

    def __init__(self, title: str) -> None:
        self.error = ""
        """The last line that named an error."""
        self._title = title
        self._bar: tqdm | None = None
        self._shown_at = 0.0
        self._shows_rest = False

    def take(self, line: str) -> None:
        """Take one line, without its end."""
        if _ERRORS.match(line):
            self.error = line
        entry = _ENTRY.match(line)
        if entry is None:
            self._shows_rest = self._shows_rest and line.startswith("  ")
            if self._shows_rest:
                self.say(line)
            return
        level, text = entry.groups()
        progress = _PROGRESS.match(text)
        if progress:
            self._progress(int(progress[1]), int(progress[2]), text)
        warns = level in ("WARNING", "ERROR") and not _KNOWN_NOISE.match(text)
        self._shows_rest = warns or bool(_SHOWN.match(text))
        if self._shows_rest:
            self.say(f"{level}: {text}" if warns else re.sub(r"\s{2,}", "  ", text.strip()))

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()

    def _progress(self, iteration: int, total: int, text: str) -> None:
        found = dict(re.findall(r"([\w/]+): ((?:\d+ days?, )?\S+)", text))
        shown = "  ".join(f"{title} {found[name]}" for name, title in _VALUES if name in found)
        if sys.stdout.isatty():
            if self._bar is None:
                layout = "{desc} {bar:20} {n_fmt}/{total_fmt}{postfix}"
                self._bar = tqdm(total=total, desc=self._title, bar_format=layout, file=sys.stdout)
            self._bar.update(iteration - self._bar.n)
            self._bar.set_postfix_str(shown)
        elif time.monotonic() - self._shown_at >= LINE_EVERY or iteration == total:
            self._shown_at = time.monotonic()
            self.say(f"{self._title}  {iteration}/{total}  {shown}")
