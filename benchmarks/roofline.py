"""The least time that a piece of work can take on this machine, from counted FLOPs and bytes and from measured peaks.

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
from torch_utils.precision import tf32

__all__ = ["Peaks", "Work", "bound", "count", "measure_peaks", "precision_of"]

# Accesses per parameter: Adam reads p, g, m, v and writes p, m, v; the EMA reads and writes its average.
ADAM_EMA_ACCESSES = 9
SAMPLES = 30  # measurements of each peak, of which the best counts: short ones fit into the gaps of a busy machine
# Width of the matrices, and length of the arrays, which are larger than any cache
SIZES = {"cuda": (8192, 1 << 28), "cpu": (1024, 1 << 25)}


@dataclass(frozen=True)
class Work:
    """What a computation needs at least: floating-point operations of its products, and bytes moved."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Peaks:
    """The best that the machine reached: FLOP/s of a matrix product in each precision, bytes/s of a + s b -> c."""

    flops: dict[str, float]
    bandwidth: float


class _Traffic(TorchDispatchMode):
    """Counter of the bytes that enter and leave every operation that has FLOPs."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.bytes += sum(x.nbytes for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor))
        return out


def count(work: Callable[[], object], parameters: int = 0) -> Work:
    """Call `work` once and return its FLOPs and bytes, backward passes included. It must be eager code.

    FLOPs are those of matrix products, convolutions and attention; a multiply-add counts as two. For the bytes, each of
    these operations reads its inputs and writes its outputs once, as if all other operations were fused into it and
    there were no cache. Adam and the moving average add their accesses to `parameters` float32 numbers.
    """
    with FlopCounterMode(display=False) as flops, _Traffic() as traffic:
        work()
    return Work(flops.get_total_flops(), traffic.bytes + 4 * ADAM_EMA_ACCESSES * parameters)


def bound(row: Row, peaks: Peaks) -> float | None:
    """Return the least seconds that the row's work can take, or None if its costs or its peak are unknown."""
    times = []
    if row.flops is not None and row.precision in peaks.flops:
        times.append(row.flops / peaks.flops[row.precision])
    if row.bytes is not None:
        times.append(row.bytes / peaks.bandwidth)
    return max(times, default=None)


@contextlib.contextmanager
def precision_of(name: str) -> Iterator[torch.dtype]:
    """Yield the dtype of 'fp32', 'tf32' or 'bf16', and let CUDA use TF32 in float32 products for 'tf32' only."""
    with tf32(name == "tf32"):
        yield torch.bfloat16 if name == "bf16" else torch.float32


def measure_peaks(device: torch.device, size: int | None = None, elements: int | None = None) -> Peaks:
    """Measure the peaks of `device`: products of [size,size] matrices, and c = a + s b on `elements` float32 numbers.

    A busy machine reaches less, but so does the work that is compared with it.
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
