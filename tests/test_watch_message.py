"""Responses encoded by hand against protobuf, and how events are cut into responses."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from kvstore.history import Entry
from kvstore.kv import Header, frame_key_value, frame_tombstone
from kvstore.pb import kv_pb2
from kvstore.pb import rpc_pb2 as pb
from kvstore.watch_message import (
    CANCELED,
    CREATED,
    NO_DELETE,
    NO_PUT,
    PREVIOUS,
    Change,
    Event,
    bodies,
    cancel_reason,
    compacted,
    encode,
    watch_id_field,
)

INT64 = st.one_of(st.integers(-5, 300), st.integers(-(1 << 63), (1 << 63) - 1))
REVISION = st.one_of(st.integers(0, 300), st.integers(0, (1 << 63) - 1))


@given(watch_id=INT64, revision=REVISION, reason=st.text(max_size=200))
def test_control_responses(watch_id: int, revision: int, reason: str) -> None:
    """Created, cancelled, refused, compacted and progress are what protobuf makes of them."""
    header = Header(cluster_id=1 << 63, member_id=2, raft_term=3)
    head = pb.ResponseHeader(cluster_id=1 << 63, member_id=2, revision=revision, raft_term=3)
    shapes: list[tuple[bytes, dict[str, bool | int | str]]] = [
        (b"", {}),
        (CREATED, {"created": True}),
        (CANCELED, {"canceled": True}),
        (
            CREATED + CANCELED + cancel_reason(reason or "why"),
            {"created": True, "canceled": True, "cancel_reason": reason or "why"},
        ),
        (compacted(revision or 1), {"canceled": True, "compact_revision": revision or 1}),
    ]
    for fields, expected in shapes:
        message = header.at(revision) + watch_id_field(watch_id) + fields
        wanted = pb.WatchResponse(header=head, watch_id=watch_id)
        for name, value in expected.items():
            setattr(wanted, name, value)
        assert message == wanted.SerializeToString(deterministic=True)


PAIR = st.tuples(
    st.binary(min_size=1, max_size=9), st.integers(1, 1 << 40), st.binary(max_size=200)
)


def change(
    sub: int, pair: tuple[bytes, int, bytes], *, deleted: bool, before: bool
) -> tuple[Change, kv_pb2.Event]:
    """A change as the hub has it, and the event that it is."""
    key, revision, value = pair
    entry: Entry = (revision + 2, sub, 0, 0, 0) if deleted else (revision + 2, sub, revision, 2, 5)
    event = kv_pb2.Event(kv=kv_pb2.KeyValue(key=key, mod_revision=revision + 2))
    framed = frame_tombstone(key, revision + 2)
    if deleted:
        event.type = kv_pb2.Event.DELETE
    else:
        framed = frame_key_value(key, revision, revision + 2, 2, value, 5)
        event.kv.MergeFrom(
            kv_pb2.KeyValue(create_revision=revision, version=2, value=value, lease=5)
        )
    if not before:
        return (key, entry, framed, None, None), event
    previous = (revision, sub, revision, 1, 0)
    event.prev_kv.CopyFrom(
        kv_pb2.KeyValue(
            key=key, create_revision=revision, mod_revision=revision, version=1, value=value
        )
    )
    framed_previous = frame_key_value(key, revision, revision, 1, value, 0)
    return (key, entry, framed, previous, framed_previous), event


@given(
    changes=st.lists(st.tuples(PAIR, st.booleans(), st.booleans()), max_size=6),
    wants=st.integers(0, 7),
    in_memory=st.booleans(),
)
def test_events(
    changes: Sequence[tuple[tuple[bytes, int, bytes], bool, bool]], wants: int, *, in_memory: bool
) -> None:
    """Events have what a watcher wants, whether the previous value was in memory or fetched."""
    given_changes: list[Change] = []
    fetched = dict[Entry, bytes | None]()
    expected: list[kv_pb2.Event] = []
    for sub, (pair, deleted, before) in enumerate(changes):
        made, event = change(sub, pair, deleted=deleted, before=before)
        if made[3] is not None and not in_memory:
            fetched[made[3]] = made[4]
            made = (*made[:4], None)
        given_changes.append(made)
        if not wants & PREVIOUS:
            event.ClearField("prev_kv")
        if not wants & (NO_DELETE if deleted else NO_PUT):
            expected.append(event)
    encoded = b"".join(event for _, event in encode(given_changes, wants, fetched))
    assert list(pb.WatchResponse.FromString(encoded).events) == expected


EVENTS = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 90)), min_size=1, max_size=30).map(
    lambda steps: [
        (1 + sum(step for step, _ in steps[: i + 1]), bytes([i]) * size)
        for i, (_, size) in enumerate(steps)
    ]
)


@given(
    events=EVENTS,
    response_bytes=st.integers(1, 400),
    fragment_bytes=st.one_of(st.just(0), st.integers(1, 200)),
)
def test_bodies(events: list[Event], response_bytes: int, fragment_bytes: int) -> None:
    """Nothing is lost or moved, no revision is cut but into fragments, sizes are kept."""
    cut = bodies(events, response_bytes, fragment_bytes)
    whole = [b"".join(piece.removeprefix(b"\x38\x01") for piece in body.pieces) for body in cut]
    assert b"".join(whole) == b"".join(encoded for _, encoded in events)
    assert sum(body.events for body in cut) == len(events)
    at = 0
    for body, data in zip(cut, whole, strict=True):
        inside = events[at : at + body.events]
        at += body.events
        assert (body.first, body.last) == (inside[0][0], inside[-1][0])
        assert at == len(events) or events[at][0] > body.last
        last_revision = sum(len(encoded) for revision, encoded in inside if revision == body.last)
        assert len(data) - last_revision < response_bytes
        assert at == len(events) or len(data) >= response_bytes
        more = [piece.startswith(b"\x38\x01") for piece in body.pieces]
        if fragment_bytes and len(inside) > 1 and len(data) >= fragment_bytes:
            assert more == [True] * (len(more) - 1) + [False]
            for piece in body.pieces:
                size = len(piece.removeprefix(b"\x38\x01"))
                assert size, "no piece without events"
                assert size < fragment_bytes or len(set(piece.removeprefix(b"\x38\x01"))) == 1
        else:
            assert len(body.pieces) == 1
