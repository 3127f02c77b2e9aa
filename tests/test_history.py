"""The logs of changes, one or one per shard, against one list, in blocks so small that they seal
all the time.
"""

import gc
from collections.abc import Sequence
from itertools import chain, repeat

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore import history
from kvstore.history import Entry, History, Log, MergedHistory, in_range

Change = tuple[bytes, Entry]
KEYS = [b"a", b"a/1", b"a/2", b"b", b"c", b"\xff"]
keys = st.sampled_from(KEYS)
ends = st.one_of(st.none(), st.sampled_from([b"\0", b"a/2", b"b", b"c", b"a"]))
bounds = st.integers(0, 40)
shards = st.integers(1, 3)


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


class Shards:
    """The log of each shard, and all of them as one; every key has its shard."""

    def __init__(self, count: int, log: Sequence[Change] = ()) -> None:
        self.parts = [History() for _ in range(count)]
        self.all: Log = self.parts[0] if count == 1 else MergedHistory(self.parts)
        for change in log:
            self.append(*change)

    def append(self, key: bytes, entry: Entry) -> None:
        """Add a change where it belongs."""
        self.parts[KEYS.index(key) % len(self.parts)].append(key, entry)


def chosen(log: list[Change], start: bytes, end: bytes | None, after: int) -> list[Change]:
    """Changes of the range later than ``after``, one by one."""
    return [(k, e) for k, e in log if e[0] > after and in_range(k, start, end)]


FIXTURE_IS_STATELESS = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@FIXTURE_IS_STATELESS
@given(logs(), shards, keys, ends, bounds)
def test_what_happened_after(
    log: list[Change], count: int, start: bytes, end: bytes | None, after: int
) -> None:
    """Net births, and the keys that died in order, as counted one by one."""
    tested, later = Shards(count, log), chosen(log, start, end, after)
    births = sum(entry[3] == 1 for _, entry in later)
    deaths = [key for key, entry in later if entry[3] == 0]
    assert births - len(deaths) == tested.all.births(start, end, after)
    died = tested.all.deaths(end, after)
    died.refresh(start)
    assert sorted(set(deaths)) == died.take(None, len(log) + 1)[0]
    assert died.first() is None
    assert len(log) == sum(map(len, tested.parts))
    assert max((entry[0] for _, entry in log), default=0) == tested.all.newest()


@FIXTURE_IS_STATELESS
@given(
    log=logs(),
    count=shards,
    start=keys,
    end=ends,
    after=bounds,
    steps=st.lists(st.tuples(st.integers(0, 2), keys, st.integers(1, 2))),
)
def test_deaths_a_few_at_a_time(
    *,
    log: list[Change],
    count: int,
    start: bytes,
    end: bytes | None,
    after: int,
    steps: list[tuple[int, bytes | None, int]],
) -> None:
    """Taken in windows while changes go on, every key that died comes once and in order; those that
    die behind the reader are not seen.
    """
    tested = Shards(count)
    died = tested.all.deaths(end, after)
    left, next_key = list(log), start
    for ahead, up_to, limit in chain(steps, repeat((2, None, 2))):
        known = max(1, tested.all.newest()) + ahead
        while left and left[0][1][0] <= known:  # a revision is never seen in part
            tested.append(*left.pop(0))
        died.refresh(next_key)
        so_far = log[: len(log) - len(left)]
        expected = sorted(
            {k for k, e in chosen(so_far, start, end, after) if e[3] == 0 and k >= next_key}
        )
        assert (expected[0] if expected else None) == died.first()
        found, looked = died.take(up_to, limit)
        assert expected[: len(found)] == found
        assert looked >= len(found)
        assert all(up_to is None or key <= up_to for key in found)
        if found:
            next_key = found[-1] + b"\0"
        elif up_to is None and not left:
            return


@FIXTURE_IS_STATELESS
@given(logs(), shards, keys, ends, bounds, bounds, st.integers(1, 6))
def test_changes(
    log: list[Change],
    count: int,
    start: bytes,
    end: bytes | None,
    after: int,
    up_to: int,
    limit: int,
) -> None:
    """Steps from one place to the next give every change once, in order, whole revisions, and
    never stop.
    """
    tested = Shards(count, log)
    expected = [change for change in chosen(log, start, end, after) if change[1][0] <= up_to]
    found: list[Change] = []
    at = after
    while at < up_to:
        some, reached = tested.all.changes(start, end, at, up_to, limit)
        assert at < reached <= up_to, "each step gets on"
        assert [change for change in expected if at < change[1][0] <= reached] == some
        last = some[-1][1][0] if some else 0
        assert sum(change[1][0] != last for change in some) < limit
        found += some
        at = reached
    assert expected == found


def test_looks_at_several_shards_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One search goes through as many blocks per shard as it may; a shard behind one that had to
    give way is not looked at any further than that one came.
    """
    monkeypatch.setattr(history, "SCAN_CHANGES", 10)
    looked: list[int] = []
    places = history._Block.places

    def counted(block: history._Block, start: bytes, end: bytes | None, position: int) -> list[int]:
        looked.append(block.entries[0][0])
        return places(block, start, end, position)

    monkeypatch.setattr(history._Block, "places", counted)
    parts = [History() for _ in range(3)]
    for revision in range(2, 902):
        parts[revision % 3].append(b"%d" % (revision % 3), (revision, 0, revision, 1, 0))
    found, reached = MergedHistory(parts).changes(b"0", b"1", 1, 901, 5)
    assert [(b"0", (n, 0, n, 1, 0)) for n in (3, 6, 9, 12, 15)] == found
    assert reached == 17
    assert len(looked) <= 3 * 10
    assert max(looked) <= 18


def test_what_one_shard_has_further_on_waits_for_the_others() -> None:
    """A shard that had to give way bounds what is shown of all."""
    parts = [History(), History()]
    wanted = [(b"a", (2, 0, 2, 1, 0)), *((b"b", (n, 0, n, 1, 0)) for n in range(3, 100))]
    wanted.append((b"a", (100, 0, 2, 2, 0)))
    for key, entry in wanted:
        parts[key == b"b"].append(key, entry)
    found, reached = MergedHistory(parts).changes(b"a", b"c", 1, 200, 1_000)
    assert 2 < reached < 100
    assert wanted[: reached - 1] == found


def test_a_merged_history_begins_where_all_do() -> None:
    """Changes are complete from the latest of the floors on, also when one moves later."""
    parts = [History(5), History(7)]
    merged = MergedHistory(parts)
    assert merged.floor == 7
    parts[0].floor = 9
    assert merged.floor == 9


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
    tested = Shards(1, log).parts[0]
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
