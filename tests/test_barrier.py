"""Requests over several shards: what they wait for, what waits for them, and for how long."""

import pytest

from kvstore.backend import RowId
from kvstore.barrier import LINE_STEP
from kvstore.config import CommitConfig
from kvstore.errors import StoppedError, TooManyRequestsError
from tests.barrier_world import Requests
from tests.commit_world import COMMITTED, NOT_COMMITTED, STOPPED, TIMED_OUT, revisions

A, B, C = 1, 2, 3
TOO_MANY = (TooManyRequestsError.code, TooManyRequestsError.text)


@pytest.fixture
def world() -> Requests:
    """Four shards with nothing uncommitted."""
    return Requests()


# -- one at a time ---------------------------------------------------------------------------------


def test_over_settled_shards_it_executes_at_once(world: Requests) -> None:
    """Nothing is uncommitted, so nobody waits; what home has pending does not matter."""
    world.send("home", 0)
    world.send("over", 0, A, B)
    assert (world.executed, world.held()) == (["home", "over"], [])
    world.settle()
    assert world.at_rest()


def test_it_waits_for_what_is_uncommitted(world: Requests) -> None:
    """It executes when the commit under way has returned, and not before."""
    world.send("a1", A)
    world.run()
    world.send("over", 0, A)
    assert (world.executed, world.held()) == (["a1"], [A])
    world.commit(A)
    assert (world.executed, world.held()) == (["a1", "over"], [])
    assert world.at_rest()


def test_writes_that_come_meanwhile_wait_and_run_in_order(world: Requests) -> None:
    """They execute behind it, in the order in which they came; other shards' at once."""
    world.send("a1", A)
    world.send("over", 0, A)
    for name in ("a2", "a3", "a4"):
        world.send(name, A)
    for shard in (0, B):
        world.send(f"other{shard}", shard)
    assert world.executed == ["a1", "other0", "other2"]
    world.commit(A)
    assert world.executed == ["a1", "other0", "other2", "over", "a2", "a3", "a4"]
    world.settle()
    assert [revisions(batch) for batch in world.backends[A].batches] == [[2], [5, 6, 7, 8]]
    assert world.at_rest()


def test_home_is_never_held(world: Requests) -> None:
    """What home has pending is committed before the record or with it."""
    world.send("home1", 0)
    world.send("a1", A)
    world.send("over", 0, A)
    world.send("home2", 0)
    world.commit(A)
    assert world.executed == ["home1", "a1", "home2", "over"]


def test_writers_wait_for_their_own_shard_and_not_for_a_slower_one(world: Requests) -> None:
    """B's commit hangs: A is let go as soon as it has settled. When B returns it is kept, and A is
    held again for as long as A needs.
    """
    for shard in (A, B):
        world.send(f"busy{shard}", shard)
    world.send("over", A, B)
    world.send("a1", A)
    assert world.held() == [A, B]
    world.commit(A)
    assert (world.executed[2:], world.held()) == (["a1"], [B])
    world.send("a2", A)
    assert world.executed[2:] == ["a1", "a2"]
    world.commit(B)
    assert (world.executed[2:], world.held()) == (["a1", "a2"], [A, B])
    world.send("a3", A)
    world.send("b1", B)
    world.settle(A)
    assert world.executed[2:] == ["a1", "a2", "over", "a3", "b1"]
    world.settle()
    assert world.at_rest()


def test_each_round_needs_one_shard_less(world: Requests) -> None:
    """However the writers go on, a request over three busy shards needs three rounds at most."""
    for shard in (A, B, C):
        world.send(f"busy{shard}", shard)
    world.send("over", A, B, C)
    rounds = 0
    while "over" not in world.executed:
        rounds += 1
        for shard in (A, B, C):
            world.send(f"more{shard}.{rounds}", shard)
            world.settle(shard)
    assert rounds <= 3
    world.settle()
    assert world.at_rest()


