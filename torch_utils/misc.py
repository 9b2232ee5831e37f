"""Seeds of training steps, sizes of networks and of blocks, and what the process does with freed memory."""

from __future__ import annotations

import ctypes
import platform

import torch

__all__ = ["block_rows", "count_parameters", "keep_freed_memory", "step_generator", "step_seed", "to_device"]

_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    # splitmix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"): a bijection of 64 bits.
    # Its low half is as random as its high half, which matters because some generators keep only 32 bits of a seed.
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def step_seed(seed: int, rank: int, nimg: int, stream: int = 0) -> int:
    """Return the seed, in [0, 2^63), of the training step after `nimg` images. Different streams are independent."""
    state = 0
    for value in (seed, rank, nimg, stream):
        state = _mix(state ^ (value & _MASK))
    return state >> 1


def step_generator(seed: int, rank: int, nimg: int, device: torch.device | str, stream: int = 0) -> torch.Generator:
    """Return a generator on `device` that is seeded with `step_seed(seed, rank, nimg, stream)`."""
    return torch.Generator(device).manual_seed(step_seed(seed, rank, nimg, stream))


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor of the CPU on `device`, without waiting for the work that the device still has to do.

    A copy from memory that the system may move would wait, so the tensor goes through pinned memory first.
    """
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)  # on MPS, a copy that did not wait could read memory that has been freed


def count_parameters(module: torch.nn.Module) -> int:
    """Return the number of parameters. A shared parameter counts once."""
    return sum(p.numel() for p in module.parameters())


def block_rows(width: int, device: torch.device) -> int:
    """Return the number of rows to compute at a time in a table with `width` columns.

    Such a block has 2^20 elements on a CPU, where it fits into the cache, and 2^26 on a GPU.
    """
    return max((2**26 if device.type == "cuda" else 2**20) // max(width, 1), 1)


def keep_freed_memory() -> None:
    """Make the C library keep freed memory for reuse, because page faults slow down small networks by up to 8%.

    The setting holds for the whole process. Without glibc, nothing happens.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
