"""Clients that write and watch while servers and databases die, and what must be true of that.

Each writer has keys of its own, so that it knows what it may find, and remembers every request. The
history that a watcher has seen over all of it must then consist of whole requests: those that were
answered at their revision, others once or not at all, and nothing else. A request over several
shards that was done in part, or twice, is a revision that nobody asked for.

Keys are in three **places**, the prefixes that ``three_shards`` routes to a shard each.
"""

import random
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import grpc
from google.protobuf.message import Message

from kvstore.pb import kv_pb2
from kvstore.pb import rpc_pb2 as pb
from tests import program

PREFIX = b"/registry/kill/"
END = b"/registry/kill0"
CORE, EVENTS, AGENTS = PLACES = (PREFIX + b"core/", PREFIX + b"events/", PREFIX + b"agents/")
KEYS_PER_PLACE = 3
TTL_SECONDS = 600
"""Of leases that end by being revoked only."""
CONFIG = """\
shards:
  - {{name: core, backend: "sqlite:core.db"}}
  - {{name: events, backend: "sqlite:events.db"}}
  - {{name: agents, backend: "{agents}"}}
routes:
  - {{prefix: /registry/kill/events/, shard: events}}
  - {{prefix: /registry/kill/agents/, shard: agents}}
"""

AnswerT = TypeVar("AnswerT", bound=Message)
Group = frozenset[tuple[bytes, bytes | None]]
"""What one revision changes: values by key, None where it deletes."""


def three_shards(directory: Path, agents: str = "sqlite:agents.db") -> str:
    """Write the file of a map with a shard for each place; ``agents`` is the URL of the last."""
    path = directory / "shards.yaml"
    path.write_text(CONFIG.format(agents=agents))
    return f"--config={path}"


def ask(
    channel: grpc.Channel, method: str, request: Message, answer: type[AnswerT], seconds: float = 20
) -> AnswerT:
    """One unary call; it fails at once when the server is gone."""
    call = channel.unary_unary(
        f"/etcdserverpb.{method}",
        request_serializer=type(request).SerializeToString,
        response_deserializer=answer.FromString,
    )
    answered: AnswerT = call(request, timeout=seconds)
    return answered


def find(channel: grpc.Channel, key: bytes, end: bytes = b"") -> pb.RangeResponse:
    """One Range."""
    return ask(channel, "KV/Range", pb.RangeRequest(key=key, range_end=end), pb.RangeResponse)


@dataclass
class Attempt:
    """One request that changes something; ``revision`` once it is answered."""

    changes: dict[bytes, bytes | None]
    revision: int | None = None

    @property
    def group(self) -> Group:
        """As the history shows it."""
        return frozenset(self.changes.items())


