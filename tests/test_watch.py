"""What clients see of watches, case by case; texts and shapes are etcd 3.6's."""

import gc
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import pytest

from kvstore.config import WatchConfig
from kvstore.errors import BackendError, TooManyRequestsError
from kvstore.pb import rpc_pb2 as pb
from kvstore.txn import Put
from kvstore.watch import DUPLICATE_ID, EMPTY_RANGE, Watch
from kvstore.watch_feed import Feed
from kvstore.watch_groups import Group, State, Watcher
from kvstore.watch_message import FRAGMENTS, NO_DELETE, NO_PUT, PREVIOUS
from tests.watch_world import Client, World

COMPACTED = "etcdserver: mvcc: required revision has been compacted"
TOO_MANY = "etcdserver: too many requests"


def world_of(*keys: bytes, config: WatchConfig | None = None) -> World:
    """A world with revisions 2, 3, ... that put ``keys``."""
    world = World(config=config)
    for key in keys:
        world.put(key)
    world.settle()
    return world


class TestCreate:
    """Answers to create requests."""

    def test_ids(self) -> None:
        """Ids count from 0 and jump over those in use; an explicit id is taken as it is."""
        client = World().client()
        for watch_id in (0, 0, 7, 3, 0, 0, 0, -9):
            client.create(b"a", watch_id=watch_id)
        assert list(client.open) == [0, 1, 7, 3, 2, 4, 5, -9]

    @pytest.mark.parametrize(
        ("watch", "reason"),
        [
            (Watch(b"a", None, -5), COMPACTED),
            (Watch(b"b", b"a", -5), COMPACTED),
            (Watch(b"b", b"a"), EMPTY_RANGE),
            (Watch(b"b", b"b", watch_id=1), EMPTY_RANGE),
            (Watch(b"b", None, watch_id=1), DUPLICATE_ID),
        ],
    )
    def test_refusals(self, watch: Watch, reason: str) -> None:
        """A watch that cannot be is created and cancelled in one response, with id -1."""
        world = world_of(b"a")
        client = world.client()
        client.create(b"x", watch_id=1)
        client.create(watch.key, watch.end, watch.start_revision, watch_id=watch.watch_id)
        head = pb.ResponseHeader(cluster_id=1 << 63, member_id=7, revision=2, raft_term=3)
        assert client.last == pb.WatchResponse(
            header=head, watch_id=-1, created=True, canceled=True, cancel_reason=reason
        )

    def test_too_many(self) -> None:
        """Above the limit of a stream, or of the server, a watch is refused; the others go on."""
        config = WatchConfig(watchers_per_stream_max=2, watchers_max=3)
        world = world_of(config=config)
        first, second = world.client(), world.client()
        assert first.create(b"a")
        assert first.create(b"b")
        assert first.create(b"c") is None
        assert first.last.cancel_reason == TOO_MANY
        assert second.create(b"d")
        assert second.create(b"e") is None
        first.cancel(0)
        assert second.create(b"e")

    def test_from_now_does_not_wait(self) -> None:
        """The created response shows the durable revision, and the next event is the one after."""
        world = world_of(b"a")
        world.put(b"a")
        client = world.client()
        seen = client.create(b"a")
        assert client.last.header.revision == 2
        world.settle()
        assert seen
        assert [event.kv.mod_revision for event in seen.events] == [3]

    def test_from_the_future(self) -> None:
        """Nothing is heard of events before the start, nor of progress before it is reached."""
        world = world_of(b"a")
        client = world.client()
        seen = client.create(b"a", start=5, notify=True)
        assert seen
        for _ in range(4):
            world.put(b"a")
            world.settle()
            client.stream.request_progress()
            world.clock.advance(1000)
            world.hub.tick()
            assert bool(seen.progress) == (world.store.revision >= 5)
        assert [event.kv.mod_revision for event in seen.events] == [5, 6]

    def test_waiting_for_the_same_revision(self) -> None:
        """All who wait for a revision go on when it comes."""
        world = World()
        client = world.client()
        for start in (3, 2, 3, 2, 4):
            client.create(b"a", start=start)
        for _ in range(4):
            world.put(b"a")
            world.settle()
        assert [len(seen.events) for seen in client.seen] == [3, 4, 3, 4, 2]

    def test_whole_range(self) -> None:
        """The range from the smallest key without an end has every key."""
        world = World()
        seen = world.client().create(b"\0", b"\0")
        for key in (b"\0", b"a", b"\xff\xff"):
            world.put(key)
        world.settle()
        assert seen
        assert len(seen.events) == 3


