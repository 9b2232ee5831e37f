"""TF32 on a CPU: products and convolutions round their factors as CUDA would under PyTorch's present settings."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.bmm, aten.addmm, aten.baddbmm)
CONVOLUTIONS = (aten.convolution, aten.convolution_backward)


class SimulatedTF32(TorchDispatchMode):
    """Inside, float32 factors keep ten bits of their fraction where the settings allow it, also in backward passes.

    `seen` lists for each product and convolution in float32 whether its factors were rounded.
    """

    def __init__(self):
        super().__init__()
        self.seen: list[bool] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        packet = function.overloadpacket
        if packet in (*PRODUCTS, *CONVOLUTIONS):
            backend = torch.backends.cuda.matmul if packet in PRODUCTS else torch.backends.cudnn
            allowed, full = backend.allow_tf32, [is_float32(x) for x in args]
            if any(full):
                self.seen.append(allowed)
            if allowed:
                args = [rounded(x) if single else x for x, single in zip(args, full, strict=True)]
        return function(*args, **(kwargs or {}))


def is_float32(x) -> bool:
    return isinstance(x, torch.Tensor) and x.dtype == torch.float32


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Round to the nearest number with ten bits after the leading one."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
