"""Reading ``--config``: the YAML file of shards and routes.

    shards:
      - {name: core,   backend: "sqlite:core.db"}
      - {name: events, backend: "sqlite:events.db"}
    routes:
      - {prefix: /registry/events/, shard: events}

A file is taken whole or refused with its line, the reason and, where one is near, the right
spelling: a route that is dropped silently would send keys to the wrong database. So nothing is
guessed: unknown keys, keys given twice, numbers where a text belongs are refused, and the nodes
are read as they stand, before YAML makes values of them, because only nodes know their lines.

**Passwords.** A URL may hold one, and a forgotten quote may tear a URL apart, so that a piece of it
stands where a key or a name belongs. What is not known is therefore repeated in a refusal only if
it is nearly what it should have been; the line says the rest.

A prefix is text, taken as UTF-8, or ``!!binary`` with any bytes.
"""

import base64
import re
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path
from typing import Final

import yaml
from yaml.reader import ReaderError

from kvstore.shard_config import DEFAULT_SHARD, RouteSpec, ShardConfig, ShardSpec

FILE_BYTES_MAX: Final = 1 << 20
SHARDS_MAX: Final = 64
"""An SQLite shard takes three threads, a PostgreSQL shard some connections."""
ROUTES_MAX: Final = 1_000

_TAG: Final = "tag:yaml.org,2002:"
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
_NOT_OF_A_NAME = re.compile(r"[^a-z0-9_.-]+")
_QUOTED = re.compile(r""" (['"])(?!<|\\?.\1).*?\1""")
"""What YAML's complaints quote of the file, but for single characters; names of its own stand in
angle brackets."""


class ShardFileError(Exception):
    """A file that is refused; the message is one line for the user, without any part of a URL."""


def read_shard_file(path: Path) -> ShardConfig:
    """The shards and routes in the file ``path``. Raises ``ShardFileError``."""
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ShardFileError(f"cannot read {path}: {error.strerror}") from error
    if len(content) > FILE_BYTES_MAX:
        raise ShardFileError(f"{path} is longer than {FILE_BYTES_MAX} bytes")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ShardFileError(f"{path}:{line}: this is not UTF-8") from error
    return parse_shards(text, name=str(path))


