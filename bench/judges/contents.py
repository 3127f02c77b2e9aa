"""What an event says of its object and of the one before it."""

from collections.abc import Callable

import numpy as np

from bench.judges.case import Case
from bench.judges.finding import Column, Findings, Mask
from bench.plan import Verb
from bench.records import EventType, Outcome
from bench.verdicts import Verdict


def prev_kv(case: Case) -> Verdict:
    """With prev_kv an event carries the object as it was just before, exactly.

    It is missing only at a creation, or when that revision may have been compacted by then; who
    did not ask for it does not get it.
    """
    findings = Findings("PrevKV")
    history, events = case.history, case.events
    asked = case.watches["prev_kv"][case.watch] != 0
    carried = events["prev_mod"] >= 0
    findings.look(
        0,
        carried & ~asked,
        lambda row: f"{_shown(case, row)} with prev_kv, for which it had not asked",
    )
    sure = asked & history.certain[case.change]
    lived = history.lived[case.change]
    previous = np.where(lived, history.before[case.change], 0)
    missing = sure & lived & ~carried
    missing[missing] = events["mod"][missing] > _compactable(case, missing)
    findings.look(
        int(sure.sum()),
        missing,
        lambda row: f"{_shown(case, row)} without prev_kv: {_previous(case, row)} came before",
    )
    findings.look(
        0,
        sure & ~lived & carried,
        lambda row: (
            f"{_shown(case, row)}, a creation, with prev_kv of revision {events['prev_mod'][row]}"
        ),
    )
    wrong = np.zeros(len(sure), dtype=np.bool_)
    for column, model in (
        ("prev_mod", history.mod),
        ("prev_create", history.create),
        ("prev_version", history.version),
        ("prev_digest", history.digest),
    ):
        expected = model[previous] if len(model) else previous
        wrong |= (events[column] != expected) & (expected >= 0)
    wrong &= sure & lived & carried
    findings.look(0, wrong, lambda row: _difference(case, row))
    return findings.verdict()


def _compactable(case: Case, rows: Mask) -> Column:
    """The revision to which the store may have been compacted when these events came."""
    calls = case.compactions
    calls = calls.where(calls["outcome"] != Outcome.REFUSED)
    when, what = case.compacted
    when, what = np.concatenate((calls["sent"], when)), np.concatenate((calls["at"], what))
    order = np.argsort(when, kind="stable")
    highest = np.concatenate(([0], np.maximum.accumulate(what[order])))
    return highest[np.searchsorted(when[order], case.received[rows], side="right")]


def _shown(case: Case, row: int) -> str:
    change = case.history.tell(int(case.change[row]))
    return f"{case.name(int(case.watch[row]))} got the {change}"


def _previous(case: Case, row: int) -> str:
    return case.history.tell(int(case.history.before[case.change[row]]))


def _difference(case: Case, row: int) -> str:
    events, history = case.events, case.history
    before = history.before[case.change[row]]
    got = tuple(int(events[f"prev_{name}"][row]) for name in ("mod", "create", "version"))
    due = tuple(int(column[before]) for column in (history.mod, history.create, history.version))
    if got == due:
        return f"{_shown(case, row)}: prev_kv has the value of another revision than {due[0]}"
    names = "(mod, create, version)"
    return f"{_shown(case, row)}: prev_kv has {names} {got}, it was {due}"


def is_create(case: Case) -> Verdict:
    """A put is shown as a creation (create and mod revision equal) if the key did not exist."""
    findings = Findings("IsCreate")
    history, events = case.history, case.events
    put = events["type"] == EventType.PUT
    sure = put & history.certain[case.change]
    claimed = events["create"] == events["mod"]
    wrong = sure & (claimed == history.lived[case.change])

    def tell(row: int) -> str:
        what = "a creation" if claimed[row] else "an update"
        return f"{_shown(case, row)} as {what}, after {_previous(case, row)}"

    findings.look(int(sure.sum()), wrong, tell)
    return findings.verdict()


def version_arithmetic(case: Case) -> Verdict:
    """A creation has version 1, each update one more and the same create revision."""
    findings = Findings("Version arithmetic")
    history, events = case.history, case.events
    put = events["type"] == EventType.PUT
    version = history.version[case.change]
    sure = put & (version > 0)
    wrong = sure & (
        (events["version"] != version) | (events["create"] != history.create[case.change])
    )

    def tell(row: int) -> str:
        change = case.change[row]
        got = f"version {events['version'][row]}, created at {events['create'][row]}"
        due = f"version {version[row]}, created at {history.create[change]}"
        return f"{_shown(case, row)} with {got}; it has {due}"

    findings.look(int(sure.sum()), wrong, tell)
    return findings.verdict()


def attributable(case: Case) -> Verdict:
    """Every event comes from a write that was sent, as it was sent; every refusal was due.

    A put has the key, value and lease of an acknowledged write at its revision or of one whose
    outcome is unknown; a delete is one of these or the end of the key's lease. So a write that was
    refused, or that lost its comparison, is never seen. What the plan says must be refused is
    refused, with its code; what is within the rules is not called invalid.
    """
    findings = Findings("Errors attributable")
    history, ops = case.history, case.ops
    unknown = np.flatnonzero(history.writes & (ops["outcome"] == Outcome.UNKNOWN))
    deletes = unknown[ops["verb"][unknown] == Verb.DELETE]
    puts = unknown[ops["verb"][unknown] != Verb.DELETE]
    ranks = history.ranks[ops["key"]]
    orphan = (history.op < 0) & ~history.preloaded
    put = history.type == EventType.PUT
    maybe = _pairs(history.rank, history.digest, ranks[puts], ops["digest"][puts])
    ended = ~history.certain | (history.before >= 0) & (history.lease[history.before] != 0)
    explained = np.where(put, maybe, np.isin(history.rank, ranks[deletes]) | ended)
    findings.look(len(history.mod), orphan & ~explained, lambda change: _phantom(case, change))
    sent = history.op[case.change] >= 0
    sent |= history.preloaded[case.change]
    differs = np.zeros(len(case.change), dtype=np.bool_)
    for column, due in (
        ("type", history.type),
        ("digest", history.digest),
        ("lease", history.lease),
    ):
        wrong = case.events[column] != due[case.change]
        differs |= wrong if column != "lease" else wrong & (case.events["type"] == EventType.PUT)
    findings.look(
        int(sent.sum()),
        differs,
        lambda row: f"{_shown(case, row)}, but not as {_author(case, int(case.change[row]))}",
    )
    _refusals(case, findings)
    return findings.verdict()


def _pairs(rank: Column, digest: Column, ranks: Column, digests: Column) -> Mask:
    """Which (rank, digest) are among others."""
    if not len(ranks):
        return np.zeros(len(rank), dtype=np.bool_)
    known = set(zip(ranks.tolist(), digests.tolist(), strict=True))
    near = np.flatnonzero(np.isin(rank, ranks))
    found = np.zeros(len(rank), dtype=np.bool_)
    pairs = zip(rank[near].tolist(), digest[near].tolist(), strict=True)
    found[near] = [pair in known for pair in pairs]
    return found


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
    return what


INVALID = (3, 11)
"""InvalidArgument, and OutOfRange of a call that names no revision."""


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


_REFUSABLE = (Verb.CREATE, Verb.UPDATE, Verb.DELETE, Verb.ADOPT)
"""What is sent for a step that must be refused; a read before it need not be."""
