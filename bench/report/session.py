"""A stored session: several targets under one plan, again and again, in one folder.

``session.json`` says what was asked for and where; ``<target>/<repetition>/`` holds one run each:
``run.json``, its tables, and ``verdicts.json`` once it was judged. Nothing else is read, what is
not what was written is refused with the name of its file. What a report writes beside them
(``results.json``, ``report.html``) can be made again at any time.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypedDict, cast

from bench.capsule import Capsule
from bench.verdicts import Verdict

SESSION = "session.json"
VERDICTS = "verdicts.json"
RUN = "run.json"


class Session(TypedDict):
    """``session.json``."""

    command_line: list[str]
    storm: str
    preset: str
    parameters: dict[str, float]
    seed: int
    duration_us: int
    fingerprint: str
    """SHA-256 of the plan, the same for every run."""
    targets: list[str]
    """Names in the order given; ratios are of the first against each other."""
    repetitions: int
    """Asked for; an interrupted session has fewer."""
    started: str
    """ISO 8601, UTC."""
    state: str
    """``COMPLETE`` or ``INCOMPLETE``."""
    before: Capsule
    after: Capsule | None
    """None: the session was interrupted, or is a probe of a search of capacity."""
    ceiling_per_second: float
    """Operations that the generator sends to a null server; 0: not measured."""


class UnusableError(ValueError):
    """What is stored is not what was written, or does not fit; says which file, and why."""


class StoredVerdict(TypedDict):
    """One judge's finding in ``verdicts.json``."""

    judge: str
    checked: int
    violations: int
    evidence: list[str]
    timed: bool
    """See ``Verdict``, as of the others."""
    rule: str
    lacking: str


def write_session(folder: Path, session: Session) -> None:
    """Write or overwrite ``session.json``."""
    (folder / SESSION).write_text(json.dumps(session, indent=2) + "\n")


def read_session(folder: Path) -> Session:
    """Raises ``FileNotFoundError`` if ``folder`` holds no session, or ``UnusableError``."""
    path = folder / SESSION
    session = cast("Session", read_object(path, Session.__required_keys__))
    for name in ("before", "after"):
        made: object = dict(session)[name]
        if made is not None or name == "before":
            _require(f"{path}: {name}", made, Capsule.__required_keys__)
    return session


def read_json(path: Path) -> object:
    """Raises ``OSError``, or ``UnusableError`` for what is no JSON."""
    try:
        read: object = json.loads(path.read_text())
    except ValueError as error:
        raise UnusableError(f"{path}: no JSON, or cut off") from error
    return read


def read_object(path: Path, names: Iterable[str]) -> dict[str, object]:
    """A JSON object that has all ``names``; raises as ``read_json`` does."""
    return _require(str(path), read_json(path), names)


def _require(where: str, read: object, names: Iterable[str]) -> dict[str, object]:
    if not isinstance(read, dict):
        raise UnusableError(f"{where}: no object")
    for name in sorted(names):
        if name not in read:
            raise UnusableError(f"{where}: without {name}")
    return read


def run_folder(folder: Path, target: str, repetition: int) -> Path:
    """Where one run is kept."""
    return folder / target / str(repetition)


def runs(folder: Path, target: str) -> list[Path]:
    """Runs of a target that left their facts, in order."""
    kept = (path.parent for path in (folder / target).glob(f"*/{RUN}") if _is_number(path))
    return sorted(kept, key=lambda path: int(path.name))


def _is_number(path: Path) -> bool:
    return path.parent.name.isdecimal()


def write_verdicts(folder: Path, verdicts: Sequence[Verdict]) -> None:
    """What the judges say of the run in ``folder``."""
    (folder / VERDICTS).write_text(json.dumps(stored_verdicts(verdicts), indent=2) + "\n")


def stored_verdicts(verdicts: Sequence[Verdict]) -> list[StoredVerdict]:
    """Verdicts as they are stored."""
    return [
        StoredVerdict(
            judge=verdict.judge,
            checked=verdict.checked,
            violations=verdict.violations,
            evidence=list(verdict.evidence),
            timed=verdict.timed,
            rule=verdict.rule,
            lacking=verdict.lacking,
        )
        for verdict in verdicts
    ]


def read_verdicts(folder: Path) -> list[StoredVerdict] | None:
    """None: the run was not judged. What older versions did not store is empty.

    Raises ``UnusableError``.
    """
    path = folder / VERDICTS
    if not path.exists():
        return None
    stored = read_json(path)
    if not isinstance(stored, list):
        raise UnusableError(f"{path}: no list")
    later = {"rule": "", "lacking": ""}
    names = StoredVerdict.__required_keys__ - later.keys()
    return [cast("StoredVerdict", later | _require(str(path), one, names)) for one in stored]
