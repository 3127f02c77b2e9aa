"""etcdserverpb.Lease: LeaseGrant, LeaseRevoke, LeaseKeepAlive, LeaseTimeToLive, LeaseLeases.

Everything here executes at the head, so that every answer, refusals included, is released when the
changes it may rest on are durable; only a refusal that rests on none (``UnreadyError``) is given at
once. An encoded answer is the ready header (field 1) and the other fields behind it.

**Keep-alives.** A client renews all its leases on one stream, and etcd answers in order: a lease
that has expired is answered with TTL 0 when it is gone. Here a shard may be out for long, and with
it the end of a lease that has keys there. To wait for that would let the stream's other leases
expire, and to end the stream, as etcd does on every other failure, hardly less: clients open it
anew and send the same ones again, in any order. So such a keep-alive is answered with TTL 0 when
the lease's end is refused, or at once. That says what is true, and no more: the lease has expired,
or is being revoked, and this server renews it never again; LeaseTimeToLive shows 0 likewise. It
does not say that the keys are gone. Nor is it durable: after a crash the lease may be there once
more, for its whole TTL. Both err on the safe side: who held a lock gives it up before others can
have it. While home is out nothing of it is said: another server may have taken the leases over.
"""

from collections import deque
from collections.abc import Callable, Iterator
from heapq import merge
from itertools import islice

from kvstore import errors
from kvstore.answers import Refusal, Then
from kvstore.config import LeaseConfig
from kvstore.errors import (
    HeldError,
    LeaseNotFoundError,
    StoreError,
    TooManyRequestsError,
    UnreadyError,
)
from kvstore.kv import Header, frame, varint
from kvstore.lease import HOME_ONLY, Lessor
from kvstore.pb import rpc_pb2 as pb
from kvstore.rpc import decode
from kvstore.store import Store
from kvstore.transport.api import Call, Method, StatusError, Stream, StreamSink

_SERVICE = b"/etcdserverpb.Lease/"

LIST_STEP = 1_000
"""Leases sorted or encoded before other requests have their turn (about 2 ms)."""


class LeaseService:
    """The handlers of etcdserverpb.Lease over ``lessor``."""

    def __init__(
        self,
        store: Store,
        lessor: Lessor,
        header: Header,
        config: LeaseConfig,
        *,
        call_soon: Callable[[Callable[[], None]], object],
    ) -> None:
        self._call_soon = call_soon
        self._store = store
        self._commits = store.commits
        self._lessor = lessor
        self._header = header
        self.config = config

    def methods(self) -> list[Method]:
        """The service's table for the transport."""
        return [
            Method.unary(_SERVICE + b"LeaseGrant", self.grant),
            Method.unary(_SERVICE + b"LeaseRevoke", self.revoke),
            Method.bidi_stream(_SERVICE + b"LeaseKeepAlive", self.keep_alives),
            Method.unary(_SERVICE + b"LeaseTimeToLive", self.time_to_live),
            Method.unary(_SERVICE + b"LeaseLeases", self.leases),
        ]

    def grant(self, payload: bytes, call: Call) -> None:
        """Lease.LeaseGrant."""
        request = decode.parse(pb.LeaseGrantRequest.FromString, payload)
        try:
            lease_id, ttl = self._lessor.grant(request.ID, request.TTL)
        except UnreadyError as error:
            call.fail(error.code, error.text)
            return
        except StoreError as error:
            self._commits.release(HOME_ONLY, Refusal(call, error), b"")
            return
        body = self._head() + b"\x10" + varint(lease_id) + b"\x18" + varint(ttl)
        self._commits.release(HOME_ONLY, call, body)

    def revoke(self, payload: bytes, call: Call) -> None:
        """Lease.LeaseRevoke: the header is the deletion's, or the head."""
        self._revoke(decode.parse(pb.LeaseRevokeRequest.FromString, payload).ID, call)

    def _revoke(self, lease_id: int, call: Call, *, in_turn: bool = False) -> None:
        """Revoke at once, or in its turn when it has keys on several shards; refused if they have
        come to others meanwhile.
        """
        try:
            revision = self._lessor.revoke(lease_id)
        except UnreadyError as error:
            if in_turn or not isinstance(error, HeldError):
                call.fail(error.code, error.text)
                return
            self._store.barrier.run(
                self._lessor.shards_of(lease_id),
                lambda: self._revoke(lease_id, call, in_turn=True),
                lambda refused: call.fail(refused.code, refused.text),
                0,
            )
            return
        except LeaseNotFoundError as error:
            self._lessor.after_revoke(lease_id, Refusal(call, error), b"")
            return
        self._lessor.after_revoke(lease_id, call, self._header.at(revision))

    def time_to_live(self, payload: bytes, call: Call) -> None:
        """Lease.LeaseTimeToLive: an unknown lease is TTL -1 and no error."""
        request = decode.parse(pb.LeaseTimeToLiveRequest.FromString, payload)
        found = self._lessor.time_to_live(request.ID, keys=request.keys)
        answer = pb.LeaseTimeToLiveResponse(ID=request.ID, TTL=-1)
        shards: tuple[int, ...] = HOME_ONLY
        if found is not None:
            answer.TTL, answer.grantedTTL = found.left, found.granted
            answer.keys.extend(found.keys)
            shards = found.shards
        body = self._header.at(self._store.head_of(shards)) + answer.SerializeToString()
        self._commits.release(shards, call, body)

    def leases(self, payload: bytes, call: Call) -> None:
        """Lease.LeaseLeases: in the order in which they expire, as in etcd."""
        decode.parse(pb.LeaseLeasesRequest.FromString, payload)
        self._list(call, [self._head()], self._listing(self._lessor.leases()))

    def _list(self, call: Call, parts: list[bytes], listing: Iterator[bytes]) -> None:
        """Take a step of the listing, giving way to other requests between two."""
        part = next(listing, None)
        if part is None:
            self._commits.release(HOME_ONLY, call, b"".join(parts))
        elif not call.cancelled:
            parts.append(part)
            self._call_soon(lambda: self._list(call, parts, listing))

    def _listing(self, ids: list[int]) -> Iterator[bytes]:
        """The leases of the answer, encoded: sorts pieces, then merges them; each step is short."""
        pieces: list[list[tuple[float, int]]] = []
        for start in range(0, len(ids), LIST_STEP):
            pieces.append(self._lessor.by_expiry(ids[start : start + LIST_STEP]))
            yield b""
        ordered = merge(*pieces)
        while step := list(islice(ordered, LIST_STEP)):
            yield b"".join(frame(b"\x12", b"\x08" + varint(lease_id)) for _, lease_id in step)

    def keep_alives(self, stream: Stream) -> StreamSink:
        """Lease.LeaseKeepAlive."""
        return _KeepAlives(self, stream)

    def renew(self, lease_id: int, waiting: "_KeepAlives") -> None:
        """Renew a lease, then answer ``waiting``; an expired one is answered when it is gone, or
        when that is not to be waited for. See the module's text.

        The header is taken first (etcd: it must not be later than the moment the lease was alive).
        Raises StoreError.
        """
        head = self._head()
        ttl = self._lessor.keep_alive(lease_id)
        body = head + pb.LeaseKeepAliveResponse(ID=lease_id, TTL=ttl or 0).SerializeToString()

        def ended(error: StoreError | None) -> None:
            if error is None:
                waiting.reply(body)
            else:
                self._commits.release(HOME_ONLY, waiting, body)

        if ttl is None:
            self._lessor.after_revoke(lease_id, Then(ended), b"")
        else:
            self._commits.release(HOME_ONLY, waiting, body)

    def _head(self) -> bytes:
        """The header of an answer that changed nothing itself."""
        return self._header.at(self._store.head_of(HOME_ONLY))


