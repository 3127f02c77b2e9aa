"""Figures of one run, from records whose figures are known."""

from pathlib import Path

import numpy as np
import pytest

from bench.drive.actor import BACKOFF_US
from bench.figures import Figures, figures
from bench.plan import Verb
from bench.records import Outcome, Records
from tests.bench.report.made import SECOND, Run

RESOLUTION = 1e-3
"""Of a histogram of three digits."""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run of ten seconds, still without operations."""
    return Run(tmp_path)


def measured(run: Run) -> Figures:
    """What is made of it."""
    return figures(Records(run.write()))


@pytest.mark.slow
def test_percentiles_are_those_of_the_latencies(run: Run) -> None:
    """Known latencies give their exact percentiles within the histogram's digits."""
    latencies = np.random.default_rng(1).permutation(np.arange(1, 10_001) * 37)
    for n, latency in enumerate(latencies.tolist()):
        run.op(n * 900, latency=latency, lag=0, actor=n)
    values = measured(run).values
    for name, percent in (("p50", 50), ("p90", 90), ("p99", 99), ("p999", 99.9)):
        exact = float(np.percentile(latencies, percent, method="inverted_cdf"))
        assert exact == pytest.approx(values[f"latency_{name}_us"], rel=RESOLUTION)


def test_latency_counts_from_due_and_service_from_sent(run: Run) -> None:
    """What an operation waited before it was sent is latency, and no service time."""
    for n in range(200):
        run.op(n * 1000, latency=900, lag=400, actor=n)
    values = measured(run).values
    assert 900 == values["latency_p50_us"]
    assert 500 == values["service_p50_us"]


@pytest.mark.parametrize("fault", ["unknown", "refused", "unanswered"])
def test_failures_take_the_timeout_and_stand_in_the_budget(run: Run, fault: str) -> None:
    """A failed operation is never faster than the timeout, however fast it failed."""
    for n in range(98):
        run.op(n * 1000, latency=500, actor=n)
    for n in (98, 99):
        outcome = Outcome.REFUSED if fault == "refused" else Outcome.UNKNOWN
        code = 0 if fault == "unanswered" else 14
        run.op(
            n * 1000,
            latency=100,
            actor=n,
            outcome=outcome,
            code=code,
            answered=fault != "unanswered",
        )
    made = measured(run)
    timeout = run.facts["timeout_us"]
    assert timeout == pytest.approx(made.values["latency_p99_us"], rel=RESOLUTION)
    assert timeout == pytest.approx(made.values["service_p99_us"], rel=RESOLUTION)
    expected = {"unknown": "UNKNOWN 14", "refused": "REFUSED 14", "unanswered": "unanswered"}
    assert {expected[fault]: 2} == made.errors
    assert 2 == made.values["errors"]


def test_a_failure_slower_than_the_timeout_is_as_slow_as_it_was(run: Run) -> None:
    """The timeout is the least that a failure counts for."""
    run.op(0, latency=9 * SECOND, outcome=Outcome.UNKNOWN, code=14)
    made = measured(run)
    assert 9 * SECOND == pytest.approx(made.latency.get_max_value(), rel=RESOLUTION)


def test_an_operation_takes_all_its_calls(run: Run) -> None:
    """Reading first and losing a race are part of what a user waits for, and cost CPU for it."""
    for n in range(100):
        at = n * 10_000
        run.op(at, latency=1000, actor=n, step=0, verb=Verb.GET)
        run.op(at + 1000, latency=1000, actor=n, step=0, outcome=Outcome.CONFLICT)
        run.op(at + 2000, latency=1000, actor=n, step=0)
    for at in range(11):
        run.sample(at * SECOND, cpu=at * 30_000)
    made = measured(run)
    values = made.values
    assert (3000, 1000) == pytest.approx(
        (values["latency_p50_us"], values["call_latency_p50_us"]), rel=RESOLUTION
    )
    assert (100, 300, 100) == (values["operations"], values["calls"], values["conflicts"])
    assert 10 == values["rate_per_second"]
    assert 3000 == values["server_cpu_per_operation_us"]
    assert 1000 == values["server_cpu_per_call_us"]
    counts = [made.classes[n]["count"] for n in ("role claim.assign", "verb UPDATE", "verb GET")]
    assert [100, 100, 100] == counts
    assert 3 == values["calls_per_success"]


def test_an_operation_that_was_lost_is_not_completed(run: Run) -> None:
    """Its CPU is borne by those that were, and it improves no latency."""
    for n in range(50):
        run.op(n * 1000, latency=10, actor=n, outcome=Outcome.CONFLICT)
        run.op(n * 1000, latency=5000, actor=n + 50)
    for at in range(11):
        run.sample(at * SECOND, cpu=at * 5000)
    values = measured(run).values
    assert 50 == values["operations_lost"]
    assert 5000 == pytest.approx(values["latency_p50_us"], rel=RESOLUTION)
    assert 1000 == values["server_cpu_per_operation_us"]
    assert 500 == values["server_cpu_per_call_us"]


