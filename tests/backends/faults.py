"""A VFS for SQLite that fails on demand, between SQLite and the operating system."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import apsw

NAME = "kvstore-faults"
SYSTEM = apsw.vfs_names()[0]


class Faults(apsw.VFS):
    """Passes everything on, except what ``failing`` names."""

    def __init__(self) -> None:
        super().__init__(NAME, SYSTEM)
        self.failing: dict[tuple[str, str], int] = {}
        """(operation, end of the file's name) to the result code that it fails with."""
        self.failed = 0
        self.durable: dict[str, bytes] = {}
        """Files as they were when they were last synced: what a power cut is sure to leave."""
        self.on_sync: Callable[[], None] = _nothing
        """Called after each sync, on the thread that did it."""

    def xOpen(  # noqa: N802 - SQLite's name
        self, name: str | apsw.URIFilename | None, flags: list[int]
    ) -> apsw.VFSFile:
        """Open a file that asks ``check`` before each operation."""
        path = name.filename() if isinstance(name, apsw.URIFilename) else name or ""
        return _File(self, path, name, flags)

    def check(self, operation: str, path: str) -> None:
        """Raise what the test wants for this operation."""
        for (failing, suffix), code in self.failing.items():
            if failing == operation and path.endswith(suffix):
                self.failed += 1
                raise apsw.exception_for(code)


class _File(apsw.VFSFile):
    def __init__(
        self, faults: Faults, path: str, name: str | apsw.URIFilename | None, flags: list[int]
    ) -> None:
        super().__init__(SYSTEM, name, flags)
        self._faults = faults
        self._path = path

    def xRead(self, amount: int, offset: int) -> bytes:  # noqa: N802
        self._faults.check("read", self._path)
        return super().xRead(amount, offset)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        self._faults.check("write", self._path)
        super().xWrite(data, offset)

    def xSync(self, flags: int) -> None:  # noqa: N802
        self._faults.check("sync", self._path)
        super().xSync(flags)
        self._faults.durable[self._path] = super().xRead(super().xFileSize(), 0)
        self._faults.on_sync()


def _nothing() -> None:
    """Nobody waits for a sync."""


@contextmanager
def faults_under_sqlite() -> Iterator[Faults]:
    """Connections opened inside go through a ``Faults``."""
    faults = Faults()
    apsw.set_default_vfs(NAME)
    try:
        yield faults
    finally:
        apsw.set_default_vfs(SYSTEM)
        faults.unregister()
