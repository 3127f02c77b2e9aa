"""What all of one generator process shares: where the server is, the records, the numbers."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

from bench import records
from bench.client.connection import WINDOW_BYTES, Answered, Connection, Sink
from bench.drive.ticker import Ticker

UNKNOWN_CODES = frozenset((1, 2, 4, 13, 14))
"""Cancelled, Unknown, DeadlineExceeded, Internal, Unavailable: done or not."""
NO_CONNECTION = "no connection"
"""Text of calls for which there was none: told from a server's words by identity."""
RECONNECT_US = 100_000
_PART_BITS = 40
"""Numbers of one process begin at its part shifted by this, so that they are unique in the run."""


class Client(Protocol):
    """A connection, whoever wrote its client: see ``bench.client.connection.Connection``."""

    received_us: int

    async def connect(self, host: str, port: int, group: asyncio.TaskGroup) -> None:
        """Raises ``OSError``."""

    @property
    def usable(self) -> bool:
        """May calls be made?"""

    def call(self, path: bytes, message: bytes, answered: Answered, timeout_us: int) -> None:
        """A unary call."""

    def open(
        self, path: bytes, message: bytes, sink: Sink, *, end: bool = False, timeout_us: int = 0
    ) -> int:
        """A stream; 0: for as long as it lasts."""

    def send(self, stream: int, message: bytes) -> None:
        """One more message."""

    def grant(self, stream: int, size: int) -> None:
        """Credit for a stream that is read slowly."""

    def cancel(self, stream: int) -> None:
        """Give a stream up."""

    def expire(self, now: int) -> None:
        """End overdue calls."""

    def close(self, *, reset: bool = False) -> None:
        """End the connection."""


class Making(Protocol):
    """How a connection is made."""

    def __call__(
        self,
        authority: str,
        on_ready: Callable[[], None],
        on_lost: Callable[[], None],
        *,
        window_bytes: int = WINDOW_BYTES,
    ) -> Client:
        """One that is to be connected."""


@dataclass(slots=True)
class Site:
    """One generator process; ``zero_us`` is set when the load starts."""

    loop: asyncio.AbstractEventLoop
    host: str
    port: int
    part: int
    run: str
    prefix: bytes
    timeout_us: int
    ticker: Ticker
    recorders: dict[str, records.Recorder]
    make: Making = Connection
    range_stream: bool = False
    """Lists of apiservers and watchers are streams; every target of the session has them."""
    zero_us: int = 0
    connections_failed: int = 0
    stopping: bool = False
    """Nothing reconnects any more."""
    over: bool = False
    """The load has ended: no step is begun any more."""
    head_revision: int = 0
    """The highest revision seen in a header."""
    operations: Iterator[int] = field(init=False)
    numbers: Iterator[int] = field(init=False)

    def __post_init__(self) -> None:
        """Numbers that no other process gives."""
        self.operations = count(self.part << _PART_BITS)
        self.numbers = count(self.part << _PART_BITS)

    def outcome(self, code: int, text: str) -> records.Outcome:
        """What an error says of the call's effect; without a connection nothing was sent."""
        if code == 0:
            return records.Outcome.OK
        unknown = code in UNKNOWN_CODES and text is not NO_CONNECTION
        return records.Outcome.UNKNOWN if unknown else records.Outcome.REFUSED


class Line:
    """A connection that comes back: lost, it is made again until the site stops.

    Calls made while it is down fail at once as Unavailable, as those of a client without a
    connection do.
    """

    def __init__(self, site: Site, *, window_bytes: int = WINDOW_BYTES) -> None:
        self.site = site
        self.number = -1
        self.on_up: Callable[[], None] | None = None
        """Called each time that the connection is usable."""
        self._window_bytes = window_bytes
        self._connection: Client | None = None
        self._making: asyncio.Task[None] | None = None
        self._group: asyncio.TaskGroup | None = None
        self._over = False

    @property
    def connection(self) -> Client | None:
        """The usable one, if there is."""
        found = self._connection
        return found if found is not None and found.usable else None

    @property
    def wanted(self) -> bool:
        """Is it to be connected?"""
        return self._group is not None and not self._over

    def up(self, group: asyncio.TaskGroup) -> None:
        """Connect, now and after each loss."""
        self._group = group
        self._connect()

    def _connect(self) -> None:
        if self._group is not None and not self.site.stopping and not self._over:
            self._making = self._group.create_task(self._make())

    async def _make(self) -> None:
        site = self.site
        assert self._group is not None
        self.number = next(site.numbers)
        connection = self._connection = site.make(
            f"{site.host}:{site.port}", self._usable, self._lost, window_bytes=self._window_bytes
        )
        try:
            await connection.connect(site.host, site.port, self._group)
        except OSError:
            site.connections_failed += 1
            self._lost()

    def _usable(self) -> None:
        if self.on_up is not None:
            self.on_up()

    def _lost(self) -> None:
        self._connection = None
        if not self.site.stopping and not self._over:
            self.site.loop.call_later(RECONNECT_US / 1e6, self._connect)

    def call(self, path: bytes, message: bytes, answered: Answered) -> None:
        """A unary call; ``answered`` may be called from inside if there is no connection."""
        connection = self.connection
        if connection is None:
            answered(14, b"", NO_CONNECTION)
        else:
            connection.call(path, message, answered, self.site.timeout_us)

    def expire(self, now: int) -> None:
        """End calls that are overdue then, though the connection may be closing."""
        if self._connection is not None:
            self._connection.expire(now)

    def received_us(self) -> int:
        """When the input came that is being handled."""
        return self._connection.received_us if self._connection is not None else 0

    def give_up(self) -> None:
        """End the connection for good."""
        self._over = True
        self.close()

    def close(self, *, reset: bool = False) -> None:
        """End the connection; it comes back unless the site is stopping."""
        if self._connection is not None:
            self._connection.close(reset=reset)