def parse_shards(text: str, *, name: str) -> ShardConfig:
    """The shards and routes in ``text``. Raises ``ShardFileError``, which says ``name``."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{name}:{mark.line + 1}" if mark else name
        problem = _QUOTED.sub("", error.problem or "this cannot be read")
        raise ShardFileError(f"{at}: not YAML: {problem}") from error
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ShardFileError(f"{name}:{line}: not YAML: a character that it forbids") from error
    except RecursionError as error:
        raise ShardFileError(f"{name}: not a file of shards: it is nested too deeply") from error
    if root is None:
        raise ShardFileError(f"{name}: the file is empty; it needs shards")
    return _Parser(name).config(root)


class _Parser:
    """Walks the nodes of one file."""

    def __init__(self, name: str) -> None:
        self._name = name

    def config(self, root: yaml.Node) -> ShardConfig:
        """Everything."""
        fields = self._fields(root, "the file", required=("shards",), optional=("routes",))
        nodes = self._items(fields["shards"], "shards", SHARDS_MAX)
        if not nodes:
            raise self._refusal(fields["shards"], "shards is empty; the first shard takes all keys")
        shards = self._shards(nodes)
        listed = fields.get("routes")
        routes = [] if listed is None else self._items(listed, "routes", ROUTES_MAX)
        return ShardConfig(shards, self._routes(routes, [shard.name for shard in shards]))

    def _shards(self, nodes: list[yaml.Node]) -> list[ShardSpec]:
        shards: list[ShardSpec] = []
        lines: dict[str, int] = {}
        for node in nodes:
            fields = self._fields(node, "a shard", required=("name", "backend"))
            name = self._shard_name(fields["name"])
            if name in lines:
                reason = f"shard {name} is there already, in line {lines[name]}"
                raise self._refusal(fields["name"], reason)
            if shards and name == DEFAULT_SHARD:
                reason = f"the name {name} is kept for the first shard, which it tells from others"
                raise self._refusal(fields["name"], reason)
            lines[name] = _line(fields["name"])
            url = self._text(fields["backend"], "backend")
            shards.append(ShardSpec(name, url, line=_line(fields["backend"])))
        return shards

    def _shard_name(self, node: yaml.Node) -> str:
        text = self._text(node, "name")
        if _NAME.fullmatch(text):
            return text
        reason = "a name is a letter or digit, then up to 62 letters, digits, '-', '_' or '.', all"
        near = _NOT_OF_A_NAME.sub("-", text.lower()).strip("-._")
        if _NAME.fullmatch(near) and not {":", "@"} & set(text):
            raise self._refusal(node, f"{reason} small; did you mean {near}?")
        raise self._refusal(node, f"{reason} small")

    def _routes(self, nodes: list[yaml.Node], names: Collection[str]) -> list[RouteSpec]:
        routes: list[RouteSpec] = []
        lines: dict[bytes, int] = {}
        for node in nodes:
            fields = self._fields(node, "a route", required=("prefix", "shard"))
            prefix = self._prefix(fields["prefix"])
            if prefix in lines:
                reason = f"prefix {prefix!r} has a route already, in line {lines[prefix]}"
                raise self._refusal(fields["prefix"], reason)
            lines[prefix] = _line(fields["prefix"])
            routes.append(RouteSpec(prefix, self._known_shard(fields["shard"], names)))
        return routes

    def _prefix(self, node: yaml.Node) -> bytes:
        if not isinstance(node, yaml.ScalarNode) or node.tag != _TAG + "binary":
            return self._text(node, "prefix", hint="; use !!binary").encode()
        try:
            prefix = base64.b64decode("".join(node.value.split()), validate=True)
        except ValueError as error:
            raise self._refusal(node, "prefix: what follows !!binary is not Base64") from error
        if not prefix:
            raise self._refusal(node, "prefix is empty")
        return prefix

    def _known_shard(self, node: yaml.Node, names: Collection[str]) -> str:
        text = self._text(node, "shard")
        if text in names:
            return text
        near = _near(text, names)
        if near:
            raise self._refusal(node, f"there is no shard {text!r}; did you mean {near}?")
        raise self._refusal(node, f"there is no such shard; there is {', '.join(names)}")

    # -- nodes -----------------------------------------------------------------------------------

    def _fields(
        self,
        node: yaml.Node,
        what: str,
        *,
        required: Collection[str],
        optional: Collection[str] = (),
    ) -> dict[str, yaml.Node]:
        """The values of a mapping, by key."""
        known = (*required, *optional)
        shape = f"{what} is a mapping of {' and '.join(known)}"
        if not isinstance(node, yaml.MappingNode) or node.tag != _TAG + "map":
            raise self._refusal(node, shape)
        fields: dict[str, yaml.Node] = {}
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else ""
            if name not in known:
                near = _near(name, known)
                if near:
                    reason = f"{what} has no {name!r}; did you mean {near}?"
                    raise self._refusal(key, reason)
                raise self._refusal(key, f"{shape}, and of nothing else")
            if name in fields:
                reason = f"{name} is there already, in line {_line(fields[name])}"
                raise self._refusal(key, reason)
            fields[name] = value
        for name in required:
            if name not in fields:
                raise self._refusal(node, f"{what} needs {name}")
        return fields

    def _items(self, node: yaml.Node, what: str, most: int) -> list[yaml.Node]:
        """The items of a list."""
        if not isinstance(node, yaml.SequenceNode) or node.tag != _TAG + "seq":
            raise self._refusal(node, f"{what} is a list: each item begins with '- '")
        if len(node.value) > most:
            raise self._refusal(node.value[most], f"there may be {most} {what} at most")
        return list(node.value)

    def _text(self, node: yaml.Node, what: str, *, hint: str = "") -> str:
        """A text; YAML takes plain ``1`` or ``on`` for something else."""
        if not isinstance(node, yaml.ScalarNode):
            raise self._refusal(node, f"{what} is a text")
        if node.tag == _TAG + "null" or not node.value:
            raise self._refusal(node, f"{what} is empty")
        if node.tag != _TAG + "str":
            raise self._refusal(node, f"{what} is a text: put it in quotes")
        text = str(node.value)
        if not text.isprintable():
            raise self._refusal(node, f"{what} has characters that cannot be shown{hint}")
        return text

    def _refusal(self, node: yaml.Node, reason: str) -> ShardFileError:
        return ShardFileError(f"{self._name}:{_line(node)}: {reason}")


def _line(node: yaml.Node) -> int:
    """Where ``node`` begins, from 1."""
    return int(node.start_mark.line) + 1


def _near(text: str, known: Collection[str]) -> str:
    """What ``text`` was meant to be; empty if it is like nothing."""
    found = get_close_matches(text.lower(), known, n=1, cutoff=0.7)
    return found[0] if found else ""
