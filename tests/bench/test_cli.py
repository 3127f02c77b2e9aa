"""The command as users meet it: what it refuses, what it leaves behind, how it ends."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from bench.cli import main
from bench.client.asking import reach
from bench.options import EXIT_FAILED, EXIT_INCOMPLETE, EXIT_INVALID, EXIT_REFUSED
from bench.plan import Verb
from bench.records import OPS, Records
from bench.report.results import Results
from bench.run.session import Wish, make_plan
from bench.storms import STORMS, bounds, meanings, told
from bench.targets import Target
from kvstore.pb import rpc_pb2 as pb
from tests.bench.report.made import session as make_session

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "bench.cli"]
SMALL = ["--seconds", "2", "--reps", "1", "--no-background", "--set", "lists_per_second=1"]
SMALL += ["--set", "objects_per_kind=20"]
"""A load that takes no time to speak of."""
HELD = (0, EXIT_INVALID)
"""Every verdict held, whether or not the machine was quiet enough for timings."""


@contextmanager
def command(*words: object) -> "Iterator[subprocess.Popen[str]]":
    """A command of ours in a process of its own, which ends with the body."""
    with subprocess.Popen(
        [*COMMAND, *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def fake(fault: str = "none", occasion: int = 1) -> str:
    """The command of a small etcd, with a fault of the given name."""
    return f"fake={sys.executable} -m tests.bench.fake_etcd {{port}} {fault} {occasion} {{dir}}"


def say(*words: str) -> tuple[int, str]:
    """Run the command in this process; its exit code, and all that it says."""
    done = CliRunner().invoke(main, list(words))
    return done.exit_code, done.output


def run_storm(out: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run a small storm in a process of its own."""
    return run_command("run", "selector-read", *SMALL, "--out", out, *words)


def run_command(*words: object) -> "subprocess.CompletedProcess[str]":
    """Run a command of ours in a process of its own."""
    return subprocess.run(
        [*COMMAND, *map(str, words)],
        capture_output=True,
        check=False,
        cwd=ROOT,
        text=True,
        timeout=120,
    )


