"""Metrics of each shard: what its commits take, what waits for them, how it is, what it stores, and
whom it holds up.

Each carries the shard's name. When a commit ends there are two bisections; everything else is read
from numbers that queues, histories and feeds keep anyway, when someone scrapes.

How many series there are is decided by the configuration alone: states and errors are members of
fixed sets, whatever storage says; its own words, which may hold anything, are in the log.

A shard that has been missing since the start has neither a frontier nor rows nor a size: those
series are left out rather than made up.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import Final

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from kvstore.clock import Clock
from kvstore.histogram import Histogram, doubling
from kvstore.shard import HOME
from kvstore.shard_queue import ShardQueue
from kvstore.store import Store
from kvstore.watch import WatchHub
from kvstore.watch_groups import State

STATES: Final = ("serving", "stuck", "out", "missing", "broken")
"""What ``ShardQueue.state`` may be."""
REASONS: Final = ("committing", "reading", *STATES[1:])
"""Why watchers hear nothing new: a commit under way, as ever; previous values that are read from
storage; or how the shard is.
"""
_COMMIT_SECONDS: Final = doubling(0.001, 14)
"""As in etcd: 1 ms to 8 s."""
_COMMIT_ROWS: Final = doubling(1.0, 12)
_SEVERAL: Final = "*"
"""The label of what was read from several shards at once; no shard has such a name."""


class ShardError(StrEnum):
    """What went wrong with a shard's storage."""

    NOT_COMMITTED = "not_committed"
    """Definitely nothing was stored: disk full, database busy."""
    UNKNOWN = "unknown"
    """It could not be found out whether a batch was stored."""
    NO_ANSWER = "no_answer"
    """A commit hung past the shard's timeout."""
    UNREACHABLE = "unreachable"
    """Nobody was at the other end."""
    FENCED = "fenced"
    """Another process has taken it."""
    BROKEN = "broken"
    """I/O error, corruption, a row that is not there."""


