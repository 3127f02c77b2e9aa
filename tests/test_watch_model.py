"""Watchers against the model: what clients must see, whatever happens when."""

from collections.abc import Sequence
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.config import WatchConfig
from kvstore.txn import DeleteRange, Op, Put
from kvstore.watch_groups import State
from tests.watch_world import Client, World

ROUTES = {b"b": 1, b"c": 2}
KEYS = [b"a", b"a1", b"b", b"c"]
ENDS = [None, b"\0", b"b", b"b1"]
TINY = WatchConfig(
    progress_interval=1.0,
    fresh_changes_max=6,
    response_bytes=60,
    fragment_bytes=100,
    outbox_bytes_max=150,
    control_bytes_max=10_000,
    catch_up_changes=3,
    catch_up_fetches_max=1,
    catch_up_fetch_rows=2,
)


class WatchMachine(RuleBasedStateMachine):
    """Three shards whose commits end in any order, clients that read or not, compactions."""

    routes: ClassVar[dict[bytes, int]] = ROUTES

    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    @initialize(memory=st.sampled_from([0, 1 << 20]), config=st.sampled_from([TINY, WatchConfig()]))
    def start(self, memory: int, config: WatchConfig) -> None:
        """Without memory for values, every one that is committed is read from storage."""
        self.world = World(routes=self.routes, config=config, cache_bytes_max=memory)
        self.world.client()

    def there(self, key: bytes) -> bool:
        """Is the shard of a key there?"""
        return not self.world.commits.queues[self.world.store.shards.of(key)].missing

    @rule(key=st.sampled_from(KEYS), size=st.sampled_from([0, 1, 40]))
    def put(self, key: bytes, size: int) -> None:
        """One key."""
        if self.there(key):
            self.world.put(key, b"v" * size)

    @rule(
        shard=st.sampled_from([b"a", b"b", b"c"]),
        count=st.integers(1, 4),
        size=st.sampled_from([1, 40]),
    )
    def put_many(self, shard: bytes, count: int, size: int) -> None:
        """Several keys of a shard in one revision."""
        ops: list[Op] = [Put(shard + b"%d" % n, b"v" * size) for n in range(count)]
        if self.there(shard):
            self.world.write(ops)

    @rule(key=st.sampled_from(KEYS))
    def delete(self, key: bytes) -> None:
        """One key, live or not."""
        if self.there(key):
            self.world.delete(key)

    @rule(shard=st.sampled_from([b"a", b"b", b"c"]))
    def delete_all(self, shard: bytes) -> None:
        """Everything of a shard, in one revision, and a put that comes first."""
        if self.there(shard):
            self.world.write([Put(shard + b"~", b""), DeleteRange(shard, shard + b"x")])

    @rule(shard=st.integers(0, 2))
    def commit(self, shard: int) -> None:
        """One step of a shard's storage: it stores a batch, tells of it, or answers a read."""
        self.world.turns.run_next()
        self.world.disks[shard % len(self.world.disks)].run_next()

    @rule(shard=st.integers(0, 2))
    def commit_all(self, shard: int) -> None:
        """A shard's storage does all that was asked of it."""
        self.world.turns.run_all()
        self.world.disks[shard % len(self.world.disks)].run_all()

    @rule()
    def turn(self) -> None:
        """One function that waits for a turn of the loop."""
        self.world.turns.run_next()

    @precondition(lambda self: self.world.commits.idle())
    @rule()
    def forget_values(self) -> None:
        """Memory is short: values are in storage only."""
        self.world.forget_values()

    @rule()
    def settle(self) -> None:
        """A quiet moment."""
        self.world.settle()

    @rule(
        data=st.data(),
        key=st.sampled_from(KEYS),
        end=st.sampled_from(ENDS),
        wants=st.integers(0, 15),
        notify=st.booleans(),
        back=st.integers(-3, 12),
        now=st.booleans(),
    )
    def create(
        self,
        data: st.DataObject,
        key: bytes,
        end: bytes | None,
        wants: int,
        back: int,
        *,
        notify: bool,
        now: bool,
    ) -> None:
        """A watch from now, from the past or from the future."""
        start = 0 if now else max(1, self.world.store.revision - back)
        client = data.draw(st.sampled_from(self.world.clients))
        client.create(key, end, start, wants=wants, notify=notify)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """Cancel a watch, compacted or not; or one that is not there."""
        client = data.draw(st.sampled_from(self.world.clients))
        client.cancel(data.draw(st.sampled_from([*client.open, 99])))

    @precondition(lambda self: len(self.world.clients) < 3)
    @rule()
    def connect(self) -> None:
        """One more client."""
        self.world.client()

    @precondition(lambda self: len(self.world.clients) > 1)
    @rule()
    def disconnect(self) -> None:
        """A client goes away with its watchers."""
        self.world.clients.pop().stream.close()

    @rule(data=st.data())
    def stop_reading(self, data: st.DataObject) -> None:
        """A client reads no more."""
        data.draw(st.sampled_from(self.world.clients)).reading = False

    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        """A client reads everything."""
        data.draw(st.sampled_from(self.world.clients)).read()

    @rule(data=st.data())
    def request_progress(self, data: st.DataObject) -> None:
        """Ask how far a stream is."""
        data.draw(st.sampled_from(self.world.clients)).stream.request_progress()

    @rule(seconds=st.sampled_from([0.0, 0.6]))
    def tick(self, seconds: float) -> None:
        """Time passes."""
        self.world.clock.advance(seconds)
        self.world.hub.tick()

    @rule(back=st.integers(0, 6))
    def compact(self, back: int) -> None:
        """Compact to a recent revision; it takes effect when home has committed it."""
        self.world.compact(self.world.commits.durable - back)

    @invariant()
    def counts(self) -> None:
        """What the hub counts is what there is."""
        hub = self.world.hub
        watchers = [w for client in self.world.clients for w in client.stream.watchers.values()]
        assert hub.count == [sum(w.state is state for w in watchers) for state in State]
        for client in self.world.clients:
            ours = list(client.stream.watchers.values())
            assert client.stream.unready == sum(w.state is not State.SYNCED for w in ours)
            feeds = {w.feed for w in ours if w.state is not State.OVER}
            assert set(client.stream.feeds) == feeds
        feeds = {w.feed for w in watchers if w.state is not State.OVER}
        assert set(hub._feeds.values()) == feeds

    def teardown(self) -> None:
        """When all is calm, everyone has everything, and progress says so."""
        world = self.world
        for client in world.clients:
            client.read()
        world.settle()
        world.hub.tick()
        world.settle()
        world.check_complete()
        for client in world.clients:
            self._check_progress(client)
            client.stream.close()
        assert world.hub.watchers == 0
        assert not world.hub._feeds
        assert not world.hub._blocked

    def _check_progress(self, client: Client) -> None:
        watchers = client.stream.watchers.values()
        ready = watchers and all(w.state is State.SYNCED for w in watchers)
        before = len(client.messages)
        client.stream.request_progress()
        assert len(client.messages) - before == bool(ready)
        if ready:
            assert client.last.header.revision == self.world.commits.durable


