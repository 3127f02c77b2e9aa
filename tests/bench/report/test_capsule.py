"""The environment of a session."""

import os
from pathlib import Path

import pytest

from bench.capsule import (
    BOUTS,
    DRIFT_PERCENT_MAX,
    ROUND_TRIPS,
    SYNCS,
    Capsule,
    bouts,
    capsule,
    differences,
    drift,
    typical,
)
from tests.bench.report.made import CAPSULE


def changed(**fields: object) -> Capsule:
    """The same machine but for something."""
    return Capsule(**{**CAPSULE, **fields})  # type: ignore[typeddict-item]


@pytest.mark.slow
def test_this_machine_is_described(tmp_path: Path) -> None:
    """Every field is known, and a command that is missing or fails has no version."""
    commands = {"sh": ["sh", "-c", "echo sh 7; echo more"], "bad": ["sh", "-c", "exit 3"]}
    found = capsule(tmp_path, {**commands, "none": ["no-such-program"]})
    assert "sh 7" == found["versions"]["sh"]
    assert {"sh", "kvstore"} == found["versions"].keys()
    assert len(os.sched_getaffinity(0)) == found["cores"]
    assert all(found[name] for name in ("cpu", "kernel", "file_system", "python"))
    assert 0 < found["fsync_p50_us"] <= found["fsync_p99_us"]
    assert 0 < found["loopback_p50_us"]


@pytest.mark.slow
def test_every_probe_is_timed(tmp_path: Path) -> None:
    """As many times as probes, fewer when a bout's time is over, and no file is left."""
    syncs, round_trips = bouts(tmp_path)
    assert BOUTS == len(syncs) == len(round_trips)
    assert all(1 <= len(bout) <= SYNCS for bout in syncs)
    assert all(1 <= len(bout) <= ROUND_TRIPS for bout in round_trips)
    assert [] == list(tmp_path.iterdir())
    assert any(each % 1 for bout in round_trips for each in bout), "finer than it takes"


def test_a_bout_on_a_slow_disk_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes longer for one sync than a bout may is synced once in each."""
    monkeypatch.setattr("bench.capsule.BOUT_US", 0)
    syncs, round_trips = bouts(tmp_path)
    assert {1} == {len(bout) for bout in (*syncs, *round_trips)}


def test_drift_is_either_way() -> None:
    """Per cent of what it was before, for a disk that got slower and a loopback that got faster."""
    after = changed(fsync_p50_us=CAPSULE["fsync_p50_us"] * 1.3, loopback_p50_us=7.0)
    found = drift(CAPSULE, after)
    assert {"fsync": 30.0, "loopback": 50.0} == pytest.approx(found)
    assert all(percent > DRIFT_PERCENT_MAX for percent in found.values())
    assert {"fsync": 0.0, "loopback": 0.0} == drift(CAPSULE, CAPSULE)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cpu", "Another"),
        ("cores", 4),
        ("memory_bytes", 1 << 30),
        ("kernel", "Linux 7"),
        ("file_system", "xfs"),
        ("python", "CPython 3.12"),
    ],
)
def test_another_machine_differs(field: str, value: object) -> None:
    """Each of the fields that timings depend on is compared."""
    (line,) = differences(CAPSULE, changed(**{field: value}))
    assert line.startswith(f"{field}: ")


def test_versions_and_timings_make_no_other_machine() -> None:
    """What is compared between sessions may be the version; timings are never equal."""
    assert [] == differences(CAPSULE, changed(versions={}, commit="", fsync_p50_us=1.0))


def test_disturbed_bouts_do_not_count() -> None:
    """A noisy neighbour in less than half of the bouts leaves no trace; a slower machine does."""
    quiet, noisy = [300.0] * 9 + [5000.0], [900.0] * 10
    assert 300 == typical([quiet] * 4 + [noisy] * 3)
    assert 900 == typical([quiet] * 3 + [noisy] * 4)
