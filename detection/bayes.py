"""Judge labels by Bayes' rule: the observed label is evidence (docs/methods/sbdc.md, section 1).

    P(y | x, o) = T[y,o] p_y(x) / sum_c T[c,o] p_c(x)          P(wrong | x, o) = 1 - P(o | x, o)

x: an image; o: its observed label; p(x): the classifier's posterior of the clean classes, at a temperature; T[y,o] =
P(observed = o | clean = y), counted at anchor points (training/transition_estimate.py).

Classifiers are too certain, and then too many labels seem wrong, or not certain enough, and then too few do. T does not
depend on how certain p is, but the mean of P(wrong) does. So the temperature is the one at which that mean is the rate
of wrong labels that T implies. (The likelihood of the labels through T would serve too if the noise did not depend on
the image. Where it does, the likelihood explains wrong labels by a softer p: 15% instead of 40% wrong labels were
found.)

A label is believed wrong when P(wrong) is above one half. The noise rate is the mean of P(wrong) over all images. It is
another number than the share of labels believed wrong: of ten labels that are wrong with probability 0.1, about one is
wrong, and none is believed wrong.

All this takes p from images alone. A classifier that has learned a small set by heart has seen the labels that it
judges, and its answer already counts them: `judge_seen` takes it for P(y | x, o).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import scipy.optimize
import torch

import dnnlib
from archives.label_noise import row_stochastic, seen_rows
from training.objectives.tdsm import posterior_weights
from training.transition_estimate import estimate_transition, noise_rate

__all__ = ["Judgment", "judge", "judge_seen"]

ROWS = 1024  # images at a time
TINY = 1e-6  # smallest entry of T
SAMPLE = 20_000  # images that choose the temperature
COLDEST, HOTTEST, STEPS = 0.2, 10.0, 12  # lowest and highest temperature; steps of the search from 1 to either
DEVIATIONS = 1.96  # standard deviations to either side of the interval: 95%


@dataclass
class Judgment:
    """What images and their labels say about the labels."""

    posterior: np.ndarray  # [N,C] float32, P(y | x, o)
    transition: np.ndarray  # [C,C] float64, T
    rate: float  # the share of wrong labels: mean of P(wrong | x, o)
    interval: tuple[float, float]  # around it, see `judge`
    confusion: np.ndarray  # [C,C] float64, mean of p(x) over the images of each class: row y says what y looks like
    temp: float = 1.0  # what the classifier's log-probabilities are divided by


def judge(
    log_probs: np.ndarray, observed: np.ndarray, T: np.ndarray | None = None, temp: float | None = None
) -> Judgment:
    """Return the judgment of observed labels int64 [N] by the clean log-posterior ln p(x), float32 [N,C].

    `T` [C,C] and `temp`: transition and temperature where they are known. The posterior takes the place of `log_probs`:
    with many images and classes there is no room for a second table.

    The interval of the rate holds what the classifier says at temperature 1, what T implies, and 1.96 standard
    deviations of a count of N labels.
    """
    n, c = log_probs.shape
    _check_finite(log_probs)
    if T is None:
        T = estimate_transition(log_probs, observed)
    T = row_stochastic(np.maximum(T, TINY))  # nothing is impossible: every observed label has a cause
    implied = noise_rate(T, observed)
    sample = np.random.default_rng(0).permutation(n)[:SAMPLE]
    certain = _mean_wrong(log_probs, observed, T, sample, 1.0)

    def excess(log_temp: float) -> float:
        return _mean_wrong(log_probs, observed, T, sample, math.exp(log_temp)) - implied

    if temp is None:
        temp = math.exp(_nearest_root(excess, certain - implied))
    confusion, right = np.zeros([c, c]), 0.0
    for start in range(0, n, ROWS):
        rows, given = log_probs[start : start + ROWS], observed[start : start + ROWS]
        p = torch.from_numpy(rows).double() / temp
        weights = posterior_weights(p, torch.from_numpy(T), torch.from_numpy(given), check=False)
        confusion += (weights.T @ torch.softmax(p, dim=1)).numpy()
        rows[:] = weights.numpy()
        right += float(np.take_along_axis(rows, given[:, None], 1).sum(dtype=np.float64))
    rate = 1 - right / max(n, 1)
    confusion = seen_rows(confusion, observed)
    return Judgment(log_probs, T, rate, _interval(n, rate, implied, certain), confusion, temp)


def judge_seen(log_probs: np.ndarray, observed: np.ndarray) -> Judgment:
    """Return the judgment of labels int64 [N] that the classifier has seen: its log-posterior [N,C] is ln P(y | x, o).

    T[y,o] is the share of the label o in the posterior of class y. The posterior takes the place of `log_probs`. The
    interval holds the share of labels that are not the most probable class, too.
    """
    n, c = log_probs.shape
    _check_finite(log_probs)
    labels, confusion = np.zeros([c, c]), np.zeros([c, c])  # what images of each class carry, and what they look like
    right, less_probable = 0.0, 0
    for start in range(0, n, ROWS):
        rows, given = log_probs[start : start + ROWS], observed[start : start + ROWS]
        np.exp(rows, out=rows)
        rows /= rows.sum(axis=1, keepdims=True)
        np.add.at(labels.T, given, rows)
        confusion += rows.T.astype(np.float64) @ rows
        right += float(np.take_along_axis(rows, given[:, None], 1).sum(dtype=np.float64))
        less_probable += int((rows.argmax(axis=1) != given).sum())
    rate = 1 - right / max(n, 1)
    T = row_stochastic(np.maximum(seen_rows(labels, observed), TINY))
    confusion = seen_rows(confusion, observed)
    return Judgment(log_probs, T, rate, _interval(n, rate, less_probable / max(n, 1)), confusion)


def _check_finite(log_probs: np.ndarray) -> None:
    if np.isnan(log_probs.sum(dtype=np.float64)):
        raise dnnlib.UserError("the classifier's answers are not numbers, so it has diverged; lower its learning rate")


def _interval(n: int, *estimates: float) -> tuple[float, float]:
    """Return the interval that holds all estimates of a rate and 1.96 standard deviations of a count of n labels."""
    spread = DEVIATIONS * max((r * (1 - r) / max(n, 1)) ** 0.5 for r in estimates)
    return max(min(estimates) - spread, 0.0), min(max(estimates) + spread, 1.0)


def _mean_wrong(log_probs: np.ndarray, observed: np.ndarray, T: np.ndarray, rows: np.ndarray, temp: float) -> float:
    """Return the mean of P(wrong | x, o) over the images `rows`, at a temperature."""
    right = 0.0
    for part in np.split(rows, range(ROWS, len(rows), ROWS)):
        p, labels = torch.from_numpy(log_probs[part]).double() / temp, torch.from_numpy(observed[part])
        weights = posterior_weights(p, torch.from_numpy(T), labels, check=False)
        right += float(weights.gather(1, labels[:, None]).sum())
    return 1 - right / max(len(rows), 1)


def _nearest_root(excess: Callable[[float], float], at_zero: float) -> float:
    """Return the root of `excess` nearest to 0 in the direction in which it falls in size, or where it is smallest.

    The mean of P(wrong) first falls with the temperature, and rises again where p says nothing any more.
    """
    grid = np.linspace(0, math.log(HOTTEST if at_zero > 0 else COLDEST), STEPS + 1)
    values = [at_zero]
    for before, here in pairwise(grid):
        values.append(excess(here))
        if values[-1] * at_zero <= 0:
            return scipy.optimize.brentq(excess, min(before, here), max(before, here), xtol=1e-3)
    return float(grid[np.argmin(np.abs(values))])
