"""What an SQLite store does when the disk, the file system or another process fails it.

A write whose end is uncertain is never acknowledged, and a store that cannot be trusted stops.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import anyio.lowlevel
import apsw
import pytest

from backends import sqlite, sqlite_file
from backends.sqlite import SqliteBackend
from backends.sqlite_writer import Writer
from kvstore.backend import (
    Batch,
    CommitResult,
    HomeRows,
    LeaseRow,
    Outcome,
    Row,
    ShardRecord,
)
from kvstore.config import SqliteConfig
from kvstore.errors import BackendError, ReadsFullError
from tests.backends.faults import Faults, faults_under_sqlite
from tests.backends.raw import raw, writing
from tests.backends.storage import Session, put

COMMITTED = CommitResult(Outcome.COMMITTED)
SMALL_LOG = SqliteConfig(checkpoint_bytes=128 * 1024, wal_bytes_max=1024 * 1024)


@pytest.fixture
def faults() -> Iterator[Faults]:
    """Faults under every connection of the test."""
    with faults_under_sqlite() as installed:
        yield installed


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the store is."""
    return tmp_path / "kvstore.db"


@pytest.fixture
async def session(path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Session]:
    """A store with one row, opened after the faults if the test has them."""
    if "faults" in request.fixturenames:
        request.getfixturevalue("faults")
    opened = await Session(SqliteBackend(path, config=SMALL_LOG)).open()
    await opened.put(b"first")
    yield opened
    await opened.close()


def large(session: Session, count: int = 100) -> list[Row]:
    """Rows of 1 MB together."""
    return [put(session.tip + 1 + n, 0, b"%d" % n, value=bytes(10_000)) for n in range(count)]


def over_shards(session: Session) -> Batch:
    """One row, and 1 MB of others' rows after it, with all else that home keeps."""
    redo = [("events", row) for row in large(session)]
    return session.batch(
        [put(session.tip + 1, 1, b"own")],
        tip=redo[-1][1][0],
        reserved=1 << 30,
        records=[ShardRecord("events", 2, "")],
        redo=redo,
        redo_drops=[1],
        shard_map="a map",
    )


def batches(session: Session) -> dict[str, Batch]:
    """A batch of each form that a commit may take."""
    rows = large(session)
    return {
        "one statement": session.batch(rows),
        "several statements": session.batch(rows, drops=[(1, 0)], compact_revision=2),
        "many rows": session.batch([put(3 + n, 0, b"k", value=bytes(999)) for n in range(1_000)]),
        "home's parts": over_shards(session),
    }


