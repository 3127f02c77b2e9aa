"""Leases over the real store and commits: rules, durability, expiry, restarts, bounds."""

from typing import Any

import pytest

from kvstore import lease as lease_module
from kvstore.config import Config, LeaseConfig
from kvstore.errors import (
    LeaseExistsError,
    LeaseNotFoundError,
    LeaseTtlTooLargeError,
    TooManyRequestsError,
)
from kvstore.lease import HOME_ONLY
from tests.engine import Engine, Waiter


@pytest.fixture
def engine() -> Engine:
    """A new store on one shard."""
    return Engine()


# -- granting ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "granted"), [(-7, 2), (0, 2), (1, 2), (2, 2), (3, 3), (9_000_000_000, 9_000_000_000)]
)
def test_a_short_ttl_is_raised_to_the_minimum(engine: Engine, asked: int, granted: int) -> None:
    """TTLs below two seconds become two; the largest legal one is taken as it is."""
    assert engine.lessor.grant(0, asked)[1] == granted


def test_ids_are_random_positive_or_as_asked(engine: Engine) -> None:
    """0 asks for a new positive id; any other is taken, negative ones too, once."""
    random_ids = {engine.lessor.grant(0, 60)[0] for _ in range(100)}
    assert len(random_ids) == 100
    assert all(0 < lease_id < 1 << 63 for lease_id in random_ids)
    assert engine.lessor.grant(-5, 60) == (-5, 60)
    with pytest.raises(LeaseExistsError):
        engine.lessor.grant(-5, 60)
    with pytest.raises(LeaseTtlTooLargeError):
        engine.lessor.grant(6, 9_000_000_001)


def test_a_lease_takes_keys_only_once_its_grant_is_durable(engine: Engine) -> None:
    """Until the commit a put with the lease is refused, although the lease can be seen."""
    engine.lessor.grant(5, 60)
    answer = Waiter()
    engine.commits.release(HOME_ONLY, answer, b"granted")
    assert engine.left(5) == 60
    with pytest.raises(LeaseNotFoundError):
        engine.put(b"a", lease=5)
    assert answer.waits
    engine.settle()
    assert answer.body == b"granted"
    engine.put(b"a", lease=5)
    assert engine.keys_of(5) == [b"a"]


def test_a_grant_whose_commit_hangs_becomes_usable_when_it_returns() -> None:
    """A ticket that timed out is taken anew, so that the lease is not half there for ever."""
    engine = Engine()
    engine.lessor.grant(5, 60)
    answer = Waiter()
    engine.commits.release(HOME_ONLY, answer, b"")
    engine.steps.run_next()
    engine.clock.advance(6.0)
    engine.commits.tick()
    assert answer.failure is not None
    engine.lessor.tick()
    assert not engine.lessor.exists(5)
    engine.settle()
    engine.lessor.tick()
    assert engine.lessor.exists(5)


def test_a_grant_lost_by_a_crash_leaves_nothing(engine: Engine) -> None:
    """Before the commit point a crash forgets the lease; after it, the lease is there."""
    engine.lessor.grant(5, 60)
    restarted = engine.crash()
    assert len(restarted.lessor) == 0
    restarted.granted(6, 60)
    assert restarted.crash().lessor.leases() == [6]


def test_too_many_leases_are_refused() -> None:
    """The number of leases is bounded; revoking one makes room."""
    engine = Engine(config=Config(lease=LeaseConfig(leases_max=2)))
    engine.granted(1, 60)
    engine.granted(2, 60)
    with pytest.raises(TooManyRequestsError):
        engine.lessor.grant(3, 60)
    engine.lessor.revoke(1)
    assert engine.lessor.grant(3, 60) == (3, 60)


# -- attaching and revoking --------------------------------------------------------------------


def test_a_key_belongs_to_the_lease_of_its_last_put(engine: Engine) -> None:
    """A put moves its key to its lease or to none; a delete detaches; a revoke kills the rest."""
    engine.granted(1, 60)
    engine.granted(2, 60)
    for key in (b"moved", b"freed", b"deleted", b"kept"):
        engine.put(key, lease=1)
    engine.put(b"moved", lease=2)
    engine.put(b"freed")
    engine.delete(b"deleted")
    engine.put(b"deleted")
    assert (engine.keys_of(1), engine.keys_of(2)) == ([b"kept"], [b"moved"])
    engine.lessor.revoke(1)
    assert engine.live() == [b"deleted", b"freed", b"moved"]


