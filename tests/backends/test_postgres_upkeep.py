"""What a holder does beside its commits is done when it is due, whatever the commits are doing."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from kvstore.backend import Outcome
from tests.backends.postgres_held import holding
from tests.backends.postgres_storage import QUICK, PostgresStorage, eventually

pytestmark = pytest.mark.postgres


@asynccontextmanager
async def without_rest(turn: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Inside, one turn follows the other."""
    ended = asyncio.Event()

    async def go_on() -> None:
        while not ended.is_set():
            await turn()

    going = asyncio.create_task(go_on())
    try:
        yield
    finally:
        ended.set()
        await going


async def refuse_rows(storage: PostgresStorage) -> None:
    """As a disk that is full: what takes room is refused, and leaves the session as it is."""
    await storage.sql(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'no room' USING ERRCODE = 'disk_full'; END $$"
    )
    await storage.sql(
        "CREATE TRIGGER refusing BEFORE INSERT ON revisions"
        " FOR EACH STATEMENT EXECUTE FUNCTION refuse()"
    )


async def test_home_is_renewed_while_its_commits_are_refused(
    postgres_storage: PostgresStorage,
) -> None:
    """A batch that is tried again and again does not let the lease run out, and is stored as soon
    as it may be.
    """
    async with holding(postgres_storage) as held:
        await refuse_rows(postgres_storage)
        batch = held.plain()

        async def refused() -> None:
            assert Outcome.NOT_COMMITTED is (await held.session.commit(batch)).outcome

        async with without_rest(refused):
            for _ in range(2):
                until = held.backend.lease_until()
                await eventually(lambda until=until: held.backend.lease_until() > until, 5)  # type: ignore[misc]
        await postgres_storage.sql("DROP TRIGGER refusing ON revisions")
        assert [Outcome.COMMITTED] == await held.settle(batch)


async def test_a_renewal_that_fails_waits_for_its_time(
    postgres_storage: PostgresStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not tried again without a pause, and commits go on meanwhile."""
    postgres_storage.config = replace(QUICK, renew_interval=60.0)
    async with holding(postgres_storage) as held:
        tried = 0

        async def fail() -> None:
            nonlocal tried
            tried += 1

        await refuse_rows(postgres_storage)
        writer = held.backend._writer
        monkeypatch.setattr(writer, "renew", fail)
        writer.renewed_at -= 60.0
        for _ in range(3):
            assert Outcome.NOT_COMMITTED is (await held.session.commit(held.plain())).outcome
        assert 1 == tried


async def test_sizes_are_measured_under_load(postgres_storage: PostgresStorage) -> None:
    """Commits that never rest for the time between two renewals do not keep them from it."""
    postgres_storage.config = replace(QUICK, renew_interval=60.0, sizes_interval=0.1)
    async with holding(postgres_storage) as held:
        await postgres_storage.sql(
            "INSERT INTO revisions SELECT -n, 0, 'x', 0, 0, 0, decode(repeat(md5(n::text), 100),"
            " 'hex') FROM generate_series(1, 1000) n"
        )

        async def committed() -> None:
            await held.session.put(b"a")

        async with without_rest(committed):
            await eventually(lambda: held.backend.sizes().total > 1_000_000, 5)