class TestCompaction:
    """Watchers and the compact revision."""

    def test_start_below(self) -> None:
        """Created, then cancelled with the compact revision; no reason, no revision in the head."""
        world = world_of(b"a", b"a", b"a")
        world.compact(4)
        world.settle()
        client = world.client()
        client.create(b"a", start=3)
        world.settle()
        assert [message.created for message in client.messages] == [True, False]
        head = pb.ResponseHeader(cluster_id=1 << 63, member_id=7, raft_term=3)
        assert client.last == pb.WatchResponse(header=head, canceled=True, compact_revision=4)

    def test_id_stays_until_cancelled(self) -> None:
        """A compacted watcher keeps its id and withholds progress until it is cancelled (etcd)."""
        world = world_of(b"a", b"a", b"a")
        world.compact(4)
        world.settle()
        client = world.client()
        client.create(b"a", start=2)
        client.create(b"a")
        world.settle()
        assert list(client.open) == [0, 1]
        before = len(client.messages)
        client.stream.request_progress()
        assert len(client.messages) == before
        client.cancel(0)
        assert client.last.canceled
        client.stream.request_progress()
        assert client.last.watch_id == -1
        assert world.hub.watchers == 1

    def test_start_at(self) -> None:
        """The compact revision itself is delivered, a tombstone too, without its previous value."""
        world = world_of(b"a", b"b")
        world.delete(b"a")
        world.put(b"b")
        world.settle()
        world.compact(4)
        world.settle()
        seen = world.client().create(b"a", b"z", start=4, wants=PREVIOUS)
        world.settle()
        assert seen
        assert [event.HasField("prev_kv") for event in seen.events] == [False, True]

    def test_start_at_before_trimming(self) -> None:
        """The previous value of an event at the compact revision is gone at once, as in etcd."""
        world = world_of(b"a", b"a", b"a")
        world.compact(3)
        while world.store.compact_revision < 3:
            world.turns.run_next()
            world.disks[0].run_next()
        seen = world.client().create(b"a", start=3, wants=PREVIOUS)
        assert world.store.version_before(b"a", 3), "still there"
        world.hub.catch_up._turn()
        assert seen
        assert [event.HasField("prev_kv") for event in seen.events] == [False, True]

    def test_synced_and_future_stay(self) -> None:
        """Compaction does not end watchers that need nothing below it."""
        world = world_of(b"a", b"a", b"a")
        client = world.client()
        client.create(b"a")
        client.create(b"a", start=9)
        world.compact(4)
        world.settle()
        for _ in range(5):
            world.put(b"a")
        world.settle()
        assert [len(seen.events) for seen in client.seen] == [5, 1]

    def test_overtaken_client(self) -> None:
        """A client that does not read is told at once, and keeps the watcher that is not behind."""
        world = world_of(b"a", config=WatchConfig(outbox_bytes_max=100))
        client = world.client()
        client.create(b"a")
        client.create(b"b")
        client.reading = False
        for _ in range(5):
            world.put(b"a")
            world.settle()
        world.compact(world.store.revision)
        world.settle()
        assert client.last.compact_revision == world.store.revision
        client.read()
        world.put(b"b")
        world.settle()
        assert [seen.cancelled for seen in client.seen] == [True, False]
        world.check_complete()

    def test_overtaken_while_reading_storage(self) -> None:
        """A compaction that takes effect while values are fetched ends the watcher."""
        world = world_of(b"a", b"a", b"a", b"a")
        world.forget_values()
        client = world.client()
        client.create(b"a", start=2)
        world.turns.run_all()
        assert world.hub.count[State.FETCHING] == 1
        world.compact(4)
        world.settle()
        assert client.last.compact_revision == 4


