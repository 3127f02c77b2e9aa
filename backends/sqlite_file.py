"""Taking hold of an SQLite file: the lock, whose file it is, and what must be in force.

Order matters, so that nothing of anybody else's is touched:

1. The library is new enough: before 3.51.3 a log can be corrupted when it is reset
   (https://www.sqlite.org/wal.html#walresetbug).
2. A lock file beside the database is locked with ``flock``; a second server is told who has it.
   SQLite's own locks would not do: they come and go with transactions, and in EXCLUSIVE mode they
   shut out our own readers.
3. The first bytes of the file are looked at without SQLite: it must be an SQLite database with our
   application id. SQLite never opens a file that is not ours: it could roll a journal back or leave
   a log beside it.
4. A store of ours is read in a way that changes nothing: its schema must not be newer, its cluster
   and its name must be those of the shard that is to be opened.
5. Only then it is opened. A new store is built completely under another name and renamed, so that
   a file with the final name is complete, whenever the machine stops; not beside the log of a
   database that is gone, which SQLite would apply to it.

SQLite's advisory locks vanish when *any* descriptor of the file is closed in this process; step 3
is safe because the lock of step 2 says that nobody, this process included, has it open.
"""

import fcntl
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import apsw

from backends.schema import (
    SCHEMA_VERSION,
    Migration,
    Statements,
    migrations,
    signed,
    sqlite_dialect,
    unsigned,
)
from kvstore.backend import Cluster
from kvstore.config import SqliteConfig
from kvstore.errors import BackendError, UnreachableError

LIBRARY_VERSION_MIN = (3, 51, 3)
APPLICATION_ID = 0x6B767374
"""In the file's header, bytes 68 to 71 (https://www.sqlite.org/fileformat.html)."""
PAGE_BYTES = 8192
BUSY_TIMEOUT_MS = 1_000
"""Nobody else writes; a foreign process that does is waited for this long, then it is busy."""
LOG_KEPT_CHECKPOINTS = 4
"""A log that grew beyond this many checkpoints' worth is cut to it when it starts over."""

_HEADER_BYTES = 100
_MAGIC = b"SQLite format 3\0"
_SYNCHRONOUS_FULL = 2


def check_library(version: str) -> None:
    """Raise ``BackendError`` unless SQLite ``version`` is free of the log-reset bug."""
    if tuple(map(int, version.split("."))) < LIBRARY_VERSION_MIN:
        wanted = ".".join(map(str, LIBRARY_VERSION_MIN))
        raise BackendError(f"SQLite {version} can corrupt its log; {wanted} or newer is needed")


def describe(error: Exception) -> str:
    """What went wrong in one line; for SQLite's errors with SQLite's name for it."""
    if not isinstance(error, apsw.Error) or not hasattr(error, "extendedresult"):
        return f"{type(error).__name__}: {error}"
    code = error.extendedresult
    names = apsw.mapping_result_codes if code < 256 else apsw.mapping_extended_result_codes
    return f"{names[code]}: {error}" if str(error) else str(names[code])


class Lock:
    """The lock file of a database; held until ``release`` or the end of the process."""

    def __init__(self, path: Path) -> None:
        """Take the lock of the database at ``path``.

        Raises ``BackendError`` when another process, or another backend of this one, has it, or
        the file with its name is somebody else's, ``UnreachableError`` when the disk forbids it.
        """
        self._path = path.with_name(path.name + ".lock")
        self._made = False
        try:
            self._descriptor = self._take()
        except OSError as error:
            raise UnreachableError(f"cannot lock {self._path}: {error.strerror}") from error

    def _take(self) -> int:
        while True:
            self._made = not self._path.exists()
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_current(descriptor):
                    self._sign(descriptor)
                    return descriptor
            except BlockingIOError as error:
                holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
                os.close(descriptor)
                who = f"process {holder}" if holder else "another process"
                raise BackendError(f"{self._path} is held by {who}") from error
            except (OSError, BackendError):
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _sign(self, descriptor: int) -> None:
        """Leave our process id, unless the file holds anything but what is left of one."""
        if os.pread(descriptor, 32, 0).strip(b"0123456789\n\0"):
            raise BackendError(f"{self._path} is not a lock of kvstore: it holds no process id")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)

    def _is_current(self, descriptor: int) -> bool:
        """Does the name still lead to the locked file? It may have been removed meanwhile."""
        try:
            return os.path.samestat(os.fstat(descriptor), self._path.stat())
        except FileNotFoundError:
            return False

    def release(self, *, undo: bool = False) -> None:
        """Let go; with ``undo``, a lock file that was not there before is removed."""
        if undo and self._made:
            self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