def test_a_step_that_was_never_sent_took_until_the_end(run: Run) -> None:
    """Half the steps did not come to be sent: the error budget and the median say so."""
    for n in range(50):
        run.op(n * 1000, latency=100, actor=n)
    for n in range(50, 102):
        run.op(SECOND, actor=n, sent=False, outcome=Outcome.UNKNOWN, code=4)
    made = measured(run)
    assert {"never sent": 52} == made.errors
    assert 52 == made.values["errors"]
    assert 9 * SECOND == pytest.approx(made.values["latency_p50_us"], rel=RESOLUTION)
    assert 100 == made.values["service_p50_us"]
    assert [] == made.invalid


def test_a_step_that_was_lost_without_a_call_is_no_error(run: Run) -> None:
    """Others were faster: it is lost as those are that a call told so, which is counted apart."""
    for n in range(50):
        run.op(n * 1000, latency=900, actor=n)
        run.op(SECOND, latency=10, actor=n + 50, sent=n == 0, outcome=Outcome.CONFLICT)
    made = measured(run)
    assert {} == made.errors
    assert (0, 50, 1) == tuple(made.values[n] for n in ("errors", "operations_lost", "conflicts"))
    assert 900 == made.values["latency_p50_us"]


def test_conflicts_and_planned_refusals_are_counted_apart(run: Run) -> None:
    """Neither is an error, and neither improves the latency of what wrote."""
    for n in range(100):
        run.op(n * 1000, latency=5000, actor=n)
        run.op(n * 1000, latency=10, actor=n + 100, outcome=Outcome.CONFLICT)
        run.op(n * 1000, latency=10, actor=n + 200, outcome=Outcome.REFUSED, code=3, refusal=3)
    made = measured(run)
    assert {} == made.errors
    assert 5000 == pytest.approx(made.values["latency_p50_us"], rel=RESOLUTION)
    assert (100, 100, 100) == tuple(
        made.classes[name]["count"] for name in ("all", "conflict", "refusal")
    )
    assert 10 == made.classes["conflict"]["latency_us"]["p50"]


def test_a_refusal_with_another_code_than_planned_is_an_error(run: Run) -> None:
    """Only what the plan asks for is no error."""
    run.op(0, outcome=Outcome.REFUSED, code=8, refusal=3)
    assert {"REFUSED 8": 1} == measured(run).errors


def test_compacted_history_is_refused_without_an_error(run: Run) -> None:
    """A read at a revision that is gone is answered by saying so; nothing else may be."""
    run.op(0, verb=Verb.READ_AT, outcome=Outcome.REFUSED, code=11)
    run.op(1, verb=Verb.READ_AT, outcome=Outcome.REFUSED, code=13)
    run.op(2, verb=Verb.LIST, outcome=Outcome.REFUSED, code=11)
    made = measured(run)
    assert {"REFUSED 11": 1, "REFUSED 13": 1} == made.errors
    assert 1 == made.values["refusals"]


def test_classes_are_by_verb_and_role(run: Run) -> None:
    """Each operation counts in its verb's class and in its role's."""
    for n in range(10):
        run.op(n, latency=100, actor=n, verb=Verb.CREATE, role="claim.create")
        run.op(n, latency=300, actor=n + 10, verb=Verb.UPDATE, role="claim.assign")
    classes = measured(run).classes
    counts = {name: (one["count"], one["latency_us"]["p50"]) for name, one in classes.items()}
    assert counts == {
        "all": (20, 100),
        "verb CREATE": (10, 100),
        "verb UPDATE": (10, 300),
        "role claim.create": (10, 100),
        "role claim.assign": (10, 300),
    }


def test_the_warm_up_is_left_out(run: Run) -> None:
    """What is due before its end is in no latency, no rate and no lag."""
    run.facts["warm_up_us"] = 5 * SECOND
    for n in range(100):
        run.op(-SECOND + n, latency=900_000, lag=800_000, actor=n)
        early = run.op(n * 1000, latency=900_000, lag=800_000, actor=n + 100)
        run.event(early, n * 1000 + 3 * SECOND)
        counted = run.op(5 * SECOND + n * 1000, latency=1000, actor=n + 200)
        run.event(counted, 5 * SECOND + n * 1000 + 2000)
    made = measured(run)
    assert 1000 == pytest.approx(made.values["latency_p99_us"], rel=RESOLUTION)
    assert 2000 == pytest.approx(made.values["watch_lag_p99_us"], rel=RESOLUTION)
    assert 100 / 5 == made.values["rate_per_second"]
    assert [] == made.invalid


