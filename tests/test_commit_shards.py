"""Shards that are missing, away, held or owned by nobody knows whom: what is refused, and for how
long.
"""

import pytest

from kvstore.commit import NOTHING_PENDING
from kvstore.errors import HeldError, StoppedError, TimedOutError
from tests.commit_world import COMMITTED, STOPPED, TIMED_OUT, UNKNOWN, World
from tests.engine import Waiter
from tests.stack import run_now

# -- missing, away, late ---------------------------------------------------------------------------


def test_a_missing_shard_shows_nothing_and_the_others_go_on() -> None:
    """Its frontier is 0; whatever needs it is refused at once; what does not, is not."""
    world = World(3, missing=[1])
    commits, waiters = world.commits, [Waiter(), Waiter()]
    assert (commits.queues[1].state, commits.visible((1,)), commits.visible((0, 2))) == (
        "missing",
        0,
        1,
    )
    for refused in ((1,), (0, 1)):
        assert world.ticket(*refused).failure == TIMED_OUT
        for stale in (False, True):
            with pytest.raises(TimedOutError):
                commits.check_readable(refused, stale=stale)
    commits.when_visible((1,), 1, waiters[0])
    commits.when_visible((1, 2), 1, waiters[1])
    assert [waiter.failure for waiter in waiters] == [TIMED_OUT] * 2
    with pytest.raises(TimedOutError):
        commits.check_room(1)
    assert not commits.shows_head(1)
    commits.check_readable((0, 2))
    other = world.write(2)
    world.end(shard=2)
    assert (other.body, commits.durable) == (b"durable", 2)
    commits.poke_drops(1)
    world.turns.run_all()
    assert not world.backends[1].asked


def test_a_missing_shard_joins() -> None:
    """From then on it is one of the others, behind what they have committed meanwhile."""
    world = World(2, missing=[1])
    world.write(0)
    world.end()
    seen: list[int] = []
    world.commits.on_durable = lambda: seen.append(world.commits.visible((0, 1)))
    world.join(1)
    assert seen == [2]
    assert (world.commits.queues[1].state, world.commits.shows_head(1)) == ("serving", True)
    world.commits.check_readable((0, 1))
    waiter = world.write(1)
    assert world.commits.visible((1,)) == 2
    world.end(shard=1)
    assert (waiter.body, world.commits.durable) == (b"durable", 3)


def test_a_shard_that_is_prepared_commits_and_shows_nothing_yet() -> None:
    """What is deleted before it joins is committed; nobody sees it before that."""
    world = World(2, missing=[1])
    backend = world.backends[1]
    fence = run_now(backend.open())
    world.commits.prepare(1, backend, fence)
    world.append(1)
    world.turns.run_all()
    world.append(1)
    assert world.commits.frontier((1,)) == 0
    with pytest.raises(TimedOutError):
        world.commits.check_room(1)
    for tip in (2, 3):
        world.end(shard=1)
        assert (world.commits.frontier((1,)), backend.disk.tip) == (0, tip)
    world.commits.join(1)
    assert world.commits.visible((1,)) == 3
    world.write(1)
    world.end(shard=1)
    assert backend.disk.tip == 4


def test_a_shard_that_is_known_to_be_away_is_refused_at_once() -> None:
    """New requests are refused, who waits goes on waiting, until its time is over or it is back."""
    world = World(2)
    waiting = world.write(1)
    world.turns.run_all()
    world.commits.lost(1, "connection refused")
    world.commits.lost(1, "connection refused again")
    with pytest.raises(TimedOutError):
        world.commits.check_room(1)
    assert world.ticket(0, 1).failure == TIMED_OUT
    assert (world.commits.queues[1].state, waiting.waits) == ("out", True)
    world.pass_time(3)
    world.commits.found(1)
    world.commits.check_room(1)
    assert world.told == [(1, "connection refused")]
    world.end(shard=1)
    assert waiting.body == b"durable"
    assert world.told[1:] == [(1, 3.0)]


def test_those_who_wait_for_a_shard_that_stays_away_are_told_in_time() -> None:
    """After the timeout of the commit under way, as if nobody had known; then it comes back."""
    world = World(2)
    waiting = world.write(1)
    world.end(UNKNOWN, shard=1)
    world.commits.lost(1, "connection refused")
    world.pass_time(5.25)
    assert waiting.failure == TIMED_OUT
    world.commits.found(1)
    with pytest.raises(TimedOutError):
        world.commits.check_room(1)
    world.backends[1].end(COMMITTED)
    world.commits.check_room(1)
    assert world.told == [(1, "connection refused"), (1, 5.25)]


