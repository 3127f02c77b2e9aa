"""Group commit, frontiers and tickets, with each commit ended by hand in any way it can end."""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstore.answers import Refusal, Then
from kvstore.backend import LeaseRow, Outcome, RowId
from kvstore.commit import NOTHING_PENDING
from kvstore.config import CommitConfig
from kvstore.errors import (
    CompactedError,
    StoppedError,
    StoreError,
    TimedOutError,
    TooManyRequestsError,
)
from tests.commit_world import (
    BROKEN,
    COMMITTED,
    FENCED,
    NOT_COMMITTED,
    STOPPED,
    TIMED_OUT,
    UNKNOWN,
    World,
    revisions,
)
from tests.engine import Waiter


@pytest.fixture
def world() -> World:
    """One shard."""
    return World()


# -- tickets ---------------------------------------------------------------------------------------


def test_a_ticket_waits_for_durability_and_order(world: World) -> None:
    """Answers come in order, each once its batch is durable; at once if nothing is pending."""
    told: list[int] = []
    for n in range(4):
        world.append()
        world.commits.release((0,), Then(lambda _, n=n: told.append(n)), b"")  # type: ignore[misc]
        if n == 1:
            world.turns.run_all()
    assert told == []
    world.end()
    assert told == [0, 1]
    world.end()
    assert told == [0, 1, 2, 3]
    assert world.ticket(0).body == b"durable"
    assert [revisions(batch) for batch in world.backends[0].batches] == [[2, 3], [4, 5]]


def test_a_refusal_waits_for_what_it_rests_on(world: World) -> None:
    """An error decided at the head is told when that head is durable, or fails with its shard."""
    told, lost = Waiter(), Waiter()
    world.append()
    world.commits.release((0,), Refusal(told, CompactedError()), b"")
    assert told.waits
    world.end()
    assert told.failure == (CompactedError.code, CompactedError.text)
    world.append()
    world.commits.release((0,), Refusal(lost, CompactedError()), b"")
    world.end(BROKEN)
    assert lost.failure == STOPPED


def test_the_hub_hears_of_a_frontier_before_answers_are_released(world: World) -> None:
    """on_durable sees the moved frontier and an answer that still waits."""
    waiter = world.write()
    seen: list[tuple[int, bool]] = []
    world.commits.on_durable = lambda: seen.append((world.commits.durable, waiter.waits))
    world.end()
    assert seen == [(2, True)]
    assert not waiter.waits


def test_changes_without_a_revision_hold_tickets_and_no_frontier(world: World) -> None:
    """A lease's row and a compaction are waited for, but hide nothing."""
    world.commits.append_lease(put=LeaseRow(7, 60, 0))
    world.commits.append_compaction(1)
    waiter = world.ticket(0)
    assert world.commits.frontier((0,)) == NOTHING_PENDING
    assert waiter.waits
    world.end()
    assert waiter.body == b"durable"
    disk = world.backends[0].disk
    assert (disk.tip, disk.compact_revision, list(disk.leases)) == (1, 1, [7])


# -- several shards --------------------------------------------------------------------------------


def test_commits_out_of_order_show_no_shard_more_than_it_has() -> None:
    """A later revision of another shard moves durable, not the frontier of the one behind."""
    world = World(3)
    world.append(1)
    world.append(2)
    commits = world.commits
    assert (commits.frontier((1,)), commits.frontier((0, 1, 2)), commits.durable) == (1, 1, 1)
    world.end(shard=2)
    assert commits.durable == 3
    shown = [commits.visible(shards) for shards in ((0,), (1,), (2,), (1, 2))]
    assert shown == [3, 1, 3, 1]
    world.end(shard=1)
    assert commits.visible((0, 1, 2)) == 3


def test_a_ticket_over_shards_waits_for_the_last_of_them() -> None:
    """It answers once, when every shard that had something pending has committed it."""
    world = World(3)
    world.append(1)
    world.append(2)
    waiter = world.ticket(0, 1, 2)
    world.end(shard=2)
    assert waiter.waits
    world.end(shard=1)
    assert waiter.body == b"durable"


def test_a_ticket_over_shards_fails_with_the_first_that_is_lost() -> None:
    """One failure answers it; what the others do later changes nothing."""
    world = World(2)
    world.append(0)
    world.append(1)
    waiter = world.ticket(0, 1)
    world.end(BROKEN, shard=1)
    assert waiter.failure == STOPPED
    world.end(shard=0)
    assert world.ticket(0, 1).failure == STOPPED
    assert world.ticket(0).body == b"durable"


