"""One process or many, on CUDA, CPU or MPS: `init()` finds out once, and all other code asks here.

The choice of a device belongs to the command line: every script has the option --device and passes its value on. So
the errors of `init()` name this option and torchrun's --nproc_per_node. They are usage errors, with exit code 2.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import click
import psutil
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # noqa: F401  (imported after init(), it would keep the group alive)
from tqdm import tqdm

import dnnlib
from torch_utils import misc

__all__ = [
    "all_gather_object",
    "all_reduce_max",
    "all_reduce_sum",
    "barrier",
    "broadcast",
    "broadcast_object",
    "from_rank0",
    "get_rank",
    "get_world_size",
    "guard",
    "init",
    "on_rank0",
    "print0",
    "progress_bar",
    "rows_from_rank0",
    "rows_to_rank0",
    "share",
    "shared",
    "shutdown",
    "to_rank0",
    "together",
]

_device: torch.device | None = None
_exit_code: int | None = None  # of a process that an error ends while others may still wait for it
_processes: list[tuple[str, int]] = []  # machine and process id of every rank
_NVIDIA_DRIVER = "/proc/driver/nvidia/version"  # there when Linux has loaded the driver
_PATIENCE = 3.0  # seconds after which a process that has lost its connections has ended


class _LoneError(dnnlib.UserError):
    """An error that only this process meets, so this process reports it, whatever its rank."""

    lone = True


def _env(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def _choose_device(name: str, local_rank: int, processes: int) -> torch.device:
    def refusal(found: str) -> click.UsageError:
        return click.UsageError(f"--device={name}: {found}")

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and processes == 1 and torch.backends.mps.is_available():
            name = "mps"
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        if name == "cpu" and os.path.exists(_NVIDIA_DRIVER) and not hidden:
            newer = f"CUDA {torch.version.cuda} may need a newer driver, or this process may not see the GPU"
            why = newer if torch.version.cuda else "it is built for CPUs"
            print0(f"Note: this PyTorch does not find the machine's NVIDIA GPU ({why}); computing on the CPU")
    if name == "cpu":
        return torch.device("cpu")
    if name == "cuda":
        if not torch.cuda.is_available():
            raise refusal("there is no CUDA device on this machine; use --device=cpu or --device=auto")
        if local_rank >= torch.cuda.device_count():
            raise refusal(
                f"process {local_rank} of this machine has no GPU, there are {torch.cuda.device_count()}; "
                "lower torchrun's --nproc_per_node"
            )
        return torch.device("cuda", local_rank)
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise refusal("there is no MPS device on this machine; use --device=cpu or --device=auto")
        if processes > 1:
            raise refusal("MPS supports only one process; use --device=cpu or start without torchrun")
        return torch.device("mps")
    raise refusal("choose auto, cpu, cuda or mps")


def _store() -> dist.Store:
    """Return the store in which the processes find each other's addresses.

    torchrun keeps one store for all its restarts, where a restarted process would find the addresses of dead ones. On
    one machine a prefix per restart prevents that. Several machines may count restarts differently, so they get none.
    """
    store, _, _ = next(dist.rendezvous("env://"))
    if _env("LOCAL_WORLD_SIZE", 1) < get_world_size():
        return store
    return dist.PrefixStore(f"life{_env('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def init(device: str = "auto", patience: datetime.timedelta = datetime.timedelta(days=1)) -> torch.device:
    """Choose this process's device and, under torchrun, join the other processes (NCCL on GPUs, gloo on CPUs).

    `device` is the value of the option --device: auto, cpu, cuda or mps. The environment says RANK, WORLD_SIZE and
    LOCAL_RANK. Processes wait for each other no longer than `patience`. Later calls return the device of the first
    call. Raises click.UsageError, which names the option, when there is no such device.
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
        # Objects travel over gloo even beside NCCL, so that they need no GPU memory and no GPU synchronization.
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=_store(), rank=get_rank(), world_size=world_size, timeout=patience)
        atexit.register(_at_exit)
        _processes[:] = all_gather_object((socket.gethostname(), os.getpid()))
    _device = chosen
    return chosen


def get_rank() -> int:
    """Return this process's number, 0 to world size - 1. The environment says it even before `init()`."""
    return _env("RANK", 0) if get_world_size() > 1 else 0


def get_world_size() -> int:
    """Return the number of processes. The environment says it even before `init()`."""
    return _env("WORLD_SIZE", 1)


def print0(*args: Any, **kwargs: Any) -> None:
    """Print on rank 0 and do nothing elsewhere."""
    if get_rank() == 0:
        print(*args, **kwargs)


def barrier() -> None:
    """Wait until every process has called this."""
    if get_world_size() > 1:
        all_gather_object(None)  # under NCCL, dist.barrier() guesses a device and warns


