"""The speed table tells what was stored, and nothing of runs that went wrong."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.load import shards, works
from tests.load.results import RESULTS, Measured, amount, line, ratio
from tests.load.server import LoadError, Run
from tests.load.table import README, rows, table, with_table, with_tables
from tests.load.works import WORKS

WORK = WORKS[0]
CPU, RATE, _ = WORK.figures


def run(cpu: float, rate: float) -> Run:
    """What etcdload prints of a run without a fault."""
    return {
        "errors": 0,
        "conflicts": 0,
        "server_cpu_us_per_operation": cpu,
        "per_second": rate,
        "p99_ms": 1,
    }


@pytest.fixture
def measured() -> Measured:
    """Three runs each: the subject takes 0.4 of the CPU and reaches 1.5 of the rate."""
    return Measured(
        work=WORK.name,
        date="2026-01-02",
        commit="0123456789ab",
        machine={"cpu": "some", "cores": 2, "memory_gib": 24, "kernel": "6.1"},
        versions={"etcd": "3.6.0", "kvstore": "0.1.0", "python": "3.11.1"},
        seconds=5,
        reference=[run(100, 2000), run(90, 1000), run(5000, 2000)],
        subject=[run(40, 3000), run(1, 9000), run(41, 10)],
    )


def test_ratio_is_of_medians(measured: Measured) -> None:
    """One run far off does not move a ratio."""
    assert pytest.approx(0.4) == ratio(CPU, measured)
    assert pytest.approx(1.5) == ratio(RATE, measured)


def test_goals_know_their_direction(measured: Measured) -> None:
    """Less CPU and a higher rate are what is wanted."""
    assert (True, False) == (line(CPU, measured)[1], line(RATE, measured)[1])


def test_result_survives_storage(measured: Measured, tmp_path: Path) -> None:
    """What is stored is what is read."""
    measured.store(tmp_path / "results")
    assert measured == Measured.load(tmp_path / "results" / f"{WORK.name}.json")


@pytest.mark.parametrize("fault", ["errors", "conflicts", "watchers_incomplete"])
def test_faulty_run_has_no_figures(measured: Measured, fault: str) -> None:
    """A work with one faulty run is a failure in the table, whatever its speed."""
    faulty = replace(measured, subject=[*measured.subject, run(1, 9000) | {fault: 1}])
    assert [f"| {WORK.meaning} | FAIL: {fault}: 1 | | | |"] == rows(WORK, faulty)


def test_table_tells_its_origin(measured: Measured, tmp_path: Path) -> None:
    """Machine, versions, commit and date stand below the figures."""
    measured.store(tmp_path)
    text = table(tmp_path)
    assert all(word in text for word in ("some", "2 cores", "3.6.0", "0123456789ab", "2026-01-02"))


def test_no_results_no_table(tmp_path: Path) -> None:
    """A fresh checkout claims no speed."""
    assert "" == table(tmp_path)


def test_table_stays_between_its_marks() -> None:
    """What stands around the table is kept, and writing twice is writing once."""
    readme = "before\n<!-- speed-table:begin -->\nold\n<!-- speed-table:end -->\nafter\n"
    once = with_table(readme, "speed", "new\n")
    assert readme.replace("old", "new") == once == with_table(once, "speed", "new\n")


def test_readme_tells_the_stored_results() -> None:
    """The README's tables are those that the stored results make."""
    readme = README.read_text()
    assert readme == with_tables(readme, RESULTS)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0.123, "0.12 us"), (12.34, "12.3 us"), (123.4, "123 us"), (12345, "12,345 us")],
)
def test_amounts_have_three_digits(value: float | None, text: str) -> None:
    """A number tells as much as it knows."""
    assert text == amount(value, "us")


def test_longest_stall_is_read_from_the_histogram() -> None:
    """Only stalls that the server blames itself for, and only since the first reading."""
    name = works.STALL
    text = (
        f'{name}{{le="0.01",measured="wall"}} 1.0\n{name}{{le="+Inf",measured="wall"}} 9.0\n'
        f'{name}{{le="0.01",measured="cpu"}} 5.0\n{name}{{le="0.02",measured="cpu"}} 7.0\n'
        f'{name}{{le="+Inf",measured="cpu"}} 7.0\n'
    )
    stalls = works._stalls(text)
    assert {0.01: 5, 0.02: 7, float("inf"): 7} == stalls
    assert 0.02 == works._highest(stalls)
    with pytest.raises(LoadError):
        works._highest({0.01: 5, float("inf"): 6})


def test_rows_of_shards_tell_what_was_wanted(measured: Measured, tmp_path: Path) -> None:
    """A figure that is not as wanted says so, and one with a limit needs nothing beside it."""
    spread, start = (
        next(each for each in shards.COMPARISONS if each.name == name)
        for name in ("shards-create", "postgres-start")
    )
    beside = replace(measured, work=spread.name, versions=measured.versions | {"postgresql": "17"})
    rate, cpu = shards.rows(spread, beside)
    assert "| one file | 2,000/s | 3,000/s | 1.50 | ratio >= 1 |" in rate
    assert rate.endswith("|")
    assert "missed" not in rate + cpu
    slow = replace(beside, subject=[run(400, 100)] * 3)
    assert all("**missed**" in row for row in shards.rows(spread, slow))
    alone = replace(beside, work=start.name, reference=[], subject=[{"seconds": 5.1}])
    assert ["missed" in row for row in shards.rows(start, alone)] == [True]
    beside.store(tmp_path)
    assert "PostgreSQL 17" in shards.table(tmp_path)


def test_storm_that_did_not_pass_has_no_figures(measured: Measured) -> None:
    """Its state stands in their place."""
    storm = next(each for each in shards.COMPARISONS if each.name == "storm-killed")
    failed: Run = {"errors": 1, "first_error": "FAIL: lost", "neighbours_noise_ratio": 1}
    (row,) = shards.rows(storm, replace(measured, reference=[], subject=[failed]))
    assert "FAIL: errors: 1; FAIL: lost" in row
