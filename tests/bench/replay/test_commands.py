"""The commands ``record`` and ``replay`` as users meet them: words, signals, exit codes, files."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import grpc.aio
import psutil
import pytest

from bench.options import EXIT_FAILED, EXIT_INCOMPLETE, EXIT_REFUSED
from bench.records import FINAL, OPS, Outcome, Records
from bench.replay.trace import Kind, Row, Trace, TraceWriter
from kvstore.pb import rpc_pb2 as pb
from tests.bench.replay.stand import ABOUT, KV, SUMMARY, Client, client, create, delete, update
from tests.bench.test_cli import HELD, ROOT, command, fake, say

PODS = b"/registry/pods/"
CALL_US = 5_000_000
"""When a second call is due: late enough for the first to be seen."""


@contextmanager
def small_etcd(folder: Path) -> Iterator[int]:
    """A small etcd; gives its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "tests.bench.fake_etcd", str(port), "none", "1", str(folder)]
    with subprocess.Popen(words, cwd=ROOT) as process:
        try:
            end = time.monotonic() + 20
            while not listening(port):
                assert time.monotonic() < end
                time.sleep(0.05)
            yield port
        finally:
            process.kill()


def listening(port: int) -> bool:
    """Does anybody?"""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def heard(process: "subprocess.Popen[str]", start: str) -> str:
    """The rest of the first line of stderr with this in it."""
    assert process.stderr is not None
    for line in process.stderr:
        if start in line:
            return line.partition(start)[2].strip()
    raise AssertionError(f"never said {start!r}")


async def use(port: int) -> int:
    """Some calls; gives how many."""
    async with client(port) as user:
        return await _calls(user)


async def _calls(user: Client) -> int:
    made = [await user.txn(create(PODS + b"%d" % n, b"value")) for n in range(4)]
    await user.txn(update(PODS + b"0", b"again", made[0].header.revision))
    await user.txn(delete(PODS + b"1", made[1].header.revision))
    found = await user.range(pb.RangeRequest(key=PODS, range_end=b"/registry/pods0"))
    assert [kv.value for kv in found.kvs] == [b"again", b"value", b"value"]
    return 7


def trace_of_calls(path: Path, *at: int) -> None:
    """A trace of writes of one client at these times, which nobody answered."""
    writer = TraceWriter(path, ABOUT)
    for n, when in enumerate(at):
        message = create(PODS + b"%d" % n, b"")
        writer.add(Row(when, Kind.BEGIN, 0, n, f"{KV}/Txn".encode(), message=message))
    writer.close(SUMMARY)


async def keys(port: int) -> int:
    """How many a server has."""
    async with client(port) as user:
        found = await user.range(pb.RangeRequest(key=b"\0", range_end=b"\0"))
        return len(found.kvs)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """What the command recorded of a few calls, until Ctrl-C."""
    out = tmp_path / "trace"
    (tmp_path / "data").mkdir()
    with small_etcd(tmp_path / "data") as port:
        words = ("record", "--listen", "127.0.0.1:0", "--upstream", f"127.0.0.1:{port}")
        with command(*words, "--out", out) as process:
            where = heard(process, "clients connect to ").partition(";")[0]
            calls = asyncio.run(use(int(where.rpartition(":")[2])))
            process.send_signal(signal.SIGINT)
            said, complaint = process.communicate(timeout=30)
    assert process.returncode == 0, complaint
    assert said == f"{out}: {calls} calls on 1 connection\n"
    return out


@pytest.mark.slow
def test_a_recorded_trace_is_replayed_and_judged(trace: Path, tmp_path: Path) -> None:
    """A right server passes with a report; one that loses a write does not, and its exit code.

    Verdicts are a table, as those of a storm are.
    """
    with command("replay", trace, "--start", fake(), "--out", tmp_path / "out") as process:
        said, complaint = process.communicate(timeout=60)
    assert process.returncode in HELD, complaint
    assert "fake: 7 of 7 calls sent" in said
    assert re.search(r"^Final state +ok \d+ *$", said, re.MULTILINE)
    assert re.search(r"^fake +(PASS|INVALID)", said, re.MULTILINE)
    assert (tmp_path / "out" / "report.html").exists()
    assert json.loads((tmp_path / "out" / "fake" / "0" / "run.json").read_text())["target"]
    faulty = fake("lost_write", 2)
    with command("replay", trace, "--start", faulty, "--out", tmp_path / "bad") as process:
        said, complaint = process.communicate(timeout=60)
    assert process.returncode == EXIT_FAILED, complaint
    assert re.search(r"^fake +FAIL", said, re.MULTILINE)
    assert said.count("fake: Acknowledged writes durable") == 1, "its evidence, once"
    results = json.loads((tmp_path / "bad" / "results.json").read_text())
    assert [target["state"] for target in results["targets"]] == ["FAIL"]


