"""What ``kvstore.backend.Backend`` promises about a shard among others, asked of every backend."""

import time

import pytest

from backends.schema import SIZE_MAX
from kvstore.backend import Cluster, CommitResult, HomeRows, LeaseRow, Outcome, Row, ShardRecord
from kvstore.errors import BackendError
from tests.backends.storage import Session, Storage, put

COMMITTED = CommitResult(Outcome.COMMITTED)
CLUSTER = Cluster(cluster_id=2**64 - 2, member_id=5)
EVENTS = ShardRecord("events", 3, "")
AGENTS = ShardRecord("agents", 1 << 62, "7315/2")
NOTHING = HomeRows("", [], [])
MAP = "shards:\n  - {name: first}  # \u00e9\n"
REDO: list[tuple[str, Row]] = [
    ("events", (3, 1, b"\0\xff", 3, 1, -(1 << 63), b"\0" * 70_000)),
    ("agents", (3, 2, b"b", 0, 0, 0, b"")),
    ("events", (3, 4, b"b", 2, (1 << 63) - 1, 7, b"")),
]


def at(revision: int, *subs: int, shard: str = "events") -> list[tuple[str, Row]]:
    """Redo rows of a revision."""
    return [(shard, put(revision, sub, b"%d" % sub)) for sub in subs]


async def test_a_new_shard_takes_the_clusters_ids(storage: Storage) -> None:
    """A shard that is not home gets home's ids when it is new, and keeps them."""
    for _ in range(2):
        session = await Session(storage.backend()).open(CLUSTER)
        assert CLUSTER == (session.fence.cluster_id, session.fence.member_id)
        assert ("first", 1, -1, 0) == (
            session.fence.shard,
            session.fence.tip,
            session.fence.compact_revision,
            session.fence.reserved,
        )
        await session.close()


async def test_the_cluster_that_home_made_is_the_others(storage: Storage) -> None:
    """What home made for itself is what it is found by, too."""
    session = await Session(storage.backend()).open()
    cluster = Cluster(session.fence.cluster_id, session.fence.member_id)
    await session.close()
    again = await Session(storage.backend()).open(cluster)
    assert cluster == (again.fence.cluster_id, again.fence.member_id)
    await again.close()


async def refused(storage: Storage, cluster: Cluster | None, *, shard: str) -> str:
    """Why the store is not opened, in one line."""
    backend = storage.backend(shard)
    with pytest.raises(BackendError) as raised:
        await backend.open(cluster)
    await backend.close()
    reason = str(raised.value)
    assert "\n" not in reason
    return reason


@pytest.mark.parametrize("cluster", [CLUSTER, None], ids=["another shard's", "home's"])
async def test_another_cluster_or_shard_is_refused(
    storage: Storage, cluster: Cluster | None
) -> None:
    """A store of another cluster, or of another shard of ours, is not taken: its epoch, its ids and
    its rows stay, and whoever it belongs to may open it.
    """
    session = await Session(storage.backend()).open(cluster)
    await session.put(b"a")
    await session.close()
    own = Cluster(session.fence.cluster_id, session.fence.member_id)
    other = Cluster(9, own.member_id)
    assert f"{own.cluster_id:x}" in await refused(storage, other, shard="first")
    for wrong in (own, None):
        assert "'first'" in await refused(storage, wrong, shard="second")
    again = await Session(storage.backend()).open(cluster)
    assert session.fence._replace(epoch=2, tip=2) == again.fence
    assert [put(2, 0, b"a")] == await again.rows()
    await again.close()


async def test_a_new_store_has_nothing_of_other_shards(storage: Storage) -> None:
    """There is no map, no record and no redo row, and nothing is reserved."""
    session = await Session(storage.backend()).open()
    assert NOTHING == await session.home()
    assert 0 == session.fence.reserved
    await session.close()


PARTS = ["reserved", "records", "redo", "redo_drops", "shard_map", "tip"]


