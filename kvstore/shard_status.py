"""What ``/shards`` tells: every shard, every route, and how they are, as JSON.

``kvstore shards`` draws it. It is asked of the running server and not read from the databases:
only the server knows how far a shard lags and why, and it holds the locks. Names, prefixes and
counts are told, no URL.

Counting the keys costs a bisection per stretch of the map, O(log n).
"""

import json

from kvstore.shard import HOME
from kvstore.shard_config import prefix_text
from kvstore.store import Store


def shard_status(store: Store) -> bytes:
    """The page; what only a shard that has been missing since the start could tell is null."""
    commits = store.commits
    keys = _keys(store)
    shards = []
    for queue in commits.queues:
        sizes = None if queue.missing else queue.backend.sizes()
        shards.append(
            {
                "name": queue.name,
                "home": queue.number == HOME,
                "state": queue.state,
                "trouble": queue.broken or queue.trouble,
                "keys": sum(n for (_, shard), n in keys.items() if shard == queue.number)
                if sizes
                else None,
                "bytes": sizes.total if sizes else None,
                "bytes_in_use": sizes.in_use if sizes else None,
                "tip": None if queue.missing else queue.tip,
                "frontier_lag": None if queue.missing else max(0, commits.durable - queue.frontier),
            }
        )
    routes = [
        {
            "prefix": prefix_text(prefix),
            "shard": commits.queues[shard].name,
            "keys": None if commits.queues[shard].missing else count,
        }
        for (prefix, shard), count in keys.items()
        if prefix
    ]
    told = {"revision": commits.durable, "shards": shards, "routes": routes}
    return json.dumps(told, separators=(",", ":")).encode()


def _keys(store: Store) -> dict[tuple[bytes, int], int]:
    """Live keys by route and its shard, in the order of the prefixes; the empty prefix has those of
    no route.
    """
    counted: dict[tuple[bytes, int], int] = {}
    for start, end, prefix in store.shards.stretches():
        place = prefix, store.shards.of(start)
        counted[place] = counted.get(place, 0) + store.index.count(start, end)
    return dict(sorted(counted.items()))