@pytest.mark.slow
def test_repetitions_take_turns(tmp_path: Path) -> None:
    """Each server has each of them on fresh data, in turns at being first, as a storm's do."""
    trace_of_calls(tmp_path / "trace", 0)
    starts = [word for name in "ab" for word in ("--start", fake().replace("fake", name, 1))]
    out = tmp_path / "out"
    with command("replay", tmp_path / "trace", *starts, "--reps", "2", "--out", out) as process:
        said, complaint = process.communicate(timeout=100)
    assert re.findall(r"^(\w \d/2): load$", complaint, re.MULTILINE) == [
        "a 1/2",
        "b 1/2",
        "b 2/2",
        "a 2/2",
    ]
    assert 4 == len(re.findall(r"^\w \d/2: 1 of 1 call sent$", said, re.MULTILINE))
    assert json.loads((out / "session.json").read_text())["repetitions"] == 2
    results = json.loads((out / "results.json").read_text())
    runs = [[run["repetition"] for run in target["runs"]] for target in results["targets"]]
    assert runs == [[0, 1], [0, 1]]
    for name in "ab":
        for repetition in (0, 1):
            final = Records(out / name / str(repetition)).frame(FINAL)
            assert (final.text("key"), final["version"].tolist()) == ([PODS + b"0"], [1])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_replay_ends_in_order(trace: Path, tmp_path: Path, number: int) -> None:
    """Interrupted in its load: exit code 3, and a report of what there is."""
    slow = ("--speed", "0.0005", "--start", fake(), "--out", tmp_path / "out")
    with command("replay", trace, *slow) as process:
        heard(process, "fake: load")
        time.sleep(1.0)
        process.send_signal(number)
        said, complaint = process.communicate(timeout=60)
    assert process.returncode == EXIT_INCOMPLETE, complaint
    assert "INCOMPLETE" in said + complaint
    assert (tmp_path / "out" / "report.html").exists()
    facts = json.loads((tmp_path / "out" / "fake" / "0" / "run.json").read_text())
    assert facts["state"] == "INCOMPLETE"


@pytest.mark.slow
def test_a_server_that_ends_is_reported(trace: Path, tmp_path: Path) -> None:
    """What it did until then is kept and judged: exit code 3, and the report says that it ended."""
    slow = ("--speed", "0.0005", "--start", fake(), "--out", tmp_path / "out")
    with command("replay", trace, *slow) as process:
        heard(process, "fake: load")
        time.sleep(1.0)
        (server,) = psutil.Process(process.pid).children()
        server.kill()
        said, complaint = process.communicate(timeout=60)
    assert process.returncode == EXIT_INCOMPLETE, complaint
    assert re.search(r"^fake +INCOMPLETE .*\n.*fake was ended", said, re.MULTILINE)
    assert re.search(r": the replay ended before$", said, re.MULTILINE)
    assert "fake was ended by signal 9" in (tmp_path / "out" / "report.html").read_text()
    facts = json.loads((tmp_path / "out" / "fake" / "0" / "run.json").read_text())
    assert (facts["state"], facts["reason"]) == ("INCOMPLETE", "fake was ended by signal 9")
    assert (tmp_path / "out" / "fake" / "0" / "ops.0.parquet").exists()


