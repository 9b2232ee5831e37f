"""Presets: what `--arch`, `--precond` and `--preset` stand for, the latter with the results measured or published."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from training.networks import EDMPrecond, VEPrecond, VPPrecond

__all__ = ["ARCHS", "PRESETS", "Preset", "network_kwargs", "precond_class", "presets_of"]

# --arch: U-Nets of EDM (docs/methods/edm.md, U-Nets) and two small ones.

_DDPMPP = dict(
    model_type="SongUNet",
    embedding_type="positional",
    encoder_type="standard",
    decoder_type="standard",
    channel_mult_noise=1,
    resample_filter=[1, 1],
    model_channels=128,
    channel_mult=[2, 2, 2],
)
_NCSNPP = dict(
    model_type="SongUNet",
    embedding_type="fourier",
    encoder_type="residual",
    decoder_type="standard",
    channel_mult_noise=2,
    resample_filter=[1, 3, 3, 1],
    model_channels=128,
    channel_mult=[2, 2, 2],
)
_ADM = dict(model_type="DhariwalUNet", model_channels=192, channel_mult=[1, 2, 3, 4])
_KWARGS = {
    "ddpmpp": _DDPMPP,
    "ncsnpp": _NCSNPP,
    "adm": _ADM,
    "ddpmpp_mnist": dict(_DDPMPP, model_channels=32, num_blocks=1),
    "ddpmpp_tiny": dict(_DDPMPP, model_channels=32, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[]),
}
_PRECONDS = {"vp": VPPrecond, "ve": VEPrecond, "edm": EDMPrecond}

ARCHS = tuple(_KWARGS)


def network_kwargs(arch: str, cbase: int | None = None, cres: Sequence[int] | None = None) -> dict[str, Any]:
    """Return the keyword arguments of a preconditioner that choose its U-Net, as plain data.

    `cbase` replaces the architecture's model_channels, `cres` its channel_mult. ValueError: unknown architecture.
    """
    if arch not in _KWARGS:
        raise ValueError(f"arch={arch!r}: must be one of {', '.join(ARCHS)}")
    kwargs = copy.deepcopy(_KWARGS[arch])
    if cbase is not None:
        kwargs["model_channels"] = cbase
    if cres is not None:
        kwargs["channel_mult"] = list(cres)
    return kwargs


def precond_class(precond: str) -> type[VPPrecond] | type[VEPrecond] | type[EDMPrecond]:
    """Return the preconditioner's class by its name on the command line. ValueError: unknown name."""
    if precond not in _PRECONDS:
        raise ValueError(f"precond={precond!r}: must be one of {', '.join(_PRECONDS)}")
    return _PRECONDS[precond]


# --preset: settings of a whole run.


@dataclass(frozen=True)
class Preset:
    """Settings of one script: everything but data, output folder and seed."""

    name: str  # --preset=NAME
    script: str  # the script that it belongs to
    result: str  # what it reaches, on which data
    options: dict[str, Any]  # parameter -> value, as click names and parses them


# 8x8 pixels: the class is decided at higher noise levels than at 32x32, hence P_mean.
_DIGITS = dict(cond=True, arch="ddpmpp_tiny", augment=0.0, P_mean=-0.4)
_DIGITS_UNET = _DIGITS | dict(batch=128, lr=3e-3, lr_rampup_kimg=2, ema=0.02, dropout=0.0, snap=10, dump=5)
_CIFAR10 = dict(cond=True, arch="ddpmpp")
# Xiao et al. 2022 and Dao et al. 2024. What the latter do not state is as in the former's scripts.
_RDUOT = dict(num_timesteps=4, num_channels_dae=128, ch_mult="1,2,2,2", num_res_blocks=2)
_RDUOT |= dict(ngf=64, t_emb_dim=256, nz=100, z_emb_dim=256, n_mlp=4, batch=256, lr_g=1.6e-4, lr_d=1.25e-4)
_RDUOT |= dict(beta1=0.5, beta2=0.9, r1_gamma=0.02, lazy_reg=15, ema_decay=0.9999)
_RDUOT |= dict(cost="pixels", phi1="softplus", phi2="softplus")
_RDUOT_256 = _RDUOT | dict(num_channels_dae=64, ch_mult="1,1,2,2,4,4", n_mlp=3, lr_d=1e-4, ema_decay=0.999)
_RDUOT_256 |= dict(tau=1e-7, r1_gamma=2.0, lazy_reg=10)

