"""What etcd promises of watches: order, no event twice, none torn apart, none lost.

The names are those of etcd's own validation of its robustness tests
(https://etcd.io/docs/latest/learning/api_guarantees/#watch-apis).
"""

import numpy as np

from bench.clock import MICROSECONDS
from bench.judges.case import Case, Owed
from bench.judges.finding import Column, Findings, Mask
from bench.records import EventType, MessageKind
from bench.verdicts import Verdict

LAG_US = 5 * MICROSECONDS
"""In which every watch that is read must have caught up after the load."""


def _neighbours(case: Case) -> Mask:
    """Of each event but the first: does it follow one of the same watch?"""
    same: Mask = case.watch[1:] == case.watch[:-1]
    return same


def ordered(case: Case) -> Verdict:
    """Events of one watch are ordered by revision; one never comes after a newer one."""
    findings = Findings("Ordered", case.unwatched("no watch showed two events"))
    mod = case.events["mod"]
    pairs = _neighbours(case)
    wrong = pairs & (mod[1:] < mod[:-1])

    def tell(row: int) -> str:
        key = case.history.tell(int(case.change[row + 1]))
        return f"{case.name(int(case.watch[row]))} got revision {mod[row]} before {key}"

    findings.look(int(pairs.sum()), wrong, tell)
    return findings.verdict()


def unique(case: Case) -> Verdict:
    """No watch shows a change twice."""
    findings = Findings("Unique", case.unwatched(""))
    pairs = _neighbours(case)
    # Only where changes do not rise can one come twice.
    suspects = np.unique(case.watch[1:][pairs & (np.diff(case.change) <= 0)])
    twice: list[int] = []
    for watch in suspects:
        first, end = case.bounds[watch], case.bounds[watch + 1]
        shown = case.change[first:end]
        order = np.argsort(shown, kind="stable")
        again = order[1:][np.diff(shown[order]) == 0]
        twice.extend(int(first + row) for row in np.sort(again))

    def tell(row: int) -> str:
        change = case.history.tell(int(case.change[row]))
        message = case.events["message"][row]
        return f"{case.name(int(case.watch[row]))} got the {change} again in message {message}"

    findings.look(len(case.change), np.array(twice, dtype=np.int64), tell)
    return findings.verdict()


def atomic(case: Case) -> Verdict:
    """All events of one revision come in one message, or in fragments of one.

    Only what deletes several keys at once (a lease's end) makes several events in one revision.
    """
    findings = Findings("Atomic", case.unwatched("no revision of several changes was shown"))
    mod, message = case.events["mod"], case.event_message
    pairs = _neighbours(case) & (mod[1:] == mod[:-1]) & (case.change[1:] != case.change[:-1])
    # A message that says "fragment" goes on in the next: they count as one.
    whole = np.concatenate(([0], np.cumsum(case.messages["fragment"] == 0)))
    torn = pairs & (whole[message[1:]] != whole[message[:-1]])

    def tell(row: int) -> str:
        parts = f"messages {case.events['message'][row]} and {case.events['message'][row + 1]}"
        keys = f"{_key(case, row)} and {_key(case, row + 1)}"
        return f"{case.name(int(case.watch[row]))} got revision {mod[row]} in {parts}: {keys}"

    findings.look(int(pairs.sum()), torn, tell)
    return findings.verdict()


def _key(case: Case, row: int) -> str:
    return case.history.key(int(case.history.rank[case.change[row]]))


def reliable(case: Case) -> Verdict:
    """Between the first and the last revision that a watch shows, no change is missing."""
    findings = Findings("Reliable", case.unwatched("no watch had a known start"))
    for owed in case.owed:
        if owed.rows.start == owed.rows.stop:
            continue
        mods = case.history.mod[owed.changes]
        first = int(case.events["mod"][owed.rows].min())
        within = (mods >= first) & (mods <= owed.last)
        _missing(case, findings, owed, within, f"and went on to revision {owed.last}")
    return findings.verdict()


def _missing(case: Case, findings: Findings, owed: Owed, asked: Mask, though: str) -> None:
    def tell(index: int) -> str:
        change = int(owed.changes[index])
        return f"{case.name(owed.watch)} never got the {case.history.tell(change)} {though}"

    findings.look(int(asked.sum()), asked & (owed.got < 0), tell)


def resumable(case: Case) -> Verdict:
    """A watch from a revision shows everything from it on, and nothing older.

    If that revision has been compacted, the watch is canceled and told so; it never stays silent.
    It is told so for no other reason.
    """
    findings = Findings("Resumable", case.unwatched("no watch had a known start"))
    old = case.compacted_before(case.watches["opened"])
    _canceled(case, findings)
    for owed in case.owed:
        asked = int(case.watches["start"][owed.watch])
        mods = case.events["mod"][owed.rows]

        def tell(row: int, owed: Owed = owed) -> str:
            change = case.history.tell(int(case.change[owed.rows][row]))
            return f"{case.name(owed.watch)} from revision {owed.start} got the {change}"

        findings.look(len(mods), mods < owed.start, tell)
        if 0 < asked < old[owed.watch]:
            _refused(case, findings, owed, int(old[owed.watch]))
        elif asked > 0 and len(mods):
            before = case.history.mod[owed.changes] < int(mods.min())
            _missing(case, findings, owed, before, f"having asked from revision {owed.start}")
    return findings.verdict()


