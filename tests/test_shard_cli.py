"""Shards on the command line: the flags, the files, and a server with several."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import grpc
import pytest

from backends.schema import SCHEMA_VERSION
from backends.sqlite import SqliteBackend
from kvstore import cli
from kvstore.backend import Backend
from kvstore.config import Config
from kvstore.databases import DATABASE, Databases
from kvstore.errors import BackendError
from kvstore.pb import rpc_pb2 as pb
from tests.program import PATIENCE, get, http, put, run, serving, url

THREE = """\
shards:
  - {name: core,   backend: "sqlite:core.db"}
  - {name: events, backend: "sqlite:events.db"}
  - {name: leases, backend: "sqlite:leases.db"}
routes:
  - {prefix: /events/, shard: events}
  - {prefix: /leases/, shard: leases}
"""
FROM_ONE = """\
shards:
  - {name: default, backend: "sqlite:kvstore.db"}
  - {name: events,  backend: "sqlite:events.db"}
routes:
  - {prefix: /events/, shard: events}
"""
PASSWORD = "hunter22"


@pytest.fixture
def chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Backend]]:
    """Runs ``kvstore serve`` up to the point where the server would start; gives the backends."""
    for name in ("KVSTORE_CONFIG", "KVSTORE_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    seen: list[list[Backend]] = []

    def record(backends: list[Backend], *_: object, **__: object) -> int:
        seen.append(backends)
        return 0

    monkeypatch.setattr(cli, "run", record)

    def serve(*flags: str, **variables: str) -> list[Backend]:
        for name, text in variables.items():
            monkeypatch.setenv(name, text)
        assert cli.main(["serve", "--data-dir", str(tmp_path / "data"), *flags]) == 0
        return seen.pop()

    return serve


def files(backends: list[Backend], below: Path) -> dict[str, str]:
    """The file of each shard, from ``below`` on."""
    found = {}
    for backend in backends:
        assert isinstance(backend, SqliteBackend)
        found[backend._shard] = str(backend._path.relative_to(below))
    return found


def write(directory: Path, text: str) -> str:
    """A file of shards; its path."""
    path = directory / "shards.yaml"
    path.write_text(text)
    return str(path)


class TestFlags:
    """Where the data is."""

    def test_default(self, chosen: Callable[..., list[Backend]], tmp_path: Path) -> None:
        """Without a word there is one file, whose name and shard have always been these."""
        assert files(chosen(), tmp_path) == {"default": f"data/{DATABASE}"}
        assert (DATABASE, "data") == ("kvstore.db", "data")

    def test_one_database(self, chosen: Callable[..., list[Backend]], tmp_path: Path) -> None:
        """A URL puts the only shard elsewhere; it may come from a variable."""
        there = {"default": "data/b/c.db"}
        assert files(chosen("--backend", "sqlite:b/c.db"), tmp_path) == there
        assert files(chosen(KVSTORE_BACKEND="sqlite:b/c.db"), tmp_path) == there
        elsewhere = chosen("--backend", f"sqlite:{tmp_path}/other.db")
        assert files(elsewhere, tmp_path) == {"default": "other.db"}

    def test_file(self, chosen: Callable[..., list[Backend]], tmp_path: Path) -> None:
        """A file names the shards, in its order; it may come from a variable."""
        path = write(tmp_path, THREE)
        there = {name: f"data/{name}.db" for name in ("core", "events", "leases")}
        assert list(files(chosen("--config", path), tmp_path).items()) == list(there.items())
        assert files(chosen(KVSTORE_CONFIG=path), tmp_path) == there

    def test_shards_without_a_route(
        self,
        chosen: Callable[..., list[Backend]],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """Such a shard is on its way in or out, or forgotten: a warning names it."""
        path = write(tmp_path, THREE.replace("  - {prefix: /leases/, shard: leases}\n", ""))
        chosen("--config", path)
        (line,) = map(json.loads, capsys.readouterr().err.splitlines())
        assert (line["level"], line["shard"]) == ("warn", "leases")


@pytest.mark.parametrize(
    ("text", "flags", "said"),
    [
        (THREE, ["--backend=sqlite:a.db"], "--config and --backend exclude one another"),
        (THREE.replace("name", "nmae", 1), [], ":2: a shard has no 'nmae'; did you mean name?"),
        (THREE.replace("sqlite:e", "sqlit:e"), [], ":3: shard events: there is no kind of"),
        (THREE.replace("leases.db", "core.db"), [], ":4: shard leases: its database is that of"),
        (THREE.replace("leases.db", "../data/core.db"), [], "is that of shard core, sqlite:/"),
        (
            THREE.replace("sqlite:core.db", f"postgresql://kv:{PASSWORD}/x@db1/kv"),
            [],
            ":2: shard core: this URL of PostgreSQL cannot be read",
        ),
        (
            THREE.replace("sqlite:core.db", f"postgresql://a:{PASSWORD}@db1/kv").replace(
                "sqlite:events.db", f"postgresql://b:{PASSWORD}@DB1:5432/kv?sslmode=require"
            ),
            [],
            ":3: shard events: its database is that of shard core, postgresql://db1:5432/kv",
        ),
        (None, ["--config=/nowhere/shards.yaml"], "cannot read /nowhere/shards.yaml: No such"),
        (None, ["--config="], "--config"),
        (None, ["--shard-timeout=0s"], "--shard-timeout"),
        (None, ["--shard-timeout=5"], "--shard-timeout"),
        (None, ["--backend="], "--backend"),
        (None, ["--backend=core.db"], "--backend: a database is sqlite:PATH or postgresql"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "check", "migrate"])
def test_what_is_refused(
    command: str,
    text: str | None,
    flags: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each mistake is one line that says where it is, without a secret, and nothing on disk."""
    monkeypatch.setattr(cli, "run", lambda *_, **__: 0)
    data = tmp_path / "data"
    config = [] if text is None else ["--config", write(tmp_path, text)]
    assert cli.main([command, "--data-dir", str(data), *config, *flags]) == cli.EXIT_REFUSED
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err
    assert PASSWORD not in err
    assert not data.exists()


