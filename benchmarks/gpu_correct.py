"""Lines of `python -m benchmarks.gpu --part=correct`: the device against the CPU and against published numbers.

A line returns what it measured, or raises Wrong or Skip.
"""

from __future__ import annotations

import copy
import functools
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map

from benchmarks.gpu_lines import Line, Skip, Wrong
from benchmarks.gpu_objectives import OBJECTIVES, Images, make
from benchmarks.sampling_rows import random_denoiser
from metrics.detectors import ClassifierDetector
from metrics.fid import fid_from_features
from metrics.kid import kid_from_features
from metrics.prdc import prdc
from metrics.reference import RunningStatistics
from sampling.guidance import AffineGuidance, ClassifierFreeGuidance, Evidence, GatedGuidance, gated_discriminator
from sampling.loading import prepare
from sampling.samplers import choose_sampler
from torch_utils.persistence import load_snapshot
from torch_utils.precision import tf32
from torch_utils.training_stats import Stats
from training import networks
from training.config import OptimizerConfig
from training.networks_resnet import Classifier, Discriminator

__all__ = ["lines"]

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FIXTURES = os.path.join(ROOT, "tests", "fixtures")  # a Docker image has no folder tests
CPU = torch.device("cpu")
# Largest relative distance between an update of the weights on the device and one in float32 on the CPU
UPDATE = dict(fp32=1e-3, tf32=0.02, bf16=0.1, fp16=0.05)
# Least share of pixels within one gray level of the CPU's
PIXELS = dict(fp32=0.999, tf32=0.97, bf16=0.9, fp16=0.97)
GENERAL = dict(solver="heun", discretization="vp", schedule="vp", scaling="vp")
SAMPLERS = {
    "EDM": {},
    "EDM, churn": dict(S_churn=10),
    "VP": GENERAL,
    "VE": GENERAL | dict(discretization="ve", schedule="ve", scaling="none"),
    "iDDPM, Euler": GENERAL | dict(solver="euler", discretization="iddpm", schedule="linear", scaling="none"),
}
CLASSES = 10


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def _within(found: float, limit: float, what: str) -> str:
    text = f"{what} {found:.2g}, at most {limit:g} allowed"
    if not found <= limit:
        raise Wrong(text)
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Published numbers


def _published_network(name: str, device: torch.device) -> str:
    data = np.load(os.path.join(FIXTURES, name))
    config = json.loads(str(data["config"]))
    net = getattr(networks, config["precond"])(**config["kwargs"]).eval().to(device)
    state = {
        k.removeprefix("state/"): torch.from_numpy(data[k].astype(np.float32)) for k in data if k.startswith("state/")
    }
    net.load_state_dict(state)
    args = {
        k: torch.from_numpy(data[k]).to(device) for k in ("x", "sigma", "class_labels", "augment_labels") if k in data
    }
    with torch.no_grad(), tf32(False):
        return _within(_distance(net(**args).cpu(), torch.from_numpy(data["denoised"])), 1e-4, "distance")


def _published_snapshot(device: torch.device) -> str:
    net = load_snapshot(os.path.join(FIXTURES, "edm_snapshot.pkl"))["ema"].to(device)
    data = np.load(os.path.join(FIXTURES, "edm_snapshot_expected.npz"))
    args = (torch.from_numpy(data[k]).to(device) for k in ("x", "sigma", "class_labels"))
    with torch.no_grad(), tf32(False):
        return _within(_distance(net(*args).cpu(), torch.from_numpy(data["denoised"])), 1e-4, "distance")


def _published_metrics(device: torch.device) -> str:
    data = np.load(os.path.join(FIXTURES, "metrics.npz"))
    expected = json.loads(str(data["expected"]))
    real, fake = (torch.from_numpy(data[k]).to(device) for k in ("real", "fake"))
    found = dict(fid=fid_from_features(real, fake), kid_unbiased_poly3=kid_from_features(real, fake))
    found |= {f"{name}_k5": value for name, value in prdc(real, fake, 5).items()}
    worst = max(abs(value / expected[name] - 1) for name, value in found.items())
    return _within(worst, 1e-6, f"{', '.join(found)}: relative error")


# ---------------------------------------------------------------------------------------------------------------------
# Training steps


def _weights(objective: Any) -> torch.Tensor:
    with torch.no_grad():
        parameters = (p for trained in objective.trained.values() for p in trained.net.parameters())
        return torch.cat([p.double().cpu().flatten() for p in parameters])


def _step(objective: Any, data: Images, nimg: int = 0, draws: dict | None = None) -> None:
    """Take a step on all images. `draws` replace the random numbers, which differ between devices."""
    device = objective.device
    if draws is not None:
        # `mixed` stays on the CPU, where the discriminator reads it.
        moved = {k: v if k == "mixed" else tree_map(lambda x: x.to(device), v) for k, v in draws.items()}
        objective.draw = lambda *_: dict(moved)
    items = torch.arange(len(data))
    objective.step(data.pixels.to(device), data.onehot().to(device), nimg, Stats(device), items)


