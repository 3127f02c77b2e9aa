"""The commands ``record`` and ``replay``."""

import asyncio
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import uvloop
from rich.console import Console

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
from bench.replay.calls import UNJUDGED, named
from bench.replay.session import Replayed, Wish
from bench.replay.trace import Summary
from bench.report import PAGE, report
from bench.report.terminal import summary
from bench.statistics import REPETITIONS_MIN
from bench.targets import Binaries, TargetError
from bench.wording import counted


def _stopping() -> asyncio.Event:
    """Set at Ctrl-C or SIGTERM; another one ends what is under way at once."""
    stop, loop, task = asyncio.Event(), asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def heed() -> None:
        if stop.is_set():
            task.cancel()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, heed)
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
    except asyncio.CancelledError as error:
        raise refuse(f"ended at once; {out} was not written") from error
    calls, connections = counted(kept["calls"], "call"), counted(kept["connections"], "connection")
    click.echo(f"{out}: {calls} on {connections}")


@click.command()
@click.argument("trace", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@target_options
@click.option(
    "--speed", type=POSITIVE, default=1.0, show_default=True, help="Times the recorded pace."
)
@click.option(
    "--reps",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help=f"Runs of each server, in turns; a ratio needs {REPETITIONS_MIN}.",
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
    reps: int,
    timeout: float,
    out: Path,
) -> None:
    """Send a recorded TRACE to one or more servers, and judge what happens.

    A server begins with what was in the store when the recording began. Each recorded connection is
    one connection here, and sends its calls at their times, or when the answers that they follow
    from are there. With --reps, each repetition has fresh servers, and their figures are compared.
    Latencies leave nothing out: the first calls count too, where a storm lets its
    first tenth pass.
    """
    refuse_used(out)
    try:
        targets = chosen_targets(starts, attached, Binaries(etcd_bin, kine_bin), out)
    except TargetError as error:
        raise refuse(error) from error
    wish = Wish(
        trace=trace,
        targets=targets,
        out=out,
        repetitions=reps,
        speed=speed,
        timeout_us=int(timeout * 1_000_000),
    )

    async def go() -> list[Replayed]:
        return await session.replay(wish, stop=_stopping(), show=_show)

    try:
        done = uvloop.run(go())
    except (TraceError, TargetError, ValueError) as error:
        raise refuse(error) from error
    except asyncio.CancelledError as error:
        raise click.Abort from error
    results = report(out)
    console = Console()
    for part in summary(results):
        console.print(part)
    for one in done:
        for line in _notes(one):
            click.echo(line)
    click.echo(f"\n{out / PAGE}")
    raise click.exceptions.Exit(exit_code(results))


def _show(target: str, stage: str) -> None:
    click.echo(f"{target}: {stage}", err=True)


def _notes(done: Replayed) -> Iterator[str]:
    """What came of a run's calls: how many were sent, and what was not or not as recorded."""
    yield f"{done.name}: {done.counts.sent:,} of {counted(done.recorded, 'call')} sent"
    for why, calls in done.not_sent.items():
        yield f"  not sent: {named(calls)}: {why}"
    if done.counts.unjudged:
        yield f"  not judged, nor is anything else: {UNJUDGED}: {named(done.counts.unjudged)}"
    if done.counts.otherwise:
        yield f"  answered otherwise than recorded: {named(done.counts.otherwise)}"
    for kind, many in done.unmapped.items():
        yield f"  without a counterpart: {kind}: {many:,}"
