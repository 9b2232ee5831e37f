"""Residual networks that receive the noise level: TDSM's time-dependent classifier and SBDC's discriminator.

They follow the ResNets for CIFAR-10, with a 3x3 stem and no pooling before the head. The noise level enters twice:
c_in(sigma) of the preconditioner scales the input, and after each stage a linear layer adds an embedding of
c_noise(sigma). See docs/methods/tdsm.md and docs/methods/sbdc.md.
"""

from __future__ import annotations

import torch
from torch.nn.functional import dropout, silu

from torch_utils.persistence import persistent_class
from torch_utils.precision import no_autocast
from training.networks import EMBEDDINGS, Conv2d, GroupNorm, Linear, edm_coefs, ve_coefs, vp_coefs

__all__ = ["DEPTHS", "Classifier", "Discriminator", "resnet_kwargs"]

# name: (blocks per stage, width of the first stage, width of each stage in multiples of the first)
DEPTHS = {
    "small": ([1, 1, 1], 32, [1, 2, 4]),
    "resnet18": ([2, 2, 2, 2], 64, [1, 2, 4, 8]),
    "resnet34": ([3, 4, 6, 3], 64, [1, 2, 4, 8]),
}
COEFS = {"vp": vp_coefs, "ve": ve_coefs, "edm": edm_coefs}


def resnet_kwargs(
    arch: str,
    img_resolution: int,
    img_channels: int,
    label_dim: int,
    cbase: int | None = None,
    cres: list[int] | None = None,
    encoder: str | None = None,
) -> dict:
    """Return the constructor arguments for a data set and the name of a U-Net architecture (docs/methods/tdsm.md).

    `cbase` and `cres` replace the width of the first stage and the multipliers, `encoder` the depth (of DEPTHS).
    """
    if encoder is not None:
        depth = encoder
    elif arch in ("ddpmpp_tiny", "ddpmpp_mnist") or img_channels == 1:
        depth = "small"
    else:
        depth = "resnet34" if label_dim > 50 or img_resolution >= 64 else "resnet18"
    _, width, mult = DEPTHS[depth]
    return dict(
        depth=depth,
        model_channels=cbase or width,
        channel_mult=list(cres or mult),
        embedding_type="fourier" if arch == "ncsnpp" else "positional",
    )


