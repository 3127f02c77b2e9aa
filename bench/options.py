"""What several commands have in common: how they refuse, and how servers are named."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import click

from bench.report.results import Results
from bench.targets import (
    Binaries,
    Target,
    TargetError,
    existing,
    kept_near,
    names_differ,
    parse_start,
    parse_target,
)

EXIT_FAILED: Final = 1
EXIT_REFUSED: Final = 2
EXIT_INCOMPLETE: Final = 3
EXIT_INVALID: Final = 4


class FiniteRange(click.FloatRange):
    """A number within bounds; click's own lets nan pass all of them."""

    def convert(
        self, value: float, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """What the user wrote, as a number."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


SECONDS: Final = FiniteRange(min=0.1)
"""Of a timeout."""
POSITIVE: Final = FiniteRange(min=0, min_open=True)


def exit_code(results: Results) -> int:
    """What a session's results mean to whoever started it; says so if there is more to it."""
    states = {target["state"]: target for target in reversed(results["targets"])}
    if results["session"]["state"] != "COMPLETE" or "INCOMPLETE" in states:
        click.echo("INCOMPLETE: this is what there is", err=True)
        return EXIT_INCOMPLETE
    if "FAIL" in states:
        return EXIT_FAILED
    for state in ("INVALID", "NOT JUDGED"):
        if state in states:
            found = states[state]
            click.echo(f"{state}: {found['name']}: {'; '.join(found['reasons'])}", err=True)
            return EXIT_INVALID
    return 0


def refuse(complaint: object) -> "click.exceptions.Exit":
    """One line on stderr, and the exit code for a wish that cannot be granted."""
    click.echo(f"kvstore-bench: {complaint}", err=True)
    return click.exceptions.Exit(EXIT_REFUSED)


def refuse_used(out: Path) -> None:
    """What was measured is never overwritten, and nothing is measured that cannot be kept."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise refuse(f"--out {out}: not an empty folder, and nothing is overwritten")
    try:
        with TemporaryDirectory(dir=existing(out)):
            pass
    except OSError as error:
        raise refuse(f"--out {out}: {error.strerror}") from error


def chosen_targets(
    starts: Sequence[str], attached: Sequence[str], binaries: Binaries, out: Path
) -> list[Target]:
    """What is to be measured, in the order of the command line; raises ``TargetError``.

    Who is started keeps its data beside what is recorded of it.
    """
    targets = [parse_start(text, binaries) for text in starts]
    targets += [parse_target(text) for text in attached]
    if not targets:
        raise TargetError("nothing to measure: --start ours, --start etcd or --target NAME=URL")
    names_differ(targets)
    return [kept_near(target, out) for target in targets]


def target_options(command: Callable[..., None]) -> Callable[..., None]:
    """The flags that name servers."""
    for option in (
        click.option("--kine-bin", metavar="FILE", help="kine, if not in PATH."),
        click.option("--etcd-bin", metavar="FILE", help="etcd, if not in PATH."),
        click.option(
            "--target", "attached", multiple=True, metavar="NAME=URL", help="A server that runs."
        ),
        click.option(
            "--start",
            "starts",
            multiple=True,
            metavar="ours|etcd|kine|NAME=COMMAND",
            help="A server to start on fresh data; a command has {port} and {dir} in it.",
        ),
    ):
        command = option(command)
    return command
