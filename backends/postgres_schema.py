"""Making PostgreSQL's tables, and bringing older ones up to date.

A store is one schema of a database. A new one is made whole in one transaction, of the version that
is current; an older one is migrated by the steps of ``schema`` that follow its version, likewise; a
newer one is refused. Two servers that find a new schema at the same moment make it one after the
other: a lock of the session sees to it (CockroachDB has the function, without effect).

A server whose role may not make tables is served by ``migrate`` run with one that may.
"""

from typing import Final

from asyncpg import exceptions
from sqlalchemy.schema import CreateTable

from backends import postgres_statements as sql
from backends.postgres_session import Session, connect, describe, read_url
from backends.schema import SCHEMA_VERSION, migrations
from kvstore.config import PostgresConfig
from kvstore.errors import BackendError

VERSION_FIRST: Final = 2
"""The schema that the first servers with PostgreSQL made."""

_LOCK: Final = "SELECT pg_advisory_lock(7738151016301003117)"
_UNLOCK: Final = "SELECT pg_advisory_unlock(7738151016301003117)"
_IS_THERE: Final = "SELECT to_regclass($1::text) IS NOT NULL"


async def migrate(url: str, config: PostgresConfig) -> tuple[int, int]:
    """Make or update the tables of the store at ``url``: the versions before (0: none) and after.

    Takes nothing: the server that holds the store goes on. Raises ``BackendError``.
    """
    target = read_url(url)
    session = await connect(target, config, writes=True)
    session.answer_timeout = config.answer_timeout_max
    try:
        return await update_schema(session, target.schema), SCHEMA_VERSION
    finally:
        await session.close()


async def update_schema(session: Session, schema: str) -> int:
    """Make the tables if there are none, migrate older ones; the version that was found, 0 for
    none. Raises ``BackendError`` for what is not ours or newer.
    """
    try:
        found = await _find_version(session, schema)
        if found != SCHEMA_VERSION:
            await session.run(_LOCK)  # before BEGIN, for only then a transaction sees what is new
            await _update(session, schema)
            await session.run(_UNLOCK)
    except exceptions.PostgresError as error:
        raise BackendError(
            f"the schema {schema} cannot be made or brought to version {SCHEMA_VERSION}:"
            f" {describe(error)}"
        ) from error
    return found


async def _update(session: Session, schema: str) -> None:
    """Raises ``PostgresError``; then nothing has changed, unless the connection is lost."""
    await session.command("BEGIN")
    try:
        found = await _find_version(session, schema)
        if found == 0:
            await session.command(f'CREATE SCHEMA IF NOT EXISTS "{schema}"')
            for table in sql.tables():
                await session.command(str(CreateTable(table).compile(dialect=sql.DIALECT)))
            await session.run(sql.INSERT_META, SCHEMA_VERSION)
        else:
            for step in migrations(sql.DIALECT):
                for statement in step.statements if step.version > found else ():
                    await session.command(statement)
            await session.run(sql.UPDATE_META, SCHEMA_VERSION)
    except (exceptions.PostgresError, BackendError):
        if not session.lost:
            await session.command("ROLLBACK")
        raise
    tag = await session.command("COMMIT")
    if tag != "COMMIT":
        raise BackendError(f"COMMIT was answered {tag}")


async def _find_version(session: Session, schema: str) -> int:
    """0 when there is no store. Raises ``BackendError`` for one that this program cannot use."""
    (there,) = await session.one(_IS_THERE, f'"{schema}".meta')
    if not there:
        return 0
    try:
        rows = (await session.run(sql.SELECT_SCHEMA_VERSION)).rows
    except exceptions.UndefinedColumnError as error:
        raise BackendError(f"the schema {schema} belongs to another application") from error
    if len(rows) != 1:
        raise BackendError(f"the schema {schema} has no schema version")
    found: int = rows[0]["schema_version"]
    if found > SCHEMA_VERSION:
        raise BackendError(
            f"the schema {schema} has version {found}, this program knows {SCHEMA_VERSION}:"
            " a newer one is needed"
        )
    if found < VERSION_FIRST:
        raise BackendError(f"the schema {schema} has version {found}, which never was")
    return found
