"""The databases of a server: chosen with flags, found, and made into backends.

What a user can get wrong about them is refused in one line, before any of them is touched, with
the line of the file; of a URL only what ``backends.urls`` shows is told.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from backends.urls import Database, find, make_backend
from kvstore.backend import Backend
from kvstore.config import Config
from kvstore.errors import BackendError
from kvstore.shard_config import ShardSpec, one_shard
from kvstore.shard_file import read_shard_file

DATABASE: Final = "kvstore.db"
"""Name of the only database, unless there is a word about it."""


class Databases:
    """The shards as configured, each with its place. Nothing is opened."""

    def __init__(self, config: str | None, backend: str | None, data_dir: Path) -> None:
        """``config`` and ``backend`` are the flags, of which one at most is given.

        Raises ``ShardFileError``, or ``BackendError`` for a URL that is none and for two shards in
        one database.
        """
        if config and backend:
            raise BackendError("--config and --backend exclude one another")
        self._source = config or "--backend"
        self._data_dir = data_dir
        self.config = (
            read_shard_file(Path(config)) if config else one_shard(backend or f"sqlite:{DATABASE}")
        )
        self.places: list[Database] = []
        """By shard number."""
        for shard in self.config.shards:
            with self._blaming(shard):
                self._place(find(shard.backend_url, data_dir=data_dir))

    def _place(self, place: Database) -> None:
        if place in self.places:
            other = self.config.names[self.places.index(place)]
            raise BackendError(f"its database is that of shard {other}, {place}")
        self.places.append(place)

    def backends(self, config: Config) -> list[Backend]:
        """One for each shard. Raises ``BackendError``."""
        made: list[Backend] = []
        for shard in self.config.shards:
            with self._blaming(shard):
                made.append(
                    make_backend(
                        shard.backend_url,
                        shard=shard.name,
                        data_dir=self._data_dir,
                        config=config,
                    )
                )
        return made

    def __iter__(self) -> Iterator[tuple[ShardSpec, Database]]:
        """Every shard with its place."""
        return zip(self.config.shards, self.places, strict=True)

    @contextmanager
    def _blaming(self, shard: ShardSpec) -> Iterator[None]:
        """What is refused inside is the fault of ``shard``'s URL."""
        try:
            yield
        except BackendError as error:
            where = (
                f"{self._source}:{shard.line}: shard {shard.name}" if shard.line else "--backend"
            )
            raise BackendError(f"{where}: {error}") from error
