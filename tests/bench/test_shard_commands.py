"""``--shard-stop`` and ``--shard-start``: what is refused, and that what they do is judged."""

import asyncio
import json
import signal
import time
from pathlib import Path

import anyio.lowlevel
import pytest

from bench.options import EXIT_REFUSED
from bench.run import repetition
from tests.bench.test_cli import command, fake, say

STORM = ("run", "noisy-shard", "--reps", "1", "--seconds", "3", "--no-background")
CHANGES = ("runs_per_second=80", "tenants=8", "noise_factor=1", "outage_s=0.8")
SMALL = [word for change in CHANGES for word in ("--set", change)]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--shard-stop", "true"), "one is nothing without the other"),
        (("--shard-start", "true"), "one is nothing without the other"),
        (("--start", "etcd", "--shard-stop", "a", "--shard-start", "b"), "one server alone"),
        (("--shard-stop", "it's", "--shard-start", "b"), "No closing quotation"),
    ],
)
def test_refusals(tmp_path: Path, words: tuple[str, ...], complaint: str) -> None:
    """Half of a pair, a pair for two servers, and a command that is none are refused at once."""
    etcd = ("--etcd-bin", "/bin/true")
    code, told = say(*STORM, "--start", fake(), *etcd, *words, "--out", str(tmp_path / "out"))
    assert (EXIT_REFUSED, 1) == (code, told.count("\n"))
    assert complaint in told


@pytest.mark.slow
def test_commands_that_stop_nothing_are_found_out(tmp_path: Path) -> None:
    """Both are run, once each, and a tenant that is served meanwhile is no outage."""
    trace, out = tmp_path / "trace", tmp_path / "out"
    words = [part for name in ("stop", "start") for part in (f"--shard-{name}", note(trace, name))]
    with command(*STORM, *SMALL, "--start", fake(), *words, "--out", out) as process:
        told, _ = process.communicate(timeout=120)
    assert "stop\nstart\n" == trace.read_text()
    assert "noisy-shard: the outage was one" in told
    verdicts = json.loads((out / "fake" / "0" / "verdicts.json").read_text())
    found = {one["judge"]: one["violations"] for one in verdicts}
    assert found["noisy-shard: the outage was one"] > 0
    assert 0 == found["noisy-shard: neighbours are served"]


@pytest.mark.slow
def test_a_command_that_fails_ends_the_run(tmp_path: Path) -> None:
    """Nobody knows what was measured then."""
    out = tmp_path / "out"
    words = ("--shard-stop", "false", "--shard-start", "true")
    with command(*STORM, *SMALL, "--start", fake(), *words, "--out", out) as process:
        told, _ = process.communicate(timeout=120)
    assert "INCOMPLETE" in told
    facts = json.loads((out / "fake" / "0" / "run.json").read_text())
    assert "false: exit code 1" == facts["reason"]


@pytest.mark.slow
def test_an_interrupted_run_leaves_no_shard_stopped(tmp_path: Path) -> None:
    """Interrupted while the shard is being stopped, the run still has it started."""
    trace, out = tmp_path / "trace", tmp_path / "out"
    stop = ("--shard-stop", f"sh -c 'echo stop >> {trace}; sleep 2; echo stopped >> {trace}'")
    start = ("--shard-start", note(trace, "start"))
    with command(*STORM, *SMALL, "--start", fake(), *stop, *start, "--out", out) as process:
        while not trace.exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        told, _ = process.communicate(timeout=120)
    assert "stop\nstopped\nstart\n" == trace.read_text()
    assert "INCOMPLETE" in told


def test_a_command_that_is_being_started_is_waited_for(tmp_path: Path) -> None:
    """However early it is cancelled, it is not ended half-way."""

    async def cancelled_after(turns: int, done: Path) -> None:
        doing = asyncio.get_running_loop().create_task(
            repetition._command(f"sh -c 'sleep 0.3; touch {done}'")
        )
        for _ in range(turns):
            await anyio.lowlevel.checkpoint()
        doing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await doing

    for turns in range(1, 8):
        done = tmp_path / str(turns)
        asyncio.run(cancelled_after(turns, done))
        assert done.exists()


def note(trace: Path, word: str) -> str:
    """A command that leaves a word behind."""
    return f"sh -c 'echo {word} >> {trace}'"