def _update(objective: Any, data: Images, draws: dict) -> torch.Tensor:
    """Return the change of all weights by one step. A loss scale that is too large makes steps that change nothing."""
    before = _weights(objective)
    for _ in range(20):
        with tf32(objective.config.precision != "fp32"):
            _step(objective, data, draws=draws)
        change = _weights(objective) - before
        if change.any():
            break
    return change


def _draws(objective: Any, data: Images) -> dict:
    return objective.draw(data.pixels, torch.Generator().manual_seed(1))


def _sgd(name: str) -> dict:
    # The change is then the gradient, where Adam's would be mostly its sign.
    return dict(
        optimizer=OptimizerConfig(
            "sgd", 1.0 if name not in ("rduot", "ddgan") else dict(net=1.0, potential=1.0), [0.9, 0.999]
        )
    )


def _objective_line(name: str, precision: str, device: torch.device, data: Images, changes: dict) -> str:
    if precision == "fp16" and device.type != "cuda":
        raise Skip("float16 needs CUDA")
    reference = make(name, data, CPU, batch=len(data), **_sgd(name))
    draws = _draws(reference, data)
    ours = make(name, data, device, batch=len(data), precision=precision, **_sgd(name), **changes)
    wanted = _update(reference, data, draws)
    return _within(_distance(_update(ours, data, draws), wanted), UPDATE[precision], "distance of the update")


def _shard_line(device: torch.device, data: Images) -> str:
    whole, shared = (make("dsm", data, device, batch=len(data), shard=shard) for shard in (False, True))
    draws = _draws(make("dsm", data, CPU, batch=len(data)), data)
    return _within(_distance(_update(shared, data, draws), _update(whole, data, draws)), 1e-6, "distance of the update")


def _resume_line(device: torch.device, data: Images) -> str:
    """Train a step on the CPU, one on the device with another memory format, and one on the CPU, with Adam."""
    build = functools.partial(make, "dsm", data, batch=len(data))
    straight = build(CPU)
    draws, start = _draws(straight, data), _weights(straight)
    for step in range(3):
        _step(straight, data, step * len(data), draws)
    state = None
    for step, (place, precision) in enumerate([(CPU, "fp32"), (device, "tf32"), (CPU, "fp32")]):
        run = build(place, precision=precision)
        if state is not None:
            run.load_state_dict(torch.load(io.BytesIO(state), map_location="cpu", weights_only=False))
        with tf32(precision == "tf32"):
            _step(run, data, step * len(data), draws)
        file = io.BytesIO()
        torch.save(run.state_dict(), file)
        state = file.getvalue()
    found = float((_weights(run) - _weights(straight)).norm() / (_weights(straight) - start).norm())
    return _within(found, 0.1, "distance of three steps")


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def _generate(net: Any, device: torch.device, resolution: int, n: int, **settings: Any) -> np.ndarray:
    rng = torch.Generator().manual_seed(3)
    latents = torch.randn([n, 3, resolution, resolution], generator=rng).to(device)
    labels = torch.eye(CLASSES)[torch.arange(n) % CLASSES].to(device)
    noise = lambda x: torch.randn(x.shape, generator=rng, dtype=x.dtype).to(x.device)  # noqa: E731
    images = choose_sampler(net, **settings)(net, latents, labels, randn_like=noise)
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8).cpu().numpy().astype(int)


def _same_images(found: np.ndarray, wanted: np.ndarray, precision: str) -> str:
    difference = np.abs(found - wanted)
    near = float((difference <= 1).mean())
    text = (
        f"{near:.3%} of pixels within a gray level, at least {PIXELS[precision]:.1%} wanted; largest {difference.max()}"
    )
    if near < PIXELS[precision] or wanted.std() < 1:  # Images of one color would show nothing.
        raise Wrong(text)
    return text


def _networks(resolution: int) -> dict[str, torch.nn.Module]:
    torch.manual_seed(1)
    kwargs = dict(depth="small", model_channels=16, channel_mult=[1, 1, 2])
    judge = Discriminator(resolution, 3, CLASSES, **kwargs).eval().requires_grad_(False)
    for p in judge.parameters():  # as initialized, its gradient is nearly zero
        p.add_(0.1 * torch.randn_like(p))
    return dict(net=random_denoiser("ddpmpp_tiny", 16, 3, resolution), judge=judge)


def _guided(kind: str, nets: dict[str, torch.nn.Module], device: torch.device) -> Any:
    net, judge = (copy.deepcopy(net).to(device) for net in nets.values())
    evidence = Evidence(*(torch.full([CLASSES], share, device=device) for share in (0.2, 0.5)))
    weaker = copy.deepcopy(net)
    with torch.no_grad():
        for p in weaker.parameters():
            p.mul_(0.98)
    return {
        "none": lambda: net,
        "classifier-free": lambda: ClassifierFreeGuidance(net, 1.5),
        "autoguidance": lambda: AffineGuidance(net, weaker, 0.5),
        "in an interval": lambda: GatedGuidance(net, [ClassifierFreeGuidance(net, 1.5)] * 2, (0.1, 10)),
        "discriminator, constant": lambda: gated_discriminator(net, judge, weights=(2.0, 0.0), gate=(0, 10)),
        "discriminator, calibrated": lambda: gated_discriminator(net, judge, weights=(1.0, 1.0), evidence=evidence),
        "discriminator over classifier-free": lambda: gated_discriminator(
            ClassifierFreeGuidance(net, 1.5), judge, weights=(1.0, 1.0)
        ),
    }[kind]()


