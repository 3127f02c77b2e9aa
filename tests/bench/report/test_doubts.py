"""What a report says beside its verdicts: why not, what was done on purpose, and what to do."""

import shutil
from pathlib import Path

import pytest

from bench.plan import Trouble
from bench.punctuality import GENERATOR_CPU_MAX, SEND_LAG_P99_US_MAX
from bench.records import NEVER_US, Records
from bench.report.doubts import Doubt, of_generator
from bench.report.incidents import incidents
from bench.report.page import HIDDEN, REFUSED, UNSTEADY, own_reasons, page, troubles, versions
from bench.report.results import Results, build, stored
from bench.report.session import run_folder, write_verdicts
from bench.verdicts import Verdict
from tests.bench.report.made import CAPSULE, SECOND, Run, session
from tests.bench.report.test_page import said
from tests.storms.table import RESULTS

LOST = Verdict("Reliable", 40, 1, ("revision 17 is missing",))


def late(run: Run) -> None:
    """Make the generator late."""
    for n in range(50):
        run.op(n * 1000, lag=20_000, latency=30_000, actor=9000 + n)


def slowed(run: Run) -> None:
    """A loopback that was slower before this run."""
    run.facts["loopback_us"] *= 1.2


def killed(run: Run) -> None:
    """A server that was killed twice, and connections cut once, as two processes tell of it."""
    run.incident(300_000, 700_000, Trouble.KILL)
    run.incident(800_000, 850_000, Trouble.KILL)
    run.incident(100_000, 100_200)
    run.incident(100_050, 100_300)


def made(folder: Path, *, names: str = "ours etcd", **how: object) -> Results:
    """Results of a small session."""
    means = dict.fromkeys(names.split(), 2000.0)
    session(folder, means_us=means, seconds=1, repetitions=2, **how)  # type: ignore[arg-type]
    return build(folder)


@pytest.mark.slow
def test_the_generators_own_figures_are_never_hidden(tmp_path: Path) -> None:
    """An INVALID run shows how late its generator was and what it used, and no server's figure."""
    results = made(tmp_path, names="ours", changes={"ours": late})
    (target,) = results["targets"]
    assert "INVALID" == target["state"]
    assert [{}] * 2 == [run["values"] for run in target["runs"]]
    assert [20_000] * 2 == [run["generator"]["send_lag_p99_us"] for run in target["runs"]]
    for shown in (page(results), said(results)):
        assert "20 ms" in shown
        assert "% of a core" in shown
        assert 1 == " ".join(shown.split()).count("The generator was late: stop other programs")
        assert 1 == shown.count("run 0: send lag p99")
        assert 2 == shown.count("send lag p99 20.0 ms")


@pytest.mark.slow
def test_a_machine_that_was_not_steady_is_told_of_once(tmp_path: Path) -> None:
    """Beside the reason stand both sides of the difference, and each run says that it is complete.

    What to do about it stands there, too.
    """
    results = made(tmp_path, changes={"etcd": slowed})
    (reason,) = results["unsteady"]
    assert "loopback differed by 20 % between the targets' runs, 15 % is allowed" == reason
    text = page(results).replace("&#39;", "'")
    for shown in (text, said(results)):
        assert 1 == shown.count(reason)
        assert 1 == " ".join(shown.split()).count("The machine was not the same for all targets")
    assert 4 == text.count("complete; session INVALID: machine not steady")
    assert 0 == text.count("<td>COMPLETE</td>")
    means = {speed["name"]: speed["means_us"] for speed in results["machine"]}
    assert {"ours": 20, "etcd": 24} == pytest.approx(means["loopback"])
    assert '20 us</td><td class="number">24 us</td><td class="number">20 %' in text


@pytest.mark.slow
def test_a_machine_that_changed_under_one_target_has_its_advice(tmp_path: Path) -> None:
    """A second target would cancel it."""
    after = CAPSULE | {"fsync_p50_us": CAPSULE["fsync_p50_us"] * 2}
    results = made(tmp_path, names="ours", after=after)
    assert [Doubt.DRIFTED.value] == results["advice"]


