"""Metrics of each shard: told apart, true whatever happens, and no more series than shards need.

Shard 0 is home, keys from ``b`` on are on shard 1; nothing is committed before a test says so.
"""

from collections.abc import Callable

import pytest

from kvstore.backend import Batch, CommitResult, Fence, Outcome
from kvstore.config import CommitConfig
from kvstore.errors import HeldError, StoreError
from kvstore.shard_metrics import REASONS, STATES, ShardError, ShardMetrics
from kvstore.shard_queue import ShardQueue
from kvstore.watch_message import PREVIOUS
from tests.scrape import Scrape, read
from tests.watch_world import World

HOME, OTHER = "0", "1"
TIMEOUT = CommitConfig().shard_timeout


class Watched:
    """A world of two shards and what is told of it."""

    def __init__(self) -> None:
        self.world = World(routes={b"b": 1})
        self.metrics = ShardMetrics(self.world.store, self.world.hub, self.world.clock)
        self.commits = self.world.commits
        self.commits.on_stuck = self.commits.on_broken = lambda shard, _: self.metrics.failed(shard)

    def see(self) -> Scrape:
        """The page as it is now."""
        return read(self.metrics.collect)

    def state(self, shard: str = OTHER) -> str:
        """The one state that is said to be true."""
        return self.see().true("kvstore_shard_state", shard=shard)["state"]

    def error(self) -> str:
        """What is said to have gone wrong last on shard 1."""
        return self.see().true("kvstore_shard_last_error", shard=OTHER)["error"]

    def pass_time(self, seconds: float) -> None:
        """Time goes by, with a tick at its end."""
        self.world.clock.advance(seconds)
        self.commits.tick()

    def commit_home(self) -> None:
        """What waits on shard 0, and nothing else."""
        self.world.turns.run_all()
        self.world.disks[0].run_all()
        self.world.turns.run_all()

    def answer(
        self, monkeypatch: pytest.MonkeyPatch, *outcomes: Outcome, reason: str = "why"
    ) -> None:
        """From now on shard 1's commits, then what it is asked of them, end so."""
        left = list(outcomes)

        def end(_: Batch, done: Callable[[CommitResult], None]) -> None:
            outcome = left.pop(0) if len(left) > 1 else left[0]
            self.world.turns(lambda: done(CommitResult(outcome, reason)))

        for method in ("commit", "resolve"):
            monkeypatch.setattr(self.world.backends[1], method, end)


@pytest.fixture
def watched() -> Watched:
    """Two shards in good health."""
    return Watched()


def test_shards_are_told_apart(watched: Watched) -> None:
    """A commit that hangs is seen on its own shard: what waits there, for how long, how far behind;
    afterwards what it carried.
    """
    world = watched.world
    before = watched.see()
    for shard in (HOME, OTHER):
        assert before.number("kvstore_frontier_lag_seconds", shard=shard) == 0
        assert before.number("kvstore_queue_rows", shard=shard) == 0
    world.put(b"b")
    world.put(b"b", b"longer")
    world.turns.run_all()
    for _ in range(3):
        world.put(b"a")
    watched.commit_home()
    world.clock.advance(2.5)
    during = watched.see()
    world.settle()
    after = watched.see()
    for name, home, other in (
        ("kvstore_queue_rows", 0, 2),
        ("kvstore_frontier_lag_revisions", 0, 5),
        ("kvstore_frontier_lag_seconds", 0, 2.5),
        ("kvstore_commit_seconds_count", 1, 0),
        ("kvstore_commit_rows_sum", 3, 0),
    ):
        assert during.number(name, shard=HOME) == home
        assert during.number(name, shard=OTHER) == other
    assert during.number("kvstore_queue_bytes", shard=OTHER) > 0
    for name, other in (
        ("kvstore_queue_rows", 0),
        ("kvstore_queue_bytes", 0),
        ("kvstore_frontier_lag_revisions", 0),
        ("kvstore_frontier_lag_seconds", 0),
        ("kvstore_commit_seconds_sum", 2.5),
        ("kvstore_commit_rows_sum", 2),
    ):
        assert after.number(name, shard=OTHER) == other
    assert after.number("etcd_disk_backend_commit_duration_seconds_sum") == 0, "home's alone"


def test_requests_over_several_shards(watched: Watched) -> None:
    """How long each has waited, how many wait and were refused, and who waits behind them."""
    world = watched.world
    barrier = world.store.barrier
    barrier.check((0, 1))
    world.put(b"b")
    world.turns.run_all()
    refused: list[StoreError] = []
    barrier.run((0, 1), lambda: None, refused.append, 1)
    with pytest.raises(HeldError):
        world.put(b"b")
    barrier.run((1,), lambda: None, refused.append, 1)
    during = watched.see()
    assert during.number("kvstore_barrier_seconds_count") == 1
    assert during.number("kvstore_barrier_waiting") == 1
    assert during.number("kvstore_held_requests", shard=OTHER) == 1
    assert during.number("kvstore_held_requests", shard=HOME) == 0
    world.clock.advance(0.5)
    world.settle()
    barrier.run((0, 1), lambda: None, refused.append, 1)
    watched.commits.lost(1, "away")
    barrier.run((0, 1), lambda: None, refused.append, 1)
    after = watched.see()
    assert after.number("kvstore_barrier_seconds_sum") == 0.5
    assert after.number("kvstore_barrier_seconds_bucket", le="0.256") == 2
    assert after.number("kvstore_barrier_seconds_bucket", le="0.512") == 3
    assert after.number("kvstore_barrier_waiting") == 0
    assert after.number("kvstore_held_requests", shard=OTHER) == 0
    assert after.number("kvstore_barrier_refused_total") == len(refused) == 1


