"""Where a store in a file begins, and has been: it is not made anew, nor beside another one."""

from pathlib import Path

import apsw
import pytest

from backends import sqlite_file
from backends.sqlite import SqliteBackend
from kvstore.backend import Cluster
from kvstore.errors import BackendError, UnreachableError
from tests.backends.storage import Session, filled

CLUSTER = Cluster(1, 2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the store is."""
    return tmp_path / "kvstore.db"


def everything(below: Path) -> list[Path]:
    """All files and directories."""
    return sorted(below.rglob("*"))


def moved(path: Path, to: Path) -> Path:
    """Move a file into a directory that is made for it, which is given."""
    to.parent.mkdir()
    path.rename(to)
    return to.parent


async def test_no_store_begins_beside_another_one(path: Path, tmp_path: Path) -> None:
    """A configuration that was forgotten, or another first shard, would serve an empty store. What
    is left of a creation that was broken off is no store, nor is a shard of the same one refused.
    """
    await filled(path)
    before = everything(tmp_path)
    for _ in range(2):
        with pytest.raises(
            BackendError, match=r"there is no .*/core\.db, but kvstore\.db of a store"
        ):
            await SqliteBackend(tmp_path / "core.db").open()
    assert before == everything(tmp_path)
    session = await Session(SqliteBackend(tmp_path / "events.db", shard="events")).open(CLUSTER)
    await session.close()
    alone = moved(path, tmp_path / "alone" / "core.db.new")
    session = await Session(SqliteBackend(alone / "core.db")).open()
    assert [] == await session.rows()
    await session.close()


@pytest.mark.parametrize("obstacle", ["no file", "no directory", "no such place"])
async def test_a_file_that_has_been_there_is_out_of_reach(tmp_path: Path, obstacle: str) -> None:
    """Its disk may not be mounted: nothing is left where it should be, and it may come yet."""
    place = tmp_path / "disk"
    if obstacle == "no file":
        place.mkdir()
    if obstacle == "no such place":
        place.write_text("")
    backend = SqliteBackend(place / "kvstore.db")
    before = everything(tmp_path)
    for _ in range(2):
        with pytest.raises(UnreachableError, match="has been there"):
            await backend.open(CLUSTER, known=True)
    assert before == everything(tmp_path)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (apsw.IOError, UnreachableError),
        (apsw.FullError, UnreachableError),
        (apsw.CorruptError, BackendError),
    ],
)
async def test_a_disk_that_fails_is_out_of_reach(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception], kind: type[Exception]
) -> None:
    """What speaks against the disk says nothing against the file; a damaged file is refused."""

    def fails(*_: object) -> None:
        raise error

    await filled(path)
    monkeypatch.setattr(sqlite_file, "open_reader", fails)
    with pytest.raises(BackendError, match=f"cannot open {path}") as raised:
        await SqliteBackend(path).open()
    assert raised.type is kind
