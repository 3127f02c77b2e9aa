"""What a call is to the judges: one row of OPS, and of ITEMS for what it showed.

Judges know the shapes that kube-apiserver sends, and what is like them: a Txn that writes one key,
under one comparison or others; a put or a delete of one key; reads of one key, of all keys with a
prefix, their count. Everything else is OTHER: sent, timed, not judged, but for its revision.
A call that writes several keys, a range, or in the other branch of a Txn is as many rows of OPS as
it wrote keys, under one number; what it wrote is known once it is answered, since a range delete is
made to tell what it deleted (``prev_kv``). What it wrote is not known if there was no answer, if a
put keeps the value that it found, or if the server does not tell: then it is *unjudged*, as its
events would look like nobody's. A replay with such a call gets no verdicts.

A page of a list is known by where it starts: right behind the last key of another page. It begins
there in the replay as well, behind what that page showed *now*.
"""

from dataclasses import dataclass, field

from google.protobuf.message import Message

from bench.client import requests
from bench.plan import Verb
from bench.records import Outcome
from bench.replay.script import branch
from bench.values import digest
from kvstore.pb import kv_pb2
from kvstore.pb import rpc_pb2 as pb

COMPACTION_KEY = b"compact_rev_key"
INVALID_ARGUMENT = 3


@dataclass(slots=True)
class Shape:
    """What can be said of a request."""

    verb: Verb = Verb.OTHER
    key: bytes = b""
    expected: int = -1
    digest: int = -1
    lease: int = 0
    ttl: int = 0
    at: int = 0
    unjudged: bool = False
    """What it writes is told by its answer, if at all (``effects_of``)."""


@dataclass(slots=True)
class Result:
    """What can be said of an answer, beside the shape of its request."""

    verb: Verb
    outcome: Outcome
    revision: int = -1
    found: int = -1
    digest: int = -1
    lease: int = 0
    count: int = -1
    items: list[kv_pb2.KeyValue] = field(default_factory=list)


def shape_of(request: Message) -> Shape:
    """Of a request as it is sent."""
    match request:
        case pb.RangeRequest():
            return _range(request)
        case pb.TxnRequest():
            return _txn(request)
        case pb.PutRequest():
            return _put(request)
        case pb.DeleteRangeRequest():
            return Shape(Verb.DELETE, request.key, unjudged=bool(request.range_end))
        case pb.CompactionRequest():
            return Shape(Verb.COMPACT, at=request.revision)
        case pb.LeaseGrantRequest():
            return Shape(Verb.GRANT, ttl=request.TTL)
        case pb.LeaseRevokeRequest():
            return Shape(Verb.REVOKE, lease=request.ID)
        case pb.LeaseKeepAliveRequest():
            return Shape(lease=request.ID)
        case pb.StatusRequest():
            return Shape(Verb.STATUS)
    return Shape()


def prefix_of(request: pb.RangeRequest) -> bytes | None:
    """The prefix that all of a range's keys have, if it is the range of a prefix's last keys."""
    end = request.range_end
    if not end or end == b"\0" or not end[-1]:
        return None
    prefix = end[:-1] + bytes((end[-1] - 1,))
    whole = requests.prefix_end(prefix) == end and request.key.startswith(prefix)
    return prefix if whole else None


def _range(request: pb.RangeRequest) -> Shape:
    partial = (
        request.keys_only
        or request.serializable
        or request.min_mod_revision
        or request.max_mod_revision
        or request.min_create_revision
        or request.max_create_revision
        or request.sort_order != pb.RangeRequest.NONE
    )
    if partial:
        return Shape(key=request.key)
    at = request.revision
    if not request.range_end:
        if request.count_only:
            return Shape(key=request.key)
        return Shape(Verb.READ_AT if at else Verb.GET, request.key, at=at)
    prefix = prefix_of(request)
    if prefix is None:
        return Shape(key=request.key)
    if request.count_only:
        return Shape(Verb.COUNT if request.key == prefix else Verb.OTHER, prefix, at=at)
    return Shape(Verb.LIST, prefix, at=at)


def _put(request: pb.PutRequest) -> Shape:
    unclear = request.ignore_value or request.ignore_lease
    mark = digest(request.value)
    return Shape(Verb.UPDATE, request.key, digest=mark, lease=request.lease, unjudged=bool(unclear))


def writes(op: pb.RequestOp) -> bool:
    """May the operation change anything?"""
    inner = op.request_txn
    return (
        op.HasField("request_put")
        or op.HasField("request_delete_range")
        or any(map(writes, (*inner.success, *inner.failure)))
    )


def tell_deleted(request: Message) -> None:
    """Have the answer to a call tell every key that it deletes."""
    if isinstance(request, pb.DeleteRangeRequest):
        request.prev_kv = request.prev_kv or bool(request.range_end)
    elif isinstance(request, pb.TxnRequest):
        for op in (*request.success, *request.failure):
            inner = op.WhichOneof("request")
            if inner is not None:
                tell_deleted(getattr(op, inner))