class OneShardMachine(WatchMachine):
    """The same with one shard: one feed for all."""

    routes: ClassVar[dict[bytes, int]] = {}

    @rule(key=st.sampled_from(KEYS), end=st.sampled_from(ENDS))
    def delete_range(self, key: bytes, end: bytes | None) -> None:
        """Any range in one revision."""
        self.world.delete(key, end)


class LateShardMachine(WatchMachine):
    """The same after a restart, with a shard that is loaded and joins some time later."""

    @initialize(
        memory=st.sampled_from([0, 1 << 20]),
        config=st.sampled_from([TINY, WatchConfig()]),
        written=st.lists(st.tuples(st.sampled_from(KEYS), st.booleans()), max_size=8),
        compacted=st.integers(0, 6),
    )
    def start(
        self,
        memory: int,
        config: WatchConfig,
        written: Sequence[tuple[bytes, bool]] = (),
        compacted: int = 0,
    ) -> None:
        """What was written before, and compacted."""
        world = World(routes=self.routes, config=config, cache_bytes_max=memory)
        for key, dies in written:
            if dies:
                world.delete(key)
            else:
                world.put(key)
        world.settle()
        world.compact(compacted)
        world.settle()
        self.world = world.restart(1)
        self.rows = self.world.rows(1)
        self.left = self.world.store.load_rows(1, [])
        oldest = max(2, self.world.store.compact_revision)
        self.world.client().create(b"b", b"c", oldest)

    @rule(rows=st.integers(1, 3))
    def load(self, rows: int) -> None:
        """Some rows of the shard."""
        self.left += self.world.store.load_rows(1, self.rows[:rows])
        del self.rows[:rows]

    @precondition(lambda self: not self.there(b"b"))
    @rule()
    def join(self) -> None:
        """It is there."""
        self.load(len(self.rows))
        self.world.join(1, self.left)

    def teardown(self) -> None:
        """It comes in the end."""
        if not self.there(b"b"):
            self.join()
        super().teardown()


TestWatch = WatchMachine.TestCase
TestWatch.settings = settings(stateful_step_count=60)
TestWatchLateShard = LateShardMachine.TestCase
TestWatchLateShard.settings = settings(stateful_step_count=60)
TestWatchOneShard = OneShardMachine.TestCase
TestWatchOneShard.settings = settings(stateful_step_count=60)
pytestmark = pytest.mark.slow
