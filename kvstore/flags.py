"""The flags of every command: names, environment variables, defaults, and what texts become.

Names, variables (``ETCD_`` and the name in capitals) and spelling are etcd's where etcd has them,
and etcdctl's where it has them; what is ours alone has variables that begin with ``KVSTORE_``. A
flag wins over its variable, which wins over the default.
"""

import re
from collections.abc import Callable
from typing import Final

import click

from kvstore.config import Config
from kvstore.listen import Address, ListenError, check_advertised, parse_urls
from kvstore.logs import LEVELS, LogFormat
from kvstore.options import TransportKind

_OF_ETCD_ALONE: Final = (
    *("auth-token", "auto-compaction-", "auto-tls", "backend-", "bcrypt-cost", "cipher-suites"),
    *("client-cert-allowed-", "client-crl-file", "compact-hash-check-", "compaction-"),
    *("config-file", "corrupt-check-time", "cors", "discovery", "downgrade-check-time"),
    *("election-timeout", "enable-", "experimental-", "feature-gates", "force-new-cluster"),
    *("grpc-keepalive-", "heartbeat-interval", "host-whitelist", "initial-", "listen-peer-urls"),
    *("listen-client-http-urls", "log-rotation-", "logger", "max-learners", "max-snapshots"),
    *("max-wals", "memory-mlock", "metrics", "peer-", "pre-vote", "quota-backend-bytes", "raft-"),
    *("self-signed-cert-validity", "snapshot-", "socket-reuse-", "strict-reconfig-check"),
    *("tls-max-version", "tls-min-version", "unsafe-no-fsync", "v2-deprecation", "wal-dir"),
    *("warning-", "distributed-tracing-", "bootstrap-defrag-"),
)
"""How those flags of etcd begin that have no meaning here."""

_PART = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|ms|s|m|h)")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def is_of_etcd_alone(flag: str) -> bool:
    """Is ``flag``, dashes included, one of etcd that has no meaning here?"""
    return flag.startswith("--") and flag[2:].startswith(_OF_ETCD_ALONE)


def parse_duration(text: str) -> float:
    """Seconds of Go's duration syntax (``10m``, ``1h30m``, ``1.5s``, ``0``); raises ValueError."""
    if text == "0":
        return 0.0
    if not re.fullmatch(f"(?:{_PART.pattern})+", text):
        raise ValueError(f"{text!r} is not a duration such as 10m, 1h30m or 500ms")
    return sum(float(number) * _SECONDS[unit] for number, unit in _PART.findall(text))


