"""S5: clients agree on what expired, bumps are counted, and late expiries show."""

import random
from pathlib import Path

import pytest

from bench import values
from bench.plan import Plan, Verb
from bench.records import EventType
from bench.storms import event_ttl
from tests.bench.storms.perfect import Played, play

SMALL = event_ttl.Parameters(
    events_per_second=30.0, burst_s=0.5, burst_every_s=4.0, ttl_s=2, namespaces=3
)


def plan() -> Plan:
    """A small one."""
    return event_ttl.schedule(SMALL, 5_000_000, random.Random(1))


@pytest.fixture
def played() -> Played:
    """A small run on a perfect store."""
    return play(plan())


def violations(played: Played, folder: Path) -> list[int]:
    """How many disagreements, and how many wrong counts."""
    verdicts = event_ttl.checks(played.records(folder), SMALL)
    assert all(verdict.checked > 20 for verdict in verdicts)
    return [verdict.violations for verdict in verdicts]


def test_shares() -> None:
    """At xs a quarter of the writes of events are bumps, one event in 200 is big, all leased."""
    made = event_ttl.schedule(event_ttl.PRESETS["xs"], 30_000_000, random.Random(3))
    steps = [step for actor in made.actors for step in actor.steps if "event" in step.role]
    creates = [step for step in steps if step.verb == Verb.CREATE]
    assert len(creates) / len(steps) == pytest.approx(0.75, abs=0.03)
    assert sum(step.size >= 10_000 for step in creates) / len(creates) == pytest.approx(
        0.005, abs=0.003
    )
    assert {step.lease_ttl for step in steps} == {10}


def test_perfect_store_passes(played: Played, tmp_path: Path) -> None:
    """Nothing is wrong when everything expires once and on time."""
    assert violations(played, tmp_path) == [0, 0]


def test_unheard_expiry_is_found(played: Played, tmp_path: Path) -> None:
    """A deletion that one of two clients does not hear of is one violation."""
    played.rows["events"].remove(next(played.find("events", type=EventType.DELETE)))
    assert violations(played, tmp_path) == [1, 0]


def test_repeated_expiry_is_found(played: Played, tmp_path: Path) -> None:
    """A deletion that one client hears twice is one violation."""
    played.rows["events"].append(next(played.find("events", type=EventType.DELETE)))
    assert violations(played, tmp_path) == [1, 0]


def test_lost_bump_is_found(played: Played, tmp_path: Path) -> None:
    """A count below that of the acknowledged bumps is one violation, as is one above it."""
    texts = [row for row in played.rows["final"] if b"/events/" in bytes(row["key"])]
    bumped = next(row for row in texts if values.count_of(bytes(row["value"])))
    fresh = next(row for row in texts if not values.count_of(bytes(row["value"])))
    bumped["value"], fresh["value"] = fresh["value"], bumped["value"]
    assert violations(played, tmp_path) == [0, 2]


def test_measures(played: Played, tmp_path: Path) -> None:
    """Lateness counts from the end of the lease; slow bystanders show against their quiet self."""
    good = event_ttl.measures(played.records(tmp_path / "good"), SMALL)
    assert good["expiry_late_p99_ms"] == pytest.approx(0.3)
    assert good["bystander_expiry_ratio"] == 1
    heard = list(played.find("events", type=EventType.DELETE))
    late = {row["message"] for row in heard}
    for row in played.rows["messages"]:
        if row["message"] in late:
            row["received"] = int(row["received"]) + 700_000
    for row in played.find("ops", role=event_ttl.BYSTANDER):
        row["done"] = int(row["done"]) + (3_000 if int(row["sent"]) > 3_000_000 else 0)
    bad = event_ttl.measures(played.records(tmp_path / "bad"), SMALL)
    assert bad["expiry_late_p50_ms"] == pytest.approx(700.3)
    assert bad["bystander_expiry_ratio"] > 1
