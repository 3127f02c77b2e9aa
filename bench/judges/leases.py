"""What a lease promises: its keys stay as long as it was granted for, and not much longer.

When the server granted is known to lie between a call's sending and its answer, so a key is gone
too early if that is *seen* sooner than the time to live after the sending, and too late if it is
there (another write found it, or nobody saw it go) longer than that after the answer, and
``LATE_US``. Leases that somebody revokes or keeps alive are not judged. A restarted server may
grant the whole time anew, as etcd's new leader does; a pause or a lost connection delays what is
seen.
"""

import numpy as np

from bench.clock import MICROSECONDS
from bench.judges.case import Case
from bench.judges.finding import Column, Findings, Mask
from bench.judges.history import FOREVER
from bench.plan import Trouble, Verb
from bench.records import FINAL, EventType, Outcome
from bench.verdicts import Verdict

LATE_US = 5 * MICROSECONDS


class _Grants:
    """Of every change: the earliest and latest time at which its lease may end it."""

    def __init__(self, case: Case) -> None:
        ops, history = case.ops, case.history
        granted = (ops["verb"] == Verb.GRANT) & (ops["outcome"] == Outcome.OK)
        rows = np.flatnonzero(granted & (ops["lease"] != 0))
        rows = rows[np.argsort(ops["lease"][rows], kind="stable")]
        ids = ops["lease"][rows]
        ttl_us = ops["ttl"][rows] * MICROSECONDS
        self.known: Mask = np.zeros(len(history.mod), dtype=np.bool_)
        """Does the change have a lease of which the grant is known?"""
        self.earliest = np.full(len(history.mod), -FOREVER)
        self.latest = np.full(len(history.mod), FOREVER)
        if not len(rows):
            return
        latest = _extended(case, ops["done"][rows] + ttl_us, ttl_us)
        found = np.minimum(np.searchsorted(ids, history.lease), len(ids) - 1)
        self.known = (ids[found] == history.lease) & (history.type == EventType.PUT)
        # Of a recorded trace: revoked, or kept alive by a call that is OTHER to judges.
        other = ops["lease"][np.isin(ops["verb"], (Verb.REVOKE, Verb.OTHER))]
        self.known &= ~np.isin(history.lease, other)
        self.earliest[self.known] = (ops["sent"][rows] + ttl_us)[found][self.known]
        self.latest[self.known] = latest[found][self.known] + LATE_US


def _extended(case: Case, ends: Column, ttl_us: Column) -> Column:
    """The latest ends of leases, with what was done to the server on the way."""
    ends = ends.copy()
    for at, until, trouble in case.incidents:
        hit = at <= ends + LATE_US
        more = ttl_us if trouble == Trouble.KILL else 0
        ends = np.where(hit, np.maximum(ends, until + more), ends)
    return ends


def ttl_window(case: Case) -> Verdict:
    """A key with a lease is deleted not before the lease ends, and once.

    A key that was put again with another lease, or with none, stays.
    """
    findings = Findings("TTL window", _unleased(case, "no key was deleted by its lease"))
    history = case.history
    grants = _Grants(case)
    ended = _ended(case)
    _early(case, findings, grants, ended)
    again = ended & history.certain & ~history.lived & (history.before >= 0)
    again &= history.leased[history.rank]

    def tell(change: int) -> str:
        return (
            f"a {history.tell(change)} was seen after a {history.tell(int(history.before[change]))}"
        )

    findings.look(int(ended.sum()), again, tell)
    kept = ended & history.certain & history.lived & history.leased[history.rank]
    kept &= (history.lease[history.before] == 0) if len(kept) else kept
    findings.look(
        0,
        kept,
        lambda change: (
            f"a {history.tell(change)} ended a key that had no lease any more: it was last "
            f"{history.tell(int(history.before[change]))}"
        ),
    )
    return findings.verdict()


def _unleased(case: Case, otherwise: str) -> str:
    """What there was none of: of leases, or of that."""
    return otherwise if (case.ops["verb"] == Verb.GRANT).any() else "no lease was asked for"


def _ended(case: Case) -> Mask:
    """Deletes that nobody asked for."""
    history, ops = case.history, case.ops
    doubtful = history.writes & (ops["outcome"] == Outcome.UNKNOWN) & (ops["verb"] == Verb.DELETE)
    asked = np.isin(history.rank, history.ranks[ops["key"][doubtful]])
    ended: Mask = (history.type == EventType.DELETE) & (history.op < 0) & ~asked
    return ended


def _early(case: Case, findings: Findings, grants: _Grants, ended: Mask) -> None:
    history = case.history
    leased = np.flatnonzero(grants.known)
    after = history.after[leased]
    gone = leased[(after >= 0) & ended[after] & history.certain[after]]
    seen = case.known_us[history.after[gone]]
    early = seen < grants.earliest[gone]

    def tell(index: int) -> str:
        change = int(gone[index])
        short = (int(grants.earliest[change]) - int(seen[index])) / MICROSECONDS
        was = f"lease {history.lease[change]} of the {history.tell(change)}"
        end = history.tell(int(history.after[change]))
        return f"{was} ended {short:.3f} s too early: the {end} was seen"

    findings.look(len(gone), early, tell)


def ttl_overdue(case: Case) -> Verdict:
    """A key with a lease is gone within five seconds after the lease's end."""
    lacking = _unleased(case, "no key was put with a lease that nobody keeps alive")
    findings = Findings("TTL overdue", lacking, timed=True)
    history, ops = case.history, case.ops
    grants = _Grants(case)
    leased = np.flatnonzero(grants.known)
    after = history.after[leased]
    op = np.where(after >= 0, history.op[after], -1) if len(after) else after
    sent = ops["sent"][op] if len(ops) else op
    # A write that found it was sent when it was still there; a delete by its lease was seen so
    # late; without either it is there still if the final list, read after the load, shows it.
    load_end = case.facts["load_end_us"]
    until = np.where(after < 0, load_end, np.where(op >= 0, sent, case.known_us[after]))
    final = case.records.frame(FINAL)
    listed = history.place(final["mod"], history.ranks[final["key"]])
    there = np.isin(history.places[leased], listed)
    sure = np.where(after >= 0, history.certain[after], there)
    late = sure & (until > grants.latest[leased])

    def tell(index: int) -> str:
        change = int(leased[index])
        over = (int(until[index]) - int(grants.latest[change]) + LATE_US) / MICROSECONDS
        then = int(after[index])
        what = f"next came the {history.tell(then)}" if then >= 0 else "it is still there"
        was = f"lease {history.lease[change]} of the {history.tell(change)}"
        return f"{was} was over {over:.3f} s ago when {what}"

    findings.look(len(leased), late, tell)
    return findings.verdict()