class TestEvents:
    """What is delivered, and how it is grouped."""

    def test_filters(self) -> None:
        """Filtered events are dropped, and a response without events is not sent."""
        world = World()
        client = world.client()
        for wants in (NO_PUT, NO_DELETE, NO_PUT | NO_DELETE):
            client.create(b"a", wants=wants)
        world.put(b"a")
        world.delete(b"a")
        world.settle()
        assert [[e.type for e in seen.events] for seen in client.seen] == [[1], [0], []]

    def test_encoded_once(self) -> None:
        """Watchers that want the same share the bytes of an event."""
        world = World()
        sent: list[bytes] = []

        class Keep:
            outbox_bytes = 0

            def send(self, parts: Sequence[bytes], size: int, /) -> None:
                sent.append(parts[2])

        for _ in range(3):
            world.hub.open(Keep()).create(Watch(b"a", None))
        sent.clear()
        world.put(b"a")
        world.settle()
        assert len(sent) == 3
        assert len(set(map(id, sent))) == 1

    def test_many_revisions_in_one_response(self) -> None:
        """What one commit made visible comes in one response, up to its size."""
        world = World(config=WatchConfig(response_bytes=300))
        client = world.client()
        client.create(b"a")
        for _ in range(4):
            world.put(b"a", bytes(100))
        world.settle()
        assert [len(message.events) for message in client.messages[1:]] == [3, 1]
        assert [message.header.revision for message in client.messages[1:]] == [4, 5]

    def test_fragments(self) -> None:
        """One revision that is too large is split for those who asked, and for no others."""
        world = World(config=WatchConfig(fragment_bytes=300))
        client = world.client()
        client.create(b"a", b"b", wants=FRAGMENTS)
        client.create(b"a", b"b")
        world.write([Put(b"a%d" % n, bytes(100)) for n in range(6)])
        world.settle()
        pieces = [(m.watch_id, m.fragment, len(m.events)) for m in client.messages[2:]]
        assert pieces == [(0, True, 2), (0, True, 2), (0, False, 2), (1, False, 6)]

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

    @pytest.mark.parametrize("start", [0, 2])
    def test_a_large_revision_is_whole(self, start: int) -> None:
        """A revision beyond every limit comes in one response, synced or from the history."""
        world = World(
            config=WatchConfig(
                fresh_changes_max=100,
                catch_up_changes=3,
                catch_up_fetch_rows=2,
                response_bytes=10,
            )
        )
        client = world.client()
        client.create(b"a", b"b")
        world.write([Put(b"a%d" % n, b"") for n in range(9)])
        world.put(b"a", b"")
        world.settle()
        world.forget_values()
        before = world.store.holds.now()
        seen = client.create(b"a", b"b", start)
        world.settle()
        assert world.store.holds.now() - before == (2 if start else 0), "one read a revision"
        assert seen
        assert len(seen.events) == (10 if start else 0)
        assert len(client.seen[0].events) == 10

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

    def test_overflow_within_a_revision(self) -> None:
        """Changes forgotten in the middle of a revision do not split it."""
        world = World(config=WatchConfig(fresh_changes_max=2))
        seen = world.client().create(b"a", b"b")
        world.write([Put(b"a%d" % n, b"") for n in range(4)])
        world.settle()
        world.put(b"a")
        world.settle()
        assert seen
        assert len(seen.events) == 5


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