def test_secrets_are_not_shown(tmp_path: Path) -> None:
    """Where a database is can be told without the password in its URL."""
    secret = f"postgresql://kv:{PASSWORD}@db1/kv?sslmode=verify-full"
    databases = Databases(write(tmp_path, THREE.replace("sqlite:core.db", secret)), None, tmp_path)
    shown = f"{databases.places} {databases.config} {[str(place) for place in databases.places]}"
    assert PASSWORD not in shown
    assert "postgresql://db1:5432/kv" in shown
    with pytest.raises(BackendError, match="exclude one another"):
        Databases("a", "b", tmp_path)
    assert Databases(None, None, tmp_path).backends(Config())


def told(stdout: str) -> dict[str, Mapping[str, str]]:
    """What ``kvstore check`` says of each shard."""
    blocks = (block.splitlines() for block in stdout.split("\n\n"))
    facts = (dict(line.split(" ", 1) for line in block) for block in blocks)
    return {fact["shard"]: fact for fact in facts}


def ranged(channel: grpc.Channel, key: bytes, end: bytes) -> pb.RangeResponse:
    """A list."""
    call = channel.unary_unary(
        "/etcdserverpb.KV/Range",
        request_serializer=pb.RangeRequest.SerializeToString,
        response_deserializer=pb.RangeResponse.FromString,
    )
    found: pb.RangeResponse = call(
        pb.RangeRequest(key=key, range_end=end), timeout=PATIENCE, wait_for_ready=True
    )
    return found


def delete(channel: grpc.Channel, key: bytes) -> None:
    """One key."""
    call = channel.unary_unary(
        "/etcdserverpb.KV/DeleteRange",
        request_serializer=pb.DeleteRangeRequest.SerializeToString,
        response_deserializer=pb.DeleteRangeResponse.FromString,
    )
    call(pb.DeleteRangeRequest(key=key), timeout=PATIENCE, wait_for_ready=True)


def compact(channel: grpc.Channel, revision: int) -> None:
    """Forget what was before."""
    call = channel.unary_unary(
        "/etcdserverpb.KV/Compact",
        request_serializer=pb.CompactionRequest.SerializeToString,
        response_deserializer=pb.CompactionResponse.FromString,
    )
    call(pb.CompactionRequest(revision=revision), timeout=PATIENCE, wait_for_ready=True)


