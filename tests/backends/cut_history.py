"""What clients have asked and seen, held against what the databases hold.

Every value is unique and names its request, so that each stored row tells whose it is:

- a request that was **acknowledged** with revision R is there at R, whole, and nowhere else;
- one that was **refused**, or changed nothing, is nowhere;
- one whose end is **unknown** to its client is there once, whole, or nowhere;
- revisions have no gaps, versions and create revisions follow from the order, and each guard of a
  Txn held where its puts are;
- a watch has shown a beginning of exactly this, and all of it up to each revision that it said to
  have reached; a read shows the state at its revision, which is not older than any acknowledgement
  before it was asked.

A tombstone has no value: those that nobody was told of must be fewer than the deletes of that key
whose end is unknown.
"""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import groupby
from typing import NamedTuple

from kvstore.backend import Row
from kvstore.pb import kv_pb2

Change = tuple[bytes, bytes | None]
"""(key, value), or None for a deletion."""


class End(Enum):
    """What a client knows of its request."""

    ASKED = "not answered yet"
    DONE = "acknowledged"
    NOTHING = "refused, or nothing changed"
    UNKNOWN = "no definite answer"


@dataclass(slots=True)
class Asked:
    """A request that writes."""

    changes: Sequence[Change]
    guard: tuple[bytes, int] | None = None
    """(key, mod_revision) that it was conditional on; 0: no such key."""
    end: End = End.ASKED
    revision: int = 0
    """Where its rows are, as it was told or as they were found."""


class Read(NamedTuple):
    """A read of one key that was answered."""

    key: bytes
    revision: int
    pair: tuple[int, int, int, bytes] | None
    """(mod_revision, create_revision, version, value)."""


class Version(NamedTuple):
    """A key from a revision on; all but the first are 0 and empty when it is deleted."""

    revision: int
    create_revision: int
    version: int
    value: bytes


GONE = Version(0, 0, 0, b"")