# -- what goes wrong -------------------------------------------------------------------------------


def test_past_its_time_it_is_refused_and_nothing_was_done(world: Requests) -> None:
    """The writes behind it then go on."""
    world.send("a1", A)
    world.send("over", 0, A)
    world.send("a2", A)
    world.run()
    world.pass_time(0.9)
    assert (world.executed, world.refused) == (["a1"], {})
    world.pass_time(0.2)
    assert (world.executed, world.refused) == (["a1", "a2"], {"over": TIMED_OUT})
    world.settle()
    assert world.at_rest()


def test_what_was_kept_for_it_is_let_go(world: Requests) -> None:
    """Also when others wait for the same shards: A's writers go before them."""
    for shard in (A, B):
        world.send(f"busy{shard}", shard)
    world.send("over", A, B)
    world.commit(B)
    world.send("b1", B)
    world.commit(A)
    world.send("a1", A)
    assert (world.executed[2:], world.held()) == (["b1"], [A, B])
    world.pass_time(0.6)
    world.send("later", A, B)
    assert (world.executed[2:], world.refused) == (["b1"], {})
    world.pass_time(0.5)
    assert (world.executed[2:], world.refused) == (["b1", "a1"], {"over": TIMED_OUT})
    world.settle()
    assert world.executed[2:] == ["b1", "a1", "later"]
    assert world.at_rest()


def test_a_shard_that_is_out_refuses_at_once(world: Requests) -> None:
    """Home, too, which would have to take the record; and nobody is held."""
    for shard in (A, 0):
        world.commits.lost(shard, "gone")
        world.send(f"over{shard}", A, B)
        world.send("none", B)
        assert world.refused.pop(f"over{shard}") == TIMED_OUT
        assert world.executed.pop() == "none"
        world.commits.found(shard)
    world.settle()
    assert world.at_rest()


def test_a_shard_that_is_out_refuses_at_once_also_behind_a_hold(world: Requests) -> None:
    """A is held for another one; B has nothing uncommitted and is out of reach."""
    world.send("a1", A)
    world.send("over", 0, A)
    world.commits.lost(B, "gone")
    world.send("lost", A, B)
    assert world.refused == {"lost": TIMED_OUT}
    world.settle()
    assert (world.executed, world.at_rest()) == (["a1", "over"], True)


def test_a_shard_that_goes_out_meanwhile() -> None:
    """Its commit hangs for too long: those who wait are refused, the other shards go on; when it
    is back, requests over it execute again.
    """
    world = Requests(config=CommitConfig(shard_timeout=0.5))
    for shard in (A, B):
        world.send(f"busy{shard}", shard)
    world.send("over", A, B)
    for name, shard in (("a1", A), ("b1", B)):
        world.send(name, shard)
    world.settle(A)
    world.pass_time(0.6)
    assert world.refused == {"over": TIMED_OUT, "b1": TIMED_OUT}
    assert world.executed[2:] == ["a1"]
    assert world.held() == []
    world.send("again", A, B)
    assert world.refused.pop("again") == TIMED_OUT
    world.settle()
    world.send("again", A, B)
    assert world.executed[3:] == ["again"]
    world.settle()
    assert world.at_rest()


def test_a_shard_that_is_known_to_be_out_meanwhile(world: Requests) -> None:
    """A kept shard is lost before the others have settled: refused when its turn comes."""
    world.send("a1", A)
    world.send("b1", B)
    world.send("over", A, B)
    world.commit(A)
    world.send("a2", A)
    world.commit(B)
    world.commits.lost(B, "gone")
    world.send("b2", B)
    assert world.refused == {"b2": TIMED_OUT}
    world.settle(A)
    assert world.refused == {"b2": TIMED_OUT, "over": TIMED_OUT}
    assert (world.executed, world.held()) == (["a1", "b1", "a2"], [])
    world.commits.found(B)
    assert world.at_rest()


