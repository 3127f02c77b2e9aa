"""The commands ``record`` and ``replay`` as users meet them: words, signals, exit codes, files."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.options import EXIT_FAILED, EXIT_INCOMPLETE, EXIT_REFUSED
from kvstore.pb import rpc_pb2 as pb
from tests.bench.replay.stand import Client, client, create, delete, update
from tests.bench.test_cli import HELD, ROOT, command, fake, say

PODS = b"/registry/pods/"


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
    assert said == f"{out}: {calls} calls on 1 connections\n"
    return out


@pytest.mark.slow
def test_a_recorded_trace_is_replayed_and_judged(trace: Path, tmp_path: Path) -> None:
    """A right server passes with a report; one that loses a write does not, and its exit code."""
    with command("replay", trace, "--start", fake(), "--out", tmp_path / "out") as process:
        said, complaint = process.communicate(timeout=60)
    assert process.returncode in HELD, complaint
    assert "fake: 7 calls sent" in said
    assert (tmp_path / "out" / "report.html").exists()
    assert json.loads((tmp_path / "out" / "fake" / "0" / "run.json").read_text())["target"]
    faulty = fake("lost_write", 2)
    with command("replay", trace, "--start", faulty, "--out", tmp_path / "bad") as process:
        said, complaint = process.communicate(timeout=60)
    assert process.returncode == EXIT_FAILED, complaint
    assert "FAIL" in said
    results = json.loads((tmp_path / "bad" / "results.json").read_text())
    assert [target["state"] for target in results["targets"]] == ["FAIL"]


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


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["record", "--upstream", "h"], "h: HOST:PORT is wanted"),
        (["record", "--upstream", "https://h:1"], "https://h:1: HOST:PORT is wanted"),
        (["record", "--upstream", "127.0.0.1:1", "--listen", "127.0.0.1:0"], "127.0.0.1:1 "),
        (["record", "--listen", "192.0.2.1:1"], "192.0.2.1:1 cannot be listened on"),
        (["replay", "{text}", "--start", "ours"], "text"),
        (["replay", "{text}"], "nothing to measure"),
        (["replay", "{text}", "--start", "redis"], "ours, etcd, kine, or NAME=COMMAND"),
        (["replay", "{text}", "--start", "ours", "--start", "ours"], "two targets are named ours"),
    ],
)
def test_wrong_words_are_refused_in_one_line(
    tmp_path: Path, words: list[str], complaint: str
) -> None:
    """The line says what is wrong; nothing is left behind."""
    (tmp_path / "text").write_text("no trace")
    out = tmp_path / "out"
    filled = [word.format(text=tmp_path / "text") for word in words]
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
    assert f"Error: Invalid value for '{words[0]}'" in told


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
