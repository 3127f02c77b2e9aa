"""Reads of one shard that hang, while its commits and all other shards go on."""

from collections.abc import Callable, Sequence

import pytest

from kvstore.backend import RowId
from kvstore.errors import BackendError, ReadsFullError
from kvstore.history import Entry
from kvstore.watch_groups import State
from tests.stack import Answered
from tests.watch_world import World

Done = Callable[[list[bytes | None] | BackendError], None]

ROUTES = {b"b": 1}


class Hanging:
    """The reads of a world's shard, which wait until they are let go."""

    def __init__(self, world: World, shard: int) -> None:
        backend = world.commits.queues[shard].backend
        self._read = backend.read_values
        self.waiting: list[tuple[Sequence[RowId], Done]] = []
        backend.read_values = self.read_values  # type: ignore[method-assign]

    def read_values(self, ids: Sequence[RowId], done: Done) -> None:
        """Not now."""
        self.waiting.append((ids, done))

    def answer(self) -> None:
        """Pass on what waits."""
        waiting, self.waiting = self.waiting, []
        for ids, done in waiting:
            self._read(ids, done)

    def fail(self, error: BackendError) -> None:
        """Refuse what waits."""
        waiting, self.waiting = self.waiting, []
        for _, done in waiting:
            done(error)


def past() -> World:
    """Revisions of both shards by turns, whose values are in storage only."""
    world = World(routes=ROUTES)
    for _ in range(3):
        world.put(b"a")
        world.put(b"b")
    world.settle()
    world.forget_values()
    return world


class TestWatchers:
    """Watchers that catch up."""

    @pytest.mark.parametrize("key", [b"b", b"a"], ids=["one", "several"])
    def test_those_of_other_shards_go_on(self, key: bytes) -> None:
        """As many as may read wait for a shard, alone or beside another one: a watcher of that
        other one gets what was and what is new.
        """
        world = past()
        hanging = Hanging(world, 1)
        client = world.client()
        for _ in range(world.config.catch_up_fetches_max):
            client.create(key, b"c", 2)
        world.settle()
        assert world.hub.count[State.FETCHING] == world.config.catch_up_fetches_max
        seen = client.create(b"a", None, 2)
        world.forget_values()
        world.wait()
        world.put(b"a")
        world.wait()
        assert seen
        assert len(seen.events) == 4
        hanging.answer()
        world.settle()
        world.check_complete()

    def test_so_many_read_a_shard(self) -> None:
        """Whatever else they read; the others wait, and none is forgotten."""
        world = past()
        most = world.config.catch_up_fetches_max
        hanging = Hanging(world, 1)
        client = world.client()
        for _ in range(most):
            client.create(b"b", None, 2)
            client.create(b"a", b"c", 2)
        for _ in range(3):
            world.wait()
            assert len(hanging.waiting) == most
            assert (world.hub.count[State.FETCHING], world.hub.count[State.STARVED]) == (most, most)
        while hanging.waiting:
            hanging.answer()
            world.forget_values()
            world.wait()
            assert len(hanging.waiting) <= most
        world.check_complete()
        assert not any(world.hub.catch_up.fetching.values())

    def test_one_shard_fails_while_another_hangs(self) -> None:
        """Neither is asked again before both have answered, and then the one that has refused."""
        world = past()
        refusing, hanging = Hanging(world, 0), Hanging(world, 1)
        world.client().create(b"a", b"c", 2)
        world.settle()
        refusing.fail(ReadsFullError())
        for _ in range(3):
            world.wait()
            assert (len(refusing.waiting), len(hanging.waiting)) == (0, 1)
        hanging.answer()
        world.settle()
        world.wait()
        assert (len(refusing.waiting), len(hanging.waiting)) == (1, 0)
        refusing.answer()
        world.settle()
        world.check_complete()


class TestCompaction:
    """Rows to be dropped while a read hangs."""

    def compact(self, world: World) -> Answered:
        """Let a physical compaction of everything go as far as it can."""
        answer = Answered()
        revision = world.store.revision
        world.compactor.compact(revision, physical=True, answer=answer, body=b"")
        self.go_on(world)
        return answer

    def go_on(self, world: World) -> None:
        """Let all happen that may."""
        for _ in range(3):
            world.settle()
            world.compactor.tick()

    def head(self, world: World, key: bytes) -> tuple[bytes, Entry]:
        """A version to be fetched."""
        entry = world.store.index.head(key)
        assert entry is not None
        return key, entry

    @pytest.mark.parametrize("keys", [[b"b"], [b"a", b"b"]], ids=["one", "several"])
    def test_that_of_other_shards_goes_on(self, keys: list[bytes]) -> None:
        """Only the rows of the shard that hangs stay, and what is read of them is there; once it is
        out, nobody waits for it.
        """
        world = past()
        hanging = Hanging(world, 1)
        found: list[object] = []
        world.store.fetch([self.head(world, key) for key in keys], found.append)
        read = world.store.index.head(b"b")
        world.put(b"b")
        kept = world.put(b"a")
        world.settle()
        first = self.compact(world)
        assert set(world.backends[0].disk.rows) == {(kept, 0)}
        assert read is not None
        assert read[:2] in world.backends[1].disk.rows
        assert not first.done, "rows of a shard that is there are to go"
        world.commits.lost(1, "away")
        kept = world.put(b"a")
        world.settle()
        second = self.compact(world)
        assert set(world.backends[0].disk.rows) == {(kept, 0)}
        assert (first.body, second.body) == (b"", b"")
        assert not found
        world.commits.found(1)
        hanging.answer()
        self.go_on(world)
        assert isinstance(found[0], list)
        assert None not in found[0]
        assert [row[2] for row in world.backends[1].disk.rows.values()] == [b"b"]

    def test_shard_of_its_own_goes_on_afterwards(self) -> None:
        """Its rows go, and the answer is given, with the read that held them back."""
        world = past()
        hanging = Hanging(world, 1)
        world.store.fetch([self.head(world, b"b")], lambda _: None)
        kept = world.put(b"b")
        world.settle()
        answer = self.compact(world)
        assert not answer.done
        hanging.answer()
        self.go_on(world)
        assert set(world.backends[1].disk.rows) == {(kept, 0)}
        assert answer.body is not None