@dataclass
class Writer:
    """Writes its own keys as kube-apiserver does, on the revisions that it saw last; several of
    them at a time now and then, some of them under a lease that it revokes.

    ``patient``: goes on when a request is refused, and remembers that in ``refused``.
    """

    number: int
    random: random.Random
    places: Sequence[bytes] = PLACES
    leases: bool = True
    patient: bool = False
    attempts: list[Attempt] = field(default_factory=list)
    refused: list[tuple[grpc.StatusCode, str | None]] = field(default_factory=list)
    seen: dict[bytes, int | None] = field(default_factory=dict)
    """mod_revision of each key, 0 when it is not there, None when that is not known."""
    lease: int = 0
    attached: set[bytes] = field(default_factory=set)
    """Keys under ``lease``, of those that are known."""

    def __post_init__(self) -> None:
        numbers = range(KEYS_PER_PLACE)
        keys = [place + b"%d/%d" % (self.number, n) for place in self.places for n in numbers]
        self.seen = dict.fromkeys(keys)

    def work(self, channel: grpc.Channel, stop: threading.Event) -> None:
        """Write until the server is gone, or until told to stop."""
        while not stop.is_set():
            try:
                self._step(channel)
            except ValueError:  # the channel was closed
                return
            except grpc.RpcError as error:
                if not self.patient:
                    return
                self.refused.append((error.code(), error.details()))
                stop.wait(0.05)

    def _step(self, channel: grpc.Channel) -> None:
        chance = self.random.random()
        if not self.leases or chance > 0.15:
            several = self.random.random() < 0.3
            keys = self.random.sample(sorted(self.seen), 4 if several else 1)
            self._learn(channel, keys)
            self._write(channel, keys)
        elif self.lease:
            self._learn(channel, list(self.seen))
            self._revoke(channel)
        else:
            request = pb.LeaseGrantRequest(TTL=TTL_SECONDS)
            self.lease = ask(channel, "Lease/LeaseGrant", request, pb.LeaseGrantResponse).ID
            self.attached = set()

    def _learn(self, channel: grpc.Channel, keys: Sequence[bytes]) -> None:
        """Read those of ``keys`` that are not known."""
        for key in keys:
            if self.seen[key] is None:
                found = find(channel, key).kvs
                self.seen[key] = found[0].mod_revision if found else 0
                self.attached.discard(key)
                if found and self.lease and found[0].lease == self.lease:
                    self.attached.add(key)

    def _write(self, channel: grpc.Channel, keys: Sequence[bytes]) -> None:
        request, changes = pb.TxnRequest(), dict[bytes, bytes | None]()
        attached: set[bytes] = set()
        for key in keys:
            before = self.seen[key] or 0
            request.compare.add(key=key, target=pb.Compare.MOD, mod_revision=before)
            if before and self.random.random() < 0.2:
                changes[key] = None
                request.success.add().request_delete_range.key = key
                continue
            changes[key] = b"%d-%d" % (self.number, len(self.attempts))
            put = request.success.add().request_put
            put.key, put.value = key, changes[key] or b""
            if self.lease and self.random.random() < 0.5:
                put.lease = self.lease
                attached.add(key)
        attempt = self._attempt(changes)
        answer = ask(channel, "KV/Txn", request, pb.TxnResponse)
        if not answer.succeeded:  # what was refused before may have been done after that was read
            assert self.refused, "nobody else writes these keys"
            self.attempts.remove(attempt)
            return
        self._done(attempt, answer.header.revision)
        self.attached = self.attached.difference(keys) | attached

    def _revoke(self, channel: grpc.Channel) -> None:
        request, self.lease = pb.LeaseRevokeRequest(ID=self.lease), 0
        if not self.attached:
            ask(channel, "Lease/LeaseRevoke", request, pb.LeaseRevokeResponse)
            return
        attempt = self._attempt(dict.fromkeys(self.attached))
        answer = ask(channel, "Lease/LeaseRevoke", request, pb.LeaseRevokeResponse)
        self._done(attempt, answer.header.revision)

    def _attempt(self, changes: dict[bytes, bytes | None]) -> Attempt:
        self.attempts.append(Attempt(changes))
        self.seen.update(dict.fromkeys(changes))
        return self.attempts[-1]

    def _done(self, attempt: Attempt, revision: int) -> None:
        attempt.revision = revision
        for key, value in attempt.changes.items():
            self.seen[key] = 0 if value is None else revision


