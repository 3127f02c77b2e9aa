"""Values that decide a request and are not in memory: fetched for it, and its own until it has been
executed.

The cache alone would not do: what was fetched first may have left it when the last value comes. So
a request's values are handed from attempt to attempt beside it, by entry. They are read in
portions, and limited: a request that would need more than REQUEST_BYTES_MAX is refused as too
large, one that would take all requests together above TOTAL_BYTES_MAX as one of too many. Nothing
has been applied then.
"""

from collections.abc import Callable, Sequence

from kvstore.errors import RequestTooLargeError, StoreError, TooManyRequestsError
from kvstore.fetch import Fetched
from kvstore.history import Entry
from kvstore.store import Store

REQUEST_BYTES_MAX = 256 * 1024 * 1024
TOTAL_BYTES_MAX = 512 * 1024 * 1024


class DecidingValues:
    """Fetches values for requests, ``rows_max`` rows at a time. ``bytes_held`` counts those of all
    fetches under way.
    """

    def __init__(
        self, store: Store, rows_max: int, call_soon: Callable[[Callable[[], None]], object]
    ) -> None:
        self.store = store
        self.rows_max = rows_max
        self.call_soon = call_soon
        self.bytes_held = 0

    def fetch(
        self,
        held: dict[Entry, bytes],
        pairs: Sequence[tuple[bytes, Entry]],
        done: Callable[[StoreError | None], None],
    ) -> None:
        """Add the framed KeyValues of ``pairs`` to ``held``, but for those compacted meanwhile.

        ``done`` gets RequestTooLargeError, TooManyRequestsError or what ``Store.fetch`` fails with.
        """
        _Portions(self, held, pairs, done).read()


class _Portions:
    """One fetch."""

    def __init__(
        self,
        values: DecidingValues,
        held: dict[Entry, bytes],
        pairs: Sequence[tuple[bytes, Entry]],
        done: Callable[[StoreError | None], None],
    ) -> None:
        self._values = values
        self._held = held
        self._pairs = pairs
        self._done = done
        self._at = 0
        self._size = 0
        self._add(sum(map(len, held.values())))

    def _add(self, size: int) -> None:
        self._size += size
        self._values.bytes_held += size

    def read(self) -> None:
        """Ask for the next portion."""
        portion = self._pairs[self._at : self._at + self._values.rows_max]
        self._at += len(portion)
        self._values.store.fetch(portion, lambda found: self._got(portion, found))

    def _got(self, portion: Sequence[tuple[bytes, Entry]], found: Fetched) -> None:
        if isinstance(found, StoreError):
            self._end(found)
            return
        for (_, entry), framed in zip(portion, found, strict=True):
            if framed is not None and entry not in self._held:
                self._held[entry] = framed
                self._add(len(framed))
        if self._size > REQUEST_BYTES_MAX:
            self._end(RequestTooLargeError())
        elif self._values.bytes_held > TOTAL_BYTES_MAX:
            self._end(TooManyRequestsError())
        elif self._at < len(self._pairs):
            self._values.call_soon(self.read)
        else:
            self._end(None)

    def _end(self, error: StoreError | None) -> None:
        self._add(-self._size)
        self._done(error)
