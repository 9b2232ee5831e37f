"""Work on parts of a whole in processes that were forked from this one, which decides in order what becomes of each."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import dnnlib
from archives.reader import ordered_map

__all__ = ["work_in_order"]

AHEAD = 4  # parts that a process makes before it waits for what is decided about the first


def work_in_order(
    parts: Sequence[Any],
    make: Callable[[Any], tuple[Any, Any]],
    decide: Callable[[Any, Any], Any],
    finish: Callable[[Any, Any], Any],
    workers: int,
) -> list[Any]:
    """`summary, data = make(part)`, then `finish(data, decide(part, summary))`, for every part; what `finish` returns.

    `decide` is called here, part after part; `make` and `finish` by `workers` processes, of which this is the first,
    the k-th taking parts k, k + workers, ... So only summaries, decisions and what `finish` returns travel: small
    images would cost more to send than to encode, and threads gain nothing, for the work holds the interpreter lock.
    Forked processes share what `make` reads. It must not use PyTorch, whose threads are not forked, nor the position
    of a file opened before. Where forking is not safe (macOS) or not there, threads make and this one finishes.

    Decisions must be small: they wait in a pipe while a process that is ahead sends its summaries.

    Raises what `make` raises, in its turn, what `finish` raises, once it is known; UserError when a process is gone.
    """
    workers = min(workers, len(parts))
    finished: list[Any] = []
    if workers <= 1 or sys.platform != "linux":
        for part, (summary, data) in zip(parts, ordered_map(make, parts, workers), strict=True):
            finished.append(finish(data, decide(part, summary)))
        return finished
    context = multiprocessing.get_context("fork")
    ours: list[Connection] = []
    processes: list[multiprocessing.process.BaseProcess] = []
    try:
        for k in range(1, workers):
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
            if i % workers == 0:
                summary, data = make(part)
                finished.append(finish(data, decide(part, summary)))
            else:
                connection = ours[i % workers - 1]
                decision = decide(part, _receive(connection))
                with contextlib.suppress(BrokenPipeError):  # gone: its next message says why
                    connection.send(decision)
        by_worker = [finished, *map(_receive, ours)]
        return [by_worker[i % workers][i // workers] for i in range(len(parts))]
    finally:
        for connection in ours:
            connection.close()
        started = [process for process in processes if process.pid is not None]
        for process in started:
            process.terminate()
        for process in started:
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
    finish: Callable[[Any, Any], Any],
    connection: Connection,
    theirs: Sequence[Connection],
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # what was there before stays as it is: to look at it for garbage would copy its memory
    for end in theirs:  # held open here, they would keep others waiting for a parent that was killed
        end.close()
    try:
        made: deque[Any] = deque()
        finished = []
        for part in parts:
            summary, data = make(part)  # while those before are decided about
            connection.send((True, summary))
            made.append(data)
            while len(made) > AHEAD or connection.poll():
                finished.append(finish(made.popleft(), connection.recv()))
        while made:
            finished.append(finish(made.popleft(), connection.recv()))
        connection.send((True, finished))
    except Exception as error:
        with contextlib.suppress(OSError):  # the parent is gone, and nobody waits for the rest
            connection.send((False, error))