@pytest.mark.slow
class TestThreeShards:
    """A server with three SQLite files."""

    def test_keys_are_where_the_map_says(self, tmp_path: Path) -> None:
        """Clients see one order, each file has its own keys, and ``shards`` tells of them."""
        config = write(tmp_path, THREE)
        data = tmp_path / "data"
        keys = [b"/a", b"/events/a", b"/events/b", b"/leases/a", b"/z"]
        with serving(data, "--config", config) as program:
            with grpc.insecure_channel(url(program)) as channel:
                revisions = [put(channel, key, b"v").header.revision for key in keys]
                assert revisions == sorted(set(revisions))
                listed = ranged(channel, b"/", b"0")
                assert [pair.key for pair in listed.kvs] == keys
            code, stdout, stderr = run("shards", "--endpoints", url(program))
            assert (code, stderr) == (0, "")
            shards, routes = (block.splitlines() for block in stdout.rstrip().split("\n\n"))
            assert [line.split()[0] for line in shards] == ["SHARD", "core", "events", "leases"]
            assert all(line.endswith("serving") for line in shards[1:])
            assert [line.split() for line in routes[1:]] == [
                ["/events/", "events", "2"],
                ["/leases/", "leases", "1"],
            ]
            status, _, body = http(url(program), "/shards")
            assert status == 200
            assert [shard["keys"] for shard in json.loads(body)["shards"]] == [2, 2, 1]
            assert program.stop() == 0
        code, stdout, stderr = run("check", "--data-dir", str(data), "--config", config)
        assert (code, stderr) == (0, "")
        found = told(stdout)
        assert {name: facts["keys"] for name, facts in found.items()} == {
            "core": "2",
            "events": "2",
            "leases": "1",
        }
        assert len({facts["cluster_id"] for facts in found.values()}) == 1

    def test_migrate(self, tmp_path: Path) -> None:
        """Each database is told of; a file that is not there yet is left to the server."""
        data = tmp_path / "data"
        flags = ["--data-dir", str(data), "--config", write(tmp_path, THREE)]
        code, stdout, _ = run("migrate", *flags)
        assert (code, stdout.count("there is no store yet\n")) == (0, 3)
        assert not data.exists()
        with serving(data, *flags[2:]) as program:
            assert program.stop() == 0
        code, stdout, stderr = run("migrate", *flags)
        assert (code, stderr) == (0, "")
        version = SCHEMA_VERSION
        assert stdout.splitlines() == [
            f"{name} sqlite:{data}/{name}.db schema {version} -> {version}"
            for name in ("core", "events", "leases")
        ]

    def test_files_that_were_exchanged(self, tmp_path: Path) -> None:
        """Neither a server nor a check takes one shard's file for another's."""
        data = tmp_path / "data"
        with serving(data, "--config", write(tmp_path, THREE)) as program:
            assert program.stop() == 0
        turned = THREE.replace("events.db", "x").replace("leases.db", "events.db")
        config = write(tmp_path, turned.replace('sqlite:x"', 'sqlite:leases.db"'))
        code, _, stderr = run("serve", "--data-dir", str(data), "--config", config)
        assert code == cli.EXIT_REFUSED
        assert "events" in stderr
        assert "leases" in stderr
        code, stdout, _ = run("check", "--data-dir", str(data), "--config", config)
        assert code == 1
        assert "finding: it is shard leases, not events" in stdout.splitlines()

    def test_check_of_one_that_is_damaged(self, tmp_path: Path) -> None:
        """Every file is looked over, and one that is damaged or missing is told of."""
        data = tmp_path / "data"
        config = write(tmp_path, THREE)
        with serving(data, "--config", config) as program:
            assert program.stop() == 0
        (data / "leases.db").unlink()
        code, stdout, stderr = run("check", "--data-dir", str(data), "--config", config)
        assert (code, stdout) == (cli.EXIT_REFUSED, "")
        assert "leases.db" in stderr


