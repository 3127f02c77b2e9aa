"""Sessions that do not go as planned: what is left behind, and that nothing is left running."""

import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench.cli import measures
from bench.client.asking import reach
from bench.clock import now_us
from bench.judges import judge
from bench.plan import Disturbance, Plan, Trouble
from bench.records import INCIDENTS, OPS, Records
from bench.report import report
from bench.report.session import VERDICTS, Session, run_folder
from bench.run import repetition as repetition_module
from bench.run import session as session_module
from bench.run.repetition import Progress
from bench.run.session import Runner, Wish, make_plan
from bench.storms import find, parse_parameters
from bench.targets import Running, Target, TargetError
from bench.verdicts import Verdict
from tests.bench.stopping import connections_when_stopped

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize("anyio_backend", [("asyncio", {})], ids=["asyncio"]),
]

SERVER = f"{sys.executable} -m tests.bench.fake_etcd {{port}} none 1 {{dir}}"
FAKE = Target(name="fake", command=SERVER)
KILLED = "fake was ended by signal 9"
Act = Callable[[int, Progress], None]


def children(word: str) -> list[psutil.Process]:
    """Our own processes with that word in their command."""
    mine = psutil.Process().children(recursive=True)
    return [child for child in mine if any(word in part for part in child.cmdline())]


def signal_all(word: str, number: signal.Signals) -> None:
    """Send it to each of those."""
    found = children(word)
    assert found
    for child in found:
        child.send_signal(number)


class Once:
    """Does something at a stage of the first repetition, half a second into it if it is a load."""

    def __init__(self, stage: str, do: Callable[[], None]) -> None:
        self.stage, self.do, self.done = stage, do, False
        self.stages: set[str] = set()

    def __call__(self, repetition: int, progress: Progress) -> None:
        """Told of progress."""
        self.stages.add(progress.stage)
        early = progress.stage == "load" and progress.elapsed_us < 500_000
        if progress.stage == self.stage and not self.done and not early:
            self.done = True
            self.do()


Told = list[tuple[int, Sequence[Verdict], str]]


async def run(
    out: Path,
    act: Act,
    target: Target = FAKE,
    *,
    processes: int = 1,
    repetitions: int = 2,
    seconds: int = 2,
    waiting: Callable[[str], None] = lambda _: None,
) -> tuple[Session, Told]:
    """A session of some repetitions of some seconds."""
    storm = find("selector-read")
    changes = {"lists_per_second": "1", "objects_per_kind": "20"}
    told: Told = []
    wish = Wish(
        storm=storm,
        preset="xs",
        parameters=parse_parameters(storm, "xs", changes),
        targets=[target],
        repetitions=repetitions,
        seed=1,
        duration_us=seconds * 1_000_000,
        out=out,
        background=False,
        ceiling=False,
        processes=processes,
    )
    runner = Runner(
        wish,
        lambda _, repetition, progress: act(repetition, progress),
        lambda _, repetition, verdicts, reason: told.append((repetition, verdicts, reason)),
        waiting=waiting,
    )
    session = await runner.run()
    assert not target.started or not children("fake_etcd")
    assert not children("bench.drive.worker")
    return session, told


def facts(out: Path, repetition: int) -> dict[str, Any]:
    """What a run says of itself."""
    found: dict[str, Any] = json.loads(
        (run_folder(out, "fake", repetition) / "run.json").read_text()
    )
    return found


async def test_server_that_dies_in_the_middle(tmp_path: Path) -> None:
    """Its run is kept, judged, and says why it is incomplete; the next one is whole."""
    die = Once("load", lambda: signal_all("fake_etcd", signal.SIGKILL))
    session, told = await run(tmp_path, die)
    first, second = facts(tmp_path, 0), facts(tmp_path, 1)
    assert ("INCOMPLETE", KILLED) == (first["state"], first["reason"])
    assert ("COMPLETE", "") == (second["state"], second["reason"])
    assert [(0, KILLED), (1, "")] == [(number, reason) for number, _, reason in told]
    assert all((run_folder(tmp_path, "fake", n) / VERDICTS).exists() for n in range(2))
    assert all(verdict.passed for _, verdicts, _ in told for verdict in verdicts)
    assert session["state"] == "INCOMPLETE"
    (target,) = report(tmp_path, measures)["targets"]
    assert target["state"] in {"INCOMPLETE", "INVALID"}  # on a busy machine the generator is late


async def test_server_that_dies_while_it_is_filled(tmp_path: Path) -> None:
    """There is nothing to judge; the run says why."""
    die = Once("filling", lambda: signal_all("fake_etcd", signal.SIGKILL))
    _, told = await run(tmp_path, die)
    assert ("INCOMPLETE", KILLED) == (
        facts(tmp_path, 0)["state"],
        facts(tmp_path, 0)["reason"],
    )
    assert [True, False] == [not verdicts for _, verdicts, _ in told]


