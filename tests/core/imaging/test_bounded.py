# SPDX-License-Identifier: Apache-2.0

"""A worker process that dies, hangs or takes too much costs its own call, and no other."""

from __future__ import annotations

import os
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gmai_xtuner.core.errors import GMAIError, Unusable
from gmai_xtuner.core.imaging.bounded import DIED, FAILED, iterate_bounded, run_bounded
from gmai_xtuner.core.records import iter_raw


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


def count(end, *, then=None):
    yield from range(end)
    if then is not None:
        then()


def count_and_abort(end):
    yield from count(end, then=abort)


def test_what_a_generator_yields_comes_as_it_is_asked_for():
    assert list(iterate_bounded(count, 1000)) == list(range(1000))
    first = iterate_bounded(count, 10**9)
    assert [next(first), next(first)] == [0, 1]
    first.close()  # its worker does not answer the next call
    assert run_bounded(double, 3) == 6
    last = iterate_bounded(count_and_abort, 2)
    assert [next(last), next(last)] == [0, 1]
    with pytest.raises(Unusable, match=DIED):
        next(last)


def test_a_parquet_of_one_long_text_many_times_is_a_documented_error(tmp_path):
    values = pa.DictionaryArray.from_arrays(np.zeros(2**16, np.int8), ["x" * 10**7])
    schema = pa.schema([("conversations", values.type)])
    with pq.ParquetWriter(tmp_path / "bomb.parquet", schema, compression="zstd") as writer:
        writer.write_table(pa.table([values], schema=schema))
    assert (tmp_path / "bomb.parquet").stat().st_size < 10**5
    with pytest.raises(GMAIError, match="Parquet"):
        list(iter_raw(tmp_path / "bomb.parquet"))
