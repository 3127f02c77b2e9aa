"""A small etcd that is right, or wrong in exactly one way.

It serves what storms use (Range, Txn of one comparison and one change, Compact, LeaseGrant, Status,
Watch) from memory, in one process and one turn of the loop per call, so it is right because nothing
happens at once. One fault can be planted; it is committed once, at the n-th occasion:
``python -m tests.bench.fake_etcd PORT FAULT N``.
"""

import asyncio
import socket
import sys
import time
from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass, field
from enum import StrEnum, auto
from typing import NamedTuple

import uvloop

from bench.client import requests
from kvstore.pb import kv_pb2
from kvstore.pb import rpc_pb2 as pb
from kvstore.transport.api import Call, Method, StatusError, Stream
from kvstore.transport.server import Server
from tests.transport.limits import TEST_LIMITS


class Fault(StrEnum):
    """What can be wrong; occasions are those on which it would matter."""

    NONE = auto()
    LOST_EVENT = auto()
    DUPLICATED_EVENT = auto()
    REORDERED_EVENTS = auto()
    SPLIT_REVISION = auto()
    LOST_WRITE = auto()
    """Acknowledged with a new revision, and not done."""
    FORGOTTEN_WRITE = auto()
    """Done and shown, and undone a second later without a word."""
    WRONG_PREV_KV = auto()
    MISSING_PREV_KV = auto()
    WRONG_CREATE = auto()
    WRONG_VERSION = auto()
    RESURRECTED_KEY = auto()
    """A second after its deletion the key is there again."""
    EARLY_PROGRESS = auto()
    """Progress names a revision whose event comes behind it."""
    STRAY_EVENT = auto()
    IGNORED_FILTER = auto()
    STALE_READ = auto()
    TORN_PAGE = auto()
    LEASE_EARLY = auto()
    LEASE_NEVER = auto()
    LEASE_TWICE = auto()
    SILENT_COMPACTED = auto()
    REVISION_BACK = auto()
    NO_WATCH = auto()
    """There is no such method, on any occasion."""
    FALSE_COMPACTION = auto()
    """A watch is canceled as compacted, and nobody has compacted."""
    EMPTY_PAGE = auto()
    MORE_DENIED = auto()
    MORE_PROMISED = auto()
    WRONG_COUNT = auto()
    """Of a page that is cut short by its limit."""
    EMPTY_STORE = auto()
    """A list of everything shows and counts nothing."""
    UNKNOWN_TWICE = auto()
    """A write is done twice and answered as if it may not have been done."""


class Event(NamedTuple):
    """One change; of a delete ``kv`` has the key and the revision only."""

    kv: kv_pb2.KeyValue
    deleted: bool
    prev: kv_pb2.KeyValue | None


@dataclass
class Lease:
    """Keys that end together."""

    ends: float
    keys: set[bytes] = field(default_factory=set)


def inside(key: bytes, first: bytes, end: bytes) -> bool:
    """As etcd's ranges are: one key, from a key on, or up to an end."""
    return key == first if not end else key >= first and (end == b"\0" or key < end)


def response(revision: int, *events: Event, prev: bool = False) -> pb.WatchResponse:
    """One message of a watch."""
    answer = pb.WatchResponse()
    answer.header.revision = revision
    for kv, deleted, before in events:
        event = answer.events.add(kv=kv, type=kv_pb2.Event.DELETE if deleted else 0)
        if prev and before is not None:
            event.prev_kv.CopyFrom(before)
    return answer