def damage(path: Path) -> None:
    """Overwrite all pages of a closed store but the first."""
    content = path.read_bytes()
    first = content[: sqlite_file.PAGE_BYTES]
    path.write_bytes(first + b"\xa5" * (len(content) - len(first)))


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until the condition holds."""
    async with asyncio.timeout(30):
        while not condition():
            await anyio.lowlevel.checkpoint()


def log_bytes(path: Path) -> int:
    """The size of the write-ahead log."""
    return path.with_name("kvstore.db-wal").stat().st_size


FORMS = ["one statement", "several statements", "many rows", "home's parts"]
NOTHING = HomeRows("", [], [])


@pytest.mark.parametrize("form", FORMS)
async def test_full_database_stores_nothing_and_recovers(session: Session, form: str) -> None:
    """SQLITE_FULL is a definite no: nothing of the batch is there, smaller writes and deletes work,
    and the same revisions are stored once there is room.
    """
    batch = batches(session)[form]
    (await writing(session.backend)).pragma("max_page_count", 20)
    result = await session.commit(batch)
    assert (Outcome.NOT_COMMITTED, True) == (result.outcome, "SQLITE_FULL" in result.reason)
    assert [put(2, 0, b"first")] == await session.rows()
    assert NOTHING == await session.home()
    assert COMMITTED == await session.commit(session.batch(lease_puts=[LeaseRow(1, 2, 0)]))
    (await writing(session.backend)).pragma("max_page_count", 1 << 30)
    assert COMMITTED == await session.commit(batch)
    assert [put(2, 0, b"first"), *batch.rows] == await session.rows()
    assert batch.redo == (await session.home()).redo


@pytest.mark.parametrize("form", FORMS)
async def test_full_disk_stores_nothing_and_recovers(
    session: Session, faults: Faults, form: str
) -> None:
    """A log that cannot grow is the same as a database that cannot."""
    batch = batches(session)[form]
    faults.failing["write", "-wal"] = apsw.SQLITE_FULL
    for _ in range(3):
        result = await session.commit(batch)
        assert (Outcome.NOT_COMMITTED, True) == (result.outcome, "SQLITE_FULL" in result.reason)
    faults.failing.clear()
    assert [put(2, 0, b"first")] == await session.rows()
    assert NOTHING == await session.home()
    assert COMMITTED == await session.commit(batch)
    assert [put(2, 0, b"first"), *batch.rows] == await session.rows()
    assert batch.redo == (await session.home()).redo


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("operation", "code"),
    [("sync", apsw.SQLITE_IOERR_FSYNC), ("write", apsw.SQLITE_IOERR_WRITE)],
)
async def test_io_error_breaks_the_store(
    path: Path, session: Session, faults: Faults, form: str, operation: str, code: int
) -> None:
    """After an I/O error on commit the batch is not acknowledged, and no later one either, even if
    the disk seems well again; what had been acknowledged before is there, for another process.
    """
    faults.failing[operation, "-wal"] = code
    result = await session.commit(batches(session)[form])
    assert Outcome.BROKEN is result.outcome
    assert "SQLITE_IOERR" in result.reason
    faults.failing.clear()
    for batch in batches(session).values():
        assert Outcome.BROKEN is (await session.commit(batch)).outcome
        assert Outcome.BROKEN is (await session.resolve(batch)).outcome
    with pytest.raises(BackendError, match="SQLITE_IOERR"):
        await session.defragment()
    await session.close()
    with pytest.raises(BackendError, match="cannot be trusted any more: SQLITE_IOERR"):
        await session.backend.open()
    again = await Session(SqliteBackend(path)).open()
    assert put(2, 0, b"first") in await again.rows()
    await again.close()


async def test_failed_sync_of_a_checkpoint_breaks_the_store(
    session: Session, faults: Faults
) -> None:
    """The commit before a failed checkpoint stands, the next one is refused for good; that it will
    be is told without waiting for it.
    """
    faults.failing["sync", ".db"] = apsw.SQLITE_IOERR_FSYNC
    reasons: list[str] = []
    session.backend.on_broken = reasons.append
    rows = large(session)
    assert COMMITTED == await session.commit(session.batch(rows))
    await until(lambda: len(reasons) > 0)
    result = await session.commit(session.batch([put(session.tip + 1, 0, b"k")]))
    assert Outcome.BROKEN is result.outcome
    assert 0 < faults.failed
    assert [result.reason] == reasons
    assert [put(2, 0, b"first"), *rows] == await session.rows()


async def test_log_that_is_taken_away_breaks_the_store(path: Path, session: Session) -> None:
    """A log that is removed under a running store stops it: nothing is acknowledged that only the
    removed file would hold. What had been acknowledged is in the database when it is closed.
    """
    path.with_name("kvstore.db-wal").unlink()
    for batch in batches(session).values():
        result = await session.commit(batch)
        assert (Outcome.BROKEN, True) == (result.outcome, "FileNotFoundError" in result.reason)
    async with asyncio.timeout(30):
        await session.close()
    again = await Session(SqliteBackend(path)).open()
    assert [put(2, 0, b"first")] == await again.rows()
    await again.close()


@pytest.mark.parametrize("place", ["_store", "_undone", "_log_is_full", "_checkpoint"])
async def test_fault_of_ours_breaks_the_store(
    session: Session, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Whatever the writing thread runs into, each commit has its answer, and the last is that the
    store is broken; close still ends.
    """

    def fails(*_: object) -> None:
        raise RuntimeError("planted")

    if place == "_undone":
        (await writing(session.backend)).pragma("max_page_count", 20)
    monkeypatch.setattr(Writer, place, fails)
    results = [await session.commit(session.batch(large(session))) for _ in range(2)]
    first = Outcome.COMMITTED if place == "_checkpoint" else Outcome.BROKEN
    assert [first, Outcome.BROKEN] == [result.outcome for result in results]
    assert "RuntimeError: planted" == results[1].reason
    with pytest.raises(BackendError, match="planted"):
        await session.defragment()


