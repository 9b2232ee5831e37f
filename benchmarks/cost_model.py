"""What a training run costs, from first principles, and a simulation of its steps on many processes.

Units: bytes, seconds, FLOPs (a multiplication and an addition are two). P is the number of weights, n of processes.
Every figure about hardware is an assumption, in `Hardware`; nothing here measures anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
BUCKET = (1 << 20, 25 << 20)  # DDP's first bucket of gradients and the others, at most
STATE = 4 * WEIGHT  # a weight in a state: itself, its average, Adam's two moments
DDP = 5 * WEIGHT  # the same on a GPU, and its gradient
NAME = len("00000/img00000000.png")


@dataclass(frozen=True)
class Hardware:
    """A cluster; the defaults are the published figures of H200 machines with a network port of 400 Gbit/s a GPU."""

    peak: float = 989e12  # FLOP/s of a GPU, dense bfloat16
    utilisation: float = 0.3  # share of it that training reaches
    memory: float = 141e9  # of a GPU
    machine: int = 8  # GPUs a machine
    link: float = 450e9  # bytes/s one way between the GPUs of a machine
    network: float = 50e9  # bytes/s one way between machines, a GPU
    latency: float = 1e-5  # of a message
    jitter: float = 0.01  # mean of the random share by which a process's step is late
    disk: float = 4e8  # bytes/s at which a state is written, hashed twice and read back
    gpu_mtbf: float = 50_000 * 3600  # mean time between failures of a run on one GPU
    restart: float = 600.0  # from a failure to the first step after it


@dataclass(frozen=True)
class Workload:
    """A data set and a recipe."""

    name: str
    images: int  # in the data set
    resolution: int
    channels: int
    classes: int
    arch: str
    batch: int  # of the recipe
    total: float  # images seen
    tick: float = 50e3  # images a tick
    snap: int = 50  # ticks a snapshot


@dataclass(frozen=True)
class Counts:
    """A network in numbers, all for one image. `layers`: (weights, forward FLOPs) in the order of the forward pass."""

    params: int
    forward: float
    train: float  # forward and backward
    activations: float  # bytes kept for backward, float32
    largest: int  # weights of the largest unit that FSDP gathers at a time
    layers: tuple[tuple[int, float], ...]


def count(net: torch.nn.Module, args: tuple, units: tuple[type, ...] = ()) -> Counts:
    """Count a network on meta tensors, so that nothing is computed; `args`: its arguments for one image."""
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
    # Order of registration is that of the forward pass in our networks, but for the embedding, which is small.
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
# Bytes and seconds on the network.


def ddp_bytes(params: int, n: int) -> float:
    """Bytes that a process sends a step: the all-reduce, 2 (n-1)/n of the gradients, in a ring or level by level."""
    return 2 * (n - 1) / n * WEIGHT * params


def fsdp_bytes(params: int, n: int, machine: int, scatter: int = 1) -> tuple[float, float]:
    """Bytes that a process sends a step with --shard, (within the machine, between machines).

    Within: weights gathered before forward and again before backward, gradients scattered, each (s-1)/s of all bytes,
    s processes a machine. Between: the all-reduce of a slice over the machines. `scatter`: 2 for gloo, which scatters
    by an all-reduce.
    """
    s = min(n, machine)
    return (2 + scatter) * (s - 1) / s * WEIGHT * params, ddp_bytes(params, n // s) / s


def all_reduce_seconds(size: float, n: int, hw: Hardware) -> float:
    """An all-reduce of `size` bytes: within each machine, and of a GPU's share of them between machines.

    At either level the better of a ring, 2(n-1) messages of size/n in turn, and a double tree, 2 log2(n) messages and
    all bytes twice.
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
# Memory and storage.


def ddp_memory(counts: Counts) -> float:
    """Bytes on a GPU beside activations: 20 a weight (itself, its gradient, its average, Adam's two moments)."""
    return DDP * counts.params


def fsdp_memory(counts: Counts, shards: int) -> float:
    """The same with --shard: 24 a weight of the slice (its gradient twice), two largest units with their gradients."""
    return (DDP + WEIGHT) * counts.params / shards + 4 * WEIGHT * counts.largest


def images_at_a_time(counts: Counts, weights: float, hw: Hardware) -> int:
    """--batch-gpu at most: activations, in bfloat16 half as many bytes, in 0.9 of the memory less `weights` bytes."""
    return max(int((0.9 * hw.memory - weights) / (counts.activations / 2)), 0)


def archive_bytes(images: int, resolution: int, channels: int) -> int:
    """Bytes of an archive: uncompressed PNGs, stored in a ZIP, without its `dataset.json`."""
    raw = resolution * (resolution * channels + 1)
    png = 8 + 25 + 12 + 12 + 2 + 5 * math.ceil(raw / 65535) + raw + 4  # signature, IHDR, IDAT, IEND, zlib's own
    return images * (png + 30 + 46 + 2 * NAME)


def checkpointing(write: float, mtbf: float, restart: float) -> tuple[float, float]:
    """(interval between states that loses least, share of the time lost with it); Young (1974): sqrt(2 write mtbf)."""
    interval = math.sqrt(2 * write * mtbf)
    return interval, write / interval + (interval / 2 + restart) / mtbf


# ---------------------------------------------------------------------------------------------------------------------
# A step on n processes.


def buckets(layers: tuple[tuple[int, float], ...], limits: tuple[int, int] = BUCKET) -> list[tuple[float, float]]:
    """DDP's buckets, (bytes, share of backward after which the bucket is full), the last layers' first."""
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
    """Mean seconds of a DDP step whose buckets travel while backward goes on: `step`, `exposed` network, `waiting`.

    A process's step takes compute (1 + jitter E), E exponential, anew every step; a third is forward. A bucket leaves
    when the slowest process has filled it and the bucket before it has arrived; the optimizer waits for the last.
    The slowest of n is late by jitter (1 + 1/2 + ... + 1/n) in the mean: waiting grows like the logarithm of n.
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
    """A run on n GPUs with DDP: one row of the table. `extra`: FLOPs an image beside the training pass (TDSM's).

    The batch is the recipe's, rounded up so that every GPU gets as many images.
    """
    per_gpu = math.ceil(work.batch / n)
    batch, flops = per_gpu * n, counts.train + extra
    steps = math.ceil(work.total / batch)
    compute = per_gpu * flops / (hw.peak * hw.utilisation)
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
