"""The log of changes against one list, in blocks so small that they seal all the time."""

import gc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore import history
from kvstore.history import Entry, History, in_range

Change = tuple[bytes, Entry]
keys = st.sampled_from([b"a", b"a/1", b"a/2", b"b", b"c", b"\xff"])
ends = st.one_of(st.none(), st.sampled_from([b"\0", b"a/2", b"b", b"c", b"a"]))
bounds = st.integers(0, 40)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three changes a block; the search gives way after four."""
    monkeypatch.setattr(history, "BLOCK_CHANGES", 3)
    monkeypatch.setattr(history, "SCAN_CHANGES", 4)
    monkeypatch.setattr(history, "_SKIP_COST", 1)


@st.composite
def logs(draw: st.DrawFn) -> list[Change]:
    """Changes that can have happened: births, updates, deaths; several keys in one revision."""
    live: dict[bytes, int] = {}
    changes: list[Change] = []
    for n, names in enumerate(draw(st.lists(st.lists(keys, unique=True, min_size=1, max_size=5)))):
        for sub, key in enumerate(names):
            dies = key in live and draw(st.booleans())
            live[key] = 0 if dies else live.get(key, 0) + 1
            version = live[key]
            if dies:
                del live[key]
            changes.append((key, (n + 2, sub, 1 if version else 0, version, 0)))
    return changes


def filled(log: list[Change]) -> History:
    """A history of these changes."""
    tested = History()
    for key, entry in log:
        tested.append(key, entry)
    return tested


def chosen(log: list[Change], start: bytes, end: bytes | None, after: int) -> list[Change]:
    """Changes of the range later than ``after``, one by one."""
    return [(k, e) for k, e in log if e[0] > after and in_range(k, start, end)]


FIXTURE_IS_STATELESS = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@FIXTURE_IS_STATELESS
@given(logs(), keys, ends, bounds)
def test_what_happened_after(
    log: list[Change], start: bytes, end: bytes | None, after: int
) -> None:
    """Net births, and the keys that died in order, as counted one by one."""
    tested, later = filled(log), chosen(log, start, end, after)
    births = sum(entry[3] == 1 for _, entry in later)
    deaths = [key for key, entry in later if entry[3] == 0]
    assert births - len(deaths) == tested.births(start, end, after)
    died = tested.deaths(end, after)
    died.refresh(start)
    assert sorted(set(deaths)) == died.take(None, len(log) + 1)[0]
    assert died.first() is None
    assert len(log) == len(tested)


@FIXTURE_IS_STATELESS
@given(logs(), ends, bounds, st.data())
def test_deaths_a_few_at_a_time(
    log: list[Change], end: bytes | None, after: int, data: st.DataObject
) -> None:
    """Taken in windows while changes go on, every key that died comes once and in order; those that
    die behind the reader are not seen.
    """
    start = data.draw(keys)
    tested = History()
    died = tested.deaths(end, after)
    left, next_key = list(log), start
    while True:
        known = tested.newest() + data.draw(st.integers(0, 2))
        while left and left[0][1][0] <= known:  # a revision is never seen in part
            tested.append(*left.pop(0))
        died.refresh(next_key)
        so_far = log[: len(log) - len(left)]
        expected = sorted(
            {k for k, e in chosen(so_far, start, end, after) if e[3] == 0 and k >= next_key}
        )
        assert (expected[0] if expected else None) == died.first()
        up_to = data.draw(keys) if left else None
        found, looked = died.take(up_to, data.draw(st.integers(1, 2)))
        assert expected[: len(found)] == found
        assert looked >= len(found)
        assert all(up_to is None or key <= up_to for key in found)
        if found:
            next_key = found[-1] + b"\0"
        elif up_to is None:
            return


@FIXTURE_IS_STATELESS
@given(logs(), keys, ends, bounds, bounds, st.integers(1, 6))
def test_changes(
    log: list[Change], start: bytes, end: bytes | None, after: int, up_to: int, limit: int
) -> None:
    """Steps from one place to the next give every change once, in order, whole revisions, and
    never stop.
    """
    tested = filled(log)
    expected = [change for change in chosen(log, start, end, after) if change[1][0] <= up_to]
    found: list[Change] = []
    at = after
    while at < up_to:
        some, reached = tested.changes(start, end, at, up_to, limit)
        assert at < reached <= up_to, "each step gets on"
        assert [change for change in expected if at < change[1][0] <= reached] == some
        last = some[-1][1][0] if some else 0
        assert sum(change[1][0] != last for change in some) < limit
        found += some
        at = reached
    assert expected == found


def test_sealed_blocks_are_nothing_to_the_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tracked does not grow with the changes but with the blocks, and refers to few."""
    monkeypatch.setattr(history, "BLOCK_CHANGES", 500)
    tested = History()
    for n in range(2, 20_002):
        tested.append(b"%d" % n, (n, 0, 1, n % 3, 0))
    gc.collect()
    gc.collect()
    tracked = [part for block in tested._blocks for part in gc.get_referents(block)]
    assert sum(len(gc.get_referents(part)) for part in tracked if gc.is_tracked(part)) < 2_000


@FIXTURE_IS_STATELESS
@given(logs(), bounds)
def test_compaction_drops_whole_blocks(log: list[Change], up_to: int) -> None:
    """Blocks earlier than the compact revision go, with every key of theirs named; nothing else."""
    tested = filled(log)
    left = list(log)
    named: set[bytes] = set()
    while (keys := list(tested.keys_until(up_to, 0))) and tested.drop_oldest_block(up_to):
        assert [key for key, _ in left[:3]] == keys
        assert all(entry[0] < up_to for _, entry in left[:3])
        named.update(keys)
        del left[:3]
    block = 0
    while keys := list(tested.keys_until(up_to, block)):
        named.update(keys)
        block += 1
    assert named == {key for key, entry in log if entry[0] <= up_to}
    assert [key for key, _ in left] == [key for b in tested._blocks for key in b.keys]
    assert len(left) == len(tested)
