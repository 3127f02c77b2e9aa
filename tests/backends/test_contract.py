"""What ``kvstore.backend.Backend`` promises, asked of every backend."""

from random import Random

import pytest

from backends.schema import SIZE_MAX
from kvstore.backend import Batch, Cluster, CommitResult, LeaseRow, Outcome, Row
from kvstore.errors import BackendError
from tests.backends.storage import Session, Storage, put

COMMITTED = CommitResult(Outcome.COMMITTED)


async def test_new_store_is_empty(storage: Storage) -> None:
    """A new store has etcd's numbers of an empty one, ids that are not zero, and no rows."""
    session = await Session(storage.backend()).open()
    fence = session.fence
    assert (1, -1, 1) == (fence.tip, fence.compact_revision, fence.epoch)
    assert "first" == fence.shard
    assert 0 < fence.cluster_id < 1 << 64
    assert 0 < fence.member_id < 1 << 64
    assert [] == await session.index()
    assert [] == await session.rows()
    assert [] == await session.leases()
    await session.close()


async def test_identity_stays_and_epoch_grows(storage: Storage) -> None:
    """Each open raises the epoch by one and finds the same ids."""
    fences = []
    for _ in range(3):
        session = await Session(storage.backend()).open()
        fences.append(session.fence)
        await session.close()
    assert [1, 2, 3] == [fence.epoch for fence in fences]
    assert 1 == len({fence._replace(epoch=0) for fence in fences})


async def test_what_was_there_before_is_not_made(storage: Storage) -> None:
    """A known shard of which there is nothing is refused, or out of reach; a new one is made."""
    cluster = Cluster(7, 8)
    backend = storage.backend()
    with pytest.raises(BackendError):
        await backend.open(cluster, known=True)
    session = await Session(backend).open(cluster)
    assert (1, 7, 1) == (session.fence.epoch, session.fence.cluster_id, session.fence.tip)
    await session.close()
    assert 2 == (await backend.open(cluster, known=True)).epoch
    await backend.close()


async def test_everything_survives_a_reopen(storage: Storage) -> None:
    """Rows, leases, tip and compact revision are there after close and open."""
    session = await Session(storage.backend()).open()
    rows: list[Row] = [
        (2, 0, b"\0\xff", 2, 1, 7, b""),
        (2, 1, b"b", 2, 1, -(1 << 63), b"\0" * 70_000),
        (3, 0, b"\0\xff", 0, 0, 0, b""),
        ((1 << 62), 0, b"b", 2, 2, (1 << 63) - 1, b"x"),
    ]
    lease = LeaseRow((1 << 63) - 1, 9_000_000_000, 17)
    batch = session.batch(rows, lease_puts=[lease], compact_revision=2)
    assert COMMITTED == await session.commit(batch)
    await session.close()
    again = await Session(storage.backend()).open()
    assert (1 << 62, 2) == (again.fence.tip, again.fence.compact_revision)
    assert rows == await again.rows()
    assert [lease] == await again.leases()
    await again.close()


@pytest.mark.parametrize("count", [1, 2, 3, SIZE_MAX, SIZE_MAX + 1, 2 * SIZE_MAX + 7])
async def test_batch_of_any_size_is_stored_whole(storage: Storage, count: int) -> None:
    """Batches of every size, around the sizes of statements too, are stored in order."""
    session = await Session(storage.backend()).open()
    rows = [put(2 + n, 0, b"%d" % n, value=b"v" * (n % 5)) for n in range(count)]
    assert COMMITTED == await session.commit(session.batch(rows))
    assert rows == await session.rows()
    await session.close()


