"""One stored session against another."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from bench.report.compare import UnequalSessionsError, compare
from bench.report.session import Session, read_session, write_session
from bench.report.terminal import comparison_table
from bench.verdicts import Verdict
from tests.bench.report.made import session

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


def test_the_table_tells_remarks_and_ratios(both: tuple[Path, Path]) -> None:
    """A slower disk is told above the ratios."""

    def slower(stored: Session) -> None:
        stored["before"]["fsync_p50_us"] *= 2
        stored["after"] = None

    change(both[1], slower)
    console = Console(file=io.StringIO(), width=120)
    console.print(comparison_table(compare(*both)))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "fsync differs by 100 % between the sessions" in text
    assert "worse" in text
