"""The proxy that breaks connections: what reaches the server, and what the client hears of it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import TypeAlias

import asyncpg
import pytest

from tests.backends.postgres_cluster import USER
from tests.backends.postgres_proxy import CUTS, Fault, Proxy, Round, proxying
from tests.backends.postgres_storage import PostgresStorage, eventually

pytestmark = pytest.mark.postgres

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
INSERT = "INSERT INTO seen VALUES ($1)"
LOST = (asyncpg.PostgresConnectionError, asyncpg.InterfaceError, OSError)


@pytest.fixture
async def storage(postgres_storage: PostgresStorage) -> PostgresStorage:
    """A schema with a table of numbers."""
    await postgres_storage.sql(f"CREATE SCHEMA {postgres_storage.schema}")
    await postgres_storage.sql("CREATE TABLE seen (n BIGINT)")
    return postgres_storage


@pytest.fixture
async def proxy(storage: PostgresStorage) -> AsyncIterator[Proxy]:
    """A proxy that does nothing yet."""
    async with proxying(storage.cluster.port, Random(7)) as opened:
        yield opened


@asynccontextmanager
async def connected(storage: PostgresStorage, proxy: Proxy) -> AsyncIterator[Connection]:
    """A session through the proxy."""
    settings = {"search_path": storage.schema, "application_name": "through"}
    connection = await asyncpg.connect(
        f"postgresql://{USER}@127.0.0.1:{proxy.port}/postgres", server_settings=settings
    )
    try:
        yield connection
    finally:
        connection.terminate()


async def seen(storage: PostgresStorage) -> list[int]:
    """What is stored."""
    return [row["n"] for row in await storage.sql("SELECT n FROM seen ORDER BY n")]


def only(proxy: Proxy, fault: Fault) -> None:
    """Do this to the next round that commits, and nothing to others."""
    proxy.plan = lambda asked: fault if asked.commits and not proxy.done else None


async def write(connection: Connection, *, several: bool) -> str:
    """Store 1, in a statement or in a transaction of several; gives the last tag."""
    if not several:
        statement = await connection.prepare(INSERT)
        await statement.fetch(1)
        return statement.get_statusmsg() or ""
    await connection.execute("BEGIN")
    await connection.execute(INSERT, 1)
    return await connection.execute("COMMIT")


in_both_ways = pytest.mark.parametrize("several", [False, True])


async def test_everything_is_passed_on(storage: PostgresStorage, proxy: Proxy) -> None:
    """Statements, transactions, errors, warnings and copied rows go through unchanged, and each
    round is told with its session, its text, and whether it commits.
    """
    asked: list[Round] = []

    def listen(each: Round) -> None:
        asked.append(each)

    proxy.plan = listen
    async with connected(storage, proxy) as connection:
        warnings: list[str] = []
        connection.add_log_listener(lambda _, message: warnings.append(message.severity_en))
        assert "INSERT 0 1" == await write(connection, several=False)
        assert "COMMIT" == await write(connection, several=True)
        with pytest.raises(asyncpg.DivisionByZeroError):
            await connection.execute("SELECT 1 / 0")
        await connection.execute("DO $$ BEGIN RAISE WARNING 'mind you'; END $$")
        assert ["WARNING"] == warnings
        rows = [(n,) for n in range(2, 5_000)]
        assert "COPY 4998" == await connection.copy_records_to_table("seen", records=rows)
        assert 5_000 == (await connection.fetchval("SELECT count(*) FROM seen"))
        assert {"through"} == {each.session for each in asked}
        assert [INSERT, "COMMIT"] == [each.texts[0] for each in asked if each.commits]
        assert [INSERT] == [each.texts[0] for each in asked if each.in_transaction and each.texts][
            :1
        ]
    assert [1, *range(1, 5_000)] == await seen(storage)


@pytest.mark.parametrize("fault", CUTS)
@in_both_ways
async def test_a_cut(
    storage: PostgresStorage,
    proxy: Proxy,
    fault: Fault,
    several: bool,  # noqa: FBT001 - pytest hands it over
) -> None:
    """Before the last message has reached the server nothing is stored, after that it is; the
    client hears of the answer only if the cut comes behind it.
    """
    only(proxy, fault)
    async with connected(storage, proxy) as connection:
        if fault is Fault.ANSWERED:
            assert (await write(connection, several=several)).startswith(("INSERT", "COMMIT"))
            await eventually(connection.is_closed)
        else:
            with pytest.raises(LOST):
                await write(connection, several=several)
        assert [fault] == [done for done, _ in proxy.done]
    stored = await seen(storage)
    if fault in (Fault.INSIDE, Fault.BEFORE, Fault.LATE):
        assert [] == stored
    elif fault is not Fault.SENT:
        assert [1] == stored
    proxy.thaw()
    async with asyncio.timeout(5):
        while fault is Fault.LATE and await seen(storage) != [1]:  # noqa: ASYNC110 - nothing tells when it does
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("fault", [Fault.FROZEN_BEFORE, Fault.FROZEN_AFTER, Fault.DELAYED])
@in_both_ways
async def test_a_frozen_connection(
    storage: PostgresStorage,
    proxy: Proxy,
    fault: Fault,
    several: bool,  # noqa: FBT001 - pytest hands it over
) -> None:
    """Nothing comes and nothing is closed, and others are served, until it goes on: then the answer
    is there. Whether it is stored by then depends on what the server has been given.
    """
    only(proxy, fault)
    proxy.delay_seconds = 0.2
    async with connected(storage, proxy) as connection, asyncio.TaskGroup() as group:
        writing = group.create_task(write(connection, several=several))
        await eventually(lambda: bool(proxy.done))
        if fault is not Fault.FROZEN_BEFORE:
            async with asyncio.timeout(5):
                while await seen(storage) != [1]:  # noqa: ASYNC110 - nothing tells when it does
                    await asyncio.sleep(0.005)
        async with connected(storage, proxy) as other:
            assert 1 == await other.fetchval("SELECT 1")
        assert not writing.done()
        assert [fault is not Fault.DELAYED] == [bool(proxy.frozen)]
        if fault is Fault.FROZEN_BEFORE:
            assert [] == await seen(storage)
        proxy.thaw()
        assert (await writing).startswith(("INSERT 0 1", "COMMIT"))
    assert [1] == await seen(storage)


async def test_everything_stands_still(storage: PostgresStorage, proxy: Proxy) -> None:
    """A frozen proxy passes nothing on, of those that are there and of new ones."""
    async with connected(storage, proxy) as connection, asyncio.TaskGroup() as group:
        proxy.freeze()
        asking = group.create_task(connection.fetchval("SELECT 1"))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1), connected(storage, proxy):
                pass
        assert not asking.done()
        proxy.thaw()
        assert 1 == await asking


@in_both_ways
async def test_a_warning(
    storage: PostgresStorage,
    proxy: Proxy,
    several: bool,  # noqa: FBT001 - pytest hands it over
) -> None:
    """The answer to a commit comes with the server's warning, in a form that the driver reads."""
    only(proxy, Fault.WARNED)
    async with connected(storage, proxy) as connection:
        heard: list[asyncpg.PostgresLogMessage] = []
        connection.add_log_listener(lambda _, message: heard.append(message))
        await write(connection, several=several)
        (warning,) = heard
        assert ("WARNING", "01000") == (warning.severity_en, warning.sqlstate)
        assert "might not have been replicated" in str(warning.detail)
    assert [1] == await seen(storage)


async def test_a_rollback(storage: PostgresStorage, proxy: Proxy) -> None:
    """A COMMIT is answered with the tag ROLLBACK, without an error, and nothing is stored."""
    only(proxy, Fault.ROLLED_BACK)
    async with connected(storage, proxy) as connection:
        assert "ROLLBACK" == await write(connection, several=True)
    assert [] == await seen(storage)


async def test_a_server_that_is_not_there(storage: PostgresStorage) -> None:
    """The client's connection is closed."""
    async with proxying(1, Random(1)) as proxy:
        with pytest.raises(LOST):
            async with connected(storage, proxy):
                pass
