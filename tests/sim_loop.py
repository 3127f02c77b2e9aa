"""An event loop that does nothing by itself: the next thing that is ready when it is told to, and
what is due when its clock has been moved.

The server's start, a shard's return and whatever else awaits run on it as they are. What they raise
comes out of ``run_next``, or is kept in the task that was made here.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from heapq import heappop, heappush
from typing import Any, TypeVar, cast

from kvstore.clock import ManualClock

ResultT = TypeVar("ResultT")


class Handle:
    """What is to be called, once, unless it is cancelled before."""

    __slots__ = ("_when", "call", "of_task")

    def __init__(self, call: Callable[[], object], when: float, *, of_task: bool = False) -> None:
        self.call: Callable[[], object] | None = call
        self.of_task = of_task
        """Is it a step of a task, or of a future that one waits for?"""
        self._when = when

    def cancel(self) -> None:
        """Never call it."""
        self.call = None

    def cancelled(self) -> bool:
        """Was it cancelled, or called?"""
        return self.call is None

    def when(self) -> float:
        """The time it was meant for."""
        return self._when


class Loop:
    """As much of ``asyncio.AbstractEventLoop`` as tasks, futures, sleeps and timeouts ask for."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.ready: deque[Handle] = deque()
        self.timers: list[tuple[float, int, Handle]] = []
        self._count = 0

    # -- what asyncio asks for ---------------------------------------------------------------------

    def call_soon(
        self,
        call: Callable[..., object],
        *args: Any,  # noqa: ANN401
        context: object = None,
    ) -> Handle:
        """Call it after what is ready already; asyncio itself gives a context."""
        step = (lambda: call(*args)) if args else call
        handle = Handle(step, self.clock.now, of_task=context is not None)
        self.ready.append(handle)
        return handle

    def call_later(
        self,
        delay: float,
        call: Callable[..., object],
        *args: Any,  # noqa: ANN401
        context: object = None,
    ) -> Handle:
        """Call it when some seconds have gone by."""
        return self.call_at(self.clock.now + delay, call, *args, context=context)

    def call_at(
        self,
        when: float,
        call: Callable[..., object],
        *args: Any,  # noqa: ANN401
        context: object = None,
    ) -> Handle:
        """Call it at a time of the clock."""
        del context
        handle = Handle((lambda: call(*args)) if args else call, when)
        if when <= self.clock.now:
            self.ready.append(handle)
        else:
            self._count += 1
            heappush(self.timers, (when, self._count, handle))
        return handle

    def time(self) -> float:
        """Seconds on the clock."""
        return self.clock.now

    def create_future(self) -> "asyncio.Future[Any]":
        """A future of this loop."""
        return asyncio.Future(loop=self.as_loop)

    def create_task(
        self,
        work: Coroutine[Any, Any, ResultT],
        *,
        name: str | None = None,
        context: object = None,
    ) -> "asyncio.Task[ResultT]":
        """A task of this loop."""
        del context
        return asyncio.Task(work, loop=self.as_loop, name=name)

    def get_debug(self) -> bool:
        """No."""
        return False

    def is_closed(self) -> bool:
        """It has no end: it is forgotten."""
        return False

    def is_running(self) -> bool:
        """Only from inside is it asked."""
        return True

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Tasks of a process that died, which nobody awaits any more, complain of it."""

    @property
    def as_loop(self) -> asyncio.AbstractEventLoop:
        """Itself, to those who ask for the whole of the class."""
        return cast("asyncio.AbstractEventLoop", self)

    # -- what the test does ------------------------------------------------------------------------

    def run_next(self) -> bool:
        """Call the next one that is ready; False when there was none. Raises what it raises."""
        while self.ready:
            handle = self.ready.popleft()
            call = handle.call
            if call is not None:
                handle.call = None
                asyncio._set_running_loop(self.as_loop)
                try:
                    call()
                finally:
                    asyncio._set_running_loop(None)
                return True
        return False

    def run_all(self) -> None:
        """Run until nothing is ready; what is due later stays."""
        while self.run_next():
            pass

    def end(self, tasks: Sequence["asyncio.Task[Any]"]) -> None:
        """Cancel ``tasks`` and run what they do about it, and nothing else any more."""
        self.timers.clear()
        self.ready = deque(handle for handle in self.ready if handle.of_task)
        for task in tasks:
            task.cancel()
        self.run_all()

    def wake(self) -> None:
        """Time has gone by: what is due by now is ready."""
        now, timers = self.clock.now, self.timers
        while timers and timers[0][0] <= now:
            self.ready.append(heappop(timers)[2])
