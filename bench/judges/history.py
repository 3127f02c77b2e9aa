"""What the store must have been through: every change known, in the order of revisions.

A *change* is one key at one revision: a put or a delete. Changes are known from three sources:
objects written beforehand, writes that were acknowledged (a Txn of kube-apiserver writes one key,
at its answer's header revision), and events, whichever watch showed them. Where sources differ
about a change, what was sent counts, and a judge says so.

Two things may have happened without being known: a write whose outcome is unknown, and the expiry
of a leased key; both only where no watch was looking. A stretch of revisions of one key in which
neither is possible is *certain*, and only what is certain is judged:

    certain(key, after m, up to r)  =  one watch after the other covered the key over (m, r]
                                       or no write of unknown outcome was sent before r
                                          was reached, and at m the key had no lease

Keys are *ranks*, their places in byte order, so that a range of keys is a range of integers.
Changes are sorted by (revision, rank); ``before`` is the change of the same key before each, so a
key's past is a chain. From it follow ``create`` and ``version`` of every change:

    key  /a:   put 7      put 9      delete 12   put 15
    create     7          7          -           15
    version    1          2          -           1

At the first put after an uncertain stretch they are taken from the event that showed it, or are
not known (-1), and so on along the chain.
"""

import numpy as np

from bench.judges.finding import Column, Mask
from bench.plan import WRITES, Verb
from bench.records import (
    EVENTS,
    FINAL,
    ITEMS,
    PRELOADED,
    WATCHES,
    EventType,
    Frame,
    Outcome,
    Records,
)

RANK_BITS = 24
REVISION_BITS = 39
FOREVER = np.iinfo(np.int64).max


