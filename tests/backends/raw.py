"""SQLite files opened behind the backend's back, and the connection that it writes with."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import apsw

from backends.sqlite import SqliteBackend
from kvstore.backend import Backend


@contextmanager
def raw(path: Path) -> Iterator[apsw.Connection]:
    """A connection that respects no lock file, to look at a store or to damage it."""
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        yield connection
    finally:
        connection.close()


async def writing(backend: Backend) -> apsw.Connection:
    """The connection that writes, once its thread has done all it was asked for: it tidies up after
    a commit was reported, and no two threads may use a connection at a time.
    """
    assert isinstance(backend, SqliteBackend)
    await backend._in_writer(lambda: None)
    return backend._writer._connection