GUIDANCES = (
    "classifier-free",
    "autoguidance",
    "in an interval",
    "discriminator, constant",
    "discriminator, calibrated",
    "discriminator over classifier-free",
)


def _guidance_line(kind: str, device: torch.device, size: dict, precision: str = "fp32", **settings: Any) -> str:
    if precision == "fp16" and device.type != "cuda":
        raise Skip("float16 needs CUDA")
    nets, settings = _networks(size["resolution"]), dict(num_steps=size["steps"]) | settings
    wanted = _generate(_guided(kind, nets, CPU), CPU, size["resolution"], size["images"], **settings)
    ours = _guided(kind, nets, device)
    if kind == "none":
        prepare(ours, precision)
    return _same_images(_generate(ours, device, size["resolution"], size["images"], **settings), wanted, precision)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics, and the tests of the suite


def _metrics_line(device: torch.device, data: Images) -> str:
    torch.manual_seed(2)
    kwargs = dict(depth="small", model_channels=16, channel_mult=[1, 1, 2])
    net = Classifier(data.resolution, 3, CLASSES, **kwargs).eval().requires_grad_(False)
    found = []
    for place in (device, CPU):
        with tf32(False):
            features = ClassifierDetector(copy.deepcopy(net), "c", place)(data.pixels.to(place))[0]
        statistics = RunningStatistics(features.shape[1], place)
        statistics.add(features)
        real, fake = features[::2], features[1::2]
        numbers = [fid_from_features(real, fake), kid_from_features(real, fake), *prdc(real, fake, 3).values()]
        found.append(np.array([*numbers, *statistics.reduce()[1]]))
    ours, wanted = found
    return _within(float(np.abs(ours - wanted).max() / np.abs(wanted).max()), 1e-3, "relative error")


def _without_fixtures() -> str:
    raise Skip(f"needs {FIXTURES}, which is not there")


def _suite_line(tiny: bool) -> str:
    if not os.path.isdir(FIXTURES):
        return _without_fixtures()
    if tiny:
        raise Skip("`make test` runs these tests")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/gpu",
        "tests/training/test_networks.py",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = ([line for line in result.stdout.splitlines() if line.strip()] or ["no output"])[-1]
    if result.returncode:
        raise Wrong(last)
    return last


def lines(device: torch.device, tiny: bool) -> Iterator[Line]:
    """Yield all lines in order. `tiny`: at a size for the CPU."""
    size = dict(resolution=8, images=2, steps=2) if tiny else dict(resolution=16, images=8, steps=18)

    @functools.cache
    def data() -> Images:
        return Images(8 if tiny else 64, 3, size["resolution"], CLASSES)

    def line(name: str, work: Callable[[], str], seconds: int = 30) -> Line:
        return Line(name, work, seconds)

    if os.path.isdir(FIXTURES):
        for name in sorted(os.listdir(FIXTURES)):
            if name.startswith("network_"):
                yield line(f"published {name[8:-4]}", functools.partial(_published_network, name, device))
        yield line("published snapshot of EDM", lambda: _published_snapshot(device))
        yield line("published metrics", lambda: _published_metrics(device))
    else:
        yield line("published numbers", _without_fixtures)
    for name in OBJECTIVES:
        for precision in ("fp32",) if tiny and name in ("rduot", "ddgan") else UPDATE:
            work = lambda name=name, precision=precision: _objective_line(name, precision, device, data(), {})  # noqa: E731
            yield line(f"step {name} {precision}", work)
    yield line("step dsm fp32, in parts", lambda: _objective_line("dsm", "fp32", device, data(), dict(batch_gpu=2)))
    for name in ("dsm", "tdsm"):
        yield line(f"step {name} fp32, compiled", lambda name=name: _compiled_line(name, device, data(), tiny), 90)
    yield line("step with shard on one process", lambda: _shard_line(device, data()))
    yield line("resume CPU, device, CPU", lambda: _resume_line(device, data()))
    for name, settings in SAMPLERS.items():
        yield line(f"sampling {name}", functools.partial(_guidance_line, "none", device, size, **settings))
    for precision in ("tf32", "bf16", "fp16"):
        yield line(f"sampling EDM {precision}", functools.partial(_guidance_line, "none", device, size, precision))
    for kind in GUIDANCES:
        yield line(f"guidance {kind}", functools.partial(_guidance_line, kind, device, size))
    yield line("metrics", lambda: _metrics_line(device, data()))
    yield line("tests of the suite", lambda: _suite_line(tiny), 150)


def _compiled_line(name: str, device: torch.device, data: Images, tiny: bool) -> str:
    if tiny:
        raise Skip("compiling takes longer than all other lines")
    return _objective_line(name, "fp32", device, data, dict(compile=True))
