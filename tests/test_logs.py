"""Log lines: one per event, in the form of etcd's."""

import io
import json
from pathlib import Path

import pytest

from kvstore.clock import ManualClock
from kvstore.logs import LEVELS, LogFormat, Logger, make_logger


def logging(
    level: str = "debug", log_format: LogFormat = LogFormat.JSON
) -> tuple[Logger, io.StringIO]:
    """A logger and where it writes."""
    output = io.StringIO()
    clock = ManualClock(1_767_323_045.678901)
    return make_logger(level=level, log_format=log_format, clock=clock, outputs=[output]), output


def test_json() -> None:
    """Level, time (RFC 3339) and message come first, as in zap's; then the facts, typed."""
    log, output = logging()
    log.info("a thing happened", count=3, ratio=0.5, key=b"/a\xff", names=["x", "y"], none=None)
    assert output.getvalue() == (
        '{"level":"info","ts":"2026-01-02T03:04:05.678901Z","msg":"a thing happened",'
        '"count":3,"ratio":0.5,"key":"/a\\\\xff","names":["x","y"],"none":null}\n'
    )


def test_console() -> None:
    """Tabs between time, level, message and the facts, which are left out when there are none."""
    log, output = logging(log_format=LogFormat.CONSOLE)
    log.warning("odd", count=3)
    log.warning("odd")
    first, second = output.getvalue().splitlines()
    assert first == '2026-01-02T03:04:05.678901Z\twarn\todd\t{"count":3}'
    assert second == "2026-01-02T03:04:05.678901Z\twarn\todd"


@pytest.mark.parametrize("log_format", LogFormat)
def test_one_line(log_format: LogFormat) -> None:
    """Whatever the facts are, tracebacks and line ends included, an event is one line of ASCII."""
    log, output = logging(log_format=log_format)
    try:
        int("two\nlines \ud800")
    except ValueError:
        log.exception("failed", path=Path("/a\nb"), text="é\u2028\ud800")
    assert output.getvalue().count("\n") == 1
    assert output.getvalue().isascii()
    assert "ValueError" in output.getvalue()
    assert "test_one_line" in output.getvalue()


@pytest.mark.parametrize("level", LEVELS)
def test_levels(level: str) -> None:
    """A level lets itself and everything worse through; nothing logs at panic."""
    log, output = logging(level)
    for say in (log.debug, log.info, log.warning, log.error, log.critical):
        say("said")
    spelled = [json.loads(line)["level"] for line in output.getvalue().splitlines()]
    known = ["debug", "info", "warn", "error", "fatal"]
    assert spelled == known[known.index(level if level != "panic" else "fatal") :]


class Broken(io.StringIO):
    """An output that nobody reads any more."""

    def write(self, text: str) -> int:
        """Nobody is there."""
        raise BrokenPipeError


def test_output_that_is_gone() -> None:
    """A broken output costs its lines, not the server, and the other outputs get theirs."""
    output = io.StringIO()
    closed = io.StringIO()
    closed.close()
    log = make_logger(
        level="info",
        log_format=LogFormat.JSON,
        clock=ManualClock(),
        outputs=[Broken(), closed, output],
    )
    log.info("said")
    assert json.loads(output.getvalue())["msg"] == "said"