@dataclass
class History:
    """Everything up to ``verified`` has been found exact."""

    verified: int
    """At first, the revision of the start."""
    asked: list[Asked] = field(default_factory=list)
    acknowledged: int = 0
    """The highest revision that anybody was told of."""
    reads: list[Read] = field(default_factory=list)
    events: list[kv_pb2.Event] = field(default_factory=list)
    """What the watch has shown."""
    reached: list[tuple[int, int]] = field(default_factory=list)
    """(revision, events by then): the watch said that it is complete up to there."""
    rows: list[Row] = field(default_factory=list)
    """What was found, in order."""
    _told: dict[int, Asked] = field(default_factory=dict)
    _unverified: list[Asked] = field(default_factory=list)
    """What was acknowledged and not looked for yet."""
    _whose: dict[bytes, Asked] = field(default_factory=dict)
    _versions: dict[bytes, list[Version]] = field(default_factory=lambda: defaultdict(list))
    _untold: Counter[bytes] = field(default_factory=Counter)
    """Tombstones by key that belong to no acknowledged delete."""
    _events_verified: int = 0

    def ask(self, keys: Iterable[bytes], guard: tuple[bytes, int] | None = None) -> Asked:
        """A request that puts ``keys``, with values of its own."""
        number = len(self.asked)
        changes = [(key, b"%d.%d" % (number, sub)) for sub, key in enumerate(keys)]
        made = Asked(changes, guard)
        self._whose |= {value: made for _, value in changes}
        self.asked.append(made)
        return made

    def ask_delete(self, key: bytes) -> Asked:
        """A request that deletes ``key``."""
        made = Asked([(key, None)])
        self.asked.append(made)
        return made

    def acknowledge(self, asked: Asked, revision: int) -> None:
        """Its client was told that it happened, there."""
        assert revision not in self._told, "a revision is one request's"
        assert asked.revision in (0, revision), f"told {revision}, and is at {asked.revision}"
        asked.end, asked.revision = End.DONE, revision
        self._told[revision] = asked
        self._unverified.append(asked)
        self.acknowledged = max(self.acknowledged, revision)

    def current(self, key: bytes) -> int:
        """The key's mod_revision as far as is verified, 0 when it is not there."""
        versions = self._versions.get(key)
        return versions[-1].revision if versions and versions[-1].version else 0

    # -- verifying ---------------------------------------------------------------------------------

    def verify(self, rows: Sequence[Row], visible: int, *, shown: int, reached: int) -> None:
        """``rows`` are all that the databases hold after ``verified``, up to ``visible``; the watch
        had shown as many events and told of progress as often when ``visible`` was taken.
        """
        assert [*range(self.verified + 1, visible + 1)] == sorted({row[0] for row in rows})
        for revision, group in groupby(rows, key=lambda row: row[0]):
            self._verify_revision(revision, list(group))
        self.rows += rows
        self.verified = visible
        self._verify_told()
        self._verify_events(shown, reached)
        self._verify_reads()

    def verify_end(self) -> None:
        """Every request has ended by now, and everything is verified and shown."""
        assert not [asked for asked in self.asked if asked.end is End.ASKED]
        unknown: Counter[bytes] = Counter()
        for asked in self.asked:
            if asked.end is End.UNKNOWN and asked.changes[0][1] is None:
                unknown[asked.changes[0][0]] += 1
        assert self._untold <= unknown, "a tombstone is somebody's"
        assert self._events_verified == len(self.events) == len(self.rows), "all is shown"
        assert not self.reads
        assert not self._unverified

    def _verify_told(self) -> None:
        """What was acknowledged is where it was said to be."""
        later = [asked for asked in self._unverified if asked.revision > self.verified]
        for asked in self._unverified:
            if asked.revision <= self.verified:
                key, value = asked.changes[-1]
                found = self._at(key, asked.revision)
                stored = found.value if found.version else None
                assert (asked.revision, value) == (found.revision, stored), f"lost: {asked}"
        self._unverified = later

    def _verify_revision(self, revision: int, rows: Sequence[Row]) -> None:
        told = self._told.get(revision)
        changes = [(row[2], row[6] if row[4] else None) for row in rows]
        assert [*range(len(rows))] == [row[1] for row in rows], f"rows of {revision}: {rows}"
        asked = told or self._whose.get(changes[0][1] or b"")
        if asked is None:
            (key,) = (key for key, value in changes if value is None)
            self._untold[key] += 1
        else:
            assert asked.end is not End.NOTHING, f"refused, and there: {revision} {changes}"
            assert [*asked.changes] == changes, f"{revision}: {changes}"
            assert asked.revision in (0, revision), f"twice: {asked.revision} and {revision}"
            asked.revision = revision
            if asked.guard is not None:
                key, guarded = asked.guard
                assert guarded == self.current(key), f"{revision}: its guard did not hold"
        for row in rows:
            self._verify_row(row)

    def _verify_row(self, row: Row) -> None:
        revision, _, key, create_revision, version, lease, value = row
        assert 0 == lease
        versions = self._versions[key]
        before = versions[-1] if versions else GONE
        if version:
            created = before.create_revision or revision
            expected = Version(revision, created, before.version + 1, value)
        else:
            assert before.version, f"{revision}: {key!r} was deleted before"
            expected = Version(revision, 0, 0, b"")
        assert expected == (revision, create_revision, version, value)
        versions.append(expected)

    def _verify_events(self, shown: int, reached: int) -> None:
        """The watch has shown the first rows, each as it is."""
        place = slice(self._events_verified, shown)
        assert shown <= len(self.rows), "nothing is shown before it is durable"
        for event, row in zip(self.events[place], self.rows[place], strict=True):
            pair = event.kv
            found = (pair.mod_revision, pair.key, pair.create_revision, pair.version, pair.value)
            assert (row[0], row[2], row[3], row[4], row[6]) == found
        self._events_verified = shown
        for revision, count in self.reached[:reached]:
            assert revision <= self.verified, "no progress is told before it is durable"
            assert count >= bisect_right(self.rows, revision, key=lambda row: row[0])
        del self.reached[:reached]

    def _verify_reads(self) -> None:
        later = [read for read in self.reads if read.revision > self.verified]
        for read in self.reads:
            if read.revision <= self.verified:
                found = self._at(read.key, read.revision)
                assert (tuple(found) if found.version else None) == read.pair, f"{read}"
        self.reads = later

    def _at(self, key: bytes, revision: int) -> Version:
        """The key as it was at ``revision``."""
        versions = self._versions.get(key, [])
        place = bisect_right(versions, revision, key=lambda version: version.revision)
        return versions[place - 1] if place else GONE
