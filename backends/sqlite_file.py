"""Taking hold of an SQLite file: the lock, whose file it is, and what must be in force before it is used.

Order matters, so that nothing of anybody else's is touched:

1. The library is new enough: before 3.51.3 a write-ahead log can be corrupted when it is reset
   (https://www.sqlite.org/wal.html#walresetbug).
2. A lock file beside the database is locked with ``flock``; a second server is told who has it. SQLite's own locks
   would not do: they come and go with transactions, and in EXCLUSIVE mode they shut out our own readers.
3. The first bytes of the file are looked at without SQLite: it must be an SQLite database with our application id.
   A file that is not ours is never opened by SQLite, which could roll a journal back or leave a log beside it.
4. Only then it is opened. A new store is built completely under another name and renamed, so that a file with the
   final name is complete, whenever the machine stops.

SQLite's advisory locks vanish when *any* descriptor of the file is closed in this process; step 3 is safe because the
lock of step 2 says that nobody, this process included, has it open.
"""

import errno
import fcntl
import os
import secrets
from pathlib import Path

import apsw

from backends.schema import (
    SCHEMA_VERSION,
    Migration,
    Statements,
    migrations,
    signed,
    sqlite_dialect,
)
from kvstore.config import SqliteConfig
from kvstore.errors import BackendError

LIBRARY_VERSION_MIN = (3, 51, 3)
APPLICATION_ID = 0x6B767374
"""In the file's header, bytes 68 to 71 (https://www.sqlite.org/fileformat.html)."""
PAGE_BYTES = 8192
BUSY_TIMEOUT_MS = 1_000
"""Nobody else writes; a foreign process that does is waited for this long, then the commit fails as busy."""
_HEADER_BYTES = 100
_MAGIC = b"SQLite format 3\0"
_FULL = 2


def check_library(version: str) -> None:
    """Raise ``BackendError`` unless SQLite ``version`` is free of the log-reset bug."""
    if tuple(map(int, version.split("."))) < LIBRARY_VERSION_MIN:
        wanted = ".".join(map(str, LIBRARY_VERSION_MIN))
        raise BackendError(f"SQLite {version} can corrupt its log; {wanted} or newer is needed")


class Lock:
    """The lock file of a database; held until ``release`` or the end of the process."""

    def __init__(self, path: Path) -> None:
        """Raises ``BackendError`` when another process, or another backend of this one, holds it."""
        self._path = path.with_name(path.name + ".lock")
        self._made = False
        try:
            self._descriptor = self._take()
        except OSError as error:
            raise BackendError(f"cannot lock {path}: {error.strerror}") from error

    def _take(self) -> int:
        while True:
            self._made = not self._path.exists()
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_current(descriptor):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
                    return descriptor
            except BlockingIOError as error:
                holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
                os.close(descriptor)
                who = f"process {holder}" if holder else "another process"
                raise BackendError(f"{self._path} is held by {who}") from error
            except OSError:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _is_current(self, descriptor: int) -> bool:
        """Is the locked file still the one with this name? ``remove`` may have come between."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False

    def release(self, *, undo: bool = False) -> None:
        """Let go; with ``undo`` a lock file that this object made is removed."""
        if undo and self._made:
            self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


def prepare_directory(path: Path) -> None:
    """Make the directory of ``path``, for its owner only. Raises ``BackendError``."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BackendError(f"cannot make {path.parent}: {error.strerror}") from error


def is_new(path: Path) -> bool:
    """True if there is no database yet; raises ``BackendError`` if there is one and it is not ours."""
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER_BYTES)
    except FileNotFoundError:
        return True
    except OSError as error:
        raise BackendError(f"cannot read {path}: {error.strerror}") from error
    if not header.startswith(_MAGIC) or len(header) < _HEADER_BYTES:
        raise BackendError(f"{path} is not an SQLite database")
    found = int.from_bytes(header[68:72], "big")
    if found != APPLICATION_ID:
        raise BackendError(f"{path} belongs to another application (application id {found:#x})")
    return False


