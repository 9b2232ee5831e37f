"""What turns images into features: pixels, TorchScript modules, torch-fidelity's extractors, our classifiers."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from typing import Any, Protocol

import torch

import dnnlib
import training.networks_resnet  # noqa: F401  (registers the classifier, so that its snapshots can be built)
from archives.dataset import to_float
from metrics.images import ImageSource, describe_shape
from torch_utils import safe_pickle
from torch_utils.persistence import find_snapshot, load_snapshot
from training.noise_levels import LOWEST_SIGMA

__all__ = [
    "DETECTORS",
    "PRECISIONS",
    "BFloat16Detector",
    "ClassifierDetector",
    "Detector",
    "FidelityDetector",
    "PixelDetector",
    "TorchScriptDetector",
    "detector",
]

DETECTORS = (
    "'pixels', 'fidelity:NAME' (package torch-fidelity), Inception-v3 or another network as TorchScript or in "
    "a .pkl (file or URL), or a classifier snapshot of train_classifier.py (file, URL or run directory)"
)
INCEPTION_URL = (
    "https://api.ngc.nvidia.com/v2/models/nvidia/research/stylegan3/versions/1/files/metrics/"
    "inception-v3-2015-12-05.pkl"
)
FIDELITY = "fidelity:"
PRECISIONS = ("fp32", "bf16")
ZIP_MAGIC = b"PK\x03\x04"


class Detector(Protocol):
    """Turns images into features; `detector` makes one from its name."""

    name: str
    precision: str  # of PRECISIONS

    def check(self, source: ImageSource) -> None:
        """UserError when it cannot take these images."""

    def __call__(self, images: torch.Tensor, probs: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
        """uint8 [N,C,H,W] on its device -> (features [N,d] float32, class probabilities [N,C] if it has any).

        `probs` False: they are not needed.
        """


class PixelDetector:
    """The pixels themselves, scaled to [-1,1] and flattened: tiny images and tests. It has no class probabilities."""

    name, precision = "pixels", "fp32"

    def check(self, source: ImageSource) -> None:
        """Takes every image."""

    def __call__(self, images: torch.Tensor, probs: bool = True) -> tuple[torch.Tensor, None]:
        return to_float(images.flatten(1)), None


class ClassifierDetector:
    """Penultimate features and probabilities of a noise-level-conditional classifier of ours at the lowest sigma."""

    precision = "fp32"

    def __init__(self, net: torch.nn.Module, name: str, device: torch.device | str):
        self.net, self.name, self.label_dim = net.to(device).eval(), name, net.label_dim

    def check(self, source: ImageSource) -> None:
        """UserError unless the images have the resolution and channels of the classifier."""
        wanted = (self.net.img_channels, self.net.img_resolution, self.net.img_resolution)
        if tuple(source.image_shape) != wanted:
            raise dnnlib.UserError(
                f"{self.name}: the classifier takes {describe_shape(wanted)} images, "
                f"{source.path} has {describe_shape(source.image_shape)}"
            )

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, probs: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        x = to_float(images)
        features = self.net.features(x, torch.full([len(x)], LOWEST_SIGMA, device=x.device))
        return features.to(torch.float32), self.net.head(features).to(torch.float32).softmax(dim=1)


class _ModuleDetector:
    """A network of others: takes uint8 RGB of any size, resizes by itself; grey images are repeated to 3 channels."""

    name: str
    precision = "fp32"

    def __init__(self, device: torch.device | str):
        self._device = device

    def run(self, images: torch.Tensor, probs: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """uint8 [N,3,H,W] -> features, and probabilities or logits."""
        raise AssertionError("a detector says how its network runs")

    def check(self, source: ImageSource) -> None:
        """UserError unless it turns two images of this shape into two rows of features."""
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
        features, p = self.run(images.repeat(1, 3, 1, 1) if images.shape[1] == 1 else images, probs)
        return features.flatten(1).to(torch.float32), None if p is None else _as_probs(p.to(torch.float32))


def _last_line(error: Exception) -> str:
    return ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1][:200]


def _as_probs(p: torch.Tensor) -> torch.Tensor:
    """Probabilities [N,C] as they are, logits through the softmax."""
    return p if bool((p >= 0).all()) and bool(((p.sum(dim=1) - 1).abs() < 1e-3).all()) else p.softmax(dim=1)


class TorchScriptDetector(_ModuleDetector):
    """A TorchScript module: uint8 [N,3,H,W] -> features [N,d].

    One that takes `return_features`, as the published Inception-v3 does, gives features with it and class probabilities
    (or logits) without; those of the inception score are without the bias of the last layer (`no_output_bias`).
    """

    def __init__(self, module: torch.jit.ScriptModule, name: str, device: torch.device | str):
        super().__init__(device)
        self.module, self.name = module.to(device).eval(), name
        options = {argument.name for argument in module.forward.schema.arguments}
        self._features = dict(return_features=True) if "return_features" in options else {}
        self._probs = dict(no_output_bias=True) if "no_output_bias" in options else {}

    def run(self, images: torch.Tensor, probs: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Features; probabilities when it has any and they are wanted."""
        return (
            self.module(images, **self._features),
            self.module(images, **self._probs) if probs and self._features else None,
        )


