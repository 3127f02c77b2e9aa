"""S6: whoever does not come back, or is left waiting for compacted history, is found."""

import random
from pathlib import Path

import pytest

from bench.plan import Plan, Trouble
from bench.records import MessageKind, Outcome
from bench.storms import apiserver_restart
from tests.bench.storms.perfect import Played, play

SMALL = apiserver_restart.Parameters(objects=20, claims=2, compaction_s=0.5)


def plan() -> Plan:
    """A small one."""
    return apiserver_restart.schedule(SMALL, 6_000_000, random.Random(1))


@pytest.fixture
def played() -> Played:
    """A small run on a perfect store."""
    return play(plan())


def violations(played: Played, folder: Path) -> list[int]:
    """Clients that did not come back, and compacted starts that were not refused."""
    verdicts = apiserver_restart.checks(played.records(folder), SMALL)
    assert all(verdict.checked > 2 for verdict in verdicts)
    return [verdict.violations for verdict in verdicts]


def test_blows_come_at_equal_distances() -> None:
    """Three drops in a run, and the kills that larger presets have after them."""
    made = [(each.at_us, each.trouble) for each in plan().disturbances]
    assert made == [(1_500_000 * n, Trouble.DROP) for n in (1, 2, 3)]
    small = apiserver_restart.Parameters(objects=20, claims=2, kills=1)
    killed = apiserver_restart.schedule(small, 5_000_000, random.Random(1))
    assert (4_000_000, Trouble.KILL) == (
        killed.disturbances[-1].at_us,
        killed.disturbances[-1].trouble,
    )


def test_objects_are_there_before() -> None:
    """Half the objects are pods, half sandboxes; none of them is for a claim to take."""
    residents = [each for each in plan().preload if b"resident" in each.key]
    assert len(residents) == len({each.key for each in residents}) == 20
    assert all(each.owner for each in residents)
    assert sum(b"/pods/" in each.key for each in residents) == 10


def test_perfect_store_passes(played: Played, tmp_path: Path) -> None:
    """Nothing is wrong when all come back, some of them by way of a refusal."""
    assert violations(played, tmp_path) == [0, 0]


def test_client_that_stays_away_is_found(played: Played, tmp_path: Path) -> None:
    """A cache that is not watched after the last drop is one violation; until then it may list."""
    watches = played.rows["watches"]
    early, late = (
        next(row for row in watches if int(row["opened"]) > after_us and int(row["start"]) > 1)
        for after_us in (1_000_000, 4_500_000)
    )
    watches.remove(early)
    watches.remove(late)
    assert violations(played, tmp_path) == [1, 0]


def test_who_stays_away_from_a_cut_run_is_not_judged(played: Played, tmp_path: Path) -> None:
    """It may have had no time to come back."""
    played.facts["state"] = "INCOMPLETE"
    watches = played.rows["watches"]
    watches.remove(next(row for row in watches if int(row["opened"]) > 4_500_000))
    returned = apiserver_restart.checks(played.records(tmp_path), SMALL)[0]
    assert (returned.checked, returned.violations) == (0, 0)
    assert returned.lacking == "the run was cut short"


def test_silence_is_found(played: Played, tmp_path: Path) -> None:
    """A compacted start that is never refused is one violation."""
    row = next(played.find("messages", kind=MessageKind.CANCELED))
    played.rows["messages"].remove(row)
    assert violations(played, tmp_path) == [0, 1]


def test_refusal_without_its_revision_is_found(played: Played, tmp_path: Path) -> None:
    """A refusal that does not say what is compacted is one violation."""
    row = next(played.find("messages", kind=MessageKind.CANCELED))
    row["compact_revision"] = 0
    assert violations(played, tmp_path) == [0, 1]


def test_half_of_history_is_found(played: Played, tmp_path: Path) -> None:
    """Events after a compacted start are one violation, refused later or not."""
    row = next(played.find("messages", kind=MessageKind.CANCELED))
    told = {"kind": MessageKind.EVENTS, "message": 2, "events": 1}
    played.add("messages", watch=row["watch"], received=row["received"], **told)
    assert violations(played, tmp_path) == [0, 1]


def test_measures(played: Played, tmp_path: Path) -> None:
    """A store is synced when its last cache is; writes until then are those of the storm.

    A call that we ended ourselves is none of them.
    """
    good = apiserver_restart.measures(played.records(tmp_path / "good"), SMALL)
    assert good["synced_max_s"] == pytest.approx(0.0022, abs=0.001)
    late = max(
        (row for row in played.rows["watches"] if 3_000_000 <= int(row["opened"]) < 3_100_000),
        key=lambda row: int(row["opened"]),
    )
    next(played.find("messages", watch=late["watch"]))["received"] = 3_600_000
    for row in played.rows["ops"]:
        if 3_000_000 <= int(row["sent"]) < 3_600_000:
            row["done"] = int(row["done"]) + 6_000
    cut = next(row for row in played.rows["ops"] if int(row["sent"]) >= 3_000_000)
    cut |= {"outcome": Outcome.UNKNOWN, "code": 14, "done": int(cut["sent"]) + 50}
    played.add("samples", server_rss=64 << 20)
    bad = apiserver_restart.measures(played.records(tmp_path / "bad"), SMALL)
    assert bad["synced_max_s"] == 0.6
    assert bad["write_storm_ratio"] == pytest.approx(21)
    assert bad["server_rss_peak_mib"] == 64