class ShardMetrics:
    """See the module's text. It makes itself ``Commits.on_commit``; ``failed`` is for whoever
    listens to the rest of ``Commits``.
    """

    def __init__(self, store: Store, hub: WatchHub, clock: Clock) -> None:
        self._store = store
        self._hub = hub
        self._clock = clock
        self._queues = queues = store.commits.queues
        self._seconds = [Histogram(_COMMIT_SECONDS) for _ in queues]
        self._rows = [Histogram(_COMMIT_ROWS) for _ in queues]
        self._errors = [dict.fromkeys(ShardError, 0) for _ in queues]
        self._last: dict[int, ShardError] = {}
        for queue in queues:
            if queue.missing:
                self.failed(queue.number)
        store.commits.on_commit = self._observe

    def failed(self, shard: int) -> None:
        """Storage of ``shard`` has just failed, for a while or for good; its queue tells how."""
        error = _error_of(self._queues[shard])
        self._errors[shard][error] += 1
        self._last[shard] = error

    def collect(self) -> Iterator[Metric]:
        """Everything, from the modules as they are now."""
        yield from self._commits()
        yield from self._waiting()
        yield from self._over_several()
        yield from self._stored()
        yield from self._cached()
        yield from self._states()
        yield from self._watchers()

    def _observe(self, shard: int, rows: int, seconds: float) -> None:
        self._seconds[shard].observe(seconds)
        self._rows[shard].observe(rows)

    def _commits(self) -> Iterator[Metric]:
        """The two disk latencies of etcd from home, and ours of every shard."""
        home = self._seconds[HOME]
        for name, meaning in (
            (
                "etcd_disk_backend_commit_duration_seconds",
                "Seconds from handing a batch to storage to its being durable.",
            ),
            (
                "etcd_disk_wal_fsync_duration_seconds",
                "The same: here a commit is one write and one sync of the database's log.",
            ),
        ):
            yield HistogramMetricFamily(name, meaning, buckets=home.buckets(), sum_value=home.sum)
        for name, meaning, histograms in (
            ("kvstore_commit_seconds", "Seconds of a commit.", self._seconds),
            ("kvstore_commit_rows", "Changes that one commit carried.", self._rows),
        ):
            family = HistogramMetricFamily(name, meaning, labels=["shard"])
            for queue, histogram in zip(self._queues, histograms, strict=True):
                family.add_metric([queue.name], histogram.buckets(), sum_value=histogram.sum)
            yield family

    def _waiting(self) -> Iterator[Metric]:
        queues, present = self._queues, self._present()
        now, durable = self._clock.monotonic(), self._store.commits.durable
        yield _gauge(
            "kvstore_queue_rows", "Changes not yet durable.", ((q, q.rows) for q in queues)
        )
        yield _gauge(
            "kvstore_queue_bytes",
            "Bytes of changes not yet durable.",
            ((q, q.size) for q in queues),
        )
        yield _gauge(
            "kvstore_frontier_lag_revisions",
            "Durable revisions that a shard with something pending keeps from being shown.",
            ((q, max(0, durable - q.frontier)) for q in present),
        )
        yield _gauge(
            "kvstore_frontier_lag_seconds",
            "Seconds since the commit began that has not ended; 0: there is none.",
            ((q, now - q.started_at if _unfinished(q) else 0.0) for q in present),
        )

    def _over_several(self) -> Iterator[Metric]:
        """Requests over several shards, and who waits behind them."""
        barrier = self._store.barrier
        yield HistogramMetricFamily(
            "kvstore_barrier_seconds",
            "Seconds that requests over several shards waited for these to have nothing pending.",
            buckets=barrier.seconds.buckets(),
            sum_value=barrier.seconds.sum,
        )
        yield CounterMetricFamily(
            "kvstore_barrier_refused", "Requests over several shards refused.", barrier.refused
        )
        yield GaugeMetricFamily(
            "kvstore_barrier_waiting", "Requests over several shards that wait.", barrier.waiting
        )
        yield _gauge(
            "kvstore_held_requests",
            "Writes that wait behind requests over several shards.",
            ((queue, barrier.held(queue.number)) for queue in self._queues),
        )

    def _stored(self) -> Iterator[Metric]:
        present = self._present()
        sizes = [(queue, queue.backend.sizes()) for queue in present]
        yield _gauge(
            "kvstore_shard_bytes",
            "Bytes of the database.",
            ((queue, size.total) for queue, size in sizes),
        )
        yield _gauge(
            "kvstore_shard_bytes_in_use",
            "Bytes of the database without its free pages.",
            ((queue, size.in_use) for queue, size in sizes),
        )
        yield _gauge(
            "kvstore_shard_rows",
            "Versions of keys in storage, tombstones included.",
            ((queue, queue.stored) for queue in present),
        )

    def _cached(self) -> Iterator[Metric]:
        counts = self._store.counts
        hits = CounterMetricFamily(
            "kvstore_cache_hits",
            f"Values that reads found in memory; {_SEVERAL}: reads over several shards.",
            labels=["shard"],
        )
        misses = CounterMetricFamily(
            "kvstore_cache_misses", "Values read from storage.", labels=["shard"]
        )
        for queue in self._queues:
            number = queue.number
            hits.add_metric([queue.name], counts.gets[number] + counts.values_in_memory[number])
            misses.add_metric([queue.name], counts.values_read[number])
        if len(self._queues) > 1:
            hits.add_metric([_SEVERAL], counts.values_in_memory[-1])
        yield from (hits, misses)

    def _states(self) -> Iterator[Metric]:
        state = GaugeMetricFamily(
            "kvstore_shard_state", "1 for the state that it is in.", labels=["shard", "state"]
        )
        last = GaugeMetricFamily(
            "kvstore_shard_last_error", "1 for what went wrong last.", labels=["shard", "error"]
        )
        errors = CounterMetricFamily(
            "kvstore_shard_errors", "Times that storage failed.", labels=["shard", "error"]
        )
        for queue in self._queues:
            assert queue.state in STATES, "a graph of all states shows this one, too"
            for each in STATES:
                state.add_metric([queue.name, each], float(each == queue.state))
            if queue.number in self._last:
                last.add_metric([queue.name, self._last[queue.number]], 1)
            for error, count in self._errors[queue.number].items():
                errors.add_metric([queue.name, error], count)
        yield _gauge(
            "kvstore_shard_out",
            "1: requests for its keys are refused.",
            ((queue, float(queue.lost is not None)) for queue in self._queues),
        )
        yield from (state, last, errors)

    def _watchers(self) -> Iterator[Metric]:
        held = GaugeMetricFamily(
            "kvstore_watchers_held",
            "Watchers that hear nothing new because of a shard, and why.",
            labels=["shard", "reason"],
        )
        for (shard, reason), watchers in self._held().items():
            held.add_metric([self._queues[shard].name, reason], watchers)
        doing = GaugeMetricFamily(
            "kvstore_watchers", "Watchers, by what they do.", labels=["state"]
        )
        for state in State:
            if state is not State.OVER:
                doing.add_metric([state.name.lower()], self._hub.count[state])
        yield from (held, doing)

    def _held(self) -> Counter[tuple[int, str]]:
        """Watchers by the shard that holds them up and why: of several the furthest behind."""
        queues, durable = self._queues, self._store.commits.durable
        held = Counter({(queue.number, reason): 0 for queue in queues for reason in REASONS})
        for feed in self._hub.feeds:
            last = min((queues[shard] for shard in feed.shards), key=_frontier)
            if last.frontier < durable:
                state = last.state
                reason = "committing" if state == "serving" else state
                held[last.number, reason] += feed.watchers
            for shard in feed.reading:
                held[shard, "reading"] += feed.watchers
        return held

    def _present(self) -> list[ShardQueue]:
        return [queue for queue in self._queues if not queue.missing]


def _error_of(queue: ShardQueue) -> ShardError:
    """What is the matter with a shard that has just failed."""
    if queue.broken:
        return ShardError.FENCED if queue.fenced else ShardError.BROKEN
    if queue.missing or queue.away:
        return ShardError.UNREACHABLE
    if queue.late:
        return ShardError.NO_ANSWER
    return ShardError.UNKNOWN if queue.unresolved else ShardError.NOT_COMMITTED


def _unfinished(queue: ShardQueue) -> bool:
    """Has a commit begun that has not ended, or never will?"""
    return queue.stuck or bool(queue.broken and queue.pending)


def _frontier(queue: ShardQueue) -> int:
    return queue.frontier


def _gauge(name: str, meaning: str, numbers: Iterable[tuple[ShardQueue, float]]) -> Metric:
    family = GaugeMetricFamily(name, meaning, labels=["shard"])
    for queue, number in numbers:
        family.add_metric([queue.name], number)
    return family
