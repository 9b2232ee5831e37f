"""Share work on the parts of a whole among threads, or among forked processes, and keep the parts in order."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import dnnlib

__all__ = ["ordered_map", "work_in_order"]

AHEAD = 4  # parts that a process makes before it waits for the decision about the first of them


def ordered_map(
    function: Callable[[Any], Any], items: Iterable[Any], workers: int, window: int | None = None
) -> Iterator[Any]:
    """Return `map(function, items)`, computed by `workers` threads and at most `window` results ahead.

    Threads suffice where the work releases the interpreter lock, as decoders of large images do.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers)
    pending = []
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= (window or 2 * workers):
                yield pending.pop(0).result()
        while pending:
            yield pending.pop(0).result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def work_in_order(
    parts: Sequence[Any],
    make: Callable[[Any], tuple[Any, Any]],
    decide: Callable[[Any, Any], Any],
    finish: Callable[[Any, Any], Any],
    workers: int,
) -> list[Any]:
    """Do `summary, data = make(part)`, then `finish(data, decide(part, summary))` for every part.

    Return what `finish` returned, in the order of the parts. `decide` runs in this process, part after part. `make`
    and `finish` run in `workers` processes, of which this one is the first; process k takes parts k, k + workers, ...
    The data stay in their process: only summaries, decisions and what `finish` returns travel. For small images this
    matters, because sending one takes longer than encoding it. Threads would gain nothing, because that work holds the
    interpreter lock.

    The processes are forked, so they share what `make` reads. `make` must not use PyTorch, whose threads do not survive
    a fork, nor the position of a file that is already open. Decisions must be small: they wait in a pipe while a
    process that is ahead sends its summaries. On other systems than Linux, where forking is unsafe or missing, threads
    do `make` and this thread does the rest.

    Raises what `make` raises when the part's turn comes, what `finish` raises as soon as it is known, and UserError
    when a process is gone.
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
            # Ctrl-C reaches all processes of a terminal. Only this process reports it, and it ends the others.
            previous = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            try:
                with warnings.catch_warnings():  # Python 3.12 warns that threads do not survive; we use none of them
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
                with contextlib.suppress(BrokenPipeError):  # the process has ended; its last message says why
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
    """Return the next message of a process, or raise the error that it sent."""
    try:
        good, value = connection.recv()
    except (EOFError, ConnectionResetError):
        raise dnnlib.UserError(
            "a worker process was ended from outside, perhaps because memory ran out; try fewer workers"
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
    """Do the share of one forked process; `theirs` are the parent's ends of the pipes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # a garbage collection would write to the objects of the parent, and so copy their memory
    for end in theirs:  # an end that stays open here keeps other processes waiting when the parent is killed
        end.close()
    try:
        made: deque[Any] = deque()
        finished = []
        for part in parts:
            summary, data = make(part)  # while the parent decides about the parts before
            connection.send((True, summary))
            made.append(data)
            while len(made) > AHEAD or connection.poll():
                finished.append(finish(made.popleft(), connection.recv()))
        while made:
            finished.append(finish(made.popleft(), connection.recv()))
        connection.send((True, finished))
    except Exception as error:
        with contextlib.suppress(OSError):  # the parent has ended, so nobody waits for the message
            connection.send((False, error))
