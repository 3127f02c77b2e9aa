"""Carrying out one RangeStream (etcd 3.7): the answer of a Range in chunks, under the client's flow
control.

One revision is pinned for all chunks. Chunks hold disjoint, ordered KeyValues and are never empty,
but for the only chunk of an empty range; header, count and more are on the last one. Compaction
past the revision ends the stream with the compacted error. No more is read while the client has not
taken what was sent, so a stream holds little memory. Orders other than by key and bounds on
revisions are refused as etcd refuses them.
"""

from collections.abc import Callable

from kvstore import errors
from kvstore.answers import Then
from kvstore.config import StoreConfig
from kvstore.errors import CompactedError, StoreError
from kvstore.fetch import Fetched
from kvstore.kv import Header, varint
from kvstore.pb import rpc_pb2 as pb
from kvstore.range import ORDER_ASCEND, SORT_KEY, RangeQuery, RangeRead
from kvstore.rpc import decode, encode
from kvstore.store import Store
from kvstore.transport.api import StatusError, Stream
from kvstore.txn import validate_range


class RangeStreamCall:
    """One KV.RangeStream in progress; the sink of its stream."""

    def __init__(
        self,
        store: Store,
        header: Header,
        config: StoreConfig,
        call_soon: Callable[[Callable[[], None]], object],
        stream: Stream,
    ) -> None:
        self._store = store
        self._header = header
        self._config = config
        self._call_soon = call_soon
        self._stream = stream
        self._query: RangeQuery | None = None
        self._read: RangeRead | None = None
        self._sent = 0
        self._shown = 0
        self._waiting_for_client = False

    # -- StreamSink -----------------------------------------

    def message(self, message: bytes) -> None:
        """The request."""
        query = decode.range_query(decode.parse(pb.RangeRequest.FromString, message))
        try:
            validate_range(query)
            if query.sort_order and (query.sort_order, query.sort_target) != _KEY_ORDER:
                raise StatusError(errors.UNIMPLEMENTED, _NO_ORDERS)
            if query.filters():
                raise StatusError(errors.UNIMPLEMENTED, _NO_FILTERS)
            self._query = query = query._replace(sort_order=0, sort_target=0)
            store = self._store
            shards = store.shards_of(query.key, query.end)
            at = store.pin(query, shards)
            self._shown = store.commits.durable if query.revision > 0 else at
        except StoreError as error:
            raise StatusError(error.code, error.text) from error
        store.commits.when_visible(
            shards, at, Then(lambda error: self._fail(error) if error else self._begin(query, at))
        )

    def half_closed(self) -> None:
        """Nothing more comes; the answer goes on."""

    def writable(self) -> None:
        """The client has taken what was sent."""
        if self._waiting_for_client:
            self._waiting_for_client = False
            self._run()

    def closed(self) -> None:
        """Nobody listens any more."""
        self._read = None

    # -- the answer -----------------------------------------

    def _begin(self, query: RangeQuery, at: int) -> None:
        if self._overtaken(at):
            return
        self._read = self._store.read(query, at)
        self._run()

    def _overtaken(self, at: int) -> bool:
        if self._stream.cancelled:
            return True
        if at < self._store.compact_revision:
            self._fail(CompactedError())
            return True
        return False

    def _run(self) -> None:
        """One step: read some keys, fetch what is missing, send a chunk."""
        read = self._read
        if read is None or self._overtaken(read.at):
            return
        if not read.done:
            read.step()
        if read.done:
            read.finish()
        places: list[int] = []
        if not read.query.keys_only:
            places = _missing_from(read, self._sent)
            shards = self._store.shards_of(read.query.key, read.query.end)
            at_hand = len(read.values) - self._sent - len(places)
            self._store.counts.shown(shards, at_hand)
        if places:
            pairs = [(read.keys[i], read.entries[i]) for i in places]
            self._store.fetch(pairs, lambda values: self._fetched(read, places, values))
        else:
            self._send(read)

    def _fetched(self, read: RangeRead, places: list[int], values: Fetched) -> None:
        if isinstance(values, StoreError):
            self._fail(values)
        elif not self._overtaken(read.at):
            for i, value in zip(places, values, strict=True):
                assert value is not None, "only a compaction past the read may have removed it"
                read.values[i] = value
            self._send(read)

    def _send(self, read: RangeRead) -> None:
        """Send what was read since the last chunk, in messages of bounded size; the last one with
        the totals.
        """
        parts: list[bytes] = []
        size = 0
        shown = encode.shown_pairs(read, self._sent, leases=False)
        read.values[self._sent :] = [None] * (len(read.values) - self._sent)
        self._sent = len(read.keys)
        for pair in shown:
            if parts and size + len(pair) > self._config.stream_chunk_bytes:
                self._send_chunk(parts, size)
                parts, size = [], 0
            parts.append(pair)
            size += len(pair)
        if read.done:
            self._send_last(read, parts, size)
            return
        if parts:
            self._send_chunk(parts, size)
        if self._stream.blocked:
            self._waiting_for_client = True
        else:
            self._call_soon(self._run)

    def _send_chunk(self, parts: list[bytes], size: int) -> None:
        length = b"\x0a" + varint(size)
        self._stream.send([length, *parts], len(length) + size)

    def _send_last(self, read: RangeRead, parts: list[bytes], size: int) -> None:
        header = self._header.at(self._shown)
        totals = encode.range_totals(read)
        self._send_chunk([header, *parts, totals], len(header) + size + len(totals))
        self._stream.finish()

    def _fail(self, error: StoreError) -> None:
        self._read = None
        self._stream.finish(error.code, error.text)


_KEY_ORDER = (ORDER_ASCEND, SORT_KEY)
_NO_ORDERS = "RangeStream does not support custom sort orders"
_NO_FILTERS = "RangeStream does not support revision filters"


def _missing_from(read: RangeRead, start: int) -> list[int]:
    return [i for i in range(start, len(read.values)) if read.values[i] is None]
