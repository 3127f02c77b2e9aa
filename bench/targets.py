"""The servers under test: started here on empty data, or there already.

Whatever is started runs at the durability of a store that is trusted: every acknowledged write has
been synced to disk. What that means for each is printed beside its figures; figures of different
classes are not compared. Its data lie where the session is kept: that is the disk which the capsule
measures, and a session kept in memory says so.
Only processes that were started here are signalled, and their whole process group is.
"""

import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Self
from urllib.parse import urlsplit

import psutil

from bench.capsule import file_system

START_TIMEOUT = 60.0
SLOW_SECONDS = 2.0
"""After this long, a server that is being started is told of."""
HELP_TIMEOUT = 10.0
LOG_BYTES_MAX = 1 << 16
"""How much of its end is looked at."""
COMPLAINT_CHARACTERS_MAX = 300
STOP_TIMEOUT = 60.0
PORTS = (20_000, 32_000)
"""Below those that the system gives to connections unasked."""
QUOTA_BYTES = 8 << 30
"""The largest that etcd recommends: a storm may write more than its default of 2 GiB."""
_EXPLAINED = ("usage", "goroutine ")
"""How the lines begin that come after a complaint and say no more of it."""
MEMORY = {"tmpfs", "ramfs"}
"""File systems on which a sync does nothing."""


class TargetError(Exception):
    """A target cannot be had, or went away; one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One server to be measured."""

    name: str
    command: str = ""
    """With ``{port}``, ``{peer}`` (another port) and ``{dir}``; empty: it runs already."""
    host: str = "127.0.0.1"
    port: int = 0
    durability: str = "unknown"
    near: Path | None = None
    """Its data are put into this folder, or on the file system that this folder is to be made on;
    None: where temporary files go."""
    shard_stop: str = ""
    """A command that stops one of its shards; empty: only the whole server can be stopped."""
    shard_start: str = ""
    """One that starts it again, and returns when it is there."""

    @property
    def started(self) -> bool:
        """Is it ours to start, kill and follow?"""
        return bool(self.command)


class Binaries(NamedTuple):
    """Where rivals are, if not in PATH."""

    etcd: str | None = None
    kine: str | None = None


_ETCD = (
    "{program} --name bench --data-dir {{dir}} --log-level error"
    " --listen-client-urls http://127.0.0.1:{{port}}"
    " --advertise-client-urls http://127.0.0.1:{{port}}"
    " --listen-peer-urls http://127.0.0.1:{{peer}}"
    " --initial-advertise-peer-urls http://127.0.0.1:{{peer}}"
    " --initial-cluster bench=http://127.0.0.1:{{peer}}"
    " --quota-backend-bytes {quota}"
)
_ETCDREF = "{program} -dir {{dir}} -listen http://127.0.0.1:{{port}} -quota-backend-bytes {quota}"
_KINE = (
    "{program} --listen-address 127.0.0.1:{{port}}"
    " --endpoint 'sqlite://{{dir}}/kine.db?_journal=WAL&cache=shared&_synchronous=FULL"
    "&_busy_timeout=30000&_txlock=immediate'"
)
"""kine's own default, but that it is told to sync every commit."""
_BUILT = Path(__file__).parents[1] / "tests" / "compat" / "bin"
"""Where a checkout keeps the references that its tests build."""
BUILD_ETCD = "cd tests/compat/etcdref36 && go build -o ../bin/etcdref36 ."
BUILD_KINE = "cd tests/compat/kine && go build -o ../bin/kine ."


