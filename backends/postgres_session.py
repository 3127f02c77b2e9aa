"""One connection to PostgreSQL: whom we talk to, on which terms, and what its answers mean.

**Settings.** Those that durability and fencing rest on are set, where a session may, and read back;
a server where one is not in force is not used: ``synchronous_commit`` at least ``on``, ``fsync``,
``full_page_writes``, ``data_sync_retry`` off, READ COMMITTED, neither a standby nor read only,
version 15 or newer, no timeout that ends a statement.
Others make a dead peer known within seconds: the server ends a session that is idle in a
transaction, or whose client does not acknowledge (it may hold the fence row's lock).

**No pooler.** The process that greeted us must be the one that answers, and what was set in a
session must still be set some transactions later. A pooler of transactions would hand our
statements to sessions without our settings.

**Answers in time.** Every statement has ``answer_timeout``. When it is over, the connection is cut.
It is never cancelled: a cancelled COMMIT that waits for a standby is answered like a success.
The plans of this session are made without scans and without joins of whole tables: a plan made
while a table was small is kept after it has grown.

**Errors.** A statement fails either for certain, which PostgreSQL said and then was ready for the
next one, so that it changed nothing (``PostgresError``), or the connection is gone and nobody knows
(``LostError``).

``synchronous_commit``, the settings about plans and connections, and the functions that tell the
origin are PostgreSQL's and YugabyteDB's; CockroachDB has no such settings to verify.
"""

import asyncio
import ssl
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from re import fullmatch
from typing import TYPE_CHECKING, Final, NamedTuple
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import asyncpg
from asyncpg import exceptions

from kvstore.config import PostgresConfig
from kvstore.errors import BackendError, UnreachableError

if TYPE_CHECKING:
    from asyncpg.prepared_stmt import PreparedStatement

VERSION_MIN: Final = 15
SCHEMA: Final = "kvstore"
"""Where the tables are unless the URL names another schema."""

_FILES: Final = ("passfile", "sslcert", "sslcrl", "sslkey", "sslrootcert")
_OPTIONS: Final = ("host", "port", "schema", "sslmode", *_FILES)
_WANTED: Final[Mapping[str, Sequence[str]]] = {
    "in_hot_standby": ("off",),
    "transaction_read_only": ("off",),
    "transaction_isolation": ("read committed",),
    "synchronous_commit": ("on", "remote_apply"),
    "fsync": ("on",),
    "full_page_writes": ("on",),
    "data_sync_retry": ("off",),
    "statement_timeout": ("0",),
    "lock_timeout": ("0",),
}
"""What a session that writes must show, in the order in which it is told."""

_OUT_OF_REACH: Final = ("08", "53", "57")
"""Classes of SQLSTATE: connection, resources (too many connections), operator (shutting down)."""
_UNKNOWN: Final = ("08", "57P")
"""Beginnings of SQLSTATEs that leave a statement's end unknown."""
_UNKNOWN_END: Final = "40003"
"""CockroachDB's word for a commit without a definite end."""

_WALL: Final = "SELECT pg_walfile_name(pg_current_wal_lsn())"
_SYSTEM: Final = "SELECT system_identifier::text FROM pg_control_system()"
_END_ABANDONED: Final = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE pid::text = ANY($1::text[]) AND pid <> pg_backend_pid()"
    " AND application_name = current_setting('application_name')"
    " AND wait_event = 'ClientRead' AND state <> 'idle'"
)
_SHOW: Final = "SELECT name, setting FROM pg_settings WHERE name = ANY($1::text[])"
_MARK: Final = "SELECT set_config('kvstore.session', $1, false)"
_SHOW_MARK: Final = "SELECT pg_backend_pid(), current_setting('kvstore.session', true)"


class LostError(UnreachableError):
    """The connection is gone; whether its last statement was carried out is not known."""


class Target(NamedTuple):
    """Where to connect."""

    dsn: str
    """What the driver takes; may hold a password."""
    schema: str
    shown: str
    """For messages."""


