"""What is in deploy/: accepted by the tools that it is for, and in agreement with the server.

Each tool is also given a file with a planted fault, so that its silence means something. Where a
tool is not installed its test is skipped, but where ``DEPLOY_TOOLS`` says that all were, it fails.
What needs Kubernetes' own programs is in tests/kube.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from backends.urls import POSTGRESQL, SQLITE, Database, find
from kvstore.cli import cli
from kvstore.config import Config
from kvstore.shard_file import parse_shards
from kvstore.shard_metrics import REASONS, STATES, ShardError
from tests.house import House, living, memory, put
from tests.program import ROOT
from tests.scrape import scrape
from tests.transport.peer import connected

DEPLOY = ROOT / "deploy"
DOCKERFILE = DEPLOY / "docker/Dockerfile"
COMPOSE = DEPLOY / "compose/compose.yaml"
UNIT = DEPLOY / "systemd/kvstore.service"
ALERTS = DEPLOY / "prometheus/alerts.yaml"
DATA = "/var/lib/kvstore"
METRICS_PORT = 2381
PATIENCE = 120.0
"""Seconds that a tool may take, on a machine that does much else."""
STOP_SECONDS = Config().server.stop_timeout + Config().server.close_timeout + 1

Object = dict[str, "Json"]
Json = Object | list["Json"] | str | int | float | bool | None


def tool(name: str) -> str:
    """Where a program is."""
    places = [ROOT / "tests/deploy/bin", Path(sys.executable).parent, os.environ["PATH"]]
    found = shutil.which(name, path=os.pathsep.join(map(str, places)))
    if found is None:
        assert "DEPLOY_TOOLS" not in os.environ, f"{name} was to be installed"
        pytest.skip(f"{name} is not installed")
    return found


def run(*words: str | Path, **variables: str) -> tuple[int, str]:
    """Exit code and all output."""
    kept = {name: text for name, text in os.environ.items() if name != "POSTGRES_PASSWORD"}
    done = subprocess.run(
        list(map(str, words)),
        check=False,
        env=kept | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
    )
    return done.returncode, done.stdout


def planted(path: Path, folder: Path, right: str, wrong: str) -> Path:
    """A copy of ``path`` and of what is beside it, with one text replaced."""
    shutil.copytree(path.parent, folder, dirs_exist_ok=True)
    text = path.read_text()
    assert text.count(right) == 1, right
    copy = folder / path.name
    copy.write_text(text.replace(right, wrong))
    return copy


def load(path: Path) -> Json:
    """The one document of a YAML file."""
    loaded: Json = yaml.safe_load(path.read_text())
    return loaded


def at(document: Json, *steps: str | int) -> Json:
    """What is at a place in a document."""
    for step in steps:
        if isinstance(step, int):
            assert isinstance(document, list)
            document = document[step]
        else:
            assert isinstance(document, dict), step
            document = document[step]
    return document


def texts(document: Json, *steps: str | int) -> list[str]:
    """The list of texts at a place."""
    found = at(document, *steps)
    assert isinstance(found, list)
    return list(map(str, found))


# -- Prometheus -----------------------------------------------------------------------------------


def rules() -> dict[str, str]:
    """Expressions by alert."""
    groups = at(load(ALERTS), "groups", 0, "rules")
    assert isinstance(groups, list)
    return {str(at(rule, "alert")): str(at(rule, "expr")) for rule in groups}


@pytest.mark.slow
def test_alerts_do_as_their_tests_say(tmp_path: Path) -> None:
    """Rules and configuration are accepted, every alert fires when it should and only then; a
    broken rule and a threshold that is off are found.
    """
    promtool = tool("promtool")
    folder = ALERTS.parent
    for verb, name in (
        ("config", "prometheus.yaml"),
        ("rules", "alerts.yaml"),
    ):
        assert run(promtool, "check", verb, folder / name)[0] == 0
    code, out = run(promtool, "test", "rules", folder / "alerts_test.yaml")
    assert code == 0, out
    broken = planted(ALERTS, tmp_path / "a", 'up{job="kvstore"} == 0', 'up{job="kvstore"} == = 0')
    assert run(promtool, "check", "rules", broken)[0] != 0
    for right, wrong in (
        ("kvstore_queue_rows > 16000", "kvstore_queue_rows > 18000"),  # one is not raised
        ("kvstore_queue_rows > 16000", "kvstore_queue_rows > 14000"),  # one is raised in health
        ("is {{ $labels.state }}", "is {{ $labels.stat }}"),
    ):
        planted(ALERTS, tmp_path / "b", right, wrong)
        assert run(promtool, "test", "rules", tmp_path / "b/alerts_test.yaml")[0] != 0, wrong


async def test_alerts_ask_for_what_there_is() -> None:
    """Each metric of an alert is on the page, and each state, reason and error can be."""
    async with living(House([memory()])) as house, connected(house.port) as peer:
        await peer.answer(put(peer, b"k"))
        seen = {name for name, _ in (await scrape(house)).samples}
    known = {"state": STATES, "reason": REASONS, "error": tuple(ShardError)}
    for alert, expression in rules().items():
        asked = set(re.findall(r"\b(?:etcd|grpc|kvstore|process)_\w+", expression))
        assert asked <= seen, alert
        assert asked or alert == "KvstoreDown"
        for label, values in re.findall(r'\b(state|reason|error)(?:=~|!=|=)"([^"]+)"', expression):
            assert set(values.split("|")) <= set(known[label]), alert


def test_every_alert_has_a_test() -> None:
    """No rule is without a sample that raises it."""
    tests = (ALERTS.parent / "alerts_test.yaml").read_text()
    raised = set(re.findall(r'alertname="(\w+)"', tests))
    assert set(rules()) == raised


def test_thresholds_follow_the_limits() -> None:
    """Alerts that warn of a limit do so at four fifths of it."""
    commit = Config().commit
    for alert, metric, limit in (
        ("KvstoreQueueFills", "kvstore_queue_rows", commit.queue_rows_max),
        ("KvstoreQueueFills", "kvstore_queue_bytes", commit.queue_bytes_max),
        ("KvstoreBatchesFull", r"kvstore_commit_rows_count\[5m\]\)", commit.batch_rows_max),
    ):
        (threshold,) = re.findall(rf"{metric} > (\d+)", rules()[alert])
        assert int(threshold) == int(limit * 0.8)


# -- command lines --------------------------------------------------------------------------------


class Instruction(NamedTuple):
    """One of a Dockerfile."""

    name: str
    text: str


def instructions() -> list[Instruction]:
    """The Dockerfile's, without comments, continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    found = []
    for line in filter(None, map(str.strip, joined.splitlines())):
        name, _, text = line.partition(" ")
        found.append(Instruction(name, text.strip()))
    return found


