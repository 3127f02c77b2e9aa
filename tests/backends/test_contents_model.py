"""Random batches on the memory backend and on SQLite leave equal contents."""

import asyncio
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.backend import Batch, CommitResult, LeaseRow, Outcome, Row, RowId
from tests.backends.storage import MemoryStorage, Session, SqliteStorage, Storage

INT64 = st.one_of(st.integers(0, 9), st.integers(-(1 << 63), (1 << 63) - 1))
CHANGES = st.tuples(st.binary(max_size=6), INT64, INT64, INT64, st.binary(max_size=40))
LEASES = st.builds(LeaseRow, st.integers(0, 5), INT64, INT64)
STEP = st.fixed_dictionaries(
    {
        "revisions": st.lists(
            st.tuples(st.integers(1, 3), st.lists(CHANGES, min_size=1, max_size=4)), max_size=6
        ),
        "drops": st.lists(st.tuples(st.integers(0, 25), st.integers(0, 4)), max_size=8),
        "lease_puts": st.lists(LEASES, max_size=3),
        "lease_deletes": st.lists(st.integers(0, 5), max_size=3),
        "compact_revision": st.none() | st.integers(0, 20),
        "tip_is_wrong": st.sampled_from([False, False, False, True]),
        "reopen": st.booleans(),
    }
)


def batch_of(session: Session, step: dict) -> Batch:  # type: ignore[type-arg]
    """The batch that ``step`` makes on top of the session's tip."""
    rows: list[Row] = []
    revision = session.tip
    for distance, changes in step["revisions"]:
        revision += distance
        rows += [(revision, sub, *change) for sub, change in enumerate(changes)]
    batch = session.batch(
        rows,
        drops=step["drops"],
        lease_puts=step["lease_puts"],
        lease_deletes=step["lease_deletes"],
        compact_revision=step["compact_revision"],
    )
    if step["tip_is_wrong"]:
        batch.tip_before += 1
    return batch


async def contents(session: Session) -> tuple[object, ...]:
    """All that a backend holds, by every way of reading."""
    rows = await session.rows()
    ids: list[RowId] = [(row[0], row[1]) for row in rows]
    assert [row[6] for row in rows] == await session.values(*ids)
    assert [row[:6] for row in rows] == [row for chunk in await session.index() for row in chunk]
    fence = session.fence
    return rows, await session.leases(), fence.epoch, fence.tip, fence.compact_revision


async def run(steps: list[dict], directory: Path) -> None:  # type: ignore[type-arg]
    """Apply ``steps`` to both and compare after each."""
    storages: list[Storage] = [MemoryStorage(), SqliteStorage(directory / "kvstore.db")]
    sessions = [await Session(storage.backend()).open() for storage in storages]
    for step in steps:
        results: list[CommitResult] = []
        for n, storage in enumerate(storages):
            results.append(await sessions[n].commit(batch_of(sessions[n], step)))
            if step["reopen"]:
                await sessions[n].close()
                sessions[n] = await Session(storage.backend()).open()
        expected = Outcome.FENCED if step["tip_is_wrong"] else Outcome.COMMITTED
        assert [expected, expected] == [result.outcome for result in results]
        assert sessions[0].tip == sessions[1].tip
        assert await contents(sessions[0]) == await contents(sessions[1])
    for session in sessions:
        await session.close()


@pytest.mark.slow
@given(st.lists(STEP, max_size=4))
def test_memory_and_sqlite_are_equal(steps: list[dict]) -> None:  # type: ignore[type-arg]
    """The reference and SQLite agree on the outcome of every batch and on all that is stored."""
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(run(steps, Path(directory)))
