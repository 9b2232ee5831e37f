"""Images from seeds: an image depends on its own seed, never on the batch or the process that makes it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.nn.functional import one_hot

import dnnlib
from sampling.arrival import Arrival
from sampling.rejection import Rejection
from sampling.samplers import heun_sampler
from sampling.seeds import StackedRandomGenerator

__all__ = ["batch_size", "drawn_classes", "generate_images"]


def generate_images(
    net: Callable[..., torch.Tensor],
    seeds: Sequence[int],
    *,
    device: torch.device,
    class_idx: int | Sequence[int] | None = None,
    batch: int = 64,
    sampler: Callable[..., torch.Tensor] = heun_sampler,
    same_shape: bool = False,
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray | None]]:
    """Yield (seeds, images uint8 [n,H,W,C], classes int64 [n] or None) for at most `batch` seeds at a time, in order.

    net         a denoiser, guided or not, or a generator, on `device`; `Rejection` draws until it accepts
    class_idx   the class of all images, or one class per seed; None: each seed draws its own
    sampler     called as sampler(net, latents, class_labels, randn_like=...), returns images in [-1,1]
    same_shape  the network sees batches of one size (`batch_size`), which a compiled network needs

    A GPU receives the next batch before this function waits for the last one, except with `Rejection`. UserError: the
    images hold values that are not finite, or a batch needs more memory than the device has.
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
        latents, classes = _draw(net, rnd)
        labels = None
        if classes is not None:
            if wanted is not None:
                classes = torch.cat([wanted[start : start + batch], classes[len(part) :]])
            labels = one_hot(classes, net.label_dim).float()
        try:
            if isinstance(net, Rejection):
                images = net.sample(sampler, latents, labels, rnd, len(part), same_shape)
            else:
                images = sampler(net, latents, labels, randn_like=rnd.randn_like)[: len(part)]
            arrival = Arrival(images, None if classes is None else classes[: len(part)])
        except torch.OutOfMemoryError:
            hint = "generate.py and sweep.py take fewer with --batch"
            raise dnnlib.UserError(f"{device} has too little memory for {n} images at a time; {hint}") from None
        except OverflowError as e:
            raise _broken(part, e) from None
        waiting.append((part, arrival))
        if len(waiting) > (device.type == "cuda"):
            yield _arrived(*waiting.popleft())
    while waiting:
        yield _arrived(*waiting.popleft())


def _draw(net: Callable[..., torch.Tensor], rnd: StackedRandomGenerator) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Draw latents [n,C,H,W] and classes [n], None without classes.

    The class is drawn even when another one is wanted, so that the sampler's noise stays the same.
    """
    n = len(rnd.generators)
    latents = rnd.randn([n, net.img_channels, net.img_resolution, net.img_resolution])
    return latents, rnd.randint(net.label_dim, size=[n]) if net.label_dim else None


def drawn_classes(net: Callable[..., torch.Tensor], seeds: Sequence[int], device: torch.device) -> list[int] | None:
    """Return the class that each seed draws for `generate_images`; None without classes."""
    if not net.label_dim:
        return None
    return [int(_draw(net, StackedRandomGenerator(device, [seed]))[1]) for seed in seeds]


def _arrived(part: list[int], arrival: Arrival) -> tuple[list[int], np.ndarray, np.ndarray | None]:
    try:
        return part, *arrival.wait()
    except FloatingPointError as e:
        raise _broken(part, e) from None


def _broken(part: list[int], e: Exception) -> dnnlib.UserError:
    return dnnlib.UserError(f"seeds {part[0]} to {part[-1]}: {e}; a broken network or setting")


def batch_size(n: int, batch: int) -> int:
    """Return the batch size that gives `n` images as few batches as `batch` does, and fills the last one best."""
    return max(math.ceil(n / max(math.ceil(n / batch), 1)), 1)
