"""Work that is due at a time: one heap and one timer of the event loop for all of it.

The loop's timers have a resolution of a millisecond; whatever is late by that is late in the
records too, because latency counts from the time at which a step was due.
"""

import asyncio
import heapq
from collections.abc import Callable
from itertools import count

from bench.clock import now_us


class Ticker:
    """Calls functions when they are due; times are those of ``now_us``."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._number = count()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_us = 0

    def at(self, due_us: int, do: Callable[[], None]) -> None:
        """Call ``do`` when it is due, never from inside this function."""
        heapq.heappush(self._heap, (due_us, next(self._number), do))
        if self._timer is None or due_us < self._timer_us:
            self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_us = self._heap[0][0]
        delay = max(0, self._timer_us - now_us()) / 1e6
        self._timer = self._loop.call_later(delay, self._tick)

    def _tick(self) -> None:
        self._timer = None
        heap = self._heap
        now = now_us()
        while heap and heap[0][0] <= now:
            heapq.heappop(heap)[2]()
        if heap and self._timer is None:
            self._arm()

    def stop(self) -> None:
        """Forget everything."""
        self._heap.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