def make_directory(directory: Path) -> None:
    """Make ``directory`` and those above it, durably, for their owner only.

    Raises ``BackendError``.
    """
    try:
        missing = [place for place in (directory, *directory.parents) if not place.exists()]
        if not missing and not directory.is_dir():
            raise BackendError(f"{directory} is not a directory")
        for place in reversed(missing):
            place.mkdir(mode=0o700)
            _sync_directory(place.parent)
    except OSError as error:
        raise BackendError(f"cannot make {directory}: {error.strerror}") from error


def require_file(path: Path) -> None:
    """Raise ``UnreachableError`` if there is no database where one has been: its disk may not be
    mounted.
    """
    try:
        path.stat()
    except OSError as error:
        raise UnreachableError(f"{path} has been there: {error.strerror}") from error


def is_new(path: Path) -> bool:
    """Is there no database yet? Raises ``BackendError`` if there is one that is not ours,
    ``UnreachableError`` if the disk does not tell.
    """
    try:
        found = _application(path)
    except FileNotFoundError:
        return True
    except OSError as error:
        raise UnreachableError(f"cannot read {path}: {error.strerror}") from error
    if found is None:
        raise BackendError(f"{path} is not an SQLite database")
    if found != APPLICATION_ID:
        raise BackendError(f"{path} belongs to another application (its id is {found:#x})")
    return False


def refuse_beside(path: Path) -> None:
    """Raise ``BackendError`` if a store that begins at ``path`` would begin beside another one, or
    what is left of one: whoever looks for that would be served an empty one.
    """
    for other in sorted(path.parent.iterdir()):
        if other == _building(path) or not other.is_file():
            continue
        if _application(other) == APPLICATION_ID:
            raise BackendError(
                f"there is no {path}, but {other.name} of a store beside it: put the file back,"
                " name the first shard of that store first, or begin in a directory of its own"
            )


def _application(path: Path) -> int | None:
    """The application id in the header of an SQLite database; None if it is none."""
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
    if not header.startswith(_MAGIC) or len(header) < _HEADER_BYTES:
        return None
    return int.from_bytes(header[68:72], "big")


def _building(path: Path) -> Path:
    """What a new database is made as, and left as by a crash then."""
    return path.with_name(path.name + ".new")


def create(path: Path, shard: str, cluster: Cluster | None = None) -> None:
    """Make a complete, empty store at ``path``: of ``cluster``, or with ids of its own.

    Raises ``OSError``, ``apsw.Error``, or ``BackendError`` when another database's log is there,
    which SQLite would apply to the new one.
    """
    for end in ("-wal", "-journal", "-shm"):
        log = path.with_name(path.name + end)
        if log.exists():
            raise BackendError(
                f"there is no {path}, but {log.name} of one: put the database back, or"
                " remove that, too, to begin with an empty store"
            )
    building = _building(path)
    for left in (building, building.with_name(building.name + "-journal")):
        left.unlink(missing_ok=True)
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
            ids = cluster or [secrets.randbelow((1 << 64) - 1) + 1 for _ in range(2)]
            fence = (1, *map(signed, ids), shard, 0, 1, -1, 0)
            connection.execute(statements.insert_fence, fence)
    finally:
        connection.close()
    building.rename(path)
    _sync_directory(path.parent)


def open_unchanged(path: Path) -> apsw.Connection:
    """A connection that reads and leaves every file as it is and none behind: without a log beside
    it the store is opened as immutable, with one the log's index is kept in memory.

    Raises ``apsw.Error``. Whoever calls it holds the lock.
    """
    if not path.with_name(path.name + "-wal").exists():
        flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
        return apsw.Connection(f"{path.absolute().as_uri()}?immutable=1", flags=flags)
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    connection.pragma("locking_mode", "exclusive")
    return connection


