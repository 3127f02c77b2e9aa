"""Metrics: names that dashboards expect, numbers that are true, a page that Prometheus can read."""

import re
from dataclasses import replace

import pytest
from hyperframe.frame import DataFrame, RstStreamFrame

from backends.memory import Steps
from kvstore.histogram import Histogram
from kvstore.metrics import CallMetrics, make_exposition
from kvstore.pb import rpc_pb2 as pb
from kvstore.transport.api import Method
from tests.house import QUICK, RANGE, WATCH, House, living, memory, page, put
from tests.scrape import read, scrape
from tests.transport.peer import connected, message
from tests.transport.running import eventually

EXPECTED = [
    "etcd_server_has_leader",
    "etcd_server_is_leader",
    "etcd_server_leader_changes_seen_total",
    "etcd_server_proposals_committed_total",
    "etcd_server_proposals_applied_total",
    "etcd_server_proposals_failed_total",
    "etcd_server_proposals_pending",
    "etcd_mvcc_db_total_size_in_bytes",
    "etcd_mvcc_db_total_size_in_use_in_bytes",
    "etcd_disk_wal_fsync_duration_seconds_bucket",
    "etcd_disk_backend_commit_duration_seconds_bucket",
    "etcd_network_client_grpc_sent_bytes_total",
    "etcd_network_client_grpc_received_bytes_total",
    "grpc_server_handled_total",
    "grpc_server_started_total",
    "grpc_server_handling_seconds_bucket",
    "process_resident_memory_bytes",
    "etcd_server_version",
    "etcd_cluster_version",
    "etcd_server_id",
    "etcd_server_health_success",
    "etcd_server_health_failures",
    "etcd_server_healthchecks_total",
    "etcd_debugging_mvcc_keys_total",
    "etcd_debugging_mvcc_watcher_total",
    "etcd_debugging_mvcc_watch_stream_total",
    "etcd_debugging_mvcc_slow_watcher_total",
    "etcd_debugging_mvcc_events_total",
    "etcd_debugging_mvcc_pending_events_total",
    "etcd_debugging_mvcc_current_revision",
    "etcd_debugging_mvcc_compact_revision",
    "os_fd_used",
    "os_fd_limit",
    "kvstore_commit_seconds_bucket",
    "kvstore_commit_rows_bucket",
    "kvstore_queue_rows",
    "kvstore_queue_bytes",
    "kvstore_frontier_lag_revisions",
    "kvstore_frontier_lag_seconds",
    "kvstore_barrier_seconds_bucket",
    "kvstore_barrier_refused_total",
    "kvstore_barrier_waiting",
    "kvstore_held_requests",
    "kvstore_shard_bytes",
    "kvstore_shard_bytes_in_use",
    "kvstore_shard_rows",
    "kvstore_shard_state",
    "kvstore_shard_out",
    "kvstore_shard_errors_total",
    "kvstore_watchers",
    "kvstore_watchers_held",
    "kvstore_watch_lag_revisions",
    "kvstore_cache_bytes",
    "kvstore_cache_hits_total",
    "kvstore_cache_misses_total",
    "etcd_mvcc_put_total",
    "etcd_mvcc_range_total",
    "etcd_mvcc_delete_total",
    "etcd_mvcc_txn_total",
    "kvstore_loop_stall_seconds_bucket",
    "kvstore_gc_pause_seconds_bucket",
    "kvstore_limits_reached_total",
    "etcd_debugging_lease_granted_total",
    "etcd_debugging_lease_renewed_total",
    "etcd_debugging_lease_revoked_total",
    "etcd_debugging_server_lease_expired_total",
]
"""What alerts and dashboards of etcd read, as far as it means something here, and what ours do."""


@pytest.fixture
def steps() -> Steps:
    """Commits under the test's control."""
    return Steps()


async def test_names() -> None:
    """After a health check and a call everything that is promised is on the page, once."""
    async with living(House([memory()])) as house, connected(house.port) as peer:
        await peer.answer(put(peer, b"k"))
        await page(house.port, "/health")
        await page(house.port, "/readyz")
        body = (await scrape(house)).text
    missing = [
        name for name in EXPECTED if not re.search(rf"^(# TYPE )?{name}\b", body, re.MULTILINE)
    ]
    assert missing == []
    typed = re.findall(r"^# TYPE (\S+)", body, re.MULTILINE)
    assert len(typed) == len(set(typed))
    assert "etcd_server_quota_backend_bytes" not in body  # 0 would fire the alerts


