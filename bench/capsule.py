"""The environment of a session: what the machine is, and how fast its disk and loopback are today.

Timings of two sessions are comparable on equal machines only, and those of one session only if the
machine stayed what it was. So the description is taken before and after, with two small benchmarks
that no server is part of: a synced write of one page, and one byte to and fro over TCP.
Medians of their quietest parts tell drift; tails are recorded and not compared: a thousand writes
do not settle a 99th percentile.
"""

import contextlib
import os
import platform
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import threading
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

import psutil

from bench.clock import now_us
from bench.statistics import percentile

DRIFT_PERCENT_MAX = 25.0
"""Beyond it the machine was not the same before and after: timings between are INVALID."""
SYNCS = 1000
SYNC_BYTES = 4096
ROUND_TRIPS = 5000
PARTS = 10
"""In which micro-benchmarks are looked at."""
COMMAND_SECONDS_MAX = 10.0


class Capsule(TypedDict):
    """What timings depend on beside the servers."""

    cpu: str
    cores: int
    """That this process may use."""
    memory_bytes: int
    kernel: str
    file_system: str
    """Of the data folder."""
    python: str
    """Version, compiler, and whether it was built with profiles."""
    versions: dict[str, str]
    """Of kvstore and of the servers, as their commands tell."""
    commit: str
    """Of this source tree; empty outside of one."""
    fsync_p50_us: float
    """Median of the quietest part, as of the loopback: what the machine can do."""
    fsync_p99_us: float
    """Over all parts."""
    loopback_p50_us: float


SAME = ("cpu", "cores", "memory_bytes", "kernel", "file_system", "python")
"""What must be equal for two sessions to be compared."""


def capsule(folder: Path, commands: Mapping[str, Sequence[str]]) -> Capsule:
    """The environment now, with ``folder`` as place of the data.

    ``commands`` names what is asked for its version: ``{"etcd": ["etcd", "--version"]}``.
    """
    syncs = fsyncs_us(folder)
    return Capsule(
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=psutil.virtual_memory().total,
        kernel=f"{platform.system()} {platform.release()} {platform.machine()}",
        file_system=file_system(folder),
        python=_python(),
        versions=_versions(commands),
        commit=_commit(Path(__file__).parent),
        fsync_p50_us=quietest(syncs),
        fsync_p99_us=percentile(syncs, 99),
        loopback_p50_us=quietest(round_trips_us()),
    )


def drift(before: Capsule, after: Capsule) -> dict[str, float]:
    """Per cent by which each micro-benchmark changed, either way."""
    pairs = {
        "fsync": (before["fsync_p50_us"], after["fsync_p50_us"]),
        "loopback": (before["loopback_p50_us"], after["loopback_p50_us"]),
    }
    return {name: 100 * abs(b - a) / max(a, 1.0) for name, (a, b) in pairs.items()}


def differences(one: Capsule, other: Capsule) -> list[str]:
    """What makes two sessions incomparable, one line each."""
    pairs = ((name, dict(one)[name], dict(other)[name]) for name in SAME)
    return [f"{name}: {a} against {b}" for name, a, b in pairs if a != b]


def quietest(times: Sequence[float]) -> float:
    """The lowest median of consecutive parts: a neighbour's noise is not the machine's speed."""
    size = max(1, len(times) // PARTS)
    return min(percentile(times[n : n + size], 50) for n in range(0, len(times), size))


def fsyncs_us(folder: Path) -> list[float]:
    """Times of writing one page to a new file in ``folder`` and syncing it, again and again."""
    page = b"kvstore-bench..." * (SYNC_BYTES // 16)
    times = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for n in range(SYNCS):
            start = now_us()
            os.pwrite(file.fileno(), page, n * SYNC_BYTES)
            os.fdatasync(file.fileno())
            times.append(float(now_us() - start))
    return times


def round_trips_us() -> list[float]:
    """Times of one byte to another thread and back, over TCP on the loopback interface."""
    times = []
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        near = stack.enter_context(socket.create_connection(listener.getsockname()))
        far = stack.enter_context(listener.accept()[0])
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        echo = threading.Thread(target=_echo, args=(far,), daemon=True)
        echo.start()
        for _ in range(ROUND_TRIPS):
            start = now_us()
            near.sendall(b".")
            near.recv(1)
            times.append(float(now_us() - start))
        near.shutdown(socket.SHUT_WR)
        echo.join()
    return times


def _echo(end: socket.socket) -> None:
    while byte := end.recv(1):
        end.sendall(byte)


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, model = line.partition(":")
        if name.strip() in {"model name", "Model"}:
            return model.strip()
    return platform.machine()


def file_system(folder: Path) -> str:
    """The type of the file system of the mount that is nearest above ``folder``."""
    above = {str(folder.resolve()), *map(str, folder.resolve().parents)}
    mounts = [m for m in psutil.disk_partitions(all=True) if m.mountpoint in above]
    return max(mounts, key=lambda mount: len(mount.mountpoint)).fstype if mounts else "unknown"


def _python() -> str:
    """Profiles are worth a sixth of CPU, so the same version is not the same interpreter."""
    options = str(sysconfig.get_config_var("CONFIG_ARGS") or "")
    built = "with" if "--enable-optimizations" in options else "without"
    name = f"{platform.python_implementation()} {platform.python_version()}"
    return f"{name}, {platform.python_compiler()}, built {built} profiles"


def _versions(commands: Mapping[str, Sequence[str]]) -> dict[str, str]:
    found = {}
    with contextlib.suppress(PackageNotFoundError):
        found["kvstore"] = version("kvstore")
    for name, command in commands.items():
        if told := _first_line(command):
            found[name] = told
    return found


def _commit(source: Path) -> str:
    git = ["git", "-C", str(source)]
    commit = _first_line([*git, "rev-parse", "HEAD"])
    changed = _first_line([*git, "status", "--porcelain", "--untracked-files=no"])
    return f"{commit} with changes" if commit and changed else commit


def _first_line(command: Sequence[str]) -> str:
    """What a command says first; nothing if it is not there or does not succeed."""
    program = shutil.which(command[0])
    if program is None:
        return ""
    try:
        done = subprocess.run(  # noqa: S603 - the user named the servers to start
            [program, *command[1:]],
            capture_output=True,
            check=True,
            text=True,
            timeout=COMMAND_SECONDS_MAX,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return next(iter(done.stdout.splitlines()), "").strip()