@pytest.mark.slow
def test_who_cannot_wait_is_heeded(tmp_path: Path) -> None:
    """A second Ctrl-C does not wait for answers that do not come; the report is made all the same.

    The server stops once it has answered one call, so that the next is under way for good.
    """
    trace_of_calls(tmp_path / "trace", 0, CALL_US)
    words = ("--timeout", "600", "--start", fake(), "--out", tmp_path / "out")
    with command("replay", tmp_path / "trace", *words) as process:
        heard(process, "fake: load")
        (server,) = psutil.Process(process.pid).children()
        port = int(server.cmdline()[3])
        while not asyncio.run(keys(port)):
            time.sleep(0.05)
        server.suspend()
        time.sleep(CALL_US / 1e6 + 1)
        process.send_signal(signal.SIGINT)
        time.sleep(1.0)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=60)
    assert process.returncode == EXIT_INCOMPLETE, complaint
    assert (tmp_path / "out" / "report.html").exists()
    outcomes = Records(tmp_path / "out" / "fake" / "0").frame(OPS)["outcome"].tolist()
    assert outcomes == [Outcome.OK, Outcome.UNKNOWN], "it may have been done"


@pytest.mark.slow
def test_a_recording_that_is_ended_at_once_is_kept(tmp_path: Path) -> None:
    """A second Ctrl-C cuts off a call that has no answer; the file is whole, its end unknown."""
    (tmp_path / "data").mkdir()
    out = tmp_path / "trace"
    with small_etcd(tmp_path / "data") as port:
        words = ("record", "--listen", "127.0.0.1:0", "--upstream", f"127.0.0.1:{port}")
        with command(*words, "--out", out) as process:
            where = heard(process, "clients connect to ").partition(";")[0]
            server = _served_by(port)
            said = asyncio.run(_interrupt_twice(int(where.rpartition(":")[2]), server, process))
    assert (process.returncode, said) == (0, f"{out}: 2 calls on 1 connection\n")
    kinds = [(row.call, row.kind) for row in Trace(out)]
    assert kinds == [(0, Kind.BEGIN), (0, Kind.END), (1, Kind.BEGIN)]


def _served_by(port: int) -> psutil.Process:
    """The small etcd of this port; other tests may have left children that are ending."""
    words = ["-m", "tests.bench.fake_etcd", str(port)]
    (server,) = (child for child in psutil.Process().children() if child.cmdline()[1:4] == words)
    return server


async def _interrupt_twice(
    port: int, server: psutil.Process, process: "subprocess.Popen[str]"
) -> str:
    """While the server is stopped with a call; gives what the recorder said."""
    async with client(port) as user, asyncio.TaskGroup() as group:
        await user.txn(create(PODS + b"0", b""))
        server.suspend()
        calling = group.create_task(_refused(user))
        await asyncio.sleep(0.5)
        process.send_signal(signal.SIGINT)
        await asyncio.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        said, _ = await asyncio.to_thread(process.communicate, timeout=30)
        assert isinstance((await calling), grpc.aio.AioRpcError)
    return said


async def _refused(user: Client) -> grpc.aio.AioRpcError | None:
    """How a call failed."""
    try:
        await user.txn(create(PODS + b"1", b""))
    except grpc.aio.AioRpcError as error:
        return error
    return None


def test_who_interrupts_again_and_again_gets_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No trace of the program, whatever was under way."""

    async def ended(*_: object, **__: object) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr("bench.replay.session.replay", ended)
    monkeypatch.setattr("bench.replay.commands.record_trace", ended)
    trace_of_calls(tmp_path / "trace", 0)
    out = ("--out", str(tmp_path / "out"))
    code, told = say("replay", str(tmp_path / "trace"), "--start", "ours", *out)
    assert (code, told.count("\n")) == (EXIT_INCOMPLETE, 1)
    code, told = say("record", *out)
    assert (code, told.count("\n")) == (EXIT_REFUSED, 1)


@pytest.mark.slow
def test_nothing_that_was_recorded_is_no_trace(tmp_path: Path) -> None:
    """Nobody called: one line, and no file that looks like a recording."""
    (tmp_path / "data").mkdir()
    with small_etcd(tmp_path / "data") as port:
        words = ("record", "--listen", "127.0.0.1:0", "--upstream", f"127.0.0.1:{port}")
        with command(*words, "--out", tmp_path / "trace") as process:
            heard(process, "clients connect to ")
            process.send_signal(signal.SIGINT)
            said, complaint = process.communicate(timeout=30)
    assert (process.returncode, said, complaint.count("\n")) == (EXIT_REFUSED, "", 1)
    assert "nothing was recorded" in complaint
    assert not list(tmp_path.glob("trace*"))


def test_trace_without_a_call_is_refused(tmp_path: Path) -> None:
    """There is nothing to judge in a replay of nothing."""
    TraceWriter(tmp_path / "trace", ABOUT).close(SUMMARY)
    out = tmp_path / "out"
    code, told = say("replay", str(tmp_path / "trace"), "--start", "ours", "--out", str(out))
    assert (code, told.count("\n")) == (EXIT_REFUSED, 1)
    assert "holds no call" in told
    assert not out.exists()


def test_address_in_use_is_said_in_words(tmp_path: Path) -> None:
    """One line with the address and the system's words for it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        code, told = say("record", "--listen", place, "--out", str(tmp_path / "trace"))
    assert code == EXIT_REFUSED
    assert told == f"kvstore-bench: --listen {place}: address already in use\n"


