"""Targets: what a user may name, and the life of a server that is started."""

import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from bench.targets import (
    BUILD_ETCD,
    PORTS,
    Binaries,
    Running,
    Target,
    TargetError,
    existing,
    kept_near,
    names_differ,
    parse_start,
    parse_target,
)

NOWHERE = Binaries("/nonexistent/etcd", "/nonexistent/kine")
SERVER = """
import os, pathlib, signal, socket, subprocess, sys, time
port, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
with (folder / "starts").open("a") as file:
    file.write("x" * 5000)
if len(sys.argv) > 3 and sys.argv[3] == "child":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    (folder / "child").write_text(str(child.pid))
if len(sys.argv) > 3 and sys.argv[3] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
end = time.process_time() + 0.05
while time.process_time() < end:
    pass
with socket.create_server(("127.0.0.1", port)):
    print("serving", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def command(tmp_path: Path) -> str:
    """A little server."""
    program = tmp_path / "server.py"
    program.write_text(SERVER)
    return f"{sys.executable} {program} {{port}} {{dir}}"


def until(condition: Callable[[], bool]) -> None:
    """Wait until something is true."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def listening(running: Running) -> bool:
    """Does it serve?"""
    with socket.socket() as probe:
        return probe.connect_ex((running.host, running.port)) == 0


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("a=http://10.0.0.1:2379", "10.0.0.1", 2379),
        ("a=10.0.0.1:2379", "10.0.0.1", 2379),
        ("a=http://[::1]:2379", "::1", 2379),
        ("a.b-c_1=http://etcd:1/", "etcd", 1),
    ],
)
def test_target(text: str, host: str, port: int) -> None:
    """A server that runs is named by address."""
    target = parse_target(text)
    assert (host, port, False) == (target.host, target.port, target.started)
    assert target.name == text.partition("=")[0]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("http://h:1", "NAME=http://HOST:PORT"),
        ("a=", "NAME=http://HOST:PORT"),
        ("a=http://h", "NAME=http://HOST:PORT"),
        ("a=https://h:1", "NAME=http://HOST:PORT"),
        ("a=http://h:99999", "Port out of range"),
        ("a=http://h:x", "Port could not be cast"),
        ("=http://h:1", "'' is no name"),
        ("../a=http://h:1", "'../a' is no name"),
        (".a=http://h:1", "letters, digits, dashes"),
    ],
)
def test_target_refused(text: str, complaint: str) -> None:
    """What is no address or no name is refused in one line that repeats it."""
    with pytest.raises(TargetError, match=complaint) as refused:
        parse_target(text)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("theirs", "--start theirs: wanted is ours, etcd, kine, or NAME=COMMAND with {port}"),
        ("a=run {port}", "NAME=COMMAND"),
        ("a=run {dir}", "NAME=COMMAND"),
        ("=run {port} {dir}", "'' is no name"),
        ("a=run {port} {dir} {what}", "{what}"),
        ("a=awk '{print $1}' {port} {dir}", "{print $1}"),
        ("a=run {port} {dir} }", "}"),
        ("a=run {port} {dir} 'x", "No closing quotation"),
    ],
)
def test_start_refused(text: str, complaint: str) -> None:
    """What cannot be started is refused before anything is, in one line."""
    with pytest.raises(TargetError) as refused:
        parse_start(text, Binaries())
    assert complaint in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["etcd", "kine"])
