"""The command line: spellings, precedence, and one clear line for whatever is wrong."""

import os
import signal
import socket
import ssl
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from kvstore import cli
from kvstore.config import Config
from kvstore.databases import DATABASE
from kvstore.flags import parse_duration
from kvstore.memory import memory_limit
from kvstore.options import ServeOptions, TransportKind
from kvstore.server import Server
from tests.backends.raw import raw
from tests.program import Program, get, put, run, serving, url
from tests.transport.certificates import Authority, lock

Served = tuple[Config, ServeOptions]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Served]:
    """Runs ``kvstore serve`` up to the point where the server would start; gives what it got."""
    for name in os.environ:
        if name.startswith(("ETCD_", "KVSTORE_")):
            monkeypatch.delenv(name)
    seen: list[Served] = []

    def record(*given: object, **__: object) -> int:
        config, options = given[2:]
        assert isinstance(config, Config)
        assert isinstance(options, ServeOptions)
        seen.append((config, options))
        return 0

    monkeypatch.setattr(cli, "run", record)

    def serve(*flags: str, **variables: str) -> Served:
        for name, text in variables.items():
            monkeypatch.setenv(name, text)
        assert cli.main(["serve", *flags]) == 0
        return seen.pop()

    return serve


class TestFlags:
    """What flags and variables become."""

    def test_defaults(self, served: Callable[..., Served]) -> None:
        """Without flags the server is etcd's default member, with the bounds of config.py."""
        config, options = served()
        assert options.name == "default"
        assert options.data_dir == Path("default.kvstore")
        assert [address.url for address in options.listen_client_urls] == ["http://localhost:2379"]
        assert options.transport is TransportKind.NATIVE
        assert options.tls is None
        assert config.request == Config().request
        assert config.watch.progress_interval == 600
        assert config.commit == Config().commit
        assert config.store.cache_bytes_max == memory_limit() // 4

    @pytest.mark.parametrize(
        "spelling",
        [
            ["--max-txn-ops", "7"],
            ["--max-txn-ops=7"],
            ["-max-txn-ops", "7"],
            ["-max-txn-ops=7"],
        ],
    )
    def test_spellings(self, served: Callable[..., Served], spelling: list[str]) -> None:
        """One dash or two, a space or an equals sign: Go's flags allow all of them."""
        assert served(*spelling)[0].request.txn_ops_max == 7

    def test_precedence(self, served: Callable[..., Served]) -> None:
        """A flag wins over its variable, that over the default, and an empty variable is none."""
        assert served(ETCD_MAX_TXN_OPS="8")[0].request.txn_ops_max == 8
        assert served("--max-txn-ops=9")[0].request.txn_ops_max == 9
        assert served(ETCD_MAX_TXN_OPS="")[0].request.txn_ops_max == 128

    def test_bounds_that_depend_on_another(self, served: Callable[..., Served]) -> None:
        """The transport takes messages half a MiB above the request limit, so that etcd's refusal
        is given by the handler.
        """
        config, _ = served("--max-request-bytes=1000", "--max-concurrent-streams=5")
        assert config.request.request_bytes_max == 1000
        assert config.transport.message_bytes_max == 1000 + 512 * 1024
        assert config.transport.streams_per_connection_max == 5

    @pytest.mark.parametrize(
        "switch",
        [[], ["--client-cert-auth"], ["--client-cert-auth=true"], ["--client-cert-auth=false"]],
    )
    def test_tls(self, served: Callable[..., Served], switch: list[str]) -> None:
        """As in etcd, an authority requires client certificates, whatever the switch says."""
        files = ["--cert-file=c.pem", "--key-file=k.pem", "--trusted-ca-file=ca.pem"]
        _, options = served("--listen-client-urls=https://127.0.0.1:1", *switch, *files)
        assert options.tls is not None
        assert options.tls.cert_file == Path("c.pem")
        assert options.tls.trusted_ca_file == Path("ca.pem")

    def test_little_memory(self) -> None:
        """What a machine has bounds what all clients together may hold, and never raises it."""
        little, much = cli.bounds_within(1 << 29), cli.bounds_within(1 << 40)
        assert little.store.cache_bytes_max == 1 << 27
        assert little.transport.request_bytes_total_max == 1 << 26
        assert little.transport.output_bytes_total_max == 1 << 27
        assert much.store.cache_bytes_max == 1 << 38
        assert much.transport == Config().transport

    def test_cache_bytes(self, served: Callable[..., Served]) -> None:
        """Our own flag has a variable of our own."""
        assert served("--cache-bytes=1000")[0].store.cache_bytes_max == 1000
        assert served(KVSTORE_CACHE_BYTES="2000")[0].store.cache_bytes_max == 2000

    def test_shard_timeout(self, served: Callable[..., Served]) -> None:
        """Likewise the time that a stuck shard is given."""
        assert served("--shard-timeout=1m30s")[0].commit.shard_timeout == 90
        assert served(KVSTORE_SHARD_TIMEOUT="500ms")[0].commit.shard_timeout == 0.5

    def test_several_urls(self, served: Callable[..., Served]) -> None:
        """URLs are separated by commas; advertised ones are passed on as they are."""
        _, options = served(
            "--listen-client-urls=http://127.0.0.1:1,unix:///tmp/x,http://[::1]:2",
            "--advertise-client-urls=http://a.example:1,http://b.example:2",
        )
        assert [address.host for address in options.listen_client_urls] == ["127.0.0.1", "", "::1"]
        assert options.advertise_client_urls == ["http://a.example:1", "http://b.example:2"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0.0), ("10m", 600.0), ("1h30m", 5400.0), ("500ms", 0.5), ("1.5s", 1.5), (".5s", 0.5)],
)
def test_durations(text: str, seconds: float) -> None:
    """Durations are Go's."""
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "10", "m", "-1s", "1s ", "1d", "1s2", "s1"])
def test_durations_that_are_none(text: str) -> None:
    """What Go refuses is refused, and negative times with it."""
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)


