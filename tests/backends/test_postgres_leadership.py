"""Who may take a shard in PostgreSQL, and until when it may be believed to be held."""

import asyncio
import math
import time
from dataclasses import replace

import pytest

from backends.postgres import PostgresBackend
from kvstore.backend import Cluster, CommitResult, Outcome
from kvstore.errors import BackendError, UnreachableError
from tests.backends.postgres_storage import SHORT_LEASE, PostgresStorage, eventually
from tests.backends.storage import Session, put

pytestmark = pytest.mark.postgres
COMMITTED = CommitResult(Outcome.COMMITTED)


@pytest.fixture
def storage(postgres_storage: PostgresStorage) -> PostgresStorage:
    """One whose lease a test can wait for."""
    postgres_storage.config = SHORT_LEASE
    return postgres_storage


def backend_of(session: Session) -> PostgresBackend:
    """The backend under a session."""
    backend = session.backend
    assert isinstance(backend, PostgresBackend)
    return backend


async def stand_still(session: Session) -> None:
    """The process pauses: nothing of it runs, and its connections stay open."""
    life = backend_of(session)._life
    assert life is not None
    life.cancel()
    await asyncio.wait([life])


async def die(session: Session) -> None:
    """The process ends without letting go."""
    await stand_still(session)
    connection = backend_of(session)._writer.session
    assert connection is not None
    connection.terminate()


async def test_a_renewed_lease_is_respected(storage: PostgresStorage) -> None:
    """While the holder lives, idle or not, home is not taken, and the holder notices nothing."""
    first = await Session(storage.backend()).open()
    until = first.backend.lease_until()
    second = storage.backend()
    with pytest.raises(BackendError, match="another server holds the shard"):
        await second.open()
    await second.close()
    await eventually(lambda: first.backend.lease_until() > until)
    await first.put(b"a")
    assert 1 == first.fence.epoch
    await first.close()


@pytest.mark.slow
async def test_a_silent_holder_is_waited_for(storage: PostgresStorage) -> None:
    """After a holder that did not let go, home is taken once its lease has run out, and not
    before; then it is fenced.
    """
    first = await Session(storage.backend()).open()
    await first.put(b"a")
    await stand_still(first)
    until = first.backend.lease_until()
    second = await Session(storage.backend()).open()
    assert time.monotonic() > until
    assert 2 == second.fence.epoch
    await second.put(b"b")
    zombie = first.batch([put(3, 0, b"c")])
    assert Outcome.FENCED is (await backend_of(first)._writer.commit(zombie)).outcome
    assert [put(2, 0, b"a"), put(3, 0, b"b")] == await second.rows()
    await second.close()
    await die(first)


async def test_who_lets_go_is_not_waited_for(storage: PostgresStorage) -> None:
    """After a close the next server takes home without looking on."""
    storage.config = replace(SHORT_LEASE, lease_watch=3_600.0)
    for epoch in (1, 2, 3):
        async with asyncio.timeout(10):
            session = await Session(storage.backend()).open()
        assert epoch == session.fence.epoch
        await session.close()


@pytest.mark.slow
async def test_a_server_may_be_told_to_take_over(storage: PostgresStorage) -> None:
    """Then it takes home from one that is there, and the old one stops."""
    first = await Session(storage.backend()).open()
    told: list[str] = []
    first.backend.on_broken = told.append
    storage.config = replace(SHORT_LEASE, take_over=True)
    second = await Session(storage.backend()).open()
    assert time.monotonic() < second.backend.lease_until()
    assert Outcome.FENCED is (await first.commit(first.batch([put(2, 0, b"a")]))).outcome
    await eventually(lambda: bool(told))
    assert told[0].startswith("fenced: ")
    await second.put(b"b")
    await first.close()
    assert COMMITTED == await second.commit(second.batch())
    await second.close()


async def fence_of(storage: PostgresStorage) -> tuple[int, int]:
    """The epoch and the holder as they are stored."""
    (row,) = await storage.sql("SELECT epoch, holder FROM fence")
    return row["epoch"], row["holder"]


async def taking_over(storage: PostgresStorage, session: Session) -> "asyncio.Task[Session]":
    """``session`` is taking home over by force, and has raised the epoch."""
    epoch, _ = await fence_of(storage)
    opening = asyncio.create_task(session.open())
    async with asyncio.timeout(10):
        while (await fence_of(storage))[0] == epoch:  # noqa: ASYNC110 - nothing tells when it does
            await asyncio.sleep(0.005)
    return opening


async def unaware(storage: PostgresStorage) -> tuple[Session, float]:
    """A holder that has just renewed its lease and notices nothing by itself; until when it goes on
    answering.
    """
    storage.config = replace(SHORT_LEASE, renew_interval=3_600.0)
    session = await Session(storage.backend()).open()
    await session.put(b"a")
    return session, session.backend.lease_until()


