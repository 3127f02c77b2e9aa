"""After a commit that answered many, the next one waits a moment for them to form one batch."""

import pytest

from kvstore.config import CommitConfig
from tests.commit_world import NOT_COMMITTED, World, revisions

INTERVAL = 0.25


@pytest.fixture
def world() -> World:
    """One shard; eight answers are many."""
    return World(config=CommitConfig(gather_waiters_min=8, gather_interval=INTERVAL))


def write(world: World, count: int, shard: int = 0) -> None:
    """So many clients write, and the turn ends."""
    for _ in range(count):
        world.write(shard)
    world.turns.run_all()


def pass_interval(world: World) -> None:
    """The oldest timer runs out, and the turn ends."""
    world.timers.pop(0)[1]()
    world.turns.run_all()


def batches(world: World, shard: int = 0) -> list[int]:
    """How many rows each commit had so far."""
    return [len(revisions(batch)) for batch in world.backends[shard].batches]


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
    pass_interval(world)
    assert batches(world) == [10, 1]
    assert world.timers == []


def test_gathering_ends_with_nobody(world: World) -> None:
    """Nobody comes: nothing is committed, and who comes after the interval does not wait."""
    write(world, 10)
    world.end()
    pass_interval(world)
    assert batches(world) == [10]
    write(world, 1)
    assert batches(world) == [10, 1]


def test_a_timer_that_is_late_ends_no_other_gathering(world: World) -> None:
    """The timer of a gathering that reached its number means nothing to the next one."""
    write(world, 10)
    world.end()
    write(world, 9)
    world.end()
    pass_interval(world)
    write(world, 1)
    assert batches(world) == [10, 9]
    pass_interval(world)
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


@pytest.fixture
def three() -> World:
    """Three shards; eight answers are many for each."""
    return World(3, config=CommitConfig(gather_waiters_min=24, gather_interval=INTERVAL))


def test_shards_that_answered_start_together(three: World) -> None:
    """All are held until most of all who were answered are there, on whichever shard."""
    for shard in range(3):
        write(three, 8, shard)
    for shard in range(3):
        three.end(shard=shard)
    write(three, 15, 0)
    write(three, 5, 1)
    assert [batches(three, shard) for shard in range(3)] == [[8], [8], [8]]
    write(three, 1, 2)
    assert [batches(three, shard) for shard in range(3)] == [[8, 15], [8, 5], [8, 1]]
    assert [seconds for seconds, _ in three.timers] == [INTERVAL]


def test_whoever_goes_on_elsewhere_is_counted(three: World) -> None:
    """The awaited come to a shard that is not held; the held one starts."""
    write(three, 8, 0)
    three.end(shard=0)
    write(three, 1, 0)
    write(three, 5, 1)
    assert batches(three, 0) == [8]
    assert batches(three, 1) == [5]
    write(three, 1, 1)
    assert batches(three, 0) == [8, 1]


def test_a_shard_with_few_is_not_held(three: World) -> None:
    """Its clients do not wait for the many of another."""
    write(three, 8, 0)
    write(three, 7, 1)
    three.end(shard=0)
    three.end(shard=1)
    write(three, 1, 1)
    assert batches(three, 1) == [7, 1]
    assert batches(three, 0) == [8]


def test_nobody_waits_for_a_shard_that_hangs(three: World) -> None:
    """Its clients have not been answered, and are not awaited."""
    write(three, 100, 1)
    write(three, 8, 0)
    three.end(shard=0)
    write(three, 7, 0)
    assert batches(three, 0) == [8, 7]


def test_a_broken_shard_that_was_held_is_left_alone(three: World) -> None:
    """Nothing of it is committed when the gathering ends, and the others go on."""
    for shard in range(2):
        write(three, 8, shard)
    for shard in range(2):
        three.end(shard=shard)
    write(three, 1, 1)
    three.commits.give_up(1, "unreadable")
    write(three, 13, 0)
    assert batches(three, 0) == [8, 13]
    assert batches(three, 1) == [8]


def test_many_shards_have_no_smaller_part_than_a_quarter() -> None:
    """One client on one of many shards is not many."""
    many = World(20, config=CommitConfig(gather_waiters_min=16, gather_interval=INTERVAL))
    for answered, held in ((3, False), (4, True)):
        write(many, answered, 5)
        many.end(shard=5)
        write(many, 1, 5)
        assert (len(many.timers) > 0) is held
        if not held:
            many.end(shard=5)
