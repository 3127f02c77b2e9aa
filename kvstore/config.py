"""The numbers that bound the store, by name, with what happens when one is reached.

Beside the code that needs them stand only numbers that nobody has a reason to set: sizes of steps,
how often something is tried again, what is kept of connections that are over or not accepted yet.

One frozen dataclass per module; ``Config`` holds them all and is the only thing that the
composition root passes on.
The defaults are the production numbers; those that users may change are set from flags by
``cli.py``.
Times are in seconds, sizes in bytes, unless a name says otherwise.
etcd's own defaults are from etcd 3.6 ``server/embed/config.go``.
"""

from dataclasses import dataclass, field

from kvstore.transport.limits import Limits

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestConfig:
    """``rpc`` and ``txn``: what one request may ask for."""

    request_bytes_max: int = 1536 * KIB
    """Encoded bytes of a write request (``--max-request-bytes``); above: InvalidArgument, request
    is too large."""
    request_overhead_bytes: int = 512 * KIB
    """What the transport accepts beyond that, so that the refusal is etcd's own and not the
    transport's."""
    txn_ops_max: int = 128
    """Compares, success or failure operations per Txn (``--max-txn-ops``); above: InvalidArgument,
    too many ops."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """``store``: memory for values, and reads that take long."""

    cache_bytes_max: int = 256 * MIB
    """Encoded values of live keys kept in memory (``--cache-bytes``); above: the coldest are
    evicted and re-read."""
    recent_bytes_max: int = 64 * MIB
    """Encoded values of replaced but young entries; above: the oldest durable ones are re-read from
    the backend."""
    read_chunk_keys: int = 4_096
    """A long read yields to other requests after looking at this many keys (about 1 ms)."""
    stream_chunk_bytes: int = 1 * MIB
    """Bytes of KeyValues in one message of a RangeStream, unless a single one is larger."""
    fetch_rows_max: int = 1_000
    """Rows per read of values from the backend; more are read in several statements."""
    read_restarts_max: int = 3
    """A read at the head that compaction overtakes starts again this often, then Unavailable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitConfig:
    """``commit``: group commit, per shard."""

    batch_rows_max: int = 2_000
    """Rows in a batch, changes of leases included; a full one waits for its turn and the next one
    is filled."""
    batch_bytes_max: int = 16 * MIB
    """Likewise for the bytes of keys and values."""
    queue_rows_max: int = 20_000
    """Uncommitted rows of a shard, changes of leases included; above: writes are refused early
    (ResourceExhausted, too many requests)."""
    queue_bytes_max: int = 128 * MIB
    """Likewise for bytes."""
    gather_waiters_min: int = 16
    """A commit that answered at least as many may hold the next one back for them; with several
    shards each its part of them (``gathering``)."""
    gather_interval: float = 0.002
    """How long at most."""
    shard_timeout: float = 5.0
    """A shard counts as out this long after its first stuck commit: its requests are then refused
    at once."""
    retry_interval: float = 0.1
    """Between attempts to commit a batch that was definitely not stored (disk full, busy), or to
    find out whether it was; unlimited attempts."""
    record_interval: float = 5.0
    """Between records, on the home shard, of how far the others are."""
    return_interval: float = 1.0
    """Between attempts to reach a shard that has been missing since the start; unlimited
    attempts."""
    barrier_timeout: float = 1.0
    """How long a request over several shards waits for them to have nothing uncommitted; then it is
    refused (Unavailable, request timed out) and nothing was done."""
    barrier_requests_max: int = 1_000
    """Requests over several shards that wait so; above: refused early (ResourceExhausted, too many
    requests)."""
    held_requests_max: int = 10_000
    """Other requests that wait for them, per shard; likewise."""
    held_bytes_max: int = 64 * MIB
    """Bytes of either, per shard and over several; likewise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactionConfig:
    """``compaction``: physical removal gives way to foreground commits."""

    drop_rows_max: int = 1_000
    """Rows removed per batch; the rest follows in later batches."""
    tick_interval: float = 0.1
    """How often it goes on with what waited for a commit or a read."""
    step_keys: int = 512
    """Keys trimmed from the index before giving way to other work (about 1 ms)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchConfig:
    """``watch``: watchers, what waits for them, and their catch-up."""

    progress_interval: float = 600.0
    """Silence after which a watcher with progress_notify hears of the revision
    (``--watch-progress-notify-interval``); +-10 % at random."""
    tick_interval: float = 0.1
    """How often the hub looks for progress that is due, for streams that can take more, and for
    reads of storage to try again."""
    watchers_per_stream_max: int = 10_000
    """Watchers on one gRPC stream; above: the create request is answered cancelled, too many
    requests."""
    watchers_max: int = 1_000_000
    """Watchers of the server; likewise."""
    fresh_changes_max: int = 32_768
    """Changes that wait to become visible to the watchers of one set of shards; above: they are
    forgotten, and those watchers read the history instead."""
    fresh_bytes_max: int = 64 * MIB
    """Likewise for their bytes."""
    response_bytes: int = 1 * MIB
    """A response of several revisions ends with the first revision that reaches this; one revision
    is never split, however large, unless the watcher asked for fragments."""
    fragment_bytes: int = 2 * MIB
    """A fragment ends before the event that would reach this (etcd: request limit + 512 KiB)."""
    outbox_bytes_max: int = 1 * MIB
    """Unsent bytes of one gRPC stream; above: its watchers get nothing more, and read the history
    once the client has read on."""
    control_bytes_max: int = 64 * KIB
    """Answers to create, cancel and progress requests while the outbox is above that; above: the
    stream is ended, too many requests."""
    catch_up_changes: int = 500
    """Changes per step of a watcher that reads the history; the next watcher's step follows, and
    after as many changes other work."""
    shared_bytes_max: int = 32 * MIB
    """Encoded pieces of the history that watchers of one range share; above: the oldest are
    forgotten, and encoded again if they are wanted."""
    catch_up_fetches_max: int = 8
    """Watchers that read values from one shard's storage at the same time; the others wait their
    turn."""
    catch_up_fetch_rows: int = 100
    """Values that one of them reads at a time; more only if one revision has more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseConfig:
    """``lease``: the lessor."""

    tick_interval: float = 0.5
    """How often expiry is looked for (etcd: 500 ms)."""
    ttl_min: int = 2
    """Seconds; a shorter TTL is raised to this (etcd: 3/2 of the election timeout, rounded up)."""
    ttl_max: int = 9_000_000_000
    """Seconds; above: OutOfRange, too large lease TTL (etcd ``lessor.go``)."""
    leases_max: int = 1_000_000
    """Leases of the server; above: a grant is refused (ResourceExhausted, too many requests)."""
    expired_per_second_max: int = 1_000
    """Leases revoked per second because they expired (etcd: 1,000); the rest follow."""
    revoked_keys_per_tick_max: int = 500
    """A tick ends once the leases it revoked had this many keys (some ms); a lease is never
    split."""
    scanned_per_tick_max: int = 2_000
    """Leases looked at per tick, most of them only to be put down again (about 2 ms)."""
    revoke_waiters_max: int = 1_000
    """Answers that wait for one lease's revoke; above: ResourceExhausted, too many requests."""
    keep_alives_waiting_max: int = 1_000
    """Keep-alives of one stream that wait for the one before; above: the stream ends with
    ResourceExhausted, too many requests."""
    keep_alive_outbox_bytes_max: int = 64 * KIB
    """Answers to keep-alives that a client has not read; above: further ones wait."""
    checkpoint_interval: float = 300.0
    """Between records of a long lease's remaining TTL (etcd: 5 min)."""
    checkpoints_per_tick_max: int = 1_000
    """Remainders recorded per tick (etcd: 1,000 per batch); the rest follow."""
    extend_on_start: float = 0.0
    """Seconds added to every lease at start, for clients that could not renew while the server was
    away."""


