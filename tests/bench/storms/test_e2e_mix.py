"""S10: the mix is what it says, and a test that does not see its own writes is found."""

import random
from collections import Counter
from pathlib import Path

import pytest

from bench.plan import WRITES, Verb
from bench.records import Outcome
from bench.storms import e2e_mix
from tests.bench.storms.perfect import Played, play

SMALL = e2e_mix.Parameters(tests_per_second=3.0, think_ms=5.0)


@pytest.fixture
def played() -> Played:
    """A small run on a perfect store."""
    return play(e2e_mix.schedule(SMALL, 2_000_000, random.Random(1)))


def violations(played: Played, folder: Path) -> list[int]:
    """How many reads, and how many lists, are found wrong."""
    verdicts = e2e_mix.checks(played.records(folder), SMALL)
    assert all(verdict.checked > 50 for verdict in verdicts)
    return [verdict.violations for verdict in verdicts]


def test_mix() -> None:
    """Of 100 calls of each test 62 are reads, 32 writes, 5 watches, 1 asks for the status."""
    plan = e2e_mix.schedule(SMALL, 2_000_000, random.Random(1))
    assert len(plan.actors) > 3
    for actor in plan.actors:
        verbs = Counter(step.verb for step in actor.steps)
        assert sum(verbs[verb] for verb in WRITES) == 32
        assert verbs[Verb.GET] + verbs[Verb.LIST] + verbs[Verb.COUNT] == 62
        assert verbs[Verb.STATUS] == 1
        assert len(actor.steps) == 95
    assert len(plan.watchers) == 5 * len(plan.actors)


def test_own_writes_are_read(played: Played, tmp_path: Path) -> None:
    """A perfect store shows each test its own writes."""
    assert violations(played, tmp_path) == [0, 0]


def test_stale_read_is_found(played: Played, tmp_path: Path) -> None:
    """A read that shows an older revision is one violation."""
    row = next(row for row in played.find("ops", role=b"e2e.get") if int(row["found"]) > 0)
    row["found"] = int(row["found"]) - 1
    assert violations(played, tmp_path) == [1, 0]


def test_resurrected_object_is_found(played: Played, tmp_path: Path) -> None:
    """An object that is counted after its deletion is one violation."""
    row = list(played.find("ops", role=b"e2e.count"))[-1]
    row["count"] = int(row["count"]) + 1
    assert violations(played, tmp_path) == [0, 1]


def test_incomplete_list_is_found(played: Played, tmp_path: Path) -> None:
    """A list that leaves an object out is one violation."""
    del played.rows["items"][0]
    assert violations(played, tmp_path) == [0, 1]


def test_doubtful_write_excuses_reads(played: Played, tmp_path: Path) -> None:
    """After a write that may have happened, its key may have either revision."""
    row = next(played.find("ops", role=b"e2e.create"))
    row |= {"outcome": Outcome.UNKNOWN, "revision": -1}
    assert violations(played, tmp_path) == [0, 0]


def test_measures(played: Played, tmp_path: Path) -> None:
    """Each kind of call has its latencies."""
    found = e2e_mix.measures(played.records(tmp_path), SMALL)
    assert {"get_p50_ms", "list_p99_ms", "count_p50_ms", "txn_p99_ms"} <= found.keys()
    assert set(found.values()) == {0.3}
