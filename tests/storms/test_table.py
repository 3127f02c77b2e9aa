"""The README's table of storms is that of the stored results."""

import json
from pathlib import Path

import pytest

from bench.report.results import build
from bench.storms import STORMS
from tests.bench.report.made import session
from tests.storms.table import BEGIN, END, README, RESULTS, placed, table

PICTURE_BYTES_MAX = 200_000


def test_the_readme_shows_the_stored_results() -> None:
    """No figure was written by hand, and none is of a result that is gone."""
    readme = README.read_text()
    assert BEGIN in readme
    assert END in readme
    assert readme == placed(readme, table(RESULTS))


def test_stored_results_are_of_storms_that_exist() -> None:
    """Every stored file is shown."""
    assert {path.stem for path in RESULTS.glob("*.json")} <= set(STORMS)


def test_pictures_are_small() -> None:
    """What a README shows is kept in git."""
    assert all(path.stat().st_size < PICTURE_BYTES_MAX for path in RESULTS.glob("*.png"))


@pytest.mark.slow
def test_what_failed_shows_no_figure(tmp_path: Path) -> None:
    """A sound result has its ratios; one without comparisons leaves the verdict and dashes."""
    session(tmp_path / "made", means_us={"ours": 2000, "etcd": 4000}, seconds=2)
    results = build(tmp_path / "made")
    kept = tmp_path / "swarm-burst.json"
    kept.write_text(json.dumps(results))
    assert "| swarm-burst | ours PASS, etcd PASS |" in table(tmp_path)
    assert " = **0." in table(tmp_path)
    results["comparisons"] = []
    results["targets"][0]["state"] = "FAIL"
    kept.write_text(json.dumps(results))
    row = next(line for line in table(tmp_path).splitlines() if line.startswith("| swarm-burst "))
    assert "ours FAIL" in row
    assert row.endswith("| - | - | - | - | - |")
