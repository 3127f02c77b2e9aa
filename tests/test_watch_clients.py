"""Clients that do not read, that ask for progress, that come and go."""

import gc

import pytest

from kvstore.config import WatchConfig
from kvstore.errors import TooManyRequestsError
from kvstore.watch import Watch
from kvstore.watch_feed import Feed
from kvstore.watch_groups import Group, State, Watcher
from kvstore.watch_message import PREVIOUS
from tests.watch_world import World, world_of


class TestSlowClients:
    """Clients that do not read."""

    def test_only_the_slow_one_waits(self) -> None:
        """Nothing is buffered for a client beyond its outbox; others are not held up."""
        world = World(config=WatchConfig(outbox_bytes_max=1_000))
        slow, quick = world.client(), world.client()
        slow.create(b"a", wants=PREVIOUS)
        quick.create(b"a", wants=PREVIOUS)
        slow.reading = False
        for _ in range(100):
            world.put(b"a", bytes(100))
            world.settle()
        assert slow.outbox_bytes < 1_500
        assert len(quick.seen[0].events) == 100
        assert world.hub.unsynced == 1
        slow.read()
        world.settle()
        world.check_complete()
        assert world.hub.unsynced == 0

    def test_cancelled_while_it_does_not_read(self) -> None:
        """A watcher of a blocked stream can be cancelled; the others go on when it reads."""
        world = World(config=WatchConfig(outbox_bytes_max=100))
        client = world.client()
        client.create(b"a")
        client.create(b"a")
        client.reading = False
        for _ in range(5):
            world.put(b"a")
            world.settle()
        assert world.hub.count[State.BLOCKED] == 2
        client.cancel(0)
        client.read()
        world.settle()
        assert [len(seen.events) for seen in client.seen][1] == 5

    def test_woken_without_being_told(self) -> None:
        """A stream whose transport forgot to say that it is writable is looked at in every tick."""
        world = World(config=WatchConfig(outbox_bytes_max=100))
        client = world.client()
        client.create(b"a")
        client.reading = False
        for _ in range(5):
            world.put(b"a", bytes(100))
            world.settle()
        client.reading, client.outbox_bytes = True, 0
        world.hub.tick()
        world.settle()
        world.check_complete()

    def test_answers_that_nobody_reads(self) -> None:
        """A client that asks on and on without reading is refused before its outbox overflows."""
        world = World(config=WatchConfig(outbox_bytes_max=100, control_bytes_max=200))
        client = world.client()
        client.reading = False

        def ask_on() -> None:
            for _ in range(100):
                client.create(b"b", b"a")

        with pytest.raises(TooManyRequestsError):
            ask_on()
        assert len(client.messages) > 2
        assert client.outbox_bytes < 500

    @pytest.mark.parametrize("other_waits", [False, True])
    def test_watches_that_nobody_reads(self, *, other_waits: bool) -> None:
        """Valid requests are refused before anything is begun for them: the stream's end leaves
        nothing, whether or not another client waits for a revision to come.
        """
        world = World(config=WatchConfig(outbox_bytes_max=100, control_bytes_max=200))
        if other_waits:
            world.client().create(b"z", None, 1_000)
        client = world.client()
        client.reading = False

        def watch_on() -> None:
            for n in range(100):
                client.create(b"%d" % n, notify=True)

        with pytest.raises(TooManyRequestsError):
            watch_on()
        assert world.hub.watchers == len(client.open) + other_waits
        client.stream.close()
        assert world.hub.watchers == other_waits
        assert len(world.hub._feeds) == other_waits
        assert client.stream not in world.hub.streams

    def test_refused_as_the_first(self) -> None:
        """The feed that a refused watch would have been the first of is not left behind."""
        world = World(config=WatchConfig(outbox_bytes_max=0, control_bytes_max=0))
        client = world.client()
        client.reading = False
        client.outbox_bytes = 1
        with pytest.raises(TooManyRequestsError):
            client.stream.create(Watch(b"a", None))
        assert not world.hub._feeds
        client.stream.close()
        assert world.hub.count == [0] * len(State)

    def test_progress_is_not_piled_up(self) -> None:
        """Requests for progress are dropped, not queued, while the client does not read."""
        world = World(config=WatchConfig(outbox_bytes_max=100))
        client = world.client()
        client.create(b"a", notify=True)
        client.reading = False
        for _ in range(50):
            client.stream.request_progress()
            world.clock.advance(1000)
            world.hub.tick()
        assert client.outbox_bytes < 200


