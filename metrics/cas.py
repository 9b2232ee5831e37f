"""Classification accuracy score (Ravuri and Vinyals 2019, "Classification accuracy score for conditional generative
models"): train a classifier on generated images and the labels they were asked for, test it on real clean images."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import dnnlib
from archives.dataset import BatchStream, to_float
from metrics.features import WORKERS
from metrics.images import ImageSource, describe_shape
from metrics.label_accuracy import label_accuracy
from torch_utils import misc
from training.augment import draw_shifts, shift_images
from training.networks_resnet import DEPTHS, Classifier
from training.noise_levels import LOWEST_SIGMA
from training.trained_network import make_optimizer

__all__ = ["CAS_ARCHS", "CAS_EPOCHS", "check_cas", "classification_accuracy_score"]

CAS_ARCHS = ("resnet50", "resnet18", "small")
CAS_EPOCHS = 100
BATCH = 128
LEARNING_RATE = 1e-3  # the highest, of AdamW, after a rise and before a cosine's fall
SHIFT = 0.125  # random whole-pixel shifts up to this share of the side


def classification_accuracy_score(
    generated: ImageSource,
    test: ImageSource,
    arch: str,
    device: torch.device | str,
    seed: int = 0,
    epochs: int = CAS_EPOCHS,
) -> dict[str, Any]:
    """Accuracy on `test` (its clean labels where it has them) of a classifier trained on `generated` and its labels.

    `arch`: resnet50 of torchvision, or our resnet18 or small. All randomness comes from `seed`. Returns `accuracy`,
    `accuracy_on_generated` (did it learn what it was shown?), `arch`, `epochs`, `num_generated`, `num_test`.
    Raises UserError for sets that do not fit each other, and when torchvision is missing.
    """
    labels = check_cas(generated, test, arch)
    device = torch.device(device)
    classes = int(max(labels.max(), generated.labels.max())) + 1
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(misc.step_seed(seed, 0, 0))
        net = _network(arch, generated.image_shape, classes).to(device)
        _train(net, generated, device, seed, epochs)
    return dict(
        accuracy=_accuracy(net, test, labels, device),
        accuracy_on_generated=_accuracy(net, generated, generated.labels, device),
        arch=arch,
        epochs=epochs,
        num_generated=len(generated),
        num_test=len(test),
    )


def check_cas(generated: ImageSource, test: ImageSource, arch: str) -> np.ndarray:
    """The labels that count of `test`. UserError unless both sets have labels, images of one shape, and a network."""
    labels = test.labels if test.clean_labels is None else test.clean_labels
    if labels is None or generated.labels is None:
        raise dnnlib.UserError(f"--test: {(test if labels is None else generated).path} has no labels")
    if test.image_shape != generated.image_shape:
        raise dnnlib.UserError(
            f"--test: {test.path} has {describe_shape(test.image_shape)} images, "
            f"{generated.path} has {describe_shape(generated.image_shape)}"
        )
    with torch.random.fork_rng([]):
        _network(arch, generated.image_shape, 2)
    return labels


class _AtLowestSigma(torch.nn.Module):
    """A noise-level-conditional classifier as one of clean images."""

    def __init__(self, net: Classifier):
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x, torch.full([len(x)], LOWEST_SIGMA, device=x.device))


def _network(arch: str, image_shape: tuple[int, int, int], classes: int) -> torch.nn.Module:
    """[N,C,H,W] in [-1,1] -> logits [N,classes]. UserError when it cannot be had for such images."""
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
            raise dnnlib.UserError(f"--cas_arch={arch}: {e}; choose --cas_arch=small") from None
    try:
        from torchvision.models import resnet50  # optional dependency
    except (ImportError, RuntimeError) as e:  # RuntimeError: a torchvision made for another torch
        raise dnnlib.UserError(
            f"--cas_arch=resnet50 needs the package torchvision ({e}): pip install torchvision, or "
            "choose --cas_arch=resnet18 or small"
        ) from None
    net = resnet50(weights=None, num_classes=classes)
    if channels != 3:
        net.conv1 = torch.nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    return net


def _train(net: torch.nn.Module, images: ImageSource, device: torch.device, seed: int, epochs: int) -> None:
    batch = min(BATCH, len(images))
    steps = math.ceil(epochs * len(images) / batch)
    optimizer = make_optimizer(net.parameters(), "adamw", LEARNING_RATE, device)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1, cycle_momentum=False
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
def _accuracy(net: torch.nn.Module, images: ImageSource, labels: np.ndarray, device: torch.device) -> float:
    net.eval()
    parts = np.array_split(np.arange(len(images)), math.ceil(len(images) / (4 * BATCH)))
    logits = [net(to_float(images.images(part).to(device))) for part in parts]
    return label_accuracy(torch.cat(logits).argmax(dim=1).cpu().numpy(), labels)
