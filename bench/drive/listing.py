"""One LIST as kube-apiserver makes it: in pages at the revision of the first, or as one stream.

Each page, and a whole stream, is one call and one row; what it shows are rows of ITEMS.
A site that streams does so for lists of apiservers and watchers, as kube-apiserver's caches do
(apiserver, pkg/storage/etcd3/store.go); actors page.
"""

from collections.abc import Callable
from typing import NamedTuple

from bench.client import requests
from bench.clock import now_us
from bench.drive.site import Line, Site
from bench.plan import Verb
from bench.records import Outcome
from bench.values import digest
from kvstore.pb import rpc_pb2 as pb

PAGE = 10_000
"""Objects in a page of an apiserver's own list (apiserver, pkg/storage/etcd3/watcher.go)."""
STREAM_TIMEOUT_US = 60_000_000
"""For a list that is one stream, which is as long as many pages; more if a call has more."""

Listed = Callable[[int], None]
"""The revision of the list, or a negative gRPC code if it could not be had."""
Shown = Callable[[bytes, int, bytes], None]
"""Key, modification revision and value of one object."""


class Origin(NamedTuple):
    """Whose call it is, for the records."""

    actor: int
    step: int
    role: bytes


class _Stream:
    """The chunks of a RangeStream, put together. A ``Sink``."""

    def __init__(self, answered: Callable[[int, pb.RangeResponse, str], None]) -> None:
        self._answered = answered
        self._answer = pb.RangeResponse()

    def message(self, message: bytes, _received_us: int) -> None:
        """One chunk; only the last has header and count."""
        self._answer.MergeFrom(pb.RangeStreamResponse.FromString(message).range_response)

    def ended(self, code: int, text: str) -> None:
        """All of it has come, or nothing follows."""
        self._answered(code, self._answer, text)


class Listing:
    """A list in progress; made, begun, and reported once through ``listed``."""

    def __init__(
        self, site: Site, line: Line, prefix: bytes, origin: Origin, listed: Listed, shown: Shown
    ) -> None:
        self._site = site
        self._line = line
        self._prefix = prefix
        self._end = requests.prefix_end(site.prefix + prefix)
        self._origin = origin
        self._listed = listed
        self._shown = shown
        self._revision = 0
        self._page = 0

    def begin(self, due_us: int, *, limit: int = PAGE, revision: int = 0) -> None:
        """Ask for the first page; ``revision`` 0 is the newest."""
        self._limit = limit
        self._revision = revision
        self._ask(self._site.prefix + self._prefix, due_us)

    def _ask(self, start: bytes, due_us: int) -> None:
        operation = next(self._site.operations)
        sent_us = now_us()
        asked = self._revision
        number = self._line.number

        def understood(code: int, shown: pb.RangeResponse, text: str) -> None:
            done_us = self._line.received_us() if code == 0 else now_us()
            answer = shown if code == 0 else None
            self._record(operation, number, due_us, sent_us, done_us, asked, code, text, answer)
            if answer is None:
                self._listed(-code)
            else:
                self._take(operation, answer, done_us)

        def answered(code: int, message: bytes, text: str) -> None:
            understood(code, pb.RangeResponse.FromString(message), text)

        connection = self._line.connection
        if self._site.range_stream and self._origin.actor < 0 and connection is not None:
            message = requests.read(start, self._end, revision=asked)
            timeout_us = max(self._site.timeout_us, STREAM_TIMEOUT_US)
            connection.open(
                requests.RANGE_STREAM, message, _Stream(understood), end=True, timeout_us=timeout_us
            )
            return
        message = requests.read(start, self._end, limit=self._limit, revision=asked)
        self._line.call(requests.RANGE, message, answered)

    def _take(self, operation: int, answer: pb.RangeResponse, done_us: int) -> None:
        cut = len(self._site.prefix)
        add = self._site.recorders["items"].add
        self._revision = self._revision or answer.header.revision
        self._site.head_revision = max(self._site.head_revision, answer.header.revision)
        key = b""
        for kv in answer.kvs:
            key, value, modified = kv.key[cut:], kv.value, kv.mod_revision
            mark = digest(value)
            add(operation, modified, kv.create_revision, kv.version, kv.lease, mark, key)
            self._shown(key, modified, value)
        self._page += 1
        if len(answer.kvs) < answer.count and answer.kvs:
            self._ask(self._site.prefix + key + b"\0", done_us)
        else:
            self._listed(self._revision)

    def _record(
        self,
        operation: int,
        connection: int,
        due_us: int,
        sent_us: int,
        done_us: int,
        asked: int,
        code: int,
        text: str,
        answer: pb.RangeResponse | None,
    ) -> None:
        site, origin = self._site, self._origin
        site.recorders["ops"].add(
            operation,
            connection,
            origin.actor,
            origin.step,
            self._page,
            Verb.LIST,
            due_us,
            sent_us,
            done_us,
            site.outcome(code, text) if code else Outcome.OK,
            code,
            -1,
            answer.header.revision if answer is not None else -1,
            int(answer.more) if answer is not None else -1,
            -1,
            0,
            0,
            answer.count if answer is not None else -1,
            asked,
            0,
            origin.role,
            self._prefix,
            text.encode(),
        )
