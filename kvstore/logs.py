"""Log lines for operators: one per event, a constant message with facts as fields, none a request.

The formats are those of etcd's logger (zap), so that the tools that read etcd's log read this one:

- ``json``: ``{"level":"info","ts":"2026-01-02T03:04:05.678901Z","msg":"...","field":...}``
- ``console``: ``2026-01-02T03:04:05.678901Z<TAB>info<TAB>...<TAB>{"field":...}``

Levels as in etcd's contributor guide (``logging.md``): *error* what an operator must act upon,
*warn* what may become one, *info* milestones of the process, *debug* the rest. ``panic`` and
``fatal``, which etcd's flag knows, show errors of that kind only; nothing here is logged at
*panic*, and *fatal* is the last line of a process that cannot go on.
"""

import json
from collections.abc import MutableMapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from enum import StrEnum
from typing import TextIO

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, WrappedLogger

from kvstore.clock import Clock

Logger = FilteringBoundLogger
"""What modules of the rim log to: ``debug``, ``info``, ``warning``, ``error``, ``critical``
(written as fatal)."""

LEVELS = {"debug": 10, "info": 20, "warn": 30, "error": 40, "panic": 50, "fatal": 50}
"""Spelling of ``--log-level`` to the numbers of the standard library."""

_SPELLING = {"warning": "warn", "critical": "fatal", "exception": "error"}


class LogFormat(StrEnum):
    """``--log-format``."""

    JSON = "json"
    CONSOLE = "console"


def make_logger(
    *, level: str, log_format: LogFormat, clock: Clock, outputs: Sequence[TextIO]
) -> Logger:
    """A logger that writes to ``outputs``; ``level`` is a key of ``LEVELS``.

    Nothing is global: whoever logs is given the logger.
    """

    def stamp(_: WrappedLogger, method: str, event: EventDict) -> EventDict:
        time = datetime.fromtimestamp(clock.wall(), UTC)
        head = {
            "level": _SPELLING.get(method, method),
            "ts": time.isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "msg": event.pop("event"),
        }
        return {**head, **event}

    logger: Logger = structlog.wrap_logger(
        _Output(outputs),
        processors=[
            structlog.processors.format_exc_info,
            stamp,
            _render_json if log_format is LogFormat.JSON else _render_console,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        context_class=dict,
    )
    return logger


class _Output:
    """Writes lines; a reader that is gone (closed pipe, full disk) does not end the store."""

    def __init__(self, outputs: Sequence[TextIO]) -> None:
        self._outputs = outputs

    def msg(self, line: str) -> None:
        """Write ``line`` in one call, so that lines of several threads do not mix."""
        for output in self._outputs:
            with suppress(OSError, ValueError):
                output.write(line + "\n")
                output.flush()

    debug = info = warning = error = exception = critical = msg


def _render_json(_: WrappedLogger, __: str, event: EventDict) -> str:
    return _encode(event)


def _render_console(_: WrappedLogger, __: str, event: EventDict) -> str:
    head = f"{event.pop('ts')}\t{event.pop('level')}\t{event.pop('msg')}"
    return f"{head}\t{_encode(event)}" if event else head


def _encode(fields: MutableMapping[str, object]) -> str:
    return json.dumps(fields, separators=(",", ":"), default=_spell)


def _spell(fact: object) -> str:
    """Keys and other bytes are shown as text with escapes; anything else by its own words."""
    return fact.decode("utf-8", "backslashreplace") if isinstance(fact, bytes) else str(fact)
