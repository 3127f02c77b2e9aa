"""An asynchronous standby that lacks acknowledged writes takes over, under a server and between
two: its shard is not served before somebody accepts the loss, and then nobody is left with a past
that is not there any more.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc
import pytest

from kvstore import cli
from tests import program
from tests.backends.postgres_cluster import Cluster, temporary_cluster
from tests.outage import STOPPED, TIMED_OUT, Load, programs, psql, stop, under_load
from tests.writers import (
    AGENTS,
    CORE,
    END,
    EVENTS,
    PREFIX,
    Watcher,
    check_history,
    eventually,
    find,
    three_shards,
)

pytestmark = [pytest.mark.postgres, pytest.mark.slow]


class Pair:
    """A PostgreSQL and its asynchronous standby, which takes over under the same address."""

    def __init__(self, primary: Cluster, standby: Cluster) -> None:
        self.primary = primary
        self._standby = standby
        standby.copy_from(primary)
        standby.start()

    def part(self) -> None:
        """What is written from now on is on the primary alone; waits for all before."""
        written = psql(self.primary, "SELECT pg_current_wal_lsn()")
        caught_up = f"SELECT pg_last_wal_replay_lsn() >= '{written}'"
        assert eventually(lambda: psql(self._standby, caught_up) == "t")
        self._standby.stop()

    def fail_over(self) -> None:
        """The primary is gone, and the standby becomes one."""
        self.primary.stop("immediate")
        self._standby.port = self.primary.port
        self._standby.configure()
        self._standby.start()
        self._standby.promote()

    def end(self) -> None:
        """Stop the standby."""
        self._standby.stop("immediate", check=False)


@contextmanager
def paired() -> Iterator[Pair]:
    """Both, running."""
    place = programs()
    with (
        temporary_cluster(place) as primary,
        TemporaryDirectory(prefix="kvstore-postgres-", dir="/tmp") as directory,
    ):
        pair = Pair(primary, Cluster(place, Path(directory)))
        try:
            yield pair
        finally:
            pair.end()


def lose(pair: Pair, load: Load) -> None:
    """Have writes acknowledged that the standby lacks."""
    assert load.probe() is None
    pair.part()
    load.work(load.stormy)
    assert load.probe() is None


def check_broken(load: Load) -> None:
    """The running server says what to do, and serves the other shards."""
    line = load.server.until("shard lost until a restart")
    assert line["shard"] == "agents"
    assert "acknowledged writes are lost: revision" in str(line["reason"])
    assert "restart with --accept-data-loss" in str(line["reason"])
    assert load.probe() == STOPPED
    assert load.read(serializable=True) == STOPPED
    load.check_degraded("broken")
    assert "--accept-data-loss" in load.page("/readyz")[1]
    load.work(load.calm)
    assert all(watcher.open for watcher in load.watchers.values())


def check_calm(load: Load) -> None:
    """Whoever had nothing to do with it has noticed nothing."""
    load.rest()
    assert [writer.refused for writer in load.calm] == [[], []]
    allowed = {TIMED_OUT, STOPPED}
    assert {refusal for writer in load.stormy for refusal in writer.refused} <= allowed


def check_refused(data: Path, config: str, why: str) -> None:
    """The next start says what to do, in one line."""
    words = ("serve", "--data-dir", str(data), config, "--listen-client-urls=http://127.0.0.1:0")
    code, out, error = program.run(*words)
    assert (code, out, error.count("\n")) == (cli.EXIT_REFUSED, "", 1)
    assert why in error
    assert "--accept-data-loss goes on without " in error


def check_accepted(load: Load, data: Path, config: str) -> None:
    """The order goes on above all that was ever shown, all before counts as compacted, what is not
    lost is there.
    """
    shown = max(watcher.shown for watcher in load.watchers.values())
    with program.serving(data, config, "--accept-data-loss") as server:
        base, compacted = server.log[-1]["revision"], server.log[-1]["compact_revision"]
        assert isinstance(base, int)
        assert base == compacted
        assert base > shown
        with grpc.insecure_channel(program.url(server)) as channel:
            for prefix, old in load.watchers.items():
                watcher = Watcher(prefix, list(old.events))
                watcher.work(channel)
                assert watcher.compacted == base, "a watcher starts anew"
            found = find(channel, PREFIX, END).kvs
            for place in (CORE, EVENTS):
                state = check_history(load.watchers[place].events)
                kept = [pair for pair in found if pair.key.startswith(place)]
                assert kept == [state[key] for key in sorted(state)]
            (probe,) = (pair for pair in found if pair.key == AGENTS + b"probe")
            assert probe.value == b"probe 0", "and not the lost one"
            assert program.put(channel, AGENTS + b"probe", b"new").header.revision == base + 1
        assert server.stop() == 0
    with program.serving(data, config) as server:
        with grpc.insecure_channel(program.url(server)) as channel:
            assert program.get(channel, AGENTS + b"probe") == [b"new"]
        assert server.stop() == 0


def test_under_a_server(tmp_path: Path) -> None:
    """The shard is lost until a restart, which is refused until the loss is accepted."""
    data = tmp_path / "data"
    with paired() as pair:
        config = three_shards(tmp_path, pair.primary.url("agents"))
        with under_load(data, config, seed=3) as load:
            lose(pair, load)
            pair.fail_over()
            check_broken(load)
            check_calm(load)
            for place in (CORE, EVENTS):
                assert load.probe(place + b"probe") is None
                load.watchers[place].wait_for(load.probes[-1].revision or 0)
            assert stop(load) == 1
        check_refused(data, config, "acknowledged writes are lost: revision ")
        check_accepted(load, data, config)


def test_between_two_servers(tmp_path: Path) -> None:
    """A server that starts afterwards refuses it, too, though nobody could tell it what there was
    but home's records and the database itself.
    """
    data = tmp_path / "data"
    with paired() as pair:
        config = three_shards(tmp_path, pair.primary.url("agents"))
        with under_load(data, config, seed=4) as load:
            lose(pair, load)
            check_calm(load)
            load.check_watchers()
            assert stop(load, signal.SIGKILL) == -signal.SIGKILL
        pair.fail_over()
        check_refused(data, config, "this is not the database of before")
        check_accepted(load, data, config)
