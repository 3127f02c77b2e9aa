"""What a judge says: how much it looked at, and what is wrong, with the evidence."""

from collections.abc import Sequence
from dataclasses import dataclass

VIOLATIONS_KEPT = 5
"""Of each judge; further ones are counted."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The finding of one judge about one run."""

    judge: str
    """``Reliable``; a storm's own check begins with its name: ``swarm-burst: one owner``."""
    checked: int
    """How many facts were looked at; 0: there was nothing to judge, which is not a pass."""
    violations: int = 0
    evidence: Sequence[str] = ()
    """Of the first few violations: revisions, keys, both sides."""
    timed: bool = False
    """It holds within a time only: of a generator that was late itself it says nothing."""

    @property
    def passed(self) -> bool:
        """Nothing is wrong."""
        return not self.violations

    def __str__(self) -> str:
        if not self.passed:
            return f"FAIL {self.judge}: {self.violations} of {self.checked}"
        return f"ok   {self.judge}: {self.checked}" if self.checked else f"none {self.judge}"


def verdict(judge: str, checked: int, evidence: Sequence[str], *, timed: bool = False) -> Verdict:
    """A verdict of a complete list of violations."""
    return Verdict(judge, checked, len(evidence), tuple(evidence[:VIOLATIONS_KEPT]), timed)
