"""A start with another map of the shards: what would be hidden, and what a user is told."""

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.memory import MemoryBackend, MemoryDisk, at_once
from kvstore.backend import IndexRow, Row
from kvstore.errors import BackendError
from kvstore.map_check import Strays, hidden
from kvstore.shard import ShardMap
from kvstore.shard_config import RouteSpec, ShardConfig, ShardSpec

EVENTS = {b"/e/": "events"}


def configured(names: Sequence[str], routes: Mapping[bytes, str]) -> ShardConfig:
    """A configuration as a user would write it."""
    shards = [ShardSpec(name, f"sqlite:{name}.db") for name in names]
    return ShardConfig(shards, [RouteSpec(prefix, shard) for prefix, shard in routes.items()])


CORE = configured(["core"], {})
TWO = configured(["core", "events"], EVENTS)


def put(revision: int, key: bytes, *, version: int = 1) -> Row:
    """A row of a live key."""
    return revision, 0, key, revision - version + 1, version, 0, b"value"


def delete(revision: int, key: bytes) -> Row:
    """A tombstone."""
    return revision, 0, key, 0, 0, 0, b""


def disk(name: str, *rows: Row, shard_map: str = "") -> MemoryDisk:
    """What is stored of one shard."""
    stored = {row[:2]: row for row in rows}
    return MemoryDisk(shard=name, rows=stored, tip=rows[-1][0] if rows else 1, shard_map=shard_map)


async def start(
    new: ShardConfig,
    *disks: MemoryDisk | None,
    old: ShardConfig | None,
    compact_revision: int = -1,
) -> None:
    """The check of a start with the map ``new`` of a store whose map was ``old``, None for a store
    that had none; a disk that is None cannot be reached.
    """
    await hidden(
        old.document() if old else "",
        new.shard_map(),
        document=new.document(),
        names=new.names,
        backends=[MemoryBackend(each, later=at_once) if each else None for each in disks],
        home_tip=disks[0].tip if disks[0] else 1,
        compact_revision=compact_revision,
    )


async def refused(
    new: ShardConfig,
    *disks: MemoryDisk | None,
    old: ShardConfig | None,
    compact_revision: int = -1,
) -> str:
    """What is said of a start that must be refused: one line."""
    with pytest.raises(BackendError) as caught:
        await start(new, *disks, old=old, compact_revision=compact_revision)
    said = str(caught.value)
    assert "\n" not in said
    return said


async def test_first_start() -> None:
    """An empty store takes any map."""
    await start(TWO, disk("core"), disk("events"), old=None)


async def test_same_map_is_not_looked_into() -> None:
    """A start with the stored map needs no shard for it, and trusts what was checked once."""
    await start(TWO, None, None, old=TWO)
    await start(TWO, disk("core", put(2, b"/e/a")), None, old=TWO)


async def test_from_one_shard_to_several() -> None:
    """A store of one shard gets more, if no route leads away from its keys."""
    await start(TWO, disk("core", put(2, b"/a"), put(3, b"/z")), disk("events"), old=CORE)


async def test_from_one_file_to_several() -> None:
    """Likewise one that never had a map, which is called ``default``."""
    new = configured(["default", "events"], EVENTS)
    await start(new, disk("default", put(2, b"/a")), disk("events"), old=None)
    said = await refused(new, disk("default", put(2, b"/e/a")), disk("events"), old=None)
    assert "would hide 1 key: b'/e/a' on shard default, now of shard events" in said


async def test_another_shard_alone() -> None:
    """One of several that is started by itself would begin an order of its own."""
    alone = configured(["events"], {})
    said = await refused(alone, disk("events", put(2, b"/e/a")), old=None)
    assert "shard events has never been the first of a store" in said


async def test_route_away_from_a_key() -> None:
    """The keys that the map would hide are named, with where they are, where it would look for
    them, what changed, and what to do.
    """
    core = disk("core", put(2, b"/a"), put(3, b"/e/b"), put(4, b"/e/a"))
    said = await refused(TWO, core, disk("events"), old=CORE)
    assert "changed (new shard events; new route b'/e/' to events)" in said
    assert "would hide 2 keys: b'/e/a' on shard core, now of shard events, b'/e/b' on" in said
    assert "Put the routes back; or, with them back, delete these keys" in said


async def test_route_taken_away() -> None:
    """Likewise when keys of a shard fall to home."""
    without = configured(["core", "events"], {})
    said = await refused(without, disk("core"), disk("events", put(2, b"/e/a")), old=TWO)
    assert "changed (without route b'/e/' to events)" in said
    assert "would hide 1 key: b'/e/a' on shard events, now of shard core." in said


async def test_many_are_counted() -> None:
    """The line stays one, however much is hidden, however long keys are, however much changed."""
    keys = [b"/e/%d/" % n + bytes(500) for n in range(100, 120)]
    core = disk("core", *(put(n, key) for n, key in enumerate(keys, start=2)))
    routes = {b"/r/%d/" % n: "events" for n in range(100, 110)}
    new = configured(["core", "events"], EVENTS | routes)
    said = await refused(new, core, disk("events"), old=CORE)
    assert "would hide 20 keys: b'/e/100/" in said
    assert "and 17 more. Put" in said
    assert "b'/r/102/' to events, b'/r/103/' to events and 6 more) and" in said
    assert len(said) < 1200


