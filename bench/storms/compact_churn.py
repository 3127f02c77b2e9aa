"""S7 ``compact-churn``: history is cut off while everybody works, and somebody still reads it.

Theory: a store that keeps every revision lives on compaction, and that is where it stalls: it
deletes in bulk what it wrote a moment ago. Real clusters compact every five minutes and keep five
minutes of history; here it is every ``compaction_s``, so that a short run has many cycles. As
kube-apiserver does it, each apiserver tries to win a Txn on ``compact_rev_key``, and the winner
compacts to where the store was one interval earlier; between one and two intervals of history
remain.

Beside the load of ``tool-fanout`` and ``hot-status`` there are ``LEDGERS`` objects that are
counted up all the time. Readers ask for them at revisions inside of what remains and far outside
of it, and slow watchers read ten of their events a second, fewer than there are.
Writes: those of the two storms, ``ledger_per_second``, and one for each compaction.
Not here: filling a store up to its quota; ``bench/DESIGN.md`` says why.

Asked of the store beyond the common judges (which know what a read at a revision must show, and
that no watch has holes): a read below a compaction that was acknowledged before it began is refused
as OutOfRange; one at or above every compaction begun until it was answered is not refused; in
between either may be. And a slow watcher is told what it misses: it gets on, or it is canceled with
the revision of the compaction that overtook it, but it is never just left.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.clock import MICROSECONDS
from bench.plan import WRITES, Actor, Edit, Object, Plan, Step, Verb, Watcher
from bench.records import (
    EVENTS,
    FINAL,
    MESSAGES,
    SAMPLES,
    WATCHES,
    Frame,
    MessageKind,
    Outcome,
    Records,
)
from bench.storms import hot_status, objects, timing, tool_fanout
from bench.verdicts import Verdict, rule_of, verdict

NAME = "compact-churn"
SUMMARY = "compactions every few seconds under load, with readers of history and slow watchers"
RATE = "runs_per_second"

LEDGERS = 20
LEDGER_PREFIX, LEDGER_SHAPE, LEDGER_BYTES = b"/registry/services/endpoints/", "endpoints", 2_000
OUT_OF_RANGE = 11
STALL_US = 5 * MICROSECONDS
"""A slow watcher that has heard nothing for so long after it was ready to hear more is left."""
AFTERMATH_US = MICROSECONDS
"""For so long after its answer a compaction is still at work in the background."""
MEBIBYTE = 1 << 20


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers that a user may change."""

    compaction_s: float = 3.0
    """Between compactions, and how much history they leave."""
    ledger_per_second: float = 60.0
    """Updates of the objects whose history is read."""
    reads_per_second: float = 20.0
    """Of history: half of them inside, half outside of what remains."""
    slow_events_per_second: int = 10
    """Events that a slow watcher reads, fewer than there are."""
    slow_watchers: int = 2
    """Watchers that read slowly."""
    runs_per_second: float = 2.0
    """As in tool-fanout."""
    writers: int = 4
    """As in hot-status."""
    rounds_per_second: float = 15.0
    """As in hot-status."""
    apiservers: int = 2
    """Each has a connection, a cache and a watch for every resource."""


PRESETS: Mapping[str, Parameters] = {
    "xs": Parameters(),
    "s": Parameters(compaction_s=10.0, runs_per_second=6.0, rounds_per_second=30.0),
    "m": Parameters(compaction_s=30.0, runs_per_second=30.0, writers=16, apiservers=3),
    "l": Parameters(compaction_s=300.0, runs_per_second=100.0, writers=64, apiservers=3),
}


def schedule(parameters: Parameters, duration_us: int, draw: random.Random) -> Plan:
    """The ledgers and their readers, compactors, and the two storms beside them."""
    churn = Plan(
        duration_us=duration_us,
        warm_up_us=duration_us // timing.WARM_UP_PARTS,
        apiservers=parameters.apiservers,
        resources=(LEDGER_PREFIX,),
        preload=tuple(Object(_ledger(n), LEDGER_SHAPE, LEDGER_BYTES) for n in range(LEDGERS)),
        actors=(
            *_compactors(parameters, duration_us),
            *_writers(parameters, duration_us, draw),
            *_readers(parameters, duration_us, draw),
        ),
        watchers=tuple(
            Watcher(
                f"slow-{number}",
                LEDGER_PREFIX,
                events_per_second=parameters.slow_events_per_second,
            )
            for number in range(parameters.slow_watchers)
        ),
    )
    return churn.beside(_load(parameters, duration_us, draw))


