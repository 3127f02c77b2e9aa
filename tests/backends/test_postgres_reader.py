"""Reading from PostgreSQL, sizes, and giving room back."""

import asyncio
import time
from collections.abc import AsyncIterator
from random import Random

import pytest

from backends import postgres_reader
from kvstore.backend import CommitResult, Outcome
from kvstore.errors import BackendError, ReadsFullError
from tests.backends.postgres_storage import QUICK, PostgresStorage, eventually
from tests.backends.storage import Session, put

pytestmark = pytest.mark.postgres
COMMITTED = CommitResult(Outcome.COMMITTED)


@pytest.fixture
async def session(postgres_storage: PostgresStorage) -> AsyncIterator[Session]:
    """An open store."""
    opened = await Session(postgres_storage.backend()).open()
    yield opened
    await opened.close()


async def test_reads_share_the_connections(
    session: Session, postgres_storage: PostgresStorage
) -> None:
    """However many reads wait, there are as many reading connections as were asked for."""
    rows = [put(2 + n, 0, b"%d" % n, value=b"v%d" % n) for n in range(100)]
    assert COMMITTED == await session.commit(session.batch(rows))
    found = await asyncio.gather(*(session.values((2 + n, 0)) for n in range(100)))
    assert [[row[6]] for row in rows] == found
    (row,) = await postgres_storage.sql(
        "SELECT count(*) FROM pg_stat_activity"
        f" WHERE application_name = 'kvstore reader {postgres_storage.schema}'"
    )
    assert postgres_storage.config.readers == row[0]


async def test_too_many_reads_are_refused(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads that wait are bounded; those below are answered."""
    await session.put(b"a")
    monkeypatch.setattr(postgres_reader, "READS_MAX", 3)
    results: list[list[bytes | None] | BackendError] = []
    for _ in range(5):
        session.backend.read_values([(2, 0)], results.append)
    await eventually(lambda: len(results) == 5)
    assert 2 == sum(isinstance(result, ReadsFullError) for result in results)
    assert 3 == results.count([b"v"])


async def test_large_values_are_read_whole(session: Session) -> None:
    """Values of a request's largest size, compressible or not, come back as they were."""
    values = [bytes(1_500_000), Random(1).randbytes(1_500_000), b"", b"\0"]
    rows = [put(2 + n, 0, b"k", value=value) for n, value in enumerate(values)]
    assert COMMITTED == await session.commit(session.batch(rows))
    assert values == await session.values(*((2 + n, 0) for n in range(4)))
    assert rows == await session.rows()


async def test_vacuum_makes_room_while_commits_go_on(session: Session) -> None:
    """What was dropped is room for what comes: storing as much again makes the tables hardly
    larger; two at a time are refused, and commits do not wait.
    """
    rows = [put(2 + n, 0, b"%d" % n, value=Random(n).randbytes(2_000)) for n in range(1_000)]
    assert COMMITTED == await session.commit(session.batch(rows))
    await session.defragment()
    full = session.backend.sizes()
    assert 2_000_000 < full.in_use < full.total
    kept = rows[::50]
    drops = [(row[0], 0) for row in rows if row not in kept]
    assert COMMITTED == await session.commit(session.batch(drops=drops))
    vacuum = asyncio.create_task(session.defragment())
    await asyncio.sleep(0)
    with pytest.raises(BackendError, match="is being defragmented"):
        await session.defragment()
    while not vacuum.done():
        await session.put(b"meanwhile")
    await vacuum
    await session.defragment()  # a look by PostgreSQL's own autovacuum may have kept rows from it
    again = [put(50_000 + n, 0, b"k", value=Random(n).randbytes(2_000)) for n in range(900)]
    assert COMMITTED == await session.commit(session.batch(again))
    await session.defragment()
    assert session.backend.sizes().total <= 1.1 * full.total


async def test_sizes_are_measured_now_and_then(
    postgres_storage: PostgresStorage, session: Session
) -> None:
    """The total becomes what PostgreSQL says, without anybody having waited for it."""
    rows = [put(2 + n, 0, b"%d" % n, value=bytes(2_000)) for n in range(1_000)]
    assert COMMITTED == await session.commit(session.batch(rows))
    estimated = session.backend.sizes().total
    session.backend._measure_at = 0.0  # type: ignore[attr-defined]
    await eventually(lambda: session.backend.sizes().total != estimated)
    (row,) = await postgres_storage.sql(
        "SELECT sum(pg_total_relation_size(c.oid)) FROM pg_class c JOIN pg_namespace n"
        f" ON n.oid = c.relnamespace WHERE n.nspname = '{postgres_storage.schema}'"
        " AND c.relkind = 'r'"
    )
    sizes = session.backend.sizes()
    assert max(int(row[0]), sizes.in_use) == sizes.total


@pytest.mark.slow
async def test_a_large_index_is_loaded_in_time(session: Session) -> None:
    """200,000 rows are loaded within five seconds, in chunks, and counted as in use."""
    step = 10_000
    for start in range(0, 200_000, step):
        rows = [
            put(2 + n, 0, b"/registry/pods/tenant-%d/pod-%08d" % (n % 100, n), value=bytes(100))
            for n in range(start, start + step)
        ]
        assert COMMITTED == await session.commit(session.batch(rows))
    await session.close()
    await session.open()
    began = time.monotonic()
    chunks = await session.index()
    assert time.monotonic() - began < 5.0
    assert 200_000 == sum(map(len, chunks))
    assert 200_000 == QUICK.load_chunk_rows * len(chunks)
    assert 200_000 * 100 < session.backend.sizes().in_use
