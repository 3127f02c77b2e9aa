"""Revisions over several shards: their commit point is on home, where all their rows are stored,
home's own as they are, the others' as a **redo record**.

    home      [ ... 7 | redo of 8: b@1 c@2 ]     the commit point of 8
    shard 1   [ 8: b | 9 ]   blocked until that has returned, then the first to go
    shard 2   [ 8: c ]       likewise; its frontier is 7 until then

So there is no moment at which a crash leaves a part of it: before the commit point no shard has
anything, after it ``opening`` applies what is missing. When all have committed their parts, the
record is dropped with a later batch of home.

Whoever appends one has found nothing uncommitted on these shards but parts of earlier records, or a
row that it was decided by could be lost in a crash which keeps this one (``barrier``). Home is
different: what it has pending is committed before the record, or with it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from kvstore.backend import Row
from kvstore.clock import Clock
from kvstore.shard import HOME
from kvstore.shard_queue import ForAll, ShardQueue


class Redo:
    """The redo records of home. ``append`` and ``schedule`` are those of ``Commits``."""

    def __init__(
        self,
        queues: Sequence[ShardQueue],
        clock: Clock,
        *,
        append: Callable[[int, list[Row], int], None],
        schedule: Callable[[ShardQueue], None],
    ) -> None:
        self._queues = queues
        self._home = queues[HOME]
        self._clock = clock
        self._append = append
        self._schedule = schedule
        self._left: dict[int, int] = {}
        """Shards that have not committed their part yet, by revision."""

    def append(self, revision: int, parts: Mapping[int, list[Row]], size: int) -> None:
        """See ``Commits.append_over``; not for rows of home alone."""
        home = self._home
        pending, record = home.filling(), home.filling_for_all()
        for shard, rows in parts.items():
            if shard != HOME:
                self._block(record, self._queues[shard], rows)
        record.redo.sort(key=_place)
        record.tip = revision
        self._left[revision] = len(parts) - (HOME in parts)
        recorded = sum(len(rows) for shard, rows in parts.items() if shard != HOME)
        pending.count += recorded
        pending.size += size
        home.rows += recorded
        home.size += size
        if HOME in parts:
            self._append(HOME, parts[HOME], 0)
        self._schedule(home)

    def _block(self, record: ForAll, queue: ShardQueue, rows: list[Row]) -> None:
        """Append a shard's part, which waits for the batch of ``record``."""
        assert queue.lost is None, "a part is given to a shard that is there"
        assert queue.settled, "nothing else is uncommitted"
        if not queue.stuck:
            queue.started_at = self._clock.monotonic()
        part = queue.filling()
        part.blocked += 1
        part.redone += (rows[0][0],)
        part.recorded += len(rows)
        record.frees.append((queue, part))
        record.redo += [(queue.name, row) for row in rows]
        self._append(queue.number, rows, sum(len(row[2]) + len(row[6]) for row in rows))

    def recorded(self, record: ForAll) -> None:
        """Home has committed a batch: the parts that waited for it go."""
        for queue, part in record.frees:
            part.blocked -= 1
            self._schedule(queue)

    def expect(self, revision: int, shards: int) -> None:
        """At start: so many shards are missing and have not committed their part."""
        self._left[revision] = shards

    def done(self, revisions: Iterable[int]) -> None:
        """A shard has committed its parts of these."""
        for revision in revisions:
            self._left[revision] -= 1
            if not self._left[revision]:
                del self._left[revision]
                self._home.filling_for_all().redo_drops.append(revision)
                self._schedule(self._home)


def _place(redo: tuple[str, Row]) -> tuple[int, int]:
    """Where a redo row stands in the order."""
    return redo[1][:2]
