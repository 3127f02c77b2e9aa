"""Who must be watching when a run ends, and is: judges of watches see only what watches there are.

A watch that has ended is owed nothing, and a cache without a list has no watch at all, so a server
that offers no watches would pass every one of them. Here those are counted who must watch: each
apiserver every resource, and each watcher of its own. The generator waits for them after the load
and asks for progress, so all but slow ones have come to the head that was told by the load's end.
Traces, which have no resources, are not judged: their clients end watches of their own accord.
"""

import numpy as np

from bench.judges.case import Case
from bench.judges.finding import Findings, Mask
from bench.judges.watch import LAG_US
from bench.records import MessageKind, Outcome
from bench.verdicts import Verdict


def everyone(case: Case) -> Verdict:
    """At the end every client has a watch that was created, is open, and has come to the head.

    And if something was written where they watch, some watch has shown something. After trouble
    made on purpose everyone has five seconds to come back.
    """
    lacking = _untold(case)
    findings = Findings("Everyone is watching", lacking, timed=True)
    if lacking:
        return findings.verdict()
    created = np.zeros(len(case.watches), dtype=np.bool_)
    created[case.message_watch[case.messages["kind"] == MessageKind.CREATED]] = True
    clients = _clients(case)
    absent = [(name, _absent(case, created, watch)) for name, watch in clients.items()]
    wrong = [f"{name} {why}" for name, why in absent if why]
    findings.look(len(clients), np.arange(len(wrong)), wrong.__getitem__)
    written = np.flatnonzero(_watched_writes(case))
    if len(written):
        silent = np.array([not len(case.events)])
        findings.look(
            1,
            silent,
            lambda _: f"no watch has shown anything, not even of the {case.call(int(written[0]))}",
        )
    return findings.verdict()


def _untold(case: Case) -> str:
    """Why nobody can be said to be absent; empty: everybody can."""
    facts = case.facts
    if not facts["resources"]:
        return "a trace's clients end watches as they like"
    if facts["state"] != "COMPLETE":
        return "the run was cut short"
    return "the final list was not read" if facts["final_revision"] < 0 else ""


def _clients(case: Case) -> dict[str, int]:
    """The last watch of everyone who must have one, by name; -1: there was none."""
    watches, facts = case.watches, case.facts
    last: dict[tuple[int, bytes], int] = {
        (apiserver, prefix.encode()): -1
        for apiserver in range(facts["apiservers"])
        for prefix in facts["resources"]
    }
    names, keys = watches.text("name"), watches.text("key")
    rows = zip(watches["apiserver"], watches["name"], watches["key"], watches["slow"], strict=True)
    for watch, (apiserver, name, key, slow) in enumerate(rows):
        if not slow:
            last[int(apiserver), keys[key] if apiserver >= 0 else names[name]] = watch
    return {
        f"apiserver {n} of {what.decode()}" if n >= 0 else f"watcher {what.decode()}": watch
        for (n, what), watch in last.items()
    }


def _absent(case: Case, created: Mask, watch: int) -> str:
    """Why a client is not watching; empty: it is."""
    if watch < 0:
        return "never had a watch"
    back_us = max((until for _, until, _ in case.incidents), default=-LAG_US) + LAG_US
    is_back_due = back_us <= case.facts["finished_us"]
    if not case.open[watch]:
        if not is_back_due:
            return ""
        code = case.watches["code"][watch]
        message = case.watches.text("message")[case.watches["message"][watch]]
        told = message.decode(errors="replace")
        return f"has no watch in the end: the last was over with code {code} {told}".rstrip()
    if not created[watch] and is_back_due:
        return "has a watch in the end that was never created"
    reached = max(int(case.reached[watch]), int(case.start[watch]) - 1)
    if reached < case.head:
        return f"has come to revision {reached} only; {case.head} was told before the load's end"
    return ""


def _watched_writes(case: Case) -> Mask:
    """Calls that change, or should have changed, what some watch is about."""
    ops, watches = case.ops, case.watches
    wrote = case.history.writes & (ops["refusal"] == 0) & (ops["outcome"] != Outcome.CONFLICT)
    rank = case.history.ranks[ops["key"]]
    watched = np.zeros(len(ops), dtype=np.bool_)
    whole = (watches["no_put"] == 0) & (watches["no_delete"] == 0)
    spans = np.stack((case.first_rank[whole], case.end_rank[whole]), axis=1)
    for first, end in np.unique(spans, axis=0).tolist():
        watched |= (rank >= first) & (rank < end)
    watched &= wrote
    return watched