@contextmanager
def speaking(answer: bytes) -> Iterator[str]:
    """A server that says one thing to everybody; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError:
                    return
                with peer:
                    peer.recv(1000)
                    peer.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_storms_are_listed_with_what_they_do() -> None:
    """A user finds every storm, and its parameters, without a manual."""
    code, told = say("storms")
    assert code == 0
    assert list(STORMS) == [line.split()[0] for line in told.splitlines()]
    code, told = say("storms", "swarm-burst")
    assert code == 0
    assert re.search(r"^claims +50 +300 +1000 +3000\n  In one burst, over ", told, re.MULTILINE)


@pytest.mark.parametrize("name", STORMS)
def test_every_parameter_has_a_meaning(name: str) -> None:
    """What a user may change is told in a sentence, for every storm."""
    said = meanings(STORMS[name])
    assert set(said) == set(asdict(STORMS[name].PRESETS["xs"]))
    assert all(text.endswith(".") for text in said.values())
    shown = say("storms", name)[1]
    for parameter, text in said.items():
        assert f"{text} ({told(bounds(STORMS[name], parameter))})" in shown


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["storms", "calm"], "no storm 'calm'; there are idle-background, "),
        (["run", "calm"], "no storm 'calm'; there are idle-background, "),
        (["run", "hot-status", "--preset", "xxl"], "no preset 'xxl'; there are xs, s, m, l"),
        (["run", "hot-status", "--set", "claims=1"], "no parameter 'claims'; there are writers, "),
        (["run", "hot-status", "--set", "writers=many"], "a whole number of 1 to 1,000 is wanted"),
        (["run", "hot-status", "--set", "writers"], "--set writers: NAME=VALUE is wanted"),
        (["run", "hot-status", "--set", "apiservers=0"], "a whole number of 1 to 100 is wanted"),
        (["run", "swarm-burst", "--set", "tenants=0"], "a whole number of 1 to 10,000 is wanted"),
        (["run", "hot-status"], "nothing to measure: --start ours, --start etcd or --target"),
        (["run", "hot-status", "--start", "redis"], "ours, etcd, kine, or NAME=COMMAND"),
        (["run", "hot-status", "--start", "ours", "--start", "ours"], "two targets are named ours"),
        (["run", "hot-status", "--target", "x=https://h:1"], "NAME=http://HOST:PORT is wanted"),
        (["run", "hot-status", "--target", "x=h:port"], "--target x=h:port: "),
        (["run", "hot-status", "--target", "../x=h:1"], "'../x' is no name for a target"),
        (["run", "hot-status", "--start", "etcd", "--etcd-bin", "/none"], "/none: not a program"),
    ],
)
def test_wrong_words_are_refused_in_one_line(
    tmp_path: Path, words: list[str], complaint: str
) -> None:
    """The line says what exists; nothing has been started or written."""
    out = tmp_path / "out"
    code, told = say(*words, *(["--out", str(out)] if words[0] == "run" else []))
    assert code == EXIT_REFUSED
    assert complaint in told
    assert told.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--seconds", "nan"],
        ["--seconds", "inf"],
        ["--seconds", "0.5"],
        ["--seconds", "0"],
        ["--reps", "0"],
        ["--timeout", "nan"],
        ["--seed", "-1"],
        ["--capacity", "--p99-ms", "-3"],
        ["--capacity", "--watch-p99-ms", "0"],
        ["--capacity", "--p99-ms", "nan"],
    ],
)
def test_numbers_that_are_none_are_refused(tmp_path: Path, words: list[str]) -> None:
    """The line names the flag, before any server is started."""
    out = tmp_path / "out"
    started = ["--start", "x=/nonexistent {port} {dir}", "--out", str(out)]
    code, told = say("run", "hot-status", *started, *words)
    assert code == EXIT_REFUSED
    assert told.startswith(f"kvstore-bench: Invalid value for '{words[-2]}': ")
    assert told.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("command", [["run", "hot-status"], ["gate"]])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, command: list[str]) -> None:
    """Before anything is measured, in one line."""
    file = tmp_path / "gate.yaml"
    file.write_text("targets: [ours]\nstorms: {hot-status: }")
    words = [str(file)] if command == ["gate"] else ["--start", "ours"]
    code, told = say(*command, *words, "--out", "/proc/foo")
    assert (code, told.count("\n")) == (EXIT_REFUSED, 1)
    assert "--out /proc/foo: " in told


def results(states: Sequence[str], session: str = "COMPLETE") -> Results:
    """Results of which only states matter."""
    targets = [
        {"name": f"target-{n}", "state": state, "reasons": ["late by 9 s"]}
        for n, state in enumerate(states)
    ]
    return {"session": {"state": session}, "targets": targets, "comparisons": []}  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    ("states", "session", "code", "line"),
    [
        (["PASS", "PASS"], "COMPLETE", 0, ""),
        (["PASS", "FAIL"], "COMPLETE", EXIT_FAILED, ""),
        (["INVALID", "FAIL"], "COMPLETE", EXIT_FAILED, ""),
        (["PASS", "INVALID"], "COMPLETE", EXIT_INVALID, ""),
        (["NOT JUDGED"], "COMPLETE", EXIT_INVALID, ""),
        (["INCOMPLETE", "PASS"], "COMPLETE", EXIT_INCOMPLETE, "INCOMPLETE: "),
        (["INVALID"], "INCOMPLETE", EXIT_INCOMPLETE, "INCOMPLETE: "),
        (["FAIL", "INCOMPLETE"], "INCOMPLETE", EXIT_FAILED, "INCOMPLETE: "),
    ],
)
def test_the_exit_code_tells_how_it_came_out(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    states: list[str],
    session: str,
    code: int,
    line: str,
) -> None:
    """What holds, what does not, and what cannot be believed are told apart without a reader.

    A gate that asks for verdicts alone takes a session whose timings are not to be believed.
    """
    monkeypatch.setattr("bench.cli._record", lambda _: False)
    monkeypatch.setattr("bench.cli.build", lambda *_: results(states, session))
    monkeypatch.setattr("bench.cli.keep", lambda *_: None)
    monkeypatch.setattr("bench.cli.summary", lambda _: [])
    found, told = say("run", "hot-status", "--start", "ours", "--out", str(tmp_path / "out"))
    assert found == code
    assert line in told
    assert "late by 9 s" not in told, "reasons are the summary's, once"
    file = tmp_path / "gate.yaml"
    file.write_text("targets: [ours]\nstorms: {hot-status: }")
    found, _ = say("gate", str(file), "--out", str(tmp_path / "out"))
    assert found == (0 if set(states) <= {"PASS", "INVALID"} else EXIT_FAILED)


def test_what_was_measured_is_not_overwritten(tmp_path: Path) -> None:
    """A folder with anything in it is refused."""
    (tmp_path / "kept").write_text("kept")
    code, told = say("run", "hot-status", "--start", "ours", "--out", str(tmp_path))
    assert code == EXIT_REFUSED
    assert "nothing is overwritten" in told


def test_a_rival_that_is_not_there_comes_with_the_way_to_build_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in PATH nor built by the tests: one line tells how."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("bench.targets._BUILT", tmp_path)
    code, told = say("run", "hot-status", "--start", "etcd", "--out", str(tmp_path / "out"))
    assert code == EXIT_REFUSED
    assert "go build -o ../bin/etcdref36" in told


def test_a_target_that_does_not_answer_is_told_apart(tmp_path: Path) -> None:
    """Unreachable and not etcd are one line each, before anything is sent or written."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    out = ["--out", str(tmp_path / "out")]
    code, told = say("run", "hot-status", "--target", f"x=127.0.0.1:{port}", *out)
    assert (code, told.count("\n")) == (EXIT_REFUSED, 1)
    assert "cannot be reached" in told
    with speaking(b"HTTP/1.1 400 Bad Request\r\n\r\n") as address:
        code, told = say("run", "hot-status", "--target", f"x={address}", *out)
    assert (code, told.count("\n")) == (EXIT_REFUSED, 1)
    assert "does not speak HTTP/2" in told