def test_an_idle_shard_that_is_away() -> None:
    """Its keys are refused although nothing waits, but for readers that need not see the newest."""
    world = World(2)
    world.commits.lost(1, "connection refused")
    with pytest.raises(TimedOutError):
        world.commits.check_readable((0, 1))
    world.commits.check_readable((0, 1), stale=True)
    assert not world.commits.shows_head(1)
    assert world.ticket(1).failure == TIMED_OUT
    world.clock.advance(3)
    world.commits.lost(1, "connection refused again")
    world.clock.advance(4)
    world.commits.found(1)
    world.commits.found(1)
    world.commits.check_readable((0, 1))
    assert world.ticket(1).body == b"durable"
    assert world.told == [(1, "connection refused"), (1, 7.0)]


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("a row is gone", "broken: a row is gone"),
        ("broken: I/O error", "broken: I/O error"),
        ("fenced: epoch 7", "fenced: epoch 7"),
    ],
)
def test_a_shard_that_is_given_up(reason: str, told: str) -> None:
    """For good, whatever is said of it later; who took it is told apart from what broke it."""
    world = World(2)
    world.commits.give_up(1, reason)
    world.commits.give_up(1, "again")
    world.commits.lost(1, "away")
    assert world.broken == [(1, told)]
    queue = world.commits.queues[1]
    assert (queue.state, queue.fenced) == ("broken", told.startswith("fenced"))
    for stale in (False, True):
        with pytest.raises(StoppedError):
            world.commits.check_readable((0, 1), stale=stale)
    assert world.ticket(1).failure == STOPPED


# -- holds -----------------------------------------------------------------------------------------


def test_a_held_shard_takes_no_new_writes() -> None:
    """As often as it is held, it is let go; tickets and reads do not notice."""
    world = World(2)
    waiter = world.write(1)
    world.commits.hold((0, 1))
    world.commits.hold((1,))
    world.commits.unhold((0, 1))
    world.commits.check_room(0)
    with pytest.raises(HeldError):
        world.commits.check_room(1)
    world.commits.check_readable((1,))
    later = world.ticket(1)
    world.end(shard=1)
    assert (waiter.body, later.body) == (b"durable", b"durable")
    world.commits.unhold((1,))
    world.commits.check_room(1)


def test_a_held_shard_that_is_out_is_out() -> None:
    """Waiting for the end of the hold would be in vain."""
    world = World(2)
    world.commits.hold((1,))
    world.commits.lost(1, "away")
    with pytest.raises(TimedOutError):
        world.commits.check_room(1)
    assert world.settled(0, 1).failure == TIMED_OUT
    world.commits.found(1)
    with pytest.raises(HeldError):
        world.commits.check_room(1)


def test_shards_settle_when_nothing_is_uncommitted() -> None:
    """At once if that is so; else with the last of their batches."""
    world = World(3)
    assert world.settled(0, 1, 2).body == b""
    world.write(1)
    world.turns.run_all()
    world.write(1)
    world.write(2)
    world.commits.hold((1, 2))
    waiter = world.settled(1, 2)
    world.end(shard=2)
    world.end(shard=1)
    assert waiter.waits
    world.end(shard=1)
    assert waiter.body == b""
    assert world.commits.frontier((1, 2)) == NOTHING_PENDING


# -- leadership ------------------------------------------------------------------------------------


def test_without_home_s_lease_nothing_is_acknowledged_or_read() -> None:
    """Not even what was committed; who watches is told of it when the lease has been renewed."""
    world = World(2, leased=True)
    seen: list[int] = []
    world.commits.on_durable = lambda: seen.append(world.commits.durable)
    acknowledged = world.write(1)
    world.end(shard=1)
    assert (acknowledged.body, seen) == (b"durable", [2])
    late = world.write(1)
    world.turns.run_all()
    world.clock.advance(5)
    assert world.commits.lease_lapsed()
    world.end(shard=1)
    assert (late.failure, seen) == (TIMED_OUT, [2])
    assert world.ticket(0).failure == TIMED_OUT
    assert not world.commits.shows_head(0)
    with pytest.raises(TimedOutError):
        world.commits.check_readable((0,))
    world.commits.check_readable((0,), stale=True)
    world.commits.tick()
    assert seen == [2]
    world.renew()
    world.commits.tick()
    world.commits.tick()
    assert seen == [2, 3]
    world.commits.check_readable((0,))
    assert world.ticket(1).body == b"durable"
    assert world.commits.shows_head(1)


def test_a_lock_is_a_lease_without_end() -> None:
    """Nobody asks for the time."""
    world = World()
    assert not world.commits.leased
    world.clock.advance(1e9)
    assert not world.commits.lease_lapsed()


# -- reservation -----------------------------------------------------------------------------------


def test_nothing_is_committed_that_is_not_reserved() -> None:
    """The last reserved revision is; the one after it stops the process."""
    world = World(2)
    world.commits.reserved = 2
    world.write(1)
    world.end(shard=1)
    world.write(1)
    with pytest.raises(AssertionError, match="reserved"):
        world.turns.run_all()
