"""Work on parts of a whole in processes that were forked from this one, which decides in order what becomes of each."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import dnnlib
from training.archive_reader import ordered_map

__all__ = ["work_in_order"]


def work_in_order(
    parts: Sequence[Any],
    make: Callable[[Any], tuple[Any, Any]],
    decide: Callable[[Any, Any], Any],
    finish: Callable[[Any, Any], None],
    workers: int,
) -> None:
    """`summary, data = make(part); finish(data, decide(part, summary))` for every part.

    `decide` is called here, part after part; `make` and `finish` by `workers` processes, worker k taking parts k,
    k + workers, ..., so that only summaries and decisions travel: small images would cost more to send than to encode,
    and threads gain nothing, for the work holds the interpreter lock. Forked processes share what `make` reads. It
    must not use PyTorch, whose threads are not forked, nor the position of a file opened before. Where forking is not
    safe (macOS) or not there, threads make and this one finishes.

    Raises what `make` and `finish` raise, in its turn, and UserError when a process is gone.
    """
    workers = min(workers, len(parts))
    if workers <= 1 or sys.platform != "linux":
        for part, (summary, data) in zip(parts, ordered_map(make, parts, workers), strict=True):
            finish(data, decide(part, summary))
        return
    context = multiprocessing.get_context("fork")
    ours: list[Connection] = []
    processes: list[multiprocessing.process.BaseProcess] = []
    try:
        for k in range(workers):
            here, there = context.Pipe()
            ours.append(here)
            args = (parts[k::workers], make, finish, there, ours)
            processes.append(context.Process(target=_work, args=args, daemon=True))
            # A Ctrl-C goes to all processes of a terminal: this one reports it and ends the others.
            previous = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            try:
                with warnings.catch_warnings():  # Python 3.12 warns of threads, which this work does not need
                    warnings.simplefilter("ignore", DeprecationWarning)
                    processes[-1].start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, previous)
            there.close()
        for i, part in enumerate(parts):
            decision = decide(part, _receive(ours[i % workers]))
            ours[i % workers].send(decision)
        for connection in ours:
            _receive(connection)  # the last part is finished
    finally:
        for connection in ours:
            connection.close()
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()


def _receive(connection: Connection) -> Any:
    try:
        good, value = connection.recv()
    except (EOFError, ConnectionResetError):
        raise dnnlib.UserError(
            "--workers: a process was ended from outside, perhaps for want of memory; try fewer"
        ) from None
    if not good:
        raise value
    return value


def _work(
    parts: Sequence[Any],
    make: Callable[[Any], tuple[Any, Any]],
    finish: Callable[[Any, Any], None],
    connection: Connection,
    theirs: Sequence[Connection],
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for end in theirs:  # held open here, they would keep others waiting for a parent that was killed
        end.close()
    try:
        unfinished = []
        for part in parts:
            summary, data = make(part)  # while the part before is decided about
            for before in unfinished:
                finish(before, connection.recv())
            connection.send((True, summary))
            unfinished = [data]
        for before in unfinished:
            finish(before, connection.recv())
        connection.send((True, None))
    except Exception as error:
        with contextlib.suppress(OSError):  # the parent is gone, and nobody waits for the rest
            connection.send((False, error))
