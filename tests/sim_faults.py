"""Faults to be planted in the engine, one at a time: the simulation must find each.

A fault is (owner, name, what stands there instead).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from kvstore import opening
from kvstore.answers import Answer
from kvstore.backend import (
    Backend,
    Batch,
    CommitResult,
    Fence,
    IndexRow,
    LeaseRow,
    Outcome,
    Row,
    RowId,
)
from kvstore.barrier import Barrier
from kvstore.commit import NOTHING_PENDING, Commits, ShardQueue
from kvstore.compaction import Compactor
from kvstore.fetch import Holds
from kvstore.history import History
from kvstore.lease import Lessor
from kvstore.opening import Returning
from kvstore.orphans import Orphans
from kvstore.redo import Redo
from kvstore.reservation import Reservation
from kvstore.shard_queue import ForAll
from kvstore.store import Store
from kvstore.watch_feed import Feed

Fault = tuple[object, str, Callable[..., object]]


# -- one shard -------------------------------------------------------------------------------------


def _answer_now(commits: Commits, shards: object, answer: Answer, body: bytes) -> None:
    del commits, shards
    answer.reply(body)


def _believe(commits: Commits, queue: ShardQueue, batch: Batch) -> None:
    commits._returned(queue, batch, CommitResult(Outcome.COMMITTED))


_start, _load_rows = Store.__init__, Store.load_rows


def _start_behind(store: Store, *parts: Any) -> None:  # noqa: ANN401
    _start(store, *parts)
    store.revision = max(1, store.revision - 1)


def _load_all_but_one(store: Store, shard: int, rows: Sequence[IndexRow]) -> list[RowId]:
    return _load_rows(store, shard, rows[:-1])


# -- several ---------------------------------------------------------------------------------------


def _scatter(redo: Redo, revision: int, parts: Mapping[int, list[Row]], size: int) -> None:
    del revision, size
    for shard, rows in parts.items():
        redo._append(shard, rows, 0)


_block = Redo._block


def _do_not_wait(redo: Redo, record: ForAll, queue: ShardQueue, rows: list[Row]) -> None:
    _block(redo, record, queue, rows)
    queue.pending[-1].blocked = False


def _forget_record(redo: Redo, record: ForAll) -> None:
    for queue, part in record.frees:
        part.blocked = False
        redo._schedule(queue)
    revisions = {row[0] for _, row in record.redo}
    if revisions:
        redo._home.filling_for_all().redo_drops.extend(revisions)


async def _apply_nothing(backend: Backend, fence: Fence, rows: Sequence[Row]) -> Fence:
    del backend, rows
    return fence


_begin = opening._Opening._begin


async def _begin_at_the_tip(start: Any, fences: list[Fence], *rest: Any) -> Fence:  # noqa: ANN401
    return await _begin(start, [fences[0]._replace(reserved=0), *fences[1:]], *rest)


def _record_ahead(reservation: Reservation) -> Iterable[object]:
    for record in _changed(reservation):
        yield record._replace(tip=record.tip + 1)


_changed = Reservation._changed


def _durable(commits: Commits, shards: object) -> int:
    del shards
    return commits.durable


_release = Commits.release


def _wait_for_all(commits: Commits, shards: object, answer: Answer, body: bytes) -> None:
    del shards
    _release(commits, range(len(commits.queues)), answer, body)


# -- leases and watches ----------------------------------------------------------------------------

_delete_keys = Store.delete_keys


def _delete_one_by_one(store: Store, keys: Iterable[bytes]) -> int:
    return max((_delete_keys(store, [key]) for key in sorted(keys)), default=0)


def _end_at_once(lessor: Lessor, lease_id: int, shards: object) -> None:
    del shards
    lessor._end_revoke(lease_id)


_load = Lessor.load


def _load_nearly_over(lessor: Lessor, rows: Iterable[LeaseRow]) -> None:
    _load(lessor, [row._replace(remaining_ttl=1) for row in rows])


def _skip_and_tell_nobody(feed: Feed, visible: int) -> None:
    feed._fresh.clear()
    feed._fresh_bytes = 0
    feed._move(visible)


def _nothing(*_: object, **_more: object) -> None:
    """Left out."""


FAULTS: dict[str, Fault] = {
    "answers before it is durable": (Commits, "release", _answer_now),
    "takes unknown for committed": (Commits, "_resolve", _believe),
    "issues a revision again": (Store, "__init__", _start_behind),
    "loses a row in recovery": (Store, "load_rows", _load_all_but_one),
    "forgets keys that die during a read": (History, "newest", lambda *_: 0),
    "forgets a compaction that timed out": (Compactor, "_take_effect", _nothing),
    "shows what is not visible": (Commits, "frontier", lambda *_: NOTHING_PENDING),
    "shows one shard what another has": (Commits, "visible", _durable),
    "commits over shards without a record": (Redo, "append", _scatter),
    "does not wait for the record": (Redo, "_block", _do_not_wait),
    "drops a record too early": (Redo, "recorded", _forget_record),
    "never drops a record": (Redo, "done", _nothing),
    "does not apply records": (opening, "apply_redo", _apply_nothing),
    "does not settle": (Barrier, "_settled", lambda *_: True),
    "begins at the tip instead of what was reserved": (
        opening._Opening,
        "_begin",
        _begin_at_the_tip,
    ),
    "drops rows that a read still wants": (Holds, "passed", lambda *_: True),
    "serves keys of leases that are gone": (Orphans, "delete_of", lambda *_: False),
    "starts with keys of leases that are gone": (Orphans, "delete", lambda *_: False),
    "takes an older copy": (opening, "find_loss", lambda *_: ""),
    "records more than there is": (Reservation, "_changed", _record_ahead),
    "goes on when its lease has run out": (Commits, "lease_lapsed", lambda *_: False),
    "serves a shard that is not there": (Commits, "check_readable", _nothing),
    "joins a shard without its rows": (Returning, "_take", _nothing),
    "waits for shards that it does not touch": (Commits, "release", _wait_for_all),
    "ends a lease key by key": (Store, "delete_keys", _delete_one_by_one),
    "ends a lease before its keys": (Lessor, "_end_when_gone", _end_at_once),
    "ends leases early after a restart": (Lessor, "load", _load_nearly_over),
    "watchers miss what piled up": (Feed, "_skip", _skip_and_tell_nobody),
}