class TestProgress:
    """Notifications without events."""

    def test_on_request(self) -> None:
        """All watchers synced: one response with id -1 at what is durable. Without any: nothing."""
        world = world_of(b"a")
        client = world.client()
        client.stream.request_progress()
        assert not client.messages
        client.create(b"a")
        client.create(b"b", b"z")
        world.put(b"x")
        client.stream.request_progress()
        assert (client.last.watch_id, client.last.header.revision) == (-1, 2)
        world.settle()
        client.stream.request_progress()
        assert (client.last.watch_id, client.last.header.revision) == (-1, 3)

    def test_not_while_one_catches_up(self) -> None:
        """A watcher that reads the history withholds the stream's progress."""
        world = world_of(b"a")
        client = world.client()
        client.create(b"b")
        client.create(b"a", start=1)
        before = len(client.messages)
        client.stream.request_progress()
        assert len(client.messages) == before
        world.settle()
        client.stream.request_progress()
        assert client.last.watch_id == -1

    def test_periodic(self) -> None:
        """Those that asked are told after an interval of silence, give or take a tenth."""
        world = World(config=WatchConfig(progress_interval=100))
        client = world.client()
        client.create(b"a", notify=True)
        client.create(b"b")
        client.create(b"c", notify=True)
        world.clock.advance(89)
        world.hub.tick()
        assert len(client.messages) == 3
        world.put(b"c")
        world.settle()
        del client.messages[:]
        world.clock.advance(22)
        world.hub.tick()
        assert [message.watch_id for message in client.messages] == [0]
        world.clock.advance(111)
        world.hub.tick()
        assert [message.watch_id for message in client.messages] == [0, 0, 2]

    def test_jitter(self) -> None:
        """Streams opened together are not notified together."""
        world = World(config=WatchConfig(progress_interval=100))
        for _ in range(50):
            world.client().create(b"a", notify=True)
        notified: list[int] = []
        for _ in range(22):
            world.clock.advance(1 if notified else 89)
            before = sum(len(client.messages) for client in world.clients)
            world.hub.tick()
            notified.append(sum(len(client.messages) for client in world.clients) - before)
        assert sum(notified) == 50
        assert max(notified) < 15


def _kept() -> list[object]:
    """Everything of watchers that is in memory."""
    return [each for each in gc.get_objects() if isinstance(each, Watcher | Group | Feed)]


class TestLeaks:
    """What is left of watchers that are over."""

    def test_nothing_is_left(self) -> None:
        """Ten thousand watchers of all kinds, cancelled or closed, leave nothing."""
        others = _kept()  # of other tests, which stay for as long as this list does
        world = world_of(b"a", b"b")
        client, other = world.client(), world.client()
        for n in range(10_000):
            stream = (client, other)[n % 2].stream
            shape = [(b"%05d" % n, None), (b"%05d" % n, b"x"), (b"%05d" % n, b"\0")][n % 3]
            start = (0, 1, 1 << 60, 3)[n % 4]
            (client, other)[n % 2]._asked.append(Watch(*shape))
            stream.create(Watch(*shape, start_revision=start, progress_notify=n % 5 == 0))
        assert world.hub.watchers == 10_000
        for watch_id in list(client.open):
            client.stream.cancel(watch_id)
        other.stream.close()
        world.turns.run_all()
        assert world.hub.count == [0] * len(State)
        assert not world.hub._feeds
        assert not any(world.hub._of_shard.values())
        assert list(world.hub.streams) == [client.stream]
        gc.collect()
        assert len(_kept()) == len(others)
        world.put(b"a")
        world.settle()
        assert world.hub.pending == 0
