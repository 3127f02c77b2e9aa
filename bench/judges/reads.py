"""What a read shows: one revision of the store, whole."""

import numpy as np

from bench.judges.case import Case
from bench.judges.finding import Column, Findings, Mask
from bench.judges.history import FOREVER
from bench.plan import Verb
from bench.records import FINAL, ITEMS, EventType, Frame, Outcome
from bench.values import digest
from bench.verdicts import Verdict
from bench.wording import counted


def snapshot(case: Case) -> Verdict:
    """A read is the store at one revision: the one asked for, or that of its answer.

    Objects are those of that revision with everything that belongs to them; a page leaves none out,
    its count is that of the keys from its start on, whatever its limit, and it says that more
    follows exactly if some of them are behind its last; an else-branch reads what stood at the
    Txn's revision; a compacted revision is refused.
    """
    findings = Findings("Snapshot", "nothing was read")
    ops = case.ops
    reads = np.isin(ops["verb"], (Verb.GET, Verb.READ_AT, Verb.LIST, Verb.COUNT))
    ok = reads & (ops["outcome"] == Outcome.OK)
    revision = np.where(ops["at"] > 0, ops["at"], ops["revision"])
    _items(case, findings, ok, revision)
    single = ok & np.isin(ops["verb"], (Verb.GET, Verb.READ_AT))
    lost = case.history.writes & (ops["outcome"] == Outcome.CONFLICT) & (ops["found"] >= 0)
    _found(case, findings, np.flatnonzero((single | lost) & (revision > 0)), revision)
    _lists(case, findings, ok & np.isin(ops["verb"], (Verb.LIST, Verb.COUNT)), revision)
    old = case.compacted_before(ops["sent"])
    late = ok & (ops["at"] > 0) & (ops["at"] < old)
    findings.look(
        int((ok & (ops["at"] > 0)).sum()),
        late,
        lambda row: (
            f"{case.call(row)} was answered at revision {ops['at'][row]}, "
            f"though the store had been compacted to {old[row]} before"
        ),
    )
    return findings.verdict()


def _rows(numbers: Column, wanted: Column) -> Column:
    """Rows of calls by their numbers."""
    order = np.argsort(numbers, kind="stable")
    return order[np.searchsorted(numbers, wanted, sorter=order)]


def _items(case: Case, findings: Findings, ok: Mask, revision: Column) -> None:
    """Every object that a read showed is the newest of its key at that revision."""
    items = case.records.frame(ITEMS)
    if not len(items):
        return
    history = case.history
    row = _rows(case.ops["op"], items["op"])
    chosen = np.flatnonzero(ok[row])
    row, items = row[chosen], items.where(chosen)
    rank = history.ranks[items["key"]]
    change, sure = history.state(case.coverage, rank, revision[row])
    due = history.mods(change)
    wrong = (items["mod"] != due) & (sure | (items["mod"] < due))
    for column, model in (
        ("create", history.create),
        ("version", history.version),
        ("lease", history.lease),
        ("digest", history.digest),
    ):
        if len(model):
            differs = (items[column] != model[change]) & (model[change] >= 0)
            wrong |= differs & (change >= 0) & (items["mod"] == due)

    def tell(index: int) -> str:
        names = ("mod", "create", "version", "lease")
        shown = ", ".join(f"{name} {items[name][index]}" for name in names)
        there = _thing(case, int(change[index]))
        return (
            f"{case.call(int(row[index]))} at revision {revision[row[index]]} showed "
            f"{history.key(int(rank[index]))} with {shown}; it was {there}"
        )

    findings.look(len(items), wrong, tell)


def _thing(case: Case, change: int) -> str:
    """An object as a change left it."""
    if change < 0:
        return "absent"
    history = case.history
    parts = (("create", history.create), ("version", history.version), ("lease", history.lease))
    text = ", ".join(f"{name} {column[change]}" for name, column in parts)
    return f"{history.tell(change)} ({text})"


def _found(case: Case, findings: Findings, rows: Column, revision: Column) -> None:
    """One key: its revision, or that it is absent."""
    history, ops = case.history, case.ops
    rank = history.ranks[ops["key"][rows]]
    change, sure = history.state(case.coverage, rank, revision[rows])
    due = history.mods(change)
    found = ops["found"][rows]
    wrong = (found != due) & (sure | ((found > 0) & (found < due)))

    def tell(index: int) -> str:
        what = f"revision {found[index]}" if found[index] else "nothing"
        there = _thing(case, int(change[index]))
        return (
            f"{case.call(int(rows[index]))} at revision {revision[rows[index]]} found {what}; "
            f"it was {there}"
        )

    findings.look(len(rows), wrong, tell)


