"""What one judge collects while it looks: facts counted, violations counted, few of them told.

A fault that repeats makes millions of violations; text is made for the first of them only.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.verdicts import VIOLATIONS_KEPT, Verdict

Column = NDArray[np.signedinteger[Any]]
Mask = NDArray[np.bool_]


class Findings:
    """One judge's; ``verdict`` ends it."""

    def __init__(self, judge: str, *, timed: bool = False) -> None:
        self._judge = judge
        self._timed = timed
        self._checked = 0
        self._violations = 0
        self._evidence: list[str] = []

    def look(self, checked: int, wrong: NDArray[Any], describe: Callable[[int], str]) -> None:
        """``checked`` facts more, of which ``wrong`` (a mask, or indices) are violations."""
        self._checked += checked
        if wrong.dtype == np.bool_:
            wrong = np.flatnonzero(wrong)
        self._violations += len(wrong)
        for index in wrong[: VIOLATIONS_KEPT - len(self._evidence)]:
            self._evidence.append(describe(int(index)))

    def verdict(self) -> Verdict:
        """All in all."""
        evidence = tuple(self._evidence)
        return Verdict(self._judge, self._checked, self._violations, evidence, self._timed)