def transport_limits() -> Limits:
    """``transport``: the production numbers; ``transport.limits`` tells what happens at each."""
    return Limits(
        connections_max=20_000,
        # One address never shuts the others out. No lower: behind a proxy all clients have one.
        connections_per_address_max=10_000,
        handshake_timeout=10.0,
        preface_timeout=10.0,
        first_request_timeout=120.0,
        # A call in a hundred is a watch that stays; kube-apiserver has some hundreds a connection.
        streams_per_connection_max=1_000,
        message_bytes_max=(1536 + 512) * KIB,
        request_bytes_total_max=256 * MIB,
        request_timeout=60.0,
        stream_window_bytes=1 * MIB,
        connection_window_bytes=8 * MIB,
        frame_bytes_max=16 * KIB,
        header_bytes_max=16 * KIB,
        header_count_max=64,
        continuations_max=8,
        templates_max=32,
        template_bytes_max=1 * KIB,
        # A client may give up on every call of its connection at once.
        resets_per_second_max=1_000,
        faults_per_second_max=100,
        settings_per_second_max=10,
        settings_entries_max=32,
        # grpc-go sends a WINDOW_UPDATE for every 16 KiB of a list that it reads.
        control_per_second_max=50_000,
        small_data_per_second_max=1_000,
        refusals_per_second_max=1_000,
        # Clients try again what was refused: one with many calls beside unread lists makes more.
        unserved_per_second_max=10_000,
        ping_interval_min=5.0,
        ping_strikes_max=2,
        keepalive_interval=7_200.0,
        keepalive_timeout=20.0,
        outbox_low_bytes=64 * KIB,
        socket_bytes_max=256 * KIB,
        unread_bytes_max=2 * MIB,
        turn_bytes_max=1 * MIB,
        # Large lists side by side on one connection; their bytes are shared with the cache.
        output_bytes_max=256 * MIB,
        output_bytes_total_max=1024 * MIB,
        output_stall_timeout=60.0,
        http1_header_bytes_max=16 * KIB,
        http1_body_bytes_max=2 * MIB,
        # A scraper keeps its connection from one scrape to the next.
        http1_timeout=120.0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SqliteConfig:
    """``backends.sqlite``."""

    checkpoint_bytes: int = 4 * MIB
    """Size of the write-ahead log from which the writer checkpoints between two batches. Commits
    wait meanwhile: 8-14 ms with 4 MiB, 20-27 ms with 16 MiB, for the same throughput."""
    wal_bytes_max: int = 512 * MIB
    """Above (readers hold it back): writes are refused until a checkpoint succeeds."""
    load_chunk_rows: int = 1_000
    """Rows per chunk when the index is loaded. The index takes one in 2-4 ms, which others wait
    for when a shard comes late; larger ones make a start no quicker."""
    readers: int = 2
    """Threads that read values, each with its own connection."""
    page_cache_bytes: int = 16 * MIB
    """SQLite's page cache per connection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresConfig:
    """``backends.postgres``."""

    connect_timeout: float = 3.0
    """A connection that takes longer is given up and tried again."""
    answer_timeout: float = 5.0
    """A statement without an answer for this long: the connection is cut, and a commit is of
    unknown outcome until another connection has told."""
    answer_timeout_max: float = 60.0
    """What taking the shard anew may wait at most: twice as long after each time that it was too
    short, for it must outlast a commit that the database is still busy with."""
    commit_timeout_max: float = 600.0
    """Likewise for each statement of a batch whose commit was too late before. So the largest batch
    that can be stored is what the link carries and the database stores in ten minutes, 75 MB at
    1 Mbit/s: full batches (16 MiB) need 0.25 Mbit/s, a revision that deletes 200,000 keys of 100
    bytes (35 MB) needs 0.5. The price is a server that falls silent in the middle of such a commit:
    it may be noticed as late as that."""
    reconnect_interval_min: float = 0.1
    """Between the first attempts to connect again; each time twice as long, half of it at
    random."""
    reconnect_interval_max: float = 1.0
    """At most; unlimited attempts."""
    dead_peer_timeout: float = 5.0
    """The server ends a session whose client has not acknowledged anything for this long."""
    idle_transaction_timeout: float = 5.0
    """Likewise a session that leaves a transaction open: it holds the fence row."""
    lease_duration: float = 5.0
    """A server is sure to hold the home shard for this long after it began its last renewal or
    commit that succeeded."""
    lease_watch: float = 6.0
    """A new server waits for this long before it serves a home shard that was not let go: longer
    than ``lease_duration``, for the two clocks may not run alike."""
    renew_interval: float = 1.0
    """A server without a commit that succeeds shows this often that it is there; other shards are
    looked at as often."""
    readers: int = 2
    """Connections that read values."""
    read_attempts_max: int = 3
    """Connections that a read is tried on before it fails as out of reach."""
    load_chunk_rows: int = 1_000
    """Rows per page when the index is loaded; likewise."""
    sizes_interval: float = 30.0
    """Between measurements of the tables; meanwhile the bytes of new rows are added."""
    take_over: bool = False
    """Take a home shard from a server that is holding it (``--take-over``): that one can write
    nothing from the beginning, and stops; this one serves after ``lease_watch``, when that one
    answers no more."""
    accept_data_loss: bool = False
    """Take a database that is not the one of before, by its origin (``--accept-data-loss``). The
    caller sees to it that no revision is issued twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HousekeepingConfig:
    """``housekeeping``: stalls of the loop and collections of garbage."""

    stall_tick_interval: float = 0.025
    """The loop's lateness is sampled this often."""
    quiet_load: float = 0.3
    """CPU seconds per second below which a moment counts as quiet."""
    gc_young_objects_max: int = 100_000
    """New objects after which the interpreter collects by itself, quiet or not (some ms)."""
    gc_young_objects_min: int = 2_000
    """Fewer new objects are not worth a collection."""
    gc_young_interval: float = 0.5
    """Between collections of young objects at quiet moments; ten times that if there is none."""
    gc_full_interval: float = 300.0
    """Between full collections at quiet moments; twice that if there is none."""
    gc_pause_max: float = 0.02
    """A full collection that took longer has its survivors frozen, so that the next is short."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """``server``: ticks, threads, and the way out."""

    quota_bytes: int = 0
    """Reported as the backend quota; 0: there is none."""
    hashes_max: int = 2
    """Hashes of the whole store computed at a time; above: ResourceExhausted, too many requests."""
    commit_tick_interval: float = 0.1
    """How often stuck shards are looked for and retries are due."""
    thread_switch_interval: float = 0.0005
    """How long a thread waits for the interpreter before it asks for it. With a busy loop the
    writer came back from a sync 5-9 ms late at Python's 5 ms; from 0.5 ms down to 0.2 ms a write
    cost the same time and up to 7 % more CPU."""
    stop_timeout: float = 10.0
    """From the signal to stop until calls have ended and all changes are durable; what is still
    under way then is cut off. A page of metrics may take a second more."""
    close_timeout: float = 10.0
    """Then, for storage to close; a shard that takes longer is left as a kill would leave it, and
    the exit code is 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All of them."""

    request: RequestConfig = field(default_factory=RequestConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    commit: CommitConfig = field(default_factory=CommitConfig)
    compaction: CompactionConfig = field(default_factory=CompactionConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    lease: LeaseConfig = field(default_factory=LeaseConfig)
    transport: Limits = field(default_factory=transport_limits)
    sqlite: SqliteConfig = field(default_factory=SqliteConfig)
    postgres: PostgresConfig = field(default_factory=PostgresConfig)
    housekeeping: HousekeepingConfig = field(default_factory=HousekeepingConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
