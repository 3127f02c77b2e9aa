"""Metrics for Prometheus, read from the plain numbers of the modules when someone scrapes.

On the way of a request there is one bisection and two additions when its call ends
(``CallMetrics``); everything else is computed here, at scrape time, and nothing is kept per key.

Names that begin with ``etcd_``, ``grpc_`` or ``os_`` are etcd's, so that its dashboards and alerts
work; they are only given where they mean the same here. Our own begin with ``kvstore_``.
What etcd calls a proposal is a revision here: one per mutating request.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    UnknownMetricFamily,
)

from kvstore.histogram import Histogram
from kvstore.housekeeping import GarbageCollector, StallMonitor
from kvstore.http.health import HealthRoutes
from kvstore.kv import Header
from kvstore.lease import Lessor
from kvstore.store import Store
from kvstore.transport.api import Kind, Method
from kvstore.version import ETCD_CLUSTER_VERSION, ETCD_VERSION, own_version
from kvstore.watch import WatchHub

_CODES = [
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
]
"""gRPC's status codes by number, spelled as grpc-go does."""
_KINDS = {
    Kind.UNARY: "unary",
    Kind.SERVER_STREAM: "server_stream",
    Kind.BIDI_STREAM: "bidi_stream",
}
_CALL_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Bounds of ``grpc_server_handling_seconds``: Prometheus' defaults, as in etcd."""


class _Calls:
    """Calls of one method that have ended."""

    __slots__ = ("codes", "handling", "labels")

    def __init__(self, method: Method) -> None:
        _, service, name = method.path.decode().split("/")
        self.labels = [_KINDS[method.kind], service, name]
        self.codes: Counter[int] = Counter()
        self.handling = Histogram(_CALL_SECONDS)


class CallMetrics:
    """Counts every call that ended; ``observe`` is a transport's ``CallObserver``."""

    def __init__(self, methods: Iterable[Method]) -> None:
        self._calls = {method.path: _Calls(method) for method in methods}

    def observe(self, path: bytes, code: int, seconds: float) -> None:
        """A call of ``path`` ended with ``code`` after ``seconds``.

        As in etcd, those of methods that are not served are nobody's.
        """
        calls = self._calls.get(path)
        if calls is not None:
            calls.codes[code] += 1
            calls.handling.observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """The gRPC metrics of etcd, of methods that have been called."""
        labels = ["grpc_type", "grpc_service", "grpc_method"]
        handled = CounterMetricFamily(
            "grpc_server_handled",
            "Calls that ended, by their status code.",
            labels=[*labels, "grpc_code"],
        )
        handling = HistogramMetricFamily(
            "grpc_server_handling_seconds", "Seconds from a call's start to its end.", labels=labels
        )
        for calls in self._calls.values():
            for code, count in sorted(calls.codes.items()):
                spelled = _CODES[code] if code < len(_CODES) else f"Code({code})"
                handled.add_metric([*calls.labels, spelled], count)
            if calls.codes:
                handling.add_metric(
                    calls.labels, calls.handling.buckets(), sum_value=calls.handling.sum
                )
        yield handled
        yield handling


