"""The command line: flags and environment variables become a ``Config`` and ``ServeOptions``.

Flags, their environment variables (``ETCD_`` and the name in capitals) and their spelling are
etcd's where etcd has them, so that its users find their way: one dash or two, ``--flag=value`` or
``--flag value``. What is etcd's alone (peers, clustering) is refused as unknown. A flag wins over
its variable, which wins over the default.

Whatever a user can get wrong ends with one line on stderr and exit code 2, before data is changed.
"""

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, TextIO

import click

from backends.check import check
from backends.sqlite import SqliteBackend
from kvstore.clock import SystemClock
from kvstore.config import Config
from kvstore.errors import BackendError
from kvstore.listen import Address, ListenError, check_advertised, parse_urls
from kvstore.logs import LEVELS, LogFormat, Logger, make_logger
from kvstore.memory import memory_limit
from kvstore.options import ServeOptions, TlsOptions, TransportKind
from kvstore.server import EXIT_FAILED, EXIT_OK, StartError, run
from kvstore.version import ETCD_VERSION, own_version

EXIT_REFUSED: Final = 2
"""Nothing was done: wrong flags, no access, address in use, data of another program or process."""

DATABASE: Final = "kvstore.db"
"""Name of the database in the data directory."""

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


def _switch(name: str, *, meaning: str) -> click.Option:
    """A flag that is on when given alone, as Go reads ``--flag`` and ``--flag=true|false``."""
    return click.Option(
        [f"--{name}"],
        default=False,
        is_flag=False,
        flag_value=True,
        type=bool,
        envvar="ETCD_" + name.upper().replace("-", "_"),
        help=meaning,
        show_envvar=True,
    )


_SIZE = click.IntRange(min=1)
_SIZE.name = "whole number"
_UNSIGNED_32 = click.IntRange(min=1, max=2**32 - 1)
_UNSIGNED_32.name = "whole number"
"""What a setting of HTTP/2 can say (RFC 9113 section 6.5.1)."""


_DATA_DIR = _flag(
    "data-dir", default=None, meaning="Directory of the database.  [default: NAME.kvstore]"
)

