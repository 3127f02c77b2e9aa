"""What the process does for itself at quiet moments: measures its stalls and collects garbage.

**Stalls.** A timer that should fire every 25 ms fires late when the loop was held up. How late is
what clients feel; but on a busy machine the process may just not have been running. So the monitor
also takes the CPU time that the process used meanwhile: of a stall, the process is to blame for at
most that. The estimate is too high by at most one interval (CPU used before the timer was due),
and a thread that waits for the disk inside the loop is felt but not blamed.

**Garbage.** The store's own records are tuples of numbers and bytes, which the collector ignores
after one look, in a few large lists, which it walks. With a million keys a full collection takes
hundreds of milliseconds, so it never runs by itself:

- after loading: collect once, then *freeze*: what is there now is never looked at again;
- young objects are collected at quiet moments, long before the collector's own threshold, which
  stays as a backstop;
- a full collection runs at a quiet moment every few minutes; when it took longer than it may,
  everything that survived it is frozen too.

A cycle that becomes garbage after it was frozen stays for ever. That needs an object that lived
through minutes and then died as a cycle; connections and watchers break theirs when they close.
Reference counting frees everything else as always.
"""

import gc
from collections.abc import Callable

from kvstore.clock import Clock
from kvstore.config import HousekeepingConfig
from kvstore.histogram import Histogram, doubling

_BOUNDS = doubling(0.001, 14)


class StallMonitor:
    """How late the loop is; ``tick`` is to be called every ``stall_tick_interval`` seconds.

    ``cpu()`` is the CPU time of all threads of the process, in seconds.
    """

    def __init__(self, clock: Clock, cpu: Callable[[], float], config: HousekeepingConfig) -> None:
        self._clock = clock
        self._cpu = cpu
        self._interval = config.stall_tick_interval
        self.begin()
        self.felt = Histogram(_BOUNDS)
        """Seconds that the timer was late."""
        self.blamed = Histogram(_BOUNDS)
        """Of these, seconds for which the process was computing."""
        self.load = 0.0
        """CPU seconds per second since the tick before; above 1 when several threads compute."""

    def begin(self) -> None:
        """What was before does not count: ticks come from now on."""
        self._ticked_at, self._cpu_then = self._clock.monotonic(), self._cpu()

    def tick(self) -> None:
        """Take the time."""
        now, used = self._clock.monotonic(), self._cpu()
        late = max(0.0, now - self._ticked_at - self._interval)
        computed = used - self._cpu_then
        self.felt.observe(late)
        self.blamed.observe(min(late, computed))
        self.load = computed / max(now - self._ticked_at, 1e-6)
        self._ticked_at, self._cpu_then = now, used


class GarbageCollector:
    """Runs the interpreter's collector when it harms least. See the module's text."""

    def __init__(self, clock: Clock, config: HousekeepingConfig) -> None:
        self._clock = clock
        self._config = config
        self._young_at = self._full_at = clock.monotonic()
        self.pauses = Histogram(_BOUNDS)
        """Seconds of each collection that was run from here."""
        self.frozen = 0
        """How often survivors were frozen."""

    def take_over(self) -> None:
        """After loading: collect, freeze, and leave the collector only its backstop."""
        gc.collect()
        self._freeze()
        gc.set_threshold(self._config.gc_young_objects_max, 1_000_000, 1_000_000)
        self._young_at = self._full_at = self._clock.monotonic()

    def tick(self, load: float) -> None:
        """Collect if it is time: at a quiet moment, or after too long a wait for one."""
        now = self._clock.monotonic()
        config = self._config
        quiet = load < config.quiet_load
        if now - self._full_at >= config.gc_full_interval * (1 if quiet else 2):
            self._young_at = self._full_at = now
            if self._collect(2) > config.gc_pause_max:
                self._freeze()
        elif now - self._young_at >= config.gc_young_interval * (1 if quiet else 10):
            self._young_at = now
            if gc.get_count()[0] >= config.gc_young_objects_min:
                self._collect(1)

    def _collect(self, generation: int) -> float:
        started_at = self._clock.monotonic()
        gc.collect(generation)
        seconds = self._clock.monotonic() - started_at
        self.pauses.observe(seconds)
        return seconds

    def _freeze(self) -> None:
        gc.freeze()
        self.frozen += 1