def _load(parameters: Parameters, duration_us: int, draw: random.Random) -> Plan:
    """Runs without the few that grow too large, which have their own storm, and a hot object."""
    runs = tool_fanout.Parameters(
        runs_per_second=parameters.runs_per_second,
        grown=0,
        oversize=0,
        apiservers=parameters.apiservers,
    )
    hot = hot_status.Parameters(
        writers=parameters.writers,
        rounds_per_second=parameters.rounds_per_second,
        others_per_second=2 * parameters.rounds_per_second,
        apiservers=parameters.apiservers,
    )
    load = tool_fanout.schedule(runs, duration_us, draw)
    return load.beside(hot_status.schedule(hot, duration_us, draw))


def _ledger(number: int) -> bytes:
    return objects.key(LEDGER_PREFIX, objects.tenant(number), f"ledger-{number:03}")


def _compactors(parameters: Parameters, duration_us: int) -> Iterator[Actor]:
    """One in each apiserver, all at the same times, as wall clocks have it."""
    interval_us = _interval_us(parameters)
    for number in range(parameters.apiservers):
        steps = tuple(
            Step(Verb.COMPACT, objects.COMPACT_REV_KEY, "apiserver.compact", due_us)
            for due_us in range(interval_us // 6, duration_us, interval_us)
        )
        yield Actor(f"compactor-{number}", number, steps)


def _interval_us(parameters: Parameters) -> int:
    return max(1, int(parameters.compaction_s * MICROSECONDS))


def _writers(parameters: Parameters, duration_us: int, draw: random.Random) -> Iterator[Actor]:
    """Each ledger has one, so that its versions come without conflicts."""
    rate = parameters.ledger_per_second / LEDGERS
    for number in range(LEDGERS):
        step = objects.update(_ledger(number), "ledger.count", LEDGER_SHAPE, LEDGER_BYTES)
        times = timing.arrivals(rate, 0, duration_us, draw)
        steps = tuple(step._replace(due_us=due_us, edit=Edit.INCREMENT) for due_us in times)
        if steps:
            yield Actor(f"ledger-{number}", number % parameters.apiservers, steps)


def _readers(parameters: Parameters, duration_us: int, draw: random.Random) -> Iterator[Actor]:
    """One for each read: history of half an interval, or of three.

    Plans cannot know which of them will be refused: compactions may be late.
    """
    interval_us = _interval_us(parameters)
    for number, due_us in enumerate(
        timing.arrivals(parameters.reads_per_second, interval_us, duration_us, draw)
    ):
        inside = draw.random() < 0.5 or due_us < 4 * interval_us
        age = draw.uniform(0.1, 0.9) if inside else draw.uniform(2.2, 3.9)
        role = "history.inside" if inside else "history.outside"
        step = Step(
            Verb.READ_AT, _ledger(draw.randrange(LEDGERS)), role, due_us, int(age * interval_us)
        )
        yield Actor(f"history-{number}", draw.randrange(parameters.apiservers), (step,))


# Checks.


_REFUSED = "A read at a revision that had been compacted before is refused as etcd does it."
_SHOWN = "A read at a revision that nobody can have compacted is answered."


def checks(records: Records, parameters: Parameters) -> list[Verdict]:
    """History is refused below compactions and only there; slow watchers are told."""
    return [*_history(records), _slow(records)]


def _compactions(records: Records) -> Frame:
    """Calls of Compact; the Txns that decide who makes them ask for no revision."""
    ops = timing.planned(records)
    return ops.where((ops["verb"] == Verb.COMPACT) & (ops["at"] > 0))


def _history(records: Records) -> list[Verdict]:
    """Reads at a revision, against the compactions that are certain and those that are possible."""
    ops = timing.planned(records)
    reads = ops.where((ops["verb"] == Verb.READ_AT) & (ops["at"] > 0) & (ops["done"] >= 0))
    compactions = _compactions(records)
    certain = compactions.where(compactions["outcome"] == Outcome.OK)
    possible = compactions.where(compactions["outcome"] != Outcome.REFUSED)
    below = _reached(certain["done"], certain["at"], reads["sent"])
    above = _reached(possible["sent"], possible["at"], reads["done"])
    compacted, kept = reads["at"] < below, reads["at"] >= above
    refused = (reads["outcome"] == Outcome.REFUSED) & (reads["code"] == OUT_OF_RANGE)
    shown = reads["outcome"] == Outcome.OK
    other = (reads["outcome"] == Outcome.REFUSED) & ~refused
    verdicts = []
    for what, chosen, wrong, rule in (
        ("compacted history is refused", compacted, shown | other, _REFUSED),
        ("kept history is shown", kept, refused | other, _SHOWN),
    ):
        evidence = [_read(reads, row, below, above) for row in np.flatnonzero(chosen & wrong)]
        count, lacking = int(chosen.sum()), "nobody read such a revision"
        verdicts.append(verdict(f"{NAME}: {what}", count, evidence, rule=rule, lacking=lacking))
    return verdicts


def _reached(
    times: NDArray[np.int64], revisions: NDArray[np.int64], until: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The highest revision with a time before ``until``; 0: there is none."""
    order = np.argsort(times, kind="stable")
    highest = np.append(0, np.maximum.accumulate(revisions[order]))
    found: NDArray[np.int64] = highest[np.searchsorted(times[order], until)]
    return found


def _read(reads: Frame, row: np.intp, below: NDArray[np.int64], above: NDArray[np.int64]) -> str:
    key = reads.text("key")[int(reads["key"][row])].decode()
    answer = f"code {reads['code'][row]}" if reads["code"][row] else "shown"
    return (
        f"read {reads['op'][row]} of {key} at {reads['at'][row]}: {answer}; {below[row]} was "
        f"compacted before it, at most {above[row]} until its answer"
    )


def _slow(records: Records) -> Verdict:
    """A watcher that reads slowly gets on, or is told that history was compacted."""
    watches, messages = records.frame(WATCHES), records.frame(MESSAGES)
    slow = watches.where(watches["slow"] > 0)
    evidence = []
    for row in range(len(slow)):
        own = messages.where(messages["watch"] == slow["watch"][row])
        wrong = _left(records, slow, row, own.where(np.argsort(own["message"])))
        if wrong:
            name = slow.text("name")[int(slow["name"][row])].decode()
            evidence.append(f"{name}: {wrong}")
    rule, lacking = rule_of(_slow), "no watcher reads slowly"
    return verdict(
        f"{NAME}: slow watchers are told",
        len(slow),
        evidence,
        rule=rule,
        lacking=lacking,
        timed=True,
    )


def _left(records: Records, slow: Frame, row: int, own: Frame) -> str:
    """How one slow watch was left without a word; empty: it was not."""
    if slow["code"][row] >= 0 and not (own["kind"] == MessageKind.CANCELED).any():
        return ""  # its connection was lost, and another watch goes on for it
    if not len(own):
        return "it was never answered"
    last = own.where(own["message"] == own["message"][-1])
    if last["kind"][0] == MessageKind.CANCELED:
        known = last["compact_revision"][0] > 0
        return "" if known else "it was canceled without the revision of a compaction"
    events = records.frame(EVENTS)
    heard = int(events["mod"][events["watch"] == slow["watch"][row]].max(initial=0))
    prefix = slow.text("key")[int(slow["key"][row])]
    newest = int(events["mod"][timing.begins(events, "key", prefix)].max(initial=0))
    busy_us = int(last["events"][0]) * MICROSECONDS // int(slow["slow"][row])
    idle_us = records.facts["finished_us"] - int(last["received"][0]) - busy_us
    if heard < newest and idle_us > STALL_US:
        return f"heard nothing after {heard} for {idle_us} us, others heard up to {newest}"
    return ""


# Measures.


def measures(records: Records, parameters: Parameters) -> dict[str, float]:
    """What writers feel of compactions, and what these leave on the disk."""
    compactions = _compactions(records)
    ops = timing.warm(records, timing.planned(records))
    writes = ops.where(timing.is_verb(ops, WRITES))
    took = timing.latencies_us(records, writes)
    ends = np.maximum(compactions["done"], compactions["sent"]) + AFTERMATH_US
    during = timing.within(writes["due"], compactions["sent"], ends)
    history = ops.where((ops["verb"] == Verb.READ_AT) & (ops["code"] != OUT_OF_RANGE))
    found = (
        timing.spread("compaction", timing.latencies_us(records, compactions))
        | timing.spread("write_compacting", took[during])
        | timing.ratio("write_compacting_ratio", took[during], took[~during])
        | timing.spread("history_read", timing.latencies_us(records, history))
    )
    samples, final = records.frame(SAMPLES), records.frame(FINAL)
    disk = samples["disk"][samples["disk"] > 0]
    live = sum(len(final.text("value")[code]) for code in final["value"].tolist())
    if len(disk) and live:
        found["disk_peak_mib"] = int(disk.max()) / MEBIBYTE
        found["disk_per_live_ratio"] = int(disk[-1]) / live
    return found
