"""The distributions of the noise level sigma that objectives train on, and the weight lambda that belongs to each."""

from __future__ import annotations

import torch

from training.networks import vp_sigma

__all__ = ["LOWEST_SIGMA", "NoiseLevels"]

LOWEST_SIGMA = 0.002  # at which a noise-level-conditional classifier sees images as they are

_DEFAULTS = {
    "vp": dict(beta_d=19.9, beta_min=0.1, epsilon_t=1e-5),
    "ve": dict(sigma_min=0.02, sigma_max=100),
    "edm": dict(P_mean=-1.2, P_std=1.2, sigma_data=0.5),
}


class NoiseLevels:
    """Distribution and weight of a preconditioner's objective E lambda(sigma) ||D(y+n; sigma) - y||^2.

    vp: sigma(t), t uniform on [epsilon_t, 1]; lambda = 1/sigma^2.
    ve: log-uniform on [sigma_min, sigma_max]; lambda = 1/sigma^2.
    edm: ln sigma ~ N(P_mean, P_std^2); lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2.
    `settings` replace the defaults above. ValueError: no such preconditioner, or a setting it does not have.
    (Karras et al. 2022, Table 1, "Training".)
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
        """Plain data that makes an equal object: NoiseLevels(**settings())."""
        return dict(precond=self.precond, **self._settings)

    def sample(self, n: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
        """Noise levels of n images, float32 [n] on `device`, from one draw of the generator (which lives there)."""
        s = self._settings
        if self.precond == "edm":
            return (torch.randn(n, generator=generator, device=device) * s["P_std"] + s["P_mean"]).exp()
        u = torch.rand(n, generator=generator, device=device)
        if self.precond == "vp":
            return vp_sigma(1 + u * (s["epsilon_t"] - 1), s["beta_d"], s["beta_min"])
        return s["sigma_min"] * (s["sigma_max"] / s["sigma_min"]) ** u

    def weight(self, sigma: torch.Tensor) -> torch.Tensor:
        """lambda(sigma), in sigma's shape."""
        if self.precond == "edm":
            sigma_data = self._settings["sigma_data"]
            return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
        return 1 / sigma**2
