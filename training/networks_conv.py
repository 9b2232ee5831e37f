"""A small convolutional classifier of clean images, for detectors: it learns several times as fast as a ResNet."""

from __future__ import annotations

import math

import torch
from torch.distributed.nn.functional import all_reduce

from torch_utils import distributed
from torch_utils.persistence import persistent_class

__all__ = ["ConvClassifier", "conv_kwargs"]

WIDEST = 8  # times the width of the first stage
SMALLEST = 4  # pixels of the last stage's maps, but there are at least LEAST stages
LEAST = 3


def conv_kwargs(img_channels: int) -> dict:
    """Return the constructor arguments for images with so many channels; color images get a larger network."""
    return dict(model_channels=32, num_blocks=1) if img_channels == 1 else dict(model_channels=64, num_blocks=2)


class BatchNorm(torch.nn.BatchNorm2d):
    """Batch normalization over the batch of all processes; PyTorch's own for several processes needs CUDA."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or distributed.get_world_size() == 1:
            return super().forward(x)
        x32 = x.to(torch.float32)
        count = x.numel() // x.shape[1] * distributed.get_world_size()
        total, squares = all_reduce(torch.stack([x32.sum(dim=[0, 2, 3]), x32.square().sum(dim=[0, 2, 3])])) / count
        var = squares - total.square()
        with torch.no_grad():
            self.running_mean.lerp_(total, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - total * scale
        return (x32 * scale[:, None, None] + shift[:, None, None]).to(x.dtype)


@persistent_class(embed_source=False)
class ConvClassifier(torch.nn.Module):
    """Classifier: images [N,C,H,W] -> logits [N,label_dim]; it takes a noise level, as others do, and ignores it."""

    network_kind = "classifier"

    def __init__(self,
        img_resolution,         # height and width in pixels
        img_channels,           # color channels
        label_dim,              # number of classes
        model_channels = 32,    # width of the first stage; it doubles from stage to stage, up to WIDEST times
        num_blocks     = 1,     # convolutions per stage; the first stage has one more
        dropout        = 0.3,   # dropout probability before the head; a third of it after each convolution
    ):  # fmt: skip
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        stages = max(round(math.log2(max(img_resolution / SMALLEST, 1))) + 1, LEAST)
        layers, width = [], img_channels
        for stage in range(stages):
            if stage and img_resolution >> stage:
                layers.append(torch.nn.MaxPool2d(2))
            for _ in range(num_blocks + (stage == 0)):
                before, width = width, model_channels * min(2**stage, WIDEST)
                layers += [torch.nn.Conv2d(before, width, 3, padding=1, bias=False), BatchNorm(width), torch.nn.ReLU()]
                layers.append(torch.nn.Dropout(dropout / 3))
        self.body = torch.nn.Sequential(*layers)
        self.dropout = torch.nn.Dropout(dropout)
        self.head = torch.nn.Linear(width, label_dim)

    def features(self, x: torch.Tensor, sigma: torch.Tensor | None = None) -> torch.Tensor:
        """Return the activations before the head, averaged over the image, [N,d]."""
        x = x.to(torch.float32, memory_format=torch.channels_last)
        return self.body(x).mean(dim=[2, 3])

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Return the head's output [N,label_dim] for features [N,d]."""
        return self.head(self.dropout(features))

    def forward(self, x: torch.Tensor, sigma: torch.Tensor | None = None) -> torch.Tensor:
        return self.logits(self.features(x))