@pytest.mark.slow
def test_a_prefix_keeps_others_history(tmp_path: Path) -> None:
    """A server that is shared is not compacted by the background, and a storm that does is refused.

    On servers of our own the background compacts.
    """
    target = ["run", "hot-status", "--target", "mine=127.0.0.1:1", "--reps", "1"]
    shared = [*target, "--prefix", "/bench", "--out", str(tmp_path / "out")]
    assert "cannot be reached" in say(*shared)[1]
    shared[1] = "compact-churn"
    code, told = say(*shared)
    assert (code, told.count("\n")) == (EXIT_REFUSED, 1)
    assert "compacts, which no --prefix of mine confines" in told
    for prefix, targets, compacts in (
        ("/bench", [Target(name="mine")], False),
        ("", [Target(name="mine")], True),
        ("/bench", [Target(name="ours", command="ours")], True),
    ):
        storm = STORMS["hot-status"]
        wish = Wish(
            storm=storm,
            preset="xs",
            parameters=storm.PRESETS["xs"],
            targets=targets,
            repetitions=1,
            seed=1,
            duration_us=3_000_000,
            out=Path("out"),
            prefix=prefix,
        )
        steps = (step for actor in make_plan(wish).actors for step in actor.steps)
        assert compacts == any(step.verb == Verb.COMPACT for step in steps)