class StoreMetrics:
    """Revisions, keys, leases and sizes."""

    def __init__(self, store: Store, lessor: Lessor, *, quota_bytes: int) -> None:
        self._store = store
        self._lessor = lessor
        self._quota_bytes = quota_bytes

    def collect(self) -> Iterator[Metric]:
        """Everything, from the modules as they are now."""
        store = self._store
        queues = store.commits.queues
        sizes = [queue.backend.sizes() for queue in queues if not queue.missing]
        pending = sum(queue.rows for queue in queues)
        yield from _gauges(
            ("etcd_debugging_mvcc_current_revision", "Last revision issued.", store.revision),
            (
                "etcd_debugging_mvcc_compact_revision",
                "Revision of the last compaction.",
                store.compact_revision,
            ),
            ("etcd_debugging_mvcc_keys_total", "Live keys.", store.index.live),
            (
                "etcd_mvcc_db_total_size_in_bytes",
                "Bytes of all databases.",
                sum(size.total for size in sizes),
            ),
            (
                "etcd_mvcc_db_total_size_in_use_in_bytes",
                "Bytes of all databases without their free pages.",
                sum(size.in_use for size in sizes),
            ),
            ("etcd_server_proposals_committed_total", "Last durable one.", store.commits.durable),
            ("etcd_server_proposals_applied_total", "Last one issued.", store.revision),
            ("etcd_server_proposals_pending", "Changes not yet durable.", pending),
            ("kvstore_leases", "Leases.", len(self._lessor)),
            ("kvstore_cache_bytes", "Bytes of values in memory.", store.index.value_bytes),
            (
                "kvstore_history_changes",
                "Changes since the last compaction.",
                sum(map(len, store.histories)),
            ),
        )
        if self._quota_bytes:  # a quota of 0 would fire the alerts that divide by it
            yield from _gauges(
                ("etcd_server_quota_backend_bytes", "Bytes allowed.", self._quota_bytes)
            )
        yield from self._operations()
        yield from self._leases()
        yield CounterMetricFamily(
            "etcd_server_proposals_failed",
            "Commits that failed for good.",
            sum(bool(queue.broken) for queue in queues),
        )

    def _operations(self) -> Iterator[Metric]:
        counts = self._store.counts
        counters = (
            ("etcd_mvcc_put", "Puts.", counts.puts),
            ("etcd_mvcc_range", "Ranges.", sum(counts.gets) + counts.ranges),
            ("etcd_mvcc_delete", "Deletes.", counts.deletes),
            ("etcd_mvcc_txn", "Txns of more than one operation.", counts.txns),
        )
        for name, meaning, number in counters:
            yield CounterMetricFamily(name, meaning, number)

    def _leases(self) -> Iterator[Metric]:
        lessor = self._lessor
        counters = (
            ("etcd_debugging_lease_granted", "Leases granted.", lessor.granted_total),
            ("etcd_debugging_lease_renewed", "Leases renewed.", lessor.renewed_total),
            ("etcd_debugging_lease_revoked", "Leases revoked.", lessor.revoked_total),
            ("etcd_debugging_server_lease_expired", "Leases expired.", lessor.expired_total),
        )
        for name, meaning, number in counters:
            yield CounterMetricFamily(name, meaning, number)


class WatchMetrics:
    """Watchers and how far they are."""

    def __init__(self, hub: WatchHub) -> None:
        self._hub = hub

    def collect(self) -> Iterator[Metric]:
        """Everything, from the hub as it is now."""
        hub = self._hub
        yield from _gauges(
            ("etcd_debugging_mvcc_watch_stream_total", "Streams of watchers.", len(hub.streams)),
            ("etcd_debugging_mvcc_watcher_total", "Watchers.", hub.watchers),
            (
                "etcd_debugging_mvcc_slow_watcher_total",
                "Watchers that read the history or wait for their client.",
                hub.unsynced,
            ),
            (
                "etcd_debugging_mvcc_pending_events_total",
                "Changes not yet sent to synced watchers.",
                hub.pending,
            ),
            (
                "kvstore_watch_lag_revisions",
                "Revisions issued that synced watchers lack, those of a missing shard apart.",
                hub.lag,
            ),
        )
        yield CounterMetricFamily("etcd_debugging_mvcc_events", "Events sent.", hub.events_sent)


