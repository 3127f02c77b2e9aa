"""Time as an argument: the only place that reads the machine's clocks.

Everything that needs time takes a ``Clock``, so that tests and the simulator can move it by hand.
"""

import time
from typing import Protocol


class Clock(Protocol):
    """What the store knows of time."""

    def monotonic(self) -> float:
        """Seconds on a clock that never goes back; its zero is arbitrary."""

    def wall(self) -> float:
        """Seconds since the Unix epoch; for logs and reports only, never for decisions."""


class SystemClock:
    """The machine's clocks: seconds of ``CLOCK_MONOTONIC``, seconds since the Unix epoch."""

    monotonic = staticmethod(time.monotonic)  # as it is: every call asks for it
    wall = staticmethod(time.time)


class ManualClock:
    """A clock that moves only when told; starts at ``start`` seconds."""

    def __init__(self, start: float = 1000.0) -> None:
        self.now = start

    def monotonic(self) -> float:
        """The time set by hand, in seconds."""
        return self.now

    def wall(self) -> float:
        """The same time: tests need no second one."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Move forward by ``seconds``."""
        assert seconds >= 0, "time does not go back"
        self.now += seconds
