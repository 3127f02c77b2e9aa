"""Records of any size of a store that is right, made in columns: ``python -m ... FOLDER WRITES``.

``writes`` objects are written in turn over a tenth as many keys, each by comparing with the
revision before; five watches show all of it, one event a message; a tenth as many reads come
between. It is the size of a long run, not its variety. Called once more, it judges them.
"""

import json
import resource
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bench.clock import now_us
from bench.judges import judge
from bench.plan import Verb
from bench.records import EVENTS, FINAL, ITEMS, MESSAGES, OPS, WATCHES, MessageKind, Records, Table
from bench.values import digest as digest_of
from tests.bench.judges.world import facts_of

WATCHES_OPEN = 5
SPACING_US = 100
Column = NDArray[np.int64]


def write(folder: Path, table: Table, rows: int, **columns: Column | int | pa.Array) -> None:
    """One table; what is not told is 0, or empty."""
    arrays = []
    for name in table.columns:
        column = columns.get(name, 0 if name in table.integers else b"")
        if isinstance(column, int):
            column = np.full(rows, column, dtype=np.int64)
        if isinstance(column, bytes):
            column = texts([column], np.zeros(rows, dtype=np.int64))
        arrays.append(column if isinstance(column, pa.Array) else pa.array(column))
    made = pa.table(arrays, names=list(table.columns))
    pq.write_table(made, folder / f"{table.name}.0.parquet", compression="zstd")


def texts(meanings: list[bytes], codes: Column) -> pa.Array:
    """Byte strings by their codes."""
    return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), pa.array(meanings))


def write_run(folder: Path, writes: int) -> None:
    """Everything that judges read."""
    keys = max(10, writes // 10)  # of which `writes` is a multiple
    names = [b"/registry/pods/tenant-%03d/pod-%07d" % (n % 100, n) for n in range(keys)]
    number = np.arange(writes)
    of = number % keys
    mod, before = number + 2, np.where(number < keys, 0, number + 2 - keys)
    create, version = of + 2, number // keys + 1
    digest, sent = (number * 7 + 1) & 0xFFFFFFFF, number * SPACING_US
    last = np.arange(writes - keys, writes)
    values = [b"%d" % n for n in range(keys)]
    digest[last] = list(map(digest_of, values))
    is_read = number % 10 == 9
    # A read comes after a write and has its revision.
    verb = np.where(number < keys, int(Verb.CREATE), int(Verb.UPDATE))
    order = np.argsort(np.concatenate((number * 2, number[is_read] * 2 + 1)), kind="stable")

    def both(of_writes: Column, of_reads: Column) -> Column:
        return np.concatenate((of_writes, of_reads))[order]

    none = np.full(int(is_read.sum()), -1)
    total = writes + len(none)
    read_mod = mod[is_read]
    write(
        folder,
        OPS,
        total,
        op=np.arange(total),
        verb=both(verb, np.full(len(none), int(Verb.GET))),
        sent=both(sent, sent[is_read] + 60),
        done=both(sent + 50, sent[is_read] + 80),
        expected=both(before, none),
        revision=both(mod, read_mod),
        found=both(np.full(writes, -1), read_mod),
        digest=both(digest, digest[is_read]),
        key=texts(names, both(of, of[is_read])),
    )
    read_number = np.flatnonzero(order >= writes)
    write(
        folder,
        ITEMS,
        len(none),
        op=read_number,
        mod=read_mod,
        create=create[is_read],
        version=version[is_read],
        digest=digest[is_read],
        key=texts(names, of[is_read]),
    )
    _watches(folder, names, of, mod, before, create, version, digest, sent)
    write(
        folder,
        FINAL,
        keys,
        revision=writes + 1,
        mod=mod[last],
        create=create[last],
        version=version[last],
        key=texts(names, of[last]),
        value=texts(values, np.arange(keys)),
    )
    load_end = writes * SPACING_US
    facts = facts_of(load_end, load_end + 6_000_000, final_revision=writes + 1)
    (folder / "run.json").write_text(json.dumps(facts))


def _watches(folder: Path, names: list[bytes], of: Column, *columns: Column) -> None:
    mod, before, create, version, digest, sent = columns
    writes = len(of)
    rows = writes * WATCHES_OPEN
    watch = np.tile(np.arange(WATCHES_OPEN), writes)

    def each(column: Column) -> Column:
        return np.repeat(column, WATCHES_OPEN)

    keys = len(names)
    previous = before > 0
    earlier = np.maximum(np.arange(writes) - keys, 0)
    write(
        folder,
        EVENTS,
        rows,
        watch=watch,
        message=each(np.arange(writes) + 1),
        mod=each(mod),
        create=each(create),
        version=each(version),
        digest=each(digest),
        prev_mod=each(np.where(previous, before, -1)),
        prev_create=each(np.where(previous, create, -1)),
        prev_version=each(np.where(previous, version - 1, -1)),
        prev_digest=each(np.where(previous, digest[earlier], -1)),
        key=texts(names, each(of)),
    )
    created = np.zeros(WATCHES_OPEN, dtype=np.int64)
    write(
        folder,
        MESSAGES,
        rows + WATCHES_OPEN,
        watch=np.concatenate((watch, np.arange(WATCHES_OPEN))),
        message=np.concatenate((each(np.arange(writes) + 1), created)),
        received=np.concatenate((each(sent + 55), created)),
        kind=np.concatenate((np.full(rows, int(MessageKind.EVENTS)), created)),
        revision=np.concatenate((each(mod), created + 1)),
    )
    write(
        folder,
        WATCHES,
        WATCHES_OPEN,
        watch=np.arange(WATCHES_OPEN),
        start=1,
        prev_kv=1,
        code=-1,
        key=texts([b""], created),
        range_end=texts([b"\0"], created),
    )


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    if not (target / "run.json").exists():
        write_run(target, int(sys.argv[2]))
    else:
        begun_us = now_us()
        for verdict in judge(Records(target)):
            sys.stdout.write("\n    ".join((str(verdict), *verdict.evidence)) + "\n")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        sys.stdout.write(f"{(now_us() - begun_us) / 1e6:.1f} s, {peak} MiB at most\n")
