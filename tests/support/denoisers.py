"""Denoisers and discriminators in closed form, and one that remembers its calls."""

from __future__ import annotations

import math

import torch


class Recorder(torch.nn.Module):
    """A denoiser or a discriminator that remembers what it was called with."""

    img_resolution, img_channels, label_dim, sigma_min, sigma_max = 2, 1, 3, 0, math.inf
    round_sigma = staticmethod(torch.as_tensor)

    def __init__(self, function):
        super().__init__()
        self.function, self.calls = function, []

    def forward(self, x, sigma, class_labels=None):
        self.calls.append((x.detach().clone(), torch.as_tensor(sigma).clone(), class_labels))
        return self.function(x, torch.as_tensor(sigma), class_labels)


def denoise(x, sigma, _labels):
    return (x / (1 + sigma**2)).to(torch.float32)


def linear(x, sigma, labels):
    return (x.flatten(1) * torch.arange(1, 5)).sum(dim=1) * (1 + labels.argmax(dim=1))
