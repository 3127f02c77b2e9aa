"""``kvstore shards``: what is asked of a server and how its answer is drawn."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvstore import cli
from kvstore.shard_table import AskError, ask, draw

CORE = {
    "name": "core",
    "home": True,
    "state": "serving",
    "trouble": "",
    "keys": 1_204,
    "bytes": 3_500_000,
    "bytes_in_use": 900,
    "tip": 12,
    "frontier_lag": 0,
}
GONE = {
    "name": "agents",
    "home": False,
    "state": "missing",
    "trouble": "no \x1b[2Janswer",
    "keys": None,
    "bytes": None,
    "bytes_in_use": None,
    "tip": None,
    "frontier_lag": None,
}
ROUTES = [
    {"prefix": "/a/", "shard": "agents", "keys": None},
    {"prefix": "/\u00e9\udcff/", "shard": "core", "keys": 4},
]
TOLD = {"revision": 12, "shards": [CORE, GONE], "routes": ROUTES}
DRAWN = """\
SHARD         KEYS    BYTES  IN USE  TIP  LAG  STATE
core (home)  1,204  3.3 MiB   900 B   12    0  serving
agents           -        -       -    -    -  missing: no \\x1b[2Janswer

PREFIX   SHARD   KEYS
/a/      agents     -
/\u00e9\\xff/  core       4"""


def drawn_from(told: object) -> str:
    """What a user sees of a page."""
    return draw(json.loads(json.dumps(told)))


def test_tables() -> None:
    """Columns are aligned, what is not known is a dash, and no terminal is told what to do."""
    assert drawn_from(TOLD) == DRAWN


def test_the_state_is_told_once() -> None:
    """A shard that is lost for good has the word in its reason, too."""
    lost = {**CORE, "state": "broken", "trouble": "broken: I/O error"}
    assert drawn_from({"shards": [lost], "routes": []}).endswith("0  broken: I/O error")


def test_one_shard() -> None:
    """Without routes there is one table."""
    assert drawn_from({"shards": [CORE], "routes": []}).count("\n") == 1


@contextmanager
def answering(*answers: bytes) -> Iterator[str]:
    """Something on a port of ours that gives ``answers``, one a connection; its host and port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(10)

        def serve() -> None:
            for answer in answers:
                sock, _ = listening.accept()
                with sock:
                    sock.recv(65536)
                    sock.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        host, port = listening.getsockname()
        yield f"{host}:{port}"
        thread.join()


def page(body: bytes, status: str = "200 OK") -> bytes:
    """An HTTP/1.1 answer."""
    return b"HTTP/1.1 %b\r\ncontent-length: %d\r\n\r\n%b" % (status.encode(), len(body), body)


def asked(*endpoints: str) -> object:
    """What those tell."""
    return ask(endpoints, cacert="", cert="", key="")


def test_the_first_that_answers_is_asked() -> None:
    """Endpoints that nobody listens on are passed over; a scheme may be left out."""
    body = json.dumps(TOLD).encode()
    with socket.create_server(("127.0.0.1", 0)) as closed:
        silent = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with answering(page(body), page(body)) as here:
        assert asked(silent, f"http://{here}/") == TOLD
        assert asked(here) == TOLD


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        (page(b"404 page not found\n", "404 Not Found"), "does not tell of shards (status 404)"),
        (page(b"hello"), "does not tell of shards (status 200)"),
        (page(b"[]"), "does not tell of shards (status 200)"),
        (page(b"{}"), "does not tell of shards (status 200)"),
        (b"SSH-2.0\r\n", "SSH-2.0"),
        (b"", "without response"),
    ],
)
def test_something_else_answers(answer: bytes, named: str) -> None:
    """What is no server of ours is named, in one line."""
    with answering(answer) as here, pytest.raises(AskError) as caught:
        asked(here)
    assert str(caught.value).startswith(here)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "endpoint", ["unix:///run/kv", "http://", "http://a:b", "http://a:1/x", "ftp://a", ":1", "["]
)
def test_endpoints_that_are_none(endpoint: str) -> None:
    """They are refused, before anything is sent."""
    with pytest.raises(AskError, match="is not an endpoint such as"):
        asked(endpoint)


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with one line and exit code 2."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    code = cli.main(["shards", "--endpoints", f"127.0.0.1:{port}"])
    out, err = capsys.readouterr()
    assert (code, out) == (cli.EXIT_REFUSED, "")
    assert err == f"kvstore: 127.0.0.1:{port}: Connection refused\n"
    assert cli.main(["shards", "--endpoints=,"]) == cli.EXIT_REFUSED
    assert "--endpoints is empty" in capsys.readouterr().err


def test_certificates_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is missing is an error like the others."""
    code = cli.main(["shards", "--endpoints=127.0.0.1:1", "--cacert=/nowhere/ca.pem"])
    assert code == cli.EXIT_REFUSED
    assert capsys.readouterr().err == "kvstore: 127.0.0.1:1: No such file or directory\n"