def test_a_pin_waits_for_its_revision_and_no_later_batch() -> None:
    """A read at a revision hangs on the last batch that holds one at or below it."""
    world = World(2, config=CommitConfig(batch_rows_max=1))
    waiters = []
    for _ in range(2):
        world.append(0)
    world.append(1)
    for revision in (1, 2, 3, 4):
        waiters.append(Waiter())
        world.commits.when_visible((0, 1), revision, waiters[-1])
    assert [waiter.waits for waiter in waiters] == [False, True, True, True]
    world.end(shard=0)
    assert [waiter.waits for waiter in waiters] == [False, False, True, True]
    world.end(shard=0)
    assert [waiter.waits for waiter in waiters] == [False, False, False, True]
    world.end(shard=1)
    assert not waiters[-1].waits


# -- outcomes --------------------------------------------------------------------------------------


def test_not_committed_is_tried_again_with_the_same_revisions(world: World) -> None:
    """The same batch goes again after the interval, whatever was appended meanwhile."""
    first = world.write()
    world.end(NOT_COMMITTED)
    second = world.write()
    world.turns.run_all()
    assert not world.backends[0].asked
    world.pass_time(0.2)
    world.end()
    assert (first.waits, second.waits) == (False, True)
    world.end()
    assert [revisions(batch) for batch in world.backends[0].batches] == [[2], [2], [3]]
    assert not second.waits


@pytest.mark.parametrize("stored", [True, False])
def test_unknown_is_resolved_before_anything_else(world: World, stored: bool) -> None:  # noqa: FBT001
    """Nothing is answered or sent until it is known; then answered, or sent again as it was."""
    waiter = world.write()
    world.end(UNKNOWN)
    backend = world.backends[0]
    world.append()
    world.turns.run_all()
    assert backend.asked[0][0] == "resolve"
    assert waiter.waits
    backend.end(COMMITTED if stored else NOT_COMMITTED)
    assert (waiter.body is not None) == stored
    if not stored:
        world.pass_time(0.2)
        world.end()
    world.end()
    expected = [[2], [3]] if stored else [[2], [2], [3]]
    assert [revisions(batch) for batch in backend.batches] == expected
    assert not waiter.waits


def test_a_resolution_that_is_unknown_itself_is_asked_again_later(world: World) -> None:
    """It neither spins nor sends the batch a second time, and the shard counts as out meanwhile."""
    waiter = world.write()
    backend = world.backends[0]
    world.end(UNKNOWN)
    for _ in range(60):
        assert backend.asked[0][0] == "resolve"
        backend.end(UNKNOWN)
        assert not backend.asked
        world.pass_time(0.2)
    assert waiter.failure == TIMED_OUT
    backend.end(COMMITTED)
    assert (len(backend.batches), world.commits.idle()) == (1, True)
    world.commits.check_room(0)


@pytest.mark.parametrize("outcome", [FENCED, BROKEN])
def test_a_lost_shard_fails_everyone_and_stays_lost(world: World, outcome: Outcome) -> None:
    """All waiters hear that the server stopped, once; nothing is sent or accepted any more."""
    waiters = [world.write()]
    world.turns.run_all()
    waiters.append(world.write())
    world.end(outcome)
    waiters.append(world.ticket(0))
    assert [waiter.failure for waiter in waiters] == [STOPPED] * 3
    assert world.broken == [(0, f"{outcome.value}: as told")]
    with pytest.raises(StoppedError):
        world.commits.check_room(0)
    world.turns.run_all()
    world.pass_time(60)
    assert not world.backends[0].asked
    assert world.commits.visible((0,)) == 1


@pytest.mark.parametrize("trouble", [None, NOT_COMMITTED])
def test_a_shard_that_hangs_is_out_until_a_commit_returns(trouble: Outcome | None) -> None:
    """After the timeout waiters fail, new writes are refused at once; the others go on; it comes
    back with what it had.
    """
    world = World(2)
    waiters = [world.write(1)]
    world.turns.run_all()
    waiters.append(world.write(1))
    if trouble is not None:
        world.end(trouble, shard=1)
    world.pass_time(4.9)
    assert waiters[0].waits
    world.pass_time(0.2)
    waiters.append(world.ticket(0, 1))
    assert [waiter.failure for waiter in waiters] == [TIMED_OUT] * 3
    with pytest.raises(TimedOutError):
        world.commits.check_room(1)
    other = world.write(0)
    world.end(shard=0)
    assert other.body == b"durable"
    world.end(shard=1)
    world.commits.check_room(1)
    late = world.write(1)
    world.end(shard=1)
    world.end(shard=1)
    assert late.body == b"durable"
    assert sorted(row[0] for row in world.backends[1].disk.rows) == [2, 3, 5]


