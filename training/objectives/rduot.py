"""RDUOT: a denoising diffusion GAN by unbalanced optimal transport, and its DDGAN baseline (rduot.md).

Dao et al., ECCV 2024; the GAN of few steps is Xiao et al., ICLR 2022, the objective Choi et al., NeurIPS 2023.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid, softplus

from archives.dataset import ImageDataset
from torch_utils.training_stats import Stats
from training.networks_ddgan import GROUP, DDGANGenerator, Potential
from training.noise_levels import DiffusionSteps
from training.objective import Objective, Phase
from training.trained_network import TrainedNetwork, cosine_decay
from training.transport_cost import TransportCost, cost_by_origin

__all__ = ["CONJUGATES", "GROUP", "RDUOT", "TransportLosses", "ema_halflife", "gradient_penalty"]

FINAL_LR = 1e-5  # what the learning rates decay to
EMA_RAMPUP = 0.25  # of the images seen, at most: two networks at play circle, and want a longer average than one


def chi_conjugate(x: torch.Tensor) -> torch.Tensor:
    """y^2/4 + y with y = max(x + 2, 0) - 2."""
    y = (x + 2).clamp(min=0) - 2
    return y.square() / 4 + y


# Psi*, the convex conjugates of what unbalancing costs (Choi et al. 2023, section 3).
CONJUGATES = {"linear": lambda x: x, "kl": torch.exp, "chi": chi_conjugate, "softplus": softplus}


def gradient_penalty(output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """||grad_x D||^2 [N] of outputs [N] at x [N,...], differentiable (R1: Mescheder et al., ICML 2018)."""
    (gradient,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    return gradient.square().flatten(1).sum(dim=1)


@dataclass
class TransportLosses:
    """The two losses of a step, on any networks D(x_t, t, x_{t+1}) -> [N] and G(x_{t+1}, t, z) -> x_0.

    Random numbers come in `draws`. Both losses return [N] and what is worth logging, by name.
    """

    steps: DiffusionSteps
    cost: Callable[..., torch.Tensor]  # c(x_0, x_{t+1}, t) -> [N]
    tau: float  # weight of the cost
    phi1: str  # conjugate on generated pairs
    phi2: str  # conjugate on real pairs
    r1_gamma: float  # weight of R1
    log_sigmoid: bool = False  # the generator maximises ln sigmoid(D), as the baseline's does, in place of D

    def draw(self, x_0: torch.Tensor, nz: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """The random numbers of one loss on images shaped like x_0, a row an image."""
        n, where = len(x_0), dict(generator=generator, device=x_0.device)
        draws = {name: torch.randn(x_0.shape, **where) for name in ("noise", "step_noise", "posterior_noise")}
        return draws | dict(t=torch.randint(self.steps.num_timesteps, [n], **where), z=torch.randn([n, nz], **where))

    def _fake(self, generator: Callable, x_next: torch.Tensor, draws: dict) -> tuple[torch.Tensor, torch.Tensor]:
        x_0 = generator(x_next, draws["t"], draws["z"])
        return x_0, self.steps.posterior(x_0, x_next, draws["t"], draws["posterior_noise"])

    def potential(
        self, potential: Callable, generator: Callable, x_0: torch.Tensor, draws: dict, penalise: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Psi2*(-D(real)) + Psi1*(D(fake) - tau c), and with `penalise` r1_gamma/2 ||grad D||^2 on real pairs."""
        t = draws["t"]
        x_t, x_next = self.steps.pair(x_0, t, draws["noise"], draws["step_noise"])
        x_t.requires_grad_(penalise)
        real = potential(x_t, t, x_next)
        with torch.no_grad():
            fake_0, fake_t = self._fake(generator, x_next, draws)
            tau_cost = self.tau * self.cost(fake_0, x_next, t)
        fake = potential(fake_t, t, x_next)
        loss = CONJUGATES[self.phi2](-real) + CONJUGATES[self.phi1](fake - tau_cost)
        report = {"real": real, "fake": fake, "size": fake.abs(), "tau_cost": tau_cost}
        if penalise:
            report["r1"] = gradient_penalty(real, x_t)
            loss = loss + 0.5 * self.r1_gamma * report["r1"]
        return loss, report

    def generator(self, potential: Callable, generator: Callable, x_0: torch.Tensor, draws: dict) -> torch.Tensor:
        """tau c - D(fake) [N]; with `log_sigmoid` tau c - ln sigmoid(D(fake))."""
        t = draws["t"]
        _, x_next = self.steps.pair(x_0, t, draws["noise"], draws["step_noise"])
        fake_0, fake_t = self._fake(generator, x_next, draws)
        score = potential(fake_t, t, x_next)
        return self.tau * self.cost(fake_0, x_next, t) - (logsigmoid(score) if self.log_sigmoid else score)


