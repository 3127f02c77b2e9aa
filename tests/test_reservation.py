"""What home knows of all shards: revisions reserved in time, tips recorded, and a clean stop."""

import pytest

from kvstore.backend import ShardRecord
from kvstore.errors import StoppedError, TimedOutError
from kvstore.reservation import AHEAD, Reservation
from tests.commit_world import NOT_COMMITTED, World
from tests.engine import Waiter

INTERVAL = 5.0


class Kept:
    """A world of three shards and its reservation."""

    def __init__(self, *, missing: tuple[int, ...] = (), reserved: int = 1 + AHEAD) -> None:
        self.world = World(3, missing=missing)
        self.home = self.world.backends[0]
        self.reservation = Reservation(
            self.world.commits,
            self.world.clock,
            reserved=reserved,
            records=[ShardRecord("1", 1, ""), ShardRecord("2", 1, "")],
            record_interval=INTERVAL,
        )

    def tick(self, seconds: float = 0.1) -> None:
        """Time goes by, and the turn ends."""
        self.world.clock.advance(seconds)
        self.reservation.tick()
        self.world.turns.run_all()

    def issue(self, revision: int, shard: int = 1) -> None:
        """Write ``revision``, durably."""
        self.world.revision = revision - 1
        self.world.write(shard)
        self.world.end(shard=shard)


@pytest.fixture
def kept() -> Kept:
    """All there."""
    return Kept()


def test_more_is_reserved_when_half_is_used_up(kept: Kept) -> None:
    """Once, and in force when it is durable."""
    kept.issue(1 + AHEAD // 2)
    kept.tick()
    assert not kept.home.asked
    kept.issue(2 + AHEAD // 2)
    for _ in range(3):
        kept.tick()
    reserved = 2 + AHEAD // 2 + AHEAD
    (batch,) = kept.home.batches
    assert batch.reserved == reserved
    assert kept.world.commits.reserved == 1 + AHEAD
    kept.world.end()
    assert (kept.world.commits.reserved, kept.home.disk.reserved) == (reserved, reserved)
    kept.tick()
    assert not kept.home.asked


def test_what_is_not_durable_counts_as_issued(kept: Kept) -> None:
    """It may become so at any time."""
    kept.world.revision = AHEAD - 1
    kept.world.write(2)
    kept.tick()
    assert kept.home.batches[-1].reserved == 2 * AHEAD


def test_a_reservation_is_stored_however_often_that_fails(kept: Kept) -> None:
    """Nothing above the old one is committed before."""
    kept.issue(AHEAD)
    kept.tick()
    kept.home.end(NOT_COMMITTED)
    kept.world.write(1)
    kept.world.end(shard=1)
    kept.world.write(1)
    with pytest.raises(AssertionError, match="reserved"):
        kept.world.turns.run_all()
    kept.world.pass_time(0.2)
    kept.world.end()
    assert kept.world.commits.reserved == 2 * AHEAD


def test_writes_are_refused_when_home_is_out_for_too_long(kept: Kept) -> None:
    """Everything but a little is used up: nothing is issued until home has stored that more may
    be; then it goes on.
    """
    commits = kept.world.commits
    kept.issue(2 + AHEAD * 3 // 4)
    commits.check_room(1)
    kept.tick()
    for shard in range(3):
        with pytest.raises(TimedOutError):
            commits.check_room(shard)
    kept.home.end(NOT_COMMITTED)
    kept.tick()
    with pytest.raises(TimedOutError):
        commits.check_room(1)
    kept.world.pass_time(0.2)
    kept.world.end()
    kept.tick()
    for shard in range(3):
        commits.check_room(shard)


def test_tips_are_recorded_now_and_then(kept: Kept) -> None:
    """Those that have changed, and as far as they are durable; home's is its own."""
    kept.issue(2, shard=1)
    kept.issue(3, shard=0)
    kept.world.append(2)
    kept.tick(INTERVAL - 1)
    assert len(kept.home.batches) == 1
    kept.tick(1)
    assert kept.home.batches[-1].records == {"1": ShardRecord("1", 2, "")}
    kept.world.end()
    kept.world.end(shard=2)
    kept.tick(INTERVAL)
    assert kept.home.batches[-1].records == {"2": ShardRecord("2", 4, "")}
    kept.world.end()
    kept.tick(INTERVAL)
    assert not kept.home.asked
    assert kept.home.disk.records == {"1": ShardRecord("1", 2, ""), "2": ShardRecord("2", 4, "")}


def test_a_database_that_was_taken_over_is_recorded(kept: Kept) -> None:
    """By a copy that lacks nothing, as its backend has found: the next start must know it."""
    kept.world.backends[1].disk.origin = "timeline 2"
    kept.tick(INTERVAL)
    assert kept.home.batches[-1].records == {"1": ShardRecord("1", 1, "timeline 2")}


def test_a_missing_shard_keeps_its_record() -> None:
    """Nobody has seen it since."""
    kept = Kept(missing=(1,))
    kept.issue(2, shard=2)
    kept.tick(INTERVAL)
    assert list(kept.home.batches[-1].records) == ["2"]


def test_nothing_is_recorded_on_a_home_that_is_out(kept: Kept) -> None:
    """It would only pile up."""
    kept.issue(2)
    kept.world.commits.lost(0, "away")
    kept.tick(INTERVAL)
    assert kept.world.commits.idle()
    kept.world.commits.found(0)
    kept.tick()
    assert kept.home.asked


def test_a_clean_stop_takes_back_what_was_not_used(kept: Kept) -> None:
    """The last one issued is stored, durable or not, with all tips; nothing more is reserved."""
    kept.issue(7)
    kept.world.append(2)
    waiter = Waiter()
    kept.world.commits.bar(StoppedError)
    kept.reservation.end(waiter)
    kept.world.turns.run_all()
    assert waiter.waits
    kept.world.end()
    assert waiter.body == b""
    assert (kept.home.disk.reserved, kept.home.disk.records["1"].tip) == (8, 7)
    kept.tick(INTERVAL)
    assert not kept.home.asked
