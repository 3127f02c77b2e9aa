"""A server that does nothing: what the generator can do when nobody holds it up.

``python -m bench.null_server`` prints its port and answers every unary call with an empty Txn that
succeeded, as soon as the call's last frame is there.
"""

import asyncio
import sys
from typing import cast

import uvloop

from kvstore.pb import rpc_pb2 as pb
from kvstore.transport import fields, frames, grpc

_GREETING = frames.settings(
    [
        (frames.HEADER_TABLE_SIZE, 0),
        (frames.INITIAL_WINDOW_SIZE, 1 << 30),
        (frames.MAX_FRAME_SIZE, 1 << 20),
    ]
) + frames.window_update(0, 1 << 30)
_REFILL_BYTES = 1 << 28


class NullConnection(asyncio.Protocol):
    """Answers without reading what was asked."""

    def __init__(self) -> None:
        answer = pb.TxnResponse(succeeded=True)
        answer.header.revision = 1
        message = answer.SerializeToString()
        self._head = fields.encode([(b":status", b"200"), (b"content-type", b"application/grpc")])
        self._body = grpc.prefix(len(message)) + message
        self._rest = b""
        self._consumed = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the settings."""
        transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance
        self._transport = transport
        transport.write(_GREETING)
        self._rest = b""
        self._greeted = False

    def data_received(self, data: bytes) -> None:
        """Answer every stream whose request has ended."""
        data = self._rest + data
        position = 0
        if not self._greeted:
            if len(data) < len(frames.PREFACE):
                self._rest = data
                return
            self._greeted = True
            position = len(frames.PREFACE)
        ended = []
        while len(data) - position >= frames.HEADER_BYTES:
            head, flags, stream = frames.unpack_header(data, position)
            end = position + frames.HEADER_BYTES + (head >> 8)
            if end > len(data):
                break
            kind = head & 0xFF
            if kind == frames.SETTINGS and not flags & frames.ACK:
                self._transport.write(frames.SETTINGS_ACK)
            elif kind == frames.DATA and flags & frames.END_STREAM:
                ended.append(self._answer(stream))
            self._consumed += end - position
            position = end
        self._rest = data[position:]
        if ended:
            self._transport.write(b"".join(ended))
        if self._consumed > _REFILL_BYTES:
            self._transport.write(frames.window_update(0, self._consumed))
            self._consumed = 0

    def _answer(self, stream: int) -> bytes:
        last = frames.END_STREAM | frames.END_HEADERS
        return (
            frames.frame(frames.HEADERS, frames.END_HEADERS, stream, self._head)
            + frames.frame(frames.DATA, 0, stream, self._body)
            + frames.frame(frames.HEADERS, last, stream, grpc.TRAILER_BLOCK_OK)
        )


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(NullConnection, "127.0.0.1", 0)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await loop.run_in_executor(None, sys.stdin.read)  # until who started it lets go


if __name__ == "__main__":
    uvloop.run(_serve())
