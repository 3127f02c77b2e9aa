"""Every refusal the engine can give, with its gRPC code and etcd's exact text: the one table.

Each class is a row: ``code`` is the gRPC status code, ``text`` the message on the wire. Clients
decide by the text (etcd ``api/v3rpc/rpctypes/error.go``), so texts are copied to the letter and
compared with etcd's by the compatibility tests. A class that carries facts takes them as
constructor arguments; they are for logs, never for the wire.
"""

from typing import ClassVar

OK = 0
CANCELLED = 1
UNKNOWN = 2
INVALID_ARGUMENT = 3
DEADLINE_EXCEEDED = 4
NOT_FOUND = 5
PERMISSION_DENIED = 7
RESOURCE_EXHAUSTED = 8
FAILED_PRECONDITION = 9
OUT_OF_RANGE = 11
UNIMPLEMENTED = 12
INTERNAL = 13
UNAVAILABLE = 14
DATA_LOSS = 15


class StoreError(Exception):
    """A request that is refused; nothing of it was done."""

    code: ClassVar[int] = INTERNAL
    text: ClassVar[str] = "etcdserver: internal error"


class UnreadyError(StoreError):
    """Refused because of how the server is (full, out, stopped), whatever the store holds: such an
    answer shows nothing and waits for nothing.
    """


class EmptyKeyError(StoreError):
    code = INVALID_ARGUMENT
    text = "etcdserver: key is not provided"


class KeyNotFoundError(StoreError):
    """ignore_value or ignore_lease on a missing key; also an operation of a Txn that has no
    content.
    """

    code = INVALID_ARGUMENT
    text = "etcdserver: key not found"


class ValueProvidedError(StoreError):
    code = INVALID_ARGUMENT
    text = "etcdserver: value is provided"


class LeaseProvidedError(StoreError):
    code = INVALID_ARGUMENT
    text = "etcdserver: lease is provided"


class TooManyOpsError(StoreError):
    code = INVALID_ARGUMENT
    text = "etcdserver: too many operations in txn request"


class DuplicateKeyError(StoreError):
    code = INVALID_ARGUMENT
    text = "etcdserver: duplicate key given in txn request"


class InvalidSortOptionError(StoreError):
    code = INVALID_ARGUMENT
    text = "etcdserver: invalid sort option"


class RequestTooLargeError(StoreError):
    code = INVALID_ARGUMENT
    text = "etcdserver: request is too large"


class CompactedError(StoreError):
    code = OUT_OF_RANGE
    text = "etcdserver: mvcc: required revision has been compacted"


class FutureRevisionError(StoreError):
    code = OUT_OF_RANGE
    text = "etcdserver: mvcc: required revision is a future revision"


class LeaseTtlTooLargeError(StoreError):
    code = OUT_OF_RANGE
    text = "etcdserver: too large lease TTL"


class NoSpaceError(StoreError):
    code = RESOURCE_EXHAUSTED
    text = "etcdserver: mvcc: database space exceeded"


class TooManyRequestsError(UnreadyError):
    """A queue is full; refused early instead of buffered."""

    code = RESOURCE_EXHAUSTED
    text = "etcdserver: too many requests"


class LeaseNotFoundError(StoreError):
    code = NOT_FOUND
    text = "etcdserver: requested lease not found"

    def __init__(self, lease: int) -> None:
        super().__init__(lease)
        self.lease = lease


class LeaseExistsError(StoreError):
    code = FAILED_PRECONDITION
    text = "etcdserver: lease already exists"


class StoppedError(UnreadyError):
    """The server is going away, or its storage failed for good; the outcome of a write is
    unknown.
    """

    code = UNAVAILABLE
    text = "etcdserver: server stopped"


class TimedOutError(UnreadyError):
    """A shard did not answer in time; the outcome of a write is unknown."""

    code = UNAVAILABLE
    text = "etcdserver: request timed out"


class HeldError(UnreadyError):
    """A request over several shards must be waited for: its own turn, or that of another one which
    holds the shard. Whoever can wait does so in the `barrier`; told to a client, it is a timeout of
    a request that was not executed.
    """

    code = UNAVAILABLE
    text = "etcdserver: request timed out"


class CorruptError(StoreError):
    """Storage did not return a row that the index names and that was not compacted."""

    code = DATA_LOSS
    text = "etcdserver: corrupt cluster"


class BackendError(Exception):
    """Storage failed: the operator's business, never shown to a client. The message says what
    failed.
    """


class UnreachableError(BackendError):
    """The database cannot be reached now; it may be there later."""


class ReadsFullError(BackendError):
    """A read was refused at once because too many wait; nothing is wrong with storage."""