class _KeepAlives:
    """One LeaseKeepAlive stream: one renewal after the other, as in etcd; answers are in order."""

    def __init__(self, service: LeaseService, stream: Stream) -> None:
        self._service = service
        self._stream = stream
        self._waiting: deque[int] = deque()
        self._renewing = False
        self._stepping = False
        self._half_closed = False

    # -- from the transport ------------------------------------------------------------------------

    def message(self, message: bytes, /) -> None:
        """One more lease to renew."""
        lease_id = decode.parse(pb.LeaseKeepAliveRequest.FromString, message).ID
        if len(self._waiting) >= self._service.config.keep_alives_waiting_max:
            raise StatusError(errors.RESOURCE_EXHAUSTED, TooManyRequestsError.text)
        self._waiting.append(lease_id)
        self._step()

    def half_closed(self) -> None:
        """The stream ends well once everything asked is answered."""
        self._half_closed = True
        self._step()

    def writable(self) -> None:
        """The client has read on."""
        self._step()

    def closed(self) -> None:
        """Nobody waits any more."""
        self._waiting.clear()

    # -- from the commits --------------------------------------------------------------------------

    def reply(self, message: bytes) -> None:
        """The renewal under way may be answered."""
        self._stream.send([message], len(message))
        self._renewing = False
        self._step()

    def fail(self, code: int, message: str) -> None:
        """It cannot be: the client must not believe that its lease lives on."""
        self._stream.finish(code, message)

    def _step(self) -> None:
        """Renew the next ones for as long as nothing must be waited for."""
        if self._stepping:
            return  # called back from inside the loop below, which goes on by itself
        self._stepping = True
        while self._waiting and not self._renewing and self._has_room():
            self._renewing = True
            try:
                self._service.renew(self._waiting.popleft(), self)
            except StoreError as error:
                self.fail(error.code, error.text)
        self._stepping = False
        if self._half_closed and not self._renewing and not self._waiting:
            self._stream.finish()

    def _has_room(self) -> bool:
        return self._stream.outbox_bytes < self._service.config.keep_alive_outbox_bytes_max
