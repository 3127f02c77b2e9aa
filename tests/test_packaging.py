"""The wheel: everything that the server needs is in it, and nothing else."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from kvstore.pb import rpc_pb2

ROOT = Path(__file__).parents[1]
SOURCES = ("LICENSE", "README.md", "backends", "bench", "kvstore", "pyproject.toml")
START_SECONDS_MAX = 30.0
STOP_SECONDS_MAX = 15.0

pytestmark = pytest.mark.slow


def pip(verb: str, *arguments: str) -> None:
    """Run pip on what is at hand: it fetches nothing."""
    command = [sys.executable, "-m", "pip", verb, "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, "--no-deps", "--no-index", *arguments], check=True)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the sources and unpack it into a folder of its own."""
    folder = tmp_path_factory.mktemp("packaging")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (folder / "source").mkdir(exist_ok=True)
        copy(ROOT / name, folder / "source" / name)
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "source"))
    (wheel,) = folder.glob("*.whl")
    pip("install", "--target", str(folder / "installed"), str(wheel))
    return folder / "installed"


@contextmanager
def served(installed: Path, folder: Path) -> Iterator[tuple[grpc.Channel, subprocess.Popen[bytes]]]:
    """Serve with the installed program on a socket in `folder`, its data beside it."""
    program = str(installed / "bin/kvstore")
    listen = ["--listen-client-urls", f"unix://{folder}/socket"]
    with subprocess.Popen(
        [program, "serve", "--data-dir", str(folder / "data"), *listen],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(installed)},
    ) as server:
        try:
            options = [("grpc.initial_reconnect_backoff_ms", 100)]
            with grpc.insecure_channel(f"unix:{folder}/socket", options=options) as channel:
                yield channel, server
        finally:
            server.kill()


def test_wheel_holds_the_three_packages(installed: Path) -> None:
    """What is installed are our packages, their metadata and the commands."""
    found = {path.name.split("-")[0] for path in installed.iterdir()}
    assert {"backends", "bench", "bin", "kvstore"} == found
    assert {"kvstore", "kvstore-bench"} == {path.name for path in (installed / "bin").iterdir()}


def test_installed_server_serves(installed: Path) -> None:
    """A server from the wheel stores a key, gives it back, and ends with 0 when told to stop."""
    with (
        tempfile.TemporaryDirectory() as folder,  # short: a socket's path has about 100 bytes
        served(installed, Path(folder)) as (channel, server),
    ):
        put = channel.unary_unary(
            "/etcdserverpb.KV/Put",
            request_serializer=rpc_pb2.PutRequest.SerializeToString,
            response_deserializer=rpc_pb2.PutResponse.FromString,
        )
        get = channel.unary_unary(
            "/etcdserverpb.KV/Range",
            request_serializer=rpc_pb2.RangeRequest.SerializeToString,
            response_deserializer=rpc_pb2.RangeResponse.FromString,
        )
        request = rpc_pb2.PutRequest(key=b"name", value=b"value")
        put(request, wait_for_ready=True, timeout=START_SECONDS_MAX)
        answer = get(rpc_pb2.RangeRequest(key=b"name"), timeout=START_SECONDS_MAX)
        assert [b"value"] == [pair.value for pair in answer.kvs]
        server.send_signal(signal.SIGTERM)
        assert server.wait(STOP_SECONDS_MAX) == 0
