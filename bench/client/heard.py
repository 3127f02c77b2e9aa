"""What a watch hears, as rows of MESSAGES and EVENTS: the same for storms and for replays."""

from bench.records import MessageKind
from bench.values import digest
from kvstore.pb import kv_pb2
from kvstore.pb import rpc_pb2 as pb

DELETE = kv_pb2.Event.DELETE
_NO_PREV_KV = (-1, -1, -1, -1)


def kind_of(answer: pb.WatchResponse) -> MessageKind:
    """What one message of a watch is."""
    if answer.canceled:
        return MessageKind.CANCELED
    if answer.created:
        return MessageKind.CREATED
    return MessageKind.EVENTS if answer.events else MessageKind.PROGRESS


def message_row(
    watch: int, number: int, received_us: int, kind: MessageKind, answer: pb.WatchResponse
) -> tuple[int | bytes, ...]:
    """A row of MESSAGES: the ``number``-th message of a watch."""
    return (
        *(watch, number, received_us, kind, answer.header.revision, answer.compact_revision),
        *(len(answer.events), answer.fragment, answer.cancel_reason.encode()),
    )


def event_row(
    watch: int, message: int, event: kv_pb2.Event, key: bytes, value: bytes | None
) -> tuple[int | bytes, ...]:
    """A row of EVENTS; ``key`` without the run's prefix, ``value`` None for a deletion."""
    kv, before = event.kv, _NO_PREV_KV
    if event.HasField("prev_kv"):
        was = event.prev_kv
        before = (was.mod_revision, was.create_revision, was.version, digest(was.value))
    return (
        *(watch, message, event.type, kv.mod_revision, kv.create_revision, kv.version, kv.lease),
        *(-1 if value is None else digest(value), *before, key),
    )