def test_a_late_generator_makes_the_run_invalid(run: Run) -> None:
    """One send in fifty that is 6 ms late is beyond 5 ms at the 99th percentile."""
    for n in range(100):
        run.op(n * 1000, lag=6000 if n % 50 == 0 else 10, latency=9000, actor=n)
    made = measured(run)
    assert 6000 == made.values["send_lag_p99_us"]
    assert ["send lag p99 6.0 ms, 5 ms is allowed"] == made.invalid


def test_a_slow_server_is_not_a_late_generator(run: Run) -> None:
    """A step that waited for its actor's answer before it was sent as soon as it could be."""
    for n in range(100):
        run.op(n * 1000, latency=500_000, actor=n)
        run.op(n * 1000 + 10_000, lag=490_020, latency=600_000, actor=n)
    made = measured(run)
    assert [] == made.invalid
    assert 20 == made.values["send_lag_p99_us"]
    assert 600_000 == pytest.approx(made.values["latency_p99_us"], rel=RESOLUTION)


@pytest.mark.parametrize("fault", ["unknown", "unanswered"])
def test_the_pause_after_a_failure_is_not_a_late_generator(run: Run, fault: str) -> None:
    """An actor waits before its next step, whenever that was due; what it waits longer is late."""
    run.facts["timeout_us"] = 30_000
    for n in range(100):
        run.op(
            n * 1000,
            latency=30_000,
            actor=n,
            outcome=Outcome.UNKNOWN,
            code=14,
            answered=fault != "unanswered",
        )
        run.op(n * 1000 + 10_000, lag=BACKOFF_US + 20_070, latency=SECOND, actor=n)
    made = measured(run)
    assert [] == made.invalid
    assert 70 == made.values["send_lag_p99_us"]


def test_no_pause_is_due_between_the_calls_of_a_step(run: Run) -> None:
    """A retry can be sent at once."""
    run.op(0, latency=1000, step=0, outcome=Outcome.CONFLICT)
    run.op(1000, lag=BACKOFF_US, latency=SECOND, step=0)
    assert BACKOFF_US == measured(run).values["send_lag_p99_us"]


def test_waiting_for_a_lease_is_not_a_late_generator(run: Run) -> None:
    """A put that carries a lease can be sent when the lease was granted."""
    run.op(0, latency=50_000, actor=-1, verb=Verb.GRANT, lease=77, role="")
    run.op(0, lag=50_030, latency=60_000, actor=1, lease=77)
    assert 30 == measured(run).values["send_lag_p99_us"]


def test_a_server_taken_away_is_not_a_late_generator(run: Run) -> None:
    """What waits for a connection during a disturbance is left out of the send lag only."""
    run.incident(SECOND, 2 * SECOND)
    run.op(SECOND + 10, lag=3 * SECOND, latency=4 * SECOND, actor=1)
    run.op(8 * SECOND, lag=15, actor=2)
    made = measured(run)
    assert 15 == made.values["send_lag_p99_us"]
    assert 4 * SECOND == pytest.approx(made.latency.get_max_value(), rel=RESOLUTION)


@pytest.mark.parametrize(("most", "invalid"), [(900_000, True), (450_000, False)])
def test_a_busy_generator_makes_the_run_invalid(run: Run, most: int, *, invalid: bool) -> None:
    """Nine tenths of a core are too much for one process, and not for two that share them."""
    run.facts["processes"] = 900_000 // most
    run.op(0)
    for at in range(11):
        run.sample(at * SECOND, cpu=0, own=at * 900_000, most=at * most)
    made = measured(run)
    assert most / SECOND == made.values["generator_cores_max"]
    assert invalid == bool(made.invalid)


def test_one_busy_process_of_two_makes_the_run_invalid(run: Run) -> None:
    """An idle process is no help to one that cannot keep up."""
    run.facts["processes"] = 2
    run.op(0)
    for at in range(11):
        run.sample(at * SECOND, cpu=0, own=at * 1_000_000, most=at * 900_000)
    made = measured(run)
    assert ["generator used 90% of a core in one process, 80% is allowed"] == made.invalid


def test_watch_lag_counts_from_the_write_of_its_revision(run: Run) -> None:
    """An event is matched with its write by revision, whichever comes first in the records."""
    revisions = [run.op(n * 1000, lag=100, latency=600, actor=n) for n in range(100)]
    for n in reversed(range(100)):
        run.event(revisions[n], n * 1000 + 1100)
    values = measured(run).values
    assert 1000 == values["watch_lag_p50_us"]
    assert 500 == values["watch_lag_after_answer_p99_us"]


