"""A reference model of etcd's KV: one process, no storage, every state kept whole, slow and
obvious.

It takes protobuf requests and gives protobuf answers or the refusal's text, so that the engine and
its encodings are compared at once. It executes at the head like the engine; what a read may see is
told by ``durable``, the last revision that the store has made durable.

What it does not model: time, leases beyond "these ids exist", size limits, several shards.
"""

from dataclasses import dataclass, field

from kvstore.pb import kv_pb2, rpc_pb2

NO_END = b"\0"


@dataclass(frozen=True)
class Version:
    """A key's state at some revision."""

    value: bytes
    create: int
    mod: int
    version: int
    lease: int


State = dict[bytes, Version]


class RefusalError(Exception):
    """The request is refused with this text; nothing changed."""


@dataclass(frozen=True)
class Change:
    """One event: a put, or a delete when ``version`` is None."""

    revision: int
    key: bytes
    version: Version | None
    previous: Version | None


@dataclass(frozen=True)
class Taken:
    """The branch that a Txn takes; nested Txns are decided with it."""

    succeeded: bool
    ops: "list[tuple[rpc_pb2.RequestOp, Taken | None]]"


@dataclass
class Model:
    """See the module's text."""

    leases: set[int] = field(default_factory=set)
    revision: int = 1
    durable: int = 1
    compacted: int = -1
    states: dict[int, State] = field(default_factory=lambda: {1: {}})
    changes: list[Change] = field(default_factory=list)

    # -- requests ------------------------------------------------------------------------------

    def range(self, request: rpc_pb2.RangeRequest) -> rpc_pb2.RangeResponse:
        """A Range on its own: linearizable, at the durable revision."""
        self._check_range(request)
        at = request.revision if request.revision > 0 else self.durable
        if at > self.durable:
            raise RefusalError("etcdserver: mvcc: required revision is a future revision")
        if at < self.compacted:
            raise RefusalError("etcdserver: mvcc: required revision has been compacted")
        response = self._select(request, self._state(at))
        response.header.revision = self.durable
        return response

    def put(self, request: rpc_pb2.PutRequest) -> rpc_pb2.PutResponse:
        """A Put on its own."""
        self._check_put_shape(request)
        if request.lease and request.lease not in self.leases:
            raise RefusalError("etcdserver: requested lease not found")
        self._check_put(request)
        state = dict(self.states[self.revision])
        response = self._put(request, state, self.revision + 1)
        self._commit(state)
        return response

    def delete_range(self, request: rpc_pb2.DeleteRangeRequest) -> rpc_pb2.DeleteRangeResponse:
        """A DeleteRange on its own."""
        if not request.key:
            raise RefusalError("etcdserver: key is not provided")
        state = dict(self.states[self.revision])
        response = self._delete(request, state, self.revision + 1)
        if response.deleted:
            self._commit(state)
        response.header.revision = self.revision
        return response

    def txn(self, request: rpc_pb2.TxnRequest) -> rpc_pb2.TxnResponse:
        """A Txn whose static checks have passed."""
        before = self.states[self.revision]
        taken = self._decide(request, before)
        self._check_taken(taken)
        state = dict(before)
        changes = len(self.changes)
        response = self._run(taken, state, changes)
        if len(self.changes) > changes:
            self._commit(state)
        response.header.revision = self.revision
        return response

    def compact(self, revision: int) -> None:
        """A Compact that has taken effect."""
        if revision <= self.compacted:
            raise RefusalError("etcdserver: mvcc: required revision has been compacted")
        if revision > self.durable:
            raise RefusalError("etcdserver: mvcc: required revision is a future revision")
        self.compacted = revision

    def crash(self) -> None:
        """Everything that was not durable is gone."""
        self.revision = self.durable
        self.states = {r: s for r, s in self.states.items() if r <= self.durable}
        self.changes = [change for change in self.changes if change.revision <= self.durable]

    # -- parts -----------------------------------------------------------------------------------

    def _state(self, at: int) -> State:
        return self.states[max(r for r in self.states if r <= at)]

    def _commit(self, state: State) -> None:
        self.revision += 1
        self.states[self.revision] = state

    def _check_range(self, request: rpc_pb2.RangeRequest) -> None:
        if not request.key:
            raise RefusalError("etcdserver: key is not provided")

    def _check_put_shape(self, request: rpc_pb2.PutRequest) -> None:
        if not request.key:
            raise RefusalError("etcdserver: key is not provided")
        if request.ignore_value and request.value:
            raise RefusalError("etcdserver: value is provided")
        if request.ignore_lease and request.lease:
            raise RefusalError("etcdserver: lease is provided")

    def _check_put(self, request: rpc_pb2.PutRequest) -> None:
        if (request.ignore_value or request.ignore_lease) and (
            request.key not in self.states[self.revision]
        ):
            raise RefusalError("etcdserver: key not found")
        if request.lease and request.lease not in self.leases:
            raise RefusalError("etcdserver: requested lease not found")

    def _check_taken(self, taken: "Taken") -> None:
        for op, inner in taken.ops:
            match op.WhichOneof("request"):
                case "request_put":
                    self._check_put(op.request_put)
                case "request_range":
                    revision = op.request_range.revision
                    if revision > self.revision:
                        raise RefusalError(
                            "etcdserver: mvcc: required revision is a future revision"
                        )
                    if 0 < revision < self.compacted:
                        raise RefusalError("etcdserver: mvcc: required revision has been compacted")
                case "request_txn":
                    assert inner is not None, "decided"
                    self._check_taken(inner)

    def _decide(self, request: rpc_pb2.TxnRequest, state: State) -> "Taken":
        succeeded = all(holds(compare, state) for compare in request.compare)
        return Taken(
            succeeded,
            [
                (op, self._decide(op.request_txn, state) if op.HasField("request_txn") else None)
                for op in (request.success if succeeded else request.failure)
            ],
        )

    def _run(self, taken: "Taken", state: State, before: int) -> rpc_pb2.TxnResponse:
        response = rpc_pb2.TxnResponse(succeeded=taken.succeeded)
        response.header.SetInParent()
        for op, inner in taken.ops:
            answer = response.responses.add()
            match op.WhichOneof("request"):
                case "request_put":
                    put = self._put(op.request_put, state, self.revision + 1)
                    answer.response_put.CopyFrom(put)
                case "request_delete_range":
                    deleted = self._delete(op.request_delete_range, state, self.revision + 1)
                    deleted.header.revision = self.revision + (len(self.changes) > before)
                    answer.response_delete_range.CopyFrom(deleted)
                case "request_range":
                    query = op.request_range
                    seen = self._state(query.revision) if query.revision > 0 else state
                    selected = self._select(query, seen)
                    selected.header.revision = self.revision + (len(self.changes) > before)
                    answer.response_range.CopyFrom(selected)
                case "request_txn":
                    assert inner is not None, "decided"
                    answer.response_txn.CopyFrom(self._run(inner, state, before))
        return response

    def _put(self, request: rpc_pb2.PutRequest, state: State, revision: int) -> rpc_pb2.PutResponse:
        previous = state.get(request.key)
        new = Version(
            value=previous.value if request.ignore_value and previous else request.value,
            create=previous.create if previous else revision,
            mod=revision,
            version=previous.version + 1 if previous else 1,
            lease=previous.lease if request.ignore_lease and previous else request.lease,
        )
        state[request.key] = new
        self.changes.append(Change(revision, request.key, new, previous))
        response = rpc_pb2.PutResponse()
        response.header.revision = revision
        if request.prev_kv and previous:
            response.prev_kv.CopyFrom(key_value(request.key, previous))
        return response

    def _delete(
        self, request: rpc_pb2.DeleteRangeRequest, state: State, revision: int
    ) -> rpc_pb2.DeleteRangeResponse:
        response = rpc_pb2.DeleteRangeResponse()
        for key in sorted(k for k in state if inside(k, request.key, request.range_end)):
            previous = state.pop(key)
            self.changes.append(Change(revision, key, None, previous))
            response.deleted += 1
            if request.prev_kv:
                response.prev_kvs.append(key_value(key, previous))
        return response

    def _select(self, request: rpc_pb2.RangeRequest, state: State) -> rpc_pb2.RangeResponse:
        found = sorted(
            (key, version)
            for key, version in state.items()
            if inside(key, request.key, request.range_end)
        )
        response = rpc_pb2.RangeResponse(count=len(found))
        if request.count_only:
            return response
        kept = [item for item in found if passes(request, item[1])]
        if request.sort_target and not request.sort_order and not filters(request):
            kept = kept[: request.limit + 1 if request.limit > 0 else None]  # etcd's quirk
        if request.sort_order or request.sort_target:
            kept.sort(key=SORT_KEYS[request.sort_target], reverse=request.sort_order == 2)
        limit = request.limit if request.limit > 0 else len(kept)
        response.more = len(kept) > limit
        for key, version in kept[:limit]:
            pair = key_value(key, version)
            if request.keys_only:
                pair.value = b""
            response.kvs.append(pair)
        return response


