"""Work is done when it is due, in order, never before and never twice."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.clock import now_us
from bench.drive.ticker import Ticker
from tests.transport.running import eventually


async def test_order() -> None:
    """Whatever the order in which it was asked for, work is done by its time, then by its turn."""
    ticker = Ticker(asyncio.get_running_loop())
    done: list[str] = []
    begun_us = now_us()
    for name, after_us in [("c", 20_000), ("a", 3000), ("d", 20_000), ("b", 10_000)]:
        ticker.at(begun_us + after_us, lambda name=name: done.append(name))  # type: ignore[misc]
    assert [] == done
    await eventually(lambda: len(done) == 4)
    assert [*"abcd"] == done


async def test_never_early() -> None:
    """Work is not done before it is due, also if it is asked for from inside other work."""
    ticker = Ticker(asyncio.get_running_loop())
    late_us: list[int] = []

    def again(due_us: int) -> None:
        late_us.append(now_us() - due_us)
        if len(late_us) < 20:
            next_us = now_us() + 700
            ticker.at(next_us, lambda: again(next_us))

    first_us = now_us() + 500
    ticker.at(first_us, lambda: again(first_us))
    await eventually(lambda: len(late_us) == 20)
    assert min(late_us) >= 0


async def test_overdue_work_waits_its_turn() -> None:
    """What is overdue is done soon, but not from inside the call that asks for it."""
    ticker = Ticker(asyncio.get_running_loop())
    done: list[int] = []
    ticker.at(now_us() + 60_000_000, lambda: done.append(2))
    ticker.at(0, lambda: done.append(1))
    assert [] == done
    await eventually(lambda: done == [1])
    ticker.stop()


async def test_stop() -> None:
    """After a stop nothing is done."""
    ticker = Ticker(asyncio.get_running_loop())
    ticker.at(now_us() + 1000, lambda: pytest.fail("was stopped"))
    ticker.stop()
    done: list[int] = []
    ticker.at(now_us() + 5000, lambda: done.append(1))
    await eventually(lambda: done == [1])


@pytest.mark.slow
@given(st.lists(st.integers(0, 3000), max_size=30))
def test_everything_once(afters_us: list[int]) -> None:
    """However dues are mixed, each piece of work is done once, in the order of its time."""

    async def check() -> None:
        ticker = Ticker(asyncio.get_running_loop())
        done: list[int] = []
        begun_us = now_us()
        for after_us in afters_us:
            ticker.at(begun_us + after_us, lambda after_us=after_us: done.append(after_us))  # type: ignore[misc]
        await eventually(lambda: len(done) == len(afters_us))
        assert sorted(afters_us) == done
        assert not ticker._heap

    asyncio.run(check())
