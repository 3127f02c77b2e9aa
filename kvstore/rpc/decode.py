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