async def test_calls() -> None:
    """Calls are counted by method and code when they end, and timed."""
    async with living(House([memory()])) as house, connected(house.port) as peer:
        for key in (b"a", b"b", b""):
            await peer.answer(put(peer, key))
        await peer.call(RANGE, pb.RangeRequest(key=b"a").SerializeToString())
        await peer.call("/etcdserverpb.KV/Nonsense")
        seen = await scrape(house)
    kv = {"grpc_service": "etcdserverpb.KV", "grpc_type": "unary"}
    for method, code, count in (
        ("Put", "OK", 2),
        ("Put", "InvalidArgument", 1),
        ("Range", "OK", 1),
    ):
        labels = {"grpc_method": method, "grpc_code": code, **kv}
        assert seen.number("grpc_server_handled_total", **labels) == count
    assert seen.number("grpc_server_started_total", grpc_method="Put", **kv) == 3
    timed = {"grpc_method": "Put", **kv}
    assert seen.number("grpc_server_handling_seconds_count", **timed) == 3
    assert seen.number("grpc_server_handling_seconds_bucket", le="+Inf", **timed) == 3


async def test_operations_and_the_cache() -> None:
    """Operations are counted as etcd does, values by where they were found."""
    frugal = replace(QUICK, store=replace(QUICK.store, cache_bytes_max=0, recent_bytes_max=0))
    both = pb.RangeRequest(key=b"a", range_end=b"c").SerializeToString()
    for config, hits, misses in ((QUICK, 3, 0), (frugal, 1, 2)):  # what was just read is kept
        async with living(House([memory()], config)) as house, connected(house.port) as peer:
            for key in (b"a", b"b"):
                await peer.answer(put(peer, key))
            await peer.call(RANGE, both)
            await peer.call(RANGE, pb.RangeRequest(key=b"a").SerializeToString())
            await peer.call(RANGE, pb.RangeRequest(key=b"a", keys_only=True).SerializeToString())
            txn = pb.TxnRequest()
            txn.success.add().request_put.key = b"c"
            txn.success.add().request_delete_range.key = b"b"
            txn.success.add().request_range.MergeFromString(both)
            txn.success[2].request_range.count_only = True
            await peer.call("/etcdserverpb.KV/Txn", txn.SerializeToString())
            seen = await scrape(house)
        for name, count in (("put", 3), ("range", 4), ("delete", 1), ("txn", 1)):
            assert seen.number(f"etcd_mvcc_{name}_total") == count
        assert seen.number("kvstore_cache_hits_total") == hits
        assert seen.number("kvstore_cache_misses_total") == misses


async def test_what_waits(steps: Steps) -> None:
    """While a commit hangs its rows are pending, its revision is not committed; then they are."""
    async with living(House([memory(steps)])) as house, connected(house.port) as peer:
        putting = put(peer, b"k", b"value")
        await eventually(lambda: len(steps.waiting) > 0)
        before = await scrape(house)
        steps.run_all()
        await peer.answer(putting)
        after = await scrape(house)
    for seen, pending, durable in ((before, 1, 1), (after, 0, 2)):
        assert seen.number("etcd_server_proposals_pending") == pending
        assert seen.number("kvstore_queue_rows", shard="default") == pending
        assert (seen.number("kvstore_queue_bytes", shard="default") > 0) == bool(pending)
        assert seen.number("etcd_server_proposals_committed_total") == durable
        assert seen.number("etcd_debugging_mvcc_current_revision") == 2
        assert seen.number("etcd_debugging_mvcc_keys_total") == 1
    assert after.number("kvstore_commit_rows_sum", shard="default") == 1
    assert after.number("kvstore_commit_seconds_count", shard="default") == 1
    assert after.number("etcd_disk_backend_commit_duration_seconds_count") == 1
    assert after.number("kvstore_cache_bytes") > 0


