"""Taking hold of an SQLite file: locks, modes, settings, and files that are not ours."""

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import anyio.lowlevel
import apsw
import pytest

from backends import sqlite_file
from backends.schema import SCHEMA_VERSION, Migration, migrations, sqlite_dialect
from backends.sqlite import SqliteBackend
from kvstore.backend import Cluster
from kvstore.config import SqliteConfig
from kvstore.errors import BackendError
from tests.backends.raw import raw, writing
from tests.backends.storage import Session, filled, put

NOBODY = 65534
SPILLING = SqliteConfig(page_cache_bytes=64 * 1024)
"""A page cache that a rebuild cannot do with."""
HOLDER = """
import sys
from pathlib import Path
from backends.sqlite_file import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the store will be."""
    return tmp_path / "kvstore.db"


async def refusal(path: Path, *, shard: str = "default", cluster: Cluster | None = None) -> str:
    """Why a store is not opened: one line that names it."""
    backend = SqliteBackend(path, shard=shard)
    with pytest.raises(BackendError) as refused:
        await backend.open(cluster)
    await backend.close()
    reason = str(refused.value)
    assert "\n" not in reason
    assert path.name in reason
    return reason


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a directory, by name."""
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.is_file()}


def mode(path: Path) -> int:
    """Permission bits."""
    return path.stat().st_mode & 0o777


async def test_files_are_the_owners_alone(tmp_path: Path) -> None:
    """The directory is made with mode 0700 and each file in it with 0600, under any umask."""
    umask = os.umask(0)
    try:
        directory = tmp_path / "made" / "for it"
        session = await Session(SqliteBackend(directory / "kvstore.db")).open()
        await session.put(b"a")
        files = sorted(file.name for file in directory.iterdir())
        names = ["kvstore.db", "kvstore.db-shm", "kvstore.db-wal", "kvstore.db.lock"]
        assert names == files
        assert {0o600} == {mode(directory / name) for name in files}
        assert (0o700, 0o700) == (mode(directory), mode(directory.parent))
        await session.close()
    finally:
        os.umask(umask)


async def test_clean_close_leaves_one_database_file(path: Path, tmp_path: Path) -> None:
    """After close everything is in the database file, without a log, and its header says whose."""
    await filled(path)
    assert {"kvstore.db", "kvstore.db.lock"} == set(contents(tmp_path))
    with raw(path) as connection:
        assert sqlite_file.APPLICATION_ID == connection.pragma("application_id")
        assert sqlite_file.PAGE_BYTES == connection.pragma("page_size")
        assert [(2, b"a")] == connection.execute("SELECT revision, key FROM revisions").fetchall()


async def test_durability_settings_are_in_force(path: Path) -> None:
    """What a power cut survives by is set on the connection that writes."""
    session = await Session(SqliteBackend(path)).open()
    connection = await writing(session.backend)
    wanted: dict[str, object] = {
        "journal_mode": "wal",
        "synchronous": 2,
        "fullfsync": 1,
        "checkpoint_fullfsync": 1,
        "locking_mode": "normal",
        "wal_autocheckpoint": 0,
        "mmap_size": 0,
        "auto_vacuum": 0,
    }
    assert wanted == {name: connection.pragma(name) for name in wanted}
    await session.close()


def test_setting_that_does_not_take_is_refused(path: Path) -> None:
    """What SQLite cannot do where the file is, such as keeping a log, is noticed."""
    connection = apsw.Connection(":memory:")
    with pytest.raises(BackendError, match="SQLite refuses journal_mode=wal, it stays memory"):
        sqlite_file.require_setting(path, connection, "journal_mode", "wal", "wal")
    connection.close()


@pytest.mark.parametrize(
    ("version", "good"),
    [("3.51.2", False), ("3.7.0", False), ("3.51.3", True), ("3.54.1", True), ("4.0.0", True)],
)
def test_library_with_the_log_reset_bug_is_refused(version: str, *, good: bool) -> None:
    """SQLite before 3.51.3 can corrupt its log."""
    if good:
        sqlite_file.check_library(version)
    else:
        with pytest.raises(BackendError, match="can corrupt its log"):
            sqlite_file.check_library(version)


@contextmanager
def lock_holder(path: Path) -> Iterator[int]:
    """Another process that has the lock of ``path``: its id; it is killed in the end."""
    command = [sys.executable, "-c", HOLDER, str(path)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root
    ) as holder:
        assert holder.stdout is not None
        try:
            assert b"held\n" == holder.stdout.readline()
            yield holder.pid
        finally:
            holder.kill()


async def test_second_process_is_told_who_has_it(path: Path, tmp_path: Path) -> None:
    """A server that finds the lock held says by which process, and changes nothing; when that one
    is killed, the lock is free.
    """
    await filled(path)
    with lock_holder(path) as pid:
        before = contents(tmp_path)
        assert f"{path}.lock is held by process {pid}" == await refusal(path)
        assert before == contents(tmp_path)
    await filled(path)


@pytest.mark.parametrize("held", [False, True])
async def test_open_that_is_cancelled_can_be_closed(path: Path, *, held: bool) -> None:
    """Whoever gives up waiting for open closes, and the lock is as before, however open ended."""
    lock = sqlite_file.Lock(path) if held else None
    backend = SqliteBackend(path)
    async with asyncio.TaskGroup() as group:
        opening = group.create_task(backend.open())
        await anyio.lowlevel.checkpoint()
        opening.cancel()
    await backend.close()
    if lock is not None:
        assert "is held by process" in await refusal(path)
        lock.release()
    await filled(path)


async def test_lock_file_that_was_replaced_is_no_lock(path: Path) -> None:
    """A lock on a file that lost its name does not count: the one with the name is taken."""
    first = sqlite_file.Lock(path)
    path.with_name("kvstore.db.lock").unlink()
    second = sqlite_file.Lock(path)
    with pytest.raises(BackendError):
        sqlite_file.Lock(path)
    first.release()
    second.release()


def foreign_database(path: Path) -> None:
    """Another application's database, with a transaction in its log."""
    connection = apsw.Connection(str(path))
    connection.pragma("journal_mode", "wal")
    connection.execute("CREATE TABLE revisions (a)")
    connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    connection.execute("INSERT INTO revisions VALUES (1)")
    connection.close()