def test_a_shard_that_is_given_up_meanwhile(world: Requests) -> None:
    """Who waits for it is told that the server stopped; those of other shards go on."""
    for shard in (A, B):
        world.send(f"busy{shard}", shard)
    world.send("over", A, B)
    world.send("a1", A)
    world.send("b1", B)
    world.commits.give_up(B, "torn")
    assert world.refused == {"over": STOPPED, "b1": STOPPED}
    assert world.executed[2:] == ["a1"]
    world.settle(A)
    assert world.at_rest()


def test_commits_that_are_refused_for_a_while(world: Requests) -> None:
    """A full disk: the barrier waits as for any commit, within its time."""
    world.send("a1", A)
    world.send("over", 0, A)
    world.run()
    for _ in range(3):
        world.backends[A].end(NOT_COMMITTED)
        world.pass_time(0.11)
    world.settle()
    assert world.executed == ["a1", "over"]
    assert world.at_rest()


class Leftovers:
    """Rows that a compaction goes on leaving."""

    def __init__(self) -> None:
        self.rows = 100

    def take(self, rows: int) -> list[RowId]:
        """One more."""
        self.rows -= 1
        return [(1, self.rows)] if self.rows > 0 else []


def test_rows_that_compaction_drops_are_not_waited_for(world: Requests) -> None:
    """They are no changes: a shard that is busy with nothing else has settled."""
    world.commits.queues[A].drops = Leftovers()
    world.send("a1", A)
    world.send("over", 0, A)
    world.send("a2", A)
    world.commit(A)
    assert world.executed == ["a1", "over", "a2"]


# -- many at a time --------------------------------------------------------------------------------


def test_requests_whose_shards_have_settled_execute_together(world: Requests) -> None:
    """A hundred that wait for the same shards need not settle them a hundred times."""
    for shard in (A, B):
        world.send(f"busy{shard}", shard)
    for n in range(100):
        world.send(f"over{n}", *((A, B), (0, A, B))[n % 2])
    world.settle(A, B)
    assert world.executed[2:] == [f"over{n}" for n in range(100)]
    world.settle()
    assert world.at_rest()
    for shard in (0, A, B):
        assert len(world.backends[shard].batches) <= 4
    assert not world.backends[0].disk.redo


def test_a_change_without_a_record_is_waited_for(world: Requests) -> None:
    """Nothing is pending on home, so that the change of one shard alone needs no record; but what
    rests on it must not be recorded before it is durable.
    """
    world.send("busy", A)
    world.send("guard", A, B, changes=A)
    world.send("rests", A, B, changes=B)
    world.send("over", A, C)
    world.commit(A)
    assert world.executed == ["busy", "guard"]
    assert not world.backends[0].asked
    world.commit(A)
    assert world.executed == ["busy", "guard", "rests", "over"]
    world.settle()
    assert world.at_rest()


def test_they_do_not_wait_for_those_of_other_shards(world: Requests) -> None:
    """B hangs: what is over A and C executes although it came later than what waits for B."""
    for shard in (A, B, C):
        world.send(f"busy{shard}", shard)
    world.send("slow", A, B)
    world.send("quick", A, C)
    world.settle(A, C)
    assert world.executed[3:] == ["quick"]
    world.settle()
    assert world.executed[3:] == ["quick", "slow"]
    assert world.at_rest()


def test_an_earlier_one_is_not_put_off_by_later_ones(world: Requests) -> None:
    """What it keeps is its own until it has executed; those that want it wait and hold nothing."""
    for shard in (A, B, C):
        world.send(f"busy{shard}", shard)
    world.send("first", A, B)
    world.commit(A)
    world.send("a1", A)
    world.commit(B)
    assert world.held() == [A, B]
    world.send("later", B, C)
    assert world.held() == [A, B]
    world.settle(A)
    assert world.executed[3:] == ["a1", "first"]
    world.settle()
    assert world.executed[3:] == ["a1", "first", "later"]
    assert world.at_rest()


