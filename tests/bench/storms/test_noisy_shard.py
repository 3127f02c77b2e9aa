"""S8: neighbours whose calls fail, tenants that stay away and outages that are none are found."""

import random
from pathlib import Path

import pytest

from bench.plan import WRITES, Plan, Trouble, Verb
from bench.records import Outcome
from bench.storms import noisy_shard
from tests.bench.storms.perfect import Played, play

SMALL = noisy_shard.Parameters(runs_per_second=40.0, noise_factor=10.0, outage_s=0.5)
STOPPED, GOING = 4_800_000, 5_300_000
"""The outage of a run of 8 seconds."""


def plan() -> Plan:
    """A small one."""
    return noisy_shard.schedule(SMALL, 8_000_000, random.Random(1))


@pytest.fixture
def played() -> Played:
    """A small run on a store that is perfect, but stands still for half a second."""
    played = play(plan())
    played.add("incidents", at=STOPPED, until=GOING, trouble=Trouble.PAUSE)
    for row in played.rows["ops"]:
        if STOPPED <= int(row["sent"]) < GOING:
            row["done"] = GOING + 1_000
    return played


def violations(played: Played, folder: Path) -> list[int]:
    """Failed calls of neighbours, tenants not served again, answers while stopped."""
    *verdicts, of_a_shard = noisy_shard.checks(played.records(folder), SMALL)
    assert all(verdict.checked > 10 for verdict in verdicts)
    assert not of_a_shard.checked, "none was stopped"
    return [verdict.violations for verdict in verdicts]


def test_five_writes_per_run() -> None:
    """A run writes five times, and the noisy tenant has most of them in its phase."""
    made = plan()
    assert {5} == {len(actor.steps) for actor in made.actors}
    assert all(step.verb in WRITES for actor in made.actors for step in actor.steps)
    noise = [
        actor.name.startswith("run-007-")
        for actor in made.actors
        if 2_000_000 <= actor.steps[0].due_us < 4_000_000
    ]
    assert sum(noise) / len(noise) == pytest.approx(10 / 29, abs=0.1)


def test_perfect_store_passes(played: Played, tmp_path: Path) -> None:
    """Nothing is wrong with a store that merely waits through its outage."""
    assert violations(played, tmp_path) == [0, 0, 0]


def test_failing_neighbour_is_found(played: Played, tmp_path: Path) -> None:
    """A neighbour's call that fails is a violation; the noisy tenant's is not, nor one stopped."""
    calls = [row for row in played.rows["ops"] if 2_000_000 <= int(row["sent"]) < 4_000_000]
    stopped = [row for row in played.rows["ops"] if STOPPED <= int(row["sent"]) < GOING]
    failed = {"outcome": Outcome.UNKNOWN, "code": 14}
    next(row for row in calls if row["role"] == b"neighbour.status").update(failed)
    next(row for row in calls if row["role"] == b"noisy.status").update(failed)
    next(row for row in stopped if row["role"] == b"neighbour.status").update(failed)
    assert violations(played, tmp_path) == [1, 0, 0]


def test_tenant_that_stays_away_is_found(played: Played, tmp_path: Path) -> None:
    """A tenant whose calls hang on after the outage is one violation, besides its failed calls."""
    hanging = 0
    for row in played.rows["ops"]:
        if int(row["sent"]) >= GOING and b"/tenant-003/" in bytes(row["key"]):
            row |= {"outcome": Outcome.UNKNOWN, "done": -1}
            hanging += 1
    assert hanging > 5
    assert violations(played, tmp_path) == [0, 1, 0]


def test_outage_that_was_none_is_found(played: Played, tmp_path: Path) -> None:
    """An answer that comes while the server is stopped is one violation."""
    row = next(row for row in played.find("ops", verb=Verb.UPDATE) if row["done"] == GOING + 1_000)
    row["done"] = STOPPED + 200_000
    assert violations(played, tmp_path) == [0, 0, 1]


def test_a_refused_connection_is_no_answer(played: Played, tmp_path: Path) -> None:
    """Of a server that was killed, calls are refused before they are sent: it answered nothing."""
    (incident,) = played.rows["incidents"]
    incident["trouble"] = Trouble.KILL
    row = next(row for row in played.find("ops", verb=Verb.UPDATE) if row["done"] == GOING + 1_000)
    row |= {"outcome": Outcome.REFUSED, "code": 14, "done": STOPPED + 200_000}
    assert violations(played, tmp_path) == [0, 0, 0]


