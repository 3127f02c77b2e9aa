"""Looking over a store without changing anything: what ``kvstore check`` reports.

The check holds the store's lock, so that no server uses it meanwhile, and opens it in the way that
changes no file (``sqlite_file.open_unchanged``), whether the server was stopped or killed. A store
of schema 1 is looked over as it is.

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

A store that is one of several has not all subs of a revision. Home knows them all while the
revision's redo rows are there: these and its own rows together must then be complete. No recorded
tip and no redo row is beyond what was issued. Leases are looked for on home only: a shard that was
missing may have kept keys of some that are gone, which are deleted when it is back.
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
    reserved: int = 0
    rows: int = 0
    live_keys: int = 0
    leases: int = 0
    compactable_rows: int = 0
    """Rows that compaction has superseded and not deleted yet."""
    shard_tips: dict[str, int] = field(default_factory=dict)
    """On home: each shard's tip as it was last recorded."""
    has_shard_map: bool = False
    redo_rows: int = 0
    """On home: rows of other shards that are not known to have reached them."""
    findings: list[str] = field(default_factory=list)
    """One line each; the first FINDINGS_MAX."""
    findings_total: int = 0

    @property
    def sound(self) -> bool:
        """Was nothing found?"""
        return self.findings_total == 0

    def facts(self) -> dict[str, object]:
        """What the store holds, by name."""
        return {
            "shard": self.shard,
            "cluster_id": f"{self.cluster_id:x}",
            "member_id": f"{self.member_id:x}",
            "schema_version": self.schema_version,
            "epoch": self.epoch,
            "revision": self.tip,
            "compact_revision": self.compact_revision,
            "reserved": self.reserved,
            "keys": self.live_keys,
            "rows": self.rows,
            "compactable_rows": self.compactable_rows,
            "leases": self.leases,
            "shards_recorded": len(self.shard_tips),
            "redo_rows": self.redo_rows,
            "findings": self.findings_total,
        }

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


def check(path: Path, *, home: Report | None = None) -> Report:
    """Look over the store at ``path``; of a shard that is not home, by what ``home`` knows of it.

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
            connection = sqlite_file.open_unchanged(path)
            try:
                return _check(path, connection, home)
            finally:
                connection.close()
        except apsw.Error as error:
            raise BackendError(f"cannot read {path}: {sqlite_file.describe(error)}") from error
    finally:
        lock.release(undo=True)


def _check(path: Path, connection: apsw.Connection, home: Report | None) -> Report:
    statements = Statements(sqlite_dialect())
    report = Report(path)
    report.schema_version = sqlite_file.schema_version(path, connection, statements)
    try:
        _check_pages(connection, report)
        _check_schema(connection, report)
        _check_fence(connection, statements, report)
        leases = _check_leases(connection, statements, report)
        on_the_way = _check_home(connection, statements, report)
        if home is None:
            alone = not report.reserved and not report.shard_tips
            chains = _Chains(report, leases, on_the_way, alone=alone)
        else:
            _check_by_home(report, home)
            chains = _Chains(report, None, {}, alone=False)
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
    declared = {table.name: table for table in tables(report.schema_version)}
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
    s, version = statements, report.schema_version
    row = connection.execute(s.select_fence if version > 1 else s.select_fence_1).fetchone()
    if row is None:
        report.find("fence: there is no fence row")
        return
    cluster_id, member_id, *others = row
    report.shard, report.epoch, report.tip, report.compact_revision, *reserved = others
    report.reserved = reserved[0] if reserved else 0
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
    if report.reserved < 0:
        report.find(f"fence: reserved {report.reserved} is negative")


def _check_leases(connection: apsw.Connection, statements: Statements, report: Report) -> set[int]:
    leases = set()
    for id_, granted, remaining in connection.execute(statements.select_leases):
        leases.add(id_)
        if granted < 1 or remaining < 0:
            report.find(f"lease {id_:x}: {remaining} s left of {granted} s")
    report.leases = len(leases)
    return leases


def _check_home(
    connection: apsw.Connection, statements: Statements, report: Report
) -> dict[int, set[int]]:
    """What home keeps for all shards; returns the subs of each revision that has redo rows."""
    on_the_way: dict[int, set[int]] = {}
    if report.schema_version == 1:
        return on_the_way
    maps = len(connection.execute(statements.select_shard_map).fetchall())
    if maps > 1:
        report.find(f"shard map: there are {maps}")
    issued_max = max(report.tip, report.reserved)
    for name, tip, _ in connection.execute(statements.select_shards):
        report.shard_tips[name] = tip
        if not name or not 1 <= tip <= issued_max:
            report.find(f"record of shard {name!r}: tip {tip}, at most {issued_max} was issued")
    for shard, *row in connection.execute(statements.select_redo):
        revision, sub, key, create_revision, version, lease, value = row
        report.redo_rows += 1
        on_the_way.setdefault(revision, set()).add(sub)
        shape = (create_revision, version, lease, len(value))
        findings = [*_row_findings(revision, key, *shape)]
        if revision > report.tip:
            findings.append(f"it is beyond the tip, {report.tip}")
        if shard in ("", report.shard):
            findings.append(f"it is on the way to {shard!r}")
        for finding in findings:
            report.find(f"redo revision {revision} sub {sub}, key {key!r}: {finding}")
    report.has_shard_map = maps > 0
    return on_the_way


def _check_by_home(report: Report, home: Report) -> None:
    """Is the store of a shard what home takes it for? Home's compact revision counts for all."""
    parts = (report.leases, report.has_shard_map, report.reserved, report.shard_tips)
    if any(parts) or report.redo_rows:
        report.find("leases, a map, a reservation, records or redo rows: only home has them")
    if report.cluster_id != home.cluster_id:
        report.find(f"cluster {report.cluster_id:x} is not home's, {home.cluster_id:x}")
    recorded = home.shard_tips.get(report.shard, 0)
    if report.tip < recorded:
        report.find(f"tip {report.tip} is below {recorded}, where home has seen it")
    report.compact_revision = max(report.compact_revision, home.compact_revision)


