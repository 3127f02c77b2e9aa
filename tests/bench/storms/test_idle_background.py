"""S0: how much a resting cluster writes, and that two compactors in one interval are found."""

import random
from collections import Counter
from pathlib import Path

import pytest

from bench.plan import Verb
from bench.records import Outcome
from bench.storms import idle_background, objects, selector_read
from tests.bench.storms.perfect import Played, play

PARAMETERS = idle_background.PRESETS["xs"]


@pytest.fixture
def played() -> Played:
    """Ten seconds without trouble, in which three Txns on the compaction's key were won."""
    made = idle_background.schedule(PARAMETERS, 10_000_000, random.Random(5))
    played = play(made)
    rows = played.rows["ops"]
    rows[:] = [row for row in rows if row["verb"] != Verb.COMPACT]
    for number, outcome in enumerate((Outcome.OK, Outcome.CONFLICT) * 3):
        txn = {"op": 10**9 + number, "actor": 1, "step": number, "verb": Verb.COMPACT}
        played.add("ops", **txn, outcome=outcome, key=objects.COMPACT_REV_KEY, done=1)
    played.add("final", key=objects.COMPACT_REV_KEY, version=3)
    return played


def test_writes_are_those_of_the_text() -> None:
    """A minute has as many writes and probes as the theory says, within one phase each."""
    made = idle_background.schedule(PARAMETERS, 60_000_000, random.Random(5))
    roles = Counter(step.role for actor in made.actors for step in actor.steps)
    nodes, apiservers = 34, 2
    assert roles["node.renew"] == 6 * nodes
    assert roles["election.renew"] == 6 * 30
    assert roles["masterlease.put"] == 6 * apiservers
    assert roles["apiserver.health"] == 60 * apiservers
    assert roles["apiserver.status"] == 2 * apiservers
    assert roles["apiserver.count"] == len(idle_background.COUNTED) * apiservers
    assert roles["apiserver.compact"] == 6 * apiservers


def test_it_fits_under_a_storm() -> None:
    """Composed, it uses the storm's apiservers, ends with it, and leaves its actors' numbers."""
    parameters = selector_read.Parameters(objects_per_kind=3, apiservers=1)
    storm = selector_read.schedule(parameters, 4_000_000, random.Random(1))
    both = idle_background.under(storm, PARAMETERS, random.Random(2))
    assert both.actors[: len(storm.actors)] == storm.actors
    assert len(both.actors) > len(storm.actors)
    assert both.apiservers == 1
    dues = [step.due_us for actor in both.actors for step in actor.steps]
    assert 0 <= min(dues) <= max(dues) < both.duration_us


def test_compacting_storms_compact_alone() -> None:
    """A plan that has compactors gets no more of them."""
    alone = idle_background.schedule(PARAMETERS, 4_000_000, random.Random(1))
    both = idle_background.under(alone, PARAMETERS, random.Random(2))
    assert 2 == sum(any(step.verb == Verb.COMPACT for step in actor.steps) for actor in both.actors)


def test_one_compactor_passes(played: Played, tmp_path: Path) -> None:
    """As many versions as Txns won is right."""
    (verdict,) = idle_background.checks(played.records(tmp_path), PARAMETERS)
    assert verdict.passed
    assert 6 == verdict.checked


def test_two_compactors_are_found(played: Played, tmp_path: Path) -> None:
    """Two Txns on one version that are both told they won are one too many for the key."""
    next(played.find("ops", verb=Verb.COMPACT, outcome=Outcome.CONFLICT))["outcome"] = Outcome.OK
    (verdict,) = idle_background.checks(played.records(tmp_path), PARAMETERS)
    assert 1 == verdict.violations
    assert "version 3 in the end, but 4 Txns" in verdict.evidence[0]


def test_unknown_win_is_allowed_either_way(played: Played, tmp_path: Path) -> None:
    """A Txn whose answer was lost may have won or not."""
    next(played.find("ops", verb=Verb.COMPACT, outcome=Outcome.OK))["outcome"] = Outcome.UNKNOWN
    (verdict,) = idle_background.checks(played.records(tmp_path), PARAMETERS)
    assert verdict.passed


def test_measures(played: Played, tmp_path: Path) -> None:
    """Lateness counts from when a beat was due."""
    figures = idle_background.measures(played.records(tmp_path / "good"), PARAMETERS)
    assert 0.3 == pytest.approx(figures["election_renew_p50_ms"])
    for row in played.find("ops", role=b"election.renew"):
        row["done"] = int(row["done"]) + 700
    figures = idle_background.measures(played.records(tmp_path / "late"), PARAMETERS)
    assert 1.0 == pytest.approx(figures["election_renew_p50_ms"])
    assert 0.3 == pytest.approx(figures["node_renew_p99_ms"])
