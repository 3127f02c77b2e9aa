"""What a judge says: how much it looked at, and what is wrong, with the evidence."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import getdoc

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
    rule: str = ""
    """What must hold, one sentence or two."""
    lacking: str = ""
    """Where nothing was looked at: what there was none of, in a few words."""

    @property
    def passed(self) -> bool:
        """Nothing is wrong."""
        return not self.violations

    def __str__(self) -> str:
        if not self.passed:
            return f"FAIL {self.judge}: {self.violations} of {self.checked}"
        if self.checked:
            return f"ok   {self.judge}: {self.checked}"
        return f"none {self.judge}: {self.lacking}".removesuffix(": ")


def rule_of(judge: Callable[..., object]) -> str:
    """What a judge holds a server to: the first paragraph of its docstring, as one line.

    So what users are told of a judge stands where it is written, and nowhere else.
    """
    return " ".join((getdoc(judge) or "").partition("\n\n")[0].split())


def verdict(
    judge: str,
    checked: int,
    evidence: Sequence[str],
    *,
    rule: str = "",
    lacking: str = "",
    timed: bool = False,
) -> Verdict:
    """A verdict of a complete list of violations; ``lacking`` counts if nothing was checked."""
    told = tuple(evidence[:VIOLATIONS_KEPT])
    why = "" if checked else lacking
    return Verdict(judge, checked, len(evidence), told, timed, rule, why)
