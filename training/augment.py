"""Augmentations that do not leak into samples, because the network receives the transform of each image as an input.

Source: Karras et al. 2022, appendix F.2; docs/methods/edm.md, Augmentation.
"""

from __future__ import annotations

import functools
import math

import torch

from torch_utils.precision import full_float32

__all__ = ["AugmentPipe", "default_augment", "draw_shifts", "shift_images"]

SCALE_STD, ANISO_STD, TRANSLATE_STD = 0.2, 0.2, 0.125  # The scales are in octaves, the translation in image sizes.

# Low-pass filter of the sym6 wavelet (Daubechies 1992). It is orthonormal to its even shifts, so upsampling and then
# downsampling with it restores the image: the identity as a warp changes nothing.
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
MARGIN = 3  # pixels around the output that downsampling needs


class AugmentPipe:
    """Random flips and warps, and the label vectors that describe them to the network.

    Each transform is drawn with probability `p` times its multiplier. With w ~ N(0, 1), drawn anew for each transform:

    * xflip, yflip: flip with probability 1/2;
    * scale: scale by 2^(0.2 w);
    * rotate_frac: rotate by an angle uniform on (-pi, pi);
    * aniso: stretch by 2^(0.2 w) along a random axis and shrink across it;
    * translate_frac: shift by 0.125 w of the image size.

    A multiplier of 0 turns the transform off and removes its entries from the label vector, which is
    [xflip, yflip, w_scale, cos(theta)-1, sin(theta), w_aniso cos(r), w_aniso sin(r), w_tx, w_ty].
    """

    def __init__(
        self,
        p: float = 1,
        xflip: float = 0,
        yflip: float = 0,
        scale: float = 0,
        rotate_frac: float = 0,
        aniso: float = 0,
        translate_frac: float = 0,
    ):
        self.p = p
        self.multipliers = dict(
            xflip=xflip, yflip=yflip, scale=scale, rotate_frac=rotate_frac, aniso=aniso, translate_frac=translate_frac
        )

    def settings(self) -> dict:
        """Return plain data from which AugmentPipe(**settings()) makes an equal object."""
        return dict(p=self.p, **self.multipliers)

    @property
    def label_dim(self) -> int:
        """Return the width of the label vector."""
        widths = dict(xflip=1, yflip=1, scale=1, rotate_frac=2, aniso=2, translate_frac=2)
        return sum(width for name, width in widths.items() if self.multipliers[name])

    def draw(self, n: int, generator: torch.Generator, device: torch.device) -> dict[str, torch.Tensor]:
        """Draw the transforms of n images: one float32 tensor [n] per transform, [n,2] for `translate_frac`.

        `rotate_frac` and `aniso_axis` are angles in radians, flips are 0 or 1, the others are the numbers w above. All
        are 0 for images that the transform leaves alone.
        """

        def uniform() -> torch.Tensor:
            return torch.rand(n, generator=generator, device=device)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(n, *shape, generator=generator, device=device)

        def drawn(name: str) -> torch.Tensor:
            return (uniform() < self.p * self.multipliers[name]).to(torch.float32)

        wanted, params = [name for name, multiplier in self.multipliers.items() if multiplier], {}
        for name in wanted:
            if name in ("xflip", "yflip"):
                params[name] = (uniform() < 0.5) * drawn(name)
            elif name == "rotate_frac":
                params[name] = (2 * uniform() - 1) * math.pi * drawn(name)
            elif name == "translate_frac":
                params[name] = normal(2) * drawn(name)[:, None]
            else:
                params[name] = normal() * drawn(name)
        if "aniso" in wanted:
            params["aniso_axis"] = (2 * uniform() - 1) * math.pi * (uniform() < 0.5)
        return params

    def apply(self, images: torch.Tensor, params: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Transform float images [N,C,H,W] by `params` from `draw`; return them and their labels [N,label_dim].

        Each image depends on its own parameters only, so both arguments may be split along N.
        """
        with full_float32(images.device):  # with ten bits, pixels are off by up to 63 gray levels at 256x256
            images = _flip(images, params)
            if params.keys() & {"scale", "rotate_frac", "aniso", "translate_frac"}:
                images = _warp(images, _output_to_input(params, *images.shape[2:]))
            return images, _labels(images, params)


def default_augment(p: float) -> AugmentPipe:
    """Return EDM's augmentation of small images, with label vectors of 9 numbers.

    Left-right flips are always drawn, the other transforms with probability p.
    """
    return AugmentPipe(p=p, xflip=1e8, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1)


def _labels(images: torch.Tensor, params: dict[str, torch.Tensor]) -> torch.Tensor:
    columns = [params[name] for name in ("xflip", "yflip", "scale") if name in params]
    if "rotate_frac" in params:
        columns += [params["rotate_frac"].cos() - 1, params["rotate_frac"].sin()]
    if "aniso" in params:
        columns += [params["aniso"] * params["aniso_axis"].cos(), params["aniso"] * params["aniso_axis"].sin()]
    if "translate_frac" in params:
        columns += params["translate_frac"].unbind(1)
    return torch.stack(columns, dim=1) if columns else images.new_zeros([len(images), 0])


def _flip(images: torch.Tensor, params: dict[str, torch.Tensor]) -> torch.Tensor:
    for name, axis in (("xflip", 3), ("yflip", 2)):
        if name in params:
            images = torch.where(params[name][:, None, None, None] > 0.5, images.flip(axis), images)
    return images


def _linear(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    # Return the maps [[a, b], [c, d]] of centered coordinates, [N,3,3], from four tensors [N].
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    return torch.stack([a, b, zero, c, d, zero, zero, zero, one], dim=1).reshape(-1, 3, 3)


def _rotation(angle: torch.Tensor) -> torch.Tensor:
    return _linear(angle.cos(), -angle.sin(), angle.sin(), angle.cos())


def _output_to_input(params: dict[str, torch.Tensor], height: int, width: int) -> torch.Tensor:
    # Return the maps [N,3,3] from output pixels to input pixels, G in docs/methods/edm.md. The origin is the center of
    # the image, x points right and y down.
    factors = []
    if "scale" in params:
        s = torch.exp2(-SCALE_STD * params["scale"])
        factors.append(_linear(s, torch.zeros_like(s), torch.zeros_like(s), s))
    if "rotate_frac" in params:
        factors.append(_rotation(params["rotate_frac"]))
    if "aniso" in params:
        s, axis = torch.exp2(ANISO_STD * params["aniso"]), params["aniso_axis"]
        stretch = _linear(1 / s, torch.zeros_like(s), torch.zeros_like(s), s)
        factors += [_rotation(-axis), stretch, _rotation(axis)]
    if "translate_frac" in params:
        shift = torch.eye(3, device=params["translate_frac"].device).repeat(len(params["translate_frac"]), 1, 1)
        # A tensor made from numbers of the host would make it wait for a GPU.
        shift[:, 0, 2] = -TRANSLATE_STD * width * params["translate_frac"][:, 0]
        shift[:, 1, 2] = -TRANSLATE_STD * height * params["translate_frac"][:, 1]
        factors.append(shift)
    return functools.reduce(torch.matmul, factors)


@functools.lru_cache(maxsize=32)
def _resampling(size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two matrices that act along one axis of an image.

    The first, [2(3 size-2),size], pads by reflection of size-1 pixels and upsamples: index 2k of the result is pixel
    k - (size-1). The second, [size,2(size+6)], downsamples: index j of its input is pixel j/2 - 3.
    """
    h, pad = torch.tensor(SYM6, dtype=torch.float64), size - 1
    padded = 3 * size - 2
    # Index i of the upsampled axis receives pixel l through tap 5 + i - 2l of h.
    tap = 5 + torch.arange(2 * padded)[:, None] - 2 * torch.arange(padded)
    up = torch.where((tap >= 0) & (tap < len(h)), h[tap.clamp(0, len(h) - 1)], 0.0)
    source = torch.arange(-pad, size + pad).abs()
    source = pad - (pad - source).abs()
    up = torch.zeros(2 * padded, size, dtype=torch.float64).index_add_(1, source, up)
    # Pixel m of the result receives index i, which is pixel i/2 - 3, through tap 5 - 2(m + 3) + i of h.
    tap = 5 + torch.arange(2 * (size + 2 * MARGIN)) - 2 * (torch.arange(size)[:, None] + MARGIN)
    down = torch.where((tap >= 0) & (tap < len(h)), h[tap.clamp(0, len(h) - 1)], 0.0)
    return up.to(device, torch.float32), down.to(device, torch.float32)


def _warp(images: torch.Tensor, output_to_input: torch.Tensor) -> torch.Tensor:
    """Return images [N,C,H,W] resampled by the maps `output_to_input` [N,3,3], with reflection at the borders."""
    height, width = images.shape[2:]
    (up_y, down_y), (up_x, down_x) = _resampling(height, images.device), _resampling(width, images.device)

    # Padding and filtering are linear along each axis, so one matrix product does both and needs no padded image.
    fine = up_y @ images @ up_x.T

    # Centered input coordinates [N,2(H+6),2(W+6),2] of each half-pixel of the output, MARGIN included.
    x = torch.arange(2 * (width + 2 * MARGIN), device=images.device) / 2 - MARGIN - (width - 1) / 2
    y = torch.arange(2 * (height + 2 * MARGIN), device=images.device) / 2 - MARGIN - (height - 1) / 2
    points = torch.stack([*torch.meshgrid(x, y, indexing="xy"), x.new_ones(len(y), len(x))], dim=2)
    source = points @ output_to_input[:, None, :2].transpose(-1, -2)

    # The centered coordinate q is index 2q - 1/2, counted from the middle of `fine`. grid_sample expects it divided by
    # half the size, so that -1 and 1 are the centers of the first and the last pixel.
    half_size = torch.stack([x.new_full([], (fine.shape[axis] - 1) / 2) for axis in (3, 2)])
    grid = (2 * source - 0.5) / half_size
    warped = torch.nn.functional.grid_sample(fine, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    return down_y @ warped @ down_x.T


def draw_shifts(
    n: int, share: float, resolution: int, generator: torch.Generator, device: torch.device | str
) -> torch.Tensor | None:
    """Draw whole-pixel shifts for `shift_images`, int64 [n,2] on `device`, up to `share` of the side `resolution`.

    Return None, and draw nothing, when the largest shift rounds to zero.
    """
    largest = round(share * resolution)
    if not largest:
        return None
    return torch.randint(-largest, largest + 1, [n, 2], generator=generator, device=device)


def shift_images(images: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
    """Shift each image [n,C,H,W] by its own number of pixels [n,2], down and right, and repeat the border.

    With `shift` None return the images as they are.
    """
    if shift is None:
        return images
    n, _, h, w = images.shape
    rows = (torch.arange(h, device=images.device) - shift[:, :1]).clamp(0, h - 1)
    cols = (torch.arange(w, device=images.device) - shift[:, 1:]).clamp(0, w - 1)
    index = torch.arange(n, device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[index, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)