def broadcast_object(obj: Any) -> Any:
    """Return rank 0's `obj` on every process."""
    if get_world_size() == 1:
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def share(count: int, rank: int | None = None) -> range:
    """Return which of `count` things are the share of process `rank` (None: this one): a part of 0 .. count - 1.

    The shares of all processes follow each other, and their lengths differ by at most 1.
    """
    rank, processes = get_rank() if rank is None else rank, get_world_size()
    return range(count * rank // processes, count * (rank + 1) // processes)


def broadcast(tensor: torch.Tensor, source: int) -> torch.Tensor:
    """Fill `tensor` with that of process `source` on every process, and return it."""
    if get_world_size() > 1:
        dist.broadcast(tensor, source)
    return tensor


def to_rank0(tensor: torch.Tensor, source: int) -> None:
    """Fill the CPU tensor of rank 0 with that of process `source`. Only these two take part."""
    if source and get_rank() == 0:
        dist.recv(tensor, source)
    elif source and get_rank() == source:
        dist.send(tensor, 0)


def rows_to_rank0(own: torch.Tensor, count: int) -> torch.Tensor | None:
    """Return on rank 0 the rows of all processes' shares of `count` rows, on its CPU; None elsewhere."""
    own, rank = own.cpu().contiguous(), get_rank()
    if get_world_size() == 1:
        return own
    if rank != 0:
        return to_rank0(own, rank)
    whole = own.new_empty([count, *own.shape[1:]])
    whole[: len(own)] = own
    for source in range(1, get_world_size()):
        rows = share(count, source)
        to_rank0(whole[rows.start : rows.stop], source)
    return whole


def rows_from_rank0(whole: torch.Tensor | None, own: torch.Tensor, count: int) -> None:
    """Fill `own` with this process's share of the `count` rows of `whole`, which rank 0 has on its CPU."""
    rank = get_rank()
    if rank == 0:
        own.copy_(whole[: len(own)])
        for other in range(1, get_world_size()):
            rows = share(count, other)
            dist.send(whole[rows.start : rows.stop].contiguous(), other)
    else:
        received = torch.empty_like(own, device="cpu")
        dist.recv(received, 0)
        own.copy_(received)


def all_gather_object(obj: Any) -> list[Any]:
    """Return the `obj` of every process, in the order of ranks, on every process."""
    if get_world_size() == 1:
        return [obj]
    result: list[Any] = [None] * get_world_size()
    dist.all_gather_object(result, obj)
    return result


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of `tensor` over processes, as a new tensor. A single process gets its own tensor back."""
    if get_world_size() == 1:
        return tensor
    result = tensor.clone()
    dist.all_reduce(result)
    return result


def all_reduce_max(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elementwise maximum of `tensor` over processes, like `all_reduce_sum`."""
    if get_world_size() == 1:
        return tensor
    result = tensor.clone()
    dist.all_reduce(result, dist.ReduceOp.MAX)
    return result


def together(fn: Callable[[], Any], rank0_first: bool = False) -> Any:
    """Call `fn()` on every process and return its result; when it fails on one, raise on all. Collective.

    Otherwise the processes that succeeded would wait for the failed one, and nobody would see its error unless it is
    rank 0. With `rank0_first`, the others begin when rank 0 is done: it downloads a file, they find it in the cache.
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
    """Call `fn()` on rank 0 only; when it fails, raise on all processes. Collective."""
    together(fn if get_rank() == 0 else lambda: None)


def from_rank0(fn: Callable[[], Any]) -> Any:
    """Return what `fn()` returns on rank 0, on every process; when it fails, raise on all processes. Collective."""
    return broadcast_object(together(fn if get_rank() == 0 else lambda: None))


def progress_bar(**kwargs: Any) -> tqdm:
    """Return a tqdm bar that only rank 0 shows, and only on a terminal. `kwargs` go to tqdm."""
    return tqdm(**dict(disable=None if get_rank() == 0 else True, leave=False) | kwargs)


def shared(error: Exception) -> Exception:
    """Mark an error that every process raises at this point, so that `guard` does not change it; return it."""
    error.shared = True
    return error


@contextlib.contextmanager
def guard(where: Callable[[], str], lone: bool = False) -> Iterator[None]:
    """Explain errors that are raised inside because another process has ended.

    When a process ends, the collectives of the others fail with errors that do not say why. This replaces such an error
    by one that names the ended process and says `where()` the work was. With `lone`, errors in the data or the files
    concern this process only, so the message names this process.
    """
    try:
        yield
    except Exception as e:
        if get_world_size() == 1 or getattr(e, "shared", False):
            raise
        if lone and isinstance(e, (click.ClickException, OSError)):
            raise shared(_LoneError(f"process {get_rank()}, {where()}: {_describe(e)}")) from e
        gone = _ended() if isinstance(e, RuntimeError) else []  # failed collectives raise RuntimeError
        if not gone:
            raise
        names = " and ".join(f"process {rank} (id {_processes[rank][1]})" for rank in gone)
        first = next(rank for rank in range(get_world_size()) if rank not in gone)
        kind = _LoneError if get_rank() == first else dnnlib.UserError
        raise shared(kind(f"{names} ended {where()}, so the other processes stop")) from e


def _ended() -> list[int]:
    """Return the ranks on this machine whose process has ended. Wait a moment for one that is about to end."""
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
    """Leave the other processes and forget the device. This is allowed at any time.

    While an error passes, as in a `finally` clause, this does not wait for the other processes: NCCL would, for as long
    as `init` says, and they may be waiting for this one. The process then ends hard, once it has reported the error.
    """
    global _device, _exit_code
    error = sys.exc_info()[1]
    if dist.is_available() and dist.is_initialized():
        if error is None or isinstance(error, (SystemExit, click.exceptions.Exit)):  # all processes exit together
            dist.destroy_process_group()
        else:
            _exit_code = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)
    _device = None


def _at_exit() -> None:
    if _exit_code is not None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(_exit_code)
    shutdown()  # If the group still exists when Python begins to shut down, the process aborts.
