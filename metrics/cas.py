"""CAS, the classification accuracy score: how well generated images serve as training data for a classifier.

Ravuri and Vinyals 2019, "Classification accuracy score for conditional generative models". The classifier is trained on
generated images and the labels that they were asked for, and tested on real images with clean labels.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import dnnlib
from archives.dataset import BatchStream, to_float
from metrics.features import WORKERS
from metrics.images import ImageSource, best_labels, check_same_shape
from metrics.label_accuracy import label_accuracy
from torch_utils import misc
from training.augment import draw_shifts, shift_images
from training.networks_resnet import DEPTHS, Classifier
from training.noise_levels import LOWEST_SIGMA
from training.trained_network import make_optimizer

__all__ = ["CAS_ARCHS", "CAS_EPOCHS", "check_arch", "check_test", "classification_accuracy_score"]

CAS_ARCHS = ("resnet50", "resnet18", "small")
CAS_EPOCHS = 100
BATCH = 128
LEARNING_RATE = 1e-3  # of AdamW at its highest: it rises for a tenth of the steps, then falls along a cosine
SHIFT = 0.125  # largest random shift, as a share of the side; shifts are whole pixels


def classification_accuracy_score(
    generated: ImageSource,
    test: ImageSource,
    arch: str,
    device: torch.device | str,
    seed: int = 0,
    epochs: int = CAS_EPOCHS,
) -> dict[str, Any]:
    """Train a classifier on `generated` images and their labels, and measure its accuracy on `test`.

    Test labels are the clean ones if the set has any, and images that it records as outliers do not count. `arch` is
    one of CAS_ARCHS: torchvision's resnet50, or our resnet18 or small. All randomness comes from `seed`. Return a
    dictionary with `accuracy`, `accuracy_on_generated` (a low one means that the classifier did not learn what it was
    shown), `arch`, `epochs`, `num_generated` and `num_test`. Raise UserError if the two sets do not fit each other, or
    if there is no such classifier for them.
    """
    check_test(generated, test)
    rows, labels = _tested(test), best_labels(test)
    device = torch.device(device)
    classes = int(max(labels.max(), generated.labels.max())) + 1
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(misc.step_seed(seed, 0, 0))
        net = _network(arch, generated.image_shape, classes).to(device)
        _train(net, generated, device, seed, epochs)
    return dict(
        accuracy=_accuracy(net, test, labels, device, rows),
        accuracy_on_generated=_accuracy(net, generated, generated.labels, device, np.arange(len(generated))),
        arch=arch,
        epochs=epochs,
        num_generated=len(generated),
        num_test=len(rows),
    )


def check_test(generated: ImageSource, test: ImageSource) -> None:
    """Raise UserError unless both sets have labels and images of the same shape, and `test` images that count."""
    for source, labels in ((test, best_labels(test)), (generated, generated.labels)):
        if labels is None:
            raise dnnlib.UserError(f"{source.path} has no labels")
    check_same_shape(test, generated)
    if not len(_tested(test)):
        raise dnnlib.UserError(f"{test.path} records all its images as outliers")


def _tested(test: ImageSource) -> np.ndarray:
    """Return the rows of the images that are no outliers: an outlier shows none of the classes."""
    return np.arange(len(test)) if test.outliers is None else np.flatnonzero(~test.outliers)


def check_arch(arch: str, image_shape: tuple[int, int, int]) -> None:
    """Raise UserError if there is no classifier `arch` for images [C,H,W] of this shape."""
    with torch.random.fork_rng([]):
        _network(arch, image_shape, 2)


class _AtLowestSigma(torch.nn.Module):
    """Makes a classifier of noisy images one of clean images, by fixing the noise level at its lowest."""

    def __init__(self, net: Classifier):
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x, torch.full([len(x)], LOWEST_SIGMA, device=x.device))


def _network(arch: str, image_shape: tuple[int, int, int], classes: int) -> torch.nn.Module:
    """Return a network that turns images [N,C,H,W] in [-1,1] into logits [N,classes].

    Raise UserError if the network does not fit the images, or needs a package that is missing.
    """
    channels, *sides = image_shape
    if arch != "resnet50":
        _, model_channels, channel_mult = DEPTHS[arch]
        try:
            return _AtLowestSigma(
                Classifier(
                    min(sides), channels, classes, depth=arch, model_channels=model_channels, channel_mult=channel_mult
                )
            )
        except ValueError as e:
            raise dnnlib.UserError(f"{arch}: {e}; choose small") from None
    try:
        from torchvision.models import resnet50  # optional dependency
    except (ImportError, RuntimeError) as e:  # RuntimeError: a torchvision that was built for another PyTorch
        raise dnnlib.UserError(
            f"resnet50 needs the package torchvision ({e}): pip install torchvision, or choose resnet18 or small"
        ) from None
    net = resnet50(weights=None, num_classes=classes)
    if channels != 3:
        net.conv1 = torch.nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    return net


def _train(net: torch.nn.Module, images: ImageSource, device: torch.device, seed: int, epochs: int) -> None:
    batch = min(BATCH, len(images))
    steps = math.ceil(epochs * len(images) / batch)
    optimizer = make_optimizer(net.parameters(), "adamw", LEARNING_RATE, device)
    rise = 0.1 if steps != 10 else 0.11  # PyTorch divides by 0 where the rate rises for exactly one step
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=rise, cycle_momentum=False
    )
    stream = BatchStream(images, batch, seed=seed, device=device, workers=WORKERS)
    with tqdm(total=steps * batch, desc="CAS", unit="img", disable=None, leave=False) as bar:
        for step in range(steps):
            pixels, onehot = next(stream)
            generator = misc.step_generator(seed, 0, step * batch, device, stream=1)
            shifts = draw_shifts(batch, SHIFT, min(images.image_shape[1:]), generator, device)
            logits = net(shift_images(to_float(pixels), shifts))
            loss = torch.nn.functional.cross_entropy(logits, onehot.argmax(dim=1))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update(batch)
    stream.close()


@torch.no_grad()
def _accuracy(
    net: torch.nn.Module, images: ImageSource, labels: np.ndarray, device: torch.device, rows: np.ndarray
) -> float:
    net.eval()
    parts = np.array_split(rows, math.ceil(len(rows) / (4 * BATCH)))
    logits = [net(to_float(images.images(part).to(device))) for part in parts]
    return label_accuracy(torch.cat(logits).argmax(dim=1).cpu().numpy(), labels[rows])
