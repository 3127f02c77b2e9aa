"""A client that does not read, over a socket: what flow control, outbox and hub make of it."""

import asyncio
import threading
import time
from collections.abc import Iterator

import grpc
import pytest

from kvstore.config import WatchConfig
from kvstore.kv import prefix_end
from kvstore.pb import rpc_pb2 as pb
from kvstore.rpc.watch import WatchService
from kvstore.transport.api import HttpRequest, HttpResponse
from kvstore.transport.server import Server
from kvstore.watch_groups import State
from tests.transport.limits import TEST_LIMITS
from tests.transport.peer import PATIENCE
from tests.transport.running import bound, eventually
from tests.watch_world import World

REVISIONS = 1_500
VALUE = bytes(10_000)


def nothing(_request: HttpRequest) -> HttpResponse:
    """HTTP/1.1 is not served here."""
    return HttpResponse(404, [], b"")


class Reader:
    """A client in a thread: it reads the first response, then nothing until ``go_on``."""

    def __init__(self, port: int) -> None:
        self.created = threading.Event()
        self.go_on = threading.Event()
        self.revisions: list[int] = []
        self._done = threading.Event()
        self._port = port

    def work(self) -> None:
        """Watch until every revision has come."""
        with grpc.insecure_channel(f"127.0.0.1:{self._port}") as channel:
            method = channel.stream_stream(
                "/etcdserverpb.Watch/Watch",
                request_serializer=pb.WatchRequest.SerializeToString,
                response_deserializer=pb.WatchResponse.FromString,
            )
            call = method(self._requests(), timeout=PATIENCE)
            next(call)
            self.created.set()
            assert self.go_on.wait(PATIENCE)
            for response in call:
                self.revisions += [event.kv.mod_revision for event in response.events]
                if len(self.revisions) >= REVISIONS:
                    break
            self._done.set()
            call.cancel()

    def _requests(self) -> Iterator[pb.WatchRequest]:
        create = pb.WatchCreateRequest(key=b"a", range_end=prefix_end(b"a"))
        yield pb.WatchRequest(create_request=create)
        self._done.wait(PATIENCE)


@pytest.mark.slow
async def test_unread_stream() -> None:
    """Its outbox stays bounded while megabytes are written; when it reads on, it gets them all."""
    world = World(config=WatchConfig(), cache_bytes_max=1 << 30)
    failures: list[str] = []
    server = Server(
        methods=WatchService(world.hub).methods(),
        http_handler=nothing,
        limits=TEST_LIMITS,
        clock=time.monotonic,
        wall=time.time,
        on_failure=lambda what, error: failures.append(f"{what}: {error!r}"),
    )
    sock = bound()
    reader = Reader(sock.getsockname()[1])
    server.listen(sock)

    def settled(*, synced: int) -> bool:
        world.settle()
        return world.hub.count[State.SYNCED] == synced

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.to_thread(reader.work))
            await eventually(reader.created.is_set)
            for n in range(REVISIONS):
                world.put(b"a%d" % n, VALUE)
                world.settle()
                await asyncio.sleep(0)
            await eventually(lambda: settled(synced=0))
            assert world.hub.count[State.BLOCKED] == 1
            most = world.config.outbox_bytes_max + world.config.response_bytes + len(VALUE)
            assert server.stats().output_bytes < most
            reader.go_on.set()
            await eventually(lambda: settled(synced=1))
            await eventually(lambda: settled(synced=0))
    finally:
        await server.drain(0.0, message="server stopped")
    assert reader.revisions == list(range(2, REVISIONS + 2))
    assert not world.hub.streams
    assert not failures