class History:
    """See the module's text. Every array but those of ranks is aligned with changes."""

    def __init__(self, records: Records, ops: Frame) -> None:
        events = records.frame(EVENTS)
        early = records.frame(PRELOADED)
        for table in (ITEMS, WATCHES, FINAL):
            records.frame(table)
        self.names: list[bytes] = []
        """Keys by rank."""
        self.ranks = self._order(list(ops.text("key")))
        """Rank of each code."""
        self.writes = _writes(ops["verb"], ops["digest"])
        """Of ops: those that write if they succeed."""
        acked = np.flatnonzero(self.writes & (ops["outcome"] == Outcome.OK))
        shown = self.place(events["mod"], self.ranks[events["key"]])
        unique, first, inverse = np.unique(shown, return_index=True, return_inverse=True)
        del shown
        acked_places = self.place(ops["revision"][acked], self.ranks[ops["key"][acked]])
        early_places = self.place(early["mod"], self.ranks[early["key"]])
        self.places = np.unique(np.concatenate((unique, acked_places, early_places)))
        """(revision, rank) of each change, as one integer."""
        count = len(self.places)
        self.mod: Column = self.places >> RANK_BITS
        self.rank: Column = self.places & ((1 << RANK_BITS) - 1)
        where = np.searchsorted(self.places, unique)
        self.change_of_event = where.astype(np.int32)[inverse]
        """Of events, in the order of their table."""
        self.shown = np.full(count, -1)
        """Row of the first event that showed it; -1: none did."""
        self.shown[where] = first
        self.change_of_op = np.full(len(ops), -1)
        """Of ops: what an acknowledged write did; -1 for all others."""
        self.change_of_op[acked] = np.searchsorted(self.places, acked_places)
        self.op = np.full(count, -1)
        """Row of the write that was acknowledged with it; -1: none was."""
        self.op[self.change_of_op[acked[::-1]]] = acked[::-1]
        was_there = np.searchsorted(self.places, early_places)
        self.preloaded = np.zeros(count, dtype=np.bool_)
        self.preloaded[was_there] = True
        self.type, self.lease, self.digest = (
            np.where(self.shown >= 0, events[name][self.shown] if len(events) else empty, empty)
            for name, empty in (("type", int(EventType.PUT)), ("lease", 0), ("digest", -1))
        )
        self.digest[was_there] = early["digest"]
        sent = self.op >= 0
        row = self.op[sent]
        self.type[sent] = ops["verb"][row] == Verb.DELETE
        self.lease[sent], self.digest[sent] = ops["lease"][row], ops["digest"][row]
        self._chain()
        self.doubted = np.flatnonzero(self.writes & (ops["outcome"] == Outcome.UNKNOWN))
        """Rows of writes of unknown outcome."""
        self.doubt_after = np.full(len(self.names), FOREVER)
        """Of ranks: the revision after which such a write may have taken effect."""
        self.leased = np.zeros(len(self.names), dtype=np.bool_)
        """Of ranks: did it ever have a lease?"""
        self.leased[self.rank[self.lease != 0]] = True

    def _order(self, texts: list[bytes]) -> Column:
        assert len(texts) < 1 << RANK_BITS
        codes = sorted(range(len(texts)), key=texts.__getitem__)
        self.names = [texts[code] for code in codes]
        ranks = np.empty(len(texts), dtype=np.int64)
        ranks[codes] = np.arange(len(texts))
        return ranks

    @staticmethod
    def place(mod: Column, rank: Column) -> Column:
        """(revision, rank) as one integer."""
        assert not len(mod) or int(mod.max()) < 1 << REVISION_BITS
        places: Column = (mod << RANK_BITS) | rank
        return places

    def _chain(self) -> None:
        """Who came before whom, key by key."""
        count = len(self.mod)
        keyed: Column = (self.rank << REVISION_BITS) | self.mod
        self.by_key = np.argsort(keyed)
        """Changes by (rank, revision)."""
        self.keyed = keyed[self.by_key]
        ranks = self.rank[self.by_key]
        follows = np.zeros(count, dtype=np.bool_)
        follows[1:] = ranks[1:] == ranks[:-1]
        self.before = np.full(count, -1)
        """The change of the same key before it; -1: there is none."""
        self.before[self.by_key[follows]] = self.by_key[np.flatnonzero(follows) - 1]
        self.after = np.full(count, -1)
        """Likewise."""
        behind = np.flatnonzero(self.before >= 0)
        self.after[self.before[behind]] = behind

    def doubt(self, rank: Column, revision: Column) -> None:
        """Writes of unknown outcome to these keys took effect after these revisions, if at all."""
        np.minimum.at(self.doubt_after, rank, revision)

    def follow(self, covered: "Coverage", create: Column, version: Column) -> None:
        """Derive what each change must look like; the arguments are of events, by row."""
        had = self.before >= 0
        previous = np.where(had, self.before, 0)
        count = len(self.mod)
        low = np.where(had, self.mod[previous], 0) if count else self.mod
        leased = (had & (self.lease[previous] != 0)) if count else had
        self.certain = self.is_certain(covered, self.rank, low, self.mod, leased)
        """Nothing of the key can have happened between the change before and this one."""
        self.lived = (had & (self.type[previous] == EventType.PUT)) if count else had
        """The key existed until then; exact only where it is certain."""
        put = self.type == EventType.PUT
        seen = self.shown >= 0
        row = np.where(seen, self.shown, 0)
        fresh = self.certain & ~self.lived
        empty = len(create) == 0
        seen_create = np.full(count, -1) if empty else np.where(seen, create[row], -1)
        seen_version = np.full(count, -1) if empty else np.where(seen, version[row], -1)
        base = put & (fresh | ~self.certain)
        order = self.by_key
        at = np.maximum.accumulate(np.where(base[order] | ~put[order], np.arange(count), 0))
        start = order[at]
        first_version = np.where(fresh[start], 1, seen_version[start])
        known = put[order] & (first_version > 0)
        self.create = np.full(count, -1)
        """-1: not known, or a delete."""
        self.version = np.full(count, -1)
        first_create = np.where(fresh[start], self.mod[start], seen_create[start])
        self.create[order] = np.where(known, first_create, -1)
        self.version[order] = np.where(known, first_version + np.arange(count) - at, -1)

    def is_certain(
        self, covered: "Coverage", rank: Column, low: Column, high: Column, leased: Mask
    ) -> Mask:
        """Is everything known that happened to the key over (low, high]?"""
        quiet: Mask = (high <= self.doubt_after[rank]) & ~leased
        if not quiet.all():
            open_ = np.flatnonzero(~quiet)
            quiet[open_] = covered.over(rank[open_], low[open_], high[open_])
        return quiet

    def last(self, rank: Column, revision: Column) -> Column:
        """The newest change of each key at a revision; -1: there is none."""
        if not len(self.keyed):
            return np.full(len(rank), -1)
        found = np.searchsorted(self.keyed, (rank << REVISION_BITS) | revision, side="right") - 1
        change = self.by_key[np.maximum(found, 0)]
        return np.where((found >= 0) & (self.rank[change] == rank), change, -1)

    def state(self, covered: "Coverage", rank: Column, revision: Column) -> tuple[Column, Mask]:
        """The change that each key stood at (-1: it was absent), and where that is certain."""
        change = self.last(rank, revision)
        if not len(self.mod):
            return change, revision <= self.doubt_after[rank]
        there = change >= 0
        low = np.where(there, self.mod[change], 0)
        leased = there & (self.lease[change] != 0)
        sure = self.is_certain(covered, rank, low, revision, leased)
        return np.where(there & (self.type[change] == EventType.PUT), change, -1), sure

    def mods(self, changes: Column) -> Column:
        """Their revisions; 0 for absence."""
        if not len(self.mod):
            return np.zeros(len(changes), dtype=np.int64)
        return np.where(changes >= 0, self.mod[changes], 0)

    def key(self, rank: int) -> str:
        """As text, for evidence."""
        return self.names[rank].decode(errors="backslashreplace")

    def tell(self, change: int) -> str:
        """A change as text, for evidence; -1 is absence."""
        if change < 0:
            return "nothing"
        kind = "put" if self.type[change] == EventType.PUT else "delete"
        return f"{kind} of {self.key(int(self.rank[change]))} at {self.mod[change]}"


