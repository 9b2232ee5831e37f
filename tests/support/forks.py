"""A process of its own for a piece of Python, without another start and other imports."""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable

__all__ = ["run_apart"]

MEMORY, CPU, DEADLINE = 1 << 30, 20, 100  # bytes beyond those of this process, and seconds


def run_apart(act: Callable[[], object]) -> tuple[int, bytes]:
    """Call `act` in a forked process with little memory and time. Return its exit status and what it wrote to stderr.

    The status is 0 or, after an exception, 1, with its traceback; or that of a signal, as `subprocess` has it.
    """
    with tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            _child(act, err.fileno())
        until = time.monotonic() + DEADLINE
        while not (done := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > until:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        err.seek(0)
        return os.waitstatus_to_exitcode(done[1]), err.read()


def _child(act: Callable[[], object], err: int) -> None:
    status = 1
    try:
        os.dup2(err, 2)
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        sys.stderr = open(2, "w", closefd=False)
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU,) * 2)
        act()
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)
