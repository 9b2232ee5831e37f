"""Random numbers that belong to seeds: what a seed draws depends on nothing else."""

from __future__ import annotations

from collections.abc import Iterable

import torch

__all__ = ["StackedRandomGenerator"]


class StackedRandomGenerator:
    """One `torch.Generator` per seed (modulo 2^32); every draw stacks one draw from each along the first dimension.

    An image draws in this order: latents, class index, sampler noise (docs/methods/edm.md, Per-seed randomness).
    """

    def __init__(self, device: torch.device | str, seeds: Iterable[int]):
        self.generators = [torch.Generator(device).manual_seed(int(seed) % 2**32) for seed in seeds]

    def take(self, items: Iterable[int], fill: int = 0) -> StackedRandomGenerator:
        """Return the generators of these seeds, which go on drawing, and `fill` copies of the last one."""
        taken = StackedRandomGenerator("cpu", [])
        taken.generators = [self.generators[i] for i in items]
        last = taken.generators[-1]
        taken.generators += [last.clone_state() for _ in range(fill)]
        return taken

    def _item_size(self, size: Iterable[int]) -> tuple[int, ...]:
        n, *item = size
        if n != len(self.generators):
            raise ValueError(f"{len(self.generators)} seeds cannot fill a tensor of {n} items")
        return tuple(item)

    def randn(self, size: Iterable[int], **kwargs) -> torch.Tensor:
        """Return standard normal numbers of shape `size` = [seeds, ...]; `kwargs` as in torch.randn."""
        item = self._item_size(size)
        return torch.stack([torch.randn(item, generator=g, device=g.device, **kwargs) for g in self.generators])

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        """Return standard normal numbers of the shape and dtype of `x` [seeds, ...]."""
        return self.randn(x.shape, dtype=x.dtype)

    def rand(self, size: Iterable[int], **kwargs) -> torch.Tensor:
        """Return numbers of [0, 1), all equally probable, of shape `size` = [seeds, ...]."""
        item = self._item_size(size)
        return torch.stack([torch.rand(item, generator=g, device=g.device, **kwargs) for g in self.generators])

    def randint(self, *bounds: int, size: Iterable[int], **kwargs) -> torch.Tensor:
        """Return integers of shape `size` = [seeds, ...] within `bounds`, as in torch.randint."""
        item = self._item_size(size)
        return torch.stack(
            [torch.randint(*bounds, size=item, generator=g, device=g.device, **kwargs) for g in self.generators]
        )
