"""RDUOT: a denoising diffusion GAN trained by unbalanced optimal transport, and its baseline DDGAN.

    potential   min_D  Psi2*(-D(x_t, x_{t+1})) + Psi1*(D(x'_t, x_{t+1}) - tau c(x'_0, x_{t+1})) + R1
    generator   min_G  tau c(x'_0, x_{t+1}) - D(x'_t, x_{t+1}),      x'_0 = G(x_{t+1}, t, z)

x_t, x_{t+1}: a training image after t and t + 1 steps of noise; x'_t: a sample of q(x_t | x'_0, x_{t+1}); c: the cost
of transport; Psi*: the conjugates of what unbalanced transport pays for leaving images out (docs/methods/rduot.md).
A cost of x_0 alone can act before training: images are left out at random so that each one stays with a probability in
proportion to w(c(x_0)) (`training.left_out`), none of a set that looks clean. What stays is trained on as DDGAN does.

Dao et al., ECCV 2024. The GAN of a few steps: Xiao et al., ICLR 2022; the objective: Choi et al., NeurIPS 2023.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import logsigmoid, softplus

import dnnlib
from archives.dataset import ImageDataset, to_float
from torch_utils import distributed
from torch_utils.training_stats import Stats
from training.config import RunConfig
from training.connected_core import FEW
from training.left_out import Selection, describe_costs, is_clean
from training.networks_ddgan import GROUP, DDGANGenerator, Potential
from training.noise_levels import DiffusionSteps
from training.objective import Objective, Phase
from training.objectives.dsm import without
from training.objectives.posterior_labels import PosteriorLabels
from training.outlier_rule import common_items
from training.trained_network import TrainedNetwork, cosine_decay, linear_rampup
from training.transport_cost import TransportCost, spread, squared_distance

__all__ = ["CONJUGATES", "DDGAN", "GROUP", "RDUOT", "TransportLosses", "ema_halflife", "gradient_penalty"]

LOOK_AT, SHEET = 2048, 64  # training images that the log looks at, at most; images of the picture
MOST, LISTED = 0.5, 10  # a class loses most of its images; this many of such classes are named
FINAL_LR = 1e-5  # the learning rates decay to this
EMA_RAMPUP = 0.25  # longest half-life of the EMA as a share of the images seen: a GAN's weights circle


def chi_conjugate(x: torch.Tensor) -> torch.Tensor:
    """Return y^2/4 + y with y = max(x + 2, 0) - 2."""
    y = (x + 2).clamp(min=0) - 2
    return y.square() / 4 + y


# Psi*: the convex conjugates of what unbalanced transport pays (Choi et al. 2023, section 3).
CONJUGATES = {"linear": lambda x: x, "kl": torch.exp, "chi": chi_conjugate, "softplus": softplus}


def slope(psi: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the derivative of a conjugate."""

    @torch.enable_grad()
    def derivative(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(psi(x).sum(), x)[0]

    return derivative


def gradient_penalty(output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return ||grad_x D||^2 [N] of outputs [N] at x [N,...], differentiable (R1: Mescheder et al., ICML 2018)."""
    (gradient,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    return gradient.square().flatten(1).sum(dim=1)


@dataclass
class TransportLosses:
    """The two losses of a step, for any networks D(x_t, t, x_{t+1}) -> [N] and G(x_{t+1}, t, z) -> x_0.

    The random numbers come from `draw`.
    """

    steps: DiffusionSteps
    cost: Callable[..., torch.Tensor]  # c(x_0, x_{t+1}, t) -> [N]
    tau: float  # weight of the cost
    phi1: str  # conjugate on generated pairs
    phi2: str  # conjugate on real pairs
    r1_gamma: float  # weight of R1
    log_sigmoid: bool = False  # the generator maximizes ln sigmoid(D) instead of D, as in DDGAN

    def draw(self, x_0: torch.Tensor, nz: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Draw the random numbers of one loss on images shaped like x_0, one row per image."""
        n, where = len(x_0), dict(generator=generator, device=x_0.device)
        draws = {name: torch.randn(x_0.shape, **where) for name in ("noise", "step_noise", "posterior_noise")}
        return draws | dict(t=torch.randint(self.steps.num_timesteps, [n], **where), z=torch.randn([n, nz], **where))

    def _fake(self, generator: Callable, x_next: torch.Tensor, draws: dict) -> tuple[torch.Tensor, torch.Tensor]:
        x_0 = generator(x_next, draws["t"], draws["z"])
        return x_0, self.steps.posterior(x_0, x_next, draws["t"], draws["posterior_noise"])

    def potential(
        self, potential: Callable, generator: Callable, x_0: torch.Tensor, draws: dict, penalize: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the potential's loss [N] and values worth logging, by name.

        Psi2*(-D(real)) + Psi1*(D(fake) - tau c), and with `penalize` r1_gamma/2 ||grad D||^2 on the real pairs.
        """
        t = draws["t"]
        x_t, x_next = self.steps.pair(x_0, t, draws["noise"], draws["step_noise"])
        x_t.requires_grad_(penalize)
        real = potential(x_t, t, x_next)
        with torch.no_grad():
            fake_0, fake_t = self._fake(generator, x_next, draws)
            tau_cost = self.tau * self.cost(fake_0, x_next, t)
        fake = potential(fake_t, t, x_next)
        loss = CONJUGATES[self.phi2](-real) + CONJUGATES[self.phi1](fake - tau_cost)
        report = {"real": real, "fake": fake, "size": fake.abs()} | ({"tau_cost": tau_cost} if self.tau else {})
        if penalize:
            report["r1"] = gradient_penalty(real, x_t)
            loss = loss + 0.5 * self.r1_gamma * report["r1"]
        return loss, report

    def generator(self, potential: Callable, generator: Callable, x_0: torch.Tensor, draws: dict) -> torch.Tensor:
        """Compute the generator's loss tau c - D(fake) [N]; with `log_sigmoid` tau c - ln sigmoid(D(fake))."""
        t = draws["t"]
        _, x_next = self.steps.pair(x_0, t, draws["noise"], draws["step_noise"])
        fake_0, fake_t = self._fake(generator, x_next, draws)
        score = potential(fake_t, t, x_next)
        return self.tau * self.cost(fake_0, x_next, t) - (logsigmoid(score) if self.log_sigmoid else score)


class RDUOT(Objective):
    """The generator 'net' and the 'potential', trained in turn."""

    method = "rduot"
    log_sigmoid = False  # see TransportLosses

    def __init__(
        self,
        config: RunConfig,
        dataset: ImageDataset,
        device: torch.device,
        *,
        posterior_labels: PosteriorLabels | None = None,
        draw_sheet: Callable[[np.ndarray, str], None] | None = None,
    ):
        """Take labels that replace those of the data set (None: its own).

        `draw_sheet(images uint8 [n,H,W,C], path)` writes a picture of images.
        """
        super().__init__(config, dataset, device)
        self.posterior_labels, self.draw_sheet = posterior_labels, draw_sheet
        c = config.rduot
        selects = c.cost == "robust" and c.distance != "pixels" and c.tau > 0
        if selects and len(dataset) < 2:
            raise dnnlib.UserError(f"{dataset.name}: the robust cost compares images, and there is only one")
        self.steps = DiffusionSteps(c.num_timesteps, c.beta_min, c.beta_max, device, bool(c.geometric))
        self.cost = TransportCost(c.cost, dataset, self.steps, device, by_pixels=c.distance == "pixels")
        self.cost_statistics: dict[str, float] = {}  # about the costs of the training images, not logged yet
        self.selection = None
        if c.tau > 0:
            # By item; where nothing is selected, of the images that the log describes.
            self.costs = self.costs_of(torch.arange(len(dataset)) if selects else self.cost.sample)
            sample = self.costs[self.cost.sample.numpy()] if selects else self.costs
            self.selection = Selection(sample, c.tau, *(slope(CONJUGATES[phi]) for phi in (c.phi1, c.phi2)))
        self.looks_clean = False
        self._choose_items(self._select(sample) if selects else None)
        in_losses = (squared_distance, 0.0) if selects else (self.cost, c.tau)
        log_sigmoid = self.log_sigmoid or bool(selects and c.balanced)
        self.losses = TransportLosses(self.steps, *in_losses, c.phi1, c.phi2, c.r1_gamma, log_sigmoid)

    def _weights(self, costs: np.ndarray) -> np.ndarray:
        """Return w of images of these costs, [n]."""
        return self.selection(torch.from_numpy(costs)).numpy()

    def _select(self, sample: np.ndarray) -> np.ndarray:
        """Return which images stay, bool [N], given the costs of the cost's sample: all, where the set looks clean."""
        self.looks_clean = is_clean(self._weights(sample), self.cost.before_limit(sample))
        if self.config.rduot.balanced and self.looks_clean:
            return np.ones(len(self.costs), dtype=bool)
        return self.selection.draw(self.costs, self.config.seed)

    def _choose_items(self, selected: np.ndarray | None) -> None:
        """Train on the images that the cost has selected (bool [N]; None: on all), where the posterior keeps them."""
        self.selected = selected
        items = None if selected is None or selected.all() else torch.from_numpy(np.flatnonzero(selected))
        others = None if self.posterior_labels is None else self.posterior_labels.train_indices
        self.train_indices = common_items(items, others)

    def costs_of(self, items: torch.Tensor) -> np.ndarray:
        """Return the costs of training images, float64 [n]; each process looks at its share. Collective."""
        part = distributed.share(len(items))
        found = distributed.together(lambda: self.cost.of_training(items[part.start : part.stop]))
        return np.concatenate(distributed.all_gather_object(found))

    def state_dict(self) -> dict[str, Any]:
        """Return what a training state holds, with the images that the cost has selected.

        Another version or another machine might select others, and a continued run would not be the same run.
        """
        kept = {} if self.selected is None else dict(selected=torch.from_numpy(np.packbits(self.selected)))
        return super().state_dict() | kept

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        super().load_state_dict(state)
        if self.selected is not None and "selected" in state:
            bits = np.unpackbits(state["selected"].numpy(), count=len(self.selected))
            self._choose_items(bits.astype(bool))

    def build(self) -> dict[str, TrainedNetwork]:
        """Create generator and potential."""
        shared = dict(
            img_resolution=self.dataset.resolution,
            img_channels=self.dataset.num_channels,
            label_dim=self.dataset.label_dim,
        )
        network, optimizer = self.config.network, self.config.optimizer
        nets = dict(
            net=DDGANGenerator(**shared, **self.steps.settings(), **network.kwargs),
            potential=Potential(**shared, **network.potential_kwargs),
        )
        # Nothing reads an average of the potential. R1 needs second derivatives, which do not compile and do not find
        # weights that a sharded network freed after the first derivatives.
        own = dict(net=dict(ema_rampup=EMA_RAMPUP), potential=dict(ema_halflife=0, compile=False, shard=False))
        schedule = self.config.rduot.schedule_nimg
        schedule = self.config.total_nimg if schedule is None else schedule
        return {
            name: self.trained_network(
                net,
                lr=optimizer.lr[name],
                betas=tuple(optimizer.betas),
                lr_factor=cosine_decay(schedule, FINAL_LR / optimizer.lr[name]) if schedule else linear_rampup(0),
                **own[name],
            )
            for name, net in nets.items()
        }

    def phases(self, nimg: int) -> list[Phase]:
        """Train the potential, then the generator. The images seen decide in which steps R1 applies."""
        step = nimg // self.config.batch_size
        penalize = self.losses.r1_gamma > 0 and step % self.config.rduot.lazy_reg == 0
        return [
            ("potential", functools.partial(self.potential_loss, penalize), ["potential"]),
            ("loss", self.loss, ["net"]),
        ]

    def draw(self, images: torch.Tensor, generator: torch.Generator) -> dict:
        """Draw the random numbers of both losses, and of the labels where they are drawn."""
        x_0 = torch.empty(images.shape, device=self.device)
        nz = self.config.network.kwargs["nz"]
        draws = {name: self.losses.draw(x_0, nz, generator) for name in ("potential", "generator")}
        if self.posterior_labels is not None:
            draws["label"] = torch.rand(len(images), generator=generator, device=self.device)
        return draws

    def step(self, images: torch.Tensor, labels: torch.Tensor, nimg: int, stats: Stats, *args: Any) -> None:
        """Take one step (see Objective). The first one logs what the training images cost."""
        for name, value in self.cost_statistics.items():
            stats.add(f"Cost/{name}", value)
        self.cost_statistics = {}
        super().step(images, labels, nimg, stats, *args)

    def choose_labels(self, labels: torch.Tensor, draws: dict, stats: Stats) -> torch.Tensor:
        """Return the labels of a step [n,C], the same in both losses; zeros where a posterior leaves no label.

        By the rule "sample", a pair of a training image and its label is distributed as clean data, at every step of
        the diffusion and so for the real pairs of the potential (docs/methods/posterior.md).
        """
        if self.posterior_labels is None:
            return labels
        return without(*self.posterior_labels.onehot(draws, labels.shape[1], stats))

    def _with_labels(self, labels: torch.Tensor, training: str) -> tuple[Callable, Callable]:
        # D and G with their labels filled in; the one in training is called through its DDP wrapper.
        nets = (t.forward if name == training else t.net for name, t in self.trained.items())
        generator, potential = (functools.partial(_call, net, labels=labels) for net in nets)
        return potential, generator

    def potential_loss(
        self, penalize: bool, images: torch.Tensor, labels: torch.Tensor, draws: dict, stats: Stats
    ) -> torch.Tensor:
        """Compute the loss [n] of the potential."""
        x_0, _ = self.prepare(images, draws)
        nets = self._with_labels(self.choose_labels(labels, draws, stats), "potential")
        loss, report = self.losses.potential(*nets, x_0, draws["potential"], penalize)
        for name, value in report.items():
            stats.add(f"Potential/{name}", value)
        return loss

    def loss(self, images: torch.Tensor, labels: torch.Tensor, draws: dict, stats: Stats) -> torch.Tensor:
        """Compute the loss [n] of the generator."""
        x_0, _ = self.prepare(images, draws)
        labels = self.choose_labels(labels, draws, stats)
        return self.losses.generator(*self._with_labels(labels, "net"), x_0, draws["generator"])

    def notes(self) -> list[str]:
        """Say what the training images cost, what is expected to be left out, and what becomes of the labels.

        When the archive records its outliers: also what these cost.
        """
        lines = [] if self.posterior_labels is None else self.posterior_labels.notes()
        cost = self.cost
        if self.selection is not None:
            costs = self.costs if self.selected is None else self.costs[cost.sample.numpy()]
            found, self.cost_statistics = describe_costs(costs, self._weights(costs), cost.before_limit(costs))
            name = cost.kind if cost.distance is None else f"{cost.kind}: ln d^2; what is below 0 costs nothing"
            lines += [f"Transport cost ({name}) of {len(costs):,} training images:", *found]
        if self.selected is not None:
            lines.append(f"The cost leaves out {self._shares(~self.selected, torch.arange(len(self.dataset)))}.")
            if self.selected.all():
                clean = "The set looks clean: few images are expensive, no group is apart."
                why = clean if self.looks_clean else "No image is so expensive at this tau that it had to go."
                lines.append(f"{why} So all images stay.")
            lines += self._warnings()
        known = self.dataset.outliers
        if known is None or known.all() or not known.any():
            return lines
        if self.selected is not None:
            clean, outliers = self.costs[~known].mean(), self.costs[known].mean()
        else:
            items = (spread(torch.from_numpy(mask).nonzero().flatten(), LOOK_AT) for mask in (~known, known))
            clean, outliers = (cost.of_training(some).mean() for some in items)
        lines.append(f"Transport cost ({cost.kind}), mean: {clean:.4g} for clean images, {outliers:.4g} for outliers")
        if outliers <= clean and self.selection is not None:
            lines.append(
                "Warning: the outliers cost less than the clean images, so unbalanced transport prefers them; "
                "try another cost"
            )
        return lines

    def _warnings(self) -> list[str]:
        """Say what a selection cannot know, or of which classes it leaves little."""
        if len(self.dataset) < FEW:
            return [f"Warning: of fewer than {FEW} images none can be told from the others, so all stay"]
        labels, names = self.dataset.labels, self.dataset.class_names
        if labels is None and not self.selected.all():
            labels, names = _labels_of_archive(self.dataset)
        if labels is None:
            return []
        number = np.bincount(labels)
        out = np.bincount(labels, ~self.selected, minlength=len(number)) / np.maximum(number, 1)
        few = [f"{names[k] if names else k} ({out[k]:.0%})" for k in np.flatnonzero(out > MOST)]
        if not few:
            return []
        others = f" and {len(few) - LISTED} others" if len(few) > LISTED else ""
        return [
            f"Warning: most images of these classes are left out: {', '.join(few[:LISTED])}{others}. "
            "Are they foreign? expensive.png will show the most expensive ones"
        ]

    @torch.no_grad()
    def finish(self, run_dir: str) -> list[str]:
        """Draw the 64 most expensive training images: `expensive.png`. Say which ones the potential prices out.

        It prices an image out if Psi2*'(-D) is less than half of the median: hardly any image like it is made. Where
        the cost has selected, the log has said before training which images are left out.
        """
        if self.selected is not None:
            items, price, lines = torch.arange(len(self.dataset)), self.costs, []
        else:
            items = spread(torch.arange(len(self.dataset)), LOOK_AT)
            # In random order, as in training: the potential sees how much the images of a group differ.
            items = items[torch.randperm(len(items), generator=torch.Generator().manual_seed(0))]
            price = self.prices(items)
            weight = slope(CONJUGATES[self.losses.phi2])(-torch.from_numpy(price)).numpy()
            lines = [f"The potential prices out {self._shares(weight < np.median(weight) / 2, items)}."]
        if self.draw_sheet is None:
            return lines
        shown = items[torch.from_numpy(np.argsort(-price)[:SHEET].copy())]
        path = os.path.join(run_dir, "expensive.png")
        self.draw_sheet(self.dataset.images(shown).permute(0, 2, 3, 1).numpy(), path)
        return [*lines, f"The {len(shown)} most expensive of {len(items):,} training images: {path}"]

    def _shares(self, out: np.ndarray, items: torch.Tensor) -> str:
        """Return which share of training images is out (bool [n]), and of clean images and outliers, as text."""
        text = f"{out.mean():.1%} of {len(items):,} training images"
        if self.dataset.outliers is None:
            return text
        outlier = self.dataset.outliers[items.numpy()]
        shares = [
            f"{out[mask].mean():.1%} of the {name}"
            for name, mask in (("clean images", ~outlier), ("outliers", outlier))
            if mask.any()
        ]
        return f"{text}: {', '.join(shares)}"

    def prices(self, items: torch.Tensor) -> np.ndarray:
        """Return the potential of training images after no step of the diffusion, float64 [n]."""
        generator = torch.Generator(self.device).manual_seed(0)
        net, values = self.trained["potential"].net, []
        for part in items.split(LOOK_AT // 8):
            x_0 = to_float(self.dataset.images_on(self.device, part))
            t = torch.zeros(len(x_0), dtype=torch.int64, device=self.device)
            noise = [torch.randn(x_0.shape, generator=generator, device=self.device) for _ in range(2)]
            x_t, x_next = self.steps.pair(x_0, t, *noise)
            draws = dict(
                items=part.to(self.device), label=torch.rand(len(part), generator=generator, device=self.device)
            )
            labels = self.choose_labels(self.dataset.onehot(part).to(self.device), draws, Stats(self.device))
            values.append(net(x_t, t, x_next, labels).cpu().double())
        return torch.cat(values).numpy()

    def loss_settings(self) -> dict[str, Any]:
        """Return the method's own settings."""
        return asdict(self.config.rduot)


class DDGAN(RDUOT):
    """The baseline: no cost (tau 0), and a generator that maximizes ln sigmoid(D)."""

    method = "ddgan"
    log_sigmoid = True


def _call(net: torch.nn.Module, *args: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return net(*args, labels)


def _labels_of_archive(dataset: ImageDataset) -> tuple[np.ndarray | None, list[str] | None]:
    """Return labels [N] and class names of a data set that was opened without its labels; None where it has none."""
    try:
        labeled = ImageDataset(**dataset.kwargs() | dict(use_labels=True))
    except dnnlib.UserError:  # nobody trains on these labels
        return None, None
    return labeled.labels, labeled.class_names


def ema_halflife(decay: float, batch_size: int) -> int:
    """Return the half-life in images of a moving average that keeps `decay` of itself per step; 0 for a decay of 0."""
    return round(batch_size * math.log(0.5) / math.log(decay)) if 0 < decay < 1 else 0
