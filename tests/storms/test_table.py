"""The README's table of storms is that of the stored results."""

import json
from pathlib import Path

from bench.storms import STORMS
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


def test_what_failed_shows_no_figure(tmp_path: Path) -> None:
    """A result without comparisons leaves the verdict and dashes."""
    kept = next(iter(RESULTS.glob("*.json")))
    results = json.loads(kept.read_text())
    results["comparisons"] = []
    results["targets"][0]["state"] = "FAIL"
    (tmp_path / kept.name).write_text(json.dumps(results))
    row = next(line for line in table(tmp_path).splitlines() if line.startswith(f"| {kept.stem} "))
    assert "ours FAIL" in row
    assert row.endswith("| - | - | - | - | - |")
