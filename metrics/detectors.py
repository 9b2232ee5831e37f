"""Detectors turn images into features: pixels, our classifiers, and networks of others."""

from __future__ import annotations

import io
import os
from typing import Protocol

import torch

import dnnlib
from archives.dataset import to_float
from metrics.images import ImageSource, describe_shape
from metrics.network_detectors import FIDELITY, FidelityDetector, TorchScriptDetector
from torch_utils import safe_pickle
from torch_utils.persistence import find_snapshot, load_snapshot
from training import networks_conv, networks_published, networks_resnet  # noqa: F401  They register classifiers.
from training.noise_levels import LOWEST_SIGMA

__all__ = [
    "DETECTORS",
    "INCEPTION",
    "INCEPTION_URL",
    "PRECISIONS",
    "BFloat16Detector",
    "ClassifierDetector",
    "Detector",
    "PixelDetector",
    "find_inception",
    "in_precision",
    "load_detector",
]

DETECTORS = (
    "'pixels', 'fidelity:NAME' (package torch-fidelity), Inception-v3 or another network as TorchScript or in "
    "a .pkl (file or URL), or a classifier snapshot of train_classifier.py or detect_noise.py (file, URL or run "
    "directory)"
)
INCEPTION_URL = (
    "https://api.ngc.nvidia.com/v2/models/nvidia/research/stylegan3/versions/1/files/metrics/"
    "inception-v3-2015-12-05.pkl"
)
INCEPTION = FIDELITY + "inception-v3-compat"  # the same network, with weights that torch-fidelity publishes
PRECISIONS = ("fp32", "bf16")
ZIP_MAGIC = b"PK\x03\x04"


class Detector(Protocol):
    """Turns images into features. `load_detector` finds the detector of a name."""

    name: str
    precision: str  # one of PRECISIONS

    def check(self, source: ImageSource) -> None:
        """Raise UserError if the detector cannot take these images."""

    def __call__(self, images: torch.Tensor, probs: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return features [N,d] float32 and class probabilities [N,C] for uint8 images [N,C,H,W] on the device.

        The probabilities are None if the detector has none. If `probs` is false, they are not needed.

        A detector with spatial features, for sFID, has a method `with_spatial` that takes the same arguments and
        returns them, [N,s], as a third value. Where it is None or missing there are none.
        """


class PixelDetector:
    """Pixel values scaled to [-1,1], for tiny images and for tests. There are no class probabilities."""

    name, precision = "pixels", "fp32"

    def check(self, source: ImageSource) -> None:
        """Accept every image."""

    def __call__(self, images: torch.Tensor, probs: bool = True) -> tuple[torch.Tensor, None]:
        """See Detector."""
        return to_float(images.flatten(1)), None


class ClassifierDetector:
    """A classifier of train_classifier.py at the lowest noise level, or one of detect_noise.py.

    Its features are the layer before the last one.
    """

    precision = "fp32"

    def __init__(
        self, net: torch.nn.Module, name: str, device: torch.device | str, class_names: list[str] | None = None
    ):
        self.net, self.name, self.label_dim = net.to(device).eval(), name, net.label_dim
        self.class_names = class_names

    def check(self, source: ImageSource) -> None:
        """Raise UserError unless the images have the resolution and the channels of the classifier."""
        wanted = (self.net.img_channels, self.net.img_resolution, self.net.img_resolution)
        if tuple(source.image_shape) != wanted:
            raise dnnlib.UserError(
                f"{self.name}: the classifier takes {describe_shape(wanted)} images, "
                f"{source.path} has {describe_shape(source.image_shape)}"
            )

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, probs: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """See Detector."""
        x = to_float(images)
        features = self.net.features(x, torch.full([len(x)], LOWEST_SIGMA, device=x.device))
        probabilities = self.net.logits(features).to(torch.float32).softmax(dim=1)
        return features.to(torch.float32), probabilities  # some networks give what autocast computes in


class BFloat16Detector:
    """Another detector that multiplies in bfloat16 (autocast). This is faster on hardware that supports it.

    The features differ from float32 ones in the third digit, so metrics in the two precisions do not compare.
    """

    precision = "bf16"

    def __init__(self, exact: Detector, device: torch.device | str):
        self._exact, self.name, self._device_type = exact, exact.name, torch.device(device).type
        if getattr(exact, "with_spatial", None) is None:
            self.with_spatial = None

    def check(self, source: ImageSource) -> None:
        """Raise UserError if the other detector cannot take these images in bfloat16."""
        with self._autocast():
            self._exact.check(source)

    def __call__(self, images: torch.Tensor, probs: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See Detector."""
        with self._autocast():
            return self._exact(images, probs)

    def with_spatial(self, images: torch.Tensor, probs: bool = True) -> tuple:
        """See Detector."""
        with self._autocast():
            return self._exact.with_spatial(images, probs)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device_type, dtype=torch.bfloat16)


