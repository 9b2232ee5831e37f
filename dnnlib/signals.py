"""Signals that ask a program to end: Ctrl-C, SIGTERM of schedulers, SIGHUP of a terminal that closes."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["ENDING", "catching", "exit_in_order", "leave_terminal"]

ENDING = (signal.SIGTERM, signal.SIGHUP)  # beside Ctrl-C, which Python turns into KeyboardInterrupt


@contextlib.contextmanager
def catching(handler: Callable[[int, Any], None], *numbers: int) -> Iterator[None]:
    """Call the handler at these signals inside, and put back the handlers that were there before.

    A hangup that is ignored, as under nohup, stays ignored.
    """
    before = {}
    try:
        for number in numbers:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            # None: another language's handler, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if old is None else old)


def exit_in_order(number: int, _frame: Any) -> None:
    """Exit as shells report this signal, through every `finally`."""
    leave_terminal(number)
    sys.exit(128 + number)


def leave_terminal(number: int) -> None:
    """Print to nowhere after a hangup: writing to a terminal that has gone raises an OSError."""
    if number == signal.SIGHUP:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for fd in (1, 2):
            with contextlib.suppress(OSError):  # one that is closed
                if stat.S_ISCHR(os.fstat(fd).st_mode):
                    os.dup2(nowhere, fd)
        os.close(nowhere)
