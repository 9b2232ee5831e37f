"""The few large steps of a denoising diffusion GAN: schedule, training pairs, posterior (Xiao et al., ICLR 2022)."""

from __future__ import annotations

import torch

__all__ = ["DiffusionSteps"]


class DiffusionSteps:
    """Forward process x_0 -> x_1 -> ... -> x_T in T steps of the variance-preserving schedule, and its posterior.

    `betas`, `a` = sqrt(1 - beta), `sigma` = sqrt(beta), `abar` (cumulative product of a): float32 [T+1], whose entry 0
    is the start, beta 1e-8. `posterior_variance`, `coef_x0`, `coef_xt`: float32 [T], entry t describes
    q(x_t | x_0, x_{t+1}) (Ho et al. 2020, Eq. 7). ValueError: fewer than one step.
    """

    def __init__(
        self, num_timesteps: int = 4, beta_min: float = 0.1, beta_max: float = 20.0, device: torch.device | str = "cpu"
    ):
        if num_timesteps < 1:
            raise ValueError(f"num_timesteps={num_timesteps}: must be at least 1")
        self.num_timesteps, self.beta_min, self.beta_max = num_timesteps, beta_min, beta_max
        time = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps * (1 - 1e-3) + 1e-3
        kept = torch.exp(-0.5 * time**2 * (beta_max - beta_min) - time * beta_min)  # 1 - var
        first = torch.tensor([1e-8], dtype=torch.float64)
        self.betas = torch.cat([first, 1 - kept[1:] / kept[:-1]]).to(torch.float32)
        self.a, self.sigma = (1 - self.betas).sqrt(), self.betas.sqrt()
        self.abar = self.a.cumprod(dim=0)
        # The posterior starts from the clean image itself: A_0 = 1.
        beta, alpha = self.betas[1:], (1 - self.betas[1:]).cumprod(dim=0)
        before = torch.cat([torch.ones(1), alpha[:-1]])
        self.posterior_variance = beta * (1 - before) / (1 - alpha)
        self.coef_x0 = beta * before.sqrt() / (1 - alpha)
        self.coef_xt = (1 - beta).sqrt() * (1 - before) / (1 - alpha)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(device))

    def settings(self) -> dict:
        """Plain data that makes an equal object: DiffusionSteps(**settings())."""
        return dict(num_timesteps=self.num_timesteps, beta_min=self.beta_min, beta_max=self.beta_max)

    def diffuse(self, x_0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """x_t [N,...] of images x_0 [N,...] at the entries t [N], 0 to T, with noise like x_0."""
        abar = _rows(self.abar[t], x_0)
        return abar * x_0 + (1 - abar.square()).sqrt() * noise

    def pair(
        self, x_0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor, step_noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(x_t, x_{t+1}) [N,...] for t [N] in 0..T-1, each with its own noise like x_0."""
        x_t = self.diffuse(x_0, t, noise)
        return x_t, _rows(self.a[t + 1], x_0) * x_t + _rows(self.sigma[t + 1], x_0) * step_noise

    def posterior(self, x_0: torch.Tensor, x_next: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """A sample of x_t [N,...] given x_0 and x_{t+1}, for t [N] in 0..T-1; at t = 0 it is x_0, without noise."""
        mean = _rows(self.coef_x0[t], x_0) * x_0 + _rows(self.coef_xt[t], x_0) * x_next
        return mean + _rows(self.posterior_variance[t].sqrt(), x_0) * noise


def _rows(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Numbers [N] in the shape that multiplies images [N,...]."""
    return values.reshape(-1, *[1] * (x.ndim - 1))
