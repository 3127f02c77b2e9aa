"""A store that an older version of the program made: opened, it is of the present schema and holds
what it held.
"""

from pathlib import Path

import apsw
import pytest

from backends import sqlite_file
from backends.check import check
from backends.schema import SCHEMA_VERSION, Migration, migrations, sqlite_dialect
from backends.sqlite import SqliteBackend
from kvstore.backend import Cluster, CommitResult, HomeRows, LeaseRow, Outcome, Row, ShardRecord
from kvstore.errors import BackendError
from tests.backends.raw import raw
from tests.backends.storage import Session, put

VERSION_1 = (
    (
        'CREATE TABLE revisions ( revision INTEGER NOT NULL, sub INTEGER NOT NULL, "key" BLOB NOT'
        " NULL, create_revision INTEGER NOT NULL, version INTEGER NOT NULL, lease INTEGER NOT NULL,"
        " value BLOB NOT NULL, PRIMARY KEY (revision, sub) ) STRICT"
    ),
    (
        "CREATE TABLE leases ( id INTEGER NOT NULL, granted_ttl INTEGER NOT NULL,"
        " remaining_ttl INTEGER NOT NULL, PRIMARY KEY (id) ) STRICT"
    ),
    (
        "CREATE TABLE fence ( id INTEGER NOT NULL, cluster_id INTEGER NOT NULL,"
        " member_id INTEGER NOT NULL, shard TEXT NOT NULL, epoch INTEGER NOT NULL,"
        " tip INTEGER NOT NULL, compact_revision INTEGER NOT NULL, PRIMARY KEY (id) ) STRICT"
    ),
    (
        "CREATE TABLE meta ( id INTEGER NOT NULL, schema_version INTEGER NOT NULL,"
        " PRIMARY KEY (id) ) STRICT"
    ),
)
"""What schema version 1 was, for ever."""
CLUSTER = Cluster(cluster_id=2**64 - 5, member_id=6)
ROWS: list[Row] = [put(2, 0, b"a"), put(2, 1, b"b", lease=7), (3, 0, b"a", 2, 2, 0, b"\0" * 9_000)]
LEASE = LeaseRow(7, 60, 30)


@pytest.fixture(params=["closed", "killed"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A store as version 1 left it when it was closed, or with a log when it was killed."""
    path = tmp_path / "kvstore.db"
    connection = apsw.Connection(str(path))
    connection.pragma("page_size", sqlite_file.PAGE_BYTES)
    connection.pragma("application_id", sqlite_file.APPLICATION_ID)
    for statement in VERSION_1:
        connection.execute(statement)
    connection.execute("INSERT INTO meta VALUES (1, 1)")
    connection.execute("INSERT INTO fence VALUES (1, -5, 6, 'default', 4, 1, 2)")
    connection.pragma("journal_mode", "wal")
    if request.param == "killed":
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    connection.executemany("INSERT INTO revisions VALUES (?, ?, ?, ?, ?, ?, ?)", ROWS)
    connection.execute("INSERT INTO leases VALUES (?, ?, ?)", LEASE)
    connection.close()
    assert (request.param == "killed") is path.with_name("kvstore.db-wal").exists()
    return path


def schema_of(path: Path) -> list[tuple[object, ...]]:
    """What the database says that its tables are."""
    with raw(path) as connection:
        return connection.execute("SELECT type, name, sql FROM sqlite_schema").fetchall()


def test_version_1_stays_what_it_was() -> None:
    """The first migration makes what version 1 of the program made, to the letter."""
    assert migrations(sqlite_dialect())[0] == Migration(1, VERSION_1)


async def test_store_of_version_1_is_migrated(path: Path, tmp_path: Path) -> None:
    """Everything is there after the migration, new parts can be stored, and the tables are those
    of a new store; a second open migrates nothing.
    """
    session = await Session(SqliteBackend(path)).open()
    fence = session.fence
    assert (*CLUSTER, "default", 5, 3, 2, 0, "") == fence
    assert ROWS == await session.rows()
    assert [LEASE] == await session.leases()
    assert HomeRows("", [], []) == await session.home()
    kept = HomeRows("a map", [ShardRecord("events", 3, "x")], [("events", put(4, 0, b"c"))])
    batch = session.batch(
        tip=4, reserved=9, shard_map=kept.shard_map, records=kept.records, redo=kept.redo
    )
    assert CommitResult(Outcome.COMMITTED) == await session.commit(batch)
    await session.close()
    again = await Session(SqliteBackend(path)).open()
    assert fence._replace(epoch=6, tip=4, reserved=9) == again.fence
    assert (ROWS, kept) == (await again.rows(), await again.home())
    await again.close()
    new = tmp_path / "new.db"
    sqlite_file.create(new, "default")
    assert schema_of(new) == schema_of(path)
    report = check(path)
    assert ([], SCHEMA_VERSION) == (report.findings, report.schema_version)


def files(path: Path) -> dict[str, bytes]:
    """The database and what is beside it, but its lock."""
    found = path.parent.iterdir()
    return {file.name: file.read_bytes() for file in found if not file.name.endswith(".lock")}


def test_store_of_version_1_is_checked_as_it_is(path: Path) -> None:
    """A check before the first start of a newer program finds nothing and changes nothing; it finds
    damage.
    """
    before = files(path)
    report = check(path)
    assert ([], 1, 3, 3, 2) == (
        report.findings,
        report.schema_version,
        report.tip,
        report.rows,
        report.live_keys,
    )
    assert before == files(path)
    with raw(path) as connection:
        connection.execute("DELETE FROM leases")
    assert ["key b'b': its lease 7 does not exist"] == check(path).findings


@pytest.mark.parametrize("steps", range(5))
async def test_migration_that_fails_leaves_version_1(
    path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Wherever it fails, the store is version 1's as before, and can be migrated later."""
    first, second = migrations(sqlite_dialect())
    assert 4 == len(second.statements)
    failing = Migration(2, (*second.statements[:steps], "INSERT INTO nowhere VALUES (1)"))
    with monkeypatch.context() as patch:
        patch.setattr(sqlite_file, "migrations", lambda _: [first, failing])
        with pytest.raises(BackendError, match="nowhere"):
            await SqliteBackend(path).open()
    report = check(path)
    assert ([], 1, 4) == (report.findings, report.schema_version, report.epoch)
    session = await Session(SqliteBackend(path)).open()
    assert ROWS == await session.rows()
    await session.close()


async def test_another_shard_of_version_1_is_not_migrated(path: Path) -> None:
    """A store that is not the one meant stays of its version, untouched."""
    before = files(path)
    with pytest.raises(BackendError, match="belongs to cluster"):
        await SqliteBackend(path).open(Cluster(1, 6))
    with pytest.raises(BackendError, match="holds the shard 'default'"):
        await SqliteBackend(path, shard="events").open(CLUSTER)
    assert before == files(path)
