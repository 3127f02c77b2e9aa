"""Buckets and ping strikes, on a clock moved by hand."""

from dataclasses import replace

import pytest

from kvstore.transport import guard
from kvstore.transport.frames import ENHANCE_YOUR_CALM, ConnectionFault
from kvstore.transport.guard import Guard
from tests.transport.limits import TEST_LIMITS


def ping_times(interval: float, count: int) -> list[float]:
    """Times of pings, evenly spaced."""
    return [100.0 + i * interval for i in range(count)]


@pytest.mark.parametrize("interval", [5.0, 10.0, 30.0])
def test_keepalive_of_clients_is_fine(interval: float) -> None:
    """Pings no oftener than every five seconds, with a call open, go on for ever."""
    counts = Guard(TEST_LIMITS)
    for now in ping_times(interval, 1000):
        counts.ping(now, calls=1, answered=False)


@pytest.mark.parametrize(("interval", "calls"), [(4.9, 1), (0.0, 1), (5.0, 0), (7_199.0, 0)])
def test_pings_too_often(interval: float, calls: int) -> None:
    """The first sets the time, two strikes are let pass, the third ends the connection."""
    counts = Guard(TEST_LIMITS)
    times = ping_times(interval, 4)
    for now in times[:3]:
        counts.ping(now, calls=calls, answered=False)
    with pytest.raises(ConnectionFault) as fault:
        counts.ping(times[3], calls=calls, answered=False)
    assert (fault.value.code, fault.value.reason) == (ENHANCE_YOUR_CALM, "too_many_pings")


def test_pings_without_calls_every_two_hours() -> None:
    """A connection without calls may be pinged, rarely."""
    counts = Guard(TEST_LIMITS)
    for now in ping_times(7_200.0, 100):
        counts.ping(now, calls=0, answered=False)


def test_answers_clear_strikes() -> None:
    """Pings that measure the bandwidth, between answers, never count; they clear older strikes."""
    counts = Guard(TEST_LIMITS)
    for now in ping_times(0.0, 100):
        counts.ping(now, calls=1, answered=True)
    for _ in range(50):
        for answered in (True, False, False):
            counts.ping(100.0, calls=1, answered=answered)


@pytest.mark.parametrize(
    ("what", "name"),
    [
        (guard.RESET, "resets"),
        (guard.FAULT, "faults"),
        (guard.SETTINGS, "settings"),
        (guard.CONTROL, "control"),
        (guard.SMALL_DATA, "small_data"),
        (guard.REFUSAL, "refusals"),
        (guard.UNSERVED, "unserved"),
    ],
)
def test_buckets(what: int, name: str) -> None:
    """A bucket takes a second's worth at once, leaks at that rate, and knows no other bucket."""
    rate = 10 + what
    counts = Guard(replace(TEST_LIMITS, **{f"{name}_per_second_max": rate}))
    for _ in range(rate):
        counts.count(what)
    counts.drain(1.0)
    for _ in range(rate):
        counts.count(what)
    counts.drain(100.0)
    for _ in range(rate):
        counts.count(what)
    with pytest.raises(ConnectionFault) as fault:
        counts.count(what)
    assert (fault.value.code, fault.value.reason) == (ENHANCE_YOUR_CALM, f"too_many_{name}")
