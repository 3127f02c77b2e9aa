"""A PostgreSQL that stands still, dies or is gone: noticed in time, and back without a loss."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import asyncpg
import pytest

from kvstore.backend import Outcome
from kvstore.errors import BackendError, UnreachableError
from tests.backends.postgres_cluster import Cluster, temporary_cluster
from tests.backends.postgres_held import Held, holding
from tests.backends.postgres_storage import QUICK, PostgresStorage, eventually
from tests.backends.storage import Session, put

pytestmark = pytest.mark.postgres


@pytest.fixture(scope="module")
def own_cluster(postgres_programs: Path) -> Iterator[Cluster]:
    """A PostgreSQL that a test may stop."""
    with temporary_cluster(postgres_programs) as cluster:
        yield cluster


_schemas = count(1)


def fresh() -> str:
    """A schema of this module's cluster that is not there yet."""
    return f"own_{next(_schemas)}"


IMPATIENT = replace(QUICK, connect_timeout=0.5, answer_timeout=0.5)


@pytest.mark.slow
async def test_a_frozen_server_is_noticed_and_comes_back(own_cluster: Cluster) -> None:
    """A server whose processes stand still is out within the time for an answer; reads then fail at
    once. When it goes on, the commit that hung is resolved, and it is there once.
    """
    storage = PostgresStorage(own_cluster, fresh(), IMPATIENT)
    async with holding(storage) as held:
        await held.session.put(b"first")
        batch = held.plain()
        with own_cluster.frozen():
            outcomes = asyncio.create_task(held.settle(batch))
            await eventually(lambda: bool(held.told), 5)
            assert held.told[0].startswith("out: ")
            with pytest.raises(UnreachableError):
                await asyncio.wait_for(held.session.values((2, 0)), 0.2)
            assert not outcomes.done()
        async with asyncio.timeout(20):
            assert Outcome.COMMITTED is (await outcomes)[-1]
        assert "back" == held.told[-1]
        assert [put(2, 0, b"first"), *batch.rows] == await held.session.rows()
        assert [b"v"] == await held.session.values((2, 0))


@pytest.mark.slow
async def test_an_idle_holder_notices_a_frozen_server(own_cluster: Cluster) -> None:
    """Without a commit, too, within the interval and the time for an answer."""
    storage = PostgresStorage(own_cluster, fresh(), IMPATIENT)
    async with holding(storage) as held:
        with own_cluster.frozen():
            await eventually(lambda: bool(held.told), 5)
        await eventually(lambda: held.told[-1] == "back")


@pytest.mark.slow
async def test_what_is_acknowledged_survives_a_crash_of_the_server(own_cluster: Cluster) -> None:
    """The server dies under commits, again and again: every one is there once, in order."""
    storage = PostgresStorage(own_cluster, fresh(), QUICK)
    async with holding(storage) as held:
        for turn in range(3):
            done = asyncio.Event()

            async def write(done: asyncio.Event, turn: int) -> None:
                while not done.is_set():
                    make = (held.plain, held.several)[held.session.tip % 2]
                    await held.settle(make(b"%d" % turn))

            writing = asyncio.create_task(write(done, turn))
            tip = held.session.tip
            await eventually(lambda tip=tip: held.session.tip > tip + 20)  # type: ignore[misc]
            await asyncio.to_thread(own_cluster.stop, "immediate")
            await eventually(lambda: held.told[-1:] != ["back"] and bool(held.told))
            await asyncio.to_thread(own_cluster.start)
            await eventually(lambda: held.told[-1] == "back")
            done.set()
            await writing
        rows = await held.session.rows()
        assert list(range(2, held.session.tip + 1)) == [row[0] for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("lost", [True, False])
async def test_failover_to_a_standby(
    postgres_programs: Path,
    lost: bool,  # noqa: FBT001 - pytest hands it over
) -> None:
    """A standby takes over under the same address. One that has everything is served, with its own
    timeline, and so it is at the next start; one that lacks what was acknowledged is not, then and
    at the next start, unless that is accepted. As long as it is a standby it is no use.
    """
    with (
        temporary_cluster(postgres_programs) as primary,
        TemporaryDirectory(prefix="kvstore-postgres-", dir="/tmp") as place,
    ):
        standby = Cluster(postgres_programs, Path(place))
        await asyncio.to_thread(standby.copy_from, primary)
        await asyncio.to_thread(standby.start)
        storage = PostgresStorage(primary, "store")
        held = Held(storage)
        await held.session.open()
        await held.session.put(b"both have this")
        await until_replayed(primary, standby)
        if lost:
            await asyncio.to_thread(standby.stop)
            await held.session.put(b"only one has this")
        await asyncio.to_thread(primary.stop, "immediate" if lost else "fast")
        if not lost:
            await asyncio.to_thread(standby.stop)
        standby.port = primary.port
        standby.configure()
        await asyncio.to_thread(standby.start)
        try:
            await eventually(lambda: any(told.startswith("out: ") for told in held.told))
            assert not held.backend._writer.connected
            with pytest.raises(UnreachableError, match="this server is a standby"):
                await storage.backend().open()
            await asyncio.to_thread(standby.promote)
            if lost:
                await eventually(lambda: held.told[-1].startswith("broken: "))
                assert "acknowledged writes are lost: revision 3 was stored" in held.told[-1]
                await held.session.close()
                with pytest.raises(BackendError, match="--accept-data-loss goes on"):
                    await storage.backend().open()
                storage.config = replace(QUICK, accept_data_loss=True)
            else:
                await eventually(lambda: held.told[-1] == "back")
                await held.session.put(b"only the standby has this")
                await held.session.close()
            again = await Session(storage.backend()).open()
            assert "2" == again.fence.origin.partition("/")[2]
            keys = [row[2] for row in await again.rows()]
            assert [b"both have this", b"only the standby has this"][: 2 - lost] == keys
            await again.close()
        finally:
            await asyncio.to_thread(standby.stop, "immediate")


async def until_replayed(primary: Cluster, standby: Cluster) -> None:
    """Wait until the standby shows what the primary has written by now."""
    (written,) = await ask(primary, "SELECT pg_current_wal_lsn()::text")
    behind = f"SELECT pg_last_wal_replay_lsn() < '{written}'"
    async with asyncio.timeout(20):
        while (await ask(standby, behind))[0]:  # noqa: ASYNC110 - nothing tells when it does
            await asyncio.sleep(0.02)


async def ask(cluster: Cluster, text: str) -> asyncpg.Record:
    """The only row of a statement."""
    connection = await asyncpg.connect(cluster.plain_url())
    try:
        (row,) = await connection.fetch(text)
        return row
    finally:
        await connection.close()


@pytest.mark.slow
async def test_closing_does_not_wait_for_a_server_that_is_gone(own_cluster: Cluster) -> None:
    """A shard whose server is gone is let go at once; its commit is not known to be stored."""
    storage = PostgresStorage(own_cluster, fresh(), QUICK)
    held = Held(storage)
    await held.session.open()
    await asyncio.to_thread(own_cluster.stop, "immediate")
    commit = asyncio.create_task(held.session.commit(held.plain()))
    await eventually(lambda: bool(held.told))
    async with asyncio.timeout(5):
        await held.session.close()
    assert Outcome.COMMITTED is not (await commit).outcome
    await asyncio.to_thread(own_cluster.start)
    again = await held.session.open()
    assert again.tip in (1, 2)
    await again.close()