FOREIGN = {
    "another application's database": (foreign_database, "belongs to another application"),
    "a text": (lambda path: path.write_bytes(b"dear diary\n" * 99), "not an SQLite database"),
    "an empty file": (lambda path: path.write_bytes(b""), "not an SQLite database"),
    "half a header": (
        lambda path: path.write_bytes(b"SQLite format 3\0" + bytes(50)),
        "not an SQLite database",
    ),
    "a directory": (lambda path: path.mkdir(), "cannot read"),
}


@pytest.mark.parametrize("kind", FOREIGN)
async def test_foreign_file_is_refused_and_untouched(path: Path, tmp_path: Path, kind: str) -> None:
    """Whatever is there under our name and is not ours stays as it is, byte for byte, and nothing
    is left beside it.
    """
    make, expected = FOREIGN[kind]
    make(path)
    before = contents(tmp_path)
    assert expected in await refusal(path)
    assert before == contents(tmp_path)


async def test_newer_schema_is_refused_and_untouched(path: Path, tmp_path: Path) -> None:
    """A store of a newer version stays as it is, what is in its log included."""
    await filled(path)
    with raw(path) as connection:
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        connection.execute("UPDATE meta SET schema_version = 99")
    before = contents(tmp_path)
    assert "kvstore.db-wal" in before
    assert f"version 99, this program knows {SCHEMA_VERSION}" in await refusal(path)
    after = contents(tmp_path)
    before["kvstore.db.lock"] = after["kvstore.db.lock"]
    assert before == after


@pytest.mark.parametrize("log", [False, True], ids=["closed", "killed"])
async def test_another_shard_is_refused_and_untouched(
    path: Path, tmp_path: Path, *, log: bool
) -> None:
    """A store of another cluster, or under another name, stays as it is, its log included, and
    nothing is left beside it.
    """
    await filled(path)
    if log:
        with raw(path) as connection:
            connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
            connection.execute("UPDATE fence SET epoch = 7")
    before = contents(tmp_path)
    assert log is ("kvstore.db-wal" in before)
    assert "belongs to cluster" in await refusal(path, cluster=Cluster(1, 2))
    assert "holds the shard 'default', not 'other'" in await refusal(path, shard="other")
    after = contents(tmp_path)
    before["kvstore.db.lock"] = after["kvstore.db.lock"]
    assert before == after
    await filled(path)


@pytest.mark.parametrize("table", ["meta", "fence"])
async def test_store_without_its_tables_is_refused(path: Path, table: str) -> None:
    """A file with our mark but not our tables or rows is refused in one line."""
    await filled(path)
    with raw(path) as connection:
        connection.execute(f"DELETE FROM {table}")
    assert "has no" in await refusal(path)
    with raw(path) as connection:
        connection.execute(f"DROP TABLE {table}")
    assert table in await refusal(path) or "no schema version" in await refusal(path)


def newer_program(monkeypatch: pytest.MonkeyPatch, *statements: str) -> None:
    """Let this program know one more schema version, reached by ``statements``."""
    steps = [*migrations(sqlite_dialect()), Migration(SCHEMA_VERSION + 1, statements)]
    monkeypatch.setattr(sqlite_file, "migrations", lambda _: steps)
    monkeypatch.setattr(sqlite_file, "SCHEMA_VERSION", SCHEMA_VERSION + 1)


