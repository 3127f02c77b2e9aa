"""S2: how much a run writes, and that lost, doubled and foreign steps show."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from bench import values
from bench.plan import WRITES, Edit, Plan, Verb
from bench.records import EventType, Outcome
from bench.storms import objects, tool_fanout
from tests.bench.storms.perfect import Played, Row, play

SMALL = tool_fanout.Parameters(runs_per_second=2.0, tenants=2, grown=0, keep_s=1.0)


def plan() -> Plan:
    """A few runs, of which some are over and deleted within the load."""
    return tool_fanout.schedule(SMALL, 8_000_000, random.Random(4))


def deletions(played: Played) -> list[Row]:
    """Of runs, as watches heard of them."""
    rows = played.find("events", type=EventType.DELETE)
    return [row for row in rows if bytes(row["key"]).startswith(objects.RUNS)]


@pytest.fixture(scope="module")
def once() -> Played:
    """A small run on a perfect store, which refuses as etcd does."""
    played = play(plan())
    for row in played.find("ops", role=b"run.oversize"):
        row["message"] = tool_fanout.TOO_LARGE
    versions = {row["key"]: row["version"] for row in played.rows["events"] if row["version"]}
    for row in deletions(played):
        row["prev_version"] = versions[row["key"]]
    return played


@pytest.fixture
def played(once: Played) -> Played:
    """The same, to be changed."""
    fresh = Played(once.plan, dict(once.facts))
    for table, rows in once.rows.items():
        fresh.rows[table] = [dict(row) for row in rows]
    return fresh


def violations(played: Played, folder: Path) -> list[int]:
    """Of steps, and of refusals."""
    verdicts = tool_fanout.checks(played.records(folder), SMALL)
    assert all(verdict.checked for verdict in verdicts)
    return [verdict.violations for verdict in verdicts]


def final_run(played: Played, *, entries: int = 2) -> Row:
    """A run that is there in the end, with some entries in its list."""
    return next(
        row
        for row in played.rows["final"]
        if bytes(row["key"]).startswith(objects.RUNS)
        and len(values.entries(bytes(row["value"]))) >= entries
    )


@pytest.mark.slow
def test_writes_per_run() -> None:
    """A run with k tools costs 10 k + 5 writes; the rate at xs fits two cores."""
    parameters = tool_fanout.PRESETS["xs"]
    made = tool_fanout.schedule(parameters, 30_000_000, random.Random(1))
    steps = [step for actor in made.actors for step in actor.steps]
    assert {step.verb for step in steps} <= set(WRITES)
    assert 300 < len(steps) / 30 < 1_300
    writes = Counter[str]()
    tools = Counter[str]()
    whole = set()
    for actor in made.actors:
        name, tool, _ = actor.name.partition("-tool-")
        writes[name] += sum(not step.refusal for step in actor.steps)
        tools[name] += bool(tool)
        if actor.steps[-1].verb == Verb.DELETE and not tool:
            whole.add(name)
    assert len(whole) > 20
    assert {writes[name] - 10 * tools[name] for name in whole} == {5}
    assert set(tools.values()) >= {4, 8, 16, 64}


@pytest.mark.parametrize("seed", range(3))
def test_rare_runs_are_there(seed: int) -> None:
    """Even a short plan has a run that grows to 1.2 MB and one that tries 1.6 MB."""
    parameters = replace(SMALL, grown=0.01)
    made = tool_fanout.schedule(parameters, 8_000_000, random.Random(seed))
    steps = [step for actor in made.actors for step in actor.steps]
    grown = [step for step in steps if step.role == tool_fanout.GROWN_ENTRY]
    assert sum(step.size for step in grown) == tool_fanout.GROWN_BYTES
    assert {step.edit for step in grown} == {Edit.APPEND}
    (oversize,) = (step for step in steps if step.role == tool_fanout.OVERSIZE)
    assert oversize.size == 1_600_000
    assert oversize.refusal == 3


def test_perfect_store_passes(played: Played, tmp_path: Path) -> None:
    """Nothing is wrong where nothing was done wrong, of runs that are there and that are not."""
    assert violations(played, tmp_path) == [0, 0]
    steps, _ = tool_fanout.checks(played.records(tmp_path), SMALL)
    runs = len(list(played.find("ops", role=b"run.create")))
    deleted = len(list(played.find("ops", role=b"run.delete")))
    assert deleted > 1
    assert steps.checked == runs


def test_lost_update_is_found(played: Played, tmp_path: Path) -> None:
    """An acknowledged entry that is not in the list in the end is named."""
    row = final_run(played)
    names = values.entries(bytes(row["value"]))
    row["value"] = bytes(row["value"]).replace(f'"name":"{names[0]}"'.encode(), b'"gone":"x"')
    (verdict, _) = tool_fanout.checks(played.records(tmp_path), SMALL)
    assert verdict.violations == 1
    assert f"lacks acknowledged entries {names[0]} (1 of " in verdict.evidence[0]


def test_doubled_and_foreign_entries_are_found(played: Played, tmp_path: Path) -> None:
    """An entry that is there twice, and one that nobody had acknowledged, are named."""
    row = final_run(played)
    names = values.entries(bytes(row["value"]))
    row["value"] = values.append(values.append(bytes(row["value"]), names[0], 9), "9.9", 9)
    (verdict, _) = tool_fanout.checks(played.records(tmp_path), SMALL)
    assert verdict.violations == 2
    assert "has entries 9.9" in verdict.evidence[0]
    assert f"repeats entries {names[0]}" in verdict.evidence[1]


def test_wrong_order_is_found(played: Played, tmp_path: Path) -> None:
    """A list in another order than that of the revisions is found."""
    row = final_run(played)
    first, second = values.entries(bytes(row["value"]))[:2]
    swapped = bytes(row["value"]).replace(first.encode() + b'"', b"?" + b'"')
    swapped = swapped.replace(second.encode() + b'"', first.encode() + b'"')
    row["value"] = swapped.replace(b'?"', second.encode() + b'"')
    assert violations(played, tmp_path) == [1, 0]


def test_lost_count_is_found(played: Played, tmp_path: Path) -> None:
    """A counter below the acknowledged updates, and a version that is too high, are found."""
    row = final_run(played)
    row["value"] = bytes(row["value"]).replace(b'"count":"0000000001"', b'"count":"0000000000"')
    row["version"] = int(row["version"]) + 1
    assert violations(played, tmp_path) == [2, 0]


def test_unknown_entry_may_be_there_or_not(played: Played, tmp_path: Path) -> None:
    """An entry whose answer was lost is no violation, whether it is in the list or not."""
    row = final_run(played)
    name = values.entries(bytes(row["value"]))[0]
    actor, step = map(int, name.split("."))
    operation = next(played.find("ops", actor=actor, step=step))
    operation |= {"outcome": Outcome.UNKNOWN, "code": 14, "revision": -1}
    assert violations(played, tmp_path / "there") == [0, 0]
    row["value"] = bytes(row["value"]).replace(f'"name":"{name}"'.encode(), b'"gone":"x"')
    row["version"] = int(row["version"]) - 1
    assert violations(played, tmp_path / "not") == [0, 0]


def test_deleted_run_has_all_versions(played: Played, tmp_path: Path) -> None:
    """A run that was deleted one version short is found by what its deletion showed."""
    heard = deletions(played)
    short = int(heard[0]["prev_version"]) - 1
    for row in heard:
        if row["key"] == heard[0]["key"]:
            row["prev_version"] = short
    (verdict, _) = tool_fanout.checks(played.records(tmp_path), SMALL)
    assert verdict.violations == 1
    assert (
        f", deleted, has version {short}; created and updated it was {short + 1} times"
        in (verdict.evidence[0])
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"code": 8, "message": b"too big"}, "was answered by code 8, 'too big'"),
        ({"message": b"grpc: received message larger than max"}, "was answered by code 3, 'grpc"),
        ({"outcome": Outcome.OK, "code": 0, "message": b""}, "was answered by code 0, ''"),
        ({"connection": 17}, "ended connection 17"),
    ],
)
def test_wrong_refusal_is_found(played: Played, tmp_path: Path, change: Row, told: str) -> None:
    """Another code or text, no refusal, or the end of the connection is found."""
    next(played.find("ops", role=b"run.oversize")).update(change)
    _, verdict = tool_fanout.checks(played.records(tmp_path), SMALL)
    assert verdict.violations == 1
    assert told in verdict.evidence[0]


def test_measures(played: Played, tmp_path: Path) -> None:
    """An entry takes until the last of its attempts is answered; each attempt counts."""
    good = tool_fanout.measures(played.records(tmp_path / "good"), SMALL)
    assert good["entry_p99_ms"] == pytest.approx(0.3)
    assert good["attempts_per_entry"] == 1
    for number, entry in enumerate(list(played.find("ops", role=b"run.entry"))):
        again = {"op": 10**9 + number, "attempt": 1, "done": int(entry["done"]) + 700}
        played.add("ops", **(entry | again))
        entry["outcome"] = Outcome.CONFLICT
    bad = tool_fanout.measures(played.records(tmp_path / "bad"), SMALL)
    assert bad["entry_p99_ms"] == pytest.approx(1.0)
    assert bad["attempts_per_entry"] == 2
    assert bad["entries_given_up"] == 0
