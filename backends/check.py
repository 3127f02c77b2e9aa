"""Looking over a store without changing anything: what ``kvstore check`` reports.

The check holds the store's lock, so that no server uses it meanwhile. Without a log beside it the
file is opened as immutable; with one (the server was killed) the log is read into memory and left
where it is. Either way not a byte of any file changes and none is left behind.

**What must hold.** Above the compact revision every row is there: the subs of a revision count from
0, and each key's rows form a chain

    put       version 1, created at its own revision         no row or a tombstone before
    put       version + 1, created when the one before was   a put before
    tombstone all zero, empty value                          a put before

A revision has at most one put of a key, and tombstones before or behind it: a Txn may put a key and
delete it with a range that has no upper bound.

Up to the compact revision rows may be missing: only the last put of a key up to there must be left,
and the others leave bit by bit. Such rows that are still there are counted, not complained of. A
gap is judged by what any chain obeys: a key is put at most once per revision, so that a version
is at most the number of revisions since the key was created.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import apsw

from backends import sqlite_file
from backends.schema import Statements, sqlite_dialect, tables, unsigned
from kvstore.errors import BackendError

FINDINGS_MAX = 1_000
"""Findings that are kept; further ones are counted."""


@dataclass(slots=True)
class Report:
    """What a store holds and what is wrong with it."""

    path: Path
    schema_version: int = 0
    shard: str = ""
    cluster_id: int = 0
    member_id: int = 0
    epoch: int = 0
    tip: int = 0
    compact_revision: int = 0
    rows: int = 0
    live_keys: int = 0
    leases: int = 0
    compactable_rows: int = 0
    """Rows that compaction has superseded and not deleted yet."""
    findings: list[str] = field(default_factory=list)
    """One line each; the first FINDINGS_MAX."""
    findings_total: int = 0

    @property
    def sound(self) -> bool:
        """Was nothing found?"""
        return self.findings_total == 0

    def find(self, finding: str) -> None:
        """Something is wrong."""
        self.findings_total += 1
        if len(self.findings) < FINDINGS_MAX:
            self.findings.append(finding)


class Version(NamedTuple):
    """A row of a key, without key and value."""

    revision: int
    create_revision: int
    version: int
    lease: int
    put_at: int
    """The revision of the key's last put, this row's or one before; 0: none is known."""


def check(path: Path, *, holds_leases: bool = True) -> Report:
    """Look over the store at ``path``; ``holds_leases`` is false for a shard that is not home.

    Raises ``BackendError`` when there is no store of ours, it is of a newer version or in use.
    """
    with suppress(OSError):  # the lock says what
        if not path.parent.is_dir():
            raise BackendError(f"there is no store at {path.parent}")
    lock = sqlite_file.Lock(path)
    try:
        if sqlite_file.is_new(path):
            raise BackendError(f"there is no store at {path}")
        try:
            connection = _open(path)
            try:
                return _check(path, connection, holds_leases=holds_leases)
            finally:
                connection.close()
        except apsw.Error as error:
            raise BackendError(f"cannot read {path}: {sqlite_file.describe(error)}") from error
    finally:
        lock.release(undo=True)


def _open(path: Path) -> apsw.Connection:
    """A connection that changes no file, see the module's text."""
    if not path.with_name(path.name + "-wal").exists():
        flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
        return apsw.Connection(f"{path.absolute().as_uri()}?immutable=1", flags=flags)
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    connection.pragma("locking_mode", "exclusive")
    return connection


def _check(path: Path, connection: apsw.Connection, *, holds_leases: bool) -> Report:
    statements = Statements(sqlite_dialect())
    report = Report(path)
    report.schema_version = sqlite_file.schema_version(path, connection, statements)
    try:
        _check_pages(connection, report)
        _check_schema(connection, report)
        _check_fence(connection, statements, report)
        leases = _check_leases(connection, statements, report)
        chains = _Chains(report, leases if holds_leases else None)
        for row in connection.execute(statements.select_chains):
            chains.add(*row)
        chains.end()
    except apsw.Error as error:
        report.find(f"what follows cannot be read: {sqlite_file.describe(error)}")
    return report


def _check_pages(connection: apsw.Connection, report: Report) -> None:
    for (line,) in connection.execute("PRAGMA integrity_check"):
        if line != "ok":
            report.find(f"pages: {' '.join(str(line).split())}")


def _check_schema(connection: apsw.Connection, report: Report) -> None:
    """Tables as declared, and nothing else that could change what statements do."""
    declared = {table.name: table for table in tables()}
    known = {*declared, *(f"sqlite_autoindex_{name}_1" for name in declared)}
    for kind, name in connection.execute("SELECT type, name FROM sqlite_schema"):
        if name not in known and not str(name).startswith("sqlite_stat"):
            report.find(f"schema: {kind} {name} does not belong here")
    for name, table in declared.items():
        found = {
            (column, kind, bool(filled or key), key)
            for _, column, kind, filled, _, key in connection.execute(f"PRAGMA table_info({name})")
        }
        keys = list(table.primary_key.columns.keys())
        expected = {
            (
                column.name,
                str(column.type.compile(dialect=sqlite_dialect())),
                True,
                keys.index(column.name) + 1 if column.name in keys else 0,
            )
            for column in table.columns
        }
        if found != expected:
            report.find(f"schema: the columns of table {name} are not as declared")


