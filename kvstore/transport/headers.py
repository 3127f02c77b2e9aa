"""What a request's header block says, and how most blocks are understood without being read.

A peer that has taken our SETTINGS_HEADER_TABLE_SIZE = 0 sends the same bytes for the same fields.
Yet nearly every block of a client with deadlines differs, by its ``grpc-timeout`` alone.
So a block is remembered as a **template**: the bytes before and after the value literal of
``grpc-timeout``, which of all the rest leaves nothing unknown.
A block matches if it starts with the one, ends with the other, and what is between is exactly one
string literal (its own length says so, nothing can hide in it).
Templates belong to one connection, are few and small, and the last used is tried first.

A block without ``grpc-timeout`` has itself as prefix and an empty suffix, and is compared whole.

A timeout stays the literal that it came as until somebody asks for the deadline: a call that is
answered at once never has one, and clients with deadlines of seconds send a different value nearly
every time. A literal found by a template has the right length, and nothing else depends on it; if
it turns out to be no timeout, the call has none (in a block that is decoded, it is refused).

Rules for fields: RFC 9113 section 8; refusals are those of grpc-go's ``http2_server.go``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvstore.transport import fields, grpc, huffman
from kvstore.transport.api import Kind, Method, StreamHandler, UnaryHandler

_TIMEOUT = b"grpc-timeout"
_HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade")
)
_PSEUDO = frozenset((b":method", b":scheme", b":path", b":authority"))
_RESERVED = frozenset((b"te", b"content-type", b"grpc-encoding", b"grpc-timeout"))
_NAME_BYTES = frozenset(b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz")
_NOT_IN_VALUES = (0, 10, 13)

_LITERAL_BYTES_MAX = 12
"""A timeout is up to nine bytes, no more when coded; and a byte for its length."""


_LENGTH_DIGITS_MAX = 19
"""No message is as long as a number of more digits says."""


class MalformedError(ValueError):
    """A request that breaks HTTP/2's rules: its stream is reset with PROTOCOL_ERROR."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that is known from the headers alone."""

    code: int
    message: str
    http_status: int = 200


@dataclass(slots=True, eq=False)
class Route:
    """A method being served, and what has happened to it so far."""

    path: bytes
    kind: Kind
    unary: UnaryHandler | None
    stream: StreamHandler | None
    started: int = 0
    """Calls, those included that were refused before they reached the handler."""
    messages_received: int = 0
    messages_sent: int = 0


NOWHERE = Route(b"", Kind.UNARY, None, None)
"""Route of requests that are refused."""


@dataclass(frozen=True, slots=True)
class Head:
    """A request's headers, understood; shared by all calls with the same block but for timeout."""

    refusal: Refusal | None
    route: Route = NOWHERE
    metadata: Mapping[bytes, bytes] = field(default_factory=dict)
    timed: bool = False
    """The block has a ``grpc-timeout``."""
    content_length: int | None = None
    """What all DATA must add up to (RFC 9113 section 8.1.1); gRPC's clients do not send it."""
    page: Mapping[bytes, bytes] | None = None
    """All fields of a request that is not gRPC's, for ``pages``; ``route`` is then NOWHERE."""
    size: int = 0
    """Bytes of all fields."""


TOO_LARGE = Refusal(grpc.RESOURCE_EXHAUSTED, "grpc: header list larger than max", 431)


@dataclass(frozen=True, slots=True)
class Routes:
    """The methods of a server by path."""

    by_path: Mapping[bytes, Route]
    services: frozenset[bytes] = field(default_factory=frozenset)

    @classmethod
    def of(cls, methods: "list[Method] | tuple[Method, ...]") -> "Routes":
        """The routes to ``methods``; a path given twice is a mistake of the caller."""
        by_path: dict[bytes, Route] = {}
        for method in methods:
            assert method.path not in by_path, f"{method.path!r} is given twice"
            by_path[method.path] = _route(method)
        return cls(by_path, frozenset(path.rpartition(b"/")[0][1:] for path in by_path))

    def refusal(self, path: bytes) -> Refusal:
        """Why nothing is served at ``path``, in grpc-go's words."""
        service, slash, name = path[1:].rpartition(b"/")
        if path[:1] != b"/" or not slash:
            return Refusal(grpc.UNIMPLEMENTED, f"malformed method name: {grpc.quote(path)}")
        text = service[: grpc.STATUS_TEXT_BYTES_MAX].decode("utf-8", "replace")
        if service in self.services:
            method = name[: grpc.STATUS_TEXT_BYTES_MAX].decode("utf-8", "replace")
            return Refusal(grpc.UNIMPLEMENTED, f"unknown method {method} for service {text}")
        return Refusal(grpc.UNIMPLEMENTED, f"unknown service {text}")