def last(name: str) -> str:
    """The last instruction of a name, which is the one that counts."""
    return [each.text for each in instructions() if each.name == name][-1]


def settings(name: str) -> list[str]:
    """All values of a setting in the unit."""
    found = re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)
    return list(map(str, found))


def pod() -> Json:
    """What the StatefulSet runs."""
    return at(load(DEPLOY / "kubernetes/statefulset.yaml"), "spec", "template", "spec")


def commands() -> dict[str, tuple[list[str], dict[str, str]]]:
    """Words and variables of every way in which the server is started."""
    set_by_unit = dict(line.split("=", 1) for line in settings("Environment"))
    return {
        "docker": (json.loads(last("CMD")), {}),
        "compose": (texts(load(COMPOSE), "services", "kvstore", "command"), {}),
        "systemd": (settings("ExecStart")[0].split()[1:], set_by_unit),
        "kubernetes": (texts(pod(), "containers", 0, "args"), {}),
    }


def parse(
    words: list[str], variables: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> Mapping[str, object]:
    """What ``kvstore serve`` makes of its words; raises click's errors."""
    for name in [name for name in os.environ if name.startswith(("ETCD_", "KVSTORE_"))]:
        monkeypatch.delenv(name)
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    command, *flags = words
    return cli.commands[command].make_context(command, flags).params


@pytest.mark.parametrize("way", ["docker", "compose", "systemd", "kubernetes"])
def test_command_lines(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server takes each command line that is written there, keeps its data where they outlive
    it, and shows its metrics where they are looked for.
    """
    words, variables = commands()[way]
    told = parse(words, variables, monkeypatch)
    assert told["data_dir"] == DATA
    metrics = told["listen_metrics_urls"]
    assert isinstance(metrics, list)
    assert [address.port for address in metrics] == [METRICS_PORT]
    with pytest.raises(Exception, match="No such option"):
        parse([*words, "--no-such-flag=1"], variables, monkeypatch)


def test_data_outlive_the_process() -> None:
    """Volumes and directories are where the data is."""
    assert last("VOLUME") == DATA
    assert f"data:{DATA}" in texts(load(COMPOSE), "services", "kvstore", "volumes")
    assert settings("StateDirectory") == [Path(DATA).name]
    mounts = at(pod(), "containers", 0, "volumeMounts")
    assert isinstance(mounts, list)
    assert {"name": "data", "mountPath": DATA} in mounts


def test_time_to_stop() -> None:
    """Whoever stops the server waits at least as long as it may take."""
    grace = at(load(COMPOSE), "services", "kvstore", "stop_grace_period")
    for told in (grace, settings("TimeoutStopSec")[0]):
        assert float(str(told).removesuffix("s")) >= STOP_SECONDS
    seconds = at(pod(), "terminationGracePeriodSeconds")
    assert isinstance(seconds, int)
    assert seconds >= STOP_SECONDS


# -- shards ---------------------------------------------------------------------------------------


def shard_files() -> dict[str, str]:
    """Every configuration of shards, by where it stands."""
    config = load(DEPLOY / "kubernetes/configmap.yaml")
    return {
        "compose/shards.yaml": (DEPLOY / "compose/shards.yaml").read_text(),
        "kubernetes/configmap.yaml": str(at(config, "data", "shards.yaml")),
    }


def databases(text: str) -> Iterator[Database]:
    """The databases of a configuration."""
    for shard in parse_shards(text, name="test").shards:
        yield find(shard.backend_url, data_dir=Path(DATA))


@pytest.mark.parametrize("name", ["compose/shards.yaml", "kubernetes/configmap.yaml"])
def test_shard_files(name: str) -> None:
    """The server reads each configuration of shards; all are used, and files are on the volume."""
    text = shard_files()[name]
    config = parse_shards(text, name=name)
    assert {route.shard for route in config.routes} == set(config.names[1:])
    found = list(databases(text))
    assert len(found) > 1
    for database in found:
        assert database.kind == POSTGRESQL or Path(database.place).is_relative_to(DATA)


def test_the_file_is_where_the_flag_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--config`` names what is mounted."""
    named = parse(*commands()["compose"], monkeypatch)["config"]
    assert at(load(COMPOSE), "services", "kvstore", "configs", 0, "target") == named
    named = parse(*commands()["kubernetes"], monkeypatch)["config"]
    mounts = at(pod(), "containers", 0, "volumeMounts")
    assert isinstance(mounts, list)
    (folder,) = (at(mount, "mountPath") for mount in mounts if at(mount, "name") == "config")
    assert f"{folder}/shards.yaml" == named
    assert {"name": "kvstore-config"} in [
        at(volume, "configMap")
        for volume in (at(pod(), "volumes", 0), at(pod(), "volumes", 1))
        if isinstance(volume, dict) and "configMap" in volume
    ]


def test_compose_reaches_its_database() -> None:
    """The PostgreSQL of the configuration is the service beside it, with its user and database."""
    (url,) = (
        shard.backend_url
        for shard in parse_shards(shard_files()["compose/shards.yaml"], name="test").shards
        if not shard.backend_url.startswith(SQLITE)
    )
    services = at(load(COMPOSE), "services")
    database = find(url, data_dir=Path(DATA))
    assert isinstance(services, dict)
    assert database.host in services
    assert database.place == at(services, database.host, "environment", "POSTGRES_DB")
    user = at(services, database.host, "environment", "POSTGRES_USER")
    assert url.startswith(f"{POSTGRESQL}://{user}@")
    assert at(services, "kvstore", "depends_on", database.host) == {"condition": "service_healthy"}


# -- the image and compose ------------------------------------------------------------------------


def test_image_runs_unprivileged_and_is_watched() -> None:
    """The last user is a number that is not root's, the health check asks the port of metrics."""
    user, _, group = last("USER").partition(":")
    assert int(user) > 0
    assert int(group) > 0
    at_container = at(pod(), "securityContext")
    assert isinstance(at_container, dict)
    assert (at_container["runAsUser"], at_container["runAsGroup"]) == (int(user), int(group))
    assert f"http://127.0.0.1:{METRICS_PORT}/health" in last("HEALTHCHECK")


def test_image_is_made_of_what_is_there() -> None:
    """What the Dockerfile copies from the tree exists, and the build is let see it."""
    ignore = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines()
    seen = {line[1:] for line in ignore if line.startswith("!")}
    copied: set[str] = set()
    for name, text in instructions():
        if name == "COPY" and not text.startswith("--from"):
            copied.update(text.split()[:-1])
    assert copied == seen
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.slow
def test_dockerfile_is_linted(tmp_path: Path) -> None:
    """The linter has nothing to say, and something of a faulty file."""
    hadolint = tool("hadolint")
    assert run(hadolint, DOCKERFILE) == (0, "")
    for right, wrong in (
        ("FROM python:3.13-slim AS build", "FROM python AS build"),
        ("USER 10001:10001", "USER root"),
        ("WORKDIR /source", "RUN cd /source"),
    ):
        assert run(hadolint, planted(DOCKERFILE, tmp_path, right, wrong))[0] != 0, wrong


@pytest.mark.slow
def test_compose_file_is_valid(tmp_path: Path) -> None:
    """Docker Compose takes the file, asks for the password, and refuses faulty ones."""
    compose = tool("docker-compose")

    def verdict(path: Path, **variables: str) -> int:
        return run(compose, "--file", path, "config", "--quiet", **variables)[0]

    assert verdict(COMPOSE, POSTGRES_PASSWORD="x") == 0
    assert verdict(COMPOSE) != 0
    for right, wrong in (
        ("    read_only: true", "    readonly: true"),
        ("      - source: shards", "      - source: shard"),
        ("networks: [clients, database]", "networks: [clients, databases]"),
        ("condition: service_healthy", "condition: service_health"),
    ):
        faulty = planted(COMPOSE, tmp_path, right, wrong)
        assert verdict(faulty, POSTGRES_PASSWORD="x") != 0, wrong


# -- systemd --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_unit_is_valid_and_hardened(tmp_path: Path) -> None:
    """Every setting of the unit is known, and there is little that the server may do beside its
    work; it complains of settings that it does not know, and sees those that are missing.
    """
    analyze = tool("systemd-analyze")
    program = str(Path(sys.executable).with_name("kvstore"))
    right = "ExecStart=/opt/kvstore/bin/kvstore"

    def verdict(path: Path) -> tuple[int, str]:
        return run(analyze, "verify", "--man=no", "--recursive-errors=no", path)

    def exposure(path: Path) -> int:
        words = ("security", "--offline=true", "--threshold=15", "--no-pager")
        return run(analyze, *words, path)[0]

    fine = planted(UNIT, tmp_path / "fine", right, f"ExecStart={program}")
    assert verdict(fine) == (0, "")
    assert exposure(fine) == 0
    faulty = planted(fine, tmp_path / "faulty", "ProtectSystem=strict", "ProtectSystems=strict")
    assert "ProtectSystems" in verdict(faulty)[1]
    bare = planted(fine, tmp_path / "bare", "CapabilityBoundingSet=\n", "\n")
    assert exposure(bare) != 0


# -- Kubernetes -----------------------------------------------------------------------------------


def test_selectors_and_ports() -> None:
    """Service and disruption budget select the pod that the StatefulSet makes, and every port that
    is named is one of its container.
    """
    labels = at(
        load(DEPLOY / "kubernetes/statefulset.yaml"), "spec", "template", "metadata", "labels"
    )
    service = load(DEPLOY / "kubernetes/service.yaml")
    budget = load(DEPLOY / "kubernetes/poddisruptionbudget.yaml")
    assert at(service, "spec", "selector") == labels
    assert at(budget, "spec", "selector", "matchLabels") == labels
    container = at(pod(), "containers", 0)
    listed, published = at(container, "ports"), at(service, "spec", "ports")
    assert isinstance(listed, list)
    assert isinstance(published, list)
    ports = {at(port, "name"): at(port, "containerPort") for port in listed}
    assert ports == {"client": 2379, "metrics": METRICS_PORT}
    assert {at(port, "targetPort") for port in published} == set(ports)
    for probe, path in (("startup", "/readyz"), ("readiness", "/readyz"), ("liveness", "/livez")):
        get = at(container, f"{probe}Probe", "httpGet")
        assert get == {"path": path, "port": "metrics"}


def test_a_slow_shard_is_no_reason_to_restart() -> None:
    """A check has its verdict, which may take the shard's timeout, before its probe gives up."""
    timeout = Config().commit.shard_timeout
    for probe in ("readiness", "liveness"):
        seconds = at(pod(), "containers", 0, f"{probe}Probe", "timeoutSeconds")
        assert isinstance(seconds, int)
        assert seconds > timeout


# -- all ------------------------------------------------------------------------------------------


def test_images_are_named_without_a_registry() -> None:
    """Where images come from is the operator's choice: a name and a tag, and nothing before it."""
    services = at(load(COMPOSE), "services")
    assert isinstance(services, dict)
    images = [at(service, "image") for service in services.values()]
    images.append(at(pod(), "containers", 0, "image"))
    images += [each.text.split()[0] for each in instructions() if each.name == "FROM"]
    assert len(images) == 5
    for image in images:
        assert re.fullmatch(r"[a-z]+:[0-9][\w.-]*", str(image)), image


def test_readme_tells_of_every_file() -> None:
    """Each file in deploy/ has its row, which says whether it was run, and each row its file."""
    told = set(re.findall(r"^\| `([^`]+)` \|", (DEPLOY / "README.md").read_text(), re.MULTILINE))
    there = {str(path.relative_to(DEPLOY)) for path in DEPLOY.rglob("*") if path.is_file()}
    assert told == there - {"README.md"}
