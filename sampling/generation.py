"""Images from seeds: batches of a sampler's output, the same whatever the batch size and the number of processes."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.nn.functional import one_hot

import dnnlib
from sampling.samplers import heun_sampler
from sampling.seeds import StackedRandomGenerator

__all__ = ["EvaluationMeter", "Stopwatch", "batch_size", "generate_images", "share_of", "to_uint8"]


def generate_images(
    net,
    seeds: Sequence[int],
    *,
    device: torch.device,
    class_idx: int | Sequence[int] | None = None,
    batch: int = 64,
    sampler: Callable[..., torch.Tensor] = heun_sampler,
    same_shape: bool = False,
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray | None]]:
    """Yield (seeds, images uint8 [n,H,W,C], classes int64 [n] or None) for at most `batch` seeds at a time, in order.

    `net` is a denoiser on `device`, guided or not. `class_idx` asks for one class, or for one per seed; by default each
    seed draws its own. `sampler(net, latents, class_labels, randn_like=...)` returns images in [-1,1]. `same_shape`:
    the network sees batches of one size (`batch_size`), as compiled ones should. A GPU is given the next batch before
    this one is waited for. UserError: values that are not finite, or more images at a time than the device's memory
    holds.
    """
    seeds = list(seeds)
    wanted = None
    if class_idx is not None:
        wanted = torch.as_tensor(class_idx).expand(len(seeds))
        if len(wanted) and not 0 <= int(wanted.min()) <= int(wanted.max()) < net.label_dim:
            raise ValueError(f"class_idx is {class_idx}, the network has {net.label_dim} classes")
        wanted = wanted.to(device)
    if same_shape:
        batch = batch_size(len(seeds), batch)
    waiting = deque()
    for start in range(0, len(seeds), batch):
        part = seeds[start : start + batch]
        fill = batch - len(part) if same_shape else 0
        rnd = StackedRandomGenerator(device, part + part[-1:] * fill)
        n = len(rnd.generators)
        latents = rnd.randn([n, net.img_channels, net.img_resolution, net.img_resolution])
        classes = labels = None
        if net.label_dim:
            # Drawn even when another class is asked for, so that the sampler's noise stays the same.
            classes = rnd.randint(net.label_dim, size=[n])
            if wanted is not None:
                classes = torch.cat([wanted[start : start + batch], classes[len(part) :]])
            labels = one_hot(classes, net.label_dim).float()
        try:
            images = sampler(net, latents, labels, randn_like=rnd.randn_like)[: len(part)]
            arriving = _Arriving(images, None if classes is None else classes[: len(part)])
        except torch.OutOfMemoryError:
            raise dnnlib.UserError(f"--batch: {device} has too little memory for {n} at a time") from None
        except OverflowError as e:
            raise _broken(part, e) from None
        waiting.append((part, arriving))
        if len(waiting) > (device.type == "cuda"):
            yield _arrived(*waiting.popleft())
    while waiting:
        yield _arrived(*waiting.popleft())


def batch_size(n: int, batch: int) -> int:
    """Images at a time so that `n` take as few batches as with `batch`, and the last one is as full as can be."""
    return math.ceil(n / max(math.ceil(n / batch), 1))


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """[N,C,H,W] float in [-1,1] on any device -> uint8 [N,H,W,C] as an array. FloatingPointError: NaN or infinity."""
    return _Arriving(images).wait()[0]


class _Arriving:
    """Images and classes on their way from the device, which is not waited for before they are asked for."""

    def __init__(self, images: torch.Tensor, classes: torch.Tensor | None = None):
        levels = (images * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        self._copies = [None if x is None else self._copy(x) for x in (images.isfinite().all(), levels, classes)]
        self._event = None
        if images.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(images.device))

    @staticmethod
    def _copy(x: torch.Tensor) -> torch.Tensor:
        if not x.is_cuda:
            return x.cpu()
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)

    def wait(self) -> tuple[np.ndarray, np.ndarray | None]:
        if self._event is not None:
            self._event.synchronize()
        finite, images, classes = self._copies
        if not finite:
            raise FloatingPointError("the images hold values that are not finite")
        return images.numpy(), None if classes is None else classes.numpy()


def _arrived(part: list[int], arriving: _Arriving) -> tuple[list[int], np.ndarray, np.ndarray | None]:
    try:
        return part, *arriving.wait()
    except FloatingPointError as e:
        raise _broken(part, e) from None


def _broken(part: list[int], e: Exception) -> dnnlib.UserError:
    return dnnlib.UserError(f"seeds {part[0]} to {part[-1]}: {e}; a broken network or setting")


def share_of(items: Sequence, rank: int, world_size: int) -> Sequence:
    """The contiguous share of a process; shares follow each other in the order of ranks, equal but for one item."""
    return items[len(items) * rank // world_size : len(items) * (rank + 1) // world_size]


class Stopwatch:
    """Context manager that adds up the seconds the device spends inside; a GPU is not waited for until `seconds`."""

    def __init__(self, device: torch.device):
        self._device, self._spans = device, []

    def __enter__(self) -> None:
        self._start = self._mark()

    def __exit__(self, *_exception) -> None:
        self._spans.append((self._start, self._mark()))

    def _mark(self):
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        if self._device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    @property
    def seconds(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return sum(start.elapsed_time(end) for start, end in self._spans) / 1000
        return sum(end - start for start, end in self._spans)


class EvaluationMeter:
    """Counts the images that go through `networks` (modules), and the seconds that takes if there is a `stopwatch`."""

    def __init__(self, *networks: torch.nn.Module, stopwatch: Stopwatch | None = None):
        self.count, self.stopwatch = 0, stopwatch
        for net in networks:
            net.register_forward_pre_hook(self._before)
            if stopwatch is not None:
                net.register_forward_hook(lambda *_: stopwatch.__exit__())

    def _before(self, _net: torch.nn.Module, args: tuple) -> None:
        self.count += len(args[0])
        if self.stopwatch is not None:
            self.stopwatch.__enter__()
