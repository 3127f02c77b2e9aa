"""The server as a program of its own: started, talked to over its socket, stopped, its log read."""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import grpc

from kvstore.pb import rpc_pb2 as pb

PATIENCE = 30.0
"""Seconds that a test waits for what must come."""
FREE_PORT = "--listen-client-urls=http://127.0.0.1:0"
READY = "ready to serve client requests"
ROOT = Path(__file__).parents[1]

Line = dict[str, object]


def environment(**extra: str) -> dict[str, str]:
    """Ours without what would change flags, and ``extra``."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("ETCD_")}
    return kept | extra


def run(*words: str, options: tuple[str, ...] = (), **extra: str) -> tuple[int, str, str]:
    """Run the command line to its end; returns exit code, stdout and stderr. A server listens on a
    free port, unless they say where.
    """
    if words[:1] == ("serve",) and not any("listen-client-urls" in word for word in words):
        words += (FREE_PORT,)
    done = subprocess.run(
        [sys.executable, *options, "-m", "kvstore", *words],
        capture_output=True,
        check=False,
        cwd=ROOT,
        env=environment(**extra),
        text=True,
        timeout=PATIENCE,
    )
    return done.returncode, done.stdout, done.stderr


class Program:
    """One running ``kvstore serve``."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.log: list[Line] = []

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.put(line)
        self._lines.put("")

    def until(self, message: str) -> Line:
        """The next log line with ``message``; it must come."""
        while text := self._lines.get(timeout=PATIENCE):
            line: Line = json.loads(text)
            self.log.append(line)
            if line["msg"] == message:
                return line
        raise AssertionError(f"{message!r} was not logged, but {self.log}")

    def finish(self) -> int:
        """Wait for the end and the rest of the log; returns the exit code."""
        code = self.process.wait(PATIENCE)
        while text := self._lines.get(timeout=PATIENCE):
            self.log.append(json.loads(text))
        return code

    def stop(self) -> int:
        """Ask it to stop, and wait."""
        self.process.send_signal(signal.SIGTERM)
        return self.finish()


@contextmanager
def serving(data: Path, *flags: str, **extra: str) -> Iterator[Program]:
    """Serve from ``data`` on a free port, or where ``flags`` say; ready on entry."""
    words = ["serve", "--data-dir", str(data)]
    if not any("listen-client-urls" in flag for flag in flags):
        words.append(FREE_PORT)
    with subprocess.Popen(
        [sys.executable, "-m", "kvstore", *words, *flags],
        cwd=ROOT,
        env=environment(**extra),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        program = Program(process)
        try:
            program.until(READY)
            yield program
        finally:
            process.kill()


def url(program: Program, name: str = "client_urls") -> str:
    """Where it listens, without the scheme."""
    urls = next(line for line in program.log if line["msg"] == READY)[name]
    assert isinstance(urls, list)
    return str(urls[0]).partition("://")[2]


def put(channel: grpc.Channel, key: bytes, value: bytes, *, wait: bool = True) -> pb.PutResponse:
    """One put, answered; ``wait`` for a server that is not there yet."""
    call = channel.unary_unary(
        "/etcdserverpb.KV/Put",
        request_serializer=pb.PutRequest.SerializeToString,
        response_deserializer=pb.PutResponse.FromString,
    )
    answer: pb.PutResponse = call(
        pb.PutRequest(key=key, value=value), timeout=PATIENCE, wait_for_ready=wait
    )
    return answer


def get(channel: grpc.Channel, key: bytes) -> list[bytes]:
    """The values found at ``key``: one or none."""
    call = channel.unary_unary(
        "/etcdserverpb.KV/Range",
        request_serializer=pb.RangeRequest.SerializeToString,
        response_deserializer=pb.RangeResponse.FromString,
    )
    answer = call(pb.RangeRequest(key=key), timeout=PATIENCE, wait_for_ready=True)
    return [pair.value for pair in answer.kvs]


def http(address: str, target: str, method: str = "GET") -> tuple[int, Mapping[str, str], bytes]:
    """One HTTP/1.1 request: status, headers by lower-case name, body."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as sock:
        head = f"{method} {target} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n"
        sock.sendall(head.encode())
        answer = b""
        while data := sock.recv(65536):
            answer += data
    top, _, body = answer.partition(b"\r\n\r\n")
    status, *fields = top.decode().split("\r\n")
    pairs = (field.partition(": ") for field in fields)
    return int(status.split()[1]), {name.lower(): text for name, _, text in pairs}, body
