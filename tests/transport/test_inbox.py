"""Messages come out of DATA frames whole and in order, and what is held is counted."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.transport.api import StatusError
from kvstore.transport.inbox import Holder, Inbox
from kvstore.transport.limits import Limits
from kvstore.transport.output import Totals
from tests.transport.limits import TEST_LIMITS
from tests.transport.peer import message


def totals() -> Totals:
    """Nothing held."""
    return Totals(output_max=1, on_full=lambda: None)


class Hoard(Holder):
    """A connection whose unfinished requests are inboxes."""

    def __init__(self, limits: Limits, held: Totals) -> None:
        super().__init__(limits, held, 0.0)
        self.inboxes: list[Inbox] = []

    def open(self, *, size: int = 0) -> Inbox:
        """One more request, of which ``size`` bytes have come."""
        inbox = Inbox(self._limits, self)
        if size:
            inbox.feed(message(bytes(10_000))[:size])
        self.inboxes.append(inbox)
        return inbox

    def give_way(self, size: int) -> None:
        """Forget requests until as much is free."""
        wanted = self.held - size
        while self.inboxes and self.held > wanted:
            self.inboxes.pop().clear()


@given(st.lists(st.binary(max_size=30), max_size=10), st.lists(st.integers(0, 20), max_size=40))
def test_any_cutting(bodies: list[bytes], cuts: list[int]) -> None:
    """However messages are cut, they come out whole, as early as possible, and nothing is held."""
    data = b"".join(map(message, bodies))
    held = totals()
    inbox = Hoard(TEST_LIMITS, held).open()
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
    inbox = Hoard(replace(TEST_LIMITS, message_bytes_max=100), totals()).open()
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


def test_requests_of_one_connection() -> None:
    """What the calls of one connection hold has a limit; giving it back makes room."""
    held = totals()
    hoard = Hoard(replace(TEST_LIMITS, request_bytes_total_max=1000), held)
    one, other = hoard.open(size=800), hoard.open()
    with pytest.raises(StatusError) as refusal:
        other.feed(message(bytes(900))[:300])
    assert refusal.value.code == 8
    assert held.request_bytes == 800
    one.clear()
    assert (held.request_bytes, held.holders) == (0, {})
    assert other.feed(message(bytes(900))) == [bytes(900)]


def test_those_that_hold_most_give_way() -> None:
    """Who holds less than its share gets room from the largest, and an eighth of all is free."""
    held = totals()
    limits = replace(TEST_LIMITS, request_bytes_total_max=10_000)
    greedy, modest, calm = (Hoard(limits, held) for _ in range(3))
    for _ in range(80):
        greedy.open(size=100)
    modest.open(size=1900)
    calm.open(size=500)
    assert (greedy.held, modest.held, calm.held) == (6300, 1900, 500)
    with pytest.raises(StatusError):
        greedy.open(size=3000)
    assert greedy.held == 6300, "a refused request costs no other"


def test_large_headers_count() -> None:
    """Headers are held with the message, and given back with the call, not with the message."""
    held = totals()
    inbox = Hoard(TEST_LIMITS, held).open()
    inbox.keep_headers(1000)
    assert inbox.feed(message(b"abc")[:4]) == []
    assert (inbox.size, held.request_bytes) == (1004, 1004)
    assert inbox.feed(message(b"abc")[4:]) == [b"abc"]
    assert held.request_bytes == 1000
    inbox.clear()
    assert held.request_bytes == 0
