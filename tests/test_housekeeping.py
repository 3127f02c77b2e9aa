"""Stalls are felt and blamed rightly; garbage is collected when it is time."""

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest

from kvstore.clock import ManualClock
from kvstore.config import HousekeepingConfig
from kvstore.histogram import Histogram, doubling
from kvstore.housekeeping import GarbageCollector, StallMonitor

CONFIG = HousekeepingConfig(stall_tick_interval=0.025, gc_young_objects_min=1)


class Cpu:
    """CPU time that a test sets."""

    def __init__(self) -> None:
        self.used = 0.0

    def __call__(self) -> float:
        """Seconds used so far."""
        return self.used


class TestHistogram:
    """Counting by bounds."""

    def test_bounds_are_inclusive(self) -> None:
        """As in Prometheus, an observation of exactly a bound is in its bucket, buckets add up."""
        histogram = Histogram([1.0, 2.0])
        for amount in (0.5, 1.0, 1.5, 2.0, 2.5):
            histogram.observe(amount)
        assert histogram.buckets() == [("1", 2.0), ("2", 4.0), ("+Inf", 5.0)]
        assert (histogram.count, histogram.sum) == (5, 7.5)

    def test_doubling(self) -> None:
        """Bounds of etcd's latencies: each is twice the one before."""
        assert doubling(0.001, 4) == (0.001, 0.002, 0.004, 0.008)


class TestStalls:
    """What a late tick means."""

    @pytest.mark.parametrize(
        ("late", "cpu", "blamed"),
        [
            (0.0, 0.020, 0.0),  # busy, but in time
            (0.3, 0.310, 0.3),  # computed all the while
            (0.3, 0.001, 0.001),  # the machine was elsewhere
            (0.3, 0.100, 0.1),  # a part of it
        ],
    )
    def test_blame(self, late: float, cpu: float, blamed: float) -> None:
        """A stall is felt as it is, and blamed on the process for what it computed at most."""
        clock, used = ManualClock(), Cpu()
        stalls = StallMonitor(clock, used, CONFIG)
        clock.advance(CONFIG.stall_tick_interval + late)
        used.used += cpu
        stalls.tick()
        assert stalls.felt.sum == pytest.approx(late)
        assert stalls.blamed.sum == pytest.approx(blamed)

    def test_time_before_the_first_tick(self) -> None:
        """Loading is no stall."""
        clock, used = ManualClock(), Cpu()
        stalls = StallMonitor(clock, used, CONFIG)
        clock.advance(30.0)
        used.used += 30.0
        stalls.begin()
        clock.advance(CONFIG.stall_tick_interval)
        stalls.tick()
        assert stalls.felt.sum == pytest.approx(0.0)
        assert stalls.load == 0.0

    def test_load(self) -> None:
        """The load is that of the last tick."""
        clock, used = ManualClock(), Cpu()
        stalls = StallMonitor(clock, used, CONFIG)
        for cpu, load in ((0.025, 1.0), (0.005, 0.2)):
            clock.advance(0.025)
            used.used += cpu
            stalls.tick()
            assert stalls.load == pytest.approx(load)


class Node:
    """One end of a cycle."""

    other: "Node"


def cycle() -> "weakref.ref[Node]":
    """Garbage that only the collector can find."""
    one, two = Node(), Node()
    one.other, two.other = two, one
    return weakref.ref(one)


@pytest.fixture
def garbage() -> Iterator[tuple[GarbageCollector, ManualClock]]:
    """A collector that has taken over; the interpreter's own settings are restored afterwards."""
    thresholds = gc.get_threshold()
    clock = ManualClock()
    collector = GarbageCollector(clock, CONFIG)
    collector.take_over()
    yield collector, clock
    gc.unfreeze()
    gc.set_threshold(*thresholds)


Taken = tuple[GarbageCollector, ManualClock]


class TestGarbage:
    """When collections run."""

    def test_take_over(self, garbage: Taken) -> None:
        """What is there after loading is frozen, and the old are never collected by themselves."""
        assert gc.get_freeze_count() > 0
        assert garbage[0].frozen == 1
        assert gc.get_threshold()[1:] == (1_000_000, 1_000_000)

    def test_quiet_moment(self, garbage: Taken) -> None:
        """Young garbage goes at a quiet moment, not before its time, and each pause is counted."""
        collector, clock = garbage
        dead = cycle()
        collector.tick(0.0)
        assert dead() is not None
        clock.advance(CONFIG.gc_young_interval)
        collector.tick(0.0)
        assert dead() is None
        assert collector.pauses.count == 1

    def test_never_quiet(self, garbage: Taken) -> None:
        """Under load young garbage waits, but not for ever."""
        collector, clock = garbage
        dead = cycle()
        clock.advance(CONFIG.gc_young_interval * 9)
        collector.tick(1.0)
        assert dead() is not None
        clock.advance(CONFIG.gc_young_interval)
        collector.tick(1.0)
        assert dead() is None

    def test_nothing_to_collect(self) -> None:
        """Few new objects are left alone."""
        clock = ManualClock()
        collector = GarbageCollector(clock, replace(CONFIG, gc_young_objects_min=1_000_000_000))
        clock.advance(CONFIG.gc_young_interval)
        collector.tick(0.0)
        assert collector.pauses.count == 0

    def test_full_collection(self, garbage: Taken) -> None:
        """Old garbage goes with the full collection, at a quiet moment or after twice the time."""
        collector, clock = garbage
        for wait, load in ((1, 0.0), (2, 1.0)):
            dead = cycle()
            node = dead()
            gc.collect(1)  # now it is old
            del node
            clock.advance(CONFIG.gc_full_interval * wait)
            collector.tick(load)
            assert dead() is None

    def test_long_collection(self, garbage: Taken) -> None:
        """A full collection that takes too long has its survivors frozen."""
        collector, clock = garbage
        frozen = gc.get_freeze_count()
        kept = [[index] for index in range(100)]

        def slow(phase: str, _: dict[str, int]) -> None:
            if phase == "stop":
                clock.advance(CONFIG.gc_pause_max * 2)

        gc.callbacks.append(slow)
        try:
            clock.advance(CONFIG.gc_full_interval)
            collector.tick(0.0)
        finally:
            gc.callbacks.remove(slow)
        assert collector.frozen == 2
        assert gc.get_freeze_count() >= frozen + len(kept)
