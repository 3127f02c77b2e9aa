"""From protobuf requests to the engine's operations; protobuf messages stop here."""

from collections.abc import Callable
from typing import TypeVar

from google.protobuf.message import DecodeError

from kvstore import errors
from kvstore.pb import rpc_pb2 as pb
from kvstore.range import RangeQuery
from kvstore.transport.api import StatusError
from kvstore.txn import Compare, DeleteRange, Op, Put, Txn

MessageT = TypeVar("MessageT")

_PLAIN_KEY_MAX = 127
_COMPARE_FIELDS = ("version", "create_revision", "mod_revision", "value", "lease")


def parse(from_string: Callable[[bytes], MessageT], payload: bytes) -> MessageT:
    """The message in ``payload``; bytes that are none are refused as grpc-go does (INTERNAL)."""
    try:
        return from_string(payload)
    except DecodeError as error:
        raise StatusError(errors.INTERNAL, f"grpc: error unmarshalling request: {error}") from error


def plain_key(payload: bytes) -> bytes | None:
    """The key of a RangeRequest that asks for one key now and nothing else; None for any other
    request.

    The two shapes that clients send for a get, ``key`` alone and ``key, limit=1``, are told by
    their length, which saves making a message object.
    """
    size = len(payload)
    if size > 2 and payload[0] == 0x0A:
        length = payload[1]
        if length <= _PLAIN_KEY_MAX and (
            size == length + 2 or (size == length + 4 and payload.endswith(b"\x18\x01"))
        ):
            return payload[2 : length + 2]
    return None


def plain_update(payload: bytes) -> tuple[bytes, int, bytes, int] | None:
    """(key, mod_revision, value, lease) of a TxnRequest that puts one key if its mod_revision is
    as given and otherwise at most reads that key; None for any other request.

    This is how kube-apiserver creates and updates (etcd ``client/v3/kubernetes``: OptimisticPut),
    nine writes of ten. Reading these bytes in place costs a fifth of making message objects. Only
    the encoding that every protobuf library gives this request is taken: fields in order, each
    once.
    """
    try:
        if payload[0] != 0x0A:
            return None
        length, at = _varint(payload, 1)
        compare_end = at + length
        if payload[at : at + 3] != b"\x10\x02\x1a":  # target MOD, then the key
            return None
        length, at = _varint(payload, at + 3)
        key = payload[at : at + length]
        at += length
        if payload[at] != 0x30:
            return None
        mod_revision, at = _varint(payload, at + 1)
        if at != compare_end or payload[at] != 0x12:
            return None
        length, at = _varint(payload, at + 1)
        success_end = at + length
        put = _plain_put(payload, at, success_end, key)
        if put is None or not _plain_failure(payload, success_end, key):
            return None
    except IndexError:
        return None
    return key, mod_revision, put[0], put[1]


def _plain_put(payload: bytes, at: int, end: int, key: bytes) -> tuple[bytes, int] | None:
    """(value, lease) of a RequestOp in [at, end) that puts ``key``."""
    if not key or payload[at] != 0x12:
        return None
    length, at = _varint(payload, at + 1)
    if at + length != end or payload[at] != 0x0A:
        return None
    length, at = _varint(payload, at + 1)
    if payload[at : at + length] != key:
        return None
    at += length
    value, lease = b"", 0
    if at < end and payload[at] == 0x12:
        length, at = _varint(payload, at + 1)
        value = payload[at : at + length]
        at += length
    if at < end and payload[at] == 0x18:
        lease, at = _varint(payload, at + 1)
        if lease >> 63:
            return None
    return (value, lease) if at == end else None


def _plain_failure(payload: bytes, at: int, key: bytes) -> bool:
    """Is the rest nothing, or one RequestOp that reads ``key`` and asks for nothing more?"""
    size = len(key)
    if at == len(payload):
        return True
    if size > _PLAIN_KEY_MAX - 4:
        return False
    return payload[at:] == b"\x1a%c\x0a%c\x0a%c%b" % (size + 4, size + 2, size, key)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The varint at ``at`` and the position after it; IndexError when it does not end."""
    byte = data[at]
    if byte < 0x80:
        return byte, at + 1
    number = byte & 0x7F
    shift = 7
    while True:
        at += 1
        byte = data[at]
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at + 1
        shift += 7


def range_query(message: pb.RangeRequest) -> RangeQuery:
    """A RangeRequest as the engine's query."""
    return RangeQuery(
        message.key,
        message.range_end or None,
        max(message.limit, 0),
        message.revision,
        message.sort_order,
        message.sort_target,
        message.serializable,
        message.keys_only,
        message.count_only,
        message.min_mod_revision,
        message.max_mod_revision,
        message.min_create_revision,
        message.max_create_revision,
    )


def put(message: pb.PutRequest) -> Put:
    """A PutRequest as the engine's operation."""
    return Put(
        message.key,
        message.value,
        message.lease,
        message.prev_kv,
        message.ignore_value,
        message.ignore_lease,
    )


def delete_range(message: pb.DeleteRangeRequest) -> DeleteRange:
    """A DeleteRangeRequest as the engine's operation."""
    return DeleteRange(message.key, message.range_end or None, message.prev_kv)


def txn(message: pb.TxnRequest) -> Txn:
    """A TxnRequest as the engine's tree of operations."""
    return Txn(
        [_compare(compare) for compare in message.compare],
        [_op(op) for op in message.success],
        [_op(op) for op in message.failure],
    )


def _compare(message: pb.Compare) -> Compare:
    """The operand is the field of the compare's own target, whichever of the union was sent, as in
    etcd.
    """
    target = message.target
    field = _COMPARE_FIELDS[target] if 0 <= target < len(_COMPARE_FIELDS) else "version"
    operand: bytes | int = getattr(message, field)
    return Compare(message.result, target, message.key, message.range_end or None, operand)


def _op(message: pb.RequestOp) -> Op | None:
    match message.WhichOneof("request"):
        case "request_put":
            return put(message.request_put)
        case "request_range":
            return range_query(message.request_range)
        case "request_delete_range":
            return delete_range(message.request_delete_range)
        case "request_txn":
            return txn(message.request_txn)
        case _:
            return None