@pytest.mark.parametrize(
    "parts",
    [[], *([part] for part in PARTS), PARTS],
    ids=lambda parts: "+".join(parts) or "rows alone",
)
async def test_batch_commits_what_home_keeps(storage: Storage, parts: list[str]) -> None:
    """Each part of what home keeps for all is stored with the rows, and alone changes nothing of
    the others.
    """
    session = await Session(storage.backend()).open()
    old = at(2, 1, 2, shard="agents")
    before = session.batch([put(2, 0, b"a")], redo=old, records=[EVENTS])
    assert COMMITTED == await session.commit(before)
    tip = 9 if "tip" in parts else 3
    batch = session.batch(
        [put(3, 0, b"a"), put(3, 3, b"c")],
        tip=tip,
        reserved=1 << 62 if "reserved" in parts else None,
        records=[AGENTS] if "records" in parts else [],
        redo=REDO if "redo" in parts else [],
        redo_drops=[2] if "redo_drops" in parts else [],
        shard_map=MAP if "shard_map" in parts else None,
    )
    assert COMMITTED == await session.commit(batch)
    found = await session.home()
    await session.close()
    again = await Session(storage.backend()).open()
    expected = HomeRows(
        shard_map=MAP if "shard_map" in parts else "",
        records=[AGENTS, EVENTS] if "records" in parts else [EVENTS],
        redo=([] if "redo_drops" in parts else old) + (REDO if "redo" in parts else []),
    )
    assert expected == found == await again.home()
    assert tip == again.fence.tip
    assert (1 << 62 if "reserved" in parts else 0) == again.fence.reserved
    assert [put(2, 0, b"a"), *batch.rows] == await again.rows()
    await again.close()


async def test_what_home_keeps_is_replaced(storage: Storage) -> None:
    """A reservation may go down, a record replaces its shard's, a map the map."""
    session = await Session(storage.backend()).open()
    many = [ShardRecord(f"shard {n:04}", n, "") for n in range(1, SIZE_MAX + 3)]
    first = session.batch(reserved=1 << 40, records=many, shard_map=MAP)
    assert COMMITTED == await session.commit(first)
    newer = [ShardRecord("shard 0002", 77, "other"), ShardRecord("shard 0003", 1, "")]
    second = session.batch(reserved=5, records=newer, shard_map="shards: []\n")
    assert COMMITTED == await session.commit(second)
    await session.close()
    again = await Session(storage.backend()).open()
    assert 5 == again.fence.reserved
    expected = [many[0], *newer, *many[3:]]
    assert HomeRows("shards: []\n", expected, []) == await again.home()
    await again.close()


async def test_redo_rows_leave_by_revision(storage: Storage) -> None:
    """Redo rows come in their order, however many; all of a revision leave together, and a revision
    without any is no error. They are no rows of this shard.
    """
    session = await Session(storage.backend()).open()
    many = at(2, *range(SIZE_MAX + 3))
    batch = session.batch(redo=[*many, *at(3, 0, 1), *at(4, 0)], tip=4)
    assert COMMITTED == await session.commit(batch)
    assert batch.redo == (await session.home()).redo
    assert [] == await session.rows()
    assert [] == await session.index()
    assert [None] == await session.values((3, 0))
    drops = session.batch(
        [put(5, 1, b"a")], redo=at(5, 0, shard="agents"), redo_drops=[2, 4, 1, 99]
    )
    assert COMMITTED == await session.commit(drops)
    assert [*at(3, 0, 1), *at(5, 0, shard="agents")] == (await session.home()).redo
    gone = session.batch(redo_drops=[*range(3, 3 + SIZE_MAX), *range(1_000, 1_000 + SIZE_MAX)])
    assert COMMITTED == await session.commit(gone)
    assert NOTHING == await session.home()
    assert [put(5, 1, b"a")] == await session.rows()
    await session.close()


async def test_tip_may_be_above_the_last_row(storage: Storage) -> None:
    """The tip goes where the batch says, with rows or without, stays there after a reopen, and the
    next batch stands on it.
    """
    session = await Session(storage.backend()).open()
    assert COMMITTED == await session.commit(session.batch(tip=1 << 30))
    row = put(1 + (1 << 30), 0, b"a")
    assert COMMITTED == await session.commit(session.batch([row], tip=1 << 31))
    behind = session.batch([put(2 + (1 << 30), 0, b"b")])
    behind.tip_before = row[0]
    assert Outcome.FENCED is (await session.commit(behind)).outcome
    assert COMMITTED == await session.commit(session.batch())
    await session.close()
    again = await Session(storage.backend()).open()
    assert 1 << 31 == again.fence.tip
    await again.put(b"c")
    assert [row, put(1 + (1 << 31), 0, b"c")] == await again.rows()
    await again.close()


