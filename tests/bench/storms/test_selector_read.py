"""S9: creations are counted, whole lists are whole, and a list that is not is found."""

import random
from pathlib import Path

import pytest

from bench.plan import Verb
from bench.records import Records
from bench.storms import selector_read
from tests.bench.storms.perfect import Played, play

SMALL = selector_read.Parameters(objects_per_kind=30, lists_per_second=10.0, page_objects=7)


@pytest.fixture
def played() -> Played:
    """A small run on a perfect store."""
    return play(selector_read.schedule(SMALL, 4_000_000, random.Random(1)))


def violations(records: Records) -> int:
    """How many lists the storm's check finds wrong."""
    (verdict,) = selector_read.checks(records, SMALL)
    assert verdict.checked > 10
    return verdict.violations


def test_one_write_per_object() -> None:
    """A run writes each object once, and nothing else."""
    plan = selector_read.schedule(SMALL, 4_000_000, random.Random(1))
    writes = [step.key for actor in plan.actors for step in actor.steps if step.verb != Verb.LIST]
    assert 6 * 30 == len(writes) == len(set(writes))


def test_whole_lists_pass(played: Played, tmp_path: Path) -> None:
    """Nothing is wrong with lists of a perfect store, pages and all."""
    assert max(row["attempt"] for row in played.find("ops", verb=Verb.LIST)) == 4
    assert violations(played.records(tmp_path)) == 0


def test_missing_object_is_found(played: Played, tmp_path: Path) -> None:
    """One object that a page leaves out is one violation."""
    del played.rows["items"][-1]
    assert violations(played.records(tmp_path)) == 1


def test_object_from_nowhere_is_found(played: Played, tmp_path: Path) -> None:
    """An object shown twice is one violation."""
    played.rows["items"].append(played.rows["items"][0])
    assert violations(played.records(tmp_path)) == 1


def test_wrong_count_is_found(played: Played, tmp_path: Path) -> None:
    """A count that disagrees with what is shown is one violation."""
    row = next(played.find("ops", verb=Verb.LIST, attempt=0))
    row["count"] = 31
    assert violations(played.records(tmp_path)) == 1


def test_measures(played: Played, tmp_path: Path) -> None:
    """A list takes all its pages; one that failed counts as the timeout."""
    good = selector_read.measures(played.records(tmp_path / "good"), SMALL)
    assert good["list_p50_ms"] == 0.3
    assert good["create_p99_ms"] == 0.3
    assert good["listed_object_us"] == pytest.approx(300 / 30, rel=0.5)
    for row in played.find("ops", verb=Verb.LIST):
        row |= {"outcome": 3, "done": -1}
    bad = selector_read.measures(played.records(tmp_path / "bad"), SMALL)
    assert bad["list_p50_ms"] == 5_000
