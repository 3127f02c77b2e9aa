"""`kvstore check`: a sound store is found sound, each kind of damage is found, nothing changes."""

from collections.abc import Iterable
from pathlib import Path

import apsw
import pytest

from backends import check as checking
from backends import sqlite_file
from backends.check import Report, check
from backends.memory import MemoryDisk
from backends.schema import SCHEMA_VERSION, Statements, sqlite_dialect
from backends.sqlite_writer import Writer
from kvstore.backend import Batch, LeaseRow, Outcome, Row
from kvstore.config import SqliteConfig
from kvstore.errors import BackendError
from kvstore.pb import rpc_pb2 as pb
from tests.backends.raw import raw
from tests.stack import Stack, serve

ROWS: list[Row] = [
    (2, 0, b"a", 2, 1, 0, b"a1"),
    (2, 1, b"b", 2, 1, 7, b"b1"),
    (3, 0, b"a", 2, 2, 0, b"a2"),
    (4, 0, b"b", 0, 0, 0, b""),
    (5, 0, b"b", 5, 1, 7, b"b2"),
    (6, 0, b"a", 2, 3, 0, b"a3"),
    (7, 0, b"c", 7, 1, 0, b"c1"),
    (7, 1, b"d", 7, 1, 0, b""),
    (8, 0, b"c", 0, 0, 0, b""),
    (9, 0, b"a", 2, 4, 0, b"a4"),
]
COMPACT_REVISION = 5
"""Compactable at 5: a at 2 (a at 3 is what a reader at 5 sees), b at 2 and 4."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store with the history above, closed."""
    path = tmp_path / "kvstore.db"
    config, statements = SqliteConfig(), Statements(sqlite_dialect())
    sqlite_file.create(path, "first")
    connection = sqlite_file.open_writer(path, statements, config)
    writer = Writer(path, connection, statements, config)
    batch = Batch(
        epoch=writer.take().epoch,
        tip_before=1,
        tip=9,
        rows=ROWS,
        lease_puts={7: LeaseRow(7, 60, 30)},
        compact_revision=COMPACT_REVISION,
    )
    assert Outcome.COMMITTED is writer.commit(batch).outcome
    writer.close()
    return path


def contents(directory: Path) -> dict[str, bytes]:
    """Every file, by name."""
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def findings_of(rows: Iterable[Row], compact_revision: int) -> list[str]:
    """What is wrong with the chains of ``rows``."""
    report = Report(Path(), compact_revision=compact_revision)
    chains = checking._Chains(report, None, {}, alone=True)
    for revision, sub, key, create_revision, version, lease, value in rows:
        chains.add(revision, sub, key, create_revision, version, lease, len(value))
    chains.end()
    return report.findings


def killed(path: Path) -> None:
    """Leave a log beside the database, as a killed server does."""
    with raw(path) as connection:
        connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        connection.execute("INSERT INTO revisions VALUES (10, 0, ?, 10, 1, 0, ?)", (b"e", b"e1"))
    path.with_name("kvstore.db-shm").unlink()


def test_sound_store(path: Path) -> None:
    """A store as it is written has no findings, and is counted."""
    report = check(path)
    assert ([], True) == (report.findings, report.sound)
    assert (9, 5, 1, "first", SCHEMA_VERSION) == (
        report.tip,
        report.compact_revision,
        report.epoch,
        report.shard,
        report.schema_version,
    )
    assert (10, 3, 1, 3) == (
        report.rows,
        report.live_keys,
        report.leases,
        report.compactable_rows,
    )


def test_compaction_may_be_anywhere(path: Path) -> None:
    """Any of the rows that compaction may delete can be gone, in any combination."""
    compactable = [(2, 0), (2, 1), (4, 0)]
    for chosen in range(1 << len(compactable)):
        with raw(path) as connection:
            connection.execute("BEGIN")
            for n, id_ in enumerate(compactable):
                if chosen >> n & 1:
                    connection.execute("DELETE FROM revisions WHERE (revision, sub) = (?, ?)", id_)
            report = Report(path, compact_revision=COMPACT_REVISION)
            chains = checking._Chains(report, {7}, {}, alone=True)
            for row in connection.execute(
                "SELECT revision, sub, key, create_revision, version, lease, length(value)"
                " FROM revisions ORDER BY revision, sub"
            ):
                chains.add(*row)
            chains.end()
            connection.execute("ROLLBACK")
        assert [] == report.findings
        assert 3 - chosen.bit_count() == report.compactable_rows


@pytest.mark.parametrize("log", [False, True], ids=["closed", "killed"])
def test_nothing_changes(path: Path, tmp_path: Path, *, log: bool) -> None:
    """A check leaves every file as it was and none behind, and sees what is in the log."""
    if log:
        killed(path)
    before = contents(tmp_path)
    report = check(path)
    assert [] == report.findings
    assert (10 if log else 9) == report.tip
    assert before == contents(tmp_path)
    sqlite_file.Lock(path).release()
    before = contents(tmp_path)
    check(path)
    assert before == contents(tmp_path)


