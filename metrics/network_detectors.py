"""Detectors made by others: TorchScript modules and the feature extractors of the package torch-fidelity.

They take uint8 RGB images of any size and resize them on their own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch

import dnnlib
from metrics.images import ImageSource, describe_shape
from metrics.inception import inception_layers, run_layers, spatial_features

__all__ = ["FIDELITY", "FidelityDetector", "NetworkDetector", "TorchScriptDetector", "as_rgb"]

FIDELITY = "fidelity:"
SPATIAL_LAYER = "Mixed_6d"  # what torch-fidelity, like torchvision, calls mixed_6


class NetworkDetector:
    """Base class: makes gray images RGB, features float32, and logits probabilities. A subclass runs the network."""

    name: str
    precision = "fp32"
    with_spatial: Callable[..., tuple] | None = None  # a subclass may have it, see metrics.detectors.Detector

    def __init__(self, device: torch.device | str):
        self._device = device

    def run(self, images: torch.Tensor, probs: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return features, and class probabilities or logits [N,C] or None, for uint8 images [N,3,H,W].

        If `probs` is false, the second value is not needed.
        """
        raise NotImplementedError

    def check(self, source: ImageSource) -> None:
        """Raise UserError unless the network turns two images of this shape into two rows of features."""
        images = torch.zeros([2, *source.image_shape], dtype=torch.uint8, device=self._device)
        try:
            features, _ = self(images)
        except (RuntimeError, torch.jit.Error, TypeError, ValueError, AttributeError) as e:
            raise dnnlib.UserError(
                f"{self.name}: fails on {describe_shape(source.image_shape)} images of {source.path} ({_last_line(e)})"
            ) from None
        if features.ndim != 2 or len(features) != 2:
            raise dnnlib.UserError(f"{self.name}: gives {list(features.shape)} for 2 images, expected features [2,d]")

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, probs: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `metrics.detectors.Detector`."""
        return _as_floats(*self.run(as_rgb(images), probs))


class TorchScriptDetector(NetworkDetector):
    """A TorchScript module that turns uint8 images [N,3,H,W] into features [N,d].

    The published Inception-v3 takes the argument `return_features`. A module with this argument gives features when it
    is true, and class probabilities (or logits) otherwise. If it also takes `no_output_bias`, the probabilities are
    computed without the bias of the last layer, as published inception scores are.
    """

    def __init__(self, module: torch.jit.ScriptModule, name: str, device: torch.device | str):
        super().__init__(device)
        self.module, self.name = module.to(device).eval(), name
        arguments = {argument.name for argument in module.forward.schema.arguments}
        self._features = dict(return_features=True) if "return_features" in arguments else {}
        self._probs = dict(no_output_bias=True) if "no_output_bias" in arguments else {}
        # The published VGG16 is made for LPIPS: with these arguments, squared distances of its features are LPIPS.
        self.lpips = dict(return_lpips=True) if "return_lpips" in arguments else {}
        if self.lpips and "resize_images" in arguments:
            self.lpips["resize_images"] = False
        self._layers = self._features and inception_layers(self.module, device)
        self.with_spatial = self._with_spatial if self._layers else None

    def run(self, images: torch.Tensor, probs: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return features, and class probabilities if the module gives any and they are needed."""
        return (
            self.module(images, **self._features),
            self.module(images, **self._probs) if probs and self._features else None,
        )

    @torch.no_grad()
    def _with_spatial(self, images: torch.Tensor, probs: bool = True) -> tuple:
        images = as_rgb(images)
        features, spatial = run_layers(self._layers, images)
        p = self.module(images, **self._probs) if probs else None
        return *_as_floats(features, p), spatial.to(torch.float32)