def _route(method: Method) -> Route:
    if method.kind is Kind.UNARY:
        return Route(method.path, method.kind, method.handler, None)  # type: ignore[arg-type]
    return Route(method.path, method.kind, None, method.handler)  # type: ignore[arg-type]


def seconds_of(literal: bytes) -> float | None:
    """Seconds of a ``grpc-timeout`` by its coded literal; None if it is none."""
    try:
        raw = huffman.decode(literal[1:]) if literal[0] & 0x80 else literal[1:]
        return grpc.parse_timeout(raw)
    except ValueError:
        return None


def check(pairs: list[fields.Field]) -> dict[bytes, bytes]:
    """The fields of a request by name, repeated ones joined with a comma.

    Raises ``MalformedError`` (RFC 9113 sections 8.2 and 8.3).
    """
    found: dict[bytes, bytes] = {}
    regular = False
    for name, value in pairs:
        if name[:1] == b":":
            if regular or name in found or name not in _PSEUDO:
                raise MalformedError(f"pseudo-header {name!r} where or when it must not be")
        else:
            regular = True
            if not name or not _NAME_BYTES.issuperset(name) or name in _HOP_BY_HOP:
                raise MalformedError(f"field name {name!r}")
        if any(byte in value for byte in _NOT_IN_VALUES) or value.strip(b" \t") != value:
            raise MalformedError(f"value of {name!r}")
        found[name] = found[name] + b"," + value if name in found else value
    if found.get(b"te", b"trailers") != b"trailers":
        raise MalformedError("te is not trailers")
    if not found.get(b":path") or b":method" not in found or b":scheme" not in found:
        raise MalformedError("a pseudo-header is missing")
    return found


def check_trailers(pairs: list[fields.Field]) -> None:
    """Raises ``MalformedError`` for trailers that break the rules (RFC 9113 section 8.1)."""
    for name, _ in pairs:
        if not name or not _NAME_BYTES.issuperset(name):
            raise MalformedError(f"field name {name!r} in trailers")


def _content_type_ok(value: bytes) -> bool:
    """Is it ``application/grpc``, alone or before ``+`` or ``;``."""
    return value[:16] == b"application/grpc" and value[16:17] in (b"", b"+", b";")


def understand(pairs: list[fields.Field], routes: Routes) -> tuple[Head, bytes | None]:
    """A request's headers and the literal of its timeout; raises ``MalformedError``."""
    found = check(pairs)
    length = found.get(b"content-length")
    if length is not None and not (length.isdigit() and len(length) < _LENGTH_DIGITS_MAX):
        raise MalformedError("content-length")
    content = None if length is None else int(length)
    size = sum(len(name) + len(value) for name, value in pairs)
    if found[b":method"] != b"POST" and not _content_type_ok(found.get(b"content-type", b"")):
        return Head(
            None, timed=_TIMEOUT in found, content_length=content, page=found, size=size
        ), None
    timeout: float | None = None
    refusal: Refusal | None = None
    raw_timeout = found.get(_TIMEOUT)
    try:
        if raw_timeout is not None:
            timeout = grpc.parse_timeout(raw_timeout)
    except ValueError as error:
        refusal = Refusal(grpc.INTERNAL, f"malformed grpc-timeout: {error}", 400)
    metadata: dict[bytes, bytes] = {}
    for name, value in found.items():
        if name in _RESERVED or name[:1] == b":":
            continue
        try:
            metadata[name] = grpc.decode_binary(value) if name.endswith(b"-bin") else value
        except ValueError as error:
            text = f"malformed binary metadata {grpc.quote(value)} in header {grpc.quote(name)}"
            refusal = Refusal(grpc.INTERNAL, f"{text}: {error}", 400)
    authority = found.get(b":authority")
    if authority is not None:
        metadata[b":authority"] = authority
    refusal = _refuse_protocol(found) or refusal or _refuse_call(found, timeout)
    route = routes.by_path.get(found[b":path"], NOWHERE)
    if refusal is None and route is NOWHERE:
        refusal = routes.refusal(found[b":path"])
    head = Head(
        refusal,
        route,
        metadata,
        timed=raw_timeout is not None,
        content_length=content,
        size=size,
    )
    if raw_timeout is None or refusal is not None:
        return head, None
    return head, fields.encode_integer(len(raw_timeout), 7) + raw_timeout


