"""README's steps with PostgreSQL: a role with a password, migrate, serve, look at the shards."""

import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from backends.schema import SCHEMA_VERSION
from kvstore import cli
from tests.backends.postgres_cluster import Cluster, temporary_cluster
from tests.program import get, put, run, serving, url

PASSWORD = "a/b?c#d@e"
ESCAPED = "a%2Fb%3Fc%23d%40e"
SHARDS = """\
shards:
  - {{name: core, backend: "sqlite:core.db"}}
  - {{name: events, backend: "{url}"}}
routes:
  - {{prefix: /events/, shard: events}}
"""

pytestmark = [pytest.mark.postgres, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster(postgres_programs: Path) -> Iterator[Cluster]:
    """One with a database of a role that needs its password."""
    with temporary_cluster(postgres_programs) as cluster:
        rules = cluster.data / "pg_hba.conf"
        rules.write_text(f"host all app 127.0.0.1/32 scram-sha-256\n{rules.read_text()}")
        where = ("--host", str(cluster.directory), "--port", str(cluster.port), "--username", "kv")
        for command in (
            f"CREATE ROLE app LOGIN PASSWORD '{PASSWORD}'",
            "CREATE DATABASE kvstore OWNER app",
            "SELECT pg_reload_conf()",
        ):
            cluster.run("psql", *where, "--dbname", "postgres", "--command", command)
        yield cluster


def is_secret_in(text: str) -> bool:
    """Is the password told, in either way of writing it?"""
    return PASSWORD in text or ESCAPED in text


def test_one_shard(cluster: Cluster, tmp_path: Path) -> None:
    """The tables are made ahead, the password comes from the environment, what is written is there
    after a restart; a wrong password is one line.
    """
    where = f"postgresql://app@127.0.0.1:{cluster.port}/kvstore"
    place = f"postgresql://127.0.0.1:{cluster.port}/kvstore?schema=kvstore"
    code, stdout, stderr = run("migrate", "--backend", where, PGPASSWORD=PASSWORD)
    assert (code, stderr) == (0, "")
    assert stdout == f"default {place} schema 0 -> {SCHEMA_VERSION}\n"
    for _ in range(2):
        with serving(tmp_path, "--backend", where, PGPASSWORD=PASSWORD) as program:
            with grpc.insecure_channel(url(program)) as channel:
                put(channel, b"k", b"v")
                assert get(channel, b"k") == [b"v"]
            assert program.stop() == 0
            assert not is_secret_in(json.dumps(program.log))
    assert not list(tmp_path.iterdir())
    code, stdout, stderr = run(
        *("serve", "--data-dir", str(tmp_path), "--backend", where),
        "--listen-client-urls=http://127.0.0.1:0",
        PGPASSWORD="wrong",
    )
    assert (code, stdout, stderr.count("\n")) == (cli.EXIT_REFUSED, "", 1)
    assert "password authentication failed" in stderr
    assert "wrong" not in stderr


def test_beside_a_file(cluster: Cluster, tmp_path: Path) -> None:
    """A password may stand in the file of shards; neither log nor ``shards`` nor ``check`` tell it,
    and keys are where the map says.
    """
    where = f"postgresql://app:{ESCAPED}@127.0.0.1:{cluster.port}/kvstore?schema=events"
    config = tmp_path / "shards.yaml"
    config.write_text(SHARDS.format(url=where))
    data = tmp_path / "data"
    with serving(data, "--config", str(config)) as program:
        with grpc.insecure_channel(url(program)) as channel:
            put(channel, b"/a", b"1")
            put(channel, b"/events/a", b"2")
            assert get(channel, b"/events/a") == [b"2"]
        code, shown, _ = run("shards", "--endpoints", url(program))
        assert code == 0
        assert [line.split()[0] for line in shown.splitlines()[1:3]] == ["core", "events"]
        assert shown.splitlines()[-1].split() == ["/events/", "events", "1"]
        assert program.stop() == 0
    code, checked, _ = run("check", "--data-dir", str(data), "--config", str(config))
    assert code == 0
    assert "keys 1" in checked.splitlines()
    assert checked.endswith("shard events\nnot checked: no SQLite file\n")
    assert not is_secret_in(json.dumps(program.log) + shown + checked)
    cluster.stop()
    try:
        code, stdout, stderr = run("migrate", "--data-dir", str(data), "--config", str(config))
    finally:
        cluster.start()
    assert (code, stderr.count("\n")) == (cli.EXIT_REFUSED, 1)
    assert "shard events: postgresql://127.0.0.1" in stderr
    assert not is_secret_in(stdout + stderr)
