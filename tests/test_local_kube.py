"""deploy/local-kube.sh before its build, which takes minutes: help, and what is in the way."""

import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from tests.program import PATIENCE, ROOT

pytestmark = pytest.mark.slow


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The script in a tree whose build only says that it was begun."""
    build = tmp_path / "tests/kube/build"
    build.parent.mkdir(parents=True)
    build.write_text("#!/bin/sh\necho built >&2\nexit 9\n")
    build.chmod(0o755)
    (tmp_path / "deploy").mkdir()
    return Path(shutil.copy(ROOT / "deploy/local-kube.sh", tmp_path / "deploy"))


def run(script: Path, *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    done = subprocess.run(
        [script, *words], capture_output=True, check=False, text=True, timeout=PATIENCE
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("flag", ["--help", "-h", "-help"])
def test_help(script: Path, flag: str) -> None:
    """It is there at once, and names the options."""
    code, out, err = run(script, "--port", "1", flag)
    assert (code, err) == (0, "")
    assert "--store URL" in out
    assert "set -" not in out


def test_what_is_in_the_way(script: Path) -> None:
    """A store that is not there, or a port that is taken, is one line; otherwise it builds."""
    with socket.socket() as free, socket.create_server(("127.0.0.1", 0)) as taken:
        free.bind(("127.0.0.1", 0))  # nobody listens
        nobody, somebody = free.getsockname()[1], taken.getsockname()[1]
        store = f"--store=http://127.0.0.1:{somebody}"
        for words, says in (
            ([f"-store=http://127.0.0.1:{nobody}"], "start one with `make run`"),
            (["--store", "nowhere"], "is not a URL"),
            (["--store"], "is not a URL"),
            (["--dir", "d", store, "--port", str(somebody)], "choose another with --port"),
            ([store, "--port=x"], "is not a number"),
        ):
            code, out, err = run(script, *words)
            assert (code, out, err.count("\n")) == (1, "", 1), err
            assert says in err
        assert run(script, store, f"--port={nobody}", "--", "--help") == (9, "", "built\n")