def test_writers_have_their_turn_between_endless_requests_over_their_shard(
    world: Requests,
) -> None:
    """Each one that executes lets those run who came before, whoever holds the shard next."""
    world.send("busy", A)
    for n in range(20):
        world.send(f"over{n}", 0, A)
        world.send(f"write{n}", A)
        world.send(f"over{n}+", 0, A)
        world.settle(A)
        world.settle(0)
        assert f"write{n}" in world.executed
    world.settle()
    assert world.at_rest()


def test_a_line_runs_between_two_requests_that_hold_its_shard(world: Requests) -> None:
    """The second one keeps A when the first one executes over it: A's writers go in between."""
    for shard in (A, B, C):
        world.send(f"busy{shard}", shard)
    world.send("first", A, C)
    world.send("second", A, B)
    world.send("a1", A)
    world.commit(B)
    world.send("b1", B)
    world.commit(A)
    assert (world.executed[3:], world.held()) == (["b1"], [A, B, C])
    world.commit(C)
    assert world.executed[3:] == ["b1", "first", "a1"]
    assert A in world.held()
    world.settle()
    assert world.executed[3:] == ["b1", "first", "a1", "second"]
    assert world.at_rest()


def test_a_long_line_runs_in_pieces(world: Requests) -> None:
    """Other work has its turn in between; those who come then queue up behind."""
    world.send("busy", A)
    world.send("over", 0, A)
    names = [f"a{n}" for n in range(3 * LINE_STEP)]
    for name in names:
        world.send(name, A)
    world.turns.run_all()
    world.backends[A].end(COMMITTED)
    assert len(world.executed) == 2 + LINE_STEP
    assert world.held() == [A]
    world.send("last", A)
    world.send("next", 0, A)
    world.run()
    assert world.executed == ["busy", "over", *names]
    world.settle()
    assert world.executed == ["busy", "over", *names, "next", "last"]
    assert world.at_rest()


# -- bounds ----------------------------------------------------------------------------------------


def test_who_waits_is_bounded_in_number() -> None:
    """Over several shards, and in the line of each shard for itself."""
    world = Requests(config=CommitConfig(barrier_requests_max=2, held_requests_max=2))
    for shard in (A, B):
        world.send(f"busy{shard}", shard)
    for n in range(3):
        world.send(f"over{n}", A, B)
    assert world.refused == {"over2": TOO_MANY}
    for n in range(3):
        for shard in (A, B):
            world.send(f"write{n}@{shard}", shard)
    del world.refused["over2"]
    assert world.refused == {f"write2@{shard}": TOO_MANY for shard in (A, B)}
    world.settle()
    assert world.at_rest()


def test_who_waits_is_bounded_in_bytes() -> None:
    """One may be as large as it is; the next has to find less than the bound."""
    world = Requests(config=CommitConfig(held_bytes_max=10))
    for shard in (A, B):
        world.send(f"busy{shard}", shard)
    for n in range(2):
        world.send(f"over{n}", A, B, size=100)
        world.send(f"write{n}", A, size=10)
    assert world.refused == {"over1": TOO_MANY, "write1": TOO_MANY}
    world.settle()
    assert world.at_rest()


# -- a stop ----------------------------------------------------------------------------------------


def test_nobody_waits_any_more_when_writes_are_barred(world: Requests) -> None:
    """Whoever waited for a turn, or behind others, is refused, and so is who comes later; what
    holds a shard is over, and its commit executes nothing.
    """
    world.send("busy", A)
    world.send("over", 0, A)
    world.send("later", A, B)
    world.send("behind", A)
    world.commits.bar(StoppedError)
    world.barrier.close()
    world.send("late", A)
    world.send("late over", 0, A)
    world.settle()
    assert world.executed == ["busy"]
    assert world.refused == dict.fromkeys(["over", "later", "behind", "late", "late over"], STOPPED)
    assert world.at_rest()
