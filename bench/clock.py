"""Time in the benchmark: whole microseconds on the machine's one monotonic clock.

CLOCK_MONOTONIC is the same for all processes of a machine, so records of several generator
processes and of the command that started them can be compared as they are.
"""

import asyncio
import time

MICROSECONDS = 1_000_000
"""In a second."""


def now_us() -> int:
    """Microseconds on ``CLOCK_MONOTONIC``."""
    return time.monotonic_ns() // 1000


def now_ns() -> int:
    """Nanoseconds on the same clock, for what takes a few microseconds."""
    return time.monotonic_ns()


def wall_seconds() -> float:
    """Seconds since the Unix epoch; for reports and names, never for decisions."""
    return time.time()


async def wait_until(time_us: int) -> None:
    """Return when ``now_us`` has come to that time."""
    await asyncio.sleep(max(0, time_us - now_us()) / MICROSECONDS)