class _Chains:
    """Takes all rows in order and judges each by the row of its key before it."""

    def __init__(
        self,
        report: Report,
        leases: set[int] | None,
        on_the_way: dict[int, set[int]],
        *,
        alone: bool,
    ) -> None:
        """``leases`` is None where they are not known; ``on_the_way`` has the subs of revisions
        with redo rows and gets those of their other rows; ``alone``: there is no other shard.
        """
        self._report = report
        self._leases = leases
        self._on_the_way = on_the_way
        self._alone = alone
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
        findings = [*_row_findings(revision, key, create_revision, version, lease, value_bytes)]
        findings += self._place_findings(revision, sub)
        if before is not None and self._is_superseded(before, revision):
            report.compactable_rows += 1
        if version == 0:
            findings += self._tombstone_findings(now, before)
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

    def _place_findings(self, revision: int, sub: int) -> Iterator[str]:
        whole = self._alone and revision > self._report.compact_revision
        if whole and sub != self._sub_next:
            yield f"sub {self._sub_next} is missing"
        others = self._on_the_way.get(revision)
        if others is not None:
            if sub in others:
                yield "it is on the way to another shard, too"
            others.add(sub)

    def _tombstone_findings(self, now: Version, before: Version | None) -> Iterator[str]:
        if before is not None and before.version == 0 and before.revision == now.revision:
            yield "the key is deleted twice in one revision"
        gone = before is None or before.version == 0
        if gone and now.revision > self._report.compact_revision:
            yield "a tombstone of a key that is not live"

    def _put_findings(self, now: Version, before: Version | None) -> Iterator[str]:
        if before is not None and before.put_at == now.revision:
            yield "the key is put twice in one revision"
        if now.revision > self._report.compact_revision:
            yield from _successor_findings(now, before)
        elif before is not None:
            yield from _gap_findings(now, before)

    def end(self) -> None:
        """All rows have been taken."""
        for revision, subs in self._on_the_way.items():
            missing = set(range(max(subs))) - subs
            if missing and revision > self._report.compact_revision:
                self._report.find(f"redo revision {revision}: sub {min(missing)} is missing")
        for key, last in self._last.items():
            if last.version == 0:
                if last.revision <= self._report.compact_revision:
                    self._report.compactable_rows += 1
                continue
            self._report.live_keys += 1
            if last.lease and self._leases is not None and last.lease not in self._leases:
                self._report.find(f"key {key!r}: its lease {last.lease:x} does not exist")


def _row_findings(
    revision: int, key: bytes, create_revision: int, version: int, lease: int, value_bytes: int
) -> Iterator[str]:
    """What a row shows by itself."""
    if revision < 2:
        yield "revisions start at 2"
    if not key:
        yield "a key is not empty"
    if version == 0:
        if create_revision or lease or value_bytes:
            yield "a tombstone is not all zero"
    elif version < 0 or not 2 <= create_revision <= revision:
        yield f"version {version}, created at {create_revision}, cannot be"
    elif (version == 1) != (create_revision == revision):
        yield f"version {version} was created at {create_revision}"
    elif version > revision - create_revision + 1:
        yield f"version {version} is more than the revisions since {create_revision}"


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