def refused(*words: str, options: tuple[str, ...] = (), **extra: str) -> str:
    """Run a command that must be refused: exit code 2 and one line, which is returned."""
    code, stdout, stderr = run(*words, options=options, **extra)
    assert (code, stdout) == (2, "")
    assert stderr.count("\n") == 1, stderr
    assert stderr.startswith("kvstore: ")
    return stderr


URL = "--listen-client-urls=http://127.0.0.1:0"
HTTPS = ["--listen-client-urls=https://127.0.0.1:0", "--cert-file=c.pem", "--key-file=k.pem"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "command"),
        (["serv"], "serv"),
        (["serve", "--nonsense"], "--nonsense"),
        (["serve", "--initial-cluster=x"], "--initial-cluster"),
        (["serve", "surplus"], "surplus"),
        (["serve", "--max-txn-ops=none"], "--max-txn-ops"),
        (["serve", "--max-txn-ops=0"], "--max-txn-ops"),
        (["serve", "--max-concurrent-streams=5000000000"], "--max-concurrent-streams"),
        (["serve", URL, "--max-request-bytes=1000000000000"], "--max-request-bytes"),
        (["serve", "--log-level=loud"], "--log-level"),
        (["serve", "--transport=pigeon"], "--transport"),
        (["serve", "--watch-progress-notify-interval=10"], "--watch-progress-notify-interval"),
        (["serve", "--listen-client-urls="], "--listen-client-urls"),
        (["serve", "--listen-client-urls=127.0.0.1:1"], "http, https or unix"),
        (["serve", "--listen-client-urls=http://127.0.0.1"], "host:port"),
        (["serve", "--listen-client-urls=http://127.0.0.1:1/v3"], "path"),
        (["serve", "--listen-client-urls=http://host.example:1"], "expected IP"),
        (["serve", "--listen-client-urls=http://127.0.0.1:99999"], "99999"),
        (["serve", "--listen-client-urls=https://127.0.0.1:0"], "--cert-file"),
        (["serve", *HTTPS, "--client-cert-auth"], "--trusted-ca-file"),
        (["serve", URL, "--log-outputs=/nowhere/log"], "/nowhere/log"),
        (["serve", *HTTPS, "--transport=grpcio"], "grpcio does not serve https"),
    ],
)
def test_wrong_flags(
    words: list[str],
    named: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each mistake is one line on stderr that names it, exit code 2, and nothing on disk."""

    async def serve(_: Server) -> int:
        """Nobody would stop it."""
        return 0

    monkeypatch.setattr(Server, "serve", serve)
    data = tmp_path / "data"
    flags = ["--data-dir", str(data)] if words[:1] == ["serve"] else []
    assert cli.main([*words[:1], *flags, *words[1:]]) == cli.EXIT_REFUSED
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("kvstore: ")
    assert named in err
    assert not data.exists()


def test_grpcio_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reference transport without its library is one line that says what to install."""
    monkeypatch.delitem(sys.modules, "kvstore.transport.grpcio_server", raising=False)
    monkeypatch.setitem(sys.modules, "grpc.aio", None)
    data = tmp_path / "data"
    words = ["serve", "--data-dir", str(data), URL, "--transport=grpcio"]
    assert cli.main(words) == cli.EXIT_REFUSED
    assert capsys.readouterr().err.startswith("kvstore: --transport grpcio needs kvstore[grpcio]: ")
    assert not data.exists()


@pytest.mark.slow
class TestWhatIsInTheWay:
    """Files and ports that are not for us."""

    def test_port_in_use(self, tmp_path: Path) -> None:
        """A port that somebody listens on is named before a data directory is made."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            flag = f"--listen-client-urls=http://127.0.0.1:{port}"
            line = refused("serve", "--data-dir", str(tmp_path / "data"), flag)
        assert f"http://127.0.0.1:{port}: address already in use" in line
        assert not (tmp_path / "data").exists()

    def test_address_of_another_machine(self, tmp_path: Path) -> None:
        """An address that is not ours is named."""
        flag = "--listen-client-urls=http://203.0.113.1:1"
        assert "203.0.113.1" in refused("serve", "--data-dir", str(tmp_path / "d"), flag)

    def test_path_that_is_too_long(self, tmp_path: Path) -> None:
        """A UNIX socket whose path the system does not take is named with the reason."""
        flag = f"--listen-client-urls=unix://{tmp_path}/{'x' * 200}"
        line = refused("serve", "--data-dir", str(tmp_path / "data"), flag)
        assert "path too long" in line

    def test_key_under_a_password(self, tmp_path: Path) -> None:
        """Nobody is asked for it."""
        certificate, key = Authority.make(tmp_path, "ca").issue("server")
        lock(key, tmp_path / "locked.key")
        files = [f"--cert-file={certificate}", f"--key-file={tmp_path}/locked.key"]
        https = "--listen-client-urls=https://127.0.0.1:0"
        data = tmp_path / "data"
        assert "password" in refused("serve", "--data-dir", str(data), https, *files)
        assert not data.exists()

    def test_metrics_port_in_use(self, tmp_path: Path) -> None:
        """Likewise a port for metrics."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            flag = f"--listen-metrics-urls=http://127.0.0.1:{taken.getsockname()[1]}"
            assert "in use" in refused("serve", "--data-dir", str(tmp_path / "d"), URL, flag)

    def test_directory_that_cannot_be(self, tmp_path: Path) -> None:
        """A data directory below a file is refused, and the file stays."""
        (tmp_path / "file").write_text("mine")
        assert "file" in refused("serve", "--data-dir", str(tmp_path / "file/data"), URL)
        assert (tmp_path / "file").read_text() == "mine"

    @pytest.mark.parametrize("content", [b"not a database", b"SQLite format 3\0" + bytes(4080)])
    def test_foreign_file(self, tmp_path: Path, content: bytes) -> None:
        """A file of our name that is not ours is refused and not touched, nor is anything added."""
        (tmp_path / DATABASE).write_bytes(content)
        assert DATABASE in refused("serve", "--data-dir", str(tmp_path), URL)
        assert (tmp_path / DATABASE).read_bytes() == content
        assert [path.name for path in tmp_path.iterdir()] == [DATABASE]

    def test_data_of_etcd(self, tmp_path: Path) -> None:
        """A data directory of etcd is not taken for an empty one."""
        (tmp_path / "member").mkdir()
        assert "etcd" in refused("serve", "--data-dir", str(tmp_path), URL)
        assert [path.name for path in tmp_path.iterdir()] == ["member"]

    def test_data_in_use(self, tmp_path: Path) -> None:
        """A second server on the same data names the first, which goes on undisturbed."""
        with serving(tmp_path / "data") as first:
            line = refused("serve", "--data-dir", str(tmp_path / "data"), URL)
            assert f"process {first.process.pid}" in line
            with grpc.insecure_channel(url(first)) as channel:
                put(channel, b"k", b"v")
                assert get(channel, b"k") == [b"v"]
            assert first.stop() == 0

    def test_certificates(self, tmp_path: Path) -> None:
        """Certificates that are missing, or none, are named before data is touched."""
        https = "--listen-client-urls=https://127.0.0.1:0"
        missing = tmp_path / "missing.pem"
        files = [f"--cert-file={missing}", f"--key-file={missing}"]
        data = ["--data-dir", str(tmp_path / "data")]
        assert "missing.pem" in refused("serve", *data, https, *files)
        missing.write_text("nonsense")
        assert "missing.pem" in refused("serve", *data, https, *files)
        files[0] = f"--cert-file={tmp_path}"
        assert f"cannot read {tmp_path}: Is a directory" in refused("serve", *data, https, *files)
        assert not (tmp_path / "data").exists()


@pytest.mark.slow
def test_optimised_python() -> None:
    """Without assertions the store does not run."""
    assert "assertions" in refused("version", options=("-O",))
    assert "assertions" in refused("version", PYTHONOPTIMIZE="1")


@pytest.mark.slow
def test_version() -> None:
    """``kvstore version`` names the program and the API on stdout."""
    code, stdout, stderr = run("version")
    assert (code, stderr) == (0, "")
    assert stdout.splitlines()[0].startswith("kvstore ")
    assert stdout.splitlines()[1] == "etcd API 3.6.16"


@pytest.mark.slow
def test_help() -> None:
    """Help names every flag with its variable."""
    code, stdout, _ = run("serve", "-h")
    assert code == 0
    for flag in cli.serve.params:
        assert flag.opts[0] in stdout
        assert str(flag.envvar or "") in stdout


@pytest.mark.slow
def test_variables(tmp_path: Path) -> None:
    """Variables of etcd that are no flag here are named in one warning and ignored."""
    unknown = {"ETCD_INITIAL_CLUSTER": "x", "ETCD_HEARTBEAT_INTERVAL": "1"}
    with serving(tmp_path / "data", ETCD_NAME="from-variable", **unknown) as program:
        assert said(program, "unrecognized environment variables are ignored") == sorted(unknown)
        assert said(program, "ready to serve client requests", "name") == "from-variable"
        assert program.stop() == 0


def said(program: Program, message: str, field: str = "names") -> object:
    """A field of the one line that has been logged with ``message``."""
    (line,) = (line for line in program.log if line["msg"] == message)
    return line[field]


def tls_page(address: str, context: ssl.SSLContext) -> bytes:
    """The answer to a question about readiness."""
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port))) as plain,
        context.wrap_socket(plain, server_hostname=host) as sock,
    ):
        sock.sendall(b"GET /readyz HTTP/1.1\r\nhost: here\r\nconnection: close\r\n\r\n")
        return b"".join(iter(lambda: sock.recv(65536), b""))


