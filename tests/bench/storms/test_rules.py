"""What every storm's own checks tell of themselves."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import storms
from bench.plan import Trouble
from bench.records import INCIDENTS, TABLES, Recorder, Records
from tests.bench.judges.world import facts_of


def nothing(folder: Path, *, trouble: bool = False) -> Records:
    """A run in which nobody did anything; with ``trouble`` its server was killed."""
    facts = facts_of() | {"duration_us": 0, "warm_up_us": 0, "timeout_us": 1}
    (folder / "run.json").write_text(json.dumps(facts))
    for table in TABLES:
        recorder = Recorder(table)
        if trouble and table is INCIDENTS:
            recorder.add(0, 1, Trouble.KILL)
        recorder.write(folder, 0)
    return Records(folder)


@pytest.mark.parametrize("name", storms.STORMS)
def test_every_check_tells_its_rule_and_what_it_lacked(name: str, tmp_path: Path) -> None:
    """Of a run in which nothing happened no check is left without words."""
    storm: storms.Storm[Any] = storms.find(name)
    checks = storm.checks(nothing(tmp_path), storm.PRESETS["xs"])
    assert checks
    for each in checks:
        assert each.rule.endswith("."), each
        assert each.lacking, each


@pytest.mark.parametrize(
    ("storm", "check", "trouble", "why"),
    [
        ("hot-status", "heard in time", True, "were disturbed on purpose"),
        ("swarm-burst", "revision = writes", True, "were disturbed on purpose"),
        ("noisy-shard", "the outage was one", False, "there was no outage"),
    ],
)
def test_a_check_tells_why_it_does_not_apply(
    storm: str, check: str, why: str, tmp_path: Path, *, trouble: bool
) -> None:
    """Trouble made on purpose, or its absence, is named."""
    found: storms.Storm[Any] = storms.find(storm)
    records = nothing(tmp_path, trouble=trouble)
    (one,) = (
        each
        for each in found.checks(records, found.PRESETS["xs"])
        if each.judge == f"{storm}: {check}"
    )
    assert why in one.lacking
