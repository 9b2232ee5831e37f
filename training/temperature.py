"""What a snapshot's logits are divided by at each noise level (training/calibration.py finds it)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

import dnnlib

__all__ = ["Temperature"]


@dataclass(frozen=True)
class Temperature:
    """What to divide logits by at noise level sigma; constant below `sigma_min` and above `sigma_max`."""

    coefficients: tuple[float, ...]  # of ln temp, by powers of ln sigma from the lowest
    sigma_min: float
    sigma_max: float

    def __call__(self, sigma: torch.Tensor) -> torch.Tensor:
        """Return the temperature at each noise level, in the shape of `sigma`."""
        x = sigma.clamp(self.sigma_min, self.sigma_max).log()
        value = torch.zeros_like(x)
        for coefficient in reversed(self.coefficients):
            value = value * x + coefficient
        return value.exp()

    def __str__(self) -> str:
        levels = dict.fromkeys((self.sigma_min, (self.sigma_min * self.sigma_max) ** 0.5, self.sigma_max))
        return ", ".join(f"{float(self(torch.tensor(level))):.2f} at sigma {level:.2g}" for level in levels)

    def plain(self) -> dict[str, Any]:
        """Return the temperature as plain data, for the info of a snapshot."""
        return asdict(self) | dict(coefficients=list(self.coefficients))

    @classmethod
    def read(cls, value: Any, path: str) -> Temperature | None:
        """Return the temperature that `plain` made; None for None. UserError that names `path`: any other value."""
        if value is None:
            return None
        try:
            coefficients = tuple(float(a) for a in value["coefficients"])
            low, high = float(value["sigma_min"]), float(value["sigma_max"])
        except (LookupError, OverflowError, TypeError, ValueError):
            raise dnnlib.UserError(f"{path}: the temperature that it records is none: {value!r:.200}") from None
        found = cls(coefficients, low, high)
        if not (coefficients and 0 < low <= high < math.inf) or not _sane(found):
            raise dnnlib.UserError(f"{path}: the temperature that it records is none: {value!r:.200}")
        return found


def _sane(temperature: Temperature) -> bool:
    x = torch.linspace(math.log(temperature.sigma_min), math.log(temperature.sigma_max), 100, dtype=torch.float64)
    temp = temperature(x.exp())
    return bool((temp.isfinite() & (temp > 0)).all())
