"""Gathering: the next commits are held back for those who were just answered.

A commit costs much the same for one row as for fifty, and many who are answered are about to write
again. So after a commit that answered many, its shard's next one is held back until most of them
are there again, ``gather_interval`` at most: they form one batch instead of several that chase each
other. Few clients never wait.

One gathering is for all shards, since who was answered on one may go on with another:

    first   answers 30 ........ held ----------------.
    second     answers 25 ..... held ----------------+-- 7/8 of the 85 are there: all start
    third          answers 30 .. held ---------------'

so that their batches stay large, and their commits go to the disk side by side. Many are then a
shard's part of ``gather_waiters_min``, a quarter of it at least. A shard without so many is not
held; a commit that hangs has answered nobody, so that nobody waits for it.
"""

from collections.abc import Callable

from kvstore.config import CommitConfig
from kvstore.shard_queue import ShardQueue


class Gathering:
    """Of so many ``shards``. ``start(queue)`` starts the next commit of one held no longer."""

    def __init__(
        self,
        shards: int,
        config: CommitConfig,
        call_later: Callable[[float, Callable[[], None]], object],
        start: Callable[[ShardQueue], None],
    ) -> None:
        self._interval = config.gather_interval
        self._waiters_min = max(config.gather_waiters_min // shards, config.gather_waiters_min // 4)
        self._call_later = call_later
        self._start = start
        self._held: list[ShardQueue] = []
        self._present = 0
        """Answers that wait for a commit of those, and what came to wait on any shard since."""
        self._known = 0
        """Them, and those who were answered."""
        self._number = 0
        """Of this gathering: a timer of an earlier one means nothing."""

    def came(self) -> None:
        """An answer waits for a commit of some shard."""
        self._present += 1
        if self._held and self._present >= self._goal():
            self._end()

    def hold(self, queue: ShardQueue, answered: int) -> bool:
        """Is the next commit of ``queue`` held back for those who are being ``answered``?"""
        if answered < self._waiters_min:
            return False
        if not self._held:
            self._present = self._known = 0
        waiting = queue.waiting()
        self._present += waiting
        self._known += waiting + answered
        if self._present >= self._goal():
            self._end()
            return False
        queue.held_back = True
        self._held.append(queue)
        if len(self._held) == 1:
            number = self._number
            self._call_later(self._interval, lambda: self._give_up(number))
        return True

    def _goal(self) -> int:
        """How many must be present for it to end."""
        return self._known * 7 // 8

    def _give_up(self, number: int) -> None:
        if number == self._number:
            self._end()

    def _end(self) -> None:
        self._number += 1
        held, self._held = self._held, []
        for queue in held:
            queue.held_back = False
            self._start(queue)
