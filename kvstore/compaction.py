"""Compaction: forgetting versions that no one may ask for any more.

In order:
1. the new compact revision is committed on the home shard (its row is the authority);
2. then it takes effect in memory, at once: reads and watches below it are refused from then on;
3. then the index and the histories are trimmed in small steps, and the rows that fell out wait in
   ``Drops``;
4. the commits take rows from there when they have time, and delete them.

A crash between 1 and 4 loses nothing: loading the index trims again and finds the rows that are
left. Each shard is trimmed up to what is visible of it only: the newest version below the compact
revision must be durable before the ones behind it may go.

    compact revision 8      history.floor         trimmed
    shard 0   not behind    8                     up to 8
    shard 1   frontier 5    5                     up to 5, the rest once its frontier is past 8
    shard 2   missing       as at the start       once it is loaded and there

So a shard that is out stops no other one's compaction, nor the answer to a physical one. When it is
back, its watchers read on from where they stood; those that have not done so when its turn comes
are told that they are late. A read that hangs keeps rows of its own shard only; a physical
compaction is answered when they are gone, or when the shard is out.

Cost: the histories' blocks name exactly the keys that changed, so a compaction looks at each change
once, never at all keys.
"""

from collections import deque
from collections.abc import Callable, Sequence

from kvstore.answers import Answer, Refusal, Then
from kvstore.backend import RowId
from kvstore.config import CompactionConfig
from kvstore.errors import CompactedError, FutureRevisionError, StoreError
from kvstore.fetch import Holds
from kvstore.history import History
from kvstore.index import Index
from kvstore.shard import HOME
from kvstore.store import Store

_DROPS_WITH_WRITES = 16
"""Rows dropped along with even the smallest batch, so that compaction ends under any load."""


class Drops:
    """Rows of one shard to delete, oldest first; rows leave only when no older fetch may still want
    them.
    """

    def __init__(self, shard: int, holds: Holds, rows_max: int) -> None:
        self._shard = shard
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
        while self._waiting and len(taken) < count:
            mark, first = self._waiting[0]
            if not self._holds.passed(self._shard, mark):
                break
            room = count - len(taken)
            taken += first[:room]
            if len(first) > room:
                del first[:room]
            else:
                self._waiting.popleft()
        self.count -= len(taken)
        return taken


class _Trimming:
    """How far one shard is trimmed; ``step`` until it is no longer ``under_way``."""

    def __init__(self, history: History, drops: Drops) -> None:
        self.history = history
        self.drops = drops
        self.up_to = history.floor
        """Trimmed up to here, or on the way."""
        self.under_way = False
        self._block = 0
        self._keys: Sequence[bytes] = ()
        self._done_keys = 0

    def begin(self) -> None:
        """Trim up to the history's floor."""
        self.under_way = True
        self.up_to = self.history.floor
        self._begin_block(0)

    def _begin_block(self, number: int) -> None:
        """Trim the keys of this block next."""
        self._block = number
        self._keys = self.history.keys_until(self.up_to, number)
        self._done_keys = 0

    def step(self, index: Index, keys_max: int) -> None:
        """Trim some keys of the block in work."""
        begin, end = self._done_keys, self._done_keys + keys_max
        rows: list[RowId] = []
        for key in self._keys[begin:end]:
            rows += [(entry[0], entry[1]) for entry in index.trim(key, self.up_to)]
        self.drops.add(rows)
        self._done_keys = end
        if not self._keys:
            self.under_way = False
        elif end >= len(self._keys):
            dropped_block = self._block == 0 and self.history.drop_oldest_block(self.up_to)
            self._begin_block(0 if dropped_block else self._block + 1)


class Compactor:
    """Carries out compactions of ``store``. ``call_soon`` runs a function in a later turn of the
    loop.

    ``on_compacted()`` is called when a compaction took effect (step 2), and when it has reached a
    shard that was behind.
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
        self._stepping = False
        self._physical: list[tuple[Answer, bytes]] = []
        shards = range(len(store.histories))
        self.drops = [Drops(shard, store.holds, config.drop_rows_max) for shard in shards]
        self._trimmings = list(map(_Trimming, store.histories, self.drops))
        for queue, drops in zip(store.commits.queues, self.drops, strict=True):
            queue.drops = drops

    def recover(self, shard: int, left: list[RowId]) -> None:
        """Rows of a shard, from ``Store.load_rows``, that a compaction had left behind; once the
        shard can commit.
        """
        self.drops[shard].add(left)
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
            commits.release((HOME,), Refusal(answer, refused), b"")
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
        """Refuse what is below from now on, and begin to trim what may be trimmed by now."""
        store = self._store
        moved = revision > store.compact_revision
        if moved:
            store.compact_revision = revision
        for shard, history in enumerate(store.histories):
            floor = min(store.compact_revision, store.commits.visible((shard,)))
            if floor > history.floor:
                history.floor = floor
                moved = True
        if moved:
            self._on_compacted()
        self._trim()

    def _trim(self) -> None:
        """Go on with what is to be trimmed."""
        for trimming in self._trimmings:
            if not trimming.under_way and trimming.history.floor > trimming.up_to:
                trimming.begin()
        if not self._stepping and any(trimming.under_way for trimming in self._trimmings):
            self._stepping = True
            self._call_soon(self._step)

    def _step(self) -> None:
        """Trim some keys, of one shard after the other, and come back if there is more."""
        self._stepping = False
        trimming = next(trimming for trimming in self._trimmings if trimming.under_way)
        trimming.step(self._store.index, self._config.step_keys)
        self._trim()
        self._poke()
        self._answer_physical()

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
        if not self._physical:
            return
        commits, compacted = self._store.commits, self._store.compact_revision
        there = [queue.number for queue in commits.queues if queue.lost is None]
        for trimming in map(self._trimmings.__getitem__, there):
            if trimming.under_way or trimming.up_to < compacted or trimming.drops.count:
                return
        waiting, self._physical = self._physical, []
        for answer, body in waiting:
            commits.release(there, answer, body)
