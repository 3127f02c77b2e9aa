"""Results as they are stored: every run of a work, and what it ran on."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Final, Self

from tests.load.server import HERE, Run
from tests.load.works import Figure

RESULTS: Final = HERE / "results"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """All runs of one work, one after the other on the reference and on the subject."""

    work: str
    date: str
    commit: str
    machine: dict[str, str | int]
    versions: dict[str, str]
    seconds: int
    reference: list[Run]
    subject: list[Run]

    def store(self, folder: Path) -> None:
        """Write it as the work's file, in place of an earlier one."""
        folder.mkdir(exist_ok=True)
        text = json.dumps(asdict(self), indent=1, sort_keys=True)
        (folder / f"{self.work}.json").write_text(text + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what ``store`` wrote."""
        return cls(**json.loads(path.read_text()))


def medians(figure: Figure, measured: Measured) -> tuple[float | None, float | None]:
    """The reference's and the subject's median of a figure; None for who does not tell it."""
    found: list[float | None] = []
    for runs in (measured.reference, measured.subject):
        told = [float(run[figure.key]) for run in runs if figure.key in run]
        found.append(median(told) if told else None)
    return found[0], found[1]


def ratio(figure: Figure, measured: Measured) -> float | None:
    """The subject's median in parts of the reference's."""
    reference, subject = medians(figure, measured)
    if not reference or subject is None:
        return None
    return subject / reference


def amount(value: float | None, unit: str) -> str:
    """A number of three digits or more, with its unit."""
    if value is None:
        return "-"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f} {unit}".replace(" /", "/")


def line(figure: Figure, measured: Measured) -> tuple[str, bool]:
    """The figure in words, and whether its goal was reached."""
    reference, subject = (amount(value, figure.unit) for value in medians(figure, measured))
    text = f"{figure.meaning}: etcd {reference}, kvstore {subject}"
    part = ratio(figure, measured)
    if part is None:
        return text, True
    text += f", ratio {part:.2f}"
    if figure.goal is not None:
        text += f" (goal {'>=' if figure.larger_is_better else '<='} {figure.goal})"
    return text, figure.reached(part)


def origins(results: list[Measured]) -> list[str]:
    """What the results were measured on, one sentence for each difference."""
    found = []
    for measured in results:
        on, of = measured.machine, measured.versions
        found.append(
            f"Medians of {len(measured.subject)}, in turns on one machine ({on['cpu']}, "
            f"{on['cores']} cores, {on['memory_gib']} GiB, Linux {on['kernel']}): "
            f"etcd {of['etcd']} and kvstore {of['kvstore']} at {measured.commit} "
            f"on Python {of['python']}, {measured.date}."
        )
    return sorted(set(found))