def test_help_tells_what_is_in_latencies() -> None:
    """Whoever compares them with a storm's knows that nothing is left out."""
    assert "Latencies leave nothing out" in " ".join(say("replay", "--help")[1].split())


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["record", "--upstream", "h"], "h: HOST:PORT is wanted"),
        (["record", "--upstream", "https://h:1"], "https://h:1: HOST:PORT is wanted"),
        (["record", "--upstream", "127.0.0.1:1", "--listen", "127.0.0.1:0"], "127.0.0.1:1 "),
        (["record", "--listen", "192.0.2.1:1"], "--listen 192.0.2.1:1: cannot assign "),
        (["replay", "{text}", "--start", "ours"], "text is not a recording of kvstore-bench"),
        (["replay", "{cut}", "--start", "ours"], "cut is a recording that was not finished"),
        (["replay", "{trace}", "--start", "x=false {{port}} {{dir}}"], "x ended with code 1\n"),
        (["replay", "{trace}", "--target", "x=http://127.0.0.1:1"], ":1 cannot be reached: conn"),
        (
            ["replay", "{trace}", "--reps", "2", "--target", "x=http://127.0.0.1:1"],
            "--reps 2: x runs already",
        ),
        (["replay", "{text}"], "nothing to measure"),
        (["replay", "{text}", "--start", "redis"], "ours, etcd, kine, or NAME=COMMAND"),
        (["replay", "{text}", "--start", "ours", "--start", "ours"], "two targets are named ours"),
    ],
)
def test_wrong_words_are_refused_in_one_line(
    tmp_path: Path, words: list[str], complaint: str
) -> None:
    """The line says what is wrong; nothing is left behind."""
    files = {name: tmp_path / name for name in ("text", "cut", "trace")}
    files["text"].write_text("no trace")
    files["cut"].write_bytes(b"PAR1 and some rows")
    trace_of_calls(files["trace"], 0)
    out = tmp_path / "out"
    filled = [word.format(**files) for word in words]
    code, told = say(*filled, "--out", str(out))
    assert code == EXIT_REFUSED
    assert complaint in told
    assert told.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    "words", [["--speed", "nan"], ["--speed", "0"], ["--speed", "-1"], ["--timeout", "nan"]]
)
def test_numbers_that_are_none_are_refused(tmp_path: Path, words: list[str]) -> None:
    """The line names the flag, before the file is looked at."""
    (tmp_path / "text").write_text("no trace")
    out = ["--out", str(tmp_path / "out")]
    code, told = say("replay", str(tmp_path / "text"), "--start", "ours", *out, *words)
    assert code == EXIT_REFUSED
    assert told.startswith(f"kvstore-bench: Invalid value for '{words[0]}': ")
    assert told.count("\n") == 1


@pytest.mark.slow
def test_what_was_recorded_is_not_overwritten(tmp_path: Path) -> None:
    """A file that is there is refused by the one command, a folder that is used by the other."""
    kept = tmp_path / "kept"
    kept.write_text("kept")
    code, told = say("replay", str(kept), "--start", "ours", "--out", str(tmp_path))
    assert (code, told.count("\n")) == (EXIT_REFUSED, 1)
    assert "nothing is overwritten" in told
    (tmp_path / "data").mkdir()
    with small_etcd(tmp_path / "data") as port:
        words = ("record", "--listen", "127.0.0.1:0", "--upstream", f"127.0.0.1:{port}")
        code, told = say(*words, "--out", str(kept))
    assert (code, told.count("\n")) == (EXIT_REFUSED, 1)
    assert kept.read_text() == "kept"
