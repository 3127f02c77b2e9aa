"""A Txn may put keys and then delete everything: both changes are shown, at one revision."""

from collections.abc import Callable, Sequence

import pytest

from kvstore.backend import RowId
from kvstore.txn import DeleteRange, Put
from kvstore.watch_message import PREVIOUS
from tests.watch_world import World


@pytest.mark.parametrize("late", [False, True], ids=["live", "catch-up"])
@pytest.mark.parametrize("forget", [False, True], ids=["in memory", "in storage"])
def test_put_and_deleted_in_one_revision(*, late: bool, forget: bool) -> None:
    """The previous value is that before the revision, as in etcd, for either change."""
    world = World()
    client = world.client()
    first = world.put(b"a", b"old")
    world.settle()
    if forget:
        world.forget_values()
    if not late:
        client.create(b"\0", b"\0", wants=PREVIOUS)
    world.write([Put(b"a", b"new"), Put(b"b", b"new"), DeleteRange(b"\0", b"\0")])
    world.settle()
    if late:
        client.create(b"\0", b"\0", first + 1, wants=PREVIOUS)
        world.settle()
    world.check_complete()
    assert [(event.kv.key, event.prev_kv.value) for event in client.last.events] == [
        (b"a", b"old"),
        (b"b", b""),
        (b"a", b"old"),
        (b"b", b""),
    ]


def test_compacted_where_put_and_deleted() -> None:
    """Compaction at that revision takes the put: a watch from there that needs its value from
    storage gets the delete alone, and asks for the value once.
    """
    world = World()
    world.put(b"a", b"old")
    world.settle()
    both = world.write([Put(b"a", b"new"), Put(b"b", b"new"), DeleteRange(b"\0", b"\0")])
    world.settle()
    world.compact(both)
    world.settle()
    world.compactor.tick()
    world.settle()
    world.forget_values()
    world.happened = [happened for happened in world.happened if not happened.is_put]
    backend = world.commits.queues[0].backend
    read, asked = backend.read_values, list[RowId]()

    def counted(ids: Sequence[RowId], done: Callable[..., None]) -> None:
        asked.extend(ids)
        assert len(asked) < 10, "the same rows again and again"
        read(ids, done)

    backend.read_values = counted  # type: ignore[method-assign]
    client = world.client()
    client.create(b"\0", b"\0", both, wants=PREVIOUS)
    later = world.put(b"a", b"newer")
    world.settle()
    world.check_complete()
    assert [(event.kv.key, event.kv.mod_revision) for event in client.seen[0].events] == [
        (b"a", both),
        (b"b", both),
        (b"a", later),
    ]
    assert asked == [(both, 0), (both, 1)]
