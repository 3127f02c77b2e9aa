"""What the generator can do: calls against a server that does nothing.

If a target's rate comes near this, it was the generator that was measured.
"""

import asyncio
import resource
import sys
from typing import NamedTuple

from bench.client import requests
from bench.client.connection import Connection
from bench.clock import now_us, wait_until
from bench.values import value
from kvstore.pb import rpc_pb2 as pb

IN_FLIGHT = 64
SECONDS = 2.0


class Ceiling(NamedTuple):
    """Calls a second and the CPU of each, of one generator process."""

    per_second: float
    cpu_us_per_call: float


async def measure(seconds: float = SECONDS) -> Ceiling:
    """Send updates of 1 KiB in a closed loop against a null server."""
    null = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.null_server"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C is the command's to handle
    )
    assert null.stdin is not None
    assert null.stdout is not None
    try:
        return await _measure(int(await null.stdout.readline()), seconds)
    finally:
        null.stdin.close()
        await null.wait()


async def _measure(port: int, seconds: float) -> Ceiling:
    usable = asyncio.Event()
    connection = Connection("null", usable.set, usable.set)
    loop = asyncio.get_running_loop()
    await loop.create_connection(lambda: connection, "127.0.0.1", port)
    await usable.wait()
    done = 0
    end_us = now_us() + int(seconds * 1e6)

    def send() -> None:
        raw = value(run="ceiling", actor=1, seq=done, shape="pod", size=1024)
        message = requests.update(b"/registry/pods/tenant-000/null", raw, 1)
        connection.call(requests.TXN, message, answered, 10_000_000)

    def answered(code: int, message: bytes, text: str) -> None:
        nonlocal done
        assert code == 0, text
        assert pb.TxnResponse.FromString(message).succeeded
        done += 1
        if connection.received_us < end_us:
            send()

    before = resource.getrusage(resource.RUSAGE_SELF)
    begun_us = now_us()
    for _ in range(IN_FLIGHT):
        send()
    while connection.calls:
        await wait_until(now_us() + 20_000)
    elapsed_us = now_us() - begun_us
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    connection.close()
    return Ceiling(done * 1e6 / elapsed_us, cpu * 1e6 / done)
