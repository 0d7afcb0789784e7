# SPDX-License-Identifier: Apache-2.0

import asyncio
import email.utils
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmai_xtuner.core.http import Concurrency, Pace, back_off, retry_after
from tests.tables import tables

TABLES = tables(__file__)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@given(
    st.floats(1, 10_000),
    st.lists(st.tuples(st.floats(0, 5), st.integers(1, 50)), min_size=1, max_size=80),
)
def test_no_minute_has_more_than_its_rate_and_a_seconds_burst(rate, steps):
    clock = Clock()
    pace = Pace(rate, clock=clock)
    sent = []
    for later, amount in steps:
        clock.now += later
        sent.append((clock.now + pace.take(amount), amount))
    largest = max(amount for _, amount in sent)
    for start, _ in sent:
        within = sum(amount for at, amount in sent if start <= at < start + 60)
        assert within <= rate * 61 / 60 + largest + 1e-6


def test_no_rate_is_no_wait():
    pace = Pace(None)
    assert [pace.take(10**9) for _ in range(3)] == [0.0] * 3


def test_what_wasnt_needed_is_given_back():
    clock = Clock()
    pace = Pace(60, clock=clock)
    assert [pace.take(10), pace.take(10)] == [0.0, 10.0]
    pace.give_back(15)
    assert pace.take(1) == pytest.approx(5.0)


@pytest.mark.parametrize(("headers", "seconds"), TABLES["retry_after"])
def test_retry_after(headers, seconds):
    now = email.utils.parsedate_to_datetime("Wed, 21 Oct 2015 07:27:00 GMT").timestamp()
    assert retry_after(headers, now=now) == seconds


def test_concurrency_begins_with_one_and_opens_with_the_first_answer():
    async def run() -> list[int]:
        concurrency, seen = Concurrency(5), []
        gate = asyncio.Event()

        async def request(number: int) -> None:
            async with concurrency.slot():
                seen.append(concurrency.under_way)
                if number:
                    await gate.wait()
                else:
                    await asyncio.sleep(0.02)
                    await concurrency.answered()

        requests = [asyncio.create_task(request(number)) for number in range(8)]
        await asyncio.sleep(0.01)
        assert seen == [1]
        await asyncio.sleep(0.05)
        # Six: the first has still to leave while the others enter, or five.
        assert len(seen) == 6
        gate.set()
        await asyncio.gather(*requests)
        return seen

    assert max(asyncio.run(run())) == 5


def test_concurrency_falls_once_for_all_under_way_and_rises_by_answers():
    async def run() -> None:
        concurrency = Concurrency(10)
        await concurrency.answered()
        assert concurrency.limit == 10
        for _ in range(10):  # ten complaints of one time
            concurrency.lower(0)
        assert concurrency.limit == 7
        concurrency.lower(1)
        assert concurrency.limit == pytest.approx(4.9)
        for _ in range(5):
            await concurrency.answered()
        assert 5.7 < concurrency.limit < 5.9
        for _ in range(1000):
            await concurrency.answered()
        assert concurrency.limit == 10
        for number in range(2, 30):
            concurrency.lower(number)
        assert concurrency.limit == 1

    asyncio.run(run())


def test_a_pause_holds_for_all_and_ends_early_if_the_run_does():
    async def run() -> None:
        concurrency = Concurrency(4)
        await concurrency.answered()
        concurrency.pause(0.3)
        concurrency.pause(0.1)  # the longer one counts
        start = time.monotonic()

        async def request() -> float:
            async with concurrency.slot():
                return time.monotonic() - start

        waits = await asyncio.gather(*(request() for _ in range(4)))
        assert min(waits) >= 0.29
        stopped = False

        def check() -> None:
            if stopped:
                raise KeyError

        concurrency.check = check
        concurrency.pause(600)
        waiting = asyncio.create_task(request())
        await asyncio.sleep(0.05)
        stopped = True
        with pytest.raises(KeyError):
            await asyncio.wait_for(waiting, 2)
        assert concurrency.under_way == 0

    asyncio.run(run())


def test_limits_of_the_back_off():
    for attempt, longest in ((0, 0.5), (3, 4.0), (50, 60.0)):
        waits = [back_off(attempt) for _ in range(200)]
        assert longest / 2 <= min(waits)
        assert max(waits) <= longest
        assert max(waits) - min(waits) > longest / 4
