"""Lines of `python -m benchmarks.gpu --part=speed`: training and sampling at CIFAR-10's shape, in every form.

The peaks that the rows are compared with come from the same run. `ddpmpp` has its defaults, without augmentation and
dropout. The label noise leaves TDSM one pair per image.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.nn import functional as F

from benchmarks.core import Row
from benchmarks.gpu_lines import Line, Skip
from benchmarks.gpu_objectives import Images, make
from benchmarks.plain import plain_layers, plain_objective
from benchmarks.roofline import Work, count
from sampling.generation import generate_images
from sampling.loading import prepare
from sampling.samplers import heun_sampler
from torch_utils.precision import tf32
from torch_utils.training_stats import Stats
from training.networks import Conv2d, EDMPrecond, GroupNorm
from training.objective import Objective
from training.presets import network_kwargs

__all__ = ["FORMS", "lines"]

IMAGES, CHANNELS, RESOLUTION, CLASSES = 50_000, 3, 32, 10
BATCH, BATCH_GPU, SAMPLES, STEPS = 512, 128, 128, 18
WARM_UP, REPEATS = 2, 5


@dataclass(frozen=True)
class Size:
    """How large the measurement is."""

    images: int = IMAGES
    resolution: int = RESOLUTION
    batch: int = BATCH
    batch_gpu: int = BATCH_GPU
    samples: int = SAMPLES
    steps: int = STEPS
    width: int | None = None  # of the networks; None: their own
    repeats: int = REPEATS


# ---------------------------------------------------------------------------------------------------------------------
# Forms of group norm and resampling. Autocast computes both in float32, and PyTorch's group norm copies to NCHW.


def _norm_in_half(self: GroupNorm, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def _norm_without_copies(self: GroupNorm, x: torch.Tensor) -> torch.Tensor:
    # The channels of a pixel stay adjacent: the groups are a view of the last axis.
    with torch.autocast(x.device.type, enabled=False):
        n, c, h, w = x.shape
        y = x.permute(0, 2, 3, 1).reshape(n, h * w, self.num_groups, c // self.num_groups)
        var, mean = torch.var_mean(y.float(), dim=(1, 3), keepdim=True, correction=0)
        scale = (var + self.eps).rsqrt()
        y = ((y - mean) * scale).to(x.dtype).reshape(n, h, w, c)
        return torch.addcmul(self.bias.to(x.dtype), y, self.weight.to(x.dtype)).permute(0, 3, 1, 2)


_resample = Conv2d._resample


def _resample_in_half(self: Conv2d, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return _resample(self, x)


@contextlib.contextmanager
def _layers(norm: Callable | None) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if norm is not None:
            stack.enter_context(mock.patch.object(GroupNorm, "forward", norm))
            stack.enter_context(mock.patch.object(Conv2d, "_resample", _resample_in_half))
        yield


@dataclass(frozen=True)
class Form:
    """A way of running the same work."""

    name: str
    precision: str = "fp32"
    compile: bool = False
    channels_last: bool | None = None  # None: what training chooses
    norm: Callable | None = None  # replaces group norm; resampling is then in half precision too
    plain: bool = False


FORMS = (
    Form("plain eager fp32", plain=True),
    Form("fp32"),
    Form("tf32", "tf32"),
    Form("tf32, contiguous", "tf32", channels_last=False),
    Form("bf16", "bf16"),
    Form("bf16, contiguous", "bf16", channels_last=False),
    Form("bf16, norm in bf16", "bf16", norm=_norm_in_half),
    Form("bf16, contiguous, norm in bf16", "bf16", channels_last=False, norm=_norm_in_half),
    Form("bf16, norm without copies", "bf16", norm=_norm_without_copies),
    Form("bf16, compiled", "bf16", compile=True),
    Form("bf16, compiled, contiguous", "bf16", compile=True, channels_last=False),
    Form("bf16, compiled, norm without copies", "bf16", compile=True, norm=_norm_without_copies),
)
FEW = tuple(form for form in FORMS if form.name in ("fp32", "tf32", "bf16", "bf16, compiled"))


# ---------------------------------------------------------------------------------------------------------------------
# Training


def _wrap(form: Form) -> Callable[[type[Objective]], type[Objective]]:
    def wrap(cls: type[Objective]) -> type[Objective]:
        if form.plain:
            return plain_objective(cls)

        class WithLayout(cls):
            def trained_network(self, net: torch.nn.Module, **overrides: Any) -> Any:
                layout = {} if form.channels_last is None else dict(channels_last=form.channels_last)
                return super().trained_network(net, **(layout | overrides))

        return WithLayout

    return wrap


def _stepper(objective: Objective, data: Images, batch: int) -> Callable[[], None]:
    """Return a function that takes a step on the next `batch` images, which are on the device already."""
    device, stats, place = objective.device, Stats(objective.device), 0
    labels = data.onehot().to(device)

    def step() -> None:
        nonlocal place
        items = (torch.arange(batch, device=device) + place) % len(data)
        place += batch
        objective.step(data.images_on(device, items), labels[items], 10_000 + place, stats, items)

    return step


def _seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    times = []
    for _ in range(WARM_UP + repeats if device.type == "cuda" else 1 + repeats):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[-repeats:])


def _work_of_step(name: str, data: Images, device: torch.device, size: Size) -> Work:
    """Return the FLOPs and bytes of a step per image, counted on a few images."""
    few = min(8, size.batch)
    objective = make(name, data, device, batch=few, arch="ddpmpp", width=size.width, augment=None)
    objective.fixed_size = False  # TDSM: without empty places in its passes
    work = count(_stepper(objective, data, few))
    return Work(work.flops / few, work.bytes / few)


def _step_row(
    name: str, form: Form, data: Callable[[], Images], work: Callable[[str], Work], device: torch.device, size: Size
) -> Row:
    if form.compile and device.type != "cuda":
        raise Skip("compiling takes longer than all other lines")
    at_a_time = size.batch_gpu
    while True:
        with _layers(form.norm), tf32(form.precision != "fp32"):
            try:
                objective = make(
                    name,
                    data(),
                    device,
                    batch=size.batch,
                    arch="ddpmpp",
                    width=size.width,
                    wrap=_wrap(form),
                    augment=None,
                    batch_gpu=at_a_time,
                    precision=form.precision,
                    compile=form.compile,
                )
                seconds = _seconds(_stepper(objective, data(), size.batch), device, size.repeats)
                break
            except torch.OutOfMemoryError:
                if at_a_time == 1:
                    raise
                at_a_time //= 2  # a smaller GPU
        objective = None
        torch.cuda.empty_cache()
    cost, note = work(name), f"batch {size.batch}, {at_a_time} at a time"
    flops, nbytes = cost.flops * size.batch, cost.bytes * size.batch
    return Row(f"{name} step, {form.name}", seconds, None, flops, nbytes, note, size.batch, form.precision)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def _sampling_row(form: Form, device: torch.device, size: Size) -> Row:
    if form.compile and device.type != "cuda":
        raise Skip("compiling takes longer than all other lines")
    torch.manual_seed(0)
    net = EDMPrecond(size.resolution, CHANNELS, CLASSES, **network_kwargs("ddpmpp", size.width))
    net.eval().requires_grad_(False).to(device)
    n, evaluations = size.samples, 2 * size.steps - 1
    x, labels = torch.zeros(1, CHANNELS, size.resolution, size.resolution, device=device), torch.zeros(1, CLASSES)
    cost = count(lambda: net(x, torch.ones(1, device=device), labels.to(device)))
    if not form.plain:
        prepare(net, form.precision, form.compile)
    sampler = functools.partial(heun_sampler, num_steps=size.steps)

    def generate() -> None:
        for _ in generate_images(net, range(n), device=device, batch=n, sampler=sampler):
            pass  # The images are arrays on the CPU, so the device has finished.

    with plain_layers() if form.plain else contextlib.nullcontext():
        seconds = _seconds(generate, device, 1)
    flops, nbytes = (value * n * evaluations for value in (cost.flops, cost.bytes))
    note = f"batch {n}, {size.steps} steps"
    return Row(f"sampling, {form.name}", seconds, None, flops, nbytes, note, n, form.precision)


def lines(device: torch.device, tiny: bool) -> Iterator[Line]:
    """Yield all lines in order; what takes longest to compile comes last. `tiny`: at a size for the CPU."""
    size = Size(16, 8, 4, 2, 2, 2, 8, 1) if tiny else Size()

    @functools.cache
    def data() -> Images:
        return Images(size.images, CHANNELS, size.resolution, CLASSES).to(device)

    @functools.cache
    def work(name: str) -> Work:
        return _work_of_step(name, data(), device, size)

    def step_line(name: str, form: Form) -> Line:
        seconds = 120 if form.compile else 40
        return Line(
            f"{name} step, {form.name}", functools.partial(_step_row, name, form, data, work, device, size), seconds
        )

    def sampling_line(form: Form) -> Line:
        run = functools.partial(_sampling_row, form, device, size)
        return Line(f"sampling, {form.name}", run, 120 if form.compile else 60)

    steps = [("dsm", form) for form in FORMS]
    steps += [(name, form) for name in ("tdsm", "discriminator") for form in FEW]
    yield from (step_line(*step) for step in steps if not step[1].compile)
    yield from map(sampling_line, (form for form in (FORMS[0], *FEW) if not form.compile))
    yield from (step_line(*step) for step in sorted(steps, key=lambda step: step[0] != "dsm") if step[1].compile)
    yield from map(sampling_line, (form for form in FEW if form.compile))
