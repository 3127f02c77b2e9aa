"""A stored session: several targets under one plan, again and again, in one folder.

``session.json`` says what was asked for and where; ``<target>/<repetition>/`` holds one run each:
``run.json``, its tables, and ``verdicts.json`` once it was judged. Nothing else is read, and what a
report writes beside them (``results.json``, ``report.html``) can be made again at any time.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

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
    """None: the session was interrupted."""
    ceiling_per_second: float
    """Operations that the generator sends to a null server; 0: not measured."""


class StoredVerdict(TypedDict):
    """One judge's finding in ``verdicts.json``."""

    judge: str
    checked: int
    violations: int
    evidence: list[str]
    timed: bool
    """See ``Verdict``."""


def write_session(folder: Path, session: Session) -> None:
    """Write or overwrite ``session.json``."""
    (folder / SESSION).write_text(json.dumps(session, indent=2) + "\n")


def read_session(folder: Path) -> Session:
    """Raises ``FileNotFoundError`` if ``folder`` holds no session."""
    session: Session = json.loads((folder / SESSION).read_text())
    return session


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
    stored = [
        StoredVerdict(
            judge=verdict.judge,
            checked=verdict.checked,
            violations=verdict.violations,
            evidence=list(verdict.evidence),
            timed=verdict.timed,
        )
        for verdict in verdicts
    ]
    (folder / VERDICTS).write_text(json.dumps(stored, indent=2) + "\n")


def read_verdicts(folder: Path) -> list[StoredVerdict] | None:
    """None: the run was not judged."""
    path = folder / VERDICTS
    if not path.exists():
        return None
    stored: list[StoredVerdict] = json.loads(path.read_text())
    return stored
