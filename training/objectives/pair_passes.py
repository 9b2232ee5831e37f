"""Passes without gradients over the (image, class) pairs that TDSM sums over: in what pieces, and without waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

__all__ = ["pair_passes", "pass_size", "read_later", "sum_over_pairs"]

# Pixels in a pass without gradients: on a CPU as many as stay in its caches, elsewhere enough to keep the device busy.
PASS_PIXELS = {"cpu": 1 << 14}
BUSY_PIXELS = 1 << 17


def sum_over_pairs(
    denoise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    weights: torch.Tensor,
    count: int,
    size: int,
    fixed: bool,
    like: torch.Tensor,
) -> torch.Tensor:
    """Return sum_c weights[i,c] denoise(i, c) of every image i, shaped as `like` [n,C,H,W].

    `weights` [n,classes]: only the `count` positive entries are computed, see `pair_passes` for `size` and `fixed`.
    `denoise(image, label)` takes two int64 tensors of equal length and returns [length,C,H,W].
    """
    n = len(weights)
    total = like.new_zeros([n + 1, *like.shape[1:]])  # the last row collects what empty places compute
    for image, label, weight in pair_passes(weights, count, size, fixed):
        part = denoise(image.clamp(max=n - 1), label)
        total.index_add_(0, image, part * weight[:, None, None, None])
    return total[:n]


def pair_passes(
    weights: torch.Tensor, count: int, size: int, fixed: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield the `count` positive entries of `weights` [n,C] as (row, column, weight), at most `size` at a time.

    The entries come row by row. With `fixed` every pass has `size` entries; empty places have row n. Unlike `nonzero`,
    nothing here waits for the device.
    """
    passes = -(-count // size)
    flat = weights.flatten()
    place = torch.arange(1, (passes * size if fixed else count) + 1, device=flat.device)
    # The k-th positive entry is where the running count reaches k; beyond the last entry, one past the end.
    index = torch.searchsorted((flat > 0).cumsum(0), place)
    for part in index.tensor_split(passes) if passes else ():
        row = part.div(weights.shape[1], rounding_mode="floor")
        yield row, part % weights.shape[1], flat[part.clamp(max=len(flat) - 1)]


def pass_size(batch: int, pixels: int, device_type: str) -> int:
    """Return how many images of `pixels` pixels to put into a pass without gradients, beside a `batch` with gradients.

    The batch tells how much memory there is: a pass without gradients takes a tenth of it per image. A CPU is fastest
    with pieces that fit its caches. A GPU needs enough work to stay busy, but half the batch leaves few empty places.
    """
    wanted = PASS_PIXELS.get(device_type, max(BUSY_PIXELS, batch * pixels // 2))
    return max(1, min(wanted // pixels, 4 * batch))


def read_later(number: torch.Tensor) -> Callable[[], int]:
    """Return a function that reads an integer tensor from the device.

    On CUDA it waits for the work queued until now, not for the work queued between this call and the reading: the
    device stays busy while the host waits.
    """
    if number.device.type != "cuda":
        return lambda: int(number)
    host = torch.empty([], dtype=number.dtype, pin_memory=True).copy_(number, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> int:
        copied.synchronize()
        return int(host)

    return read
