"""A whole server in the test's own event loop, over memory instead of a database."""

import asyncio
import io
import json
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from backends.memory import MemoryBackend, MemoryDisk
from kvstore.assembly import Assembly, assemble
from kvstore.backend import Backend
from kvstore.clock import Clock, ManualClock, SystemClock
from kvstore.config import Config
from kvstore.front import bind_all
from kvstore.listen import parse_urls
from kvstore.logs import LogFormat, make_logger
from kvstore.opening import open_shards
from kvstore.options import ServeOptions, TransportKind
from kvstore.pb import rpc_pb2 as pb
from kvstore.server import Failures, Server
from kvstore.shard_config import ShardConfig, one_shard
from tests.program import READY, Line
from tests.transport.peer import Peer
from tests.transport.running import eventually

PUT, RANGE, WATCH = "/etcdserverpb.KV/Put", "/etcdserverpb.KV/Range", "/etcdserverpb.Watch/Watch"
STATUS = "/etcdserverpb.Maintenance/Status"
QUICK = replace(
    Config(),
    commit=replace(Config().commit, shard_timeout=0.1, retry_interval=0.01),
    server=replace(Config().server, commit_tick_interval=0.01, stop_timeout=5.0),
)
"""Bounds that a test can wait for."""


async def assembled(
    backends: Sequence[Backend],
    shards: ShardConfig,
    config: Config = QUICK,
    *,
    clock: Clock | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Assembly:
    """The server but for its sockets, over ``backends`` that are not open yet; its time stands
    still unless there is a ``clock``.
    """
    return await assemble(
        backends,
        await open_shards(backends, shards),
        shards.shard_map(),
        config,
        name="under-test",
        client_urls=(),
        clock=clock or ManualClock(),
        random=Random(1),
        stopped=stopped,
    )


def bound() -> ServeOptions:
    """A server on free ports of its own, for clients and for metrics."""
    return ServeOptions(
        name="under-test",
        data_dir=Path("unused"),
        listen_client_urls=parse_urls("http://127.0.0.1:0"),
        advertise_client_urls=(),
        listen_metrics_urls=parse_urls("http://127.0.0.1:0"),
        tls=None,
        transport=TransportKind.NATIVE,
    )


@dataclass
class House:
    """A server, where it is, and what it said."""

    backends: Sequence[Backend]
    config: Config = QUICK
    shards: ShardConfig = field(default_factory=lambda: one_shard("memory:"))
    output: io.StringIO = field(default_factory=io.StringIO)

    def __post_init__(self) -> None:
        """Bind and build, without starting."""
        clock = SystemClock()
        log = make_logger(
            level="debug", log_format=LogFormat.JSON, clock=clock, outputs=[self.output]
        )
        options = bound()
        self.sockets = bind_all(options)
        failures = Failures(log, clock)
        self.server = Server(
            self.backends,
            self.shards,
            self.config,
            options,
            self.sockets,
            None,
            failures,
            clock=clock,
            log=log,
        )
        self.port = port_of(self.sockets.clients[0].sock)
        self.metrics_port = port_of(self.sockets.metrics[0].sock)

    @property
    def log(self) -> list[Line]:
        """Every line so far."""
        return [json.loads(line) for line in self.output.getvalue().splitlines()]

    def said(self, message: str) -> bool:
        """Was that logged?"""
        return any(line["msg"] == message for line in self.log)


def port_of(sock: socket.socket) -> int:
    """The port that a socket is bound to."""
    port = sock.getsockname()[1]
    assert isinstance(port, int)
    return port


def memory(later: Callable[[Callable[[], None]], object] | None = None) -> MemoryBackend:
    """An empty store; its steps run in later turns of the loop, or when ``later`` says."""
    return MemoryBackend(MemoryDisk(), later=later or asyncio.get_running_loop().call_soon)


@asynccontextmanager
async def living(house: House, *, exit_code: int = 0) -> AsyncIterator[House]:
    """Run a server around the test's body; it is told to stop then, and must end as expected."""
    async with asyncio.TaskGroup() as group:
        life = group.create_task(house.server.serve())
        try:
            await eventually(lambda: house.said(READY) or life.done())
            yield house
        finally:
            house.server.stop()
        assert await life == exit_code


def put(peer: Peer, key: bytes, value: bytes = b"v") -> int:
    """Send a put; gives its stream."""
    return peer.start(PUT, pb.PutRequest(key=key, value=value).SerializeToString())


async def get(peer: Peer, key: bytes) -> list[bytes]:
    """The values at ``key``: one or none."""
    answer = await peer.call(RANGE, pb.RangeRequest(key=key).SerializeToString())
    assert answer.status == (0, "")
    return [pair.value for pair in pb.RangeResponse.FromString(answer.messages[0]).kvs]


async def page(port: int, target: str) -> tuple[int, str]:
    """Status and body of one page."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"GET {target} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n"
    writer.write(head.encode())
    answer = (await reader.read()).decode()
    writer.close()
    await writer.wait_closed()
    top, _, body = answer.partition("\r\n\r\n")
    return int(top.split()[1]), body
