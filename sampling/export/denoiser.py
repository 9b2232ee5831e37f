"""A denoiser of cleanscore as a model of diffusers. It needs diffusers and, beside this file, networks.py.

Part of cleanscore, Apache License 2.0.
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from training.networks import EDMPrecond, VEPrecond, VPPrecond, iDDPMPrecond

PRECONDS = {cls.__name__: cls for cls in (EDMPrecond, VEPrecond, VPPrecond, iDDPMPrecond)}


class CleanscoreDenoiser(ModelMixin, ConfigMixin):
    """A denoiser D(x; sigma, y).

    precond    the class of the preconditioned network, as in cleanscore
    arguments  those of its constructor
    """

    @register_to_config
    def __init__(self, precond: str, arguments: dict):
        super().__init__()
        self.net = PRECONDS[precond](**arguments)

    def forward(
        self, sample: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the denoised images [N,C,H,W], float32.

        `sample`: images in about [-1,1] with noise of standard deviation `sigma`, one number or N numbers.
        `class_labels`: one-hot [N,classes]; rows of zeros, or None, mean no class.
        """
        return self.net(sample, sigma, class_labels)