SORT_KEYS = {
    0: lambda item: item[0],
    1: lambda item: item[1].version,
    2: lambda item: item[1].create,
    3: lambda item: item[1].mod,
    4: lambda item: item[1].value,
}


def key_value(key: bytes, version: Version) -> kv_pb2.KeyValue:
    """The pair as etcd shows it."""
    return kv_pb2.KeyValue(
        key=key,
        create_revision=version.create,
        mod_revision=version.mod,
        version=version.version,
        value=version.value,
        lease=version.lease,
    )


def inside(key: bytes, start: bytes, end: bytes) -> bool:
    """Is ``key`` in the range of a request?"""
    if not end:
        return key == start
    return key >= start and (end == NO_END or key < end)


def filters(request: rpc_pb2.RangeRequest) -> bool:
    """Are there bounds on revisions?"""
    return bool(
        request.min_mod_revision
        or request.max_mod_revision
        or request.min_create_revision
        or request.max_create_revision
    )


def passes(request: rpc_pb2.RangeRequest, version: Version) -> bool:
    """The bounds on revisions; 0 is none."""
    bounds = (
        (request.min_mod_revision, version.mod, 1),
        (request.max_mod_revision, version.mod, -1),
        (request.min_create_revision, version.create, 1),
        (request.max_create_revision, version.create, -1),
    )
    return all(not bound or (actual - bound) * sign >= 0 for bound, actual, sign in bounds)


