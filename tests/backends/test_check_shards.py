"""`kvstore check` of a store that is one of several: what home keeps for all is counted and judged,
and another shard is judged by what home knows.
"""

from pathlib import Path

import pytest

from backends import sqlite_file
from backends.check import Report, check
from backends.schema import Statements, sqlite_dialect
from backends.sqlite_writer import Writer
from kvstore.backend import Batch, Cluster, LeaseRow, Outcome, Row, ShardRecord
from kvstore.config import SqliteConfig
from tests.backends.raw import raw

CLUSTER = Cluster(cluster_id=10, member_id=11)
STATEMENTS = Statements(sqlite_dialect())
HOME_ROWS: list[Row] = [
    (2, 0, b"a", 2, 1, 7, b"a1"),
    (3, 1, b"b", 3, 1, 0, b"b1"),
    (5, 0, b"a", 2, 2, 0, b"a2"),
    (5, 3, b"b", 0, 0, 0, b""),
]
REDO: list[tuple[str, Row]] = [
    ("agents", (5, 1, b"x", 3, 2, 7, b"x2")),
    ("events", (5, 2, b"y", 0, 0, 0, b"")),
    ("events", (6, 0, b"y", 6, 1, 0, b"y2")),
    ("agents", (6, 1, b"x", 0, 0, 0, b"")),
]
EVENTS_ROWS: list[Row] = [
    (3, 0, b"y", 3, 1, 7, b"y1"),
    (4, 0, b"z", 4, 1, 0, b"z1"),
    (4, 2, b"w", 4, 1, 0, b"w1"),
]


