"""Records: what was recorded is what is read, whatever file and table it is in."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.records import (
    EVENTS,
    FINAL,
    OPS,
    ROWS_PER_PIECE,
    SAMPLES,
    TABLES,
    Recorder,
    Records,
    Table,
)

Rows = list[tuple[int | bytes, ...]]
NUMBERS = st.integers(-(2**53), 2**53)


def rows_of(table: Table) -> st.SearchStrategy[Rows]:
    """Rows as a recorder takes them."""
    numbers = [NUMBERS] * len(table.integers)
    row = st.tuples(*numbers, *[st.binary(max_size=3)] * len(table.binaries))
    return st.lists(row, max_size=20)


def write(folder: Path, table: Table, *parts: Rows, zero_us: int = 0) -> Records:
    """Parts of one table, as processes write them."""
    (folder / "run.json").write_text(json.dumps({"storm": "s"}))
    for part, rows in enumerate(parts):
        recorder = Recorder(table)
        for row in rows:
            recorder.add(*row)
        assert len(recorder) == len(rows)
        recorder.write(folder, part, zero_us)
    return Records(folder)


def read(records: Records, table: Table) -> Rows:
    """All rows of a table."""
    frame = records.frame(table)
    columns = [frame[name].tolist() for name in table.integers]
    columns += [[frame.text(name)[code] for code in frame[name]] for name in table.binaries]
    return list(zip(*columns, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
@given(st.data())
def test_round_trip(
    table: Table, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """What several processes record is read as one table, in their order."""
    one, two = data.draw(rows_of(table)), data.draw(rows_of(table))
    records = write(tmp_path_factory.mktemp("records"), table, one, two)
    assert one + two == read(records, table)


def test_many_rows(tmp_path: Path) -> None:
    """Rows are packed as they come; none is lost or moved where a piece ends."""
    count = 2 * ROWS_PER_PIECE + 1
    width = len(FINAL.integers)
    rows: Rows = [(*[n] * width, b"k%d" % (n % 7), b"v%d" % n) for n in range(count)]
    assert rows == read(write(tmp_path, FINAL, rows), FINAL)


def test_times_count_from_the_beginning(tmp_path: Path) -> None:
    """Times are told from the start of the load, before it too; nothing else is changed."""
    row = dict.fromkeys(OPS.integers, 1_000_000) | {"due": 999_000, "done": 1_500_000}
    rows: Rows = [(*row.values(), b"", b"", b"")]
    frame = write(tmp_path, OPS, rows, zero_us=1_000_000).frame(OPS)
    assert (-1000, 0, 500_000) == tuple(int(frame[name][0]) for name in OPS.times)
    others = set(OPS.integers) - set(OPS.times)
    assert {1_000_000} == {int(frame[name][0]) for name in others}


def test_codes_mean_the_same_everywhere(tmp_path: Path) -> None:
    """A key has one code in all tables and files, so that keys compare as numbers."""
    ops = [0] * len(OPS.integers)
    events = [0] * len(EVENTS.integers)
    write(
        tmp_path, OPS, [(*ops, b"r", b"a", b""), (*ops, b"r", b"b", b"")], [(*ops, b"", b"c", b"")]
    )
    records = write(
        tmp_path, EVENTS, [(*events, b"c"), (*events, b"b")], [(*events, b"d"), (*events, b"a")]
    )
    asked, told = records.frame(OPS), records.frame(EVENTS)
    codes = {raw: records.code("key", raw) for raw in (b"a", b"b", b"c", b"d")}
    assert [codes[raw] for raw in (b"a", b"b", b"c")] == asked["key"].tolist()
    assert [codes[raw] for raw in (b"c", b"b", b"d", b"a")] == told["key"].tolist()
    assert (4, -1) == (len(set(codes.values())), records.code("key", b"none"))
    assert asked.text("key") is told.text("key")


def test_chosen_rows(tmp_path: Path) -> None:
    """A mask or indices choose rows, which keep what their codes mean."""
    width = len(FINAL.integers)
    rows: Rows = [(*[n] * width, b"k%d" % n, b"") for n in range(5)]
    frame = write(tmp_path, FINAL, rows).frame(FINAL)
    by_mask = frame.where(frame["mod"] > 2)
    by_index = frame.where(np.array([4, 0]))
    assert ([3, 4], 2) == (by_mask["mod"].tolist(), len(by_mask))
    assert [b"k4", b"k0"] == [by_index.text("key")[code] for code in by_index["key"]]
    assert list(FINAL.columns) == by_mask.columns


def test_what_was_never_written_is_empty(tmp_path: Path) -> None:
    """A table without files has its columns and no rows; facts are read as they are."""
    (tmp_path / "run.json").write_text(json.dumps({"storm": "s"}))
    records = Records(tmp_path)
    assert (0, []) == (len(records.frame(SAMPLES)), records.frame(SAMPLES)["disk"].tolist())
    assert "s" == records.facts["storm"]


def test_a_row_is_whole(tmp_path: Path) -> None:
    """A row with too few columns is an error, not a shifted table."""
    recorder = Recorder(FINAL)
    recorder.add(1, 2, 3)
    with pytest.raises(AssertionError, match="final"):
        recorder.write(tmp_path, 0)