def parse_start(text: str, binaries: Binaries) -> Target:
    """``ours``, ``etcd``, ``kine``, or ``NAME=COMMAND`` with ``{port}`` and ``{dir}``.

    Raises ``TargetError``.
    """
    if text == "ours":
        program = Path(sys.executable).with_name("kvstore")
        command = (
            f"{shlex.quote(str(program))} serve --data-dir {{dir}} --log-level warn"
            " --listen-client-urls http://127.0.0.1:{port}"
        )
        return Target(name="ours", command=command, durability="fsync per group of commits")
    if text == "etcd":
        program_name = _find("etcd", binaries.etcd, "etcdref36", BUILD_ETCD)
        template = _etcd_flags(program_name)
        command = template.format(program=shlex.quote(program_name), quota=QUOTA_BYTES)
        return Target(name="etcd", command=command, durability="fsync per group of commits")
    if text == "kine":
        program_name = _find("kine", binaries.kine, "kine", BUILD_KINE)
        command = _KINE.format(program=shlex.quote(program_name))
        return Target(name="kine", command=command, durability="fsync per commit")
    name, equals, command = text.partition("=")
    if equals and "{port}" in command and "{dir}" in command:
        try:
            shlex.split(command.format(port=0, peer=0, dir=""))
        except (AttributeError, LookupError) as error:
            raise TargetError(f"--start {text}: a brace that is meant is doubled") from error
        except ValueError as error:
            raise TargetError(f"--start {text}: {error}") from error
        return Target(name=_checked(name), command=command)
    raise TargetError(
        f"--start {text}: wanted is ours, etcd, kine,"
        " or NAME=COMMAND with {port} and {dir} in it"
    )


def _find(name: str, given: str | None, built: str, build: str) -> str:
    """The program of a rival."""
    if given is not None:
        if not os.access(given, os.X_OK):
            raise TargetError(f"--{name}-bin {given}: not a program")
        return given
    found = shutil.which(name)
    if found is not None:
        return found
    if os.access(_BUILT / built, os.X_OK):
        return str(_BUILT / built)
    raise TargetError(
        f"{name} is not in PATH: name it with --{name}-bin; in a checkout, `{build}` builds one"
    )


def _etcd_flags(program: str) -> str:
    """The flags to start an etcd with: those of the reference if its help tells of them, whatever
    its file is called; else etcd's own.
    """
    try:
        asked = subprocess.run(  # noqa: S603 - the user's own program
            [program, "--help"],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=HELP_TIMEOUT,
        )
    except (OSError, subprocess.TimeoutExpired):
        return _ETCD
    return _ETCDREF if b" -listen " in asked.stdout else _ETCD


