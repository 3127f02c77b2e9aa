"""An open store in PostgreSQL, what it has told, and batches for it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from backends.postgres_session import Session as Connection
from backends.postgres_statements import COPY_ROWS_MIN
from kvstore.backend import Batch, LeaseRow, Outcome
from tests.backends.postgres_storage import PostgresStorage
from tests.backends.storage import Session, put


class Held:
    """An open store, and what it has told."""

    def __init__(self, storage: PostgresStorage) -> None:
        self.storage = storage
        self.backend = storage.backend()
        self.session = Session(self.backend)
        self.told: list[str] = []
        self.backend.on_broken = lambda reason: self.told.append(f"broken: {reason}")
        self.backend.on_out = lambda reason: self.told.append(f"out: {reason}")
        self.backend.on_back = lambda: self.told.append("back")

    @property
    def connection(self) -> Connection:
        """The writing session."""
        connection = self.backend._writer.session
        assert connection is not None
        return connection

    def plain(self, key: bytes = b"a") -> Batch:
        """A batch of one statement."""
        return self.session.batch([put(self.session.tip + 1, 0, key)])

    def several(self, key: bytes = b"a") -> Batch:
        """A batch of several statements."""
        tip = self.session.tip
        return self.session.batch(
            [put(tip + 1, 0, key)], lease_puts=[LeaseRow(tip + 1, 60, 0)], drops=[(1, 0)]
        )

    def many(self, key: bytes = b"a") -> Batch:
        """A batch whose rows are copied."""
        tip = self.session.tip + 1
        return self.session.batch([put(tip, n, key) for n in range(COPY_ROWS_MIN)])

    def without_revision(self, _: bytes = b"") -> Batch:
        """A batch that does not move the tip."""
        return self.session.batch(lease_puts=[LeaseRow(7, 60, 0)])

    async def settle(self, batch: Batch) -> list[Outcome]:
        """Commit and, as long as it is needed, resolve and commit again; every outcome."""
        outcomes = [(await self.session.commit(batch)).outcome]
        while outcomes[-1] in {Outcome.UNKNOWN, Outcome.NOT_COMMITTED}:
            if outcomes[-1] is Outcome.UNKNOWN:
                outcomes.append((await self.session.resolve(batch)).outcome)
            else:
                outcomes.append((await self.session.commit(batch)).outcome)
        self.session.tip = batch.tip
        return outcomes


@asynccontextmanager
async def holding(storage: PostgresStorage) -> AsyncIterator[Held]:
    """A store that is open inside."""
    held = Held(storage)
    await held.session.open()
    try:
        yield held
    finally:
        await held.session.close()