def _writes(verb: Column, digest: Column) -> Mask:
    """Calls that write one key: the Txns; COMPACT's has a value, its Compact has none."""
    writes: Mask = np.isin(verb, WRITES) | ((verb == Verb.COMPACT) & (digest >= 0))
    return writes


class Coverage:
    """Which revisions of which keys some watch has certainly shown, filters aside.

    Of each distinct range of keys the stretches of its watches are merged; a key belongs to the
    range with the longest of them.
    """

    def __init__(self, ranks: int, stretches: dict[tuple[int, int], list[tuple[int, int]]]) -> None:
        merged = {span: _merge(parts) for span, parts in stretches.items()}
        spans = sorted(merged, key=lambda span: sum(b - a for a, b in merged[span]))
        self._group = np.full(ranks, -1)
        lows: list[int] = []
        highs: list[int] = []
        for group, (first, end) in enumerate(spans):
            self._group[first:end] = group
            for low, high in merged[first, end]:
                lows.append(group << REVISION_BITS | low)
                highs.append(group << REVISION_BITS | high)
        self._lows, self._highs = np.array(lows, np.int64), np.array(highs, np.int64)

    def over(self, rank: Column, low: Column, high: Column) -> Mask:
        """Does one stretch hold all of (low, high] of each key?"""
        group = self._group[rank]
        if not len(self._lows):
            return np.zeros(len(rank), dtype=np.bool_)
        base = np.maximum(group, 0) << REVISION_BITS
        found = np.searchsorted(self._lows, base | low, side="right") - 1
        at = np.maximum(found, 0)
        held: Mask = (group >= 0) & (found >= 0)
        held &= (self._lows[at] >= base) & (self._highs[at] >= (base | high))
        return held


def _merge(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Stretches (low, high] that touch, joined."""
    joined: list[tuple[int, int]] = []
    for low, high in sorted(parts):
        if joined and low <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(high, joined[-1][1]))
        else:
            joined.append((low, high))
    return joined