async def test_full_disk_at_a_defragmentation_costs_nothing(
    session: Session, faults: Faults
) -> None:
    """A rebuild for which there is no room fails, and the store goes on."""
    assert COMMITTED == await session.commit(session.batch(large(session)))
    faults.failing["write", "-wal"] = apsw.SQLITE_FULL
    with pytest.raises(BackendError, match="defragmentation failed: SQLITE_FULL"):
        await session.defragment()
    faults.failing.clear()
    assert COMMITTED == await session.commit(session.batch(large(session)))
    assert 201 == len(await session.rows())
    await session.defragment()


async def test_io_error_at_a_defragmentation_breaks_the_store(
    session: Session, faults: Faults
) -> None:
    """A rebuild whose sync fails is like a commit whose sync fails, and is told at once."""
    reasons: list[str] = []
    session.backend.on_broken = reasons.append
    faults.failing["sync", "-wal"] = apsw.SQLITE_IOERR_FSYNC
    with pytest.raises(BackendError, match="SQLITE_IOERR_FSYNC"):
        await session.defragment()
    await until(lambda: len(reasons) > 0)
    assert Outcome.BROKEN is (await session.commit(session.batch(large(session)))).outcome


async def test_full_disk_at_a_checkpoint_leaves_the_log(session: Session, faults: Faults) -> None:
    """A database file that cannot grow does not lose what is in the log; it follows later."""
    faults.failing["write", ".db"] = apsw.SQLITE_FULL
    for _ in range(3):
        assert COMMITTED == await session.commit(session.batch(large(session, 20)))
    assert 0 < faults.failed
    faults.failing.clear()
    assert COMMITTED == await session.commit(session.batch(large(session, 20)))
    assert 81 == len(await session.rows())


async def test_failed_read_is_reported(session: Session, faults: Faults) -> None:
    """A read that fails is an error, never a shorter answer."""
    await session.put(b"second", value=bytes(100_000))
    faults.failing["read", ""] = apsw.SQLITE_IOERR_READ
    with pytest.raises(BackendError, match=r"cannot read .*SQLITE_IOERR_READ"):
        await session.values((3, 0))
    with pytest.raises(BackendError):
        await session.rows()
    with pytest.raises(BackendError):
        await session.index()
    faults.failing.clear()
    assert [bytes(100_000)] == await session.values((3, 0))


async def test_corruption_is_refused_at_open(path: Path, session: Session) -> None:
    """A store whose pages are damaged is not opened."""
    assert COMMITTED == await session.commit(session.batch(large(session)))
    await session.close()
    damage(path)
    with pytest.raises(BackendError, match="SQLITE_CORRUPT"):
        await SqliteBackend(path).open()


async def test_rows_that_the_schema_refuses_break_the_store(session: Session) -> None:
    """A revision that is there already, or a value that is no blob, is a fault of ours: stop."""
    again = session.batch([put(3, 0, b"a"), put(3, 0, b"a")])
    result = await session.commit(again)
    assert (Outcome.BROKEN, True) == (result.outcome, "SQLITE_CONSTRAINT" in result.reason)
    assert [put(2, 0, b"first")] == await session.rows()