@dataclass
class Watcher:
    """Follows every change of a prefix, over all of the server's lives."""

    prefix: bytes = PREFIX
    events: list[kv_pb2.Event] = field(default_factory=list)
    shown: int = 1
    """The highest revision that events or progress have shown."""
    open: bool = False
    """Is the stream still there?"""
    compacted: int = 0
    """The first revision that can be watched, if a watch was cancelled for that."""

    @property
    def last(self) -> int:
        """The revision of the last event."""
        return self.events[-1].kv.mod_revision if self.events else 1

    def work(self, channel: grpc.Channel) -> None:
        """Watch from where it stands until the stream ends, with the server or the channel."""
        request = pb.WatchRequest()
        create = request.create_request
        create.key, create.range_end = self.prefix, self.prefix[:-1] + b"0"
        create.start_revision, create.prev_kv = self.last + 1, True
        done = threading.Event()

        def requests() -> Iterator[bytes]:
            yield request.SerializeToString()
            done.wait()

        watch: grpc.StreamStreamMultiCallable[bytes, pb.WatchResponse] = channel.stream_stream(
            "/etcdserverpb.Watch/Watch", response_deserializer=pb.WatchResponse.FromString
        )
        try:
            for response in watch(requests()):
                self.open = True
                self.compacted = response.compact_revision
                if self.compacted:
                    return
                self._take(response)
        except (grpc.RpcError, ValueError):
            pass
        finally:
            self.open = False
            done.set()

    def _take(self, response: pb.WatchResponse) -> None:
        assert not response.canceled, response
        assert response.header.revision >= self.shown, "no revision is taken back"
        if response.created:  # the store's revision: the watch itself may be behind one shard
            return
        self.shown = response.header.revision
        if response.events:
            assert response.events[0].kv.mod_revision > self.last, "a revision comes whole"
            self.events += response.events

    def wait_for(self, revision: int) -> None:
        """Wait until an event of ``revision`` has come, which must."""
        assert eventually(lambda: self.last >= revision), "what is acknowledged is shown"


def eventually(condition: Callable[[], bool], seconds: float = program.PATIENCE) -> bool:
    """Wait until ``condition`` holds; False if it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def check_history(events: Sequence[kv_pb2.Event]) -> dict[bytes, kv_pb2.KeyValue]:
    """Revisions rise, each key's chain is whole; returns the state that the history leads to."""
    state: dict[bytes, kv_pb2.KeyValue] = {}
    last = 1
    for event in events:
        pair, before = event.kv, state.get(event.kv.key)
        assert pair.mod_revision >= last, "in order"
        last = pair.mod_revision
        if before is None:
            assert not event.HasField("prev_kv")
        else:
            assert event.prev_kv == before
            assert pair.mod_revision > before.mod_revision, "a key once in a revision"
        if event.type == kv_pb2.Event.DELETE:
            assert before is not None, "only what was there is deleted"
            del state[pair.key]
            continue
        assert pair.version == (before.version + 1 if before else 1)
        assert pair.create_revision == (before.create_revision if before else pair.mod_revision)
        state[pair.key] = pair
    return state


def by_revision(events: Sequence[kv_pb2.Event]) -> dict[int, dict[bytes, bytes | None]]:
    """What each revision changes."""
    found: dict[int, dict[bytes, bytes | None]] = {}
    for event in events:
        deleted = event.type == kv_pb2.Event.DELETE
        found.setdefault(event.kv.mod_revision, {})[event.kv.key] = (
            None if deleted else event.kv.value
        )
    return found


def check_attempts(events: Sequence[kv_pb2.Event], attempts: Sequence[Attempt]) -> None:
    """Every revision is one whole request: what was answered is there at its revision, what was
    not once or never.
    """
    found = by_revision(events)
    for attempt in attempts:
        if attempt.revision is not None:
            assert found.pop(attempt.revision, None) == attempt.changes, attempt
    others = Counter(frozenset(changes.items()) for changes in found.values())
    unanswered = Counter(attempt.group for attempt in attempts if attempt.revision is None)
    assert others <= unanswered, f"nobody asked for {others - unanswered}"


def check_revisions(
    events: Sequence[kv_pb2.Event], bases: Sequence[int], attempts_by: Sequence[int]
) -> None:
    """Each server of several lives goes on right above its base, and issues no more revisions than
    it was asked for; ``attempts_by`` counts the requests up to its end.
    """
    revisions = sorted(by_revision(events))
    assert list(bases) == sorted(bases), "no server goes back"
    asked_before = 0
    for n, base in enumerate(bases):
        following = bases[n + 1] if n + 1 < len(bases) else revisions[-1]
        own = revisions[bisect_left(revisions, base + 1) : bisect_left(revisions, following + 1)]
        asked = attempts_by[n] - asked_before
        asked_before = attempts_by[n]
        if own:
            assert own[-1] - base <= asked, "revisions are dense"
