"""Which synced watchers want to hear of a key.

Watchers of equal ranges form a **group**, so that a key is looked up once for all of them and its
event is encoded once for those that want it in the same form. Groups are found by the shape of
their range:

    one key            a dictionary
    [key, no end)      sorted starts: all that start at or before the key match
    [start, end)       a tree ordered by (start, end), each node with the furthest end below it:

                             [/b, /c)  reach /z          find(/e): /b's reach is beyond /e, so look
                            /         \\                  left ([/a, /z) matches, nothing below it)
               [/a, /z) reach /z     [/d, /f) reach /f   and right ([/d, /f) matches)

A lookup is O(log n) plus what it finds, whatever the ranges are: nested, disjoint or chosen to
hurt. The tree is a treap: it balances by random priorities, so no order of insertion degrades it.

Alternative rejected: the elementary segments between all starts and ends, each with the groups
that cover it; one bisection, but n nested ranges need n^2 places.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from enum import IntEnum
from random import Random
from typing import TYPE_CHECKING

from kvstore.watch_message import PREVIOUS, Outbox, watch_id_field

if TYPE_CHECKING:
    from kvstore.history import Entry
    from kvstore.watch import WatchStream
    from kvstore.watch_feed import Feed

NO_END = b"\0"
"""As the end of a range: there is none."""


class State(IntEnum):
    """What a watcher is doing; it is in exactly one place for each."""

    WAITING = 0
    """For the revision ``due`` to become visible; in its feed's list."""
    SYNCED = 1
    """It has everything up to its feed's position; in a group."""
    QUEUED = 2
    """Unsynced, as all that follow: about to read the next piece of the history."""
    FETCHING = 3
    """Values that it needs are being read from storage."""
    STARVED = 4
    """It needs values, and enough others are fetching."""
    FAILED = 5
    """Storage did not answer; it tries again at the next tick."""
    BLOCKED = 6
    """The client has not read enough; among its stream's blocked watchers."""
    OVER = 7
    """Cancelled, or compaction overtook it."""


class Watcher:
    """The server's side of one watch."""

    __slots__ = (
        "due",
        "end",
        "feed",
        "fetched",
        "group",
        "id",
        "id_field",
        "key",
        "next",
        "number",
        "outbox",
        "progress_notify",
        "quiet",
        "state",
        "stream",
        "wants",
    )

    def __init__(
        self,
        stream: "WatchStream",
        feed: "Feed",
        watch_id: int,
        key: bytes,
        end: bytes | None,
        wants: int,
    ) -> None:
        self.stream = stream
        self.outbox: Outbox = stream.outbox
        self.feed = feed
        self.id = watch_id
        self.id_field = watch_id_field(watch_id)
        self.key = key
        self.end = end
        self.wants = wants
        self.state = State.WAITING
        self.number = 0
        """Its place among watchers that wait for the same revision."""
        self.next = 0
        """Everything below this revision was sent, or is not wanted; not kept while synced."""
        self.due = 0
        """It is not synced before this revision is visible."""
        self.progress_notify = False
        self.quiet = True
        """No event was sent since progress was last due."""
        self.group: Group | None = None
        self.fetched: dict[Entry, bytes | None] | None = None
        """Values read from storage since it last got on; memory may have lost others meanwhile."""


class Group:
    """Synced watchers of one range, by what they want."""

    __slots__ = ("end", "key", "variants", "wants_previous")

    def __init__(self, key: bytes, end: bytes | None) -> None:
        self.key = key
        self.end = end
        self.variants: dict[int, dict[Watcher, None]] = {}
        self.wants_previous = False

    def add(self, watcher: Watcher) -> None:
        """Take a watcher of this range."""
        self.variants.setdefault(watcher.wants, {})[watcher] = None
        self.wants_previous = self.wants_previous or bool(watcher.wants & PREVIOUS)

    def remove(self, watcher: Watcher) -> None:
        """Let a watcher go."""
        like = self.variants[watcher.wants]
        del like[watcher]
        if not like:
            del self.variants[watcher.wants]
            self.wants_previous = any(wants & PREVIOUS for wants in self.variants)