def test_measures(played: Played, tmp_path: Path) -> None:
    """Noise and outage show in the neighbours' latencies of their phases alone."""
    good = noisy_shard.measures(played.records(tmp_path / "good"), SMALL)
    assert good["neighbours_noise_ratio"] == 1
    assert good["neighbours_outage_p50_ms"] > 100
    assert good["neighbours_after_p99_ms"] == 0.3
    assert good["outage_backlog_ms"] == 1
    for row in played.rows["ops"]:
        if 2_000_000 <= int(row["due"]) < 4_000_000:
            row["done"] = int(row["done"]) + 3_000
    bad = noisy_shard.measures(played.records(tmp_path / "bad"), SMALL)
    assert bad["neighbours_noise_ratio"] == pytest.approx(11)
    assert bad["neighbours_before_p99_ms"] == 0.3


TIMEOUT = noisy_shard.Parameters(
    runs_per_second=40.0, noise_factor=10.0, outage_s=2.5, shard_timeout_s=0.1
)
AWAY, THERE = 4_800_000, 7_300_000
"""A shard is away for so long; it is known to be after 1.1 s."""


@pytest.fixture
def without_a_shard() -> Played:
    """A small run on a store that is perfect, and refuses one tenant while its shard is away."""
    played = play(noisy_shard.schedule(TIMEOUT, 8_000_000, random.Random(1)))
    played.add("incidents", at=AWAY, until=THERE, trouble=Trouble.SHARD)
    for row in lost(played):
        refused_us = max(AWAY + 600_000, int(row["sent"]) + 1_000)
        row |= {"outcome": Outcome.UNKNOWN, "code": 14, "done": refused_us}
    return played


def lost(played: Played) -> list[dict[str, bytes | int]]:
    """Calls of the tenant whose shard is away, meanwhile."""
    rows = played.rows["ops"]
    return [
        r for r in rows if b"/tenant-007/" in bytes(r["key"]) and AWAY <= int(r["sent"]) < THERE
    ]


def faults(played: Played, folder: Path) -> list[int]:
    """Failed calls of neighbours, tenants not served again (the run is over by then),
    answers of a shard that is away, calls that waited too long to be refused.
    """
    verdicts = noisy_shard.checks(played.records(folder), TIMEOUT)
    assert [verdict.checked > 0 for verdict in verdicts] == [True, False, True, True]
    return [verdict.violations for verdict in verdicts]


def test_a_lost_shard_is_its_tenants_alone(without_a_shard: Played, tmp_path: Path) -> None:
    """A tenant that is refused in time is no fault, and its neighbours feel nothing."""
    assert faults(without_a_shard, tmp_path) == [0, 0, 0, 0]
    found = noisy_shard.measures(without_a_shard.records(tmp_path / "measured"), TIMEOUT)
    assert found["neighbours_outage_ratio"] == 1
    assert found["lost_refused_first_ms"] == pytest.approx(600, abs=1)
    assert found["lost_refused_later_ms"] < 600
    assert found["lost_back_ms"] < 700


def test_a_neighbour_of_a_lost_shard_has_no_excuse(without_a_shard: Played, tmp_path: Path) -> None:
    """A neighbour's call that fails while a shard is away is a violation."""
    rows = without_a_shard.rows["ops"]
    inside = [row for row in rows if AWAY <= int(row["sent"]) < THERE]
    row = next(row for row in inside if row["role"] == b"neighbour.status")
    row |= {"outcome": Outcome.UNKNOWN, "code": 14}
    assert faults(without_a_shard, tmp_path) == [1, 0, 0, 0]


def test_a_lost_shard_that_answers_is_found(without_a_shard: Played, tmp_path: Path) -> None:
    """The commands did not stop the shard of this tenant."""
    lost(without_a_shard)[0] |= {"outcome": Outcome.OK, "code": 0}
    assert faults(without_a_shard, tmp_path) == [0, 0, 1, 0]


def test_a_refusal_that_is_late_is_found(without_a_shard: Played, tmp_path: Path) -> None:
    """One call waits longer than the timeout, one more when the shard is long known to be away."""
    first, *_ = calls = lost(without_a_shard)
    first["done"] = AWAY + 1_101_000
    later = next(row for row in calls if AWAY + 200_000 < int(row["sent"]) < THERE - 1_100_000)
    later["done"] = max(AWAY + 1_100_000, int(later["sent"]) + 1_000_000) + 1_000
    assert faults(without_a_shard, tmp_path) == [0, 0, 0, 2]
