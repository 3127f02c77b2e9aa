"""Ctrl-C and SIGTERM while nobody waits: in imports, while a plan is made, after the last run."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench import cli
from bench.capsule import Capsule, capsule
from bench.options import EXIT_INCOMPLETE
from bench.plan import Plan
from bench.run import session as session_module
from bench.run.repetition import Progress
from bench.run.session import Wish, make_plan
from bench.run.show import Show
from bench.targets import TargetError
from tests.bench.run.test_session import SERVER, Once, run

pytestmark = pytest.mark.slow
on_asyncio = pytest.mark.parametrize("anyio_backend", [("asyncio", {})], ids=["asyncio"])
ROOT = Path(__file__).parents[2]
IMPORTING = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, path, target=None):
        if name == "uvloop":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
from bench.cli import main
main()
"""
HANDLED = """
import signal
before = signal.getsignal(signal.SIGINT)
import bench.cli
assert signal.getsignal(signal.SIGINT) is before
"""


def python(program: str) -> tuple[int, str]:
    """How a program ends, and what it says meanwhile."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout


def test_imports_end_without_a_word() -> None:
    """A Ctrl-C that is too early for anything to be lost ends the program as it does others."""
    assert python(IMPORTING) == (-signal.SIGINT, "")


def test_imports_leave_signals_as_they_were() -> None:
    """Who imports the command for what is in it, is interrupted as before."""
    assert python(HANDLED) == (0, "")


@on_asyncio
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_plan_that_is_being_made_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """One line, at once, though a plan leaves no time to anything else; nothing is left."""
    made: list[Plan] = []

    def interrupted(wish: Wish) -> Plan:
        os.kill(os.getpid(), number)
        made.append(make_plan(wish))
        return made[0]

    monkeypatch.setattr(session_module, "make_plan", interrupted)
    with pytest.raises(TargetError, match=r"^stopped before anything was measured$"):
        await run(tmp_path / "out", lambda *_: None)
    assert not made
    assert not (tmp_path / "out").exists()


@on_asyncio
async def test_a_second_signal_ends_the_look_at_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last run there is nothing that has to be waited for."""
    looked: list[Capsule] = []

    def interrupted(*arguments: Any) -> Capsule:  # noqa: ANN401 - whatever it is
        if looked:
            os.kill(os.getpid(), signal.SIGINT)
        looked.append(capsule(*arguments))
        return looked[-1]

    monkeypatch.setattr(session_module, "capsule", interrupted)
    stop = Once("load", lambda: os.kill(os.getpid(), signal.SIGINT))
    session, told = await run(tmp_path, stop)
    assert (session["state"], session["after"]) == ("INCOMPLETE", None)
    assert len(looked) == len(told) == 1
    assert told[0][1]


def test_who_ends_the_load_is_told_what_is_done_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, and before it is done."""
    stop = Once("load", lambda: os.kill(os.getpid(), signal.SIGINT))
    shown = Show.progress

    def progress(show: Show, target: str, number: int, done: Progress) -> None:
        stop(number, done)
        shown(show, target, number, done)

    monkeypatch.setattr(Show, "progress", progress)
    words = ["run", "selector-read", "--seconds", "5", "--reps", "1", "--no-background"]
    words += ["--set", "lists_per_second=1", "--set", "objects_per_kind=20"]
    words += ["--start", f"fake={SERVER}", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(cli.main, words)
    assert done.exit_code == EXIT_INCOMPLETE, done.output
    before, stopping, after = done.output.partition(
        "stopping: judging what there is; another signal ends it at once\n"
    )
    assert stopping
    assert "judges pass" not in before
    assert "fake 1: " in after
    assert "stopping" not in after