@persistent_class(embed_source=False)
class ResBlock(torch.nn.Module):
    """Pre-activation residual block, [N,C_in,H,W] -> [N,C_out,H/stride,W/stride]."""

    def __init__(self, in_channels: int, out_channels: int, down: bool, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.norm0 = GroupNorm(in_channels)
        self.conv0 = Conv2d(in_channels, out_channels, 3, down=down, resample_filter=[1, 1])
        self.norm1 = GroupNorm(out_channels)
        self.conv1 = Conv2d(out_channels, out_channels, 3, init_weight=1e-2)
        self.skip = None
        if down or in_channels != out_channels:
            self.skip = Conv2d(in_channels, out_channels, 1, down=down, resample_filter=[1, 1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = silu(self.norm1(self.conv0(silu(self.norm0(x)))))
        h = self.conv1(dropout(h, self.dropout, self.training))
        return h + (x if self.skip is None else self.skip(x))


class _ResNet(torch.nn.Module):
    """Base class of classifier and discriminator; its head has `outputs` numbers per image.

    Raises ValueError if the image is too small for the number of stages.
    """

    def __init__(self,
        img_resolution,                     # height and width in pixels
        img_channels,                       # color channels
        label_dim,                          # number of classes
        augment_dim         = 0,            # width of the augmentation label vector; 0: none
        precond             = "edm",        # preconditioner that gives c_in and c_noise: vp, ve, edm
        depth               = "resnet18",   # blocks per stage: small, resnet18, resnet34
        model_channels      = 64,           # width of the first stage
        channel_mult        = (1, 2, 4, 8), # width of each stage, in multiples of model_channels
        embedding_type      = "positional", # noise embedding: positional, fourier
        dropout             = 0.1,          # dropout probability, in the blocks and before the head
        *,
        outputs,                            # numbers per image that the head returns
    ):  # fmt: skip
        if img_resolution >> (len(channel_mult) - 1) < 1:
            raise ValueError(f"{len(channel_mult)} levels are too many for images of {img_resolution} pixels")
        if min(channel_mult, default=0) < 1:
            raise ValueError("channel_mult: every level needs at least one channel")
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.augment_dim, self.precond, self.dropout = augment_dim, precond, dropout
        blocks = DEPTHS[depth][0]
        if len(channel_mult) != len(blocks):
            # The multipliers decide how many stages there are. Extra stages get as many blocks as the last one.
            blocks = (blocks + blocks[-1:] * len(channel_mult))[: len(channel_mult)]
        widths = [model_channels * m for m in channel_mult]
        emb = 4 * model_channels
        self.map_noise = EMBEDDINGS[embedding_type](model_channels)
        self.map_augment = Linear(augment_dim, emb, bias=False) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb)
        self.map_layer1 = Linear(emb, emb)
        self.stem = Conv2d(img_channels, widths[0], 3)
        self.stages = torch.nn.ModuleList()
        self.affines = torch.nn.ModuleList()
        for i, (n, width) in enumerate(zip(blocks, widths, strict=True)):
            first = ResBlock(widths[max(i - 1, 0)], width, down=i > 0, dropout=dropout)
            rest = [ResBlock(width, width, down=False, dropout=dropout) for _ in range(n - 1)]
            self.stages.append(torch.nn.Sequential(first, *rest))
            self.affines.append(Linear(emb, width))
        self.norm_out = GroupNorm(widths[-1])
        self.head = Linear(widths[-1], outputs, init_weight=1e-2)

    def embedding(self, c_noise: torch.Tensor, augment_labels: torch.Tensor | None) -> torch.Tensor:
        """Return the embedding of noise level and augmentation before its last layer, [N,4 model_channels]."""
        emb = self.map_layer0(self.map_noise(c_noise))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return emb

    def body(self, x: torch.Tensor, c_in: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """Return the activations before the head, averaged over the image, float32 [N,d]."""
        emb = silu(self.map_layer1(silu(emb)))
        h = self.stem(x.to(torch.float32) * c_in)
        for stage, affine in zip(self.stages, self.affines, strict=True):
            h = stage(h) + affine(emb)[:, :, None, None]
        return silu(self.norm_out(h)).mean(dim=[2, 3], dtype=torch.float32)

    def coefs(self, x: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the preconditioner's c_in [N or 1,1,1,1] and c_noise [N] at `sigma` ([] or [N])."""
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1, 1, 1, 1)
        _, _, c_in, c_noise = COEFS[self.precond](sigma)
        return c_in, c_noise.flatten().expand(len(x))

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Return the head's float32 output [N,outputs] for the activations [N,d] of `body`."""
        with no_autocast(features.device):  # 8 bits are too few for a logit
            return self.head(dropout(features, self.dropout, self.training))


@persistent_class(embed_source=False)
class Classifier(_ResNet):
    """Time-dependent classifier: images [N,C,H,W] at noise level sigma ([] or [N]) -> logits [N,label_dim].

    `augment_labels` [N,augment_dim] says how each image was augmented. The constructor's arguments are those of
    `_ResNet` without `outputs`. See docs/methods/tdsm.md.
    """

    network_kind = "classifier"

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int, **kwargs):
        super().__init__(img_resolution, img_channels, label_dim, outputs=label_dim, **kwargs)

    def features(
        self, x: torch.Tensor, sigma: torch.Tensor, augment_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the activations before the head, averaged over the image, [N,d]."""
        c_in, c_noise = self.coefs(x, sigma)
        return self.body(x, c_in, self.embedding(c_noise, augment_labels))

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, augment_labels: torch.Tensor | None = None) -> torch.Tensor:
        return self.logits(self.features(x, sigma, augment_labels))


@persistent_class(embed_source=False)
class Discriminator(_ResNet):
    """Discriminator: images [N,C,H,W] at noise level sigma ([] or [N]), labels [N,label_dim] -> logits [N].

    A logit is positive where the label looks right. The label enters through the embedding, as in the U-Nets. The
    constructor's arguments are those of `_ResNet` without `outputs`. See docs/methods/sbdc.md.
    """

    network_kind = "discriminator"

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int, **kwargs):
        super().__init__(img_resolution, img_channels, label_dim, outputs=1, **kwargs)
        self.map_label = Linear(
            label_dim,
            self.map_layer0.weight.shape[0],
            bias=False,
            init_mode="kaiming_normal",
            init_weight=label_dim**0.5,
        )

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        class_labels: torch.Tensor,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        c_in, c_noise = self.coefs(x, sigma)
        emb = self.embedding(c_noise, augment_labels) + self.map_label(class_labels.to(torch.float32))
        return self.logits(self.body(x, c_in, emb))[:, 0]
