"""URLs of databases: which they are, which are the same, what is said of those that are none."""

from pathlib import Path

import pytest

from backends.sqlite import SqliteBackend
from backends.urls import Database, find, make_backend
from kvstore.config import Config
from kvstore.errors import BackendError

DATA = Path("/data")


def test_sqlite_is_below_the_data_directory(tmp_path: Path) -> None:
    """A relative path is, an absolute one is taken as it is."""
    assert str(find("sqlite:core.db", data_dir=tmp_path)) == f"sqlite:{tmp_path}/core.db"
    assert find("sqlite:/srv/core.db", data_dir=tmp_path).place == "/srv/core.db"
    backend = make_backend("sqlite:a/b.db", shard="b", data_dir=tmp_path, config=Config())
    assert isinstance(backend, SqliteBackend)
    assert backend._path == tmp_path / "a/b.db"
    assert backend._shard == "b"


def test_one_file_by_several_names(tmp_path: Path) -> None:
    """Dots and links lead to the same database."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    same = ["real/a.db", "./real/../real/a.db", "link/a.db", f"{tmp_path}/link/a.db"]
    assert len({find(f"sqlite:{path}", data_dir=tmp_path) for path in same}) == 1
    assert find("sqlite:a.db", data_dir=tmp_path) != find("sqlite:real/a.db", data_dir=tmp_path)


def test_link_to_itself(tmp_path: Path) -> None:
    """A path that leads nowhere is refused."""
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(BackendError, match="cannot be followed"):
        find("sqlite:loop/a.db", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://kv@db1/kvstore", "postgresql://db1:5432/kvstore?schema=kvstore"),
        ("postgresql://kv:pass@DB1/a?sslmode=require", "postgresql://db1:5432/a?schema=kvstore"),
        ("postgresql://db1:6432/kv%20s", "postgresql://db1:6432/kv s?schema=kvstore"),
        ("postgresql://[::1]/kv?schema=a", "postgresql://[::1]:5432/kv?schema=a"),
        (
            "postgresql:///kv?host=/run/postgresql",
            "postgresql:///run/postgresql:5432/kv?schema=kvstore",
        ),
        ("postgresql:///kv?host=db1&port=6432", "postgresql://db1:6432/kv?schema=kvstore"),
    ],
)
def test_postgresql(url: str, shown: str) -> None:
    """What is shown has neither user nor password."""
    assert str(find(url, data_dir=DATA)) == shown


def test_one_postgresql_by_several_urls() -> None:
    """Who asks and how does not matter, which schema of which database does."""
    one = find("postgresql://a:b@db1/kv?sslmode=require", data_dir=DATA)
    assert one == find("postgresql://c@DB1:5432/kv", data_dir=DATA)
    assert one == find("postgresql://db1/kv?schema=kvstore", data_dir=DATA)
    assert one != find("postgresql://c@db1:5433/kv", data_dir=DATA)
    assert one != find("postgresql://c@db1/kv?schema=b", data_dir=DATA)
    assert isinstance(one, Database)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "a database is sqlite:PATH or postgresql://USER@HOST/DATABASE"),
        ("core.db", "did you mean sqlite:core.db?"),
        ("sqlite3:core.db", "no kind of database 'sqlite3'; did you mean sqlite?"),
        ("SQLite:core.db", "did you mean sqlite?"),
        ("postgres://kv@db1/kv", "no kind of database 'postgres'; did you mean postgresql?"),
        ("mysql://kv:pass@db1/kv", "this is neither"),
        ("kv:pass@db1/kv", "this is neither"),
        ("sqlite:", "needs the path of a file"),
        ("sqlite:events/", "needs the path of a file"),
        ("sqlite:///srv/core.db", "did you mean sqlite:/srv/core.db?"),
        ("sqlite:core.db?mode=ro", "no options"),
        ("postgresql:kv", "begins with postgresql://"),
        ("postgresql://db1", "names one database"),
        ("postgresql://db1/", "names one database"),
        ("postgresql://db1/a/b", "names one database"),
        ("postgresql://kv:pass/w@db1/kv", "cannot be read"),
        ("postgresql://kv:pass?w@db1/kv", "cannot be read"),
        ("postgresql://kv:pass#w@db1/kv", "cannot be read"),
        ("postgresql://kv:pass[w@db1/kv", "cannot be read"),
        ("postgresql://db1:pass/kv", "cannot be read"),
        ("postgresql://kv:a@pass@db1/kv", "cannot be read"),
        ("postgresql://kv:a@b:pass@db1/kv", "cannot be read"),
        ("postgresql://kv:12/pass@db1/kv", "cannot be read"),
        ("postgresql://kv@db1/kv?sslmod=require", "did you mean sslmode?"),
        ("postgresql://kv:pass\u2100@db1/kv", "cannot be read"),
    ],
)
def test_urls_that_are_none(url: str, reason: str) -> None:
    """One line says what is wrong and what would be right, and nothing of a password."""
    with pytest.raises(BackendError) as caught:
        make_backend(url, shard="a", data_dir=DATA, config=Config())
    said = str(caught.value)
    assert reason in said
    assert "pass" not in said.replace("password", "")
    assert caught.value.__suppress_context__ or not caught.value.__context__
    assert "\n" not in said