class FidelityDetector(NetworkDetector):
    """A feature extractor of the package torch-fidelity, which must have its weights already.

    torch-fidelity downloads weights that it lacks, without asking. So this class looks for the files first, and raises
    UserError if one is missing.
    """

    def __init__(self, name: str, device: torch.device | str):
        super().__init__(device)
        self._seen: list[torch.Tensor] = []  # spatial features of the last images
        self.name, name = name, name.removeprefix(FIDELITY)
        try:
            from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY  # optional dependency
            from torch_fidelity.utils import create_feature_extractor  # optional dependency
        except (ImportError, RuntimeError) as e:  # RuntimeError: a torchvision that was built for another PyTorch
            raise dnnlib.UserError(
                f"{self.name} needs the package torch-fidelity: pip install torch-fidelity ({_last_line(e)})"
            ) from None
        if name not in FEATURE_EXTRACTORS_REGISTRY:
            raise dnnlib.UserError(
                f"torch-fidelity has no extractor {name!r}; there are {', '.join(sorted(FEATURE_EXTRACTORS_REGISTRY))}"
            )
        cls = FEATURE_EXTRACTORS_REGISTRY[name]
        # The last layer serves the inception score, but only if it holds logits.
        layers = [cls.get_default_feature_layer_for_metric(metric) for metric in ("fid", "isc")]
        self._has_probs = layers[1].startswith("logits")
        layers = layers[: 1 + self._has_probs]
        command = (
            'python -c "from torch_fidelity.utils import create_feature_extractor as f; '
            f'f({name!r}, {layers}, cuda=False)"'
        )
        for path, url in _downloads_of(name, cls):
            if not os.path.exists(path):
                raise dnnlib.UserError(
                    f"{self.name} needs {path}, published at {url}; nothing is downloaded unasked: "
                    f"put it there, or run once {command}"
                )
        try:
            self._net = create_feature_extractor(name, layers, cuda=False, verbose=False).to(device)
        except Exception as e:  # anything: damaged weights, a failed lookup in torch.hub, a bug of the extractor
            raise dnnlib.UserError(
                f"torch-fidelity cannot make {self.name} ({_last_line(e)}); see what {command} says"
            ) from None

        layer = getattr(self._net, SPATIAL_LAYER, None)
        if layer is not None:
            layer.register_forward_hook(lambda _module, _args, output: self._seen.append(spatial_features(output)))
            self.with_spatial = self._with_spatial

    @torch.no_grad()
    def _with_spatial(self, images: torch.Tensor, probs: bool = True) -> tuple:
        return *self(images, probs), self._seen.pop().to(torch.float32)

    def run(self, images: torch.Tensor, probs: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the layer that torch-fidelity uses for FID and, if it has logits, the one for the inception score."""
        self._seen.clear()
        found = self._net(images)
        return found[0], found[1] if self._has_probs else None


def _downloads_of(name: str, cls: type) -> list[tuple[str, str]]:
    """Return what the extractor `name` of torch-fidelity would download: (path on this machine, URL) of each item.

    The class `cls` says which weights the extractor needs, and its module where they are published. Extractors that
    other packages have registered look after their own weights. Raise UserError for an extractor of torch-fidelity
    that this function does not know.
    """
    module: Any = sys.modules[cls.__module__]
    if cls.__module__.split(".")[0] != "torch_fidelity":
        return []
    hub = torch.hub.get_dir()
    try:
        if cls.__name__ == "FeatureExtractorInceptionV3":
            urls = {os.path.basename(module.URL_INCEPTION_V3): module.URL_INCEPTION_V3}
        elif cls.__name__ == "FeatureExtractorVGG16":
            urls = {"vgg16-397923af.pth": "https://download.pytorch.org/models/vgg16-397923af.pth"}
        elif cls.__name__ == "FeatureExtractorCLIP":
            urls = {f"{name}-{module.MODEL_METADATA[name]['hash']}.pt": module.MODEL_URLS[name]}
        elif cls.__name__ == "FeatureExtractorDinoV2":
            model = module.MODEL_METADATA[name]
            file = f"{model}_pretrain.pth"
            urls = {file: f"https://dl.fbaipublicfiles.com/dinov2/{model}/{file}"}
        else:
            raise KeyError(cls.__name__)
    except (AttributeError, KeyError):
        raise dnnlib.UserError(
            f"{FIDELITY}{name}: this version of torch-fidelity does not say which weights it needs, and nothing is "
            "downloaded unasked; choose another extractor"
        ) from None
    files = [(os.path.join(hub, "checkpoints", file), url) for file, url in urls.items()]
    if cls.__name__ == "FeatureExtractorDinoV2":  # its code comes from a repository
        files.append((os.path.join(hub, "facebookresearch_dinov2_main"), "https://github.com/facebookresearch/dinov2"))
    return files


def as_rgb(images: torch.Tensor) -> torch.Tensor:
    """Return gray images [N,1,H,W] as [N,3,H,W], and others as they are."""
    return images.repeat(1, 3, 1, 1) if images.shape[1] == 1 else images


def _as_floats(features: torch.Tensor, probs: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    return features.flatten(1).to(torch.float32), None if probs is None else _as_probs(probs.to(torch.float32))


def _last_line(error: Exception) -> str:
    return ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1][:200]


def _as_probs(p: torch.Tensor) -> torch.Tensor:
    """Return probabilities [N,C] as they are, and logits after a softmax."""
    return p if bool((p >= 0).all()) and bool(((p.sum(dim=1) - 1).abs() < 1e-3).all()) else p.softmax(dim=1)
