"""Compaction: what it refuses, when it takes effect, which rows go and when."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.memory import MemoryDisk
from kvstore import errors, history
from kvstore.compaction import Drops
from kvstore.fetch import Holds
from kvstore.pb import rpc_pb2 as pb
from tests.stack import Answered, Stack, serve
from tests.watch_world import World

RowId = tuple[int, int]


def change(engine: Stack, key: bytes, *, delete: bool = False) -> None:
    """A put or a delete, committed."""
    if delete:
        serve(engine.kv.delete_range, pb.DeleteRangeRequest(key=key).SerializeToString())
    else:
        serve(engine.kv.put, pb.PutRequest(key=key, value=b"v").SerializeToString())
    engine.settle()


def compact(engine: Stack, revision: int, *, physical: bool = False) -> Answered:
    """Ask for a compaction."""
    request = pb.CompactionRequest(revision=revision, physical=physical)
    return serve(engine.kv.compact, request.SerializeToString())


def finish(engine: Stack) -> None:
    """Let everything that compaction has to do happen."""
    for _ in range(100):
        engine.settle()
        engine.compactor.tick()
    engine.settle()


@given(
    st.lists(st.tuples(st.sampled_from([b"a", b"b", b"c"]), st.booleans()), max_size=20),
    st.lists(st.integers(0, 8), max_size=3),
)
def test_exactly_the_unreadable_rows_go(
    changes: list[tuple[bytes, bool]], backs: list[int]
) -> None:
    """Storage keeps the versions that a read or watch from the compact revision can see, and drops
    all others; a restart over what is left finds the same.
    """
    disk = MemoryDisk()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "BLOCK_CHANGES", 3)
        engine = Stack([disk])
        for key, delete in changes:
            change(engine, key, delete=delete)
        rows = dict(disk.rows)
        for back in backs:
            compact(engine, max(1, engine.store.revision - back))
        finish(engine)
    at = engine.store.compact_revision
    assert (max(1, engine.store.revision - min(backs)) if backs else -1) == at
    newest = {row[2]: id_ for id_, row in rows.items() if row[0] <= at}
    kept = {id_ for id_ in newest.values() if rows[id_][4] or id_[0] == at}
    assert kept | {id_ for id_ in rows if id_[0] > at} == set(disk.rows)
    assert sum(drops.count for drops in engine.compactor.drops) == 0
    engine.crash()
    again = Stack([disk])
    finish(again)
    assert kept | {id_ for id_ in rows if id_[0] > at} == set(disk.rows)
    assert at == again.store.compact_revision


def test_refusals() -> None:
    """At or below the last compaction, also one that is not durable yet, and above the head."""
    engine = Stack([MemoryDisk()])
    for _ in range(5):
        change(engine, b"a")
    first, second = compact(engine, 4), compact(engine, 4)
    future = compact(engine, 7)
    engine.settle()
    assert first.body is not None
    assert second.failed == (errors.CompactedError.code, errors.CompactedError.text)
    assert future.failed == (errors.FutureRevisionError.code, errors.FutureRevisionError.text)


def test_takes_effect_once_durable() -> None:
    """Before its commit old revisions are readable; once it is answered they are not."""
    engine = Stack([MemoryDisk()])
    for _ in range(5):
        change(engine, b"a")
    old = pb.RangeRequest(key=b"a", revision=3).SerializeToString()
    call = compact(engine, 5)
    assert not call.done
    assert serve(engine.kv.range, old).failed is None
    engine.settle()
    assert call.body is not None
    expected = (errors.CompactedError.code, errors.CompactedError.text)
    assert expected == serve(engine.kv.range, old).failed


def test_physical_is_answered_when_rows_are_gone() -> None:
    """The answer comes after the last row; one that is not physical comes before."""
    disk = MemoryDisk()
    engine = Stack([disk])
    for _ in range(20):
        change(engine, b"a")
    call = compact(engine, 21, physical=True)
    for _ in range(100):
        engine.turn()
        engine.steps.run_next()
        engine.compactor.tick()
        assert not call.done or set(disk.rows) == {(21, 0)}
    assert call.body is not None, call.failed


def test_rows_wait_in_one_piece_per_step() -> None:
    """What falls out in a step waits together: a row is no object of its own to the collector."""
    engine = Stack([MemoryDisk()])
    for n in range(40):
        change(engine, b"%d" % (n % 20))
    hold = engine.store.holds.begin(0)
    compact(engine, 41)
    finish(engine)
    drops = engine.compactor.drops[0]
    assert drops.count == 20
    assert len(drops._waiting) <= 10, "two keys a step"
    engine.store.holds.end(0, hold)


def test_each_key_is_handed_over_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compaction at exactly the revision of a large delete copies its keys once, not per step."""
    monkeypatch.setattr(history, "BLOCK_CHANGES", 16)
    engine = Stack([MemoryDisk()])
    for n in range(100):
        change(engine, b"a/%03d" % n)
    request = pb.DeleteRangeRequest(key=b"a/", range_end=b"a0")
    serve(engine.kv.delete_range, request.SerializeToString())
    engine.settle()
    handed_over: list[int] = []
    keys_until = history.History.keys_until

    def counted(*given: Any) -> Sequence[bytes]:  # noqa: ANN401
        keys = keys_until(*given)
        handed_over.append(len(keys))
        return keys

    monkeypatch.setattr(history.History, "keys_until", counted)
    compact(engine, 102)
    finish(engine)
    assert sum(handed_over) == 200
    assert len(engine.backends[0].disk.rows) == 100, "the tombstones of the compact revision"


