"""A trace as what each client did, in order, and what it knew when it did that.

An *act* is what a client did on its connection: it began a call, sent a message, said that it was
done, gave up. ``after`` are the calls of that connection that were answered since the act before:
acts of one connection are taken in turn, so none comes before an answer that it may follow from.
What a client learned elsewhere shows in what it sends: it compares with a revision that another
client wrote, or names a lease that another was granted. ``wrote`` and ``granted`` say which calls
these came from. Every such call began before the one that needs it, so nobody waits in a circle.

The whole trace is held in memory.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from google.protobuf.message import Message

from bench.replay.methods import RPCS, Rpc
from bench.replay.trace import Kind, Row, TraceError
from kvstore.pb import kv_pb2
from kvstore.pb import rpc_pb2 as pb
from kvstore.transport.api import Kind as Shape


@dataclass(slots=True)
class Call:
    """One call as it was recorded."""

    number: int
    connection: int
    rpc: Rpc
    messages: list[bytes] = field(default_factory=list)
    """Requests."""
    answers: list[bytes] = field(default_factory=list)
    """Of a stream both ways none is kept."""
    created: list[int] = field(default_factory=list)
    """Ids of the watches that were created on it, in order."""
    code: int = -1
    """gRPC; -1: given up, or open at the end."""

    def request(self) -> Message:
        """The only request, or the first."""
        message = self.rpc.request()
        message.ParseFromString(self.messages[0] if self.messages else b"")
        return message

    def answer(self) -> Message | None:
        """What it was answered; None: it was not, or with an error."""
        return merged(self.rpc, self.answers) if self.code == 0 else None

    def lost(self) -> pb.TxnResponse | None:
        """What a Txn was answered whose comparison failed; None: this is none."""
        if self.rpc.answer is pb.TxnResponse:
            answer = self.answer()
            if isinstance(answer, pb.TxnResponse) and not answer.succeeded:
                return answer
        return None


def merged(rpc: Rpc, answers: Iterable[bytes]) -> Message:
    """The answer of a call; pieces of a stream put together."""
    if rpc.answer is pb.RangeStreamResponse:
        whole = pb.RangeResponse()
        for raw in answers:
            whole.MergeFrom(pb.RangeStreamResponse.FromString(raw).range_response)
        return whole
    message = rpc.answer()
    for raw in answers:
        message.ParseFromString(raw)
    return message


class Act(NamedTuple):
    """One thing that a client did."""

    at: int
    kind: Kind
    call: Call
    message: bytes
    after: tuple[int, ...]
    created: int
    """Watches that the client had been told of on this stream."""


@dataclass(slots=True)
class Script:
    """See the module's text."""

    objects: list[kv_pb2.KeyValue] = field(default_factory=list)
    """What was there, oldest first."""
    calls: list[Call] = field(default_factory=list)
    acts: dict[int, list[Act]] = field(default_factory=dict)
    """By connection."""
    wrote: dict[tuple[bytes, int], int] = field(default_factory=dict)
    """The call that wrote a key at a revision."""
    granted: dict[int, int] = field(default_factory=dict)
    """The call that was granted a lease."""
    duration_us: int = 0


_BY_CLIENTS = (Kind.BEGIN, Kind.UP, Kind.HALF_CLOSE, Kind.CANCEL)


def read_script(rows: Iterable[Row]) -> Script:
    """The script of a trace, from its first call on; raises ``TraceError`` if it cannot be made."""
    script, begun_us = Script(), -1
    answered: dict[int, list[int]] = {}
    for row in rows:
        if row.kind == Kind.OBJECTS:
            script.objects.extend(pb.RangeResponse.FromString(row.message).kvs)
            continue
        begun_us = row.at if begun_us < 0 else begun_us  # nobody waits for a client that was late
        script.duration_us = row.at - begun_us
        call = _call(script, row)
        if row.kind in _BY_CLIENTS:
            if row.kind == Kind.UP or (row.kind == Kind.BEGIN and call.rpc.kind is Shape.UNARY):
                call.messages.append(row.message)
            after = tuple(answered.pop(row.connection, ()))
            at = row.at - begun_us
            act = Act(at, row.kind, call, row.message, after, len(call.created))
            script.acts.setdefault(row.connection, []).append(act)
        elif row.kind == Kind.DOWN:
            _down(call, row.message)
        else:
            call.code = row.code
            if call.rpc.kind is Shape.UNARY:
                call.answers.append(row.message)
            if call.rpc.kind is not Shape.BIDI_STREAM and call.messages:
                answered.setdefault(row.connection, []).append(call.number)
    script.objects.sort(key=lambda kv: kv.mod_revision)
    for call in script.calls:
        _note(script, call)
    return script


def _call(script: Script, row: Row) -> Call:
    if row.kind != Kind.BEGIN:
        return script.calls[row.call]
    rpc = RPCS.get(row.path)
    if rpc is None or row.call != len(script.calls):
        raise TraceError(f"call {row.call} of {row.path.decode()} is not one of a recording")
    script.calls.append(Call(row.call, row.connection, rpc))
    return script.calls[-1]


def _down(call: Call, message: bytes) -> None:
    if call.rpc.kind is not Shape.BIDI_STREAM:
        call.answers.append(message)
    elif call.rpc.answer is pb.WatchResponse:
        answer = pb.WatchResponse.FromString(message)
        if answer.created:
            call.created.append(answer.watch_id)


def _note(script: Script, call: Call) -> None:
    """Remember what the call wrote, or was granted."""
    answer = call.answer()
    if isinstance(answer, pb.LeaseGrantResponse):
        script.granted[answer.ID] = call.number
    elif isinstance(answer, pb.TxnResponse | pb.PutResponse):
        for key in written(call.request(), answer):
            script.wrote[key, answer.header.revision] = call.number


def written(request: Message, answer: Message) -> Iterator[bytes]:
    """Keys that a call put, if ``answer`` is what it was answered."""
    if isinstance(request, pb.PutRequest):
        yield request.key
    elif isinstance(request, pb.TxnRequest) and isinstance(answer, pb.TxnResponse):
        for op, part in branch(request, answer):
            if op.HasField("request_put"):
                yield op.request_put.key
            elif op.HasField("request_txn"):
                yield from written(op.request_txn, part.response_txn)


def branch(
    request: pb.TxnRequest, answer: pb.TxnResponse
) -> Iterator[tuple[pb.RequestOp, pb.ResponseOp]]:
    """The operations of a Txn that were done, with what came of each."""
    done = request.success if answer.succeeded else request.failure
    return zip(done, answer.responses, strict=False)
