"""Which storms there are, and how a user's words become a storm and its parameters."""

import ast
import inspect
import math
import random
from collections.abc import Mapping
from dataclasses import Field, fields, replace
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, TypeVar

from bench.plan import Plan
from bench.records import Records
from bench.storms import (
    apiserver_restart,
    compact_churn,
    e2e_mix,
    event_ttl,
    heartbeat_flood,
    hot_status,
    idle_background,
    noisy_shard,
    selector_read,
    swarm_burst,
    tool_fanout,
)
from bench.verdicts import Verdict

P = TypeVar("P")


class Storm(Protocol[P]):
    """What the module of a storm offers; see the package's text."""

    NAME: str
    SUMMARY: str
    RATE: str
    """The parameter that scales the load, for a search of capacity."""
    PRESETS: Mapping[str, P]

    def schedule(self, parameters: P, duration_us: int, draw: random.Random) -> Plan:
        """Everything that a run will do."""

    def checks(self, records: Records, parameters: P) -> list[Verdict]:
        """What the storm asks beyond the common judges; each tells its rule, and what it lacked."""

    def measures(self, records: Records, parameters: P) -> dict[str, float]:
        """Figures by name, with the unit at the end of it; lower is better."""


_MODULES: tuple[Storm[Any], ...] = (
    idle_background,
    swarm_burst,
    tool_fanout,
    heartbeat_flood,
    hot_status,
    event_ttl,
    apiserver_restart,
    compact_churn,
    noisy_shard,
    selector_read,
    e2e_mix,
)
STORMS: Mapping[str, Storm[Any]] = {module.NAME: module for module in _MODULES}
"""By name."""


class Bounds(NamedTuple):
    """What a parameter may be; both ends are allowed."""

    least: float
    """Above 0 where 0 is no plan: there is nobody to do it, nothing to judge, or no end of it."""
    most: float
    """Of what counts, several times that of preset l: a plan is in memory, all of it."""


_SHARE, _PER_CENT, _DAY_S = Bounds(0, 1), Bounds(0, 100), Bounds(0, 86_400)
BOUNDS: Mapping[str, Bounds] = {
    "agents": Bounds(1, 500_000),
    "apiservers": Bounds(1, 100),
    "bump_share": Bounds(0, 0.99),
    "burst_every_s": Bounds(0.1, 86_400),
    "burst_factor": Bounds(0, 1_000),
    "burst_s": _DAY_S,
    "bystander_per_second": Bounds(0, 50_000),
    "changing": _SHARE,
    "claims": Bounds(1, 100_000),
    "clients_per_namespace": Bounds(0, 1_000),
    "compaction_s": _DAY_S,
    f"{compact_churn.NAME} compaction_s": Bounds(0.1, 86_400),
    "drops": Bounds(0, 1_000),
    "dwell_s": _DAY_S,
    "events_per_second": Bounds(0.1, 50_000),
    "grown": _SHARE,
    "keep_s": _DAY_S,
    "kills": Bounds(0, 100),
    "leaders": _SHARE,
    "ledger_per_second": Bounds(0, 50_000),
    "lists_per_second": Bounds(0, 1_000),
    "namespaces": Bounds(1, 10_000),
    "noise_bytes": Bounds(0, 1_000_000),
    "noise_factor": Bounds(0, 1_000),
    "objects": Bounds(0, 3_000_000),
    "objects_per_kind": Bounds(1, 500_000),
    "others_per_second": Bounds(0, 50_000),
    "outage_s": _DAY_S,
    "oversize": _SHARE,
    "page_objects": Bounds(0, 100_000),
    "racing": _SHARE,
    "reads_per_second": Bounds(0, 50_000),
    "replicas": Bounds(0, 10_000),
    "resume": _PER_CENT,
    "rounds_per_second": Bounds(0, 1_000),
    f"{hot_status.NAME} rounds_per_second": Bounds(0.1, 1_000),
    "runs_per_second": Bounds(0.1, 10_000),
    f"{compact_churn.NAME} runs_per_second": Bounds(0, 10_000),
    "shard_timeout_s": _DAY_S,
    "slow_events_per_second": Bounds(0, 100_000),
    "slow_watchers": Bounds(0, 1_000),
    "stale": _PER_CENT,
    "stopping": _SHARE,
    "tenants": Bounds(1, 10_000),
    "tests_per_second": Bounds(0.1, 1_000),
    "think_ms": Bounds(0.1, 3_600_000),
    "ttl_s": Bounds(1, 86_400),
    "watchers_max": Bounds(0, 10_000),
    "writers": Bounds(0, 1_000),
    f"{hot_status.NAME} writers": Bounds(1, 1_000),
}
"""Of every parameter by its name, or behind that of a storm to which other ones apply."""


def find(name: str) -> Storm[Any]:
    """The storm of that name; ``ValueError`` lists which there are."""
    if name not in STORMS:
        raise ValueError(f"no storm {name!r}; there are {', '.join(STORMS)}")
    return STORMS[name]


def bounds(storm: Storm[Any], name: str) -> Bounds:
    """What a parameter of a storm may be."""
    return BOUNDS.get(f"{storm.NAME} {name}", BOUNDS[name])


def meanings(storm: Storm[Any]) -> dict[str, str]:
    """What each of a storm's parameters means: the docstrings of their class, in one line each.

    Read from the source, which is where Python leaves those of attributes.
    """
    (made,) = ast.parse(inspect.getsource(type(storm.PRESETS["xs"]))).body
    assert isinstance(made, ast.ClassDef)
    found = {}
    for field, text in pairwise(made.body):
        match field, text:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(said))),
            ):
                found[name] = " ".join(said.split())
    return found


def parse_parameters(storm: Storm[P], preset: str, changes: Mapping[str, str]) -> P:
    """A preset with some numbers changed; ``ValueError`` lists what exists."""
    presets = storm.PRESETS
    if preset not in presets:
        raise ValueError(f"{storm.NAME}: no preset {preset!r}; there are {', '.join(presets)}")
    parameters: Any = presets[preset]
    known = {field.name: field for field in fields(parameters)}
    numbers: dict[str, float] = {}
    for name, text in changes.items():
        if name not in known:
            raise ValueError(f"{storm.NAME}: no parameter {name!r}; there are {', '.join(known)}")
        numbers[name] = _number(known[name], text, bounds(storm, name))
    changed: P = replace(parameters, **numbers)
    return changed


def told(within: Bounds) -> str:
    """Bounds in words."""
    return f"{within.least:,.10g} to {within.most:,.10g}"


def _number(field: "Field[Any]", text: str, within: Bounds) -> float:
    """What a user wrote for one parameter."""
    whole = field.type is int
    try:
        number: float = int(text) if whole else float(text)
    except ValueError:
        number = math.nan
    if not within.least <= number <= within.most:  # what is no number is neither
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"{field.name}={text}: {kind} of {told(within)} is wanted")
    return number