def _duration(_: click.Context, __: click.Parameter, text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _filled(_: click.Context, __: click.Parameter, text: str | None) -> str | None:
    if text == "":
        raise click.BadParameter("this is empty")
    return text


def _some_time(context: click.Context, parameter: click.Parameter, text: str) -> float:
    seconds = _duration(context, parameter, text)
    if not seconds:
        raise click.BadParameter("this takes some time: 0 is too little")
    return seconds


def _addresses(_: click.Context, __: click.Parameter, text: str) -> list[Address]:
    try:
        return parse_urls(text) if text else []
    except ListenError as error:
        raise click.BadParameter(str(error)) from error


def _advertised(context: click.Context, parameter: click.Parameter, text: str) -> list[str]:
    urls = _words(context, parameter, text)
    try:
        check_advertised(urls)
    except ListenError as error:
        raise click.BadParameter(str(error)) from error
    return urls


def _words(_: click.Context, __: click.Parameter, text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _flag(
    name: str,
    *,
    default: str | int | None,
    meaning: str,
    convert: Callable[[click.Context, click.Parameter, str], object] | None = None,
    kind: click.IntRange | click.Choice[str] | type[str] = str,
    prefix: str = "ETCD_",
) -> click.Option:
    """One flag with the environment variable that belongs to it."""
    return click.Option(
        [f"--{name}"],
        default=default,
        envvar=prefix + name.upper().replace("-", "_"),
        help=meaning,
        show_default=default not in {None, ""},
        show_envvar=True,
        callback=convert,
        type=kind,
    )


def _switch(name: str, *, meaning: str, prefix: str = "ETCD_") -> click.Option:
    """A flag that is on when given alone, as Go reads ``--flag`` and ``--flag=true|false``; without
    ``prefix`` it has no variable.
    """
    return click.Option(
        [f"--{name}"],
        default=False,
        is_flag=False,
        flag_value=True,
        type=bool,
        envvar=prefix + name.upper().replace("-", "_") if prefix else None,
        help=meaning,
        show_envvar=True,
    )


_SIZE = click.IntRange(min=1)
_SIZE.name = "whole number"
_UNSIGNED_32 = click.IntRange(min=1, max=2**32 - 1)
_UNSIGNED_32.name = "whole number"
"""What a setting of HTTP/2 can say (RFC 9113 section 6.5.1)."""

DATA_FLAGS: Final = [
    _flag(
        "data-dir",
        default=None,
        meaning="Directory of SQLite files.  [default: NAME.kvstore]",
    ),
    _flag(
        "config",
        default=None,
        convert=_filled,
        prefix="KVSTORE_",
        meaning="File of shards and routes, YAML.  [default: one shard]",
    ),
    _flag(
        "backend",
        default=None,
        convert=_filled,
        prefix="KVSTORE_",
        meaning="Database of the only shard: sqlite:PATH or postgresql://...; instead of --config."
        "  [default: sqlite:kvstore.db]",
    ),
]
"""Where the data is."""

SERVE_FLAGS: Final = [
    _flag("name", default="default", meaning="Name of this server, as clients see it."),
    *DATA_FLAGS,
    _flag(
        "shard-timeout",
        default="5s",
        convert=_some_time,
        prefix="KVSTORE_",
        meaning="How long a shard may not commit before its requests are refused at once.",
    ),
    _switch(
        "take-over",
        meaning="Take a home shard in PostgreSQL from the server that holds it; for one start.",
        prefix="",
    ),
    _switch(
        "accept-data-loss",
        meaning="Serve databases that have lost acknowledged changes: revisions jump ahead, and all"
        " before count as compacted; for one start.",
        prefix="",
    ),
    _flag(
        "listen-client-urls",
        default="http://localhost:2379",
        convert=_addresses,
        meaning="Where to serve clients: http, https or unix URLs, separated by commas.",
    ),
    _flag(
        "advertise-client-urls",
        default="",
        convert=_advertised,
        meaning="What clients are told to connect to.  [default: where it listens]",
    ),
    _flag(
        "listen-metrics-urls",
        default="",
        convert=_addresses,
        meaning="Where else to serve /metrics and health checks, and nothing but these.",
    ),
    _flag(
        "max-request-bytes",
        default=Config().request.request_bytes_max,
        kind=_SIZE,
        meaning="Largest request that is not refused.",
    ),
    _flag(
        "max-txn-ops",
        default=Config().request.txn_ops_max,
        kind=_SIZE,
        meaning="Most operations in one transaction.",
    ),
    _flag(
        "max-concurrent-streams",
        default=Config().transport.streams_per_connection_max,
        kind=_UNSIGNED_32,
        meaning="Most calls at a time on one connection.",
    ),
    _flag(
        "watch-progress-notify-interval",
        default="10m",
        convert=_duration,
        meaning="Silence after which a watcher that asked for it is told how far the store is.",
    ),
    _flag(
        "log-level",
        default="info",
        kind=click.Choice(list(LEVELS)),
        meaning="Least severe level that is logged.",
    ),
    _flag(
        "log-format",
        default=LogFormat.JSON.value,
        kind=click.Choice([kind.value for kind in LogFormat]),
        meaning="Form of the log.",
    ),
    _flag(
        "log-outputs",
        default="default",
        convert=_words,
        meaning="Where the log goes: stderr (default), stdout or files, separated by commas.",
    ),
    _flag("cert-file", default="", meaning="Server certificate, PEM; for https URLs."),
    _flag("key-file", default="", meaning="Key of the server certificate, PEM."),
    _flag(
        "trusted-ca-file",
        default="",
        meaning="Authority of clients' certificates, PEM; if given, one is required.",
    ),
    _switch("client-cert-auth", meaning="Require a client certificate; needs --trusted-ca-file."),
    _flag(
        "cache-bytes",
        default=None,
        kind=_SIZE,
        prefix="KVSTORE_",
        meaning="Memory for values.  [default: a quarter of what this process may use]",
    ),
    _flag(
        "transport",
        default=TransportKind.NATIVE.value,
        kind=click.Choice([kind.value for kind in TransportKind]),
        prefix="KVSTORE_",
        meaning="The server's own HTTP/2, or grpcio to compare with.",
    ),
]

ASK_FLAGS: Final = [
    _flag(
        "endpoints",
        default="http://127.0.0.1:2379",
        convert=_words,
        prefix="ETCDCTL_",
        meaning="Where servers are, separated by commas; the first that answers is asked.",
    ),
    _flag(
        "cacert",
        default="",
        prefix="ETCDCTL_",
        meaning="Authority of the server's certificate, PEM.  [default: the system's]",
    ),
    _flag("cert", default="", prefix="ETCDCTL_", meaning="Certificate to show it, PEM."),
    _flag("key", default="", prefix="ETCDCTL_", meaning="Key of that certificate, PEM."),
]
"""How to reach a running server, as etcdctl has it."""