def test_states(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard is in one state at a time: serving, stuck, out, and serving again; then broken."""
    world = watched.world
    assert watched.state() == "serving"
    with monkeypatch.context() as patched:
        watched.answer(patched, Outcome.NOT_COMMITTED)
        world.put(b"b")
        world.turns.run_all()
        assert watched.state() == "stuck"
        assert watched.see().number("kvstore_shard_out", shard=OTHER) == 0
        watched.pass_time(TIMEOUT)
        assert watched.state() == "out"
        assert watched.see().number("kvstore_shard_out", shard=OTHER) == 1
        world.turns.run_all()
    watched.pass_time(1.0)
    world.settle()
    assert watched.state() == "serving"
    assert watched.error() == "not_committed", "the last one stays"
    watched.commits.give_up(1, "a row is missing")
    assert watched.state() == "broken"
    assert watched.error() == "broken"
    assert watched.state(HOME) == "serving"
    assert watched.see().all("kvstore_shard_last_error", shard=HOME) == []


@pytest.mark.parametrize(
    ("outcomes", "error"),
    [
        ((Outcome.NOT_COMMITTED,), ShardError.NOT_COMMITTED),
        ((Outcome.UNKNOWN, Outcome.UNKNOWN), ShardError.UNKNOWN),
        ((Outcome.FENCED,), ShardError.FENCED),
        ((Outcome.BROKEN,), ShardError.BROKEN),
        ((), ShardError.NO_ANSWER),
        (None, ShardError.UNREACHABLE),
    ],
    ids=str,
)
def test_errors(
    watched: Watched,
    monkeypatch: pytest.MonkeyPatch,
    outcomes: tuple[Outcome, ...] | None,
    error: ShardError,
) -> None:
    """Whatever goes wrong is one of a few errors, counted; storage's own words are not told."""
    if outcomes is None:
        watched.commits.lost(1, "password=hunter2")
    else:
        if outcomes:
            watched.answer(monkeypatch, *outcomes, reason="password=hunter2")
        watched.world.put(b"b")
        watched.world.turns.run_all()
        watched.pass_time(TIMEOUT if not outcomes else 0.0)
    seen = watched.see()
    assert watched.error() == error
    for each in ShardError:
        assert seen.number("kvstore_shard_errors_total", shard=OTHER, error=each) == (each is error)
    assert seen.all("kvstore_shard_errors_total", shard=HOME, error=error) == [0]
    assert "hunter2" not in seen.text


def test_series_are_bounded(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """After many troubles, each with other words, there are as many series as after one."""
    world = watched.world

    def trouble(number: int) -> None:
        with monkeypatch.context() as patched:
            watched.answer(patched, Outcome.NOT_COMMITTED, reason=f"error {number}")
            world.put(b"b%d" % number)
            world.turns.run_all()
        watched.pass_time(1.0)
        world.settle()

    trouble(0)
    once = len(watched.see().samples)
    for number in range(1, 20):
        trouble(number)
    seen = watched.see()
    assert len(seen.samples) == once
    assert seen.number("kvstore_shard_errors_total", shard=OTHER, error="not_committed") == 20
    assert len(seen.all("kvstore_shard_state", shard=OTHER)) == len(STATES)
    assert len(seen.all("kvstore_watchers_held", shard=OTHER)) == len(REASONS)


def test_stored(watched: Watched) -> None:
    """Rows and bytes are those in storage: more with each change, fewer once compaction has dropped
    some.
    """
    world = watched.world
    for key in (b"a", b"b", b"b", b"b"):
        world.put(key)
    world.delete(b"b")
    before = watched.see()
    world.settle()
    full = watched.see()
    world.compact(world.store.revision)
    for _ in range(5):
        world.compactor.tick()
        world.settle()
    after = watched.see()
    rows = [seen.number("kvstore_shard_rows", shard=OTHER) for seen in (before, full, after)]
    assert rows == [0, 4, len(world.backends[1].disk.rows)]
    assert rows[2] < rows[1]
    assert full.number("kvstore_shard_rows", shard=HOME) == 1
    sizes = world.backends[1].sizes()
    assert after.number("kvstore_shard_bytes", shard=OTHER) == sizes.total
    assert after.number("kvstore_shard_bytes_in_use", shard=OTHER) == sizes.in_use < sizes.total


def test_loaded_rows_are_stored(watched: Watched) -> None:
    """What a start or a return reads is counted, once."""
    rows = [(revision, 0, b"b", 2, revision - 1, 0) for revision in range(2, 6)]
    watched.world.store.load_rows(1, rows[:3])
    watched.world.store.load_rows(1, rows)
    assert watched.see().number("kvstore_shard_rows", shard=OTHER) == 4


def test_cache(watched: Watched) -> None:
    """Values are counted for the shard that they are of; those of a read over several apart."""
    world = watched.world
    for key in (b"a", b"b", b"bb"):
        world.put(key)
    world.settle()
    world.forget_values()
    pairs = [(key, entry) for key in (b"b", b"bb") if (entry := world.store.index.head(key))]
    world.store.fetch(pairs, lambda _: None)
    world.settle()
    world.store.counts.shown((1,), 2)
    world.store.counts.shown((0, 1), 7)
    world.store.counts.gets[0] += 5
    seen = watched.see()
    for shard, hits in ((HOME, 5), (OTHER, 2), ("*", 7)):
        assert seen.number("kvstore_cache_hits_total", shard=shard) == hits
    for shard, misses in ((HOME, 0), (OTHER, 2)):
        assert seen.number("kvstore_cache_misses_total", shard=shard) == misses


def held(seen: Scrape) -> dict[tuple[str, str], float]:
    """Who holds up how many, by shard and reason."""
    return {
        (shard, reason): count
        for shard in (HOME, OTHER)
        for reason in REASONS
        if (count := seen.number("kvstore_watchers_held", shard=shard, reason=reason))
    }


def test_watchers_that_a_shard_holds(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit that does not end holds the watchers whose ranges touch its shard, and it is told
    how the shard is.
    """
    world = watched.world
    client = world.client()
    client.create(b"a")
    client.create(b"b")
    client.create(b"bb")
    client.create(b"a", b"z")
    watched.answer(monkeypatch, Outcome.NOT_COMMITTED)
    world.put(b"b")
    assert held(watched.see()) == {}, "nothing is durable that they have not heard of"
    world.put(b"a")
    watched.commit_home()
    assert held(watched.see()) == {(OTHER, "stuck"): 3}
    watched.pass_time(TIMEOUT)
    assert held(watched.see()) == {(OTHER, "out"): 3}
    world.turns.run_all()
    monkeypatch.undo()
    watched.pass_time(1.0)
    world.turns.run_all()
    assert held(watched.see()) == {(OTHER, "out"): 3}, "until the commit has ended"
    world.settle()
    assert held(watched.see()) == {}
    assert watched.see().number("kvstore_watchers", state="synced") == 4


def test_watchers_of_a_commit_under_way(watched: Watched) -> None:
    """While nothing is wrong, those who wait for a commit are counted as just that."""
    world = watched.world
    world.client().create(b"b")
    world.put(b"b")
    world.turns.run_all()
    world.put(b"a")
    watched.commit_home()
    assert held(watched.see()) == {(OTHER, "committing"): 1}


def test_the_furthest_behind_holds(watched: Watched) -> None:
    """A watcher over two shards that are behind is held by the one that is further."""
    world = watched.world
    world.client().create(b"a", b"z")
    world.put(b"a")
    world.turns.run_all()
    world.put(b"b")
    world.turns.run_all()
    world.commits.durable = 10
    assert held(watched.see()) == {(HOME, "committing"): 1}


def test_watchers_that_wait_for_values(watched: Watched) -> None:
    """Previous values that are read from storage hold the watchers that want them."""
    world = watched.world
    world.put(b"b")
    world.settle()
    world.forget_values()
    world.client().create(b"b", wants=PREVIOUS)
    world.settle()
    world.put(b"b")
    world.turns.run_all()
    world.disks[1].run_next()
    world.disks[1].run_next()
    assert held(watched.see()) == {(OTHER, "reading"): 1}
    world.settle()
    assert held(watched.see()) == {}


def test_missing_since_the_start() -> None:
    """A shard that was never there is missing and unreachable, holds its watchers, and has no
    numbers that only its database could tell.
    """
    world = World(routes={b"b": 1})
    unknown = Fence(cluster_id=1, member_id=2, shard=OTHER, epoch=0, tip=0, compact_revision=-1)
    world.commits.queues[1] = ShardQueue(1, world.backends[1], unknown)
    world.client().create(b"b")
    world.client().create(b"a")
    seen = read(ShardMetrics(world.store, world.hub, world.clock).collect)
    assert seen.true("kvstore_shard_state", shard=OTHER)["state"] == "missing"
    assert seen.true("kvstore_shard_last_error")["error"] == "unreachable"
    assert seen.number("kvstore_shard_out", shard=OTHER) == 1
    assert held(seen) == {(OTHER, "missing"): 1}
    for name in ("rows", "bytes", "bytes_in_use"):
        assert len(seen.all(f"kvstore_shard_{name}", shard=HOME)) == 1
        assert seen.all(f"kvstore_shard_{name}", shard=OTHER) == []
    assert seen.all("kvstore_frontier_lag_revisions", shard=OTHER) == []
