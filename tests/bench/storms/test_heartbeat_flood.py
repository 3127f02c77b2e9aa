"""S3: how many heartbeats there are, and that double holders and lost renewals show."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from bench.plan import Plan, Verb
from bench.records import Outcome
from bench.storms import heartbeat_flood
from tests.bench.storms.perfect import Played, Row, play

SMALL = heartbeat_flood.Parameters(agents=60, leaders=0.5, changing=0.2, stopping=0.1, tenants=3)


def plan(seed: int = 1) -> Plan:
    """Sixty agents, twelve seconds."""
    return heartbeat_flood.schedule(SMALL, 12_000_000, random.Random(seed))


@pytest.fixture
def played() -> Played:
    """A perfect store, on which the first standby always wins and the other does nothing."""
    made = plan()
    winners = [actor for actor in made.actors if not actor.name.endswith("standby-1")]
    return play(replace(made, actors=tuple(winners)))


def violations(played: Played, folder: Path) -> list[int]:
    """Of one holder, order, and missed renewals."""
    verdicts = heartbeat_flood.checks(played.records(folder), SMALL)
    assert all(verdict.checked for verdict in verdicts)
    return [verdict.violations for verdict in verdicts]


def renewals(played: Played, minimum: int = 3) -> list[Row]:
    """Those of one agent that has a few."""
    counts = Counter(row["actor"] for row in played.find("ops", role=b"leader.renew"))
    actor = next(actor for actor, count in counts.items() if count >= minimum)
    return list(played.find("ops", role=b"leader.renew", actor=actor))


@pytest.mark.slow
def test_rate_and_shares() -> None:
    """At xs N/10 to N/2 renewals a second, at absolute times; 2 % stop and 2 % change hands."""
    parameters = heartbeat_flood.PRESETS["xs"]
    made = heartbeat_flood.schedule(parameters, 30_000_000, random.Random(1))
    agents = parameters.agents
    assert agents / 10 < made.steps / 30 < agents / 2
    assert 300 < made.steps / 30 < 1_300
    assert all(step.due_us >= 0 for actor in made.actors for step in actor.steps)
    roles = Counter(step.role for actor in made.actors for step in actor.steps)
    assert roles["lease.release"] / agents == pytest.approx(0.02, abs=0.01)
    assert roles["lease.take"] == 2 * roles["lease.release"]
    last = {actor.name: actor.steps[-1] for actor in made.actors}
    silent = [
        step
        for step in last.values()
        if step.role in heartbeat_flood.PERIOD_US
        and step.due_us + heartbeat_flood.PERIOD_US[step.role] < 30_000_000
    ]
    assert len(silent) / agents == pytest.approx(0.02, abs=0.01)


def test_standbys_race() -> None:
    """Two actors try each Lease that is given up, at the same time, through two apiservers."""
    actors = [actor for actor in plan().actors if "standby" in actor.name]
    assert len(actors) > 8
    for first, second in zip(actors[::2], actors[1::2], strict=True):
        assert first.apiserver != second.apiserver
        assert first.steps[0].candidates == second.steps[0].candidates
        assert abs(first.steps[0].due_us - second.steps[0].due_us) < 2_000


def test_perfect_store_passes(played: Played, tmp_path: Path) -> None:
    """Nothing is wrong where nothing was done wrong."""
    assert len(list(played.find("ops", verb=Verb.ADOPT))) > 4
    assert violations(played, tmp_path) == [0, 0, 0]


def test_second_holder_is_found(played: Played, tmp_path: Path) -> None:
    """A Lease that two standbys were given is found."""
    took = next(played.find("ops", verb=Verb.ADOPT))
    other = played.add("ops", **took)
    other |= {"op": 10**9, "actor": 999, "revision": int(took["revision"]) + 1}
    verdict, *_ = heartbeat_flood.checks(played.records(tmp_path), SMALL)
    assert verdict.violations >= 1
    assert "went from lease.take of actor" in verdict.evidence[0]


def test_taking_without_giving_is_found(played: Played, tmp_path: Path) -> None:
    """A Lease that is taken though its holder had not given it up is found."""
    release = next(played.find("ops", role=b"lease.release"))
    played.rows["ops"].remove(release)
    assert violations(played, tmp_path) == [1, 0, 0]


def test_lost_answer_of_a_release_is_allowed(played: Played, tmp_path: Path) -> None:
    """A Lease may be taken after a release of which nobody knows."""
    release = next(played.find("ops", role=b"lease.release"))
    release |= {"outcome": Outcome.UNKNOWN, "code": 14, "revision": -1}
    assert violations(played, tmp_path) == [0, 0, 0]


def test_wrong_order_is_found(played: Played, tmp_path: Path) -> None:
    """A later renewal with a lower revision than an earlier one is found."""
    first, second = renewals(played)[:2]
    first["revision"], second["revision"] = second["revision"], first["revision"]
    assert violations(played, tmp_path) == [0, 1, 0]


def test_missed_renewal_is_found(played: Played, tmp_path: Path) -> None:
    """A conflict without a rival, and a Lease that is not there, are found; told trouble is not."""
    first, second, third = renewals(played)[:3]
    first["outcome"] = Outcome.CONFLICT
    second |= {"verb": Verb.GET, "found": 0}
    assert violations(played, tmp_path / "found") == [0, 0, 2]
    third |= {"outcome": Outcome.UNKNOWN, "code": 14}
    assert violations(played, tmp_path / "excused") == [0, 0, 0]


def test_measures(played: Played, tmp_path: Path) -> None:
    """A gap of more than two thirds of the lease, also up to the end, is a missed deadline."""
    good = heartbeat_flood.measures(played.records(tmp_path / "good"), SMALL)
    assert good["renew_p999_ms"] == pytest.approx(0.3)
    assert good["deadline_misses"] == good["leases_untaken"] == 0
    for row in renewals(played, 5):
        if int(row["step"]):
            row |= {"outcome": Outcome.UNKNOWN, "code": 14}
    played.facts["load_end_us"] = 20_000_000
    next(played.find("ops", role=b"lease.take"))["outcome"] = Outcome.CONFLICT
    bad = heartbeat_flood.measures(played.records(tmp_path / "bad"), SMALL)
    assert bad["deadline_misses"] == 1
    assert bad["renew_p999_ms"] == 5_000
    assert bad["leases_untaken"] == 1
