"""A store that is right passes every judge, and every judge has something to look at."""

import json
from pathlib import Path

import pytest

from bench.judges import JUDGES, judge
from bench.plan import Verb
from bench.records import TABLES, Recorder, Records
from tests.bench.judges import test_store_faults, test_watch_faults
from tests.bench.judges.large import write_run
from tests.bench.judges.world import World, facts_of, fresh


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_right_store_passes(seed: int, tmp_path: Path) -> None:
    """No judge finds fault with a store that is right, and none looks at nothing."""
    for verdict in judge(World(seed).records(tmp_path)):
        assert verdict.passed, (verdict, verdict.evidence)
        assert verdict.checked > 0, verdict


def test_every_judge_has_a_fault(tmp_path: Path) -> None:
    """For each judge there is a planted fault that it must catch."""
    faults = {*test_watch_faults.FAULTS.values(), *test_store_faults.FAULTS.values()}
    (tmp_path / "run.json").write_text(json.dumps(facts_of()))
    names = [verdict.judge for verdict in judge(Records(tmp_path))]
    assert len(names) == len(JUDGES) == len(set(names))
    assert set(names) == {name for name, _ in faults}


def test_nothing_is_not_a_pass(tmp_path: Path) -> None:
    """Of a run without rows every judge says that it has looked at nothing."""
    (tmp_path / "run.json").write_text(json.dumps(facts_of()))
    for table in TABLES:
        Recorder(table).write(tmp_path, 0)
    assert {(v.checked, v.violations) for v in judge(Records(tmp_path))} == {(0, 0)}


LACKING = {
    "Everyone is watching": "a trace's clients end watches as they like",
    "Bookmarkable": "nothing was watched",
    "TTL window": "no lease was asked for",
    "TTL overdue": "no lease was asked for",
    "Final state": "the final list was not read",
    "CAS chains": "no write compared a revision",
}


def test_who_looked_at_nothing_says_why(tmp_path: Path) -> None:
    """Every judge tells what it holds a server to, and of an empty run what it lacked."""
    (tmp_path / "run.json").write_text(json.dumps(facts_of()))
    told = {v.judge: v for v in judge(Records(tmp_path))}
    assert {name: told[name].lacking for name in LACKING} == LACKING
    assert all(verdict.lacking and verdict.rule.endswith(".") for verdict in told.values())
    assert "No watch shows a change twice." == told["Unique"].rule
    assert "none Unique: nothing was watched" == str(told["Unique"])


@pytest.mark.slow
def test_what_was_lacking_is_told_apart(tmp_path: Path) -> None:
    """No watch at all, watches that showed nothing, a run that was cut short: each has its words.

    Whoever did look at something lacked nothing.
    """
    world = fresh()
    assert {""} == {v.lacking for v in judge(world.records(tmp_path))}
    del world.rows["events"][1:]
    alone = {v.judge: v for v in judge(world.records(tmp_path))}
    assert "no watch showed two events" == alone["Ordered"].lacking
    assert "no revision of several changes was shown" == alone["Atomic"].lacking
    assert all(bool(v.lacking) == (v.checked == 0) for v in alone.values())
    world.rows["events"].clear()
    world.facts["state"] = "INCOMPLETE"
    silent = {v.judge: v.lacking for v in judge(world.records(tmp_path))}
    assert "no watch showed an event" == silent["Unique"] == silent["PrevKV"]
    assert "the run was cut short" == silent["Everyone is watching"]
    world.rows["watches"].clear()
    world.rows["ops"] = [op for op in world.rows["ops"] if op["verb"] != Verb.GRANT]
    unwatched = {v.judge: v.lacking for v in judge(world.records(tmp_path))}
    assert "nothing was watched" == unwatched["Unique"] == unwatched["Bookmarkable"]
    assert "no lease was asked for" == unwatched["TTL overdue"]


@pytest.mark.slow
def test_long_run_is_judged(tmp_path: Path) -> None:
    """Records made in columns, of many events, are judged like those of a small run."""
    write_run(tmp_path, 20_000)
    verdicts = judge(Records(tmp_path))
    assert [] == [verdict.evidence for verdict in verdicts if not verdict.passed]
    assert {"Reliable", "PrevKV", "CAS chains", "Final state", "Snapshot", "Lag drains"} <= {
        verdict.judge for verdict in verdicts if verdict.checked > 1000
    }
