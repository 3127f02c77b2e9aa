"""What a recorded revision, lease or version is on the server that the trace is replayed to.

    compared revision   the revision at which the replayed call wrote that key which the recorded
                        one had written at it; else that at which a read of both showed the key;
                        else the newest that is known of the key, or one that it never had if
                        the comparison failed when it was recorded; both are counted
    read or watched     on the connection that was told of it: what the same answer told in the
      revision          replay. Else, and for compactions: where the replay stands when all writes
                        recorded up to it and answered by now are done
    version             less by those versions that an object had when the recording began
    lease               that which the replayed call was granted; a lease from before the recording
                        is none, which is counted
    time to live        divided by the speed, at least a second

What this cannot do: a revision inside a value stays what it was (``compact_rev_key``). Clients that
raced may win in another order, though one that lost waits for the write to which it lost, if that
was sent before it: compares then fail or hold where others did. Revisions of keys that somebody
else wrote, past the proxy, are not known. History from before the recording is not there: a watch
or read of it begins with the replay, which is counted.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator

from google.protobuf.message import Message

from bench.replay.script import Call, Script, branch, written
from kvstore.pb import kv_pb2
from kvstore.pb import rpc_pb2 as pb

COMPARED = "compared revisions"
COMPARED_RANGES = "compared revisions of ranges"
REVISIONS = "revisions before the recording"
LEASES = "leases"


class Translation:
    """Of one replay. ``unmapped`` counts by kind what had no counterpart."""

    def __init__(self, script: Script, revision: int, speed: float) -> None:
        """``revision`` was the store's when the recording began."""
        self._script = script
        self._speed = speed
        self._begun = revision
        self._mods: dict[tuple[bytes, int], int] = {}
        self._newest: dict[bytes, int] = {}
        self._versions: dict[bytes, int] = {}
        """Versions that an object had before the recording began, but for its last."""
        self._leases: dict[int, int] = {}
        self._heads: dict[tuple[int, int], int] = {}
        """By connection and recorded revision: what the first answer that told it told now."""
        self._recorded: list[int] = []
        self._replayed: list[int] = []
        """Stairs: a write recorded at or before the one was replayed at the other at most."""
        self.unmapped: Counter[str] = Counter()

    # What is learned.

    def object(self, kv: kv_pb2.KeyValue, revision: int) -> None:
        """An object that was there has been put at a revision."""
        self._mods[kv.key, kv.mod_revision] = revision
        self._mods.setdefault((kv.key, kv.create_revision), revision)
        self._newest[kv.key] = revision
        self._versions[kv.key] = kv.version - 1

    def begin(self, revision: int) -> None:
        """The replay begins at a revision."""
        self._step(self._begun, revision)

    def shown(self, key: bytes, revision: int) -> None:
        """A watch or a read showed a key at a revision of the replay's."""
        if revision > self._newest.get(key, 0):
            self._newest[key] = revision

    def answered(
        self, connection: int, request: Message, then: Message | None, now: Message
    ) -> None:
        """A call was answered ``now``; ``then`` it was as recorded, None: not, or by an error."""
        for key in written(request, now):
            self._newest[key] = _revision(now)
        for key in _deleted(request, now):
            self._versions.pop(key, None)
        if then is None:
            return
        before, after = _revision(then), _revision(now)
        if before and after:
            self._heads.setdefault((connection, before), after)
        both = set(written(request, then)) & set(written(request, now))
        for key in both:
            self._mods[key, before] = after
        if both or (any(_deleted(request, then)) and any(_deleted(request, now))):
            self._step(before, after)
        self._pair(then, now)
        if isinstance(then, pb.LeaseGrantResponse) and isinstance(now, pb.LeaseGrantResponse):
            self._leases[then.ID] = now.ID

    def _pair(self, then: Message, now: Message) -> None:
        """Objects that both answers show."""
        for key, kv in _shown(now).items():
            self.shown(key, kv.mod_revision)
        known = _shown(now)
        for key, kv in _shown(then).items():
            other = known.get(key)
            if other is not None and (key, kv.mod_revision) not in self._script.wrote:
                self._mods.setdefault((key, kv.mod_revision), other.mod_revision)

    def _step(self, recorded: int, replayed: int) -> None:
        place = bisect_right(self._recorded, recorded)
        if place and self._replayed[place - 1] >= replayed:
            return
        end = place
        while end < len(self._replayed) and self._replayed[end] <= replayed:
            end += 1
        self._recorded[place:end] = [recorded]
        self._replayed[place:end] = [replayed]

    # What it is used for.

    def revision(self, connection: int, recorded: int) -> int:
        """A revision that is read, watched from or compacted to; 0 stays 0."""
        if recorded <= 0:
            return recorded
        known = self._heads.get((connection, recorded))
        if known is not None:
            return known
        place = bisect_right(self._recorded, recorded)
        if not place:
            self.unmapped[REVISIONS] += 1
            return self._replayed[0] if self._replayed else recorded
        return self._replayed[place - 1]

    def lease(self, recorded: int) -> int:
        """A lease; 0 stays 0."""
        known = self._leases.get(recorded)
        if known is None and recorded:
            self.unmapped[LEASES] += 1
        return known or 0

    def needs(self, request: Message) -> Iterator[int]:
        """Calls whose answers are needed to translate a request."""
        if isinstance(request, pb.TxnRequest):
            for compare in request.compare:
                revision = compare.mod_revision or compare.create_revision
                yield from _known(self._script.wrote.get((compare.key, revision)))
                yield from self._granted(compare.lease)
            for op in (*request.success, *request.failure):
                inner = op.WhichOneof("request")
                if inner is not None:
                    yield from self.needs(getattr(op, inner))
        elif isinstance(request, pb.PutRequest):
            yield from self._granted(request.lease)
        elif isinstance(
            request, pb.LeaseRevokeRequest | pb.LeaseKeepAliveRequest | pb.LeaseTimeToLiveRequest
        ):
            yield from self._granted(request.ID)

    def lost_to(self, call: Call) -> Iterator[int]:
        """Calls that had written what this one found, if its comparison failed."""
        then = call.lost()
        if then is not None:
            for key, kv in _shown(then).items():
                yield from _known(self._script.wrote.get((key, kv.mod_revision)))

    def _granted(self, lease: int) -> Iterator[int]:
        return _known(self._script.granted.get(lease))

    def request(self, connection: int, request: Message, *, lost: bool = False) -> None:
        """Make a recorded request one of the replay's; ``lost``: its comparison failed."""
        match request:
            case pb.RangeRequest():
                self._range(connection, request)
            case pb.TxnRequest():
                self._txn(connection, request, lost=lost)
            case pb.PutRequest():
                request.lease = self.lease(request.lease)
            case pb.CompactionRequest():
                request.revision = self.revision(connection, request.revision)
            case pb.LeaseGrantRequest():
                request.TTL = max(1, round(request.TTL / self._speed))
            case pb.LeaseRevokeRequest() | pb.LeaseKeepAliveRequest() | pb.LeaseTimeToLiveRequest():
                request.ID = self.lease(request.ID)
            case pb.WatchCreateRequest():
                start = request.start_revision
                if start > 1:
                    request.start_revision = self.revision(connection, start - 1) + 1

    def _txn(self, connection: int, request: pb.TxnRequest, *, lost: bool) -> None:
        for compare in request.compare:
            self._compare(compare, lost=lost)
        for op in (*request.success, *request.failure):
            inner = op.WhichOneof("request")
            if inner is not None:
                self.request(connection, getattr(op, inner))

    def _range(self, connection: int, request: pb.RangeRequest) -> None:
        for name in (
            "revision",
            "min_mod_revision",
            "max_mod_revision",
            "min_create_revision",
            "max_create_revision",
        ):
            recorded = getattr(request, name)
            if recorded:
                setattr(request, name, self.revision(connection, recorded))

    def _compare(self, compare: pb.Compare, *, lost: bool) -> None:
        match compare.target:
            case pb.Compare.MOD if compare.mod_revision:
                compare.mod_revision = self._modified(compare, compare.mod_revision, lost=lost)
            case pb.Compare.CREATE if compare.create_revision:
                compare.create_revision = self._modified(
                    compare, compare.create_revision, lost=lost
                )
            case pb.Compare.VERSION if compare.version:
                compare.version -= self._versions.get(compare.key, 0)
            case pb.Compare.LEASE if compare.lease:
                compare.lease = self.lease(compare.lease)

    def _modified(self, compare: pb.Compare, recorded: int, *, lost: bool) -> int:
        if compare.range_end:
            self.unmapped[COMPARED_RANGES] += 1
            return self.revision(-1, recorded)
        known = self._mods.get((compare.key, recorded))
        if known is None:
            self.unmapped[COMPARED] += 1
            known = max(1, self._newest.get(compare.key, recorded) - lost)
        return known