def read_url(url: str) -> Target:
    """The target of ``postgresql://user@host:port/database?option=...``.

    Options are libpq's ``sslmode``, ``sslrootcert``, ``sslcert``, ``sslkey``, ``sslcrl``,
    ``passfile``, ``host`` and ``port``, and ``schema``. Raises ``BackendError``, which repeats
    nothing that may be a password.
    """
    try:
        parts = urlsplit(url)
        given = dict(
            parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        )
        shown = f"postgresql://{parts.hostname or ''}:{parts.port or 5432}{parts.path}"
    except ValueError:
        raise BackendError("the URL of a PostgreSQL database cannot be read") from None
    for name in given:
        if name not in _OPTIONS:
            near = get_close_matches(name, _OPTIONS, n=1)
            hint = f"; did you mean {near[0]}?" if near else f": {', '.join(_OPTIONS)}"
            raise BackendError(f"a URL of PostgreSQL has no option {name!r}{hint}")
    for name in _FILES:
        if name in given and not Path(given[name]).is_file():
            raise BackendError(f"{name} of a URL of PostgreSQL: there is no file {given[name]}")
    schema = given.pop("schema", SCHEMA)
    if not fullmatch(r"[a-z_][a-z0-9_]{0,62}", schema):
        raise BackendError(f"a schema is small letters, digits and _, not {schema!r}")
    dsn = parts._replace(query=urlencode(given, quote_via=quote)).geturl()
    return Target(dsn, schema, f"{shown} (schema {schema})")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a statement gave."""

    rows: Sequence[asyncpg.Record]
    tag: str
    """As ``INSERT 0 5``."""


class Session:
    """A connection, its prepared statements, and what the server warned of; one statement at a
    time.
    """

    def __init__(
        self, connection: "asyncpg.Connection[asyncpg.Record]", answer_timeout: float
    ) -> None:
        self.answer_timeout = answer_timeout
        self.warnings: list[str] = []
        """Since they were last cleared; complete once a statement is answered."""
        self.on_lost: Callable[[], None] = _nobody_hears
        """Called in a turn of its own when the connection has gone, however it went."""
        self._connection = connection
        self._server_process = connection.get_server_pid()
        self._loop = asyncio.get_running_loop()
        self._prepared: dict[str, PreparedStatement[asyncpg.Record]] = {}
        self._overdue = False
        connection.add_log_listener(self._hear)
        connection.add_termination_listener(lambda _: self.on_lost())

    @property
    def lost(self) -> bool:
        """Is the connection gone?"""
        return self._connection.is_closed()

    @property
    def overdue(self) -> bool:
        """Was the connection cut because an answer did not come in time?"""
        return self._overdue

    @property
    def in_transaction(self) -> bool:
        """Is a transaction open, as far as the server has told?"""
        return not self.lost and self._connection.is_in_transaction()

    @property
    def server_process(self) -> int:
        """The process that greeted us, known also when the connection is gone."""
        return self._server_process

    async def run(self, text: str, *given: object) -> Answer:
        """Run one prepared statement. Raises ``PostgresError`` or ``LostError``."""
        with self._answering():
            statement = self._prepared.get(text)
            if statement is None:
                statement = self._prepared[text] = await self._connection.prepare(text)
            rows = await statement.fetch(*given)
            return Answer(rows, statement.get_statusmsg() or "")

    async def command(self, text: str) -> str:
        """Run a command without parameters, give its tag. Raises likewise."""
        with self._answering():
            return await self._connection.execute(text)

    async def copy(
        self, table: str, columns: Sequence[str], rows: Sequence[Sequence[object]]
    ) -> None:
        """Add many rows to a table. Raises likewise."""
        with self._answering():
            tag = await self._connection.copy_records_to_table(table, records=rows, columns=columns)
        assert tag == f"COPY {len(rows)}", "all rows are copied, or an error is raised"

    async def one(self, text: str, *given: object) -> asyncpg.Record:
        """The only row of a statement."""
        (row,) = (await self.run(text, *given)).rows
        return row

    def terminate(self) -> None:
        """Cut the connection; whoever waits for an answer hears of it."""
        self._connection.terminate()

    async def close(self) -> None:
        """Part from the server in order, or without it if it does not answer."""
        try:
            await self._connection.close(timeout=self.answer_timeout)
        except (exceptions.PostgresError, exceptions.InterfaceError, OSError):
            self._connection.terminate()

    def _hear(self, _: object, message: exceptions.PostgresLogMessage) -> None:
        severity = getattr(message, "severity_en", None) or getattr(message, "severity", "")
        if severity == "WARNING":
            self.warnings.append(str(message).partition("\n")[0])

    @contextmanager
    def _answering(self) -> Iterator[None]:
        overdue = self._loop.call_later(self.answer_timeout, self._give_up)
        try:
            yield
        except (
            exceptions.PostgresError,
            exceptions.InterfaceError,
            exceptions.InternalClientError,
            OSError,
        ) as error:
            if not self.lost and not _ends_a_connection(error):
                raise
            self.terminate()
            late = f"no answer within {self.answer_timeout:g} s"
            raise LostError(late if self._overdue else describe(error)) from error
        finally:
            overdue.cancel()

    def _give_up(self) -> None:
        self._overdue = True
        self.terminate()


def _ends_a_connection(error: Exception) -> bool:
    """Does ``error`` leave open what became of the statement?"""
    if isinstance(error, exceptions.PostgresError):
        code = error.sqlstate or ""
        return code.startswith(_UNKNOWN) or code == _UNKNOWN_END
    return not isinstance(error, exceptions.InterfaceError)


def describe(error: BaseException) -> str:
    """What went wrong, in one line."""
    first = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


# -- connecting ------------------------------------------------------------------------------------


async def connect(target: Target, config: PostgresConfig, *, writes: bool) -> Session:
    """A session on our terms; with ``writes``, one that may be trusted with commits.

    Raises ``UnreachableError`` when there is nobody, or not now, and ``BackendError`` when it must
    not be used as it is.
    """
    session = Session(await _dial(target, config, writes=writes), config.answer_timeout)
    try:
        if writes:
            await _require_settings(session)
            await _require_no_pooler(session)
    except exceptions.PostgresError as error:
        session.terminate()
        raise BackendError(f"{target.shown}: {describe(error)}") from error
    except BackendError as error:
        session.terminate()
        raise type(error)(f"{target.shown}: {error}") from error
    except BaseException:
        session.terminate()
        raise
    return session


async def _dial(
    target: Target, config: PostgresConfig, *, writes: bool
) -> "asyncpg.Connection[asyncpg.Record]":
    try:
        return await asyncpg.connect(
            target.dsn,
            timeout=config.connect_timeout,
            server_settings=_server_settings(target, config, writes=writes),
        )
    except exceptions.PostgresError as error:
        kind = UnreachableError if (error.sqlstate or "")[:2] in _OUT_OF_REACH else BackendError
        raise kind(f"{target.shown}: {describe(error)}") from error
    except (ssl.SSLCertVerificationError, exceptions.InterfaceError, ValueError) as error:
        raise BackendError(f"{target.shown}: {describe(error)}") from error
    except (OSError, exceptions.InternalClientError) as error:
        raise UnreachableError(f"{target.shown}: {describe(error)}") from error


def _server_settings(target: Target, config: PostgresConfig, *, writes: bool) -> dict[str, str]:
    """What the session is started with; milliseconds unless PostgreSQL counts seconds."""
    dead_after = config.dead_peer_timeout
    return {
        "application_name": application_name(target.schema, writes=writes),
        "search_path": f'"{target.schema}"',
        "default_transaction_isolation": "read committed",
        "default_transaction_read_only": "off" if writes else "on",
        "statement_timeout": "0",
        "lock_timeout": "0",
        "idle_in_transaction_session_timeout": str(int(config.idle_transaction_timeout * 1000)),
        "client_connection_check_interval": "1000",
        "tcp_user_timeout": str(int(dead_after * 1000)),
        "tcp_keepalives_idle": "1",
        "tcp_keepalives_interval": "1",
        "tcp_keepalives_count": str(max(1, int(dead_after) - 1)),
        "jit": "off",
        "enable_seqscan": "off",
        "enable_hashjoin": "off",
        "enable_mergejoin": "off",
    }


def application_name(schema: str, *, writes: bool) -> str:
    """What the server shows of a session; it cuts longer ones."""
    return f"kvstore {'writer' if writes else 'reader'} {schema}"[:63]


async def _require_settings(session: Session) -> None:
    """Raise ``BackendError`` unless all that we rely on is in force; ``UnreachableError`` for a
    standby, which may be promoted any time.
    """
    found = await _settings(session)
    if found.get("synchronous_commit") not in _WANTED["synchronous_commit"]:
        await session.command("SET synchronous_commit = on")
        found = await _settings(session)
    trouble = find_trouble(found)
    if trouble:
        raise (UnreachableError if found.get("in_hot_standby") == "on" else BackendError)(trouble)


async def _settings(session: Session) -> dict[str, str]:
    names = [*_WANTED, "server_version_num"]
    return {row["name"]: row["setting"] for row in (await session.run(_SHOW, names)).rows}


def find_trouble(found: Mapping[str, str]) -> str:
    """Why a server with these settings must not be written to; empty if it may.

    >>> find_trouble({"server_version_num": "140011"})
    'PostgreSQL 15 or newer is needed, this is 14'
    """
    version = int(found.get("server_version_num", "0")) // 10_000
    if version < VERSION_MIN:
        return f"PostgreSQL {VERSION_MIN} or newer is needed, this is {version}"
    if found.get("in_hot_standby") == "on":
        return "this server is a standby: in_hot_standby is on"
    for name, allowed in _WANTED.items():
        value = found.get(name)
        if value not in allowed:
            return f"{name} must be {' or '.join(allowed)}, it is {value}"
    return ""


async def _require_no_pooler(session: Session) -> None:
    """Raise ``BackendError`` if statements are handed to sessions of others."""
    mark = f"{session.server_process}"
    await session.run(_MARK, mark)
    for _ in range(2):
        process, shown = await session.one(_SHOW_MARK)
        if (process, shown) != (session.server_process, mark):
            raise BackendError(
                "a connection pooler is in between; the URL must lead to PostgreSQL itself"
            )


async def find_origin(session: Session) -> str:
    """Which database this is: ``<system identifier>/<timeline>``. A copy that went its own way has
    another timeline, any other database another identifier. Empty where there is no such thing.

    The timeline is that of the log being written: the control file's may be older for a while after
    a promotion.
    """
    try:
        (system,) = await session.one(_SYSTEM)
        (file,) = await session.one(_WALL)
    except (exceptions.UndefinedFunctionError, exceptions.FeatureNotSupportedError):
        return ""
    except exceptions.InsufficientPrivilegeError as error:
        raise BackendError(f"which database is this? {describe(error)}") from error
    return f"{system}/{int(file[:8], 16)}"


async def end_abandoned(session: Session, processes: Collection[int]) -> None:
    """End those sessions of ours that the server has not noticed to be lost, and that wait for what
    we would say next in the middle of a transaction: they may have the fence row's lock.

    One that is at work is let alone: its commit may be slow, and would be as slow the next time.
    A server that has no such function, or forbids it, does without.
    """
    if not processes:
        return
    try:
        await session.run(_END_ABANDONED, [str(process) for process in processes])
    except exceptions.PostgresError:
        return  # they end by ``idle_in_transaction_session_timeout``, or when TCP gives them up


def _nobody_hears() -> None:
    """Until somebody sets ``on_lost``."""
