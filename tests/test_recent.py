"""Values that are neither head nor old: what is held, and for how long."""

from collections import OrderedDict

from hypothesis import given
from hypothesis import strategies as st

from backends.memory import MemoryDisk
from kvstore.config import StoreConfig
from kvstore.history import Entry
from kvstore.recent import ENTRY_BYTES, RecentValues
from tests.stack import Stack


def entry(revision: int) -> Entry:
    """A version that a change at ``revision`` made."""
    return (revision, 0, 1, revision, 0)


@given(
    st.integers(0, 6 * ENTRY_BYTES),
    st.lists(st.tuples(st.integers(1, 200), st.integers(0, 90), st.integers(0, 200))),
)
def test_the_oldest_leave_once_they_are_stored(
    bytes_max: int, kept: list[tuple[int, int, int]]
) -> None:
    """What is held is what a dictionary in order of arrival would hold, and no more than the bound
    but for what is not stored yet.
    """
    stored = 0
    tested = RecentValues(bytes_max, lambda: stored)
    held: OrderedDict[Entry, bytes] = OrderedDict()
    for revision, size, stored_now in kept:
        stored = max(stored, stored_now)
        if entry(revision) not in held:
            held[entry(revision)] = b"x" * size
            while sum(len(value) + ENTRY_BYTES for value in held.values()) > bytes_max:
                oldest = next(iter(held))
                if oldest[0] > stored:
                    break
                del held[oldest]
        tested.keep(entry(revision), b"y" * size if tested.get(entry(revision)) else b"x" * size)
        assert [held.get(entry(n)) for n in range(201)] == [
            tested.get(entry(n)) for n in range(201)
        ]


def test_small_values_count_with_what_they_cost() -> None:
    """Values of some bytes do not fill memory with what is around them."""
    engine = Stack([MemoryDisk()], store=StoreConfig(recent_bytes_max=20_000))
    store = engine.store
    replaced = [(n, 0, 2, n - 1, 0) for n in range(2, 1_002)]
    for n in range(1_001):
        store.put_if(b"a", n + 1 if n else 0, b"", 0)
        engine.settle()
    held = sum(store._recent[0].get(version) is not None for version in replaced)
    assert 100 < held <= 20_000 // 100


def test_no_segment_is_large() -> None:
    """Growing is done in small parts, whatever the revisions of the values."""
    tested = RecentValues(1 << 30, lambda: 0)
    for n in range(64_000):
        tested.keep(entry(n * 7), b"")
    assert max(map(len, tested._segments)) <= 1_000