class TestShards:
    """Several shards."""

    def stuck(self) -> tuple[World, Client]:
        """Shard 1 has a commit under way that does not end."""
        world = World(routes={b"b": 1})
        client = world.client()
        client.create(b"a")
        client.create(b"b")
        client.create(b"a", b"z")
        world.put(b"b")
        world.turns.run_all()
        return world, client

    def commit_home(self, world: World) -> None:
        """What waits on shard 0, and nothing else."""
        world.turns.run_all()
        world.disks[0].run_all()
        world.turns.run_all()

    def test_others_go_on(self) -> None:
        """A stuck shard delays only watchers whose range includes it."""
        world, client = self.stuck()
        for _ in range(5):
            world.put(b"a")
            self.commit_home(world)
        assert [len(seen.events) for seen in client.seen] == [5, 0, 0]
        before = len(client.messages)
        client.stream.request_progress()
        assert len(client.messages) == before, "progress would go back"
        world.settle()
        assert [len(seen.events) for seen in client.seen] == [5, 1, 6]
        client.stream.request_progress()
        assert client.last.header.revision == 7

    @pytest.mark.parametrize("told", ["created", "event", "caught up", "periodically", "asked"])
    def test_progress_does_not_go_back(self, told: str) -> None:
        """What one watcher was told in any way bounds the progress of the whole stream."""
        world = World(routes={b"b": 1})
        world.put(b"a")
        world.settle()
        client = world.client()
        client.create(b"a" if told == "event" else b"a1", notify=True)
        if told != "asked":
            client.create(b"b")
        world.put(b"b")
        world.turns.run_all()
        world.put(b"a")
        self.commit_home(world)
        if told == "created":
            client.create(b"a1")
        elif told == "caught up":
            client.create(b"a", start=2)
        elif told == "periodically":
            world.clock.advance(1000)
            world.hub.tick()
        elif told == "asked":
            client.stream.request_progress()
            client.create(b"b", start=2)
        world.turns.run_all()
        assert client.stream.unready == 0
        assert max(feed.position for feed in client.stream.feeds) == 4
        before = len(client.messages)
        client.stream.request_progress()
        assert len(client.messages) == before
        world.settle()
        client.stream.request_progress()
        assert (client.last.watch_id, client.last.header.revision) == (-1, 4)

    def test_header_of_history(self) -> None:
        """Responses from the history do not show more than their shards' visible revision."""
        world, client = self.stuck()
        world.put(b"a")
        self.commit_home(world)
        world.settle()
        world.put(b"b")
        world.turns.run_all()
        world.put(b"a")
        self.commit_home(world)
        client.create(b"b", start=2)
        world.turns.run_all()
        assert client.last.events
        assert client.last.header.revision == 3 < world.commits.durable

    def test_from_now_behind_a_stuck_shard(self) -> None:
        """A new watcher starts above what is durable, even if its shards are not that far."""
        world, client = self.stuck()
        world.put(b"a")
        self.commit_home(world)
        seen = client.create(b"a", b"z")
        assert client.last.header.revision == 3
        world.settle()
        assert seen
        assert not seen.events
        world.put(b"b")
        world.settle()
        assert len(seen.events) == 1

    def test_waiting_changes_are_bounded(self) -> None:
        """Beyond a limit, changes that wait for a stuck shard are forgotten and read again."""
        world, client = self.stuck()
        world.hub.config = replace(world.hub.config, fresh_changes_max=10)
        for feed in world.hub._feeds.values():
            feed._config = world.hub.config
        for _ in range(100):
            world.put(b"a")
            self.commit_home(world)
            assert world.hub.pending <= 11
        world.settle()
        world.check_complete()
        assert len(client.seen[2].events) == 101


class Load(NamedTuple):
    """How a turn's work is seen: the most events sent between two turns of the loop."""

    events: int
    turns: int


class TestManyWatchers:
    """Numbers of watchers."""

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

    def test_nothing_is_left(self) -> None:
        """Ten thousand watchers of all kinds, cancelled or closed, leave nothing."""
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
        assert not any(isinstance(kept, Watcher | Group | Feed) for kept in gc.get_objects())
        world.put(b"a")
        world.settle()
        assert world.hub.pending == 0


class TestStorageTrouble:
    """Reads of storage that fail."""

    def test_tried_again(self) -> None:
        """While storage does not answer, watchers wait and none is lost; then they go on."""
        world = world_of(b"a")
        world.forget_values()
        client = world.client()
        client.create(b"a", start=2, wants=PREVIOUS)
        client.create(b"a", wants=PREVIOUS)
        backend = world.commits.queues[0].backend
        read = backend.read_values
        calls = Counter[str]()

        def fail(_ids: object, done: object) -> None:
            calls["failed"] += 1
            assert callable(done)
            done(BackendError("no answer"))

        backend.read_values = fail  # type: ignore[method-assign, assignment]
        world.put(b"a")
        for _ in range(3):
            world.settle()
            world.hub.tick()
        assert calls["failed"] >= 3
        assert [len(seen.events) for seen in client.seen] == [0, 0]
        backend.read_values = read  # type: ignore[method-assign]
        world.hub.tick()
        world.settle()
        world.check_complete()
        assert [len(seen.events) for seen in client.seen] == [2, 1]
