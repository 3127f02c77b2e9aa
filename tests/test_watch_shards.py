"""Watchers over several shards, one of which may be stuck."""

from dataclasses import replace

import pytest

from kvstore.txn import Put
from kvstore.watch_groups import State
from tests.watch_world import Client, World

_PILES = 100
"""Revisions of 100 changes."""


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
