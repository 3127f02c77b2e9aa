"""Leases whose keys are on several shards: one revision, when the shards let it be."""

from collections.abc import Callable

import pytest

from kvstore.backend import Batch, CommitResult
from kvstore.compaction import Compactor
from kvstore.errors import HeldError, LeaseNotFoundError
from kvstore.pb import rpc_pb2 as pb
from kvstore.rpc.kv import KvService
from kvstore.rpc.lease import LeaseService
from kvstore.txn import DeleteRange, Put, Txn
from tests.engine import Engine, Waiter
from tests.stack import Answered, serve

TIMED_OUT = (14, "etcdserver: request timed out")
Commit = tuple[Batch, Callable[[CommitResult], None]]


@pytest.fixture
def engine() -> Engine:
    """Home and shards for keys under x/ and y/; lease 1 has keys on home and under x/, lease 2 only
    there.
    """
    engine = Engine(routes={b"x/": 1, b"y/": 2})
    engine.granted(1, 60)
    engine.granted(2, 600)
    for key in (b"x/b", b"x/a", b"home"):
        engine.put(key, lease=1)
    engine.put(b"x/2", lease=2)
    engine.settle()
    return engine


def revoke(engine: Engine, lease_id: int) -> Answered:
    """Send a LeaseRevoke."""
    service = LeaseService(
        engine.store, engine.lessor, engine.header, engine.config.lease, call_soon=engine.steps
    )
    return serve(service.revoke, pb.LeaseRevokeRequest(ID=lease_id).SerializeToString())


def expire(engine: Engine) -> None:
    """Lease 1 has expired, and a tick has seen it."""
    engine.clock.advance(61)
    engine.lessor.tick()


# -- revoking --------------------------------------------------------------------------------------


def test_all_keys_die_in_one_revision(engine: Engine) -> None:
    """In key order, over home and other shards."""
    call = revoke(engine, 1)
    engine.settle()
    assert engine.deaths() == [(b"home", 6), (b"x/a", 6), (b"x/b", 6)]
    assert call.body is not None
    assert pb.LeaseRevokeResponse.FromString(call.body).header.revision == 6
    assert (engine.lessor.leases(), list(engine.disks[0].leases)) == ([2], [2])


@pytest.mark.parametrize("steps", range(20))
def test_a_crash_leaves_lease_and_keys_or_no_keys(engine: Engine, steps: int) -> None:
    """All keys are dead, on their shards or in home's record, or none is; the row goes last."""
    call = revoke(engine, 1)
    for _ in range(steps):
        engine.steps.run_next()
    disks = engine.disks
    rows = [row for disk in disks for row in disk.rows.values()] + [row for _, row in disks[0].redo]
    dead = {row[2] for row in rows if not row[4]}
    assert dead in (set(), {b"home", b"x/a", b"x/b"})
    if 1 not in disks[0].leases:
        assert dead
        assert not disks[0].redo
    assert steps < 19 or call.done


def test_a_revoke_waits_for_its_turn(engine: Engine) -> None:
    """A key under x/ is being written: the lease is as before until that is durable."""
    engine.put(b"x/z")
    with pytest.raises(HeldError):
        engine.lessor.revoke(1)
    call = revoke(engine, 1)
    assert engine.keys_of(1) == [b"home", b"x/a", b"x/b"]
    assert engine.lessor.exists(1)
    engine.settle()
    assert engine.deaths() == [(b"home", 7), (b"x/a", 7), (b"x/b", 7)]
    assert call.body is not None


def test_a_revoke_of_one_shard_waits_only_behind_a_hold(engine: Engine) -> None:
    """Keys of one shard need no turn of their own."""
    engine.put(b"x/z")
    first, second = revoke(engine, 1), revoke(engine, 2)
    assert engine.deaths() == []
    engine.settle()
    assert [revision for _, revision in engine.deaths()] == [7, 7, 7, 8]
    assert first.body is not None
    assert second.body is not None
    engine.granted(3, 60)
    engine.put(b"x/3", lease=3)
    assert engine.lessor.revoke(3)


