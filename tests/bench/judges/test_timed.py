"""Which verdicts are about time, so that a late generator takes the blame off the server."""

import json
from pathlib import Path

import pytest

from bench.judges import judge
from bench.records import Records
from tests.bench.judges.test_store_faults import expired_early, expired_late
from tests.bench.judges.world import facts_of, fresh

TIMED = {"Everyone is watching", "Lag drains", "TTL overdue"}


def test_only_judges_of_time_are_timed(tmp_path: Path) -> None:
    """What must hold however late anybody is, is never called a matter of time."""
    (tmp_path / "run.json").write_text(json.dumps(facts_of()))
    assert {v.judge for v in judge(Records(tmp_path)) if v.timed} == TIMED


@pytest.mark.parametrize("is_late", [False, True])
def test_only_lateness_of_leases_is_timed(*, is_late: bool, tmp_path: Path) -> None:
    """A key that goes too early is a violation whatever the generator did."""
    world = fresh()
    (expired_late if is_late else expired_early)(world)
    failed = {v.judge: v.timed for v in judge(world.records(tmp_path)) if not v.passed}
    assert failed.get("TTL overdue", False) is is_late
    assert failed.get("TTL window", True) is is_late
