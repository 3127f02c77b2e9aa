"""What may be said of a target, and what is hidden."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from bench.records import Outcome
from bench.report.durability import equally_durable
from bench.report.results import (
    MixedRunsError,
    Results,
    Target,
    build,
    has_speed,
    stored,
    write,
)
from bench.report.session import VERDICTS, UnusableError, run_folder
from bench.verdicts import VIOLATIONS_KEPT, Verdict
from tests.bench.report.made import CAPSULE, GOOD, SECOND, Run, session

pytestmark = pytest.mark.slow
MEANS = {"ours": 2000.0, "etcd": 4000.0}
LOST = Verdict("Reliable", 400, 2, ("revision 17 of /registry/pods/a is missing", "and 19"))


def late(run: Run) -> None:
    """Make the generator late."""
    for n in range(50):
        run.op(n * 1000, lag=20_000, latency=30_000, actor=9000 + n)


def target(results: Results, name: str) -> Target:
    """One of a session."""
    return next(one for one in results["targets"] if one["name"] == name)


def test_sound_sessions_pass_and_are_compared(tmp_path: Path) -> None:
    """Both pass, and half the latency is a ratio of about a half, better for certain."""
    session(tmp_path, means_us=MEANS)
    results = build(tmp_path)
    assert ["PASS", "PASS"] == [one["state"] for one in results["targets"]]
    rows = {row["metric"]: row for row in results["comparisons"]}
    p50 = rows["latency_p50_us"]
    assert ("ours", "etcd", "better") == (p50["target"], p50["against"], p50["finding"])
    assert 0.5 == pytest.approx(p50["ratio"], rel=0.2)
    assert "no difference" == rows["rate_per_second"]["finding"]
    assert "send_lag_p99_us" not in rows


def test_a_higher_rate_is_better(tmp_path: Path) -> None:
    """Of rates more is better, although of all else less is."""

    def more(run: Run) -> None:
        for n in range(40):
            run.op(n * 1000, actor=5000 + n)

    session(tmp_path, means_us={"ours": 2000, "etcd": 2000}, seconds=1, changes={"ours": more})
    rows = {row["metric"]: row for row in build(tmp_path)["comparisons"]}
    assert 1.5 < rows["rate_per_second"]["ratio"]
    assert "better" == rows["rate_per_second"]["finding"]


def test_a_violation_hides_the_speed(tmp_path: Path) -> None:
    """One violation in one of five runs: evidence is kept, no figure and no ratio is."""
    session(tmp_path, means_us=MEANS, seconds=2)
    bad = run_folder(tmp_path, "ours", 3) / VERDICTS
    bad.write_text(json.dumps([vars_of(LOST), *map(vars_of, GOOD)]))
    results = build(tmp_path)
    ours = target(results, "ours")
    assert "FAIL" == ours["state"]
    assert ["run 3: Reliable: 2 of 400"] == ours["reasons"]
    (judge,) = (one for one in ours["judges"] if one["violations"])
    assert ["run 3: " + line for line in LOST.evidence] == judge["evidence"]
    assert is_silent(ours)
    assert [] == results["comparisons"]
    assert ["ours / etcd: ours is FAIL"] == results["not_compared"]
    assert has_speed(target(results, "etcd"))


def vars_of(verdict: Verdict) -> dict[str, object]:
    """As it is stored."""
    return asdict(verdict)


def is_silent(one: Target) -> bool:
    """Is there no figure of it anywhere?"""
    figures = (one["medians"], one["curve"], one["course"], *(run["values"] for run in one["runs"]))
    return not any(figures)


def test_evidence_is_limited(tmp_path: Path) -> None:
    """Of many violations the first few are kept, and all are counted."""
    lines = tuple(f"violation {n}" for n in range(VIOLATIONS_KEPT))
    many = replace(LOST, violations=100, evidence=lines)
    session(tmp_path, means_us=MEANS, seconds=1, verdicts={"ours": [many]})
    (judge,) = target(build(tmp_path), "ours")["judges"]
    assert 500 == judge["violations"]
    assert VIOLATIONS_KEPT == len(judge["evidence"])


def test_a_late_generator_is_invalid_and_hides_the_speed(tmp_path: Path) -> None:
    """The reason names the run and the lag."""
    session(tmp_path, means_us=MEANS, seconds=2, changes={"etcd": late})
    etcd = target(build(tmp_path), "etcd")
    assert "INVALID" == etcd["state"]
    assert "run 0: send lag p99 20.0 ms, 5 ms is allowed" == etcd["reasons"][0]
    assert is_silent(etcd)


def test_a_violation_outweighs_an_invalid_run(tmp_path: Path) -> None:
    """A late generator is no excuse for a lost event."""
    wrong = {"ours": [LOST]}
    session(tmp_path, means_us=MEANS, seconds=2, verdicts=wrong, changes={"ours": late})
    assert "FAIL" == target(build(tmp_path), "ours")["state"]


def test_lateness_of_a_late_generator_is_not_the_servers(tmp_path: Path) -> None:
    """What is wrong in time only is INVALID where the generator was late, and FAIL elsewhere."""
    slow = Verdict("Lag drains", 40, 1, ("a watch was 6 s behind",), timed=True)
    for name, wrong in (("late", late), ("sound", lambda _: None)):
        (tmp_path / name).mkdir()
        verdicts = {"ours": [*GOOD, slow]}
        changes = {"ours": wrong}
        session(tmp_path / name, means_us=MEANS, seconds=1, verdicts=verdicts, changes=changes)
    excused, failed = (target(build(tmp_path / name), "ours") for name in ("late", "sound"))
    assert ("INVALID", "FAIL") == (excused["state"], failed["state"])
    assert any(line.startswith("run 0: Lag drains: 1 of 40, ") for line in excused["reasons"])
    sums = [one["judges"][-1] for one in (excused, failed)]
    assert [(0, 5), (5, 0)] == [(one["violations"], one["excused"]) for one in sums]
    assert [0] * 5 == [run["violations"] for run in excused["runs"]]
    assert is_silent(excused)
    assert is_silent(failed)


def test_a_run_that_showed_no_event_is_not_judged(tmp_path: Path) -> None:
    """Something was watched, and nothing of it was ever compared: that is no pass."""
    blind = [replace(one, checked=0) if one.judge == "Reliable" else one for one in GOOD]
    session(tmp_path, means_us=MEANS, seconds=1, verdicts={"ours": blind})
    results = build(tmp_path)
    assert ["NOT JUDGED", "PASS"] == [one["state"] for one in results["targets"]]
    assert is_silent(target(results, "ours"))


@pytest.mark.parametrize("watches", [0, 1])
def test_a_run_that_watches_nothing_needs_no_judge_of_watches(tmp_path: Path, watches: int) -> None:
    """A replay of calls without watches may pass; one whose watches showed nothing may not."""

    def replay(run: Run) -> None:
        run.forget_watches()
        for watch in range(watches):
            run.watcher(watch)

    some = {"ours": [Verdict("Final state", 4)]}
    session(tmp_path, means_us=MEANS, seconds=1, verdicts=some, changes={"ours": replay})
    assert ("NOT JUDGED" if watches else "PASS") == target(build(tmp_path), "ours")["state"]


def test_a_drifting_machine_makes_a_lone_target_invalid(tmp_path: Path) -> None:
    """A disk that became a third slower says so when there is nothing to compare with."""
    after = CAPSULE.copy()
    after["fsync_p50_us"] *= 1.34
    session(tmp_path, means_us={"ours": MEANS["ours"]}, seconds=1, after=after)
    (one,) = build(tmp_path)["targets"]
    assert "INVALID" == one["state"]
    assert ["fsync changed by 34 % meanwhile, 25 % is allowed"] == one["reasons"]
    assert is_silent(one)


def test_targets_in_turns_share_the_drift(tmp_path: Path) -> None:
    """What changed for all of them is told, and their ratio stands."""
    after = CAPSULE.copy()
    after["fsync_p50_us"] *= 1.34
    session(tmp_path, means_us=MEANS, seconds=1, after=after)
    results = build(tmp_path)
    assert ["PASS"] * len(MEANS) == [one["state"] for one in results["targets"]]
    assert 34 == pytest.approx(results["drift_percent"]["fsync"], abs=0.1)


@pytest.mark.parametrize(("factor", "allowed"), [(1.14, True), (1.2, False)])
def test_a_machine_that_favours_a_target_makes_all_invalid(
    tmp_path: Path, factor: float, *, allowed: bool
) -> None:
    """One whose loopback is slower whenever one target has its turn compares the machine."""

    def slowed(run: Run) -> None:
        run.facts["loopback_us"] *= factor

    session(tmp_path, means_us=MEANS, seconds=1, changes={"etcd": slowed})
    for one in build(tmp_path)["targets"]:
        assert ("PASS" if allowed else "INVALID") == one["state"]
        expected = "loopback differed by 20 % between the targets' runs, 15 % is allowed"
        assert allowed or [expected] == one["reasons"]
        assert allowed or is_silent(one)


@pytest.mark.parametrize("verdicts", [None, [], [Verdict("Ordered", 0)]])
def test_a_run_that_nobody_judged_has_no_speed(
    tmp_path: Path, verdicts: list[Verdict] | None
) -> None:
    """No verdicts, none at all, or judges that looked at nothing: NOT JUDGED, not PASS."""
    session(tmp_path, means_us=MEANS, seconds=1, verdicts={"ours": verdicts or []})
    if verdicts is None:
        (run_folder(tmp_path, "ours", 2) / VERDICTS).unlink()
    ours = target(build(tmp_path), "ours")
    assert "NOT JUDGED" == ours["state"]
    assert is_silent(ours)


def test_why_a_run_was_not_judged_is_told(tmp_path: Path) -> None:
    """A replay whose calls judges cannot follow says so itself; nobody has to guess."""

    def say_why(run: Run) -> None:
        run.facts["reason"] = "calls that judges cannot follow: 1 KV/Put"

    nothing = {"ours": list[Verdict]()}
    session(tmp_path, means_us=MEANS, seconds=1, verdicts=nothing, changes={"ours": say_why})
    reasons = target(build(tmp_path), "ours")["reasons"]
    assert "run 0 was not judged: calls that judges cannot follow: 1 KV/Put" == reasons[0]


def test_one_judge_without_work_is_no_failure(tmp_path: Path) -> None:
    """It is kept as having looked at nothing, beside those that did."""
    session(tmp_path, means_us=MEANS, seconds=1)
    ours = target(build(tmp_path), "ours")
    assert "PASS" == ours["state"]
    assert {"Ordered": 2000, "Reliable": 2000, "Resumable": 0, "swarm-burst: one owner": 250} == {
        one["judge"]: one["checked"] for one in ours["judges"]
    }


def test_an_interrupted_run_enters_no_median(tmp_path: Path) -> None:
    """Its figures are kept beside its state; four complete runs are too few for a verdict."""

    def interrupt(run: Run) -> None:
        if run.facts["repetition"] == 4:
            run.facts["state"] = "INCOMPLETE"
            for n in range(500):
                run.op(n, latency=4 * SECOND, actor=5000 + n)

    session(tmp_path, means_us=MEANS, seconds=3, changes={"ours": interrupt})
    results = build(tmp_path)
    ours = target(results, "ours")
    assert ("INCOMPLETE", ["4 complete runs of 5"]) == (ours["state"], ours["reasons"])
    assert 3_900_000 < ours["runs"][4]["values"]["latency_p99_us"]
    assert 100_000 > ours["medians"]["latency_p99_us"]
    assert 100_000 > ours["curve"][-1][1]
    assert {"too few"} == {row["finding"] for row in results["comparisons"]}
    assert {None} == {row["low"] for row in results["comparisons"]}


@pytest.mark.parametrize(
    ("told", "commands", "equal"),
    [
        (("fsync per commit", "fsync per group of commits"), ("a", "b"), True),
        (("fsync per commit", "none (memory)"), ("a", "a"), False),
        (("none (memory)", "none (memory)"), ("a", "b"), True),
        (("unknown", "fsync per commit"), ("a", "b"), False),
        (("unknown", "unknown"), ("a", "b"), False),
        (("unknown", "unknown"), ("", ""), False),
        (("unknown", "unknown"), ("a", "a"), True),
    ],
)
def test_classes_of_durability(
    told: tuple[str, str], commands: tuple[str, str], *, equal: bool
) -> None:
    """Whoever has synced is equal, however; who is not known is equal to its own command only."""
    assert equal == equally_durable(told, commands)


def test_a_sync_for_each_commit_is_compared_with_one_for_many(tmp_path: Path) -> None:
    """How a server comes to have synced is no reason to refuse a ratio."""

    def each(run: Run) -> None:
        run.facts["durability"] = "fsync per group of commits"

    session(tmp_path, means_us=MEANS, seconds=1, changes={"etcd": each})
    results = build(tmp_path)
    assert [] == results["not_compared"]
    assert results["comparisons"]


def test_why_a_run_ended_is_told(tmp_path: Path) -> None:
    """A server that died before anything was recorded leaves its facts, and they say why."""

    def died(run: Run) -> None:
        if run.facts["repetition"] == 1:
            run.facts |= {"state": "INCOMPLETE", "reason": "ours ended: no space left"}

    session(tmp_path, means_us=MEANS, seconds=1, repetitions=2, changes={"ours": died})
    dead = run_folder(tmp_path, "ours", 1)
    for table in dead.glob("*.parquet"):
        table.unlink()
    (dead / VERDICTS).unlink()
    facts = json.loads((dead / "run.json").read_text()) | {"rows": {}}
    (dead / "run.json").write_text(json.dumps(facts))
    ours = target(build(tmp_path), "ours")
    assert "INCOMPLETE" == ours["state"]
    assert ["1 complete run of 2", "run 1: ours ended: no space left"] == ours["reasons"]
    assert {} == ours["runs"][1]["values"]


def test_other_durability_is_not_compared(tmp_path: Path) -> None:
    """Each has figures, and there is no ratio."""

    def lazy(run: Run) -> None:
        run.facts["durability"] = "none"

    session(tmp_path, means_us=MEANS, seconds=1, changes={"etcd": lazy})
    results = build(tmp_path)
    assert [] == results["comparisons"]
    assert "durability differs" in results["not_compared"][0]


def test_runs_of_another_plan_are_refused(tmp_path: Path) -> None:
    """One run with another fingerprint spoils the session."""

    def other(run: Run) -> None:
        run.facts["fingerprint"] = "0" * 64

    session(tmp_path, means_us=MEANS, seconds=1, repetitions=1, changes={"etcd": other})
    with pytest.raises(MixedRunsError, match="another plan"):
        build(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_run_is_named(tmp_path: Path, text: str) -> None:
    """Whoever reads the complaint knows which file to look at."""
    session(tmp_path, means_us=MEANS, seconds=1, repetitions=1)
    damaged = run_folder(tmp_path, "etcd", 0) / "run.json"
    damaged.write_text(text)
    with pytest.raises(UnusableError, match=str(damaged)):
        build(tmp_path)


def test_a_folder_without_a_session_is_named(tmp_path: Path) -> None:
    """There is nothing to draw, and the complaint says where."""
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: neither"):
        stored(tmp_path)


def test_a_storms_measures_stand_beside_the_figures(tmp_path: Path) -> None:
    """They have medians and ratios of their own."""
    session(tmp_path, means_us=MEANS, seconds=1)
    results = build(
        tmp_path, lambda records: {"all_ready_us": 2.0 if records.facts["target"] == "ours" else 8}
    )
    assert 2 == target(results, "ours")["medians"]["all_ready_us"]
    (row,) = (row for row in results["comparisons"] if row["metric"] == "all_ready_us")
    assert (0.25, "better") == (row["ratio"], row["finding"])


def test_results_are_small_and_outlive_raw_records(tmp_path: Path) -> None:
    """What is kept is what was built; it is read where the raw records are gone."""
    raw, kept = tmp_path / "raw", tmp_path / "kept"
    raw.mkdir()
    kept.mkdir()
    session(raw, means_us=MEANS)
    results = build(raw)
    write(kept, results)
    assert results == stored(kept) == stored(raw)
    assert 100_000 > (kept / "results.json").stat().st_size


def test_errors_are_told_per_run(tmp_path: Path) -> None:
    """The error budget of each run is kept, of a failed target too: it is no speed."""

    def broken(run: Run) -> None:
        run.op(0, actor=7777, outcome=Outcome.UNKNOWN, code=14)

    session(
        tmp_path, means_us=MEANS, seconds=1, verdicts={"ours": [LOST]}, changes={"ours": broken}
    )
    ours = target(build(tmp_path), "ours")
    assert [{"UNKNOWN 14": 1}] * 5 == [run["errors"] for run in ours["runs"]]