def test_a_revoke_deletes_all_keys_in_one_revision_in_key_order(engine: Engine) -> None:
    """One revision, one event per key, in key order; the lease is gone at once."""
    engine.granted(1, 60)
    for key in (b"c", b"a", b"b"):
        engine.put(key, lease=1)
    revision = engine.lessor.revoke(1)
    assert revision == 5
    assert engine.deaths() == [(b"a", revision), (b"b", revision), (b"c", revision)]
    assert not engine.lessor.exists(1)
    with pytest.raises(LeaseNotFoundError):
        engine.lessor.revoke(1)
    engine.settle()
    assert (engine.disks[0].leases, engine.live()) == ({}, [])


def test_a_revoke_without_keys_makes_no_revision(engine: Engine) -> None:
    """No key, no revision, no event."""
    engine.granted(1, 60)
    before = engine.store.revision
    assert engine.lessor.revoke(1) == before
    assert (engine.store.revision, engine.deaths()) == (before, [])


def test_keys_and_row_go_in_one_commit_on_one_shard(engine: Engine) -> None:
    """However a crash cuts, either lease and keys are there or neither is."""
    for steps in range(6):
        engine = Engine()
        engine.granted(1, 60)
        engine.put(b"a", lease=1)
        engine.put(b"b", lease=1)
        engine.settle()
        engine.lessor.revoke(1)
        for _ in range(steps):
            engine.steps.run_next()
        after = engine.crash()
        assert (after.live(), after.lessor.leases()) in (([b"a", b"b"], [1]), ([], []))
        if after.live():
            assert after.keys_of(1) == [b"a", b"b"]


def test_a_lease_can_be_granted_anew_while_its_revoke_is_not_durable(engine: Engine) -> None:
    """Revoke, grant and put of one id may share a batch; the last word counts after a crash."""
    engine.granted(1, 60)
    engine.put(b"a", lease=1)
    engine.settle()
    engine.lessor.revoke(1)
    engine.lessor.grant(1, 30)
    engine.settle()
    after = engine.crash()
    assert (after.left(1), after.live()) == (30, [])


def test_answers_after_a_revoke_wait_for_its_commit(engine: Engine) -> None:
    """The revoke's answer and a refusal that rests on it come with the commit, not before."""
    engine.granted(1, 60)
    engine.lessor.revoke(1)
    answer, refused = Waiter(), Waiter()
    engine.lessor.after_revoke(1, answer, b"revoked")
    engine.lessor.after_revoke(1, refused, b"unknown")
    assert (answer.waits, refused.waits) == (True, True)
    engine.settle()
    assert (answer.body, refused.body) == (b"revoked", b"unknown")


# -- time --------------------------------------------------------------------------------------


def test_leases_expire_after_their_ttl_in_order(engine: Engine) -> None:
    """Not before the TTL, within a tick and a slot after it, earlier expiries first."""
    for lease_id, ttl in ((1, 5), (2, 3), (3, 4)):
        engine.granted(lease_id, ttl)
        engine.put(b"%d" % lease_id, lease=lease_id)
    engine.pass_time(2.9)
    assert engine.deaths() == []
    engine.pass_time(0.8)
    assert engine.deaths() == [(b"2", 5)]
    engine.pass_time(3.0)
    assert engine.deaths() == [(b"2", 5), (b"3", 6), (b"1", 7)]
    assert (engine.lessor.leases(), engine.disks[0].leases) == ([], {})


def test_what_happened_is_counted(engine: Engine) -> None:
    """Grants, renewals, revokes and, among those, expiries; refusals are none of them."""
    for lease_id in (1, 2, 3):
        engine.granted(lease_id, 10)
    engine.lessor.keep_alive(1)
    engine.lessor.keep_alive(99)
    engine.lessor.revoke(1)
    engine.pass_time(11)
    lessor = engine.lessor
    counted = (lessor.granted_total, lessor.renewed_total, lessor.revoked_total)
    assert (counted, lessor.expired_total) == ((3, 1, 3), 2)


def test_a_renewed_lease_lives_on(engine: Engine) -> None:
    """A keep-alive gives the whole TTL again, counted from then."""
    engine.granted(1, 10)
    for _ in range(5):
        engine.pass_time(8)
        assert engine.lessor.keep_alive(1) == 10
        assert engine.left(1) == 10
    engine.pass_time(9.9)
    assert engine.lessor.leases() == [1]
    engine.pass_time(1)
    assert engine.lessor.leases() == []
    assert engine.lessor.keep_alive(1) == 0


