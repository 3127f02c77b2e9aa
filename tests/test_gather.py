"""After a commit that answered many, the next one waits a moment for them to form one batch."""

import pytest

from kvstore.config import CommitConfig
from tests.commit_world import NOT_COMMITTED, World, revisions

INTERVAL = 0.25


@pytest.fixture
def world() -> World:
    """One shard; eight answers are many."""
    return World(config=CommitConfig(gather_waiters_min=8, gather_interval=INTERVAL))


def write(world: World, count: int) -> None:
    """So many clients write, and the turn ends."""
    for _ in range(count):
        world.write()
    world.turns.run_all()


def batches(world: World) -> list[int]:
    """How many rows each commit had so far."""
    return [len(revisions(batch)) for batch in world.backends[0].batches]


def test_those_who_were_answered_form_one_batch(world: World) -> None:
    """The next commit starts once most of those answered or waiting wait again, without a timer."""
    write(world, 10)
    write(world, 6)
    world.end()
    assert batches(world) == [10]
    write(world, 7)
    assert batches(world) == [10]
    write(world, 1)
    assert batches(world) == [10, 14]
    assert [seconds for seconds, _ in world.timers] == [INTERVAL]
    world.end()
    assert world.commits.idle()


def test_gathering_has_an_end(world: World) -> None:
    """Those who wait are committed after the interval though nobody joined them."""
    write(world, 10)
    write(world, 1)
    world.end()
    assert batches(world) == [10]
    world.timers.pop()[1]()
    assert batches(world) == [10, 1]


def test_gathering_ends_with_nobody(world: World) -> None:
    """Nobody comes: nothing is committed, and who comes after the interval does not wait."""
    write(world, 10)
    world.end()
    world.timers.pop()[1]()
    assert batches(world) == [10]
    write(world, 1)
    assert batches(world) == [10, 1]


def test_a_timer_that_is_late_ends_no_other_gathering(world: World) -> None:
    """The timer of a gathering that reached its number means nothing to the next one."""
    write(world, 10)
    world.end()
    write(world, 9)
    world.end()
    write(world, 1)
    late, due = (step for _, step in world.timers)
    late()
    assert batches(world) == [10, 9]
    due()
    assert batches(world) == [10, 9, 1]


@pytest.mark.parametrize("waiting", [0, 3, 60])
def test_few_never_wait(world: World, waiting: int) -> None:
    """Nobody is held back after a commit that answered few, nor when enough wait already."""
    answered = 7 if waiting < 60 else 8
    write(world, answered)
    write(world, waiting)
    world.end()
    assert batches(world) == [answered] + [waiting] * bool(waiting)
    assert world.timers == []


def test_rows_that_nobody_waits_for_do_not_count(world: World) -> None:
    """One client that writes many keys at once is not many clients."""
    world.append(rows=100)
    world.ticket(0)
    world.end()
    write(world, 1)
    assert batches(world) == [100, 1]


def test_a_retry_is_not_held_back(world: World) -> None:
    """Only a commit that succeeded answers anyone."""
    write(world, 10)
    world.end(NOT_COMMITTED)
    world.pass_time(1.0)
    assert batches(world) == [10, 10]
    assert world.timers == []
