"""What an acknowledged write means: its comparison held, and it stays."""

import numpy as np

from bench.clock import MICROSECONDS
from bench.judges.case import Case, latest
from bench.judges.finding import Column, Findings
from bench.judges.history import FOREVER
from bench.plan import Trouble
from bench.records import FINAL, EventType, MessageKind, Outcome
from bench.verdicts import Verdict


def cas_chains(case: Case) -> Verdict:
    """The writes of a key that succeeded are one chain, each comparing with the one before it.

    And a comparison that failed had a reason: the key was at another revision.
    """
    findings = Findings("CAS chains", "no write compared a revision")
    history, ops = case.history, case.ops
    rows = np.flatnonzero((history.change_of_op >= 0) & (ops["expected"] >= 0))
    change, expected = history.change_of_op[rows], ops["expected"][rows]
    before, sure = history.before[change], history.certain[change]
    newest = history.mods(before)
    mod = np.where(history.lived[change], newest, 0)
    wrong = (expected != mod) & (sure | ((newest > expected) & (expected > 0)))

    def tell(index: int) -> str:
        call = case.call(int(rows[index]))
        was = history.tell(int(before[index]))
        due = f"succeeded at {ops['revision'][rows[index]]} comparing with {expected[index]}"
        return f"{call} {due}, after {was}"

    findings.look(len(rows), wrong, tell)
    _conflicts(case, findings)
    return findings.verdict()


def _conflicts(case: Case, findings: Findings) -> None:
    history, ops = case.history, case.ops
    lost = (ops["outcome"] == Outcome.CONFLICT) & (ops["expected"] >= 0) & (ops["revision"] > 0)
    rows = np.flatnonzero(lost)
    expected, rank, revision = (
        ops["expected"][rows],
        history.ranks[ops["key"][rows]],
        ops["revision"][rows],
    )
    change, sure = history.state(case.coverage, rank, revision)
    mod = history.mods(change)
    wrong = (expected == ops["found"][rows]) | (sure & (mod == expected))

    def tell(index: int) -> str:
        was = history.tell(int(change[index]))
        asked = f"failed at {revision[index]} comparing with {expected[index]}"
        return f"{case.call(int(rows[index]))} {asked}, after {was}"

    findings.look(len(rows), wrong, tell)


def durable(case: Case) -> Verdict:
    """An acknowledged write is there for good: in every watch of its key, and in the final list.

    Whatever was done to the server in between.
    """
    findings = Findings("Acknowledged writes durable", "no write was acknowledged")
    history = case.history
    acked = np.flatnonzero((history.op >= 0) | history.preloaded)
    rank, mod = history.rank[acked], history.mod[acked]
    watched = case.coverage.over(rank, mod - 1, mod)
    findings.look(
        len(acked),
        watched & (history.shown[acked] < 0),
        lambda index: f"{_acknowledged(case, int(acked[index]))}; no watch of it saw that",
    )
    final = case.records.frame(FINAL)
    revision = case.facts["final_revision"]
    if revision < 0:
        return findings.verdict()
    newest = np.zeros(len(history.names), dtype=np.int64)
    newest[history.ranks[final["key"]]] = final["mod"]
    last = (history.after[acked] < 0) & (mod <= revision)
    put = history.type[acked] == EventType.PUT
    # Nobody is known to have touched the key again; a lease may have ended, a doubtful delete too.
    free = (history.lease[acked] != 0) | (history.doubt_after[rank] < FOREVER)
    seen = newest[rank]
    wrong = last & np.where(put, (seen < mod) & ((seen > 0) | ~free), (seen > 0) & (seen < mod))

    def tell(index: int) -> str:
        there = int(seen[index])
        what = f"has revision {there}" if there else "has nothing"
        return f"{_acknowledged(case, int(acked[index]))}; the final list {what}"

    findings.look(0, wrong, tell)
    return findings.verdict()


