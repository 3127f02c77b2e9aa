"""Is what is kept of a run what was written?

Figures and verdicts of half a run look like those of a whole one: a file that is gone or cut takes
calls with it that nobody misses. So ``run.json`` counts the rows of every file when the run ends,
and nothing is said of records that are not all there.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq

from bench.records import Facts, Records
from bench.report.session import (
    RUN,
    Session,
    StoredVerdict,
    UnusableError,
    read_object,
    read_verdicts,
    run_folder,
    stored_verdicts,
    write_verdicts,
)
from bench.verdicts import Verdict
from bench.wording import counted

Judging = Callable[[Records], Sequence[Verdict]]
"""All verdicts on a run."""


def all_there(folder: Path, session: Session) -> None:
    """Raises ``UnusableError`` if a session that was completed lacks one of its runs."""
    if session["state"] != "COMPLETE":
        return
    for target in session["targets"]:
        for repetition in range(session["repetitions"]):
            run = run_folder(folder, target, repetition)
            for path in (run.parent, run, run / RUN):
                if not path.exists():
                    raise UnusableError(f"{path}: is missing")


def records_of(path: Path) -> Records:
    """The records of one run, all there as far as they were counted.

    Raises ``UnusableError``, which names the file.
    """
    facts = cast("Facts", read_object(path / RUN, Facts.__required_keys__))
    there = {file.name: _rows(file) for file in sorted(path.glob("*.parquet"))}
    for name, rows in facts.get("rows", there).items():
        if name not in there:
            raise UnusableError(f"{path / name}: is missing")
        if there[name] != rows:
            told = f"{counted(there[name], 'row')}, {rows:,} were written"
            raise UnusableError(f"{path / name}: has {told}")
    for name in there.keys() - facts.get("rows", there).keys():
        raise UnusableError(f"{path / name}: is not of this run")
    return Records(path)


def _rows(file: Path) -> int:
    try:
        return int(pq.read_metadata(file).num_rows)
    except pa.ArrowException as error:
        raise UnusableError(f"{file}: not a whole Parquet file") from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Reading the run in ``path``, raises ``UnusableError`` for a file that is broken inside."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system's, not the format's
        raise UnusableError(f"{_broken(path) or path}: damaged inside") from error


def _broken(path: Path) -> Path | None:
    for file in sorted(path.glob("*.parquet")):
        try:
            pq.read_table(file, page_checksum_verification=True)
        except (pa.ArrowException, OSError):
            return file
    return None


def verdicts_of(path: Path, facts: Facts, judging: Judging | None) -> list[StoredVerdict] | None:
    """As they were stored, or, where they are not, as ``judging`` finds and stores them now.

    A run without a load, one that lost a generator process with its records, and one that ended
    early for any reason stay without: a server would be accused of what is not there.
    """
    stored = read_verdicts(path)
    whole = all((path / f"ops.{part}.parquet").exists() for part in range(facts["processes"]))
    judgeable = whole and facts["zero_us"] and not facts["reason"]
    if stored is not None or judging is None or not judgeable:
        return stored
    found = judging(Records(path))
    with suppress(OSError):  # of a folder that may only be read they are made every time
        write_verdicts(path, found)
    return stored_verdicts(found)
