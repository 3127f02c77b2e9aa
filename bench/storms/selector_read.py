"""S9 ``selector-read``: objects of six kinds are created, then whole kinds are listed.

Theory: a label selector is nothing that etcd knows. Whatever a client selects by, the store is
asked for the whole prefix of the kind and the apiserver throws away what does not match. So the
price of a selector is that of a full list, and stores on SQL are advertised by just this test
(HariKube's k6 script: create six kinds, then select from each).

Phase 1 creates ``objects_per_kind`` of each kind at Poisson times in the first half of the run, as
actors of one write each. Phase 2 lists whole kinds in pages of ``page_objects``, one kind after the
other, at Poisson times. Writes: exactly one per object, none else: 6 x ``objects_per_kind``.

Asked of the store beyond the common judges, by counting alone, without a history: as nothing is
deleted here, a list shows at least what was acknowledged before it was asked for and at most what
had been sent before its last page came, and no page or count disagrees with the others.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from bench.plan import Actor, Plan, Step, Verb
from bench.records import ITEMS, Frame, Outcome, Records
from bench.storms import objects, timing
from bench.verdicts import Verdict, rule_of, verdict

NAME = "selector-read"
SUMMARY = "creates six kinds, then lists whole kinds as selectors make apiservers do"
RATE = "lists_per_second"

KINDS = (
    (objects.PODS, "pod", objects.POD_NEW_BYTES),
    (objects.CONFIG_MAPS, "configmap", 2_000),
    (objects.SANDBOXES, "sandbox", objects.SANDBOX_NEW_BYTES),
    (objects.CLAIMS, "claim", objects.CLAIM_READY_BYTES),
    (objects.POOLS, "pool", objects.POOL_BYTES),
    (objects.RUNS, "run", objects.RUN_BYTES),
)
"""Prefix, shape and size of each kind."""
TENANTS = 20


@dataclass(frozen=True, slots=True)
class Parameters:
    """Numbers that a user may change."""

    objects_per_kind: int = 900
    """Objects of each of six kinds that are created."""
    lists_per_second: float = 8.0
    """Lists of a whole kind, in the second half."""
    page_objects: int = 500
    """Objects of one page of a list."""
    apiservers: int = 2
    """Each has a connection, a cache and a watch for every resource."""


PRESETS: Mapping[str, Parameters] = {
    "xs": Parameters(),
    "s": Parameters(objects_per_kind=10_000, lists_per_second=4.0),
    "m": Parameters(objects_per_kind=50_000, lists_per_second=4.0, apiservers=3),
    "l": Parameters(objects_per_kind=150_000, lists_per_second=4.0, apiservers=3),
}


def schedule(parameters: Parameters, duration_us: int, draw: random.Random) -> Plan:
    """Creations in the first half, lists in the second."""
    half_us = duration_us // 2
    return Plan(
        duration_us=duration_us,
        warm_up_us=duration_us // timing.WARM_UP_PARTS,
        apiservers=parameters.apiservers,
        resources=tuple(prefix for prefix, _, _ in KINDS),
        actors=(*_creations(parameters, half_us, draw), *_lists(parameters, duration_us, draw)),
    )


def _creations(parameters: Parameters, until_us: int, draw: random.Random) -> Iterator[Actor]:
    """One actor per object: a fixed number at uniform times is Poisson once the number is given."""
    for prefix, shape, size in KINDS:
        for number in range(parameters.objects_per_kind):
            name = f"{shape}-{number:06}"
            key = objects.key(prefix, objects.tenant(number % TENANTS), name)
            due_us = draw.randrange(until_us)
            step = Step(Verb.CREATE, key, f"{shape}.create", due_us, shape=shape, size=size)
            yield Actor(name, draw.randrange(parameters.apiservers), (step,))


def _lists(parameters: Parameters, duration_us: int, draw: random.Random) -> Iterator[Actor]:
    """Kind after kind; the first meet the last creations."""
    times = timing.arrivals(parameters.lists_per_second, duration_us // 2, duration_us, draw)
    for number, due_us in enumerate(times):
        prefix, shape, _ = KINDS[number % len(KINDS)]
        step = Step(Verb.LIST, prefix, f"{shape}.list", due_us, limit=parameters.page_objects)
        yield Actor(f"select-{number}", draw.randrange(parameters.apiservers), (step,))


@dataclass(frozen=True, slots=True)
class Listed:
    """One whole list: its rows are pages, in their order."""

    pages: Frame
    shown: int
    is_whole: bool
    """All pages were answered."""

    @property
    def prefix(self) -> bytes:
        """What was listed."""
        return self.pages.text("key")[int(self.pages["key"][0])]

    @property
    def took_us(self) -> int:
        """From when it was due until its last page came."""
        return int(self.pages["done"][-1] - self.pages["due"][0])


def _listed(records: Records) -> list[Listed]:
    """All lists that were asked for."""
    ops = timing.planned(records)
    ops = ops.where((ops["verb"] == Verb.LIST) & timing.begins(ops, "key", *_prefixes()))
    ops = ops.where(np.lexsort((ops["attempt"], ops["step"], ops["actor"])))
    items = np.sort(records.frame(ITEMS)["op"])
    shown = np.searchsorted(items, ops["op"], "right") - np.searchsorted(items, ops["op"], "left")
    edges = np.flatnonzero(np.diff(ops["actor"]) | np.diff(ops["step"])) + 1
    parts = np.split(np.arange(len(ops)), edges) if len(ops) else []
    whole = ops["outcome"] == Outcome.OK
    return [
        Listed(ops.where(part), int(shown[part].sum()), bool(whole[part].all())) for part in parts
    ]


def _prefixes() -> tuple[bytes, ...]:
    return tuple(prefix for prefix, _, _ in KINDS)


def checks(records: Records, parameters: Parameters) -> list[Verdict]:
    """Every list shows all objects that were there throughout, and its count is what it shows."""
    listed = [each for each in _listed(records) if each.is_whole]
    ops = timing.planned(records)
    creates = ops.where(ops["verb"] == Verb.CREATE)
    evidence: list[str] = []
    for prefix in _prefixes():
        of_kind = creates.where(timing.begins(creates, "key", prefix))
        done = np.sort(of_kind["done"][of_kind["outcome"] == Outcome.OK])
        sent = np.sort(of_kind["sent"][of_kind["outcome"] != Outcome.REFUSED])
        for each in (each for each in listed if each.prefix == prefix):
            least = int(np.searchsorted(done, each.pages["sent"][0]))
            most = int(np.searchsorted(sent, each.pages["done"][-1], "right"))
            evidence += _wrong(each, least, most)
    rule, lacking = rule_of(checks), "no list was answered whole"
    return [verdict(f"{NAME}: lists are whole", len(listed), evidence, rule=rule, lacking=lacking)]


def _wrong(listed: Listed, least: int, most: int) -> Iterator[str]:
    """What one list shows that cannot be."""
    pages = listed.pages
    what = f"list {int(pages['op'][0])} of {listed.prefix.decode()}"
    if not least <= listed.shown <= most:
        yield f"{what} shows {listed.shown} objects, there were {least} to {most}"
    elif int(pages["count"][0]) != listed.shown:
        yield f"{what} shows {listed.shown} objects, its count says {int(pages['count'][0])}"


def measures(records: Records, parameters: Parameters) -> dict[str, float]:
    """What whole lists and the creations before them cost."""
    listed = _listed(records)
    timeout_us = records.facts["timeout_us"]
    took = np.array(
        [each.took_us if each.is_whole else max(each.took_us, timeout_us) for each in listed],
        np.int64,
    )
    ops = timing.warm(records, timing.planned(records))
    creates = ops.where(ops["verb"] == Verb.CREATE)
    creates = creates.where(timing.begins(creates, "key", *_prefixes()))
    found = timing.spread("list", took) | timing.spread(
        "create", timing.latencies_us(records, creates)
    )
    total = sum(each.shown for each in listed)
    if total:
        found["listed_object_us"] = float(took.sum()) / total
    return found
