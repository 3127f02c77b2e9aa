"""Versions: this program's own, and the etcd release whose behaviour it shows to clients."""

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

ETCD_VERSION = "3.6.16"
"""The release that the tests compare with; clients read it (``Status``, ``/version``) to know what
they may ask."""
ETCD_CLUSTER_VERSION = "3.6.0"
"""etcd's version of what all members of a cluster can do: major and minor."""
STORAGE_VERSION = "3.6.0"
"""Likewise of the storage."""


def own_version() -> str:
    """The installed distribution's version; ``0+source`` when run from a tree not installed."""
    try:
        return installed_version("kvstore")
    except PackageNotFoundError:
        return "0+source"