@pytest.mark.slow
def test_what_is_sound_needs_no_advice(tmp_path: Path) -> None:
    """A PASS has none; runs that nobody judged have theirs."""
    assert [] == made(tmp_path)["advice"]
    shutil.rmtree(tmp_path)
    results = made(tmp_path, verdicts={"ours": [Verdict("Ordered", 0)]})
    assert [Doubt.UNSEEN.value] == results["advice"]


@pytest.mark.parametrize(
    ("values", "replayed", "doubts"),
    [
        ({"operations": 9.0, "send_lag_p99_us": SEND_LAG_P99_US_MAX}, False, []),
        ({"operations": 9.0, "send_lag_p99_us": SEND_LAG_P99_US_MAX + 1}, False, [Doubt.LATE]),
        ({"operations": 9.0, "send_lag_p99_us": 9e9}, True, [Doubt.LATE_REPLAY]),
        ({"operations": 9.0, "generator_cores_max": GENERATOR_CPU_MAX + 0.1}, False, [Doubt.BUSY]),
        ({"operations": 0.0}, False, [Doubt.EMPTY]),
    ],
)
def test_each_doubt_about_the_generator_has_its_kind(
    values: dict[str, float], doubts: list[Doubt], *, replayed: bool
) -> None:
    """Just beyond what is allowed, and not before."""
    assert doubts == list(of_generator(values, replayed=replayed))


@pytest.mark.slow
def test_kills_are_shown_with_their_outages(tmp_path: Path) -> None:
    """How many in each run, when, and for how long the server was gone; the longest is a figure."""
    results = made(tmp_path, names="ours", changes={"ours": killed})
    (target,) = results["targets"]
    first = [(row.repetition, row.what, row.outage) for row in troubles([target])][:2]
    times = "\N{MULTIPLICATION SIGN}"
    assert [
        (0, f"1 {times} connections dropped, at 0.1 s", ""),
        (0, f"2 {times} kill -9, at 0.3, 0.8 s", "400 ms, 50 ms"),
    ] == first
    assert 400_000 == target["medians"]["kill_outage_max_us"]
    text = said(results)
    assert 2 == text.count(f"2 {times} kill -9, at 0.3, 0.8 s")
    assert 2 == text.count("400 ms, 50 ms")


@pytest.mark.slow
def test_an_outage_is_a_speed(tmp_path: Path) -> None:
    """Of a server that broke a promise the kills are shown, and not how soon it was back.

    Where nothing was done on purpose, the page says how it could be.
    """
    wrong = {"ours": [LOST]}
    results = made(tmp_path, names="ours", verdicts=wrong, changes={"ours": killed})
    for shown in (page(results), said(results)):
        assert "kill -9, at 0.3, 0.8 s" in shown
        assert "400 ms" not in shown
    shutil.rmtree(tmp_path)
    calm = page(made(tmp_path, names="ours", verdicts=wrong))
    assert "<code>--kill9 N</code>" in calm
    assert "&#215;" not in calm


@pytest.mark.slow
def test_drops_told_by_two_processes_are_one(tmp_path: Path) -> None:
    """And one a second later is another."""
    run = Run(tmp_path)
    for at in (0, 10, SECOND + 20):
        run.incident(at, at + 5)
    run.write()
    assert [0, SECOND + 20] == [one["at_us"] for one in incidents(Records(tmp_path))]


@pytest.mark.slow
def test_who_never_answered_has_no_outage(tmp_path: Path) -> None:
    """A server that did not come back after a kill was not back when the run ended."""

    def gone(run: Run) -> None:
        run.incident(10, 400_010, Trouble.KILL)
        run.incident(SECOND, 2 * NEVER_US, Trouble.KILL)

    (target,) = made(tmp_path, names="ours", changes={"ours": gone})["targets"]
    outages = [one["outage_us"] for one in target["runs"][0]["incidents"]]
    assert [400_000, None] == outages
    assert 400_000 == target["medians"]["kill_outage_max_us"]


