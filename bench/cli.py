"""The command `kvstore-bench`: what a user says becomes a wish, and what went wrong one line.

Exit codes: 0, all verdicts hold and the timings may be believed; 1, a verdict does not hold, or a
gate is not met; 2, refused before anything was measured: wrong words, a target that cannot be had;
3, the session is incomplete: it was interrupted, a server or the generator ended within it, or the
disk took no more, and no verdict is broken by then;
4, no verdict is broken, and the session says nothing all the same: the generator or the machine was
not steady enough (INVALID), or a run was not judged. A gate without ratios takes INVALID for good.
A signal before anything was measured is a refusal; one before the imports are done ends the program
without a word, as it ends others (130 in a shell).
"""

import signal
import sys
import threading

_EARLY = (
    threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
)
if _EARLY:  # the imports take more than a second, and have nothing to say of a Ctrl-C
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# ruff: noqa: E402 - imports come after what is to hold for them
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import click
import uvloop
from rich.console import Console

from bench.clock import MICROSECONDS
from bench.gate import GateError, complaints, read_gate
from bench.judges import judge
from bench.options import (
    EXIT_FAILED,
    EXIT_INCOMPLETE,
    EXIT_INVALID,
    POSITIVE,
    SECONDS,
    FiniteRange,
    OneLineGroup,
    chosen_targets,
    exit_code,
    refuse,
    refuse_used,
    target_options,
    with_shard,
)
from bench.records import Records, unkept
from bench.replay.commands import record, replay
from bench.report import PAGE, keep
from bench.report import picture as draw
from bench.report import report as make_report
from bench.report.compare import UnequalSessionsError
from bench.report.compare import compare as compare_sessions
from bench.report.kept import Judging
from bench.report.results import Results, build
from bench.report.session import SESSION, UnusableError
from bench.report.terminal import comparison_table, summary
from bench.run.capacity import SECONDS as CAPACITY_SECONDS
from bench.run.capacity import Gates
from bench.run.crew import CrewError
from bench.run.probing import CAPACITY, StoppedError, known, outcome, probe_all, retold
from bench.run.probing import read as read_capacity
from bench.run.session import Runner, Wish
from bench.run.show import Show
from bench.statistics import REPETITIONS_MIN
from bench.storms import STORMS, Storm, bounds, find, meanings, parse_parameters, told
from bench.targets import Binaries, TargetError
from bench.verdicts import Verdict
from bench.wording import counted

if _EARLY:
    signal.signal(signal.SIGINT, signal.default_int_handler)

PRESET_SECONDS: Final = {"xs": 30.0, "s": 300.0, "m": 300.0, "l": 300.0}
"""How long a load takes if nobody says."""


@click.group(
    cls=OneLineGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="kvstore", prog_name="kvstore-bench")
def main() -> None:
    """Storm-test servers that speak the etcd v3 API: correctness first, then speed."""


@main.command()
@click.argument("storm", required=False)
def storms(storm: str | None) -> None:
    """Tell which storms there are, or what one of them does and its parameters."""
    if storm is None:
        for name, module in STORMS.items():
            click.echo(f"{name:18} {module.SUMMARY}")
        return
    try:
        found = find(storm)
    except ValueError as error:
        raise refuse(error) from error
    click.echo(f"{found.NAME}: {found.SUMMARY}\n")
    presets, said = found.PRESETS, meanings(found)
    names = [field.name for field in fields(presets["xs"])]
    width = max(map(len, names), default=0)
    click.echo(f"{'parameter':{width}}" + "".join(f"{preset:>12}" for preset in presets))
    for name in names:
        row = "".join(f"{getattr(parameters, name):>12}" for parameters in presets.values())
        click.echo(f"{name:{width}}{row}\n  {said[name]} ({told(bounds(found, name))})")
    click.echo(f"\n--capacity searches the highest {found.RATE} that a server holds.")


def _changes(assignments: Sequence[str]) -> dict[str, str]:
    """``name=value`` pairs; raises ``ValueError``."""
    changes = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set {assignment}: NAME=VALUE is wanted")
        changes[name] = text
    return changes


@main.command()
@click.argument("storm")
@target_options
@click.option("--preset", default="xs", show_default=True, help="Size: xs, s, m, l.")
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="NAME=VALUE",
    help="A parameter of the storm; `kvstore-bench storms STORM` tells which there are.",
)
@click.option(
    "--seconds",
    type=FiniteRange(min=1),
    help=f"Length of the load.  [default: {PRESET_SECONDS['xs']:.0f} at xs,"
    f" {PRESET_SECONDS['s']:.0f} else; {CAPACITY_SECONDS:.0f} with --capacity]",
)
@click.option(
    "--reps",
    type=click.IntRange(min=1),
    default=REPETITIONS_MIN,
    show_default=True,
    help=f"Runs of each server, in turns; a ratio needs {REPETITIONS_MIN}.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Of the plan: the same seed sends the same calls.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A new folder.")