@pytest.mark.slow
async def test_who_is_replaced_by_force_is_outlasted(storage: PostgresStorage) -> None:
    """It writes nothing from the beginning, and may go on answering out of its memory until its
    lease has run out: the new one does not serve before.
    """
    first, until = await unaware(storage)
    storage.config = replace(SHORT_LEASE, take_over=True)
    opening = await taking_over(storage, Session(storage.backend()))
    assert Outcome.FENCED is (await first.commit(first.batch([put(3, 0, b"b")]))).outcome
    second = await opening
    assert time.monotonic() > until
    await second.put(b"b")
    await first.close()
    await second.close()


async def test_a_take_over_that_is_cut_off_begins_anew(storage: PostgresStorage) -> None:
    """Who has raised the epoch and lost the connection before the time was over does not find home
    in its own hands: it raises it once more, and waits again.
    """
    first, _ = await unaware(storage)
    storage.config = replace(SHORT_LEASE, lease_watch=3_600.0, take_over=True)
    second = Session(storage.backend())
    opening = await taking_over(storage, second)
    await storage.kill(writes=True)
    with pytest.raises(UnreachableError):
        await opening
    opening = await taking_over(storage, second)
    epoch, holder = await fence_of(storage)
    assert (3, False) == (epoch, holder == backend_of(second)._holder)
    opening.cancel()
    await asyncio.wait([opening])
    await first.close()


@pytest.mark.slow
async def test_of_two_that_take_over_the_later_one_serves(storage: PostgresStorage) -> None:
    """The one before it notices while it waits, and gives up."""
    first, _ = await unaware(storage)
    storage.config = replace(SHORT_LEASE, take_over=True)
    second, third = Session(storage.backend()), Session(storage.backend())
    opening = await taking_over(storage, second)
    later = await taking_over(storage, third)
    with pytest.raises(BackendError, match="another server holds the shard"):
        await opening
    await later
    await third.put(b"b")
    await first.close()
    await third.close()


async def test_other_shards_are_taken_at_once(storage: PostgresStorage) -> None:
    """Who holds home may take the others, whoever has them; they have no lease of their own."""
    storage.config = replace(SHORT_LEASE, lease_watch=3_600.0)
    cluster = Cluster(3, 4)
    first = await Session(storage.backend()).open(cluster)
    assert math.inf == first.backend.lease_until()
    async with asyncio.timeout(10):
        second = await Session(storage.backend()).open(cluster)
    assert Outcome.FENCED is (await first.commit(first.batch([put(2, 0, b"a")]))).outcome
    await second.put(b"b")
    await first.close()
    await second.close()


@pytest.mark.slow
async def test_a_lease_runs_out_while_the_database_is_silent(storage: PostgresStorage) -> None:
    """Without a renewal that succeeded, the holder itself stops believing after the lease's time;
    a commit renews as well, from the moment when it began.
    """
    storage.config = replace(SHORT_LEASE, renew_interval=3_600.0)
    session = await Session(storage.backend()).open()
    taken = session.backend.lease_until()
    assert taken <= time.monotonic() + SHORT_LEASE.lease_duration
    began = time.monotonic()
    await session.put(b"a")
    renewed = session.backend.lease_until()
    assert began + SHORT_LEASE.lease_duration <= renewed
    assert renewed <= time.monotonic() + SHORT_LEASE.lease_duration
    await asyncio.sleep(SHORT_LEASE.lease_duration)
    assert session.backend.lease_until() == renewed < time.monotonic()
    await session.put(b"b")
    assert time.monotonic() < session.backend.lease_until()
    await session.close()


async def test_of_two_that_wait_one_takes_it(storage: PostgresStorage) -> None:
    """Two servers that find the shard free at the same moment: one gets it, one is refused."""
    first = await Session(storage.backend()).open()
    await first.close()
    backends = [storage.backend() for _ in range(4)]
    opened = await asyncio.gather(*(each.open() for each in backends), return_exceptions=True)
    taken = [each for each in opened if not isinstance(each, BaseException)]
    assert 1 == len(taken)
    assert all(isinstance(each, BackendError) for each in opened if each not in taken)
    assert 2 == taken[0].epoch
    for backend in backends:
        await backend.close()


async def test_a_commit_is_seen_as_a_renewal(storage: PostgresStorage) -> None:
    """A holder that commits without ever being idle is seen to be there, also by commits that move
    no revision.
    """
    storage.config = replace(SHORT_LEASE, renew_interval=1.0)
    first = await Session(storage.backend()).open()
    looking = asyncio.create_task(storage.backend().open())
    while not looking.done():
        assert COMMITTED == await first.commit(first.batch())
    with pytest.raises(BackendError, match="another server holds the shard"):
        await looking
    await first.close()