def create(path: Path, shard: str) -> None:
    """Make a complete, empty store at ``path``. Raises ``OSError`` or ``apsw.Error``."""
    building = path.with_name(path.name + ".new")
    for suffix in ("", "-journal"):
        building.with_name(building.name + suffix).unlink(missing_ok=True)
    os.close(os.open(building, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    statements = Statements(sqlite_dialect())
    connection = apsw.Connection(str(building), flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        connection.pragma("synchronous", "full")
        connection.pragma("page_size", PAGE_BYTES)
        with connection:
            connection.pragma("application_id", APPLICATION_ID)
            migrate(connection, found=0, steps=migrations(sqlite_dialect()))
            connection.execute(statements.insert_meta, (1, SCHEMA_VERSION))
            ids = (signed(secrets.randbelow((1 << 64) - 1) + 1) for _ in range(2))
            connection.execute(statements.insert_fence, (1, *ids, shard, 0, 1, -1))
    finally:
        connection.close()
    building.rename(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def migrate(connection: apsw.Connection, *, found: int, steps: list[Migration]) -> None:
    """Run the steps above schema version ``found``; the caller holds the transaction and stores the version."""
    for step in steps:
        if step.version > found:
            for statement in step.statements:
                connection.execute(statement)


def open_writer(path: Path, config: SqliteConfig, statements: Statements) -> apsw.Connection:
    """The connection that writes: settings in force and read back, schema checked, migrated if older.

    Raises ``BackendError``, or ``apsw.Error`` from storage. A newer schema is left exactly as it is.
    """
    connection = apsw.Connection(
        str(path), flags=apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_NOFOLLOW
    )
    try:
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        connection.set_busy_timeout(BUSY_TIMEOUT_MS)
        check_schema(path, connection, statements)
        configure_writer(path, connection, config)
    except BaseException:
        connection.close()
        raise
    return connection


def check_schema(path: Path, connection: apsw.Connection, statements: Statements) -> None:
    """Refuse a newer schema, migrate an older one."""
    found = schema_version(path, connection, statements)
    if found < SCHEMA_VERSION:
        with connection:
            migrate(connection, found=found, steps=migrations(sqlite_dialect()))
            connection.execute(statements.update_schema_version, (SCHEMA_VERSION,))


def schema_version(path: Path, connection: apsw.Connection, statements: Statements) -> int:
    """The schema version of an open store; raises ``BackendError`` when this program is too old for it."""
    found = connection.execute(statements.select_schema_version).get
    if not isinstance(found, int):
        raise BackendError(f"{path} has no schema version")
    if found > SCHEMA_VERSION:
        raise BackendError(
            f"{path} has schema version {found}; this program knows {SCHEMA_VERSION}: use a newer one"
        )
    return found


def configure_writer(path: Path, connection: apsw.Connection, config: SqliteConfig) -> None:
    """Durability settings, each read back; raises ``BackendError`` when one is not in force."""
    _require(path, connection, "journal_mode", "wal", "wal")
    _require(path, connection, "synchronous", "full", _FULL)
    _require(path, connection, "fullfsync", 1, 1)
    _require(path, connection, "checkpoint_fullfsync", 1, 1)
    _require(path, connection, "locking_mode", "normal", "normal")
    _require(path, connection, "wal_autocheckpoint", 0, 0)
    _configure_any(connection, config)


def open_reader(path: Path, config: SqliteConfig) -> apsw.Connection:
    """A connection that only reads. Raises ``apsw.Error``."""
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    connection.set_busy_timeout(BUSY_TIMEOUT_MS)
    _configure_any(connection, config)
    return connection


def _configure_any(connection: apsw.Connection, config: SqliteConfig) -> None:
    connection.pragma("cache_size", -(config.page_cache_bytes // 1024))
    connection.pragma("mmap_size", 0)
    connection.pragma("temp_store", "memory")
    connection.pragma("trusted_schema", 0)


def _require(
    path: Path, connection: apsw.Connection, name: str, wanted: str | int, shown: str | int
) -> None:
    connection.pragma(name, wanted)
    found = connection.pragma(name)
    if found != shown:
        raise BackendError(f"{path}: SQLite refuses {name}={wanted} (it stays {found})")


def disk_full(error: OSError) -> bool:
    """Did the file system have no room?"""
    return error.errno in {errno.ENOSPC, errno.EDQUOT}
