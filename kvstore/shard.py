"""Which shard owns a key, and which shards a range touches.

A route sends a prefix to a shard; the longest matching prefix wins; keys that no route matches
belong to the home shard, number 0. Routes are flattened once into ordered **boundaries**, so that a
key's shard is one bisection and a range's shards are one slice:

    routes      /events/ -> 1, /agents/ -> 2
    boundaries  b""  /agents/  /agents0  /events/  /events0
    owners      0    2         0         1         0
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping

from kvstore.kv import prefix_end

HOME = 0


class ShardMap:
    """Routes of prefixes to shard numbers; without routes everything is on the home shard."""

    def __init__(self, routes: Mapping[bytes, int] | None = None) -> None:
        self._routes = dict(routes or {})
        assert b"" not in self._routes, "the home shard takes what no route matches"
        edges = {b""}
        for prefix in self._routes:
            edges.add(prefix)
            end = prefix_end(prefix)
            if end != b"\0":
                edges.add(end)
        self._boundaries = sorted(edges)
        self._owners = [self._longest(edge) for edge in self._boundaries]
        self.count = max(self._owners) + 1
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
            self._sets[first, last] = found
        return found

    def _longest(self, edge: bytes) -> int:
        """The owner of keys from ``edge`` to the next boundary."""
        best, owner = b"", HOME
        for prefix, shard in self._routes.items():
            if edge.startswith(prefix) and len(prefix) > len(best):
                best, owner = prefix, shard
        return owner
