"""Revisions over several shards: their commit point on home, what waits for it, and crashes at any
step around it.
"""

from collections.abc import Iterator

import pytest

from backends.memory import MemoryBackend, MemoryDisk, Steps, at_once
from kvstore.backend import Batch, Fence, Outcome, Row
from kvstore.clock import ManualClock
from kvstore.commit import NOTHING_PENDING, Commits
from kvstore.config import CommitConfig
from kvstore.opening import Opened, open_shards
from kvstore.shard_config import RouteSpec, ShardConfig, ShardSpec
from tests.commit_world import COMMITTED, NOT_COMMITTED, TIMED_OUT, UNKNOWN, World, revisions
from tests.engine import Waiter
from tests.stack import run_now

NAMES = ("core", "events", "agents")


def redo_of(batch: Batch) -> list[tuple[str, int]]:
    """The redo record that a batch carries: (shard, revision)."""
    return [(shard, row[0]) for shard, row in batch.redo]


# -- the commit point ------------------------------------------------------------------------------


def test_parts_wait_for_the_commit_point() -> None:
    """Home stores all of it, then the others their parts, first of all; then the record is dropped
    and whoever holds a ticket of all is answered.
    """
    world = World(3)
    home, one, two = world.backends
    revision = world.append_over(0, 1, 2)
    waiter = world.ticket(0, 1, 2)
    world.turns.run_all()
    assert not one.asked
    assert not two.asked
    (batch,) = home.batches
    assert (revisions(batch), redo_of(batch), batch.tip) == ([2], [("1", 2), ("2", 2)], revision)
    assert [row[:2] for _, row in batch.redo] == [(2, 1), (2, 2)]
    assert world.commits.frontier((0, 1, 2)) == 1
    world.end()
    assert (world.commits.durable, world.commits.visible((0,))) == (2, 2)
    assert world.commits.visible((1, 2)) == 1
    world.end(shard=2)
    assert home.disk.redo
    assert waiter.waits
    assert not home.asked
    world.end(shard=1)
    assert waiter.body == b"durable"
    world.end()
    assert home.batches[-1].redo_drops == [2]
    assert (home.disk.redo, world.commits.idle()) == ([], True)
    assert [list(disk.disk.rows) for disk in world.backends] == [[(2, 0)], [(2, 1)], [(2, 2)]]


def test_home_needs_no_part() -> None:
    """Its tip moves to the revision all the same; its frontier stays where it is."""
    world = World(3)
    world.append_over(1, 2)
    assert world.commits.frontier((0,)) == NOTHING_PENDING
    world.end()
    assert (world.backends[0].disk.tip, world.commits.durable) == (2, 2)
    assert [row[0] for _, row in world.backends[0].disk.redo] == [2, 2]
    world.end(shard=1)
    world.end(shard=2)
    world.end()
    assert world.backends[0].disk.redo == []


def test_home_s_own_changes_are_before_the_record_or_in_its_batch() -> None:
    """A record may rest on what home has not committed yet."""
    world = World(2)
    world.append(0)
    world.append_over(0, 1)
    world.append(0)
    world.end()
    (batch,) = world.backends[0].batches
    assert (revisions(batch), redo_of(batch), batch.tip) == ([2, 3, 4], [("1", 3)], 4)


@pytest.mark.parametrize("busy", [True, False])
def test_rows_of_one_shard_alone(busy: bool) -> None:  # noqa: FBT001
    """Decided over several shards, they need a record only while home has something that they may
    rest on.
    """
    world = World(2)
    if busy:
        world.append_leases(put=True)
    world.append_over(1)
    world.turns.run_all()
    assert bool(world.backends[1].asked) is not busy
    if busy:
        world.end()
    world.end(shard=1)
    assert world.commits.durable == world.revision


