"""A server over two files and a PostgreSQL under load, while something happens to the PostgreSQL.

**Calm** writers and watchers have to do with the files alone and must notice nothing; **stormy**
ones write to the PostgreSQL, some across all shards. Every request is remembered, and in the end
the watchers' histories must consist of whole requests (see ``writers``).
"""

import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from kvstore.pb import rpc_pb2 as pb
from tests import program
from tests.backends.postgres_cluster import MISSING, Cluster, find_programs
from tests.scrape import Scrape
from tests.writers import (
    AGENTS,
    CORE,
    END,
    EVENTS,
    PLACES,
    PREFIX,
    Attempt,
    Watcher,
    Writer,
    ask,
    check_attempts,
    check_history,
    eventually,
    find,
)

SHARD_TIMEOUT_SECONDS = 2
TIMED_OUT = (grpc.StatusCode.UNAVAILABLE, "etcdserver: request timed out")
STOPPED = (grpc.StatusCode.UNAVAILABLE, "etcdserver: server stopped")


def programs() -> Path:
    """PostgreSQL's; the test is skipped without them."""
    found = find_programs()
    if found is None:
        pytest.skip(MISSING)
    return found


def psql(cluster: Cluster, text: str) -> str:
    """What one statement gives, as text."""
    where = ("--host", str(cluster.directory), "--port", str(cluster.port), "--username", "kv")
    flags = ("--no-align", "--tuples-only", "--dbname", "postgres")
    return cluster.run("psql", *where, *flags, "--command", text).strip()


