"""Noise levels: how objectives draw sigma and weight it, and the few large steps of a denoising diffusion GAN.

See docs/methods/edm.md, Noise levels, and docs/methods/rduot.md, Steps and posterior.
"""

from __future__ import annotations

import torch

from training.networks import vp_sigma

__all__ = ["LOWEST_SIGMA", "DiffusionSteps", "NoiseLevels"]

LOWEST_SIGMA = 0.002  # Here a network that depends on the noise level sees images without visible noise.

# ---------------------------------------------------------------------------------------------------------------------
# Continuous noise levels of denoisers, classifiers and discriminators

_DEFAULTS = {
    "vp": dict(beta_d=19.9, beta_min=0.1, epsilon_t=1e-5),
    "ve": dict(sigma_min=0.02, sigma_max=100),
    "edm": dict(P_mean=-1.2, P_std=1.2, sigma_data=0.5),
}


class NoiseLevels:
    """Distribution of sigma and weight lambda in the loss E lambda(sigma) ||D(y+n; sigma) - y||^2.

    vp: sigma(t), t uniform on [epsilon_t, 1]; lambda = 1/sigma^2.
    ve: log-uniform on [sigma_min, sigma_max]; lambda = 1/sigma^2.
    edm: ln sigma ~ N(P_mean, P_std^2); lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2.

    `settings` replace the defaults above. Raises ValueError for an unknown preconditioner or setting. Source: Karras et
    al. 2022, Table 1, "Training".
    """

    def __init__(self, precond: str, **settings: float):
        if precond not in _DEFAULTS:
            raise ValueError(f"precond={precond!r}: must be one of {', '.join(_DEFAULTS)}")
        unknown = settings.keys() - _DEFAULTS[precond].keys()
        if unknown:
            raise ValueError(
                f"{', '.join(sorted(unknown))}: no setting of {precond}, which has {', '.join(_DEFAULTS[precond])}"
            )
        self.precond = precond
        self._settings = _DEFAULTS[precond] | settings

    def settings(self) -> dict:
        """Return plain data from which NoiseLevels(**settings()) makes an equal object."""
        return dict(precond=self.precond, **self._settings)

    def sample(self, n: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
        """Draw noise levels for n images, float32 [n] on `device`, where the generator lives. It is used once."""
        s = self._settings
        if self.precond == "edm":
            return (torch.randn(n, generator=generator, device=device) * s["P_std"] + s["P_mean"]).exp()
        u = torch.rand(n, generator=generator, device=device)
        if self.precond == "vp":
            return vp_sigma(1 + u * (s["epsilon_t"] - 1), s["beta_d"], s["beta_min"])
        return s["sigma_min"] * (s["sigma_max"] / s["sigma_min"]) ** u

    def weight(self, sigma: torch.Tensor) -> torch.Tensor:
        """Return lambda(sigma), in the shape of sigma."""
        if self.precond == "edm":
            sigma_data = self._settings["sigma_data"]
            return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
        return 1 / sigma**2


# ---------------------------------------------------------------------------------------------------------------------
# Discrete steps of RDUOT and DDGAN


class DiffusionSteps:
    """Forward process x_0 -> x_1 -> ... -> x_T in T steps that keep the variance, and its posterior.

    The variance of the noise at time u is 1 - exp(-u^2 (beta_max - beta_min)/2 - u beta_min), and with `geometric`
    beta_min (beta_max / beta_min)^u.

    Attributes: `betas`, `a` = sqrt(1 - beta), `sigma` = sqrt(beta) and `abar`, the cumulative product of a, are float32
    [T+1]; their entry 0 is the start, with beta = 1e-8. `posterior_variance`, `coef_x0` and `coef_xt` are float32 [T];
    their entry t describes q(x_t | x_0, x_{t+1}) (Ho et al. 2020, Eq. 7). The schedules are those of Xiao et al., ICLR
    2022. Raises ValueError for fewer than one step, and unless every step adds noise and keeps some of the image.
    """

    def __init__(
        self,
        num_timesteps: int = 4,
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        device: torch.device | str = "cpu",
        geometric: bool = False,
    ):
        if num_timesteps < 1:
            raise ValueError(f"num_timesteps={num_timesteps}: must be at least 1")
        self.num_timesteps, self.beta_min, self.beta_max, self.geometric = num_timesteps, beta_min, beta_max, geometric
        time = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps * (1 - 1e-3) + 1e-3
        kept = torch.exp(-0.5 * time**2 * (beta_max - beta_min) - time * beta_min)  # 1 - var(t)
        if geometric:
            kept = 1 - beta_min * (beta_max / beta_min) ** time
        if not (kept[-1] > 0 and (kept.diff() < 0).all()):
            raise ValueError(
                f"beta_min={beta_min:g}, beta_max={beta_max:g}: "
                + ("a geometric schedule needs 0 < beta_min < beta_max < 1" if geometric else "too much noise")
            )
        first = torch.tensor([1e-8], dtype=torch.float64)
        self.betas = torch.cat([first, 1 - kept[1:] / kept[:-1]]).to(torch.float32)
        self.a, self.sigma = (1 - self.betas).sqrt(), self.betas.sqrt()
        self.abar = self.a.cumprod(dim=0)
        # The posterior starts from the clean image itself, so A_0 = 1.
        beta, alpha = self.betas[1:], (1 - self.betas[1:]).cumprod(dim=0)
        before = torch.cat([torch.ones(1), alpha[:-1]])
        self.posterior_variance = beta * (1 - before) / (1 - alpha)
        self.coef_x0 = beta * before.sqrt() / (1 - alpha)
        self.coef_xt = (1 - beta).sqrt() * (1 - before) / (1 - alpha)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(device))

    def settings(self) -> dict:
        """Return plain data from which DiffusionSteps(**settings()) makes an equal object."""
        names = ("num_timesteps", "beta_min", "beta_max", "geometric")
        return {name: getattr(self, name) for name in names}

    def diffuse(self, x_0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return x_t [N,...] for images x_0 [N,...], t [N] in 0..T and standard normal noise in the shape of x_0."""
        abar = _rows(self.abar[t], x_0)
        return abar * x_0 + (1 - abar.square()).sqrt() * noise

    def pair(
        self, x_0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor, step_noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (x_t, x_{t+1}) [N,...] for t [N] in 0..T-1. `noise` makes x_t, `step_noise` the step after it."""
        x_t = self.diffuse(x_0, t, noise)
        return x_t, _rows(self.a[t + 1], x_0) * x_t + _rows(self.sigma[t + 1], x_0) * step_noise

    def posterior(self, x_0: torch.Tensor, x_next: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Draw x_t [N,...] given x_0 and x_next = x_{t+1}, for t [N] in 0..T-1. At t = 0 the result is x_0."""
        mean = _rows(self.coef_x0[t], x_0) * x_0 + _rows(self.coef_xt[t], x_0) * x_next
        return mean + _rows(self.posterior_variance[t].sqrt(), x_0) * noise


def _rows(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    # Reshape numbers [N] so that they multiply images [N,...].
    return values.reshape(-1, *[1] * (x.ndim - 1))