class _Replay:
    """Which keys exist, as the history goes on; asked at revisions that rise."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._history = history = case.history
        self._change = np.full(len(history.names), -1)
        self._applied = 0
        self._shaky = (history.doubt_after < FOREVER) | history.leased
        self._shaky_before = np.concatenate(([0], np.cumsum(self._shaky)))

    def go(self, revision: int) -> None:
        """Apply every change up to a revision."""
        history = self._history
        end = int(np.searchsorted(history.mod, revision, side="right"))
        changes = np.arange(self._applied, end)
        put = history.type[self._applied : end] == EventType.PUT
        # Of a key that comes more than once, the last assignment stays.
        self._change[history.rank[self._applied : end]] = np.where(put, changes, -1)
        self._applied = end

    def live(self, first: int, end: int, revision: int) -> tuple[Column, Column]:
        """Ranks in [first, end) that exist, and those of which that is not certain."""
        live = first + np.flatnonzero(self._change[first:end] >= 0)
        if self._shaky_before[end] == self._shaky_before[first]:
            return live, live[:0]
        shaky = first + np.flatnonzero(self._shaky[first:end])
        _, sure = self._history.state(
            self._case.coverage, shaky, np.full(len(shaky), revision, dtype=np.int64)
        )
        return live, shaky[~sure]


def _lists(case: Case, findings: Findings, chosen: Mask, revision: Column) -> None:
    """Pages and counts against the history, replayed alongside."""
    ops, history = case.ops, case.history
    rows = np.flatnonzero(chosen & (revision > 0))
    if not len(rows):
        return
    shown = _Shown(case)
    starts = _page_starts(case, rows, revision, shown)
    ends = _ends(case, rows)
    rows = rows[np.argsort(revision[rows], kind="stable")]
    replay = _Replay(case)
    wrong: list[int] = []
    texts: list[str] = []
    for row in rows.tolist():
        at = int(revision[row])
        first = starts.get(row, int(history.ranks[ops["key"][row]]))
        end = ends[int(ops["key"][row])]
        replay.go(at)
        live, doubtful = replay.live(first, end, at)
        listed = shown.of(row) if ops["verb"][row] == Verb.LIST else None
        text = _page(case, live, doubtful, listed, int(ops["count"][row]))
        if listed is not None and not text:
            text = _more(case, live, doubtful, listed, int(ops["found"][row]))
        if text:
            wrong.append(len(texts))
            texts.append(f"{case.call(row)} at revision {at}{text}")
    findings.look(len(rows), np.array(wrong, dtype=np.int64), lambda index: texts[index])


def _page(case: Case, live: Column, doubtful: Column, listed: Column | None, count: int) -> str:
    """What is wrong with one page or count; empty: nothing."""
    history = case.history
    sure = np.setdiff1d(live, doubtful, assume_unique=True) if len(doubtful) else live
    if listed is not None:
        if (np.diff(listed) <= 0).any():
            place = int(np.flatnonzero(np.diff(listed) <= 0)[0])
            pair = history.key(int(listed[place])), history.key(int(listed[place + 1]))
            return f" showed {pair[1]} after {pair[0]}"
        # A page that shows nothing is the last, so it owes all that there is.
        end = np.searchsorted(sure, listed[-1], side="right") if len(listed) else len(sure)
        span = sure[:end]
        if len(span) != len(listed) or not np.array_equal(span, listed):
            missing = np.setdiff1d(span, listed)
            if len(missing):
                return f" left out {history.key(int(missing[0]))}"
    if not len(sure) <= count <= len(sure) + len(doubtful):
        most = f" to {len(sure) + len(doubtful)}" if len(doubtful) else ""
        keys = counted(count, "key")
        return f" counted {keys} from the page's start on; there were {len(sure)}{most}"
    return ""


def _more(case: Case, live: Column, doubtful: Column, listed: Column, more: int) -> str:
    """What is wrong with a page's word that more follows (1), or not (0); -1: it is not known."""
    last = int(listed[-1]) if len(listed) else -1
    behind = live[live > last]
    sure = np.setdiff1d(behind, doubtful, assume_unique=True)
    if more == 0 and len(sure):
        return f" said that nothing more follows; {case.history.key(int(sure[0]))} did"
    if more == 1 and not len(behind) and not (doubtful > last).any():
        return " said that more follows; nothing did"
    return ""


