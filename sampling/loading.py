"""From snapshot files to networks that are ready to sample, and the guidance that a discriminator's snapshot allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import dnnlib
from archives.classes import check_class_numbers
from archives.label_noise import check_matrix
from sampling.ddgan import is_generator
from sampling.evaluations import Stopwatch
from sampling.guidance import AsPublished, Evidence, GatedGuidance, gated_discriminator
from sampling.rejection import LabelJudge, Rejection
from torch_utils import checkpoint, persistence
from torch_utils.distributed import print0
from torch_utils.precision import tf32, widest
from training import (  # noqa: F401  They register classes.
    networks,
    networks_conv,
    networks_ddgan,
    networks_published,
    networks_resnet,
)
from training.noise_levels import LOWEST_SIGMA
from training.published_ddgan import build_generator, is_checkpoint, load_checkpoint
from training.temperature import Temperature

__all__ = [
    "DEFAULT_WEIGHTS",
    "EVERYWHERE",
    "MODES",
    "PRECISIONS",
    "TrainedDiscriminator",
    "guide",
    "load_denoiser",
    "load_discriminator",
    "prepare",
    "warn_if_never_unlabeled",
]

DEFAULT_WEIGHTS = {"constant": (2.0, 0.0), "calibrated": (1.0, 1.0)}  # of a step's first and second evaluation
EVERYWHERE = (0.0, math.inf)  # the noise levels at which a discriminator corrects
TINY = 1e-6  # smallest share of wrong or right labels that a detector's classifier is taken to have stated
MODES = (*DEFAULT_WEIGHTS, "rejection")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
LOWER = {"bf16": torch.bfloat16, "fp16": torch.float16}
FORM = ("img_channels", "img_resolution", "label_dim")  # what every network here states
PARTS = ("model", *FORM, "sigma_min", "sigma_max", "round_sigma")  # of a denoiser
BRANCH = ("conv0", "conv1", "qkv", "proj")  # the layers of the residual branches: nearly all of a U-Net's arithmetic


def load_denoiser(
    path: str,
    device: torch.device,
    *,
    precision: str | None = None,
    compile: bool = False,
    trust_pickle: bool = False,
    kinds: Sequence[str] = ("denoiser",),
    published: Mapping[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
) -> tuple[torch.nn.Module, list[str] | None]:
    """Return the network of a snapshot, ready to sample on `device`, and its class names or None.

    path          a snapshot, the run directory of one, or a URL; or a published generator, X.pth
    precision     and `compile` as in `prepare`
    trust_pickle  run code that the snapshot contains
    kinds         what the snapshot may hold: 'denoiser', 'generator'
    published     settings that a published generator does not record (training.published_ddgan.SETTINGS)
    class_names   those of another network that it will work with

    UserError: the file is missing, damaged or of another kind, its images are neither gray nor RGB, or it numbers the
    classes differently.
    """
    snapshot = _load(path, trust_pickle, kinds, published)
    if not is_generator(snapshot["ema"]):
        _check_parts(path, snapshot["ema"], PARTS)
    net = prepare(snapshot["ema"].to(device), precision, compile)
    if net.img_channels not in (1, 3):
        raise dnnlib.UserError(f"{path}: makes images of {net.img_channels} channels; PNGs have 1 or 3")
    info = snapshot.get("info") or {}
    check_class_numbers(info.get("class_names"), path, class_names, "the network")
    mode = info  # a stranger's snapshot may hold anything there
    for key in ("options", "posterior", "mode"):
        mode = mode.get(key) if isinstance(mode, dict) else None
    net.unlabeled = getattr(net.model, "label_dropout", 0) > 0 or mode == "null"
    return net, info.get("class_names")


def _check_parts(path: str, net: torch.nn.Module, parts: Sequence[str]) -> None:
    """Raise UserError for a network of another family, which only `trust_pickle` can build."""
    if lacking := [name for name in parts if not hasattr(net, name)]:
        raise dnnlib.UserError(
            f"{path}: {type(net).__name__} lacks {', '.join(lacking)}; networks of other families than EDM's cannot be "
            "used here"
        )


def warn_if_never_unlabeled(net: Callable[..., torch.Tensor]) -> None:
    """Print a warning when a network of `load_denoiser` has learned no image without its label."""
    if not getattr(net, "unlabeled", True):
        print0(
            "Warning: this network has learned no image without its label (its label dropout was 0), so the denoiser "
            "without a label, which classifier-free guidance steers away from, is a guess"
        )


def _load(path: str, trust_pickle: bool, kinds: Sequence[str], published: Mapping[str, Any] | None = None) -> dict:
    path = persistence.find_snapshot(path)
    given = {name: value for name, value in (published or {}).items() if value is not None}
    if is_checkpoint(path):
        if "generator" not in kinds:
            raise dnnlib.UserError(f"{path}: holds a generator of RDUOT or DDGAN, not a {' or '.join(kinds)}")
        return dict(ema=build_generator(load_checkpoint(path), **given))
    if given:
        raise dnnlib.UserError(f"{path}: records its {', '.join(given)}; only a published X.pth needs them stated")
    snapshot = persistence.load_snapshot(path, trust_pickle=trust_pickle, kind=kinds)
    checkpoint.warn_if_older(path, snapshot["ema"])
    return snapshot


def prepare(net: torch.nn.Module, precision: str | None = None, compile: bool = False) -> torch.nn.Module:
    """Make a denoiser or generator on its device ready to sample, in place, and return it.

    precision  None leaves it to the snapshot: float16 on CUDA if the network was trained so, else float32. `tf32` lets
               CUDA multiply with ten-bit fractions. `bf16` and `fp16` are for the convolutions and the attention of the
               residual branches. The sums that the branches add to, the norms and the embeddings stay float32: rounding
               the sums is what moves pixels by more than one gray level
    compile    compile the U-Net, for one input shape; on CPUs its weights become constants
    """
    device = next(net.parameters()).device
    if precision is not None:
        net.use_fp16 = False  # the snapshot's own choice
    # Ten-bit products stay off unless they are asked for: with them an image would depend on its batch.
    _scope_tf32(net, precision not in (None, "fp32"))
    if precision in LOWER:
        # Without this, attention by plain operations returns to float32. Its softmax adds up in float32 either way.
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
        for name, layer in net.model.named_modules():
            if name.rpartition(".")[2] in BRANCH:
                _lower(layer, LOWER[precision], stays=name.endswith("qkv"))
    if device.type == "cpu" or precision in LOWER:
        net.to(memory_format=torch.channels_last)  # not float32 on CUDA, whose kernels want the other order
    if compile:
        net.model.compile(dynamic=False, options={"freezing": device.type == "cpu"})
    return net


def _scope_tf32(net: torch.nn.Module, allowed: bool) -> None:
    # The setting is the process's, but what guides the network has a precision of its own.
    entered = []

    def enter(*_) -> None:
        entered.append(tf32(allowed))
        entered[-1].__enter__()

    def leave(*_) -> None:  # What a hook returns would replace the output.
        entered.pop().__exit__(None, None, None)

    net.register_forward_pre_hook(enter)
    net.register_forward_hook(leave, prepend=True, always_call=True)


def _lower(layer: torch.nn.Module, dtype: torch.dtype, stays: bool) -> None:
    layer.to(dtype)  # The parameters too; otherwise every call would round them again.
    layer.register_forward_pre_hook(lambda _, args: (args[0].to(dtype), *args[1:]))
    if not stays:
        layer.register_forward_hook(lambda _, args, output: output.float())


@dataclass(frozen=True)
class TrainedDiscriminator:
    """A discriminator on its device, and what its snapshot says of the pairs it was trained on.

    A detector's classifier serves as one for images without noise, so for rejection only (`LabelJudge`).
    """

    path: str
    net: Callable[..., torch.Tensor]
    noise_rates: list[float] | None  # [C]: share of wrong labels among those observed, per class
    right_shares: list[float] | None  # [C]: share of right pairs among those it was trained on, per class
    temperature: Temperature | None = None  # of its evidence, fitted to held-out pairs; None: was not calibrated
    held_out: int = 0  # images that these pairs are made of
    label_path: str | None = None  # label file that it was trained with
    sigma: float = 0.05  # noise level that hides little, and at which it was trained
    noisy_images: bool = True  # whether it knows images at all noise levels


def load_discriminator(
    path: str, device: torch.device, *, class_names: Sequence[str] | None = None, trust_pickle: bool = False
) -> TrainedDiscriminator:
    """Return the discriminator of a snapshot, or a detector's classifier as one.

    `class_names`: those of the network whose images it will judge. UserError: the file is missing, damaged or of
    another kind, or numbers these classes differently.
    """
    snapshot = _load(path, trust_pickle, ("discriminator", "classifier"))
    info = snapshot.get("info") or {}
    check_class_numbers(info.get("class_names"), path, class_names, "the network")
    if getattr(snapshot["ema"], "network_kind", None) == "classifier":
        return _as_discriminator(path, snapshot["ema"].to(device), info, device)
    _check_parts(path, snapshot["ema"], FORM)
    options = info.get("options") or {}
    levels = options.get("noise_levels") or {}
    sigma = TrainedDiscriminator.sigma
    if levels.get("P_mean") is not None and levels.get("P_std") is not None:
        sigma = math.exp(levels["P_mean"] - 3 * levels["P_std"])  # ln sigma is normally distributed in training
    return TrainedDiscriminator(
        path,
        snapshot["ema"].to(device),
        info.get("noise_rates"),
        info.get("right_shares"),
        Temperature.read(info.get("temperature"), path),
        int(info.get("held_out") or 0),
        (options.get("discriminator") or {}).get("label_path"),
        sigma,
    )


def _as_discriminator(
    path: str, net: torch.nn.Module, info: Mapping[str, Any], device: torch.device
) -> TrainedDiscriminator:
    rates, T, temperature = (info.get(name) for name in ("noise_rates", "transition", "temperature"))
    if info.get("method") != "detector" or rates is None or T is None or temperature is None:
        raise dnnlib.UserError(
            f"{path}: is a classifier that cannot judge labels; detect_noise.py makes one that can since version 0.2, "
            "and train_discriminator.py makes discriminators"
        )
    T = torch.from_numpy(check_matrix(T, net.label_dim, f"{path}: its transition matrix"))
    if len(rates) != net.label_dim:
        raise dnnlib.UserError(f"{path}: records {len(rates)} noise rates for {net.label_dim} classes")
    temp = float(Temperature.read(temperature, path)(torch.tensor(LOWEST_SIGMA)))
    # Its logit holds the odds that the label is right, so the share of right pairs is that of right labels. They cancel
    # out unless a rate is stated, and must not be infinite for it.
    rates = [min(max(float(rate), TINY), 1 - TINY) for rate in rates]
    facts = dict(noise_rates=rates, right_shares=[1 - rate for rate in rates], sigma=LOWEST_SIGMA, noisy_images=False)
    return TrainedDiscriminator(path, LabelJudge(net, T.to(device, widest(device)), temp), **facts)


def guide(
    net: Callable[..., torch.Tensor],
    discriminator: TrainedDiscriminator,
    device: torch.device,
    *,
    mode: str | None = None,
    weights: Sequence[float | None] = (None, None),
    gate: Sequence[float] = EVERYWHERE,
    noise_rate: float | None = None,
    published: bool = False,
    stopwatch: Stopwatch | None = None,
) -> GatedGuidance | Rejection:
    """Return the denoiser `net` corrected by a discriminator (docs/methods/sbdc.md), and print how.

    mode        'constant', 'calibrated' or 'rejection'; None: constant if the discriminator is not calibrated, else
                calibrated if there are weights or a gate, else rejection, as for a detector's classifier
    weights     of a step's first and second evaluation; None: DEFAULT_WEIGHTS of the mode. Not for rejection
    gate        lowest and highest noise level that is corrected. Not for rejection
    noise_rate  share of wrong labels in every class, not for the mode 'constant'; None: those of the snapshot
    published   ask the discriminator as SBDC's published sampling does (`AsPublished`), with a constant weight

    UserError: the networks do not fit each other, the mode is not 'constant' and the snapshot does not say enough,
    there is a noise rate, but the discriminator is not calibrated and no mode was asked for, or a detector's classifier
    is asked for guidance.
    """
    fitted = discriminator.temperature is not None
    shaped = any(w is not None for w in weights) or tuple(gate) != EVERYWHERE
    if not discriminator.noisy_images:
        if mode not in (None, "rejection") or published or shaped:
            raise dnnlib.UserError(
                f"{discriminator.path}: is a detector's classifier, which has seen images without noise only, so it "
                "can reject images but not guide; train_discriminator.py makes what guides"
            )
        mode = "rejection"
    if mode is None and not published and not fitted and noise_rate is not None:
        raise dnnlib.UserError(
            f"{discriminator.path}: is not calibrated, so the weights are constant and the noise rate {noise_rate:g} "
            "would change nothing; leave it out, or ask for calibrated weights"
        )
    why = f"fitted to {discriminator.held_out:,} held-out images" if fitted else "not fitted to held-out images"
    if mode == "constant" or published:
        mode, why = "constant", "asked as in SBDC's published sampling" if published else "as asked"
    if mode is None:
        mode = "constant" if not fitted else "calibrated" if shaped else "rejection"
    evidence = None if mode == "constant" else _evidence(discriminator, noise_rate, device)
    if mode == "rejection":
        who = f"the discriminator takes them for right, {why}"
        who = who if discriminator.noisy_images else "the detector's classifier takes them for right"
        print0(f"Rejection: images are drawn until {who}")
        judged = dict(evidence=evidence, sigma=discriminator.sigma, stopwatch=stopwatch)
        return Rejection(net, discriminator.net, **judged)
    weights = [default if w is None else w for w, default in zip(weights, DEFAULT_WEIGHTS[mode], strict=True)]
    asked = AsPublished(discriminator.net) if published else discriminator.net
    guided = gated_discriminator(net, asked, weights=weights, gate=gate, evidence=evidence, stopwatch=stopwatch)
    print0(
        f"Guidance: {mode} ({why}), weights {weights[0]:g} and {weights[1]:g}, "
        f"where {gate[0]:g} <= sigma <= {gate[1]:g}"
    )
    return guided


def _evidence(discriminator: TrainedDiscriminator, noise_rate: float | None, device: torch.device) -> Evidence:
    if discriminator.noise_rates is None or discriminator.right_shares is None:
        raise dnnlib.UserError(
            f"{discriminator.path}: does not say what it was trained on, as a probability needs; "
            "generate.py --dg_mode=constant works without"
        )
    rates, shares = (
        torch.tensor(x, dtype=torch.float32, device=device)
        for x in (discriminator.noise_rates, discriminator.right_shares)
    )
    rates = rates if noise_rate is None else torch.full_like(rates, noise_rate)
    return Evidence(rates, shares, discriminator.temperature)
