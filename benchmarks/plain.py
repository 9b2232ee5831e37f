"""The plain form of training: stock layers, eager float32, Python loops over parameters for gradients, Adam and EMA.

It repeats layers and optimizer step on purpose, so that it stays the same when those of the package become faster.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from unittest import mock

import torch
from torch.nn import functional as F

from torch_utils import misc
from torch_utils.training_stats import Stats
from training.networks import Conv2d, GroupNorm, Linear, UNetBlock
from training.objective import Objective

__all__ = ["PlainNetwork", "plain_layers", "plain_objective"]

EMA_BETA = 0.999


def _linear(self: Linear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, self.weight, self.bias)


def _conv(self: Conv2d, x: torch.Tensor) -> torch.Tensor:
    if self.up:
        x = F.interpolate(x, scale_factor=2.0)
    if self.down:
        x = F.avg_pool2d(x, 2)
    return x if self.weight is None else F.conv2d(x, self.weight, self.bias, padding=self.kernel // 2)


def _group_norm(self: GroupNorm, x: torch.Tensor) -> torch.Tensor:
    return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def _block(self: UNetBlock, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
    h = self.conv0(F.silu(self.norm0(x)))
    p = self.affine(emb)[:, :, None, None]
    if self.adaptive_scale:
        scale, shift = p.chunk(2, dim=1)
        h = F.silu(self.norm1(h) * (scale + 1) + shift)
    else:
        h = F.silu(self.norm1(h + p))
    h = self.conv1(F.dropout(h, self.dropout, self.training))
    x = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
    if self.num_heads:
        x = (self.proj(_attend(self, self.norm2(x))) + x) * self.skip_scale
    return x


def _attend(self: UNetBlock, x: torch.Tensor) -> torch.Tensor:
    n, c, height, width = x.shape
    q, k, v = self.qkv(x).reshape(n, self.num_heads, c // self.num_heads, 3, height * width).unbind(3)
    weights = torch.einsum("nhcq,nhck->nhqk", q, k / (c // self.num_heads) ** 0.5).softmax(dim=-1)
    return torch.einsum("nhqk,nhck->nhcq", weights, v).reshape(n, c, height, width)


@contextlib.contextmanager
def plain_layers() -> Iterator[None]:
    """Run U-Nets with the box filter (DDPM++) in stock PyTorch operations, which compute the same numbers."""
    with contextlib.ExitStack() as stack:
        for cls, forward in ((Linear, _linear), (Conv2d, _conv), (GroupNorm, _group_norm), (UNetBlock, _block)):
            stack.enter_context(mock.patch.object(cls, "forward", forward))
        yield


class PlainNetwork:
    """Replacement for `TrainedNetwork` that loops over parameters, in Adam as well, and copies the moving average."""

    def __init__(self, net: torch.nn.Module, device: torch.device, lr: float):
        self.net = self.forward = net.train().requires_grad_(True).to(device)
        self.ema = copy.deepcopy(self.net).eval().requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=lr, foreach=False, fused=False)

    def gathered(self) -> contextlib.AbstractContextManager:
        """Do nothing: the weights are always here."""
        return contextlib.nullcontext()

    @torch.no_grad()
    def update(self) -> None:
        """Clean the gradients, make one optimizer step, and update the EMA."""
        for p in self.net.parameters():
            if p.grad is not None:
                torch.nan_to_num(p.grad, nan=0.0, posinf=1e5, neginf=-1e5, out=p.grad)
        self.optimizer.step()
        for averaged, p in zip(self.ema.parameters(), self.net.parameters(), strict=True):
            averaged.copy_(p.lerp(averaged, EMA_BETA))


def plain_objective(cls: type[Objective]) -> type[Objective]:
    """Return a subclass of the method `cls` that trains in the plain form, with the same mathematics."""

    class Plain(cls):
        def trained_network(self, net: torch.nn.Module, **overrides) -> PlainNetwork:
            return PlainNetwork(net, self.device, self.config.optimizer.lr)

        def step(
            self, images: torch.Tensor, labels: torch.Tensor, nimg: int, stats: Stats, items: torch.Tensor | None = None
        ) -> None:
            trained = self.trained["net"]
            trained.optimizer.zero_grad(set_to_none=True)
            generator = misc.step_generator(self.config.seed, 0, nimg, self.device)
            for part in torch.arange(len(images), device=self.device).split(self.config.batch_gpu or len(images)):
                draws = self.draw(images[part], generator) | dict(items=None if items is None else items[part])
                with plain_layers():
                    loss = self.loss(images[part], labels[part], draws, stats)
                    (loss.sum() / len(images)).backward()
            trained.update()

    return Plain