def test_writes_behind_a_part_ride_along() -> None:
    """They are in its batch, behind it, and wait for the same commit point."""
    world = World(2)
    world.append_over(0, 1)
    waiter = world.write(1)
    world.turns.run_all()
    assert not world.backends[1].asked
    world.end()
    world.end(shard=1)
    assert waiter.body == b"durable"
    assert [revisions(batch) for batch in world.backends[1].batches] == [[2, 3]]


@pytest.mark.parametrize("outcome", [NOT_COMMITTED, UNKNOWN])
def test_parts_wait_until_the_commit_point_is_known(outcome: Outcome) -> None:
    """However often home must try or ask."""
    world = World(2)
    world.append_over(0, 1)
    world.end(outcome)
    for _ in range(3):
        world.pass_time(0.2)
        world.turns.run_all()
        assert not world.backends[1].asked
        world.backends[0].end(outcome)
    world.pass_time(0.2)
    world.backends[0].end(COMMITTED)
    world.end(shard=1)
    assert world.commits.durable == 2


def test_several_records_in_one_batch() -> None:
    """Each is dropped when all have its parts."""
    world = World(3)
    world.append_over(0, 1)
    world.append_over(1, 2)
    world.append_over(0, 2)
    world.end()
    (batch,) = world.backends[0].batches
    assert redo_of(batch) == [("1", 2), ("1", 3), ("2", 3), ("2", 4)]
    world.end(shard=1)
    world.end()
    assert world.backends[0].batches[-1].redo_drops == [2]
    world.end(shard=2)
    world.end()
    assert world.backends[0].batches[-1].redo_drops == [3, 4]
    assert world.backends[0].disk.redo == []


def test_a_part_waits_for_the_last_of_its_records() -> None:
    """Parts of two records in one batch, and the second record is not committed yet."""
    world = World(2, config=CommitConfig(batch_rows_max=3))
    world.append_over(0, 1)
    world.append(0)
    world.append_over(0, 1)
    world.end()
    assert [row[0] for _, row in world.backends[0].disk.redo] == [2]
    world.turns.run_all()
    assert not world.backends[1].asked
    world.end()
    world.end(shard=1)
    assert [revisions(batch) for batch in world.backends[1].batches] == [[2, 4]]


def test_home_is_full_of_records() -> None:
    """They count for its limits, and are taken out again."""
    world = World(2)
    queue = world.commits.queues[0]
    world.append_over(0, 1)
    assert (queue.rows, queue.size) == (2, 20)
    world.end()
    assert (queue.rows, queue.size) == (0, 0)
    world.end(shard=1)
    assert (world.commits.queues[1].rows, world.commits.queues[1].size) == (0, 0)


def test_who_waits_for_a_part_is_told_when_home_hangs() -> None:
    """The shard is refused while its first batch waits for home, and comes back with it."""
    world = World(2)
    world.append_over(0, 1)
    waiter = world.ticket(1)
    world.turns.run_all()
    world.pass_time(4.9)
    assert waiter.waits
    world.pass_time(0.2)
    assert waiter.failure == TIMED_OUT
    assert [queue.state for queue in world.commits.queues] == ["out", "out"]
    world.end()
    world.end(shard=1)
    assert [queue.state for queue in world.commits.queues] == ["serving", "serving"]


# -- crashes ---------------------------------------------------------------------------------------


