"""Watchers that read the history: from storage, in shared pieces, in turn."""

from typing import NamedTuple

from kvstore.config import WatchConfig
from kvstore.watch_groups import State
from kvstore.watch_message import NO_PUT, PREVIOUS
from tests.watch_world import World, world_of


class TestStorage:
    """Values that are not in memory."""

    def test_values_only_in_storage(self) -> None:
        """A previous value that is not in memory is fetched once for all, and order is kept."""
        world = world_of(b"a", b"b")
        client = world.client()
        for _ in range(3):
            client.create(b"a", b"z", wants=PREVIOUS)
        client.create(b"a", b"z")
        world.forget_values()
        world.put(b"a")
        world.put(b"a")
        world.turns.run_all()
        before = world.store.holds.now()
        world.settle()
        assert world.store.holds.now() - before == 1
        assert [feed._previous for feed in world.hub._feeds.values()] == [{}]
        assert [len(seen.events) for seen in client.seen] == [2, 2, 2, 2]
        assert all(event.HasField("prev_kv") for event in client.seen[0].events)

    def test_memory_that_loses_one_value_while_another_is_read(self) -> None:
        """A watcher keeps what it has read until it can send, however short memory is."""
        world = world_of(b"a")
        world.forget_values()
        world.put(b"a")
        world.settle()
        client = world.client()
        seen = client.create(b"a", start=3, wants=PREVIOUS)
        for _ in range(4):
            world.turns.run_all()
            world.forget_values()
            world.disks[0].run_all()
            world.forget_values()
        assert seen
        assert len(seen.events) == 1

    def test_reads_of_storage_in_turn(self) -> None:
        """Who waits for its turn to read storage gets it, even if the one before goes away."""
        world = world_of(b"a", b"a", config=WatchConfig(catch_up_fetches_max=1))
        world.forget_values()
        client = world.client()
        for _ in range(3):
            client.create(b"a", start=2)
        world.turns.run_all()
        assert (world.hub.count[State.FETCHING], world.hub.count[State.STARVED]) == (1, 2)
        world.disks[0].run_all()
        assert world.hub.count[State.STARVED] == 1
        client.cancel(1)
        world.forget_values()
        world.settle()
        world.check_complete()
        assert len(client.seen[2].events) == 2

    def test_cancelled_while_reading_storage(self) -> None:
        """An answer of storage that comes too late changes nothing."""
        world = world_of(b"a")
        world.forget_values()
        client = world.client()
        client.create(b"a", start=2)
        world.turns.run_all()
        client.cancel(0)
        world.settle()
        assert world.hub.count == [0] * len(State)


class TestSharing:
    """Pieces of the history that are encoded once."""

    def test_slow_clients_share(self) -> None:
        """Clients that fell behind at different places get the same bytes, encoded once."""
        world = World(config=WatchConfig(catch_up_changes=50))
        for n in range(200):
            world.put(b"a", bytes([n]))
        world.settle()
        clients = [world.client() for _ in range(3)]
        for n, client in enumerate(clients):
            client.create(b"a", start=3 + 7 * n)
        world.settle()
        world.check_complete()
        shared = world.hub.catch_up._pieces._shared
        assert [place[3] for place in shared] == [32, 64, 96, 128, 160]
        world.compact(100)
        world.settle()
        assert not shared

    def test_only_like_watchers_share(self) -> None:
        """A piece is for watchers of the same range that want the same."""
        world = World()
        for n in range(100):
            world.put((b"a", b"b")[n % 2], bytes([n]))
        world.settle()
        client = world.client()
        for wants in (0, PREVIOUS, NO_PUT):
            for end in (None, b"b", b"c", b"\0"):
                client.create(b"a", end, start=16, wants=wants)
        world.settle()
        world.check_complete()

    def test_what_is_shared_is_bounded(self) -> None:
        """The oldest pieces make room, and empty ones count too."""
        world = World(config=WatchConfig(catch_up_changes=20, shared_bytes_max=3_000))
        for n in range(500):
            world.put(b"b" if n < 100 else b"a", bytes(100))
        world.settle()
        for key in (b"a", b"b"):
            world.client().create(key, start=16)
            world.settle()
        pieces = world.hub.catch_up._pieces
        assert 0 < pieces._shared_bytes <= 3_000
        assert pieces._shared_bytes == sum(size for _, size in pieces._shared.values())
        world.check_complete()


class Load(NamedTuple):
    """How a turn's work is seen: the most events sent between two turns of the loop."""

    events: int
    turns: int


class TestTurns:
    """Many watchers."""

    def run(self, world: World) -> Load:
        """Run turns until nothing waits."""
        most = turns = 0
        while world.turns.waiting:
            before = world.hub.events_sent
            world.turns.run_next()
            most = max(most, world.hub.events_sent - before)
            turns += 1
        return Load(most, turns)

    def test_resuming_together_is_done_in_turns(self) -> None:
        """Watchers that all resume in the past take bounded turns, one step each."""
        world = World()
        for n in range(200):
            world.put(b"%03d" % n)
        world.settle()
        client = world.client()
        for _ in range(300):
            client.create(b"\0", b"\0", start=2)
        assert client.messages[-1].created
        load = self.run(world)
        assert load.events <= world.config.catch_up_changes + 200
        assert load.turns >= 300 * 200 // (world.config.catch_up_changes + 200)
        assert [len(seen.events) for seen in client.seen] == [200] * 300

    def test_fairness(self) -> None:
        """A long history does not keep a short one waiting."""
        world = World(config=WatchConfig(catch_up_changes=10))
        for _ in range(300):
            world.put(b"a")
        world.put(b"b")
        world.settle()
        client = world.client()
        client.create(b"a", start=2)
        short = client.create(b"b", start=2)
        turns = 0
        while not (short and short.events):
            world.turns.run_next()
            turns += 1
        assert turns < 5
