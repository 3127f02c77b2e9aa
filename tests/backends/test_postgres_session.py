"""Whom a session talks to, and on which terms."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from backends.postgres import PostgresBackend
from backends.postgres_session import (
    LostError,
    Session,
    connect,
    find_origin,
    find_trouble,
    read_url,
)
from kvstore.errors import BackendError, UnreachableError
from tests.backends.postgres_cluster import Cluster, free_port, temporary_cluster
from tests.backends.postgres_storage import QUICK, PostgresStorage
from tests.transport.certificates import Authority

GOOD = {
    "server_version_num": "150014",
    "in_hot_standby": "off",
    "transaction_read_only": "off",
    "transaction_isolation": "read committed",
    "synchronous_commit": "on",
    "fsync": "on",
    "full_page_writes": "on",
    "data_sync_retry": "off",
    "statement_timeout": "0",
    "lock_timeout": "0",
}

postgres = pytest.mark.postgres


def test_url_is_read() -> None:
    """The schema is ours, the rest is the driver's, and no password is shown."""
    target = read_url("postgresql://kv:se%40cret@db1:5433/main?sslmode=verify-full&schema=events")
    assert "postgresql://kv:se%40cret@db1:5433/main?sslmode=verify-full" == target.dsn
    assert "events" == target.schema
    assert "postgresql://db1:5433/main (schema events)" == target.shown


def test_schema_has_a_default() -> None:
    """A URL without a schema means ours, not whatever the role would find first."""
    assert "kvstore" == read_url("postgresql://db1/main").schema


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("postgresql://db1/main?sslmod=require", "no option 'sslmod'; did you mean sslmode?"),
        ("postgresql://db1/main?zzz=1", "no option 'zzz': host, port, schema, sslmode, passfile"),
        ("postgresql://db1/main?sslrootcert=/none", "sslrootcert of a URL of PostgreSQL: there"),
        ("postgresql://db1/main?schema=Events", "small letters, digits and _, not 'Events'"),
        ('postgresql://db1/main?schema=a"b', "small letters"),
        ("postgresql://kv:hush@db1:port/main", "cannot be read"),
        ("postgresql://kv:hush@db1/main?schema", "cannot be read"),
    ],
)
def test_wrong_url_is_refused(url: str, reason: str) -> None:
    """One line says what is wrong, with the right spelling, and without the password."""
    with pytest.raises(BackendError) as raised:
        PostgresBackend(url)
    assert reason in str(raised.value)
    assert "hush" not in str(raised.value)


def test_good_settings_are_no_trouble() -> None:
    """What we ask for is enough, and so is more."""
    assert "" == find_trouble(GOOD)
    assert "" == find_trouble(GOOD | {"synchronous_commit": "remote_apply"})


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("server_version_num", "140011", "PostgreSQL 15 or newer is needed, this is 14"),
        ("in_hot_standby", "on", "this server is a standby"),
        ("transaction_read_only", "on", "transaction_read_only must be off"),
        ("transaction_isolation", "serializable", "must be read committed, it is serializable"),
        ("synchronous_commit", "off", "must be on or remote_apply, it is off"),
        ("synchronous_commit", "local", "must be on or remote_apply, it is local"),
        ("synchronous_commit", "remote_write", "must be on or remote_apply"),
        ("fsync", "off", "fsync must be on, it is off"),
        ("full_page_writes", "off", "full_page_writes must be on"),
        ("data_sync_retry", "on", "data_sync_retry must be off"),
        ("statement_timeout", "500", "statement_timeout must be 0"),
    ],
)
def test_each_setting_counts(name: str, value: str, reason: str) -> None:
    """One that is not in force is named, with what it must be."""
    assert reason in find_trouble(GOOD | {name: value})


@pytest.mark.parametrize("name", GOOD)
def test_unknown_setting_counts(name: str) -> None:
    """What a server does not tell is not taken for granted."""
    assert "" != find_trouble({each: value for each, value in GOOD.items() if each != name})