def _check_fence(connection: apsw.Connection, statements: Statements, report: Report) -> None:
    row = connection.execute(statements.select_fence).fetchone()
    if row is None:
        report.find("fence: there is no fence row")
        return
    cluster_id, member_id, *others = row
    report.shard, report.epoch, report.tip, report.compact_revision = others
    report.cluster_id, report.member_id = unsigned(cluster_id), unsigned(member_id)
    if cluster_id == 0 or member_id == 0:
        report.find("fence: an id is zero")
    if report.epoch < 0:
        report.find(f"fence: epoch {report.epoch} is negative")
    if report.tip < 1:
        report.find(f"fence: tip {report.tip} is below 1, the revision of an empty store")
    if not -1 <= report.compact_revision <= report.tip:
        report.find(
            f"fence: compact revision {report.compact_revision} is not between -1 and the tip,"
            f" {report.tip}"
        )


def _check_leases(connection: apsw.Connection, statements: Statements, report: Report) -> set[int]:
    leases = set()
    for id_, granted, remaining in connection.execute(statements.select_leases):
        leases.add(id_)
        if granted < 1 or remaining < 0:
            report.find(f"lease {id_:x}: {remaining} s left of {granted} s")
    report.leases = len(leases)
    return leases


class _Chains:
    """Takes all rows in order and judges each by the row of its key before it."""

    def __init__(self, report: Report, leases: set[int] | None) -> None:
        self._report = report
        self._leases = leases
        self._last: dict[bytes, Version] = {}
        self._revision = 0
        self._sub_next = 0

    def add(
        self,
        revision: int,
        sub: int,
        key: bytes,
        create_revision: int,
        version: int,
        lease: int,
        value_bytes: int,
    ) -> None:
        """The next row in (revision, sub) order."""
        report = self._report
        report.rows += 1
        if revision != self._revision:
            self._revision, self._sub_next = revision, 0
        before = self._last.get(key)
        put_at = revision if version else before.put_at if before is not None else 0
        now = Version(revision, create_revision, version, lease, put_at)
        findings = [*self._place_findings(revision, sub, key)]
        if before is not None and self._is_superseded(before, revision):
            report.compactable_rows += 1
        if version == 0:
            findings += self._tombstone_findings(now, before, value_bytes)
        else:
            findings += self._put_findings(now, before)
        for finding in findings:
            report.find(f"revision {revision} sub {sub}, key {key!r}: {finding}")
        self._sub_next = sub + 1
        self._last[key] = now

    def _is_superseded(self, before: Version, revision: int) -> bool:
        """May the row before one at ``revision`` be compacted?"""
        last = self._report.compact_revision
        return revision <= last or (before.version == 0 and before.revision <= last)

    def _place_findings(self, revision: int, sub: int, key: bytes) -> Iterator[str]:
        if revision < 2:
            yield "revisions start at 2"
        if revision > self._report.compact_revision and sub != self._sub_next:
            yield f"sub {self._sub_next} is missing"
        if not key:
            yield "a key is not empty"

    def _tombstone_findings(
        self, now: Version, before: Version | None, value_bytes: int
    ) -> Iterator[str]:
        if now.create_revision or now.lease or value_bytes:
            yield "a tombstone is not all zero"
        if before is not None and before.version == 0 and before.revision == now.revision:
            yield "the key is deleted twice in one revision"
        gone = before is None or before.version == 0
        if gone and now.revision > self._report.compact_revision:
            yield "a tombstone of a key that is not live"

    def _put_findings(self, now: Version, before: Version | None) -> Iterator[str]:
        if before is not None and before.put_at == now.revision:
            yield "the key is put twice in one revision"
        if now.version < 0 or not 2 <= now.create_revision <= now.revision:
            yield f"version {now.version}, created at {now.create_revision}, cannot be"
            return
        if (now.version == 1) != (now.create_revision == now.revision):
            yield f"version {now.version} was created at {now.create_revision}"
        elif now.version > now.revision - now.create_revision + 1:
            yield f"version {now.version} is more than the revisions since {now.create_revision}"
        if now.revision > self._report.compact_revision:
            yield from _successor_findings(now, before)
        elif before is not None:
            yield from _gap_findings(now, before)

    def end(self) -> None:
        """All rows have been taken."""
        for key, last in self._last.items():
            if last.version == 0:
                if last.revision <= self._report.compact_revision:
                    self._report.compactable_rows += 1
                continue
            self._report.live_keys += 1
            if last.lease and self._leases is not None and last.lease not in self._leases:
                self._report.find(f"key {key!r}: its lease {last.lease:x} does not exist")


def _successor_findings(now: Version, before: Version | None) -> Iterator[str]:
    """``before`` is the row of the key just before ``now``: nothing is missing between."""
    if before is None or before.version == 0:
        if now.version != 1:
            yield f"version {now.version} of a key that was not live"
    elif (now.version, now.create_revision) != (before.version + 1, before.create_revision):
        yield (
            f"version {now.version} created at {now.create_revision} follows version"
            f" {before.version} created at {before.create_revision}"
        )


def _gap_findings(now: Version, before: Version) -> Iterator[str]:
    """Rows between ``before`` and ``now`` may have been compacted."""
    if before.version and now.create_revision == before.create_revision:
        if not 1 <= now.version - before.version <= now.revision - before.revision:
            yield f"version {now.version} follows version {before.version}"
    elif now.create_revision < before.revision or (
        now.create_revision == before.revision and before.version
    ):
        yield f"created at {now.create_revision}, before the row at {before.revision} ended it"
