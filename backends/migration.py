"""Bringing a database to this program's schema without serving it: ``kvstore migrate``.

A server does it by itself when it opens a database. Somebody else must where the server's role may
not change tables, or where the change is to be made at a time of its own.
"""

from pathlib import Path

import apsw

from backends import sqlite_file
from backends.schema import SCHEMA_VERSION, Statements, sqlite_dialect
from backends.sqlite_writer import Writer
from backends.urls import SQLITE, find
from kvstore.config import Config, SqliteConfig
from kvstore.errors import BackendError


async def migrate(url: str, *, data_dir: Path, config: Config) -> tuple[int, int]:
    """The schema's versions before and after, 0 where there is no store. A file is made by the
    first server, never here; PostgreSQL's tables are made.

    Raises ``BackendError``.
    """
    database = find(url, data_dir=data_dir)
    if database.kind == SQLITE:
        return _migrate_file(Path(database.place), config.sqlite)
    from backends.postgres_schema import migrate  # noqa: PLC0415 - its driver takes a while to load

    return await migrate(url, config.postgres)


def _migrate_file(path: Path, config: SqliteConfig) -> tuple[int, int]:
    if not path.exists():
        return 0, 0
    lock = sqlite_file.Lock(path)
    try:
        if sqlite_file.is_new(path):
            return 0, 0
        statements = Statements(sqlite_dialect())
        connection = sqlite_file.open_unchanged(path)
        try:
            found = sqlite_file.schema_version(path, connection, statements)
        finally:
            connection.close()
        if found < SCHEMA_VERSION:
            writing = sqlite_file.open_writer(path, statements, config)
            Writer(path, writing, statements, config).close()
    except apsw.Error as error:
        raise BackendError(f"cannot migrate {path}: {sqlite_file.describe(error)}") from error
    finally:
        lock.release(undo=True)
    return found, SCHEMA_VERSION