async def test_busy_is_a_definite_no(path: Path, session: Session) -> None:
    """A foreign process that holds the write lock costs a commit, not the store."""
    (await writing(session.backend)).set_busy_timeout(1)
    for batch in batches(session).values():
        with raw(path) as foreign:
            foreign.execute("BEGIN IMMEDIATE")
            result = await session.commit(batch)
            assert (Outcome.NOT_COMMITTED, True) == (result.outcome, "BUSY" in result.reason)
    assert COMMITTED == await session.commit(batches(session)["one statement"])


async def test_log_starts_over_and_stays_small(path: Path, session: Session) -> None:
    """However much is written, the log holds little more than a checkpoint's worth."""
    for _ in range(40):
        assert COMMITTED == await session.commit(session.batch(large(session, 10)))
    assert 40 * 100_000 < session.backend.sizes().total
    assert log_bytes(path) < SMALL_LOG.checkpoint_bytes + 200_000


async def test_log_that_a_reader_holds_back_is_bounded(path: Path, session: Session) -> None:
    """A reader that does not end makes the log grow to its limit, where commits are refused; when
    it ends, they go on.
    """
    (await writing(session.backend)).set_busy_timeout(1)
    with raw(path) as foreign:
        foreign.execute("BEGIN")
        foreign.execute("SELECT count(*) FROM revisions").fetchall()
        result = COMMITTED
        for _ in range(30):
            if result == COMMITTED:
                result = await session.commit(session.batch(large(session, 10)))
        assert (Outcome.NOT_COMMITTED, True) == (result.outcome, "log is full" in result.reason)
        assert log_bytes(path) < SMALL_LOG.wal_bytes_max + 200_000
        foreign.execute("COMMIT")
    count = len(await session.rows())
    assert COMMITTED == await session.commit(session.batch(large(session, 10)))
    assert count + 10 == len(await session.rows())


async def test_log_that_grew_is_cut_again(path: Path, session: Session) -> None:
    """Once the reader that made the log grow is gone, the log's file shrinks, too."""
    (await writing(session.backend)).set_busy_timeout(1)
    with raw(path) as foreign:
        foreign.execute("BEGIN")
        foreign.execute("SELECT count(*) FROM revisions").fetchall()
        for _ in range(8):
            assert COMMITTED == await session.commit(session.batch(large(session, 10)))
        kept = sqlite_file.LOG_KEPT_CHECKPOINTS * SMALL_LOG.checkpoint_bytes
        assert kept < log_bytes(path)
        foreign.execute("COMMIT")
    for _ in range(4):
        assert COMMITTED == await session.commit(session.batch(large(session, 10)))
    assert log_bytes(path) <= kept


async def test_closed_store_refuses(session: Session) -> None:
    """After close, every call is answered with a refusal, and nothing hangs."""
    await session.close()
    assert Outcome.NOT_COMMITTED is (await session.commit(session.batch())).outcome
    assert Outcome.NOT_COMMITTED is (await session.resolve(session.batch())).outcome
    for refused in (session.values((2, 0)), session.rows(), session.defragment()):
        with pytest.raises(BackendError, match="is closed"):
            await refused


async def test_close_waits_for_what_is_under_way(path: Path) -> None:
    """A commit and reads that were begun before close are answered, and the commit is stored."""
    session = await Session(SqliteBackend(path)).open()
    answers: list[object] = []
    session.backend.commit(session.batch([put(2, 0, b"a")]), answers.append)
    session.backend.read_values([(1, 0)], answers.append)
    await session.close()
    assert sorted([COMMITTED, [None]], key=str) == sorted(answers, key=str)
    again = await Session(SqliteBackend(path)).open()
    assert [put(2, 0, b"a")] == await again.rows()
    await again.close()


async def test_reads_are_bounded(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the limit of waiting reads one is refused, and the others are answered."""
    monkeypatch.setattr(sqlite, "READS_MAX", 3)
    answers: list[object] = []
    for _ in range(5):
        session.backend.read_values([(2, 0)], answers.append)
    await until(lambda: len(answers) == 5)
    assert 3 == answers.count([b"v"])
    assert 2 == sum(isinstance(answer, ReadsFullError) for answer in answers)
    assert [b"v"] == await session.values((2, 0))
