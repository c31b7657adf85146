"""How many CPUs this process may really use."""

from __future__ import annotations

import math
import os
from pathlib import Path

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def _numbers(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def cgroup_quota(root: Path = _CGROUP_ROOT, membership: Path = _MEMBERSHIP) -> float | None:
    """CPUs' worth of time the control groups (v1 or v2) grant this process; None without a limit.

    A limit anywhere between the process's group and the root binds, so the smallest counts. Inside a container the
    group's own folder is often mounted as the root; then the path of `membership` is not there, only the root counts.
    """
    quotas = []
    for line in membership.read_text().splitlines() if membership.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base = root
        elif "cpu" in controllers.split(","):
            base = next((root / name for name in (controllers, "cpu") if (root / name).is_dir()), root)
        else:
            continue
        folder = base / path.strip("/")
        for group in (folder, *folder.parents):
            limit = _numbers(group / "cpu.max")  # v2: "<quota or max> <period>", microseconds
            if not limit:
                limit = _numbers(group / "cpu.cfs_quota_us") + _numbers(group / "cpu.cfs_period_us")  # v1: -1 is none
            if len(limit) == 2 and limit[0] not in ("max", "-1") and float(limit[1]) > 0:
                quotas.append(float(limit[0]) / float(limit[1]))
            if group == base:
                break
    return min(quotas, default=None)


def usable_cpus() -> int:
    """Threads to compute with: the smallest of CPU affinity, control-group quota and `OMP_NUM_THREADS`, at least 1."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        count = os.cpu_count() or 1
    quota = cgroup_quota()
    if quota is not None:
        count = min(count, math.ceil(quota))
    wish = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # OpenMP allows a list, one a nesting level
    if wish.isdecimal() and int(wish) > 0:
        count = min(count, int(wish))
    return max(count, 1)
