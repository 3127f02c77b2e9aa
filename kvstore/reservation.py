"""What home knows of all shards, so that a start may do without some of them.

**Reserved revisions.** A shard that is missing at a start may hold later revisions than all others.
None of them may be issued again, so home has stored, before any was issued, up to where they may
go; the next start begins above. It is ``AHEAD`` further than what is issued, is moved on when half
of that is used up, and a clean stop takes it back to the last one issued, so that numbers do not
jump without need. A shard commits nothing above it (``Commits.reserved``): with home out of reach
all others may go on for AHEAD / 4 revisions, some hours at the highest rate. Then writes are
refused until home has stored the next reservation; the last AHEAD / 4 are for what is issued
between two ticks.

**Records.** How far each shard was when it was last looked at, and which database it was: one that
comes back further behind, or as another, has lost what was acknowledged, and is refused
(``opening``). They are at most ``record_interval`` old.

With one shard there is nothing to do: its own tip says it all.
"""

from collections.abc import Iterable, Iterator

from kvstore.answers import Answer
from kvstore.backend import ShardRecord
from kvstore.clock import Clock
from kvstore.commit import Commits
from kvstore.errors import TimedOutError
from kvstore.shard import HOME

AHEAD = 1 << 30
"""Revisions; billions of starts fit into the numbers that there are."""

HOME_ONLY = (HOME,)


class Reservation:
    """Keeps home's reservation and records, over ``commits`` of several shards, up to date.

    ``reserved`` and ``records`` are what home has stored at the start.
    """

    def __init__(
        self,
        commits: Commits,
        clock: Clock,
        *,
        reserved: int,
        records: Iterable[ShardRecord],
        record_interval: float,
    ) -> None:
        commits.reserved = reserved
        self._commits = commits
        self._clock = clock
        self._asked = reserved
        """What is reserved once all is committed that was appended."""
        self._records = {record.shard: record for record in records}
        self._record_interval = record_interval
        self._records_due = clock.monotonic() + record_interval
        self._short = False
        """Is so little reserved that nothing may be issued?"""
        self._over = False

    def tick(self) -> None:
        """Reserve more and record tips, if it is time; the server calls it a few times a second."""
        if self._over:
            return
        issued = self._issued()
        short = self._commits.reserved - issued < AHEAD // 4
        if short != self._short:
            self._short = short
            self._commits.bar(TimedOutError if short else None)
        reserved = None
        if self._asked - issued < AHEAD // 2:
            reserved = self._asked = issued + AHEAD
        now = self._clock.monotonic()
        changed: list[ShardRecord] = []
        if now >= self._records_due and self._commits.queues[HOME].lost is None:
            self._records_due = now + self._record_interval
            changed = list(self._changed())
        if reserved is not None or changed:
            self._append(reserved, changed)

    def end(self, answer: Answer) -> None:
        """A clean stop: writes are barred, nothing more is issued. ``answer`` is told when that
        is stored.
        """
        assert self._commits.queues[HOME].barred, "what is issued now would not be reserved"
        self._over = True
        self._asked = self._issued()
        self._append(self._asked, list(self._changed()))
        self._commits.release(HOME_ONLY, answer, b"")

    def _append(self, reserved: int | None, changed: list[ShardRecord]) -> None:
        self._records.update((record.shard, record) for record in changed)
        self._commits.append_reserved(reserved, changed)

    def _issued(self) -> int:
        """The last revision issued on any shard."""
        return max(self._commits.durable, *(queue.issued() for queue in self._commits.queues))

    def _changed(self) -> Iterator[ShardRecord]:
        """Shards that are not as they were recorded; home needs no record of itself."""
        for queue in self._commits.queues[1:]:
            record = ShardRecord(queue.name, queue.tip, queue.backend.origin)
            if not queue.missing and record != self._records.get(queue.name):
                yield record