@pytest.mark.slow
class TestAnotherMap:
    """What README says of a map that changes."""

    def test_from_one_file_to_several(self, tmp_path: Path) -> None:
        """A store of one file gets another shard; a route away from its keys is refused until they
        are gone and forgotten, and the old way of starting works as before meanwhile.
        """
        data = tmp_path / "data"
        with serving(data) as program:
            with grpc.insecure_channel(url(program)) as channel:
                put(channel, b"/a", b"1")
                put(channel, b"/events/a", b"2")
            assert program.stop() == 0
        config = write(tmp_path, FROM_ONE)
        code, stdout, stderr = run("serve", "--data-dir", str(data), "--config", config)
        assert (code, stdout, stderr.count("\n")) == (cli.EXIT_REFUSED, "", 1)
        assert "would hide 1 key: b'/events/a' on shard default, now of shard events" in stderr
        with serving(data) as program:
            with grpc.insecure_channel(url(program)) as channel:
                assert get(channel, b"/events/a") == [b"2"]
                delete(channel, b"/events/a")
                revision = put(channel, b"note", b"now").header.revision
                compact(channel, revision)
            assert program.stop() == 0
        with serving(data, "--config", config) as program:
            with grpc.insecure_channel(url(program)) as channel:
                assert get(channel, b"/a") == [b"1"]
                assert put(channel, b"/events/b", b"3").header.revision > revision
            assert program.stop() == 0
        code, stdout, _ = run("check", "--data-dir", str(data), "--config", config)
        assert code == 0
        assert {name: facts["keys"] for name, facts in told(stdout).items()} == {
            "default": "2",
            "events": "1",
        }

    def test_start_without_the_file(self, tmp_path: Path) -> None:
        """A store with several shards is not served as one of one file."""
        data = tmp_path / "data"
        with serving(data, "--config", write(tmp_path, FROM_ONE)) as program:
            assert program.stop() == 0
        code, _, stderr = run("serve", "--data-dir", str(data))
        assert code == cli.EXIT_REFUSED
        assert "the stored map has shard events, which the configuration leaves out" in stderr

    def test_absent_file(self, tmp_path: Path) -> None:
        """The others are served without it, even after a start that had just made it, and it is not
        made anew unless the loss is accepted; when it is there again, so is all that it had.
        """
        data, away = tmp_path / "data", tmp_path / "away.db"
        flags = ["--config", write(tmp_path, FROM_ONE)]
        with serving(data, *flags) as program:
            with grpc.insecure_channel(url(program)) as channel:
                put(channel, b"/events/0", b"v")
                put(channel, b"/other", b"v")
            assert program.stop() == 0
        (data / "events.db").rename(away)
        with serving(data, *flags) as program:
            with grpc.insecure_channel(url(program)) as channel:
                assert get(channel, b"/other") == [b"v"]
                with pytest.raises(grpc.RpcError, match="request timed out"):
                    put(channel, b"/events/0", b"w")
                assert not (data / "events.db").exists()
                away.rename(data / "events.db")
                program.until("shard is back")
                assert get(channel, b"/events/0") == [b"v"]
            assert program.stop() == 0
        (data / "events.db").unlink()
        with serving(data, *flags, "--accept-data-loss") as program:
            (told,) = (line for line in program.log if line["msg"] == "a loss of data is accepted")
            assert str(told["reason"]).startswith("shard events has lost data: it is at revision 1")
            with grpc.insecure_channel(url(program)) as channel:
                assert get(channel, b"/events/0") == []
                assert get(channel, b"/other") == [b"v"]
            assert program.stop() == 0

    def test_older_copy(self, tmp_path: Path) -> None:
        """A shard that lost what was acknowledged is refused, until the loss is accepted: then all
        that was before counts as compacted, and no revision comes again.
        """
        data = tmp_path / "data"
        flags = ["--config", write(tmp_path, FROM_ONE)]
        copies, revisions = [], []
        for n in range(2):
            with serving(data, *flags) as program:
                with grpc.insecure_channel(url(program)) as channel:
                    revisions.append(put(channel, b"/events/%d" % n, b"v").header.revision)
                assert program.stop() == 0
            copies.append((data / "events.db").read_bytes())
        (data / "events.db").write_bytes(copies[0])
        code, _, stderr = run("serve", "--data-dir", str(data), *flags)
        assert (code, stderr.count("\n")) == (cli.EXIT_REFUSED, 1)
        assert "shard events has lost data" in stderr
        with serving(data, *flags, "--accept-data-loss") as program:
            with grpc.insecure_channel(url(program)) as channel:
                assert get(channel, b"/events/1") == []
                assert get(channel, b"/events/0") == [b"v"]
                assert put(channel, b"/events/1", b"w").header.revision > revisions[-1] + 1
                with pytest.raises(grpc.RpcError, match="has been compacted"):
                    compact(channel, revisions[-1])
            assert program.stop() == 0
        with serving(data, *flags) as program:
            assert program.stop() == 0

    def test_shard_leaves(self, tmp_path: Path) -> None:
        """In two steps: its routes, then itself; the file may go then."""
        data = tmp_path / "data"
        for text in (
            FROM_ONE,
            FROM_ONE.partition("routes:")[0],
            FROM_ONE.partition("  - {name: events")[0],
        ):
            with serving(data, "--config", write(tmp_path, text)) as program:
                with grpc.insecure_channel(url(program)) as channel:
                    put(channel, b"/a", b"1")
                assert program.stop() == 0
        (data / "events.db").unlink()
        with serving(data) as program:
            with grpc.insecure_channel(url(program)) as channel:
                assert get(channel, b"/a") == [b"1"]
            assert program.stop() == 0