class Watch:
    """A watch's sink; everything is sent as soon as it happens."""

    def __init__(self, fake: "FakeEtcd", stream: Stream) -> None:
        self._fake, self._stream = fake, stream
        self.asked: pb.WatchCreateRequest | None = None
        self._held: Event | None = None

    def message(self, message: bytes, /) -> None:
        """Create the watch, or ask for its progress."""
        request = pb.WatchRequest.FromString(message)
        fake = self._fake
        if request.HasField("progress_request"):
            if self.asked is not None:
                self.send(pb.WatchResponse(header=fake.header()))
            return
        asked = self.asked = request.create_request
        self.send(pb.WatchResponse(header=fake.header(), created=True))
        if 0 < asked.start_revision < fake.compacted:
            self.asked = None
            if not fake.occasion(Fault.SILENT_COMPACTED):
                told = pb.WatchResponse(header=fake.header(), canceled=True)
                told.compact_revision = fake.compacted
                self.send(told)
            return
        if fake.occasion(Fault.FALSE_COMPACTION, when=asked.start_revision > 0):
            self.asked = None
            told = pb.WatchResponse(header=fake.header(), canceled=True)
            told.compact_revision = asked.start_revision + 1
            self.send(told)
            return
        if asked.start_revision:
            for _, events in fake.since(asked.start_revision):
                self.show(events)
        fake.watches.append(self)

    def show(self, events: list[Event]) -> None:
        """The changes of one revision, those that it wants."""
        asked, fake = self.asked, self._fake
        assert asked is not None
        mine = [e for e in events if inside(e.kv.key, asked.key, asked.range_end)]
        if not mine and fake.occasion(Fault.STRAY_EVENT, when=bool(asked.range_end != b"\0")):
            mine = events
        wanted = [e for e in mine if int(e.deleted) not in asked.filters]
        if wanted != mine and fake.occasion(Fault.IGNORED_FILTER):
            wanted = mine
        if not wanted or fake.occasion(Fault.LOST_EVENT):
            return
        if self._held is None and fake.occasion(Fault.REORDERED_EVENTS):
            self._held = wanted[0]
            return
        if fake.occasion(Fault.EARLY_PROGRESS):
            self.send(pb.WatchResponse(header=fake.header()))
        self._send(wanted)
        if fake.occasion(Fault.DUPLICATED_EVENT):
            self._send(wanted)
        if self._held is not None:
            held, self._held = self._held, None
            self._send([held])

    def _send(self, events: list[Event]) -> None:
        fake, asked = self._fake, self.asked
        assert asked is not None
        had = asked.prev_kv and events[0].prev is not None
        prev = asked.prev_kv and not fake.occasion(Fault.MISSING_PREV_KV, when=had)
        if fake.occasion(Fault.WRONG_PREV_KV, when=had):
            kv, deleted, before = events[0]
            wrong = kv_pb2.KeyValue()
            wrong.CopyFrom(before or kv)
            wrong.mod_revision -= 1
            events = [Event(kv, deleted, wrong), *events[1:]]
        if len(events) > 1 and fake.occasion(Fault.SPLIT_REVISION):
            self.send(response(fake.revision, *events[:1], prev=prev))
            events = events[1:]
        self.send(response(fake.revision, *events, prev=prev))

    def send(self, answer: pb.WatchResponse) -> None:
        """One message."""
        raw = answer.SerializeToString()
        self._stream.send([raw], len(raw))

    def half_closed(self) -> None:
        """A client that is done with asking may still listen."""

    def writable(self) -> None:
        """Nothing is held back: runs are small."""

    def closed(self) -> None:
        """Nobody listens any more."""
        if self in self._fake.watches:
            self._fake.watches.remove(self)