def effects_of(request: Message, answer: Message) -> list[Shape] | None:
    """What an answered call has written, key by key; None: the answer does not tell."""
    if isinstance(request, pb.PutRequest):
        put = _put(request)
        return None if put.unjudged else [put]
    if isinstance(request, pb.DeleteRangeRequest) and isinstance(answer, pb.DeleteRangeResponse):
        keys = [kv.key for kv in answer.prev_kvs] if request.range_end else [request.key]
        told = len(keys) == answer.deleted or not (request.range_end or answer.deleted)
        return [Shape(Verb.DELETE, key) for key in keys[: answer.deleted]] if told else None
    if isinstance(request, pb.TxnRequest) and isinstance(answer, pb.TxnResponse):
        return _effects(request, answer)
    return []


def _effects(request: pb.TxnRequest, answer: pb.TxnResponse) -> list[Shape] | None:
    found: list[Shape] = []
    for op, part in branch(request, answer):
        inner = op.WhichOneof("request")
        if inner is None:
            continue
        came = getattr(part, inner.replace("request", "response"))
        parts = effects_of(getattr(op, inner), came)
        if parts is None:
            return None
        found += parts
    if answer.succeeded:
        for shape in found:
            expected = [_required(c, shape.key) for c in request.compare]
            shape.expected = max((shape.expected, *expected))
    return found


def _txn(request: pb.TxnRequest) -> Shape:
    then = [op for op in request.success if writes(op)]
    if any(map(writes, request.failure)) or len(then) > 1:
        return Shape(unjudged=True)
    if not then:
        return Shape()
    if then[0].HasField("request_txn"):
        return Shape(unjudged=True)
    if then[0].HasField("request_put"):
        shape = _put(then[0].request_put)
    else:
        shape = shape_of(then[0].request_delete_range)
    shape.expected = _expected(request, shape.key)
    if shape.verb == Verb.UPDATE and shape.key == COMPACTION_KEY:
        shape.verb = Verb.COMPACT
    elif shape.verb == Verb.UPDATE and shape.expected == 0:
        shape.verb = Verb.CREATE
    return shape


def _expected(request: pb.TxnRequest, key: bytes) -> int:
    """The revision at which the key must be; 0: absent; -1: the comparison is another."""
    return _required(request.compare[0], key) if len(request.compare) == 1 else -1


def _required(compare: pb.Compare, key: bytes) -> int:
    """Likewise, of one comparison."""
    if compare.key != key or compare.range_end or compare.result != pb.Compare.EQUAL:
        return -1
    match compare.target:
        case pb.Compare.MOD:
            return compare.mod_revision
        case pb.Compare.CREATE:
            return 0 if not compare.create_revision else -1
        case pb.Compare.VERSION:
            return 0 if not compare.version else -1
    return -1


def result_of(shape: Shape, request: Message, answer: Message) -> Result:
    """Of an answer that is OK."""
    header = getattr(answer, "header", None)
    revision = header.revision if isinstance(header, pb.ResponseHeader) else 0
    stale = isinstance(request, pb.RangeRequest) and request.serializable
    told = -1 if stale or not revision else revision
    result = Result(shape.verb, Outcome.OK, told, digest=shape.digest, lease=shape.lease)
    match answer:
        case pb.RangeResponse():
            _read(shape, answer, result)
        case pb.TxnResponse():
            _decided(shape, request, answer, result)
        case pb.DeleteRangeResponse() if not answer.deleted:
            result.verb = Verb.OTHER
        case pb.LeaseGrantResponse():
            result.lease = answer.ID
    return result


def _read(shape: Shape, answer: pb.RangeResponse, result: Result) -> None:
    result.count = answer.count
    if shape.verb in (Verb.GET, Verb.READ_AT, Verb.LIST):
        result.items = list(answer.kvs)
    if shape.verb == Verb.LIST:
        result.found = int(answer.more)
    if shape.verb in (Verb.GET, Verb.READ_AT):
        result.found = answer.kvs[0].mod_revision if answer.kvs else 0
        result.digest = digest(answer.kvs[0].value) if answer.kvs else -1


def _decided(shape: Shape, request: Message, answer: pb.TxnResponse, result: Result) -> None:
    assert isinstance(request, pb.TxnRequest)
    if answer.succeeded:
        deleted = [
            part.response_delete_range.deleted
            for part in answer.responses
            if part.HasField("response_delete_range")
        ]
        if shape.verb == Verb.DELETE and not any(deleted):
            result.verb = Verb.OTHER
        return
    if shape.verb == Verb.OTHER:
        return
    result.outcome = Outcome.CONFLICT
    for op, part in zip(request.failure, answer.responses, strict=False):
        read = op.request_range
        if op.HasField("request_range") and _range(read) == Shape(Verb.GET, shape.key):
            kvs = part.response_range.kvs
            result.found = kvs[0].mod_revision if kvs else 0
            return