class ServerMetrics:
    """The process: identity, health, stalls and the garbage collector."""

    def __init__(
        self,
        header: Header,
        health: HealthRoutes,
        stalls: StallMonitor,
        garbage: GarbageCollector,
        failures: Callable[[], int],
    ) -> None:
        """``failures()`` is how many exceptions there were that should not have been."""
        self._header = header
        self._health = health
        self._stalls = stalls
        self._garbage = garbage
        self._failures = failures
        self._process = ProcessCollector(registry=None)

    def collect(self) -> Iterator[Metric]:
        """Everything, as it is now."""
        yield from _gauges(
            ("etcd_server_has_leader", "Always 1: there is one member.", 1),
            ("etcd_server_is_leader", "Always 1.", 1),
            ("etcd_server_is_learner", "Always 0.", 0),
        )
        yield CounterMetricFamily("etcd_server_leader_changes_seen", "Always 1: the start.", 1)
        yield _named("etcd_server_version", "server_version", ETCD_VERSION)
        yield _named("etcd_cluster_version", "cluster_version", ETCD_CLUSTER_VERSION[:-2])
        yield _named("etcd_server_id", "server_id", f"{self._header.member_id:x}")
        yield _named("kvstore_version", "version", own_version())
        yield from self._checks()
        felt = HistogramMetricFamily(
            "kvstore_loop_stall_seconds",
            "How late a timer of the event loop was: felt by clients, and used by this process.",
            labels=["measured"],
        )
        for measured, stalls in (("wall", self._stalls.felt), ("cpu", self._stalls.blamed)):
            felt.add_metric([measured], stalls.buckets(), sum_value=stalls.sum)
        yield felt
        yield _histogram(
            "kvstore_gc_pause_seconds",
            "Collections of garbage that the server ran.",
            self._garbage.pauses,
        )
        yield CounterMetricFamily(
            "kvstore_failures", "Exceptions that should not have been.", self._failures()
        )
        process = list(self._process.collect())
        yield from process
        yield from _descriptors(process)

    def _checks(self) -> Iterator[Metric]:
        health = self._health
        yield UnknownMetricFamily(
            "etcd_server_health_success", "Answers of /health that said true.", health.succeeded
        )
        yield UnknownMetricFamily(
            "etcd_server_health_failures", "Answers of /health that said false.", health.failed
        )
        latest = GaugeMetricFamily(
            "etcd_server_healthcheck", "1: the check's last run succeeded.", labels=["type", "name"]
        )
        for (kind, name), fine in health.latest.items():
            latest.add_metric([kind, name], fine)
        results = CounterMetricFamily(
            "etcd_server_healthchecks", "Runs of checks.", labels=["type", "name", "status"]
        )
        for (kind, name, status), count in health.results.items():
            results.add_metric([kind, name, status], count)
        yield latest
        yield results


Section = Callable[[], Iterable[Metric]]


class _Sections:
    """What ``prometheus_client`` collects from."""

    def __init__(self, sections: Sequence[Section]) -> None:
        self._sections = sections

    def collect(self) -> Iterator[Metric]:
        for section in self._sections:
            yield from section()


def make_exposition(sections: Sequence[Section]) -> Callable[[], bytes]:
    """A function that gives all ``sections`` as one page in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Sections(sections))
    return lambda: generate_latest(registry)


def _gauges(*gauges: tuple[str, str, float]) -> Iterator[Metric]:
    for name, meaning, number in gauges:
        yield GaugeMetricFamily(name, meaning, number)


def _named(name: str, label: str, value: str) -> Metric:
    """A gauge of 1 whose label is the news."""
    family = GaugeMetricFamily(name, f"1, with the {label} as label.", labels=[label])
    family.add_metric([value], 1)
    return family


def _histogram(name: str, meaning: str, histogram: Histogram) -> Metric:
    return HistogramMetricFamily(
        name, meaning, buckets=histogram.buckets(), sum_value=histogram.sum
    )


def _descriptors(process: Iterable[Metric]) -> Iterator[Metric]:
    """The names of etcd for what the process collector has read already."""
    theirs = {"process_open_fds": "os_fd_used", "process_max_fds": "os_fd_limit"}
    for metric in process:
        if metric.name in theirs:
            name, number = theirs[metric.name], metric.samples[0].value
            yield GaugeMetricFamily(name, metric.documentation, number)