def test_a_request_after_a_revoke_rests_on_nothing_that_a_crash_forgets(engine: Engine) -> None:
    """Over the shards of a record, a lease ends whose last key is on one of them, whose rows home
    has not: the next request over them waits until that is durable, or half of it could stay.
    """
    engine.granted(3, 60)
    for key in (b"x/3", b"y/3"):
        engine.put(key, lease=3)
    engine.settle()
    engine.put(b"x/busy")
    store, done = engine.store, list[str]()

    def send(name: str, shards: tuple[int, ...], execute: Callable[[], object]) -> None:
        def attempt() -> None:
            execute()
            done.append(name)

        store.barrier.run(shards, attempt, lambda error: done.append(str(error)), 0)

    first = Txn((), [DeleteRange(b"y/3", None), Put(b"x/z", b"")], ())
    second = Txn((), [DeleteRange(b"x/3", None), Put(b"y/done", b"")], ())
    send("first", (1, 2), lambda: store.txn(first))
    send("revoke", (1, 2), lambda: engine.lessor.revoke(3))
    send("second", (1, 2), lambda: store.txn(second))
    while b"y/done" not in {row[2] for _, row in engine.disks[0].redo}:
        engine.steps.run_next()
    assert done == ["first", "revoke", "second"]
    kept = [row for disk in engine.disks for row in disk.rows.values()]
    kept += [row for _, row in engine.disks[0].redo]
    assert b"x/3" in {row[2] for row in kept if not row[4]}


def test_a_revoke_past_its_time_is_refused(engine: Engine) -> None:
    """Nothing was done; the lease lives on."""
    engine.put(b"x/z")
    call = revoke(engine, 1)
    engine.clock.advance(1.1)
    engine.store.barrier.tick()
    assert call.failed == TIMED_OUT
    engine.settle()
    assert (engine.deaths(), engine.left(1)) == ([], 58)


def test_keys_that_come_to_another_shard_meanwhile(engine: Engine) -> None:
    """The revoke would have to begin again: it is refused, and the lease is as it was."""
    engine.put(b"x/z")
    call = revoke(engine, 1)
    engine.put(b"y/a", lease=1)
    while not call.done:
        assert engine.steps.run_next()
    assert call.failed == TIMED_OUT
    engine.settle()
    assert engine.deaths() == []
    call = revoke(engine, 1)
    engine.settle()
    assert call.body is not None
    assert b"y/a" in [key for key, _ in engine.deaths()]


# -- expiry ----------------------------------------------------------------------------------------


def test_an_expiry_waits_for_its_turn(engine: Engine) -> None:
    """And is counted once; a renewal comes too late."""
    engine.put(b"x/z")
    expire(engine)
    assert (engine.deaths(), engine.lessor.keep_alive(1)) == ([], None)
    engine.settle()
    assert engine.deaths() == [(b"home", 7), (b"x/a", 7), (b"x/b", 7)]
    assert (engine.lessor.expired_total, engine.lessor.revoked_total) == (1, 1)
    assert engine.lessor.leases() == [2]


def test_an_expiry_whose_keys_come_to_another_shard_takes_another_turn(engine: Engine) -> None:
    """They die in one revision with the others."""
    engine.put(b"x/z")
    expire(engine)
    engine.put(b"y/a", lease=1)
    engine.settle()
    assert engine.deaths() == [(key, 8) for key in (b"home", b"x/a", b"x/b", b"y/a")]
    assert (engine.lessor.expired_total, engine.lessor.revoked_total) == (1, 1)


def test_an_expiry_past_its_time_is_tried_again(engine: Engine) -> None:
    """Its shard was slow: half a second later."""
    engine.put(b"x/z")
    expire(engine)
    engine.clock.advance(1.1)
    engine.store.barrier.tick()
    engine.settle()
    assert engine.deaths() == []
    engine.pass_time(1)
    assert engine.deaths() == [(b"home", 7), (b"x/a", 7), (b"x/b", 7)]


