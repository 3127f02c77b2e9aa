"""What several commands have in common: how they refuse, and how servers are named."""

import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

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


class OneLineGroup(click.Group):
    """Commands whose complaints are one line each, and which a Ctrl-C leaves INCOMPLETE."""

    def main(self, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - as click's own
        """Run the command that the words name, and exit."""
        try:
            code = super().main(*arguments, **options | {"standalone_mode": False})
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            code = error.exit_code
        except click.ClickException as error:
            code = refuse(error.format_message()).exit_code
        except click.Abort:
            click.echo("kvstore-bench: interrupted; what has been recorded is kept", err=True)
            code = EXIT_INCOMPLETE
        sys.exit(code or 0)


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
    """What a session's results mean to whoever started it; the summary has told why.

    A broken promise is one, however the session went on.
    """
    states = {target["state"] for target in results["targets"]}
    incomplete = results["session"]["state"] != "COMPLETE" or "INCOMPLETE" in states
    if incomplete:
        click.echo("INCOMPLETE: this is what there is", err=True)
    if "FAIL" in states:
        return EXIT_FAILED
    if incomplete:
        return EXIT_INCOMPLETE
    return EXIT_INVALID if states & {"INVALID", "NOT JUDGED"} else 0


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


def with_shard(targets: Sequence[Target], stop: str, start: str) -> list[Target]:
    """The targets with commands that stop and start one shard; raises ``TargetError``."""
    if bool(stop) != bool(start):
        raise TargetError("--shard-stop and --shard-start: one is nothing without the other")
    if stop and (len(targets) > 1 or not targets[0].started):
        raise TargetError("--shard-stop: for one server alone, and one that is started here")
    for flag, line in (("--shard-stop", stop), ("--shard-start", start)):
        try:
            shlex.split(line)
        except ValueError as error:
            raise TargetError(f"{flag} {line}: {error}") from error
    return [replace(target, shard_stop=stop, shard_start=start) for target in targets]


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
