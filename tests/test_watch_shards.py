"""Watchers over several shards, one of which may be stuck."""

from dataclasses import replace

import pytest

from kvstore.config import WatchConfig
from kvstore.txn import Put
from kvstore.watch_groups import State
from tests.watch_world import Client, World

_PILES = 100
"""Revisions of 100 changes."""


class TestShards:
    """Several shards."""

    def stuck(self) -> tuple[World, Client]:
        """Shard 1 has a commit under way that does not end."""
        world = World(routes={b"b": 1}, cache_bytes_max=1 << 23)
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

    def test_what_piled_up_is_sent_in_turns(self) -> None:
        """After a hold, other work gets its turn between some thousand events, and the watchers
        that come meanwhile miss nothing.
        """
        world, client = self.stuck()
        changes = 100 * _PILES
        for _ in range(_PILES):
            world.write([Put(b"a%03d" % n, b"") for n in range(100)])
            self.commit_home(world)
        watcher, late = client.seen[2], world.client()
        world.disks[1].run_all()
        most, sent = len(watcher.events), len(watcher.events)
        assert sent < changes
        while world.turns.waiting:
            late.create(b"a", b"z", world.store.revision - len(late.seen) * 50)
            client.stream.request_progress()
            world.turns.run_next()
            most, sent = max(most, len(watcher.events) - sent), len(watcher.events)
        assert sent == changes + 1
        assert most < 3_000
        world.check_complete()

    def test_a_feed_that_is_left_while_it_gives_way(self) -> None:
        """What a feed put off is nobody's when its last watcher has gone."""
        world, client = self.stuck()
        for _ in range(_PILES):
            world.write([Put(b"a%03d" % n, b"") for n in range(100)])
            self.commit_home(world)
        world.disks[1].run_all()
        before = len(client.messages)
        client.stream.close()
        world.settle()
        assert len(client.messages) == before
        assert world.hub.count == [0] * len(State)


class TestReturn:
    """A shard comes back, or late, and compaction has gone on without it."""

    def run_home(self, world: World) -> None:
        """All that shard 0 has to do."""
        for _ in range(4):
            world.turns.run_all()
            world.disks[0].run_all()

    def late(self, config: WatchConfig | None = None) -> World:
        """Revisions 2 to 5 are b, a, b, a; shard 1, which has b, is not there yet."""
        world = World(routes={b"b": 1}, config=config)
        for key in (b"b", b"a", b"b", b"a"):
            world.put(key)
            world.settle()
        return world.restart(1)

    def load(self, world: World) -> None:
        """Shard 1 is there."""
        world.join(1, world.store.load_rows(1, world.rows(1)))

    def test_how_far_watchers_are_behind(self) -> None:
        """Those of a shard that is not there are not said to be behind: it may have nothing new."""
        world = self.late()
        world.client().create(b"b")
        assert world.hub.lag == 0
        world.client().create(b"a")
        world.put(b"a")
        assert world.hub.lag == 1
        self.run_home(world)
        assert world.hub.lag == 0
        self.load(world)
        world.put(b"b")
        assert world.hub.lag == 1

    def test_stuck_while_others_are_compacted(self) -> None:
        """Watchers of the stuck shard alone miss nothing and are not ended, and it is compacted
        once they have gone on.
        """
        world = World(routes={b"b": 1})
        world.put(b"b")
        world.settle()
        world.put(b"b")
        world.turns.run_all()
        client = world.client()
        for start in (0, 2, 3):
            client.create(b"b", start=start)
        for _ in range(5):
            world.put(b"a")
            self.run_home(world)
        world.compact(7)
        self.run_home(world)
        assert world.store.compact_revision == 7
        client.create(b"b")
        world.put(b"b")
        world.settle()
        world.check_complete()
        assert [len(seen.events) for seen in client.seen] == [2, 3, 2, 1]
        world.compactor.tick()
        world.settle()
        assert set(world.backends[1].disk.rows) == {(3, 0), (9, 0)}

    def test_silent_until_it_is_there(self) -> None:
        """Watchers that touch a missing shard wait, from whenever they are; then they get all of
        it, in the order of all shards.
        """
        world = self.late()
        client = world.client()
        for end, start in ((None, 2), (None, 0), (b"z", 2), (b"z", 0)):
            client.create(b"b", end, start)
        client.create(b"a", b"z", 2)
        client.create(b"a", None, 2)
        rows = world.rows(1)
        left = world.store.load_rows(1, rows[:1])
        world.put(b"a")
        self.run_home(world)
        left += world.store.load_rows(1, rows[1:])
        self.run_home(world)
        assert [len(seen.events) for seen in client.seen] == [0, 0, 0, 0, 0, 3]
        before = len(client.messages)
        client.stream.request_progress()
        assert len(client.messages) == before
        world.join(1, left)
        world.settle()
        world.put(b"b")
        world.settle()
        world.check_complete()
        assert [len(seen.events) for seen in client.seen] == [3, 1, 3, 1, 6, 3]
        client.stream.request_progress()
        assert client.last.header.revision == 7

    def test_compacted_before_it_was_there(self) -> None:
        """Its own watchers go on from where it stood; those that touch a compacted shard as well
        are told.
        """
        world = self.late()
        client = world.client()
        client.create(b"b", None, 2)
        client.create(b"b")
        client.create(b"a", b"z", 2)
        world.put(b"a")
        self.run_home(world)
        world.compact(6)
        self.run_home(world)
        self.load(world)
        world.settle()
        assert client.seen[2].compact_revision == 6
        world.compactor.tick()
        world.put(b"b")
        world.settle()
        world.check_complete()
        assert [len(seen.events) for seen in client.seen] == [3, 1, 0]
        assert set(world.backends[1].disk.rows) == {(4, 0), (7, 0)}

    def test_late_when_compaction_reaches_it(self) -> None:
        """Who has not read what the shard had is told, even if the client does not read."""
        world = self.late(WatchConfig(outbox_bytes_max=10))
        client = world.client()
        client.reading = False
        seen = client.create(b"b", None, 2)
        assert seen is not None
        world.compact(5)
        self.run_home(world)
        self.load(world)
        world.settle()
        assert not seen.cancelled
        world.compactor.tick()
        world.settle()
        assert seen.compact_revision == 5
        assert not seen.events