class FidelityDetector(_ModuleDetector):
    """An extractor registered with the package torch-fidelity; nothing that it lacks is downloaded."""

    def __init__(self, name: str, device: torch.device | str, option: str = "--detector"):
        super().__init__(device)
        self.name, name = name, name.removeprefix(FIDELITY)
        try:
            from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY  # optional dependency
            from torch_fidelity.utils import create_feature_extractor  # optional dependency
        except (ImportError, RuntimeError) as e:  # RuntimeError: a torchvision made for another torch
            raise dnnlib.UserError(
                f"{option}: {self.name} needs the package torch-fidelity: pip install torch-fidelity ({_last_line(e)})"
            ) from None
        if name not in FEATURE_EXTRACTORS_REGISTRY:
            raise dnnlib.UserError(
                f"{option}: torch-fidelity has no extractor {name!r}; there are "
                f"{', '.join(sorted(FEATURE_EXTRACTORS_REGISTRY))}"
            )
        cls = FEATURE_EXTRACTORS_REGISTRY[name]
        layers = [cls.get_default_feature_layer_for_metric(metric) for metric in ("fid", "isc")]
        self._has_probs = layers[1].startswith("logits")
        layers = layers[: 1 + self._has_probs]
        fetch = f"from torch_fidelity.utils import create_feature_extractor as f; f({name!r}, {layers}, cuda=False)"
        try:
            with _no_download(f"{option}: {self.name}", fetch):
                self._net = create_feature_extractor(name, layers, cuda=False, verbose=False).to(device)
        except dnnlib.UserError:
            raise
        except Exception as e:  # damaged weights, no network for what torch.hub looks up, an extractor's own troubles
            raise dnnlib.UserError(
                f'{option}: torch-fidelity cannot make {self.name} ({_last_line(e)}); see what python -c "{fetch}" says'
            ) from None

    def run(self, images: torch.Tensor, probs: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The layers that torch-fidelity uses for FID and, where those are logits, for the inception score."""
        found = self._net(images)
        return found[0], found[1] if self._has_probs else None


class BFloat16Detector:
    """Another detector with its products in bfloat16 (autocast): faster where the hardware has them.

    Its features differ from the other's in the third digit; figures from the two do not compare.
    """

    precision = "bf16"

    def __init__(self, exact: Detector, device: torch.device | str):
        self._exact, self.name, self._device_type = exact, exact.name, torch.device(device).type

    def check(self, source: ImageSource) -> None:
        """As the other detector, in bfloat16: not every network can."""
        with self._autocast():
            self._exact.check(source)

    def __call__(self, images: torch.Tensor, probs: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
        with self._autocast():
            return self._exact(images, probs)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device_type, dtype=torch.bfloat16)


@contextlib.contextmanager
def _no_download(what: str, fetch: str) -> Iterator[None]:
    """Inside it torch.hub, which torch-fidelity fetches its weights with, says what is missing instead."""

    def refuse(url: str, dst: str, *args: Any, **kwargs: Any) -> None:
        raise dnnlib.UserError(
            f"{what} needs {dst}, published at {url}; nothing is downloaded unasked: put it there, "
            f'or run once python -c "{fetch}"'
        )

    original = torch.hub.download_url_to_file
    torch.hub.download_url_to_file = refuse
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        torch.hub.download_url_to_file = original


def detector(name: str, device: torch.device | str, option: str = "--detector", precision: str = "fp32") -> Detector:
    """The detector called `name` (DETECTORS). Raises UserError for what is none, and for what it lacks."""
    if precision == "bf16":
        exact = detector(name, device, option)
        if isinstance(exact, PixelDetector):
            raise dnnlib.UserError(f"--precision=bf16: {option}={name} computes nothing; leave it at fp32")
        return BFloat16Detector(exact, device)
    if name == PixelDetector.name:
        return PixelDetector()
    if name.startswith(FIDELITY):
        return FidelityDetector(name, device, option)
    if not (dnnlib.is_url(name) or os.path.exists(name) or any(c in name for c in "*?[")):
        published = f"; Inception-v3 is published at {INCEPTION_URL}" if "inception" in name.lower() else ""
        raise dnnlib.UserError(f"{option}: no detector or file {name!r}; choose {DETECTORS}{published}")
    path = find_snapshot(name)
    script = _find_torchscript(dnnlib.read_bytes(path), path)
    if script is None:
        return ClassifierDetector(load_snapshot(path, kind="classifier")["ema"], path, device)
    try:
        module = torch.jit.load(io.BytesIO(script), map_location="cpu")
    except (RuntimeError, ValueError, torch.jit.Error):
        raise dnnlib.UserError(f"{path}: not a TorchScript module; {option} takes {DETECTORS}") from None
    return TorchScriptDetector(module, path, device)


def _find_torchscript(data: bytes, name: str) -> bytes | None:
    """The TorchScript archive that a file is or that its pickle, which is not run, holds; None: a snapshot of ours."""
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
            f"{name}: holds no TorchScript module and no snapshot of ours, and the code in it is "
            "not run; where you trust it, convert it: torch.jit.script(net).save('detector.pt')"
        )
    return found[0]