def test_a_fetch_holds_back_rows() -> None:
    """Rows that fell out while a fetch was under way wait for its end."""
    disk = MemoryDisk()
    engine = Stack([disk])
    for _ in range(5):
        change(engine, b"a")
    hold = engine.store.holds.begin(0)
    compact(engine, 6)
    finish(engine)
    assert len(disk.rows) == 5
    engine.store.holds.end(0, hold)
    finish(engine)
    assert set(disk.rows) == {(6, 0)}


def test_a_crash_between_loses_nothing() -> None:
    """A compaction that was durable but not carried out is carried out after the restart."""
    disk = MemoryDisk()
    engine = Stack([disk])
    for _ in range(5):
        change(engine, b"a")
    change(engine, b"b")
    call = compact(engine, 6)
    while not call.done:
        engine.turns.run_next()
        engine.steps.run_next()
    engine.crash()
    assert len(disk.rows) == 6
    again = Stack([disk])
    finish(again)
    assert set(disk.rows) == {(6, 0), (7, 0)}


@given(st.lists(st.integers(0, 12), max_size=6), st.lists(st.integers(0, 40), max_size=12))
def test_drops_leave_in_order_and_measure(adds: list[int], batches: list[int]) -> None:
    """Oldest first, no more per batch than allowed, and all of them in the end."""
    holds = Holds()
    drops = Drops(0, holds, 20)
    rows: list[RowId] = []
    for n, size in enumerate(adds):
        added = [(n, sub) for sub in range(size)]
        rows += added
        drops.add(added)
    taken: list[RowId] = []
    for batch in [*batches, *[0] * 5]:
        some = drops.take(batch)
        assert len(some) <= min(20, max(batch, 16) if batch else 20)
        taken += some
        assert len(rows) - len(taken) == drops.count
    assert rows == taken


def test_drops_wait_for_older_holds_only() -> None:
    """A hold that began after the rows fell out keeps nothing back."""
    holds = Holds()
    drops = Drops(0, holds, 20)
    older = holds.begin(0)
    drops.add([(1, 0)])
    younger = holds.begin(0)
    assert drops.take(0) == []
    holds.end(0, older)
    assert drops.take(0) == [(1, 0)]
    holds.end(0, younger)


def test_a_stuck_shard_keeps_no_compaction_waiting() -> None:
    """While a commit of another shard hangs, a compaction takes effect, and refusals are given:
    they rest on what the home shard has.
    """
    world = World(routes={b"b": 1})
    for key in (b"a", b"b", b"a", b"b"):
        world.put(key)
        world.settle()
    world.put(b"b")
    first, second, future = Answered(), Answered(), Answered()
    for revision, answer in ((4, first), (4, second), (6, future)):
        world.compactor.compact(revision, physical=False, answer=answer, body=b"")
    world.turns.run_all()
    world.disks[0].run_all()
    world.turns.run_all()
    assert first.body is not None
    assert second.failed == (errors.CompactedError.code, errors.CompactedError.text)
    assert future.failed == (errors.FutureRevisionError.code, errors.FutureRevisionError.text)
    assert world.store.compact_revision == 4
    world.disks[0].run_all()
    assert set(world.backends[0].disk.rows) == {(4, 0)}
    assert set(world.backends[1].disk.rows) == {(3, 0), (5, 0)}


def test_physical_waits_for_a_shard_that_is_behind() -> None:
    """Rows are gone when they are gone from every shard."""
    world = World(routes={b"b": 1})
    for key in (b"b", b"b", b"a"):
        world.put(key)
        world.settle()
    stuck = world.put(b"b")
    world.turns.run_all()
    world.put(b"a")
    answer = Answered()
    for _ in range(3):
        world.turns.run_all()
        world.disks[0].run_all()
    world.compactor.compact(6, physical=True, answer=answer, body=b"")
    for _ in range(3):
        world.turns.run_all()
        world.disks[0].run_all()
        world.compactor.tick()
    assert set(world.backends[0].disk.rows) == {(6, 0)}
    assert not answer.done
    for _ in range(3):
        world.settle()
        world.compactor.tick()
    assert set(world.backends[1].disk.rows) == {(stuck, 0)}
    assert answer.body is not None


@pytest.mark.parametrize("stuck", [True, False])
def test_physical_does_not_wait_for_a_shard_that_is_out(*, stuck: bool) -> None:
    """Rows are gone from all that are there; from that one when it is back."""
    world = World(routes={b"b": 1})
    for key in (b"b", b"b", b"a", b"a"):
        world.put(key)
        world.settle()
    if stuck:
        world.put(b"b")
    world.commits.lost(1, "away")
    answer = Answered()
    world.compactor.compact(5, physical=True, answer=answer, body=b"")
    for _ in range(3):
        world.turns.run_all()
        world.disks[0].run_all()
        world.compactor.tick()
    assert set(world.backends[0].disk.rows) == {(5, 0)}
    assert set(world.backends[1].disk.rows) == {(2, 0), (3, 0)}
    assert answer.body is not None
    world.commits.found(1)
    for _ in range(3):
        world.settle()
        world.compactor.tick()
    assert (2, 0) not in world.backends[1].disk.rows