class FakeEtcd:
    """See the module's text."""

    def __init__(self, fault: Fault = Fault.NONE, after: int = 1) -> None:
        self.revision = 1
        self.compacted = 0
        self.watches: list[Watch] = []
        self._fault, self._after = fault, after
        self._past: dict[bytes, list[tuple[int, kv_pb2.KeyValue | None]]] = defaultdict(list)
        self._log: list[tuple[int, list[Event]]] = []
        self._leases: dict[int, Lease] = {}
        self._lease_next = 1000

    def occasion(self, fault: Fault, *, when: bool = True) -> bool:
        """Is this the moment for the planted fault?"""
        if fault is not self._fault or not when:
            return False
        self._after -= 1
        return self._after == 0

    def header(self) -> pb.ResponseHeader:
        """Of every answer."""
        return pb.ResponseHeader(revision=self.revision)

    def since(self, revision: int) -> list[tuple[int, list[Event]]]:
        """What has happened from a revision on."""
        return [part for part in self._log if part[0] >= revision]

    def methods(self) -> list[Method]:
        """What is served."""
        methods = [
            Method.unary(requests.RANGE, self.range),
            Method.unary(requests.TXN, self.txn),
            Method.unary(requests.COMPACT, self.compact),
            Method.unary(requests.GRANT, self.grant),
            Method.unary(requests.STATUS, self.status),
        ]
        if self._fault is not Fault.NO_WATCH:
            watch = Method.bidi_stream(requests.WATCH, lambda stream: Watch(self, stream))
            methods.append(watch)
        return methods

    # Reads.

    def at(self, key: bytes, revision: int) -> kv_pb2.KeyValue | None:
        """A key at a revision."""
        past = self._past.get(key, [])
        place = bisect_right(past, revision, key=lambda part: part[0])
        return past[place - 1][1] if place else None

    def range(self, message: bytes, _call: Call) -> bytes:
        """A key or a page, now or at a revision."""
        request = pb.RangeRequest.FromString(message)
        if 0 < request.revision < self.compacted:
            raise StatusError(11, "etcdserver: mvcc: required revision has been compacted")
        return self._range(request).SerializeToString()

    def _range(self, request: pb.RangeRequest) -> pb.RangeResponse:
        at = request.revision or self.revision
        if request.range_end:
            keys = sorted(k for k in self._past if inside(k, request.key, request.range_end))
        else:
            keys = [request.key]
            past = self._past.get(request.key, [])
            stale = len(past) > 1 and not request.revision
            if self.occasion(Fault.STALE_READ, when=stale):
                at = past[-1][0] - 1
        found = [kv for key in keys if (kv := self.at(key, at)) is not None]
        everything = request.range_end == b"\0" and not request.count_only
        if self.occasion(Fault.EMPTY_STORE, when=everything):
            found = []
        answer = pb.RangeResponse(header=self.header(), count=len(found))
        if self.occasion(Fault.REVISION_BACK, when=not request.range_end):
            answer.header.revision = 1  # far enough, in whatever order answers come
        if not request.count_only:
            shown = found[: request.limit] if request.limit else found
            answer.more = len(shown) < len(found)
            if self.occasion(Fault.MORE_DENIED, when=answer.more):
                answer.more = False
            if self.occasion(Fault.MORE_PROMISED, when=request.limit > 1 and not answer.more):
                answer.more = True
            if self.occasion(Fault.WRONG_COUNT, when=answer.more):
                answer.count += 1
            if len(shown) > 2 and self.occasion(Fault.TORN_PAGE):
                del shown[1]
            if 1 < request.limit < len(found) and self.occasion(Fault.EMPTY_PAGE):
                shown = []
            answer.kvs.extend(shown)
        return answer

    # Writes.

    def txn(self, message: bytes, _call: Call) -> bytes:
        """One comparison; one put or delete, or one read."""
        request = pb.TxnRequest.FromString(message)
        (compare,) = request.compare
        now = self.at(compare.key, self.revision)
        answer = pb.TxnResponse()
        if compare.target == pb.Compare.MOD:
            answer.succeeded = compare.mod_revision == (now.mod_revision if now else 0)
        else:
            answer.succeeded = compare.version == (now.version if now else 0)
        for part in request.success if answer.succeeded else request.failure:
            if part.HasField("request_put"):
                put = part.request_put
                if put.lease and put.lease not in self._leases:
                    raise StatusError(5, "etcdserver: requested lease not found")
                self._put(put.key, put.value, put.lease)
                answer.responses.add().response_put.header.revision = self.revision
            elif part.HasField("request_delete_range"):
                self._delete(part.request_delete_range.key)
                answer.responses.add().response_delete_range.deleted = 1
            else:
                answer.responses.add().response_range.CopyFrom(self._range(part.request_range))
        answer.header.CopyFrom(self.header())
        put = request.success[0].request_put
        known = now is not None and answer.succeeded and bool(put.key)
        if self.occasion(Fault.UNKNOWN_TWICE, when=known and put.key != b"compact_rev_key"):
            self._put(put.key, put.value, put.lease)
            raise StatusError(14, "etcdserver: request timed out")
        return answer.SerializeToString()

    def _put(self, key: bytes, value: bytes, lease: int) -> None:
        was = self.at(key, self.revision)
        self.revision += 1
        kv = kv_pb2.KeyValue(key=key, value=value, lease=lease, mod_revision=self.revision)
        kv.create_revision = was.create_revision if was else self.revision
        kv.version = was.version + 1 if was else 1
        if self.occasion(Fault.LOST_WRITE, when=key != b"compact_rev_key"):
            return
        if was is not None and was.lease:
            self._leases[was.lease].keys.discard(key)
        if lease:
            self._leases[lease].keys.add(key)
        shown = kv_pb2.KeyValue()
        shown.CopyFrom(kv)
        if self.occasion(Fault.WRONG_CREATE, when=was is not None):
            shown.create_revision = self.revision
        if self.occasion(Fault.WRONG_VERSION):
            shown.version += 1
        self._past[key].append((self.revision, kv))
        self._tell([Event(shown, deleted=False, prev=was)])
        if self.occasion(Fault.FORGOTTEN_WRITE, when=was is not None and not lease):
            self._later(key, self.revision)

    def _delete(self, *keys: bytes) -> None:
        self.revision += 1
        events = []
        for key in keys:
            was = self.at(key, self.revision)
            if was is not None and was.lease in self._leases:
                self._leases[was.lease].keys.discard(key)
            self._past[key].append((self.revision, None))
            kv = kv_pb2.KeyValue(key=key, mod_revision=self.revision)
            events.append(Event(kv, deleted=True, prev=was))
        self._tell(events)
        if self.occasion(Fault.RESURRECTED_KEY):
            self._later(keys[0], self.revision)

    def _later(self, key: bytes, revision: int) -> None:
        """In a moment, what happened to the key at that revision has never been."""

        def undo() -> None:
            past = self._past[key]
            past[:] = [part for part in past if part[0] < revision]

        asyncio.get_running_loop().call_later(0.5, undo)

    def _tell(self, events: list[Event]) -> None:
        self._log.append((self.revision, events))
        for watch in list(self.watches):
            watch.show(events)

    def compact(self, message: bytes, _call: Call) -> bytes:
        """Forget what is older."""
        self.compacted = max(self.compacted, pb.CompactionRequest.FromString(message).revision)
        return pb.CompactionResponse(header=self.header()).SerializeToString()

    # Leases.

    def grant(self, message: bytes, _call: Call) -> bytes:
        """A lease, which ends by itself."""
        ttl = pb.LeaseGrantRequest.FromString(message).TTL
        self._lease_next += 1
        number = self._lease_next
        self._leases[number] = Lease(time.monotonic() + ttl)
        seconds = ttl - 1.5 if self.occasion(Fault.LEASE_EARLY) else float(ttl)
        if not self.occasion(Fault.LEASE_NEVER):
            asyncio.get_running_loop().call_later(seconds, self._end, number)
        answer = pb.LeaseGrantResponse(header=self.header(), ID=number, TTL=ttl)
        return answer.SerializeToString()

    def _end(self, number: int) -> None:
        keys = sorted(self._leases.pop(number).keys)
        if keys:
            self._delete(*keys)
            if self.occasion(Fault.LEASE_TWICE):
                self._delete(*keys)

    def status(self, _message: bytes, _call: Call) -> bytes:
        """Who this is."""
        return pb.StatusResponse(header=self.header(), version="3.6.0-fake").SerializeToString()


def complain(what: str, error: Exception) -> None:
    """What goes wrong shows."""
    sys.stderr.write(f"{what}: {error!r}\n")


async def main(port: int, fault: Fault, after: int) -> None:
    """Serve until killed."""
    server = Server(
        methods=FakeEtcd(fault, after).methods(),
        http_handler=lambda _: None,
        limits=TEST_LIMITS,
        clock=time.monotonic,
        wall=time.time,
        on_failure=complain,
    )
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # it may be killed and come back
    sock.bind(("127.0.0.1", port))
    server.listen(sock)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), Fault(sys.argv[2]), int(sys.argv[3])))