async def test_fence_refuses_another_epoch(storage: Storage) -> None:
    """Once another process has raised the epoch, a batch of any kind stores nothing."""
    session = await Session(storage.backend()).open()
    await session.put(b"a")
    await storage.steal(session.fence.epoch + 1, session.tip)
    refused = [
        session.batch([put(3, 0, b"b")]),
        session.batch([put(3, 0, b"b")], drops=[(2, 0)]),
        session.batch(lease_puts=[LeaseRow(1, 2, 0)]),
        session.batch(compact_revision=2),
    ]
    for batch in refused:
        assert Outcome.FENCED is (await session.commit(batch)).outcome
    assert [put(2, 0, b"a")] == await session.rows()
    assert [] == await session.leases()
    await session.close()
    again = await Session(storage.backend()).open()
    assert (2, -1) == (again.fence.tip, again.fence.compact_revision)
    await again.close()


@pytest.mark.parametrize("change", [-1, 1])
async def test_fence_refuses_another_tip(storage: Storage, change: int) -> None:
    """A batch that expects another tip than the last batch's stores nothing; the next may go on."""
    session = await Session(storage.backend()).open()
    await session.put(b"a")
    await session.put(b"b")
    wrong = Batch(
        epoch=session.fence.epoch,
        tip_before=session.tip + change,
        tip=9,
        rows=[put(9, 0, b"c")],
    )
    assert Outcome.FENCED is (await session.commit(wrong)).outcome
    await session.put(b"d")
    assert [2, 3, 4] == [row[0] for row in await session.rows()]
    await session.close()


async def test_fence_refuses_a_tip_that_moved_on(storage: Storage) -> None:
    """A fence row whose tip is beyond ours stops us even if its epoch is ours."""
    session = await Session(storage.backend()).open()
    await session.put(b"a")
    await storage.steal(session.fence.epoch, 99)
    assert Outcome.FENCED is (await session.commit(session.batch([put(3, 0, b"b")]))).outcome
    assert Outcome.FENCED is (await session.commit(session.batch(drops=[(2, 0)]))).outcome
    assert [put(2, 0, b"a")] == await session.rows()
    await session.close()


