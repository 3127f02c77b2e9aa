"""What a watcher-event costs in Python: ``python -m tests.bench_watch``.

The hub alone, over the memory backend: from the store's record of a change to the hand-over of a
message to each client's stream, which only counts. Three ways in which writes come:

    one      each revision is committed and delivered alone: a message per watcher and revision
    batch    32 revisions per commit, as under load: a message per watcher and commit
    history  watchers that start in the past and catch up
"""

import sys
from collections.abc import Callable, Sequence
from time import process_time

from kvstore.config import WatchConfig
from kvstore.txn import Put
from kvstore.watch import Watch
from kvstore.watch_message import PREVIOUS
from tests.watch_world import World

WATCHERS = 100
REVISIONS = 4_096
BATCH = 32
VALUE = bytes(1024)
KEYS = [b"/registry/pods/default/pod-%05d" % n for n in range(2_048)]


class Counter:
    """A client that takes everything at once."""

    outbox_bytes = 0

    def __init__(self) -> None:
        self.messages = 0

    def send(self, parts: Sequence[bytes], size: int, /) -> None:
        """One more."""
        self.messages += 1


def write(world: World, batch: int) -> None:
    """Write REVISIONS revisions, committed ``batch`` at a time."""
    for n in range(REVISIONS):
        world.store.put(Put(KEYS[n % len(KEYS)], VALUE))
        if (n + 1) % batch == 0:
            world.settle()


def watched(ranges: Sequence[tuple[bytes, bytes | None]], start: int = 0) -> World:
    """A world with one watcher on each range, each on a stream of its own."""
    world = World(config=WatchConfig(), cache_bytes_max=1 << 30)
    if start:
        write(world, BATCH)
    for key, end in ranges:
        world.hub.open(Counter()).create(Watch(key, end, start, wants=PREVIOUS))
    return world


def seconds(work: Callable[[], None]) -> float:
    """CPU seconds of this process."""
    begin = process_time()
    work()
    return process_time() - begin


def say(line: str) -> None:
    """Print."""
    sys.stdout.write(line + "\n")


def report(name: str, ranges: Sequence[tuple[bytes, bytes | None]], batch: int) -> None:
    """Cost above that of the same writes without watchers."""
    bare = watched([])
    world = watched(ranges)
    idle = seconds(lambda: write(bare, batch))
    taken = seconds(lambda: write(world, batch)) - idle
    sent = world.hub.events_sent
    each = taken / sent * 1e6
    revision = taken / REVISIONS * 1e6
    say(f"{name:34} {each:6.2f} us per watcher-event, {revision:8.1f} us per revision")


def main() -> None:
    """All ways in."""
    prefix = (b"/registry/pods/", b"/registry/pods0")
    same = [prefix] * WATCHERS
    own = [(KEYS[n], None) for n in range(WATCHERS)]
    nested = [(b"/registry/pods/%c" % n, b"/registry/pods0") for n in range(WATCHERS)]
    scattered = [(b"/registry/%03d/" % n, b"/registry/%03d0" % n) for n in range(1_000)] + [prefix]
    for batch in (1, BATCH):
        report(f"100 on one prefix, batch {batch}", same, batch)
        report(f"100 on own keys, batch {batch}", own, batch)
        report(f"100 on own ranges, batch {batch}", nested, batch)
        report(f"1 among 1,000 prefixes, batch {batch}", scattered, batch)
    world = watched(same, start=2)
    taken = seconds(world.settle)
    say(f"{'100 catch up':34} {taken / world.hub.events_sent * 1e6:6.2f} us per watcher-event")


if __name__ == "__main__":
    main()