@postgres
async def test_terms_are_set_whatever_the_roles_are(postgres_storage: PostgresStorage) -> None:
    """Defaults of a role that would lose commits, cut them off or change their isolation are
    overridden for our sessions.
    """
    role = f"careless_{postgres_storage.schema}"
    await postgres_storage.sql(f"CREATE ROLE {role} LOGIN SUPERUSER")
    for name, value in {
        "synchronous_commit": "off",
        "default_transaction_isolation": "serializable",
        "default_transaction_read_only": "on",
        "statement_timeout": "1s",
        "search_path": "elsewhere",
        "enable_seqscan": "on",
    }.items():
        await postgres_storage.sql(f"ALTER ROLE {role} SET {name} = '{value}'")
    target = read_url(postgres_storage.cluster.url(postgres_storage.schema, user=role))
    session = await connect(target, QUICK, writes=True)
    shown = await session.run(
        "SELECT name, setting FROM pg_settings WHERE name = ANY($1::text[])",
        [*GOOD, "search_path", "idle_in_transaction_session_timeout", "enable_seqscan"],
    )
    found = {row["name"]: row["setting"] for row in shown.rows}
    assert "" == find_trouble(found)
    assert "on" == found["synchronous_commit"]
    assert f'"{postgres_storage.schema}"' == found["search_path"]
    assert ("5000", "off") == (
        found["idle_in_transaction_session_timeout"],
        found["enable_seqscan"],
    )
    await session.close()


@postgres
async def test_remote_apply_is_kept(postgres_storage: PostgresStorage) -> None:
    """A role that is stricter than we are stays so."""
    role = f"strict_{postgres_storage.schema}"
    await postgres_storage.sql(f"CREATE ROLE {role} LOGIN SUPERUSER")
    await postgres_storage.sql(f"ALTER ROLE {role} SET synchronous_commit = remote_apply")
    target = read_url(postgres_storage.cluster.url(postgres_storage.schema, user=role))
    session = await connect(target, QUICK, writes=True)
    assert "remote_apply" == (await session.one("SHOW synchronous_commit"))[0]
    await session.close()


@postgres
@pytest.mark.slow
@pytest.mark.parametrize("setting", ["fsync", "full_page_writes"])
async def test_unsafe_server_is_refused(postgres_programs: Path, setting: str) -> None:
    """A real server without a setting that only its operator can change is refused by name."""
    with temporary_cluster(postgres_programs, **{setting: "off"}) as cluster:
        backend = PostgresBackend(cluster.url("kvstore"))
        with pytest.raises(BackendError, match=f"{setting} must be on, it is off"):
            await backend.open()
        await backend.close()


class Pooled(Session):
    """A session behind a pooler: another process answers than the one that greeted us."""

    @property
    def server_process(self) -> int:
        """Of the pooler's making."""
        return 4_000_000_000


