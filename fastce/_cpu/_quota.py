"""The CPU quota of the process's control group: Linux enforces it, OpenMP does not see it.

Design
------
1. A quota binds all groups below its own, so every ancestor is asked and the least counts.
2. The process's path leads nowhere in a container that shares the host's view of the groups: the folders of that path
   are missing, and the root of the mount is the container's own group. So what is missing is passed over.
3. Both versions of control groups may be mounted side by side, and the quota may be in either.
"""

import contextlib
import functools
import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


@functools.cache
def cpu_quota() -> int | None:
    """Return this process's quota, as it was when first asked: a call to the library must not read files."""
    return read_quota(Path("/"))


def read_quota(root: Path) -> int | None:
    """Return how many threads the quota keeps busy, a fraction rounded up, or None without a quota.

    `root` is the folder that holds ``proc`` and ``sys``.
    """
    limit = min((read_limit(group) for group in find_groups(root)), default=math.inf)
    return None if math.isinf(limit) else max(1, math.ceil(limit))


def find_groups(root: Path) -> Iterator[Path]:
    """Yield the folders, existing or not, of the groups and their ancestors that may limit the process's CPU time."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    mounts = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2; "unified" where version 1 has the first place
            hierarchies = mounts, mounts / "unified"
        elif "cpu" in controllers.split(","):
            hierarchies = mounts / "cpu", mounts / controllers
        else:
            continue
        group = PurePosixPath(path)
        if ".." in group.parts:  # above the mount's root, and not to be reached from here
            group = PurePosixPath("/")
        for hierarchy in hierarchies:
            for ancestor in (group, *group.parents):
                yield hierarchy / ancestor.relative_to("/")


def read_limit(group: Path) -> float:
    """Return the CPU time per time that one group allows, or infinity."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        # ValueError: a sandbox that imitates these files in part is no reason to fail a call.
        with contextlib.suppress(OSError, ValueError):
            quota, period = " ".join((group / name).read_text() for name in names).split()
            if quota not in ("max", "-1"):
                return int(quota) / int(period)
    return math.inf
