"""One stored session against another."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from bench.report.compare import Sessions, UnequalSessionsError, compare
from bench.report.session import Session, read_session, write_session
from bench.report.terminal import comparison_table
from bench.verdicts import Verdict
from tests.bench.report.made import session
from tests.bench.test_cli import say

pytestmark = pytest.mark.slow


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    """Two sessions, in the second of which ours is twice as slow."""
    folders = (tmp_path / "first", tmp_path / "second")
    for folder, mean_us in zip(folders, (2000, 4000), strict=True):
        folder.mkdir()
        session(folder, means_us={"ours": mean_us, "etcd": 4000}, seconds=3)
    return folders


def change(folder: Path, edit: Callable[[Session], None]) -> None:
    """Edit what a session says of itself."""
    stored = read_session(folder)
    edit(stored)
    write_session(folder, stored)


def test_the_second_is_measured_against_the_first(both: tuple[Path, Path]) -> None:
    """Twice as slow is a ratio of two and worse; the other target did not change."""
    made = compare(*both)
    rows = {(row["target"], row["metric"]): row for row in made.rows}
    ours, etcd = (rows[name, "latency_p50_us"] for name in ("ours", "etcd"))
    assert 2 == pytest.approx(ours["ratio"], rel=0.25)
    assert ("worse", "no difference") == (ours["finding"], etcd["finding"])
    assert [] == made.remarks


def test_what_differs_is_said_once(
    both: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trace at another speed is not the same load, though it is the same trace."""

    def hurry(stored: Session) -> None:
        stored["parameters"] = {"speed": 2.0}

    change(both[1], hurry)
    expected = "{'burst': 50} against {'speed': 2.0}"
    with pytest.raises(UnequalSessionsError) as refusal:
        compare(*both)
    assert (expected,) == refusal.value.args
    monkeypatch.setattr("bench.cli.measures", lambda _: {})
    code, told = say("compare", "--force", *map(str, both))
    assert (0, 1) == (code, told.count(expected))


def test_unequal_machines_are_refused(both: tuple[Path, Path]) -> None:
    """The refusal says what differs; whoever insists is told as well."""

    def move(stored: Session) -> None:
        stored["before"]["kernel"] = "Linux 9"
        stored["before"]["cores"] = 64

    change(both[1], move)
    with pytest.raises(UnequalSessionsError) as refusal:
        compare(*both)
    expected = ("cores: 2 against 64", "kernel: Linux 6.1 against Linux 9")
    assert expected == refusal.value.args
    forced = compare(*both, force=True)
    assert list(expected) == forced.remarks
    assert forced.rows


def test_unequal_plans_are_refused(both: tuple[Path, Path]) -> None:
    """Another fingerprint is another load."""

    def other(stored: Session) -> None:
        stored["fingerprint"] = "0" * 64

    for run in both[1].glob("*/*/run.json"):
        run.write_text(run.read_text().replace("f" * 64, "0" * 64))
    change(both[1], other)
    with pytest.raises(UnequalSessionsError, match="fingerprint: ffffffffffff against 0000"):
        compare(*both)


def test_unequal_durability_is_refused(both: tuple[Path, Path]) -> None:
    """A server that syncs less is no faster."""
    for run in both[1].glob("ours/*/run.json"):
        run.write_text(run.read_text().replace("fsync per commit", "none"))
    with pytest.raises(UnequalSessionsError, match="durability of ours"):
        compare(*both)


def test_unknown_durability_is_refused(both: tuple[Path, Path]) -> None:
    """Two servers that ran already may be two configurations of one program."""
    for folder in both:
        for run in folder.glob("ours/*/run.json"):
            text = run.read_text().replace("fsync per commit", "unknown")
            run.write_text(text.replace("kvstore serve", ""))
    with pytest.raises(UnequalSessionsError, match="durability of ours: unknown against unknown"):
        compare(*both)


def test_targets_without_speed_are_left_out(tmp_path: Path, both: tuple[Path, Path]) -> None:
    """A failed target and one that only one session has are named, with no figure."""
    third = tmp_path / "third"
    third.mkdir()
    wrong = {"ours": [Verdict("Reliable", 4, 1, ("lost",))]}
    session(third, means_us={"ours": 2000, "kine": 9000}, seconds=1, verdicts=wrong)
    made = compare(both[0], third)
    assert [] == made.rows
    assert made.remarks == [
        "ours is PASS in the first, FAIL in the second",
        "etcd is in the first session only",
        "kine is in the second session only",
    ]


def shown(sessions: Sessions) -> str:
    """What the terminal shows."""
    console = Console(file=io.StringIO(), width=120)
    console.print(comparison_table(sessions))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_slower_disk_is_refused(both: tuple[Path, Path]) -> None:
    """It is another machine; whoever insists is told above the ratios."""

    def slower(stored: Session) -> None:
        stored["before"]["fsync_p50_us"] *= 2
        stored["after"] = None

    change(both[1], slower)
    told = "fsync differs by 100 % between the sessions, 25 % is allowed"
    with pytest.raises(UnequalSessionsError, match=told):
        compare(*both)
    text = shown(compare(*both, force=True))
    assert told in text
    assert "worse" in text


def test_what_is_compared_is_told_first(both: tuple[Path, Path]) -> None:
    """Another version or commit is why one compares; the speed of the disk is always shown."""

    def newer(stored: Session) -> None:
        stored["before"]["commit"] = "89abcde"
        stored["before"]["fsync_p50_us"] *= 1.2

    change(both[1], newer)
    for run in both[1].glob("ours/*/run.json"):
        run.write_text(run.read_text().replace("3.6.0", "3.6.1"))
    lines = shown(compare(*both)).splitlines()
    assert "ours: 3.6.0 in the first, 3.6.1 in the second" == lines[0].strip()
    assert "commit: 0123456 in the first, 89abcde in the second" == lines[2].strip()
    assert lines[3].startswith("fsync: 110 ")
    assert "132 " in lines[3]


@pytest.mark.parametrize("wrong", [True, False])
def test_what_is_true_of_every_row_is_told_once(tmp_path: Path, *, wrong: bool) -> None:
    """With nothing to compare there is no empty table; too few runs are too few for all rows."""
    verdicts = {"ours": [Verdict("Reliable", 4, 1, ("lost",))]} if wrong else {}
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        means_us = {"ours": 2000.0}
        session(folder, means_us=means_us, repetitions=1, seconds=1, verdicts=verdicts)
    text = shown(compare(tmp_path / "first", tmp_path / "second"))
    assert ("finding" in text) != wrong
    expected = "nothing can be compared" if wrong else "every finding is too few (1): it takes 5"
    assert text.splitlines()[-1].startswith(expected)
    assert wrong or text.count("too few") == 1
