"""Stores in a PostgreSQL of the tests' own: each in a schema of its own."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import asyncpg

from backends.postgres import PostgresBackend
from backends.postgres_session import application_name
from kvstore.config import PostgresConfig
from tests.backends.postgres_cluster import Cluster

QUICK = replace(
    PostgresConfig(),
    renew_interval=0.1,
    reconnect_interval_min=0.01,
    reconnect_interval_max=0.1,
)
"""What a test can wait for, and a busy machine still does in time."""
SHORT_LEASE = replace(QUICK, lease_duration=1.0, lease_watch=1.5)


class PostgresStorage:
    """A schema that is not there yet."""

    def __init__(self, cluster: Cluster, schema: str, config: PostgresConfig = QUICK) -> None:
        self.cluster = cluster
        self.schema = schema
        self.config = config
        self.port: int | None = None
        """A proxy's, when backends are to go through one."""

    def backend(self, shard: str = "first") -> PostgresBackend:
        """Over the schema."""
        url = self.cluster.url(self.schema, port=self.port)
        return PostgresBackend(url, shard=shard, config=self.config)

    async def steal(self, epoch: int, tip: int) -> None:
        """By a session that asks nobody."""
        await self.sql(f"UPDATE fence SET epoch = {epoch}, tip = {tip}")

    async def sql(self, text: str) -> list[asyncpg.Record]:
        """Run one statement as the superuser, in the schema."""
        connection = await self.connect()
        try:
            return await connection.fetch(text)
        finally:
            await connection.close()

    async def connect(self) -> "asyncpg.Connection[asyncpg.Record]":
        """A foreign connection."""
        settings = {"search_path": self.schema, "application_name": "a test"}
        return await asyncpg.connect(self.cluster.plain_url(), server_settings=settings)

    async def sessions(self) -> int:
        """How many sessions of ours the server has that write to this schema."""
        name = application_name(self.schema, writes=True)
        (row,) = await self.sql(
            f"SELECT count(*) FROM pg_stat_activity WHERE application_name = '{name}'"
        )
        found: int = row[0]
        return found

    async def kill(self, *, writes: bool) -> None:
        """End our writing or reading sessions in this schema, as an administrator would."""
        name = application_name(self.schema, writes=writes)
        await self.sql(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            f" WHERE application_name = '{name}'"
        )


async def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until ``condition`` holds."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - nothing tells when it does
            await asyncio.sleep(0.005)