def test_rival_that_is_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rival is looked for where it was said to be, or the line says how to get one."""
    with pytest.raises(TargetError, match=f"--{name}-bin /nonexistent/{name}: not a program"):
        parse_start(name, NOWHERE)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("bench.targets._BUILT", Path("/nonexistent"))
    with pytest.raises(TargetError, match=f"{name} is not in PATH: name it with --{name}-bin"):
        parse_start(name, Binaries())
    assert "go build" in BUILD_ETCD


@pytest.mark.parametrize("name", ["ours", "etcd", "kine"])
def test_known_servers(name: str) -> None:
    """What is known has a command for any directory and port, and says how durable it is."""
    target = parse_start(name, Binaries(sys.executable, sys.executable))
    filled = target.command.format(port=1, dir="/data dir", peer=2)
    assert (name, True) == (target.name, target.started)
    assert "fsync" in target.durability
    assert "127.0.0.1:1" in filled
    assert "/data dir" in filled


@pytest.mark.parametrize(
    ("tells", "flag"), [("  -listen string", " -dir "), ("--listen-client-urls", " --data-dir ")]
)
def test_the_flags_of_an_etcd_are_those_that_it_tells(
    tmp_path: Path, tells: str, flag: str
) -> None:
    """The reference is known by its help, whatever its file is called, and so is etcd itself."""
    for name in ("etcdref36", "etcd"):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\necho '{tells}' >&2\nexit 2\n")
        program.chmod(0o755)
        assert flag in parse_start("etcd", Binaries(str(program))).command


def test_known_servers_log_as_little_as_each_other() -> None:
    """Ours writes no line per event that etcd, at its level, does not write."""
    told = parse_start("ours", Binaries()).command
    assert "--log-level warn" in told


def test_kine_takes_its_lock_when_a_transaction_begins() -> None:
    """As kine by itself does, lest writers of one moment fail as busy."""
    assert "_txlock=immediate" in parse_start("kine", Binaries(None, sys.executable)).command


def test_data_lie_where_the_session_is_kept(tmp_path: Path) -> None:
    """In the session's folder; before that is made, beside it, and nothing is made for it."""
    out = tmp_path / "sessions" / "one"
    target = kept_near(Target(name="x", command="true {port} {dir}"), out)
    with Running(target) as before:
        assert before._data.is_relative_to(tmp_path)
    assert not any(tmp_path.iterdir())
    out.mkdir(parents=True)
    with Running(target) as running:
        assert running._data.is_relative_to(out)
    assert not any(out.iterdir())