@pytest.mark.slow
def test_a_run_leaves_a_report_that_can_be_made_again(tmp_path: Path) -> None:
    """Verdicts, results and page are there; from raw data they come out the same."""
    done = run_storm(tmp_path / "out", "--start", fake())
    assert done.returncode in HELD, done.stderr
    made = {
        name: (tmp_path / "out" / name).read_bytes() for name in ("results.json", "report.html")
    }
    code, told = say("report", str(tmp_path / "out"))
    assert code == 0
    assert "Reliable" in told
    assert made == {name: (tmp_path / "out" / name).read_bytes() for name in made}


@pytest.mark.slow
def test_a_violation_fails_the_run_and_hides_its_speed(tmp_path: Path) -> None:
    """The exit code says so, the evidence is shown, and no figure of that target is anywhere."""
    done = run_storm(tmp_path / "out", "--start", fake("lost_event", 30))
    assert done.returncode == EXIT_FAILED, done.stderr
    assert "FAIL Reliable: 1 of" in done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    (target,) = results["targets"]
    assert target["state"] == "FAIL"
    assert not target["medians"]
    assert "latency" not in done.stdout


@pytest.mark.slow
def test_interrupted_a_run_keeps_and_reports_what_there_is(tmp_path: Path) -> None:
    """Ctrl-C ends the load in order: exit code 3, state INCOMPLETE, records and report."""
    out = tmp_path / "out"
    words = ["run", "selector-read", *SMALL, "--seconds", "60", "--out", str(out)]
    with command(*words, "--start", fake()) as process:
        begun = out / "fake" / "0" / "assignment.json"
        while not begun.exists() and process.poll() is None:
            time.sleep(0.1)
        time.sleep(5)  # filling 120 objects takes a moment; the load lasts a minute
        process.send_signal(signal.SIGINT)
        said, complaint = process.communicate(timeout=60)
    assert process.returncode == EXIT_INCOMPLETE, complaint
    assert "INCOMPLETE" in said + complaint
    facts = json.loads((out / "fake" / "0" / "run.json").read_text())
    assert facts["state"] == "INCOMPLETE"
    assert facts["load_end_us"] < 20_000_000
    assert (out / "report.html").exists()


async def leases_at(port: int) -> list[int]:
    """Those that a server knows; to end one that it does not know is no error."""
    asking = await reach("127.0.0.1", port, 5)
    await asking.revoke(1)
    raw = await asking.call(b"/etcdserverpb.Lease/LeaseLeases", b"")
    await asking.leave()
    return [lease.ID for lease in pb.LeaseLeasesResponse.FromString(raw).leases]


@pytest.mark.slow
def test_a_server_that_runs_is_left_as_it_was(tmp_path: Path) -> None:
    """Not empty: refused, unless a prefix keeps the run apart; afterwards nothing of it is left."""
    data = str(tmp_path / "data")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    serve = [str(Path(sys.executable).with_name("kvstore")), "serve", "--data-dir", data]
    with subprocess.Popen(
        [*serve, "--listen-client-urls", url], stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stderr is not None
            while "ready to serve" not in server.stderr.readline():
                pass
            done = run_storm(tmp_path / "one", "--target", f"it={url}", "--prefix", "/theirs")
            assert done.returncode in HELD, done.stderr
            records = tmp_path / "one" / "it" / "0"
            assert json.loads((records / "run.json").read_text())["prefix"] == "/theirs"
            done = run_storm(tmp_path / "two", "--target", f"it={url}")
            assert done.returncode in HELD, done.stderr  # the first run has cleaned up
            events = ("run", "event-ttl", "--seconds", "2", "--reps", "1", "--out")
            done = run_command(*events, tmp_path / "three", "--target", f"it={url}")
            assert done.returncode in HELD, done.stderr
            assert Verb.GRANT in Records(tmp_path / "three" / "it" / "0").frame(OPS)["verb"]
            assert asyncio.run(leases_at(port)) == []
        finally:
            server.kill()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "Usage: "),
        (["frobnicate"], "kvstore-bench: No such command 'frobnicate'."),
        (["run"], "kvstore-bench: Missing argument 'STORM'."),
        (
            ["report", "/no/such"],
            "kvstore-bench: Invalid value for 'FOLDER': Directory '/no/such' ",
        ),
    ],
)
def test_words_that_make_no_command_are_one_line(words: list[str], complaint: str) -> None:
    """But who says nothing at all is shown what there is."""
    code, told = say(*words)
    assert code == EXIT_REFUSED
    assert told.startswith(complaint)
    assert (told.count("\n") == 1) == bool(words)


