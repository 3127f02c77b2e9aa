"""From a URL to a backend: which databases there are, and what of a URL may be told.

- ``sqlite:PATH``: one file; a relative path is below the data directory.
- ``postgresql://user@host/database?option=...``: one schema of a database.

A URL may hold a password, in its user part or among its options; so no message repeats a URL, and
none that comes from a parser is passed on: it may repeat a piece. ``shown`` is what may be told. A
password with an unescaped ``/``, ``?`` or ``#`` makes the rest of it look like a path, options or a
fragment: a URL with an ``@`` there is refused, and nothing of it is shown.
"""

from difflib import get_close_matches
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from backends.sqlite import SqliteBackend
from kvstore.backend import Backend
from kvstore.config import Config
from kvstore.errors import BackendError

SQLITE: Final = "sqlite"
POSTGRESQL: Final = "postgresql"
_KINDS: Final = "sqlite:PATH or postgresql://USER@HOST/DATABASE"
_PORT: Final = 5432


class Database(NamedTuple):
    """Which database a URL leads to: two of them are equal if they are one, as far as the URLs can
    tell. Shown whole, it tells no secret.
    """

    kind: str
    host: str
    """Empty with SQLite, or with a PostgreSQL that is where its environment variables say."""
    port: int
    place: str
    """The file, or the name of the database."""
    schema: str
    """Empty with SQLite."""

    def __str__(self) -> str:
        """As a URL without user, password and options."""
        if self.kind == SQLITE:
            return f"{SQLITE}:{self.place}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{POSTGRESQL}://{host}:{self.port}/{self.place}?schema={self.schema}"


def make_backend(url: str, *, shard: str, data_dir: Path, config: Config) -> Backend:
    """The backend of shard ``shard``, not opened. Raises ``BackendError``, one line, for a URL that
    cannot be one.
    """
    database = find(url, data_dir=data_dir)
    if database.kind == SQLITE:
        return SqliteBackend(Path(database.place), shard=shard, config=config.sqlite)
    from backends.postgres import PostgresBackend  # noqa: PLC0415 - its driver takes a while to load

    return PostgresBackend(url, shard=shard, config=config.postgres)


def find(url: str, *, data_dir: Path) -> Database:
    """The database of ``url``. Raises ``BackendError`` as ``make_backend`` does."""
    scheme, colon, rest = url.partition(":")
    if scheme == SQLITE and colon:
        return _find_sqlite(rest, data_dir)
    if scheme == POSTGRESQL and rest.startswith("//"):
        return _find_postgres(url)
    if scheme == POSTGRESQL and colon:
        raise BackendError(f"a URL of PostgreSQL begins with {POSTGRESQL}://")
    near = get_close_matches(scheme.lower(), (SQLITE, POSTGRESQL), n=1, cutoff=0.6)
    if near and colon:
        raise BackendError(f"there is no kind of database {scheme!r}; did you mean {near[0]}?")
    if not colon and "@" not in url:
        raise BackendError(f"a database is {_KINDS}; did you mean {SQLITE}:{url}?")
    raise BackendError(f"a database is {_KINDS}, and this is neither")


def _find_sqlite(text: str, data_dir: Path) -> Database:
    if text.startswith("//"):
        raise BackendError(f"a file is {SQLITE}:PATH; did you mean {SQLITE}:/{text.lstrip('/')}?")
    if not text or text.endswith("/"):
        raise BackendError(f"{SQLITE}: needs the path of a file")
    if "?" in text:
        raise BackendError(f"{SQLITE}: takes a path and no options: it has a question mark")
    try:
        place = (data_dir / text).resolve()
    except (OSError, RuntimeError) as error:
        raise BackendError(f"{SQLITE}: the path cannot be followed") from error
    return Database(SQLITE, "", 0, str(place), "")


def _find_postgres(url: str) -> Database:
    from backends.postgres_session import read_url  # noqa: PLC0415 - likewise

    try:
        parts = urlsplit(url)
        port = parts.port or _PORT
    except ValueError:
        raise _unclear() from None  # the parser repeats parts of the URL
    if parts.netloc.count("@") > 1 or "@" in parts.path + parts.query or "#" in url:
        raise _unclear()
    place = unquote(parts.path.removeprefix("/"))
    if not place or "/" in place:
        raise BackendError("a URL of PostgreSQL names one database behind its host")
    schema = read_url(url).schema
    options = dict(parse_qsl(parts.query))
    host = options.get("host") or unquote(parts.hostname or "").lower()
    given = options.get("port", "")
    return Database(POSTGRESQL, host, int(given) if given.isdecimal() else port, place, schema)


def _unclear() -> BackendError:
    return BackendError(
        "this URL of PostgreSQL cannot be read: the port is a number, and in a user or password"
        " every / ? # @ : [ ] % is written as % and two hexadecimal digits"
    )
