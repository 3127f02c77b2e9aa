"""The command line: flags and environment variables become a ``Config`` and ``ServeOptions``.

``flags.py`` has the flags: one dash or two, ``--flag=value`` or ``--flag value``. What is etcd's
alone (peers, clustering) is refused as unknown.

Whatever a user can get wrong ends with one line on stderr and exit code 2, before data is changed.
"""

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, TextIO

import click

from backends.check import Report, check
from backends.migration import migrate
from backends.urls import SQLITE
from kvstore.clock import SystemClock
from kvstore.config import Config
from kvstore.databases import Databases
from kvstore.errors import BackendError
from kvstore.flags import ASK_FLAGS, DATA_FLAGS, SERVE_FLAGS, is_of_etcd_alone
from kvstore.listen import Address
from kvstore.logs import LogFormat, Logger, make_logger
from kvstore.memory import memory_limit
from kvstore.options import ServeOptions, TlsOptions, TransportKind
from kvstore.server import EXIT_FAILED, EXIT_OK, StartError, run
from kvstore.shard_file import ShardFileError
from kvstore.shard_table import AskError, ask, draw
from kvstore.version import ETCD_VERSION, own_version

EXIT_REFUSED: Final = 2
"""Nothing was done: wrong flags, no access, address in use, data of another program or process."""

_DATA_DIR: Final = "default.kvstore"


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
    """A server that speaks the etcd v3 API over SQLite and PostgreSQL."""


@cli.command(params=SERVE_FLAGS)
def serve(
    *,
    name: str,
    data_dir: str | None,
    config: str | None,
    backend: str | None,
    shard_timeout: float,
    take_over: bool,
    accept_data_loss: bool,
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
    bounds = replace(
        bounds,
        request=replace(
            bounds.request, request_bytes_max=max_request_bytes, txn_ops_max=max_txn_ops
        ),
        store=replace(bounds.store, cache_bytes_max=cache_bytes or bounds.store.cache_bytes_max),
        commit=replace(bounds.commit, shard_timeout=shard_timeout),
        transport=replace(
            bounds.transport,
            streams_per_connection_max=max_concurrent_streams,
            message_bytes_max=_message_bytes_max(max_request_bytes, bounds),
        ),
        watch=replace(bounds.watch, progress_interval=watch_progress_notify_interval),
        postgres=replace(bounds.postgres, take_over=take_over, accept_data_loss=accept_data_loss),
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
        accept_data_loss=accept_data_loss,
    )
    databases = Databases(config, backend, options.data_dir)
    logger = _make_logger(log_level, log_format, log_outputs)
    _warn_of_idle_settings(logger, listen_client_urls if any(files) else [], databases)
    _refuse_data_of_etcd(options.data_dir)
    shards = databases.config
    return run(databases.backends(bounds), shards, bounds, options, clock=SystemClock(), log=logger)


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


def _message_bytes_max(request_bytes_max: int, bounds: Config) -> int:
    """What the transport takes, so that requests of ``request_bytes_max`` come through."""
    overhead = bounds.request.request_overhead_bytes
    most = bounds.transport.request_bytes_total_max - overhead
    if request_bytes_max > most:
        raise StartError(f"--max-request-bytes may be {most} at most with the memory there is")
    return request_bytes_max + overhead


def _make_logger(level: str, form: str, outputs: Sequence[str]) -> Logger:
    return make_logger(
        level=level,
        log_format=LogFormat(form),
        clock=SystemClock(),
        outputs=[_output(output) for output in outputs],
    )


def _warn_of_idle_settings(
    logger: Logger, certified: Sequence[Address], databases: Databases
) -> None:
    """Say what has no effect: foreign variables, certificates for ``certified`` without TLS, shards
    that get no keys.
    """
    unknown = unknown_variables(os.environ)
    if unknown:
        logger.warning("unrecognized environment variables are ignored", names=unknown)
    for address in certified:
        if not address.tls:
            logger.warning("certificate files have no effect on a URL without TLS", url=address.url)
    routed = {route.shard for route in databases.config.routes}
    for shard in databases.config.names[1:]:
        if shard not in routed:
            logger.warning("a shard has no route and gets no keys", shard=shard)


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


@cli.command("check", params=DATA_FLAGS)
def check_data(*, data_dir: str | None, config: str | None, backend: str | None) -> int:
    """Look for damage in SQLite files that no server uses, without changing anything."""
    databases = Databases(config, backend, Path(data_dir or _DATA_DIR))
    home: Report | None = None
    told: list[list[str]] = []
    sound = True
    for number, (shard, place) in enumerate(databases):
        if place.kind != SQLITE or (number and home is None):
            why = "no SQLite file" if place.kind != SQLITE else "home is no SQLite file"
            told.append([f"shard {shard.name}", f"not checked: {why}"])
            continue
        report = check(Path(place.place), home=home)
        if report.shard != shard.name and config:
            report.find(f"it is shard {report.shard}, not {shard.name}")
        home = home or report
        sound = sound and report.sound
        facts = [f"{name} {fact}" for name, fact in report.facts().items()]
        told.append([*facts, *(f"finding: {finding}" for finding in report.findings)])
    click.echo("\n\n".join("\n".join(lines) for lines in told))
    return EXIT_OK if sound else EXIT_FAILED


@cli.command("migrate", params=DATA_FLAGS)
def migrate_data(*, data_dir: str | None, config: str | None, backend: str | None) -> int:
    """Bring every database to the schema of this program; make the tables of PostgreSQL."""
    directory = Path(data_dir or _DATA_DIR)
    for shard, place in Databases(config, backend, directory):
        steps = migrate(shard.backend_url, data_dir=directory, config=Config())
        try:
            before, after = asyncio.run(steps)
        except BackendError as error:
            raise BackendError(f"shard {shard.name}: {error}") from error
        told = f"schema {before} -> {after}" if after else "there is no store yet"
        click.echo(f"{shard.name} {place} {told}")
    return EXIT_OK


@cli.command("shards", params=ASK_FLAGS)
def show_shards(*, endpoints: list[str], cacert: str, cert: str, key: str) -> int:
    """Show the shards of a running server and how they are."""
    click.echo(draw(ask(endpoints, cacert=cacert, cert=cert, key=key)))
    return EXIT_OK


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
        if is_of_etcd_alone(error.option_name):
            return _refuse(f"kvstore has no {error.option_name}, a flag of etcd")
        return _refuse(error.format_message())
    except click.ClickException as error:
        return _refuse(error.format_message())
    except click.Abort:
        return _refuse("aborted")
    except (StartError, ShardFileError, BackendError, AskError) as error:
        return _refuse(str(error))
    return code or EXIT_OK


def two_dashes(words: Sequence[str]) -> list[str]:
    """Go's flags may have one dash: known ones get their second, everything else stays."""
    commands = [cli, *cli.commands.values()]
    known = {name for command in commands for p in command.params for name in p.opts}

    def is_flag(name: str) -> bool:
        return name in known or is_of_etcd_alone(name)

    return ["-" + word if is_flag("-" + word.split("=", 1)[0]) else word for word in words]


def _refuse(reason: str) -> int:
    sys.stderr.write("kvstore: " + " ".join(reason.split()) + "\n")
    return EXIT_REFUSED
