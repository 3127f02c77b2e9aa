"""A disk that takes no more while a session is measured: it is told, and what fits is kept."""

import json
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bench import cli
from bench.options import EXIT_INCOMPLETE, EXIT_REFUSED
from bench.run.repetition import Progress
from bench.run.show import Show
from bench.targets import Running
from tests.bench.run.test_session import children

pytestmark = pytest.mark.slow
FAKE = f"fake={sys.executable} -m tests.bench.fake_etcd {{port}} none 1 {{dir}}"
WORDS = [
    *("run", "selector-read", "--seconds", "2", "--reps", "3", "--no-background"),
    *("--set", "lists_per_second=1", "--set", "objects_per_kind=20", "--start", FAKE),
]
FACTS_FIT = 2_500
"""Bytes for a run's facts, and too few for its samples or its calls."""


@pytest.fixture(autouse=True)
def unbounded() -> Iterator[None]:
    """Whatever bounds the files of this process bounds those of no other test."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def hold(size: int, process: int = 0) -> None:
    """No file of a process grows beyond so many bytes, as on a disk that is full."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.prlimit(process, resource.RLIMIT_FSIZE, (size, hard))


def hold_generator() -> None:
    """Likewise its processes."""
    for process in children("bench.drive.worker"):
        hold(FACTS_FIT, process.pid)


def run(out: Path) -> tuple[int, str]:
    """The exit code of a session, and all that it says."""
    done = CliRunner().invoke(cli.main, [*WORDS, "--out", str(out)])
    assert not children("fake_etcd")
    assert not children("bench.drive.worker")
    return done.exit_code, done.output


def at_the_load(monkeypatch: pytest.MonkeyPatch, do: Callable[[], None]) -> None:
    """Do it in the load of the second repetition."""
    shown = Show.progress

    def progress(show: Show, target: str, number: int, done: Progress) -> None:
        if number == 1 and done.stage == "load":
            do()
        shown(show, target, number, done)

    monkeypatch.setattr(Show, "progress", progress)


def facts(out: Path, repetition: int) -> dict[str, Any]:
    """What a run says of itself."""
    said: dict[str, Any] = json.loads((out / "fake" / str(repetition) / "run.json").read_text())
    return said


@pytest.mark.parametrize("do", [lambda: hold(FACTS_FIT), hold_generator], ids=["here", "there"])
def test_a_full_disk_ends_the_session_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, do: Callable[[], None]
) -> None:
    """One line says it; the run before it stays judged, this one says why, and no other begins."""
    at_the_load(monkeypatch, do)
    code, told = run(tmp_path)
    assert code == EXIT_INCOMPLETE, told
    (line,) = (line for line in told.splitlines() if line.startswith("kvstore-bench: "))
    assert line == (
        f"kvstore-bench: {tmp_path}: file too large: the session ends here, and what could be"
        " written is kept"
    )
    first, second = facts(tmp_path, 0), facts(tmp_path, 1)
    assert (first["state"], second["state"]) == ("COMPLETE", "INCOMPLETE")
    assert second["reason"] == "not all records could be written: file too large"
    judged = [path.parent.name for path in tmp_path.glob("fake/*/verdicts.json")]
    assert judged == ["0"]
    assert json.loads((tmp_path / "session.json").read_text())["state"] == "INCOMPLETE"
    assert sorted(path.name for path in (tmp_path / "fake").iterdir()) == ["0", "1"]
    assert not list(tmp_path.glob("plan.pickle"))


def test_the_facts_of_a_run_are_kept_when_its_server_has_left_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a byte can be written until the server's data are deleted; then there is the reason."""

    class Leaving(Running):
        def stop(self, seconds: float) -> None:
            super().stop(seconds)
            hold(resource.RLIM_INFINITY)

    monkeypatch.setattr("bench.run.session.Running", Leaving)
    at_the_load(monkeypatch, lambda: hold(0))
    code, told = run(tmp_path)
    assert code == EXIT_INCOMPLETE, told
    assert facts(tmp_path, 1)["reason"] == "not all records could be written: file too large"
    assert (tmp_path / "report.html").exists()


def test_a_disk_that_is_full_beforehand_is_refused(tmp_path: Path) -> None:
    """One line, and nothing is left: nothing was measured."""
    hold(100)
    code, told = run(tmp_path)
    assert code == EXIT_REFUSED
    assert told == f"kvstore-bench: {tmp_path}: file too large: nothing was measured\n"
    assert not list(tmp_path.iterdir())
