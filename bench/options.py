"""What several commands have in common: how they refuse, and how servers are named."""

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import click

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
