"""Where everything that was seen comes from, and whether what was refused had to be."""

from collections.abc import Callable

import numpy as np

from bench.judges.case import Case
from bench.judges.finding import Findings, Mask
from bench.plan import Verb
from bench.records import EventType, Outcome
from bench.verdicts import Verdict

INVALID = (3, 11)
"""InvalidArgument, and OutOfRange of a call that names no revision."""
_REFUSABLE = (Verb.CREATE, Verb.UPDATE, Verb.DELETE, Verb.ADOPT)
"""What is sent for a step that must be refused; a read before it need not be."""


def attributable(case: Case) -> Verdict:
    """Every event comes from a write that was sent, as it was sent; every refusal was due.

    A put has the key, value and lease of an acknowledged write at its revision or of one whose
    outcome is unknown, which is done once at most and if its comparison held; a delete is one of
    these or the end of the key's lease. So a write that was refused, or that lost its comparison,
    is never seen. What the plan says must be refused is
    refused, with its code; what is within the rules is not called invalid.
    """
    findings = Findings("Errors attributable", "nothing was sent and nothing was seen")
    history = case.history
    orphan = (history.op < 0) & ~history.preloaded
    orphan[_unknown(case, orphan)] = False
    ended = ~history.certain | (history.before >= 0) & (history.lease[history.before] != 0)
    orphan &= ~ended | (history.type == EventType.PUT)
    findings.look(len(history.mod), orphan, lambda change: _phantom(case, change))
    events, change = case.events, case.change
    differs = (events["type"] != history.type[change]) | (
        events["digest"] != history.digest[change]
    )
    differs |= (events["lease"] != history.lease[change]) & (events["type"] == EventType.PUT)
    findings.look(
        len(differs),
        differs,
        lambda row: f"{case.shown(row)}, but not as {_author(case, int(case.change[row]))}",
    )
    _refusals(case, findings)
    return findings.verdict()


def _unknown(case: Case, orphan: Mask) -> list[int]:
    """Changes that are each explained by a write of unknown outcome of its own.

    Where the object before is certain it is the one that the write compared with; such changes
    choose first.
    """
    history, ops, rows = case.history, case.ops, case.history.doubted
    ranks = history.ranks[ops["key"][rows]]
    delete = ops["verb"][rows] == Verb.DELETE
    values = np.where(delete, -1, ops["digest"][rows])
    free: dict[tuple[int, int], list[int]] = {}
    for rank, value, expected in zip(
        ranks.tolist(), values.tolist(), ops["expected"][rows].tolist(), strict=True
    ):
        free.setdefault((rank, value), []).append(expected)
    explained: list[int] = []
    near = np.flatnonzero(orphan & np.isin(history.rank, ranks))
    for change in near[np.argsort(~history.certain[near], kind="stable")].tolist():
        deleted = history.type[change] == EventType.DELETE
        value = -1 if deleted else int(history.digest[change])
        candidates = free.get((int(history.rank[change]), value), [])
        before = int(history.before[change])
        mod = int(history.mod[before]) if history.lived[change] else 0
        for expected in candidates:
            if expected in {-1, mod} or not history.certain[change]:
                candidates.remove(expected)
                explained.append(change)
                break
    return explained


def _author(case: Case, change: int) -> str:
    op = int(case.history.op[change])
    return f"{case.call(op)} wrote it" if op >= 0 else "other watches saw it"


def _phantom(case: Case, change: int) -> str:
    """A change that nobody asked for; the call that carried its value, if one did."""
    history, ops = case.history, case.ops
    same = (ops["digest"] == history.digest[change]) & (history.digest[change] >= 0)
    near = np.flatnonzero(same & (history.ranks[ops["key"]] == history.rank[change]))
    what = f"a {history.tell(change)} was seen, and no write explains it"
    if len(near):
        outcome = Outcome(int(ops["outcome"][near[0]])).name
        what += f": {case.call(int(near[0]))} ended as {outcome} at {ops['revision'][near[0]]}"
        before, expected = int(history.before[change]), ops["expected"][near[0]]
        what += f", comparing with {expected}, and before it came {history.tell(before)}"
    return what


def _refusals(case: Case, findings: Findings) -> None:
    ops = case.ops
    due = ops["refusal"] != 0
    refused = (ops["outcome"] == Outcome.REFUSED) & (ops["code"] == ops["refusal"])
    excused = ops["outcome"] == Outcome.UNKNOWN
    troubled = np.zeros(len(due), dtype=np.bool_)
    for at, until, _ in case.incidents:
        troubled |= (ops["sent"] <= until) & ((ops["done"] >= at) | (ops["done"] < 0))
    wrong = due & ~refused & ~(excused & troubled) & np.isin(ops["verb"], _REFUSABLE)

    def describe(of: str) -> Callable[[int], str]:
        def tell(row: int) -> str:
            outcome = Outcome(int(ops["outcome"][row])).name
            message = ops.text("message")[ops["message"][row]].decode(errors="replace")
            return f"{case.call(row)} {of}: {outcome}, code {ops['code'][row]} {message}".rstrip()

        return tell

    findings.look(int(due.sum()), wrong, describe("had to be refused"))
    unasked = (ops["outcome"] == Outcome.REFUSED) & (ops["refusal"] == 0)
    unasked &= np.isin(ops["code"], INVALID) & (ops["at"] <= 0)
    findings.look(len(due), unasked, describe("was within the rules"))
