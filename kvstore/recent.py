"""Values that are no longer head and not yet old, by entry: uncommitted, or just replaced.

Reads pinned below them and watchers that lag a little find them here instead of asking storage.
What came first leaves first, once storage has it: 600,000 small values fit into 64 MiB, so that
they are kept in segments; a single dictionary of them takes 30 ms to grow.
"""

from collections import deque
from collections.abc import Callable

from kvstore.history import Entry

ENTRY_BYTES = 128
"""What a value costs beside its bytes: the object, its slots in a segment and in the order."""

_SEGMENTS = 64


class RecentValues:
    """See the module's text. At most ``bytes_max`` are held, ENTRY_BYTES per value included; above
    the oldest leave, but for those later than ``stored()``, the revision up to which storage has
    everything.
    """

    def __init__(self, bytes_max: int, stored: Callable[[], int]) -> None:
        self._bytes_max = bytes_max
        self._stored = stored
        self._segments: list[dict[Entry, bytes]] = [{} for _ in range(_SEGMENTS)]
        self._order: deque[Entry] = deque()
        self._bytes = 0

    def get(self, entry: Entry) -> bytes | None:
        """The framed KeyValue of a version, if it is here."""
        return self._segments[entry[0] % _SEGMENTS].get(entry)

    def keep(self, entry: Entry, framed: bytes) -> None:
        """Hold a value; one that is here already counts once."""
        segment = self._segments[entry[0] % _SEGMENTS]
        held = len(segment)
        segment.setdefault(entry, framed)
        if len(segment) == held:
            return
        self._order.append(entry)
        self._bytes += len(framed) + ENTRY_BYTES
        if self._bytes > self._bytes_max:
            self._drop()

    def _drop(self) -> None:
        stored, order = self._stored(), self._order
        while self._bytes > self._bytes_max and order and order[0][0] <= stored:
            entry = order.popleft()
            self._bytes -= len(self._segments[entry[0] % _SEGMENTS].pop(entry)) + ENTRY_BYTES
