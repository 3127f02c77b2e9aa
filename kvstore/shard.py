"""Which shard owns a key, and which shards a range touches.

A route sends a prefix to a shard; the longest matching prefix wins; keys that no route matches
belong to the home shard, number 0. Routes are flattened once into ordered **boundaries**, so that a
key's shard is one bisection and a range's shards are one slice:

    routes      /events/ -> 1, /agents/ -> 2
    boundaries  b""  /agents/  /agents0  /events/  /events0
    owners      0    2         0         1         0
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping

from kvstore.kv import prefix_end

HOME = 0

SETS_MAX = 1_000
"""Ranges of boundaries whose shards are remembered; when there are more, all are forgotten."""


class ShardMap:
    """Routes of prefixes to shard numbers; without routes everything is on the home shard.

    ``count`` is how many shards there are, those without a route included; left out, the map ends
    with the last shard that owns keys.
    """

    def __init__(self, routes: Mapping[bytes, int] | None = None, *, count: int = 1) -> None:
        self._routes = dict(routes or {})
        assert b"" not in self._routes, "the home shard takes what no route matches"
        edges = {b""}
        for prefix in self._routes:
            edges.add(prefix)
            end = prefix_end(prefix)
            if end != b"\0":
                edges.add(end)
        self._boundaries = sorted(edges)
        self._deciding = [self._longest(edge) for edge in self._boundaries]
        self._owners = [self._routes.get(prefix, HOME) for prefix in self._deciding]
        self.count = max(count, 1 + max(self._owners))
        self.all = tuple(range(self.count))
        self._sets: dict[tuple[int, int], tuple[int, ...]] = {}

    def of(self, key: bytes) -> int:
        """The shard that owns ``key``."""
        if self.count == 1:
            return HOME
        return self._owners[bisect_right(self._boundaries, key) - 1]

    def of_range(self, key: bytes, end: bytes | None) -> tuple[int, ...]:
        r"""The shards that [key, end) touches, in order; ``end`` None is the single key, ``b"\\0"``
        no upper bound.
        """
        if self.count == 1:
            return self.all
        first = bisect_right(self._boundaries, key) - 1
        if end is None or (end != b"\0" and end <= key):
            return (self._owners[first],)
        last = len(self._boundaries) if end == b"\0" else bisect_left(self._boundaries, end)
        found = self._sets.get((first, last))
        if found is None:
            found = tuple(sorted(set(self._owners[first:last])))
            if len(self._sets) >= SETS_MAX:
                self._sets.clear()
            self._sets[first, last] = found
        return found

    def stretches(self) -> Iterator[tuple[bytes, bytes, bytes]]:
        r"""(start, end, prefix) for each stretch between two boundaries, in order: the keys of
        [start, end) go where the route of ``prefix`` says, home if it is empty. The last ``end`` is
        ``b"\\0"``, no upper bound; no other is, for no key is below that one.
        """
        first = 1 if b"\0" in self._boundaries else 0
        starts = self._boundaries[first:]
        return zip(starts, [*starts[1:], b"\0"], self._deciding[first:], strict=True)

    def _longest(self, edge: bytes) -> bytes:
        """The route of keys from ``edge`` to the next boundary; empty if there is none."""
        return max((p for p in self._routes if edge.startswith(p)), key=len, default=b"")
