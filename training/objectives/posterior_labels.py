"""Labels from the posterior P(y | x_0, o) in place of the observed labels o (docs/methods/posterior.md).

Training sees the image x_0 without noise. If y ~ P(y | x_0, o), then (x_0, y) is distributed as clean data,

    sum_o p(x_0, o) P(y | x_0, o) = p(x_0, y),

so what an objective learns from (x_0, y) is unbiased at every noise level. What becomes of the label of an image:

    sample    y ~ P(y | x_0, o), drawn anew each time the image is used
    relabel   the most probable class
    drop      o where it is the most probable class; other images are left out
    null      the most probable class where its probability reaches a limit; elsewhere none, as in label dropout
"""

from __future__ import annotations

import numpy as np
import torch

import dnnlib
from archives.label_noise import seen_rows
from archives.listing import some
from archives.posterior import TopPosterior
from torch_utils import misc
from torch_utils.precision import widest
from torch_utils.training_stats import Stats

__all__ = ["MODES", "PosteriorLabels", "draw_classes"]

MODES = ("sample", "relabel", "drop", "null")


def draw_classes(p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Return a class of each row of `p` [n,C], int64 [n], drawn by a number in [0,1) per row, `uniform` [n].

    The rows need not sum to 1. The class is where their running sum passes this share of the row's sum.
    """
    cumulative = p.cumsum(dim=1)
    drawn = torch.searchsorted(cumulative, uniform.to(p)[:, None] * cumulative[:, -1:], right=True)[:, 0]
    return drawn.clamp(max=p.shape[1] - 1)


class PosteriorLabels:
    """The labels that N images get in place of their observed ones, by the rule `mode`.

    `limit`: the least probability of a label that `null` keeps. `foreign` bool [N]: which images belong to no class and
    are learned all the same; they are only counted. UserError: the rule leaves no image, or no label.
    """

    def __init__(
        self,
        posterior: TopPosterior,
        mode: str,
        device: torch.device,
        limit: float | None = None,
        foreign: np.ndarray | None = None,
    ):
        self.mode = mode
        best, certainty = posterior.best()
        self.observed, self.best = self._put(posterior.labels, device), self._put(best, device)
        uncertain = certainty < limit if mode == "null" else np.zeros(len(best), dtype=bool)
        self.uncertain = self._put(uncertain, device)
        changed = best != posterior.labels
        self.train_indices = torch.from_numpy(np.flatnonzero(~changed)) if mode == "drop" else None
        if mode == "drop" and changed.all():
            raise dnnlib.UserError("no image is left: no label is the most probable class of its image")
        if uncertain.all():
            raise dnnlib.UserError(f"no label is left: no class has a probability of {limit:g} or more")

        own = posterior.labels[:, None].astype(posterior.classes.dtype)  # of the type that takes less memory
        self.listed = self._put(np.concatenate([own, posterior.classes], axis=1), device)
        self.probabilities = self._put(posterior.probabilities, device)
        # A class that the prior excludes still shares a rest that belongs to nobody else.
        self.prior = self._put(posterior.prior, device).to(widest(device)).clamp_min(1e-12)

        counts = dict(sample="draws the labels anew at each use", relabel=f"changes {changed.sum():,} labels")
        counts["drop"] = f"leaves out {changed.sum():,} images"
        counts["null"] = f"changes {(changed & ~uncertain).sum():,} labels and takes {uncertain.sum():,} away"
        right = posterior.probabilities[:, 0].astype(np.float32) / posterior.probabilities.sum(axis=1, dtype=np.float32)
        self._notes = [
            f"Labels by the posterior: {1 - right.mean():.1%} of {len(best):,} are wrong by it; "
            f"the rule '{mode}' {counts[mode]}."
        ]
        kept = ~changed if mode == "drop" else ~uncertain
        lost = [] if mode == "sample" else np.setdiff1d(posterior.labels, best[kept]).tolist()
        if lost:
            self._notes.append(
                f"Warning: the rule '{mode}' leaves no image of {'class' if len(lost) == 1 else 'classes'} "
                f"{some(map(str, lost), len(lost))}, so the network does not learn "
                f"{'it' if len(lost) == 1 else 'them'}; the rule 'sample' does not lose classes."
            )
        number = 0 if foreign is None else int(np.sum(foreign if self.train_indices is None else foreign & ~changed))
        if number:
            self._notes.append(
                f"Note: {number:,} of the images are foreign by the label file and are learned like the others; "
                "--drop_outliers --outlier_data=FILE leaves them out."
            )

    @staticmethod
    def _put(array: np.ndarray, device: torch.device) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    def notes(self) -> list[str]:
        """Return lines that say what becomes of the labels, and of foreign images."""
        return self._notes

    def expand(self, items: torch.Tensor) -> torch.Tensor:
        """Return P(y | x_0, o) of some images, by their numbers int64 [n]: [n,C], rows sum to 1."""
        p, listed = self.probabilities[items].to(self.prior), self.listed[items].to(torch.int64)
        rest = self.prior.expand(len(items), -1).scatter(1, listed, 0)
        rest = rest * (p[:, -1:] / rest.sum(dim=1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny))
        p = rest.scatter(1, listed, p[:, :-1])
        return p / p.sum(dim=1, keepdim=True)

    def classes(self, items: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """Return the labels of some images, int64 [n], drawn by `uniform` [n] in [0,1) where the rule draws."""
        if self.mode == "sample":
            return draw_classes(self.expand(items), uniform)
        return self.best[items]  # of images that 'drop' keeps, this is the observed label

    def onehot(self, draws: dict, num_classes: int, stats: Stats) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the labels of a step's images, float32 [n,C], and which images have none, bool [n] or None: no image.

        `draws`: of the step; `items`, `label` (uniform numbers) and, with label dropout, `dropped`.
        """
        items, dropped = draws["items"], draws.get("dropped")
        labels = self.classes(items, draws["label"])
        uncertain = self.uncertain[items]
        stats.add("Posterior/changed", ((labels != self.observed[items]) & ~uncertain).float())
        if self.mode == "null":
            stats.add("Posterior/without_label", uncertain.float())
            dropped = uncertain if dropped is None else dropped | uncertain
        return torch.nn.functional.one_hot(labels, num_classes).to(torch.float32), dropped

    def transition(self) -> np.ndarray:
        """Return the label noise that remains: T[y, l] = P(label l | class y) by the posterior, float64 [C,C].

            T[y, l]  is proportional to  sum of P(y | x_0, o) over the images with label l

        It takes the posterior for exact. With 'sample' it is the identity: (x_0, label) is distributed as clean data. A
        class that no label of the set names, or that has less than half an image, keeps its label.
        """
        c = len(self.prior)
        if self.mode == "sample":
            return np.eye(c)
        used = ~self.uncertain
        if self.train_indices is not None:
            used &= self.best == self.observed
        counts = torch.zeros([c, c], dtype=self.prior.dtype, device=self.prior.device)  # [label, class]
        for items in used.nonzero()[:, 0].split(misc.block_rows(c, used.device)):
            counts.index_add_(0, self.best[items], self.expand(items))
        return seen_rows(counts.T.cpu().double().numpy(), self.observed.cpu().numpy())
