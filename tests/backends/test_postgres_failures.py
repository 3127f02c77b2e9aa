"""What becomes of commits, reads and the shard when a session, the server or an answer is lost."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from backends.postgres import PostgresBackend
from backends.postgres_session import LostError
from kvstore.backend import Batch, CommitResult, Outcome
from kvstore.backend import Cluster as ClusterIds
from kvstore.errors import BackendError, UnreachableError
from tests.backends.postgres_held import Held, holding
from tests.backends.postgres_storage import QUICK, PostgresStorage, eventually
from tests.backends.storage import Session, put

pytestmark = pytest.mark.postgres
COMMITTED = CommitResult(Outcome.COMMITTED)


CALM = replace(QUICK, renew_interval=60.0)
"""Nothing comes in between."""


@pytest.fixture
async def held(postgres_storage: PostgresStorage) -> AsyncIterator[Held]:
    """An open store with one row, that renews nothing by itself."""
    postgres_storage.config = CALM
    async with holding(postgres_storage) as opened:
        await opened.session.put(b"first")
        yield opened


KINDS: list[Callable[[Held], Batch]] = [
    Held.plain,
    Held.several,
    Held.many,
    Held.without_revision,
]
each_kind = pytest.mark.parametrize("make", KINDS, ids=lambda kind: kind.__name__)


async def contents(held: Held) -> tuple[list[object], list[object]]:
    """Rows and leases as they are stored."""
    return list(await held.session.rows()), list(await held.session.leases())


# -- lost sessions ---------------------------------------------------------------------------------


async def test_an_idle_session_that_is_lost_is_replaced(held: Held) -> None:
    """The shard is taken anew by itself, with a higher epoch; commits and reads go on, and nobody
    is told of trouble that is over.
    """
    before = held.connection
    await held.session.values((2, 0))
    await held.storage.kill(writes=False)
    await held.storage.kill(writes=True)
    await eventually(lambda: before.lost and held.backend._writer.connected)
    assert held.connection is not before
    (row,) = await held.storage.sql("SELECT epoch FROM fence")
    assert held.session.fence.epoch + 1 == row["epoch"]
    await held.session.put(b"b")
    assert [b"v", b"v"] == await held.session.values((2, 0), (3, 0))
    assert held.told in ([], ["out", "back"])


@each_kind
async def test_a_commit_that_is_cut_off_before_it_is_stored(
    held: Held, make: Callable[[Held], Batch]
) -> None:
    """A commit whose session is ended while it waits is of unknown outcome, turns out not to have
    happened, and is stored once when it is tried again.
    """
    batch = make(held)
    blocker = await held.storage.connect()
    await blocker.execute("BEGIN")
    await blocker.execute("SELECT * FROM fence FOR UPDATE")
    outcomes = asyncio.create_task(held.settle(batch))
    await eventually(lambda: bool(held.backend._jobs))
    await waiting_for_a_lock(held.storage, 1)
    await held.storage.kill(writes=True)
    await waiting_for_a_lock(held.storage, 1)  # the new session, which raises the epoch
    await blocker.execute("ROLLBACK")
    await blocker.close()
    assert [Outcome.UNKNOWN, Outcome.NOT_COMMITTED, Outcome.COMMITTED] == await outcomes
    rows, leases = await contents(held)
    assert [put(2, 0, b"first"), *batch.rows] == rows
    assert list(batch.lease_puts.values()) == leases


async def waiting_for_a_lock(storage: PostgresStorage, count: int) -> None:
    """Wait until as many of our sessions wait for a lock."""
    async with asyncio.timeout(20):
        while True:
            (row,) = await storage.sql(
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                f" AND application_name = 'kvstore writer {storage.schema}'"
            )
            if row[0] == count:
                return
            await asyncio.sleep(0.01)


class Answers:
    """Makes the last statement of a commit end otherwise than it did."""

    def __init__(self, held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
        self.connection = held.connection
        self._patch = monkeypatch

    def lose(self, *, stored: bool) -> None:
        """Lose the connection with the answer, or with the question."""
        connection, run, command = self.connection, self.connection.run, self.connection.command

        async def lost_run(text: str, *given: object) -> object:
            last = "tip=" in text and not connection.in_transaction
            if not last:
                return await run(text, *given)
            if stored:
                await run(text, *given)
            connection.terminate()
            raise LostError("cut")

        async def lost_command(text: str) -> str:
            if text != "COMMIT":
                return await command(text)
            if stored:
                await command(text)
            connection.terminate()
            raise LostError("cut")

        self._patch.setattr(connection, "run", lost_run)
        self._patch.setattr(connection, "command", lost_command)


@each_kind
@pytest.mark.parametrize("stored", [True, False])
async def test_an_answer_that_is_lost(
    held: Held,
    make: Callable[[Held], Batch],
    stored: bool,  # noqa: FBT001 - pytest hands it over
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether a commit happened whose answer was lost is found out, also where the tip does not
    tell; it is there once, and the next one stands on it.
    """
    batch = make(held)
    Answers(held, monkeypatch).lose(stored=stored)
    outcomes = await held.settle(batch)
    assert Outcome.UNKNOWN is outcomes[0]
    assert ([Outcome.COMMITTED] if stored else [Outcome.NOT_COMMITTED, Outcome.COMMITTED]) == (
        outcomes[1:]
    )
    await held.session.put(b"next")
    rows, leases = await contents(held)
    assert [put(2, 0, b"first"), *batch.rows, put(batch.tip + 1, 0, b"next")] == rows
    assert list(batch.lease_puts.values()) == leases


