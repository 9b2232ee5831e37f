"""The factor on the loss while gradients are computed: without it, small gradients vanish in float16."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["LossScale"]

START = 2.0**16  # the first factor, too large rather than too small: a few skipped steps correct it
LARGEST = 2.0**32
GROW_AFTER = 2000  # steps in a row without overflow


class LossScale:
    """A fixed factor, or with `device` one that adapts (Micikevicius et al., "Mixed Precision Training", ICLR 2018).

    The adapting factor starts at 2^16 `factor`. It is halved when gradients overflow, and doubled after 2000 steps
    without overflow. It stays on the device, so that nothing waits for it. It follows from the gradients, so all
    processes have the same one.
    """

    def __init__(self, factor: float = 1.0, device: torch.device | None = None):
        self.adapts = device is not None
        self.factor: float | torch.Tensor = factor
        if self.adapts:
            self.factor = torch.full([], START * factor, device=device)
            self.good_steps = torch.zeros([], dtype=torch.int64, device=device)

    def update(self, bad: torch.Tensor) -> torch.Tensor:
        """Adapt the factor after a step with `bad` non-finite gradient elements, which the optimizer has skipped.

        Returns how many of them remain a fault: none while a smaller factor may help.
        """
        fault = torch.where(self.factor > 1, 0, bad)
        self.good_steps = torch.where(bad > 0, 0, self.good_steps + 1)
        grow = self.good_steps >= GROW_AFTER
        self.good_steps = torch.where(grow, 0, self.good_steps)
        changed = torch.where(bad > 0, self.factor / 2, torch.where(grow, self.factor * 2, self.factor))
        self.factor = changed.clamp(1, LARGEST)
        return fault

    def state_dict(self) -> dict[str, Any]:
        """Return the factor and the steps since the last overflow, as plain numbers."""
        return dict(factor=float(self.factor), good_steps=int(self.good_steps))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.factor = torch.full_like(self.factor, state["factor"])
        self.good_steps = torch.full_like(self.good_steps, state["good_steps"])
