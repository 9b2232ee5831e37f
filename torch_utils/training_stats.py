"""Statistics of a run, collected where they arise and combined over all processes once per tick."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch

from torch_utils import distributed

__all__ = ["Stats"]

_ROWS = 64  # tables are padded to a multiple of this, so that different names fail our check and not the collective


class Stats:
    """Count, mean and standard deviation of named values.

    Within a tick, every process must report the same names.
    """

    def __init__(self, device: torch.device | str):
        self._device = torch.device(device)
        self._dtype = torch.float32 if self._device.type == "mps" else torch.float64
        self._sums: dict[str, torch.Tensor] = {}  # name: count, sum, sum of squares

    def add(self, name: str, value: torch.Tensor | float, mask: torch.Tensor | None = None) -> None:
        """Count every element of `value` (any shape) under `name`. This does not wait for the device.

        With `mask` (bool, same shape), only the elements where it is true count.
        """
        if not isinstance(value, torch.Tensor):
            value = torch.tensor(value, dtype=self._dtype)
        value = value.detach().to(self._dtype)
        if name not in self._sums:
            self._sums[name] = torch.zeros(3, dtype=self._dtype, device=self._device)
        total = self._sums[name]
        if mask is None:
            total[0].add_(value.numel())
        else:
            total[0].add_(mask.sum())
            value = torch.where(mask, value, 0)
        total[1].add_(value.sum())
        total[2].add_(value.square().sum())

    def reduce(self) -> Mapping[str, dict[str, float]]:
        """Return the statistics since the last call, over all processes, as {name: {num, mean, std}}; then start again.

        This is one collective. Raises RuntimeError when the processes report different names.
        """
        names = sorted(self._sums)
        table = torch.zeros(-(-(len(names) + 1) // _ROWS) * _ROWS, 3, dtype=self._dtype)
        # The first row is a checksum of the names, small enough that its square is exact in float64.
        check = zlib.crc32("\n".join(names).encode()) & 0xFFFF
        table[0, 1], table[0, 2] = check, check**2
        table = table.to(self._device)
        if names:
            table[1 : len(names) + 1] = torch.stack([self._sums[name] for name in names])
        table = distributed.all_reduce_sum(table).double().cpu()
        size = distributed.get_world_size()
        # One process agrees with itself, and on MPS, which has no float64, the square would be rounded.
        if size > 1 and (table[0, 1] != size * check or table[0, 2] != size * check**2):
            raise RuntimeError(f"processes report different statistics; rank {distributed.get_rank()} has {names}")
        self._sums.clear()
        result = {}
        for name, (num, total, squares) in zip(names, table[1 : len(names) + 1].tolist(), strict=True):
            mean = total / num if num else float("nan")
            var = squares / num - mean**2 if num else float("nan")
            result[name] = {"num": int(num), "mean": mean, "std": max(var, 0.0) ** 0.5 if var == var else var}
        return result
