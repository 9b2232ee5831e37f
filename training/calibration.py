"""How sure a classifier of clean labels may be, found from noisy labels (docs/methods/sbdc.md, section 1).

    L(temp, T) = sum_i ln P(o_i | x_i),    P(o | x) = sum_y T[y,o] p_y(x),    p(x) = softmax(logits(x) / temp)

x_i: an image that the classifier has not trained on; o_i: its observed label; T[y,o] = P(observed = o | clean = y).
Classifiers are too sure of themselves, most of all those that a method sharpens. The temperature that makes the
held-out noisy labels most likely makes p honest, because L is largest in expectation where P(o | x) is the true one.

Given p, the same likelihood gives T by expectation-maximization: with w_iy = P(y | x_i, o_i) by Bayes' rule,

    T[y,o] = (sum of w_iy over i with o_i = o, plus prior) / (sum of w_iy over all i, plus prior).
"""

from __future__ import annotations

import math

import scipy.optimize
import torch

__all__ = ["Profile", "estimate_transition", "fit_temperature", "log_likelihoods"]

TEMPERATURES, GRID = (0.05, 20.0), 13  # the temperatures that are tried, the first ones on a grid of logarithms
PRIOR = 10.0  # images by which each row of T is drawn to symmetric noise at the common rate
ROUNDS = 200  # of expectation-maximization at most
CHANGE = 1e-5  # of the largest entry of T, below which it has converged
TINY = 1e-30  # stands for probability 0 where a logarithm or a quotient follows
DROP = 1.92  # of the log-likelihood from its peak to the limits of a 95% interval: half of chi^2 with one degree


def log_likelihoods(logits: torch.Tensor, T: torch.Tensor, observed: torch.Tensor, temp: float = 1.0) -> torch.Tensor:
    """Return ln P(o | x) of each image, [N], from logits [N,C], T [C,C] and observed labels int64 [N]."""
    p = torch.softmax(logits / temp, dim=1)
    return (p * T.T[observed]).sum(dim=1).clamp_min(TINY).log()


def estimate_transition(p: torch.Tensor, observed: torch.Tensor) -> torch.Tensor:
    """Return T [C,C] in p's type, given clean posteriors p(x) [N,C] and observed labels int64 [N].

    A prior of PRIOR images of symmetric noise at the common rate keeps rows with few images sane.
    """
    c = p.shape[1]
    eye = torch.eye(c, dtype=p.dtype, device=p.device)
    T = _symmetric(0.5, eye)
    by_label = torch.nn.functional.one_hot(observed, c).to(p)
    for _ in range(ROUNDS):
        joint = p * T.T[observed]
        joint = by_label.T @ (joint / joint.sum(dim=1, keepdim=True).clamp_min(TINY))  # [observed, clean]
        rate = 1 - float(joint.diagonal().sum() / joint.sum())
        counts = joint.T + PRIOR * _symmetric(rate, eye)
        before, T = T, counts / counts.sum(dim=1, keepdim=True)
        if float((T - before).abs().max()) < CHANGE:
            break
    return T


def fit_temperature(logits: torch.Tensor, observed: torch.Tensor, T: torch.Tensor) -> float:
    """Return the temperature, from 0.05 to 20, at which held-out noisy labels are most likely."""
    return Profile(logits, observed, T=T).temp


class Profile:
    """The likelihood of held-out noisy labels at each temperature, with the T that suits this temperature.

    Temperature and T are not fitted in turns: a temperature that is too high lets T come nearer to the identity, and
    this T asks for a temperature that is higher still.

    `logits` [N,C] and `observed` int64 [N] are those of all images, which T is estimated from unless it is given.
    `held_out` bool [N] says which of them the classifier has not trained on; None: all. `temp` is the most likely
    temperature, `transition` the T that goes with it.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        observed: torch.Tensor,
        held_out: torch.Tensor | None = None,
        T: torch.Tensor | None = None,
    ):
        self._logits, self._observed, self._given = logits, observed, T
        self._held_out = slice(None) if held_out is None else held_out
        self._known: dict[float, tuple[float, torch.Tensor]] = {}
        # There may be several peaks: a coarse grid finds the highest, a bounded search its top.
        grid = torch.linspace(*(math.log(t) for t in TEMPERATURES), GRID).tolist()
        best = max(range(GRID), key=lambda i: self.likelihood(grid[i]))
        bounds = grid[max(best - 1, 0)], grid[min(best + 1, GRID - 1)]
        self._top = scipy.optimize.minimize_scalar(
            lambda t: -self.likelihood(t), bounds=bounds, method="bounded", options=dict(xatol=1e-2)
        ).x

    @property
    def temp(self) -> float:
        """The most likely temperature."""
        return math.exp(self._top)

    @property
    def transition(self) -> torch.Tensor:
        """T [C,C] at the most likely temperature."""
        return self._at(self._top)[1]

    def likelihood(self, log_temp: float) -> float:
        """Return the log-likelihood of all held-out labels together."""
        return self._at(log_temp)[0]

    def rate(self, log_temp: float) -> float:
        """Return the mean of P(wrong | x, o) over all images."""
        p = torch.softmax(self._logits / math.exp(log_temp), dim=1)
        w = p * self._at(log_temp)[1].T[self._observed]
        right = w.gather(1, self._observed[:, None])[:, 0] / w.sum(dim=1).clamp_min(TINY)
        return 1 - float(right.mean())

    def rate_limits(self) -> tuple[float, float]:
        """Return how far the rate at the limits of the temperature's 95% interval lies from the rate at its peak.

        The first number is at most 0, the second at least 0.
        """
        peak, top = self.likelihood(self._top), self.rate(self._top)
        differences = [0.0]
        for end in map(math.log, TEMPERATURES):
            limit = end
            if self.likelihood(end) < peak - DROP:
                limit = scipy.optimize.brentq(lambda t: self.likelihood(t) - peak + DROP, self._top, end, xtol=1e-2)
            differences.append(self.rate(limit) - top)
        return min(differences), max(differences)

    def _at(self, log_temp: float) -> tuple[float, torch.Tensor]:
        if log_temp not in self._known:
            temp = math.exp(log_temp)
            T = self._given
            if T is None:
                T = estimate_transition(torch.softmax(self._logits / temp, dim=1), self._observed)
            held_out = self._held_out
            likely = log_likelihoods(self._logits[held_out], T, self._observed[held_out], temp).sum()
            self._known[log_temp] = float(likely), T
        return self._known[log_temp]


def _symmetric(rate: float, eye: torch.Tensor) -> torch.Tensor:
    others = rate / max(len(eye) - 1, 1)
    return others + (1 - rate - others) * eye
