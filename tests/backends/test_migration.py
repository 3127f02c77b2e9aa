"""``kvstore migrate`` of files: an older store is brought up to date, nothing else is touched."""

from pathlib import Path

import apsw
import pytest

from backends import sqlite_file
from backends.check import check
from backends.migration import migrate
from backends.schema import SCHEMA_VERSION
from kvstore.config import Config
from kvstore.errors import BackendError
from tests.backends.raw import raw
from tests.backends.test_sqlite_migration import VERSION_1


def make_old(path: Path) -> None:
    """A store as version 1 made it."""
    connection = apsw.Connection(str(path))
    connection.pragma("page_size", sqlite_file.PAGE_BYTES)
    connection.pragma("application_id", sqlite_file.APPLICATION_ID)
    for statement in VERSION_1:
        connection.execute(statement)
    connection.execute("INSERT INTO meta VALUES (1, 1)")
    connection.execute("INSERT INTO fence VALUES (1, 5, 6, 'default', 4, 1, -1)")
    connection.pragma("journal_mode", "wal")
    connection.close()


def names(directory: Path) -> list[str]:
    """What is there."""
    return sorted(path.name for path in directory.iterdir())


async def migrated(directory: Path) -> tuple[int, int]:
    """What is told of the store ``a.db`` there."""
    return await migrate("sqlite:a.db", data_dir=directory, config=Config())


async def test_older_store(tmp_path: Path) -> None:
    """It gets the present schema, once, is sound, and nobody's epoch has changed."""
    make_old(tmp_path / "a.db")
    assert await migrated(tmp_path) == (1, SCHEMA_VERSION)
    assert await migrated(tmp_path) == (SCHEMA_VERSION, SCHEMA_VERSION)
    report = check(tmp_path / "a.db")
    assert (report.schema_version, report.epoch) == (SCHEMA_VERSION, 4)
    assert report.sound


async def test_no_store(tmp_path: Path) -> None:
    """A file is made by a server, which knows whose it is: nothing appears."""
    assert await migrated(tmp_path / "missing") == (0, 0)
    assert await migrated(tmp_path) == (0, 0)
    assert names(tmp_path) == []


async def test_store_in_use(tmp_path: Path) -> None:
    """A server that uses it has migrated it, and is left alone."""
    make_old(tmp_path / "a.db")
    lock = sqlite_file.Lock(tmp_path / "a.db")
    with pytest.raises(BackendError, match="held by"):
        await migrated(tmp_path)
    lock.release()


@pytest.mark.parametrize("content", [b"not a database", b"SQLite format 3\0" + bytes(4080)])
async def test_foreign_file(tmp_path: Path, content: bytes) -> None:
    """What is not ours stays as it is."""
    (tmp_path / "a.db").write_bytes(content)
    with pytest.raises(BackendError, match=r"a\.db"):
        await migrated(tmp_path)
    assert (tmp_path / "a.db").read_bytes() == content
    assert names(tmp_path) == ["a.db"]


async def test_newer_store(tmp_path: Path) -> None:
    """It is refused and stays as it is."""
    make_old(tmp_path / "a.db")
    with raw(tmp_path / "a.db") as connection:
        connection.execute("UPDATE meta SET schema_version = 1000")
    with pytest.raises(BackendError, match="a newer one is needed"):
        await migrated(tmp_path)
