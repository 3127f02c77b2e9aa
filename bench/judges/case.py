"""What all judges of one run share: the history, and what each watch was owed and got.

A watch is *owed* every change of its range and kind from its first revision on. The first is the
one asked for; of a watch from now, the one after the header of its ``created`` message. The last
is the newest of the history while the watch is open, and the last revision that it showed (by an
event or by progress) once it has ended, for whatever reason: what was under way then is lost
lawfully, and asked for again by the watch that resumes.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bench.judges.finding import Column, Mask
from bench.judges.history import FOREVER, Coverage, History
from bench.plan import Trouble, Verb
from bench.records import (
    EVENTS,
    INCIDENTS,
    MESSAGES,
    OPS,
    WATCHES,
    EventType,
    Frame,
    MessageKind,
    Outcome,
    Records,
)


@dataclass(frozen=True, slots=True)
class Owed:
    """One watch's due: changes in order, and the row of the event that brought each (-1: none).

    Rows are those of ``Case.events`` in arrival order, ``rows`` the watch's own.
    """

    watch: int
    start: int
    last: int
    """The last revision that an event showed; 0: there was no event."""
    reached: int
    """The last revision that an event or progress showed."""
    rows: slice
    changes: Column
    got: Column


class Case:
    """The records of one run, prepared for judges."""

    def __init__(self, records: Records) -> None:
        self.records = records
        self.facts = records.facts
        ops = records.frame(OPS)
        unsent = (ops["sent"] < 0) & (ops["actor"] >= 0)
        self.ops: Frame = ops.where(~unsent) if unsent.any() else ops
        """Calls that were sent; what the load's end cut off did nothing to the store."""
        self.watches: Frame = records.frame(WATCHES)
        """In the order of their numbers."""
        self.watches.reorder(np.argsort(self.watches["watch"]))
        self.events: Frame = records.frame(EVENTS)
        """Of each watch together, in the order in which they came."""
        self.watch: Column = _index(self.watches["watch"], self.events["watch"]).astype(np.int32)
        """Of each event: index of its watch."""
        if (np.diff(self.watch) < 0).any() or (self.watch < 0).any():
            order = np.argsort(self.watch, kind="stable")
            order = order[self.watch[order] >= 0]
            self.events.reorder(order)
            self.watch = self.watch[order]
        self.history = History(records, self.ops)
        self.change: Column = self.history.change_of_event
        """Of each event: what change it shows."""
        self.bounds = np.searchsorted(self.watch, np.arange(len(self.watches) + 1))
        """Rows of watch ``w`` are ``bounds[w]`` to ``bounds[w + 1]``."""
        self._messages()
        self._spans()
        self._starts()
        history, ops, doubted = self.history, self.ops, self.history.doubted
        when, highest, _ = self.told
        # What is sent takes effect after what was told before, and after what it compares with.
        floor = latest(when, highest, ops["sent"][doubted])
        floor = np.maximum(floor, ops["expected"][doubted])
        history.doubt(history.ranks[ops["key"][doubted]], floor)
        history.follow(self._coverage(), self.events["create"], self.events["version"])

    def _messages(self) -> None:
        self.messages: Frame = self.records.frame(MESSAGES)
        """Of watches that were recorded, by watch and number."""
        of = _index(self.watches["watch"], self.messages["watch"])
        order = np.lexsort((self.messages["message"], of))
        order = order[of[order] >= 0]
        self.messages.reorder(order)
        self.message_watch: Column = of[order].astype(np.int32)
        self.message_bounds = np.searchsorted(self.message_watch, np.arange(len(self.watches) + 1))
        keys = (self.message_watch.astype(np.int64) << 32) | self.messages["message"]
        wanted = (self.watch.astype(np.int64) << 32) | self.events["message"]
        found = np.searchsorted(keys, wanted).astype(np.int32)
        self.event_message: Column = np.minimum(found, max(0, len(keys) - 1))
        """Of each event: row of its message."""

    @cached_property
    def received(self) -> Column:
        """Of each event: when it came."""
        times = self.messages["received"]
        return times[self.event_message] if len(times) else np.empty(0, np.int64)

    @cached_property
    def told(self) -> tuple[Column, Column, Column]:
        """(when, the highest revision told by then, row) of all answers and messages of watches.

        Rows are those of OPS, and behind them those of ``messages``.
        """
        when = np.concatenate((self.ops["done"], self.messages["received"]))
        what = np.concatenate((self.ops["revision"], self.messages["revision"]))
        order = np.argsort(when, kind="stable").astype(np.int32)
        return when[order], np.maximum.accumulate(what[order]), order

    @cached_property
    def head(self) -> int:
        """The highest revision that had been told by the end of the load; 0: there was none."""
        when, highest, _ = self.told
        return int(latest(when, highest, np.array([self.facts["load_end_us"]]))[0])

    @cached_property
    def known_us(self) -> Column:
        """Of each change: the first time at which somebody knew of it."""
        known = np.full(len(self.history.mod), FOREVER // 2)
        np.minimum.at(known, self.change, self.received)
        known[self.history.preloaded] = np.iinfo(np.int64).min
        acked = np.flatnonzero(self.history.change_of_op >= 0)
        np.minimum.at(known, self.history.change_of_op[acked], self.ops["done"][acked])
        return known

    def _spans(self) -> None:
        """Ranks of each watch's range: [first, end)."""
        names, ranks = self.history.names, self.history.ranks
        ends = self.watches.text("range_end")
        self.first_rank: Column = ranks[self.watches["key"]]
        self.end_rank = np.array(
            [
                _rank_of_end(names, int(first), ends[code])
                for first, code in zip(self.first_rank, self.watches["range_end"], strict=True)
            ],
            dtype=np.int64,
        )

    def _starts(self) -> None:
        """Of each watch: the revision from which it is owed everything; -1: not known."""
        messages = self.messages
        created = messages["kind"] == MessageKind.CREATED
        now = np.full(len(self.watches), -1)
        now[self.message_watch[created]] = messages["revision"][created] + 1
        now[now == 1] = -1
        self.start: Column = np.where(self.watches["start"] > 0, self.watches["start"], now)
        self.canceled = np.zeros(len(self.watches), dtype=np.bool_)
        """Of watches: ended by the server with a message."""
        canceled = messages["kind"] == MessageKind.CANCELED
        self.canceled[self.message_watch[canceled]] = True
        self.last = np.zeros(len(self.watches), dtype=np.int64)
        np.maximum.at(self.last, self.watch, self.events["mod"])
        progress = messages["kind"] == MessageKind.PROGRESS
        self.reached = self.last.copy()
        np.maximum.at(self.reached, self.message_watch[progress], messages["revision"][progress])
        self.open: Mask = (self.watches["code"] == -1) & ~self.canceled

    def _coverage(self) -> Coverage:
        stretches: dict[tuple[int, int], list[tuple[int, int]]] = {}
        whole = (self.watches["no_put"] == 0) & (self.watches["no_delete"] == 0)
        for w in np.flatnonzero(whole & (self.start > 0) & (self.reached >= self.start)):
            span = int(self.first_rank[w]), int(self.end_rank[w])
            stretches.setdefault(span, []).append((int(self.start[w]) - 1, int(self.reached[w])))
        self.coverage = Coverage(len(self.history.names), stretches)
        return self.coverage

    @cached_property
    def owed(self) -> list[Owed]:
        """Of each watch whose start is known."""
        history = self.history
        mods = history.mod
        ranges: dict[tuple[int, int, int, int], Column] = {}
        owed = []
        by_rank = history.rank[history.by_key]
        for w in np.flatnonzero(self.start > 0):
            no_put, no_delete = int(self.watches["no_put"][w]), int(self.watches["no_delete"][w])
            span = int(self.first_rank[w]), int(self.end_rank[w]), no_put, no_delete
            if span not in ranges:
                low, high = np.searchsorted(by_rank, span[:2])
                mine = np.sort(history.by_key[low:high]).astype(np.int32)
                kinds = history.type[mine]
                ranges[span] = mine[~(_filtered(kinds, no_put, no_delete))]
            mine = ranges[span]
            mine_mods = mods[mine]
            start, reached = int(self.start[w]), int(self.reached[w])
            end = FOREVER if self.open[w] else reached
            low, high = np.searchsorted(mine_mods, start), np.searchsorted(mine_mods, end, "right")
            rows = slice(int(self.bounds[w]), int(self.bounds[w + 1]))
            changes = mine[low:high]
            got = _match(changes, self.change[rows], rows.start)
            owed.append(Owed(int(w), start, int(self.last[w]), reached, rows, changes, got))
        return owed

    @cached_property
    def compactions(self) -> Frame:
        """Calls of Compact, whatever came of them."""
        ops = self.ops
        return ops.where((ops["verb"] == Verb.COMPACT) & (ops["digest"] < 0) & (ops["at"] > 0))

    @cached_property
    def compactable(self) -> tuple[Column, Column]:
        """(when, revision): by then, somebody had asked for compaction so far."""
        calls = self.compactions
        calls = calls.where(calls["outcome"] != Outcome.REFUSED)
        order = np.argsort(calls["sent"], kind="stable")
        return calls["sent"][order], np.maximum.accumulate(calls["at"][order])

    @cached_property
    def invented(self) -> Mask:
        """Of messages: do they tell of a compaction that nobody had asked for?

        A server that was there already, or is told to compact, may do so on its own account.
        """
        told = self.messages["compact_revision"]
        command = self.facts["command"]
        if not command or "compact" in command:
            return np.zeros(len(told), dtype=np.bool_)
        invented: Mask = told > latest(*self.compactable, self.messages["received"])
        return invented

    @cached_property
    def compacted(self) -> tuple[Column, Column]:
        """(when, revision): by then, the store had certainly been compacted so far."""
        calls, messages = self.compactions, self.messages
        calls = calls.where(calls["outcome"] == Outcome.OK)
        told = (messages["compact_revision"] > 0) & ~self.invented
        when = np.concatenate((calls["done"], messages["received"][told]))
        revision = np.concatenate((calls["at"], messages["compact_revision"][told]))
        order = np.argsort(when, kind="stable")
        return when[order], np.maximum.accumulate(revision[order])

    def compacted_before(self, times: Column) -> Column:
        """The revision to which the store had certainly been compacted before each time."""
        return latest(*self.compacted, times)

    def unwatched(self, otherwise: str) -> str:
        """What a judge of watches lacked, if there was no watch or none showed an event."""
        if not len(self.watches):
            return "nothing was watched"
        return otherwise if len(self.events) else "no watch showed an event"

    @cached_property
    def incidents(self) -> list[tuple[int, int, Trouble]]:
        """(from, until, what) of troubles that were made on purpose."""
        table = self.records.frame(INCIDENTS)
        rows = zip(table["at"], table["until"], table["trouble"], strict=True)
        return sorted((int(a), int(b), Trouble(int(c))) for a, b, c in rows)

    def name(self, watch: int) -> str:
        """A watch as text, for evidence."""
        name = self.watches.text("name")[self.watches["name"][watch]].decode()
        return f"watch {self.watches['watch'][watch]} ({name})"

    def shown(self, row: int) -> str:
        """An event as text, for evidence."""
        change = self.history.tell(int(self.change[row]))
        return f"{self.name(int(self.watch[row]))} got the {change}"

    def call(self, row: int) -> str:
        """A call as text, for evidence."""
        ops = self.ops
        key = ops.text("key")[ops["key"][row]].decode(errors="backslashreplace")
        verb = Verb(int(ops["verb"][row])).name
        return f"{verb} {key} (op {ops['op'][row]}, actor {ops['actor'][row]})"


def latest(when: Column, what: Column, times: Column) -> Column:
    """Of values sorted by time, the last one strictly before each time; 0: there is none."""
    if not len(when):
        return np.zeros(len(times), dtype=np.int64)
    found = np.searchsorted(when, times, side="left") - 1
    return np.where(found >= 0, what[np.maximum(found, 0)], 0)


def _index(numbers: Column, wanted: Column) -> Column:
    """Places of numbers in a sorted list of them; -1: not there."""
    if not len(numbers):
        return np.full(len(wanted), -1)
    found = np.minimum(np.searchsorted(numbers, wanted), len(numbers) - 1)
    return np.where(numbers[found] == wanted, found, -1)


def _rank_of_end(names: list[bytes], first: int, range_end: bytes) -> int:
    """First rank that is not in the range; without an end the range is one key."""
    if not range_end:
        return first + 1
    if range_end == b"\0":
        return len(names)
    low, high = first, len(names)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if names[middle] < range_end else (low, middle)
    return low


def _filtered(kinds: Column, no_put: int, no_delete: int) -> Mask:
    filtered: Mask = ((kinds == EventType.PUT) & (no_put != 0)) | (
        (kinds == EventType.DELETE) & (no_delete != 0)
    )
    return filtered


def _match(owed: Column, shown: Column, first: int) -> Column:
    """For each change that is owed the row that showed it first; -1: none did."""
    count = len(shown)
    if count <= len(owed) and np.array_equal(owed[:count], shown):
        got = np.full(len(owed), -1, dtype=np.int32)
        got[:count] = np.arange(first, first + count)
        return got
    order = np.argsort(shown, kind="stable")
    ordered = shown[order]
    found = np.searchsorted(ordered, owed)
    at = np.minimum(found, max(0, count - 1))
    if not count:
        return np.full(len(owed), -1, dtype=np.int32)
    return np.where(ordered[at] == owed, order[at] + first, -1).astype(np.int32)
