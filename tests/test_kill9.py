"""kill -9 of the real server on SQLite, again and again, under writers and a watcher.

What was acknowledged must be there afterwards, at its revision; what was not may be there once or
not at all; the watcher, which resumes after each crash from the last revision it saw, must have
seen one unbroken history, and the final state must be its replay.
``KILL9_CYCLES`` sets how often the server dies.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from kvstore.pb import kv_pb2
from kvstore.pb import rpc_pb2 as pb
from tests import program

CYCLES = int(os.environ.get("KILL9_CYCLES", "30"))
PREFIX = b"/registry/kill/"
END = b"/registry/kill0"
WRITERS = 4
KEYS_PER_WRITER = 5


def txn(channel: grpc.Channel, request: pb.TxnRequest) -> pb.TxnResponse:
    """One Txn; it fails at once when the server is gone."""
    call = channel.unary_unary(
        "/etcdserverpb.KV/Txn",
        request_serializer=pb.TxnRequest.SerializeToString,
        response_deserializer=pb.TxnResponse.FromString,
    )
    answer: pb.TxnResponse = call(request, timeout=10)
    return answer


def range_(channel: grpc.Channel, request: pb.RangeRequest) -> pb.RangeResponse:
    """One Range; likewise."""
    call = channel.unary_unary(
        "/etcdserverpb.KV/Range",
        request_serializer=pb.RangeRequest.SerializeToString,
        response_deserializer=pb.RangeResponse.FromString,
    )
    answer: pb.RangeResponse = call(request, timeout=10)
    return answer


@dataclass
class Attempt:
    """One write: a put of ``value``, a delete if None; ``revision`` once acknowledged."""

    key: bytes
    value: bytes | None
    revision: int | None = None


@dataclass
class Writer:
    """Writes its own keys as kube-apiserver does: on the revision that it saw last."""

    number: int
    random: random.Random
    attempts: list[Attempt] = field(default_factory=list)
    seen: dict[bytes, int | None] = field(default_factory=dict)
    """mod_revision of each key, 0 when it is not there, None when that is not known."""

    def work(self, channel: grpc.Channel, stop: threading.Event) -> None:
        """Write until the server is gone."""
        try:
            while not stop.is_set():
                key = PREFIX + b"%d/%d" % (self.number, self.random.randrange(KEYS_PER_WRITER))
                if self.seen.get(key) is None:
                    found = range_(channel, pb.RangeRequest(key=key)).kvs
                    self.seen[key] = found[0].mod_revision if found else 0
                self._write(channel, key)
        except grpc.RpcError:
            return

    def _write(self, channel: grpc.Channel, key: bytes) -> None:
        before = self.seen[key]
        request = pb.TxnRequest()
        compare = request.compare.add(key=key, target=pb.Compare.MOD)
        compare.mod_revision = before or 0
        attempt = Attempt(key, b"%d-%d" % (self.number, len(self.attempts)))
        if before and self.random.random() < 0.2:
            attempt.value = None
            request.success.add().request_delete_range.key = key
        else:
            put = request.success.add().request_put
            put.key, put.value = key, attempt.value or b""
        self.attempts.append(attempt)
        self.seen[key] = None
        answer = txn(channel, request)
        assert answer.succeeded, "nobody else writes this key"
        attempt.revision = answer.header.revision
        self.seen[key] = answer.header.revision if attempt.value is not None else 0


@dataclass
class Watcher:
    """Follows every change, over all of the server's lives."""

    events: list[kv_pb2.Event] = field(default_factory=list)
    shown: int = 1
    """The highest revision that any header has shown."""

    def work(self, channel: grpc.Channel, until: int | None = None) -> None:
        """Watch from where it stands, to the server's end, or to ``until``, which must come."""
        last = self.events[-1].kv.mod_revision if self.events else 1
        request = pb.WatchRequest()
        create = request.create_request
        create.key, create.range_end = PREFIX, END
        create.start_revision, create.prev_kv = last + 1, True
        done = threading.Event()

        def requests() -> Iterator[bytes]:
            yield request.SerializeToString()
            done.wait()

        watch: grpc.StreamStreamMultiCallable[bytes, pb.WatchResponse] = channel.stream_stream(
            "/etcdserverpb.Watch/Watch", response_deserializer=pb.WatchResponse.FromString
        )
        stream = watch(requests(), timeout=program.PATIENCE if until else None)
        try:
            for response in stream:
                assert not response.canceled, response
                assert response.header.revision >= self.shown, "no revision is taken back"
                self.shown = response.header.revision
                self.events += response.events
                if until and self.events and self.events[-1].kv.mod_revision >= until:
                    return
        except grpc.RpcError:
            assert not until, "every acknowledged revision is shown"
        finally:
            done.set()
            stream.cancel()


