"""Half of what was written is no result."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from bench.records import PRELOADED, Recorder, Records
from bench.report.kept import reading
from bench.report.session import VERDICTS, UnusableError
from bench.storms import STORMS
from tests.bench.report.made import Run, session
from tests.bench.test_cli import say

pytestmark = pytest.mark.slow
REFUSED = 2


def known(run: Run) -> None:
    """Make it a run of the storm as it is today."""
    run.facts["parameters"] = asdict(STORMS["swarm-burst"].PRESETS["xs"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete session of one run."""
    session(tmp_path, means_us={"ours": 900}, repetitions=1, seconds=2, changes={"ours": known})
    return tmp_path


def refusal(folder: Path) -> str:
    """Why there is no report of it: one line."""
    code, told = say("report", str(folder))
    assert (code, told.count("\n")) == (REFUSED, 1), told
    return told


def test_a_file_that_is_gone_is_missed(folder: Path) -> None:
    """Without its calls there are figures, and they are wrong."""
    (folder / "ours/0/ops.0.parquet").unlink()
    assert f"{folder}/ours/0/ops.0.parquet: is missing" in refusal(folder)


def test_rows_that_are_gone_are_missed(folder: Path) -> None:
    """A shorter file says how much shorter it is."""
    file = folder / "ours/0/events.0.parquet"
    table = pq.read_table(file)
    pq.write_table(table.slice(30), file)
    told = f"{file}: has {table.num_rows - 30} rows, {table.num_rows} were written"
    assert told in refusal(folder)


def test_a_file_of_another_run_is_no_record(folder: Path) -> None:
    """What was not there when the run ended would be counted."""
    shutil.copy(folder / "ours/0/ops.0.parquet", folder / "ours/0/ops.1.parquet")
    assert f"{folder}/ours/0/ops.1.parquet: is not of this run" in refusal(folder)


def test_records_that_nobody_counted_are_read_and_told_of(folder: Path) -> None:
    """A session of an older version has a report, which says what it could not check."""
    file = folder / "ours/0/run.json"
    facts = json.loads(file.read_text())
    del facts["rows"]
    file.write_text(json.dumps(facts))
    code, told = say("report", str(folder))
    assert code == 0
    assert "could not be checked" in " ".join(told.split())


def test_a_run_without_verdicts_is_judged_again(folder: Path) -> None:
    """By all judges and the storm's own; what they say is kept, and is what is shown."""
    (folder / "ours/0" / VERDICTS).unlink()
    code, told = say("report", str(folder))
    assert code == 0
    judged = {one["judge"] for one in json.loads((folder / "ours/0" / VERDICTS).read_text())}
    assert {"Reliable", "Everyone is watching"} < judged
    assert any(judge.startswith("swarm-burst: ") for judge in judged)
    assert "Everyone is watching" in told


@pytest.mark.parametrize("lost", ["zero", "part", "reason"])
def test_a_run_that_cannot_be_judged_is_not_judged_again(folder: Path, lost: str) -> None:
    """No load, or records that ended with their process or early, would accuse the server."""
    file = folder / "ours/0/run.json"
    lacking = {"zero": {"zero_us": 0}, "part": {"processes": 2}, "reason": {"reason": "no space"}}
    facts = json.loads(file.read_text()) | lacking[lost]
    file.write_text(json.dumps(facts))
    (folder / "ours/0" / VERDICTS).unlink()
    assert "NOT JUDGED" in say("report", str(folder))[1]
    assert not (folder / "ours/0" / VERDICTS).exists()


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("session.json", '{"before": {}}', "without after"),
        ("ours/0/verdicts.json", "[{", "no JSON, or cut off"),
        ("ours/0/verdicts.json", "[{}]", "without checked"),
        ("ours/0/ops.0.parquet", "{", "not a whole Parquet file"),
    ],
)
def test_what_is_damaged_is_named(folder: Path, file: str, text: str, told: str) -> None:
    """Whoever reads the complaint knows which file to look at, and what is wrong with it."""
    (folder / file).write_text(text)
    assert f"{folder / file}: {told}\n" in refusal(folder)


def test_a_file_that_is_broken_inside_is_named(folder: Path) -> None:
    """Its foot says that all is well."""
    file = folder / "ours/0/ops.0.parquet"
    raw = bytearray(file.read_bytes())
    raw[4 : len(raw) // 2] = bytes(len(raw) // 2 - 4)
    file.write_bytes(raw)
    assert f"{file}: damaged inside\n" in refusal(folder)


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    """Wherever it is in a column: another number there would accuse a server."""
    (tmp_path / "run.json").write_text("{}")
    recorder = Recorder(PRELOADED)
    for number in range(200):
        recorder.add(number, number * 0x1234567890ABCD % (1 << 62), b"/registry/%d" % number)
    recorder.write(tmp_path, 0)
    file = tmp_path / "preloaded.0.parquet"
    whole = file.read_bytes()
    columns = pq.read_metadata(file).row_group(0)
    for number, name in enumerate(PRELOADED.columns):
        column = columns.column(number)
        first = min(column.dictionary_page_offset, column.data_page_offset)
        end = first + column.total_compressed_size
        for place in (column.data_page_offset - 5, column.data_page_offset - 1, end - 5, end - 1):
            changed = bytearray(whole)
            changed[place] ^= 1
            file.write_bytes(changed)
            with pytest.raises(UnusableError) as refused, reading(tmp_path):
                Records(tmp_path).frame(PRELOADED)
            assert f"{file}: damaged inside" == str(refused.value), (name, place)


def test_records_without_sums_are_read(folder: Path) -> None:
    """Older versions wrote none."""
    for file in (folder / "ours/0").glob("*.parquet"):
        pq.write_table(pq.read_table(file), file, write_page_checksum=False)
    (folder / "ours/0" / VERDICTS).unlink()
    assert say("report", str(folder))[0] == 0


@pytest.mark.parametrize("lost", ["ours", "ours/0"])
def test_a_run_that_is_gone_is_missed(folder: Path, lost: str) -> None:
    """A session that was completed had it."""
    shutil.rmtree(folder / lost)
    assert f"{folder / lost}: is missing\n" in refusal(folder)


def test_a_report_that_cannot_be_kept_is_told(folder: Path) -> None:
    """The summary is what was asked for; one line says that there is no page."""
    (folder / "report.html").mkdir()
    code, told = say("report", str(folder))
    assert code == 0
    assert "PASS" in told
    assert f"{folder / 'report.html'} was not written: Is a directory" in told
