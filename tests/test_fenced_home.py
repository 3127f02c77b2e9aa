"""A home that is lost for good has lost its lease, too: another process may own all shards."""

import pytest

from kvstore.backend import Outcome
from kvstore.errors import TimedOutError
from tests.commit_world import TIMED_OUT, World


@pytest.mark.parametrize("outcome", [Outcome.FENCED, Outcome.BROKEN])
def test_the_other_shards_are_refused_at_once(outcome: Outcome) -> None:
    """Though the time of the last renewal runs: what is in memory may no longer be true, of no
    shard, and nothing more is told.
    """
    world = World(2, leased=True)
    seen: list[int] = []
    world.commits.on_durable = lambda: seen.append(world.commits.durable)
    late = world.write(1)
    world.turns.run_all()
    world.commits.check_readable((1,))
    world.commits.give_up(0, f"{outcome.value}: another server has taken it")
    assert not world.commits.shows_head(1)
    with pytest.raises(TimedOutError):
        world.commits.check_readable((1,))
    world.commits.check_readable((1,), stale=True)
    world.end(shard=1)
    world.commits.tick()
    assert (late.failure, seen) == (TIMED_OUT, [])
    assert world.ticket(1).failure == TIMED_OUT


def test_a_lock_outlasts_its_store() -> None:
    """Where home is held by a lock of the machine, nobody else can have taken the others."""
    world = World(2)
    world.commits.give_up(0, "a failed sync")
    world.commits.check_readable((1,))
    assert world.commits.shows_head(1)
    assert not world.commits.lease_lapsed()