@click.option("--prefix", default="", help="Put before every key, to share a server.")
@click.option(
    "--processes",
    type=click.IntRange(1, 16),
    default=2,
    show_default=True,
    help="Of the generator, at most one for each apiserver of the plan.",
)
@click.option(
    "--timeout",
    type=SECONDS,
    default=10.0,
    show_default=True,
    help="Seconds after which a call is given up; one that failed counts as that long.",
)
@click.option(
    "--kill9",
    "kills",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="In each run, kill a server that was started here so many times, spread evenly, and"
    " start it on the same data: what it had acknowledged must be there.",
)
@click.option(
    "--shard-stop",
    default="",
    metavar="CMD",
    help="Stops a shard of the server, where a storm would stop the server; see noisy-shard.",
)
@click.option("--shard-start", default="", metavar="CMD", help="Starts that shard again.")
@click.option("--background/--no-background", default=True, help="idle-background underneath.")
@click.option(
    "--client",
    type=click.Choice(["lean", "grpcio"]),
    default="lean",
    show_default=True,
    help="grpcio: slower, and somebody else's; it checks what the lean one measures.",
)
@click.option("--capacity", is_flag=True, help="Search the highest rate that holds the gates.")
@click.option(
    "--p99-ms",
    type=POSITIVE,
    default=Gates().latency_p99_ms,
    show_default=True,
    help="With --capacity: the largest latency of an operation that is good enough, in"
    " milliseconds at the 99th percentile.",
)
@click.option(
    "--watch-p99-ms",
    type=POSITIVE,
    default=Gates().watch_lag_p99_ms,
    show_default=True,
    help="Likewise the largest lag of a watch behind the write that it shows.",
)
def run(
    storm: str,
    starts: Sequence[str],
    attached: Sequence[str],
    etcd_bin: str | None,
    kine_bin: str | None,
    preset: str,
    assignments: Sequence[str],
    seconds: float | None,
    reps: int,
    seed: int,
    out: Path,
    prefix: str,
    processes: int,
    timeout: float,
    kills: int,
    shard_stop: str,
    shard_start: str,
    *,
    background: bool,
    client: str,
    capacity: bool,
    p99_ms: float,
    watch_p99_ms: float,
) -> None:
    """Run STORM against one or more servers, in turns, and judge and report what happened."""
    try:
        chosen: Storm[Any] = find(storm)
        parameters = parse_parameters(chosen, preset, _changes(assignments))
        targets = chosen_targets(starts, attached, Binaries(etcd_bin, kine_bin), out)
        targets = with_shard(targets, shard_stop, shard_start)
    except (ValueError, TargetError) as error:
        raise refuse(error) from error
    if client == "grpcio" and find_spec("grpc") is None:
        raise refuse("--client grpcio: grpcio is not installed (the extra `grpcio`)")
    refuse_used(out)
    wish = Wish(
        storm=chosen,
        preset=preset,
        parameters=parameters,
        targets=targets,
        repetitions=reps,
        seed=seed,
        duration_us=int((seconds or PRESET_SECONDS[preset]) * MICROSECONDS),
        out=out,
        prefix=prefix,
        processes=processes,
        timeout_us=int(timeout * MICROSECONDS),
        background=background,
        client=client,
        kills=kills,
    )
    if capacity:
        gates = Gates(p99_ms, watch_p99_ms)
        wish = replace(wish, duration_us=int((seconds or CAPACITY_SECONDS) * MICROSECONDS))
        raise click.exceptions.Exit(_find_capacity(wish, gates))
    _record(wish)
    raise click.exceptions.Exit(exit_code(_report(wish.out)))


def _record(wish: Wish) -> bool:
    """Run a session with its progress on the terminal; gives whether it was ended early, by the
    user or by a disk that takes no more.
    """
    with Show(Console(stderr=True), wish) as show:
        runner = Runner(wish, show.progress, show.judged, show.stopping, show.waiting)
        try:
            uvloop.run(runner.run())
        except (TargetError, CrewError) as error:
            raise refuse(error) from error
        except ExceptionGroup as group:
            raise refuse(group.exceptions[0]) from group
        except OSError as error:
            raise refuse(f"{wish.out}: {unkept(error)}: nothing was measured") from error
    if runner.unkept:
        what = "the session ends here, and what could be written is kept"
        click.echo(f"kvstore-bench: {wish.out}: {runner.unkept}: {what}", err=True)
    return runner.stopped or bool(runner.unkept)


def _report(folder: Path, judging: Judging | None = None) -> Results:
    """Make the report, and say what is in it, even if it cannot be kept."""
    results = build(folder, measures, judging)
    console = Console()
    for part in summary(results):
        console.print(part)
    try:
        keep(folder, results)
    except OSError as error:
        click.echo(f"\n{folder / PAGE} was not written: {error.strerror}")
    else:
        click.echo(f"\n{folder / PAGE}")
    return results


def measures(records: Records) -> Mapping[str, float]:
    """The figures of its own that a run's storm has; a replay has none.

    Raises ``UnusableError`` for a run of a storm that has changed since.
    """
    storm = STORMS.get(records.facts["storm"])
    return {} if storm is None else storm.measures(records, _parameters(storm, records))