async def test_history_that_is_not_compacted() -> None:
    """A deleted key counts until its deletion cannot be asked for any more."""
    core = disk("core", put(2, b"/e/a"), delete(5, b"/e/a"), put(6, b"/a"))
    said = await refused(TWO, core, disk("events"), old=CORE)
    assert "would hide the history of 1 deleted key: b'/e/a' on shard core" in said
    await refused(TWO, core, disk("events"), old=CORE, compact_revision=5)
    await start(TWO, core, disk("events"), old=CORE, compact_revision=6)


async def test_live_key_below_the_compact_revision() -> None:
    """Compaction does not take live keys away, however old they are."""
    core = disk("core", put(2, b"/e/a"), put(6, b"/a"))
    said = await refused(TWO, core, disk("events"), old=CORE, compact_revision=6)
    assert "would hide 1 key: b'/e/a'" in said


async def test_longer_route_back_home() -> None:
    """What counts is who owns a key in the end."""
    back = configured(["core", "events"], EVENTS | {b"/e/mine/": "core"})
    await start(back, disk("core", put(2, b"/e/mine/a")), disk("events"), old=CORE)
    said = await refused(TWO, disk("core", put(2, b"/e/mine/a")), disk("events"), old=back)
    assert "without route b'/e/mine/' to core" in said


@pytest.mark.parametrize("gone", [0, 1])
async def test_changed_map_needs_every_shard(gone: int) -> None:
    """What is out of reach may hold what the map would hide: it is named."""
    three = configured(["core", "events", "agents"], EVENTS | {b"/g/": "agents"})
    others = [None if n == gone else disk(name) for n, name in enumerate(three.names[1:])]
    said = await refused(three, disk("core"), *others, old=TWO)
    assert f"and shard {three.names[1 + gone]} cannot be reached" in said
    assert "needs every shard" in said


async def test_shard_that_is_left_out() -> None:
    """One that has routes in the stored map may hold keys."""
    said = await refused(CORE, disk("core"), old=TWO)
    assert "the stored map has shard events, which the configuration leaves out" in said
    assert "first start without its routes" in said


async def test_shard_leaves_in_two_steps() -> None:
    """First its routes, when it is empty, then itself."""
    without = configured(["core", "events"], {})
    await start(without, disk("core"), disk("events"), old=TWO)
    await start(CORE, disk("core", put(2, b"/e/a")), old=without)


async def test_home_stays_home() -> None:
    """Leases, the map and the records are on home: another shard does not become it."""
    turned = configured(["events", "core"], EVENTS)
    core = disk("core", put(2, b"/a"), shard_map=TWO.document())
    said = await refused(turned, disk("events", put(3, b"/e/a")), core, old=None)
    assert "shard events has never been the first of a store" in said


async def test_damaged_map() -> None:
    """What home has stored is not guessed at."""
    with pytest.raises(BackendError, match="the map stored on shard core is damaged"):
        await hidden(
            "nonsense",
            ShardMap(),
            document=CORE.document(),
            names=CORE.names,
            backends=[MemoryBackend(disk("core"), later=at_once)],
            home_tip=1,
            compact_revision=-1,
        )


revisions = st.lists(
    st.tuples(st.sampled_from([b"a", b"b", b"c"]), st.booleans()), min_size=1, max_size=12
)


@given(revisions, st.integers(-1, 15), st.sampled_from([1, 100]))
def test_hidden_is_what_anyone_could_ask_for(
    changes: list[tuple[bytes, bool]], compact_revision: int, chunk_rows: int
) -> None:
    """A key is hidden if and only if a read at the compact revision or later finds it, or a watch
    from there hears of it; wherever the rows are cut into chunks.
    """
    rows: list[IndexRow] = []
    versions: dict[bytes, int] = {}
    for revision, (key, deleted) in enumerate(changes, start=2):
        if deleted and not versions.get(key):
            continue
        versions[key] = 0 if deleted else versions.get(key, 0) + 1
        rows.append((revision, 0, key, revision if versions[key] else 0, versions[key], 0))
    askable: dict[bytes, bool] = {}
    for key in versions:
        mine = [row for row in rows if row[2] == key]
        before = [row for row in mine if row[0] <= compact_revision]
        found = bool(before) and before[-1][4] > 0
        heard = any(row[0] >= compact_revision for row in mine)
        if found or heard:
            askable[key] = mine[-1][4] > 0
    strays = Strays(1, ShardMap({b"c": 1}), compact_revision)
    for at in range(0, len(rows), chunk_rows):
        strays.add(rows[at : at + chunk_rows])
    expected = [(key, 1, 0, live) for key, live in sorted(askable.items()) if key != b"c"]
    assert expected == strays.hidden()
