"""Images from seeds: batches of a sampler's output, the same whatever the batch size and the number of processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.nn.functional import one_hot

import dnnlib
from sampling.samplers import heun_sampler
from sampling.seeds import StackedRandomGenerator

__all__ = ["EvaluationMeter", "Stopwatch", "generate_images", "share_of", "to_uint8"]


def generate_images(
    net, seeds: Sequence[int], *, device: torch.device, class_idx: int | Sequence[int] | None = None, batch: int = 64,
    sampler: Callable[..., torch.Tensor] = heun_sampler,
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray | None]]:
    """Yield (seeds, images uint8 [n,H,W,C], classes int64 [n] or None) for at most `batch` seeds at a time, in order.

    `net` is a denoiser on `device`, guided or not. `class_idx` asks for one class, or for one per seed; by default each
    seed draws its own. `sampler(net, latents, class_labels, randn_like=...)` returns images in [-1,1]. UserError:
    values that are not finite, or more images at a time than the device's memory holds.
    """
    seeds = list(seeds)
    wanted = None
    if class_idx is not None:
        wanted = torch.as_tensor(class_idx, device=device).expand(len(seeds))
        if len(wanted) and not 0 <= int(wanted.min()) <= int(wanted.max()) < net.label_dim:
            raise ValueError(f"class_idx is {class_idx}, the network has {net.label_dim} classes")
    for start in range(0, len(seeds), batch):
        part = seeds[start : start + batch]
        rnd = StackedRandomGenerator(device, part)
        latents = rnd.randn([len(part), net.img_channels, net.img_resolution, net.img_resolution])
        classes = labels = None
        if net.label_dim:
            # Drawn even when another class is asked for, so that the sampler's noise stays the same.
            classes = rnd.randint(net.label_dim, size=[len(part)])
            if wanted is not None:
                classes = wanted[start : start + batch]
            labels = one_hot(classes, net.label_dim).float()
        try:
            images = to_uint8(sampler(net, latents, labels, randn_like=rnd.randn_like))
        except torch.OutOfMemoryError:
            raise dnnlib.UserError(f"--batch: {device} has too little memory for {len(part)} at a time") from None
        except (FloatingPointError, OverflowError) as e:
            raise dnnlib.UserError(f"seeds {part[0]} to {part[-1]}: {e}; a broken network or setting") from None
        yield part, images, None if classes is None else classes.cpu().numpy()


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """[N,C,H,W] float in [-1,1] on any device -> uint8 [N,H,W,C] as an array. FloatingPointError: NaN or infinity."""
    if not images.isfinite().all():
        raise FloatingPointError("the images hold values that are not finite")
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


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
    """Counts the images that go through `networks` (modules) and the seconds that takes."""

    def __init__(self, device: torch.device, *networks: torch.nn.Module):
        self.count, self.stopwatch = 0, Stopwatch(device)
        for net in networks:
            net.register_forward_pre_hook(self._before)
            net.register_forward_hook(lambda *_: self.stopwatch.__exit__())

    def _before(self, _net: torch.nn.Module, args: tuple) -> None:
        self.count += len(args[0])
        self.stopwatch.__enter__()
