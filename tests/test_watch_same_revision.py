"""A Txn may put keys and then delete everything: both changes are shown, at one revision."""

import pytest

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
