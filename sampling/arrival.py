"""Images on their way from the device to the CPU, without waiting for what the device still computes."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["Arrival"]


class Arrival:
    """Starts to copy images, float [N,C,H,W] in [-1,1], and their classes [N] to the CPU; `wait` returns them."""

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
        """Return images uint8 [N,H,W,C] and classes int64 [N] or None. FloatingPointError: NaN or infinity in them."""
        if self._event is not None:
            self._event.synchronize()
        finite, images, classes = self._copies
        if not finite:
            raise FloatingPointError("the images hold values that are not finite")
        return images.numpy(), None if classes is None else classes.numpy()
