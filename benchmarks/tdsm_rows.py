"""Rows about TDSM: its step, with one drawn class or with all, against DSM's for different numbers of classes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch

from archives.label_noise import transition_matrix
from benchmarks.core import Row, compare
from benchmarks.data import RandomImages, train_config
from torch_utils.training_stats import Stats
from training.config import TDSMConfig
from training.networks_resnet import Classifier, resnet_kwargs
from training.objective import Objective
from training.objectives.dsm import DSM
from training.objectives.tdsm import TDSM

__all__ = ["rows"]

PAIRS = 3  # other classes above tau of each image
OTHERS = 0.43  # their weight together: how often the drawn class is another one, on digits with 40% symmetric noise
CLASSES = (10, 100, 1000)
LOOP = 100  # classes of the loop, which is too slow for more


class KnownPairs(torch.nn.Module):
    """A classifier that costs what a real one does, and leaves PAIRS other classes above tau for each image."""

    augment_dim = 0

    def __init__(self, data: RandomImages, transition: np.ndarray):
        super().__init__()
        observed, classes = torch.from_numpy(data.labels)[:, None], len(transition)
        kwargs = resnet_kwargs("ddpmpp_tiny", data.resolution, data.num_channels, classes)
        self.net = Classifier(data.resolution, data.num_channels, classes, **kwargs)
        index = (observed + torch.arange(PAIRS + 1)) % classes
        # Divided by T[y, o], so that the weights are these for any number of classes.
        weights = torch.tensor([1 - OTHERS] + [OTHERS / PAIRS] * PAIRS).log()
        logits = weights - torch.from_numpy(transition).float()[index, observed].log()
        self.register_buffer("logits", torch.full([len(observed), classes], -60.0).scatter_(1, index, logits))

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, augment_labels: torch.Tensor | None = None) -> torch.Tensor:
        return self.logits + 0 * self.net(x, sigma)


class TDSMClassLoop(TDSM):
    """The plain form of TDSM: one pass of the whole batch for every class."""

    def combine(self, x, sigma, labels, augment_labels, stats, *_):
        observed = labels.argmax(dim=1)
        w = self.weights(x, sigma, observed, augment_labels)
        own = w.gather(1, observed[:, None])[:, :, None, None]
        total = self.trained["net"].forward(x, sigma, labels, augment_labels=augment_labels) * own
        for c in range(labels.shape[1]):
            with torch.no_grad():
                onehot = torch.nn.functional.one_hot(torch.full_like(observed, c), labels.shape[1]).float()
                part = self.trained["net"].net(x, sigma, onehot, augment_labels=augment_labels)
            total = total + (w[:, c] * (observed != c))[:, None, None, None] * part
        return total


def stepper(objective: Objective, data: RandomImages) -> Callable[[], None]:
    """Return a form: one step on all of `data`, each with other random numbers."""
    objective.setup()
    stats, labels, step = Stats(torch.device("cpu")), data.onehot(), itertools.count(100)
    return lambda: objective.step(data.pixels, labels, next(step) * len(labels), stats)


def rows(repeats: int) -> Iterator[Row]:
    """Measure steps with few and with many classes."""
    forms, cpu, n = {}, torch.device("cpu"), 64
    for classes in CLASSES:
        data = RandomImages(n, 3, 16, classes)
        transition = transition_matrix("sym", 0.4, classes)
        classifier = KnownPairs(data, transition).eval().requires_grad_(False)

        def form(cls: type[DSM], others: str | None = None, data=data, transition=transition, classifier=classifier):
            config = train_config(data, "--arch=ddpmpp_tiny", "--augment=0", f"--batch={n}")
            if others is None:
                return stepper(cls(config, data, cpu), data)
            config.tdsm = TDSMConfig(others=others)
            known = dict(classifier=classifier, transition=transition, posterior="clean")
            return stepper(cls(config, data, cpu, **known), data)

        forms[f"dsm{classes}"] = form(DSM)
        for others in ("sample", "all"):
            forms[f"{others}{classes}"] = form(TDSM, others)
        if classes == LOOP:
            forms["loop"] = form(TDSMClassLoop, "all")
    t = compare(forms, repeats, "TDSM")
    shares = dict(sample=f"another class in {OTHERS:.0%} of the images", all=f"{PAIRS} pairs per image")
    for classes, others in itertools.product(CLASSES, shares):
        yield Row(
            f"TDSM step, {classes} classes, --others={others}; plain: DSM step",
            t[f"{others}{classes}"],
            t[f"dsm{classes}"],
            images=n,
            note=f"{shares[others]}, with its classifier, ddpmpp_tiny, 16x16, batch {n}",
        )
    for classes in CLASSES[1:]:
        name = f"TDSM step, {classes} classes, --others=all; plain: 10 classes"
        yield Row(name, t[f"all{classes}"], t["all10"], images=n)
    name = f"TDSM step, {LOOP} classes, --others=all; plain: loop over the classes"
    yield Row(name, t[f"all{LOOP}"], t["loop"], images=n)
