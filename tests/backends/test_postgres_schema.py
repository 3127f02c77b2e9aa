"""Making and migrating PostgreSQL's tables."""

import asyncio

import pytest

from backends import postgres_schema
from backends.postgres import PostgresBackend
from backends.postgres_schema import migrate
from backends.schema import SCHEMA_VERSION, Migration
from kvstore.backend import Batch, Outcome
from kvstore.errors import BackendError
from tests.backends.postgres_cluster import USER
from tests.backends.postgres_storage import QUICK, PostgresStorage
from tests.backends.storage import Session, put

pytestmark = pytest.mark.postgres


def url(storage: PostgresStorage, user: str = USER) -> str:
    """Where the store is."""
    return storage.cluster.url(storage.schema, user=user)


async def test_migrate_makes_the_tables_once(postgres_storage: PostgresStorage) -> None:
    """The first time there is nothing, then it is as it must be; an opened store is as it was."""
    assert (0, SCHEMA_VERSION) == await migrate(url(postgres_storage), QUICK)
    assert (SCHEMA_VERSION, SCHEMA_VERSION) == await migrate(url(postgres_storage), QUICK)
    session = await Session(postgres_storage.backend()).open()
    await session.put(b"a")
    assert (SCHEMA_VERSION, SCHEMA_VERSION) == await migrate(url(postgres_storage), QUICK)
    await session.put(b"b")
    assert [put(2, 0, b"a"), put(3, 0, b"b")] == await session.rows()
    await session.close()


async def test_a_role_without_rights_to_make_tables_serves(
    postgres_storage: PostgresStorage,
) -> None:
    """After ``migrate``, a role that may only read and change rows is enough; before, it is told
    what is missing.
    """
    role, schema = f"worker_{postgres_storage.schema}", postgres_storage.schema
    await postgres_storage.sql(f"CREATE ROLE {role} LOGIN")
    backend = PostgresBackend(url(postgres_storage, user=role), shard="first", config=QUICK)
    with pytest.raises(BackendError, match="permission denied for database"):
        await backend.open()
    await migrate(url(postgres_storage), QUICK)
    await postgres_storage.sql(f"GRANT USAGE ON SCHEMA {schema} TO {role}")
    await postgres_storage.sql(
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO {role}"
    )
    session = await Session(backend).open()
    await session.put(b"a")
    assert Outcome.COMMITTED is (await session.commit(_everything(session))).outcome
    await session.close()


def _everything(session: Session) -> Batch:
    """A batch that touches every table."""
    return session.batch(
        [put(3, 0, b"b")],
        drops=[(2, 0)],
        lease_deletes=[1],
        redo=[("x", put(3, 1, b"c"))],
        redo_drops=[1],
        shard_map="m",
        reserved=9,
    )


async def test_newer_schema_is_refused(postgres_storage: PostgresStorage) -> None:
    """A store of a version that this program does not know is left as it is."""
    await migrate(url(postgres_storage), QUICK)
    await postgres_storage.sql(f"UPDATE meta SET schema_version = {SCHEMA_VERSION + 1}")
    refusal = f"has version {SCHEMA_VERSION + 1}, this program knows {SCHEMA_VERSION}"
    with pytest.raises(BackendError, match=refusal):
        await migrate(url(postgres_storage), QUICK)
    with pytest.raises(BackendError, match=refusal):
        await postgres_storage.backend().open()
    assert [] == await postgres_storage.sql("SELECT * FROM fence")


async def test_another_applications_schema_is_refused(postgres_storage: PostgresStorage) -> None:
    """Tables that are not ours are left alone, whether one of ours has their name or not."""
    schema = postgres_storage.schema
    await postgres_storage.sql(f"CREATE SCHEMA {schema}")
    await postgres_storage.sql("CREATE TABLE leases (tenant text)")
    with pytest.raises(BackendError, match='"leases" already exists'):
        await postgres_storage.backend().open()
    await postgres_storage.sql("CREATE TABLE meta (tenant text)")
    with pytest.raises(BackendError, match="belongs to another application"):
        await postgres_storage.backend().open()
    tables = await postgres_storage.sql(
        f"SELECT table_name FROM information_schema.tables WHERE table_schema = '{schema}'"
    )
    assert {"leases", "meta"} == {row[0] for row in tables}


async def test_two_may_make_the_same_store(postgres_storage: PostgresStorage) -> None:
    """Servers that find nothing at the same moment make one store, of one version."""
    made = await asyncio.gather(*(migrate(url(postgres_storage), QUICK) for _ in range(5)))
    assert SCHEMA_VERSION == {after for _, after in made}.pop()
    assert 1 == len(await postgres_storage.sql("SELECT * FROM meta"))


async def test_rows_without_a_fence_row_are_refused(postgres_storage: PostgresStorage) -> None:
    """A store that has lost its fence row is not taken for a new one."""
    session = await Session(postgres_storage.backend()).open()
    await session.put(b"a")
    await session.close()
    await postgres_storage.sql("DELETE FROM fence")
    with pytest.raises(BackendError, match="no fence row"):
        await postgres_storage.backend().open()


async def test_older_store_is_migrated(
    postgres_storage: PostgresStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps above the store's version are run, in one transaction with the new version; a step that
    fails leaves the store as it was.
    """
    session = await Session(postgres_storage.backend()).open()
    await session.put(b"a")
    await session.close()
    steps = [
        Migration(SCHEMA_VERSION, ("SELECT 1 / 0",)),
        Migration(SCHEMA_VERSION + 1, ("CREATE TABLE added (id BIGINT)",)),
        Migration(SCHEMA_VERSION + 2, ("SELECT 1 / 0",)),
    ]
    monkeypatch.setattr(postgres_schema, "SCHEMA_VERSION", SCHEMA_VERSION + 2)
    monkeypatch.setattr(postgres_schema, "migrations", lambda _: steps)
    with pytest.raises(BackendError, match="division by zero"):
        await migrate(url(postgres_storage), QUICK)
    assert [(SCHEMA_VERSION,)] == [
        tuple(row) for row in await postgres_storage.sql("SELECT schema_version FROM meta")
    ]
    steps.pop()
    monkeypatch.setattr(postgres_schema, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
    assert (SCHEMA_VERSION, SCHEMA_VERSION + 1) == await migrate(url(postgres_storage), QUICK)
    assert [] == await postgres_storage.sql("SELECT * FROM added")
    session = await Session(postgres_storage.backend()).open()
    assert [put(2, 0, b"a")] == await session.rows()
    await session.close()
