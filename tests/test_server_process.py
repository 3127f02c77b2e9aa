"""The server as a process: signals, crashes, and what the next start finds."""

import asyncio
import signal
import socket
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
from hyperframe.frame import DataFrame, GoAwayFrame

from kvstore.pb import rpc_pb2 as pb
from tests.program import PATIENCE, Program, get, http, put, serving, url
from tests.transport.certificates import Authority
from tests.transport.peer import connected, message

pytestmark = pytest.mark.slow


def port(program: Program) -> int:
    """Where it listens."""
    return int(url(program).rpartition(":")[2])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal(number: signal.Signals, tmp_path: Path) -> None:
    """Either signal ends the server in order, with 0, and says so."""
    with serving(tmp_path / "data") as program:
        with grpc.insecure_channel(url(program)) as channel:
            put(channel, b"k", b"v")
        program.process.send_signal(number)
        assert program.finish() == 0
        messages = [line["msg"] for line in program.log]
        assert messages[-2:] == ["received signal; shutting down", "stopped"]
        assert program.log[-2]["signal"] == number.name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_second_signal(number: signal.Signals, tmp_path: Path) -> None:
    """While the server waits for a request that never ends, another signal ends it at once; what
    was acknowledged is there after that.
    """
    with serving(tmp_path / "data") as program:
        async with connected(port(program)) as peer:
            body = pb.PutRequest(key=b"k", value=b"v").SerializeToString()
            assert (await peer.call("/etcdserverpb.KV/Put", body)).status == (0, "")
            endless = peer.start("/etcdserverpb.KV/Put")
            peer.send(DataFrame(endless, message(body)[:3]))
            await peer.settle()
            program.process.send_signal(number)
            await peer.until(lambda f: isinstance(f, GoAwayFrame))
            program.process.send_signal(number)
            assert await asyncio.to_thread(program.finish) == -number
    with serving(tmp_path / "data") as program:
        with grpc.insecure_channel(url(program)) as channel:
            assert get(channel, b"k") == [b"v"]
        assert program.stop() == 0


def test_crash(tmp_path: Path) -> None:
    """After SIGKILL the next start has everything acknowledged, its lock, and a higher epoch."""
    with serving(tmp_path / "data") as program:
        with grpc.insecure_channel(url(program)) as channel:
            for number in range(20):
                put(channel, b"k%d" % number, b"v")
        program.process.kill()
        program.process.wait(PATIENCE)
        epoch = program.log[-1]["epoch"]
    with serving(tmp_path / "data") as program:
        ready = program.log[-1]
        assert (ready["keys"], ready["revision"]) == (20, 21)
        assert isinstance(epoch, int)
        assert ready["epoch"] == epoch + 1
        with grpc.insecure_channel(url(program)) as channel:
            assert put(channel, b"k", b"v").header.revision == 22
        assert program.stop() == 0


def test_scrape(tmp_path: Path) -> None:
    """Metrics of a process: pages on both listeners, with the process's own numbers."""
    with serving(tmp_path / "data", "--listen-metrics-urls=http://127.0.0.1:0") as program:
        for name in ("client_urls", "metrics_urls"):
            status, headers, body = http(url(program, name), "/metrics")
            assert status == 200
            assert headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
            assert b"\nprocess_resident_memory_bytes " in body
        assert http(url(program), "/metrics", "HEAD")[2] == b""
        assert program.stop() == 0


@pytest.mark.parametrize("level", ["debug", "info"])
def test_tls_troubles(level: str, tmp_path: Path) -> None:
    """A failed handshake is a line at debug only; changed certificates are told at any level, and
    why they are not taken, without a traceback.
    """
    certificate, key = Authority.make(tmp_path, "ca").issue("server")
    good = key.read_bytes()
    flags = [f"--cert-file={certificate}", f"--key-file={key}", f"--log-level={level}"]
    with serving(tmp_path / "data", "--listen-client-urls=https://127.0.0.1:0", *flags) as program:
        hello(url(program))
        key.write_text("half written")
        hello(url(program))
        refused = program.until("certificates not reloaded; the old ones stay in use")
        key.write_bytes(good + b"\n")
        hello(url(program))
        reloaded = program.until("certificates reloaded")
        assert program.stop() == 0
    assert set(refused) == {"level", "ts", "msg", "reason"}
    assert (refused["level"], reloaded["level"]) == ("error", "info")
    assert str(refused["reason"]).endswith(f"{key} holds no private key")
    assert reloaded["files"] == [str(certificate), str(key)]
    failed = [line for line in program.log if line["msg"] == "TLS handshake failed"]
    assert len(failed) == (3 if level == "debug" else 0)
    for line in failed:
        assert str(line["peer"]).startswith("127.0.0.1:")
        assert "http request" in str(line["reason"]).lower().replace("_", " ")


def hello(address: str) -> None:
    """Speak plain HTTP to a listener that wants TLS, until it hangs up."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with suppress(ConnectionResetError):
            while sock.recv(4096):
                pass