class _Shown:
    """Ranks that each list showed."""

    def __init__(self, case: Case) -> None:
        items: Frame = case.records.frame(ITEMS)
        row = _rows(case.ops["op"], items["op"]) if len(items) else items["op"]
        order = np.argsort(row, kind="stable")
        self._row = row[order]
        self._rank = case.history.ranks[items["key"][order]] if len(items) else row

    def of(self, row: int) -> Column:
        """In the order in which they came."""
        first, end = np.searchsorted(self._row, (row, row + 1))
        return self._rank[first:end]


def _page_starts(case: Case, rows: Column, revision: Column, shown: _Shown) -> dict[int, int]:
    """Ranks at which pages after the first begin: behind the last key of the page before."""
    ops = case.ops
    rows = rows[ops["verb"][rows] == Verb.LIST]
    of = [ops[name][rows] for name in ("step", "actor", "key", "connection")]
    order = rows[np.lexsort((ops["sent"][rows], revision[rows], *of))]
    starts: dict[int, int] = {}
    follows = np.flatnonzero(ops["attempt"][order] > 0).tolist()
    for place in follows:
        row, before = int(order[place]), int(order[place - 1])
        alike = place and all(
            ops[name][row] == ops[name][before] for name in ("step", "actor", "key", "connection")
        )
        next_page = ops["attempt"][row] == ops["attempt"][before] + 1
        last = shown.of(before if alike and next_page else row)
        if alike and next_page and len(last):
            starts[row] = int(last[-1]) + 1
        elif len(last):
            starts[row] = int(last[0])
    return starts


def _ends(case: Case, rows: Column) -> dict[int, int]:
    """First rank behind all keys that begin with a prefix, by the prefix's code."""
    names, ranks = case.history.names, case.history.ranks
    text = case.ops.text("key")
    ends: dict[int, int] = {}
    for code in np.unique(case.ops["key"][rows]).tolist():
        prefix = text[code]
        low, high = int(ranks[code]), len(names)
        while low < high:
            middle = (low + high) // 2
            inside = names[middle].startswith(prefix)
            low, high = (middle + 1, high) if inside else (low, middle)
        ends[code] = low
    return ends


def _at(column: Column, row: Column, there: Mask) -> Column:
    """Values of rows, and 0 where there is none."""
    values = np.zeros(len(row), dtype=np.int64)
    values[there] = column[row[there]]
    return values


def final_state(case: Case) -> Verdict:
    """The list of everything at the end is what the history comes to: no key more, none less.

    It may show nothing, but is not older than what had been told by the end of the load.
    """
    findings = Findings("Final state", "the final list was not read")
    history, final = case.history, case.records.frame(FINAL)
    at = case.facts["final_revision"]
    if at < 0:
        return findings.verdict()
    findings.look(
        1,
        np.array([at < case.head]),
        lambda _: f"the final list is at {at}; revision {case.head} had been told before",
    )
    ranks = np.unique(np.concatenate((history.rank, history.ranks[final["key"]])))
    change, sure = history.state(case.coverage, ranks, np.full(len(ranks), at))
    due = history.mods(change)
    row = np.full(len(history.names), -1)
    row[history.ranks[final["key"]]] = np.arange(len(final))
    row = row[ranks]
    shown = row >= 0
    got = _at(final["mod"], row, shown)
    wrong = sure & (got != due)
    same = (change >= 0) & shown & (got == due)
    digests = np.array([digest(raw) for raw in final.text("value")], dtype=np.int64)
    for column, model in (
        (final["create"], history.create),
        (final["version"], history.version),
        (final["lease"], history.lease),
        (digests[final["value"]], history.digest),
    ):
        if len(model):
            differs = _at(column, row, shown) != model[change]
            wrong |= same & (model[change] >= 0) & differs

    def tell(index: int) -> str:
        there = f"revision {got[index]}" if got[index] else "nothing"
        if got[index] and got[index] == due[index]:
            there = f"another create, version, lease or value at revision {got[index]}"
        key = history.key(int(ranks[index]))
        was = _thing(case, int(change[index]))
        return f"the final list at {at} has {there} of {key}; it was {was}"

    findings.look(len(ranks), wrong, tell)
    return findings.verdict()