def test_watches_of_two_processes_are_told_apart(run: Run) -> None:
    """Numbers of watches carry their process in the high bits; each has its own times."""
    other = 1 << 40
    run.watcher(other)
    for n in range(100):
        revision = run.op(n * 1000, actor=n)
        run.event(revision, n * 1000 + 2000, message=n)
        run.event(revision, n * 1000 + 700, message=n, watch=other)
    values = measured(run).values
    assert (2000, 2000) == (values["watch_lag_p50_us"], values["watch_lag_p99_us"])
    assert (700, 700) == (values["watcher_lag_p50_us"], values["watcher_lag_p99_us"])


def test_watch_lag_of_an_event_before_its_answer_is_zero(run: Run) -> None:
    """An event that overtakes the answer has no lag after it."""
    for n in range(100):
        run.event(run.op(n * 1000, latency=900, actor=n), n * 1000 + 300)
    values = measured(run).values
    assert 0 == values["watch_lag_after_answer_p99_us"]
    assert 300 == values["watch_lag_p99_us"]


def test_history_and_slow_readers_have_no_watch_lag(run: Run) -> None:
    """Watches opened after the write, and those that read slowly on purpose, are left out."""
    revision = run.op(0, latency=10)
    run.event(revision, 40)
    run.watcher(1)
    run.event(revision, 70, watch=1)
    for watch in (2, 3):
        run.watcher(watch, opened=5 * SECOND, apiserver=0)
        run.watcher(watch + 2, slow=10)
        run.event(revision, 6 * SECOND, watch=watch)
        run.event(revision, 9 * SECOND, watch=watch + 2)
    values = measured(run).values
    assert 40 == values["watch_lag_p50_us"]
    assert 70 == values["watcher_lag_p50_us"]


def test_resources_are_divided_by_what_was_served(run: Run) -> None:
    """CPU per answered operation and per event, bytes per write, memory at its peak and end."""
    for n in range(50):
        run.event(run.op(n * 1000, actor=n), n * 1000 + 2000)
        run.op(n * 1000, actor=n + 50, verb=Verb.GET)
    for at in range(11):
        rss = (9 if at == 5 else 4) << 20
        run.sample(at * SECOND, cpu=7_000 + at * 1000, rss=rss, written=at * 5000, disk=at)
    values = measured(run).values
    assert 100 == values["server_cpu_per_operation_us"]
    assert 200 == values["server_cpu_per_event_us"]
    assert 1000 == values["written_per_write_bytes"]
    assert (9 << 20, 4 << 20) == (values["server_rss_max_bytes"], values["server_rss_end_bytes"])
    assert 10 == values["disk_end_bytes"]


def test_a_server_that_is_not_followed_has_no_resources(run: Run) -> None:
    """Nothing is said of what was not measured; of the generator it is."""
    run.op(0)
    for at in range(11):
        run.sample(at * SECOND, cpu=-1, rss=-1, written=-1, disk=-1, own=at)
    made = measured(run)
    assert not [name for name in made.values if name.startswith(("server", "disk", "written"))]
    assert "generator_cores_max" in made.values
    assert [None] * 10 == made.windows["server_cores"]


def test_windows_show_the_course(run: Run) -> None:
    """Each second has its own rate, latencies, CPU and memory; an empty one has none."""
    for n in range(10):
        run.op(2 * SECOND + n * 1000, latency=(n + 1) * 100, actor=n)
        run.event(run.op(4 * SECOND + n, latency=7000, actor=n), 4 * SECOND + n + 8000)
    for at in range(21):
        run.sample(at * SECOND // 2, cpu=at * at * 1000, rss=(at + 1) << 20)
    windows = measured(run).windows
    assert SECOND == windows["width_us"]
    assert [0, 0, 10, 0, 10, 0, 0, 0, 0, 0] == windows["rate_per_second"]
    assert [None, None, 500, None, 7000, *[None] * 5] == windows["latency_p50_us"]
    assert [None, None, 1000, None, 7000, *[None] * 5] == windows["latency_p99_us"]
    assert [None] * 4 + [8000.0] + [None] * 5 == windows["watch_lag_p99_us"]
    assert 0.004 == pytest.approx(windows["server_cores"][0])
    assert 2 << 20 == windows["server_rss_bytes"][0]


def test_long_loads_have_windows_of_ten_seconds(tmp_path: Path) -> None:
    """Two minutes are twelve windows."""
    run = Run(tmp_path, duration_us=120 * SECOND)
    run.op(0)
    windows = measured(run).windows
    assert 10 * SECOND == windows["width_us"]
    assert 12 == len(windows["rate_per_second"])


def test_percentiles_beyond_the_last_operation_are_not_given(run: Run) -> None:
    """A hundred operations have a 99th percentile and no 99.9th."""
    for n in range(100):
        run.op(n, actor=n)
    values = measured(run).values
    assert "latency_p99_us" in values
    assert "latency_p999_us" not in values


def test_a_run_without_operations_is_invalid(run: Run) -> None:
    """Nothing was measured, and that is said."""
    assert ["no operation was due after the warm-up"] == measured(run).invalid