async def test_a_statement_that_arrives_late_changes_nothing(held: Held) -> None:
    """A statement of a session that was given up, run after the shard was taken anew, is refused by
    the epoch, though its tip is right.
    """
    from backends.postgres_statements import steps  # noqa: PLC0415

    batch = held.plain(b"late")
    ((text, given),) = steps(batch, epoch=held.session.fence.epoch, writes=1_000_000)
    await held.storage.kill(writes=True)
    await eventually(lambda: held.backend._writer._epoch > held.session.fence.epoch)
    foreign = await held.storage.connect()
    late = await foreign.prepare(text)
    await late.fetch(*given)
    assert "INSERT 0 0" == late.get_statusmsg()
    await foreign.close()
    assert [Outcome.COMMITTED] == await held.settle(held.plain(b"b"))


# -- answers that are no success -------------------------------------------------------------------


async def warn_on_insert(storage: PostgresStorage, level: str) -> None:
    """From now on inserting a revision says something at this level."""
    await storage.sql(
        "CREATE FUNCTION speak() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN RAISE {level} 'not replicated'; RETURN NULL; END $$"
    )
    await storage.sql(
        "CREATE TRIGGER speaking AFTER INSERT ON revisions"
        " FOR EACH STATEMENT EXECUTE FUNCTION speak()"
    )


@pytest.mark.parametrize("make", KINDS[:3], ids=lambda kind: kind.__name__)
async def test_a_commit_with_a_warning_is_in_doubt(
    held: Held, make: Callable[[Held], Batch]
) -> None:
    """A WARNING says that the commit may not be on the standby: it is not acknowledged before the
    shard has been taken anew without one, which is stored behind it.
    """
    await warn_on_insert(held.storage, "WARNING")
    batch = make(held)
    result = await held.session.commit(batch)
    assert Outcome.UNKNOWN is result.outcome
    assert "not replicated" in result.reason
    assert COMMITTED == await held.session.resolve(batch)
    assert [put(2, 0, b"first"), *batch.rows] == await held.session.rows()


async def test_a_notice_is_no_warning(held: Held) -> None:
    """What is said below a WARNING does not matter."""
    await warn_on_insert(held.storage, "NOTICE")
    assert COMMITTED == await held.session.commit(held.plain())


