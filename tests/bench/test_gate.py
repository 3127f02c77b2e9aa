"""Gate files: what is refused, and what a session must hold to."""

from pathlib import Path

import pytest

from bench.gate import GateError, complaints, read_gate
from bench.report.results import Comparison, Results, Target

GOOD = """
targets: [ours, etcd]
storms:
  swarm-burst:
    seconds: 10
    parameters: {claims: 5}
    ratios: {server_cpu_per_operation_us: 0.6, rate_per_second: 0.9}
"""


def read(tmp_path: Path, text: str) -> object:
    """The gate that a file with this text is."""
    file = tmp_path / "gate.yaml"
    file.write_text(text)
    return read_gate(file)


def test_a_gate_file_is_read(tmp_path: Path) -> None:
    """Its numbers arrive, and what it leaves out has defaults."""
    (tmp_path / "gate.yaml").write_text(GOOD)
    gate = read_gate(tmp_path / "gate.yaml")
    (bar,) = gate.bars
    assert (gate.targets, gate.repetitions, gate.seed) == (("ours", "etcd"), 5, 1)
    assert (bar.storm.NAME, bar.preset, bar.seconds) == ("swarm-burst", "xs", 10)
    assert bar.parameters.claims == 5
    assert bar.ratios == {"server_cpu_per_operation_us": 0.6, "rate_per_second": 0.9}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "a mapping is wanted"),
        ("{", "gate.yaml: "),
        ("targets: [ours]\nstorm: {}", "no 'storm'; there are repetitions, seed, storms, targets"),
        ("storms: {hot-status: }", "targets: a list"),
        ("targets: [ours]", "storms: a mapping"),
        ("targets: [ours]\nstorms: {calm: }", "no storm 'calm'; there are idle-background"),
        ("targets: [ours]\nstorms: {hot-status: {preset: xxl}}", "no preset 'xxl'; there are xs"),
        ("targets: [ours]\nstorms: {hot-status: {second: 3}}", "no 'second'; there are"),
        ("targets: [ours]\nstorms: {hot-status: {seconds: no}}", "a number above 0"),
        ("targets: [ours]\nstorms: {hot-status: {seconds: .nan}}", "a number above 0"),
        ("targets: [ours]\nstorms: {hot-status: {seconds: .inf}}", "a number above 0"),
        ("targets: [ours]\nstorms: {hot-status: {seconds: 0.5}}", "seconds: 1 or more"),
        ("targets: [ours]\nstorms: {hot-status: }\nrepetitions: 0.5", "a whole number above 0"),
        ("targets: [ours]\nstorms: {hot-status: }\nseed: true", "a whole number above 0"),
        ("targets: [ours]\nstorms: {hot-status: {parameters: {x: 1}}}", "no parameter 'x'"),
        ("targets: [ours]\nstorms: {hot-status: {ratios: {x: 1}}}", "a ratio needs two targets"),
        (GOOD + "repetitions: 3", "a ratio needs 5 repetitions"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_reason(
    tmp_path: Path, text: str, complaint: str
) -> None:
    """Nothing is run on a guess."""
    with pytest.raises(GateError) as refused:
        read(tmp_path, text)
    assert complaint in str(refused.value)
    assert "\n" not in str(refused.value)


def target(name: str, state: str) -> Target:
    """A target of which only the state matters."""
    return Target(
        name=name,
        version="",
        command="",
        durability="",
        client="lean",
        state=state,
        reasons=["because"],
        judges=[],
        runs=[],
        medians={},
        curve=[],
        window_us=0,
        course={},
    )


def row(metric: str, ratio: float, against: str = "etcd") -> Comparison:
    """One figure of ours against another's."""
    return Comparison(
        metric=metric,
        target="ours",
        against=against,
        ratio=ratio,
        low=None,
        high=None,
        runs=5,
        finding="",
    )


@pytest.mark.parametrize(
    ("state", "cpu", "rate", "missed"),
    [
        ("PASS", 0.6, 0.9, []),
        ("PASS", 0.61, 0.9, ["server_cpu_per_operation_us is 0.61"]),
        ("PASS", 0.6, 0.89, ["rate_per_second is 0.89"]),
        ("FAIL", 0.6, 0.9, ["ours is FAIL: because"]),
        ("INVALID", 0.6, 0.9, ["ours is INVALID: because"]),
    ],
)
def test_a_session_is_held_to_its_bar(
    tmp_path: Path, state: str, cpu: float, rate: float, missed: list[str]
) -> None:
    """A verdict or a ratio that is worse is told; one as good as the bar passes."""
    (tmp_path / "gate.yaml").write_text(GOOD)
    (bar,) = read_gate(tmp_path / "gate.yaml").bars
    found: Results = {  # type: ignore[typeddict-item]
        "targets": [target("ours", state), target("etcd", "PASS")],
        "comparisons": [row("server_cpu_per_operation_us", cpu), row("rate_per_second", rate)],
    }
    told = list(complaints(bar, found))
    assert len(told) == len(missed)
    assert all(part in line for part, line in zip(missed, told, strict=True))


def test_a_bar_is_about_the_second_target(tmp_path: Path) -> None:
    """A third one, which is slower, does not hide that the ratio to the second is missed."""
    (tmp_path / "gate.yaml").write_text(GOOD.replace("0.6, rate_per_second: 0.9", "0.6"))
    (bar,) = read_gate(tmp_path / "gate.yaml").bars
    name = "server_cpu_per_operation_us"
    found: Results = {  # type: ignore[typeddict-item]
        "targets": [target(one, "PASS") for one in ("ours", "etcd", "kine")],
        "comparisons": [row(name, 0.9), row(name, 0.1, "kine")],
    }
    (told,) = complaints(bar, found)
    assert f"{name} is 0.90" in told


def test_without_ratios_a_busy_machine_does_no_harm(tmp_path: Path) -> None:
    """Verdicts hold or not, however late the generator was; a failed one still counts."""
    (tmp_path / "gate.yaml").write_text("targets: [ours]\nstorms: {hot-status: }")
    (bar,) = read_gate(tmp_path / "gate.yaml").bars
    for state, many in (("INVALID", 0), ("FAIL", 1), ("NOT JUDGED", 1)):
        found: Results = {"targets": [target("ours", state)], "comparisons": []}  # type: ignore[typeddict-item]
        assert len(list(complaints(bar, found))) == many


def test_a_ratio_that_was_not_measured_is_a_miss(tmp_path: Path) -> None:
    """A bar on a figure that does not exist can never pass."""
    (tmp_path / "gate.yaml").write_text(GOOD)
    (bar,) = read_gate(tmp_path / "gate.yaml").bars
    found: Results = {"targets": [target("ours", "PASS")], "comparisons": []}  # type: ignore[typeddict-item]
    assert "was not measured" in next(complaints(bar, found))
