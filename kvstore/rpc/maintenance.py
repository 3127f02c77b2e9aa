"""etcdserverpb.Maintenance: Status, Alarm, Defragment, Hash, HashKV, MoveLeader.

Snapshot and Downgrade are not served: UNIMPLEMENTED.

There is no quota, so no alarm is ever raised: asking for alarms gives none, disarming one that is
not there gives none (both as in etcd), and arming one by request is refused as UNIMPLEMENTED
instead of being accepted without effect.
"""

from collections.abc import Callable

from kvstore import errors
from kvstore.config import ServerConfig
from kvstore.errors import BackendError, StoreError, TooManyRequestsError
from kvstore.kv import Header
from kvstore.pb import rpc_pb2 as pb
from kvstore.rpc import decode
from kvstore.rpc.hash import HashResult, KeyValueHash
from kvstore.store import Store
from kvstore.transport.api import Call, Method, StatusError
from kvstore.version import ETCD_VERSION, STORAGE_VERSION

_SERVICE = b"/etcdserverpb.Maintenance/"


class MaintenanceService:
    """The handlers of etcdserverpb.Maintenance."""

    def __init__(self, store: Store, header: Header, config: ServerConfig) -> None:
        self._store = store
        self._commits = store.commits
        self._header = header
        self._config = config
        self._hashes = 0
        self._defragmenting = False

    def methods(self) -> list[Method]:
        """The service's table for the transport."""
        return [
            Method.unary(_SERVICE + b"Status", self.status),
            Method.unary(_SERVICE + b"Alarm", self.alarm),
            Method.unary(_SERVICE + b"Defragment", self.defragment),
            Method.unary(_SERVICE + b"Hash", self.hash),
            Method.unary(_SERVICE + b"HashKV", self.hash_kv),
            Method.unary(_SERVICE + b"MoveLeader", self.move_leader),
        ]

    def status(self, payload: bytes, _call: Call) -> bytes:
        """Maintenance.Status: for raft's index the durable revision, for its term the epoch."""
        decode.parse(pb.StatusRequest.FromString, payload)
        durable = self._commits.durable
        sizes = [queue.backend.sizes() for queue in self._commits.queues if not queue.missing]
        answer = pb.StatusResponse(
            version=ETCD_VERSION,
            dbSize=sum(size.total for size in sizes),
            leader=self._header.member_id,
            raftIndex=durable,
            raftTerm=self._header.raft_term,
            raftAppliedIndex=durable,
            errors=self._troubles(),
            dbSizeInUse=sum(size.in_use for size in sizes),
            storageVersion=STORAGE_VERSION,
            dbSizeQuota=self._config.quota_bytes,
            downgradeInfo=pb.DowngradeInfo(),
        )
        return self._header.at(durable) + answer.SerializeToString()

    def _troubles(self) -> list[str]:
        """Shards that do not serve, for whoever looks at the status."""
        queues = [queue for queue in self._commits.queues if queue.lost is not None]
        return [f"shard {queue.name}: {queue.broken or 'not answering'}" for queue in queues]

    def alarm(self, payload: bytes, _call: Call) -> bytes:
        """Maintenance.Alarm."""
        request = decode.parse(pb.AlarmRequest.FromString, payload)
        if request.action == pb.AlarmRequest.ACTIVATE and request.alarm != pb.NONE:
            raise StatusError(errors.UNIMPLEMENTED, "etcdserver: alarms cannot be armed by request")
        return self._header.at(self._commits.durable)

    def move_leader(self, payload: bytes, _call: Call) -> bytes:
        """Maintenance.MoveLeader: the only member leads, so it can be moved to that one alone."""
        target = decode.parse(pb.MoveLeaderRequest.FromString, payload).targetID
        if target != self._header.member_id:
            raise StatusError(errors.FAILED_PRECONDITION, "etcdserver: bad leader transferee")
        return b""

    # -- defragmentation ---------------------------------------------------------------------------

    def defragment(self, payload: bytes, call: Call) -> None:
        """Maintenance.Defragment: one shard after the other; the answer is empty, as in etcd."""
        decode.parse(pb.DefragmentRequest.FromString, payload)
        if self._defragmenting:
            raise StatusError(TooManyRequestsError.code, TooManyRequestsError.text)
        self._defragmenting = True
        backends = [queue.backend for queue in self._commits.queues if queue.lost is None]

        def next_one(error: BackendError | None = None) -> None:
            if error is None and backends:
                backends.pop(0).defragment(next_one)
                return
            self._defragmenting = False
            if error is None:
                call.reply(b"")
            else:
                call.fail(errors.INTERNAL, "etcdserver: defragmentation failed")

        next_one()

    # -- hashes ------------------------------------------------------------------------------------

    def hash(self, payload: bytes, call: Call) -> None:
        """Maintenance.Hash: etcd hashes its whole file; here it is the hash of all changes."""
        decode.parse(pb.HashRequest.FromString, payload)
        self._hash(0, call, lambda result: pb.HashResponse(hash=result.hash).SerializeToString())

    def hash_kv(self, payload: bytes, call: Call) -> None:
        """Maintenance.HashKV: of the changes up to a revision, 0 for all."""
        revision = decode.parse(pb.HashKVRequest.FromString, payload).revision
        self._hash(revision, call, _hash_kv_fields)

    def _hash(self, revision: int, call: Call, encode: Callable[[HashResult], bytes]) -> None:
        if self._hashes >= self._config.hashes_max:
            raise StatusError(TooManyRequestsError.code, TooManyRequestsError.text)
        self._hashes += 1
        header = self._header.at(self._commits.durable)

        def done(result: HashResult | StoreError) -> None:
            self._hashes -= 1
            if isinstance(result, StoreError):
                call.fail(result.code, result.text)
            else:
                call.reply(header + encode(result))

        KeyValueHash(self._store, revision, done=done, cancelled=lambda: call.cancelled).start()


def _hash_kv_fields(result: HashResult) -> bytes:
    """A HashKVResponse without its header."""
    return pb.HashKVResponse(
        hash=result.hash,
        compact_revision=result.compact_revision,
        hash_revision=result.revision,
    ).SerializeToString()
