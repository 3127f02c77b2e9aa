"""S7: history that is shown or refused wrongly, and slow watchers that are left, are found."""

import random
from pathlib import Path

import pytest

from bench.plan import Plan, Verb
from bench.records import MessageKind, Outcome
from bench.storms import compact_churn
from tests.bench.storms.perfect import Played, Row, play

SMALL = compact_churn.Parameters(
    compaction_s=0.5,
    runs_per_second=0.5,
    writers=2,
    rounds_per_second=5.0,
    ledger_per_second=30.0,
    reads_per_second=40.0,
)
CODE = compact_churn.OUT_OF_RANGE


def plan() -> Plan:
    """A small one."""
    return compact_churn.schedule(SMALL, 4_000_000, random.Random(1))


@pytest.fixture
def played() -> Played:
    """A small run on a perfect store, which has gone on long after its last write."""
    played = play(plan())
    played.facts["finished_us"] = 20_000_000
    return played


def violations(played: Played, folder: Path) -> list[int]:
    """Compacted history shown, kept history refused, slow watchers left."""
    verdicts = compact_churn.checks(played.records(folder), SMALL)
    assert all(verdict.checked > 1 for verdict in verdicts)
    return [verdict.violations for verdict in verdicts]


def read(played: Played, role: bytes) -> Row:
    """The last read of history inside or outside of what is kept."""
    return list(played.find("ops", role=role))[-1]


def test_reads_are_of_both_kinds() -> None:
    """At xs about half of the reads go where history is, the others where it was."""
    made = compact_churn.schedule(compact_churn.PRESETS["xs"], 30_000_000, random.Random(1))
    reads = [step for actor in made.actors for step in actor.steps if step.verb == Verb.READ_AT]
    inside = [step for step in reads if step.think_us < 3_000_000]
    assert 400 < len(reads) < 700
    assert 0.5 < len(inside) / len(reads) < 0.8
    assert all(step.think_us > 6_000_000 for step in reads if step not in inside)
    assert all(step.due_us > step.think_us for step in reads)


def test_one_apiserver_compacts(played: Played) -> None:
    """Of two apiservers one wins each interval."""
    txns = list(played.find("ops", verb=Verb.COMPACT, at=0))
    assert len(txns) == 16
    assert sum(row["outcome"] == Outcome.OK for row in txns) == 8


def test_perfect_store_passes(played: Played, tmp_path: Path) -> None:
    """Nothing is wrong where history ends at the compaction, and all watchers are told."""
    assert violations(played, tmp_path) == [0, 0, 0]


def test_compacted_history_is_found(played: Played, tmp_path: Path) -> None:
    """A read below the compaction that shows something is one violation."""
    read(played, b"history.outside").update(outcome=Outcome.OK, code=0)
    assert violations(played, tmp_path) == [1, 0, 0]


def test_refused_history_is_found(played: Played, tmp_path: Path) -> None:
    """A read above every compaction that is refused is one violation."""
    read(played, b"history.inside").update(outcome=Outcome.REFUSED, code=CODE)
    assert violations(played, tmp_path) == [0, 1, 0]


def test_wrong_refusal_is_found(played: Played, tmp_path: Path) -> None:
    """Another code than that of compaction is one violation."""
    read(played, b"history.outside")["code"] = 5
    assert violations(played, tmp_path) == [1, 0, 0]


def test_doubtful_reads_are_excused(played: Played, tmp_path: Path) -> None:
    """While a compaction is under way, history may be there or not; a timeout proves nothing."""
    last = read(played, b"history.inside")
    unanswered = {"verb": Verb.COMPACT, "outcome": Outcome.UNKNOWN, "done": -1}
    played.add("ops", **last | unanswered | {"at": int(last["at"]) + 1})
    last.update(outcome=Outcome.REFUSED, code=CODE)
    read(played, b"history.outside").update(outcome=Outcome.UNKNOWN, code=4)
    assert violations(played, tmp_path) == [0, 0, 0]


def forget(played: Played, after_us: int) -> int:
    """A slow watcher hears nothing any more; gives its number."""
    (row, *_) = played.find("watches", name=b"slow-0")
    for table in ("events", "messages"):
        late = {
            message["message"]
            for message in played.find("messages", watch=row["watch"])
            if int(message["received"]) > after_us
        }
        played.rows[table] = [
            each
            for each in played.rows[table]
            if each["watch"] != row["watch"] or each["message"] not in late
        ]
    return int(row["watch"])


def test_slow_watcher_that_is_left_is_found(played: Played, tmp_path: Path) -> None:
    """A slow watcher that hears nothing any more, though there is more, is one violation."""
    forget(played, 1_000_000)
    assert violations(played, tmp_path) == [0, 0, 1]


def test_slow_watcher_that_is_told_is_excused(played: Played, tmp_path: Path) -> None:
    """Canceled with the revision of a compaction, it knows; without it, it does not."""
    watch = forget(played, 1_000_000)
    told = played.add("messages", watch=watch, message=1 << 40, kind=MessageKind.CANCELED)
    told["compact_revision"] = 99
    assert violations(played, tmp_path / "told") == [0, 0, 0]
    told["compact_revision"] = 0
    assert violations(played, tmp_path / "untold") == [0, 0, 1]


def test_slow_watcher_may_be_busy(played: Played, tmp_path: Path) -> None:
    """Who reads ten events a second needs a while for a message of two hundred."""
    watch = forget(played, 1_000_000)
    last = max(played.find("messages", watch=watch), key=lambda row: int(row["message"]))
    last["events"] = 200
    assert violations(played, tmp_path) == [0, 0, 0]


def test_measures(played: Played, tmp_path: Path) -> None:
    """Writes beside a compaction are told from the others, disk is told per live byte."""
    played.add("samples", disk=64 << 20)
    for row in played.find("ops", verb=Verb.COMPACT):
        row["done"] = int(row["sent"]) + 40_000
    found = compact_churn.measures(played.records(tmp_path), SMALL)
    assert found["compaction_p99_ms"] == 40
    assert found["disk_peak_mib"] == 64
    assert found["disk_per_live_ratio"] > 1
    assert found["history_read_p99_ms"] == 0.3, "a refusal that is right is no failed call"
