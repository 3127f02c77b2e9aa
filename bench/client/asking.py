"""One call at a time, awaited: for what happens before and after the load."""

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress

from bench.client import requests
from bench.client.connection import Connection
from bench.clock import now_us, wait_until
from kvstore.pb import kv_pb2
from kvstore.pb import rpc_pb2 as pb
from kvstore.transport import grpc

TIMEOUT = 10.0
CALL_TIMEOUT_US = 60_000_000
DELETE_RANGE = b"/etcdserverpb.KV/DeleteRange"
LEASE_REVOKE = b"/etcdserverpb.Lease/LeaseRevoke"
NOT_FOUND = 5
_PAGE = 5000


class AskError(Exception):
    """A call ended with an error, or there is no etcd to call; ``code`` is gRPC's or -1."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


def reason(error: OSError) -> str:
    """What went wrong, in the system's words alone: ``connection refused``."""
    if error.errno is None:
        return str(error) or "no answer"
    known = os.strerror(error.errno) if error.errno > 0 else error.strerror or str(error)
    return known[:1].lower() + known[1:]


class _Ending:
    """A ``Sink`` that tells how a stream ended."""

    def __init__(self, over: "asyncio.Future[tuple[int, str]]") -> None:
        self._over = over

    def message(self, _message: bytes, _received_us: int) -> None:
        """Of no interest."""

    def ended(self, code: int, text: str) -> None:
        """The stream is over."""
        if not self._over.done():
            self._over.set_result((code, text))


class Asking:
    """A connection for single calls."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._usable = asyncio.Event()
        self._lost = asyncio.Event()
        self._connection = Connection(f"{host}:{port}", self._usable.set, self._gone)

    def _gone(self) -> None:
        self._usable.set()
        self._lost.set()

    async def connect(self) -> None:
        """Raises ``AskError``: nobody listens, or who listens does not speak HTTP/2."""
        host, port = self._address
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(TIMEOUT):
                await loop.create_connection(lambda: self._connection, host, port)
                await self._usable.wait()
        except (OSError, TimeoutError) as error:
            raise AskError(-1, f"cannot be reached: {reason(error)}") from error
        if not self._connection.usable:
            raise AskError(-1, "does not speak HTTP/2")

    def close(self) -> None:
        """End the connection."""
        self._connection.close()

    async def leave(self) -> None:
        """End the connection, and wait until it has ended: closing it alone takes effect when the
        loop runs again, and a server that is stopped first waits for it.
        """
        self.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(TIMEOUT):
                await self._lost.wait()

    async def call(self, path: bytes, message: bytes) -> bytes:
        """The answer; raises ``AskError``."""
        if not self._connection.usable:
            raise AskError(14, "connection lost")
        over: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        def answered(code: int, raw: bytes, text: str) -> None:
            if over.done():
                return
            if code:
                over.set_exception(AskError(code, text))
            else:
                over.set_result(raw)

        self._connection.call(path, message, answered, CALL_TIMEOUT_US)
        try:
            async with asyncio.timeout(CALL_TIMEOUT_US / 1e6):
                return await over
        except TimeoutError as error:
            raise AskError(4, "no answer") from error

    async def version(self) -> str:
        """What the server says it is."""
        return pb.StatusResponse.FromString(await self.call(requests.STATUS, b"")).version

    async def count(self, prefix: bytes) -> tuple[int, int]:
        """How many keys have the prefix, and the revision of that answer."""
        key = prefix or b"\0"
        message = requests.read(key, requests.prefix_end(prefix), count=True)
        answer = pb.RangeResponse.FromString(await self.call(requests.RANGE, message))
        return answer.count, answer.header.revision

    async def objects(self, prefix: bytes) -> tuple[int, list[kv_pb2.KeyValue]]:
        """All keys with the prefix at one revision, and that revision."""
        start, end, revision = prefix or b"\0", requests.prefix_end(prefix), 0
        found: list[kv_pb2.KeyValue] = []
        while True:
            message = requests.read(start, end, limit=_PAGE, revision=revision)
            answer = pb.RangeResponse.FromString(await self.call(requests.RANGE, message))
            revision = revision or answer.header.revision
            found.extend(answer.kvs)
            if len(answer.kvs) >= answer.count or not answer.kvs:
                return revision, found
            start = answer.kvs[-1].key + b"\0"

    async def has_range_stream(self, key: bytes) -> bool:
        """Does the server answer RangeStream with anything but UNIMPLEMENTED?

        Raises ``AskError`` if it does not answer.
        """
        over: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()
        message = requests.read(key, limit=1)
        self._connection.open(requests.RANGE_STREAM, message, _Ending(over), end=True)
        try:
            async with asyncio.timeout(TIMEOUT):
                code, text = await over
        except TimeoutError as error:
            raise AskError(4, "no answer to RangeStream") from error
        if code == grpc.UNAVAILABLE:
            raise AskError(code, text)
        return code != grpc.UNIMPLEMENTED

    async def delete(self, prefix: bytes) -> None:
        """Delete all keys with the prefix."""
        end = requests.prefix_end(prefix)
        message = pb.DeleteRangeRequest(key=prefix, range_end=end).SerializeToString()
        await self.call(DELETE_RANGE, message)

    async def revoke(self, lease: int) -> None:
        """End a lease, if it has not ended yet."""
        message = pb.LeaseRevokeRequest(ID=lease).SerializeToString()
        try:
            await self.call(LEASE_REVOKE, message)
        except AskError as error:
            if error.code != NOT_FOUND:
                raise


async def reach(
    host: str, port: int, seconds: float, hopeful: Callable[[], bool] = lambda: True
) -> Asking:
    """A connection as soon as the server answers Status.

    Raises ``AskError`` after that time, or when there is no hope left.
    """
    end_us = now_us() + int(seconds * 1e6)
    while True:
        asking = Asking(host, port)
        try:
            await asking.connect()
            await asking.version()
        except AskError:
            asking.close()
            if now_us() >= end_us or not hopeful():
                raise
            await wait_until(now_us() + 50_000)
        else:
            return asking