PRESETS = [
    Preset(
        "digits",
        "train.py",
        "1,797 digits, 40% symmetric noise, seeds 0-2: label accuracy 0.573, 0.567, 0.589; "
        "class-wise FD 5.95, 5.71, 5.48",
        _DIGITS_UNET | dict(duration=0.15, tick=7.5),
    ),
    Preset(
        "digits",
        "train_classifier.py",
        "for TDSM, with --noise_type=auto --label-path=labels.npz of detect_noise.py; results: train_noise.py --help",
        _DIGITS
        | dict(batch=256, lr=2e-3, lr_rampup_kimg=10, ema=0.01, dropout=0.5, snap=1, dump=5, duration=0.2, tick=10),
    ),
    Preset(
        "digits",
        "train_noise.py",
        "1,797 digits, 40% symmetric noise, seeds 0-2, classifier of a label file: label accuracy 0.953, 0.955, 0.954; "
        "class-wise FD 1.23, 1.21, 1.38",
        _DIGITS_UNET | dict(duration=0.28, tick=14),
    ),
    Preset(
        "digits",
        "detect_noise.py",
        "F1 of the wrong labels, symmetric noise, seeds 0-2: 0.986, 0.992, 0.993; asymmetric 0.963; "
        "instance-dependent 0.957",
        dict(method="cores", arch="ddpmpp_tiny", epochs=60),
    ),
    Preset(
        "digits",
        "train_discriminator.py",
        "with generate.py's default, rejection, seeds 0, 1, 2: label accuracy 0.954, 0.952, 0.953; "
        "class-wise FD 1.32, 1.33, 1.36",
        # The better the discriminator knows the training images, the sharper its gradient: no dropout, no shifts.
        _DIGITS
        | dict(P_mean=0.2, P_std=0.9, batch=256, lr=3e-3, lr_rampup_kimg=10, ema=0.02, dropout=0.0, shift=0.0)
        | dict(snap=10, dump=5, duration=0.4, tick=20),
    ),
    Preset(
        "photos",
        "train_rduot.py",
        "16,000 photo crops with 10% digits, seeds 0, 1: outliers 0.000, 0.000 (DDGAN 0.123, 0.127); "
        "FD to the clean images 0.33, 0.31 (DDGAN 2.51, 2.90)",
        # Two steps: x_1 is so noisy that the last step decides what an image shows, and there the potential sees it
        # without noise. With more steps, noise hides the beginnings of an outlier from the potential.
        dict(num_timesteps=2, num_channels_dae=16, ch_mult="1,2", num_res_blocks=1, ngf=16, n_mlp=2, z_emb_dim=64)
        | dict(batch=64, lr_g=5e-4, lr_d=5e-4, r1_gamma=0.2, lazy_reg=10, ema_decay=0.999, cost="robust")
        | dict(duration=0.24, tick=12, snap=10, dump=5),
    ),
    Preset(
        "cifar10",
        "train.py",
        "32x32 images, with EDM's settings; not measured here",
        _CIFAR10 | dict(duration=200, batch=512, lr=1e-3, lr_rampup_kimg=10000, ema=0.5, dropout=0.13, augment=0.12),
    ),
    Preset(
        "cifar10",
        "train_classifier.py",
        "32x32 images, after the settings of the TDSM paper; not measured here",
        _CIFAR10 | dict(duration=10, batch=1024, lr=1e-3, lr_rampup_kimg=10000, ema=0.05, dropout=0.3, augment=0.12),
    ),
    Preset(
        "cifar10",
        "train_noise.py",
        "32x32 images, after the settings of the TDSM paper; not measured here",
        _CIFAR10
        | dict(duration=200, batch=512, lr=1e-3, lr_rampup_kimg=10000, ema=0.5, dropout=0.13, augment=0.12)
        | dict(others="all", tau=0.01, temp=1.0),
    ),
    Preset(
        "cifar10",
        "train_discriminator.py",
        "32x32 images, after the settings of the SBDC paper; not measured here",
        _CIFAR10
        | dict(duration=10, batch=1024, lr=1e-3, lr_rampup_kimg=10000, ema=0.05, dropout=0.1, augment=0.12, simix=True),
    ),
    Preset(
        "cifar10",
        "train_rduot.py",
        "CIFAR-10 with 3% or 5% MNIST, the settings of the RDUOT paper; not measured here",
        _RDUOT | dict(tau=1e-3, duration=90),
    ),
    Preset(
        "celeba64",
        "train_rduot.py",
        "CelebA at 64x64 with 5% Fashion-MNIST or LSUN, tau of the RDUOT paper, the rest as cifar10; not measured here",
        _RDUOT | dict(tau=3e-4, duration=90),
    ),
    Preset(
        "stl10",
        "train_rduot.py",
        "STL-10 (unlabeled) at 64x64, as celeba64, since its tau is not known to us; not measured here",
        _RDUOT | dict(tau=3e-4, duration=90),
    ),
    Preset(
        "celebahq256",
        "train_rduot.py",
        "CelebA-HQ at 256x256, tau, R1 and levels of the RDUOT paper, the rest of DDGAN's; not measured here",
        _RDUOT_256 | dict(num_timesteps=2, batch=32, lr_g=2e-4, duration=24),
    ),
    Preset(
        "lsun256",
        "train_rduot.py",
        "LSUN churches at 256x256, tau, R1 and levels of the RDUOT paper, the rest of DDGAN's; not measured here",
        _RDUOT_256 | dict(num_timesteps=4, batch=64, lr_g=1.6e-4, duration=63),
    ),
]


def presets_of(script: str) -> dict[str, Preset]:
    """Return the presets of a script, by name."""
    return {preset.name: preset for preset in PRESETS if preset.script == script}