async def test_drops_leave_for_ever(storage: Storage) -> None:
    """Dropped rows are gone, others stay, and rows that are not there are no error."""
    session = await Session(storage.backend()).open()
    rows = [put(2 + n // 3, n % 3, b"%d" % n) for n in range(2_000)]
    assert COMMITTED == await session.commit(session.batch(rows))
    drops = [(row[0], row[1]) for row in rows if row[0] % 2 == 0]
    Random(7).shuffle(drops)
    gone = [*drops, (1, 0), (2, 17), (10**9, 0)]
    assert COMMITTED == await session.commit(session.batch(drops=gone))
    left = [row for row in rows if row[0] % 2]
    assert left == await session.rows()
    await session.close()
    again = await Session(storage.backend()).open()
    assert left == await again.rows()
    await again.close()


async def test_tip_outlives_its_row(storage: Storage) -> None:
    """The revision never goes back, even when compaction drops the newest row."""
    session = await Session(storage.backend()).open()
    await session.put(b"a")
    await session.put(b"b")
    assert COMMITTED == await session.commit(session.batch(drops=[(2, 0), (3, 0)]))
    await session.close()
    again = await Session(storage.backend()).open()
    assert 3 == again.fence.tip
    assert [] == await again.rows()
    await again.put(b"c")
    assert [put(4, 0, b"c")] == await again.rows()
    await again.close()


@pytest.mark.parametrize(
    "parts",
    [
        ["drops"],
        ["lease_puts"],
        ["lease_deletes"],
        ["compact_revision"],
        ["drops", "lease_puts", "lease_deletes", "compact_revision"],
    ],
    ids="+".join,
)
async def test_batch_commits_all_of_its_parts(storage: Storage, parts: list[str]) -> None:
    """Beside rows, a batch may drop others, change leases and compact: each part counts."""
    session = await Session(storage.backend()).open()
    before = session.batch([put(2, 0, b"a"), put(2, 1, b"b")], lease_puts=[LeaseRow(3, 9, 0)])
    assert COMMITTED == await session.commit(before)
    batch = session.batch(
        [put(3, 0, b"a", lease=5)],
        drops=[(2, 0)] if "drops" in parts else [],
        lease_puts=[LeaseRow(5, 60, 0)] if "lease_puts" in parts else [],
        lease_deletes=[3] if "lease_deletes" in parts else [],
        compact_revision=3 if "compact_revision" in parts else None,
    )
    assert COMMITTED == await session.commit(batch)
    await session.close()
    again = await Session(storage.backend()).open()
    kept = [] if "drops" in parts else [put(2, 0, b"a")]
    assert [*kept, put(2, 1, b"b"), put(3, 0, b"a", lease=5)] == await again.rows()
    old = [] if "lease_deletes" in parts else [LeaseRow(3, 9, 0)]
    new = [LeaseRow(5, 60, 0)] if "lease_puts" in parts else []
    assert [*old, *new] == await again.leases()
    assert (3 if "compact_revision" in parts else -1) == again.fence.compact_revision
    await again.close()


async def test_leases_are_replaced_and_deleted(storage: Storage) -> None:
    """A put replaces, a delete removes, and within a batch deletes come before puts."""
    session = await Session(storage.backend()).open()
    many = [LeaseRow(n, n + 1, 0) for n in range(1, SIZE_MAX + 3)]
    assert COMMITTED == await session.commit(session.batch(lease_puts=many))
    change = session.batch(
        lease_puts=[LeaseRow(1, 60, 30), LeaseRow(2, 60, 0)], lease_deletes=[2, 3, 12345678]
    )
    assert COMMITTED == await session.commit(change)
    expected = [LeaseRow(1, 60, 30), LeaseRow(2, 60, 0), *many[3:]]
    assert expected == await session.leases()
    await session.close()


async def test_empty_batch_only_asks_the_fence(storage: Storage) -> None:
    """A batch without any change is committed while the shard is ours and fenced when it is not."""
    session = await Session(storage.backend()).open()
    assert COMMITTED == await session.commit(session.batch())
    await storage.steal(session.fence.epoch + 1, session.tip)
    assert Outcome.FENCED is (await session.commit(session.batch())).outcome
    await session.close()


async def test_index_comes_in_order_and_in_chunks(storage: Storage) -> None:
    """Every row comes once, without its value, ordered by revision and sub."""
    session = await Session(storage.backend()).open()
    rows = [put(2 + n // 7, n % 7, b"k%d" % n, value=b"x" * 10) for n in range(11_000)]
    assert COMMITTED == await session.commit(session.batch(rows))
    chunks = await session.index()
    assert [row[:6] for row in rows] == [row for chunk in chunks for row in chunk]
    assert 1 < len(chunks)
    assert 0 < min(map(len, chunks))
    await session.close()


async def test_values_come_in_the_order_asked(storage: Storage) -> None:
    """Values are found by id in any order and number, repeated too; None where there is no row."""
    session = await Session(storage.backend()).open()
    rows = [put(2 + n, 0, b"%d" % n, value=b"\0v%d" % n * (n % 4)) for n in range(600)]
    assert COMMITTED == await session.commit(session.batch(rows))
    stored = {(row[0], row[1]): row[6] for row in rows}
    ids = [*stored, (2, 1), (2, 0), (999_999, 0), (2, 0)]
    Random(3).shuffle(ids)
    assert [stored.get(id_) for id_ in ids] == await session.values(*ids)
    assert [] == await session.values()
    assert [None] == await session.values((0, 0))
    assert [None, None] == await session.values((0, 0), (1, 1))
    await session.close()


async def test_rows_come_after_an_id_up_to_a_limit(storage: Storage) -> None:
    """History is read from any point, a revision's rows not excepted, in pages of any size."""
    session = await Session(storage.backend()).open()
    rows = [put(2 + n // 3, n % 3, b"%d" % n, value=b"v" * n) for n in range(400)]
    assert COMMITTED == await session.commit(session.batch(rows))
    assert rows[4:6] == await session.rows((3, 0), 2)
    assert rows[3:] == await session.rows((2, 2))
    assert rows[:300] == await session.rows((0, 0), 300)
    assert [] == await session.rows((10**9, 0))
    assert [] == await session.rows((0, 0), 0)
    await session.close()


async def test_reads_see_the_last_commit(storage: Storage) -> None:
    """What has been reported committed is there for the next read."""
    session = await Session(storage.backend()).open()
    for n in range(20):
        await session.put(b"k", value=b"%d" % n)
        assert [b"%d" % n] == await session.values((session.tip, 0))
    await session.close()


async def test_resolve_tells_what_is_stored(storage: Storage) -> None:
    """A batch that was committed resolves as such, one that never came does not, and can be sent
    again.
    """
    session = await Session(storage.backend()).open()
    first = session.batch([put(2, 0, b"a")])
    assert COMMITTED == await session.commit(first)
    assert COMMITTED == await session.resolve(first)
    second = session.batch([put(3, 0, b"b")])
    assert Outcome.NOT_COMMITTED is (await session.resolve(second)).outcome
    assert COMMITTED == await session.commit(second)
    assert Outcome.FENCED is (await session.resolve(first)).outcome
    assert [put(2, 0, b"a"), put(3, 0, b"b")] == await session.rows()
    await session.close()


async def test_resolve_of_a_batch_without_rows(storage: Storage) -> None:
    """Where the tip says nothing, the changes themselves tell."""
    session = await Session(storage.backend()).open()
    await session.put(b"a")
    batch = session.batch(
        drops=[(2, 0)], lease_puts=[LeaseRow(1, 2, 0)], lease_deletes=[3], compact_revision=2
    )
    assert Outcome.NOT_COMMITTED is (await session.resolve(batch)).outcome
    assert COMMITTED == await session.commit(batch)
    assert COMMITTED == await session.resolve(batch)
    await session.close()


async def test_second_holder_is_refused(storage: Storage) -> None:
    """While one backend is open another one is refused and changes nothing; afterwards it may."""
    first = await Session(storage.backend()).open()
    second = storage.backend()
    with pytest.raises(BackendError):
        await second.open()
    await second.close()
    await first.put(b"a")
    await first.close()
    third = await Session(storage.backend()).open()
    assert (2, 2) == (third.fence.epoch, third.fence.tip)
    await third.close()


async def test_close_is_idempotent(storage: Storage) -> None:
    """A second close changes nothing, not even what another backend holds by then."""
    first = await Session(storage.backend()).open()
    await first.close()
    second = await Session(storage.backend()).open()
    await first.close()
    await second.put(b"a")
    with pytest.raises(BackendError):
        await storage.backend().open()
    await second.close()


async def test_close_before_open_does_nothing(storage: Storage) -> None:
    """Whoever cleans up after a failed start need not know how far it got."""
    backend = storage.backend()
    await backend.close()
    session = await Session(storage.backend()).open()
    await backend.close()
    await session.put(b"a")
    await session.close()


async def test_sizes_follow_the_rows(storage: Storage) -> None:
    """Sizes grow with rows; dropping gives bytes in use back, defragmenting the total; what is
    left is still there.
    """
    session = await Session(storage.backend()).open()
    empty = session.backend.sizes()
    assert 0 <= empty.in_use <= empty.total
    rows = [put(2 + n, 0, b"%d" % n, value=bytes(2_000)) for n in range(1_000)]
    assert COMMITTED == await session.commit(session.batch(rows))
    full = session.backend.sizes()
    assert empty.in_use + 2_000_000 <= full.in_use <= full.total
    drops = [(row[0], row[1]) for row in rows[:900]]
    assert COMMITTED == await session.commit(session.batch(drops=drops))
    dropped = session.backend.sizes()
    assert full.total == dropped.total
    assert dropped.in_use <= full.in_use // 4
    await session.defragment()
    small = session.backend.sizes()
    assert small.total <= full.total // 4
    assert small.in_use <= small.total
    assert rows[900:] == await session.rows()
    await session.put(b"after")
    await session.close()
