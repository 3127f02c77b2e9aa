"""Which storms there are, and how a user's words become a storm and its parameters."""

import math
import random
from collections.abc import Mapping
from dataclasses import Field, fields, replace
from typing import Any, Protocol, TypeVar

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
        """What the storm asks beyond the common judges."""

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
LEAST: Mapping[str, float] = {
    "apiservers": 1,
    "tenants": 1,
    "namespaces": 1,
    "ttl_s": 1,
    "burst_every_s": 0.1,
    "think_ms": 0.1,
    f"{compact_churn.NAME} compaction_s": 0.1,
}
"""Of parameters for which 0 is no plan: there is nobody to do it, or no end of it. A storm's own
stand behind its name; all others may be 0."""


def find(name: str) -> Storm[Any]:
    """The storm of that name; ``ValueError`` lists which there are."""
    if name not in STORMS:
        raise ValueError(f"no storm {name!r}; there are {', '.join(STORMS)}")
    return STORMS[name]


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
        least = LEAST.get(f"{storm.NAME} {name}", LEAST.get(name, 0))
        numbers[name] = _number(known[name], text, least)
    changed: P = replace(parameters, **numbers)
    return changed


def _number(field: "Field[Any]", text: str, least: float) -> float:
    """What a user wrote for one parameter."""
    whole = field.type is int
    try:
        number: float = int(text) if whole else float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number < least:
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"{field.name}={text}: {kind} of {least:g} or more is wanted")
    return number
