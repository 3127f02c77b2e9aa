"""What a client of PostgreSQL has given up may still be under way: it changes nothing any more, and
keeps nobody waiting.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import replace
from random import Random

import pytest

from kvstore.backend import Batch, Cluster, Outcome
from kvstore.errors import UnreachableError
from tests.backends.postgres_held import Held, holding
from tests.backends.postgres_proxy import Fault, Proxy, proxying
from tests.backends.postgres_storage import QUICK, PostgresStorage
from tests.backends.storage import Session

pytestmark = pytest.mark.postgres

CLUSTER = Cluster(3, 4)


@pytest.fixture
async def proxy(postgres_storage: PostgresStorage) -> AsyncIterator[Proxy]:
    """A proxy that backends over the storage go through."""
    postgres_storage.config = replace(QUICK, renew_interval=60.0)
    async with proxying(postgres_storage.cluster.port, Random(7)) as opened:
        postgres_storage.port = opened.port
        yield opened


def injure(proxy: Proxy, *injuries: tuple[str, Fault]) -> None:
    """From now on the next round that runs such a text is treated so, then the next."""
    left = list(injuries)

    def plan(asked: object) -> Fault | None:
        if left and left[0][0] in str(asked):
            return left.pop(0)[1]
        return None

    proxy.plan = plan
    proxy.done.clear()


async def arrived(storage: PostgresStorage, proxy: Proxy, sessions: int) -> None:
    """What is late goes on, and has been carried out."""
    assert Fault.LATE in [fault for fault, _ in proxy.done]
    assert proxy.frozen
    assert await storage.sessions() > sessions
    proxy.thaw()
    async with asyncio.timeout(10):
        while await storage.sessions() != sessions:  # noqa: ASYNC110 - nothing tells when it does
            await asyncio.sleep(0.005)


async def ends_nobody(_: object, processes: Collection[int]) -> None:
    """As on a server that does not let us end sessions."""


async def test_a_taking_that_arrives_late(
    postgres_storage: PostgresStorage, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shard was taken anew twice, and the first attempt reaches the database last: the server
    is not fenced by itself.
    """
    monkeypatch.setattr("backends.postgres_writer.end_abandoned", ends_nobody)
    async with holding(postgres_storage) as held:
        injure(proxy, ("INSERT INTO revisions", Fault.UNANSWERED), ("SET epoch", Fault.LATE))
        assert Outcome.COMMITTED is (await held.settle(held.plain()))[-1]
        await arrived(postgres_storage, proxy, 1)
        assert [Outcome.COMMITTED] == await held.settle(held.plain())
        assert "broken" not in str(held.told)


async def test_a_first_taking_that_arrives_late(
    postgres_storage: PostgresStorage, proxy: Proxy
) -> None:
    """A shard was opened once more after the first attempt had been cut off; likewise."""
    held = Held(postgres_storage)
    injure(proxy, ("SET epoch", Fault.LATE))
    with pytest.raises(UnreachableError):
        await held.session.open(CLUSTER)
    await held.session.open(CLUSTER)
    await arrived(postgres_storage, proxy, 1)
    assert [Outcome.COMMITTED] == await held.settle(held.plain())
    await held.session.close()


async def test_a_release_that_arrives_late(postgres_storage: PostgresStorage, proxy: Proxy) -> None:
    """A shard was closed and opened again by the same server, and the end of the first time reaches
    the database last: the shard is still held.
    """
    session = await Session(postgres_storage.backend()).open()
    injure(proxy, ("holder=0", Fault.LATE))
    await session.close()
    await session.open()
    await arrived(postgres_storage, proxy, 1)
    (row,) = await postgres_storage.sql("SELECT holder FROM fence")
    assert 0 != row["holder"]
    await session.close()


async def test_a_locked_shard_is_out_of_reach_at_a_start(
    postgres_storage: PostgresStorage,
) -> None:
    """The others need not wait as long for it as home may take."""
    session = await Session(postgres_storage.backend()).open(CLUSTER)
    await session.close()
    postgres_storage.config = replace(QUICK, answer_timeout=0.5, answer_timeout_max=3_600.0)
    foreign = await postgres_storage.connect()
    await foreign.execute("BEGIN")
    await foreign.execute("SELECT * FROM fence FOR UPDATE")
    backend = postgres_storage.backend()
    try:
        async with asyncio.timeout(10):
            with pytest.raises(UnreachableError, match=r"no answer within 0\.5 s"):
                await backend.open(CLUSTER)
    finally:
        foreign.terminate()
    await backend.open(CLUSTER)
    await backend.close()


@pytest.mark.slow
@pytest.mark.parametrize("make", [Held.plain, Held.several], ids=lambda kind: kind.__name__)
async def test_an_abandoned_session_keeps_nobody_waiting(
    postgres_storage: PostgresStorage, proxy: Proxy, make: Callable[[Held], Batch]
) -> None:
    """A session that has the fence row and waits for a client which has left, as a network or a
    proxy in between has not told it, is ended by that client's next session.
    """
    postgres_storage.config = replace(QUICK, answer_timeout=1.0, idle_transaction_timeout=3_600.0)
    async with holding(postgres_storage) as held:
        last = "INSERT INTO revisions" if make is Held.plain else "'COMMIT'"
        injure(proxy, (last, Fault.FROZEN_BEFORE))
        batch = make(held)
        async with asyncio.timeout(25):
            outcomes = await held.settle(batch)
        assert [Outcome.UNKNOWN, Outcome.NOT_COMMITTED] == outcomes[:2]
        assert Outcome.COMMITTED is outcomes[-1]
        proxy.thaw()
        assert [Outcome.COMMITTED] == await held.settle(held.plain())
        assert [batch.rows[0][2], b"a"] == [row[2] for row in await held.session.rows()]
