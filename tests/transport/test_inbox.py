"""Messages come out of DATA frames whole and in order, and what is held is counted."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.transport.api import StatusError
from kvstore.transport.inbox import Inbox
from kvstore.transport.output import Totals
from tests.transport.limits import TEST_LIMITS
from tests.transport.peer import message


def totals() -> Totals:
    """Nothing held."""
    return Totals(output_max=1, on_full=lambda: None)


@given(st.lists(st.binary(max_size=30), max_size=10), st.lists(st.integers(0, 20), max_size=40))
def test_any_cutting(bodies: list[bytes], cuts: list[int]) -> None:
    """However messages are cut, they come out whole, as early as possible, and nothing is held."""
    data = b"".join(map(message, bodies))
    held = totals()
    inbox = Inbox(TEST_LIMITS, held)
    found: list[bytes] = []
    given_bytes = 0
    for cut in [*cuts, len(data)]:
        part, data = data[:cut], data[cut:]
        found += inbox.feed(part)
        given_bytes += len(part)
        whole = sum(len(body) + 5 for body in found)
        assert held.request_bytes == given_bytes - whole
        assert inbox.unfinished == (given_bytes - whole >= 5)
    assert found == bodies
    assert held.request_bytes == 0


@pytest.mark.parametrize("cuts", [[10], [3, 7], [5, 5], [1] * 10])
def test_refused_by_prefix(cuts: list[int]) -> None:
    """A message above the limit is refused as soon as its prefix is there."""
    inbox = Inbox(replace(TEST_LIMITS, message_bytes_max=100), totals())
    data = message(bytes(101))

    def feed() -> None:
        rest = data
        for cut in cuts:
            inbox.feed(rest[:cut])
            rest = rest[cut:]

    with pytest.raises(StatusError) as refusal:
        feed()
    assert (refusal.value.code, refusal.value.message) == (
        8,
        "grpc: received message larger than max (101 vs. 100)",
    )


def test_all_requests_together() -> None:
    """What all calls hold has a limit; giving it back makes room."""
    held = totals()
    limits = replace(TEST_LIMITS, request_bytes_total_max=1000)
    one, other = Inbox(limits, held), Inbox(limits, held)
    one.feed(message(bytes(900))[:800])
    with pytest.raises(StatusError) as refusal:
        other.feed(message(bytes(900))[:300])
    assert refusal.value.code == 8
    assert held.request_bytes == 800
    one.clear()
    assert held.request_bytes == 0
    assert other.feed(message(bytes(900))) == [bytes(900)]
