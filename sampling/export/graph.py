"""Write a denoiser as a graph that runs without this program: TorchScript or ONNX. See docs/export.md.

A graph takes x [N,C,H,W], sigma [N] and, for networks with classes, class_labels [N,label_dim], all float32, and
returns D(x; sigma, y) [N,C,H,W]. N is free. A row of zeros means no label.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

import dnnlib
from sampling.schedules import edm_steps, overlap

__all__ = ["TOLERANCE", "write_onnx", "write_torchscript"]

TOLERANCE = 1e-4  # how much the values of a graph may differ from the network's
TRACED, OTHERS = 2, (1, 5)  # images in the batch that is traced; in those that test the graph, too
INPUTS, OUTPUT = ("x", "sigma", "class_labels"), "denoised"
SIGMAS = 0.002, 80.0  # lowest and highest noise level of EDM's sampler


class _Tensors(torch.nn.Module):
    """A denoiser that takes tensors only. They are three, or two without classes."""

    def __init__(self, net: torch.nn.Module):
        super().__init__()
        self.net = net
        self.eval()

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        return self.net(x, sigma, class_labels)


def write_torchscript(net: torch.nn.Module, folder: Path) -> float:
    """Write `model.pt` into a folder, and return how much its values differ from those of the denoiser `net`.

    `net` is on the CPU and in eval mode. UserError: they differ by more than TOLERANCE.
    """
    path = str(folder / "model.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what depends on shapes: the comparison below shows whether it matters
        torch.jit.trace(_Tensors(net), _inputs(net, TRACED), check_trace=False).save(path)
        with torch.jit.optimized_execution(False):  # optimizing takes far longer than these few images
            return _compare(net, torch.jit.load(path))


def write_onnx(net: torch.nn.Module, folder: Path) -> float:
    """Write `model.onnx` into a folder, and return how much its values differ from those of the denoiser `net`.

    ONNX Runtime computes them. `net` is on the CPU and in eval mode. UserError: packages are missing, or they differ
    by more than TOLERANCE.
    """
    try:
        import onnx  # noqa: F401  optional dependency, as are the next two
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError:
        raise dnnlib.UserError("ONNX needs three packages: pip install onnx onnxscript onnxruntime") from None
    inputs = _inputs(net, TRACED)
    names = INPUTS[: len(inputs)]
    images = torch.export.Dim("N", min=1, max=1 << 16)
    path = str(folder / "model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it would name packages that nobody needs
        torch.onnx.export(
            _Tensors(net),
            inputs,
            dynamo=True,
            verbose=False,
            input_names=names,
            output_names=[OUTPUT],
            dynamic_shapes={name: {0: images} for name in names},
        ).save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        values = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return torch.from_numpy(session.run([OUTPUT], values)[0])

    return _compare(net, run)


def _inputs(net: torch.nn.Module, n: int) -> tuple[torch.Tensor, ...]:
    """Return noisy images at n noise levels, from the lowest to the highest, each with a class, the last with none."""
    generator = torch.Generator().manual_seed(n)
    sigma = net.round_sigma(edm_steps(n, *overlap(net, *SIGMAS), 7)).float().flip(0)
    x = torch.randn(n, net.img_channels, net.img_resolution, net.img_resolution, generator=generator)
    x = x * (sigma.square() + 0.25).sqrt().reshape(-1, 1, 1, 1)
    if not net.label_dim:
        return x, sigma
    labels = torch.eye(net.label_dim)[torch.arange(n) % net.label_dim]
    labels[-1] = 0
    return x, sigma, labels


@torch.no_grad()
def _compare(net: torch.nn.Module, graph: Callable[..., torch.Tensor]) -> float:
    """Return the largest difference between a graph and its network. UserError: it is above TOLERANCE."""
    batches = [_inputs(net, n) for n in (TRACED, *OTHERS)]
    difference = max(float((graph(*inputs) - net(*inputs)).abs().max()) for inputs in batches)
    if not difference <= TOLERANCE:
        raise dnnlib.UserError(f"the graph differs from the network by {difference:.1e}, more than {TOLERANCE:g}")
    return difference
