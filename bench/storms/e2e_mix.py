"""S10 ``e2e-mix``: the mix of calls that Kubernetes' own end-to-end tests make, as calibration.

Theory: traces of those tests on a real cluster count 62 % Range, 32 % Txn, 5 % Watch and 1 % other
calls: many tests side by side, each in a namespace of its own where it makes a few objects, reads
them again and again, lists, counts, changes and deletes them. Churn of agents is nothing like it
(nearly all Txn, reads served by the apiservers' caches); whoever tunes a store for this mix tunes
it for test suites. It is here to tell the two apart.

A test is one actor of 95 calls in its namespace: 8 objects, each created, updated twice and
deleted (32 Txns); 62 Ranges (a GET of an object of its own, a LIST or COUNT of its namespace, a
GET of a resource's bare name, by which apiservers ask for the newest revision); one Status. Five
watchers of the namespace make it 100. Plans know no watcher that comes later, so these are there
from the start, and no more than ``watchers_max`` in all; beyond that a test has none and the mix
is 65 / 34 / 0 / 1. Tests arrive as a Poisson process and think between their calls. Writes: 32 per
test.

Asked of the store beyond the common judges: one client alone in its namespace must see the world
as it left it. Each GET gives the revision of its last write, each list and count the number of
objects that it has there. That is linearizability of a single writer, told without a history.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from bench.plan import WRITES, Actor, Plan, Start, Step, Verb, Watcher
from bench.records import ITEMS, Frame, Outcome, Records
from bench.storms import objects, timing
from bench.verdicts import Verdict, verdict

NAME = "e2e-mix"
SUMMARY = "the calls of end-to-end tests: 62 % reads, 32 % writes, 5 % watches"
RATE = "tests_per_second"

RESOURCES = (
    (objects.PODS, "pod", objects.POD_NEW_BYTES),
    (objects.CONFIG_MAPS, "configmap", 2_000),
    (b"/registry/services/endpoints/", "endpoints", 1_000),
    (objects.LEASES, "lease", objects.LEASE_BYTES),
    (objects.RUNS, "run", objects.RUN_BYTES),
)
"""Prefix, shape and size; a test has objects and watchers of each."""
OBJECTS_PER_TEST = 8
READS_PER_TEST = 62
PAGE_OBJECTS = 500
OWN = b"e2e."
"""Roles of a test's calls begin with it."""
_READS = ("get",) * 6 + ("list",) * 2 + ("count", "probe")


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers that a user may change."""

    tests_per_second: float = 3.0
    """Tests that begin, on average; each makes 95 calls."""
    think_ms: float = 60.0
    """Between two calls of a test, on average."""
    watchers_max: int = 250
    """Watchers in all, five for each test while there are any left."""
    apiservers: int = 2
    """Each has a connection, a cache and a watch for every resource."""


PRESETS: Mapping[str, Parameters] = {
    "xs": Parameters(),
    "s": Parameters(tests_per_second=5.0, watchers_max=500),
    "m": Parameters(tests_per_second=20.0, watchers_max=1_000, apiservers=3),
    "l": Parameters(tests_per_second=60.0, watchers_max=1_000, apiservers=3),
}


def schedule(parameters: Parameters, duration_us: int, draw: random.Random) -> Plan:
    """Tests at Poisson times, each with watchers while there are any left."""
    actors: list[Actor] = []
    watchers: list[Watcher] = []
    for due_us in timing.arrivals(parameters.tests_per_second, 0, duration_us, draw):
        name = f"e2e-{len(actors):05d}"
        steps = tuple(_test(name.encode(), due_us, parameters.think_ms, draw))
        actors.append(Actor(name, draw.randrange(parameters.apiservers), steps))
        if len(watchers) + len(RESOURCES) <= parameters.watchers_max:
            watchers += _watchers(name)
    return Plan(
        duration_us=duration_us,
        warm_up_us=duration_us // timing.WARM_UP_PARTS,
        apiservers=parameters.apiservers,
        resources=tuple(prefix for prefix, _, _ in RESOURCES),
        actors=tuple(actors),
        watchers=tuple(watchers),
    )


def _watchers(test: str) -> Iterator[Watcher]:
    """One of each resource in the test's namespace."""
    for prefix, shape, _ in RESOURCES:
        yield Watcher(f"{test}-{shape}", b"%b%b/" % (prefix, test.encode()), Start.NOW)