def made(path: Path, shard: str, batch: Batch) -> Path:
    """A store of the cluster that holds one batch, closed."""
    sqlite_file.create(path, shard, CLUSTER)
    config = SqliteConfig()
    connection = sqlite_file.open_writer(path, STATEMENTS, config)
    writer = Writer(path, connection, STATEMENTS, config)
    batch.epoch = writer.take().epoch
    assert Outcome.COMMITTED is writer.commit(batch).outcome
    writer.close()
    return path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The home shard: a revision over itself and both others, and one over the others alone, are
    on their way; 3 was over home and events, 4 over events and agents.
    """
    tips = {"core": 3, "events": 4, "agents": 3}
    batch = Batch(
        epoch=0,
        tip_before=1,
        tip=6,
        rows=HOME_ROWS,
        lease_puts={7: LeaseRow(7, 60, 30)},
        compact_revision=2,
        reserved=1 << 30,
        records={name: ShardRecord(name, tip, "") for name, tip in tips.items()},
        redo=REDO,
        shard_map="a map",
    )
    return made(tmp_path / "core.db", "core", batch)


@pytest.fixture
def events(tmp_path: Path) -> Path:
    """Another shard, which 5 and 6 have not reached."""
    return made(tmp_path / "events.db", "events", Batch(0, 1, 4, EVENTS_ROWS))


def test_what_home_keeps_is_counted(home: Path) -> None:
    """A sound home has no findings, and its reservation, records and redo rows are told."""
    report = check(home)
    assert ([], True) == (report.findings, report.sound)
    facts = report.facts()
    assert (6, 1 << 30, 3, 4) == (
        facts["revision"],
        facts["reserved"],
        facts["shards_recorded"],
        facts["redo_rows"],
    )
    assert {"core": 3, "events": 4, "agents": 3} == report.shard_tips


def test_another_shard_is_judged_by_home(home: Path, events: Path) -> None:
    """Subs that went to other shards are not missed, nor are leases, nor what home has compacted;
    without home's word all three are.
    """
    with raw(events) as connection:
        connection.execute("UPDATE revisions SET version = 2, create_revision = 2 WHERE sub = 0")
    with raw(home) as connection:
        connection.execute("UPDATE fence SET compact_revision = 4")
    report = check(events, home=check(home))
    assert ([], 4, "events", 3) == (
        report.findings,
        report.compact_revision,
        report.shard,
        report.live_keys,
    )
    alone = check(events).findings
    expected = ["sub 1 is missing", "its lease 7 does not exist", "of a key that was not live"]
    assert all(any(text in finding for finding in alone) for text in expected), alone


def test_rows_may_have_arrived_before_their_redo_rows_left(home: Path, events: Path) -> None:
    """Redo rows stay until every shard has its own: a shard that has them is sound, too."""
    with raw(events) as connection:
        arrived = [row for shard, row in REDO if shard == "events"]
        connection.executemany("INSERT INTO revisions VALUES (?, ?, ?, ?, ?, ?, ?)", arrived)
    report = check(events, home=check(home))
    assert ([], 6) == (report.findings, report.tip)


def test_compacted_rows_of_a_redo_record_are_not_missed(home: Path) -> None:
    """Home may have compacted its own rows of a revision that is still on its way."""
    with raw(home) as connection:
        connection.execute("UPDATE fence SET compact_revision = 6")
        connection.execute("DELETE FROM revisions WHERE revision = 5 AND sub = 3")
        connection.execute("DELETE FROM revisions WHERE revision = 3")
    assert [] == check(home).findings


HOME_DAMAGES: dict[str, tuple[str, str]] = {
    "a negative reservation": ("UPDATE fence SET reserved = -1", "reserved -1 is negative"),
    "a record beyond all": (
        "UPDATE shards SET tip = 1 << 40 WHERE name = 'events'",
        f"record of shard 'events': tip {1 << 40}, at most {1 << 30} was issued",
    ),
    "a record before all": (
        "UPDATE shards SET tip = 0 WHERE name = 'events'",
        "record of shard 'events': tip 0",
    ),
    "a record of nobody": (
        "UPDATE shards SET name = '' WHERE name = 'events'",
        "record of shard '': tip 4",
    ),
    "a redo row beyond the tip": (
        "UPDATE redo SET revision = 7 WHERE revision = 6",
        "redo revision 7 sub 0, key b'y': it is beyond the tip, 6",
    ),
    "a redo row of home": (
        "UPDATE redo SET shard = 'core' WHERE sub = 2",
        "redo revision 5 sub 2, key b'y': it is on the way to 'core'",
    ),
    "a redo row of nobody": (
        "UPDATE redo SET shard = '' WHERE sub = 2",
        "redo revision 5 sub 2, key b'y': it is on the way to ''",
    ),
    "a lost redo row": ("DELETE FROM redo WHERE sub = 2", "redo revision 5: sub 2 is missing"),
    "a lost redo row of others alone": (
        "DELETE FROM redo WHERE sub = 0",
        "redo revision 6: sub 0 is missing",
    ),
    "a lost row of home": (
        "DELETE FROM revisions WHERE (revision, sub) = (5, 0)",
        "redo revision 5: sub 0 is missing",
    ),
    "a row that is in both": (
        "UPDATE redo SET sub = 0 WHERE (revision, sub) = (5, 1)",
        "revision 5 sub 0, key b'a': it is on the way to another shard, too",
    ),
    "a redo row before all": (
        "UPDATE redo SET revision = 1 WHERE revision = 6",
        "redo revision 1 sub 0, key b'y': revisions start at 2",
    ),
    "a redo row without a key": (
        "UPDATE redo SET key = x'' WHERE (revision, sub) = (6, 1)",
        "redo revision 6 sub 1, key b'': a key is not empty",
    ),
    "a redo tombstone with a value": (
        "UPDATE redo SET value = x'00' WHERE (revision, sub) = (6, 1)",
        "redo revision 6 sub 1, key b'x': a tombstone is not all zero",
    ),
    "a redo row that no put makes": (
        "UPDATE redo SET version = 9 WHERE (revision, sub) = (5, 1)",
        "redo revision 5 sub 1, key b'x': version 9 is more than the revisions since 3",
    ),
    "a redo row of the future": (
        "UPDATE redo SET create_revision = 8 WHERE (revision, sub) = (5, 1)",
        "redo revision 5 sub 1, key b'x': version 2, created at 8, cannot be",
    ),
    "a second map": ("INSERT INTO shard_map VALUES (2, 'another')", "shard map: there are 2"),
    "another column": (
        "ALTER TABLE redo ADD COLUMN more INTEGER",
        "the columns of table redo are not as declared",
    ),
    "no table of records": ("DROP TABLE shards", "the columns of table shards are not as declared"),
}


@pytest.mark.parametrize("kind", HOME_DAMAGES)
def test_damage_of_what_home_keeps_is_found(home: Path, kind: str) -> None:
    """Each kind of damage has its finding."""
    damage, expected = HOME_DAMAGES[kind]
    with raw(home) as connection:
        connection.execute(damage)
    report = check(home)
    assert not report.sound
    assert any(expected in finding for finding in report.findings), report.findings


SHARD_DAMAGES: dict[str, tuple[str, str]] = {
    "another cluster": ("UPDATE fence SET cluster_id = 12", "cluster c is not home's, a"),
    "an older copy": (
        "DELETE FROM revisions WHERE revision = 4; UPDATE fence SET tip = 3",
        "tip 3 is below 4, where home has seen it",
    ),
    "a wrong version": (
        "UPDATE revisions SET version = 2 WHERE sub = 2",
        "version 2 was created at 4",
    ),
    "a reservation": ("UPDATE fence SET reserved = 5", "only home has them"),
    "a map": ("INSERT INTO shard_map VALUES (1, '')", "only home has them"),
    "a record": ("INSERT INTO shards VALUES ('core', 3, '')", "only home has them"),
    "a lease": ("INSERT INTO leases VALUES (1, 2, 0)", "only home has them"),
    "a redo row": (
        "INSERT INTO redo VALUES (3, 0, 'core', x'61', 3, 1, 0, x'')",
        "only home has them",
    ),
}


@pytest.mark.parametrize("kind", SHARD_DAMAGES)
def test_damage_of_another_shard_is_found(home: Path, events: Path, kind: str) -> None:
    """Each kind of damage has its finding."""
    damage, expected = SHARD_DAMAGES[kind]
    with raw(events) as connection:
        connection.execute(damage)
    report: Report = check(events, home=check(home))
    assert any(expected in finding for finding in report.findings), report.findings
