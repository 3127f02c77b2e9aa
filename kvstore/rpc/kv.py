"""etcdserverpb.KV: Range, RangeStream, Put, DeleteRange, Txn, Compact.

Each handler is one synchronous call on the engine and an encoded answer. Four things can make it
wait:

- **its ticket**: what it shows rests on changes that are not durable yet (``commits.release``);
- **its pin**: a read of several shards waits until their frontiers reach its revision
  (``commits.when_visible``);
- **values** that are not in memory. Those that decide are fetched first (``deciding``) and the
  request then executes from the start; those only shown are fetched after it has executed;
- **the barrier**, before a write over several shards, and behind one that holds its shard
  (``HeldError``): it then executes from the start.

A refusal is an answer too: one that was decided at the head waits for its ticket, one for want of
room does not (``UnreadyError``).
"""

from collections.abc import Callable, Sequence

from kvstore.answers import Refusal
from kvstore.compaction import Compactor
from kvstore.config import RequestConfig, StoreConfig
from kvstore.errors import (
    CorruptError,
    HeldError,
    RequestTooLargeError,
    StoreError,
    TimedOutError,
    TooManyRequestsError,
    UnreadyError,
)
from kvstore.fetch import Fetched
from kvstore.history import Entry
from kvstore.kv import Header
from kvstore.pb import rpc_pb2 as pb
from kvstore.range import Item
from kvstore.rpc import decode, encode
from kvstore.rpc.deciding import DecidingValues
from kvstore.rpc.range import RangeCall
from kvstore.rpc.range_stream import RangeStreamCall
from kvstore.store import Store
from kvstore.transport.api import Call, Method, StatusError, Stream, StreamSink
from kvstore.txn import (
    NeedValuesError,
    Result,
    validate_delete,
    validate_put,
    validate_range,
    validate_txn,
)

_SERVICE = b"/etcdserverpb.KV/"
_FETCH_ROUNDS_MAX = 10
"""Times that values which decide are fetched, others each time because their keys were changed
meanwhile, before the request is given up as timed out.
"""

Execute = Callable[[], tuple[Sequence[int], Sequence[Result], Callable[[encode.Lookup], bytes]]]
"""Runs a request on the engine: the shards it touched, what it shows, and how to encode it."""