def test_kills_are_refused_by_their_name(tmp_path: Path) -> None:
    """A server that was there already is not killed, and the line names the option that asked."""
    out = str(tmp_path / "out")
    words = ["run", "hot-status", "--target", "mine=127.0.0.1:1", "--out", out]
    code, told = say(*words, "--kill9", "2")
    assert code == EXIT_REFUSED
    assert told == "kvstore-bench: --kill9 2 kills its server: mine was not started here\n"


def test_every_option_says_what_it_is() -> None:
    """The help of a run leaves nobody to guess, and tells what holds if nothing is said."""
    run = main.commands["run"]
    assert all(option.help for option in run.params if isinstance(option, click.Option))
    told = " ".join(say("run", "--help")[1].split())
    assert "[default: 30 at xs, 300 else; 60 with --capacity]" in told


def test_interrupted_between_phases_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ctrl-C that nobody else takes, as while a report is made, is one line and INCOMPLETE."""

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bench.cli.find", interrupt)
    code, told = say("storms", "swarm-burst")
    assert code == EXIT_INCOMPLETE
    assert told.strip() == "kvstore-bench: interrupted; what has been recorded is kept"


@pytest.mark.parametrize("command", ["report", "compare", "picture"])
def test_a_folder_without_a_session_is_refused(tmp_path: Path, command: str) -> None:
    """One line that says so, no traceback."""
    others = {"report": [], "compare": [str(tmp_path)], "picture": [str(tmp_path / "x.png")]}
    code, told = say(command, str(tmp_path), *others[command])
    assert code == EXIT_REFUSED
    assert told.count("\n") == 1
    assert ": no session: " in told
    assert "Error" not in told


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["", "{", "{}", "[]", "7", '{"fingerprint": "x"}'])
@pytest.mark.parametrize("file", ["session.json", "ours/0/run.json", "ours/0/ops.0.parquet"])
def test_a_damaged_session_is_refused(tmp_path: Path, file: str, damage: str) -> None:
    """Whatever is cut off or missing is told in one line with the folder's name."""
    folder = tmp_path / "session"
    parameters = asdict(STORMS["swarm-burst"].PRESETS["xs"])
    change = {"ours": lambda run: run.facts.update(parameters=parameters)}
    make_session(folder, means_us={"ours": 900}, repetitions=1, seconds=2, changes=change)
    assert say("report", str(folder))[0] == 0
    assert (folder / file).exists()
    (folder / file).write_text(damage)
    for words in (["report"], ["picture", str(tmp_path / "x.png")], ["compare", str(folder)]):
        code, told = say(words[0], str(folder), *words[1:])
        assert (code, told.count("\n")) == (EXIT_REFUSED, 1), told
        assert str(folder) in told


@pytest.mark.slow
def test_a_session_of_another_version_is_refused(tmp_path: Path) -> None:
    """Parameters that its storm no longer has are one line: figures would be guesses."""
    folder = tmp_path / "session"
    make_session(folder, means_us={"ours": 900}, repetitions=1, seconds=2)
    code, told = say("report", str(folder))
    assert (code, told.count("\n")) == (EXIT_REFUSED, 1)
    assert "swarm-burst has other parameters today: burst" in told