def _refuse_protocol(found: Mapping[bytes, bytes]) -> Refusal | None:
    """A request that is not gRPC at all."""
    hosts = found.get(b"host", b"").count(b",") + (b"host" in found)
    if hosts > 1:
        text = (
            f"num values of :authority: {int(b':authority' in found)}, num values of host: {hosts},"
            " both must only have 1 value as per HTTP/2 spec"
        )
        return Refusal(grpc.INTERNAL, text, 400)
    kind = found.get(b"content-type", b"")
    if not _content_type_ok(kind):
        text = f"invalid gRPC request content-type {grpc.quote(kind)}"
        return Refusal(grpc.INVALID_ARGUMENT, text, 415)
    return None


def _refuse_call(found: Mapping[bytes, bytes], timeout: float | None) -> Refusal | None:
    """A gRPC request that cannot be served, whatever its path."""
    method = found[b":method"]
    if method != b"POST":
        text = f"Received a HEADERS frame with :method {grpc.quote(method)} which should be POST"
        return Refusal(grpc.INTERNAL, text, 405)
    if timeout is not None and timeout <= 0:
        return Refusal(grpc.DEADLINE_EXCEEDED, "context deadline exceeded")
    encoding = found.get(b"grpc-encoding", b"")
    if encoding not in (b"", b"identity"):
        text = f"grpc: Decompressor is not installed for grpc-encoding {grpc.quote(encoding)}"
        return Refusal(grpc.UNIMPLEMENTED, text)
    return None


Template = tuple[bytes, bytes | None, int, int, Head]
"""Prefix, suffix (None without a timeout), their lengths, and what the block says."""


class Templates:
    """The blocks of one connection that are known; at most ``count_max`` of ``bytes_max`` each."""

    __slots__ = ("_bytes_max", "_count_max", "known")

    def __init__(self, *, count_max: int, bytes_max: int) -> None:
        self._count_max = count_max
        self._bytes_max = bytes_max
        self.known: list[Template] = []
        """The last used is the first."""

    def find(self, block: bytes) -> tuple[Head, bytes | None] | None:
        """Headers and timeout's literal of a known block, or None."""
        for template in self.known:
            before, after, start, tail, head = template
            if not block.startswith(before):
                continue
            literal = None
            if after is not None:
                if not block.endswith(after):
                    continue
                literal = block[start : len(block) - tail]
                size = len(literal)
                if not 1 < size <= _LITERAL_BYTES_MAX or size != (literal[0] & 127) + 1:
                    continue
            elif len(block) != start:
                continue
            if template is not self.known[0]:
                self.known.remove(template)
                self.known.insert(0, template)
            return head, literal
        return None

    def learn(self, block: bytes, span: tuple[int, int] | None, head: Head) -> None:
        """Remember a block that was read and not refused; ``span`` is that of its timeout."""
        if len(block) > self._bytes_max or head.timed != (span is not None):
            return
        if span is None:
            template: Template = (block, None, len(block), 0, head)
        else:
            start, end = span
            template = (block[:start], block[end:], start, len(block) - end, head)
        self.known.insert(0, template)
        del self.known[self._count_max :]