async def test_server_that_ends_at_its_start(tmp_path: Path) -> None:
    """Nobody waits for one that has ended already; what it said last is told."""
    started = tmp_path / "started"
    command = (
        f"sh -c 'test -e {started} && echo no more >&2 && exit 7; touch {started}; exec {SERVER}'"
    )
    begun_us = now_us()
    session, told = await run(
        tmp_path / "out", lambda *_: None, Target(name="fake", command=command)
    )
    assert now_us() - begun_us < 20_000_000
    assert session["state"] == "INCOMPLETE"
    assert [
        (0, [], "fake ended with code 7: no more"),
        (1, [], "fake ended with code 7: no more"),
    ] == told
    assert report(tmp_path / "out", measures)["targets"][0]["state"] == "INCOMPLETE"


async def test_server_is_stopped_when_nobody_asks_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that ends in order waits for connections that are open."""
    left = connections_when_stopped(monkeypatch)
    await run(tmp_path, lambda *_: None, repetitions=1, seconds=1)
    assert [0, 0] == left


async def test_server_that_takes_its_time_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Soon, and once, by its name; one that answers at once is not."""
    monkeypatch.setattr(session_module, "SLOW_SECONDS", 0.1)
    monkeypatch.setattr(session_module, "START_TIMEOUT", 0.4)
    told: list[str] = []
    silent = Target(name="silent", command="sh -c 'sleep 500; : {port} {dir}'")
    with pytest.raises(TargetError, match=r"^silent at "):
        await run(tmp_path, lambda *_: None, silent, waiting=told.append)
    assert told == ["silent"]
    assert not children("sleep 500")


async def test_server_that_ends_at_once_is_refused(tmp_path: Path) -> None:
    """One that never started is no target: nothing is done, nobody waits, and it says how."""
    begun_us = now_us()
    command = "sh -c 'echo never >&2; : {port} {dir}; exit 3'"
    with pytest.raises(TargetError, match=r"^fake ended with code 3: never$"):
        await run(tmp_path, lambda *_: None, Target(name="fake", command=command))
    assert now_us() - begun_us < 10_000_000


async def test_generator_that_dies(tmp_path: Path) -> None:
    """The server is not accused for what went with the records; the next run is whole."""

    def kill_one() -> None:
        children("bench.drive.worker")[0].kill()

    die = Once("load", kill_one)
    _, told = await run(tmp_path, die, processes=2)
    first, second = facts(tmp_path, 0), facts(tmp_path, 1)
    assert "INCOMPLETE" == first["state"]
    assert first["reason"].startswith("generator process ")
    assert ("COMPLETE", "") == (second["state"], second["reason"])
    assert [[], True] == [told[0][1], all(verdict.passed for verdict in told[1][1])]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_signal_during_the_load(tmp_path: Path, number: signal.Signals) -> None:
    """The load ends in order, and is judged; no server is left."""
    stop = Once("load", lambda: os.kill(os.getpid(), number))
    session, told = await run(tmp_path, stop)
    assert "draining" in stop.stages
    assert ("INCOMPLETE", "INCOMPLETE", "") == (
        session["state"],
        facts(tmp_path, 0)["state"],
        facts(tmp_path, 0)["reason"],
    )
    assert 1 == len(told)
    assert told[0][1]
    assert facts(tmp_path, 0)["final_revision"] > 0


@pytest.mark.parametrize("stage", ["filling", "watching"])
async def test_signal_before_the_load(tmp_path: Path, stage: str) -> None:
    """Though the server answers nothing, the session ends soon, without a load."""

    def silence_and_stop() -> None:
        signal_all("fake_etcd", signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGINT)

    stop = Once(stage, silence_and_stop)
    begun_us = now_us()
    session, told = await run(tmp_path, stop)
    assert now_us() - begun_us < 15_000_000
    assert "load" not in stop.stages
    assert ("INCOMPLETE", [(0, [], "")]) == (session["state"], told)
    assert report(tmp_path, measures)["targets"][0]["state"] == "INCOMPLETE"


async def test_second_signal(tmp_path: Path) -> None:
    """Who cannot wait for the drain is not made to."""

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    stop, hurry = Once("load", interrupt), Once("draining", interrupt)

    def act(repetition: int, progress: Progress) -> None:
        stop(repetition, progress)
        hurry(repetition, progress)

    session, told = await run(tmp_path, act)
    assert ("INCOMPLETE", []) == (session["state"], told)
    assert report(tmp_path, measures)["targets"][0]["state"] == "INCOMPLETE"