PUT_A = pb.RequestOp(request_put=pb.PutRequest(key=b"a"))
DELETE_ALL = pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=b"a", range_end=b"\0"))


def test_puts_and_deletes_of_one_revision_are_sound() -> None:
    """A Txn that puts a key and deletes all keys around it leaves up to three rows of the key in a
    revision; none is a finding, wherever compaction stands and however far it has come, which takes
    a key's oldest row first.
    """
    disk = MemoryDisk()
    engine = Stack([disk])
    put, delete = PUT_A, DELETE_ALL
    for ops in ([put], [put, delete], [put], [delete, put], [put], [delete, put, delete], [put]):
        serve(engine.kv.txn, pb.TxnRequest(success=ops).SerializeToString())
        engine.settle()
    rows = list(disk.rows.values())
    assert [1, 2, 1, 2, 1, 3, 1] == [
        sum(row[0] == revision for row in rows) for revision in range(2, 9)
    ]
    for compact_revision in range(1, 9):
        below = sum(row[0] <= compact_revision for row in rows)
        is_kept = below > 0 and rows[below - 1][4] > 0
        for gone in range(below + 1 - is_kept):
            assert [] == findings_of(rows[gone:], compact_revision)


@pytest.mark.parametrize("compact_revision", [-1, 3])
def test_changes_of_one_revision_that_no_request_makes(compact_revision: int) -> None:
    """Two puts, with or without a delete between, and two deletes."""
    first: Row = (2, 0, b"a", 2, 1, 0, b"")
    again: Row = (3, 0, b"a", 2, 2, 0, b"")
    gone: Row = (3, 1, b"a", 0, 0, 0, b"")
    damaged: list[tuple[str, list[Row]]] = [
        ("put", [again, (3, 1, b"a", 2, 3, 0, b"")]),
        ("put", [again, gone, (3, 2, b"a", 3, 1, 0, b"")]),
        ("deleted", [gone, (3, 2, b"a", 0, 0, 0, b"")]),
    ]
    for what, rows in damaged:
        findings = findings_of([first, *rows], compact_revision)
        expected = f"the key is {what} twice in one revision"
        assert any(expected in finding for finding in findings), findings