@pytest.mark.parametrize(
    ("kind", "durability"), [("tmpfs", "none (memory)"), ("ramfs", "none (memory)"), ("ext4", "?")]
)
def test_memory_is_no_disk(
    tmp_path: Path, kind: str, durability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept in memory is not durable, whatever the server syncs; who runs is not known."""
    asked: list[Path] = []

    def file_system(folder: Path) -> str:
        asked.append(folder)
        return kind

    monkeypatch.setattr("bench.targets.file_system", file_system)
    started = Target(name="x", command="x {port} {dir}", durability="?")
    assert kept_near(started, tmp_path / "not" / "yet").durability == durability
    assert asked == [tmp_path]
    assert kept_near(Target(name="x"), tmp_path).durability == "unknown"


def test_existing_is_the_nearest_that_is_there(tmp_path: Path) -> None:
    """The folder itself, or the last of the way to it."""
    assert existing(tmp_path) == existing(tmp_path / "a" / "b") == tmp_path


def test_names_differ() -> None:
    """Two targets of one name are refused by that name."""
    names_differ([Target(name="a"), Target(name="b")])
    with pytest.raises(TargetError, match="two targets are named a"):
        names_differ([Target(name="a"), Target(name="b"), Target(name="a")])


@pytest.mark.slow
def test_a_servers_life(command: str) -> None:
    """Started on an empty directory, stopped in order, and the directory goes away."""
    with Running(Target(name="little", command=command)) as running:
        until(lambda: listening(running))
        assert PORTS[0] <= running.port < PORTS[1]
        assert running.log_tail() == "serving"
        assert ["starts"] == [path.name for path in running._data.iterdir()]
        folder = running._data
    assert not listening(running)
    assert not folder.parent.exists()


@pytest.mark.slow
def test_kill_and_start(command: str) -> None:
    """A killed server starts again on what it had; what it used stays counted."""
    with Running(Target(name="little", command=command)) as running:
        until(lambda: listening(running))
        first = running.usage()
        assert first.cpu_us >= 50_000
        assert first.rss_bytes > 1_000_000
        assert first.disk_bytes >= 5000
        running.kill()
        assert not running.alive
        assert not listening(running)
        down = running.usage()
        assert (down.cpu_us >= first.cpu_us, down.rss_bytes) == (True, 0)
        running.start()
        until(lambda: listening(running))
        second = running.usage()
        assert second.cpu_us >= down.cpu_us + 50_000
        assert second.written_bytes >= first.written_bytes
        assert 10_000 == (running._data / "starts").stat().st_size


@pytest.mark.slow
def test_pause(command: str) -> None:
    """A paused server does nothing until it goes on; stopped while paused, it ends."""
    with Running(Target(name="little", command=command)) as running:
        until(lambda: listening(running))
        process = psutil.Process(running._process.pid if running._process else 0)
        running.pause()
        until(lambda: process.status() == psutil.STATUS_STOPPED)
        running.go_on()
        until(lambda: process.status() != psutil.STATUS_STOPPED)
        running.pause()
    assert not process.is_running()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stop", "kill"])
def test_its_children_end_too(command: str, how: str) -> None:
    """Whatever a server has started ends with it."""
    with Running(Target(name="little", command=command + " child")) as running:
        until(lambda: listening(running))
        child = psutil.Process(int((running._data / "child").read_text()))
        assert running.usage().rss_bytes > child.memory_info().rss
        running.kill() if how == "kill" else running.stop(20)
        until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.slow
def test_a_server_that_does_not_stop(command: str) -> None:
    """Who does not heed SIGTERM is killed after a while."""
    with Running(Target(name="little", command=command + " deaf")) as running:
        until(lambda: listening(running))
        running.stop(0.2)
        assert running._process is not None
        assert running._process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_server_that_ends_by_itself() -> None:
    """One that ends is not alive, and what it said can be told."""
    target = Target(name="gone", command="sh -c 'echo no such flag: {port} {dir}; exit 3'")
    with Running(target) as running:
        until(lambda: not running.alive)
        assert "no such flag" in running.log_tail()
        assert running.usage().rss_bytes == 0
        running.kill()
        running.pause()


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        ("no such flag: -x\nUsage of server:\n  -dir string\n    where", "no such flag: -x"),
        ("a\npanic: no disk\n\ngoroutine 1 [running]:\nmain.go:7", "panic: no disk"),
        ("Traceback (most recent call last):\n  File\nOSError: no disk\n", "OSError: no disk"),
        ("usage: server\nserver: error: no such flag\n", "server: error: no such flag"),
        ("x" * 100_000, "x" * 300),
        ("", ""),
    ],
    ids=["usage", "stack", "traceback", "usage-first", "long", "nothing"],
)
def test_a_complaint_is_one_line(tmp_path: Path, written: str, complaint: str) -> None:
    """However much a server writes as it ends, one line tells why; help and stacks do not."""
    (tmp_path / "said").write_text(written)
    command = f"sh -c 'cat {tmp_path}/said >&2; : {{port}} {{dir}}; exit 2'"
    with Running(Target(name="x", command=command)) as running:
        until(lambda: not running.alive)
        assert (running.log_tail(), running.end) == (complaint, "ended with code 2")


def test_a_program_that_is_no_server_is_told_what_to_do() -> None:
    """Whoever ends with code 0 is named, with the way to start something else."""
    with Running(Target(name="x", command="true {port} {dir}")) as running:
        until(lambda: not running.alive)
        assert running.end.startswith("ended with code 0, as no server does: is true one")
        assert "--start NAME=COMMAND" in running.end


def test_a_program_that_does_not_exist() -> None:
    """A command that cannot be run is refused in one line, and leaves nothing behind."""
    running = Running(Target(name="none", command="/nonexistent/server {port} {dir}"))
    folder = running._data.parent
    with pytest.raises(TargetError, match="none: /nonexistent/server: No such file"):
        running.__enter__()
    assert not folder.exists()


def test_ports_differ() -> None:
    """Servers get ports that nobody has, and not each other's."""
    servers = [Running(Target(name="x", command="{port} {peer} {dir}")) for _ in range(5)]
    ports = [int(word) for running in servers for word in running.command[:2]]
    assert 10 == len(set(ports))
    for running in servers:
        running._folder.cleanup()