@pytest.mark.slow
def test_a_judge_tells_its_rule_and_what_it_lacked(tmp_path: Path) -> None:
    """In the page beside its name; on the terminal judges that lacked the same stand together."""
    idle = [
        Verdict("TTL window", 0, rule="Keys stay.", lacking="no lease was asked for"),
        Verdict("TTL overdue", 0, rule="Keys go.", lacking="no lease was asked for"),
        LOST,
    ]
    results = made(tmp_path, verdicts={"ours": idle, "etcd": [*idle[:1], LOST]})
    text = page(results)
    assert "Keys stay." in text
    assert 3 == text.count("no lease was asked for")
    wanted = "not judged, since no lease was asked for: TTL window, TTL overdue (ours)"
    assert wanted in said(results)


@pytest.mark.slow
def test_what_was_lacking_in_some_runs_only_is_not_told(tmp_path: Path) -> None:
    """A judge that looked at something in one run was applied."""
    idle = Verdict("Ordered", 0, rule="Order.", lacking="nothing was watched")
    made(tmp_path, names="ours", verdicts={"ours": [idle, LOST]})
    write_verdicts(run_folder(tmp_path, "ours", 1), [Verdict("Ordered", 7), LOST])
    (judge,) = (o for o in build(tmp_path)["targets"][0]["judges"] if o["judge"] == "Ordered")
    assert (7, "", "Order.") == (judge["checked"], judge["lacking"], judge["rule"])


@pytest.mark.slow
def test_versions_stand_beside_each_target(tmp_path: Path) -> None:
    """What every run's server said of itself, and what its command said before the session."""

    def changed(run: Run) -> None:
        run.facts["version"] = f"3.6.{run.facts['repetition']}"

    results = made(tmp_path, verdicts={"etcd": [LOST], "ours": [LOST]}, changes={"etcd": changed})
    for shown in (page(results), said(results)):
        assert "3.6.0, 3.6.1 (etcd Version: 3.6.14)" in " ".join(shown.split())


@pytest.mark.slow
def test_results_of_older_versions_are_shown(tmp_path: Path) -> None:
    """What was kept before some of it was known, and has no raw records, still has a page."""
    shutil.copy(RESULTS / "noisy-shard.json", tmp_path / "results.json")
    results = stored(tmp_path)
    assert "ours PASS" in " ".join(said(results).split())
    assert "noisy-shard: neighbours are served" in page(results)


@pytest.mark.slow
def test_an_invalid_session_says_why_at_each_place(tmp_path: Path) -> None:
    """Beside each target, once for both of a pair, and below outages that are not shown."""
    results = made(tmp_path, changes={"etcd": slowed, "ours": killed})
    assert ["ours / etcd: ours and etcd are INVALID"] == results["not_compared"]
    assert [[UNSTEADY]] * 2 == [own_reasons(results, one) for one in results["targets"]]
    for text in (page(results), said(results)):
        assert 1 == " ".join(text.split()).count(HIDDEN)


@pytest.mark.slow
def test_what_a_kill_does_to_latencies_is_told(tmp_path: Path) -> None:
    """On the page and on the terminal; where no server was killed nothing is said."""
    for name, change, expected in (("killed", killed, 1), ("quiet", lambda _: None, 0)):
        (tmp_path / name).mkdir()
        results = made(tmp_path / name, names="ours", changes={"ours": change})
        for text in (page(results), said(results)):
            assert expected == " ".join(text.split()).count(REFUSED)


@pytest.mark.slow
def test_a_version_is_told_once(tmp_path: Path) -> None:
    """What a server says by the API is what its runs say, if it is the same."""
    results = made(tmp_path, names="ours")
    (target,) = results["targets"]
    told = results["session"]["before"]["versions"]
    for command, expected in (
        ("kvstore 0.1.0; API 3.6.0", "3.6.0 (kvstore 0.1.0)"),
        ("API 3.6.0", "3.6.0"),
        ("kvstore 0.1.0; API 3.5.0", "3.6.0 (kvstore 0.1.0; API 3.5.0)"),
    ):
        told["ours"] = command
        assert expected == versions(results, target)