def test_a_shard_that_hangs_behind_the_record_is_waited_for(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keys are dead for good, home has them; the row goes when the shard has its part. Who
    waits for that is told that it takes too long.
    """
    lost = engine.backends[1]
    hanging: list[Commit] = []
    monkeypatch.setattr(lost, "commit", lambda *call: hanging.append(call))
    call = revoke(engine, 1)
    engine.settle()
    engine.clock.advance(6)
    engine.commits.tick()
    assert call.failed == (14, "etcdserver: request timed out")
    assert (engine.lessor.leases(), len(engine.disks[0].redo)) == ([1, 2], 2)
    with pytest.raises(LeaseNotFoundError):
        engine.lessor.revoke(1)
    monkeypatch.undo()
    lost.commit(*hanging.pop())
    engine.settle()
    engine.lessor.tick()
    engine.settle()
    assert (engine.lessor.leases(), engine.disks[0].redo) == ([2], [])


@pytest.mark.parametrize("ended_by", [revoke, lambda engine, _: expire(engine)])
def test_a_put_is_refused_when_the_end_of_its_lease_is_durable(
    engine: Engine, ended_by: Callable[[Engine, int], object]
) -> None:
    """Not before: a crash could bring the lease back, for whom it was refused."""
    service = KvService(
        engine.store,
        Compactor(engine.store, engine.config.compaction, engine.steps, lambda: None),
        engine.header,
        request=engine.config.request,
        reads=engine.config.store,
        call_soon=engine.steps,
    )
    ended_by(engine, 1)
    puts = [
        serve(service.put, pb.PutRequest(key=key, lease=1).SerializeToString())
        for key in (b"x/late", b"late", b"y/late")
    ]
    while not all(put.done for put in puts):
        assert engine.steps.run_next()
        assert not any(put.done for put in puts) or 1 not in engine.disks[0].leases
    assert {put.failed for put in puts} == {(5, "etcdserver: requested lease not found")}


def test_a_revoke_of_a_lease_whose_keys_are_gone_shows_no_head_before_that(engine: Engine) -> None:
    """They were deleted on another shard: the answer rests on it, and so its revision does."""
    engine.put(b"home")
    for key in (b"x/a", b"x/b"):
        engine.delete(key)
    call = revoke(engine, 1)
    engine.settle()
    assert call.body is not None
    assert pb.LeaseRevokeResponse.FromString(call.body).header.revision == 8


def test_a_revoke_and_an_expiry_at_once(engine: Engine) -> None:
    """Both wait for the same turn: the first ends the lease, the other finds that it has ended."""
    engine.put(b"x/z")
    expire(engine)
    call = revoke(engine, 1)
    engine.settle()
    assert engine.deaths() == [(b"home", 7), (b"x/a", 7), (b"x/b", 7)]
    assert call.failed == (5, "etcdserver: requested lease not found")
    assert (engine.lessor.expired_total, engine.lessor.revoked_total) == (1, 1)


def test_an_expiry_that_waits_does_not_touch_a_lease_granted_anew(engine: Engine) -> None:
    """The old one was revoked by a client in the same turn, before."""
    engine.put(b"x/z")
    engine.clock.advance(60)
    call = revoke(engine, 1)
    expire(engine)
    while call.body is None:
        assert engine.steps.run_next()
    engine.granted(1, 1000)
    engine.settle()
    engine.pass_time(5)
    assert (engine.left(1), engine.lessor.expired_total) == (995, 0)


def test_many_that_expire_at_once_share_their_turns() -> None:
    """Hundreds over the same two shards need not settle them hundreds of times."""
    engine = Engine(routes={b"x/": 1})
    for n in range(1, 201):
        engine.granted(n, 60)
        engine.put(b"a%03d" % n, lease=n)
        engine.put(b"x/%03d" % n, lease=n)
    engine.settle()
    before = engine.commits.queues[1].commits_total
    engine.clock.advance(62)
    while engine.lessor.leases():
        engine.put(b"x/busy")
        engine.lessor.tick()
        engine.settle()
    assert len(engine.deaths()) == 400
    assert len({revision for _, revision in engine.deaths()}) == 200
    assert engine.commits.queues[1].commits_total - before <= 3 * 5


# -- orphans ---------------------------------------------------------------------------------------


def test_keys_of_a_returning_shard_whose_lease_is_gone_die(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One revision per lease, some at a time, though the shard serves nobody yet; those of other
    shards stay.
    """
    monkeypatch.setattr("kvstore.orphans.ORPHANS_STEP", 2)
    for revision, key, lease in ((100, b"x/9", 9), (101, b"x/8", 9), (102, b"x/7", 8)):
        engine.store.load_rows(1, [(revision, 0, key, revision, 1, lease)])
    engine.store.revision = 200
    engine.store.load_rows(2, [(103, 0, b"y/7", 103, 1, 8)])
    engine.commits.lost(1, "not joined")
    assert engine.lessor.orphans.delete_of(1)
    assert [key for key, _ in engine.deaths()] == [b"x/8", b"x/9"]
    assert not engine.lessor.orphans.delete_of(1)
    assert [key for key, _ in engine.deaths()] == [b"x/8", b"x/9", b"x/7"]
    assert len({revision for _, revision in engine.deaths()}) == 2
    answer = Waiter()
    engine.commits.found(1)
    engine.commits.release((1,), answer, b"")
    engine.settle()
    assert answer.body == b""
    assert b"y/7" in engine.live()
    assert not engine.lessor.orphans.delete_of(2)
    assert b"y/7" not in engine.live()
