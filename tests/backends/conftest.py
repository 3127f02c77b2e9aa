"""Every contract test runs over every backend."""

from pathlib import Path

import pytest

from tests.backends.storage import MemoryStorage, SqliteStorage, Storage


@pytest.fixture(params=["memory", "sqlite"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """New and empty."""
    if request.param == "memory":
        return MemoryStorage()
    return SqliteStorage(tmp_path / "data" / "kvstore.db")