def _acknowledged(case: Case, change: int) -> str:
    """A write that was acknowledged, and by how much before the next kill."""
    history = case.history
    text = f"the {history.tell(change)} was acknowledged"
    op = int(history.op[change])
    if op < 0:
        return f"{text} before the load"
    done = int(case.ops["done"][op])
    text = f"{text} at {done / MICROSECONDS:.3f} s to {case.call(op)}"
    for at, _, trouble in case.incidents:
        if trouble == Trouble.KILL and at >= done:
            return f"{text}, {(at - done) / MICROSECONDS:.3f} s before a kill"
    return text


def revision(case: Case) -> Verdict:
    """The store's revision only grows.

    An answer's revision is never below that of an answer or a watch message received before the
    call was sent, on whatever connection, and that of a write is above it; no two writes have the
    same; a watch's messages do not go back, nor does a message tell of what is newer than itself.
    """
    findings = Findings("Revision", "no answer told a revision")
    ops = case.ops
    when, highest, order = case.told
    rows = np.flatnonzero(ops["revision"] > 0)
    reached = latest(when, highest, ops["sent"][rows])
    wrote = case.history.change_of_op[rows] >= 0
    got = ops["revision"][rows]
    wrong = got < reached + wrote

    def tell(index: int) -> str:
        row = rows[index]
        sent = int(ops["sent"][row])
        at = np.searchsorted(when, sent) - 1
        from_ = int(order[np.searchsorted(highest[: at + 1], reached[index])])
        source = case.call(from_) if from_ < len(ops) else _message(case, from_ - len(ops))
        return (
            f"{case.call(int(row))}, sent at {sent / MICROSECONDS:.6f} s, was answered at revision "
            f"{got[index]}; revision {reached[index]} had been told before, to {source}"
        )

    findings.look(len(rows), wrong, tell)
    _shared(case, findings)
    _streams(case, findings)
    return findings.verdict()


def _message(case: Case, row: int) -> str:
    return f"{case.name(int(case.message_watch[row]))}, message {case.messages['message'][row]}"


def _shared(case: Case, findings: Findings) -> None:
    """Several changes in one revision are one call's, or the deletes of one lease's end."""
    history, ops = case.history, case.ops
    mod, op = history.mod, history.op
    written = (history.type == EventType.PUT) | (op >= 0)
    call = np.where(op >= 0, ops["op"][op], -1) if len(ops) else op
    apart = (call[1:] != call[:-1]) | (op[1:] < 0)
    shared = (mod[1:] == mod[:-1]) & (written[1:] | written[:-1]) & apart

    def tell(row: int) -> str:
        return f"one revision for two: {history.tell(row)}, {history.tell(row + 1)}"

    findings.look(len(mod), shared, tell)
    acked = np.flatnonzero(history.change_of_op >= 0)
    order = acked[np.argsort(history.change_of_op[acked], kind="stable")]
    twice = np.diff(history.change_of_op[order]) == 0

    def tell_acked(index: int) -> str:
        first, second = case.call(int(order[index])), case.call(int(order[index + 1]))
        return f"one revision, {ops['revision'][order[index]]}, for two: {first}, {second}"

    findings.look(0, twice, tell_acked)


def _streams(case: Case, findings: Findings) -> None:
    messages, watch = case.messages, case.message_watch
    if not len(messages):
        return
    told = (messages["revision"] > 0) & np.isin(
        messages["kind"], (MessageKind.EVENTS, MessageKind.PROGRESS)
    )
    rows = np.flatnonzero(told)
    revisions, of = messages["revision"][rows], watch[rows]
    back = (of[1:] == of[:-1]) & (np.diff(revisions) < 0)

    def tell(index: int) -> str:
        later = int(rows[index + 1])
        return (
            f"{_message(case, later)} says revision {revisions[index + 1]} after {revisions[index]}"
        )

    findings.look(len(rows), back, tell)
    newest: Column = np.zeros(len(messages), dtype=np.int64)
    np.maximum.at(newest, case.event_message, case.events["mod"])
    early = told & (newest > messages["revision"])
    findings.look(
        0,
        early,
        lambda row: (
            f"{_message(case, row)} says revision {messages['revision'][row]} "
            f"and brings an event of {newest[row]}"
        ),
    )