def load_detector(name: str, device: torch.device | str) -> Detector:
    """Return the detector called `name`; DETECTORS lists the choices. Raise UserError if there is no such detector."""
    if name == PixelDetector.name:
        return PixelDetector()
    if name.startswith(FIDELITY):
        return FidelityDetector(name, device)
    if not (dnnlib.is_url(name) or os.path.exists(name) or any(c in name for c in "*?[")):
        published = f"; Inception-v3 is published at {INCEPTION_URL}" if "inception" in name.lower() else ""
        raise dnnlib.UserError(f"no detector or file {name!r}; choose {DETECTORS}{published}")
    path = find_snapshot(name)
    script = _find_torchscript(dnnlib.read_bytes(path), path)
    if script is None:
        snapshot = load_snapshot(path, kind="classifier")
        return ClassifierDetector(snapshot["ema"], path, device, (snapshot.get("info") or {}).get("class_names"))
    try:
        module = torch.jit.load(io.BytesIO(script), map_location="cpu")
    except (RuntimeError, ValueError, torch.jit.Error):
        raise dnnlib.UserError(f"{path}: not a TorchScript module; choose {DETECTORS}") from None
    return TorchScriptDetector(module, path, device)


def find_inception(device: torch.device | str) -> Detector:
    """Return the Inception-v3 of torch-fidelity, as EDM's commands use Inception-v3 without being told.

    Raise UserError that says where Inception-v3 is published if the package or its weights are missing.
    """
    try:
        return load_detector(INCEPTION, device)
    except dnnlib.UserError as e:
        raise dnnlib.UserError(
            f"published figures come from Inception-v3: choose {INCEPTION_URL}, which is downloaded once, or install "
            f"torch-fidelity with its weights ({e.message}). Other choices: {DETECTORS}"
        ) from None


def in_precision(detector: Detector, precision: str, device: torch.device | str) -> Detector:
    """Return the detector in one of PRECISIONS. Raise UserError for pixels in bf16, since pixels are not computed."""
    if precision == "fp32":
        return detector
    if isinstance(detector, PixelDetector):
        raise dnnlib.UserError(f"the detector {detector.name} computes nothing; leave it at fp32")
    return BFloat16Detector(detector, device)


def _find_torchscript(data: bytes, name: str) -> bytes | None:
    """Return the TorchScript archive in a file, or None if the file is a snapshot of ours.

    The file is a TorchScript archive or a pickle that holds one; the pickle's code is not run. Raise UserError if there
    is none, or more than one. `name` names the file in errors.
    """
    if data.startswith(ZIP_MAGIC):
        return data
    tree = safe_pickle.parse(data, name)[0]
    if isinstance(tree, dict) and "ema" in tree:
        return None
    found, seen, waiting = [], set(), [tree]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, (bytes, bytearray)) and value.startswith(ZIP_MAGIC):
            found.append(bytes(value))
        elif isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting += value
        elif isinstance(value, safe_pickle.Record):
            waiting += [value.args, value.state]
    if len(found) != 1:
        raise dnnlib.UserError(
            f"{name}: holds neither a snapshot of ours nor exactly one TorchScript module, and its code is not run; "
            "if you trust it, convert it: torch.jit.script(net).save('detector.pt')"
        )
    return found[0]
