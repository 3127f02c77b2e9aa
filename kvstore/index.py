"""The index: live keys in order with their head versions and cached values, and all older versions
by key.

Live keys are kept in **chunks** of parallel lists, a two-level ordered array:

    firsts    b""          b"/pods/m"                    lower bound of each chunk, bisected first
    chunks    keys    /a   /b   /pods/c  | /pods/m  /pods/z
              entries  e    e    e       |  e        e     (mod, sub, create, version, lease)
              values   v    None v       |  v        v     framed KeyValue, None when evicted

A lookup is two bisections, an insert moves at most CHUNK_KEYS pointers, a range is slices, a count
is a sum of lengths, and no single list or dict grows so large that its resize stalls the loop. A
deleted key leaves the chunks at once, so ranges at the head never walk over tombstones (etcd's
index does).

Versions that are no longer head wait in ``older`` until compaction trims them, oldest first,
tombstones included:

    put a (2), put a (3), delete a (4), put a (5)
    chunks: a -> (5, 0, 5, 1, 0)      older: a -> ((2..), (3..), (4, 0, 0, 0, 0))
    at 3: (3..)   at 4: nothing   at 6: (5..)
    trim(4): a -> ((4..),)   trim(5): a -> ()     a tombstone stays only at the compact revision

They are tuples, which the garbage collector looks at once, for a key that changed once or is dead;
those of a live key that changed more often are a list, which grows without being copied.

Values are cached per head version, evicted a chunk at a time by a clock hand (a chunk read since
the last pass gets another round). Values of revisions that are not in storage yet stay whatever the
budget: they exist nowhere else. After a turn that found nothing that may go, the hand rests until
there may be something.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence

from kvstore.history import Entry

CHUNK_KEYS = 512
"""A chunk that grows past this is split in two."""

_MERGE_KEYS = 64
"""A chunk that shrinks below this joins its neighbour if both fit in half a chunk."""

_OLDER_SEGMENTS = 64

_EVICT_LOOKS = 256
"""Chunks that the hand may pass in one call, a sixteenth as many with values to look at (0.4 ms at
most); for each sixteenth by which the budget is exceeded as many again, and none is spared then.
"""

_VALUES_LOOKS = 16
"""What going through a chunk's values counts, in chunks only passed."""

_TUPLE_VERSIONS = 16
"""More older versions of a key are not copied into a tuple when it dies or is trimmed."""


class Chunk:
    """Neighbouring live keys; the three lists are parallel."""

    __slots__ = ("entries", "hot", "keys", "value_bytes", "values")

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self.entries: list[Entry] = []
        self.values: list[bytes | None] = []
        self.value_bytes = 0
        self.hot = False


_Versions = tuple[Entry, ...] | list[Entry]

Stored = Callable[[bytes, bytes | None], int]
"""Up to which revision everything of a key, or of a range, is in storage."""

Place = tuple[int, Chunk, int, bool]
"""A chunk's number, the chunk, a position in it, and whether the key there is the one asked for."""


