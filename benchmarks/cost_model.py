"""Model of what a training run costs, from first principles, with a simulation of its steps on many processes.

Units are bytes, seconds and FLOPs, where a multiplication and an addition count as two. P is the number of weights, n
the number of processes. `Hardware` holds all assumptions about hardware; this file measures nothing. docs/scaling.md
shows the results.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

__all__ = [
    "Counts",
    "Hardware",
    "Workload",
    "all_reduce_seconds",
    "archive_bytes",
    "buckets",
    "checkpointing",
    "cost",
    "count",
    "ddp_bytes",
    "ddp_memory",
    "fsdp_bytes",
    "fsdp_memory",
    "images_at_a_time",
    "simulate_steps",
]

WEIGHT = 4  # bytes of a float32
BUCKET = (1 << 20, 25 << 20)  # largest size of DDP's first bucket of gradients, and of the other buckets
STATE = 4 * WEIGHT  # bytes per weight in a state: weight, average, Adam's two moments
DDP = 5 * WEIGHT  # bytes per weight on a GPU: the same, and the gradient
NAME = len("00000/img00000000.png")  # length of a file name in an archive


def _assumption(default: float, text: str) -> Any:
    # `text` is also the help text of the option in `python -m benchmarks.scaling`.
    return dataclasses.field(default=default, metadata=dict(help=text))


@dataclass(frozen=True)
class Hardware:
    """A cluster. The defaults are published figures of H200 machines with one 400 Gbit/s network port per GPU."""

    peak: float = _assumption(989e12, "FLOP/s of a GPU, dense bfloat16")
    utilization: float = _assumption(0.3, "Share of the peak that training reaches")
    memory: float = _assumption(141e9, "Bytes of memory of a GPU")
    machine: int = _assumption(8, "GPUs per machine")
    link: float = _assumption(450e9, "Bytes/s, one way, between the GPUs of a machine")
    network: float = _assumption(50e9, "Bytes/s per GPU, one way, between machines")
    latency: float = _assumption(1e-5, "Seconds that a message takes besides its bytes")
    jitter: float = _assumption(0.01, "Mean delay of a process in a step, as a share of the step")
    disk: float = _assumption(4e8, "Bytes/s at which a state is written, hashed twice and read back")
    gpu_mtbf: float = _assumption(50_000 * 3600, "Mean seconds between failures of a run on one GPU")
    restart: float = _assumption(600.0, "Seconds from a failure to the first step after it")


@dataclass(frozen=True)
class Workload:
    """A data set and a recipe."""

    name: str
    images: int  # images in the data set
    resolution: int
    channels: int
    classes: int
    arch: str
    batch: int  # images per step in the recipe
    total: float  # images that the run sees
    tick: float = 50e3  # images per tick
    snap: int = 50  # ticks per snapshot


@dataclass(frozen=True)
class Counts:
    """The costs of a network, FLOPs and bytes for one image."""

    params: int  # number of weights
    forward: float  # FLOPs of the forward pass
    train: float  # FLOPs of forward and backward pass
    activations: float  # bytes kept for the backward pass, float32
    largest: int  # weights of the largest unit that FSDP gathers
    layers: tuple[tuple[int, float], ...]  # (weights, FLOPs of the forward pass) in the order of the forward pass


def count(net: torch.nn.Module, args: tuple, units: tuple[type, ...] = ()) -> Counts:
    """Count the costs of a network without computing anything, on meta tensors.

    `args` are its arguments for one image, `units` the classes of modules that FSDP gathers as one.
    """
    net = net.to("meta")
    args = tuple(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args)
    owned = {p.untyped_storage()._cdata for p in net.parameters()}
    kept: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in owned:
            kept[storage._cdata] = storage.nbytes()
        return t

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            output = net(*args)
        forward = counter.get_total_flops()
        by_module = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
        output.sum().backward()
    # Our networks register their modules in the order of the forward pass, except for the embedding, which is small.
    layers = tuple(
        (sum(p.numel() for p in module.parameters()), by_module.get(f"{type(net).__name__}.{name}", 0))
        for name, module in net.named_modules()
        if name and not list(module.children())
    )
    whole = sum(p.numel() for p in net.parameters())
    sizes = [sum(p.numel() for p in module.parameters()) for module in net.modules() if isinstance(module, units)]
    return Counts(
        whole,
        forward,
        counter.get_total_flops(),
        sum(kept.values()),
        max([*sizes, whole - sum(sizes)]),
        tuple(layer for layer in layers if layer[0]),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Bytes and seconds on the network


def ddp_bytes(params: int, n: int) -> float:
    """Return the bytes that a process sends per step with DDP, an all-reduce: 2 (n-1)/n of the gradients."""
    return 2 * (n - 1) / n * WEIGHT * params


def fsdp_bytes(params: int, n: int, machine: int, scatter: int = 1) -> tuple[float, float]:
    """Return the bytes that a process sends per step with FSDP, (within the machine, between machines).

    Let s be the number of processes per machine. Within the machine, weights are gathered before the forward and again
    before the backward pass, and gradients are scattered; each sends (s-1)/s of all bytes. Between machines, a slice of
    the gradients is all-reduced. `scatter` is 2 for gloo, which scatters by an all-reduce.
    """
    s = min(n, machine)
    return (2 + scatter) * (s - 1) / s * WEIGHT * params, ddp_bytes(params, n // s) / s


def all_reduce_seconds(size: float, n: int, hw: Hardware) -> float:
    """Return the seconds of an all-reduce of `size` bytes, within each machine and then between machines.

    Each level takes the faster of two ways: a ring sends 2(n-1) messages of size/n one after the other, a double tree
    sends 2 log2(n) messages and all bytes twice. Between machines a GPU sends only its share of the bytes.
    """

    def level(size: float, n: int, bandwidth: float) -> float:
        if n == 1:
            return 0.0
        ring = 2 * (n - 1) * (hw.latency + size / n / bandwidth)
        tree = 2 * (math.ceil(math.log2(n)) * hw.latency + size / bandwidth)
        return min(ring, tree)

    s = min(n, hw.machine)
    return level(size, s, hw.link) + level(size / s, math.ceil(n / s), hw.network)


# ---------------------------------------------------------------------------------------------------------------------
# Memory and storage


def ddp_memory(counts: Counts) -> float:
    """Return the bytes on a GPU besides activations: 20 per weight (weight, gradient, average, Adam's two moments)."""
    return DDP * counts.params


def fsdp_memory(counts: Counts, shards: int) -> float:
    """Return the same with FSDP: 24 per weight of a slice (its gradient is there twice), 16 per weight of the largest
    unit."""
    return (DDP + WEIGHT) * counts.params / shards + 4 * WEIGHT * counts.largest


def images_at_a_time(counts: Counts, weights: float, hw: Hardware) -> int:
    """Return how many images fit on a GPU at a time, next to `weights` bytes, in 0.9 of its memory.

    Activations are bfloat16, which takes half of the counted bytes.
    """
    return max(int((0.9 * hw.memory - weights) / (counts.activations / 2)), 0)


def archive_bytes(images: int, resolution: int, channels: int) -> int:
    """Return the bytes of an archive, a ZIP of uncompressed PNGs, without its `dataset.json`."""
    raw = resolution * (resolution * channels + 1)
    png = 8 + 25 + 12 + 12 + 2 + 5 * math.ceil(raw / 65535) + raw + 4  # signature, IHDR, IDAT, IEND, zlib, pixels
    return images * (png + 30 + 46 + 2 * NAME)


def checkpointing(write: float, mtbf: float, restart: float) -> tuple[float, float]:
    """Return the best interval between states, sqrt(2 write mtbf) (Young 1974), and the share of time lost with it."""
    interval = math.sqrt(2 * write * mtbf)
    return interval, write / interval + (interval / 2 + restart) / mtbf


# ---------------------------------------------------------------------------------------------------------------------
# A step on n processes


def buckets(layers: tuple[tuple[int, float], ...], limits: tuple[int, int] = BUCKET) -> list[tuple[float, float]]:
    """Return DDP's buckets, those of the last layers first.

    A bucket is (bytes, share of the backward pass after which it is full).
    """
    total, done, size, found = max(sum(flops for _, flops in layers), 1e-9), 0.0, 0, []
    for params, flops in reversed(layers):
        if size and size + WEIGHT * params > limits[min(len(found), 1)]:
            found.append((size, done / total))
            size = 0
        done += flops
        size += WEIGHT * params
    return [*found, (size, 1.0)]


def simulate_steps(
    layers: tuple[tuple[int, float], ...], compute: float, n: int, hw: Hardware, steps: int = 2000, seed: int = 0
) -> dict[str, float]:
    """Simulate DDP steps and return mean seconds: `step`, `waiting` for the slowest process, `exposed` network time.

    In each step the computation of a process takes compute (1 + jitter E), where E is exponential, and a third of it is
    the forward pass. Buckets are sent during the backward pass. A bucket leaves when the slowest process has filled it
    and the bucket before it has arrived. The optimizer waits for the last one. The slowest of n processes is late by
    jitter (1 + 1/2 + ... + 1/n) on average, so waiting grows like the logarithm of n.
    """
    rng = np.random.default_rng(seed)
    slowest = np.array([rng.exponential(hw.jitter, n).max() for _ in range(steps)])
    time = compute * (1 + slowest)
    arrived = np.zeros(steps)
    for size, share in buckets(layers):
        arrived = np.maximum(arrived, time * (1 + 2 * share) / 3) + all_reduce_seconds(size, n, hw)
    step, alone = float(np.maximum(time, arrived).mean()), float(time.mean())
    return dict(step=step, exposed=step - alone, waiting=alone - compute)


def cost(work: Workload, counts: Counts, n: int, hw: Hardware, extra: float = 0.0) -> dict[str, float]:
    """Return the costs of a run on n GPUs with DDP, one row of the tables.

    `extra` is the FLOPs per image besides forward and backward pass, which TDSM needs. The batch of the recipe is
    rounded up, so that every GPU gets equally many images.
    """
    per_gpu = math.ceil(work.batch / n)
    batch, flops = per_gpu * n, counts.train + extra
    steps = math.ceil(work.total / batch)
    compute = per_gpu * flops / (hw.peak * hw.utilization)
    step = simulate_steps(counts.layers, compute, n, hw)
    seconds, images_per_second = steps * step["step"], batch / step["step"]
    write = STATE * counts.params / hw.disk
    interval, lost = checkpointing(write, hw.gpu_mtbf / n, hw.restart)
    within, between = fsdp_bytes(counts.params, n, hw.machine)
    return dict(
        n=n,
        batch=batch,
        per_gpu=per_gpu,
        steps=steps,
        flops_step=batch * flops,
        flops_run=steps * batch * flops,
        compute=compute,
        **step,
        images_per_second=images_per_second,
        hours=seconds / 3600,
        gpu_hours=n * seconds / 3600,
        ddp_bytes=ddp_bytes(counts.params, n),
        fsdp_within=within,
        fsdp_between=between,
        ddp_memory=ddp_memory(counts),
        fsdp_memory=fsdp_memory(counts, min(n, hw.machine)),
        activations=counts.activations / 2,
        ddp_images=images_at_a_time(counts, ddp_memory(counts), hw),
        archive=archive_bytes(work.images, work.resolution, work.channels),
        state=STATE * counts.params,
        snapshots=WEIGHT * counts.params * math.ceil(work.total / work.tick / work.snap),
        read=images_per_second * archive_bytes(1, work.resolution, work.channels),
        write=write,
        failures=n * seconds / hw.gpu_mtbf,
        dump_seconds=interval,
        dump_ticks=max(round(interval * images_per_second / work.tick), 1),
        lost=lost,
    )