async def test_older_schema_is_migrated(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer program runs the missing steps once and keeps the rows; an older one then refuses."""
    await filled(path)
    with monkeypatch.context() as patch:
        newer_program(patch, "CREATE TABLE extra (a)", "INSERT INTO extra VALUES (7)")
        for _ in range(2):
            session = await Session(SqliteBackend(path)).open()
            assert [put(2, 0, b"a")] == await session.rows()
            await session.close()
    with raw(path) as connection:
        assert 7 == connection.execute("SELECT sum(a) FROM extra").get
    assert f"has schema version {SCHEMA_VERSION + 1}" in await refusal(path)


async def test_migration_is_whole_or_not_at_all(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A migration that fails halfway leaves the old schema, and the old program can go on."""
    await filled(path)
    with monkeypatch.context() as patch:
        newer_program(patch, "CREATE TABLE extra (a)", "INSERT INTO nowhere VALUES (7)")
        assert "nowhere" in await refusal(path)
    with raw(path) as connection:
        assert not connection.table_exists("main", "extra")
    await filled(path)


async def test_creation_that_was_cut_short_starts_over(path: Path, tmp_path: Path) -> None:
    """What a crash left of a store that was being made is made anew, and never taken for one."""
    path.with_name("kvstore.db.new").write_bytes(b"SQLite format 3\0 half")
    path.with_name("kvstore.db.new-journal").write_bytes(b"half")
    await filled(path)
    assert {"kvstore.db", "kvstore.db.lock"} == set(contents(tmp_path))


@pytest.mark.parametrize("end", ["-wal", "-shm", "-journal"])
async def test_log_without_its_database_is_refused_and_untouched(
    path: Path, tmp_path: Path, end: str
) -> None:
    """Whoever removes the database of a killed server and leaves its log is told, and no new store
    is made for SQLite to apply that log to.
    """
    session = await Session(SqliteBackend(path)).open()
    await session.put(b"a")
    log = contents(tmp_path)["kvstore.db-wal"]
    await session.close()
    database, left = (path.with_name(path.name + name) for name in ("", end))
    database.unlink()
    left.write_bytes(log)
    before = contents(tmp_path)
    assert f"there is no {path}, but kvstore.db{end} of one" in await refusal(path)
    after = contents(tmp_path)
    before["kvstore.db.lock"] = after["kvstore.db.lock"]
    assert before == after
    left.unlink()
    await filled(path)


def set_modes(modes: dict[Path, int]) -> None:
    """Change permission bits."""
    for path, bits in modes.items():
        path.chmod(bits)


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Be somebody whom permissions bind, for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory below /tmp that everybody may enter, unlike ``tmp_path``."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield directory
        directory.chmod(0o755)


async def test_read_only_directory_is_refused(open_directory: Path) -> None:
    """Where nothing may be written, a store is neither made nor opened, and one line says so."""
    set_modes({open_directory: 0o555})
    with ordinary_user():
        reason = await refusal(open_directory / "kvstore.db")
        assert "Permission denied" in reason
        below = SqliteBackend(open_directory / "below" / "kvstore.db")
        with pytest.raises(BackendError, match=r"cannot make .*below: Permission denied"):
            await below.open()
    assert {} == contents(open_directory)


async def test_read_only_store_is_refused(open_directory: Path) -> None:
    """A store that may be read but not written is refused before anything is done to it."""
    path = open_directory / "kvstore.db"
    await filled(path)
    lock = path.with_name("kvstore.db.lock")
    set_modes({path: 0o444, lock: 0o666, open_directory: 0o777})
    before = contents(open_directory)["kvstore.db"]
    with ordinary_user():
        reason = await refusal(path)
    assert "readonly" in reason or "READONLY" in reason or "Permission denied" in reason
    assert before == contents(open_directory)["kvstore.db"]
    set_modes({path: 0o644})
    await filled(path)


async def test_defragmentation_that_cannot_begin_costs_nothing(open_directory: Path) -> None:
    """Where the temporary copy cannot be made, the rebuild is refused and the store goes on."""
    session = await Session(SqliteBackend(open_directory / "kvstore.db", config=SPILLING)).open()
    await session.put(b"a", value=bytes(1_000_000))
    set_modes({open_directory: 0o555})
    with ordinary_user(), pytest.raises(BackendError, match="defragmentation failed"):
        await session.defragment()
    set_modes({open_directory: 0o755})
    await session.put(b"b")
    await session.defragment()
    assert [2, 3] == [row[0] for row in await session.rows()]
    await session.close()


def open_files() -> set[Path]:
    """What this process has open, unlinked files included."""
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found.add(descriptor.readlink())
    return {file for file in found if file.is_absolute() and Path("/proc") not in file.parents}


async def test_defragmentation_copies_beside_the_database(path: Path, tmp_path: Path) -> None:
    """The temporary copy, as large as the store, is where the store is: other places may be small
    or closed.
    """
    session = await Session(SqliteBackend(path, config=SPILLING)).open()
    await session.put(b"a", value=bytes(1_000_000))
    before, opened = open_files(), set[Path]()

    def look() -> bool:
        opened.update(open_files())
        return False

    (await writing(session.backend)).set_progress_handler(look, 10)
    await session.defragment()
    assert {tmp_path} == {file.parent for file in opened - before}
    await session.close()
