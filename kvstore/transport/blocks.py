"""Header blocks of one connection, from frames to understood requests.

Until the peer acknowledges our SETTINGS (HEADER_TABLE_SIZE = 0) its blocks may refer to a dynamic
table, and only the ``hpack`` library reads them.
The acknowledgement empties that table (RFC 9113 section 4.3.1, RFC 7541 section 4.2): from then on
blocks mean the same whenever they come, the library's state is dropped, and ``fields`` and
``Templates`` read them; an index into a dynamic table is then a COMPRESSION_ERROR.
The size update that must open the first block after the acknowledgement is taken when it comes, but
not insisted upon: some clients that never use a table do not announce that they stop using it.
"""

import hpack

from kvstore.transport import fields, frames
from kvstore.transport.frames import ConnectionFault, StreamFault
from kvstore.transport.headers import (
    TOO_LARGE,
    Head,
    MalformedError,
    Routes,
    Templates,
    check_trailers,
    understand,
)
from kvstore.transport.limits import Limits
from kvstore.transport.output import Totals


class Blocks:
    """Reads the header blocks of one connection."""

    __slots__ = (
        "_hpack",
        "_limits",
        "_parts",
        "_routes",
        "_totals",
        "open_flags",
        "open_stream",
        "templates",
    )

    def __init__(self, limits: Limits, routes: Routes, totals: Totals) -> None:
        self._limits = limits
        self._routes = routes
        self._totals = totals
        self._hpack: hpack.Decoder | None = hpack.Decoder(limits.header_bytes_max)
        self.templates = Templates(
            count_max=limits.templates_max, bytes_max=limits.template_bytes_max
        )
        self.open_stream = 0
        """The stream whose block is not finished; only its CONTINUATION frames may follow."""
        self.open_flags = 0
        self._parts: list[bytes] = []

    def settings_acknowledged(self) -> None:
        """The peer has no dynamic table any more."""
        self._hpack = None

    def begin(self, stream: int, flags: int, part: bytes) -> None:
        """The first part of a block that goes on in CONTINUATION frames."""
        self.open_stream = stream
        self.open_flags = flags
        self._parts = [part]
        self._totals.request_bytes += len(part)

    def go_on(self, part: bytes) -> None:
        """A further part; raises ``ConnectionFault`` when there are too many or too large ones."""
        parts = self._parts
        parts.append(part)
        self._totals.request_bytes += len(part)
        if len(parts) > self._limits.continuations_max + 1:
            raise ConnectionFault(frames.ENHANCE_YOUR_CALM, "too_many_continuations")
        if sum(map(len, parts)) > 4 * self._limits.header_bytes_max:
            raise ConnectionFault(frames.ENHANCE_YOUR_CALM, "header_block_too_large")

    def end(self) -> bytes:
        """The whole block."""
        block = b"".join(self._parts)
        self._totals.request_bytes -= len(block)
        self.open_stream = 0
        self._parts = []
        return block

    def close(self) -> None:
        """Nothing more will come."""
        if self.open_stream:
            self.end()

    def request(self, block: bytes) -> tuple[Head, bytes | None]:
        """What a request's block says, with the literal of its timeout.

        Raises ``ConnectionFault`` if it cannot be read, ``StreamFault`` if it breaks the rules.
        """
        found = self.templates.find(block)
        if found is not None:
            return found
        try:
            pairs, span = self._read(block)
            head, timeout = understand(pairs, self._routes)
        except fields.FieldsTooLargeError:
            return Head(TOO_LARGE), None
        except MalformedError as error:
            raise StreamFault(frames.PROTOCOL_ERROR, str(error)) from error
        if self._hpack is None and head.refusal is None and head.content_length is None:
            self.templates.learn(block, span, head)
        return head, timeout

    def trailers(self, block: bytes) -> None:
        """Read a request's trailers, which gRPC has no use for; raises as ``request``."""
        try:
            check_trailers(self._read(block)[0])
        except (fields.FieldsTooLargeError, MalformedError) as error:
            raise StreamFault(frames.PROTOCOL_ERROR, str(error)) from error

    def skip(self, block: bytes) -> None:
        """Read a block only for what it does to the dynamic table."""
        if self._hpack is not None:
            self._read(block)

    def _read(self, block: bytes) -> tuple[list[fields.Field], tuple[int, int] | None]:
        limits = self._limits
        if self._hpack is None:
            try:
                return fields.decode(
                    block,
                    count_max=limits.header_count_max,
                    bytes_max=limits.header_bytes_max,
                    locate=b"grpc-timeout",
                )
            except fields.CompressionError as error:
                raise ConnectionFault(frames.COMPRESSION_ERROR, str(error)) from error
        try:
            pairs = [(name, value) for name, value in self._hpack.decode(block, raw=True)]
        except hpack.OversizedHeaderListError as error:
            # The rest of the block was not read: the table is not what the peer thinks it is.
            raise ConnectionFault(frames.ENHANCE_YOUR_CALM, "header_list_too_large") from error
        except hpack.HPACKError as error:
            raise ConnectionFault(frames.COMPRESSION_ERROR, str(error)) from error
        if len(pairs) > limits.header_count_max:
            raise fields.FieldsTooLargeError("too many fields")
        return pairs, None