class Groups:
    """See the module's text."""

    def __init__(self, random: Random) -> None:
        self._exact: dict[bytes, Group] = {}
        self._open_starts: list[bytes] = []
        self._open: list[Group] = []
        self._bounded = RangeTree(random)

    def __iter__(self) -> Iterator[Group]:
        """All groups."""
        yield from self._exact.values()
        yield from self._open
        yield from self._bounded

    def find(self, key: bytes) -> list[Group]:
        """The groups whose range holds ``key``."""
        found = self._open[: bisect_right(self._open_starts, key)]
        exact = self._exact.get(key)
        if exact is not None:
            found.append(exact)
        self._bounded.find(key, found)
        return found

    def add(self, watcher: Watcher) -> None:
        """Put a watcher into the group of its range."""
        group = self._of(watcher.key, watcher.end)
        if group is None:
            group = Group(watcher.key, watcher.end)
            self._insert(group)
        group.add(watcher)
        watcher.group = group

    def remove(self, watcher: Watcher) -> None:
        """Take a watcher out of its group."""
        group = watcher.group
        assert group is not None, "a synced watcher has a group"
        watcher.group = None
        group.remove(watcher)
        if not group.variants:
            self._delete(group)

    def _of(self, key: bytes, end: bytes | None) -> Group | None:
        if end is None:
            return self._exact.get(key)
        if end == NO_END:
            at = bisect_left(self._open_starts, key)
            found = at < len(self._open_starts) and self._open_starts[at] == key
            return self._open[at] if found else None
        return self._bounded.get(key, end)

    def _insert(self, group: Group) -> None:
        if group.end is None:
            self._exact[group.key] = group
        elif group.end == NO_END:
            at = bisect_left(self._open_starts, group.key)
            self._open_starts.insert(at, group.key)
            self._open.insert(at, group)
        else:
            self._bounded.insert(group.key, group.end, group)

    def _delete(self, group: Group) -> None:
        if group.end is None:
            del self._exact[group.key]
        elif group.end == NO_END:
            at = bisect_left(self._open_starts, group.key)
            del self._open_starts[at], self._open[at]
        else:
            self._bounded.delete(group.key, group.end)


class _Node:
    __slots__ = ("end", "group", "left", "priority", "reach", "right", "start")

    def __init__(self, start: bytes, end: bytes, group: Group, priority: float) -> None:
        self.start = start
        self.end = end
        self.group = group
        self.priority = priority
        self.left: _Node | None = None
        self.right: _Node | None = None
        self.reach = end

    def update(self) -> "_Node":
        """Renew ``reach`` after a child changed."""
        reach = self.end
        if self.left is not None and self.left.reach > reach:
            reach = self.left.reach
        if self.right is not None and self.right.reach > reach:
            reach = self.right.reach
        self.reach = reach
        return self


class RangeTree:
    """Groups by range [start, end), one per range; see the module's text."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._root: _Node | None = None

    def __iter__(self) -> Iterator[Group]:
        """All groups, in no order that matters."""
        left = [self._root]
        while left:
            node = left.pop()
            if node is not None:
                yield node.group
                left += (node.left, node.right)

    def find(self, key: bytes, found: list[Group]) -> None:
        """Add the groups whose range holds ``key`` to ``found``."""
        left: list[_Node | None] = [self._root]
        while left:
            node = left.pop()
            if node is None or node.reach <= key:
                continue
            left.append(node.left)
            if node.start <= key:
                if key < node.end:
                    found.append(node.group)
                left.append(node.right)

    def get(self, start: bytes, end: bytes) -> Group | None:
        """The group of exactly this range."""
        node, at = self._root, (start, end)
        while node is not None:
            here = (node.start, node.end)
            if at == here:
                return node.group
            node = node.left if at < here else node.right
        return None

    def insert(self, start: bytes, end: bytes, group: Group) -> None:
        """Add a range that is not there."""
        new = _Node(start, end, group, self._random.random())
        low, high = _split(self._root, start, end)
        self._root = _merge(_merge(low, new), high)

    def delete(self, start: bytes, end: bytes) -> None:
        """Remove a range that is there."""
        self._root = _without(self._root, start, end)


def _split(node: _Node | None, start: bytes, end: bytes) -> tuple[_Node | None, _Node | None]:
    """The nodes before (start, end), and those after."""
    if node is None:
        return None, None
    if (node.start, node.end) < (start, end):
        node.right, high = _split(node.right, start, end)
        return node.update(), high
    low, node.left = _split(node.left, start, end)
    return low, node.update()


def _merge(low: _Node | None, high: _Node | None) -> _Node | None:
    """One tree of two, all of ``low`` before all of ``high``."""
    if low is None:
        return high
    if high is None:
        return low
    if low.priority > high.priority:
        low.right = _merge(low.right, high)
        return low.update()
    high.left = _merge(low, high.left)
    return high.update()


def _without(node: _Node | None, start: bytes, end: bytes) -> _Node | None:
    assert node is not None, "only a range that is there is deleted"
    if (node.start, node.end) == (start, end):
        return _merge(node.left, node.right)
    if (start, end) < (node.start, node.end):
        node.left = _without(node.left, start, end)
    else:
        node.right = _without(node.right, start, end)
    return node.update()
