"""How much memory is ours: the machine's, or what control groups leave of it."""

import os
from pathlib import Path

import pytest

from kvstore.memory import memory_limit

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def tree(root: Path, files: dict[str, str]) -> Path:
    """Write ``files`` below ``root``."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, MACHINE),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.max": "1048576\n"}, 1 << 20),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "max\n"}, MACHINE),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "2097152\n"}, 2 << 20),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/memory.max": "1\n"}, MACHINE),
        (
            {
                "proc/self/cgroup": "4:cpu,memory:/a\n1:pids:/b\n0::/\n",
                "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "3145728\n",
            },
            3 << 20,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/a\n",
                "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "9223372036854771712\n",
            },
            MACHINE,
        ),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": f"{MACHINE * 2}"}, MACHINE),
    ],
)
def test_limits(files: dict[str, str], limit: int, tmp_path: Path) -> None:
    """The smallest of machine and groups, both versions, the group's ancestors included."""
    assert memory_limit(tree(tmp_path, files)) == limit


def test_this_machine() -> None:
    """Whatever there is here, it is memory and not more than the machine has."""
    assert 1 << 20 < memory_limit() <= MACHINE
