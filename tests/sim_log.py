"""What has been committed on all shards, written down at the commit points, and what must hold
there.

A revision is committed when all its rows are on their shard or, if it changes several, when home
has its redo record; each participant then gets exactly what was recorded for it, before anything
later. Reads, events and answers are compared with this log.
"""

from bisect import bisect_right, insort
from collections.abc import Callable, Collection, Mapping, Sequence

from kvstore.backend import Batch, LeaseRow, Row, RowId


class Log:
    """``names``: the shards' names in order, home's first. ``shard_of``: the map of the routes."""

    def __init__(self, names: Sequence[str], shard_of: Callable[[bytes], int]) -> None:
        self.revisions: dict[int, list[Row]] = {}
        self.order: list[int] = []
        """All of ``revisions``, ascending."""
        self.versions: dict[bytes, list[Row]] = {}
        self.keys: list[bytes] = []
        """All of ``versions``, ascending."""
        self.values: dict[bytes, int] = {}
        """Every value, and its revision."""
        self.refused: set[bytes] = set()
        """Values that must never be written."""
        self.tip = 1
        """Nothing above this may be shown."""
        self.owed: list[dict[int, list[Row]]] = [{} for _ in names]
        """By shard: rows of redo records that it does not have yet, by revision."""
        self.redone = 0
        """Revisions over several shards."""
        self.ended: dict[int, float] = {}
        """Leases whose rows were deleted, and when."""
        self.absent: Callable[[], Collection[int]] = tuple
        """Shards whose keys the server does not know."""
        self.frontier: Callable[[int], int] = lambda _shard: self.tip
        """Up to where a shard has committed what the server has issued."""
        self.explained: Callable[[int, list[Row]], bool] = lambda _revision, _rows: True
        """Did a client ask for these deletions?"""
        self._numbers = {name: number for number, name in enumerate(names)}
        self._shard_of = shard_of

    # -- writing -----------------------------------------------------------------------------------

    def committed(
        self, shard: int, batch: Batch, tip_before: int, leases: Mapping[int, LeaseRow], now: float
    ) -> None:
        """A batch passed its commit point; ``leases`` is what home holds by now."""
        fresh = self._without_owed(shard, batch) + [row for _, row in batch.redo]
        for name, row in batch.redo:
            assert row[0] <= batch.tip, "the tip covers the redo record"
            self.owed[self._numbers[name]].setdefault(row[0], []).append(row)
        self.redone += len({row[0] for _, row in batch.redo})
        self._add(sorted(fresh, key=lambda row: row[:2]), tip_before)
        self.tip = max(self.tip, batch.tip)
        for revision in batch.redo_drops:
            owing = any(revision in owed for owed in self.owed)
            assert not owing, f"the redo record of {revision} is dropped before all have it"
        for key in {row[2] for row in fresh}:
            last = self.versions[key][-1]
            known = not last[5] or last[5] in leases
            assert known, f"{key!r} at {last[0]} has a lease that is not stored"
        for lease in batch.lease_deletes:
            if lease not in batch.lease_puts:
                self._end(lease, now)

    def _without_owed(self, shard: int, batch: Batch) -> list[Row]:
        """The rows of a batch, without those that were committed by a redo record."""
        owed = self.owed[shard]
        if not owed:
            return batch.rows
        due = [revision for revision in owed if revision <= batch.tip]
        for revision in due:
            rows = [row for row in batch.rows if row[0] == revision]
            recorded = owed.pop(revision)
            assert rows == recorded, f"shard {shard} gets what was recorded for it at {revision}"
        return [row for row in batch.rows if row[0] not in due]

    def _end(self, lease: int, now: float) -> None:
        left = [row for row in self.attached(lease, self.tip) if not self._away(row)]
        assert not left, f"lease {lease} is gone before its keys"
        self.ended[lease] = now

    def _add(self, rows: Sequence[Row], tip_before: int) -> None:
        for revision in dict.fromkeys(row[0] for row in rows):
            assert revision > tip_before, "revisions of a shard increase"
            assert revision not in self.revisions, f"revision {revision} was issued twice"
            complete = [row for row in rows if row[0] == revision]
            subs = [row[1] for row in complete]
            assert subs == list(range(len(subs))), f"all of revision {revision}, or nothing"
            self._check_lease_ends(revision, complete)
            for row in complete:
                self._change(row)
            self.revisions[revision] = complete
            insort(self.order, revision)

    def _change(self, row: Row) -> None:
        revision, _, key, create, version, lease, value = row
        if key not in self.versions:
            self.versions[key] = []
            insort(self.keys, key)
        chain = self.versions[key]
        before = chain[-1] if chain else None
        alive = before is not None and before[4] > 0
        if version == 0:
            assert alive, "only a live key is deleted"
            assert (create, lease, value) == (0, 0, b"")
        else:
            expected = (before[3], before[4] + 1) if before and alive else (revision, 1)
            assert (create, version) == expected, f"{key!r} at {revision} continues its chain"
            assert value not in self.values, f"{value!r} was written twice"
            assert value not in self.refused, f"{value!r} was refused"
            self.values[value] = revision
        assert before is None or before[:2] < row[:2], f"{key!r} at {revision} comes after {before}"
        chain.append(row)

    def _check_lease_ends(self, revision: int, rows: list[Row]) -> None:
        """The keys of a lease that ends die in one revision, whatever shards they are on."""
        if any(row[4] for row in rows):
            return
        died = [row for row in (self.at(row[2], revision - 1) for row in rows) if row]
        leases = {row[5] for row in died}
        if len(leases) != 1 or 0 in leases:
            return
        attached = self.attached(leases.pop(), revision - 1)
        left = [row for row in attached if row not in died and not self._away(row)]
        shards = {self._shard_of(row[2]) for row in rows}
        others = ((row, self._shard_of(row[2])) for row in left)
        left = [row for row, n in others if n in shards or self.frontier(n) >= revision - 1]
        assert not left or self.explained(revision, rows), f"{left[0]} outlives its lease"

    def _away(self, row: Row) -> bool:
        return self._shard_of(row[2]) in self.absent()

    # -- reading -----------------------------------------------------------------------------------

    def at(self, key: bytes, revision: int) -> Row | None:
        """The version of ``key`` that ``revision`` sees, None if it is not alive then."""
        for row in reversed(self.versions.get(key, ())):
            if row[0] <= revision:
                return row if row[4] else None
        return None

    def range(self, key: bytes, end: bytes, revision: int) -> list[Row]:
        """Live versions of a range at ``revision``, in key order; without ``end`` of one key."""
        if not end:
            row = self.at(key, revision)
            return [row] if row is not None else []
        rows = (self.at(k, revision) for k in self.keys if key <= k < end)
        return [row for row in rows if row is not None]

    def changes(self, key: bytes, end: bytes, after: int, up_to: int) -> list[Row]:
        """Rows of a range with ``after`` < revision <= ``up_to``, in order."""
        first, last = bisect_right(self.order, after), bisect_right(self.order, up_to)
        rows = (row for revision in self.order[first:last] for row in self.revisions[revision])
        return [row for row in rows if row[2] == key or key < row[2] < end]

    def attached(self, lease: int, revision: int) -> list[Row]:
        """What belongs to ``lease`` at ``revision``, in key order."""
        rows = (self.at(key, revision) for key in self.keys)
        return [row for row in rows if row is not None and row[5] == lease]

    def kept(self, compacted: int) -> set[RowId]:
        """Rows that a compaction leaves: later ones, its own, and what its revision sees."""
        found: set[RowId] = set()
        for key, chain in self.versions.items():
            seen = self.at(key, compacted)
            found.update((r[0], r[1]) for r in chain if r[0] >= compacted or r is seen)
        return found
