"""SQLite files opened behind the backend's back."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import apsw


@contextmanager
def raw(path: Path) -> Iterator[apsw.Connection]:
    """A connection that respects no lock file, to look at a store or to damage it."""
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        yield connection
    finally:
        connection.close()
