"""Who waits for changes to be durable, and how they are told: once, with an answer or a status.

A transport's unary ``Call`` is an ``Answer`` as it is; the others here stand before one.
"""

from collections.abc import Callable
from typing import Protocol

from kvstore.errors import StoppedError, StoreError, TimedOutError


class Answer(Protocol):
    """Who waits for a commit."""

    def reply(self, message: bytes) -> None:
        """It is durable: answer."""

    def fail(self, code: int, message: str) -> None:
        """It is not known to be durable: answer with this status."""


class Then:
    """An Answer that calls ``done(None)`` or ``done(error)``."""

    __slots__ = ("_done",)

    def __init__(self, done: Callable[[StoreError | None], None]) -> None:
        self._done = done

    def reply(self, message: bytes) -> None:
        """Durable."""
        self._done(None)

    def fail(self, code: int, message: str) -> None:
        """Not known to be durable."""
        stopped = (code, message) == (StoppedError.code, StoppedError.text)
        self._done(StoppedError() if stopped else TimedOutError())


class Refusal:
    """An Answer that, once its ticket is due, fails the answer behind it with ``error``."""

    __slots__ = ("_answer", "_error")

    def __init__(self, answer: Answer, error: StoreError) -> None:
        self._answer = answer
        self._error = error

    def reply(self, message: bytes) -> None:
        """Everything the refusal was based on is durable."""
        self._answer.fail(self._error.code, self._error.text)

    def fail(self, code: int, message: str) -> None:
        """It never became so."""
        self._answer.fail(code, message)


class Joined:
    """An Answer behind tickets of several shards: answers once, when the last is due or the first
    fails.
    """

    __slots__ = ("_answer", "_body", "_left")

    def __init__(self, answer: Answer, body: bytes, count: int) -> None:
        self._answer = answer
        self._body = body
        self._left = count

    def reply(self, message: bytes) -> None:
        """One more shard is durable."""
        self._left -= 1
        if self._left == 0:
            self._answer.reply(self._body)

    def fail(self, code: int, message: str) -> None:
        """One shard is not known to be: the first failure is the answer."""
        if self._left > 0:
            self._left = -1
            self._answer.fail(code, message)