DAMAGES: dict[str, tuple[str, str]] = {
    "a version that skips": (
        "UPDATE revisions SET version = 5 WHERE revision = 9",
        "version 5 created at 2 follows version 3 created at 2",
    ),
    "a version that repeats": (
        "UPDATE revisions SET version = 3 WHERE revision = 9",
        "version 3 created at 2 follows version 3",
    ),
    "another creation": (
        "UPDATE revisions SET create_revision = 3 WHERE revision = 9",
        "version 4 created at 3 follows version 3 created at 2",
    ),
    "a creation in the future": (
        "UPDATE revisions SET create_revision = 10 WHERE revision = 9",
        "version 4, created at 10, cannot be",
    ),
    "a first version of an older key": (
        "UPDATE revisions SET create_revision = 6 WHERE (revision, sub) = (7, 1)",
        "version 1 was created at 6",
    ),
    "a later version at its creation": (
        "UPDATE revisions SET version = 2 WHERE (revision, sub) = (7, 1)",
        "version 2 was created at 7",
    ),
    "more versions than revisions": (
        "UPDATE revisions SET version = 9 WHERE revision = 3",
        "version 9 is more than the revisions since 2",
    ),
    "a lost row": ("DELETE FROM revisions WHERE revision = 6", "follows version 2 created at 2"),
    "a lost newest version below the compaction": (
        "DELETE FROM revisions WHERE revision IN (2, 3)",
        "version 3 of a key that was not live",
    ),
    "a lost tombstone": (
        (
            "UPDATE revisions SET revision = 10, key = x'63' WHERE revision = 9;"
            "UPDATE revisions SET create_revision = 10, version = 1 WHERE revision = 10;"
            "DELETE FROM revisions WHERE revision = 8"
        ),
        "version 1 created at 10 follows version 1 created at 7",
    ),
    "a lost put before a tombstone": (
        (
            "DELETE FROM revisions WHERE (revision, sub) = (7, 0);"
            "UPDATE revisions SET sub = 0 WHERE revision = 7"
        ),
        "a tombstone of a key that is not live",
    ),
    "a tombstone with a lease": (
        "UPDATE revisions SET lease = 7 WHERE revision = 8",
        "a tombstone is not all zero",
    ),
    "a tombstone with a value": (
        "UPDATE revisions SET value = x'00' WHERE revision = 8",
        "a tombstone is not all zero",
    ),
    "a missing sub": (
        (
            "DELETE FROM revisions WHERE (revision, sub) = (7, 0);"
            "DELETE FROM revisions WHERE revision = 8"
        ),
        "sub 0 is missing",
    ),
    "a key twice in a revision": (
        "UPDATE revisions SET key = x'63' WHERE (revision, sub) = (7, 1)",
        "the key is put twice in one revision",
    ),
    "an empty key": (
        "UPDATE revisions SET key = x'' WHERE (revision, sub) = (7, 1)",
        "a key is not empty",
    ),
    "a gap that is too wide": (
        (
            "UPDATE revisions SET key = x'65', version = 1, create_revision = 4 WHERE revision = 4;"
            "UPDATE revisions SET key = x'65', version = 3, create_revision = 4 WHERE revision = 5"
        ),
        "version 3 is more than the revisions since 4",
    ),
    "a creation before what ended it": (
        "UPDATE revisions SET create_revision = 3, version = 2 WHERE revision = 5",
        "created at 3, before the row at 4 ended it",
    ),
    "a revision before all": (
        "INSERT INTO revisions VALUES (1, 0, x'66', 1, 1, 0, x'')",
        "revisions start at 2",
    ),
    "a lease that is gone": ("DELETE FROM leases", "its lease 7 does not exist"),
    "a lease without time": ("UPDATE leases SET granted_ttl = 0", "lease 7: 30 s left of 0 s"),
    "no fence row": ("DELETE FROM fence", "there is no fence row"),
    "a compaction beyond the tip": (
        "UPDATE fence SET compact_revision = 10",
        "compact revision 10 is not between -1 and the tip, 9",
    ),
    "an id of zero": ("UPDATE fence SET cluster_id = 0", "an id is zero"),
    "a negative epoch": ("UPDATE fence SET epoch = -1", "epoch -1 is negative"),
    "a trigger": (
        "CREATE TRIGGER t AFTER INSERT ON revisions BEGIN DELETE FROM leases; END",
        "trigger t does not belong here",
    ),
    "another column": (
        "ALTER TABLE leases ADD COLUMN more INTEGER",
        "the columns of table leases are not as declared",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_found(path: Path, kind: str) -> None:
    """Each kind of damage has its finding."""
    damage, expected = DAMAGES[kind]
    with raw(path) as connection:
        connection.execute(damage)
    report = check(path)
    assert not report.sound
    assert any(expected in finding for finding in report.findings), report.findings


def test_damaged_pages_are_found(path: Path) -> None:
    """A page that SQLite cannot read is a finding, not a crash."""
    content = path.read_bytes()
    for number in range(1, len(content) // sqlite_file.PAGE_BYTES):
        start = number * sqlite_file.PAGE_BYTES
        end = start + sqlite_file.PAGE_BYTES
        path.write_bytes(content[:start] + b"\xa5" * sqlite_file.PAGE_BYTES + content[end:])
        try:
            report = check(path)
        except BackendError as error:
            assert "SQLITE_CORRUPT" in str(error)
        else:
            assert any("pages:" in line or "cannot be read" in line for line in report.findings)


def test_index_that_lost_a_row_is_found(path: Path) -> None:
    """A row that only the table has is found, though no query would miss it."""
    with raw(path) as connection:
        root = connection.execute(
            "SELECT rootpage FROM sqlite_schema WHERE name = 'sqlite_autoindex_revisions_1'"
        ).get
    assert isinstance(root, int)
    content = bytearray(path.read_bytes())
    cells = (root - 1) * sqlite_file.PAGE_BYTES + 3
    content[cells : cells + 2] = (len(ROWS) - 1).to_bytes(2, "big")
    path.write_bytes(content)
    findings = check(path).findings
    assert any(line.startswith("pages:") and "revisions" in line for line in findings), findings


def test_findings_are_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much is wrong, the report stays short and tells how much there is."""
    monkeypatch.setattr(checking, "FINDINGS_MAX", 3)
    with raw(path) as connection:
        connection.execute("UPDATE revisions SET version = 99 WHERE version > 0")
    report = check(path)
    assert 3 == len(report.findings)
    assert 8 <= report.findings_total


def test_store_in_use_is_refused(path: Path) -> None:
    """A check and a server exclude each other, with one line that says so."""
    lock = sqlite_file.Lock(path)
    with pytest.raises(BackendError, match="is held by process"):
        check(path)
    lock.release()
    assert check(path).sound


def test_what_is_no_store_is_refused(path: Path, tmp_path: Path) -> None:
    """No file, a foreign file and a newer store are refused, and nothing is left behind."""
    with pytest.raises(BackendError, match="there is no store at"):
        check(tmp_path / "other.db")
    with raw(path) as connection:
        connection.execute("UPDATE meta SET schema_version = 99")
    with pytest.raises(BackendError, match="has schema version 99"):
        check(path)
    path.write_bytes(b"text")
    with pytest.raises(BackendError, match="is not an SQLite database"):
        check(path)
    assert {"kvstore.db"} == set(contents(tmp_path))