def live(running: program.Program, writers: list[Writer], watcher: Watcher, seconds: float) -> None:
    """Let everybody work for a while, then kill the server."""
    stop = threading.Event()
    channel = grpc.insecure_channel(program.url(running))
    workers = [threading.Thread(target=w.work, args=(channel, stop)) for w in writers]
    workers.append(threading.Thread(target=watcher.work, args=(channel,)))
    for worker in workers:
        worker.start()
    time.sleep(seconds)
    running.process.send_signal(signal.SIGKILL)
    running.process.wait(program.PATIENCE)
    stop.set()
    channel.close()
    for worker in workers:
        worker.join(program.PATIENCE)
        assert not worker.is_alive(), "everybody notices that the server is gone"


def die_while_starting(data: Path, seconds: float) -> None:
    """Kill a server that is opening its files, or loading, or just ready."""
    words = ("serve", "--data-dir", str(data), "--listen-client-urls=http://127.0.0.1:0")
    with subprocess.Popen(
        [sys.executable, "-m", "kvstore", *words], cwd=program.ROOT, stderr=subprocess.DEVNULL
    ) as process:
        time.sleep(seconds)
        process.kill()


def check_history(events: list[kv_pb2.Event]) -> dict[bytes, kv_pb2.KeyValue]:
    """Revisions rise, each key's chain is whole; returns the state that the history leads to."""
    state: dict[bytes, kv_pb2.KeyValue] = {}
    last = 1
    for event in events:
        pair, before = event.kv, state.get(event.kv.key)
        assert pair.mod_revision > last, "each revision once, in order"
        last = pair.mod_revision
        if before is None:
            assert not event.HasField("prev_kv")
        else:
            assert event.prev_kv == before
        if event.type == kv_pb2.Event.DELETE:
            assert before is not None, "only what was there is deleted"
            del state[pair.key]
            continue
        assert pair.version == (before.version + 1 if before else 1)
        assert pair.create_revision == (before.create_revision if before else pair.mod_revision)
        state[pair.key] = pair
    return state


def check_attempts(events: list[kv_pb2.Event], attempts: list[Attempt]) -> None:
    """Acknowledged writes are in the history at their revision; others once or never."""
    at = {event.kv.mod_revision: event for event in events}
    puts = [event.kv.value for event in events if event.type == kv_pb2.Event.PUT]
    assert len(puts) == len(set(puts)), "no write was done twice"
    for attempt in attempts:
        if attempt.revision is None:
            continue
        event = at[attempt.revision]
        assert event.kv.key == attempt.key
        assert (event.type == kv_pb2.Event.DELETE) == (attempt.value is None)
        assert event.kv.value == (attempt.value or b"")
    tried = {attempt.value for attempt in attempts}
    assert set(puts) <= tried, "nothing that nobody wrote"


@pytest.mark.slow
def test_kill9(tmp_path: Path) -> None:
    """No crash loses what was acknowledged, repeats a revision or tears the watcher's history."""
    seed = 20261125
    chance = random.Random(seed)
    writers = [Writer(n, random.Random(seed + n)) for n in range(WRITERS)]
    watcher = Watcher()
    for _ in range(CYCLES):
        if chance.random() < 0.2:
            die_while_starting(tmp_path, chance.uniform(0.3, 1.0))
        with program.serving(tmp_path) as running:
            live(running, writers, watcher, chance.uniform(0.1, 0.6))
    with program.serving(tmp_path) as running:
        channel = grpc.insecure_channel(program.url(running))
        final = range_(channel, pb.RangeRequest(key=PREFIX, range_end=END))
        attempts = [attempt for writer in writers for attempt in writer.attempts]
        acknowledged = [a.revision for a in attempts if a.revision is not None]
        assert final.header.revision >= max(acknowledged), "no revision is taken back"
        watcher.work(channel, final.header.revision)  # deletes that nobody was told of included
        channel.close()
    state = check_history(watcher.events)
    check_attempts(watcher.events, attempts)
    assert sorted(state) == [pair.key for pair in final.kvs]
    assert [state[pair.key] for pair in final.kvs] == list(final.kvs)
    assert len(acknowledged) > CYCLES, "the writers did get something done"
    code, out, _ = program.run("check", "--data-dir", str(tmp_path))
    assert code == 0, out