def _known(call: int | None) -> Iterator[int]:
    if call is not None:
        yield call


def _revision(answer: Message) -> int:
    header = getattr(answer, "header", None)
    return header.revision if isinstance(header, pb.ResponseHeader) else 0


def _deleted(request: Message, answer: Message) -> Iterator[bytes]:
    """Keys, or beginnings of ranges, that a call deleted something of."""
    if isinstance(request, pb.DeleteRangeRequest) and isinstance(answer, pb.DeleteRangeResponse):
        if answer.deleted:
            yield request.key
    elif isinstance(request, pb.TxnRequest) and isinstance(answer, pb.TxnResponse):
        for op, part in branch(request, answer):
            inner = op.WhichOneof("request")
            if inner is not None:
                came = getattr(part, inner.replace("request", "response"))
                yield from _deleted(getattr(op, inner), came)


def _shown(answer: Message) -> dict[bytes, kv_pb2.KeyValue]:
    """Objects that an answer shows, by key."""
    if isinstance(answer, pb.RangeResponse):
        return {kv.key: kv for kv in answer.kvs}
    found: dict[bytes, kv_pb2.KeyValue] = {}
    if isinstance(answer, pb.TxnResponse):
        for part in answer.responses:
            inner = part.WhichOneof("response")
            if inner is not None:
                found |= _shown(getattr(part, inner))
    return found
