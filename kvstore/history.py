"""The log of changes since the last compaction, in memory, in revision order.

A worked history, blocks of three changes for the picture (``+1`` birth, ``-1`` death, ``0``
update):

    revision   2     3     4   |   5     6     7   |   8
    key        a     b     a   |   c     a     b   |   d          the log: parallel lists in blocks
    delta     +1    +1     0   |  +1    -1     0   |  +1
    sealed:   keys sorted  a a b        a b c          (open)
              sums         +1 +1 +2     -1 -1 0
              dead                      a

    count of [a, c) at 4 = live count now (1: b) - net births in it after 4 (a died: -1) = 2

Reads at an old revision need three things of the changes made after it: the net number of births in
a range (to turn the live count into the count then), the keys that died in a range (they are no
longer in the index), and watchers that catch up need the changes of a range in order. A sealed
block answers the first by bisection in its sorted keys, has the second sorted to be merged with
those of other blocks (``Deaths``), and lets the third skip it.

Alternatives rejected: one entry per birth and death only (watchers would have to read the backend
to catch up), and a persistent ordered tree per revision (several times the memory and the cost of
each write, for reads that are rare).

The log holds the same key and entry objects as the index, so a change costs two list slots.
A sealed block is made of tuples, which the garbage collector looks at once.
Only ``store`` appends, only ``compaction`` drops.

Each shard has a log of its own: one that comes back late brings its own, and compaction takes from
each no more than what is durable there. A revision of a request over several shards has changes in
several logs, with one numbering of ``sub``. What touches several shards reads their logs as one:

    shard 0   2.0 a           4.0 a           6.0 a
    shard 1           3.0 m   4.1 m   5.0 m
    merged    2.0 a   3.0 m   4.0 a   4.1 m   5.0 m   6.0 a
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush, heapreplace
from itertools import accumulate

Entry = tuple[int, int, int, int, int]
"""(mod_revision, sub, create_revision, version, lease); the last three are 0 in a tombstone."""

BLOCK_CHANGES = 1024
"""Changes in a block: sealing sorts them once (about 0.4 ms), an old count looks at up to this many
one by one.
"""

SCAN_CHANGES = 8 * BLOCK_CHANGES
"""Changes that ``changes`` looks at before it lets others work (about half a millisecond)."""

_SKIP_COST = 32
"""What skipping a sealed block costs, in changes looked at."""


def in_range(key: bytes, start: bytes, end: bytes | None) -> bool:
    r"""Is ``key`` in [start, end)? ``end`` None: only ``start`` itself; ``b"\\0"``: no upper bound
    (etcd's forms).
    """
    if end is None:
        return key == start
    return key >= start and (end == b"\0" or key < end)


def _delta(entry: Entry) -> int:
    """+1 for a birth, -1 for a death, 0 for an update."""
    version = entry[3]
    return 1 if version == 1 else -1 if version == 0 else 0


class _Block:
    """Up to BLOCK_CHANGES consecutive changes; the rest exists once it is full: keys in ``order``,
    ``sums`` of births less deaths before each, and keys of deaths (``dead``).
    """

    __slots__ = ("dead", "entries", "keys", "order", "sums")

    def __init__(self, keys: list[bytes], entries: list[Entry]) -> None:
        self.keys: Sequence[bytes] = keys
        self.entries: Sequence[Entry] = entries
        self.order: tuple[bytes, ...] | None = None
        self.sums: tuple[int, ...] = ()
        self.dead: tuple[bytes, ...] = ()

    def seal(self) -> None:
        """Sort the keys with their deltas, so that ranges are found by bisection."""
        pairs = sorted(zip(self.keys, map(_delta, self.entries), strict=True))
        deltas = [delta for _, delta in pairs]
        self.order = tuple([key for key, _ in pairs])
        self.sums = (0, *accumulate(deltas))
        if -1 in deltas:
            self.dead = tuple([key for key, delta in pairs if delta < 0])
        self.keys, self.entries = tuple(self.keys), tuple(self.entries)

    def span(self, start: bytes, end: bytes | None) -> tuple[int, int]:
        """The slice of ``order`` in the range; only on a sealed block."""
        assert self.order is not None, "span of an open block"
        return _span(self.order, start, end)

    def deaths(
        self, start: bytes, end: bytes | None, position: int
    ) -> tuple[Sequence[bytes], int, int]:
        """Sorted keys, and the slice of them that changes from ``position`` on deleted in the
        range.
        """
        if position == 0 and self.order is not None:
            return self.dead, *_span(self.dead, start, end)
        keys, entries = self.keys, self.entries
        dead = sorted(
            keys[i]
            for i in range(position, len(entries))
            if entries[i][3] == 0 and in_range(keys[i], start, end)
        )
        return dead, 0, len(dead)

    def places(self, start: bytes, end: bytes | None, position: int) -> list[int]:
        """Positions of the range's changes from ``position`` on, in order."""
        if self.order is not None:
            low, high = self.span(start, end)
            if low == high:
                return []
        keys = self.keys
        if end is None:
            return [i for i in range(position, len(keys)) if keys[i] == start]
        if end == b"\0":
            return [i for i in range(position, len(keys)) if keys[i] >= start]
        return [i for i in range(position, len(keys)) if start <= keys[i] < end]


class History:
    r"""See the module's text. Revisions are those of entries; ``b"\\0"`` as end means no end."""

    def __init__(self, floor: int = -1) -> None:
        self.floor = floor
        """Changes from this revision on are all here; compaction takes from those before it."""
        self._blocks: list[_Block] = []
        self._open_block()

    def _open_block(self) -> None:
        self._keys: list[bytes] = []
        self._entries: list[Entry] = []
        self._blocks.append(_Block(self._keys, self._entries))

    def __len__(self) -> int:
        """Changes held."""
        return sum(len(block.keys) for block in self._blocks)

    def append(self, key: bytes, entry: Entry) -> None:
        """Add the newest change; its (mod_revision, sub) is greater than all before."""
        keys = self._keys
        keys.append(key)
        self._entries.append(entry)
        if len(keys) == BLOCK_CHANGES:
            self._blocks[-1].seal()
            self._open_block()

    def newest(self) -> int:
        """The revision of the newest change; 0 if there is none."""
        last = next((block for block in reversed(self._blocks) if block.entries), None)
        return last.entries[-1][0] if last is not None else 0

    def tail(self, after: int) -> Iterator[tuple[_Block, int]]:
        """Blocks with changes later than revision ``after``, each with the position of its first
        such change.
        """
        blocks = self._blocks
        at = len(blocks) - 1
        while at > 0 and (not blocks[at].entries or blocks[at].entries[0][0] > after):
            at -= 1
        for block in blocks[at:]:
            entries = block.entries
            if entries and entries[-1][0] > after:
                yield block, 0 if entries[0][0] > after else _first_after(entries, after)

    def births(self, start: bytes, end: bytes | None, after: int) -> int:
        """Births minus deaths in the range by changes later than revision ``after``."""
        net = 0
        for block, position in self.tail(after):
            if position == 0 and block.order is not None:
                low, high = block.span(start, end)
                net += block.sums[high] - block.sums[low]
            else:
                entries = block.entries
                for i in range(position, len(entries)):
                    version = entries[i][3]
                    if version < 2 and in_range(block.keys[i], start, end):
                        net += 1 if version else -1
        return net

    def deaths(self, end: bytes | None, after: int) -> "Deaths":
        """Keys that changes later than ``after`` deleted, as one comes to them in key order."""
        return Deaths(self, end, after)

    def changes(
        self, start: bytes, end: bytes | None, after: int, up_to: int, limit: int
    ) -> tuple[list[tuple[bytes, Entry]], int]:
        """Changes of the range later than revision ``after``, in order, and how far they go.

        They are all there are up to the revision returned with them, which is ``up_to`` unless
        ``limit`` were found or SCAN_CHANGES were looked at before. A revision is never cut, however
        many changes it has.
        """
        found: list[tuple[bytes, Entry]] = []
        looked, seen = 0, after
        for block, position in self.tail(after):
            entries = block.entries
            first = entries[position][0]
            if first > up_to:
                break
            if first != seen and (looked >= SCAN_CHANGES or len(found) >= limit):
                return found, seen
            places = block.places(start, end, position)
            looked += _SKIP_COST if not places else len(entries) - position
            for i in places:
                entry = entries[i]
                if entry[0] > up_to:
                    return found, up_to
                if len(found) >= limit and entry[0] != found[-1][1][0]:
                    return found, entry[0] - 1
                found.append((block.keys[i], entry))
            seen = entries[-1][0]
        return found, up_to

    def keys_until(self, up_to: int, block: int) -> Sequence[bytes]:
        """Keys of the changes at or before ``up_to`` in a block, the oldest being 0; empty if there
        are none, and then there are none in later blocks either.
        """
        if block == len(self._blocks):
            return ()
        keys, entries = self._blocks[block].keys, self._blocks[block].entries
        return keys[: _first_after(entries, up_to)]

    def drop_oldest_block(self, up_to: int) -> bool:
        """Forget the oldest block if it is sealed and all its changes are earlier than ``up_to``;
        was it?
        """
        block = self._blocks[0]
        if block.order is None or block.entries[-1][0] >= up_to:
            return False
        del self._blocks[0]
        return True


class MergedHistory:
    """The logs of several shards as one; it holds nothing itself, so that it is never behind them.

    Reads and watchers over several shards see only revisions that are durable on all of them, and
    up to there each shard's log is complete: nothing needs to be known of one that is behind.
    """

    __slots__ = ("_parts",)

    def __init__(self, parts: Sequence[History]) -> None:
        self._parts = parts

    @property
    def floor(self) -> int:
        """Changes from this revision on are all here."""
        return max(part.floor for part in self._parts)

    def newest(self) -> int:
        """The revision of the newest change; 0 if there is none."""
        return max(part.newest() for part in self._parts)

    def tail(self, after: int) -> Iterator[tuple[_Block, int]]:
        """As ``History.tail``, shard by shard."""
        for part in self._parts:
            yield from part.tail(after)

    def births(self, start: bytes, end: bytes | None, after: int) -> int:
        """Births minus deaths in the range by changes later than revision ``after``."""
        return sum(part.births(start, end, after) for part in self._parts)

    def deaths(self, end: bytes | None, after: int) -> "Deaths":
        """Keys that changes later than ``after`` deleted, as one comes to them in key order."""
        return Deaths(self, end, after)

    def changes(
        self, start: bytes, end: bytes | None, after: int, up_to: int, limit: int
    ) -> tuple[list[tuple[bytes, Entry]], int]:
        """As ``History.changes``, in the order of all shards; SCAN_CHANGES are looked at per shard.

        Each shard is asked only as far as those before it got, so that little is looked at in vain.
        """
        found: list[tuple[bytes, Entry]] = []
        for part in self._parts:
            some, up_to = part.changes(start, end, after, up_to, limit)
            found += some
        found = sorted((change for change in found if change[1][0] <= up_to), key=_entry)
        if len(found) > limit:
            cut = bisect_right(found, found[limit - 1][1][0], key=_revision)
            if cut < len(found):
                up_to = found[cut][1][0] - 1
                del found[cut:]
        return found, up_to


Log = History | MergedHistory
"""One shard's changes, or those of several."""


class Deaths:
    """Keys in a range that died after a revision, in key order, a few at a time.

    Each block's deaths are sorted; a heap holds what each shows next, so that nothing is looked at
    before it is taken. A key that died may have been born again since, and before or after the
    revision: the index knows.
    """

    def __init__(self, history: Log, end: bytes | None, after: int) -> None:
        self._history = history
        self._end = end
        self._seen = after
        self._heap: list[tuple[bytes, int, int, int, Sequence[bytes]]] = []
        self._sources = 0

    def refresh(self, start: bytes) -> None:
        """Take in what changed since the last call, from key ``start`` on."""
        newest = self._history.newest()
        if newest <= self._seen:
            return
        for block, position in self._history.tail(self._seen):
            dead, low, high = block.deaths(start, self._end, position)
            if low < high:
                self._sources += 1
                heappush(self._heap, (dead[low], self._sources, low, high, dead))
        self._seen = newest

    def first(self) -> bytes | None:
        """The next key; None if there is none."""
        return self._heap[0][0] if self._heap else None

    def take(self, up_to: bytes | None, limit: int) -> tuple[list[bytes], int]:
        """The next keys, each once and not after ``up_to`` (None: no bound), and how many deaths
        were looked at.

        That is ``limit`` at most, but that the last key's are looked at to the end: whatever
        ``first`` shows then comes after it.
        """
        heap = self._heap
        found: list[bytes] = []
        last: bytes | None = None
        looked = 0
        while heap:
            key, source, at, high, dead = heap[0]
            if key != last:
                if looked >= limit or (up_to is not None and key > up_to):
                    break
                last = key
                found.append(key)
            looked += 1
            at = bisect_right(dead, key, at + 1, high)
            if at < high:
                heapreplace(heap, (dead[at], source, at, high, dead))
            else:
                heappop(heap)
        return found, looked


def _span(order: Sequence[bytes], start: bytes, end: bytes | None) -> tuple[int, int]:
    """The slice of sorted keys that is in the range."""
    low = bisect_left(order, start)
    if end is None:
        return low, bisect_right(order, start, low)
    return low, len(order) if end == b"\0" else max(low, bisect_left(order, end, low))


def _first_after(entries: Sequence[Entry], revision: int) -> int:
    """Position of the first entry later than ``revision``."""
    return bisect_right(entries, revision, key=_mod_revision)


def _mod_revision(entry: Entry) -> int:
    return entry[0]


def _entry(change: tuple[bytes, Entry]) -> Entry:
    return change[1]


def _revision(change: tuple[bytes, Entry]) -> int:
    return change[1][0]
