"""Carrying out one Range or RangeStream: its pin, its steps, its values, its restarts.

A read at the head that compaction overtakes starts again at a new revision, a few times; one at an
explicit revision fails as compacted. That is checked after everything that may take a turn of the
loop: a wait for a frontier, a step, a fetch. A value that storage does not have although the index
names it is never skipped.
"""

from collections.abc import Callable, Sequence

from kvstore.answers import Then
from kvstore.config import StoreConfig
from kvstore.errors import CompactedError, StoreError, TimedOutError
from kvstore.fetch import Fetched
from kvstore.kv import Header
from kvstore.range import RangeQuery, RangeRead
from kvstore.rpc import encode
from kvstore.store import Store
from kvstore.transport.api import Call

_JOINED_BYTES = 16 * 1024
"""A larger answer is handed on in parts: copying it would cost more than passing the parts."""


class RangeCall:
    """One KV.Range in progress."""

    def __init__(
        self,
        store: Store,
        header: Header,
        config: StoreConfig,
        call_soon: Callable[[Callable[[], None]], object],
        query: RangeQuery,
        call: Call,
    ) -> None:
        self._store = store
        self._header = header
        self._config = config
        self._call_soon = call_soon
        self._query = query
        self._call = call
        self._shards = store.shards_of(query.key, query.end)
        self._restarts = 0
        self._shown = 0
        self._read: RangeRead | None = None
        self._missing: list[int] = []
        self._at_once: bytes | None = None
        self._starting = True

    def start(self) -> bytes | None:
        """The answer, if nothing has to be waited for. Raises StoreError for a revision that cannot
        be read.
        """
        self._begin()
        self._starting = False
        return self._at_once

    def _begin(self) -> None:
        """Pin a revision and wait until it may be seen."""
        store, query = self._store, self._query
        at = store.pin(query, self._shards)
        self._shown = store.commits.durable if query.revision > 0 else at
        if store.commits.frontier(self._shards) >= at:
            self._visible(at)
        else:
            then = Then(lambda error: self._fail(error) if error else self._visible(at))
            store.commits.when_visible(self._shards, at, then)

    def _visible(self, at: int) -> None:
        if self._overtaken(at):
            return
        self._read = self._store.read(self._query, at)
        self._run()

    def _overtaken(self, at: int) -> bool:
        """Did a compaction pass ``at`` meanwhile? Then this read has ended or begun anew."""
        if at >= self._store.compact_revision:
            return False
        if self._query.revision > 0:
            self._fail(CompactedError())
        elif self._restarts == self._config.read_restarts_max:
            self._fail(TimedOutError())
        else:
            self._restarts += 1
            try:
                self._begin()
            except StoreError as error:
                self._fail(error)
        return True

    def _run(self) -> None:
        """Steps, giving way between them; then the values, then the answer."""
        read = self._read
        assert read is not None, "runs after it began"
        if self._call.cancelled or self._overtaken(read.at):
            return
        if not read.done:
            read.step()
            if not read.done:
                self._call_soon(self._run)
                return
        if not read.sorts_by_value():
            read.finish()
        self._missing = read.missing()
        if not read.query.keys_only:
            self._store.counts.shown(self._shards, len(read.values) - len(self._missing))
        self._fetch()

    def _fetch(self) -> None:
        read = self._read
        assert read is not None, "fetches after it read"
        if not self._missing:
            self._complete(read)
            return
        places = self._missing[: self._config.fetch_rows_max]
        del self._missing[: len(places)]
        pairs = [(read.keys[i], read.entries[i]) for i in places]
        self._store.fetch(pairs, lambda values: self._fetched(read, places, values))

    def _fetched(self, read: RangeRead, places: Sequence[int], values: Fetched) -> None:
        if isinstance(values, StoreError):
            self._fail(values)
            return
        if self._call.cancelled or self._overtaken(read.at):
            return
        for i, value in zip(places, values, strict=True):
            assert value is not None, "only a compaction past the read may have removed it"
            read.values[i] = value
        self._fetch()

    def _complete(self, read: RangeRead) -> None:
        if read.sorts_by_value():
            read.finish()
        parts = encode.range_parts(self._header.at(self._shown), read)
        size = sum(map(len, parts))
        if size > _JOINED_BYTES:
            self._call.reply_parts(parts, size)
        elif self._starting:
            self._at_once = b"".join(parts)
        else:
            self._call.reply(b"".join(parts))

    def _fail(self, error: StoreError) -> None:
        if self._starting:
            raise error
        self._call.fail(error.code, error.text)
