"""Gates: storms whose verdicts must hold and whose ratios must not get worse than a file says.

A gate file is YAML:

    targets: [ours, etcd]
    repetitions: 5
    seed: 1
    storms:
      swarm-burst:
        preset: xs
        seconds: 30
        parameters: {claims: 50}
        ratios: {server_cpu_per_operation_us: 0.6}

A ratio is the first target's median over the second's, whatever others there are; the
number is the largest that passes, or the smallest for what is better when higher. A storm without
ratios is judged for its verdicts alone, and then a machine too busy for honest timings does no
harm. Everything but ``targets`` and ``storms`` may be left out. Whatever is not known is refused.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bench.report.metrics import Better
from bench.report.metrics import metric as describe
from bench.report.results import Results
from bench.statistics import REPETITIONS_MIN
from bench.storms import Storm, find, parse_parameters

_KEYS = {"targets", "repetitions", "seed", "storms"}
_STORM_KEYS = {"preset", "seconds", "parameters", "ratios"}


class GateError(ValueError):
    """A gate file that cannot be used; one line."""


@dataclass(frozen=True, slots=True)
class Bar:
    """What one storm must hold to."""

    storm: Storm[Any]
    preset: str
    parameters: Any
    seconds: float
    ratios: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Gate:
    """A gate file."""

    targets: tuple[str, ...]
    """As ``--start`` takes them."""
    repetitions: int
    seed: int
    bars: tuple[Bar, ...]


def read_gate(file: Path) -> Gate:
    """Raises ``GateError``, ``OSError``."""
    try:
        said = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise GateError(f"{file}: {' '.join(str(error).split())}") from error
    fields = _mapping(file, said, "the file", _KEYS)
    storms = fields.get("storms")
    targets = fields.get("targets")
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets) or not targets:
        raise GateError(f"{file}: targets: a list, such as [ours, etcd]")
    if not isinstance(storms, dict) or not storms:
        raise GateError(f"{file}: storms: a mapping of storms to their bars")
    bars = tuple(_bar(file, str(name), bar) for name, bar in storms.items())
    repetitions = _count(file, "repetitions", fields.get("repetitions", REPETITIONS_MIN))
    if any(bar.ratios for bar in bars) and len(targets) < 2:
        raise GateError(f"{file}: a ratio needs two targets")
    if any(bar.ratios for bar in bars) and repetitions < REPETITIONS_MIN:
        raise GateError(f"{file}: a ratio needs {REPETITIONS_MIN} repetitions")
    seed = _count(file, "seed", fields.get("seed", 1))
    return Gate(tuple(targets), repetitions, seed, bars)


def _bar(file: Path, name: str, said: object) -> Bar:
    fields = _mapping(file, said or {}, name, _STORM_KEYS)
    preset = str(fields.get("preset", "xs"))
    changes = _mapping(file, fields.get("parameters", {}), f"{name}: parameters", None)
    ratios = _mapping(file, fields.get("ratios", {}), f"{name}: ratios", None)
    try:
        storm = find(name)
        parameters = parse_parameters(storm, preset, {k: str(v) for k, v in changes.items()})
    except ValueError as error:
        raise GateError(f"{file}: {error}") from error
    bars = {metric: _number(file, f"{name}: {metric}", bar) for metric, bar in ratios.items()}
    seconds = _number(file, f"{name}: seconds", fields.get("seconds", 30))
    if seconds < 1:
        raise GateError(f"{file}: {name}: seconds: 1 or more")
    return Bar(storm, preset, parameters, seconds, bars)


def _mapping(file: Path, said: object, where: str, known: set[str] | None) -> dict[str, object]:
    if not isinstance(said, dict):
        raise GateError(f"{file}: {where}: a mapping is wanted")
    for key in said:
        if known is not None and key not in known:
            raise GateError(f"{file}: {where}: no {key!r}; there are {', '.join(sorted(known))}")
    return {str(key): part for key, part in said.items()}


def _number(file: Path, where: str, said: object) -> float:
    if isinstance(said, bool) or not isinstance(said, int | float) or not 0 < said < math.inf:
        raise GateError(f"{file}: {where}: a number above 0 is wanted")
    return float(said)


def _count(file: Path, where: str, said: object) -> int:
    if isinstance(said, bool) or not isinstance(said, int) or said <= 0:
        raise GateError(f"{file}: {where}: a whole number above 0 is wanted")
    return said


def complaints(bar: Bar, results: Results) -> Iterator[str]:
    """Why a session does not pass its bar; nothing if it does."""
    name = bar.storm.NAME
    wrong = {"FAIL", "NOT JUDGED", "INCOMPLETE", *(["INVALID"] if bar.ratios else [])}
    for target in results["targets"]:
        if target["state"] in wrong:
            yield f"{name}: {target['name']} is {target['state']}: {'; '.join(target['reasons'])}"
    found = {
        row["metric"]: row["ratio"]
        for row in results["comparisons"]
        if row["against"] == results["targets"][1]["name"]
    }
    for metric, bound in bar.ratios.items():
        if metric not in found:
            yield f"{name}: {metric} was not measured; there are {', '.join(sorted(found))}"
        elif describe(metric).better is Better.HIGHER and found[metric] < bound:
            yield f"{name}: {metric} is {found[metric]:.2f} of the other's, {bound:g} is wanted"
        elif describe(metric).better is Better.LOWER and found[metric] > bound:
            yield f"{name}: {metric} is {found[metric]:.2f} of the other's, {bound:g} is allowed"
