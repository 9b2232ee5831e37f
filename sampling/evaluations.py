"""Evaluations of a denoiser: how a sampler calls it, how many there were, and how long they took."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

import dnnlib
from sampling.guidance import Denoiser, at_step
from sampling.rejection import Rejection, warn_of_given_up
from sampling.schedules import Function
from torch_utils import distributed, misc
from torch_utils.distributed import print0
from torch_utils.precision import widest

__all__ = ["EvaluationMeter", "Stopwatch", "evaluations", "on_host", "precise", "report", "start_over", "uncounted"]


def precise(latents: torch.Tensor) -> torch.Tensor:
    """Return the latents in the samplers' dtype: float64, or float32 on MPS, which has no float64."""
    return latents.to(widest(latents.device))


def on_host(*values: torch.Tensor) -> list[list[float]]:
    """Return tensors of the CPU as lists of numbers: code that computes with numbers never waits for a GPU."""
    return [value.tolist() for value in values]


def evaluations(
    net: Denoiser, order: int, sigmas: torch.Tensor, x: torch.Tensor, class_labels: torch.Tensor | None
) -> list[Function]:
    """Return one function x -> D(x; sigma_i) for each of the noise levels `sigmas`, float64 [num_steps] on the CPU.

    `order` is 1 for the first evaluation of a solver's step and 2 for the second; a gated guidance chooses its denoiser
    by `order` and sigma_i. The functions take and return tensors of the device and dtype of `x`, whatever dtype `net`
    computes in.
    """
    levels = misc.to_device(sigmas.to(x.dtype), x.device)

    def evaluation(denoiser: Denoiser, sigma: torch.Tensor) -> Function:
        return lambda x: denoiser(x, sigma, class_labels).to(x.dtype)

    return [
        evaluation(at_step(net, order, number), sigma) for number, sigma in zip(*on_host(sigmas), levels, strict=True)
    ]


class Stopwatch:
    """Context manager that adds up the seconds the device spends inside. `seconds` waits for a GPU, nothing before."""

    def __init__(self, device: torch.device):
        self._device, self._spans = device, []

    @property
    def times(self) -> int:
        """How often it ran."""
        return len(self._spans)

    def reset(self, keep: int = 0) -> None:
        """Forget the seconds so far, but for those of the first times that it ran."""
        del self._spans[keep:]

    def __enter__(self) -> None:
        self._start = self._mark()

    def __exit__(self, *_exception) -> None:
        self._spans.append((self._start, self._mark()))

    def _mark(self):
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        if self._device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    @property
    def seconds(self) -> float:
        """The seconds so far."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return sum(start.elapsed_time(end) for start, end in self._spans) / 1000
        return sum(end - start for start, end in self._spans)


class EvaluationMeter:
    """Counts the images that go through `networks` (modules), and measures the time if there is a `stopwatch`."""

    def __init__(self, *networks: torch.nn.Module, stopwatch: Stopwatch | None = None):
        self.count, self.stopwatch = 0, stopwatch
        for net in networks:
            net.register_forward_pre_hook(self._before)
            if stopwatch is not None:
                net.register_forward_hook(lambda *_: stopwatch.__exit__())

    def _before(self, _net: torch.nn.Module, args: tuple) -> None:
        self.count += len(args[0])
        if self.stopwatch is not None:
            self.stopwatch.__enter__()


def start_over(meter: EvaluationMeter, correcting: Stopwatch | None, net: Denoiser) -> None:
    """Forget what was counted and measured so far; the arguments as of `report`."""
    meter.count = 0
    for stopwatch in (meter.stopwatch, correcting):
        if stopwatch is not None:
            stopwatch.reset()
    if isinstance(net, Rejection):
        net.drawn = net.given_up = 0


def uncounted(
    act: Callable[..., None], meter: EvaluationMeter, correcting: Stopwatch | None, net: Denoiser
) -> Callable[..., None]:
    """Return `act` as a function that adds nothing to what is counted and measured; the arguments as of `report`."""

    def quietly(*args: Any) -> None:
        rejection = net if isinstance(net, Rejection) else None
        count, draws = meter.count, (rejection.drawn, rejection.given_up) if rejection else None
        stopwatches = [stopwatch for stopwatch in (meter.stopwatch, correcting) if stopwatch is not None]
        times = [stopwatch.times for stopwatch in stopwatches]
        act(*args)
        meter.count = count
        if rejection:
            rejection.drawn, rejection.given_up = draws
        for stopwatch, before in zip(stopwatches, times, strict=True):
            stopwatch.reset(keep=before)

    return quietly


def report(images: int, seconds: float, meter: EvaluationMeter, correcting: Stopwatch | None, net: Denoiser) -> None:
    """Print what the `images` that all processes have made took. Collective.

    meter       of this process's networks, with a stopwatch if there is `correcting`
    correcting  ran while a discriminator corrected this process's images; None without one
    net         what made the images, perhaps by rejection
    """
    spent = (correcting.seconds, meter.stopwatch.seconds) if correcting else (0.0, 0.0)
    rejection = net if isinstance(net, Rejection) else None
    draws = (rejection.drawn, rejection.given_up) if rejection else (0, 0)
    everything = distributed.all_gather_object((meter.count, *spent, *draws))
    count, extra, plain, drawn, given_up = map(sum, zip(*everything, strict=True))
    print0(
        f"{images} images in {dnnlib.format_time(seconds)}, {images / seconds:.1f} images/s, "
        f"{count / max(images, 1):g} network evaluations per image"
    )
    if plain and not rejection:
        print0(f"Guided sampling took {1 + extra / plain:.2f} times the network time of unguided sampling")
    if drawn:
        print0(f"Drew {drawn} images, of which the discriminator accepted {(images - given_up) / drawn:.0%}")
    warn_of_given_up(given_up)
