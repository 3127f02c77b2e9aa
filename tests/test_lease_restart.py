"""Leases over crashes, restarts, full queues and several shards."""

from collections.abc import Callable

import pytest

from backends.memory import MemoryDisk
from kvstore.backend import Batch, CommitResult, LeaseRow
from kvstore.config import CommitConfig, Config, LeaseConfig
from kvstore.errors import LeaseNotFoundError, StoreError, TooManyRequestsError
from kvstore.lease import HOME_ONLY
from tests.engine import Engine, Waiter

Commit = tuple[Batch, Callable[[CommitResult], None]]
"""What a backend is asked to commit, and whom to tell."""


@pytest.fixture
def engine() -> Engine:
    """A new store on one shard."""
    return Engine()


# -- restarts ----------------------------------------------------------------------------------


def test_a_restart_gives_a_short_lease_its_whole_ttl(engine: Engine) -> None:
    """No remainder is recorded for leases up to the checkpoint interval."""
    engine.granted(1, 300)
    engine.put(b"a", lease=1)
    engine.settle()
    engine.pass_time(200)
    after = engine.crash(seconds=50)
    assert (after.left(1), after.keys_of(1)) == (300, [b"a"])
    after.pass_time(299)
    assert after.live() == [b"a"]
    after.pass_time(2)
    assert after.live() == []


def test_a_restart_gives_a_long_lease_what_was_left(engine: Engine) -> None:
    """At most one checkpoint interval more than it had, never less."""
    engine.granted(1, 3600)
    engine.pass_time(1000)
    after = engine.crash(seconds=70)
    remainder = after.left(1)
    assert remainder is not None
    assert 2600 <= remainder <= 2600 + 301


def test_a_restart_may_give_more_time_to_all() -> None:
    """For clients that could not renew while the server was away."""
    engine = Engine(config=Config(lease=LeaseConfig(extend_on_start=5.0)))
    engine.granted(1, 60)
    assert (engine.left(1), engine.crash().left(1)) == (60, 65)


def test_many_restarts_do_not_keep_a_long_lease_for_ever(engine: Engine) -> None:
    """A server that crashes oftener than the interval still gets to record remainders."""
    engine.granted(1, 1000)
    lived = 0
    while engine.lessor.leases():
        engine.pass_time(200)
        engine = engine.crash()
        lived += 200
        assert lived < 10_000
    assert lived >= 1000


def test_a_renewal_with_a_recorded_remainder_clears_it_before_the_answer(engine: Engine) -> None:
    """Or a restart would take the renewed time away from a client that was told it had it."""
    engine.granted(1, 1000)
    engine.pass_time(700)
    assert engine.disks[0].leases[1].remaining_ttl > 0
    assert engine.lessor.keep_alive(1) == 1000
    answer = Waiter()
    engine.commits.release(HOME_ONLY, answer, b"")
    assert answer.waits
    assert engine.lessor.keep_alive(1) == 1000
    assert engine.crash().left(1) is not None
    engine.settle()


def test_a_renewal_survives_a_crash_once_answered(engine: Engine) -> None:
    """After the answer the whole TTL is there whatever happens."""
    engine.granted(1, 1000)
    engine.pass_time(700)
    assert engine.lessor.keep_alive(1) == 1000
    engine.settle()
    assert engine.disks[0].leases[1] == LeaseRow(1, 1000, 0)
    assert engine.crash(seconds=5).left(1) == 1000


def test_a_short_lease_writes_nothing_when_it_comes_up_early(engine: Engine) -> None:
    """It was renewed since it was put down; its remainder is not worth a row."""
    engine.granted(1, 10)
    commits = engine.commits.queues[0].commits_total
    for _ in range(5):
        engine.pass_time(6)
        engine.lessor.keep_alive(1)
    assert engine.commits.queues[0].commits_total == commits


