"""One process or many, CUDA, CPU or MPS: found once by `init()`, asked for everywhere else."""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import click
import psutil
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # noqa: F401  (loaded after init(), its default arguments would keep the group alive)
from tqdm import tqdm

import dnnlib
from torch_utils import misc

__all__ = [
    "LoneError",
    "all_gather_object",
    "all_reduce_max",
    "all_reduce_sum",
    "barrier",
    "broadcast_object",
    "device",
    "ended",
    "get_rank",
    "get_world_size",
    "guard",
    "init",
    "on_rank0",
    "print0",
    "progress_bar",
    "shared",
    "shutdown",
    "together",
]

_device: torch.device | None = None
_processes: list[tuple[str, int]] = []  # machine and process id of every rank
_PATIENCE = 3.0  # seconds in which a process whose connections are gone has ended


class LoneError(dnnlib.UserError):
    """A mistake or misfortune that the other processes do not meet: the one that does reports it, whatever its rank."""

    lone = True


def _env(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def _choose_device(name: str, local_rank: int, processes: int) -> torch.device:
    def refuse(found: str) -> None:
        raise click.UsageError(f"--device={name}: {found}")

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and processes == 1 and torch.backends.mps.is_available():
            name = "mps"
    if name == "cpu":
        return torch.device("cpu")
    if name == "cuda":
        if not torch.cuda.is_available():
            refuse("no CUDA device here; use --device=cpu or --device=auto")
        if local_rank >= torch.cuda.device_count():
            refuse(
                f"process {local_rank} of this machine has no GPU, there are {torch.cuda.device_count()}; "
                "lower --nproc_per_node"
            )
        return torch.device("cuda", local_rank)
    if name == "mps":
        if not torch.backends.mps.is_available():
            refuse("no MPS device here; use --device=cpu or --device=auto")
        if processes > 1:
            refuse("MPS runs one process; use --device=cpu or start without torchrun")
        return torch.device("mps")
    refuse("choose auto, cpu, cuda or mps")
    raise AssertionError


def _store() -> dist.Store:
    """Where the processes find each other's addresses.

    torchrun keeps one store for all its restarts, in which a restarted process would find the addresses of dead ones.
    Machines may disagree on the number of restarts, so it tells lives apart on a single machine only.
    """
    store, _, _ = next(dist.rendezvous("env://"))
    if _env("LOCAL_WORLD_SIZE", 1) < get_world_size():
        return store
    return dist.PrefixStore(f"life{_env('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def init(device: str = "auto") -> torch.device:
    """Choose this process's device and, under torchrun, join the other processes (NCCL on GPUs, gloo on CPUs).

    `device`: auto, cpu, cuda or mps. Reads RANK, WORLD_SIZE and LOCAL_RANK. Later calls return the first one's device.
    Raises click.UsageError when there is no such device.
    """
    global _device
    if _device is not None:
        return _device
    world_size = _env("WORLD_SIZE", 1)
    chosen = _choose_device(device, _env("LOCAL_RANK", 0) if world_size > 1 else 0, world_size)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if chosen.type == "cpu":
        misc.keep_freed_memory()
    if world_size > 1 and not dist.is_initialized():
        # Objects travel over gloo even beside NCCL, so that they cost no GPU memory and no GPU synchronisation.
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=_store(), rank=get_rank(), world_size=world_size)
        # A group that still stands when Python's finalisation begins aborts the process.
        atexit.register(shutdown)
        _processes[:] = all_gather_object((socket.gethostname(), os.getpid()))
    _device = chosen
    return chosen


def device() -> torch.device:
    """The device `init()` chose. Raises RuntimeError before that."""
    if _device is None:
        raise RuntimeError("torch_utils.distributed.init() has not been called")
    return _device


def get_rank() -> int:
    """This process's number, 0 to world size - 1; known from the environment even before `init()`."""
    return _env("RANK", 0) if get_world_size() > 1 else 0


def get_world_size() -> int:
    """Number of processes; known from the environment even before `init()`."""
    return _env("WORLD_SIZE", 1)


def print0(*args: Any, **kwargs: Any) -> None:
    """print() on rank 0, nothing elsewhere."""
    if get_rank() == 0:
        print(*args, **kwargs)


def barrier() -> None:
    """Wait until every process is here."""
    if get_world_size() > 1:
        all_gather_object(None)  # dist.barrier() under NCCL guesses a device and warns


def broadcast_object(obj: Any) -> Any:
    """Rank 0's `obj`, on every process."""
    if get_world_size() == 1:
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_gather_object(obj: Any) -> list[Any]:
    """Every process's `obj`, in the order of ranks, on every process."""
    if get_world_size() == 1:
        return [obj]
    result: list[Any] = [None] * get_world_size()
    dist.all_gather_object(result, obj)
    return result


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of `tensor` over processes, as a new tensor of the same shape (the same one for a single process)."""
    if get_world_size() == 1:
        return tensor
    result = tensor.clone()
    dist.all_reduce(result)
    return result


def all_reduce_max(tensor: torch.Tensor) -> torch.Tensor:
    """Largest `tensor` over processes, by element, as `all_reduce_sum`."""
    if get_world_size() == 1:
        return tensor
    result = tensor.clone()
    dist.all_reduce(result, dist.ReduceOp.MAX)
    return result


def together(fn: Callable[[], Any], rank0_first: bool = False) -> Any:
    """`fn()` of every process; when one fails, all raise. Collective.

    Otherwise the ones that succeeded would wait for the failed one, and an error off rank 0 would not be shown.
    `rank0_first`: the others begin when rank 0 is done (it downloads, they find the file in the cache).
    """
    value = None
    for turn in ("first", "rest") if rank0_first else ("all",):
        error = None
        if turn == "all" or (turn == "first") == (get_rank() == 0):
            try:
                value = fn()
            except Exception as e:
                error = e
        messages = all_gather_object(None if error is None else _describe(error))
        if error is not None:
            raise shared(error)
        for rank, message in enumerate(messages):
            if message is not None:
                raise shared(dnnlib.UserError(f"process {rank}: {message}"))
    return value


def on_rank0(fn: Callable[[], Any]) -> None:
    """Call `fn()` on rank 0 alone; when it fails, all processes raise. Collective."""
    together(fn if get_rank() == 0 else lambda: None)


def progress_bar(**kwargs: Any) -> tqdm:
    """Return a tqdm bar that rank 0 alone shows, and only on a terminal. `kwargs` as tqdm takes them."""
    return tqdm(**dict(disable=None if get_rank() == 0 else True, leave=False) | kwargs)


def shared(error: Exception) -> Exception:
    """Mark an error that every process raises at this point; to be raised. `guard` leaves it as it is."""
    error.shared = True
    return error


@contextlib.contextmanager
def guard(where: Callable[[], str], lone: bool = False) -> Iterator[None]:
    """Inside it an error that comes of another process's end names that process and says `where()` the work was.

    `lone`: mistakes in here are this process's own; it names itself. Processes that fail alone take the others down:
    their collectives fail.
    """
    try:
        yield
    except Exception as e:
        if get_world_size() == 1 or getattr(e, "shared", False):
            raise
        if lone and isinstance(e, (click.ClickException, OSError)):
            raise shared(LoneError(f"process {get_rank()}, {where()}: {_describe(e)}")) from e
        gone = ended() if isinstance(e, RuntimeError) else []  # so are the errors of collectives
        if not gone:
            raise
        names = " and ".join(f"process {rank} (id {_processes[rank][1]})" for rank in gone)
        first = next(rank for rank in range(get_world_size()) if rank not in gone)
        kind = LoneError if get_rank() == first else dnnlib.UserError
        raise shared(kind(f"{names} ended {where()}, so the other processes stop")) from e


def ended() -> list[int]:
    """Ranks on this machine whose process has ended, after waiting a moment for one that is ending."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        gone = [rank for rank, (host, pid) in enumerate(_processes) if host == socket.gethostname() and not _alive(pid)]
        if gone or time.monotonic() > deadline:
            return gone
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def _describe(error: Exception) -> str:
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {error}"


def shutdown() -> None:
    """Leave the other processes and forget the device. Allowed at any time."""
    global _device
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    _device = None
