"""The environment of a session: what the machine is, and how fast its disk and loopback are today.

Timings of two sessions are comparable on equal machines only, and those of one session only if the
machine treated its targets alike. So the description is taken before and after, and two small
benchmarks that no server is part of also before every run: a synced write of one page, and one byte
to and fro over TCP. A machine that became faster meanwhile did so for all targets, because they
take turns; one that was faster in the turns of one target makes the session INVALID.
Each is made in bouts with pauses between, since machines that are shared change speed from one
tenth of a second to the next, and the median of the bouts' medians tells drift. Tails are recorded
and not compared: a thousand writes do not settle a 99th percentile.
"""

import contextlib
import os
import platform
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import geometric_mean
from typing import NamedTuple, TypedDict

import psutil

from bench.clock import now_ns
from bench.statistics import percentile

DRIFT_PERCENT_MAX = 25.0
"""Beyond it the machine was not the same before and after, and there is nothing to compare with:
timings between are INVALID.
"""
UNEQUAL_PERCENT_MAX = 15.0
"""Beyond it the machine was not the same for all targets: their timings are INVALID."""
SYNCS = 100
ROUND_TRIPS = 500
"""Of one bout at most, over a connection of its own."""
BOUT_US = 50_000
"""A bout ends when it has taken this long, on a disk or a machine that is busy."""
SYNC_BYTES = 4096
BOUTS = 13
PAUSE_SECONDS = 0.05
"""Between two bouts."""
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
    """Version, compiler, and whether it says that it was built with profiles."""
    versions: dict[str, str]
    """Of kvstore and of the servers, as their commands tell."""
    commit: str
    """Of this source tree; empty outside of one."""
    fsync_p50_us: float
    """Median of the bouts' medians, as of the loopback."""
    fsync_p99_us: float
    """Over all bouts."""
    loopback_p50_us: float


class Speeds(NamedTuple):
    """How fast the machine is just now, without a server; microseconds."""

    fsync_p50_us: float
    fsync_p99_us: float
    loopback_p50_us: float


SAME = ("cpu", "cores", "memory_bytes", "kernel", "file_system", "python")
"""What must be equal for two sessions to be compared."""


def capsule(folder: Path, commands: Mapping[str, Sequence[str]]) -> Capsule:
    """The environment now, with ``folder`` as place of the data.

    ``commands`` names what is asked for its version: ``{"etcd": ["etcd", "--version"]}``.
    """
    measured = speeds(folder)
    return Capsule(
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=psutil.virtual_memory().total,
        kernel=f"{platform.system()} {platform.release()} {platform.machine()}",
        file_system=file_system(folder),
        python=_python(),
        versions=_versions(commands),
        commit=_commit(Path(__file__).parent),
        fsync_p50_us=measured.fsync_p50_us,
        fsync_p99_us=measured.fsync_p99_us,
        loopback_p50_us=measured.loopback_p50_us,
    )


def drift(before: Capsule, after: Capsule) -> dict[str, float]:
    """Per cent by which each micro-benchmark changed, either way."""
    pairs = {
        "fsync": (before["fsync_p50_us"], after["fsync_p50_us"]),
        "loopback": (before["loopback_p50_us"], after["loopback_p50_us"]),
    }
    return {name: 100 * abs(b - a) / max(a, 1.0) for name, (a, b) in pairs.items()}


def unequal(speeds: Sequence[Sequence[float]]) -> float:
    """Per cent between the slowest and the fastest of geometric means, one for each target.

    ``speeds`` are what one micro-benchmark said before each of a target's runs.
    """
    means = [geometric_mean(each) for each in speeds]
    return 100 * (max(means) / min(means) - 1)


def differences(one: Capsule, other: Capsule) -> list[str]:
    """What makes two sessions incomparable, one line each."""
    pairs = ((name, dict(one)[name], dict(other)[name]) for name in SAME)
    return [f"{name}: {a} against {b}" for name, a, b in pairs if a != b]


def speeds(folder: Path) -> Speeds:
    """Measure the machine for two seconds, with ``folder`` as place of the data."""
    syncs, round_trips = bouts(folder)
    tail = percentile([each for bout in syncs for each in bout], 99)
    return Speeds(typical(syncs), tail, typical(round_trips))


def typical(measured: Sequence[Sequence[float]]) -> float:
    """The median of the bouts' medians: a neighbour's noise in a minority of them is ignored."""
    return percentile([percentile(bout, 50) for bout in measured], 50)


def bouts(folder: Path) -> tuple[list[list[float]], list[list[float]]]:
    """Both micro-benchmarks in turns: times in microseconds of syncs and of round trips."""
    syncs, round_trips = [], []
    for _ in range(BOUTS):
        syncs.append(fsyncs_us(folder))
        round_trips.append(round_trips_us())
        time.sleep(PAUSE_SECONDS)  # noqa: TID251 - time has to pass, nothing is waited for
    return syncs, round_trips


def fsyncs_us(folder: Path) -> list[float]:
    """Times of writing one page to a new file in ``folder`` and syncing it, again and again."""
    page = b"kvstore-bench..." * (SYNC_BYTES // 16)
    with tempfile.TemporaryFile(dir=folder) as file:

        def sync(number: int) -> None:
            os.pwrite(file.fileno(), page, number * SYNC_BYTES)
            os.fdatasync(file.fileno())

        return _bout(sync, SYNCS)


def round_trips_us() -> list[float]:
    """Times of one byte there and back, over TCP on the loopback interface.

    One thread has both ends: how fast another is woken is the scheduler's mood, not the machine's.
    """
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        near = stack.enter_context(socket.create_connection(listener.getsockname()))
        far = stack.enter_context(listener.accept()[0])
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def there_and_back(_: int) -> None:
            for here, there in ((near, far), (far, near)):
                here.sendall(b".")
                there.recv(1)

        return _bout(there_and_back, ROUND_TRIPS)


def _bout(probe: Callable[[int], None], count: int) -> list[float]:
    """Microseconds that each of ``count`` probes took; fewer when the bout's time is over.

    By a clock that is finer than microseconds: a round trip takes five of them, and of one more or
    less a drift of 20 % would be made.
    """
    times: list[float] = []
    begun = now = now_ns()
    while len(times) < count and (not times or now - begun < BOUT_US * 1000):
        start = now
        probe(len(times))
        now = now_ns()
        times.append((now - start) / 1000)
    return times


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
    """Profiles are worth a sixth of CPU, so the same version is not the same interpreter. Builds
    that use them without saying so are told apart by their compiler.
    """
    options = str(sysconfig.get_config_var("CONFIG_ARGS") or "")
    built = ", built with profiles" if "--enable-optimizations" in options else ""
    name = f"{platform.python_implementation()} {platform.python_version()}"
    return f"{name}, {platform.python_compiler()}{built}"


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