async def test_trouble_ends_with_the_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is paused on purpose goes on when the user stops: its final list is read."""

    def with_pause(wish: Wish) -> Plan:
        pause = Disturbance(100_000, Trouble.PAUSE, lasts_us=60_000_000)
        return replace(make_plan(wish), disturbances=(pause,))

    monkeypatch.setattr(session_module, "make_plan", with_pause)
    stop = Once("load", lambda: os.kill(os.getpid(), signal.SIGINT))
    begun_us = now_us()
    _, told = await run(tmp_path, stop)
    assert now_us() - begun_us < 50_000_000
    assert facts(tmp_path, 0)["final_revision"] > 0
    assert told[0][1]
    assert 1 == len(Records(run_folder(tmp_path, "fake", 0)).frame(INCIDENTS))


@pytest.mark.parametrize("stage", ["filling", "draining"])
async def test_server_that_cannot_be_cleaned(tmp_path: Path, stage: str) -> None:
    """On a server that is not ours the session goes on to its end, and says what it left there."""
    stop = Once(stage, lambda: os.kill(os.getpid(), signal.SIGINT))
    with Running(Target(name="fake", command=SERVER)) as server:
        (await reach(server.host, server.port, 30)).close()
        attached = Target(name="fake", host=server.host, port=server.port)
        session, told = await run(tmp_path / "one", stop, attached)
    assert session["state"] == "INCOMPLETE"
    ((_, verdicts, remark),) = told
    assert remark.startswith("what it wrote was not deleted: ")
    assert bool(verdicts) == (stage == "draining")


@asynccontextmanager
async def attached(target: Target) -> AsyncIterator[tuple[Running, Target]]:
    """A server that runs, and as what it is attached."""
    with Running(target) as server:
        (await reach(server.host, server.port, 30)).close()
        yield server, Target(name="fake", host=server.host, port=server.port)


@pytest.mark.parametrize("number", [None, signal.SIGTERM])
async def test_attached_server_that_is_gone(tmp_path: Path, number: signal.Signals | None) -> None:
    """It is given up soon after the load, or after a signal within it; meanwhile the user is told.

    What there is is judged, though the server's end is nowhere to be seen.
    """
    notes: set[str] = set()

    async with attached(FAKE) as (server, target):
        die = Once("load", server.kill)

        def act(repetition: int, progress: Progress) -> None:
            die(repetition, progress)
            notes.add(progress.note)
            if number is not None and "no connection" in progress.note and len(signals) < 1:
                signals.append(now_us())
                os.kill(os.getpid(), number)

        signals: list[int] = []
        begun_us = now_us()
        session, told = await run(
            tmp_path / "out", act, target, repetitions=1, seconds=30 if number else 2
        )
    assert now_us() - (signals[0] if signals else begun_us) < (8_000_000 if number else 25_000_000)
    said = facts(tmp_path / "out", 0)
    assert ("INCOMPLETE", "INCOMPLETE") == (session["state"], said["state"])
    where = f"fake at {target.host}:{target.port}: no connection since "
    assert said["reason"] == "" if number else said["reason"].startswith(where)
    assert "no connection for 1 s" in notes
    assert session["before"]["versions"]["fake"] == "API 3.6.0-fake"
    ((_, verdicts, remark),) = told
    assert all(verdict.passed for verdict in verdicts)
    assert any(verdict.checked for verdict in verdicts)
    assert "what it wrote was not deleted: " in remark


async def test_attached_server_that_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the load it is waited for, however long it takes, and measured to the end."""
    monkeypatch.setattr(repetition_module, "LOST_SECONDS", 1.0)
    async with attached(FAKE) as (server, target):
        die = Once("load", server.kill)
        lost: set[str] = set()

        def act(repetition: int, progress: Progress) -> None:
            die(repetition, progress)
            if "no connection for 2 s" in progress.note and not lost:
                lost.add(progress.note)
                server.start()

        await run(tmp_path / "out", act, target, repetitions=1, seconds=10)
    said = facts(tmp_path / "out", 0)
    assert ("COMPLETE", "") == (said["state"], said["reason"])
    assert lost
    assert said["final_revision"] > 0


@pytest.mark.parametrize("signals", [1, 2])
async def test_signal_while_judging(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signals: int
) -> None:
    """After one the judges finish and no other run begins; a second ends them, records stay."""

    def interrupted(records: Records) -> list[Verdict]:
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGINT)
        return judge(records)

    monkeypatch.setattr(session_module, "judge", interrupted)
    session, told = await run(tmp_path, lambda *_: None)
    assert [signals == 1] == [bool(verdicts) for _, verdicts, _ in told]
    assert ("INCOMPLETE", "COMPLETE") == (session["state"], facts(tmp_path, 0)["state"])
    assert (signals == 1) == (session["after"] is not None)
    assert len(Records(run_folder(tmp_path, "fake", 0)).frame(OPS))


async def test_a_kill_is_told_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who watches sees how many there were; the records say when it began and was over.

    That is when the server answers again, though the load has ended meanwhile.
    """

    def with_kill(wish: Wish) -> Plan:
        return replace(make_plan(wish), disturbances=(Disturbance(1_900_000, Trouble.KILL),))

    kills: set[int] = set()
    monkeypatch.setattr(session_module, "make_plan", with_kill)
    slow = replace(FAKE, command=f"sh -c 'sleep 1.5; exec {SERVER}'")
    session, _ = await run(
        tmp_path, lambda _, progress: kills.add(progress.kills), slow, repetitions=1
    )
    assert ("COMPLETE", {0, 1}) == (facts(tmp_path, 0)["state"], kills)
    assert session["before"]["versions"]["fake"].endswith("API 3.6.0-fake")
    incidents = Records(run_folder(tmp_path, "fake", 0)).frame(INCIDENTS)
    assert [Trouble.KILL] == incidents["trouble"].tolist()
    assert incidents["until"][0] - incidents["at"][0] > 1_400_000
