"""A batch that PostgreSQL needs long for is stored in the end."""

import asyncio
from dataclasses import replace

import pytest

from kvstore.backend import Outcome
from tests.backends.postgres_held import holding
from tests.backends.postgres_storage import QUICK, PostgresStorage
from tests.backends.storage import put

pytestmark = pytest.mark.postgres


async def slow_down(storage: PostgresStorage, seconds: float) -> None:
    """From now on inserting revisions takes so long."""
    await storage.sql(
        "CREATE OR REPLACE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN PERFORM pg_sleep({seconds}); RETURN NULL; END $$"
    )
    await storage.sql(
        "CREATE OR REPLACE TRIGGER dawdling AFTER INSERT ON revisions"
        " FOR EACH STATEMENT EXECUTE FUNCTION dawdle()"
    )


@pytest.mark.slow
async def test_a_slow_batch_is_stored_in_the_end(postgres_storage: PostgresStorage) -> None:
    """A batch whose commit is cut off for being late, and undone by the server, which notices
    within a second, is given more time until it is stored, once; the next one is cut off as early
    as ever.
    """
    postgres_storage.config = replace(QUICK, answer_timeout=0.4)
    async with holding(postgres_storage) as held:
        await held.session.put(b"first")
        await slow_down(postgres_storage, 2.0)
        batch = held.plain()
        async with asyncio.timeout(25):
            outcomes = await held.settle(batch)
        assert [Outcome.UNKNOWN, Outcome.NOT_COMMITTED] == outcomes[:2]
        assert Outcome.COMMITTED is outcomes[-1]
        assert [put(2, 0, b"first"), *batch.rows] == await held.session.rows()
        await slow_down(postgres_storage, 0.8)
        assert Outcome.UNKNOWN is (await held.settle(held.plain()))[0]