def parse_target(text: str) -> Target:
    """``NAME=URL`` of a server that runs; raises ``TargetError``."""
    name, equals, url = text.partition("=")
    try:
        parts = urlsplit(url if "//" in url else f"//{url}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise TargetError(f"--target {text}: {error}") from error
    if not equals or not host or not port or parts.scheme not in ("", "http"):
        raise TargetError(f"--target {text}: NAME=http://HOST:PORT is wanted")
    return Target(name=_checked(name), host=host, port=port)


def _checked(name: str) -> str:
    """A name that can be a folder's."""
    if not name or not all(c.isalnum() or c in "-_." for c in name) or name.startswith("."):
        raise TargetError(f"{name!r} is no name for a target: letters, digits, dashes")
    return name


def kept_near(target: Target, folder: Path) -> Target:
    """The target with its data in ``folder``, which need not be there yet; memory is told as such.

    One that runs already keeps its data where it will, which nobody here knows.
    """
    if not target.started:
        return target
    in_memory = file_system(existing(folder)) in MEMORY
    durability = "none (memory)" if in_memory else target.durability
    return replace(target, near=folder, durability=durability)


def existing(folder: Path) -> Path:
    """The folder, or what of the way to it is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


class Usage(NamedTuple):
    """What a server has used since its first start."""

    cpu_us: int
    rss_bytes: int
    written_bytes: int
    disk_bytes: int


class Running:
    """A started server with a fresh directory, which goes away with it. A context manager."""

    def __init__(self, target: Target) -> None:
        self.target = target
        near = existing(target.near) if target.near is not None else None
        self._folder = tempfile.TemporaryDirectory(prefix=f".data-{target.name}-", dir=near)
        self._data = Path(self._folder.name) / "data"
        self._data.mkdir(mode=0o700)
        self._log = Path(self._folder.name) / "log"
        self.port, peer = _free_ports()
        self.host = "127.0.0.1"
        filled = target.command.format(dir=self._data, port=self.port, peer=peer)
        self.command = shlex.split(filled)
        self._process: subprocess.Popen[bytes] | None = None
        self._before = (0, 0)
        """CPU and written bytes of processes that have ended."""
        self._last: dict[int, tuple[int, int]] = {}

    def __enter__(self) -> Self:
        """Raises ``TargetError``: there is no such program."""
        try:
            self.start()
        except OSError as error:
            self._folder.cleanup()
            complaint = f"{self.command[0]}: {error.strerror}"
            raise TargetError(f"{self.target.name}: {complaint}") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.stop(STOP_TIMEOUT if kind is None else 0.0)
        finally:
            self._folder.cleanup()

    def start(self) -> None:
        """Start it on the data that it has."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - the user's own command
                self.command, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def alive(self) -> bool:
        """Has it not ended by itself?"""
        return self._process is not None and self._process.poll() is None

    @property
    def end(self) -> str:
        """How one that is not ``alive`` ended: with which code, or by which signal."""
        assert self._process is not None
        code = self._process.returncode
        if code:
            return f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        return (
            f"ended with code 0, as no server does: is {self.command[0]} one that stays in the"
            " foreground? (--start NAME=COMMAND starts any program with any flags)"
        )

    def log_tail(self) -> str:
        """The line that says most of why it ended: its last one, or what stands before the help
        or the stack that it ended with. Empty: it wrote nothing.
        """
        written = self._log.read_bytes()[-LOG_BYTES_MAX:].decode(errors="replace")
        lines = [line.strip() for line in written.splitlines() if line.strip()]
        for before, line in pairwise(lines):
            if line.lower().startswith(_EXPLAINED):
                return before[:COMPLAINT_CHARACTERS_MAX]
        return lines[-1][:COMPLAINT_CHARACTERS_MAX] if lines else ""

    def kill(self) -> None:
        """SIGKILL for all its processes."""
        if self._process is not None and self.alive:
            self.usage()
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._retire()

    def pause(self) -> None:
        """SIGSTOP."""
        if self._process is not None and self.alive:
            os.killpg(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        if self._process is not None and self.alive:
            os.killpg(self._process.pid, signal.SIGCONT)

    def stop(self, seconds: float) -> None:
        """End it in order, by force if that takes longer."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            os.killpg(process.pid, signal.SIGCONT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
        with suppress(ProcessLookupError):  # nobody is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _retire(self) -> None:
        """What ended processes have used stays counted."""
        cpu_us, written = self._before
        self._before = (
            cpu_us + sum(cpu for cpu, _ in self._last.values()),
            written + sum(bytes_ for _, bytes_ in self._last.values()),
        )
        self._last.clear()

    def usage(self) -> Usage:
        """What all its processes have used so far."""
        rss = 0
        for process in self._processes():
            try:
                with process.oneshot():
                    times = process.cpu_times()
                    cpu_us = int((times.user + times.system) * 1e6)
                    self._last[process.pid] = (cpu_us, process.io_counters().write_bytes)
                    rss += process.memory_info().rss
            except psutil.Error:
                continue
        cpu, written = self._before
        return Usage(
            cpu + sum(cpu_us for cpu_us, _ in self._last.values()),
            rss,
            written + sum(bytes_ for _, bytes_ in self._last.values()),
            _disk_bytes(self._data),
        )

    def _processes(self) -> list[psutil.Process]:
        if self._process is None or not self.alive:
            return []
        try:
            root = psutil.Process(self._process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.Error:
            return []


def _disk_bytes(folder: Path) -> int:
    """Bytes that the files below a folder occupy."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_blocks * 512
        except OSError:
            continue
    return total


def _free_ports() -> tuple[int, int]:
    """Two ports of the loopback that nobody has; not from the seed, which another run may share."""
    found: list[int] = []
    while len(found) < 2:
        port = PORTS[0] + secrets.randbelow(PORTS[1] - PORTS[0])
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found[0], found[1]


def names_differ(targets: Sequence[Target]) -> None:
    """Raises ``TargetError`` if two targets have one name."""
    names = [target.name for target in targets]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise TargetError(f"two targets are named {twice[0]}")
