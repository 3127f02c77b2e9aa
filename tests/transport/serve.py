"""The server under attack, as a process of its own: ``python -m tests.transport.serve OPTIONS``.

OPTIONS is a JSON object: ``limits`` replaces numbers of the test limits, ``certificate`` and
``key`` turn TLS on. The first line of output is the port; the process ends when its standard input
does. ``GET /stats`` tells what it holds.
"""

import asyncio
import gc
import json
import socket
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import psutil
import uvloop

from kvstore.transport.connection import Http2Connection
from kvstore.transport.server import Server
from kvstore.transport.tls import Tls, TlsFiles
from tests.transport.limits import TEST_LIMITS
from tests.transport.service import Service

COUNTED = (
    *("UnaryCall", "StreamCall", "Transfer", "Outbox", "Inbox", "Http2Connection", "Sniffer"),
    *("Http1Connection", "Task", "Tap"),
)


def report(server: Server, service: Service) -> bytes:
    """What the server holds, as JSON."""
    gc.collect()
    kinds = Counter(type(thing).__name__ for thing in gc.get_objects())
    stats = server.stats()._asdict()
    stats["objects"] = {kind: kinds[kind] for kind in COUNTED}
    stats["calls"] -= 1  # this one
    stats["rss"] = psutil.Process().memory_info().rss
    stats["cancelled"] = service.cancelled
    stats["templates"] = max(
        len(connection.streams.blocks.templates.known)
        for connection in server._connections
        if isinstance(connection, Http2Connection)
    )
    return json.dumps(stats).encode()


def complain(what: str, error: Exception) -> None:
    """Failures are not expected: they show in the test's output."""
    sys.stderr.write(f"{what}: {error!r}\n")


async def main() -> None:
    """Serve until standard input ends."""
    options = json.loads(sys.argv[1])
    service = Service()
    server = Server(
        methods=service.methods(),
        http_handler=service.handle_http,
        limits=replace(TEST_LIMITS, **options.get("limits", {})),
        clock=time.monotonic,
        wall=time.time,
        on_failure=complain,
    )
    service.stats = lambda: report(server, service)
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    tls = None
    if "certificate" in options:
        files = TlsFiles(certificate=Path(options["certificate"]), key=Path(options["key"]))
        tls = Tls(files, lambda _: None)
    server.listen(sock, tls=tls)
    sys.stdout.write(f"{sock.getsockname()[1]}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    await server.drain(0.0, message="stopped")


if __name__ == "__main__":
    uvloop.run(main())
