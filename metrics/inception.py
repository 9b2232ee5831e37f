"""The layers of the published Inception-v3, one by one: sFID needs features from the middle of the network.

Nash et al. 2021, "Generating images with sparse representations": the spatial features are the first seven channels of
the layer `mixed_6`, 7 x 17 x 17 = 2,023 numbers, in the order that ADM's references (`mu_s`, `sigma_s`) have.
"""

from __future__ import annotations

import torch
from torch.nn.functional import affine_grid, grid_sample

__all__ = ["inception_layers", "run_layers", "spatial_features"]

LAYER, CHANNELS = "mixed_6", 7
SIDE = 299  # pixels


def spatial_features(mixed_6: torch.Tensor) -> torch.Tensor:
    """Return the spatial features [N,7HW] of the output of `mixed_6` [N,C,H,W]; channels vary fastest."""
    return mixed_6[:, :CHANNELS].permute(0, 2, 3, 1).flatten(1)


def inception_layers(module: torch.jit.ScriptModule, device: torch.device | str) -> list[tuple[str, torch.nn.Module]]:
    """Return names and layers of a TorchScript Inception-v3, or an empty list if it is another network.

    The network is known by its parts: `layers`, with one called `mixed_6`. They count only if `run_layers` gives the
    features that the network itself gives, since it may prepare images in its own way.
    """
    layers = getattr(module, "layers", None)
    found = [] if layers is None else list(layers.named_children())
    if LAYER not in dict(found):
        return []
    images = torch.arange(2 * 3 * 32 * 32, device=device).mul(7919).remainder(256).to(torch.uint8).view(2, 3, 32, 32)
    try:
        with torch.no_grad():
            own, features = module(images, return_features=True), run_layers(found, images)[0]
    except (RuntimeError, torch.jit.Error, TypeError, ValueError, AttributeError):
        return []
    same = own.shape == features.shape and torch.allclose(own, features, rtol=1e-3, atol=1e-3 * float(own.abs().max()))
    return found if same else []


def run_layers(layers: list[tuple[str, torch.nn.Module]], images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features [N,d] and spatial features [N,s] of images uint8 [N,3,H,W].

    The images become 299 pixels wide and high as in the network itself: bilinear, with the alignment of TensorFlow 1,
    where the corner of the first pixel stays in its place.
    """
    x, spatial = images.to(torch.float32), None
    theta = torch.eye(2, 3, device=x.device)
    for row, side in enumerate((x.shape[3], x.shape[2])):
        theta[row, 2] = 1 / side - 1 / SIDE
    grid = affine_grid(theta.expand(len(x), 2, 3), [len(x), 3, SIDE, SIDE], align_corners=False)
    x = grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    x = (x - 128) / 128
    for name, layer in layers:
        x = layer(x)
        if name == LAYER:
            spatial = spatial_features(x)
    return x.flatten(1), spatial
