"""WatchResponses as bytes: an event is encoded once and shared by all watchers that want it.

A response is three parts, in the order of their fields:

    header (1)    made once per revision, shared
    watch_id (2)  made once per watcher
    the rest      created (3), canceled (4), compact_revision (5), cancel_reason (6), or a **body**:
                  fragment (7) and events (11), made once per group of like watchers, shared

Events of one revision are never split over responses, unless the watcher asked for fragments:
then a large body is split between events, with ``fragment`` set on all but the last piece
(etcd ``server/etcdserver/api/v3rpc/watch.go``).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from kvstore.history import Entry
from kvstore.kv import frame, frame_delete_event, frame_put_event, varint

CREATED = b"\x18\x01"
CANCELED = b"\x20\x01"
_FRAGMENT = b"\x38\x01"

INVALID_WATCH_ID = -1
"""In refusals, and in progress for all watchers of a stream."""

PREVIOUS = 1
NO_PUT = 2
NO_DELETE = 4
FRAGMENTS = 8
"""What a watcher wants to be different: flags, added up; like watchers share encoded events."""

Change = tuple[bytes, Entry, bytes, Entry | None, bytes | None]
"""(key, entry, framed, previous, framed previous); the last is None when it is not in memory."""

Event = tuple[int, bytes]
"""(mod_revision, the encoded entry of ``WatchResponse.events``)."""


class Outbox(Protocol):
    """The sending end of one client's stream."""

    @property
    def outbox_bytes(self) -> int:
        """Bytes that the client has not taken yet."""

    def send(self, parts: Sequence[bytes], size: int, /) -> None:
        """Queue one message of ``size`` bytes; its parts are shared with others."""


class Body(NamedTuple):
    """Events of complete revisions, ready to send."""

    first: int
    """A watcher that did not get this body still needs everything from this revision on."""
    last: int
    pieces: tuple[bytes, ...]
    """What follows the watch_id: one piece, or fragments that belong together."""
    events: int


def watch_id_field(watch_id: int) -> bytes:
    """Field 2; left out when 0."""
    return b"\x10" + varint(watch_id) if watch_id else b""


def cancel_reason(text: str) -> bytes:
    """Field 6."""
    return frame(b"\x32", text.encode())


def compacted(revision: int) -> bytes:
    """Cancelled because everything below ``revision`` is gone: fields 4 and 5."""
    return CANCELED + b"\x28" + varint(revision)


def encode(
    changes: Iterable[Change], wants: int, fetched: Mapping[Entry, bytes | None]
) -> list[Event]:
    """The events among ``changes`` for watchers with the flags ``wants``.

    ``fetched`` has previous values that were not in memory; None there, or nothing, means that
    compaction has taken the value: the event then goes without it, as in etcd.
    """
    events: list[Event] = []
    for _, entry, framed, previous, framed_previous in changes:
        if previous is None or not wants & PREVIOUS:
            shown = None
        elif framed_previous is None:
            shown = fetched.get(previous)
        else:
            shown = framed_previous
        if entry[3]:
            if not wants & NO_PUT:
                events.append((entry[0], frame_put_event(framed, shown)))
        elif not wants & NO_DELETE:
            events.append((entry[0], frame_delete_event(framed, shown)))
    return events


def bodies(events: Sequence[Event], response_bytes: int, fragment_bytes: int) -> list[Body]:
    """``events`` cut into bodies at the first revision that brings a body to ``response_bytes``.

    With ``fragment_bytes`` (0: none), a body that reaches that consists of several pieces.
    """
    if len(events) == 1:
        revision, encoded = events[0]
        return [Body(revision, revision, (encoded,), 1)]
    cut: list[Body] = []
    start = size = 0
    for i, (revision, encoded) in enumerate(events):
        if size >= response_bytes and revision != events[i - 1][0]:
            cut.append(_body(events[start:i], size, fragment_bytes))
            start, size = i, 0
        size += len(encoded)
    if size:
        cut.append(_body(events[start:], size, fragment_bytes))
    return cut


def _body(events: Sequence[Event], size: int, fragment_bytes: int) -> Body:
    if fragment_bytes and size >= fragment_bytes:
        pieces = _fragments(events, fragment_bytes)
    else:
        pieces = (b"".join([encoded for _, encoded in events]),)
    return Body(events[0][0], events[-1][0], pieces, len(events))


def _fragments(events: Sequence[Event], fragment_bytes: int) -> tuple[bytes, ...]:
    """At least one event each; all but the last say that more follows."""
    pieces: list[list[bytes]] = [[]]
    held = 0
    for _, encoded in events:
        if pieces[-1] and held + len(encoded) >= fragment_bytes:
            pieces.append([])
            held = 0
        pieces[-1].append(encoded)
        held += len(encoded)
    *more, last = (b"".join(piece) for piece in pieces)
    return (*(_FRAGMENT + piece for piece in more), last)
