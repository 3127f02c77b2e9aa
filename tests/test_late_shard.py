"""Shards that are loaded while others are served, and that compaction reaches late: what is read,
and which rows storage keeps, is what it would be had they been there all the time.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import history
from kvstore.backend import RowId
from kvstore.config import CommitConfig
from kvstore.history import in_range
from kvstore.range import RangeQuery
from tests.watch_world import World

ROUTES = {b"b": 1, b"c": 2}
KEYS = [b"a", b"b", b"b1", b"c"]
OTHERS = [b"a", b"a1", b"c"]
"""Keys that shard 1 does not own."""
WINDOWS = [(b"\0", b"\0"), (b"a", b"b1"), (b"b", b"c"), (b"b", None), (b"b1", b"\0")]

changes = st.lists(st.tuples(st.sampled_from(KEYS), st.booleans()), max_size=12)
others = st.lists(st.tuples(st.sampled_from(OTHERS), st.booleans()), max_size=6)
back = st.none() | st.integers(0, 8)


def happen(world: World, these: list[tuple[bytes, bool]]) -> None:
    """Puts, and deletions where true."""
    for key, dies in these:
        if dies:
            world.delete(key)
        else:
            world.put(key)


def compact(world: World, steps_back: int | None) -> None:
    """Compact to some revisions before what is durable, if at all and if that is possible."""
    if steps_back is not None:
        world.compact(max(1, world.commits.durable - steps_back))


def run(world: World, *shards: int) -> None:
    """Let turns, ticks and the storage of some shards go on until nothing changes."""
    for _ in range(5):
        world.turns.run_all()
        for shard in shards:
            world.disks[shard].run_all()
        world.compactor.tick()


def check_reads(world: World) -> None:
    """Every range at every revision that may be read is what happened by then."""
    store = world.store
    for at in range(max(1, store.compact_revision), store.revision + 1):
        there = {h.key: h for h in world.happened if h.revision <= at}
        pairs = [there[key].pair for key in sorted(there) if there[key].is_put]
        for window in WINDOWS:
            read = store.read(RangeQuery(*window, revision=at), at)
            while not read.done:
                read.step()
            wanted = [pair for pair in pairs if in_range(pair.key, *window)]
            found = zip(read.keys, read.entries, strict=True)
            assert [(p.key, p.mod_revision, p.create_revision, p.version) for p in wanted] == [
                (key, mod, create, version) for key, (mod, _, create, version, _) in found
            ]
            assert len(wanted) == read.count


def kept(world: World, shard: int, compacted: int) -> set[RowId]:
    """Rows of a shard that a compaction leaves of what is durable."""
    tip = world.backends[shard].disk.tip
    of = world.store.shards.of
    ours = [h for h in world.happened if of(h.key) == shard and h.revision <= tip]
    newest = {h.key: h for h in ours if h.revision <= compacted}
    alive = {h.revision for h in newest.values() if h.is_put or h.revision == compacted}
    return {(h.revision, 0) for h in ours if h.revision > compacted or h.revision in alive}


def stored(world: World, shard: int) -> set[RowId]:
    """Rows of a shard."""
    return set(world.backends[shard].disk.rows)


@pytest.fixture(autouse=True, scope="module")
def _small_blocks() -> object:
    """Blocks of three changes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "BLOCK_CHANGES", 3)
        yield


@pytest.mark.slow
@given(
    before=changes,
    first=back,
    meanwhile=st.lists(st.tuples(others, back), max_size=4),
    broken_off=st.integers(0, 6),
    chunk=st.integers(1, 5),
    after=changes,
    last=back,
)
def test_a_shard_that_comes_late(
    *,
    before: list[tuple[bytes, bool]],
    first: int | None,
    meanwhile: list[tuple[list[tuple[bytes, bool]], int | None]],
    broken_off: int,
    chunk: int,
    after: list[tuple[bytes, bool]],
    last: int | None,
) -> None:
    """Loaded in pieces, from the start again after a load that broke off, while others are written
    and compacted.
    """
    world = World(routes=ROUTES)
    happen(world, before)
    run(world, 0, 1, 2)
    compact(world, first)
    run(world, 0, 1, 2)
    world = world.restart(1)
    rows = world.rows(1)
    left = world.store.load_rows(1, rows[:broken_off])
    places, left_off = [*range(0, len(rows), chunk)], list(meanwhile)
    while places or left_off:
        if left_off:
            these, steps_back = left_off.pop(0)
            happen(world, these)
            run(world, 0, 2)
            compact(world, steps_back)
            run(world, 0, 2)
            assert {row[:2] for row in rows} == stored(world, 1), "nothing goes meanwhile"
        if places:
            place = places.pop(0)
            left += world.store.load_rows(1, rows[place : place + chunk])
    world.join(1, left)
    check_reads(world)
    happen(world, after)
    run(world, 0, 1, 2)
    check_reads(world)
    compact(world, last)
    run(world, 0, 1, 2)
    check_reads(world)
    for shard in range(3):
        assert kept(world, shard, world.store.compact_revision) == stored(world, shard)


@pytest.mark.slow
@given(
    before=changes,
    stuck=changes,
    compactions=st.lists(st.tuples(others, st.integers(0, 8)), min_size=1, max_size=3),
    steps=st.integers(0, 8),
    crash=st.booleans(),
)
def test_each_shard_is_trimmed_up_to_its_own_frontier(
    *,
    before: list[tuple[bytes, bool]],
    stuck: list[tuple[bytes, bool]],
    compactions: list[tuple[list[tuple[bytes, bool]], int]],
    steps: int,
    crash: bool,
) -> None:
    """While a shard's commits hang, the others are compacted, and it keeps what is newest of what
    it has: a crash then loses nothing that was durable. The rest follows once it is back.
    """
    world = World(routes=ROUTES)
    world.commits.config = CommitConfig(batch_rows_max=2)
    happen(world, before)
    run(world, 0, 1, 2)
    happen(world, stuck)
    for these, steps_back in compactions:
        happen(world, these)
        run(world, 0, 2)
        compact(world, steps_back)
        run(world, 0, 2)
    compacted = world.store.compact_revision
    for shard in (0, 2):
        assert kept(world, shard, compacted) == stored(world, shard)
    for _ in range(steps):
        world.disks[1].run_next()
        run(world, 0, 2)
    reached = min(compacted, world.commits.frontier((1,)))
    assert kept(world, 1, reached) <= stored(world, 1)
    if crash:
        world = world.restart()
        check_reads(world)
    run(world, 0, 1, 2)
    check_reads(world)
    for shard in range(3):
        assert kept(world, shard, compacted) == stored(world, shard)


@pytest.mark.parametrize("missing", [False, True], ids=["stuck", "missing"])
def test_a_shard_that_is_behind_keeps_no_other_in_memory(*, missing: bool) -> None:
    """Values of other shards leave memory as if it were not there; its own that are not stored
    stay.
    """
    world = World(routes=ROUTES, cache_bytes_max=3_000)
    if missing:
        world = world.restart(1)
    else:
        world.put(b"b", b"v" * 50)
        world.put(b"b", b"w" * 50)
    store = world.store
    for n in range(200):
        world.put(b"a%d" % (n % 60), b"v" * 100)
        run(world, 0)
    assert store.index.value_bytes <= 3_300
    assert sum(recent._bytes for recent in store._recent) <= 3_300
    if not missing:
        head = store.index.head(b"b")
        assert head is not None
        for entry in (head, *store.index.older(b"b")):
            framed = store.framed(b"b", entry)
            assert framed is not None
            assert len(framed) > 50
