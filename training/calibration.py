"""How certain a network may be at each noise level, found from held-out targets (docs/methods/tdsm.md, "Temperature").

    L = sum_i ln P(o_i | x_i, sigma_i),    P(o | x, sigma) = sum_y T[y,o] softmax(h(x, sigma) / temp(sigma))_y

    ln temp(sigma) = a_0 + a_1 ln sigma + a_2 (ln sigma)^2

x_i: an image at noise level sigma_i that the network has not trained on; o_i: its observed label; h: the logits;
T[y,o] = P(observed = o | clean = y). The temperature that makes the held-out labels most likely makes the network
honest, because L is largest in expectation where P(o | x, sigma) is the true one. T is fixed: fitted together with the
temperature, softer answers would explain the wrong labels, and T would approach the identity.

Without T, the softmax itself is the distribution of the targets, which may then be soft: o_i drawn from shares t_io.
Targets of two classes may be doubtful: with probability d_i, target i is the class that it should not be. Then the
likelihood is that of (1 - d_i) P(t_i | x_i, sigma_i) + d_i (1 - P(t_i | x_i, sigma_i)), and a network is not asked to
share the doubts of whoever made the targets.
"""

from __future__ import annotations

import math

import numpy as np
import scipy.optimize
import torch
from numpy.polynomial import Polynomial

from torch_utils.precision import widest
from training.temperature import Temperature

__all__ = ["fit_temperature", "mean_log_likelihood"]

GRID = np.linspace(-3, 3, 25)  # of ln temp, constant over the noise levels: the likelihood may have several peaks
LIMIT = 3.0  # of the coefficients, in units of the spread of ln sigma
PRIOR = (1.0, 0.5, 0.25)  # standard deviations of the coefficients around 0, which is temp 1
DROP = 1.92  # of the log-likelihood from its peak to the limits of a 95% interval: half of chi^2 with one degree
MOST = math.log(2)  # by how much ln temp may lie below its most likely value, where nothing contradicts
TAILS = 0.01  # share of the noise levels at either end to which the polynomial does not reach


def mean_log_likelihood(
    logits: torch.Tensor,
    targets: torch.Tensor,
    T: torch.Tensor | None = None,
    temp: torch.Tensor | float = 1.0,
    doubt: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the mean of ln P(o | x) at the temperatures `temp` [N]; the other arguments as in `fit_temperature`."""
    logits, targets, columns = _as_classes(logits, targets, T)
    temp = torch.as_tensor(temp, dtype=logits.dtype, device=logits.device)
    return _log_likelihoods(logits, targets, columns, temp.reshape(-1, 1), doubt).mean()


def fit_temperature(
    logits: torch.Tensor,
    sigma: torch.Tensor,
    targets: torch.Tensor,
    T: torch.Tensor | None = None,
    images: int | None = None,
    certain: bool = False,
    doubt: torch.Tensor | None = None,
) -> Temperature:
    """Return the temperature at which held-out targets are most likely.

    With `certain`, return the lowest one that they do not contradict (a 95% interval), at least half of the most likely
    one. The more images there are, the nearer the two are to each other. Few noisy labels hardly tell 3% of doubt from
    10%: a sample of them has more or fewer wrong labels than T says. Where doubt does more harm than certainty, it
    needs the evidence.

    `logits` [N,C], of each image at noise level `sigma` [N]. `targets`: observed classes int64 [N], or shares of the
    classes [N,C]. `T` [C,C]: what turns the classes of the logits into those of `targets` int64 [N]. A network of two
    classes may have one logit: `logits` [N], `targets` [N] from 0 to 1. `images`: how many different images these are
    (None: N); the same image at further noise levels is not further evidence against temp 1, where the prior is.
    `doubt` [N]: the probability that a target of two classes is the wrong one of them; ValueError with more classes.
    """
    logits, targets, columns = _as_classes(logits.detach(), targets, T)
    x = sigma.detach().to(logits).log()
    low, high = (float(x.quantile(q)) for q in (TAILS, 1 - TAILS))
    x = x.clamp(low, high)
    center, spread = float(x.mean()), max(float(x.std(correction=0)), 1e-3)
    powers = ((x - center) / spread)[:, None] ** torch.arange(len(PRIOR), device=x.device)
    evidence = (images or len(x)) / len(x)

    def likelihood(a: torch.Tensor) -> torch.Tensor:
        temp = (powers @ a.to(powers)).clamp(-2 * LIMIT, 2 * LIMIT).exp()
        found = _log_likelihoods(logits, targets, columns, temp[:, None], doubt)
        return evidence * found.sum().to("cpu", torch.float64)

    def negative(a: np.ndarray) -> tuple[float, np.ndarray]:
        a = torch.tensor(a, dtype=torch.float64, requires_grad=True)
        loss = (a / torch.tensor(PRIOR)).square().sum() / 2 - likelihood(a)
        loss.backward()
        return loss.item(), a.grad.numpy()

    rest = [0.0] * (len(PRIOR) - 1)
    start = min(([float(a), *rest] for a in GRID), key=lambda a: negative(np.array(a))[0])
    bounds = [(-LIMIT, LIMIT)] * len(PRIOR)
    found = scipy.optimize.minimize(negative, start, jac=True, method="L-BFGS-B", bounds=bounds).x
    if certain:

        def spare(down: float) -> float:
            fall = peak - float(likelihood(torch.tensor(found - [down, *rest])))
            return 1 - fall / DROP - (down / MOST) ** 2

        peak = float(likelihood(torch.tensor(found)))
        found[0] -= MOST if spare(MOST) >= 0 else scipy.optimize.brentq(spare, 0, MOST, xtol=1e-3)
    polynomial = Polynomial(found)(Polynomial([-center / spread, 1 / spread]))
    return Temperature(tuple(polynomial.coef.tolist()), math.exp(low), math.exp(high))


def _as_classes(
    logits: torch.Tensor, targets: torch.Tensor, T: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    # In float64 where the device has it: T's small entries meet probabilities that are smaller still.
    logits = logits.to(widest(logits.device))
    if logits.ndim == 1:
        logits = torch.stack([torch.zeros_like(logits), logits], dim=1)
        targets = torch.stack([1 - targets, targets], dim=1)
    if targets.is_floating_point():
        return logits, targets.to(logits), None
    return logits, targets, None if T is None else T.detach().to(logits).T[targets].log()


def _log_likelihoods(
    logits: torch.Tensor,
    targets: torch.Tensor,
    columns: torch.Tensor | None,
    temp: torch.Tensor,
    doubt: torch.Tensor | None = None,
) -> torch.Tensor:
    # columns: ln T[:,o] of each image [N,C]
    log_p = torch.log_softmax(logits / temp, dim=1)
    if doubt is not None:
        if log_p.shape[1] != 2:
            raise ValueError(f"doubtful targets must be of two classes, these are of {log_p.shape[1]}")
        doubt = doubt.to(log_p)[:, None]
        log_p = torch.logaddexp(log_p + (1 - doubt).log(), log_p.flip(1) + doubt.log())
    if columns is not None:
        return torch.logsumexp(log_p + columns, dim=1)
    if targets.is_floating_point():
        return (log_p * targets).sum(dim=1)
    return log_p.gather(1, targets[:, None])[:, 0]
