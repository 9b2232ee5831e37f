"""Judge labels by Bayes' rule: the observed label is evidence, and the classifier's certainty is measured first.

    P(y | x, o) = T[y,o] p_y(x) / sum_c T[c,o] p_c(x)          P(wrong | x, o) = 1 - P(o | x, o)

x: an image; o: its observed label; p(x): the classifier's clean posterior, at the temperature that makes held-out noisy
labels most likely (training/calibration.py); T[y,o] = P(observed = o | clean = y), estimated from the same images.

A label is believed wrong when P(wrong) is above one half. The noise rate is the mean of P(wrong) over all images, which
is another number than the share of labels believed wrong: of ten labels that are wrong with probability 0.1, one is
wrong, and none is believed wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from training.calibration import Profile
from training.objectives.tdsm import posterior_weights

__all__ = ["Judgement", "judge"]

SAMPLE = 40_000  # images that temperature and T are estimated from
ROWS = 4096  # images at a time


@dataclass
class Judgement:
    """What the images say about their labels."""

    posterior: np.ndarray  # [N,C] float32, P(y | x, o)
    transition: np.ndarray  # [C,C] float64, T
    noise_rate: float  # mean of P(wrong | x, o)
    noise_interval: tuple[
        float, float
    ]  # 95%; it knows how surely the temperature is found, not how the classifier errs
    temp: float  # what the classifier's logits are divided by


def judge(
    logits: np.ndarray, observed: np.ndarray, held_out: np.ndarray | None = None, T: np.ndarray | None = None
) -> Judgement:
    """Return the judgement of observed labels int64 [N] by clean log-probabilities or logits, float32 [N,C].

    `held_out` bool [N]: the images that the classifier has not trained on, which the temperature comes from; None: all.
    `T` [C,C]: the transition where it is known. The posterior takes the place of `logits`: with many images and classes
    there is no room for a second table.
    """
    rng = np.random.default_rng(0)
    held_out = np.ones(len(observed), dtype=bool) if held_out is None else held_out
    # Held-out images come first: they are fewer.
    rows = np.concatenate([rng.permutation(np.flatnonzero(part)) for part in (held_out, ~held_out)])[:SAMPLE]
    profile = Profile(
        torch.from_numpy(logits[rows]).double(),
        torch.from_numpy(observed[rows]),
        torch.from_numpy(held_out[rows]),
        None if T is None else torch.from_numpy(np.asarray(T, dtype=np.float64)),
    )
    table, labels = torch.from_numpy(logits), torch.from_numpy(observed)
    for part, given in zip(table.split(ROWS), labels.split(ROWS), strict=True):
        part.copy_(posterior_weights(part.double() / profile.temp, profile.transition, given, check=False))
    rate = 1 - float(np.take_along_axis(logits, observed[:, None], 1).mean(dtype=np.float64))
    low, high = profile.rate_limits()
    interval = max(rate + low, 0.0), min(rate + high, 1.0)
    return Judgement(logits, profile.transition.numpy(), rate, interval, profile.temp)
