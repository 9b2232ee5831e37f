"""PPL, perceptual path length: how much images change along a short step in latent space.

Karras et al. 2019, "A style-based generator architecture for GANs", sec. 4.1, for the path in z:

    PPL = E d(G(slerp(z_1, z_2; t)), G(slerp(z_1, z_2; t + epsilon))) / epsilon^2

with t uniform on (0, 1) (`full`) or t = 0 (`end`), epsilon = 1e-4, and LPIPS as d. The lowest and the highest percent
of the distances are left out. A generator of RDUOT has a latent z in each of its steps. All of them move; the noise
that the steps start from and add, and the class, stay the same for both images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import torch

import dnnlib
from metrics.detectors import Detector
from metrics.network_detectors import FidelityDetector, TorchScriptDetector, as_rgb
from sampling.ddgan import ddgan_sampler
from sampling.seeds import StackedRandomGenerator
from torch_utils import distributed
from torch_utils.precision import widest

__all__ = ["EPSILON", "LPIPS_URL", "Distance", "image_distance", "path_distances", "path_length", "slerp"]

EPSILON = 1e-4
DISCARDED = (1, 99)  # percentiles: distances below the first and above the second are left out
LARGEST = 256  # larger images are averaged down to this side
LPIPS_URL = "https://api.ngc.nvidia.com/v2/models/nvidia/research/stylegan3/versions/1/files/metrics/vgg16.pkl"

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # images [N,C,H,W] in [-1,1], twice -> [N]


def slerp(a: torch.Tensor, b: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return the points at the shares `t` [N] of the great circles from `a` [N,d] to `b` [N,d].

    They have the norm sqrt(d), which a normal latent has on average. Only the directions of `a` and `b` count.
    """
    a, b = (torch.nn.functional.normalize(x, dim=1) for x in (a, b))
    cosine = (a * b).sum(dim=1, keepdim=True).clamp(-1, 1)
    angle = t[:, None] * cosine.acos()
    across = torch.nn.functional.normalize(b - cosine * a, dim=1)
    return (a * angle.cos() + across * angle.sin()) * a.shape[1] ** 0.5


def image_distance(detector: Detector, image_shape: tuple[int, int, int], name: str) -> Distance:
    """Return the squared distance of two images by a detector, which is LPIPS if it is the published VGG16.

    The images [N,C,H,W] are in [-1,1]; the detector sees values in [0,255], not rounded. `name` is what made them.
    Raise UserError if the detector takes whole gray levels only, or cannot take images of this shape.
    """
    if isinstance(detector, FidelityDetector):
        raise dnnlib.UserError(
            f"{detector.name} takes whole gray levels only, but steps along a path are smaller; choose the VGG16 that "
            f"is published at {LPIPS_URL}, or for tiny images pixels"
        )
    channels, height, width = image_shape
    factor = max(min(height, width) // LARGEST, 1)
    lpips = detector.lpips if isinstance(detector, TorchScriptDetector) else {}
    if not lpips:
        detector.check(SimpleNamespace(image_shape=(channels, height // factor, width // factor), path=name))

    @torch.no_grad()
    def features(images: torch.Tensor) -> torch.Tensor:
        images = (images.to(torch.float32) + 1) * 127.5
        if factor > 1:
            images = torch.nn.functional.avg_pool2d(images, factor)
        return detector.module(as_rgb(images), **lpips) if lpips else detector(images, probs=False)[0]

    return lambda a, b: (features(a).to(torch.float64) - features(b).to(torch.float64)).square().flatten(1).sum(dim=1)


@torch.no_grad()
def path_distances(
    net: torch.nn.Module,
    seeds: Sequence[int],
    distance: Distance,
    device: torch.device,
    *,
    ends: Sequence[str] = ("full", "end"),
    batch: int = 64,
    epsilon: float = EPSILON,
) -> dict[str, np.ndarray]:
    """Return distance / epsilon^2 of one step per seed, float64 [seeds], for each of `ends`: 'full' or 'end'.

    The steps of a seed do not depend on the batch or the process. Every process must call this function; each does a
    share, and all receive the whole.
    """
    own = [seeds[i] for i in distributed.share(len(seeds))]

    def work() -> dict[str, list[np.ndarray]]:
        found: dict[str, list[np.ndarray]] = {end: [] for end in ends}
        with distributed.progress_bar(total=len(own), desc="paths", unit="path") as bar:
            for start in range(0, len(own), batch):
                part = own[start : start + batch]
                for end, values in _steps(net, part, distance, device, ends, epsilon).items():
                    found[end].append(values.cpu().numpy())
                bar.update(len(part))
        return found

    parts = distributed.all_gather_object(distributed.together(work))
    return {end: np.concatenate([values for part in parts for values in part[end]]) for end in ends}


def _steps(
    net: torch.nn.Module,
    seeds: Sequence[int],
    distance: Distance,
    device: torch.device,
    ends: Sequence[str],
    epsilon: float,
) -> dict[str, torch.Tensor]:
    # Each seed draws: the noise that the first step starts from, a class, t, and for each step both ends of the path
    # and the noise that the step adds.
    rnd, n, dtype = StackedRandomGenerator(device, seeds), len(seeds), widest(device)
    shape = [n, net.img_channels, net.img_resolution, net.img_resolution]
    latents, labels = rnd.randn(shape), None
    if net.label_dim:
        labels = torch.nn.functional.one_hot(rnd.randint(net.label_dim, size=[n]), net.label_dim).float()
    uniform = torch.stack([torch.rand([], generator=g, device=g.device, dtype=dtype) for g in rnd.generators])
    draws = [
        [rnd.randn([n, net.nz], dtype=dtype) for _ in range(2)] + [rnd.randn(shape)] for _ in range(net.num_timesteps)
    ]

    def images(t: torch.Tensor) -> torch.Tensor:
        values = iter([x for a, b, noise in draws for x in (slerp(a, b, t).to(torch.float32), noise)])
        return ddgan_sampler(net, latents, labels, randn_like=lambda _like: next(values))

    starts = dict(full=uniform, end=torch.zeros_like(uniform))
    return {end: distance(images(starts[end]), images(starts[end] + epsilon)) / epsilon**2 for end in ends}


def path_length(distances: np.ndarray) -> float:
    """Return PPL: the mean of distances [N] without the lowest and the highest percent."""
    low = np.percentile(distances, DISCARDED[0], method="lower")
    high = np.percentile(distances, DISCARDED[1], method="higher")
    return float(distances[(distances >= low) & (distances <= high)].mean())
