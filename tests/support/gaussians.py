"""Classes that are Gaussians, with label noise: exact denoisers and the optimal discriminator."""

import math

import numpy as np
import torch

from archives.label_noise import transition_matrix
from training.objectives.discriminator import Shuffle

PRIORS = np.array([0.5, 0.3, 0.2])
MEANS = torch.tensor([[-2.0, 0.0], [2.0, 1.0], [0.5, -2.5]], dtype=torch.float64)
STD = 0.3
ASYM = np.array([[0.6, 0.4, 0.0], [0.0, 1.0, 0.0], [0.1, 0.3, 0.6]])
LABELS = torch.eye(3)


class Gaussians:
    """The exact denoiser of classes N(MEANS, STD^2), images [2,1,1]; `weights` [C,C]: class c's share under label o."""

    img_resolution, img_channels, label_dim, sigma_min, sigma_max = 1, 2, 3, 0, math.inf
    round_sigma = staticmethod(torch.as_tensor)

    def __init__(self, weights):
        self.weights = torch.as_tensor(weights, dtype=torch.float64)

    @staticmethod
    def log_p(x, sigma):
        var = STD**2 + sigma**2
        return -(x.flatten(1)[:, None] - MEANS).square().sum(dim=2) / (2 * var) - var.log()

    def __call__(self, x, sigma, class_labels):
        shares = self.weights.T[class_labels.argmax(dim=1)]
        posterior = (self.log_p(x, sigma) + shares.log()).softmax(dim=1)
        flat = x.flatten(1)[:, None]
        means = MEANS + (flat - MEANS) * STD**2 / (STD**2 + sigma**2)
        return (posterior[:, :, None] * means).sum(dim=1)[:, :, None, None]


class Optimal(Gaussians):
    """The optimal discriminator's logit, when `right` [C] and `wrong` [C,C] are the masses of pairs it trains on."""

    def __init__(self, right, wrong):
        self.right, self.wrong = torch.as_tensor(right), torch.as_tensor(wrong)

    def __call__(self, x, sigma, class_labels):
        o, log_p = class_labels.argmax(dim=1), self.log_p(x, sigma)
        log_right = log_p.gather(1, o[:, None])[:, 0] + self.right[o].log()
        return log_right - torch.logsumexp(log_p + self.wrong.T[o].log(), dim=1)


def world(T, shuffle):
    """Noisy denoiser, clean denoiser, optimal discriminator, eta, R for a transition and a shuffle."""
    joint = PRIORS[:, None] * T
    stays = np.diagonal(joint)
    off = joint * (1 - np.eye(3))
    right = stays * (1 - shuffle.flip)
    wrong = off + (stays * shuffle.flip)[:, None] * shuffle.rows
    eta = torch.tensor(off.sum(axis=0) / joint.sum(axis=0))
    share = torch.tensor(right / (right + wrong.sum(axis=0)))
    return Gaussians(joint), Gaussians(np.eye(3)), Optimal(right, wrong), eta, share


def shuffle_for(T, known):
    """The shuffle of 1,000 images with these priors and this noise."""
    counts = np.round(1000 * PRIORS[:, None] * T).astype(int)
    labels = np.repeat(np.tile(np.arange(3), 3), counts.ravel())
    return Shuffle(labels, np.repeat(np.eye(3, dtype=bool).ravel(), counts.ravel()), 3, known)


SYM = transition_matrix("sym", 0.4, 3)
WORLDS = {
    "sym, uniform": world(SYM, shuffle_for(SYM, None)),
    "sym, transition": world(SYM, shuffle_for(SYM, SYM)),
    "asym, transition": world(ASYM, shuffle_for(ASYM, ASYM)),
}
