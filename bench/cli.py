"""The command `kvstore-bench`: what a user says becomes a wish, and what went wrong one line.

Exit codes: 0, all verdicts hold and the timings may be believed; 1, a verdict does not hold, or a
gate is not met; 2, refused before anything was measured: wrong words, a target that cannot be had;
3, the session is incomplete: it was interrupted, or a server or the generator ended within it;
4, no verdict is broken, and the session says nothing all the same: the generator or the machine was
not steady enough (INVALID), or a run was not judged. A gate without ratios takes INVALID for good.
"""

import sys
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
from bench.options import (
    EXIT_FAILED,
    EXIT_INCOMPLETE,
    EXIT_INVALID,
    POSITIVE,
    SECONDS,
    FiniteRange,
    chosen_targets,
    exit_code,
    refuse,
    refuse_used,
    target_options,
)
from bench.records import Records
from bench.replay.commands import record, replay
from bench.report import PAGE
from bench.report import picture as draw
from bench.report import report as make_report
from bench.report.compare import UnequalSessionsError
from bench.report.compare import compare as compare_sessions
from bench.report.results import Results
from bench.report.terminal import comparison_table, summary
from bench.run.capacity import SECONDS as CAPACITY_SECONDS
from bench.run.capacity import Finding, Gates, search, with_rate
from bench.run.capacity import judge as judge_probe
from bench.run.crew import CrewError
from bench.run.session import Runner, Wish
from bench.run.show import Show
from bench.storms import STORMS, Storm, find, parse_parameters
from bench.targets import Binaries, Target, TargetError

PRESET_SECONDS: Final = {"xs": 30.0, "s": 300.0, "m": 300.0, "l": 300.0}
"""How long a load takes if nobody says."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
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
    presets = found.PRESETS
    names = [field.name for field in fields(presets["xs"])]
    width = max(map(len, names), default=0)
    click.echo(f"{'parameter':{width}}" + "".join(f"{preset:>12}" for preset in presets))
    for name in names:
        row = "".join(f"{getattr(parameters, name):>12}" for parameters in presets.values())
        click.echo(f"{name:{width}}{row}")


def _changes(assignments: Sequence[str]) -> dict[str, str]:
    """``name=value`` pairs; raises ``ValueError``."""
    changes = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set {assignment}: NAME=VALUE")
        changes[name] = text
    return changes


@main.command()
@click.argument("storm")
@target_options
@click.option("--preset", default="xs", show_default=True, help="Size: xs, s, m, l.")
@click.option("--set", "assignments", multiple=True, metavar="NAME=VALUE", help="A parameter.")
@click.option("--seconds", type=FiniteRange(min=1), help="Length of the load.")
@click.option("--reps", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A new folder.")
@click.option("--prefix", default="", help="Put before every key, to share a server.")
@click.option(
    "--processes",
    type=click.IntRange(1, 16),
    default=2,
    show_default=True,
    help="Of the generator, at most one for each apiserver of the plan.",
)
@click.option("--timeout", type=SECONDS, default=10.0, show_default=True)
@click.option("--kill9", "kills", type=click.IntRange(min=0), default=0, help="Crashes per run.")
@click.option("--background/--no-background", default=True, help="idle-background underneath.")
@click.option(
    "--client",
    type=click.Choice(["lean", "grpcio"]),
    default="lean",
    show_default=True,
    help="grpcio: slower, and somebody else's; it checks what the lean one measures.",
)
@click.option("--capacity", is_flag=True, help="Search the highest rate that holds the gates.")
@click.option("--p99-ms", type=POSITIVE, default=Gates().latency_p99_ms, show_default=True)
@click.option("--watch-p99-ms", type=POSITIVE, default=Gates().watch_lag_p99_ms, show_default=True)
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
    """Run a session with its progress on the terminal; gives whether the user ended it early."""
    with Show(Console(stderr=True), wish) as show:
        runner = Runner(wish, show.progress, show.judged)
        try:
            uvloop.run(runner.run())
        except (TargetError, CrewError) as error:
            raise refuse(error) from error
        except ExceptionGroup as group:
            raise refuse(group.exceptions[0]) from group
    return runner.stopped


def _report(folder: Path) -> Results:
    """Make the report, and say what is in it."""
    results = make_report(folder, measures)
    console = Console()
    for part in summary(results):
        console.print(part)
    click.echo(f"\n{folder / PAGE}")
    return results


def measures(records: Records) -> Mapping[str, float]:
    """The figures of its own that a run's storm has; a replay has none.

    Raises ``ValueError`` for a run of a storm that has changed since.
    """
    storm = STORMS.get(records.facts["storm"])
    if storm is None:
        return {}
    kind, said = type(storm.PRESETS["xs"]), records.facts["parameters"]
    if {field.name for field in fields(kind)} != set(said):
        raise ValueError(f"{storm.NAME} has other parameters today: {', '.join(said)} were stored")
    return storm.measures(records, kind(**said))


_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Whatever is wrong with a stored session is one line."""
    try:
        yield
    except (OSError, ValueError, LookupError) as error:
        said = " ".join(str(error).split())
        raise refuse(f"{what}: {type(error).__name__}: {said}") from error


@main.command()
@click.argument("folder", type=_FOLDER)
def report(folder: Path) -> None:
    """Make the report of a stored session again, from its raw records."""
    with _reading(str(folder)):
        _report(folder)


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
    console = Console()
    console.print(comparison_table(sessions))
    for remark in sessions.remarks:
        console.print(remark, markup=False)


def _find_capacity(wish: Wish, gates: Gates) -> int:
    """Search the capacity of each target; gives the exit code."""
    console = Console()
    name = wish.storm.RATE
    first = getattr(wish.parameters, name)
    code = 0
    if not first:
        raise refuse(f"--capacity: a search begins at a rate above 0, and {name} is 0")
    for target in wish.targets:
        number = 0

        def probe(rate: float, target: Target = target) -> Finding:
            nonlocal number
            number += 1
            once = replace(
                wish,
                parameters=with_rate(wish.storm, wish.parameters, rate),
                targets=[target],
                repetitions=1,
                out=wish.out / target.name / f"probe-{number}",
                ceiling=False,
            )
            if _record(once):
                raise click.exceptions.Exit(EXIT_INCOMPLETE)
            finding, why = judge_probe(make_report(once.out, measures), gates)
            said = f"{target.name}: {name} {rate:.10g} {finding.value}: {why}"
            console.print(said, markup=False)
            return finding

        found = search(probe, first)
        least = "at least " if found.bounded else ""
        said = f"{least}{found.holds:.10g} {name}"
        if found.bounded and not found.holds:
            code, said = EXIT_INVALID, "unknown"
        console.print(f"{target.name}: capacity is {said}")
    return code


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
    click.echo(f"{len(wanted.bars)} storms, {len(missed)} bars missed")
    raise click.exceptions.Exit(EXIT_FAILED if missed else 0)


main.add_command(record)
main.add_command(replay)

if __name__ == "__main__":
    sys.exit(main())