async def test_fence_refuses_what_home_keeps(storage: Storage) -> None:
    """Once another process has raised the epoch, or moved the tip, nothing that home keeps for all
    is stored, and nothing with it.
    """
    session = await Session(storage.backend()).open()
    first = session.batch(redo=at(2, 0), records=[EVENTS], reserved=7, shard_map=MAP, tip=2)
    assert COMMITTED == await session.commit(first)
    kept = await session.home()
    for epoch, tip in ((session.fence.epoch + 1, 2), (session.fence.epoch, 8)):
        await storage.steal(epoch, tip)
        for batch in (
            session.batch(reserved=99),
            session.batch(records=[AGENTS, EVENTS._replace(tip=9)]),
            session.batch(redo=at(3, 0, 1), tip=3),
            session.batch([put(3, 1, b"a")], redo=at(3, 0)),
            session.batch(redo_drops=[2]),
            session.batch(shard_map="shards: []\n"),
            session.batch(tip=99),
        ):
            assert Outcome.FENCED is (await session.commit(batch)).outcome
        assert kept == await session.home()
        assert [] == await session.rows()
    await session.close()
    again = await Session(storage.backend()).open()
    assert (7, 8) == (again.fence.reserved, again.fence.tip)
    await again.close()


@pytest.mark.parametrize("part", [*PARTS, "all"])
async def test_resolve_of_what_home_keeps(storage: Storage, part: str) -> None:
    """Each part tells whether its batch has been stored, where the tip says nothing, too."""
    session = await Session(storage.backend()).open()
    before = session.batch(redo=at(2, 0), records=[EVENTS], reserved=7, shard_map="", tip=2)
    assert COMMITTED == await session.commit(before)
    batch = session.batch(
        tip={"tip": 9, "redo": 3, "all": 9}.get(part),
        reserved=99 if part in ("reserved", "all") else None,
        records=[AGENTS, EVENTS] if part in ("records", "all") else [],
        redo=at(3, 0) if part in ("redo", "all") else [],
        redo_drops=[2] if part in ("redo_drops", "all") else [],
        shard_map=MAP if part in ("shard_map", "all") else None,
        lease_puts=[LeaseRow(1, 2, 0)] if part == "all" else [],
    )
    assert Outcome.NOT_COMMITTED is (await session.resolve(batch)).outcome
    assert COMMITTED == await session.commit(batch)
    assert COMMITTED == await session.resolve(batch)
    following = session.batch([put(batch.tip + 1, 0, b"a")])
    assert COMMITTED == await session.commit(following)
    await session.close()


async def test_an_open_shard_is_held(storage: Storage) -> None:
    """Whoever has opened a shard holds it for now, knows which database it is, and hears of no
    trouble while all is well.
    """
    session = await Session(storage.backend()).open()
    told: list[str] = []
    session.backend.on_broken = told.append
    session.backend.on_out = told.append
    session.backend.on_back = lambda: told.append("back")
    await session.put(b"a")
    await session.values((2, 0))
    assert time.monotonic() < session.backend.lease_until()
    assert session.fence.origin == session.backend.origin
    await session.close()
    assert [] == told


async def test_a_closed_backend_may_be_opened_again(storage: Storage) -> None:
    """A shard that was refused, or closed after it was opened, may be asked for again and again:
    each open is like the first.
    """
    session = Session(storage.backend())
    epochs = []
    for number in range(3):
        await session.open(CLUSTER)
        await session.put(b"%d" % number)
        epochs.append(session.fence.epoch)
        await session.close()
        with pytest.raises(BackendError):
            await session.backend.open(Cluster(9, 9))
        await session.close()
    assert [1, 2, 3] == epochs
    await session.open(CLUSTER)
    assert [put(2 + n, 0, b"%d" % n) for n in range(3)] == await session.rows()
    assert [b"v", None] == await session.values((2, 0), (2, 1))
    await session.close()
