"""Per-seed randomness: an image depends on its own seed, never on the batch or the process it was made in."""

from __future__ import annotations

from collections.abc import Iterable

import torch

__all__ = ["StackedRandomGenerator"]


class StackedRandomGenerator:
    """One `torch.Generator` per seed (modulo 2^32); every draw stacks one draw from each along the first dimension.

    The stream of an image is, in this order: latents, class index, sampler noise (edm.md, Per-seed randomness).
    """

    def __init__(self, device: torch.device | str, seeds: Iterable[int]):
        self.generators = [torch.Generator(device).manual_seed(int(seed) % 2**32) for seed in seeds]

    def _item_size(self, size: Iterable[int]) -> tuple[int, ...]:
        n, *item = size
        if n != len(self.generators):
            raise ValueError(f"{len(self.generators)} seeds cannot fill a tensor of {n} items")
        return tuple(item)

    def randn(self, size: Iterable[int], **kwargs) -> torch.Tensor:
        """Standard normal numbers of shape `size` = [seeds, ...]; `kwargs` as in torch.randn."""
        item = self._item_size(size)
        return torch.stack([torch.randn(item, generator=g, device=g.device, **kwargs) for g in self.generators])

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        """Standard normal numbers of the shape and dtype of `x` [seeds, ...]."""
        return self.randn(x.shape, dtype=x.dtype)

    def randint(self, *bounds: int, size: Iterable[int], **kwargs) -> torch.Tensor:
        """Integers of shape `size` = [seeds, ...] in the range `bounds`, as in torch.randint."""
        item = self._item_size(size)
        return torch.stack(
            [torch.randint(*bounds, size=item, generator=g, device=g.device, **kwargs) for g in self.generators]
        )
