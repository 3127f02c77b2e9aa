"""A server, a recording proxy before it, and clients of either, in the test's own event loop."""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

import grpc
import grpc.aio

from bench.replay.record import record
from bench.replay.trace import FORMAT, VERSION, About, Kind, Row, Summary, Trace
from kvstore.pb import rpc_pb2 as pb
from tests.house import House, living, memory

KV, LEASE = "/etcdserverpb.KV", "/etcdserverpb.Lease"
ABOUT = About(
    format=FORMAT, version=VERSION, started="", upstream="3.6.0", revision=1, scrubbed=False
)
SUMMARY = Summary(calls=0, connections=0, rows=0, duration_us=0, error="")
WATCH, KEEP_ALIVE = "/etcdserverpb.Watch/Watch", f"{LEASE}/LeaseKeepAlive"


@dataclass
class Stand:
    """A recording that is under way."""

    house: House
    out: Path
    stop: asyncio.Event
    port: int = 0
    """Of the proxy."""
    summary: Summary | None = None
    rows: list[Row] = field(default_factory=list)
    """When it has ended."""

    def of(self, call: int) -> list[Row]:
        """What happened of one call."""
        return [row for row in self.rows if row.call == call]

    def calls(self, name: str) -> list[Row]:
        """Beginnings of the calls of one method."""
        return [
            row
            for row in self.rows
            if row.kind == Kind.BEGIN and row.path.decode().endswith(f"/{name}")
        ]


def create(key: bytes, value: bytes, lease: int = 0) -> bytes:
    """kube-apiserver's Txn for an object that must not exist."""
    return _txn(key, 0, pb.RequestOp(request_put=pb.PutRequest(key=key, value=value, lease=lease)))


def update(key: bytes, value: bytes, revision: int) -> bytes:
    """kube-apiserver's Txn for one last seen at a revision."""
    put = pb.RequestOp(request_put=pb.PutRequest(key=key, value=value))
    return _txn(key, revision, put)


def delete(key: bytes, revision: int) -> bytes:
    """Likewise, to delete it."""
    deletion = pb.DeleteRangeRequest(key=key)
    return _txn(key, revision, pb.RequestOp(request_delete_range=deletion))


def _txn(key: bytes, revision: int, then: pb.RequestOp) -> bytes:
    compare = pb.Compare(target=pb.Compare.MOD, key=key, mod_revision=revision)
    read = pb.RequestOp(request_range=pb.RangeRequest(key=key))
    txn = pb.TxnRequest(compare=[compare], success=[then], failure=[read])
    return txn.SerializeToString()


class Streaming(Protocol):
    """grpcio's stream of bytes both ways, as far as it is used here."""

    async def write(self, message: bytes, /) -> None:
        """Send one."""

    async def read(self) -> bytes:
        """The next one, or ``EOF``."""

    async def done_writing(self) -> None:
        """No more is sent."""

    async def code(self) -> grpc.StatusCode:
        """How it ended."""

    def cancel(self) -> bool:
        """Give it up."""


class Client:
    """A real gRPC client with one connection."""

    def __init__(self, port: int) -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options)

    async def call(self, path: str, message: bytes, *metadata: tuple[str, str]) -> bytes:
        """One unary call of bytes."""
        method: Callable[..., Awaitable[bytes]] = self._channel.unary_unary(path)
        return await method(message, timeout=20, metadata=metadata)

    async def txn(self, message: bytes) -> pb.TxnResponse:
        """One Txn."""
        return pb.TxnResponse.FromString(await self.call(f"{KV}/Txn", message))

    async def range(self, request: pb.RangeRequest) -> pb.RangeResponse:
        """One Range."""
        raw = await self.call(f"{KV}/Range", request.SerializeToString())
        return pb.RangeResponse.FromString(raw)

    async def grant(self, ttl: int) -> int:
        """A lease; gives its id."""
        wish = pb.LeaseGrantRequest(TTL=ttl).SerializeToString()
        return pb.LeaseGrantResponse.FromString(await self.call(f"{LEASE}/LeaseGrant", wish)).ID

    def stream(self, path: str) -> Streaming:
        """A stream of bytes both ways."""
        return cast("Streaming", self._channel.stream_stream(path)())

    def answers(self, path: str, message: bytes) -> AsyncIterable[bytes]:
        """A stream of answers to one request."""
        method: Callable[..., AsyncIterable[bytes]] = self._channel.unary_stream(path)
        return method(message, timeout=20)

    async def close(self) -> None:
        """End the connection."""
        await self._channel.close()


@asynccontextmanager
async def client(port: int) -> AsyncIterator[Client]:
    """A client that goes away with the body."""
    made = Client(port)
    try:
        yield made
    finally:
        await made.close()


def watch_from(prefix: bytes, revision: int = 0) -> bytes:
    """Create a watch as kube-apiserver does."""
    end = prefix[:-1] + bytes((prefix[-1] + 1,))
    wish = pb.WatchCreateRequest(
        key=prefix, range_end=end, start_revision=revision, prev_kv=True, progress_notify=True
    )
    return pb.WatchRequest(create_request=wish).SerializeToString()


async def record_to(
    out: Path,
    upstream: str,
    stop: asyncio.Event,
    *,
    scrub: bool = False,
    told: Callable[[str], None] = lambda _: None,
) -> Summary:
    """Record on a free port."""
    return await record(
        listen="127.0.0.1:0", upstream=upstream, out=out, scrub=scrub, stop=stop, ready=told
    )


@asynccontextmanager
async def recording(
    out: Path, *, scrub: bool = False, before: Callable[[Client], Awaitable[object]] | None = None
) -> AsyncIterator[Stand]:
    """A fresh server behind a proxy; when the body ends so does the recording, and it is read."""
    async with living(House([memory()])) as house:
        if before is not None:
            async with client(house.port) as direct:
                await before(direct)
        stand = Stand(house, out, asyncio.Event())
        ready = asyncio.Event()

        def told(address: str) -> None:
            stand.port = int(address.rpartition(":")[2])
            ready.set()

        async with asyncio.TaskGroup() as group:
            upstream = f"127.0.0.1:{house.port}"
            task = group.create_task(record_to(out, upstream, stand.stop, scrub=scrub, told=told))
            await ready.wait()
            yield stand
            stand.stop.set()
            stand.summary = await task
        stand.rows = list(Trace(out))