async def test_a_commit_answered_rollback_is_in_doubt(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A COMMIT that the server answers with the tag ROLLBACK is no success, though nobody raised
    an error.
    """
    command = held.connection.command

    async def misled(text: str) -> str:
        return await command("ROLLBACK" if text == "COMMIT" else text)

    monkeypatch.setattr(held.connection, "command", misled)
    batch = held.several()
    result = await held.session.commit(batch)
    assert (Outcome.UNKNOWN, "COMMIT was answered ROLLBACK") == result
    assert Outcome.NOT_COMMITTED is (await held.session.resolve(batch)).outcome
    assert [Outcome.COMMITTED] == await held.settle(batch)


@pytest.mark.parametrize("make", KINDS[:3], ids=lambda kind: kind.__name__)
async def test_a_refused_commit_stores_nothing(held: Held, make: Callable[[Held], Batch]) -> None:
    """A commit that fails for certain leaves nothing behind, not even a moved tip, and the same
    revisions may be stored later.
    """
    await warn_on_insert(held.storage, "EXCEPTION")
    batch = make(held)
    result = await held.session.commit(batch)
    assert Outcome.NOT_COMMITTED is result.outcome
    assert "not replicated" in result.reason
    await held.storage.sql("DROP TRIGGER speaking ON revisions")
    assert COMMITTED == await held.session.commit(batch)
    assert [] == held.told


@pytest.mark.parametrize("make", KINDS[:3], ids=lambda kind: kind.__name__)
async def test_a_revision_that_is_there_already_breaks_the_shard(
    held: Held, make: Callable[[Held], Batch]
) -> None:
    """Somebody has stored rows without moving the fence row: nothing can be trusted."""
    await held.storage.sql("INSERT INTO revisions VALUES (3, 0, 'x', 3, 1, 0, 'foreign')")
    result = await held.session.commit(make(held))
    assert Outcome.BROKEN is result.outcome
    assert "UniqueViolation" in result.reason
    await eventually(lambda: bool(held.told))
    assert held.told[0].startswith("broken: broken: ")
    assert Outcome.BROKEN is (await held.session.commit(held.plain())).outcome


# -- somebody else, and lost data ------------------------------------------------------------------


@pytest.mark.parametrize("home", [True, False])
async def test_an_idle_holder_notices_that_it_was_replaced(
    postgres_storage: PostgresStorage,
    home: bool,  # noqa: FBT001 - pytest hands it over
) -> None:
    """Without a commit, too: whoever serves the shard's memory must stop."""
    held = Held(postgres_storage)
    await held.session.open(None if home else ClusterIds(3, 4))
    await postgres_storage.sql("UPDATE fence SET epoch = epoch + 1, holder = holder + 1")
    await eventually(lambda: bool(held.told))
    assert held.told[0].startswith("broken: fenced: ")
    assert Outcome.FENCED is (await held.session.commit(held.plain())).outcome
    await held.session.close()


async def test_a_replaced_holder_does_not_come_back(held: Held) -> None:
    """A session that is lost while somebody else takes the shard is not followed by another."""
    await held.storage.sql("UPDATE fence SET epoch = epoch + 1, holder = holder + 1")
    await held.storage.kill(writes=True)
    await eventually(lambda: bool(held.told))
    assert held.told[0].startswith("broken: fenced: ")
    assert Outcome.FENCED is (await held.session.resolve(held.plain())).outcome
    (row,) = await held.storage.sql("SELECT epoch FROM fence")
    assert held.session.fence.epoch + 1 == row["epoch"]


LOSSES = {
    "a revision": "UPDATE fence SET tip = tip - 1",
    "all that followed": "UPDATE fence SET tip = tip - 1, writes = writes - 2",
    "a commit without revision": "UPDATE fence SET writes = writes - 2",
}


@pytest.mark.parametrize("loss", LOSSES)
async def test_acknowledged_writes_that_are_gone_break_the_shard(
    postgres_storage: PostgresStorage, loss: str
) -> None:
    """A database that lacks what was acknowledged is not served, nor by the next start, though its
    system and timeline are those of before, as an older copy of its files has them.
    """
    postgres_storage.config = CALM
    async with holding(postgres_storage) as held:
        await held.session.put(b"a")
        await held.session.put(b"b")
        assert COMMITTED == await held.session.commit(held.without_revision())
        origin = held.backend.origin
        await postgres_storage.sql(LOSSES[loss])
        await postgres_storage.kill(writes=True)
        await eventually(lambda: bool(held.told))
        assert held.told[0].startswith("broken: broken: ")
        assert "acknowledged writes are lost" in held.told[0]
        assert "--accept-data-loss" in held.told[0]
        (row,) = await postgres_storage.sql("SELECT epoch, tip, origin FROM fence")
        assert held.session.fence.epoch == row["epoch"]
        assert row["origin"].startswith(f"{origin} lacks ")
        assert Outcome.BROKEN is (await held.session.commit(held.plain())).outcome
    with pytest.raises(BackendError, match=f"revision 3 was stored, .* ends at {row['tip']}"):
        await postgres_storage.backend().open()
    postgres_storage.config = replace(CALM, accept_data_loss=True)
    session = await Session(postgres_storage.backend()).open()
    assert origin == session.fence.origin
    await session.close()
    postgres_storage.config = CALM
    late = "UPDATE fence SET origin = origin || ' lacks 1'"  # by a server that was replaced
    await postgres_storage.sql(late)
    await (await Session(postgres_storage.backend()).open()).close()


async def test_an_older_state_is_noticed_by_the_next_commit(
    postgres_storage: PostgresStorage,
) -> None:
    """An older dump put back while the connection lives is no other server: the shard is broken,
    and the next start refuses it.
    """
    postgres_storage.config = CALM
    async with holding(postgres_storage) as held:
        await held.session.put(b"a")
        await held.session.put(b"b")
        await postgres_storage.sql("DELETE FROM revisions WHERE revision = 3")
        await postgres_storage.sql("UPDATE fence SET tip = 2, writes = writes - 1")
        result = await held.session.commit(held.plain())
        assert Outcome.BROKEN is result.outcome
        assert "revision 3 was stored, and the database" in result.reason
    with pytest.raises(BackendError, match=r"revision 3 was stored, .* ends at 2"):
        await postgres_storage.backend().open()


async def test_another_timeline_is_served_only_if_accepted(
    postgres_storage: PostgresStorage,
) -> None:
    """A start finds another origin than the row tells: refused, with both and what to do, unless
    the loss is accepted; from then on it is the origin.
    """
    session = await Session(postgres_storage.backend()).open()
    origin = session.fence.origin
    await session.close()
    system = origin.partition("/")[0]
    await postgres_storage.sql(f"UPDATE fence SET origin = '{system}/77'")
    with pytest.raises(BackendError, match=f"were {system}/77 and are {origin}"):
        await postgres_storage.backend().open()
    accepting = PostgresStorage(
        postgres_storage.cluster, postgres_storage.schema, replace(QUICK, accept_data_loss=True)
    )
    session = await Session(accepting.backend()).open()
    assert origin == session.fence.origin
    await session.close()
    session = await Session(postgres_storage.backend()).open()
    await session.close()


async def test_another_database_is_not_taken(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever answers in place of our database is not written to."""

    async def other(_: object) -> str:
        return "1234/1"

    monkeypatch.setattr("backends.postgres_writer.find_origin", other)
    await held.storage.kill(writes=True)
    await eventually(lambda: bool(held.told))
    assert held.told[0].startswith("broken: broken: ")
    assert "another database answers: 1234/1" in held.told[0]


async def test_a_standby_that_took_over_with_everything_is_served(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another timeline that lacks nothing is the database from now on: its origin is stored, and
    reads go to it.
    """
    system = held.backend.origin.partition("/")[0]
    await held.session.values((2, 0))

    async def promoted(_: object) -> str:
        return f"{system}/2"

    monkeypatch.setattr("backends.postgres_writer.find_origin", promoted)
    monkeypatch.setattr("backends.postgres.find_origin", promoted)
    await held.storage.kill(writes=True)
    await eventually(lambda: held.backend.origin == f"{system}/2")
    await held.session.put(b"b")
    assert [b"v"] == await held.session.values((3, 0))
    (row,) = await held.storage.sql("SELECT origin FROM fence")
    assert f"{system}/2" == row["origin"]
    assert [] == held.told


async def test_reads_are_not_taken_from_another_copy(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reading connection that leads to another copy than the writer's is no use, but nothing is
    wrong with the data.
    """

    async def old(_: object) -> str:
        return "1234/1"

    monkeypatch.setattr("backends.postgres.find_origin", old)
    with pytest.raises(UnreachableError, match="another copy"):
        await held.session.values((2, 0))


async def test_a_corrupt_read_is_a_failure_of_storage(held: Held) -> None:
    """What another attempt cannot help is told as such."""
    await held.storage.sql("ALTER TABLE revisions RENAME TO elsewhere")
    with pytest.raises(BackendError, match="UndefinedTable") as raised:
        await held.session.values((2, 0))
    assert not isinstance(raised.value, UnreachableError)


async def test_a_backend_is_opened_again(postgres_storage: PostgresStorage) -> None:
    """After a close, the same backend takes the shard anew and goes on from what is stored."""
    session = Session(postgres_storage.backend())
    for turn in range(3):
        await session.open()
        assert turn + 1 == session.fence.epoch == session.tip
        await session.put(b"%d" % turn)
        await session.close()
    backend = session.backend
    assert isinstance(backend, PostgresBackend)
    results: list[CommitResult] = []
    backend.commit(session.batch(), results.append)
    assert [] == results
    await eventually(lambda: bool(results))
    assert Outcome.NOT_COMMITTED is results[0].outcome
