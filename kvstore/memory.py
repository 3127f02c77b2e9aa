"""How much memory this process may use: the machine's, or less if a control group says so."""

import os
from pathlib import Path

_UNLIMITED = 1 << 60
"""Version 1 control groups spell "no limit" as a number near 2^63."""


def memory_limit(root: Path = Path("/")) -> int:
    """Bytes: the smallest of the machine's memory and the limits of this process's control groups.

    ``root`` is where ``proc`` and ``sys`` are found. Both versions of control groups are
    understood; inside a container their path is relative to a root that hides the host's.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            limits += _limits(root / "sys/fs/cgroup", path, "memory.max")
        elif "memory" in controllers.split(","):
            limits += _limits(root / "sys/fs/cgroup/memory", path, "memory.limit_in_bytes")
    return min(limits)


def _limits(mount: Path, path: str, name: str) -> list[int]:
    """Limits of the group at ``path`` and of every group above it."""
    group = mount / path.lstrip("/")
    groups = [at for at in (group, *group.parents) if at.is_relative_to(mount)]
    numbers = [int(text) for at in groups for text in _lines(at / name) if text.isdigit()]
    return [number for number in numbers if number < _UNLIMITED]


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
