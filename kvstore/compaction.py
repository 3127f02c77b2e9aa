"""Compaction: forgetting versions that no one may ask for any more.

In order:
1. the new compact revision is committed on the home shard (its row is the authority);
2. then it takes effect in memory, at once: reads and watches below it are refused from then on;
3. then the index and the history are trimmed in small steps, and the rows that fell out wait in
   ``Drops``;
4. the commits take rows from there when they have time, and delete them.

A crash between 1 and 4 loses nothing: loading the index trims again and finds the rows that are
left. Trimming goes up to the visible revision of all shards only: the newest version below the
compact revision must be durable before the ones behind it may go.

Cost: the history's blocks name exactly the keys that changed, so a compaction looks at each change
once, never at all keys.
"""

from collections import deque
from collections.abc import Callable, Sequence

from kvstore.answers import Answer, Refusal, Then
from kvstore.backend import RowId
from kvstore.config import CompactionConfig
from kvstore.errors import CompactedError, FutureRevisionError, StoreError
from kvstore.fetch import Holds
from kvstore.shard import HOME
from kvstore.store import Store

_DROPS_WITH_WRITES = 16
"""Rows dropped along with even the smallest batch, so that compaction ends under any load."""


class Drops:
    """Rows of one shard to delete, oldest first; rows leave only when no older fetch may still want
    them.
    """

    def __init__(self, holds: Holds, rows_max: int) -> None:
        self._holds = holds
        self._rows_max = rows_max
        self._waiting: deque[tuple[int, list[RowId]]] = deque()
        self.count = 0

    def add(self, rows: list[RowId]) -> None:
        """These fell out of the index just now."""
        if rows:
            self._waiting.append((self._holds.now(), rows))
            self.count += len(rows)

    def take(self, rows: int) -> list[RowId]:
        """Rows that may be deleted now, for a batch of ``rows`` others: as many as those, or the
        most when it is idle.

        So compaction keeps up with the writes that made it necessary, and costs a batch no more
        than it costs itself.
        """
        count = min(max(rows, _DROPS_WITH_WRITES), self._rows_max) if rows else self._rows_max
        taken: list[RowId] = []
        while self._waiting and len(taken) < count and self._holds.passed(self._waiting[0][0]):
            first = self._waiting[0][1]
            room = count - len(taken)
            taken += first[:room]
            if len(first) > room:
                del first[:room]
            else:
                self._waiting.popleft()
        self.count -= len(taken)
        return taken


class Compactor:
    """Carries out compactions of ``store``. ``call_soon`` runs a function in a later turn of the
    loop.

    ``on_compacted()`` is called when a compaction took effect (step 2).
    """

    def __init__(
        self,
        store: Store,
        config: CompactionConfig,
        call_soon: Callable[[Callable[[], None]], object],
        on_compacted: Callable[[], None],
    ) -> None:
        self._store = store
        self._config = config
        self._call_soon = call_soon
        self._on_compacted = on_compacted
        self._accepted = store.compact_revision
        self._running = False
        self._up_to = -1
        self._block = 0
        self._keys: Sequence[bytes] = ()
        self._done_keys = 0
        self._physical: list[tuple[Answer, bytes]] = []
        self.drops = [Drops(store.holds, config.drop_rows_max) for _ in store.commits.queues]
        for queue, drops in zip(store.commits.queues, self.drops, strict=True):
            queue.drops = drops

    def recover(self, left: list[RowId]) -> None:
        """At start: rows that an interrupted compaction left behind, from ``Store.load_rows``."""
        self._accepted = self._up_to = self._store.compact_revision
        self.drops[HOME].add(left)
        self._poke()

    def compact(self, revision: int, *, physical: bool, answer: Answer, body: bytes) -> None:
        """Compact to ``revision``; ``answer.reply(body)`` once it has taken effect (``physical``:
        and rows are gone).

        Refused through the answer: CompactedError at or below the last one, FutureRevisionError
        above the durable head.
        """
        commits = self._store.commits
        refused: StoreError | None = None
        if revision <= self._accepted:
            refused = CompactedError()
        elif revision > commits.durable:
            refused = FutureRevisionError()
        if refused is not None:
            commits.release(self._store.shards.all, Refusal(answer, refused), b"")
            return
        try:
            commits.check_room(HOME)
        except StoreError as error:
            answer.fail(error.code, error.text)
            return
        self._accepted = revision
        commits.append_compaction(revision)

        def durable(error: StoreError | None) -> None:
            if error is not None:
                answer.fail(error.code, error.text)
                return
            self._take_effect(revision)
            if physical:
                self._physical.append((answer, body))
                self._answer_physical()
            else:
                answer.reply(body)

        commits.release((HOME,), Then(durable), b"")

    def _take_effect(self, revision: int) -> None:
        store = self._store
        if revision > store.compact_revision:
            store.compact_revision = revision
            self._on_compacted()
        self._trim()

    def _trim(self) -> None:
        """Start trimming up to what may go now, unless that is under way or done."""
        store = self._store
        up_to = min(store.compact_revision, store.commits.visible(store.shards.all))
        if not self._running and up_to > self._up_to:
            self._running = True
            self._up_to = up_to
            self._begin_block(0)
            self._call_soon(self._step)

    def _begin_block(self, number: int) -> None:
        """Trim the keys of this block next."""
        self._block = number
        self._keys = self._store.history.keys_until(self._up_to, number)
        self._done_keys = 0

    def _step(self) -> None:
        """Trim some keys of the block in work, and come back if there is more."""
        store, up_to = self._store, self._up_to
        rows: list[list[RowId]] = [[] for _ in self.drops]
        for key in self._keys[self._done_keys : self._done_keys + self._config.step_keys]:
            dropped = store.index.trim(key, up_to)
            rows[store.shards.of(key)] += [(entry[0], entry[1]) for entry in dropped]
        for drops, fallen in zip(self.drops, rows, strict=True):
            drops.add(fallen)
        self._done_keys += self._config.step_keys
        if self._done_keys >= len(self._keys):
            if not self._keys:
                self._running = False
                self._trim()
                self._poke()
                self._answer_physical()
                return
            dropped_block = self._block == 0 and store.history.drop_oldest_block(up_to)
            self._begin_block(0 if dropped_block else self._block + 1)
        self._poke()
        self._call_soon(self._step)

    def tick(self) -> None:
        """Go on with what waited for a frontier or a fetch, or was committed after its answer had
        timed out; the server calls it a few times a second.
        """
        self._take_effect(self._store.commits.compact_revision)
        self._poke()
        self._answer_physical()

    def _poke(self) -> None:
        for queue, drops in zip(self._store.commits.queues, self.drops, strict=True):
            if drops.count:
                self._store.commits.poke_drops(queue.number)

    def _answer_physical(self) -> None:
        if (
            self._up_to < self._store.compact_revision
            or self._running
            or any(drops.count for drops in self.drops)
        ):
            return
        waiting, self._physical = self._physical, []
        for answer, body in waiting:
            self._store.commits.release(self._store.shards.all, answer, body)
