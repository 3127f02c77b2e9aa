"""``kvstore-bench record``: keep what clients and an etcd say to each other.

What is in the store when the recording begins is kept first, so that a replay can begin with it.
"""

import asyncio
import secrets
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from bench.client import requests
from bench.client.asking import AskError, Asking, reason
from bench.clock import now_us, wall_seconds
from bench.replay.proxy import Address, Book, Proxy
from bench.replay.scrub import Scrubber
from bench.replay.trace import (
    FORMAT,
    VERSION,
    About,
    Kind,
    Row,
    Summary,
    TraceError,
    TraceWriter,
)
from kvstore.pb import rpc_pb2 as pb

PAGE = 500
"""Objects in a page of those that were there."""
GRACE = 5.0
"""Seconds that calls have to finish when the recording ends."""


def parse_address(text: str) -> Address:
    """``HOST:PORT``, with ``http://`` before it or not; raises ``TraceError``."""
    try:
        parts = urlsplit(text if "//" in text else f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise TraceError(f"{text}: {error}") from error
    if not host or port is None or parts.scheme not in ("", "http"):
        raise TraceError(f"{text}: HOST:PORT is wanted")
    return Address(host, port)


async def record(
    *,
    listen: str,
    upstream: str,
    out: Path,
    scrub: bool,
    stop: asyncio.Event,
    ready: Callable[[str], None],
) -> Summary:
    """Record until ``stop`` is set; ``ready`` is told where clients may connect.

    Raises ``TraceError``: without a file when the upstream is not there, ``listen`` or ``out``
    cannot be had, nobody made a call, or the file cannot be written to its end; with a complete one
    when the upstream goes away meanwhile.
    Cancelled once ``stop`` is set, it cuts off the calls that it waits for, and returns.
    """
    source, place = parse_address(upstream), parse_address(listen)
    try:
        sock = socket.create_server(place)
    except OSError as error:
        raise TraceError(f"--listen {place}: {reason(error)}") from error
    scrubber = Scrubber(secrets.token_bytes(32)) if scrub else None
    zero_us = now_us()
    with sock:
        writer = await _begin(source, out, scrubber, zero_us)
        sock.setblocking(False)
        complaints: list[str] = []
        ended = asyncio.Event()

        def failed(text: str) -> None:
            complaints.append(text)
            ended.set()

        book = Book(writer, scrubber, zero_us, failed)
        async with asyncio.TaskGroup() as group:
            proxy = Proxy(book, source, group, failed)
            proxy.listen(sock)
            ready(str(Address(*sock.getsockname()[:2])))
            stopping = group.create_task(_pass_on(stop, ended))
            await ended.wait()
            stopping.cancel()
            await _end(proxy, stop)
    if not book.calls:
        writer.discard()
        why = "; ".join((*complaints, "no client made a call"))
        raise TraceError(f"nothing was recorded, and {out} was not written: {why}")
    summary = Summary(
        calls=book.calls,
        connections=book.connections,
        rows=writer.rows,
        duration_us=now_us() - zero_us,
        error=complaints[0] if complaints else "",
    )
    try:
        writer.close(summary)
    except TraceError as error:
        lines = dict.fromkeys((*complaints[:1], str(error)))
        raise TraceError(f"{'; '.join(lines)}; nothing is kept") from error
    if complaints:
        raise TraceError(f"{complaints[0]}; {out} holds what was recorded until then")
    return summary


async def _end(proxy: Proxy, stop: asyncio.Event) -> None:
    """Let calls finish; who does not want to wait for them cancels, and keeps the recording."""
    try:
        await proxy.end(GRACE)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if not stop.is_set() or task is None:
            raise
        task.uncancel()
        await proxy.end(0.0)


async def _pass_on(stop: asyncio.Event, ended: asyncio.Event) -> None:
    await stop.wait()
    ended.set()


async def _begin(
    source: Address, out: Path, scrubber: Scrubber | None, zero_us: int
) -> TraceWriter:
    """The file, with what there is already."""
    asking = Asking(*source)
    try:
        await asking.connect()
        version = await asking.version()
        _, revision = await asking.count(b"")
        about = About(
            format=FORMAT,
            version=VERSION,
            started=datetime.fromtimestamp(wall_seconds(), UTC).isoformat(timespec="seconds"),
            upstream=version,
            revision=revision,
            scrubbed=scrubber is not None,
        )
        writer = TraceWriter(out, about)
        try:
            await _keep_objects(asking, revision, writer, scrubber, zero_us)
        except BaseException:
            writer.discard()
            raise
    except AskError as error:
        raise TraceError(f"the upstream {source} {error.text}") from error
    finally:
        asking.close()
    return writer


async def _keep_objects(
    asking: Asking, revision: int, writer: TraceWriter, scrubber: Scrubber | None, zero_us: int
) -> None:
    """Everything that there is at a revision, page by page."""
    start = b"\0"
    while True:
        page = requests.read(start, b"\0", limit=PAGE, revision=revision)
        raw = await asking.call(requests.RANGE, page)
        answer = pb.RangeResponse.FromString(raw)
        if answer.kvs:
            kept = raw if scrubber is None else scrubber.message(pb.RangeResponse, raw)
            writer.add(Row(now_us() - zero_us, Kind.OBJECTS, -1, -1, message=kept))
            start = answer.kvs[-1].key + b"\0"
        if not answer.more:
            return
