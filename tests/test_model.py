"""The engine and its KV service against the reference model, step by step, with crashes and slow
commits.
"""

from collections.abc import Callable

from google.protobuf.message import Message
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from backends.memory import MemoryDisk
from kvstore.config import StoreConfig
from kvstore.errors import DuplicateKeyError, LeaseProvidedError, ValueProvidedError
from kvstore.pb import rpc_pb2 as pb
from tests.model import Model, RefusalError
from tests.stack import Answered, Stack, all_versions, serve

LEASES = {7, -9}
EDGE = {DuplicateKeyError.text, ValueProvidedError.text, LeaseProvidedError.text}
keys = st.sampled_from([b"a", b"a/1", b"a/2", b"b", b"b/1", b"c", b"\xff", b"\xff\xff"])
ends = st.sampled_from([b"", b"", b"\0", b"a/3", b"b", b"c", b"a"])
values = st.sampled_from([b"", b"1", b"2", b"three"])
small = st.integers(0, 12)


@st.composite
def put_requests(draw: st.DrawFn) -> pb.PutRequest:
    """A put, now and then with an unknown lease or the ignore options."""
    request = pb.PutRequest(key=draw(keys), value=draw(values), prev_kv=draw(st.booleans()))
    match draw(st.integers(0, 5)):
        case 0:
            request.lease = draw(st.sampled_from([7, -9, 5]))
        case 1:
            request.ignore_value = True
            request.value = draw(st.sampled_from([b"", b"", b"x"]))
        case 2:
            request.ignore_lease = True
    return request


@st.composite
def delete_requests(draw: st.DrawFn) -> pb.DeleteRangeRequest:
    """A delete of a key or a range."""
    return pb.DeleteRangeRequest(key=draw(keys), range_end=draw(ends), prev_kv=draw(st.booleans()))


@st.composite
def range_requests(draw: st.DrawFn) -> pb.RangeRequest:
    """A range with any of its options; sorts by version, which may tie, only with key order told
    apart.
    """
    request = pb.RangeRequest(
        key=draw(keys),
        range_end=draw(ends),
        limit=draw(st.integers(0, 4)),
        revision=draw(st.sampled_from([0, 0, 0, 1, 2, 3, 5, 8, 13, 21])),
        keys_only=draw(st.booleans()),
        count_only=draw(st.integers(0, 4)) == 0,
    )
    if draw(st.booleans()):
        request.sort_order = draw(st.sampled_from(pb.RangeRequest.SortOrder.values()))
        request.sort_target = draw(st.sampled_from(pb.RangeRequest.SortTarget.values()))
    if draw(st.booleans()):
        request.min_mod_revision = draw(small)
        request.max_mod_revision = draw(small)
        request.min_create_revision = draw(small)
        request.max_create_revision = draw(small)
    return request


@st.composite
def compares(draw: st.DrawFn) -> pb.Compare:
    """A compare of any target and result on a key or range."""
    compare = pb.Compare(
        result=draw(st.sampled_from(pb.Compare.CompareResult.values())),
        key=draw(keys),
        range_end=draw(ends),
        target=draw(st.sampled_from(pb.Compare.CompareTarget.values())),
    )
    match compare.target:
        case pb.Compare.VERSION:
            compare.version = draw(st.integers(0, 3))
        case pb.Compare.CREATE:
            compare.create_revision = draw(small)
        case pb.Compare.MOD:
            compare.mod_revision = draw(small)
        case pb.Compare.VALUE:
            compare.value = draw(values)
        case pb.Compare.LEASE:
            compare.lease = draw(st.sampled_from([0, 7, -9]))
    return compare


@st.composite
def update_requests(draw: st.DrawFn) -> pb.TxnRequest:
    """A create or update as kube-apiserver sends it."""
    key = draw(keys)
    request = pb.TxnRequest()
    compare = request.compare.add(key=key, target=pb.Compare.MOD)
    compare.mod_revision = draw(st.one_of(st.just(0), small))
    lease = draw(st.sampled_from([0, 0, 7, -9, 5]))
    request.success.add().request_put.CopyFrom(
        pb.PutRequest(key=key, value=draw(values), lease=lease)
    )
    if draw(st.booleans()):
        request.failure.add().request_range.key = key
    return request


