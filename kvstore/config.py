"""Every number that bounds something in the store, by name, with what happens when it is reached.

One frozen dataclass per module; ``Config`` holds them all and is the only thing that the
composition root passes on.
The defaults are the production numbers; those that users may change are set from flags by
``cli.py``.
Times are in seconds, sizes in bytes, unless a name says otherwise.
etcd's own defaults are from etcd 3.6 ``server/embed/config.go``.
"""

from dataclasses import dataclass, field

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
    request_timeout: float = 7.0
    """A write that is not durable by then is answered Unavailable, request timed out (etcd: 5 s + 2
    elections)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """``store``: memory for values, and reads that take long."""

    cache_bytes_max: int = 256 * MIB
    """Encoded values of live keys kept in memory (``--cache-bytes``); above: the coldest are
    evicted and re-read."""
    recent_bytes_max: int = 64 * MIB
    """Encoded values of replaced but young entries; above: the oldest durable ones are re-read from
    the backend."""
    read_chunk_bytes: int = 4 * MIB
    """A long read yields to other requests after this many bytes of answer."""
    read_chunk_keys: int = 10_000
    """Likewise after this many keys, for answers of tiny values."""
    fetch_rows_max: int = 1_000
    """Rows per read of values from the backend; more are read in several statements."""
    read_restarts_max: int = 3
    """A read at the head that compaction overtakes starts again this often, then Unavailable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitConfig:
    """``commit``: group commit, per shard."""

    batch_rows_max: int = 2_000
    """Rows in a batch; a full one waits for its turn and the next one is filled."""
    batch_bytes_max: int = 16 * MIB
    """Likewise for the bytes of keys and values."""
    queue_rows_max: int = 20_000
    """Uncommitted rows of a shard; above: writes are refused early (ResourceExhausted, too many
    requests)."""
    queue_bytes_max: int = 128 * MIB
    """Likewise for bytes."""
    queue_age_max: float = 5.0
    """Likewise once the oldest uncommitted row has waited this long."""
    shard_timeout: float = 5.0
    """A shard counts as out this long after its first stuck commit: its requests are then refused
    at once."""
    retry_interval: float = 0.1
    """Between attempts to commit a batch that was definitely not stored (disk full, busy);
    unlimited attempts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactionConfig:
    """``compaction``: physical removal gives way to foreground commits."""

    drop_rows_max: int = 1_000
    """Rows removed per batch; the rest follows in later batches."""
    pause: float = 0.01
    """Between such batches while the shard has other work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchConfig:
    """``watch``: watchers, their ring and their catch-up."""

    progress_interval: float = 600.0
    """Silence after which a watcher with progress_notify hears of the revision
    (``--watch-progress-notify-interval``)."""
    tick_interval: float = 0.1
    """How often the hub looks for progress that is due and for watchers that can catch up."""
    ring_events_max: int = 32_768
    """Encoded events held for watchers that are slightly behind; older ones are read from the
    history."""
    ring_bytes_max: int = 64 * MIB
    """Likewise for their bytes."""
    catch_up_events_max: int = 1_000
    """Events per step of a watcher that reads the history; it gives way to other work between
    steps."""
    watchers_per_stream_max: int = 10_000
    """Watchers on one gRPC stream; above: the create request is answered cancelled, too many
    requests."""
    watchers_max: int = 1_000_000
    """Watchers of the server; likewise."""
    fragment_bytes: int = 1536 * KIB
    """Larger answers are split for watchers that asked for fragments (etcd: max-request-bytes + 512
    KiB)."""
    outbox_bytes_max: int = 1 * MIB
    """Unsent bytes of one gRPC stream; above: its watchers read the history once the client has
    read on."""


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
    checkpoint_interval: float = 300.0
    """Between records of a long lease's remaining TTL (etcd: 5 min)."""
    checkpoints_per_tick_max: int = 1_000
    """Remainders recorded per tick (etcd: 1,000 per batch); the rest follow."""
    extend_on_start: float = 0.0
    """Seconds added to every lease at start, for clients that could not renew while the server was
    away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportConfig:
    """``transport.Limits``: what one peer and all peers together may hold."""

    connections_max: int = 20_000
    """Connections per listener; above: accepted and closed at once, counted."""
    streams_per_connection_max: int = 1_000
    """``--max-concurrent-streams``; advertised in SETTINGS; above: RST_STREAM REFUSED_STREAM."""
    request_bytes_total_max: int = 256 * MIB
    """Request bytes being received over all connections; above: new requests get ResourceExhausted.
    """
    header_bytes_max: int = 16 * KIB
    """Decoded header list of a request, 32 bytes a field added; above: the request is refused."""
    header_count_max: int = 64
    """Fields of a request; likewise."""
    continuations_max: int = 8
    """CONTINUATION frames per header block; above: GOAWAY ENHANCE_YOUR_CALM."""
    output_bytes_max: int = 8 * MIB
    """Unread answers of one connection; above: it is not read from until the peer has read half of
    them."""
    output_bytes_total_max: int = 1024 * MIB
    """Unread answers of all connections; above: the connection with the most is closed."""
    output_stall_timeout: float = 60.0
    """A peer that has read nothing for so long with answers waiting is disconnected."""
    handshake_timeout: float = 10.0
    """TLS handshake; later: closed."""
    preface_timeout: float = 10.0
    """First bytes and HTTP/2 preface; later: closed."""
    http1_timeout: float = 30.0
    """An HTTP/1.1 request from its first byte to its last, and silence between two; later: closed.
    """
    http1_body_bytes_max: int = 2 * MIB
    """Body of an HTTP/1.1 request; above: 413."""
    ping_interval_min: float = 5.0
    """A client that pings oftener than this gets a strike (etcd: ``--grpc-keepalive-min-time`` 5
    s)."""
    ping_strikes_max: int = 2
    """Strikes allowed; above: GOAWAY ENHANCE_YOUR_CALM ``too_many_pings`` (gRPC keepalive)."""
    keepalive_interval: float = 7_200.0
    """The server pings a silent connection after this (etcd: ``--grpc-keepalive-interval`` 2 h)."""
    keepalive_timeout: float = 20.0
    """A ping unanswered for so long: closed (etcd: ``--grpc-keepalive-timeout`` 20 s)."""
    resets_per_second_max: int = 100
    """Streams reset by the peer, or by us for its mistakes, per connection; above: GOAWAY
    ENHANCE_YOUR_CALM."""
    drain_timeout: float = 5.0
    """At a stop, time for answers under way; later: closed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SqliteConfig:
    """``backends.sqlite``."""

    checkpoint_bytes: int = 16 * MIB
    """Size of the write-ahead log from which the writer checkpoints between two batches."""
    wal_bytes_max: int = 512 * MIB
    """Above (readers hold it back): writes are refused until a checkpoint succeeds."""
    load_chunk_rows: int = 5_000
    """Rows per chunk when the index is loaded."""
    readers: int = 2
    """Threads that read values, each with its own connection."""
    page_cache_bytes: int = 16 * MIB
    """SQLite's page cache per connection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """``server``: ticks, garbage collection, and the way out."""

    quota_bytes: int = 2048 * MIB
    """Reported as the backend quota (etcd: ``--quota-backend-bytes``, 2 GiB when 0)."""
    commit_tick_interval: float = 0.1
    """How often stuck shards are looked for."""
    stop_timeout: float = 10.0
    """Between the signal to stop and the end, whatever is still under way then."""
    stall_tick_interval: float = 0.05
    """The loop's lateness is sampled this often."""
    gc_interval: float = 60.0
    """A garbage collection of our own is run at least this often, at a quiet moment if there is
    one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All of them."""

    request: RequestConfig = field(default_factory=RequestConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    commit: CommitConfig = field(default_factory=CommitConfig)
    compaction: CompactionConfig = field(default_factory=CompactionConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    lease: LeaseConfig = field(default_factory=LeaseConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    sqlite: SqliteConfig = field(default_factory=SqliteConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
