"""What users of etcd and newcomers get wrong first: one line that says what, and exit code 2."""

import json
from pathlib import Path

import pytest

from backends import sqlite_file
from kvstore import cli
from kvstore.databases import DATABASE
from kvstore.errors import BackendError
from tests.transport.certificates import Authority

HTTP = "--listen-client-urls=http://127.0.0.1:0"
HTTPS = "--listen-client-urls=https://127.0.0.1:0"


@pytest.fixture
def line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> "Refused":
    """Runs a command that must be refused."""
    return Refused(tmp_path / "data", capsys)


class Refused:
    """Gives the one line, without the program's name, of commands with wrong flags."""

    def __init__(self, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._data = data
        self._capsys = capsys

    def __call__(self, *words: str) -> str:
        """Exactly these words."""
        assert cli.main(words) == cli.EXIT_REFUSED
        out, err = self._capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert not self._data.exists()
        name, _, reason = err.rstrip("\n").partition(": ")
        assert name == "kvstore"
        return reason

    def serve(self, *flags: str) -> str:
        """``serve`` with a data directory that must not be made."""
        return self("serve", "--data-dir", str(self._data), *flags)


@pytest.mark.parametrize(
    "flag",
    ["--quota-backend-bytes", "--auto-compaction-mode", "--initial-cluster", "--snapshot-count"],
)
def test_flags_of_etcd_alone(line: Refused, flag: str) -> None:
    """They are named as such, however they are spelled, and nothing else is proposed."""
    for words in ([flag, "1"], [f"{flag}=1"], [flag[1:], "1"], [f"{flag[1:]}=1"]):
        assert line.serve(*words) == f"kvstore has no {flag}, a flag of etcd"


def test_flags_of_nobody(line: Refused) -> None:
    """A slip gets a proposal."""
    assert "--max-txn-ops" in line.serve("--max-txn-op=1")


def test_client_certificates_that_nobody_is_asked_for(line: Refused, tmp_path: Path) -> None:
    """Whoever requires client certificates must not believe that they are when they are not."""
    certificate, key = Authority.make(tmp_path, "ca").issue("server")
    files = [f"--cert-file={certificate}", f"--key-file={key}"]
    for urls in (HTTP, HTTPS):
        said = line.serve(urls, "--client-cert-auth", *files)
        assert said == "--client-cert-auth needs --trusted-ca-file"
    authority = f"--trusted-ca-file={certificate}"
    said = line.serve(HTTP, "--client-cert-auth", authority, *files)
    assert said == "--client-cert-auth needs an https URL"


@pytest.mark.parametrize("flag", ["--cert-file", "--key-file", "--trusted-ca-file"])
def test_certificates_without_https(
    flag: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Certificate files beside a URL without TLS: a warning names the URL, as etcd's does."""
    monkeypatch.setattr(cli, "run", lambda *_, **__: 0)
    words = ["serve", "--data-dir", str(tmp_path), HTTP]
    assert cli.main([*words, "--client-cert-auth=false"]) == 0
    assert capsys.readouterr().err == ""
    assert cli.main([*words, f"{flag}=c.pem"]) == 0
    warning = json.loads(capsys.readouterr().err)
    assert warning["level"] == "warn"
    assert warning["msg"] == "certificate files have no effect on a URL without TLS"
    assert warning["url"] == "http://127.0.0.1:0"


def test_files_without_a_certificate(line: Refused, tmp_path: Path) -> None:
    """The file that does not hold what its flag is for is named."""
    certificate, key = Authority.make(tmp_path, "ca").issue("server")
    other = tmp_path / "other"
    other.write_text("nonsense")
    flags = {"--cert-file": certificate, "--key-file": key, "--trusted-ca-file": certificate}
    for flag, what in (
        ("--cert-file", "certificate"),
        ("--key-file", "private key"),
        ("--trusted-ca-file", "certificate"),
    ):
        given = flags | {flag: other}
        said = line.serve(HTTPS, *(f"{name}={path}" for name, path in given.items()))
        assert said.endswith(f"{other} holds no {what}")


@pytest.mark.parametrize("directory", ["others", "others/below/it"])
def test_directory_of_somebody_else(
    directory: str, line: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data directory that may not be looked into is one line."""
    others, stat = tmp_path / "others", Path.stat
    others.mkdir()

    def guarded(path: Path, *, follow_symlinks: bool = True) -> object:
        if others in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(Path, "stat", guarded)
    place = tmp_path / directory
    said = line("serve", "--data-dir", str(place), HTTP)
    assert said == f"cannot look into {place}: Permission denied"
    with pytest.raises(BackendError, match="Permission denied"):
        sqlite_file.make_directory(others / "below/it")


def test_no_directory(line: Refused, tmp_path: Path) -> None:
    """A file is no data directory, and a store that is not there is not made to be checked."""
    file = tmp_path / "file"
    file.write_text("mine")
    assert line("serve", "--data-dir", str(file), HTTP) == f"{file} is not a directory"
    missing = tmp_path / "missing"
    for place in (missing, file):
        assert line("check", "--data-dir", str(place)) == f"there is no store at {place}"
    assert not missing.exists()


@pytest.mark.parametrize("text", ["my notes\n", "12 monkeys", "-1"])
def test_lock_file_of_somebody_else(line: Refused, tmp_path: Path, text: str) -> None:
    """A file with the lock's name that holds anything but a process id is left as it is."""
    lock = tmp_path / f"{DATABASE}.lock"
    lock.write_text(text)
    for command in (["serve", HTTP], ["check"]):
        said = line(*command, "--data-dir", str(tmp_path))
        assert said == f"{lock} is not a lock of kvstore: it holds no process id"
    assert (lock.read_text(), list(tmp_path.iterdir())) == (text, [lock])


@pytest.mark.parametrize("content", [b"", b"123\n", b"12", b"\0\0\0\0"])
def test_lock_file_of_a_process_that_is_gone(tmp_path: Path, content: bytes) -> None:
    """However much of it a crash or a power cut has left."""
    path = tmp_path / DATABASE
    (tmp_path / f"{DATABASE}.lock").write_bytes(content)
    sqlite_file.Lock(path).release()


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--name=", "--name is empty"),
        ("--max-request-bytes=abc", "'abc' is not a valid whole number"),
        ("--max-txn-ops=1.5", "'1.5' is not a valid whole number"),
        ("--advertise-client-urls=foo", "URL scheme must be http, https or unix: foo"),
        ("--advertise-client-urls=http://a:1,http://b", '"host:port": http://b'),
        ("--advertise-client-urls=http://a:1/v3", "must not contain a path"),
    ],
)
def test_values(line: Refused, flag: str, said: str) -> None:
    """Values that mean nothing are named."""
    assert said in line.serve(HTTP, flag)


def test_no_command(line: Refused) -> None:
    """The way on is shown."""
    assert line() == "no command is given; try kvstore --help"


def test_version_as_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    """It says what the command says."""
    assert cli.main(["version"]) == 0
    shown = capsys.readouterr()
    for spelling in ("--version", "-version"):
        assert cli.main([spelling]) == 0
        assert capsys.readouterr() == shown
