"""The weights of TDSM, w_y = P(clean = y | x_t, observed = o), and clean posteriors from noisy ones.

Source: Na et al., "Label-Noise Robust Diffusion Models", ICLR 2024. Apart from the matrices themselves, which need no
PyTorch: it takes longer to import than most archives to build.
"""

from __future__ import annotations

import numpy as np
import torch

from archives.label_noise import impossible_label, inverse_transition

__all__ = ["clean_posterior", "cut_weights", "log_weights", "posterior_weights", "survivors"]


def log_weights(
    log_posterior: torch.Tensor, T: torch.Tensor, observed: torch.Tensor, check: bool = True
) -> torch.Tensor:
    """ln w_y = ln softmax_y(ln T[y, o] + ln P(y | x_t)), shape [N, C]. Bayes' rule; nothing is inverted or clamped.

    `log_posterior` [N, C]: clean log-probabilities, or logits. `T` [C, C]. `observed` int64 [N].
    UserError names an observed label whose column of T is all zero: no clean class can have produced it. Looking for
    one waits for the device: `check=False` for labels that have been through `check_observed`.
    """
    columns = T.to(log_posterior).T[observed]
    if check:
        impossible = columns.sum(dim=1) == 0
        if impossible.any():
            raise impossible_label(int(observed[impossible][0]))
    return torch.log_softmax(columns.log() + log_posterior, dim=1)


def posterior_weights(
    log_posterior: torch.Tensor, T: torch.Tensor, observed: torch.Tensor, check: bool = True
) -> torch.Tensor:
    """w = P(clean | x_t, observed), rows sum to 1, shape [N, C]: the exponential of `log_weights`."""
    return log_weights(log_posterior, T, observed, check).exp()


def survivors(weights: torch.Tensor, observed: torch.Tensor, tau: float) -> torch.Tensor:
    """Which classes stay in the sum: w_c > tau, and always the observed one. bool [N, C]."""
    return (weights > tau).scatter(1, observed[:, None], True)


def cut_weights(weights: torch.Tensor, observed: torch.Tensor, tau: float, pairs: int | None = None) -> torch.Tensor:
    """Weights with the dropped classes set to 0, without renormalising, shape [N, C].

    `pairs`: of the other classes that survive tau only so many stay, the heaviest.
    """
    weights = weights * survivors(weights, observed, tau)
    if pairs is None or pairs >= weights.shape[1] - 1:
        return weights
    others = weights.scatter(1, observed[:, None], -1)  # below all others: never among the heaviest
    heaviest = torch.cat([others.topk(pairs, dim=1).indices, observed[:, None]], dim=1)
    return torch.zeros_like(weights).scatter(1, heaviest, weights.gather(1, heaviest))


def clean_posterior(
    noisy_log_probs: torch.Tensor, T: np.ndarray | torch.Tensor, inverse: np.ndarray | torch.Tensor | None = None
) -> torch.Tensor:
    """Clean posterior P(y | x_t) [N, C] from the noisy log-posterior: T^T p = q, negatives set to 0, renormalised.

    Pass `inverse` (from `inverse_transition`, once) to skip the check of T and its inversion in every step.
    Entries can be 0: give the logarithm a floor before `log_weights`, or a label that rules out the rest gives NaN.
    """
    if inverse is None:
        inverse = inverse_transition(torch.as_tensor(T).detach().cpu().numpy())
    dtype = torch.float32 if noisy_log_probs.device.type == "mps" else torch.float64  # mps has no float64
    q = noisy_log_probs.to(dtype).exp()
    p = (q @ torch.as_tensor(inverse).to(q)).clamp(min=0)
    return (p / p.sum(dim=1, keepdim=True)).to(noisy_log_probs.dtype)
