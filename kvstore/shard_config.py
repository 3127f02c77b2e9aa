"""Which shards there are, where their data is, and which prefix goes where.

``ShardConfig`` is what a user has written down, in a file (``shard_file.py``) or with flags. The
first shard is home, which takes what no route matches.

**The document** is what of it is stored on the home shard: the names and the routes, in one
canonical form, so that two maps are the same if and only if their documents are. URLs are not in
it: a database may move, and a URL may hold a password. A prefix is any bytes; it is stored as
UTF-8, bytes that are not as lone surrogates, all of it escaped: the document is ASCII without NUL.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from kvstore.errors import BackendError
from kvstore.shard import ShardMap

DEFAULT_SHARD: Final = "default"
"""Name of the only shard of a server that was given none."""

_FORMAT: Final = 1


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """One shard as configured."""

    name: str
    backend_url: str = field(repr=False)
    """``sqlite:PATH`` or ``postgresql://...``; may hold a password, and so is never shown."""
    line: int = field(default=0, compare=False)
    """Where the file says it, from 1; 0: not in a file."""


@dataclass(frozen=True, slots=True)
class RouteSpec:
    """Keys that begin with ``prefix`` are on ``shard``, unless a longer route matches."""

    prefix: bytes
    """Not empty."""
    shard: str


@dataclass(frozen=True, slots=True)
class ShardConfig:
    """All shards, home first, and all routes. Names and prefixes are unique, every route's shard is
    among the shards; whoever reads one from outside has made sure of it.
    """

    shards: Sequence[ShardSpec]
    routes: Sequence[RouteSpec] = ()

    def __post_init__(self) -> None:
        """Be sure of it."""
        assert self.shards, "there is a home shard"
        assert len(set(self.names)) == len(self.names), "a name means one shard"
        assert all(route.shard in self.names for route in self.routes), "routes lead somewhere"
        prefixes = {route.prefix for route in self.routes}
        assert len(prefixes) == len(self.routes), "a prefix goes to one shard"
        assert b"" not in prefixes, "the home shard takes what no route matches"

    @property
    def names(self) -> list[str]:
        """By shard number."""
        return [shard.name for shard in self.shards]

    def shard_map(self) -> ShardMap:
        """The routes by shard number."""
        numbers = {name: number for number, name in enumerate(self.names)}
        routes = {route.prefix: numbers[route.shard] for route in self.routes}
        return ShardMap(routes, count=len(self.shards))

    def document(self) -> str:
        """What home stores; the order of the other shards and of the routes does not matter."""
        home, *others = self.names
        routes = sorted((route.prefix, route.shard) for route in self.routes)
        content = {
            "format": _FORMAT,
            "shards": [home, *sorted(others)],
            "routes": [[prefix_text(prefix), shard] for prefix, shard in routes],
        }
        return json.dumps(content, separators=(",", ":"))


def one_shard(backend_url: str, *, name: str = DEFAULT_SHARD) -> ShardConfig:
    """Everything in one database."""
    return ShardConfig([ShardSpec(name, backend_url)])


def read_document(document: str, *, home: str) -> ShardConfig:
    """The map in a document, with empty URLs; an empty document is that of a store which has never
    had a map: everything is on ``home``.

    Raises ``BackendError`` if it is of a newer version, or damaged.
    """
    if not document:
        return one_shard("", name=home)
    try:
        content = json.loads(document)
        form = content["format"]
        if form != _FORMAT:
            raise BackendError(
                f"the map stored on shard {home} has format {form!r}, this program knows {_FORMAT}:"
                " a newer one is needed"
            )
        return ShardConfig(
            [ShardSpec(str(name), "") for name in content["shards"]],
            [RouteSpec(prefix_bytes(prefix), str(shard)) for prefix, shard in content["routes"]],
        )
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise BackendError(f"the map stored on shard {home} is damaged") from error


def prefix_text(prefix: bytes) -> str:
    """A prefix as JSON can hold it."""
    return prefix.decode("utf-8", "surrogateescape")


def prefix_bytes(text: str) -> bytes:
    """The inverse of ``prefix_text``. Raises ValueError for what it never returns."""
    return text.encode("utf-8", "surrogateescape")
