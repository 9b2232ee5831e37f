"""The least time that a piece of work can take on this machine: FLOPs and bytes counted, peaks measured.

bound = max(FLOPs / peak of the matrix product, bytes / memory bandwidth)   (Williams et al. 2009, the roofline)
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from benchmarks.core import Row

__all__ = ["Peaks", "Work", "bound", "count", "measure_peaks", "precision_of"]

ADAM_EMA_ACCESSES = 9  # of a parameter: Adam reads p, g, m, v, writes p, m, v; the EMA, fused with it, reads, writes
SAMPLES = 30  # of each peak; the best counts, many and short ones because a busy machine has short gaps
# Width of the matrices, and length of the arrays, which no cache holds.
SIZES = {"cuda": (8192, 1 << 28), "cpu": (1024, 1 << 25)}


@dataclass(frozen=True)
class Work:
    """What a computation needs: floating-point operations of its products, and bytes moved at least."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Peaks:
    """What the machine reached: FLOP/s of a matrix product for each precision, bytes/s of a + s b -> c."""

    flops: dict[str, float]
    bandwidth: float


class _Traffic(TorchDispatchMode):
    """Bytes of inputs and outputs of every operation that has FLOPs."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.bytes += sum(x.nbytes for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor))
        return out


def count(work: Callable[[], object], parameters: int = 0) -> Work:
    """FLOPs and bytes of `work()`, backward passes included, which it carries out once; eager code only.

    FLOPs: matrix products, convolutions and attention, a multiply-add being two. Bytes: each of those reads its inputs
    and writes its outputs once, as if all other operations were fused into them and no cache kept anything; and for
    `parameters` float32 numbers, what Adam and the moving average read and write.
    """
    with FlopCounterMode(display=False) as flops, _Traffic() as traffic:
        work()
    return Work(flops.get_total_flops(), traffic.bytes + 4 * ADAM_EMA_ACCESSES * parameters)


def bound(row: Row, peaks: Peaks) -> float | None:
    """Seconds that the row's work takes at least; None where nothing was counted or its peak not measured."""
    times = []
    if row.flops is not None and row.precision in peaks.flops:
        times.append(row.flops / peaks.flops[row.precision])
    if row.bytes is not None:
        times.append(row.bytes / peaks.bandwidth)
    return max(times, default=None)


@contextlib.contextmanager
def precision_of(name: str) -> Iterator[torch.dtype]:
    """The dtype of 'fp32', 'tf32' or 'bf16'; inside, float32 products on CUDA are exact or TF32 accordingly."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = name == "tf32"
        yield torch.bfloat16 if name == "bf16" else torch.float32
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


def measure_peaks(device: torch.device, size: int | None = None, elements: int | None = None) -> Peaks:
    """Peaks of `device`: products of [size,size] matrices, and c = a + s b on float32 arrays of `elements` numbers.

    A machine that is doing something else reaches less; so does the work that is compared with it.
    """
    size, elements = size or SIZES[device.type][0], elements or SIZES[device.type][1]
    flops = {}
    for name in ("fp32", "tf32", "bf16") if device.type == "cuda" else ("fp32", "bf16"):
        with precision_of(name) as dtype:
            a = torch.randn(size, size, device=device).to(dtype)
            out = torch.empty_like(a)
            flops[name] = 2 * size**3 / _best(lambda a=a, out=out: torch.mm(a, a, out=out), device)
    a, b, c = (torch.ones(elements, device=device) for _ in range(3))
    return Peaks(flops, 3 * a.nbytes / _best(lambda: torch.add(a, b, alpha=3.0, out=c), device))


def _best(work: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(1 + SAMPLES):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])
