"""How a network runs while it samples: the precision of its arithmetic, its memory layout, compilation."""

from __future__ import annotations

import torch

__all__ = ["PRECISIONS", "prepare"]

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
LOWER = {"bf16": torch.bfloat16, "fp16": torch.float16}
BRANCH = ("conv0", "conv1", "qkv", "proj")  # the layers of the residual branches: nearly all of a U-Net's arithmetic


def prepare(net: torch.nn.Module, precision: str | None = None, compile: bool = False) -> torch.nn.Module:
    """Make a denoiser or generator on its device ready to sample, in place; returns it.

    precision  None leaves it to the snapshot: float16 on CUDA if it was trained so, else float32. `tf32` lets CUDA
               multiply with ten-bit fractions. `bf16` and `fp16` run convolutions and attention of the residual
               branches so; the sums that the branches add to, norms and embeddings stay float32, as rounding the sums
               is what moves images by more than a grey level.
    compile    torch.compile of the U-Net, for one shape of its input; on CPUs its weights become constants
    """
    device = next(net.parameters()).device
    if precision is not None:
        net.use_fp16 = False  # the snapshot's own choice
    # Without a choice ten-bit products stay off: with them an image would depend on its batch.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision not in (None, "fp32")
    if precision in LOWER:
        # Attention by plain operations would otherwise go back to float32; its softmax adds up in float32 either way.
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
        for name, layer in net.model.named_modules():
            if name.rpartition(".")[2] in BRANCH:
                _lower(layer, LOWER[precision], stays=name.endswith("qkv"))
    if device.type == "cpu" or precision in LOWER:
        net.to(memory_format=torch.channels_last)  # not float32 on CUDA, whose kernels want the other order
    if compile:
        net.model.compile(dynamic=False, options={"freezing": device.type == "cpu"})
    return net


def _lower(layer: torch.nn.Module, dtype: torch.dtype, stays: bool) -> None:
    layer.to(dtype)  # Parameters too, else they were rounded again at every call.
    layer.register_forward_pre_hook(lambda _, args: (args[0].to(dtype), *args[1:]))
    if not stays:
        layer.register_forward_hook(lambda _, args, output: output.float())