def _judged(records: Records) -> list[Verdict]:
    """All verdicts on a run; raises as ``measures`` does."""
    storm = STORMS.get(records.facts["storm"])
    own = [] if storm is None else storm.checks(records, _parameters(storm, records))
    return [*judge(records), *own]


def _parameters(storm: Storm[Any], records: Records) -> object:
    kind, said = type(storm.PRESETS["xs"]), records.facts["parameters"]
    if {field.name for field in fields(kind)} != set(said):
        why = f"{storm.NAME} has other parameters today: {', '.join(said)} were stored"
        raise UnusableError(f"{records.folder}: {why}")
    return kind(**said)


_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError)
"""What comes of stored JSON that says something else than it should."""


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Whatever is wrong with a stored session is one line."""
    try:
        yield
    except OSError as error:
        lacking = isinstance(error, FileNotFoundError) and SESSION in str(error)
        raise refuse(f"{what}: {'no session: ' if lacking else ''}{_plain(error)}") from error
    except UnusableError as error:
        raise refuse(_plain(error)) from error
    except _DAMAGE as error:
        raise refuse(f"{what}: damaged: {type(error).__name__}: {_plain(error)}") from error


def _plain(error: Exception) -> str:
    """What an error says, in one line, without a number that only the system knows."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


@main.command()
@click.argument("folder", type=_FOLDER)
def report(folder: Path) -> None:
    """Make the report of a stored session again, from its raw records, which must all be there.

    Verdicts are those of when it was run; a run whose verdicts.json is gone is judged again.

    Of a search of capacity, tell what it found; each of its probes is a session of its own.
    """
    with _reading(str(folder)):
        if (folder / CAPACITY).exists():
            click.echo("\n".join(retold(folder)))
        else:
            _report(folder, _judged)


@main.command()
@click.argument("folder", type=_FOLDER)
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
def picture(folder: Path, file: Path) -> None:
    """Draw the main charts of a stored session as a PNG."""
    with _reading(str(folder)):
        draw(folder, file, measures)


@main.command()
@click.argument("first", type=_FOLDER)
@click.argument("second", type=_FOLDER)
@click.option("--force", is_flag=True, help="Even if machines or plans differ.")
def compare(first: Path, second: Path, *, force: bool) -> None:
    """Compare two stored sessions of one plan, made on one machine."""
    with _reading(f"{first}, {second}"):
        try:
            sessions = compare_sessions(first, second, force=force, measures=measures)
        except UnequalSessionsError as error:
            for difference in error.args:
                click.echo(f"kvstore-bench: {difference}", err=True)
            raise refuse(
                "these sessions are not comparable; --force compares them all the same"
            ) from error
    Console().print(comparison_table(sessions))


def _find_capacity(wish: Wish, gates: Gates) -> int:
    """Search the capacity of each target; gives the exit code."""
    name = wish.storm.RATE
    if not getattr(wish.parameters, name):
        raise refuse(f"--capacity: a search begins at a rate above 0, and {name} is 0")
    console = Console(soft_wrap=True)

    def tell(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    try:
        kept = probe_all(wish, gates, _record, lambda out: make_report(out, measures), tell)
    except StoppedError:
        if (wish.out / CAPACITY).exists():
            for line in outcome(read_capacity(wish.out)):
                tell(line)
        click.echo("INCOMPLETE: this is what there is", err=True)
        return EXIT_INCOMPLETE
    for line in outcome(kept):
        tell(line)
    return 0 if all(known(searched) for searched in kept["targets"]) else EXIT_INVALID


@main.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--etcd-bin", metavar="FILE", help="etcd, if not in PATH.")
@click.option("--kine-bin", metavar="FILE", help="kine, if not in PATH.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A new folder.")
def gate(file: Path, etcd_bin: str | None, kine_bin: str | None, out: Path) -> None:
    """Run the storms of FILE; exit with 1 if a verdict or a ratio is worse than it says."""
    try:
        wanted = read_gate(file)
        targets = chosen_targets(wanted.targets, (), Binaries(etcd_bin, kine_bin), out)
    except (GateError, TargetError, OSError) as error:
        raise refuse(error) from error
    refuse_used(out)
    missed: list[str] = []
    for bar in wanted.bars:
        wish = Wish(
            storm=bar.storm,
            preset=bar.preset,
            parameters=bar.parameters,
            targets=targets,
            repetitions=wanted.repetitions,
            seed=wanted.seed,
            duration_us=int(bar.seconds * MICROSECONDS),
            out=out / bar.storm.NAME,
        )
        stopped = _record(wish)
        results = _report(wish.out)
        if stopped:
            raise click.exceptions.Exit(exit_code(results))
        missed += complaints(bar, results)
    for complaint in missed:
        click.echo(f"MISS {complaint}", err=True)
    click.echo(f"{counted(len(wanted.bars), 'storm')}, {counted(len(missed), 'bar')} missed")
    raise click.exceptions.Exit(EXIT_FAILED if missed else 0)


main.add_command(record)
main.add_command(replay)

if __name__ == "__main__":
    sys.exit(main())
