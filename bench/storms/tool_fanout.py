"""S2 ``tool-fanout``: one agent, k tools at once, and one object that grows with each of them.

Theory: an agent's run is one object R of 3 KB, as a pipeline or a workflow is. It calls k tools
(4, 8, 16 or 64, two in five runs with 4, one in twenty with 64), up to eight at a time, each in a
Pod of its own. Every tool that ends is noted in R's list of steps, so R grows by half a kilobyte
and is rewritten as a whole each time, by whoever comes first: the others lose their comparison,
read, and write again. One run in a hundred grows to 1.2 MB, just below what the store takes, and
one in a thousand tries to write 1.6 MB, which the store must refuse without ending the connection.
A plan has at least one of either.

Writes per run: 10 k + 5, and failed comparisons beside them. For each tool: Pod create, three
status updates, four events, R's entry, Pod delete. For R: create, finalizer, status, finalizer, and
a delete some time after its end.

Asked of the store beyond the common judges: R's list in the end has every acknowledged entry once,
in the order of their revisions, R's counter is the number of its other updates, and its version is
one more than all of them; so too when R is deleted. The refusal of too large a request has etcd's
text, and the connection goes on.
"""

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bench import values
from bench.clock import MICROSECONDS
from bench.plan import Actor, Edit, Plan, Step, Verb, Watcher
from bench.records import EVENTS, EventType, Frame, Outcome, Records
from bench.storms import attempts, objects, timing
from bench.verdicts import Verdict, rule_of, verdict

NAME = "tool-fanout"
SUMMARY = "agents call tools, each a pod, and note every step in one growing object"
RATE = "runs_per_second"

TOOLS = ((4, 40), (8, 40), (16, 15), (64, 5))
"""How many tools a run calls, and the weight of that."""
WIDTH = 8
"""Tools of a run that work at the same time."""
TOOL_US = 800_000
"""How long a tool works, give or take half of it."""
ENTRY = "run.entry"
GROWN_ENTRY = "run.large-entry"
OVERSIZE = "run.oversize"
GROWN_BYTES, OVERSIZE_BYTES = 1_200_000, 1_600_000
INVALID_ARGUMENT, DEADLINE_EXCEEDED = 3, 4
TOO_LARGE = b"etcdserver: request is too large"


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers that a user may change."""

    runs_per_second: float = 4.0
    """Runs that begin, on average; each writes 10 k + 5 times for its k tools."""
    tenants: int = 10
    """Namespaces that runs are spread over."""
    grown: float = 0.01
    """Part of the runs whose object R grows to 1.2 MB; at least one does, unless it is 0."""
    oversize: float = 0.001
    """Part of the runs whose R tries 1.6 MB, which is refused; at least one, unless it is 0."""
    keep_s: float = 8.0
    """From a run's end to the deletion of R."""
    apiservers: int = 2
    """Each has a connection, a cache and a watch for every resource."""


PRESETS: Mapping[str, Parameters] = {
    "xs": Parameters(),
    "s": Parameters(runs_per_second=10.0, tenants=20, keep_s=60.0),
    "m": Parameters(runs_per_second=40.0, tenants=100, keep_s=60.0, apiservers=3),
    "l": Parameters(runs_per_second=150.0, tenants=400, keep_s=60.0, apiservers=3),
}


