"""The commands ``record`` and ``replay``."""

import asyncio
import signal
from collections.abc import Sequence
from pathlib import Path

import click
import uvloop

from bench.client.asking import AskError
from bench.options import (
    POSITIVE,
    SECONDS,
    chosen_targets,
    exit_code,
    refuse,
    refuse_used,
    target_options,
)
from bench.replay import TraceError, session
from bench.replay import record as record_trace
from bench.replay.session import Replayed, Wish
from bench.replay.trace import Summary
from bench.report import PAGE, report
from bench.targets import Binaries, TargetError


def _stopping() -> asyncio.Event:
    """Set at Ctrl-C or SIGTERM."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


@click.command()
@click.option("--listen", default="127.0.0.1:2378", show_default=True, help="For clients.")
@click.option("--upstream", default="127.0.0.1:2379", show_default=True, help="The etcd.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A new file.")
@click.option("--scrub", is_flag=True, help="Replace values by synthetic ones of equal size.")
def record(listen: str, upstream: str, out: Path, *, scrub: bool) -> None:
    """Stand between clients and an etcd, and keep every call in a file, until Ctrl-C."""

    def ready(where: str) -> None:
        click.echo(f"recording: clients connect to {where}; Ctrl-C ends it", err=True)

    async def go() -> Summary:
        return await record_trace(
            listen=listen,
            upstream=upstream,
            out=out,
            scrub=scrub,
            stop=_stopping(),
            ready=ready,
        )

    try:
        kept = uvloop.run(go())
    except TraceError as error:
        raise refuse(error) from error
    click.echo(f"{out}: {kept['calls']:,} calls on {kept['connections']} connections")


@click.command()
@click.argument("trace", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@target_options
@click.option(
    "--speed", type=POSITIVE, default=1.0, show_default=True, help="Times the recorded pace."
)
@click.option("--timeout", type=SECONDS, default=10.0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A new folder.")
def replay(
    trace: Path,
    starts: Sequence[str],
    attached: Sequence[str],
    etcd_bin: str | None,
    kine_bin: str | None,
    speed: float,
    timeout: float,
    out: Path,
) -> None:
    """Send a recorded TRACE to one or more servers, and judge what happens."""
    refuse_used(out)
    try:
        targets = chosen_targets(starts, attached, Binaries(etcd_bin, kine_bin), out)
    except TargetError as error:
        raise refuse(error) from error
    wish = Wish(
        trace=trace, targets=targets, out=out, speed=speed, timeout_us=int(timeout * 1_000_000)
    )

    async def go() -> list[Replayed]:
        return await session.replay(wish, stop=_stopping(), show=_show, told=_tell)

    try:
        uvloop.run(go())
    except (TraceError, TargetError, AskError, ValueError) as error:
        raise refuse(error) from error
    results = report(out)
    click.echo(f"\n{out / PAGE}")
    raise click.exceptions.Exit(exit_code(results))


def _show(target: str, stage: str) -> None:
    click.echo(f"{target}: {stage}", err=True)


def _tell(done: Replayed) -> None:
    """What came of one target: calls, what could not be sent or judged, verdicts."""
    click.echo(f"{done.target}: {done.counts.sent:,} calls sent")
    for what, parts in (
        ("not translated", done.unmapped),
        ("withheld", done.counts.withheld),
        ("not judged", done.counts.unjudged),
        ("answered otherwise", done.counts.otherwise),
    ):
        for kind, many in parts.items():
            click.echo(f"  {what}: {kind}: {many:,}")
    for verdict in done.verdicts:
        if not verdict.passed:
            click.echo(f"  {verdict}")
            for line in verdict.evidence:
                click.echo(f"    {line}")
