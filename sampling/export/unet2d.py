"""ADM's U-Net as a `UNet2DModel` of diffusers, parameter by parameter. No other architecture of ours has a counterpart.

`UNet2DModel` has neither the scaled residual sums of DDPM++ and NCSN++ nor their label before the embedding's layers.
"""

from __future__ import annotations

from typing import Any

import torch

from training.networks import DhariwalUNet, EDMPrecond, GroupNorm, UNetBlock

__all__ = ["unet2d_config", "unet2d_state"]

HEAD = 64  # channels of an attention head of ADM


def unet2d_config(net: torch.nn.Module) -> dict[str, Any] | None:
    """Return the arguments of the `UNet2DModel` that computes the same as the U-Net of a denoiser, or None.

    It takes c_in x and c_noise. Its last class, beyond those of the network, means no class. None where the
    preconditioning is not EDM's, or the U-Net not ADM's with multiples of 64 channels, at least 128.
    """
    unet = net.model
    if type(net) is not EDMPrecond or type(unet) is not DhariwalUNet:
        return None
    first = [unet.enc[f"{level}_block0"] for level in unet.levels]
    widths = [block.out_channels for block in first]
    groups = {module.num_groups for module in unet.modules() if isinstance(module, GroupNorm)}
    attending = [block for block in unet.modules() if isinstance(block, UNetBlock) and block.num_heads]
    embedding = unet.map_layer0
    if (
        len(groups) > 1
        or any(block.num_heads * HEAD != block.out_channels for block in attending)
        or not unet.dec[f"{unet.levels[-1]}_in0"].num_heads
        or embedding.in_features != widths[0]
    ):
        return None
    down = ["AttnDownBlock2D" if block.num_heads else "ResnetDownsampleBlock2D" for block in first]
    return dict(
        sample_size=net.img_resolution,
        in_channels=net.img_channels,
        out_channels=net.img_channels,
        time_embedding_dim=embedding.out_features,
        down_block_types=down,
        up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
        block_out_channels=widths,
        layers_per_block=unet.num_blocks,
        downsample_type="resnet",
        upsample_type="resnet",
        attention_head_dim=HEAD,
        norm_num_groups=min(groups),
        attn_norm_num_groups=min(groups),  # without it, the attention in the middle has no norm
        norm_eps=1e-5,
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=net.label_dim + 1 if net.label_dim else None,
    )


def unet2d_state(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters of that `UNet2DModel`, by its names."""
    unet, state = net.model, {}

    def put(name: str, layer: torch.nn.Module) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = layer.weight, layer.bias

    def put_block(name: str, block: UNetBlock) -> None:
        for theirs, ours in (("norm1", "norm0"), ("conv1", "conv0"), ("norm2", "norm1"), ("conv2", "conv1")):
            put(f"{name}.{theirs}", getattr(block, ours))
        put(f"{name}.time_emb_proj", block.affine)
        if block.skip is not None and block.skip.weight is not None:
            put(f"{name}.conv_shortcut", block.skip)

    def put_attention(name: str, block: UNetBlock) -> None:
        put(f"{name}.group_norm", block.norm2)
        c = block.out_channels  # the channels of qkv are [heads, channels per head, 3]
        parts = block.qkv.weight.reshape(c, 3, c).unbind(1), block.qkv.bias.reshape(c, 3).unbind(1)
        for letter, weight, bias in zip("qkv", *parts, strict=True):
            state[f"{name}.to_{letter}.weight"], state[f"{name}.to_{letter}.bias"] = weight, bias
        state[f"{name}.to_out.0.weight"], state[f"{name}.to_out.0.bias"] = block.proj.weight.flatten(1), block.proj.bias

    def put_level(name: str, blocks: list[UNetBlock]) -> None:
        for i, block in enumerate(blocks):
            put_block(f"{name}.resnets.{i}", block)
            if block.num_heads:
                put_attention(f"{name}.attentions.{i}", block)

    put("conv_in", unet.enc[f"{unet.levels[0]}_conv"])
    put("time_embedding.linear_1", unet.map_layer0)
    put("time_embedding.linear_2", unet.map_layer1)
    if net.label_dim:
        rows = unet.map_label.weight.t()
        state["class_embedding.weight"] = torch.cat([rows, torch.zeros_like(rows[:1])])
    n, last = unet.num_blocks, len(unet.levels) - 1
    for i, level in enumerate(unet.levels):
        put_level(f"down_blocks.{i}", [unet.enc[f"{level}_block{j}"] for j in range(n)])
        put_level(f"up_blocks.{last - i}", [unet.dec[f"{level}_block{j}"] for j in range(n + 1)])
        if i > 0:
            put_block(f"down_blocks.{i - 1}.downsamplers.0", unet.enc[f"{level}_down"])
        if i < last:
            put_block(f"up_blocks.{last - i - 1}.upsamplers.0", unet.dec[f"{level}_up"])
    put_level("mid_block", [unet.dec[f"{unet.levels[-1]}_in{j}"] for j in range(2)])
    put("conv_norm_out", unet.out_norm)
    put("conv_out", unet.out_conv)
    return state
