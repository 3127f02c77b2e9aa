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
    """One judge's; ``verdict`` ends it.

    ``lacking`` says what there was none of if it looks at nothing.
    """

    def __init__(self, judge: str, lacking: str, *, timed: bool = False) -> None:
        self._judge = judge
        self._lacking = lacking
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
        return Verdict(
            judge=self._judge,
            checked=self._checked,
            violations=self._violations,
            evidence=tuple(self._evidence),
            timed=self._timed,
            lacking="" if self._checked else self._lacking,
        )
