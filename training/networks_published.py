"""Classifiers of TDSM and discriminators of SBDC as their authors publish them, under the published names.

They exist to be read from published snapshots; our own are in `training.networks_resnet`. Their parameters and buffers
have the published names, so they load one by one. See docs/formats.md, Published checkpoints.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn.functional import avg_pool2d, relu, silu

from torch_utils.persistence import persistent_class
from torch_utils.precision import no_autocast
from training.networks import EMBEDDINGS, Linear, PositionalEmbedding
from training.networks_resnet import COEFS

__all__ = [
    "MODELS",
    "EDMPrecondDiscriminator",
    "EDMPrecond_classifier",
    "EDMPrecond_classifier_with_transition_matrix",
    "VPPrecondDiscriminator",
    "VPPrecond_classifier",
    "VPPrecond_classifier_with_transition_matrix",
]

DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}  # residual blocks per stage
WIDTHS = (64, 128, 256, 512)  # of the stages
POOLED = 4  # pixels that the last layer averages over, along each side
SETTINGS = {"edm": ["sigma_data"], "vp": ["beta_d", "beta_min", "M"]}  # of the preconditioners
MANY_CLASSES = 100  # from here on, a network that does not record its depth is a ResNet-34


class BasicBlock(torch.nn.Module):
    """Residual block with batch normalization, [N,C_in,H,W] -> [N,C_out,H/stride,W/stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(out_channels)
        self.conv2 = torch.nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(out_channels)
        self.shortcut = torch.nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            skip = torch.nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = torch.nn.Sequential(skip, torch.nn.BatchNorm2d(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        return relu(h + self.shortcut(x))


class ResNet(torch.nn.Module):
    """ResNet that adds an embedding after each stage: [N,C,H,W], [N,emb_channels] -> features [N,d].

    Raises ValueError for images of fewer than 32 pixels along a side.
    """

    def __init__(self, img_resolution: int, in_channels: int, emb_channels: int, depth: str, outputs: int):
        super().__init__()
        left = img_resolution >> len(WIDTHS) - 1
        if left < POOLED:
            raise ValueError(f"images of {img_resolution} pixels are too small, at least 32 are needed")
        self.conv1 = torch.nn.Conv2d(in_channels, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(WIDTHS[0])
        width = WIDTHS[0]
        for stage, (blocks, wider) in enumerate(zip(DEPTHS[depth], WIDTHS, strict=True), start=1):
            first = BasicBlock(width, wider, stride=1 if stage == 1 else 2)
            rest = [BasicBlock(wider, wider, stride=1) for _ in range(blocks - 1)]
            setattr(self, f"layer{stage}", torch.nn.Sequential(first, *rest))
            setattr(self, f"dense_{stage}", torch.nn.Linear(emb_channels, wider))
            width = wider
        self.linear = torch.nn.Linear(width * (left // POOLED) ** 2, outputs)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h, emb = relu(self.bn1(self.conv1(x))), silu(emb)
        for stage in range(1, len(WIDTHS) + 1):
            h = getattr(self, f"layer{stage}")(h) + getattr(self, f"dense_{stage}")(emb)[:, :, None, None]
        return avg_pool2d(h, POOLED).flatten(1)


class ConvNet(torch.nn.Module):
    """Two convolutions with an embedding after each, for MNIST: [N,C,H,W], [N,emb_channels] -> features [N,d]."""

    def __init__(self, img_resolution: int, in_channels: int, emb_channels: int, depth: str, outputs: int):
        super().__init__()
        del depth  # there is one
        for stage, (before, width) in enumerate([(in_channels, 16), (16, 32)], start=1):
            conv = torch.nn.Conv2d(before, width, 5, padding=2)
            setattr(self, f"conv{stage}", torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.MaxPool2d(2)))
            setattr(self, f"dense_{stage}", torch.nn.Linear(emb_channels, width))
        self.linear = torch.nn.Linear(32 * (img_resolution // 4) ** 2, outputs)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h, emb = x, silu(emb)
        for stage in (1, 2):
            h = getattr(self, f"conv{stage}")(h) + getattr(self, f"dense_{stage}")(emb)[:, :, None, None]
        return h.flatten(1)


class _Embedded(torch.nn.Module):
    """A network, called `part`, and the embedding of noise level, augmentation and (`labels`) class that it receives.

    The embedding is that of EDM's U-Nets: of DDPM++ and NCSN++, or (`adm`) of ADM.
    """

    part, network, labels, adm = "classifier", ResNet, False, False

    def __init__(self,
        img_resolution: int,                    # height and width in pixels
        img_channels: int,
        label_dim: int,                         # number of classes
        augment_dim: int        = 0,            # width of the augmentation label vector; 0: none
        model_channels: int     = 0,            # unit of all widths; 0: 128, and 192 for ADM
        channel_mult_emb: int   = 4,            # width of the embedding, in multiples of model_channels
        channel_mult_noise: int = 1,            # width of the noise embedding, in multiples of model_channels
        embedding_type: str     = "positional", # noise embedding: positional, fourier
        encoder_type: str       = "",           # resnet18, resnet34; anything else: by the number of classes
        **_unused: Any,                         # recorded for the U-Nets that share these settings
    ):  # fmt: skip
        super().__init__()
        depth = encoder_type if encoder_type in DEPTHS else "resnet34" if label_dim >= MANY_CLASSES else "resnet18"
        width = model_channels or (192 if self.adm else 128)
        noise, emb = width * channel_mult_noise, width * channel_mult_emb
        self.label_scale = label_dim**0.5
        self.map_noise = PositionalEmbedding(noise) if self.adm else EMBEDDINGS[embedding_type](noise)
        self.map_label = Linear(label_dim, noise) if self.labels else None
        self.map_augment = Linear(augment_dim, noise, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer1 = Linear(noise, emb), Linear(emb, emb)
        outputs = 1 if self.labels else label_dim
        setattr(self, self.part, self.network(img_resolution, img_channels, emb, depth, outputs))

    def forward(
        self,
        x: torch.Tensor,
        noise_labels: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the features before the last layer, [N,d]."""
        emb = self.map_noise(noise_labels)
        emb = emb if self.adm else emb.roll(emb.shape[1] // 2, dims=1)  # [sin, cos]
        if self.map_label is not None:
            if class_labels is None:
                class_labels = emb.new_zeros([1, self.map_label.in_features])
            emb = emb + self.map_label(class_labels * self.label_scale)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = silu(self.map_layer1(silu(self.map_layer0(emb))))
        return getattr(self, self.part)(x, emb)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Return what the last layer makes of features [N,d]."""
        return getattr(self, self.part).linear(features)


@persistent_class(embed_source=False)
class ClassifierSong(_Embedded):
    """TDSM's classifier, a ResNet."""


@persistent_class(embed_source=False)
class ClassifierSong_MNIST(_Embedded):
    """TDSM's classifier for MNIST."""

    network = ConvNet


@persistent_class(embed_source=False)
class ClassifierDhariwal(_Embedded):
    """TDSM's classifier beside ADM."""

    adm = True


@persistent_class(embed_source=False)
class DiscriminatorSong(_Embedded):
    """SBDC's discriminator, a ResNet."""

    part, labels = "discriminator", True


@persistent_class(embed_source=False)
class DiscriminatorDhariwal(_Embedded):
    """SBDC's discriminator beside ADM."""

    part, labels, adm = "discriminator", True, True


MODELS = {
    cls.__name__: cls
    for cls in (ClassifierSong, ClassifierSong_MNIST, ClassifierDhariwal, DiscriminatorSong, DiscriminatorDhariwal)
}


class _Precond(torch.nn.Module):
    """A preconditioner's c_in and c_noise before the network `model`, whose class is called `model_type`.

    Raises ValueError unless `model_type` is one of MODELS that is a `part`.
    """

    part, precond = "classifier", "edm"

    def __init__(self,
        img_resolution: int,        # height and width in pixels
        img_channels: int,
        label_dim: int,             # number of classes
        model_type: str     = "",   # one of MODELS
        **kwargs: Any,              # settings of the preconditioner, and further arguments of that class
    ):  # fmt: skip
        super().__init__()
        model = MODELS.get(model_type)
        if model is None or model.part != self.part:
            known = ", ".join(name for name, cls in MODELS.items() if cls.part == self.part)
            raise ValueError(f"model_type={model_type!r}: must be one of {known}")
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        settings = {name: kwargs[name] for name in SETTINGS[self.precond] if name in kwargs}
        self.coefs = functools.partial(COEFS[self.precond], **settings)
        self.augment_dim = 0  # They know augmentation labels, but were published to be asked without.
        self.model = model(img_resolution, img_channels, label_dim, **kwargs)

    def features(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the features before the last layer, float32 [N,d], of images [N,C,H,W] at noise level [] or [N]."""
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1, 1, 1, 1)
        _, _, c_in, c_noise = self.coefs(sigma)
        labels = None if class_labels is None else class_labels.to(torch.float32)
        return self.model(c_in * x.to(torch.float32), c_noise.flatten(), labels, augment_labels)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Return the float32 output of the last layer for features [N,d]."""
        with no_autocast(features.device):  # 8 bits are too few for a logit
            return self.model.logits(features.to(torch.float32))

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.logits(self.features(x, sigma, class_labels, augment_labels))


@persistent_class(embed_source=False)
class EDMPrecond_classifier(_Precond):
    """TDSM's classifier: images [N,C,H,W] at noise level [] or [N] -> logits [N,label_dim]; class labels do nothing."""

    network_kind = "classifier"


@persistent_class(embed_source=False)
class VPPrecond_classifier(EDMPrecond_classifier):
    """The same beside a denoiser of the variance-preserving process."""

    precond = "vp"


@persistent_class(embed_source=False)
class EDMPrecond_classifier_with_transition_matrix(EDMPrecond_classifier):
    """TDSM's classifier by VolMinNet: its logits are those of clean labels, and it knows the transition matrix."""

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int, **kwargs: Any):
        super().__init__(img_resolution, img_channels, label_dim, **kwargs)
        self.transition_matrix = torch.nn.Parameter(torch.full([label_dim, label_dim], -2.0))

    def transition(self) -> torch.Tensor:
        """Return T, float64 [C,C], rows the clean class: I + sigmoid(theta) off the diagonal, rows normalized."""
        theta = self.transition_matrix.detach().to(torch.float64)
        T = theta.sigmoid().fill_diagonal_(1)
        return T / T.sum(dim=1, keepdim=True)

    def snapshot_info(self) -> dict[str, Any]:
        """Return what a snapshot of ours would record about the network."""
        return dict(posterior="clean", transition=self.transition().tolist())


@persistent_class(embed_source=False)
class VPPrecond_classifier_with_transition_matrix(EDMPrecond_classifier_with_transition_matrix):
    """The same beside a denoiser of the variance-preserving process."""

    precond = "vp"


@persistent_class(embed_source=False)
class EDMPrecondDiscriminator(_Precond):
    """SBDC's discriminator: images [N,C,H,W] at noise level [] or [N], labels [N,label_dim] -> logits [N].

    The published network returns the sigmoid of this, [N,1]. Without labels the embedding keeps its bias.
    """

    network_kind = "discriminator"
    part = "discriminator"

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Return the float32 logit [N] for features [N,d]."""
        return super().logits(features)[:, 0]


@persistent_class(embed_source=False)
class VPPrecondDiscriminator(EDMPrecondDiscriminator):
    """The same beside a denoiser of the variance-preserving process."""

    precond = "vp"
