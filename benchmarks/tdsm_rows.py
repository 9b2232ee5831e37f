"""Rows about TDSM: its step against DSM's for different numbers of classes, and against a loop over the classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from archives.label_noise import transition_matrix
from benchmarks.core import Row, compare
from benchmarks.data import RandomImages, train_config
from torch_utils.training_stats import Stats
from training.config import TDSMConfig
from training.objective import Objective
from training.objectives.dsm import DSM
from training.objectives.tdsm import TDSM

__all__ = ["rows"]

PAIRS = 3  # other classes that each image keeps
CLASSES = (10, 100, 1000)
LOOP = 100  # classes of the loop, which is too slow for more


class KnownPairs(torch.nn.Module):
    """A classifier that costs nothing and leaves PAIRS other classes above tau for each image."""

    augment_dim = 0

    def __init__(self, labels: np.ndarray, transition: np.ndarray):
        super().__init__()
        observed, classes = torch.from_numpy(labels)[:, None], len(transition)
        index = (observed + torch.arange(PAIRS + 1)) % classes
        # Dividing by T[y, o] makes all PAIRS + 1 weights equal for any number of classes.
        logits = -torch.from_numpy(transition).float()[index, observed].log()
        self.register_buffer("logits", torch.full([len(labels), classes], -30.0).scatter_(1, index, logits))

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, augment_labels: torch.Tensor | None = None) -> torch.Tensor:
        return self.logits


class TDSMClassLoop(TDSM):
    """The plain form of TDSM: one pass of the whole batch for every class."""

    def combine(self, x, sigma, labels, augment_labels, stats):
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
    """Return a form: one step on all of `data`."""
    objective.setup()
    stats, labels = Stats(torch.device("cpu")), data.onehot()
    return lambda: objective.step(data.pixels, labels, 10_000, stats)


def rows(repeats: int) -> Iterator[Row]:
    """Measure steps with few and with many classes."""
    forms, cpu, n = {}, torch.device("cpu"), 64
    for classes in CLASSES:
        data = RandomImages(n, 3, 16, classes)
        config = train_config(data, "--arch=ddpmpp_tiny", "--augment=0", f"--batch={n}")
        config.tdsm = TDSMConfig()
        transition = transition_matrix("sym", 0.4, classes)
        kwargs = dict(classifier=KnownPairs(data.labels, transition), transition=transition, posterior="clean")
        forms[f"dsm{classes}"] = stepper(DSM(config, data, cpu), data)
        forms[f"tdsm{classes}"] = stepper(TDSM(config, data, cpu, **kwargs), data)
        if classes == LOOP:
            forms["loop"] = stepper(TDSMClassLoop(config, data, cpu, **kwargs), data)
    t = compare(forms, repeats, "TDSM")
    for classes in CLASSES:
        yield Row(
            f"TDSM step, {classes} classes; plain: DSM step",
            t[f"tdsm{classes}"],
            t[f"dsm{classes}"],
            images=n,
            note=f"{PAIRS} pairs per image, ddpmpp_tiny, 16x16, batch {n}",
        )
    for classes in CLASSES[1:]:
        yield Row(f"TDSM step, {classes} classes; plain: 10 classes", t[f"tdsm{classes}"], t["tdsm10"], images=n)
    yield Row(f"TDSM step, {LOOP} classes; plain: loop over the classes", t[f"tdsm{LOOP}"], t["loop"], images=n)