def test_a_shard_whose_commits_are_refused_is_told_once_until_one_succeeds() -> None:
    """At the first refusal with storage's reason, however often it is repeated and whether or not
    the shard goes out; then once more, with the time that it took. The next trouble is told anew.
    """
    world = World(2)
    world.append(1)
    world.end(NOT_COMMITTED, shard=1)
    assert world.told == [(1, "as told")]
    for _ in range(30):
        world.pass_time(0.25)
        world.end(NOT_COMMITTED, shard=1)
    assert world.told == [(1, "as told")]
    assert world.commits.queues[1].trouble == "as told"
    world.pass_time(0.5)
    world.end(shard=1)
    assert world.told[1:] == [(1, 8.0)]
    assert world.commits.queues[1].trouble == ""
    world.append(1)
    world.end(shard=1)
    world.append(1)
    world.end(NOT_COMMITTED, shard=1)
    assert world.told[2:] == [(1, "as told")]


def test_a_shard_whose_storage_hangs_is_told_when_it_is_out(world: World) -> None:
    """No earlier trouble, long over, is given as the reason."""
    world.append()
    world.end(UNKNOWN)
    world.backends[0].end(COMMITTED)
    assert world.told == []
    world.append()
    world.turns.run_all()
    world.pass_time(5.5)
    world.pass_time(5.5)
    assert world.told == [(0, "storage does not answer")]
    world.end()
    assert world.told[1:] == [(0, 11.0)]


def test_a_shard_whose_outcome_stays_unknown_is_told_why(world: World) -> None:
    """With the backend's reason, once it cannot say what became of a commit."""
    world.append()
    world.end(UNKNOWN)
    assert world.told == []
    world.backends[0].end(UNKNOWN)
    world.pass_time(5.5)
    assert world.told == [(0, "as told")]


# -- bounds ----------------------------------------------------------------------------------------


def test_a_full_queue_refuses_until_it_has_room() -> None:
    """Rows, bytes and changes of leases count, in flight or not, until they are durable."""
    config = CommitConfig(queue_rows_max=4, queue_bytes_max=100)
    fillings: list[Callable[[World], object]] = [
        lambda world: world.append(rows=4),
        lambda world: world.append(size=100),
        lambda world: world.append_leases(put=True),
        lambda world: world.append_leases(put=False),
    ]
    for fill in fillings:
        world = World(config=config)
        world.commits.check_room(0)
        fill(world)
        world.turns.run_all()
        with pytest.raises(TooManyRequestsError):
            world.commits.check_room(0)
        world.end()
        world.commits.check_room(0)
        assert (world.commits.queues[0].rows, world.commits.queues[0].size) == (0, 0)


def test_batches_close_at_their_limits(world: World) -> None:
    """By rows or bytes; a revision is never split; changes of leases count."""
    world = World(config=CommitConfig(batch_rows_max=3, batch_bytes_max=100))
    for rows, size in ((2, 1), (2, 1), (1, 100), (1, 1)):
        world.append(rows=rows, size=size)
    world.append_leases(put=True)
    while not world.commits.idle():
        world.end()
    found = [(revisions(batch), len(batch.lease_puts)) for batch in world.backends[0].batches]
    assert found == [([2, 2, 3, 3], 0), ([4], 0), ([5], 2), ([], 2)]


class Leftovers:
    """A source of drops that notes how many were asked for."""

    def __init__(self) -> None:
        self.left: list[RowId] = [(1, n) for n in range(10)]
        self.asked: list[int] = []

    def take(self, rows: int) -> list[RowId]:
        """At most as many as ``rows``, five when idle."""
        self.asked.append(rows)
        taken, self.left = self.left[: rows or 5], self.left[rows or 5 :]
        return taken


def test_drops_give_way_to_writes(world: World) -> None:
    """Along with a batch go as many rows as it has changes, and many only when nothing waits."""
    drops = world.commits.queues[0].drops = Leftovers()
    world.commits.append_compaction(1)
    world.commits.append_lease(put=LeaseRow(7, 9, 0))
    world.end()
    world.append(rows=2)
    world.commits.poke_drops(0)
    while not world.commits.idle():
        world.end()
    assert drops.asked == [1, 0, 2, 0, 0]
    assert [len(batch.drops) for batch in world.backends[0].batches] == [1, 5, 2, 2]