@st.composite
def txn_requests(draw: st.DrawFn, depth: int = 2) -> pb.TxnRequest:
    """A Txn of up to three operations a branch, nested up to ``depth``."""
    request = pb.TxnRequest(compare=draw(st.lists(compares(), max_size=2)))
    for branch in (request.success, request.failure):
        for kind in draw(st.lists(st.integers(0, 3 if depth else 2), max_size=3)):
            op = branch.add()
            match kind:
                case 0:
                    op.request_put.CopyFrom(draw(put_requests()))
                case 1:
                    op.request_delete_range.CopyFrom(draw(delete_requests()))
                case 2:
                    op.request_range.CopyFrom(draw(range_requests()))
                case 3:
                    op.request_txn.CopyFrom(draw(txn_requests(depth - 1)))
    return request


class EngineAgainstModel(RuleBasedStateMachine):
    """Any sequence of requests, commits, evictions, compactions and crashes gives the model's
    answers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.disk = MemoryDisk()
        self.model = Model(leases=set(LEASES))
        self.waiting: list[tuple[Answered, Message, int]] = []
        self.engine = self._start()

    def _start(self) -> Stack:
        config = StoreConfig(read_chunk_keys=2, fetch_rows_max=3, recent_bytes_max=350)
        return Stack([self.disk], leases=set(LEASES), store=config)

    # -- requests ------------------------------------------------------------------------------

    @rule(request=put_requests())
    def put(self, request: pb.PutRequest) -> None:
        """Put answers as the model, once durable."""
        self._write(self.engine.kv.put, request, pb.PutResponse, self.model.put)

    @rule(request=delete_requests())
    def delete_range(self, request: pb.DeleteRangeRequest) -> None:
        """DeleteRange answers as the model, once durable."""
        self._write(
            self.engine.kv.delete_range, request, pb.DeleteRangeResponse, self.model.delete_range
        )

    @rule(request=txn_requests())
    def txn(self, request: pb.TxnRequest) -> None:
        """Txn answers as the model, once durable; duplicates of keys are refused by the edge,
        tested elsewhere.
        """
        self._write(self.engine.kv.txn, request, pb.TxnResponse, self.model.txn)

    @rule(request=update_requests())
    def update(self, request: pb.TxnRequest) -> None:
        """A Txn of the commonest shape, which takes a way of its own, answers like any other."""
        self._write(self.engine.kv.txn, request, pb.TxnResponse, self.model.txn)

    @rule(request=range_requests())
    def range(self, request: pb.RangeRequest) -> None:
        """Range shows the durable state, whatever is pending."""
        call = serve(self.engine.kv.range, request.SerializeToString())
        self.engine.turn()
        assert call.done, "with one shard a read never waits for a commit"
        try:
            expected = self.model.range(request)
        except RefusalError as refusal:
            assert call.failed is not None, "refused"
            assert call.failed[1] == str(refusal)
            return
        assert call.body is not None, call.failed
        actual = pb.RangeResponse.FromString(call.body)
        self._compare(actual, expected, tied=request.sort_target != 0)

    def _write(
        self,
        method: Callable[..., bytes | None],
        request: Message,
        kind: type[Message],
        model: Callable[..., Message],
    ) -> None:
        call = serve(method, request.SerializeToString())
        if call.failed and call.failed[1] in EDGE:
            return  # refused by its shape alone, before the engine: the edge has tests of its own
        try:
            expected: Message = model(request)
        except RefusalError as refusal:
            self.waiting.append((call, _Refused(str(refusal)), self.model.revision))  # type: ignore[arg-type]
            return
        self.waiting.append((call, expected, self.model.revision))

    # -- what happens behind their back ------------------------------------------------------------

    @rule(count=st.integers(1, 4))
    def commit(self, count: int) -> None:
        """The backend does some of its steps."""
        self.engine.turn()
        for _ in range(count):
            self.engine.steps.run_next()
        self._check_waiting()

    @rule()
    def settle(self) -> None:
        """Everything becomes durable, and so every request is answered."""
        self.engine.settle()
        self._check_waiting()
        assert not self.waiting, "nothing pending, nothing waiting"

    @rule()
    def evict(self) -> None:
        """Values leave memory; nothing changes but where they are read from."""
        index = self.engine.store.index
        for chunk in index._chunks:
            chunk.hot = False
        index.evict(0, self.engine.commits.durable)

    @rule(back=st.integers(0, 6))
    def compact(self, back: int) -> None:
        """Compact to a little behind the durable head; what it refuses, the model refuses."""
        self.settle()
        revision = self.model.durable - back
        request = pb.CompactionRequest(revision=revision, physical=back % 2 == 0)
        call = serve(self.engine.kv.compact, request.SerializeToString())
        while not call.done:
            self.engine.settle()
            self.engine.compactor.tick()
        try:
            self.model.compact(revision)
        except RefusalError as refusal:
            assert call.failed is not None, "refused"
            assert call.failed[1] == str(refusal)
        else:
            assert call.body is not None, call.failed

    @rule(steps=st.integers(0, 3))
    def crash(self, steps: int) -> None:
        """The process dies; whatever was answered or durable is there afterwards, nothing else."""
        self.engine.turn()
        for _ in range(steps):
            self.engine.steps.run_next()
        self._check_waiting()
        self.engine.crash()
        self.model.durable = self.disk.tip
        self.model.crash()
        self.waiting.clear()
        self.engine = self._start()

    @precondition(lambda self: self.model.compacted > 0)
    @rule()
    def rows_are_dropped(self) -> None:
        """Once settled, storage holds exactly the versions that the index knows."""
        self.settle()
        while any(drops.count for drops in self.engine.compactor.drops) or (
            self.engine.turns.waiting or self.engine.steps.waiting
        ):
            self.engine.compactor.tick()
            self.engine.settle()
        known = {
            (entry[0], entry[1])
            for entries in all_versions(self.engine.store).values()
            for entry in entries
        }
        assert known == set(self.disk.rows)

    # -- checks ----------------------------------------------------------------------------------

    def _check_waiting(self) -> None:
        """Answered requests answered what the model said, and not before they were durable."""
        self.model.durable = self.engine.commits.durable
        still = []
        for call, expected, revision in self.waiting:
            if not call.done:
                still.append((call, expected, revision))
                continue
            assert revision <= self.disk.tip, "shown before it was durable"
            if isinstance(expected, _Refused):
                assert call.failed is not None, "refused"
                assert call.failed[1] == expected.text
            else:
                assert call.body is not None, call.failed
                self._compare(type(expected).FromString(call.body), expected, tied=True)
        self.waiting = still

    def _compare(self, actual: Message, expected: Message, *, tied: bool) -> None:
        normalise(actual, sort=tied)
        normalise(expected, sort=tied)
        assert actual == expected

    @invariant()
    def leases_follow_keys(self) -> None:
        """Exactly the live keys with a lease are attached, to that lease."""
        state = self.model.states[self.model.revision]
        expected = {key: version.lease for key, version in state.items() if version.lease}
        assert self.engine.leases.attached == expected


class _Refused:
    """In place of an answer: the refusal's text."""

    def __init__(self, text: str) -> None:
        self.text = text


def normalise(message: Message, *, sort: bool) -> None:
    """Drop ids that the model does not know; where sorting may tie, compare pairs in key order."""
    if isinstance(message, pb.TxnResponse):
        for answer in message.responses:
            for name, inner in answer.ListFields():
                del name
                normalise(inner, sort=sort)
    if isinstance(message, pb.RangeResponse) and sort and not message.more:
        pairs = sorted(message.kvs, key=lambda pair: pair.key)
        del message.kvs[:]
        message.kvs.extend(pairs)
    if isinstance(message, pb.RangeResponse) and sort and message.more:
        del message.kvs[:]
    header = message.header  # type: ignore[attr-defined]
    for field in ("cluster_id", "member_id", "raft_term"):
        header.ClearField(field)


EngineAgainstModel.TestCase.settings = settings(stateful_step_count=40)
TestEngineAgainstModel = EngineAgainstModel.TestCase
