"""How many cores this process may use, and how its threads wait for each other (docs/performance.md, A busy machine).

PyTorch's threads come from OpenMP, which reads the environment once, when PyTorch is imported. By default a thread
that waits for the others spins for milliseconds. That is fastest on idle cores: a thread that sleeps wakes up slowly.
But on cores that other programs use, the thread that the others wait for gets no core while they spin, and the program
almost stops. The number of threads never depends on what other programs do, because it changes the results' last bits.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

import psutil

__all__ = ["choose", "cpu_quota", "others_compute", "usable_cores"]

SPIN = "1000"  # turns of the waiting loop before a thread sleeps: some microseconds
WATCH = 0.1  # seconds for which the cores are watched
BUSY = 0.3  # cores that others must use to count: less is the noise of an idle machine


def choose(environ: MutableMapping[str, str]) -> None:
    """Set the variables that OpenMP reads, except where the user has set them.

    Waiting threads spin briefly if other programs use the cores now. A CPU quota, which OpenMP does not know, limits
    the number of threads; the cores that the process is bound to limit it by themselves.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & environ.keys() and others_compute():
        environ["GOMP_SPINCOUNT"] = SPIN
    if cpu_quota() < float("inf"):
        environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))


def others_compute() -> bool:
    """Return whether other programs leave this process fewer idle cores than it may use. Takes a tenth of a second."""
    used = psutil.cpu_percent(WATCH, percpu=True)
    idle = sum(1 - percent / 100 for core, percent in enumerate(used) if core in _bound())
    return idle < usable_cores() - BUSY


def usable_cores() -> int:
    """Return how many cores this process may use: those it is bound to, or fewer if the container has a CPU quota."""
    return max(1, int(min(len(_bound()), cpu_quota())))


def _bound() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def cpu_quota(cgroup: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> float:
    """Return the CPU quota of this process in cores, infinity without one.

    A quota limits all groups below it, so the lowest on the way from this process's group to the root counts. Files of
    Linux control groups of both versions are read: `cpu.max` holds quota and period, `cpu.cfs_quota_us` the quota.
    """
    try:
        with open(cgroup) as f:
            groups = [line.rstrip("\n").split(":", 2) for line in f]
    except OSError:  # not Linux
        return float("inf")
    lowest = float("inf")
    for _, controllers, path in (group for group in groups if len(group) == 3):
        if controllers and "cpu" not in controllers.split(","):
            continue
        for top in (root, os.path.join(root, "cpu"), os.path.join(root, controllers)) if controllers else (root,):
            # In a container the path may be that of the host, which does not exist here: then the root is the group.
            parts = path.strip("/").split("/")
            for depth in range(len(parts) + 1):
                lowest = min(lowest, _quota_of(os.path.join(top, *parts[:depth])))
    return lowest


def _quota_of(folder: str) -> float:
    quota, period = "max", "100000"
    try:
        with open(os.path.join(folder, "cpu.max")) as f:
            quota, period = f.read().split()
    except (OSError, ValueError):
        try:
            with open(os.path.join(folder, "cpu.cfs_quota_us")) as f:
                quota = f.read().strip()
            with open(os.path.join(folder, "cpu.cfs_period_us")) as f:
                period = f.read().strip()
        except OSError:
            return float("inf")
    try:
        cores = float(quota) / float(period)
    except (ValueError, ZeroDivisionError):  # "max"
        return float("inf")
    return cores if cores > 0 else float("inf")  # version 1 writes -1 for no quota