class Life:
    """One process over three disks, which writes over several shards and each alone, and dies after
    so many steps.
    """

    def __init__(self, disks: list[MemoryDisk]) -> None:
        self.disks = disks
        self.steps = Steps()
        self.backends = [MemoryBackend(disk, later=self.steps) for disk in disks]
        fences: list[Fence] = [run_now(backend.open()) for backend in self.backends]
        self.commits = Commits(
            list(zip(self.backends, fences, strict=True)),
            clock=ManualClock(),
            config=CommitConfig(batch_rows_max=2),
            call_soon=self.steps,
            call_later=lambda _, step: self.steps(step),
        )
        self.revision = self.commits.durable
        self.written: dict[int, dict[int, list[Row]]] = {}
        self.waiters: dict[int, Waiter] = {}

    def write(self, *shards: int) -> None:
        """One revision, with a row on each."""
        self.revision += 1
        parts: dict[int, list[Row]] = {
            shard: [(self.revision, sub, b"%d" % shard, self.revision, 1, 0, b"v")]
            for sub, shard in enumerate(shards)
        }
        self.commits.append_over(self.revision, parts, 10)
        self.written[self.revision] = parts
        waiter = self.waiters[self.revision] = Waiter()
        self.commits.release(shards, waiter, b"")

    def run(self) -> Iterator[int]:
        """Everything, a step at a time; yields after each."""
        self.write(0, 1, 2)
        self.write(1, 2)
        self.write(1)
        count = 0
        later = [(0, 2), (0, 1, 2), (2,)]
        while self.steps.run_next():
            count += 1
            settled = self.commits.frontier((1, 2)) == NOTHING_PENDING
            if later and settled:
                self.write(*later.pop(0))
            yield count

    def crash(self) -> None:
        """Die."""
        for backend in self.backends:
            backend.crash()


def has(disk: MemoryDisk, rows: list[Row]) -> bool:
    """Are all of ``rows`` there?"""
    found = {(row[0], row[1]) in disk.rows for row in rows}
    assert len(found) == 1, "rows of one revision on one shard are one"
    return found.pop()


CONFIG = ShardConfig(
    [ShardSpec(name, "memory:") for name in NAMES],
    [RouteSpec(b"1", "events"), RouteSpec(b"2", "agents")],
)


async def reopen(disks: list[MemoryDisk]) -> Opened:
    """The next start, which ends as soon as it has taken the shards."""
    backends = [MemoryBackend(disk, later=at_once) for disk in disks]
    opened = await open_shards(backends, CONFIG)
    for backend in backends:
        backend.crash()
    return opened


def new_disks() -> list[MemoryDisk]:
    """Three shards that know one another, with revisions reserved."""
    home = MemoryDisk(shard=NAMES[0], shard_map=CONFIG.document(), reserved=1_000)
    return [home, *(MemoryDisk(shard=name, epoch=1) for name in NAMES[1:])]


def check_all_or_nothing(life: Life) -> set[bool]:
    """Each revision is on all its shards that are there or on none; which of both there are."""
    outcomes: set[bool] = set()
    for revision, parts in life.written.items():
        there = {shard: rows for shard, rows in parts.items() if life.disks[shard].reachable}
        found = {has(life.disks[shard], rows) for shard, rows in there.items()}
        assert len(found) <= 1, f"all of {revision} or nothing"
        if life.waiters[revision].body is not None:
            assert False not in found, f"{revision} was acknowledged"
        outcomes |= found
    return outcomes


@pytest.mark.slow
@pytest.mark.parametrize("away", [None, 1, 2])
async def test_a_crash_at_any_step_leaves_all_or_nothing(away: int | None) -> None:
    """Whatever the step after which the process dies, and whether or not a shard is missing at the
    next start: after it all of a revision is there or nothing, what was acknowledged is, what is
    missing comes when its shard is back, and nothing is issued again.
    """
    steps = sum(1 for _ in Life(new_disks()).run())
    assert steps > 20
    outcomes: set[bool] = set()
    for last in range(1, steps + 1):
        life = Life(new_disks())
        next(count for count in life.run() if count == last)
        life.crash()
        home, tip = life.disks[0], max(disk.tip for disk in life.disks)
        if away is not None:
            life.disks[away].reachable = False
            opened = await reopen(life.disks)
            assert opened.fences[0].tip >= tip
            outcomes |= check_all_or_nothing(life)
            owed = {row[0] for rows in opened.redo.values() for row in rows}
            assert {row[0] for _, row in home.redo} == owed, "what is owed is kept, and no more"
            life.disks[away].reachable = True
        opened = await reopen(life.disks)
        assert opened.fences[0].tip >= tip
        outcomes |= check_all_or_nothing(life)
        assert home.redo == [], "what all have is dropped"
    assert outcomes == {True, False}
