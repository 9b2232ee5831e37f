"""One network in training: optimizer, learning rate, gradient hygiene, EMA and DDP, shared by all objectives."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import warnings
from collections.abc import Callable, Iterator

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from torch_utils import distributed
from training.loss_scale import LossScale
from training.sharding import UNITS, Shards

__all__ = ["TrainedNetwork", "cosine_decay", "linear_rampup", "make_optimizer"]


def make_optimizer(
    params, name: str, lr: float, device: torch.device, betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.Optimizer:
    """Return an optimizer by name: adam(*betas, 1e-8), adamw (weight decay 0.01) or sgd (momentum 0.9)."""
    params = list(params)
    if name == "sgd":
        return torch.optim.SGD(params, lr=lr, momentum=0.9, fused=device.type != "mps")
    cls = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    return cls(params, lr=lr, betas=betas, eps=1e-8, fused=device.type != "mps")


def linear_rampup(rampup_nimg: float) -> Callable[[int], float]:
    """Return a learning-rate factor that rises linearly from 0 to 1 over `rampup_nimg` images."""
    return lambda nimg: min(nimg / rampup_nimg, 1.0) if rampup_nimg > 0 else 1.0


def cosine_decay(total_nimg: int, final: float) -> Callable[[int], float]:
    """Return a learning-rate factor that falls along half a cosine from 1 to `final` (at most 1) over `total_nimg`."""
    final = min(final, 1.0)
    return lambda nimg: final + (1 - final) * (1 + math.cos(math.pi * min(nimg / total_nimg, 1.0))) / 2


class TrainedNetwork:
    """A network, its EMA, its optimizer and, on several processes, its DDP wrapper or (with `shard`) its `Shards`.

    `lr_factor` maps the images seen to a factor on `lr`. The half-life of the EMA in images is min(ema_halflife,
    ema_rampup nimg) (docs/methods/edm.md, Training recipe). Call `forward` for passes that need gradients, and `net`
    for passes that do not.
    """

    def __init__(
        self,
        net: torch.nn.Module,
        device: torch.device,
        *,
        lr: float,
        optimizer: str = "adam",
        betas: tuple[float, float] = (0.9, 0.999),
        lr_factor: Callable[[int], float] = lambda nimg: 1.0,
        ema_halflife: float = 0.0,
        ema_rampup: float = 0.05,
        loss_scale: LossScale | None = None,
        compile: bool = False,
        channels_last: bool = False,
        shard: bool = False,
    ):
        shard = shard and distributed.get_world_size() > 1  # one process has no other to share with
        # A sharded network is never whole on the device: its parts go there, one block at a time.
        self.net = net.train().requires_grad_(True).to("cpu" if shard else device)
        if channels_last and not shard:  # the layout of tensor cores, which FSDP2 lacks
            self.net.to(memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.net).eval().requires_grad_(False)
        # `export` fills this network. With sharding it is a copy of the EMA that rank 0 alone holds.
        self.exported = self.ema if not shard else copy.deepcopy(self.ema) if distributed.get_rank() == 0 else None
        self.device = device
        self.lr, self.lr_factor, self.ema_halflife = lr, lr_factor, ema_halflife
        self.ema_rampup, self.loss_scale = ema_rampup, loss_scale or LossScale()
        self.bad_grads = torch.zeros([], dtype=torch.int64, device=device)
        self._buckets: list[torch.Tensor] = []  # DDP's gradients of this step, averaged
        if compile:
            # Collectives stay outside the compiled code.
            for module in (m for m in self.net.modules() if isinstance(m, UNITS)) if shard else (self.net,):
                module.compile()
        self._shards = Shards(self.net, self.ema, device) if shard else None
        buffers = zip(self.ema.named_buffers(), self.net.buffers(), strict=True)
        running = (".running_mean", ".running_var")  # statistics of batch normalization; other buffers are constant
        self._running = [(average, value) for (name, average), value in buffers if name.endswith(running)]
        self.params = self._shards.params if shard else list(self.net.parameters())
        self.optimizer = make_optimizer(self.params, optimizer, lr, device, betas)
        if optimizer == "sgd" and self.loss_scale.adapts:
            # If the first step is skipped, PyTorch leaves the momentum uninitialized.
            for p in self.params:
                self.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        if shard:
            self.forward, self._flat_grads = self.net, self._shards.flat_grads
        elif distributed.get_world_size() > 1:
            # Buffers are constants here, so they need not travel in every step. PyTorch 2.13 renamed that argument.
            names = inspect.signature(torch.nn.parallel.DistributedDataParallel).parameters
            constant = {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}
            # Gradients of 1x1 kernels have other strides in dimensions of size 1 only, which changes nothing.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            self.forward = torch.nn.parallel.DistributedDataParallel(
                self.net,  # without device_ids, for which DDP would look at the first input: some networks have none
                gradient_as_bucket_view=True,
                **constant,
            )
            self.forward.register_comm_hook(None, self._keep_bucket)
            self._flat_grads = None
        else:
            self.forward = self.net
            self._flat_grads = self._flatten_grads()

    def _flatten_grads(self) -> torch.Tensor:
        # One buffer under all gradients: cleaning and zeroing are one operation each, not one per parameter.
        sizes, first = [p.numel() for p in self.params], self.params[0]
        flat = torch.zeros(sum(sizes), device=first.device, dtype=first.dtype)
        for p, chunk in zip(self.params, flat.split(sizes), strict=True):
            p.grad = chunk.as_strided(p.size(), p.stride())
        return flat

    def _clean(self, grads: list[torch.Tensor]) -> torch.Tensor:
        # Undo the loss scale and make all elements finite, in place. Returns how many were not.
        bad = torch.zeros_like(self.bad_grads)
        for flat in grads:
            if self.loss_scale.adapts or self.loss_scale.factor != 1:
                flat.mul_(1 / self.loss_scale.factor)
            bad += torch.count_nonzero(flat * 0)  # zero times a non-finite number is not zero
            torch.nan_to_num_(flat, nan=0.0, posinf=1e5, neginf=-1e5)
        return bad if self._shards is None else self._shards.sum(bad)

    def _keep_bucket(
        self, _state, bucket
    ):  # no annotations: DDP compares them with its types, and ours would be strings
        # Hooks of several buckets run on several CUDA streams at a time, so they must not add to one counter.
        self._buckets.append(bucket.buffer())
        return allreduce_hook(None, bucket)

    @contextlib.contextmanager
    def accumulate(self, last: bool):
        """Wrap forward and backward of one micro-batch; gradients travel between processes only after the `last`."""
        if last or (self._shards is None and self.forward is self.net):
            yield
        else:
            with (self._shards or self.forward).no_sync():
                yield

    def requires_grad_(self, value: bool) -> None:
        """Set whether backward computes gradients of the weights."""
        if self._shards is not None:
            self._shards.free()
        self.net.requires_grad_(value)

    def gathered(self) -> contextlib.AbstractContextManager:
        """Wrap passes of `net` without gradients whose number differs between processes. Collective when sharded."""
        return contextlib.nullcontext() if self._shards is None else self._shards.gathered()

    @torch.no_grad()  # otherwise the average would keep a graph of all its updates
    def update(self, nimg: int, batch_size: int) -> None:
        """Take one optimizer step from the accumulated gradients and update the EMA. `nimg`: images seen before it.

        With a loss scale that adapts, non-finite gradients leave the weights as they are.
        """
        if self._shards is not None:
            self._shards.take_grads()
        buckets, self._buckets = self._buckets, []
        bad = self._clean(buckets if self._flat_grads is None else [self._flat_grads])
        self.bad_grads = self.bad_grads + bad
        if self.loss_scale.adapts:
            self.optimizer.found_inf = (bad > 0).to(torch.float32)  # fused optimizers skip the step on the device
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.lr_factor(nimg)
        self.optimizer.step()
        if self._flat_grads is None:
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self._flat_grads.zero_()
        # beta = 0.5^(batch / half-life); the half-life rises with the images seen.
        halflife = min(self.ema_halflife, self.ema_rampup * nimg)
        beta = 0.5 ** (batch_size / halflife) if halflife > 0 else 0.0
        ema, net = (list(self.ema.parameters()), self.params) if self._shards is None else self._shards.slices()
        torch._foreach_lerp_(ema, net, 1 - beta)
        for average, value in self._running:
            average.lerp_(value, 1 - beta)

    def take_bad_grads(self) -> torch.Tensor:
        """Return the number of non-finite gradient elements since the last call, a tensor on the device."""
        count, self.bad_grads = self.bad_grads, torch.zeros_like(self.bad_grads)
        return count

    def transfer(self, source: torch.nn.Module) -> tuple[dict[str, int], dict[str, int]]:
        """Copy parameters and buffers of equal name and shape from `source` into network and EMA.

        Return the sizes of the parameters that were copied and of those that were not, by name.
        """
        theirs, ours = source.state_dict(), self.net.state_dict()
        common = {k: v for k, v in theirs.items() if k in ours and ours[k].shape == v.shape}
        copied, left = {}, {}
        for key, parameter in self.net.named_parameters():  # buffers are the same in most networks
            (copied if key in common else left)[key] = parameter.numel()
        for module in (self.net, self.ema):
            self._load(module, common, strict=False)
        return copied, left

    def export(self) -> torch.nn.Module | None:
        """Return the EMA as a whole network. Collective when sharded: on the CPU of rank 0, None elsewhere."""
        if self._shards is not None:
            state = self._shards.gather(self.ema)
            if distributed.get_rank() == 0:
                self.exported.load_state_dict(state)
        return self.exported

    @contextlib.contextmanager
    def exported_here(self) -> Iterator[torch.nn.Module]:
        """Give the exported network on the device, for passes that rank 0 makes alone."""
        home = next(self.exported.parameters()).device
        try:
            yield self.exported.to(self.device)
        finally:
            self.exported.to(home)

    def close(self) -> None:
        """Release DDP.

        Its reducer and our hook refer to each other and so keep the process group alive. A group that still exists when
        Python shuts down aborts the process.
        """
        self.forward = self.net

    def state_dict(self) -> dict:
        """Return plain data, the same with and without sharding. Collective; rank 0 gathers sharded tensors."""
        if self._shards is None:
            return dict(net=self.net.state_dict(), ema=self.ema.state_dict(), optimizer=self.optimizer.state_dict())
        return dict(
            net=self._shards.gather(self.net),
            ema=self._shards.gather(self.ema),
            optimizer=self._shards.gather_optimizer(self.optimizer.state_dict()),
        )

    def load_state_dict(self, state: dict) -> None:
        self._load(self.net, state["net"])
        self._load(self.ema, state["ema"])
        optimizer = state["optimizer"]
        self.optimizer.load_state_dict(optimizer if self._shards is None else self._shards.slice_optimizer(optimizer))
        # The moments come in the memory layout of the run that saved them. Fused kernels need that of the weights.
        for p, values in self.optimizer.state.items():
            for name, value in values.items():
                if torch.is_tensor(value) and value.shape == p.shape and value.stride() != p.stride():
                    values[name] = torch.empty_like(p).copy_(value)

    def _load(self, module: torch.nn.Module, state: dict, strict: bool = True) -> None:
        if self._shards is None:
            module.load_state_dict(state, strict=strict)
        else:
            self._shards.load(module, state, strict)
