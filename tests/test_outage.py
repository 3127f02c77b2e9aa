"""One database of a server dies or stands still under load, and comes back: whoever has to do with
it is refused in time, everybody else notices nothing, and no watcher misses anything.
"""

import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.backends.postgres_cluster import Cluster, temporary_cluster
from tests.outage import SHARD_TIMEOUT_SECONDS, TIMED_OUT, Load, programs, seconds_of, under_load
from tests.writers import eventually, three_shards

FROZEN_SECONDS = 8.0
"""Longer than a commit's answer is waited for: the connection is given up, too."""

pytestmark = [pytest.mark.postgres, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A PostgreSQL that a test may stop."""
    with temporary_cluster(programs()) as cluster:
        yield cluster


def check_refusals(load: Load) -> None:
    """The lost shard's keys are refused after a while, then at once; the others are served."""
    first, ended = seconds_of(load)
    assert ended == TIMED_OUT
    refused = [seconds_of(load) for _ in range(9)]
    assert {ended for _, ended in refused} == {TIMED_OUT}
    median = statistics.median(seconds for seconds, _ in refused)
    assert median < SHARD_TIMEOUT_SECONDS / 2, "known to be out: at once"
    assert load.read(serializable=False) == TIMED_OUT
    assert load.read(serializable=True) is None
    load.work(load.calm)
    told = f"first refusal after {first:.3f} s, then {median * 1000:.1f} ms (median)"
    sys.stdout.write(f"{told}, timeout {SHARD_TIMEOUT_SECONDS} s\n")


def check_return(load: Load) -> None:
    """The lost shard's keys are served again, and everybody has seen everything."""
    began = time.monotonic()
    assert eventually(lambda: load.probe() is None), "it is back by itself"
    sys.stdout.write(f"served again {time.monotonic() - began:.3f} s after its database\n")
    load.work(load.stormy)
    load.check_whole()
    load.rest()
    assert [writer.refused for writer in load.calm] == [[], []]
    refused = {refusal for writer in load.stormy for refusal in writer.refused}
    assert refused <= {TIMED_OUT}, "or they have waited all the while"
    load.check_watchers()


def test_a_database_dies_and_is_started_again(cluster: Cluster, tmp_path: Path) -> None:
    """A crash of PostgreSQL refuses its own keys until it is back, and nothing else."""
    config = three_shards(tmp_path, cluster.url("dies"))
    with under_load(tmp_path / "data", config, seed=1) as load:
        cluster.stop("immediate")
        try:
            check_refusals(load)
            load.check_degraded("out")
        finally:
            cluster.start()
        check_return(load)
        assert load.server.stop() == 0
    messages = [line["msg"] for line in load.server.log]
    assert messages.count("shard does not commit") == messages.count("shard commits again") == 1


def test_a_database_stands_still_and_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    """So does one whose processes are stopped: connections are there, and nobody answers."""
    config = three_shards(tmp_path, cluster.url("stands_still"))
    with under_load(tmp_path / "data", config, seed=2) as load:
        with cluster.frozen():
            frozen_at = time.monotonic()
            check_refusals(load)
            load.check_degraded("out")
            held = load.metrics().number("kvstore_watchers_held", shard="agents", reason="out")
            assert held == 2, "the watchers of its keys, and of all keys"
            assert eventually(lambda: time.monotonic() > frozen_at + FROZEN_SECONDS)
            assert load.probe() == TIMED_OUT
        check_return(load)
        assert load.server.stop() == 0