class Index:
    """See the module's text. ``value_bytes`` counts the cached values, ``live`` the live keys."""

    def __init__(self) -> None:
        self._chunks = [Chunk()]
        self._firsts = [b""]
        self._older: list[dict[bytes, _Versions]] = [{} for _ in range(_OLDER_SEGMENTS)]
        self._hand = 0
        self._kept_after = -1
        self._fruitless = 0
        """Chunks in a row from which nothing could go, with this ``keep_after``."""
        self.live = 0
        self.value_bytes = 0

    # -- one key -----------------------------------------

    def find(self, key: bytes) -> tuple[Chunk, int] | None:
        """Where a live key is: its chunk and position, or None."""
        chunk = self._chunks[bisect_right(self._firsts, key) - 1]
        keys = chunk.keys
        at = bisect_left(keys, key)
        if at < len(keys) and keys[at] == key:
            return chunk, at
        return None

    def head(self, key: bytes) -> Entry | None:
        """The live version of ``key``, or None."""
        found = self.find(key)
        return found[0].entries[found[1]] if found else None

    def head_value(self, key: bytes, entry: Entry) -> bytes | None:
        """The cached value if ``entry`` is the live version of ``key``."""
        found = self.find(key)
        if found is None:
            return None
        chunk, at = found
        if chunk.entries[at] != entry:
            return None
        chunk.hot = True
        return chunk.values[at]

    def older(self, key: bytes) -> Sequence[Entry]:
        """Versions of ``key`` that are not live, oldest first, tombstones included."""
        return self._older[hash(key) % _OLDER_SEGMENTS].get(key, ())

    def at(self, key: bytes, revision: int) -> Entry | None:
        """The version of ``key`` that a read at ``revision`` sees, or None."""
        found = self.find(key)
        if found is not None:
            entry = found[0].entries[found[1]]
            if entry[0] <= revision:
                return entry
        return self.older_at(key, revision)

    def older_at(self, key: bytes, revision: int) -> Entry | None:
        """The newest version among those not live that is not later than ``revision``; None for a
        tombstone.
        """
        versions = self._older[hash(key) % _OLDER_SEGMENTS].get(key)
        if versions is None:
            return None
        at = bisect_right(versions, revision, key=_mod_revision)
        if at == 0:
            return None
        entry = versions[at - 1]
        return entry if entry[3] else None

    # -- changes -----------------------------------------

    def place(self, key: bytes) -> Place:
        """Where ``key`` is or would be, for ``put_at``; good until the index changes."""
        number = bisect_right(self._firsts, key) - 1
        chunk = self._chunks[number]
        keys = chunk.keys
        at = bisect_left(keys, key)
        return number, chunk, at, at < len(keys) and keys[at] == key

    def put(self, key: bytes, entry: Entry, value: bytes | None) -> None:
        """Make ``entry`` the live version of ``key``; the version before it becomes older."""
        self.put_at(self.place(key), key, entry, value)

    def put_at(self, place: Place, key: bytes, entry: Entry, value: bytes | None) -> None:
        """``put`` at the place just found."""
        number, chunk, at, live = place
        entries, values = chunk.entries, chunk.values
        grown = 0 if value is None else len(value)
        if live:
            self._remember(key, entries[at])
            entries[at] = entry
            replaced = values[at]
            values[at] = value
            if replaced is not None:
                grown -= len(replaced)
        else:
            chunk.keys.insert(at, key)
            entries.insert(at, entry)
            values.insert(at, value)
            self.live += 1
        chunk.value_bytes += grown
        self.value_bytes += grown
        if len(values) > CHUNK_KEYS:
            self._split(number)

    def delete(self, key: bytes, tombstone: Entry) -> None:
        """Remove a live key; its version and the tombstone become older versions."""
        at_chunk = bisect_right(self._firsts, key) - 1
        chunk = self._chunks[at_chunk]
        at = bisect_left(chunk.keys, key)
        assert chunk.keys[at] == key, "only a live key can be deleted"
        self._bury(key, chunk.entries[at], tombstone)
        value = chunk.values[at]
        if value is not None:
            chunk.value_bytes -= len(value)
            self.value_bytes -= len(value)
        del chunk.keys[at], chunk.entries[at], chunk.values[at]
        self.live -= 1
        if len(chunk.keys) < _MERGE_KEYS:
            self._merge(at_chunk)

    def cache_value(self, key: bytes, entry: Entry, value: bytes) -> None:
        """Keep a value read from storage, if ``entry`` is still the live version of ``key``."""
        found = self.find(key)
        if found is None:
            return
        chunk, at = found
        if chunk.entries[at] == entry and chunk.values[at] is None:
            chunk.values[at] = value
            chunk.value_bytes += len(value)
            chunk.hot = True
            self.value_bytes += len(value)
            self._fruitless = 0

    def load(self, key: bytes, entry: Entry, compact_revision: int) -> Sequence[Entry]:
        """Apply a stored change, in (mod, sub) order at start; returns versions that compaction has
        left behind.
        """
        if entry[3]:
            self.put(key, entry, None)
        elif self.find(key) is not None:
            self.delete(key, entry)
        else:
            self._remember(key, entry)
        if entry[0] <= compact_revision:
            return self.trim(key, compact_revision)
        return ()

    def trim(self, key: bytes, revision: int) -> Sequence[Entry]:
        """Forget versions that no read at or after ``revision`` can see; returns them for storage
        to drop.

        The newest version at or before ``revision`` stays, unless it is a tombstone older than
        ``revision`` itself (a watch from ``revision`` still gets an event at exactly that
        revision).
        """
        segment = self._older[hash(key) % _OLDER_SEGMENTS]
        versions = segment.get(key)
        if versions is None:
            return ()
        keep_from = bisect_right(versions, revision, key=_mod_revision)
        head = self.head(key)
        if head is None or head[0] > revision:
            newest = keep_from - 1
            if newest >= 0 and (versions[newest][3] or versions[newest][0] == revision):
                keep_from = newest
        if keep_from == len(versions):
            del segment[key]
        elif keep_from:
            kept = versions[keep_from:]
            segment[key] = kept if len(kept) > _TUPLE_VERSIONS else tuple(kept)
        return versions[:keep_from]

    # -- ranges -----------------------------------------

    def slices(self, start: bytes, end: bytes | None) -> Iterator[tuple[Chunk, int, int]]:
        r"""(chunk, low, high) for each piece of the range [start, end), in key order; never empty
        pieces.

        ``end`` None is the single key, ``b"\\0"`` no upper bound. The index must not change while
        iterating.
        """
        if end is None:
            found = self.find(start)
            if found:
                yield found[0], found[1], found[1] + 1
            return
        unbounded = end == b"\0"
        if not unbounded and end <= start:
            return
        at_chunk = bisect_right(self._firsts, start) - 1
        low = bisect_left(self._chunks[at_chunk].keys, start)
        for i in range(at_chunk, len(self._chunks)):
            chunk = self._chunks[i]
            keys = chunk.keys
            last = not unbounded and (i + 1 == len(self._firsts) or self._firsts[i + 1] >= end)
            high = bisect_left(keys, end, low) if last else len(keys)
            if high > low:
                yield chunk, low, high
            if last:
                return
            low = 0

    def count(self, start: bytes, end: bytes | None) -> int:
        """Live keys in the range."""
        return sum(high - low for _, low, high in self.slices(start, end))

    # -- memory -----------------------------------------

    def evict(self, bytes_max: int, keep_after: int, stored: Stored | None = None) -> None:
        """Drop cached values until at most ``bytes_max`` are held, or for a bounded time: called
        for every value that comes, it keeps up.

        Values of revisions above ``keep_after`` stay whatever the budget: they are not in storage
        yet; nor are those above what ``stored`` says of their key, if it is given.
        """
        chunks = self._chunks
        if keep_after != self._kept_after:
            self._kept_after, self._fruitless = keep_after, 0
        over = 16 * (self.value_bytes - bytes_max) // (bytes_max or 1)
        looks = _EVICT_LOOKS * (1 + over)
        while self.value_bytes > bytes_max and looks > 0 and self._fruitless < len(chunks):
            self._hand = (self._hand + 1) % len(chunks)
            self._fruitless += 1
            looks -= 1
            chunk = chunks[self._hand]
            if chunk.hot and not over:
                chunk.hot = False
                self._fruitless = 0
            elif chunk.value_bytes:
                looks -= _VALUES_LOOKS
                if self._evict_chunk(chunk, keep_after, stored):
                    self._fruitless = 0

    def _evict_chunk(self, chunk: Chunk, keep_after: int, stored: Stored | None) -> int:
        """Drop what may go of a chunk's values; how many bytes that were."""
        if stored is not None:
            keep_after = min(keep_after, stored(chunk.keys[0], chunk.keys[-1] + b"\0"))
        kept = [
            value if entry[0] > keep_after else None
            for entry, value in zip(chunk.entries, chunk.values, strict=True)
        ]
        if stored is not None:  # the chunk may have keys of several shards, one of them behind
            kept = [
                value if value is not None and entry[0] > stored(key, None) else None
                for key, entry, value in zip(chunk.keys, chunk.entries, kept, strict=True)
            ]
        left = sum(len(value) for value in kept if value is not None)
        dropped = chunk.value_bytes - left
        self.value_bytes -= dropped
        chunk.values = kept
        chunk.value_bytes = left
        return dropped

    def _remember(self, key: bytes, entry: Entry) -> None:
        segment = self._older[hash(key) % _OLDER_SEGMENTS]
        versions = segment.get(key)
        if versions is None:
            segment[key] = (entry,)
        elif isinstance(versions, list):
            versions.append(entry)
        else:
            segment[key] = [*versions, entry]

    def _bury(self, key: bytes, entry: Entry, tombstone: Entry) -> None:
        """Remember both: a key that died is likely to stay as it is."""
        segment = self._older[hash(key) % _OLDER_SEGMENTS]
        versions = segment.get(key, ())
        if len(versions) <= _TUPLE_VERSIONS:
            segment[key] = (*versions, entry, tombstone)
        elif isinstance(versions, list):
            versions += (entry, tombstone)
        else:
            segment[key] = [*versions, entry, tombstone]

    def _split(self, at: int) -> None:
        """Halve a chunk; the new boundary is the right half's first key."""
        left = self._chunks[at]
        half = len(left.keys) // 2
        right = Chunk()
        right.keys, right.entries, right.values = (
            left.keys[half:],
            left.entries[half:],
            left.values[half:],
        )
        del left.keys[half:], left.entries[half:], left.values[half:]
        right.value_bytes = sum(len(value) for value in right.values if value is not None)
        left.value_bytes -= right.value_bytes
        right.hot = left.hot
        self._chunks.insert(at + 1, right)
        self._firsts.insert(at + 1, right.keys[0])

    def _merge(self, at: int) -> None:
        """Join a small chunk with its right (else left) neighbour if the two fit in half a
        chunk.
        """
        if len(self._chunks) == 1:
            return
        left_at = at if at + 1 < len(self._chunks) else at - 1
        left, right = self._chunks[left_at], self._chunks[left_at + 1]
        if len(left.keys) + len(right.keys) > CHUNK_KEYS // 2:
            return
        left.keys += right.keys
        left.entries += right.entries
        left.values += right.values
        left.value_bytes += right.value_bytes
        left.hot = left.hot or right.hot
        del self._chunks[left_at + 1], self._firsts[left_at + 1]


def _mod_revision(entry: Entry) -> int:
    return entry[0]
