"""Every contract test runs over every backend."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from tests.backends.postgres_cluster import (
    MISSING,
    Cluster,
    find_programs,
    temporary_cluster,
)
from tests.backends.postgres_storage import PostgresStorage
from tests.backends.storage import MemoryStorage, SqliteStorage, Storage

_schemas = count(1)


@pytest.fixture
def memory_storage() -> Storage:
    """A disk in memory."""
    return MemoryStorage()


@pytest.fixture
def sqlite_storage(tmp_path: Path) -> Storage:
    """A file that is not there yet, nor is its directory."""
    return SqliteStorage(tmp_path / "data" / "kvstore.db")


@pytest.fixture(scope="session")
def postgres_programs() -> Path:
    """Where PostgreSQL's programs are."""
    programs = find_programs()
    if programs is None:
        pytest.skip(MISSING)
    return programs


@pytest.fixture(scope="session")
def postgres_cluster(postgres_programs: Path) -> Iterator[Cluster]:
    """A PostgreSQL for all tests that do not stop it."""
    with temporary_cluster(postgres_programs) as cluster:
        yield cluster


@pytest.fixture
def postgres_storage(postgres_cluster: Cluster) -> PostgresStorage:
    """A schema that is not there yet."""
    return PostgresStorage(postgres_cluster, f"store_{next(_schemas)}")


@pytest.fixture(params=["memory", "sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def storage(request: pytest.FixtureRequest) -> Storage:
    """New and empty, of each kind; the fixture of a kind is made only for its own tests."""
    made: Storage = request.getfixturevalue(f"{request.param}_storage")
    return made