class KvService:
    """The handlers of etcdserverpb.KV over ``store``."""

    def __init__(
        self,
        store: Store,
        compactor: Compactor,
        header: Header,
        *,
        request: RequestConfig,
        reads: StoreConfig,
        call_soon: Callable[[Callable[[], None]], object],
    ) -> None:
        self._store = store
        self._commits = store.commits
        self._compactor = compactor
        self._header = header
        self._request = request
        self._reads = reads
        self._call_soon = call_soon
        self._deciding = DecidingValues(store, reads.fetch_rows_max, call_soon)

    def methods(self) -> list[Method]:
        """The service's table for the transport."""
        return [
            Method.unary(_SERVICE + b"Range", self.range),
            Method.server_stream(_SERVICE + b"RangeStream", self.range_stream),
            Method.unary(_SERVICE + b"Put", self.put),
            Method.unary(_SERVICE + b"DeleteRange", self.delete_range),
            Method.unary(_SERVICE + b"Txn", self.txn),
            Method.unary(_SERVICE + b"Compact", self.compact),
        ]

    # -- reads -----------------------------------------

    def range(self, payload: bytes, call: Call) -> bytes | None:
        """KV.Range."""
        key = decode.plain_key(payload)
        if key is not None:
            store, durable = self._store, self._commits.durable
            item = store.get(key, durable)
            shard = store.shards.of(key)
            if self._commits.shows_head(shard):
                if item is None:
                    return self._header.at(durable)
                if item.framed is not None:
                    store.counts.gets[shard] += 1
                    return self._header.at(durable) + item.framed + b"\x20\x01"
        query = decode.range_query(decode.parse(pb.RangeRequest.FromString, payload))
        try:
            validate_range(query)
            return RangeCall(
                self._store, self._header, self._reads, self._call_soon, query, call
            ).start()
        except StoreError as error:
            raise StatusError(error.code, error.text) from error

    def range_stream(self, stream: Stream) -> StreamSink:
        """KV.RangeStream (etcd 3.7)."""
        return RangeStreamCall(self._store, self._header, self._reads, self._call_soon, stream)

    # -- writes -----------------------------------------

    def put(self, payload: bytes, call: Call) -> None:
        """KV.Put."""
        op = decode.put(decode.parse(pb.PutRequest.FromString, payload))
        self._check_size(payload)
        _refuse(validate_put, op)
        store, header = self._store, self._header
        shards = store.shards_of(op.key, None)

        def execute() -> tuple[Sequence[int], Sequence[Result], Callable[[encode.Lookup], bytes]]:
            result = store.put(op)
            head = header.at(result.revision)
            return shards, [result], lambda lookup: encode.put_response(head, result, lookup)

        self._execute(execute, shards, call, len(payload))

    def delete_range(self, payload: bytes, call: Call) -> None:
        """KV.DeleteRange."""
        op = decode.delete_range(decode.parse(pb.DeleteRangeRequest.FromString, payload))
        self._check_size(payload)
        _refuse(validate_delete, op)
        store, header = self._store, self._header
        shards = store.shards_of(op.key, op.end)

        def execute() -> tuple[Sequence[int], Sequence[Result], Callable[[encode.Lookup], bytes]]:
            result = store.delete_range(op)
            head = header.at(result.revision)
            return shards, [result], lambda lookup: encode.delete_response(head, result, lookup)

        self._execute(execute, shards, call, len(payload))

    def txn(self, payload: bytes, call: Call) -> None:
        """KV.Txn."""
        plain = decode.plain_update(payload)
        if plain is not None and self._update(plain, payload, call):
            return
        txn = decode.txn(decode.parse(pb.TxnRequest.FromString, payload))
        self._check_size(payload)
        try:
            validate_txn(txn, self._request.txn_ops_max)
        except StoreError as error:
            raise StatusError(error.code, error.text) from error
        store, header = self._store, self._header
        shards = store.shards_of_txn(txn)

        def execute() -> tuple[Sequence[int], Sequence[Result], Callable[[encode.Lookup], bytes]]:
            result, revision = store.txn(txn)
            head = header.at(revision)
            return (
                shards,
                result.results,
                lambda lookup: encode.txn_response(head, result, lookup),
            )

        self._execute(execute, shards, call, len(payload))

    def _update(self, plain: tuple[bytes, int, bytes, int], payload: bytes, call: Call) -> bool:
        """The short way of a Txn as kube-apiserver writes; False, with nothing done, if it must
        go the long way because it will not succeed.
        """
        if len(payload) > self._request.request_bytes_max:
            return False
        key, mod_revision, value, lease = plain
        store = self._store
        try:
            revision = store.put_if(key, mod_revision, value, lease)
        except StoreError:
            return False
        if not revision:
            return False
        body = encode.put_succeeded(self._header.at(revision), revision)
        self._commits.release(store.shards_of(key, None), call, body)
        return True

    def compact(self, payload: bytes, call: Call) -> None:
        """KV.Compact."""
        request = decode.parse(pb.CompactionRequest.FromString, payload)
        self._compactor.compact(
            request.revision,
            physical=request.physical,
            answer=call,
            body=self._header.at(self._commits.durable),
        )

    def _check_size(self, payload: bytes) -> None:
        if len(payload) > self._request.request_bytes_max:
            raise StatusError(RequestTooLargeError.code, RequestTooLargeError.text)

    def _execute(
        self,
        execute: Execute,
        shards: Sequence[int],
        call: Call,
        size: int,
        values: dict[Entry, bytes] | None = None,
        rounds: int = 0,
    ) -> None:
        """Run a request of ``size`` bytes, with ``values`` at hand that were fetched for it in so
        many rounds; its answer is released when it may be shown. Always answers through ``call``.
        """
        try:
            touched, results, encoded = (
                self._store.with_values(values, execute) if values else execute()
            )
        except HeldError:
            self._wait(
                shards,
                lambda: self._execute(execute, shards, call, size, values, rounds),
                call,
                size + sum(map(len, values.values())) if values else size,
            )
            return
        except UnreadyError as error:
            call.fail(error.code, error.text)
            return
        except StoreError as error:
            self._store.refuse(shards, call, error)
            return
        except NeedValuesError as need:
            if rounds == _FETCH_ROUNDS_MAX:
                call.fail(TimedOutError.code, TimedOutError.text)
                return
            held = values if values is not None else {}

            def fetched(error: StoreError | None) -> None:
                if error is not None:
                    call.fail(error.code, error.text)
                else:
                    self._execute(execute, shards, call, size, held, rounds + 1)

            self._deciding.fetch(held, need.pairs, fetched)
            return
        missing = encode.shown_items(results)
        if missing:
            self._fetch_shown(missing, touched, encoded, call)
        else:
            self._commits.release(touched, call, encoded(_framed))

    def _wait(
        self, shards: Sequence[int], again: Callable[[], None], call: Call, size: int
    ) -> None:
        """Try a request again when the barrier lets it; nothing was done so far."""

        def execute() -> None:
            if not call.cancelled:
                again()

        def refuse(error: StoreError) -> None:
            call.fail(error.code, error.text)

        self._store.barrier.run(shards, execute, refuse, size)

    def _fetch_shown(
        self,
        missing: Sequence[Item],
        touched: Sequence[int],
        encoded: Callable[[encode.Lookup], bytes],
        call: Call,
    ) -> None:
        """Answer a request that has been executed, once what it shows is in memory."""
        pairs = [(item.key, item.entry) for item in missing]

        def fetched(values: Fetched) -> None:
            if isinstance(values, StoreError) or None in values:
                error = values if isinstance(values, StoreError) else CorruptError()
                if isinstance(error, TooManyRequestsError):
                    error = TimedOutError()  # it has been executed: not refused, but unknown
                self._commits.release(touched, Refusal(call, error), b"")
                return
            found = dict(zip(pairs, values, strict=True))
            body = encoded(lambda item: _found(item, found))
            self._commits.release(touched, call, body)

        self._store.fetch(pairs, fetched)


def _refuse(validate: Callable[[decode.MessageT], None], op: decode.MessageT) -> None:
    try:
        validate(op)
    except StoreError as error:
        raise StatusError(error.code, error.text) from error


def _framed(item: Item) -> bytes:
    assert item.framed is not None, "everything shown is in memory"
    return item.framed


def _found(item: Item, found: dict[tuple[bytes, Entry], bytes | None]) -> bytes:
    framed = item.framed if item.framed is not None else found[item.key, item.entry]
    assert framed is not None, "checked when it came"
    return framed