_SERVE_FLAGS = [
    _flag("name", default="default", meaning="Name of this server, as clients see it."),
    _DATA_DIR,
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


def _show_version(context: click.Context, _: click.Parameter, asked: bool) -> None:  # noqa: FBT001
    if asked:
        _tell_version()
        context.exit()


@click.group(no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="The same as the command.",
)
def cli() -> None:
    """A server that speaks the etcd v3 API over SQLite."""


@cli.command(params=_SERVE_FLAGS)
def serve(
    *,
    name: str,
    data_dir: str | None,
    listen_client_urls: list[Address],
    advertise_client_urls: list[str],
    listen_metrics_urls: list[Address],
    max_request_bytes: int,
    max_txn_ops: int,
    max_concurrent_streams: int,
    watch_progress_notify_interval: float,
    log_level: str,
    log_format: str,
    log_outputs: list[str],
    cert_file: str,
    key_file: str,
    trusted_ca_file: str,
    client_cert_auth: bool,
    cache_bytes: int | None,
    transport: str,
) -> int:
    """Serve clients until SIGTERM or SIGINT; a second signal ends the process at once."""
    bounds = bounds_within(memory_limit())
    message_bytes_max = max_request_bytes + bounds.request.request_overhead_bytes
    if message_bytes_max > bounds.transport.request_bytes_total_max:
        most = bounds.transport.request_bytes_total_max - bounds.request.request_overhead_bytes
        raise StartError(f"--max-request-bytes may be {most} at most with the memory there is")
    config = replace(
        bounds,
        request=replace(
            bounds.request, request_bytes_max=max_request_bytes, txn_ops_max=max_txn_ops
        ),
        store=replace(bounds.store, cache_bytes_max=cache_bytes or bounds.store.cache_bytes_max),
        transport=replace(
            bounds.transport,
            streams_per_connection_max=max_concurrent_streams,
            message_bytes_max=message_bytes_max,
        ),
        watch=replace(bounds.watch, progress_interval=watch_progress_notify_interval),
    )
    if not name:
        raise StartError("--name is empty")
    if not listen_client_urls:
        raise StartError("--listen-client-urls is empty")
    addresses = [*listen_client_urls, *listen_metrics_urls]
    files = (cert_file, key_file, trusted_ca_file)
    options = ServeOptions(
        name=name,
        data_dir=Path(data_dir or f"{name}.kvstore"),
        listen_client_urls=listen_client_urls,
        advertise_client_urls=advertise_client_urls,
        listen_metrics_urls=listen_metrics_urls,
        tls=_tls(*files, client_cert_auth=client_cert_auth, addresses=addresses),
        transport=TransportKind(transport),
    )
    logger = make_logger(
        level=log_level,
        log_format=LogFormat(log_format),
        clock=SystemClock(),
        outputs=[_output(output) for output in log_outputs],
    )
    _warn_of_idle_settings(logger, listen_client_urls if any(files) else [])
    _refuse_data_of_etcd(options.data_dir)
    database = options.data_dir / DATABASE
    backends = [SqliteBackend(database, config=config.sqlite)]
    return run(backends, config, options, clock=SystemClock(), log=logger)


def bounds_within(memory: int) -> Config:
    """Bounds for a process that may use ``memory`` bytes: shares of it where that is less."""
    bounds = Config()
    limits = bounds.transport
    return replace(
        bounds,
        store=replace(bounds.store, cache_bytes_max=memory // 4),
        transport=replace(
            limits,
            request_bytes_total_max=min(limits.request_bytes_total_max, memory // 8),
            output_bytes_total_max=min(limits.output_bytes_total_max, memory // 4),
        ),
    )


def _warn_of_idle_settings(logger: Logger, certified: Sequence[Address]) -> None:
    """Say what has no effect: foreign variables, certificates for ``certified`` without TLS."""
    unknown = unknown_variables(os.environ)
    if unknown:
        logger.warning("unrecognized environment variables are ignored", names=unknown)
    for address in certified:
        if not address.tls:
            logger.warning("certificate files have no effect on a URL without TLS", url=address.url)


def _refuse_data_of_etcd(directory: Path) -> None:
    try:
        found = (directory / "member").is_dir()
    except OSError as error:
        raise StartError(f"cannot look into {directory}: {error.strerror}") from error
    if found:
        raise StartError(f"{directory} is a data directory of etcd")


def _tls(
    cert_file: str,
    key_file: str,
    trusted_ca_file: str,
    *,
    client_cert_auth: bool,
    addresses: Sequence[Address],
) -> TlsOptions | None:
    """As in etcd, a trusted authority alone is enough to require client certificates.

    The switch is refused where it has no effect; None if no address is for TLS.
    """
    secured = any(address.tls for address in addresses)
    if client_cert_auth and not trusted_ca_file:
        raise StartError("--client-cert-auth needs --trusted-ca-file")
    if client_cert_auth and not secured:
        raise StartError("--client-cert-auth needs an https URL")
    if not secured:
        return None
    if not cert_file or not key_file:
        raise StartError("https URLs need --cert-file and --key-file")
    return TlsOptions(
        cert_file=Path(cert_file),
        key_file=Path(key_file),
        trusted_ca_file=Path(trusted_ca_file) if trusted_ca_file else None,
    )


def _output(name: str) -> TextIO:
    if name in {"default", "stderr"}:
        return sys.stderr
    if name == "stdout":
        return sys.stdout
    try:
        return Path(name).open("a", encoding="utf-8")
    except OSError as error:
        raise StartError(f"cannot write the log to {name}: {error.strerror}") from error


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Names of ``ETCD_`` variables that are no flag of ``serve``, sorted."""
    known = {option.envvar for option in serve.params}
    return sorted(name for name in environment if name.startswith("ETCD_") and name not in known)


@cli.command("check", params=[_DATA_DIR])
def check_data(*, data_dir: str | None) -> int:
    """Look for damage in a data directory that no server uses, without changing anything."""
    report = check(Path(data_dir or "default.kvstore") / DATABASE)
    facts = {
        "shard": report.shard,
        "cluster_id": f"{report.cluster_id:x}",
        "member_id": f"{report.member_id:x}",
        "schema_version": report.schema_version,
        "epoch": report.epoch,
        "revision": report.tip,
        "compact_revision": report.compact_revision,
        "keys": report.live_keys,
        "rows": report.rows,
        "compactable_rows": report.compactable_rows,
        "leases": report.leases,
        "findings": report.findings_total,
    }
    for name, fact in facts.items():
        click.echo(f"{name} {fact}")
    for finding in report.findings:
        click.echo(f"finding: {finding}")
    return EXIT_OK if report.sound else EXIT_FAILED


@cli.command()
def version() -> int:
    """Show the versions of this program and of the API that it serves."""
    _tell_version()
    return EXIT_OK


def _tell_version() -> None:
    click.echo(f"kvstore {own_version()}")
    click.echo(f"etcd API {ETCD_VERSION}")
    click.echo(f"Python {sys.version.split()[0]}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (``sys.argv`` without its first word if None); returns the exit code."""
    if not __debug__:
        return _refuse("assertions guard the data: run without -O and PYTHONOPTIMIZE")
    words = sys.argv[1:] if arguments is None else arguments
    if not words:
        return _refuse("no command is given; try kvstore --help")
    try:
        code: int | None = cli.main(two_dashes(words), prog_name="kvstore", standalone_mode=False)
    except click.NoSuchOption as error:
        if _is_of_etcd_alone(error.option_name):
            return _refuse(f"kvstore has no {error.option_name}, a flag of etcd")
        return _refuse(error.format_message())
    except click.ClickException as error:
        return _refuse(error.format_message())
    except click.Abort:
        return _refuse("aborted")
    except (StartError, BackendError) as error:
        return _refuse(str(error))
    return code or EXIT_OK


def two_dashes(words: Sequence[str]) -> list[str]:
    """Go's flags may have one dash: known ones get their second, everything else stays."""
    commands = [cli, *cli.commands.values()]
    known = {name for command in commands for p in command.params for name in p.opts}

    def is_flag(name: str) -> bool:
        return name in known or _is_of_etcd_alone(name)

    return ["-" + word if is_flag("-" + word.split("=", 1)[0]) else word for word in words]


def _is_of_etcd_alone(flag: str) -> bool:
    return flag.startswith("--") and flag[2:].startswith(_OF_ETCD_ALONE)


def _refuse(reason: str) -> int:
    sys.stderr.write("kvstore: " + " ".join(reason.split()) + "\n")
    return EXIT_REFUSED