class RDUOT(Objective):
    """Generator 'net' and 'potential' in turn. The method 'ddgan' is the same with tau 0 and a non-saturating loss."""

    network_options = "--num_channels_dae, --ch_mult"

    def __init__(self, config: dict, dataset: ImageDataset, device: torch.device):
        c = config["rduot"]
        self.method = config["method"]
        self.steps = DiffusionSteps(c["num_timesteps"], c["beta_min"], c["beta_max"], device=device)
        super().__init__(config, dataset, device)
        self.losses = TransportLosses(
            self.steps,
            TransportCost(c["cost"], dataset, self.steps, device),
            c["tau"],
            c["phi1"],
            c["phi2"],
            c["r1_gamma"],
            log_sigmoid=self.method == "ddgan",
        )

    def build(self) -> dict[str, TrainedNetwork]:
        shared = dict(
            img_resolution=self.dataset.resolution,
            img_channels=self.dataset.num_channels,
            label_dim=self.dataset.label_dim,
        )
        networks = self.config["network"]
        nets = dict(
            net=DDGANGenerator(**shared, **self.steps.settings(), **networks["kwargs"]),
            potential=Potential(**shared, **networks["potential_kwargs"]),
        )
        # Nobody reads the potential's average; second derivatives, which R1 needs, do not compile, nor do they find the
        # weights again that a sharded network frees after the first ones.
        own = dict(net=dict(ema_rampup=EMA_RAMPUP), potential=dict(ema_halflife=0, compile=False, shard=False))
        schedule = self.config["rduot"]["schedule_nimg"] or self.config["total_nimg"]
        trained = {}
        for name, net in nets.items():
            lr = self.config["optimizer"]["lr"][name]
            trained[name] = self.trained_network(
                net,
                lr=lr,
                betas=tuple(self.config["optimizer"]["betas"]),
                lr_factor=cosine_decay(schedule, FINAL_LR / lr),
                **own[name],
            )
        return trained

    def phases(self, nimg: int) -> list[Phase]:
        # The step's number follows from the images seen: a resumed run penalises in the same steps.
        step = nimg // self.config["batch_size"]
        penalise = self.losses.r1_gamma > 0 and step % self.config["rduot"]["lazy_reg"] == 0
        return [
            ("potential", functools.partial(self.potential_loss, penalise), ["potential"]),
            ("loss", self.loss, ["net"]),
        ]

    def draw(self, images: torch.Tensor, generator: torch.Generator) -> dict:
        x_0 = torch.empty(images.shape, device=self.device)
        nz = self.config["network"]["kwargs"]["nz"]
        return {name: self.losses.draw(x_0, nz, generator) for name in ("potential", "generator")}

    def _callables(self, labels: torch.Tensor, training: str) -> tuple[Callable, Callable]:
        """D and G with the labels filled in; the one in training is called through its DDP wrapper."""
        nets = (t.forward if name == training else t.net for name, t in self.trained.items())
        generator, potential = (functools.partial(_call, net, labels=labels) for net in nets)
        return potential, generator

    def potential_loss(
        self, penalise: bool, images: torch.Tensor, labels: torch.Tensor, draws: dict, stats: Stats
    ) -> torch.Tensor:
        """Loss [n] of the potential."""
        x_0, _ = self.prepare(images, draws)
        nets = self._callables(labels, "potential")
        loss, report = self.losses.potential(*nets, x_0, draws["potential"], penalise)
        for name, value in report.items():
            stats.add(f"Potential/{name}", value)
        return loss

    def loss(self, images: torch.Tensor, labels: torch.Tensor, draws: dict, stats: Stats) -> torch.Tensor:
        """Loss [n] of the generator."""
        x_0, _ = self.prepare(images, draws)
        return self.losses.generator(*self._callables(labels, "net"), x_0, draws["generator"])

    def notes(self) -> list[str]:
        costs = cost_by_origin(self.losses.cost, self.dataset, self.steps, self.device)
        if costs is None:
            return []
        clean, outliers = costs
        lines = [
            f"Transport cost ({self.losses.cost.kind}), mean: {clean:.4g} for clean images, {outliers:.4g} for outliers"
        ]
        if outliers <= clean and self.method == "rduot":
            lines.append(
                "Warning: the outliers are the cheaper ones, so unbalanced transport favours them over clean "
                "images; try another --cost"
            )
        return lines

    def loss_settings(self) -> dict:
        return self.config["rduot"]


def _call(net: torch.nn.Module, *args: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return net(*args, labels)


def ema_halflife(decay: float, batch_size: int) -> int:
    """Half-life in images of a moving average that keeps `decay` of itself every step; 0 for a decay of 0."""
    return round(batch_size * math.log(0.5) / math.log(decay)) if 0 < decay < 1 else 0