@pytest.mark.slow
class TestListening:
    """Where a server can be met."""

    def test_unix_socket(self, tmp_path: Path) -> None:
        """A UNIX socket left behind by a crash is taken over; a clean stop removes its file."""
        path = tmp_path / "s"
        flag = f"--listen-client-urls=unix://{path}"
        with serving(tmp_path / "data", flag) as program:
            program.process.send_signal(signal.SIGKILL)
            program.process.wait()
        assert path.is_socket()
        with serving(tmp_path / "data", flag) as program:
            with grpc.insecure_channel(f"unix:{path}") as channel:
                put(channel, b"k", b"v")
            assert "in use" in refused("serve", "--data-dir", str(tmp_path / "other"), flag)
            assert program.stop() == 0
        assert not path.exists()

    def test_socket_path_of_a_file(self, tmp_path: Path) -> None:
        """A file that is no socket is in the way, and stays."""
        (tmp_path / "s").write_text("mine")
        flag = f"--listen-client-urls=unix://{tmp_path}/s"
        assert "in use" in refused("serve", "--data-dir", str(tmp_path / "data"), flag)
        assert (tmp_path / "s").read_text() == "mine"

    def test_several(self, tmp_path: Path) -> None:
        """Every listen URL reaches the same store."""
        urls = f"http://127.0.0.1:0,unix://{tmp_path}/s"
        with serving(tmp_path / "data", f"--listen-client-urls={urls}") as program:
            with grpc.insecure_channel(url(program)) as one:
                put(one, b"k", b"v")
            with grpc.insecure_channel(f"unix:{tmp_path}/s") as other:
                assert get(other, b"k") == [b"v"]
            assert program.stop() == 0

    def test_tls(self, tmp_path: Path) -> None:
        """Over https clients need a certificate of the authority, for calls and for metrics."""
        authority = Authority.make(tmp_path, "ca")
        certificate, key = authority.issue("server")
        with serving(
            tmp_path / "data",
            "--listen-client-urls=https://127.0.0.1:0",
            "--listen-metrics-urls=https://127.0.0.1:0",
            f"--cert-file={certificate}",
            f"--key-file={key}",
            f"--trusted-ca-file={authority.certificate}",
        ) as program:
            mine, secret = authority.issue("client")
            root = authority.certificate.read_bytes()
            trusted = grpc.ssl_channel_credentials(root, secret.read_bytes(), mine.read_bytes())
            with grpc.secure_channel(url(program), trusted) as channel:
                put(channel, b"k", b"v")
                assert get(channel, b"k") == [b"v"]
            with (
                grpc.secure_channel(url(program), grpc.ssl_channel_credentials(root)) as channel,
                pytest.raises(grpc.RpcError, match="UNAVAILABLE"),
            ):
                put(channel, b"k", b"v", wait=False)
            context = ssl.create_default_context(cafile=str(authority.certificate))
            context.load_cert_chain(mine, secret)
            assert tls_page(url(program, "metrics_urls"), context).endswith(b"\r\n\r\nok\n")
            assert program.stop() == 0

    def test_grpcio(self, tmp_path: Path) -> None:
        """The reference transport serves the same store, and stops as well."""
        with serving(tmp_path / "data", "--transport=grpcio") as program:
            with grpc.insecure_channel(url(program)) as channel:
                put(channel, b"k", b"v")
                assert get(channel, b"k") == [b"v"]
            assert program.stop() == 0