class _Run(NamedTuple):
    """One run of an agent, as it is drawn."""

    name: str
    namespace: str
    begin_us: int
    tools: int
    is_grown: bool
    is_oversize: bool

    @property
    def key(self) -> bytes:
        return objects.key(objects.RUNS, self.namespace, self.name)

    @property
    def end_us(self) -> int:
        """When the last tool should have ended."""
        return self.begin_us + (-(-self.tools // WIDTH) + 1) * TOOL_US * 3 // 2


def schedule(parameters: Parameters, duration_us: int, draw: random.Random) -> Plan:
    """Runs at Poisson times; what a run begins before the load ends is finished."""
    return Plan(
        duration_us=duration_us,
        warm_up_us=duration_us // 10,
        apiservers=parameters.apiservers,
        resources=(objects.PODS, objects.RUNS),
        actors=tuple(
            actor
            for run in _runs(parameters, duration_us, draw)
            for actor in _actors(run, parameters, duration_us, draw)
        ),
        watchers=(Watcher("events", objects.EVENTS),),
    )


def _runs(parameters: Parameters, duration_us: int, draw: random.Random) -> list[_Run]:
    times = list(timing.arrivals(parameters.runs_per_second, 0, duration_us, draw))
    counts, weights = zip(*TOOLS, strict=True)
    tools = draw.choices(counts, weights, k=len(times))
    # What is rare is drawn from the first half, so that it happens within the load, and of the
    # runs with few tools, so that a grown one is rewritten a few times and not 64 times.
    rare = [n for n, at in enumerate(times) if at < duration_us // 2 and tools[n] <= WIDTH]
    grown = _some(parameters.grown, len(times), rare, draw)
    oversize = _some(parameters.oversize, len(times), rare, draw)
    return [
        _Run(
            f"agent-run-{n:06}-{objects.suffix(draw)}",
            objects.tenant(draw.randrange(parameters.tenants)),
            at_us,
            tools[n],
            is_grown=n in grown,
            is_oversize=n in oversize,
        )
        for n, at_us in enumerate(times)
    ]


def _some(share: float, of: int, among: list[int], draw: random.Random) -> set[int]:
    """A share of ``of`` runs, at least one, of those that may be chosen; none of a share of 0."""
    wanted = max(1, round(of * share)) if share else 0
    return set(draw.sample(among, min(wanted, len(among))))


def _actors(
    run: _Run, parameters: Parameters, duration_us: int, draw: random.Random
) -> Iterator[Actor]:
    """R's own controller, and one for every tool."""
    apiserver = draw.randrange(parameters.apiservers)
    yield Actor(run.name, apiserver, tuple(_life(run, parameters, duration_us)))
    for number in range(run.tools):
        apiserver = draw.randrange(parameters.apiservers)
        begin_us = run.begin_us + 100_000 + number // WIDTH * TOOL_US * 3 // 2
        begin_us += draw.randrange(100_000)
        if begin_us < duration_us:
            work_us = draw.randrange(TOOL_US // 2, TOOL_US * 3 // 2)
            name = f"{run.name}-tool-{number:02}"
            yield Actor(name, apiserver, tuple(_tool(run, name, begin_us, work_us)))


def _life(run: _Run, parameters: Parameters, duration_us: int) -> Iterator[Step]:
    """R itself; updates count up, so that they keep the steps that are listed."""

    def counted(role: str, due_us: int = -1) -> Step:
        step = objects.update(run.key, role, "run", objects.RUN_BYTES)
        return step._replace(edit=Edit.INCREMENT, due_us=due_us)

    create = objects.create(run.key, "run.create", "run", objects.RUN_BYTES)
    yield create._replace(due_us=run.begin_us)
    yield counted("run.finalizer")
    if run.is_oversize:
        step = objects.update(run.key, OVERSIZE, "run", OVERSIZE_BYTES, think_us=500_000)
        yield step._replace(refusal=INVALID_ARGUMENT)
    if run.end_us < duration_us:
        yield counted("run.status", run.end_us)
        yield counted("run.finalizer")
    delete_us = run.end_us + int(parameters.keep_s * MICROSECONDS)
    if delete_us < duration_us:
        yield objects.delete(run.key, "run.delete")._replace(due_us=delete_us)


def _tool(run: _Run, name: str, begin_us: int, work_us: int) -> Iterator[Step]:
    """One Pod from its creation to its deletion, and its entry in R's list."""
    pod = objects.key(objects.PODS, run.namespace, name)
    grown = run.is_grown
    entry_bytes = GROWN_BYTES // run.tools if grown else objects.RUN_ENTRY_BYTES

    def reported(think_us: int = 1_000) -> Step:
        return objects.update(pod, "pod.status", "pod", objects.POD_READY_BYTES, think_us=think_us)

    create = objects.create(pod, "pod.create", "pod", objects.POD_NEW_BYTES)
    yield create._replace(due_us=begin_us)
    yield objects.event(run.namespace, name, "Scheduled", think_us=1_000)
    yield reported()
    yield objects.event(run.namespace, name, "Pulled", think_us=20_000)
    yield objects.event(run.namespace, name, "Created")
    yield objects.event(run.namespace, name, "Started")
    yield reported()
    yield reported(work_us)
    entry = objects.update(run.key, GROWN_ENTRY if grown else ENTRY, "run", entry_bytes)
    yield entry._replace(edit=Edit.APPEND, think_us=1_000)
    yield objects.delete(pod, "pod.delete", think_us=5_000)


# Checks.


def checks(records: Records, parameters: Parameters) -> list[Verdict]:
    """No entry is lost, and what is too large is refused as etcd does it."""
    ops = timing.planned(records)
    mine = ops.where(timing.begins(ops, "role", b"run."))
    return [_entries(records, mine), _refusals(records, ops)]


class _Written(NamedTuple):
    """What was written to one R."""

    entries: list[str]
    """Acknowledged ones, in the order of their revisions."""
    counted: int
    """Acknowledged updates beside them."""
    unsure_entries: frozenset[str]
    unsure: int
    """Updates of either kind that may have been made or not."""


def _written(ops: Frame) -> Mapping[bytes, _Written]:
    """By key, for every R whose creation was acknowledged."""
    ops = ops.where(np.argsort(ops["revision"], kind="stable"))
    keys, roles = ops.text("key"), ops.text("role")
    done, unsure = attempts.written(ops).tolist(), attempts.unsure(ops).tolist()
    columns = (ops[name].tolist() for name in ("key", "role", "verb", "actor", "step"))
    created: set[bytes] = set()
    entries: dict[bytes, list[str]] = {}
    doubtful: dict[bytes, list[str]] = {}
    counted: Counter[bytes] = Counter()
    doubts: Counter[bytes] = Counter()
    entry_roles = (ENTRY.encode(), GROWN_ENTRY.encode())
    for row, (code, role, verb, actor, step) in enumerate(zip(*columns, strict=True)):
        key = keys[code]
        is_entry = roles[role] in entry_roles
        if verb == Verb.CREATE and done[row]:
            created.add(key)
        elif verb == Verb.UPDATE and done[row] and is_entry:
            entries.setdefault(key, []).append(f"{actor}.{step}")
        elif verb == Verb.UPDATE and done[row]:
            counted[key] += 1
        elif verb == Verb.UPDATE and unsure[row]:
            doubts[key] += 1
            if is_entry:
                doubtful.setdefault(key, []).append(f"{actor}.{step}")
    return {
        key: _Written(
            entries.get(key, []), counted[key], frozenset(doubtful.get(key, ())), doubts[key]
        )
        for key in created
    }


def _entries(records: Records, ops: Frame) -> Verdict:
    """Every run's object, in the end or when it was deleted, is the sum of its updates."""
    written = _written(ops)
    evidence: list[str] = []
    checked = 0
    for key, (version, value) in attempts.final_values(records).items():
        if key in written:
            checked += 1
            evidence += _wrong(key.decode(), written[key], version, value)
    events = records.frame(EVENTS)
    gone = events.where((events["type"] == EventType.DELETE) & (events["prev_version"] > 0))
    gone = gone.where(timing.begins(gone, "key", objects.RUNS))
    keys = gone.text("key")
    for code, version in {*zip(gone["key"].tolist(), gone["prev_version"].tolist(), strict=True)}:
        known = written.get(keys[code])
        if known is not None:
            checked += 1
            evidence += _wrong_version(f"{keys[code].decode()}, deleted,", known, version)
    rule, lacking = rule_of(_entries), "no run's object was acknowledged and seen again"
    return verdict(f"{NAME}: every step once", checked, evidence, rule=rule, lacking=lacking)


def _wrong(key: str, written: _Written, version: int, value: bytes) -> Iterator[str]:
    """What an R holds that it should not, or lacks."""
    found = values.entries(value)
    lost = sorted(set(written.entries) - set(found))
    foreign = sorted(set(found) - set(written.entries) - written.unsure_entries)
    twice = sorted(name for name, count in Counter(found).items() if count > 1)
    for names, what in ((lost, "lacks acknowledged"), (foreign, "has"), (twice, "repeats")):
        if names:
            yield f"{key} {what} entries {', '.join(names[:5])} ({len(names)} of {len(found)})"
    known = [name for name in found if name not in written.unsure_entries]
    if not (lost or foreign or twice) and known != written.entries:
        yield f"{key} has its entries as {known[:5]}, revisions say {written.entries[:5]}"
    count = values.count_of(value)
    if not written.counted <= count <= written.counted + written.unsure:
        yield f"{key} counts {count} updates; acknowledged were {written.counted}"
    yield from _wrong_version(key, written, version)


def _wrong_version(key: str, written: _Written, version: int) -> Iterator[str]:
    least = 1 + len(written.entries) + written.counted
    if not least <= version <= least + written.unsure:
        yield f"{key} has version {version}; created and updated it was {least} times"


def _refusals(records: Records, ops: Frame) -> Verdict:
    """Too large a request is refused in etcd's words, and its connection lives on."""
    too_large = ops.where(timing.begins(ops, "role", OVERSIZE.encode()) & (ops["refusal"] > 0))
    too_large = too_large.where(too_large["code"] != DEADLINE_EXCEEDED)
    messages, keys = too_large.text("message"), too_large.text("key")
    evidence = []
    names = ("actor", "step", "connection", "code", "message", "key")
    columns = (too_large[name].tolist() for name in names)
    for actor, step, connection, code, message, key in zip(*columns, strict=True):
        told = f"{keys[key].decode()} with {OVERSIZE_BYTES} bytes"
        if (code, messages[message]) != (INVALID_ARGUMENT, TOO_LARGE):
            text = messages[message].decode()
            evidence.append(f"{told} was answered by code {code}, {text!r}")
        after = ops.where((ops["actor"] == actor) & (ops["step"] == step + 1))
        if attempts.is_calm(records) and len(after) and after["connection"][0] != connection:
            evidence.append(f"{told} ended connection {connection}")
    rule, lacking = rule_of(_refusals), "nothing too large was sent"
    return verdict(
        f"{NAME}: too large is refused", len(too_large), evidence, rule=rule, lacking=lacking
    )


# Measures.


def measures(records: Records, parameters: Parameters) -> dict[str, float]:
    """What noting a step costs when others note theirs, and what large objects cost."""
    ops = timing.warm(records, timing.planned(records))
    steps = attempts.steps(ops)
    entries = steps.where(timing.begins(steps, "role", ENTRY.encode()))
    large = steps.where(timing.begins(steps, "role", GROWN_ENTRY.encode()))
    figures = timing.spread("entry", timing.latencies_us(records, entries))
    figures |= timing.spread("large_entry", timing.latencies_us(records, large))
    noted = int(attempts.written(entries).sum())
    if noted:
        figures["attempts_per_entry"] = (int(entries["conflicts"].sum()) + noted) / noted
        figures["entries_given_up"] = float((entries["outcome"] == Outcome.CONFLICT).sum())
    return figures