class Load:
    """See the module's text; made by ``under_load``."""

    def __init__(self, server: program.Program, channel: grpc.Channel, seed: int) -> None:
        self.server = server
        self.channel = channel
        self.address = program.url(server)
        dice = [random.Random(seed + n) for n in range(5)]
        self.calm = [Writer(n, dice[n], (CORE, EVENTS), patient=True) for n in range(2)]
        over = [(AGENTS,), (AGENTS,), PLACES]
        self.stormy = [
            Writer(n, dice[n], over[n - 2], leases=False, patient=True) for n in range(2, 5)
        ]
        self.watchers = {place: Watcher(place) for place in (*PLACES, PREFIX)}
        self.probes: list[Attempt] = []
        self._stop = threading.Event()
        writers = [
            threading.Thread(target=writer.work, args=(channel, self._stop))
            for writer in (*self.calm, *self.stormy)
        ]
        watchers = [
            threading.Thread(target=watcher.work, args=(channel,))
            for watcher in self.watchers.values()
        ]
        self._threads = [*watchers, *writers]
        self._writing = writers
        for thread in self._threads:
            thread.start()

    # -- asking ------------------------------------------------------------------------------------

    def attempts(self, writers: list[Writer]) -> list[Attempt]:
        """All requests of some writers."""
        return [attempt for writer in writers for attempt in writer.attempts]

    def answered(self, writers: list[Writer]) -> int:
        """How many requests of some writers were answered."""
        return sum(attempt.revision is not None for attempt in self.attempts(writers))

    def work(self, writers: list[Writer], requests: int = 20) -> None:
        """Let some writers get that much done, at least."""
        before = self.answered(writers)
        assert eventually(lambda: self.answered(writers) >= before + requests), "they get on"

    def probe(self, key: bytes = AGENTS + b"probe") -> tuple[grpc.StatusCode, str | None] | None:
        """How one put ends; None: well."""
        value = b"probe %d" % len(self.probes)
        attempt = Attempt({key: value})
        self.probes.append(attempt)
        try:
            answer = ask(
                self.channel, "KV/Put", pb.PutRequest(key=key, value=value), pb.PutResponse
            )
        except grpc.RpcError as error:
            return error.code(), error.details()
        attempt.revision = answer.header.revision
        return None

    def read(self, *, serializable: bool) -> tuple[grpc.StatusCode, str | None] | None:
        """How a get of a key in PostgreSQL ends; None: well."""
        request = pb.RangeRequest(key=AGENTS + b"probe", serializable=serializable)
        try:
            ask(self.channel, "KV/Range", request, pb.RangeResponse)
        except grpc.RpcError as error:
            return error.code(), error.details()
        return None

    def page(self, target: str) -> tuple[int, str]:
        """A page of the server: status and body."""
        status, _, body = program.http(self.address, target)
        return status, body.decode()

    def metrics(self) -> Scrape:
        """The page of metrics."""
        return Scrape(self.page("/metrics")[1])

    # -- judging -----------------------------------------------------------------------------------

    def check_degraded(self, state: str) -> None:
        """Every page tells that one shard is in ``state``, and that the server is not down."""
        status, ready = self.page("/readyz")
        assert status == 200
        assert f"[-]shard_agents failed: {state}: " in ready
        assert ready.endswith("ok (degraded)\n")
        assert "[+]shard_core ok\n[+]shard_events ok\n" in ready
        assert self.page("/readyz/shard_agents")[0] == 503
        assert self.page("/livez")[0] == 200
        assert self.page("/health") == (200, '{"health":"true","reason":""}')
        found = self.metrics()
        assert found.true("kvstore_shard_state", shard="agents")["state"] == state
        out = {name: found.number("kvstore_shard_out", shard=name) for name in ("core", "events")}
        assert out == {"core": 0, "events": 0}
        assert found.number("kvstore_shard_out", shard="agents") == 1

    def check_whole(self) -> None:
        """Every page tells that all shards serve."""
        assert self.page("/readyz") == (200, "ok\n")
        assert self.page("/readyz/shard_agents")[0] == 200
        found = self.metrics()
        assert found.true("kvstore_shard_state", shard="agents")["state"] == "serving"
        assert sum(found.all("kvstore_shard_out")) == 0

    def rest(self) -> None:
        """End the writers."""
        self._stop.set()
        for thread in self._writing:
            thread.join(program.PATIENCE)
            assert not thread.is_alive(), "every request has an end"

    def check_watchers(self) -> None:
        """After ``rest``: no watcher was cut off, and all have seen the same whole requests, to the
        last one.
        """
        marks = {place: len(self.probes) + n for n, place in enumerate(PLACES)}
        for place in marks:
            assert self.probe(place + b"probe") is None
        ends = {place: self.probes[n].revision or 0 for place, n in marks.items()}
        ends[PREFIX] = max(ends.values())
        for prefix, watcher in self.watchers.items():
            watcher.wait_for(ends[prefix])
            assert watcher.open, "a watch outlives the outage"
        events = self.watchers[PREFIX].events
        state = check_history(events)
        check_attempts(events, [*self.attempts([*self.calm, *self.stormy]), *self.probes])
        for place in PLACES:
            own = [event for event in events if event.kv.key.startswith(place)]
            assert own == self.watchers[place].events
        final = find(self.channel, PREFIX, END)
        assert [state[key] for key in sorted(state)] == list(final.kvs)

    def end(self) -> None:
        """Let go of the server."""
        self._stop.set()
        self.channel.close()
        for thread in self._threads:
            thread.join(program.PATIENCE)
            assert not thread.is_alive(), "nothing waits for a channel that is closed"


@contextmanager
def under_load(data: Path, config: str, *, seed: int) -> Iterator[Load]:
    """Serve, with everybody at work on entry."""
    timeout = f"--shard-timeout={SHARD_TIMEOUT_SECONDS}s"
    with program.serving(data, config, timeout) as server:
        load = Load(server, grpc.insecure_channel(program.url(server)), seed)
        try:
            load.work(load.calm)
            load.work(load.stormy)
            yield load
        finally:
            load.end()


def stop(load: Load, number: signal.Signals = signal.SIGTERM) -> int:
    """End the server; its exit code. Its whole log can be read then."""
    load.server.process.send_signal(number)
    return load.server.finish()


def seconds_of(load: Load) -> tuple[float, tuple[grpc.StatusCode, str | None] | None]:
    """How long one put took, and how it ended."""
    began = time.monotonic()
    ended = load.probe()
    return time.monotonic() - began, ended