def contents(directory: Path) -> dict[str, bytes]:
    """Every file but the lock, which names its last holder."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix != ".lock"}


@pytest.mark.slow
class TestCheck:
    """``kvstore check``."""

    def test_sound(self, tmp_path: Path) -> None:
        """A store that was used is found sound, and told of; nothing changes."""
        with serving(tmp_path) as program:
            with grpc.insecure_channel(url(program)) as channel:
                put(channel, b"a", b"1")
                put(channel, b"a", b"2")
            assert "held by" in refused("check", "--data-dir", str(tmp_path))
            assert program.stop() == 0
        before = contents(tmp_path)
        code, stdout, stderr = run("check", "-data-dir", str(tmp_path))
        assert (code, stderr) == (0, "")
        assert {"keys 1", "rows 2", "revision 3", "findings 0"} <= set(stdout.splitlines())
        assert contents(tmp_path) == before

    def test_damage(self, tmp_path: Path) -> None:
        """A damaged store is exit code 1 and a line for each finding."""
        with serving(tmp_path) as program:
            with grpc.insecure_channel(url(program)) as channel:
                for number in range(3):
                    put(channel, b"k", b"%d" % number)
            assert program.stop() == 0
        with raw(tmp_path / DATABASE) as connection:
            connection.execute("DELETE FROM revisions WHERE revision = 3")
        code, stdout, _ = run("check", "--data-dir", str(tmp_path))
        assert code == 1
        assert any(line.startswith("finding: ") for line in stdout.splitlines())
        assert "findings 0" not in stdout.splitlines()

    def test_nothing_there(self, tmp_path: Path) -> None:
        """A directory without a store is refused, and stays without."""
        assert DATABASE in refused("check", "--data-dir", str(tmp_path))
        assert list(tmp_path.iterdir()) == []
