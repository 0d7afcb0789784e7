# SPDX-License-Identifier: Apache-2.0

"""A worker process that dies, hangs or takes too much costs its own call, and no other."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest

from gmai_xtuner.core.errors import Unusable
from gmai_xtuner.core.imaging.bounded import DIED, FAILED, run_bounded


def double(values):
    return values * 2


def where():
    return os.getpid()


def abort():
    os.abort()


def spin():
    while True:
        pass


def allocate():
    return len(bytearray(2**29))


def refuse():
    raise Unusable("a reason", "a detail")


def panic():
    raise SystemExit("pyo3 panics are no Exception either")


def test_results_come_from_another_process_that_is_used_again():
    assert run_bounded(double, np.arange(3)).tolist() == [0, 2, 4]
    first = run_bounded(where)
    assert first != os.getpid()
    assert run_bounded(where) == first


@pytest.mark.parametrize(
    ("function", "limits", "reason"),
    [
        (abort, {}, DIED),
        (spin, {"seconds": 1}, DIED),
        (allocate, {"memory": 2**28}, FAILED),
        (refuse, {}, "a reason"),
        (panic, {}, FAILED),
    ],
)
def test_a_bad_call_has_a_reason_and_the_next_one_is_answered(function, limits, reason):
    started = time.monotonic()
    with pytest.raises(Unusable) as caught:
        run_bounded(function, **limits)
    assert caught.value.reason == reason
    assert time.monotonic() - started < 10
    assert run_bounded(double, 2) == 4


def test_memory_that_is_allowed_is_given():
    assert run_bounded(allocate) == 2**29
