"""Which groups a key finds, against a plain search through all ranges."""

from collections.abc import Sequence
from random import Random
from typing import cast

from hypothesis import given
from hypothesis import strategies as st

from kvstore.history import in_range
from kvstore.watch_groups import Groups, Watcher, _Node
from kvstore.watch_message import PREVIOUS

KEYS = st.binary(min_size=1, max_size=2).map(lambda key: bytes(b"abcd"[b % 4] for b in key))
RANGES = st.tuples(KEYS, st.one_of(st.none(), st.just(b"\0"), KEYS)).filter(
    lambda r: r[1] is None or r[1] == b"\0" or r[1] > r[0]
)


def stand(number: int, key: bytes, end: bytes | None, wants: int = 0) -> Watcher:
    """A watcher without a stream."""
    watcher = Watcher.__new__(Watcher)
    watcher.id, watcher.key, watcher.end, watcher.wants = number, key, end, wants
    watcher.group = None
    return watcher


def ranges_found(groups: Groups, key: bytes) -> list[tuple[bytes, bytes | None]]:
    """Ranges of the groups that a key finds, in order."""
    return sorted(((g.key, g.end) for g in groups.find(key)), key=repr)


@given(
    pool=st.lists(RANGES, min_size=1, max_size=5),
    steps=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.booleans()), max_size=40),
    probes=st.lists(KEYS, max_size=8),
    seed=st.integers(0, 9),
)
def test_find(
    pool: Sequence[tuple[bytes, bytes | None]],
    steps: Sequence[tuple[int, int, bool]],
    probes: Sequence[bytes],
    seed: int,
) -> None:
    """A key finds each range that holds it once, after any additions and removals."""
    groups, present = Groups(Random(seed)), list[Watcher]()
    for number, (place, wants, remove) in enumerate(steps):
        key, end = pool[place % len(pool)]
        if remove and present:
            groups.remove(present.pop(number % len(present)))
        else:
            present.append(stand(number, key, end, wants))
            groups.add(present[-1])
        for probe in (*probes, key):
            matching = {(w.key, w.end) for w in present if in_range(probe, w.key, w.end)}
            assert ranges_found(groups, probe) == sorted(matching, key=repr)
        for group in groups:
            members = {w for like in group.variants.values() for w in like}
            assert group.wants_previous == any(w.wants & PREVIOUS for w in members)
    for group in groups:
        members = {w for like in group.variants.values() for w in like}
        assert members == {w for w in present if (w.key, w.end) == (group.key, group.end)}
        assert all(w.wants == wants for wants, like in group.variants.items() for w in like)
    for watcher in present:
        groups.remove(watcher)
    assert not list(groups), "nothing is left of groups without watchers"


def depth(node: _Node | None) -> int:
    """Levels of a tree."""
    return 0 if node is None else 1 + max(depth(node.left), depth(node.right))


def test_ranges_in_any_order_stay_shallow() -> None:
    """Ascending, nested and repeated ranges do not make the tree a list."""
    for step in (1, -1):
        groups = Groups(Random(1))
        for n in range(5_000):
            groups.add(stand(n, b"%06d" % n, b"%06d" % (n + 1 if step > 0 else 20_000 - n)))
        assert depth(cast("_Node", groups._bounded._root)) < 60
