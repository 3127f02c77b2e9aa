"""What clients see of watches, case by case; texts and shapes are etcd 3.6's."""

from collections.abc import Sequence

import pytest

from kvstore.config import WatchConfig
from kvstore.pb import rpc_pb2 as pb
from kvstore.txn import Put
from kvstore.watch import DUPLICATE_ID, EMPTY_RANGE, Watch
from kvstore.watch_groups import State
from kvstore.watch_message import FRAGMENTS, NO_DELETE, NO_PUT, PREVIOUS
from tests.watch_world import World, world_of

COMPACTED = "etcdserver: mvcc: required revision has been compacted"
TOO_MANY = "etcdserver: too many requests"


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