@postgres
async def test_pooler_is_refused(
    postgres_storage: PostgresStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection whose statements another process answers is not used."""
    monkeypatch.setattr("backends.postgres_session.Session", Pooled)
    with pytest.raises(BackendError, match="a connection pooler is in between"):
        await postgres_storage.backend().open()


async def test_nobody_there_is_unreachable() -> None:
    """A port that nobody listens on is out of reach: it may be tried again."""
    backend = PostgresBackend(f"postgresql://kv@127.0.0.1:{free_port()}/postgres", config=QUICK)
    for _ in range(2):
        with pytest.raises(UnreachableError, match=r"Errno|Connect"):
            await backend.open()
    await backend.close()


@postgres
@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("postgresql://nobody_here@127.0.0.1:{port}/postgres", 'role "nobody_here" does not exist'),
        ("postgresql://kv@127.0.0.1:{port}/nowhere", 'database "nowhere" does not exist'),
        ("postgresql://kv@127.0.0.1:{port}/postgres?sslmode=verify-full", "SSL|root"),
    ],
)
async def test_wrong_target_is_refused(postgres_cluster: Cluster, url: str, reason: str) -> None:
    """What trying again would not help is no matter of reach."""
    backend = PostgresBackend(url.format(port=postgres_cluster.port), config=QUICK)
    with pytest.raises(BackendError, match=reason) as raised:
        await backend.open()
    assert not isinstance(raised.value, UnreachableError)
    assert "\n" not in str(raised.value)


@postgres
async def test_late_answer_cuts_the_connection(postgres_storage: PostgresStorage) -> None:
    """A statement that takes too long ends with its connection, which is told, and is not
    cancelled: the server finishes it.
    """
    target = read_url(postgres_storage.cluster.url(postgres_storage.schema))
    session = await connect(target, QUICK, writes=True)
    lost = asyncio.Event()
    session.on_lost = lost.set
    session.answer_timeout = 0.2
    with pytest.raises(LostError, match=r"no answer within 0\.2 s"):
        await session.run("SELECT pg_sleep(60)")
    assert session.lost
    assert session.overdue
    await asyncio.wait_for(lost.wait(), 5)
    assert "canceling statement" not in postgres_storage.cluster.log()
    with pytest.raises(LostError):
        await session.run("SELECT 1")


@postgres
async def test_definite_error_leaves_the_session(postgres_storage: PostgresStorage) -> None:
    """After a refused statement the next one is answered."""
    target = read_url(postgres_storage.cluster.url(postgres_storage.schema))
    session = await connect(target, QUICK, writes=True)
    with pytest.raises(Exception, match="division by zero"):
        await session.run("SELECT 1 / 0")
    assert 1 == (await session.one("SELECT 1"))[0]
    await session.close()
    assert session.lost


@postgres
async def test_warnings_are_heard_in_time(postgres_storage: PostgresStorage) -> None:
    """A warning that comes with an answer is known when the answer is; a notice is none."""
    target = read_url(postgres_storage.cluster.url(postgres_storage.schema))
    session = await connect(target, QUICK, writes=True)
    await session.command("DO $$ BEGIN RAISE NOTICE 'by the way'; END $$")
    assert [] == session.warnings
    await session.command("DO $$ BEGIN RAISE WARNING 'mind you'; END $$")
    assert 1 == len(session.warnings)
    assert "mind you" in session.warnings[0]
    assert "ROLLBACK" == await session.command("ROLLBACK")
    assert 2 == len(session.warnings)
    await session.close()


@postgres
async def test_origin_is_system_and_timeline(postgres_storage: PostgresStorage) -> None:
    """The origin is what PostgreSQL's own tool says of the cluster, and a role without rights may
    see it.
    """
    role = f"plain_{postgres_storage.schema}"
    await postgres_storage.sql(f"CREATE ROLE {role} LOGIN")
    cluster = postgres_storage.cluster
    session = await connect(
        read_url(cluster.url(postgres_storage.schema, user=role)), QUICK, writes=True
    )
    printed = cluster.run("pg_controldata", str(cluster.data))
    (system,) = (line.split()[-1] for line in printed.splitlines() if "system identifier" in line)
    assert f"{system}/1" == await find_origin(session)
    await session.close()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Who signs the server's certificate."""
    return Authority.make(tmp_path_factory.mktemp("authority"), "authority")


@pytest.fixture(scope="module")
def tls_cluster(postgres_programs: Path, authority: Authority) -> Iterator[Cluster]:
    """A PostgreSQL that speaks TLS, as localhost."""
    certificate, key = authority.issue("server")
    with temporary_cluster(postgres_programs) as cluster:
        for file in (certificate, key):
            cluster.adopt(file)
        cluster.configure(ssl="on", ssl_cert_file="server.pem", ssl_key_file="server.key")
        cluster.stop()
        cluster.start()
        yield cluster


@postgres
@pytest.mark.slow
async def test_verified_tls(tls_cluster: Cluster, authority: Authority, tmp_path: Path) -> None:
    """With sslmode=verify-full the server's certificate is checked: one that is signed by another
    authority, or of another name, is refused for good.
    """
    stranger = Authority.make(tmp_path, "stranger")
    options = {"sslmode": "verify-full", "sslrootcert": str(authority.certificate)}
    session = await connect(read_url(tls_cluster.url("s", options=options)), QUICK, writes=True)
    (encrypted,) = await session.one("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
    assert encrypted
    await session.close()
    options["sslrootcert"] = str(stranger.certificate)
    with pytest.raises(BackendError, match="certificate verify failed") as raised:
        await connect(read_url(tls_cluster.url("s", options=options)), QUICK, writes=True)
    assert not isinstance(raised.value, UnreachableError)
