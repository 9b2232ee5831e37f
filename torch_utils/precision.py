"""The precision of arithmetic: TF32, which CUDA may use for float32, autocast, and the widest type of a device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["full_float32", "no_autocast", "tf32", "widest"]


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Let CUDA round the factors of float32 products and convolutions to TF32's ten-bit fractions inside, or forbid it.

    PyTorch forbids it in matrix products and allows it in convolutions unless told otherwise. Products of half
    precision are always summed in float32 inside. The settings hold for the whole process, also for threads. Functions
    and methods take this as a decorator, too.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    settings = [
        (cudnn, "allow_tf32", allowed),
        (matmul, "allow_tf32", allowed),
        (matmul, "allow_fp16_reduced_precision_reduction", False),
        (matmul, "allow_bf16_reduced_precision_reduction", False),
    ]
    before = [(backend, name, getattr(backend, name)) for backend, name, _ in settings]
    try:
        for setting in settings:
            setattr(*setting)
        yield
    finally:
        for setting in before:
            setattr(*setting)


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Compute float32 in all its digits inside, whatever autocast and TF32 do outside."""
    with tf32(False), no_autocast(device):
        yield


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Compute in the types that the tensors have, whatever autocast does outside."""
    # The device "meta", on which networks are only counted, has no autocast.
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def widest(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on MPS, which has nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64