def _test(test: bytes, due_us: int, think_ms: float, draw: random.Random) -> Iterator[Step]:
    """All calls of one test; every object is in place before it is read, changed or deleted."""
    owned = [
        (prefix, b"%b%b/object-%d" % (prefix, test, number), shape, size)
        for number in range(OBJECTS_PER_TEST)
        for prefix, shape, size in (RESOURCES[number % len(RESOURCES)],)
    ]
    writes = _shuffled(owned, draw)
    reads = READS_PER_TEST
    alive: list[tuple[bytes, bytes]] = []
    for number, (verb, (prefix, key, shape, size)) in enumerate(writes):
        step = Step(verb, key, f"e2e.{verb.name.lower()}", think_us=_think_us(think_ms, draw))
        if verb != Verb.DELETE:
            step = step._replace(shape=shape, size=size)
        yield step if number else step._replace(due_us=due_us)
        if verb == Verb.CREATE:
            alive.append((prefix, key))
        elif verb == Verb.DELETE:
            alive.remove((prefix, key))
        for _ in range(-(-reads // (len(writes) - number))):
            yield _read(
                draw.choice(alive or [(prefix, key)]), test, _think_us(think_ms, draw), draw
            )
            reads -= 1
    yield Step(Verb.STATUS, b"", "e2e.status", think_us=_think_us(think_ms, draw))


def _think_us(think_ms: float, draw: random.Random) -> int:
    return int(draw.expovariate(1 / think_ms) * 1000)


_Write = tuple[Verb, tuple[bytes, bytes, str, int]]


def _shuffled(owned: list[tuple[bytes, bytes, str, int]], draw: random.Random) -> list[_Write]:
    """A random merge of the objects' lives, each in its own order."""
    lives = [[(verb, each) for verb in _LIFE] for each in owned]
    merged: list[_Write] = []
    while lives:
        life = draw.choice(lives)
        merged.append(life.pop(0))
        if not life:
            lives.remove(life)
    return merged


_LIFE = (Verb.CREATE, Verb.UPDATE, Verb.UPDATE, Verb.DELETE)


def _read(of: tuple[bytes, bytes], test: bytes, think_us: int, draw: random.Random) -> Step:
    """One Range, of an object or of what surrounds it."""
    prefix, key = of
    kind = draw.choice(_READS)
    if kind == "list":
        namespace = b"%b%b/" % (prefix, test)
        return Step(Verb.LIST, namespace, "e2e.list", think_us=think_us, limit=PAGE_OBJECTS)
    if kind == "count":
        return Step(Verb.COUNT, b"%b%b/" % (prefix, test), "e2e.count", think_us=think_us)
    if kind == "probe":
        return Step(Verb.GET, prefix.rstrip(b"/"), "revision.probe", think_us=think_us)
    return Step(Verb.GET, key, "e2e.get", think_us=think_us)


def checks(records: Records, parameters: Parameters) -> list[Verdict]:
    """What each test sees of its own namespace."""
    found: dict[Verb, list[str]] = {Verb.GET: [], Verb.LIST: []}
    for verb, wrong in _seen(records):
        found[Verb.GET if verb == Verb.GET else Verb.LIST].append(wrong)
    return [
        verdict(
            f"{NAME}: {what}",
            len(found[verb]),
            [wrong for wrong in found[verb] if wrong],
            rule=rule,
            lacking="no test read its own namespace",
        )
        for verb, what, rule in (
            (Verb.GET, "own writes are read", "A test reads the last write of its own object."),
            (Verb.LIST, "own lists are exact", "A test lists and counts its own objects exactly."),
        )
    ]


@dataclass(slots=True)
class _Namespace:
    """What one test knows to be there, call after call."""

    written: dict[bytes, int]
    """Revision of the last write of each key; 0: deleted."""
    doubtful: set[bytes]
    """Keys whose last write may have happened or not."""

    def write(self, verb: int, key: bytes, outcome: int, revision: int) -> None:
        """A write was answered, or given up."""
        if outcome == Outcome.OK:
            self.written[key] = 0 if verb == Verb.DELETE else revision
            self.doubtful.discard(key)
        elif outcome == Outcome.UNKNOWN:
            self.doubtful.add(key)

    def is_known(self, prefix: bytes) -> bool:
        """No key that begins so is doubtful."""
        return not any(key.startswith(prefix) for key in self.doubtful)

    def alive(self, prefix: bytes) -> int:
        """How many objects have keys that begin so."""
        return sum(key.startswith(prefix) and mod > 0 for key, mod in self.written.items())


def _seen(records: Records) -> Iterator[tuple[int, str]]:
    """The verb of each answered read of a test, and what is wrong with it, if anything."""
    ops = timing.planned(records)
    ops = ops.where(timing.begins(ops, "role", OWN))
    ops = ops.where(np.lexsort((ops["op"], ops["step"], ops["actor"])))
    texts = ops.text("key")
    columns = ("op", "actor", "verb", "outcome", "revision", "found", "count", "attempt", "key")
    rows = zip(*(ops[name].tolist() for name in columns), _shown(records, ops), strict=True)
    last = -1
    namespace = _Namespace({}, set())
    for op, actor, verb, outcome, revision, found, count, attempt, code, shown in rows:
        if actor != last:
            last, namespace = actor, _Namespace({}, set())
        key = texts[code]
        if verb in WRITES:
            namespace.write(verb, key, outcome, revision)
        elif outcome != Outcome.OK or attempt or not namespace.is_known(key):
            continue
        elif verb == Verb.GET:
            due = namespace.written.get(key, 0)
            wrong = f"read {op} of {key.decode()} shows revision {found}, last written at {due}"
            yield verb, wrong if found != due else ""
        elif verb in {Verb.LIST, Verb.COUNT}:
            alive = namespace.alive(key)
            told = shown if verb == Verb.LIST else count
            wrong = f"read {op} of {key.decode()} shows {told} objects, there were {alive}"
            yield verb, wrong if told != alive else ""


def _shown(records: Records, ops: Frame) -> list[int]:
    """How many objects each call showed one by one."""
    items = np.sort(records.frame(ITEMS)["op"])
    found = np.searchsorted(items, ops["op"], "right") - np.searchsorted(items, ops["op"], "left")
    return [int(each) for each in found]


def measures(records: Records, parameters: Parameters) -> dict[str, float]:
    """Latencies by kind of call."""
    ops = timing.warm(records, timing.planned(records))
    ops = ops.where(timing.begins(ops, "role", OWN))
    found: dict[str, float] = {}
    for name, verbs in (
        ("get", (Verb.GET,)),
        ("list", (Verb.LIST,)),
        ("count", (Verb.COUNT,)),
        ("txn", WRITES),
    ):
        chosen = ops.where(timing.is_verb(ops, verbs))
        found |= timing.spread(name, timing.latencies_us(records, chosen))
    return found