# -- everything at once ----------------------------------------------------------------------------

SHARDS = st.sampled_from([(0,), (1,), (2,), (0, 1), (0, 1, 2)])


class AnyOrder(RuleBasedStateMachine):
    """Writes, tickets and pins on shards whose commits end in any order and in any way but for
    good.
    """

    @initialize(count=st.integers(1, 3))
    def start(self, count: int) -> None:
        """Small batches, so that queues are long."""
        self.world = World(count, config=CommitConfig(batch_rows_max=2, queue_rows_max=6))
        self.appended: list[list[int]] = [[] for _ in range(count)]
        self.waiting: list[tuple[Waiter, list[tuple[int, int]]]] = []
        self.outs = 0

    def touched(self, shards: Sequence[int]) -> tuple[int, ...]:
        """Those of ``shards`` that there are."""
        return tuple(s for s in shards if s < len(self.appended)) or (0,)

    @rule(shards=SHARDS)
    def write(self, shards: tuple[int, ...]) -> None:
        """A write takes a ticket or is refused with nothing changed."""
        shard = self.touched(shards)[-1]
        before = self.world.commits.queues[shard].rows
        try:
            self.world.commits.check_room(shard)
        except TooManyRequestsError:
            assert before >= 6
        except StoreError:
            assert self.world.commits.queues[shard].out
        else:
            self.appended[shard].append(self.world.append(shard))
            self.ticket((shard,))

    @rule(shards=SHARDS)
    def ticket(self, shards: tuple[int, ...]) -> None:
        """Something executes at the head of some shards."""
        touched = self.touched(shards)
        needs = [(s, self.appended[s][-1]) for s in touched if self.appended[s]]
        self.waiting.append((self.world.ticket(*touched), needs))

    @rule(shards=SHARDS, revision=st.integers(1, 30))
    def pin(self, shards: tuple[int, ...], revision: int) -> None:
        """A read at a revision that may be shown somewhere."""
        touched, at = self.touched(shards), min(revision, self.world.commits.durable)
        waiter = Waiter()
        self.world.commits.when_visible(touched, at, waiter)
        needs = [(s, max((r for r in self.appended[s] if r <= at), default=1)) for s in touched]
        self.waiting.append((waiter, needs))

    @rule()
    def turn(self) -> None:
        """The turn of the loop ends."""
        self.world.turns.run_all()

    @rule(shards=SHARDS, outcome=st.sampled_from([COMMITTED, COMMITTED, NOT_COMMITTED, UNKNOWN]))
    def end(self, shards: tuple[int, ...], outcome: Outcome) -> None:
        """A commit ends, or the question what became of it."""
        backend = self.world.backends[self.touched(shards)[-1]]
        if backend.asked:
            backend.end(outcome)

    @rule(seconds=st.sampled_from([0.05, 0.2, 3.0]))
    def time(self, seconds: float) -> None:
        """Time goes by."""
        self.world.pass_time(seconds)
        self.outs += any(queue.out for queue in self.world.commits.queues)

    @rule(shards=SHARDS)
    def lose(self, shards: tuple[int, ...]) -> None:
        """A backend knows that its database is out of reach."""
        self.world.commits.lost(self.touched(shards)[-1], "away")
        self.outs += 1

    @rule(shards=SHARDS)
    def find(self, shards: tuple[int, ...]) -> None:
        """It is back."""
        self.world.commits.found(self.touched(shards)[-1])

    @invariant()
    def shown_is_durable(self) -> None:
        """Frontiers and durable are what the disks say; answers are due, and due ones are
        answered.
        """
        commits, tips = self.world.commits, [b.disk.tip for b in self.world.backends]
        assert commits.durable == max(tips)
        for shard, tip in enumerate(tips):
            left = [revision for revision in self.appended[shard] if revision > tip]
            assert commits.frontier((shard,)) == (left[0] - 1 if left else NOTHING_PENDING)
        for waiter, needs in self.waiting:
            due = all(tips[shard] >= revision for shard, revision in needs)
            if waiter.failure is not None:
                assert self.outs, "fails only with a shard that was out"
                assert waiter.failure == TIMED_OUT
            else:
                assert (waiter.body is not None) == due
        self.waiting = [(waiter, needs) for waiter, needs in self.waiting if waiter.waits]


TestAnyOrder = AnyOrder.TestCase
