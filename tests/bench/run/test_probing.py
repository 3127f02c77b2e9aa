"""A search of capacity as it is kept and told."""

import re
from pathlib import Path

import pytest

from bench.options import EXIT_INCOMPLETE, EXIT_INVALID, EXIT_REFUSED
from bench.report.results import Results
from bench.run.probing import CAPACITY, Capacities, Probe, Searched, known, outcome
from bench.run.session import Wish
from tests.bench.test_cli import results, say


def searched(name: str, *, held: float, fsync_us: float, over: bool = True) -> Searched:
    """A target that held a rate of claims, and missed the next one."""
    probes = [
        Probe(
            folder=f"{name}/probe-{number}",
            rate=held + number,
            finding=finding,
            why="slow",
            fsync_us=fsync_us,
            loopback_us=10.0,
        )
        for number, finding in enumerate(["holds", "misses"])
    ]
    return Searched(target=name, probes=probes, holds=held, misses=held + 1, over=over)


def kept(*targets: Searched) -> Capacities:
    """A search of these targets."""
    return Capacities(
        command_line=[],
        storm="swarm-burst",
        preset="xs",
        rate="claims",
        seconds=60,
        gates={},
        targets=list(targets),
    )


@pytest.mark.parametrize(("fsync_us", "apart"), [(110.0, False), (130.0, True)])
def test_a_machine_that_changed_speaks_against_comparing(fsync_us: float, *, apart: bool) -> None:
    """Each capacity is told all the same, with what stood in the way of more."""
    lines = list(
        outcome(
            kept(
                searched("ours", held=9, fsync_us=100.0),
                searched("etcd", held=7, fsync_us=fsync_us, over=False),
            )
        )
    )
    assert lines[:2] == [
        "ours: capacity is 9 claims; at 10 claims: misses: slow",
        "etcd: capacity is at least 7 claims; at 8 claims: misses: slow",
    ]
    said = "a synced write differed by 30 % between the targets' probes: do not compare"
    assert lines[2:] == ([said] if apart else [])


def test_nothing_that_held_is_a_capacity_only_if_the_server_missed() -> None:
    """If it was the generator that was late, nothing is known."""
    missed = searched("ours", held=0, fsync_us=1.0)
    late = searched("ours", held=0, fsync_us=1.0, over=False)
    assert (known(missed), known(late)) == (True, False)
    assert "capacity is 0 claims" in next(outcome(kept(missed)))
    assert "capacity is unknown" in next(outcome(kept(late)))


def test_a_search_of_capacity_begins_above_nothing(tmp_path: Path) -> None:
    """A rate of 0 can be doubled for ever."""
    words = ["run", "selector-read", "--set", "lists_per_second=0", "--start", "ours"]
    code, told = say(*words, "--capacity", "--out", str(tmp_path / "out"))
    assert (code, told.count("\n")) == (EXIT_REFUSED, 1)
    assert "lists_per_second is 0" in told


def test_capacity_is_told_as_it_was_probed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line has the rate that was run, in whole numbers where it is a count; so has the last.

    A server that ends within a probe has missed it.
    """
    ran: list[int] = []

    def record(wish: Wish) -> bool:
        ran.append(wish.parameters.claims)
        return False

    def report(*_: object) -> Results:
        state = "PASS" if ran[-1] <= 11 else "INCOMPLETE"
        found = results([state])
        found["targets"][0]["medians"] = {}
        return found

    monkeypatch.setattr("bench.cli._record", record)
    monkeypatch.setattr("bench.cli.make_report", report)
    words = ["run", "swarm-burst", "--set", "claims=3", "--start", "ours", "--capacity"]
    code, told = say(*words, "--out", str(tmp_path / "out"))
    assert code == 0
    assert ran == [3, 6, 12, 8, 10, 11]
    *lines, last = told.splitlines()
    assert [int(line.split()[2]) for line in lines] == ran
    assert last == "ours: capacity is 11 claims; at 12 claims: misses: INCOMPLETE: late by 9 s"
    code, again = say("report", str(tmp_path / "out"))
    assert code == 0
    assert [line.partition(" (")[0] for line in again.splitlines()] == [*lines, last]
    folders = [f"ours/probe-{number}" for number in range(1, 7)]
    assert re.findall(r"\((.*)\)", again) == folders


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"targets": [{"probes": 1}]}', "\0", "1"])
def test_a_damaged_search_is_told_by_its_file(tmp_path: Path, damage: str) -> None:
    """In one line, and in no words but the user's."""
    file = tmp_path / CAPACITY
    file.write_text(damage)
    told = f"kvstore-bench: {file}: damaged\n"
    assert say("report", str(tmp_path)) == (EXIT_REFUSED, told)


def test_a_search_that_is_interrupted_keeps_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What held by then is a lower bound; it is told at once, and can be told again."""
    ran: list[int] = []

    def record(wish: Wish) -> bool:
        ran.append(wish.parameters.claims)
        return len(ran) == 3

    def report(*_: object) -> Results:
        found = results(["PASS"])
        found["targets"][0]["medians"] = {}
        return found

    monkeypatch.setattr("bench.cli._record", record)
    monkeypatch.setattr("bench.cli.make_report", report)
    words = ["run", "swarm-burst", "--set", "claims=3", "--start", "ours", "--capacity"]
    code, told = say(*words, "--out", str(tmp_path / "out"))
    assert code == EXIT_INCOMPLETE
    assert "ours: capacity is at least 6 claims\n" in told
    assert "INCOMPLETE: " in told
    assert "ours: capacity is at least 6 claims\n" in say("report", str(tmp_path / "out"))[1]


def test_a_capacity_that_nobody_saw_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where not one probe could be believed there is no figure, and the exit code says so."""
    monkeypatch.setattr("bench.cli._record", lambda _: False)
    monkeypatch.setattr("bench.cli.make_report", lambda *_: results(["INVALID"]))
    words = ["run", "swarm-burst", "--start", "ours", "--capacity"]
    code, told = say(*words, "--out", str(tmp_path / "out"))
    assert code == EXIT_INVALID
    last = "ours: capacity is unknown; at 1 claims: unknown: INVALID: late by 9 s"
    assert told.splitlines()[-1] == last
