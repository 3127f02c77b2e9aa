"""The command `kvstore-bench`."""

import click


@click.command()
@click.version_option(package_name="kvstore", prog_name="kvstore-bench")
def main() -> None:
    """Measure a server that speaks the etcd v3 API."""
