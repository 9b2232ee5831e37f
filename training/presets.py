"""Names on the command line and the networks they stand for."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from training.networks import EDMPrecond, VEPrecond, VPPrecond

__all__ = ["ARCHS", "network_kwargs", "precond_class"]

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


def network_kwargs(arch: str, cbase: int | None = None, cres: Sequence[int] | None = None) -> dict:
    """Keyword arguments of a preconditioner that choose its U-Net, plain data (edm.md, U-Nets).

    `cbase` replaces the preset's model_channels, `cres` its channel_mult. ValueError: no such architecture.
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
    """The preconditioner by its name on the command line. ValueError: no such name."""
    if precond not in _PRECONDS:
        raise ValueError(f"precond={precond!r}: must be one of {', '.join(_PRECONDS)}")
    return _PRECONDS[precond]