def require_identity(
    path: Path, statements: Statements, *, shard: str, cluster: Cluster | None
) -> None:
    """Is the store at ``path`` the one that is meant? Nothing is changed; any cluster will do when
    ``cluster`` is None.

    Raises ``BackendError`` if it is not, or of a newer schema, and ``apsw.Error`` from storage.
    """
    connection = open_unchanged(path)
    try:
        schema_version(path, connection, statements)
        found = connection.execute(statements.select_identity).fetchone()
    finally:
        connection.close()
    if found is None:
        raise BackendError(f"{path} has no fence row")
    cluster_id, name = unsigned(found[0]), found[1]
    if cluster is not None and cluster_id != cluster.cluster_id:
        raise BackendError(
            f"{path} belongs to cluster {cluster_id:x}, not to that of the home shard,"
            f" {cluster.cluster_id:x}"
        )
    if name != shard:
        raise BackendError(f"{path} holds the shard {name!r}, not {shard!r}")


def migrate(connection: apsw.Connection, *, found: int, steps: Sequence[Migration]) -> None:
    """Run the steps above schema version ``found``, inside the caller's transaction."""
    for step in steps:
        if step.version > found:
            for statement in step.statements:
                connection.execute(statement)


def open_writer(path: Path, statements: Statements, config: SqliteConfig) -> apsw.Connection:
    """The connection that writes: schema checked and migrated if older, settings in force.

    Raises ``BackendError``, or ``apsw.Error`` from storage. A newer schema is left as it is.
    """
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        connection.set_busy_timeout(BUSY_TIMEOUT_MS)
        found = schema_version(path, connection, statements)
        require_setting(path, connection, "journal_mode", "wal", "wal")
        require_setting(path, connection, "synchronous", "full", _SYNCHRONOUS_FULL)
        require_setting(path, connection, "fullfsync", 1, 1)
        require_setting(path, connection, "checkpoint_fullfsync", 1, 1)
        require_setting(path, connection, "locking_mode", "normal", "normal")
        require_setting(path, connection, "wal_autocheckpoint", 0, 0)
        log_bytes_kept = LOG_KEPT_CHECKPOINTS * config.checkpoint_bytes
        require_setting(path, connection, "journal_size_limit", log_bytes_kept, log_bytes_kept)
        _configure(connection, config)
        if found < SCHEMA_VERSION:
            with connection:
                migrate(connection, found=found, steps=migrations(sqlite_dialect()))
                connection.execute(statements.update_schema_version, (SCHEMA_VERSION,))
    except BaseException:
        connection.close()
        raise
    return connection


def open_reader(path: Path, config: SqliteConfig) -> apsw.Connection:
    """A connection that only reads. Raises ``apsw.Error``."""
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    connection.set_busy_timeout(BUSY_TIMEOUT_MS)
    _configure(connection, config)
    return connection


def schema_version(path: Path, connection: apsw.Connection, statements: Statements) -> int:
    """The version of an open store's schema; raises ``BackendError`` if it is unknown here."""
    try:
        found = connection.execute(statements.select_schema_version).get
    except apsw.SQLError as error:
        raise BackendError(f"{path} has no schema version: {error}") from error
    if not isinstance(found, int):
        raise BackendError(f"{path} has no schema version")
    if found > SCHEMA_VERSION:
        raise BackendError(
            f"{path} has schema version {found}, this program knows {SCHEMA_VERSION}:"
            " a newer one is needed"
        )
    return found


def _configure(connection: apsw.Connection, config: SqliteConfig) -> None:
    connection.pragma("cache_size", -(config.page_cache_bytes // 1024))
    connection.pragma("mmap_size", 0)
    connection.pragma("trusted_schema", 0)


def require_setting(
    path: Path, connection: apsw.Connection, name: str, wanted: str | int, shown: str | int
) -> None:
    """Set a pragma and read it back; raises ``BackendError`` if it is not in force."""
    connection.pragma(name, wanted)
    found = connection.pragma(name)
    if found != shown:
        raise BackendError(f"{path}: SQLite refuses {name}={wanted}, it stays {found}")


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