def test_a_keep_alive_of_an_expired_lease_waits_for_its_end(engine: Engine) -> None:
    """It cannot be saved any more: the answer comes when it is durably gone."""
    engine.granted(1, 2)
    engine.put(b"a", lease=1)
    engine.settle()
    engine.clock.advance(2.0)
    assert engine.lessor.keep_alive(1) is None
    assert engine.left(1) == 0
    answer = Waiter()
    engine.lessor.after_revoke(1, answer, b"ttl 0")
    engine.clock.advance(0.2)
    engine.lessor.tick()
    assert (engine.live(), answer.waits) == ([], True)
    engine.settle()
    assert answer.body == b"ttl 0"


def test_an_expired_lease_takes_keys_until_its_revoke(engine: Engine) -> None:
    """As in etcd; the keys then die with it."""
    engine.granted(1, 2)
    engine.clock.advance(2.1)
    engine.put(b"a", lease=1)
    engine.clock.advance(0.5)
    engine.lessor.tick()
    assert engine.live() == []


def test_waiters_of_one_lease_are_bounded() -> None:
    """Beyond the bound a keep-alive is refused instead of kept."""
    engine = Engine(config=Config(lease=LeaseConfig(revoke_waiters_max=1)))
    engine.granted(1, 2)
    engine.clock.advance(3.0)
    first, second = Waiter(), Waiter()
    engine.lessor.after_revoke(1, first, b"")
    engine.lessor.after_revoke(1, second, b"")
    assert (first.waits, second.failure) == (True, (8, "etcdserver: too many requests"))


def test_a_burst_of_expiries_is_spread_over_ticks() -> None:
    """One tick revokes a bounded number and asks to be called again soon; all die in the end."""
    engine = Engine(config=Config(lease=LeaseConfig(expired_per_second_max=200)))
    for n in range(1, 101):
        engine.granted(n, 10)
        engine.put(b"%03d" % n, lease=n)
    engine.settle()
    engine.clock.advance(10.2)
    assert engine.lessor.tick() == lease_module.BACKLOG_PAUSE
    assert len(engine.deaths()) == 10
    ticks = 1
    while engine.lessor.tick() == lease_module.BACKLOG_PAUSE:
        ticks += 1
    assert len(engine.deaths()) == 100
    assert 10 <= ticks <= 11
    assert [key for key, _ in engine.deaths()] == [b"%03d" % n for n in range(1, 101)]


def test_leases_with_many_keys_end_a_tick() -> None:
    """A lease is never split; once a tick has deleted enough keys the next lease waits."""
    engine = Engine(config=Config(lease=LeaseConfig(revoked_keys_per_tick_max=5)))
    for lease_id in (1, 2):
        engine.granted(lease_id, 2)
        for n in range(20):
            engine.put(b"%d/%02d" % (lease_id, n), lease=lease_id)
    engine.clock.advance(3)
    engine.lessor.tick()
    assert len(engine.live()) == 20
    engine.lessor.tick()
    assert engine.live() == []


def test_renewed_leases_that_come_up_early_are_bounded_too() -> None:
    """Looking at leases only to put them down again is work as well."""
    engine = Engine(config=Config(lease=LeaseConfig(scanned_per_tick_max=10)))
    for n in range(1, 26):
        engine.granted(n, 10)
    engine.clock.advance(9)
    for n in range(1, 26):
        engine.lessor.keep_alive(n)
    engine.clock.advance(2)
    assert [engine.lessor.tick() for _ in range(3)] == [0.01, 0.01, 0.5]
    assert len(engine.lessor) == 25


def test_many_leases_are_held_in_parts(engine: Engine) -> None:
    """No dictionary holds so many that its growth stalls; ids given and ids chosen alike."""
    for n in range(1, 3_001):
        engine.lessor.grant(n, 10)
        engine.lessor.grant(0, 10)
        engine.settle()
    assert len(engine.lessor) == 6_000
    held: Any = engine.lessor._leases
    assert max(map(len, held)) <= 200


def test_a_lease_revoked_and_granted_anew_in_a_backlog_keeps_its_new_time(engine: Engine) -> None:
    """What is left of the old lease in the backlog must not touch the new one."""
    engine = Engine(config=Config(lease=LeaseConfig(expired_per_second_max=20)))
    for n in range(1, 5):
        engine.granted(n, 2)
    engine.clock.advance(2.2)
    engine.lessor.tick()
    engine.lessor.revoke(3)
    engine.granted(3, 1000)
    engine.clock.advance(1)
    for _ in range(5):
        engine.lessor.tick()
    assert (engine.lessor.leases(), len(engine.lessor._agenda)) == ([3], 1)
