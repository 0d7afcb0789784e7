# SPDX-License-Identifier: Apache-2.0

"""Mutated files of every format: documented errors alone, at small cost; `make fuzz` tries more."""

import logging
from pathlib import Path

from tests.fuzz.__main__ import fuzz
from tests.fuzz.targets import targets

CASES = 30


def test_each_reader_refuses_mutated_files_with_a_documented_error(
    tmp_path: Path, subtests
) -> None:
    logging.disable(logging.CRITICAL)
    try:
        for which, target in targets(tmp_path).items():
            with subtests.test(which):
                fuzz(target, tmp_path / "cases" / which.replace(" ", "_"), cases=CASES, start=None)
    finally:
        logging.disable(logging.NOTSET)
