"""Storage that does not return what watchers need: it is asked again, and then given up."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
from hyperframe.frame import DataFrame

from backends.memory import MemoryBackend, MemoryDisk
from kvstore.backend import Outcome, RowId
from kvstore.errors import BackendError, ReadsFullError, StoppedError, TooManyRequestsError
from kvstore.fetch import READ_ATTEMPTS_MAX, Fetched
from kvstore.pb import rpc_pb2 as pb
from kvstore.txn import DeleteRange, Put
from kvstore.watch_message import PREVIOUS
from tests import commit_world
from tests.commit_world import STOPPED
from tests.engine import Waiter
from tests.house import QUICK, WATCH, House, living, put
from tests.transport.peer import connected, message
from tests.transport.running import eventually
from tests.watch_world import World

Done = Callable[[list[bytes | None] | BackendError], None]


NO_ANSWER = BackendError("no answer")


class Failing:
    """Answers the next ``times`` reads of a world's home shard with ``error``."""

    def __init__(self, world: World, times: int, error: BackendError = NO_ANSWER) -> None:
        backend = world.commits.queues[0].backend
        self._read = backend.read_values
        self._left = times
        self._error = error
        self.asked = 0
        backend.read_values = self.read_values  # type: ignore[method-assign]

    def read_values(self, ids: Sequence[RowId], done: Done) -> None:
        """No, or what there is."""
        self.asked += 1
        if self._left:
            self._left -= 1
            done(self._error)
        else:
            self._read(ids, done)


