"""The whole synchronous engine in a world that goes wrong, one seed at a time.

A seed decides everything: which requests several clients send, which of the waiting steps runs
next, how each commit ends, when the process dies and how far its recovery gets. Nothing depends on
time or threads, so that a seed that fails fails again.

The oracle needs no search. Every batch passes its disk's commit point exactly once, and there the
``Log`` writes it down; whatever a client is told is compared with the log:

- an acknowledged write is in the log at its revision, as it was sent; an unknown one is in it once
  or never, a refused one never; a revision is committed once, with one content;
- revisions follow real time: a write's is greater than every one shown before it was sent, a
  read's at least as great; none is greater than what is durable when it is shown;
- the body of a read is the replay of the log at its revision, both when it is shown and at the end
  (no earlier change may slip in behind it);
- create revisions and versions follow from the changes before.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random
from typing import Any
from unittest.mock import patch

from google.protobuf.message import Message

from backends.memory import Steps
from kvstore import history
from kvstore.backend import Row
from kvstore.errors import (
    CompactedError,
    FutureRevisionError,
    StoppedError,
    TimedOutError,
    TooManyRequestsError,
)
from kvstore.pb import kv_pb2
from kvstore.pb import rpc_pb2 as pb
from tests.sim_world import LEASE, ROUTES, Faults, Log, LoggedDisk, Process
from tests.stack import Answered, all_versions, serve


class PromiseBrokenError(Exception):
    """What went wrong, after the call that repeats it."""


@dataclass
class Sent:
    """A request on its way, and what was known when it was sent."""

    call: Answered
    check: Callable[[bytes], int]
    """Compares the answer with the log; returns the revision of its header."""
    seen: int
    """The highest revision shown to anyone: the answer's is at least this, a change's greater."""
    compacted: int
    """Of the last compaction acknowledged."""
    revision: int = 0
    """That a read asks for; 0: the head."""
    value: bytes = b""
    """That a write would store."""
    serializable: bool = False


class Simulation:
    """One seed. See the module's text."""

    def __init__(self, seed: int, *, shards: int = 1) -> None:
        self.name = f"run(seed={seed}, shards={shards})"
        self.random = Random(seed)
        self.log = Log()
        self.disks = [LoggedDisk(number, self.log) for number in range(shards)]
        prefixes = [b"", *list(ROUTES)][:shards]
        self.groups = [[prefix + name for name in (b"a", b"b", b"c", b"d")] for prefix in prefixes]
        self.steps = Steps()
        self.faults = Faults(self.random, self.random.choice([0.0, 0.05, 0.2, 0.5]))
        self.crash_rate = self.random.choice([0.0, 0.01, 0.05])
        self.faulty = self.faults.rate > 0
        self.sent: list[Sent] = []
        self.reads: list[Callable[[], object]] = []
        self.counts: Counter[str] = Counter()
        self.seen = 1
        self.compacted = self.compaction_sent = -1
        self.writes = 0
        self.process = Process(self.disks, self.steps, self.faults)
        self.process.load()

    def run(self, actions: int = 150) -> Counter[str]:
        """Live through it, then heal and compare everything; what happened, counted.

        Raises PromiseBrokenError.
        """
        try:
            for _ in range(actions):
                self._act()
            self._heal()
            self._compare()
            self._reboot()
            self._compare()
            for read in self.reads:
                read()
        except Exception as error:
            raise PromiseBrokenError(f"{self.name}: {error!r}") from error
        return self.counts

    # -- what happens ------------------------------------------------------------------------------

    def _act(self) -> None:
        chance = self.random.random()
        if self.process.lost or chance < self.crash_rate:
            self._reboot()
        elif chance < 0.35 and len(self.sent) < 8:
            self._send()
        elif chance < 0.60:
            self.process.turns.run_next()
        elif chance < 0.88:
            self._step()
        elif chance < 0.92:
            self.process.tick(self.random.choice([0.05, 0.2, 3.0]))
        elif chance < 0.98:
            self.process.evict()
        elif self.faults.hung:
            self.faults.hung.popleft()()
        elif self.faults.rate and self.random.random() < 0.05:
            self.random.choice(self.disks).epoch += 1  # another process takes the shard
        self._collect()

    def _step(self) -> None:
        """Any of the waiting steps: none waits for another."""
        waiting = self.steps.waiting
        if waiting:
            waiting.rotate(self.random.randrange(len(waiting)))
            self.steps.run_next()

    def _reboot(self) -> None:
        """Die and recover, perhaps dying on the way; what waited is unknown."""
        self.counts["crashes"] += 1
        lost = (queue.broken for queue in self.process.commits.queues if queue.broken)
        self.counts.update(reason.split(":")[0] for reason in lost)
        self.process.crash()
        self._collect()
        self.counts["unknown"] += len(self.sent)
        self.sent.clear()
        while True:
            again = self.faults.rate and self.random.random() < 0.2
            self.process = Process(self.disks, self.steps, self.faults)
            if not again:
                break
            self.process.load(self.random.randrange(20))
            self._drain(self.random.randrange(4))
            self.process.crash()
        self.process.load()

    def _drain(self, steps: int) -> None:
        for _ in range(steps):
            self.process.turns.run_next()
            self._step()

    def _heal(self) -> None:
        """Nothing goes wrong any more: everything that waits is answered in bounded work."""
        self.faults.rate = 0.0
        if self.process.lost:
            self._reboot()
        for _ in range(40):
            while self.faults.hung:
                self.faults.hung.popleft()()
            self.process.tick(0.2)
            self._drain(20)
            self._collect()
            if self.process.lost:
                self._reboot()  # another process had taken the shard
        assert not self.sent, "everything is answered"
        assert self.process.commits.idle()

    # -- requests ----------------------------------------------------------------------------------

    def _send(self) -> None:
        often = (self._put, self._swap, self._range)
        self.random.choice(
            (*often, *often, *often, self._delete, self._look, self._compact, self._compact)
        )()

    def _note(self, method: Callable[..., object], request: Message, sent: Sent) -> None:
        self.sent.append(sent)
        sent.call = serve(method, request.SerializeToString())  # type: ignore[arg-type]
        self.counts[type(request).__name__] += 1

    def _sending(self, check: Callable[[bytes], int], **facts: Any) -> Sent:  # noqa: ANN401
        return Sent(Answered(), check, self.seen, self.compacted, **facts)

    def _key(self) -> bytes:
        return self.random.choice(self.random.choice(self.groups))

    def _value(self) -> bytes:
        self.writes += 1
        return b"%d-" % self.writes + b"v" * self.random.choice([0, 1, 30])

    def _put(self) -> None:
        request = pb.PutRequest(key=self._key(), value=self._value(), prev_kv=True)
        request.lease = self.random.choice([0, 0, LEASE])

        def check(body: bytes) -> int:
            answer = pb.PutResponse.FromString(body)
            revision = answer.header.revision
            self._written(request, revision, sent)
            before = self.log.at(request.key, revision - 1)
            previous = [answer.prev_kv] if answer.HasField("prev_kv") else []
            assert _pairs(previous) == _shown([before] if before else [])
            return revision

        sent = self._sending(check, value=request.value)
        self._note(self.process.kv.put, request, sent)

    def _swap(self) -> None:
        """Compare and swap, by revision or by value, against the truth or against a guess."""
        put = pb.PutRequest(key=self._key(), value=self._value())
        request = pb.TxnRequest()
        compare = request.compare.add(key=put.key)
        known = self.log.at(put.key, self.log.tip)
        by_value = self.random.random() < 0.3
        if by_value:
            compare.target = pb.Compare.VALUE
            compare.value = known[6] if known else b"?"
        else:
            compare.target = pb.Compare.MOD
            compare.mod_revision = known[0] if known else 0
            if self.random.random() < 0.2:
                compare.mod_revision = self.random.randrange(self.log.tip + 1)
        request.success.add().request_put.CopyFrom(put)
        request.failure.add().request_range.key = put.key

        def holds(row: Row | None) -> bool:
            if by_value:
                return row is not None and row[6] == compare.value
            return (row[0] if row else 0) == compare.mod_revision

        def check(body: bytes) -> int:
            answer = pb.TxnResponse.FromString(body)
            revision = answer.header.revision
            if answer.succeeded:
                self._written(put, revision, sent)
                assert holds(self.log.at(put.key, revision - 1)), "swapped what it was compared to"
            else:
                self._check_refused_later(sent.value)
                seen = self.log.at(put.key, revision)
                assert not holds(seen), "the compare failed"
                found = answer.responses[0].response_range
                assert _pairs(found.kvs) == _shown([seen] if seen else [])
                assert found.header.revision <= self.log.tip
            return revision

        sent = self._sending(check, value=put.value)
        self._note(self.process.kv.txn, request, sent)

    def _delete(self) -> None:
        request = pb.DeleteRangeRequest(key=self._key(), prev_kv=True)
        if self.random.random() < 0.5:
            request.range_end = request.key[:-1] + b"e"

        def check(body: bytes) -> int:
            answer = pb.DeleteRangeResponse.FromString(body)
            revision = answer.header.revision
            expected = self.log.range(request.key, request.range_end, revision - 1)
            if answer.deleted:
                assert revision > sent.seen
                rows = self.log.revisions[revision]
                assert [(row[2], row[4]) for row in rows] == [(row[2], 0) for row in expected]
                assert _pairs(answer.prev_kvs) == _shown(expected)
            else:
                assert not self.log.range(request.key, request.range_end, revision)
            return revision

        sent = self._sending(check)
        self._note(self.process.kv.delete_range, request, sent)

    def _range(self) -> None:
        request = pb.RangeRequest(key=self._key(), limit=self.random.choice([0, 0, 2]))
        request.serializable = self.random.random() < 0.1
        match self.random.randrange(3):
            case 0:
                request.range_end = request.key[:-1] + b"e"
            case 1:
                request.range_end = b"z"
        if self.random.random() < 0.4:
            request.revision = self.random.randrange(1, self.log.tip + 3)

        def check(body: bytes) -> int:
            answer = pb.RangeResponse.FromString(body)
            assert not request.revision or request.revision >= sent.compacted, "compacted"
            self._matches(request, answer)
            self.reads.append(lambda: self._matches(request, answer))
            return answer.header.revision

        sent = self._sending(check, revision=request.revision, serializable=request.serializable)
        self._note(self.process.kv.range, request, sent)

    def _look(self) -> None:
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

        self._note(self.process.kv.txn, request, self._sending(check))

    def _compact(self) -> None:
        revision = self.log.tip + 1 - self.random.choice([0, 1, 1, 2, 3, 5, 8])
        request = pb.CompactionRequest(revision=revision, physical=self.random.random() < 0.5)

        def check(body: bytes) -> int:
            self.compacted = max(self.compacted, revision)
            return pb.CompactionResponse.FromString(body).header.revision

        sent = self._sending(check, revision=revision)
        self.compaction_sent = max(self.compaction_sent, revision)
        self._note(self.process.kv.compact, request, sent)

    # -- the oracle --------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Look at what was answered since the last step."""
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

    def _refusal(self, sent: Sent, text: str) -> None:
        self.counts[text] += 1
        match text:
            case TooManyRequestsError.text:
                self._check_refused_later(sent.value)
            case CompactedError.text:
                assert sent.revision <= self.compaction_sent, "someone asked for it"
            case FutureRevisionError.text:
                assert sent.revision > sent.seen, "no one has seen it"
            case TimedOutError.text:
                pass
            case StoppedError.text:
                assert self.faulty, "only broken storage stops it"
            case _:
                raise AssertionError(text)

    def _check_refused_later(self, value: bytes) -> None:
        """A definite no: ``value`` is not in the log and never will be."""
        if value:
            assert value not in self.log.values
            self.log.refused.add(value)

    def _written(self, put: pb.PutRequest, revision: int, sent: Sent) -> None:
        assert revision > sent.seen, "a change is later than what was shown before it"
        rows = [(row[2], row[6], row[5]) for row in self.log.revisions.get(revision, ())]
        assert rows == [(put.key, put.value, put.lease)], "acknowledged, so in the log"

    def _matches(self, request: pb.RangeRequest, answer: pb.RangeResponse) -> None:
        at = request.revision or answer.header.revision
        expected = self.log.range(request.key, request.range_end, at)
        shown = expected[: request.limit] if request.limit else expected
        assert _pairs(answer.kvs) == _shown(shown), f"the replay at {at}"
        assert (answer.count, answer.more) == (len(expected), len(shown) < len(expected))

    def _compare(self) -> None:
        """The store, its disks and the log are one, at every revision that may be read."""
        assert self.process.store.compact_revision == self.disks[0].compact_revision
        first = max(self.compacted, self.process.store.compact_revision, 1)
        for revision in (0, *range(first, self.process.commits.durable + 1)):
            request = pb.RangeRequest(key=b"a", range_end=b"z", revision=revision)
            call = serve(self.process.kv.range, request.SerializeToString())
            while not call.done:
                self._drain(1)
            assert call.body is not None, call.failed
            self._matches(request, pb.RangeResponse.FromString(call.body))
        while any(drops.count for drops in self.process.compactor.drops):
            self.process.tick(0.2)
            self._drain(20)
        self.process.turns.run_all()
        self.steps.run_all()
        versions = all_versions(self.process.store).values()
        known = {(entry[0], entry[1]) for entries in versions for entry in entries}
        assert known == {row for disk in self.disks for row in disk.rows}, "the index knows all"
        assert known == self.log.kept(self.process.store.compact_revision), "no row too many"


def _shown(rows: Iterable[Row]) -> list[tuple[object, ...]]:
    """Rows as a client sees them."""
    return [(row[0], *row[2:]) for row in rows]


def _pairs(pairs: Iterable[kv_pb2.KeyValue]) -> list[tuple[object, ...]]:
    """KeyValues likewise."""
    return [(p.mod_revision, p.key, p.create_revision, p.version, p.lease, p.value) for p in pairs]


def run(seed: int, *, shards: int = 1) -> Counter[str]:
    """Live through one seed, with a history of small blocks; what happened, counted."""
    with patch.object(history, "BLOCK_CHANGES", 4):
        return Simulation(seed, shards=shards).run()