def test_a_long_lease_with_all_its_time_left_writes_nothing(engine: Engine) -> None:
    """Renewed just before its checkpoint: no remainder means all of the TTL."""
    engine.granted(1, 1000)
    commits = engine.commits.queues[0].commits_total
    engine.clock.advance(300.5)
    engine.lessor.keep_alive(1)
    engine.lessor.tick()
    engine.settle()
    assert engine.commits.queues[0].commits_total == commits


def test_renewals_write_at_most_two_rows_per_interval(engine: Engine) -> None:
    """A checkpoint and a clearing per interval, however often a lease is renewed."""
    engine.granted(1, 1000)
    rows = engine.commits.queues[0].commits_total
    for _ in range(100):
        engine.pass_time(10)
        engine.lessor.keep_alive(1)
        engine.settle()
    assert engine.commits.queues[0].commits_total - rows <= 2 * (1000 // 300 + 1)


def test_checkpoints_are_bounded_per_tick() -> None:
    """A thousand leases due at once record their remainders over several ticks."""
    config = LeaseConfig(checkpoints_per_tick_max=10)
    engine = Engine(config=Config(lease=config))
    for n in range(1, 26):
        engine.granted(n, 1000)
    engine.clock.advance(301)
    pauses = [engine.lessor.tick() for _ in range(3)]
    engine.settle()
    assert pauses == [0.05, 0.05, 0.5]
    assert all(row.remaining_ttl == 699 for row in engine.disks[0].leases.values())


def test_keys_of_an_unknown_lease_die_before_serving() -> None:
    """What a crash left between shards is deleted, one revision per lease, in key order."""
    disk = MemoryDisk(tip=4)
    for revision, key, lease in ((2, b"b", 9), (3, b"a", 9), (4, b"c", -8)):
        disk.rows[revision, 0] = (revision, 0, key, revision, 1, lease, b"v")
    engine = Engine(disks=[disk])
    assert engine.lessor.orphans.delete() == 0
    assert engine.deaths() == [(b"c", 5), (b"a", 6), (b"b", 6)]
    engine.settle()
    assert engine.crash().live() == []


# -- trouble -----------------------------------------------------------------------------------


def test_expiry_waits_for_room_and_does_not_lose_the_lease() -> None:
    """A full queue refuses the revoke of an expired lease; it comes again half a second later."""
    engine = Engine(config=Config(commit=CommitConfig(queue_rows_max=3)))
    engine.granted(1, 2)
    engine.put(b"a", lease=1)
    for n in range(2):
        engine.put(b"%d" % n)
    engine.clock.advance(3)
    engine.lessor.tick()
    assert b"a" in engine.live()
    with pytest.raises(TooManyRequestsError):
        engine.lessor.revoke(1)
    engine.settle()
    engine.pass_time(1)
    assert engine.live() == [b"0", b"1"]


def test_nothing_is_granted_revoked_or_cleared_on_a_shard_that_is_out(engine: Engine) -> None:
    """Home does not answer: refused at once, and nothing was done."""
    engine.granted(1, 1000)
    engine.pass_time(400)
    engine.put(b"a", lease=1)
    engine.steps.run_next()
    engine.clock.advance(6)
    engine.commits.tick()
    before = engine.left(1)
    for refused in (
        lambda: engine.lessor.grant(2, 10),
        lambda: engine.lessor.revoke(1),
        lambda: engine.lessor.keep_alive(1),
    ):
        with pytest.raises(StoreError):
            refused()
    assert (engine.left(1), engine.live(), len(engine.lessor)) == (before, [b"a"], 1)


def test_keys_that_fill_a_batch_do_not_leave_their_lease_behind() -> None:
    """Row and keys share a batch although the keys close it."""
    for steps in range(8):
        engine = Engine(config=Config(commit=CommitConfig(batch_rows_max=1)))
        engine.granted(1, 60)
        engine.put(b"a", lease=1)
        engine.put(b"b", lease=1)
        engine.settle()
        engine.lessor.revoke(1)
        for _ in range(steps):
            engine.steps.run_next()
        after = engine.crash()
        assert (after.live(), after.lessor.leases()) in (([b"a", b"b"], [1]), ([], []))


# -- several shards ----------------------------------------------------------------------------


@pytest.fixture
def sharded() -> Engine:
    """Home and a shard for keys under ``x/``; a lease with keys there and at home."""
    engine = Engine(routes={b"x/": 1})
    engine.granted(1, 60)
    for key in (b"x/b", b"x/a", b"home"):
        engine.put(key, lease=1)
    engine.settle()
    return engine


def test_the_row_goes_only_after_keys_on_other_shards_are_durably_gone(sharded: Engine) -> None:
    """At every step: if the lease row is gone, so are the keys; and the answer comes after both."""
    sharded.lessor.revoke(1)
    answer = Waiter()
    sharded.lessor.after_revoke(1, answer, b"revoked")
    assert not sharded.lessor.exists(1)
    with pytest.raises(LeaseNotFoundError):
        sharded.put(b"x/c", lease=1)
    while sharded.steps.run_next():
        live = {row[2] for row in sharded.disks[1].rows.values() if row[4]}
        dead = {row[2] for row in sharded.disks[1].rows.values() if not row[4]}
        if 1 not in sharded.disks[0].leases:
            assert live == dead
        if not answer.waits:
            assert 1 not in sharded.disks[0].leases
    assert (answer.body, len(sharded.lessor)) == (b"revoked", 0)


def test_a_lease_with_keys_elsewhere_rests_on_home_too(sharded: Engine) -> None:
    """Its answers wait for home's commits as well as for those of the keys' shard."""
    sharded.granted(2, 60)
    sharded.put(b"x/z", lease=2)
    found = sharded.lessor.time_to_live(2, keys=True)
    assert found is not None
    assert (found.keys, found.shards) == ([b"x/z"], (0, 1))
    sharded.settle()
    sharded.lessor.revoke(2)
    sharded.settle()
    assert (sharded.lessor.leases(), list(sharded.disks[0].leases)) == ([1], [1])


def test_a_revoke_whose_keys_hang_goes_on_when_they_return(sharded: Engine) -> None:
    """The answer may fail as timed out, but the lease does not stay half revoked."""
    sharded.lessor.revoke(1)
    sharded.steps.run_next()
    sharded.clock.advance(6)
    sharded.commits.tick()
    assert sharded.lessor.half_revoked
    sharded.settle()
    assert (sharded.live(), sharded.lessor.leases()) == ([], [1])
    sharded.lessor.tick()
    sharded.settle()
    assert (sharded.lessor.leases(), sharded.disks[0].leases) == ([], {})


@pytest.mark.parametrize("steps", range(12))
def test_a_crash_between_keys_and_row_is_repeated_harmlessly(sharded: Engine, steps: int) -> None:
    """The lease comes back, perhaps without keys, and expires again."""
    sharded.lessor.revoke(1)
    for _ in range(steps):
        sharded.steps.run_next()
    after = sharded.crash()
    assert after.lessor.orphans.delete() == 0
    after.pass_time(62)
    assert (after.live(), after.lessor.leases(), after.disks[0].leases) == ([], [], {})


def test_a_lease_with_keys_on_a_shard_that_is_out_waits_for_it(
    sharded: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays as it is, is tried again, and holds up no other lease."""
    sharded.granted(2, 60)
    sharded.put(b"other", lease=2)
    sharded.settle()
    lost = sharded.backends[1]
    sharded.put(b"x/z")
    hanging: list[Commit] = []
    monkeypatch.setattr(lost, "commit", lambda *call: hanging.append(call))
    sharded.settle()
    sharded.clock.advance(6)
    sharded.commits.tick()
    sharded.pass_time(62)
    assert sharded.live() == [b"home", b"x/a", b"x/b", b"x/z"]
    assert sharded.lessor.leases() == [1]
    monkeypatch.undo()
    lost.commit(*hanging.pop())
    sharded.settle()
    sharded.pass_time(1)
    assert (sharded.live(), sharded.lessor.leases()) == ([b"x/z"], [])
