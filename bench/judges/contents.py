"""What an event says of its object and of the one before it."""

import numpy as np

from bench.judges.case import Case
from bench.judges.finding import Column, Findings, Mask
from bench.records import EventType
from bench.verdicts import Verdict


def prev_kv(case: Case) -> Verdict:
    """With prev_kv an event carries the object as it was just before, exactly.

    It is missing only at a creation, or when that revision may have been compacted by then; who
    did not ask for it does not get it.
    """
    findings = Findings("PrevKV", case.unwatched("no watch asked for prev_kv"))
    history, events = case.history, case.events
    asked = case.watches["prev_kv"][case.watch] != 0
    carried = events["prev_mod"] >= 0
    findings.look(
        0,
        carried & ~asked,
        lambda row: f"{case.shown(row)} with prev_kv, for which it had not asked",
    )
    sure = asked & history.certain[case.change]
    lived = history.lived[case.change]
    previous = np.where(lived, history.before[case.change], 0)
    missing = sure & lived & ~carried
    missing[missing] = events["mod"][missing] > _compactable(case, missing)
    findings.look(
        int(sure.sum()),
        missing,
        lambda row: f"{case.shown(row)} without prev_kv: {_previous(case, row)} came before",
    )
    findings.look(
        0,
        sure & ~lived & carried,
        lambda row: (
            f"{case.shown(row)}, a creation, with prev_kv of revision {events['prev_mod'][row]}"
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
    asked, told = case.compactable, case.compacted
    when, what = (np.concatenate(both) for both in zip(asked, told, strict=True))
    order = np.argsort(when, kind="stable")
    highest = np.concatenate(([0], np.maximum.accumulate(what[order])))
    return highest[np.searchsorted(when[order], case.received[rows], side="right")]


def _previous(case: Case, row: int) -> str:
    return case.history.tell(int(case.history.before[case.change[row]]))


def _difference(case: Case, row: int) -> str:
    events, history = case.events, case.history
    before = history.before[case.change[row]]
    got = tuple(int(events[f"prev_{name}"][row]) for name in ("mod", "create", "version"))
    due = tuple(int(column[before]) for column in (history.mod, history.create, history.version))
    if got == due:
        return f"{case.shown(row)}: prev_kv has the value of another revision than {due[0]}"
    names = "(mod, create, version)"
    return f"{case.shown(row)}: prev_kv has {names} {got}, it was {due}"


def is_create(case: Case) -> Verdict:
    """A put is shown as a creation (create and mod revision equal) if the key did not exist."""
    findings = Findings("IsCreate", case.unwatched("no put of a known past was shown"))
    history, events = case.history, case.events
    put = events["type"] == EventType.PUT
    sure = put & history.certain[case.change]
    claimed = events["create"] == events["mod"]
    wrong = sure & (claimed == history.lived[case.change])

    def tell(row: int) -> str:
        what = "a creation" if claimed[row] else "an update"
        return f"{case.shown(row)} as {what}, after {_previous(case, row)}"

    findings.look(int(sure.sum()), wrong, tell)
    return findings.verdict()


def version_arithmetic(case: Case) -> Verdict:
    """A creation has version 1, each update one more and the same create revision."""
    findings = Findings("Version arithmetic", case.unwatched("no put of a known past was shown"))
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
        return f"{case.shown(row)} with {got}; it has {due}"

    findings.look(int(sure.sum()), wrong, tell)
    return findings.verdict()
