"""What a session shows on a terminal while it runs."""

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from bench.run import repetition
from bench.run.session import Wish
from bench.targets import START_TIMEOUT
from bench.verdicts import Verdict
from bench.wording import counted


class Show:
    """A bar for each repetition, and a line for each verdict that is not a pass. A context."""

    def __init__(self, console: Console, wish: Wish) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._repetitions = wish.repetitions
        self._bar: dict[tuple[str, int], TaskID] = {}
        self.failed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bars.stop()

    def progress(self, target: str, number: int, done: repetition.Progress) -> None:
        """How far a repetition is."""
        key = (target, number)
        if key not in self._bar:
            self._bars.start()  # not before: a refusal is one line and nothing else
            name = f"{target} {number + 1}/{self._repetitions}"
            self._bar[key] = self._bars.add_task(name, total=done.duration_us, text="")
        text = f"{done.stage:9} {done.calls:>9,} calls {done.events:>9,} events"
        text += f", killed {counted(done.kills, 'time')}" if done.kills else ""
        text += f", {done.note}" if done.note else ""
        elapsed_us = min(max(done.elapsed_us, 0), done.duration_us)
        self._bars.update(self._bar[key], completed=elapsed_us, text=text)

    def waiting(self, target: str) -> None:
        """A server that was started takes its time."""
        told = f"{target} does not answer yet; it has {START_TIMEOUT:g} s"
        self._bars.console.print(told, markup=False)

    def stopping(self) -> None:
        """The user wants to end."""
        self._bars.console.print("stopping: judging what there is; another signal ends it at once")

    def judged(
        self, target: str, number: int, verdicts: Sequence[Verdict], reason: str = ""
    ) -> None:
        """What the judges say of a repetition, and what went wrong beside them."""
        wrong = [verdict for verdict in verdicts if not verdict.passed]
        self.failed = self.failed or bool(wrong)
        passed = sum(verdict.checked > 0 and verdict.passed for verdict in verdicts)
        said = f"{passed} judges pass, {len(wrong)} fail" if verdicts else "not judged"
        self._bars.console.print(f"{target} {number + 1}: {said}")
        if reason:
            self._bars.console.print(f"  {reason}", markup=False)
        for verdict in wrong:
            self._bars.console.print(str(verdict), *verdict.evidence, sep="\n  ", markup=False)
