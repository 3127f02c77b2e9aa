"""May the store be served with this map? Nothing that is stored may be hidden by it.

A key is looked for where the map says, so that rows on another shard are lost to view: a list
without them reads as deletions, a put begins at version 1 again. The map is stored on home, and a
start with another one looks at every shard, once, for rows whose keys it would move:

- a **live** key;
- **history** that is not compacted: a change at the compact revision or after it, which a watch or
  a read at an old revision may ask for.

Superseded rows that an interrupted compaction left behind are nobody's any more.

What follows from looking once: with a changed map every shard must be there, the new ones, which
may hold something, and the old ones. An old shard may be left out of the configuration when the
stored map has no route to it and it is not home: the start that stored this map has found it empty,
and nothing has come to it since. So a shard leaves in two steps: its routes first, then itself.

**Home is known by its map.** A store that has none is new, or of one shard with the name that
such a shard gets by itself, which no other shard may have; any other without a map is not home but
one of several, and would begin an order of its own.

The new map is stored in the batch that begins the new life, after this check and before the first
write: a crash in between leaves the old one, by which nothing is hidden.
"""

from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from kvstore.backend import Backend, IndexRow
from kvstore.errors import BackendError
from kvstore.shard import HOME, ShardMap
from kvstore.shard_config import DEFAULT_SHARD, RouteSpec, ShardConfig, read_document

EXAMPLES_MAX = 3
"""Hidden keys that are named; the others are counted."""
ROUTES_MAX = 5
"""Routes that are named as gone or new; likewise."""
_KEY_CHARACTERS_MAX = 100
TIP_OF_NEW = 1


async def hidden(
    old_document: str,
    new_map: ShardMap,
    *,
    document: str,
    names: Sequence[str],
    backends: Sequence[Backend | None],
    home_tip: int,
    compact_revision: int,
) -> None:
    """Raise ``BackendError`` unless the map may change from ``old_document``, which home has
    stored, to ``document``, which is ``new_map``. The same map is not looked into.

    ``backends`` are open, by shard number, with redo records applied; None is one that cannot be
    reached. ``home_tip`` and ``compact_revision`` are home's.
    """
    if old_document == document:
        return
    old, new = (read_document(text, home=names[HOME]) for text in (old_document, document))
    changes = _changes(old, new)
    if not old_document and home_tip > TIP_OF_NEW and names[HOME] != DEFAULT_SHARD:
        raise BackendError(
            f"shard {names[HOME]} has never been the first of a store: the shard that was stays its"
            " first"
        )
    _refuse_left_out(old, names)
    present = [backend for backend in backends if backend is not None]
    if len(present) < len(backends):
        gone = _listed(name for name, backend in zip(names, backends, strict=True) if not backend)
        raise BackendError(
            f"the map of the shards has changed ({changes}), and {gone} cannot be reached: the"
            " first start with a changed map needs every shard, to be sure that it hides no key"
        )
    if new_map.count == 1:
        return  # whatever is on home is home's
    findings: list[Hidden] = []
    for number, backend in enumerate(present):
        strays = Strays(number, new_map, compact_revision)
        await backend.load_index(strays.add)
        findings += strays.hidden()
    if findings:
        raise BackendError(_told(findings, names, changes))


class Hidden(NamedTuple):
    """A key with rows that the map would hide."""

    key: bytes
    shard: int
    """Where they are."""
    owner: int
    """Where the map looks for them."""
    live: bool
    """Is the key there, or only its history?"""


class Strays:
    """Takes the rows of one shard in order, and tells which the map would hide."""

    def __init__(self, shard: int, shard_map: ShardMap, compact_revision: int) -> None:
        self._shard = shard
        self._map = shard_map
        self._compact_revision = compact_revision
        self._last: dict[bytes, tuple[int, int]] = {}
        """(revision, version) of the last row of each key that belongs elsewhere."""

    def add(self, rows: list[IndexRow]) -> None:
        """The next rows in (revision, sub) order."""
        shard, owner = self._shard, self._map.of
        for revision, _, key, _, version, _ in rows:
            if owner(key) != shard:
                self._last[key] = revision, version

    def hidden(self) -> list[Hidden]:
        """All keys that are live or have history, in order.

        The last row decides both: if it is older than the compact revision, so are all others.
        """
        return [
            Hidden(key, self._shard, self._map.of(key), live=version > 0)
            for key, (revision, version) in sorted(self._last.items())
            if version > 0 or revision >= self._compact_revision
        ]


def _refuse_left_out(old: ShardConfig, names: Sequence[str]) -> None:
    """A shard that may hold something must be configured."""
    needed = {route.shard for route in old.routes} | {old.names[HOME]}
    left_out = sorted(needed.difference(names))
    if left_out:
        raise BackendError(
            f"the stored map has {_listed(left_out)}, which the configuration leaves out: to remove"
            " a shard, first start without its routes, then without itself"
        )


def _changes(old: ShardConfig, new: ShardConfig) -> str:
    """What is different, in words."""
    before, after = set(old.routes), set(new.routes)
    parts = [
        *_differences("new shard", set(new.names) - set(old.names)),
        *_differences("without shard", set(old.names) - set(new.names)),
        *_differences("new route", map(_route, after - before)),
        *_differences("without route", map(_route, before - after)),
    ]
    return "; ".join(parts)


def _differences(what: str, found: Collection[str] | Iterator[str]) -> Iterator[str]:
    every = sorted(found)
    if every:
        more = f" and {len(every) - ROUTES_MAX} more" if len(every) > ROUTES_MAX else ""
        yield f"{what}{'s' * (len(every) > 1)} {', '.join(every[:ROUTES_MAX])}{more}"


def _route(route: RouteSpec) -> str:
    return f"{_shown(route.prefix)} to {route.shard}"


def _told(findings: Sequence[Hidden], names: Sequence[str], changes: str) -> str:
    """One line: what would be hidden, and what to do."""
    live = sum(found.live for found in findings)
    counts = [f"{live} key{'s' * (live != 1)}"] if live else []
    dead = len(findings) - live
    if dead:
        counts.append(f"the history of {dead} deleted key{'s' * (dead != 1)}")
    examples = ", ".join(
        f"{_shown(found.key)} on shard {names[found.shard]}, now of shard {names[found.owner]}"
        for found in islice(findings, EXAMPLES_MAX)
    )
    more = len(findings) - EXAMPLES_MAX
    return (
        f"the map of the shards has changed ({changes}) and would hide {' and '.join(counts)}:"
        f" {examples}{f' and {more} more' if more > 0 else ''}. Put the routes back; or, with them"
        " back, delete these keys, write any other key, compact at its revision, and then change"
        " the routes"
    )


def _listed(names: Collection[str] | Iterator[str]) -> str:
    every = list(names)
    return f"shard{'s' * (len(every) > 1)} {', '.join(every)}"


def _shown(key: bytes) -> str:
    shown = repr(key)
    return shown if len(shown) <= _KEY_CHARACTERS_MAX else shown[:_KEY_CHARACTERS_MAX] + "..."