async def test_watchers() -> None:
    """Streams and watchers are counted while they last, events when they are sent."""
    async with living(House([memory()])) as house, connected(house.port) as peer:
        create = pb.WatchCreateRequest(key=b"\0", range_end=b"\0")
        body = pb.WatchRequest(create_request=create).SerializeToString()
        sid = peer.start(WATCH)
        peer.send(DataFrame(sid, message(body)))
        await peer.until(lambda f: isinstance(f, DataFrame) and f.stream_id == sid)
        await peer.answer(put(peer, b"k"))
        during = await scrape(house)
        peer.send(RstStreamFrame(sid, error_code=8))
        await peer.settle()
        after = await scrape(house)
    for seen, count in ((during, 1), (after, 0)):
        assert seen.number("etcd_debugging_mvcc_watch_stream_total") == count
        assert seen.number("etcd_debugging_mvcc_watcher_total") == count
        assert seen.number("etcd_debugging_mvcc_events_total") == 1
        assert seen.number("etcd_debugging_mvcc_slow_watcher_total") == 0
        assert seen.number("kvstore_watch_lag_revisions") == 0


async def test_shard_that_is_out(steps: Steps) -> None:
    """A shard whose commits hang for too long is out, until they go on."""
    async with living(House([memory(steps)])) as house, connected(house.port) as peer:
        putting = put(peer, b"k")
        await peer.answer(putting)
        out = await scrape(house)
        steps.run_all()
        back = await scrape(house)
    for seen, number, state in ((out, 1, "out"), (back, 0, "serving")):
        assert seen.number("kvstore_shard_out", shard="default") == number
        assert seen.true("kvstore_shard_state")["state"] == state
        assert seen.true("kvstore_shard_last_error")["error"] == "no_answer"
        assert seen.number("kvstore_shard_errors_total", error="no_answer") == 1


async def test_health_checks() -> None:
    """Health checks are counted by path, name and result."""
    async with living(House([memory()])) as house:
        for target in ("/health", "/health", "/livez", "/readyz/non_learner"):
            await page(house.port, target)
        seen = await scrape(house)
    assert seen.number("etcd_server_health_success") == 2
    assert seen.number("etcd_server_health_failures") == 0
    for kind, name in (("livez", "serializable_read"), ("readyz", "non_learner")):
        labels = {"type": kind, "name": name}
        assert seen.number("etcd_server_healthchecks_total", status="success", **labels) == 1
        assert seen.number("etcd_server_healthcheck", **labels) == 1


def test_unknown_codes_and_paths() -> None:
    """A code that gRPC does not know has a name all the same; unknown paths make no new series."""
    calls = CallMetrics([Method.unary(b"/s.S/M", lambda _, __: b"")])
    calls.observe(b"/s.S/M", 99, 0.1)
    calls.observe(b"/anything/else", 0, 0.1)
    text = read(calls.collect).text
    assert 'grpc_code="Code(99)"' in text
    assert "anything" not in text


def test_cost_of_a_call() -> None:
    """Nothing grows with the number of calls: after many there are as many series as after one."""
    calls = CallMetrics([Method.unary(b"/s.S/M", lambda _, __: b"")])
    exposed = make_exposition([calls.collect])
    calls.observe(b"/s.S/M", 0, 0.1)
    lines = len(exposed().splitlines())
    for number in range(1000):
        calls.observe(b"/s.S/M", 0, number / 100)
    assert len(exposed().splitlines()) == lines


def test_histograms_on_the_page() -> None:
    """Buckets add up, sum and count are there, as Prometheus wants them."""
    calls = CallMetrics([Method.unary(b"/s.S/M", lambda _, __: b"")])
    for seconds in (0.001, 0.02, 0.02, 100.0):
        calls.observe(b"/s.S/M", 0, seconds)
    seen = read(calls.collect)
    name = "grpc_server_handling_seconds"
    assert [seen.number(f"{name}_bucket", le=le) for le in ("0.005", "0.025", "10", "+Inf")] == [
        *(1, 3, 3, 4)
    ]
    assert (seen.number(f"{name}_count"), seen.number(f"{name}_sum")) == (4, 100.041)
    assert Histogram([1.0]).buckets() == [("1", 0.0), ("+Inf", 0.0)]
