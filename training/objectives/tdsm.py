"""Transition-aware weighted denoising score matching (tdsm.md; Na et al., ICLR 2024)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

import dnnlib
from archives.dataset import ImageDataset
from archives.label_noise import check_matrix, check_observed, inverse_transition
from torch_utils import distributed
from torch_utils.training_stats import Stats
from training.label_weights import clean_posterior, cut_weights, posterior_weights
from training.objectives.dsm import DSM

__all__ = ["TDSM"]

# Pixels of a pass without gradients: on a CPU what stays in its caches, on others what keeps them busy.
PASS_PIXELS = {"cpu": 1 << 14}
BUSY_PIXELS = 1 << 17


class TDSM(DSM):
    """lambda ||w_o D(x_t; o) + sum_{c != o, w_c > tau} w_c sg[D(x_t; c)] - y||^2, w_c = P(c | x_t, o) (tdsm.md).

    `classifier`: time-dependent classifier (eval mode); `transition`: T [C,C]; `posterior`: what the classifier's
    softmax is, 'clean' P(y|x_t) or 'noisy' P(o|x_t). `config["tdsm"]["pairs"]`: how many other classes an image keeps
    at most, the heaviest; None: all above tau.

    The other classes' passes have one size in a whole run where a new size costs something (compilation, cuDNN's
    search, memory in pieces), with empty places in the last; elsewhere they are as even as the pairs allow.
    """

    method = "tdsm"

    def __init__(
        self,
        config: dict,
        dataset: ImageDataset,
        device: torch.device,
        *,
        classifier: torch.nn.Module,
        transition: np.ndarray,
        posterior: str,
    ):
        if dataset.labels is None:
            raise dnnlib.UserError(f"{dataset.name}: its labels are vectors, but TDSM needs one class an image")
        check_observed(transition, dataset.labels)
        # The inverse only serves classifiers of noisy labels; whether there is one is checked before the first step.
        self.inverse = None
        if posterior == "noisy":
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self.inverse = torch.as_tensor(inverse_transition(transition), dtype=dtype, device=device)
        self.transition = torch.as_tensor(transition, dtype=torch.float32, device=device)
        self.posterior, self.tau, self.temp = posterior, config["tdsm"]["tau"], config["tdsm"]["temp"]
        self.pairs = config["tdsm"].get("pairs")
        super().__init__(config, dataset, device)
        self.classifier = classifier.to(device)
        if config["compile"]:
            self.classifier.compile()
        # It does not cast itself to float16, as the U-Nets do.
        half = config["precision"] == "fp16" and device.type == "cuda"
        self.classifier_dtype = torch.float16 if half else self.autocast_dtype
        share = config["batch_size"] // distributed.get_world_size()
        self.pass_size = pass_size(min(config["batch_gpu"] or share, share), dataset.resolution**2, device.type)
        self.fixed_size = config["compile"] or device.type != "cpu"

    @torch.no_grad()
    def weights(
        self, x: torch.Tensor, sigma: torch.Tensor, observed: torch.Tensor, augment_labels: torch.Tensor | None
    ) -> torch.Tensor:
        """w [n,C] = P(y | x_t, o) by Bayes' rule; dropped entries (tau, pairs) are 0, the observed label's stays."""
        augment_labels = augment_labels if self.classifier.augment_dim else None
        dtype = self.classifier_dtype
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            logits = self.classifier(x, sigma.flatten(), augment_labels=augment_labels)
        log_p = torch.log_softmax(logits.to(torch.float32) / self.temp, dim=1)
        if self.posterior == "noisy":
            log_p = clean_posterior(log_p, self.transition, self.inverse).clamp_min(torch.finfo(log_p.dtype).tiny).log()
        # The labels were checked before the first step.
        w = posterior_weights(log_p, self.transition, observed, check=False)
        return cut_weights(w, observed, self.tau, self.pairs)

    def combine(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        labels: torch.Tensor,
        augment_labels: torch.Tensor | None,
        stats: Stats,
    ) -> torch.Tensor:
        observed = labels.argmax(dim=1)
        w = self.weights(x, sigma, observed, augment_labels)
        own = w.gather(1, observed[:, None])
        others = w.scatter(1, observed[:, None], 0)
        pairs = (others > 0).sum(dim=1)
        stats.add("TDSM/pairs_per_image", pairs)
        stats.add("TDSM/observed_weight", own)
        stats.add("TDSM/cut_weight", 1 - w.sum(dim=1))
        stats.add("TDSM/corrected", (w.argmax(dim=1) != observed).float())

        count = read_later(pairs.sum())  # to be there when the device has begun the pass with gradients
        denoised = super().combine(x, sigma, labels, augment_labels, stats) * own[:, :, None, None]
        n, classes = others.shape
        rest = denoised.new_zeros([n + 1, *denoised.shape[1:]])  # the last row takes what empty places compute
        with torch.no_grad(), self.trained["net"].gathered():  # every process has its own number of pairs
            for image, label, weight in pair_passes(others, count(), self.pass_size, self.fixed_size):
                i = image.clamp(max=n - 1)
                onehot = (label[:, None] == torch.arange(classes, device=label.device)).to(labels.dtype)
                part = self.trained["net"].net(
                    x[i], sigma[i], onehot, augment_labels=None if augment_labels is None else augment_labels[i]
                )
                rest.index_add_(0, image, part * weight[:, None, None, None])
        return denoised + rest[:n]

    def info(self) -> dict:
        return dict(transition=self.transition.tolist(), posterior=self.posterior)


def pass_size(batch: int, pixels: int, device_type: str) -> int:
    """Images in a pass without gradients beside a batch with them, whose size says what memory there is.

    Such a pass takes a tenth of the memory an image and is fastest in pieces that fit the caches of a CPU; a GPU wants
    to be busy, but half the batch does not leave many places empty.
    """
    wanted = PASS_PIXELS.get(device_type, max(BUSY_PIXELS, batch * pixels // 2))
    return max(1, min(wanted // pixels, 4 * batch))


def pair_passes(
    weights: torch.Tensor, count: int, size: int, fixed: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The `count` positive entries of `weights` [n,C] as (row, column, weight), in passes of at most `size`.

    Row by row. `fixed`: all passes have `size` entries; the ones left over say row n. Nothing waits for the device,
    as `nonzero` would.
    """
    passes = -(-count // size)
    flat = weights.flatten()
    place = torch.arange(1, (passes * size if fixed else count) + 1, device=flat.device)
    # The k-th positive entry is where their running count reaches k; beyond the last k, one past the end.
    index = torch.searchsorted((flat > 0).cumsum(0), place)
    for part in index.tensor_split(passes) if passes else ():
        row = part.div(weights.shape[1], rounding_mode="floor")
        yield row, part % weights.shape[1], flat[part.clamp(max=len(flat) - 1)]


def read_later(number: torch.Tensor) -> Callable[[], int]:
    """What reads an integer from the device. On CUDA it waits for what was queued until now, not for what comes later:
    while the host waits, the device goes on with work queued in between."""
    if number.device.type != "cuda":
        return lambda: int(number)
    host = torch.empty([], dtype=number.dtype, pin_memory=True).copy_(number, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> int:
        copied.synchronize()
        return int(host)

    return read


def check_classifier(classifier: torch.nn.Module, dataset: ImageDataset, path: str) -> None:
    """Raise UserError unless classifier and data agree in resolution, channels and classes."""
    theirs = (classifier.img_resolution, classifier.img_channels, classifier.label_dim)
    ours = (dataset.resolution, dataset.num_channels, dataset.label_dim)
    for name, a, b in zip(("resolution", "number of channels", "number of classes"), theirs, ours, strict=True):
        if a != b:
            raise dnnlib.UserError(
                f"--cls: the {name} of {path} is {a}, of {dataset.name} {b}; train the classifier on this data set"
            )


def known_transition(info: dict, stated: np.ndarray | None, dataset: ImageDataset, path: str) -> tuple[np.ndarray, str]:
    """T [C,C] and the posterior's kind from a classifier snapshot's info and from the options (None: not given).

    Raises UserError when the two contradict each other, or when neither knows T.
    """
    recorded, posterior = info.get("transition"), info.get("posterior", "noisy")
    if recorded is not None:
        recorded = check_matrix(recorded, dataset.label_dim, name=f"--cls: the transition matrix recorded in {path}")
    if posterior not in ("noisy", "clean"):
        raise dnnlib.UserError(f"--cls: {path} records the posterior {posterior!r}, expected 'noisy' or 'clean'")
    if recorded is not None and stated is not None and np.abs(np.subtract(recorded, stated)).max() > 1e-3:
        i, j = np.unravel_index(np.abs(np.subtract(recorded, stated)).argmax(), stated.shape)
        raise dnnlib.UserError(
            f"--noise_type: T[{i},{j}] = {stated[i, j]:.4g} by the options, but {path} was trained with "
            f"{recorded[i][j]:.4g}; leave the options out or train a classifier for them"
        )
    if recorded is None and stated is None:
        c = dataset.corruption
        hint = (
            f" (the archive says --noise_type={c['noise_type']} --noise_rate={c.get('noise_rate')})"
            if c.get("noise_type")
            else ""
        )
        raise dnnlib.UserError(
            f"--noise_type: {path} was trained without a transition matrix; state the label noise{hint}"
        )
    return np.asarray(stated if recorded is None else recorded), posterior
