"""What clients of the simulation ask for, and what each answer must say, by the log.

- An acknowledged write is in the log at its revision, as it was sent; an unknown one is in it once
  or never, a refused one never.
- Revisions follow real time: a write's is greater than every one shown before it was sent, a
  read's at least as great; none is greater than what is durable when it is shown.
- The body of a read is the replay of the log at its revision, when it is shown and at the end.
- Keys of a shard that is not there are refused at once.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from google.protobuf.message import Message

from kvstore.backend import Row
from kvstore.errors import (
    CompactedError,
    FutureRevisionError,
    LeaseNotFoundError,
    StoppedError,
    TimedOutError,
    TooManyRequestsError,
)
from kvstore.pb import kv_pb2
from kvstore.pb import rpc_pb2 as pb
from tests.sim_leases import Leases
from tests.sim_world import World
from tests.stack import Answered

if TYPE_CHECKING:
    from random import Random

    from tests.sim_process import Process

ALL = (b"a", b"z")
"""A range over everything."""
NAMES = (b"a", b"b", b"c", b"d")

Delete = tuple[bytes, bytes]
"""(key, end) of a deletion."""


@dataclass
class Sent:
    """A request on its way, and what was known when it was sent."""

    process: "Process"
    check: Callable[[bytes], int]
    """Compares the answer with the log; returns the revision of its header."""
    seen: int
    """The highest revision shown to anyone: the answer's is at least this, a change's greater."""
    compacted: int
    """Of the last compaction acknowledged."""
    at: float
    """When, in seconds."""
    shards: Sequence[int]
    """That it touches."""
    call: Answered = field(default_factory=Answered)
    revision: int = 0
    """That a read asks for; 0: the head."""
    values: Sequence[bytes] = ()
    """That a write would store."""
    deletes: Sequence[Delete] = ()
    serializable: bool = False
    lease: int = 0
    """That it rests on."""
    read_only: bool = False


class Clients:
    """All clients of one world: what they send, and judge."""

    def __init__(self, world: World) -> None:
        self.random: Random = world.random
        self.world = world
        self.log = world.log
        self.sent: list[Sent] = []
        self.unknown: list[Sent] = []
        """Deletions of which nobody knows whether they will be done."""
        self.reads: list[Callable[[], object]] = []
        self.counts: Counter[str] = Counter()
        self.leases = Leases(self)
        self.seen = 1
        self.compacted = self.compaction_sent = -1
        self.writes = 0
        self.prefixes = [b"", *world.routes]
        self._guards: list[tuple[bytes, bytes, Callable[[Row | None], bool]]] = []
        """Of Txns: a value that is only written if the version of a key before is such."""
        self.log.explained = self._explained

    # -- sending -----------------------------------------------------------------------------------

    def send(self, process: "Process") -> None:
        """One request of any kind."""
        often = (self._put, self._swap, self._range)
        seldom = (self._delete, self._look, self._compact, self._compact, self._move, self._move)
        leases = self.leases
        rare = (leases.grant, leases.grant, leases.revoke, leases.renew, leases.time_to_live)
        self.random.choice((*often, *often, *often, *seldom, *rare, leases.list_all))(process)

    def _put(self, process: "Process") -> None:
        self.put(process, self._key())

    def put(self, process: "Process", key: bytes, *, leases: float = 0.3) -> Sent:
        """A put without conditions; ``leases`` of them have one, which may be about to end."""
        request = pb.PutRequest(key=key, value=self._value(), prev_kv=True)
        request.lease = self.leases.some(leases)

        def check(body: bytes) -> int:
            answer = pb.PutResponse.FromString(body)
            revision = answer.header.revision
            self._written(sent, revision, [(key, request.value, request.lease)])
            before = self.log.at(key, revision - 1)
            previous = [answer.prev_kv] if answer.HasField("prev_kv") else []
            assert pairs(previous) == shown([before] if before else [])
            return revision

        sent = self.sending(process, check, [(key, b"")], values=[request.value])
        sent.lease = request.lease
        self.note("KV/Put", request, sent)
        return sent

    def read(self, process: "Process", key: bytes, end: bytes = b"", revision: int = 0) -> Sent:
        """A linearizable range."""
        request = pb.RangeRequest(key=key, range_end=end, revision=revision)
        return self._read(process, request)

    def note(self, path: str, request: Message, sent: Sent) -> None:
        """Send it; what is known at once to be impossible is refused at once."""
        self.sent.append(sent)
        process = sent.process
        lost = process.absent if sent.read_only else process.absent | process.out
        refused = lost.intersection(sent.shards) and not process.paused
        sent.process.serve(path, request.SerializeToString(), sent.call)
        self.counts[type(request).__name__] += 1
        if len(sent.shards) > 1:
            self.counts["over several shards"] += 1
        if refused:
            assert sent.call.failed is not None, f"a shard is out, so refused at once: {request}"
            self.counts["refused at once"] += 1

    def sending(
        self,
        process: "Process",
        check: Callable[[bytes], int],
        ranges: Iterable[tuple[bytes, bytes]],
        **facts: Any,  # noqa: ANN401
    ) -> Sent:
        """A request to ``process`` that touches ``ranges``, with what is known now."""
        of_range = self.world.shards.of_range
        touched = {shard for key, end in ranges for shard in of_range(key, end or None)}
        now = self.world.clock.now
        shards = tuple(sorted(touched))
        return Sent(process, check, self.seen, self.compacted, now, shards, **facts)

    def _key(self) -> bytes:
        return self.random.choice(self.prefixes) + self.random.choice(NAMES)

    def _value(self) -> bytes:
        self.writes += 1
        return b"%d-" % self.writes + b"v" * self.random.choice([0, 1, 30])

    def _end_of(self, key: bytes) -> bytes:
        """Of a range from ``key``: none, its group's, or everything's."""
        return self.random.choice([b"", key[:-1] + b"e", b"z"])

    def _some_revision(self) -> int:
        order = self.log.order
        some = order[-1 - self.random.randrange(min(len(order), 8))] if order else 1
        return self.random.choice([some, some, some + 1, self.log.tip + 1, self.log.tip + 2])

    def _swap(self, process: "Process") -> None:
        """Compare and swap, by revision or by value, against the truth or against a guess."""
        put = pb.PutRequest(key=self._key(), value=self._value(), lease=self.leases.some(0.2))
        request = pb.TxnRequest()
        holds = self._compare(request, put.key)
        request.success.add().request_put.CopyFrom(put)
        request.failure.add().request_range.key = put.key
        self._txn(process, request, put.key, holds)

    def _move(self, process: "Process") -> None:
        """A Txn over several shards: one key decides, others change."""
        first = self._key()
        keys = [key for key in dict.fromkeys(self._key() for _ in range(3)) if key != first]
        request = pb.TxnRequest()
        holds = self._compare(request, first)
        lease = self.leases.some(0.2)
        for key in (first, *keys):
            if key != first and self.random.random() < 0.3:
                request.success.add().request_delete_range.key = key
            else:
                put = pb.PutRequest(key=key, value=self._value(), lease=lease)
                request.success.add().request_put.CopyFrom(put)
        request.failure.add().request_range.key = first
        self._txn(process, request, first, holds)

    def _compare(self, request: pb.TxnRequest, key: bytes) -> Callable[[Row | None], bool]:
        """Add a compare of ``key``; whether it holds of a version."""
        compare = request.compare.add(key=key)
        known = self.log.at(key, self.log.tip)
        if self.random.random() < 0.3:
            compare.target = pb.Compare.VALUE
            compare.value = known[6] if known else b"?"
            return lambda row: row is not None and row[6] == compare.value
        compare.target = pb.Compare.MOD
        compare.mod_revision = known[0] if known else 0
        if self.random.random() < 0.2:
            compare.mod_revision = self._some_revision()
        return lambda row: (row[0] if row else 0) == compare.mod_revision

    def _txn(
        self,
        process: "Process",
        request: pb.TxnRequest,
        key: bytes,
        holds: Callable[[Row | None], bool],
    ) -> None:
        """Send a Txn that compares ``key`` and changes it, or reads it if the compare fails."""
        puts = [op.request_put for op in request.success if op.HasField("request_put")]
        gone = [
            op.request_delete_range.key
            for op in request.success
            if op.HasField("request_delete_range")
        ]

        def check(body: bytes) -> int:
            answer = pb.TxnResponse.FromString(body)
            revision = answer.header.revision
            if answer.succeeded:
                self._written(sent, revision, self._expected(request, revision))
                assert holds(self.log.at(key, revision - 1)), "swapped what it was compared to"
            else:
                self._refused_for_ever(sent)
                seen = self.log.at(key, revision)
                assert not holds(seen), "the compare failed"
                found = answer.responses[0].response_range
                assert pairs(found.kvs) == shown([seen] if seen else [])
                assert found.header.revision <= self.log.tip
            return revision

        ranges = [(each, b"") for each in (key, *(put.key for put in puts), *gone)]
        self._guards.append((puts[0].value, key, holds))
        sent = self.sending(process, check, ranges, values=[put.value for put in puts])
        sent.lease = puts[0].lease
        self.note("KV/Txn", request, sent)

    def _expected(self, request: pb.TxnRequest, revision: int) -> list[tuple[bytes, bytes, int]]:
        """What the success branch writes at ``revision``."""
        rows: list[tuple[bytes, bytes, int]] = []
        for op in request.success:
            if op.HasField("request_put"):
                put = op.request_put
                rows.append((put.key, put.value, put.lease))
            elif self.log.at(op.request_delete_range.key, revision - 1) is not None:
                rows.append((op.request_delete_range.key, b"", 0))
        return rows

    def _delete(self, process: "Process") -> None:
        key = self._key()
        self.delete(process, key, self._end_of(key))

    def delete(self, process: "Process", key: bytes, end: bytes) -> None:
        """Delete a range."""
        request = pb.DeleteRangeRequest(key=key, range_end=end, prev_kv=True)
        where = key, end

        def check(body: bytes) -> int:
            answer = pb.DeleteRangeResponse.FromString(body)
            revision = answer.header.revision
            expected = self.log.range(*where, revision - 1)
            if answer.deleted:
                assert revision > sent.seen
                rows = self.log.revisions[revision]
                assert [(row[2], row[4]) for row in rows] == [(row[2], 0) for row in expected]
                assert pairs(answer.prev_kvs) == shown(expected)
            else:
                assert not self.log.range(*where, revision)
            return revision

        sent = self.sending(process, check, [where], deletes=[where])
        self.note("KV/DeleteRange", request, sent)

    def _range(self, process: "Process") -> None:
        request = pb.RangeRequest(key=self._key(), limit=self.random.choice([0, 0, 2]))
        request.serializable = self.random.random() < 0.1
        request.range_end = self._end_of(request.key)
        if self.random.random() < 0.4:
            request.revision = self._some_revision()
        self._read(process, request)

    def _read(self, process: "Process", request: pb.RangeRequest) -> Sent:
        def check(body: bytes) -> int:
            answer = pb.RangeResponse.FromString(body)
            assert not request.revision or request.revision >= sent.compacted, "compacted"
            if not (request.revision or request.serializable):
                left = [pair for pair in answer.kvs if pair.lease in ended]
                alive = [self.log.at(pair.key, self.log.tip) for pair in left]
                outlive = shown(row for row in alive if row is not None)
                assert not set(pairs(left)) & set(outlive), "keys outlive their lease"
            self._matches(request, answer)
            self.reads.append(lambda: self._matches(request, answer))
            return answer.header.revision

        ended = set(self.log.ended)
        where = [(request.key, request.range_end)]
        sent = self.sending(process, check, where, revision=request.revision, read_only=True)
        sent.serializable = request.serializable
        self.note("KV/Range", request, sent)
        return sent

    def _look(self, process: "Process") -> None:
        """A Txn that only reads: two ranges, one picture."""
        ranges = [pb.RangeRequest(key=self._key(), range_end=end) for end in (b"", b"z")]
        request = pb.TxnRequest()
        for each in ranges:
            request.success.add().request_range.CopyFrom(each)

        def matches(answer: pb.TxnResponse) -> None:
            for each, response in zip(ranges, answer.responses, strict=True):
                found = response.response_range
                assert found.header.revision == answer.header.revision
                self._matches(each, found)

        def check(body: bytes) -> int:
            answer = pb.TxnResponse.FromString(body)
            matches(answer)
            self.reads.append(lambda: matches(answer))
            return answer.header.revision

        where = [(each.key, each.range_end) for each in ranges]
        self.note("KV/Txn", request, self.sending(process, check, where, read_only=True))

    def _compact(self, process: "Process") -> None:
        order = self.log.order
        back = self.random.choice([0, 1, 1, 2, 3, 5, 8])
        self.compact(process, order[-back] if 0 < back <= len(order) else self.log.tip + 1)

    def compact(self, process: "Process", revision: int) -> None:
        """Compact."""
        request = pb.CompactionRequest(revision=revision, physical=self.random.random() < 0.5)

        def check(body: bytes) -> int:
            self.compacted = max(self.compacted, revision)
            return pb.CompactionResponse.FromString(body).header.revision

        sent = self.sending(process, check, (), revision=revision, read_only=True)
        self.compaction_sent = max(self.compaction_sent, revision)
        self.note("KV/Compact", request, sent)

    # -- the oracle --------------------------------------------------------------------------------

    def collect(self) -> None:
        """Look at what was answered since the last step."""
        if not any(sent.call.done for sent in self.sent):
            return
        waiting = self.sent
        self.sent = [sent for sent in waiting if not sent.call.done]
        for sent in waiting:
            if sent.call.body is not None:
                revision = sent.check(sent.call.body)
                assert revision <= self.log.tip, "shown before it was durable"
                assert revision >= sent.seen or sent.serializable, "what was shown stays seen"
                self.seen = max(self.seen, revision)
                self.counts["answered"] += 1
            elif sent.call.failed is not None:
                self._refusal(sent, sent.call.failed[1])

    def lose(self, process: "Process") -> None:
        """A process is gone: what it was asked is unknown."""
        self.collect()
        lost = [sent for sent in self.sent if sent.process is process]
        self.counts["unknown"] += len(lost)
        self.unknown += [sent for sent in lost if sent.deletes]
        self.sent = [sent for sent in self.sent if sent.process is not process]

    def _refusal(self, sent: Sent, text: str) -> None:
        self.counts[text] += 1
        match text:
            case TooManyRequestsError.text:
                self._refused_for_ever(sent)
            case CompactedError.text:
                assert sent.revision <= self.compaction_sent, "someone asked for it"
            case FutureRevisionError.text:
                assert sent.serializable or sent.revision > sent.seen, "no one has seen it"
            case LeaseNotFoundError.text:
                self._refused_for_ever(sent)
                assert not self.leases.stored(sent.lease), "its end is durable"
            case TimedOutError.text | StoppedError.text:
                if sent.deletes:
                    self.unknown.append(sent)
            case _:
                raise AssertionError(text)

    def _refused_for_ever(self, sent: Sent) -> None:
        """A definite no: its values are not in the log and never will be."""
        assert not self.log.values.keys() & set(sent.values)
        self.log.refused.update(sent.values)

    def _written(self, sent: Sent, revision: int, expected: list[tuple[bytes, bytes, int]]) -> None:
        assert revision > sent.seen, "a change is later than what was shown before it"
        rows = [(row[2], row[6], row[5]) for row in self.log.revisions.get(revision, ())]
        assert rows == expected, "acknowledged, so in the log"

    def _matches(self, request: pb.RangeRequest, answer: pb.RangeResponse) -> None:
        at = request.revision or answer.header.revision
        expected = self.log.range(request.key, request.range_end, at)
        some = expected[: request.limit] if request.limit else expected
        assert pairs(answer.kvs) == shown(some), f"the replay at {at}"
        assert (answer.count, answer.more) == (len(expected), len(some) < len(expected))

    def check_guards(self) -> None:
        """Nothing was written by a Txn whose compare did not hold, answered or not."""
        for value, key, holds in self._guards:
            revision = self.log.values.get(value)
            guarded = revision is None or holds(self.log.at(key, revision - 1))
            assert guarded, f"{value!r} of {revision} has lost what it was compared to"

    def _explained(self, revision: int, rows: list[Row]) -> bool:
        """Has a client asked for exactly these deletions?"""
        dead = [row[2] for row in rows]
        for sent in (*self.sent, *self.unknown):
            for key, end in sent.deletes:
                if [row[2] for row in self.log.range(key, end, revision - 1)] == dead:
                    return True
        return False


def shown(rows: Iterable[Row]) -> list[tuple[object, ...]]:
    """Rows as a client sees them."""
    return [(row[0], *row[2:]) for row in rows]


def pairs(found: Iterable[kv_pb2.KeyValue]) -> list[tuple[object, ...]]:
    """KeyValues likewise."""
    return [(p.mod_revision, p.key, p.create_revision, p.version, p.lease, p.value) for p in found]