def _canceled(case: Case, findings: Findings) -> None:
    """What a watch is told of compaction: somebody asked for it, and the watch needs it."""
    messages, of = case.messages, case.message_watch
    told = messages["compact_revision"]
    needed = np.maximum(case.start, case.reached + 1)[of]

    def tell(row: int) -> str:
        what = f"{case.name(int(of[row]))} was told that {told[row]} had been compacted"
        if case.invented[row]:
            return f"{what}, for which nobody had asked"
        return f"{what}; it had been shown everything up to {needed[row] - 1}"

    needless = (told > 0) & (told <= needed)
    findings.look(int((told > 0).sum()), case.invented | needless, tell)


def _refused(case: Case, findings: Findings, owed: Owed, compacted: int) -> None:
    """A watch from a compacted revision must hear so; one that soon broke off may not have."""
    first, end = case.message_bounds[owed.watch], case.message_bounds[owed.watch + 1]
    told = case.messages["compact_revision"][first:end] > owed.start
    lasted = case.watches["closed"][owed.watch] - case.watches["opened"][owed.watch]
    silent = not told.any() and (case.open[owed.watch] or lasted > LAG_US)
    shown = owed.rows.stop > owed.rows.start and not told.any()

    def tell(_: int) -> str:
        what = "was shown events" if shown else "was not told"
        return (
            f"{case.name(owed.watch)} asked from revision {owed.start}, which had been compacted "
            f"to {compacted} before it opened, and {what}"
        )

    findings.look(1, np.array([silent or shown]), tell)


def bookmarkable(case: Case) -> Verdict:
    """Progress at revision R comes after every event up to R."""
    findings = Findings("Bookmarkable", _no_progress(case))
    messages = case.messages
    for owed in case.owed:
        first, end = case.message_bounds[owed.watch], case.message_bounds[owed.watch + 1]
        progress = first + np.flatnonzero(messages["kind"][first:end] == MessageKind.PROGRESS)
        if not len(progress):
            continue
        revisions = messages["revision"][progress]
        counts = np.searchsorted(case.history.mod[owed.changes], revisions, side="right")
        came = _came(case, owed, len(messages["kind"]))
        latest = np.concatenate(([-1], np.maximum.accumulate(came)))
        late = latest[counts] > progress

        def tell(
            index: int,
            owed: Owed = owed,
            counts: Column = counts,
            came: Column = came,
            progress: Column = progress,
            revisions: Column = revisions,
        ) -> str:
            missing = np.flatnonzero(came[: counts[index]] > progress[index])[0]
            change = case.history.tell(int(owed.changes[missing]))
            later = "later" if owed.got[missing] >= 0 else "never"
            return (
                f"{case.name(owed.watch)} was told of progress at revision {revisions[index]} "
                f"and got the {change} {later}"
            )

        findings.look(len(progress), late, tell)
    return findings.verdict()


def _no_progress(case: Case) -> str:
    return "no watch told of progress" if len(case.watches) else "nothing was watched"


def _came(case: Case, owed: Owed, never: int) -> Column:
    """Row of the message that brought each change."""
    if not len(case.event_message):
        return np.full(len(owed.changes), never)
    return np.where(owed.got >= 0, case.event_message[owed.got], never)


def filtered(case: Case) -> Verdict:
    """A watch shows keys of its range only, and no kind of event that it does not want."""
    findings = Findings("Filter", case.unwatched(""))
    rank = case.history.rank[case.change]
    watch, watches, kind = case.watch, case.watches, case.events["type"]
    outside = (rank < case.first_rank[watch]) | (rank >= case.end_rank[watch])
    unwanted = (watches["no_put"][watch] != 0) & (kind == EventType.PUT)
    unwanted |= (watches["no_delete"][watch] != 0) & (kind == EventType.DELETE)

    def tell(row: int) -> str:
        why = "outside its range" if outside[row] else "of a kind that it does not want"
        change = case.history.tell(int(case.change[row]))
        return f"{case.name(int(watch[row]))} got the {change}, {why}"

    findings.look(len(watch), outside | unwanted, tell)
    return findings.verdict()


def lag_drains(case: Case) -> Verdict:
    """Five seconds after the load every watch that is read at full speed has shown everything."""
    lacking = case.unwatched("no watch was open at the end that was owed anything")
    findings = Findings("Lag drains", lacking, timed=True)
    load_end, finished = case.facts["load_end_us"], case.facts["finished_us"]
    known = case.known_us
    for owed in case.owed:
        if not case.open[owed.watch] or case.watches["slow"][owed.watch]:
            continue
        due = np.maximum(known[owed.changes], load_end) + LAG_US
        got = owed.got >= 0
        came = np.full(len(due), finished)
        came[got] = case.received[owed.got[got]]
        late = came > due
        late |= ~got & (due <= finished)

        def tell(index: int, owed: Owed = owed, came: Column = came, got: Mask = got) -> str:
            change = case.history.tell(int(owed.changes[index]))
            seconds = (int(came[index]) - load_end) / MICROSECONDS
            what = f"{seconds:.1f} s after the load" if got[index] else "never"
            return f"{case.name(owed.watch)} got the {change} {what}"

        findings.look(len(due), late, tell)
    return findings.verdict()