@pytest.fixture(params=["live", "catch-up"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """A put of "a" whose watchers need what the put before left in storage only; one of "b"."""
    world = World()
    world.put(b"a", b"old")
    world.settle()
    client = world.client()
    client.create(b"b")
    if request.param == "live":
        client.create(b"a", wants=PREVIOUS)
    world.forget_values()
    world.put(b"a", b"new")
    if request.param == "catch-up":
        world.settle()
        client.create(b"a", None, 3, wants=PREVIOUS)
    world.put(b"b")
    yield world
    if world.lost:
        with pytest.raises(StoppedError):
            world.put(b"a")


class TestMissing:
    """Rows that must be there."""

    def test_shard_is_given_up(self, world: World) -> None:
        """A value that is gone stops the shard, once, with a reason that names the row."""
        del world.backends[0].disk.rows[2, 0]
        for _ in range(3):
            world.wait()
        assert world.lost == [(0, "broken: row 0 of revision 2 is missing")]

    def test_replaced_in_its_own_revision(self) -> None:
        """A put that the same Txn deleted again must be there, too, while nothing is compacted."""
        world = World()
        both = world.write([Put(b"a", b"new"), DeleteRange(b"\0", b"\0")])
        world.settle()
        world.forget_values()
        del world.backends[0].disk.rows[both, 0]
        world.client().create(b"a", None, both)
        world.settle()
        assert world.lost == [(0, f"broken: row 0 of revision {both} is missing")]


class TestFailing:
    """Reads that fail."""

    def test_tried_again(self, world: World) -> None:
        """Until the last attempt, watchers wait; then they have everything, and nothing is lost."""
        reads = Failing(world, READ_ATTEMPTS_MAX - 1)
        world.settle()
        for _ in range(READ_ATTEMPTS_MAX - 1):
            assert len(world.clients[0].seen[1].events) == 0
            world.wait()
        world.check_complete()
        assert reads.asked == READ_ATTEMPTS_MAX
        assert not world.lost

    def test_failing_for_good(self, world: World) -> None:
        """After the last attempt the shard is given up, and asked no more."""
        reads = Failing(world, 1_000)
        for _ in range(2 * READ_ATTEMPTS_MAX):
            world.wait()
        assert world.lost == [(0, "broken: no answer")]
        assert reads.asked == READ_ATTEMPTS_MAX
        assert not world.timers

    def test_attempts_are_those_of_one_read(self) -> None:
        """Many reads that fail at the same moment are no reason to give a shard up."""
        world = World()
        client = world.client()
        names = [b"a%d" % n for n in range(2 * READ_ATTEMPTS_MAX)]
        for name in names:
            world.put(name)
        world.settle()
        world.forget_values()
        for name in names:
            client.create(name, None, 2)
        Failing(world, len(names))
        for _ in names:
            world.wait()
        world.check_complete()
        assert not world.lost


class TestFull:
    """Reads that are refused because too many wait."""

    def test_watchers_ask_again(self, world: World) -> None:
        """At every tick, for as long as it lasts; nothing is wrong with the shard."""
        reads = Failing(world, 3 * READ_ATTEMPTS_MAX, ReadsFullError("many wait"))
        for _ in range(3 * READ_ATTEMPTS_MAX + 1):
            world.wait()
        world.check_complete()
        assert reads.asked > 3 * READ_ATTEMPTS_MAX
        assert not world.lost
        assert not world.timers

    def test_requests_are_refused(self, world: World) -> None:
        """At once, with the words for it."""
        world.settle()
        world.forget_values()
        Failing(world, 1, ReadsFullError("many wait"))
        answers: list[Fetched] = []
        entry = world.store.index.head(b"a")
        assert entry
        world.store.fetch([(b"a", entry)], answers.append)
        assert isinstance(answers[0], TooManyRequestsError)


class TestGivenUp:
    """A shard that is given up while it commits."""

    def ended(self, world: commit_world.World, waiter: Waiter) -> None:
        """Whatever time passes, nothing more is asked of storage."""
        for _ in range(3):
            world.clock.advance(1)
            world.commits.tick()
            world.turns.run_all()
        assert not world.backends[0].asked
        assert len(world.backends[0].batches) == 1
        assert waiter.failure == STOPPED
        assert world.broken == [(0, "broken: a row is missing")]

    def begun(self) -> tuple[commit_world.World, Waiter]:
        """A commit is under way, and another revision waits behind it."""
        world, waiter = commit_world.World(), Waiter()
        world.append()
        world.turns.run_all()
        world.append()
        world.commits.release((0,), waiter, b"")
        return world, waiter

    @pytest.mark.parametrize("outcome", list(Outcome))
    def test_commit_under_way(self, outcome: Outcome) -> None:
        """It ends, however, and none follows; that the shard is lost is said once."""
        world, waiter = self.begun()
        world.commits.give_up(0, "a row is missing")
        world.commits.give_up(0, "another, too")
        world.backends[0].end(outcome)
        self.ended(world, waiter)

    def test_commit_to_be_tried_again(self) -> None:
        """It is not."""
        world, waiter = self.begun()
        world.backends[0].end(Outcome.NOT_COMMITTED)
        world.commits.give_up(0, "a row is missing")
        self.ended(world, waiter)


async def test_the_server_stops() -> None:
    """Exit code 1, a line that says why, and the watch's stream ends with the server's words."""
    backend = MemoryBackend(MemoryDisk(), later=asyncio.get_running_loop().call_soon)
    memory = replace(QUICK.store, cache_bytes_max=0, recent_bytes_max=0)
    config = replace(QUICK, store=memory)
    async with (
        living(House([backend], config), exit_code=1) as house,
        connected(house.port) as peer,
    ):
        for _ in range(2):
            assert (await peer.answer(put(peer, b"k"))).status == (0, "")
        backend.read_values = lambda ids, done: done([None for _ in ids])  # type: ignore[method-assign]
        watching = peer.start(WATCH)
        create = pb.WatchCreateRequest(key=b"k", start_revision=2)
        body = pb.WatchRequest(create_request=create).SerializeToString()
        peer.send(DataFrame(watching, message(body)))
        assert (await peer.answer(watching)).status == STOPPED
        await eventually(lambda: house.said("stopped"))
    (line,) = (line for line in house.log if line["level"] == "error")
    assert line["msg"] == "storage failed; shutting down"
    assert line["reason"] == "broken: row 0 of revision 2 is missing"