def holds(compare: rpc_pb2.Compare, state: State) -> bool:
    """Does the compare hold for every key of its range, or for a missing key if there is none?"""
    found = [v for k, v in state.items() if inside(k, compare.key, compare.range_end)]
    if not found:
        if compare.target == rpc_pb2.Compare.VALUE:
            return False
        found = [Version(b"", 0, 0, 0, 0)]
    return all(_matches(compare, version) for version in found)


def _matches(compare: rpc_pb2.Compare, version: Version) -> bool:
    if compare.target == rpc_pb2.Compare.VALUE:
        order = (version.value > compare.value) - (version.value < compare.value)
    else:
        actual, wanted = {
            rpc_pb2.Compare.VERSION: (version.version, compare.version),
            rpc_pb2.Compare.CREATE: (version.create, compare.create_revision),
            rpc_pb2.Compare.MOD: (version.mod, compare.mod_revision),
            rpc_pb2.Compare.LEASE: (version.lease, compare.lease),
        }[compare.target]
        order = (actual > wanted) - (actual < wanted)
    return {
        rpc_pb2.Compare.EQUAL: order == 0,
        rpc_pb2.Compare.GREATER: order > 0,
        rpc_pb2.Compare.LESS: order < 0,
        rpc_pb2.Compare.NOT_EQUAL: order != 0,
    }[compare.result]
