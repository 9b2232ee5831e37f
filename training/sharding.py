"""Sharding by FSDP2: each process keeps slices of weights, gradients, Adam's moments and EMA (docs/scaling.md).

The whole weights of a block exist only while a pass runs through it, so every pass is collective: all processes must
make the same number of passes, except inside `Shards.gathered`. The processes of one machine divide a network among
themselves, because the links within a machine are fast. Machines hold copies of each other. Source: ZeRO-3
(Rajbhandari et al., SC 2020).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

import dnnlib
from torch_utils import distributed
from training.networks import UNetBlock
from training.networks_resnet import ResBlock

__all__ = ["Shards", "check_pytorch", "whole"]

UNITS = (UNetBlock, ResBlock)  # each is gathered and freed as one unit; the rest of the network is one more unit


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole tensor that a slice belongs to (collective), or any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_pytorch() -> None:
    """Raise UserError if the FSDP2 of this PyTorch is too old."""
    if not hasattr(FSDPModule, "set_reshard_after_forward"):
        raise dnnlib.UserError(
            f"PyTorch {torch.__version__} is too old for sharding: its FSDP2 cannot keep weights gathered between "
            "passes; install a newer one, or do not shard"
        )


def _mesh(device: torch.device) -> DeviceMesh:
    world = distributed.get_world_size()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if local < world and world % local == 0:
        return init_device_mesh(device.type, (world // local, local), mesh_dim_names=("machine", "shard"))
    return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))


class Shards:
    """The slices of `net` and of its average `ema` that this process keeps.

    The constructor replaces the weights of both networks, which must be whole, on the CPU, and the same on every
    process. `params` holds the slices of `net` as plain parameters, and their `grad` is a view of `flat_grads`. An
    optimizer that works element by element can use them like any other parameters. See `check_pytorch`.
    """

    def __init__(self, net: torch.nn.Module, ema: torch.nn.Module, device: torch.device):
        self.mesh = _mesh(device)
        self.net, self.ema = net, ema
        for module in (net, ema):
            for unit in [m for m in module.modules() if isinstance(m, UNITS)]:
                fully_shard(unit, mesh=self.mesh)
            fully_shard(module, mesh=self.mesh)
        # The backward pass gathers the next block early. This fixes the order on every process. Left to itself, FSDP2
        # repeats the order of all earlier passes, also of those inside `gathered`. Their number differs from process to
        # process, so the processes would gather different blocks.
        order = [m for m in net.modules() if isinstance(m, FSDPModule)]  # the root, then the order of the forward pass
        for module, ahead in zip(order, order[-1:] + order[:-1], strict=True):
            module.set_modules_to_backward_prefetch([ahead])
        self._net, self._ema = list(net.parameters()), list(ema.parameters())
        self.params = [torch.nn.Parameter(p.to_local().detach()) for p in self._net]
        self.flat_grads = torch.zeros(sum(p.numel() for p in self.params), device=device)
        for p, grad in zip(self.params, self.flat_grads.split([p.numel() for p in self.params]), strict=True):
            p.grad = grad.view_as(p)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients on each process without exchanging them."""
        self.net.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.net.set_requires_gradient_sync(True)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Keep all weights of `net` on every process, so that each may make passes of its own, without gradients.

        Entering is collective.
        """
        units = [m for m in self.net.modules() if isinstance(m, FSDPModule)]
        for unit in units:
            unit.unshard()
        self.net.set_reshard_after_forward(False)
        try:
            yield
        finally:
            self.net.set_reshard_after_forward(True)
            for unit in units:
                unit.reshard()

    def free(self) -> None:
        """Free the whole weights that a pass without backward leaves in the root.

        They must not outlive a step or a change of `requires_grad`.
        """
        for module in (self.net, self.ema):
            module.reshard()

    @torch.no_grad()
    def take_grads(self) -> None:
        """Move the gradients of the backward pass into `flat_grads`, and point `params` to the current slices."""
        self.free()
        ours, theirs = [], []
        for mine, p in zip(self.params, self._net, strict=True):
            mine.data = p.to_local()  # The first pass may move a slice, to pad it.
            if p.grad is not None:
                ours.append(mine.grad)
                theirs.append(p.grad.to_local())
                p.grad = None
        if ours:
            torch._foreach_copy_(ours, theirs)

    @torch.no_grad()
    def slices(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the slices of `ema` and of `net`, to update the average."""
        return [p.to_local() for p in self._ema], [p.to_local() for p in self._net]

    def sum(self, count: torch.Tensor) -> torch.Tensor:
        """Sum `count` in place over the processes that share a network, and return it.

        Every machine computes the same sum, because machines hold copies of each other.
        """
        torch.distributed.all_reduce(count, group=self.mesh["shard"].get_group())
        return count

    # States hold whole tensors, like those of runs without sharding.

    @torch.no_grad()
    def gather(self, module: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return `module.state_dict()` with whole tensors on the CPU of rank 0, and {} on other ranks. Collective."""
        return {k: v for k, v in ((k, _to_rank0(v)) for k, v in module.state_dict().items()) if v is not None}

    @torch.no_grad()
    def load(self, module: torch.nn.Module, state: dict[str, torch.Tensor], strict: bool = True) -> None:
        """Set the tensors of `module` that `state` names to this process's slices of the whole tensors in `state`.

        With `strict`, `state` must name all tensors. Raises ValueError if names or shapes differ.
        """
        ours = module.state_dict()
        if strict and ours.keys() != state.keys():
            raise ValueError(f"it has {len(state)} tensors, the network has {len(ours)}, and their names differ")
        for name in ours.keys() & state.keys():
            mine = ours[name].to_local() if isinstance(ours[name], DTensor) else ours[name]
            mine.copy_(self._slice(name, state[name], ours[name]))

    @torch.no_grad()
    def gather_optimizer(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the state of an optimizer of `params` as a state for whole parameters, on rank 0. Collective."""
        found = {}
        for i, values in state["state"].items():
            p, mine = self._net[i], self.params[i]
            found[i] = {
                k: _to_rank0(_like(v, p)) if torch.is_tensor(v) and v.shape == mine.shape else v
                for k, v in values.items()
            }
        return dict(state, state=found)

    def slice_optimizer(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the state of an optimizer of whole parameters as a state for `params`.

        Raises ValueError if it belongs to other parameters.
        """
        if any(i not in range(len(self._net)) for i in state["state"]):
            raise ValueError(f"the optimizer's state covers more than {len(self._net)} parameters")
        found = {}
        for i, values in state["state"].items():
            found[i] = {
                k: self._slice(k, v, self._net[i]) if torch.is_tensor(v) and v.ndim else v for k, v in values.items()
            }
        return dict(state, state=found)

    def _slice(self, name: str, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        if tensor.shape != like.shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, expected {list(like.shape)}")
        if not isinstance(like, DTensor):
            return tensor
        parts = tensor.chunk(self.mesh["shard"].size())  # As DTensor's Shard(0), it may return fewer parts than asked.
        rank = self.mesh["shard"].get_local_rank()
        return parts[rank] if rank < len(parts) else tensor[:0]


def _like(part: torch.Tensor, p: DTensor) -> DTensor:
    return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def _to_rank0(tensor: torch.Tensor) -> torch.Tensor | None:
    # The caller takes one tensor at a time, so a device never holds more than one whole tensor.
    tensor = whole(tensor)
    return tensor.cpu() if distributed.get_rank() == 0 else None
