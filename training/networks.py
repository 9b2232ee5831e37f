"""U-Nets and preconditioned denoisers D(x; sigma, y) (Karras et al. 2022, Table 1 and appendix C; docs/methods/edm.md).

Snapshots carry the source of this file, and other programs run it, some of them on older versions of Python. So the
file imports only torch, NumPy and `persistent_class`. Its classes, constructor arguments, parameters and buffers have
the names that the published checkpoints use.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from torch_utils.persistence import persistent_class

__all__ = [
    "EMBEDDINGS",
    "Conv2d",
    "DhariwalUNet",
    "EDMPrecond",
    "FourierEmbedding",
    "GroupNorm",
    "Linear",
    "PositionalEmbedding",
    "SongUNet",
    "UNetBlock",
    "VEPrecond",
    "VPPrecond",
    "edm_coefs",
    "iDDPMPrecond",
    "ve_coefs",
    "vp_coefs",
    "vp_sigma",
    "vp_sigma_inv",
]

# ---------------------------------------------------------------------------------------------------------------------
# Layers


def _initial(shape: Sequence[int], mode: str, fan_in: int, fan_out: int) -> torch.Tensor:
    # The variance is 2/(fan_in + fan_out) (Glorot and Bengio 2010) or 1/fan_in (He et al. 2015, without ReLU's gain).
    scheme, _, distribution = mode.partition("_")
    if scheme not in ("xavier", "kaiming") or distribution not in ("uniform", "normal"):
        raise ValueError(f"init_mode={mode!r}: must be xavier or kaiming, then _uniform or _normal")
    std = (2 / (fan_in + fan_out)) ** 0.5 if scheme == "xavier" else (1 / fan_in) ** 0.5
    return torch.randn(*shape) * std if distribution == "normal" else (torch.rand(*shape) * 2 - 1) * (3**0.5 * std)


def _divisor(n: int, limit: int) -> int:
    # Return the largest divisor of n up to `limit`. For published widths this is `limit` itself.
    return max(d for d in range(1, limit + 1) if n % d == 0)


def _like(parameter: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    # Parameters are stored in float32. Where activations have half precision, each layer casts its parameters to it.
    return None if parameter is None else parameter.to(x.dtype)


def _dropout(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    # Ordinary dropout (Srivastava et al. 2014), with p rounded to the nearest 2^-16. On a CPU PyTorch draws 64 random
    # bits per element, one element after the other, which takes a third of a small network's forward pass. 16 bits are
    # enough. Compiled networks keep PyTorch's dropout, which the compiler fuses with other operations.
    dropped = round(p * 2**16)
    if not training or not 0 < dropped < 2**16 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[: x.numel()]
    kept = (bits >= dropped - 2**15).as_strided(x.shape, torch.empty_like(x).stride())
    return x * (kept * (2**16 / (2**16 - dropped))).to(x.dtype)


@persistent_class
class Linear(torch.nn.Module):
    """Affine map [..., in_features] -> [..., out_features].

    The gains `init_weight` and `init_bias` multiply the initial values that `init_mode` describes.
    """

    def __init__(self,
        in_features: int,
        out_features: int,
        bias: bool          = True,
        init_mode: str      = "kaiming_normal",     # xavier or kaiming, followed by _uniform or _normal
        init_weight: float  = 1,                    # gain of the initial weight
        init_bias: float    = 0,                    # gain of the initial bias
    ):  # fmt: skip
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        fans = dict(mode=init_mode, fan_in=in_features, fan_out=out_features)
        self.weight = torch.nn.Parameter(init_weight * _initial([out_features, in_features], **fans))
        self.bias = torch.nn.Parameter(init_bias * _initial([out_features], **fans)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, _like(self.weight, x), _like(self.bias, x))


@persistent_class
class Conv2d(torch.nn.Module):
    """Convolution with padding kernel//2 and optional resampling by 2, [N,C_in,H,W] -> [N,C_out,H',W'].

    With `up` or `down` the layer doubles or halves the image, filters each channel with f f^T / sum(f)^2, and then
    convolves. With `fused_resample` filter and convolution share their padding, and `down` convolves first. With
    `kernel` 0 the layer only resamples.
    """

    def __init__(self,
        in_channels: int,
        out_channels: int,
        kernel: int,                                # width of the kernel; 0: no convolution
        bias: bool                      = True,
        up: bool                        = False,
        down: bool                      = False,
        resample_filter: Sequence[float] = (1, 1),  # f, one axis of the low-pass filter
        fused_resample: bool            = False,
        init_mode: str                  = "kaiming_normal",
        init_weight: float              = 1,        # gain of the initial weight
        init_bias: float                = 0,        # gain of the initial bias
    ):  # fmt: skip
        super().__init__()
        if up and down:
            raise ValueError("up and down: a convolution cannot do both")
        self.in_channels, self.out_channels, self.kernel = in_channels, out_channels, kernel
        self.up, self.down, self.fused_resample = up, down, fused_resample
        fans = dict(mode=init_mode, fan_in=in_channels * kernel**2, fan_out=out_channels * kernel**2)
        self.weight = self.bias = None
        if kernel:
            shape = [out_channels, in_channels, kernel, kernel]
            self.weight = torch.nn.Parameter(init_weight * _initial(shape, **fans))
            self.bias = torch.nn.Parameter(init_bias * _initial([out_channels], **fans)) if bias else None
        f = torch.as_tensor(list(resample_filter), dtype=torch.float32)
        self.filter_padding = (len(f) - 1) // 2
        self.box_filter = len(f) == 2 and bool(f[0] == f[1])
        self.register_buffer("resample_filter", f.outer(f)[None, None] / f.sum() ** 2 if up or down else None)

    def _filter_up(self, x: torch.Tensor, padding: int) -> torch.Tensor:
        # The transposed convolution puts zeros between the pixels. The factor 4 makes up for them.
        f = _like(4 * self.resample_filter, x).expand(x.shape[1], -1, -1, -1)
        return F.conv_transpose2d(x, f, groups=x.shape[1], stride=2, padding=padding)

    def _filter_down(self, x: torch.Tensor, padding: int) -> torch.Tensor:
        f = _like(self.resample_filter, x).expand(x.shape[1], -1, -1, -1)
        return F.conv2d(x, f, groups=x.shape[1], stride=2, padding=padding)

    def _resample(self, x: torch.Tensor) -> torch.Tensor:
        if self.up:  # The box filter repeats pixels or averages 2x2 of them. These calls are far cheaper than a filter.
            return F.interpolate(x, scale_factor=2.0) if self.box_filter else self._filter_up(x, self.filter_padding)
        if self.down:
            return F.avg_pool2d(x, 2) if self.box_filter else self._filter_down(x, self.filter_padding)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight is None:
            return self._resample(x)
        w, b, padding = _like(self.weight, x), _like(self.bias, x), self.kernel // 2
        if self.up and self.fused_resample:
            x = self._filter_up(x, max(self.filter_padding - padding, 0))
            return F.conv2d(x, w, b, padding=max(padding - self.filter_padding, 0))
        if self.down and self.fused_resample:
            # The filter sums to 1 and adds no padding here, so it leaves the bias as it is.
            return self._filter_down(F.conv2d(x, w, b, padding=padding + self.filter_padding), 0)
        if self.up and self.box_filter and self.kernel == 1:
            return self._resample(F.conv2d(x, w, b))  # Repeating comes last, so there are fewer pixels to convolve.
        return F.conv2d(self._resample(x), w, b, padding=padding)


@persistent_class
class GroupNorm(torch.nn.Module):
    """Group normalization of [N,C,...] (Wu and He 2018) with min(num_groups, C // min_channels_per_group) groups.

    If this number does not divide C, the layer takes the next smaller number that does.
    """

    def __init__(self, num_channels: int, num_groups: int = 32, min_channels_per_group: int = 4, eps: float = 1e-5):
        super().__init__()
        self.num_groups = _divisor(num_channels, max(min(num_groups, num_channels // min_channels_per_group), 1))
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(num_channels))
        self.bias = torch.nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x, self.num_groups, _like(self.weight, x), _like(self.bias, x), self.eps)


def _half(num_channels: int) -> int:
    # Embeddings consist of as many cosines as sines.
    if num_channels % 2 or num_channels < 2:
        raise ValueError(f"{num_channels} channels: the embedding of noise levels or times needs an even number")
    return num_channels // 2


@persistent_class
class PositionalEmbedding(torch.nn.Module):
    """Sinusoids of [N] numbers, [N,num_channels] = [cos, sin](x max_positions^(-k/K)) (Vaswani et al. 2017).

    k runs from 0 to num_channels/2 - 1. K is num_channels/2. With `endpoint` K is one less, which makes 1/max_positions
    the lowest frequency.
    """

    def __init__(self, num_channels: int, max_positions: float = 10000, endpoint: bool = False):
        super().__init__()
        half = _half(num_channels)
        k = torch.arange(half, dtype=torch.float32) / max(half - bool(endpoint), 1)
        self.register_buffer("freqs", (1 / max_positions) ** k, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = x[:, None] * self.freqs
        return torch.cat([angles.cos(), angles.sin()], dim=1)


@persistent_class
class FourierEmbedding(torch.nn.Module):
    """Random Fourier features of [N] numbers, [N,num_channels] = [cos, sin](2 pi freqs x) (Tancik et al. 2020)."""

    def __init__(self, num_channels: int, scale: float = 16):
        super().__init__()
        self.register_buffer("freqs", torch.randn(_half(num_channels)) * scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = x[:, None] * (2 * np.pi * self.freqs)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


EMBEDDINGS = {  # embedding_type: the embedding of noise levels or times, given its width
    "positional": lambda num_channels: PositionalEmbedding(num_channels, endpoint=True),
    "fourier": FourierEmbedding,
}


@persistent_class
class UNetBlock(torch.nn.Module):
    """Residual block that receives an embedding, with optional resampling and self-attention.

    [N,in_channels,H,W], [N or 1,emb_channels] -> [N,out_channels,H',W']. The block passes `norm_inputs` to its norms,
    which subclasses may replace by norms that use them.
    """

    def __init__(self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        up: bool                        = False,
        down: bool                      = False,
        attention: bool                 = False,
        num_heads: int | None           = None,     # None: out_channels // channels_per_head; 0: no attention at all
        channels_per_head: int          = 64,
        dropout: float                  = 0,
        skip_scale: float               = 1,        # multiplies every residual sum
        eps: float                      = 1e-5,     # eps of the group norms
        resample_filter: Sequence[float] = (1, 1),  # one axis of the low-pass filter
        resample_proj: bool             = False,    # give every resampled skip a 1x1 convolution
        adaptive_scale: bool            = True,     # the embedding scales and shifts; False: it shifts only
        init: dict | None               = None,     # initialization of most layers
        init_zero: dict | None          = None,     # initialization of conv1 and proj; None: zero
        init_attn: dict | None          = None,     # initialization of qkv; None: the same as `init`
    ):  # fmt: skip
        super().__init__()
        init = init or {}
        init_zero = dict(init_weight=0) if init_zero is None else init_zero
        self.out_channels, self.dropout = out_channels, dropout
        self.skip_scale, self.adaptive_scale = skip_scale, adaptive_scale
        if num_heads is None:
            num_heads = out_channels // channels_per_head and _divisor(out_channels, out_channels // channels_per_head)
        self.num_heads = num_heads if attention else 0
        resampling = dict(up=up, down=down, resample_filter=resample_filter)

        self.norm0 = GroupNorm(in_channels, eps=eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, **resampling, **init)
        self.affine = Linear(emb_channels, out_channels * (2 if adaptive_scale else 1), **init)
        self.norm1 = GroupNorm(out_channels, eps=eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3, **init_zero)
        self.skip = None
        if in_channels != out_channels or up or down:
            kernel = 1 if resample_proj or in_channels != out_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel, **resampling, **init)
        if self.num_heads:
            self.norm2 = GroupNorm(out_channels, eps=eps)
            self.qkv = Conv2d(out_channels, out_channels * 3, 1, **(init if init_attn is None else init_attn))
            self.proj = Conv2d(out_channels, out_channels, 1, **init_zero)

    def forward(self, x: torch.Tensor, emb: torch.Tensor, *norm_inputs: torch.Tensor) -> torch.Tensor:
        h = self.conv0(F.silu(self.norm0(x, *norm_inputs)))
        p = self.affine(emb)[:, :, None, None].to(h.dtype)
        if self.adaptive_scale:
            scale, shift = p.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm1(h, *norm_inputs), scale + 1))
        else:
            h = F.silu(self.norm1(h + p, *norm_inputs))
        h = self.conv1(_dropout(h, self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
        if self.num_heads:
            x = (self.proj(self._attend(self.norm2(x, *norm_inputs))) + x) * self.skip_scale
        return x

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        # Published weights lay out the channels of qkv as [heads, channels per head, 3]. PyTorch computes the softmax
        # in float32 for every input type, in its fused kernels and (2.5 and newer) in the plain operations as well.
        n, c, height, width = x.shape
        qkv = self.qkv(x).reshape(n, self.num_heads, c // self.num_heads, 3, height * width)
        q, k, v = (part.transpose(-1, -2) for part in qkv.unbind(3))
        if x.is_cuda:  # The fused kernels need the channels of each pixel to be adjacent in memory.
            q, k, v = (part.contiguous() for part in (q, k, v))
        a = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(n, c, height, width)
        # With one head the output is channels-last, and all later layers would follow. So restore the input's layout.
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        return a.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


# ---------------------------------------------------------------------------------------------------------------------
# U-Nets


@persistent_class
class UNet(torch.nn.Module):
    """Base class of the U-Nets: encoder `enc` and decoder `dec`.

    Each level of the encoder has half the resolution of the level before. The name of a level is its resolution, such
    as '32x32'. Subclasses define two methods: `_embed(noise_labels, class_labels, augment_labels)` returns the
    embedding that all blocks receive, and `_output(name, x, total)` adds a level's output to the image `total`.
    """

    def __init__(
        self,
        img_resolution: int,  # height and width in pixels
        in_channels: int,
        stem_channels: int,  # width of the first convolution
        widths: Sequence[int],  # width of each level
        num_blocks: int,  # residual blocks per level; the decoder has one more
        attn_resolutions: Sequence[int],  # resolutions with self-attention
        attn_in_all_decoder_blocks: bool,  # False: only in the last block of a level
        label_dropout: float,  # how often the training objective drops a class label; the network only records it
        stem: dict,  # further arguments of the first convolution
        block: dict,  # further arguments of all blocks
    ):
        super().__init__()
        resolutions = [img_resolution >> level for level in range(len(widths))]
        if not resolutions or resolutions[-1] < 1:
            raise ValueError(f"channel_mult: {len(widths)} levels do not fit images of {img_resolution} pixels")
        if min(widths) < 1:
            raise ValueError("channel_mult: every level needs at least one channel")
        self.levels = [f"{res}x{res}" for res in resolutions]
        self.num_blocks, self.label_dropout = num_blocks, label_dropout
        plan = [(self.levels[level], widths[level], res in attn_resolutions) for level, res in enumerate(resolutions)]

        self.enc = torch.nn.ModuleDict()
        channels, skips = stem_channels, [stem_channels]
        self.enc[f"{self.levels[0]}_conv"] = Conv2d(in_channels, channels, 3, **stem)
        for level, (name, width, attention) in enumerate(plan):
            if level > 0:
                self.enc[f"{name}_down"] = self._block(channels, channels, down=True, **block)
                skips.append(channels)
            for i in range(num_blocks):
                self.enc[f"{name}_block{i}"] = self._block(channels, width, attention=attention, **block)
                channels = width
                skips.append(channels)

        self.dec = torch.nn.ModuleDict()
        self.dec[f"{self.levels[-1]}_in0"] = self._block(channels, channels, attention=True, **block)
        self.dec[f"{self.levels[-1]}_in1"] = self._block(channels, channels, **block)
        for level, (name, width, attention) in reversed(list(enumerate(plan))):
            if level < len(plan) - 1:
                self.dec[f"{name}_up"] = self._block(channels, channels, up=True, **block)
            for i in range(num_blocks + 1):
                attend = attention and (attn_in_all_decoder_blocks or i == num_blocks)
                self.dec[f"{name}_block{i}"] = self._block(channels + skips.pop(), width, attention=attend, **block)
                channels = width

    def _block(self, in_channels: int, out_channels: int, **kwargs) -> UNetBlock:
        # Subclasses override this method to build other blocks.
        return UNetBlock(in_channels, out_channels, **kwargs)

    def _join_input(self, name: str, x: torch.Tensor, aux: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Subclasses with a second path `aux` of the input add it to x here, once per level, after the halving.
        return x, aux

    def forward(
        self,
        x: torch.Tensor,
        noise_labels: torch.Tensor,
        class_labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return F(x; c_noise, y), [N,out_channels,H,W].

        x [N,in_channels,H,W], noise_labels [N or 1], class_labels [N or 1,label_dim] or None.
        """
        emb = self._embed(noise_labels, class_labels, augment_labels)
        aux, skips = x, []
        for name in self.levels:
            if name == self.levels[0]:
                x = self.enc[f"{name}_conv"](x)
            else:
                x, aux = self._join_input(name, self.enc[f"{name}_down"](x, emb), aux)
            skips.append(x)
            for i in range(self.num_blocks):
                x = self.enc[f"{name}_block{i}"](x, emb)
                skips.append(x)

        total = None
        for name in reversed(self.levels):
            if name == self.levels[-1]:
                x = self.dec[f"{name}_in1"](self.dec[f"{name}_in0"](x, emb), emb)
            else:
                x = self.dec[f"{name}_up"](x, emb)
            for i in range(self.num_blocks + 1):
                x = self.dec[f"{name}_block{i}"](torch.cat([x, skips.pop()], dim=1), emb)
            total = self._output(name, x, total)  # The last level completes the image.
        return total


@persistent_class
class SongUNet(UNet):
    """DDPM++ and NCSN++ (Song et al. 2021, appendix H). The defaults are those of DDPM++."""

    def __init__(self,
        img_resolution: int,                            # height and width in pixels
        in_channels: int,
        out_channels: int,
        label_dim: int                  = 0,            # width of the class label vector; 0: unconditional
        augment_dim: int                = 0,            # width of the augmentation label vector; 0: none
        model_channels: int             = 128,          # width of the first convolution
        channel_mult: Sequence[int]     = (1, 2, 2, 2), # width of each level, in multiples of model_channels
        channel_mult_emb: int           = 4,            # width of the embedding, in multiples of model_channels
        num_blocks: int                 = 4,            # residual blocks per level
        attn_resolutions: Sequence[int] = (16,),        # resolutions with self-attention
        dropout: float                  = 0.10,         # dropout probability in the blocks
        label_dropout: float            = 0,            # how often training drops a class label, for the record
        embedding_type: str             = "positional", # noise embedding: positional (DDPM++), fourier (NCSN++)
        channel_mult_noise: int         = 1,            # its width in multiples of model_channels: 1, 2 (NCSN++)
        encoder_type: str               = "standard",   # standard (DDPM++), residual (NCSN++), skip
        decoder_type: str               = "standard",   # standard, skip
        resample_filter: Sequence[float] = (1, 1),      # [1,1] (DDPM++), [1,3,3,1] (NCSN++)
    ):  # fmt: skip
        for option, value, known in (
            ("embedding_type", embedding_type, EMBEDDINGS),
            ("encoder_type", encoder_type, ("standard", "residual", "skip")),
            ("decoder_type", decoder_type, ("standard", "skip")),
        ):
            if value not in known:
                raise ValueError(f"{option}={value!r}: must be one of {', '.join(known)}")
        init = dict(init_mode="xavier_uniform")
        init_zero = dict(init_mode="xavier_uniform", init_weight=1e-5)
        init_attn = dict(init_mode="xavier_uniform", init_weight=0.2**0.5)
        emb_channels, noise_channels = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        widths = [model_channels * mult for mult in channel_mult]
        super().__init__(
            img_resolution,
            in_channels,
            stem_channels=model_channels,
            widths=widths,
            num_blocks=num_blocks,
            attn_resolutions=attn_resolutions,
            attn_in_all_decoder_blocks=False,
            label_dropout=label_dropout,
            stem=init,
            block=dict(
                emb_channels=emb_channels,
                num_heads=1,
                dropout=dropout,
                skip_scale=0.5**0.5,
                eps=1e-6,
                resample_filter=resample_filter,
                resample_proj=True,
                adaptive_scale=False,
                init=init,
                init_zero=init_zero,
                init_attn=init_attn,
            ),
        )
        self.encoder_type, self.decoder_type = encoder_type, decoder_type
        self.label_scale = label_dim**0.5

        self.map_noise = EMBEDDINGS[embedding_type](noise_channels)
        self.map_label = Linear(label_dim, noise_channels, **init) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False, **init) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels, **init)
        self.map_layer1 = Linear(emb_channels, emb_channels, **init)

        aux_down = dict(down=True, resample_filter=resample_filter)
        aux_channels = in_channels
        for name in self.levels[1:]:
            width = self.enc[f"{name}_down"].out_channels
            if encoder_type == "skip":
                self.enc[f"{name}_aux_down"] = Conv2d(in_channels, in_channels, 0, **aux_down)
                self.enc[f"{name}_aux_skip"] = Conv2d(in_channels, width, 1, **init)
            if encoder_type == "residual":
                self.enc[f"{name}_aux_residual"] = Conv2d(
                    aux_channels, width, 3, **aux_down, fused_resample=True, **init
                )
                aux_channels = width
        aux_up = dict(up=True, resample_filter=resample_filter)
        for level, name in enumerate(self.levels):
            if decoder_type == "skip" and name != self.levels[-1]:
                self.dec[f"{name}_aux_up"] = Conv2d(out_channels, out_channels, 0, **aux_up)
            if decoder_type == "skip" or name == self.levels[0]:
                self.dec[f"{name}_aux_norm"] = GroupNorm(widths[level], eps=1e-6)
                self.dec[f"{name}_aux_conv"] = Conv2d(widths[level], out_channels, 3, **init_zero)

    def _embed(self, noise_labels, class_labels, augment_labels) -> torch.Tensor:
        emb = self.map_noise(noise_labels)
        emb = emb.roll(emb.shape[1] // 2, dims=1)  # Published weights expect [sin, cos].
        if self.map_label is not None and class_labels is not None:
            emb = emb + self.map_label(class_labels * self.label_scale)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def _join_input(self, name: str, x: torch.Tensor, aux: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.encoder_type == "skip":
            aux = self.enc[f"{name}_aux_down"](aux)
            return x + self.enc[f"{name}_aux_skip"](aux), aux
        if self.encoder_type == "residual":
            x = (x + self.enc[f"{name}_aux_residual"](aux)) * 0.5**0.5
            return x, x
        return x, aux

    def _output(self, name: str, x: torch.Tensor, total: torch.Tensor | None) -> torch.Tensor | None:
        if self.decoder_type != "skip" and name != self.levels[0]:
            return None
        image = self.dec[f"{name}_aux_conv"](F.silu(self.dec[f"{name}_aux_norm"](x)))
        return image if total is None else image + self.dec[f"{name}_aux_up"](total)


@persistent_class
class DhariwalUNet(UNet):
    """ADM (Dhariwal and Nichol 2021, section 3)."""

    def __init__(self,
        img_resolution: int,                            # height and width in pixels
        in_channels: int,
        out_channels: int,
        label_dim: int                  = 0,            # width of the class label vector; 0: unconditional
        augment_dim: int                = 0,            # width of the augmentation label vector; 0: none
        model_channels: int             = 192,          # unit of all widths
        channel_mult: Sequence[int]     = (1, 2, 3, 4), # width of each level, in multiples of model_channels
        channel_mult_emb: int           = 4,            # width of the embedding, in multiples of model_channels
        num_blocks: int                 = 3,            # residual blocks per level
        attn_resolutions: Sequence[int] = (32, 16, 8),  # resolutions with self-attention
        dropout: float                  = 0.10,         # dropout probability in the blocks
        label_dropout: float            = 0,            # how often training drops a class label, for the record
    ):  # fmt: skip
        gain = (1 / 3) ** 0.5
        init = dict(init_mode="kaiming_uniform", init_weight=gain, init_bias=gain)
        init_zero = dict(init_mode="kaiming_uniform", init_weight=0)
        emb_channels = model_channels * channel_mult_emb
        widths = [model_channels * mult for mult in channel_mult]
        super().__init__(
            img_resolution,
            in_channels,
            stem_channels=widths[0],
            widths=widths,
            num_blocks=num_blocks,
            attn_resolutions=attn_resolutions,
            attn_in_all_decoder_blocks=True,
            label_dropout=label_dropout,
            stem=init,
            block=dict(emb_channels=emb_channels, dropout=dropout, init=init, init_zero=init_zero),
        )

        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = Linear(augment_dim, model_channels, bias=False, **init_zero) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels, **init)
        self.map_layer1 = Linear(emb_channels, emb_channels, **init)
        init_label = dict(init_mode="kaiming_normal", init_weight=label_dim**0.5)
        self.map_label = Linear(label_dim, emb_channels, bias=False, **init_label) if label_dim else None
        self.out_norm = GroupNorm(widths[0])
        self.out_conv = Conv2d(widths[0], out_channels, 3, **init_zero)

    def _embed(self, noise_labels, class_labels, augment_labels) -> torch.Tensor:
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None and class_labels is not None:
            emb = emb + self.map_label(class_labels)
        return F.silu(emb)

    def _output(self, name: str, x: torch.Tensor, total: torch.Tensor | None) -> torch.Tensor | None:
        return self.out_conv(F.silu(self.out_norm(x))) if name == self.levels[0] else None


MODELS = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}

# ---------------------------------------------------------------------------------------------------------------------
# Preconditioning: sigma -> (c_skip, c_out, c_in, c_noise), each in the shape of sigma (Karras et al. 2022, Table 1)


def vp_sigma(t: torch.Tensor, beta_d: float = 19.9, beta_min: float = 0.1) -> torch.Tensor:
    """Return the noise level at time t of the variance-preserving process, sqrt(exp(beta_d t^2/2 + beta_min t) - 1)."""
    # In float32, exp() - 1 is wrong by several percent at the lowest noise levels; expm1() is not.
    return (0.5 * beta_d * t**2 + beta_min * t).expm1().sqrt()


def vp_sigma_inv(sigma: torch.Tensor, beta_d: float = 19.9, beta_min: float = 0.1) -> torch.Tensor:
    """Return the time at which the variance-preserving process has noise level sigma, the inverse of `vp_sigma`."""
    return ((beta_min**2 + 2 * beta_d * (sigma**2).log1p()).sqrt() - beta_min) / beta_d


def vp_coefs(
    sigma: torch.Tensor, beta_d: float = 19.9, beta_min: float = 0.1, M: int = 1000
) -> tuple[torch.Tensor, ...]:
    """Return the coefficients of the variance-preserving denoiser; c_noise is the time in steps of 1/(M-1)."""
    return torch.ones_like(sigma), -sigma, (sigma**2 + 1).rsqrt(), (M - 1) * vp_sigma_inv(sigma, beta_d, beta_min)


def ve_coefs(sigma: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the coefficients of the variance-exploding denoiser."""
    one = torch.ones_like(sigma)
    return one, sigma, one, (0.5 * sigma).log()


def edm_coefs(sigma: torch.Tensor, sigma_data: float = 0.5) -> tuple[torch.Tensor, ...]:
    """Return the coefficients that give the network's input and training target unit variance.

    `sigma_data` is the standard deviation of the data.
    """
    c_in = (sigma**2 + sigma_data**2).rsqrt()
    return (sigma_data * c_in) ** 2, sigma * sigma_data * c_in, c_in, sigma.log() / 4


@persistent_class
class Precond(torch.nn.Module):
    """Denoiser D(x; sigma, y) = c_skip x + c_out F(c_in x; c_noise, y) around a U-Net F (Karras et al. 2022, Eq. 7).

    Subclasses define `coefs(sigma)` and pass on the range of noise levels, `sigma_min` to `sigma_max`, that they are
    made for.
    """

    def __init__(
        self,
        img_resolution: int,  # height and width in pixels
        img_channels: int,
        label_dim: int,  # number of classes; 0: unconditional
        use_fp16: bool,  # run the U-Net in float16 on CUDA
        sigma_min: float,  # lowest noise level
        sigma_max: float,  # highest noise level
        model_type: str,  # SongUNet, DhariwalUNet
        model_kwargs: dict,  # further arguments of the U-Net
        out_channels: int | None = None,  # of the U-Net; None: img_channels
    ):
        super().__init__()
        if model_type not in MODELS:
            raise ValueError(f"model_type={model_type!r}: must be one of {', '.join(MODELS)}")
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.use_fp16, self.sigma_min, self.sigma_max = use_fp16, sigma_min, sigma_max
        self.model = MODELS[model_type](
            img_resolution=img_resolution,
            in_channels=img_channels,
            out_channels=out_channels or img_channels,
            label_dim=label_dim,
            **model_kwargs,
        )

    def round_sigma(self, sigma: torch.Tensor | float) -> torch.Tensor:
        """Return the noise level nearest to sigma that the network knows, here sigma itself."""
        return torch.as_tensor(sigma)

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        force_fp32: bool = False,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the denoised images, float32 [N,C,H,W].

        x: images [N,C,H,W] with noise of standard deviation `sigma`, which is one number or N numbers.
        class_labels: one-hot [N,label_dim], or one row for all images; None means no label, a row of zeros.
        augment_labels: [N,augment_dim]; None means that no image was augmented.
        F runs in float16 with `use_fp16` on CUDA, in autocast's dtype under autocast, and in float32 otherwise or with
        `force_fp32`. Raises ValueError if the labels have another width than `label_dim`.
        """
        if force_fp32 and torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self(x, sigma, class_labels, force_fp32, augment_labels)
        dtype = torch.float16 if self.use_fp16 and not force_fp32 and x.device.type == "cuda" else torch.float32
        x = x.to(torch.float32)
        # type_as() names no device, which a trace would keep; as_tensor() does, even for tensors.
        sigma = sigma if isinstance(sigma, torch.Tensor) else torch.as_tensor(sigma)
        sigma = sigma.type_as(x).reshape(-1, 1, 1, 1)
        if self.label_dim == 0:
            class_labels = None
        elif class_labels is None:
            class_labels = torch.zeros([1, self.label_dim], device=x.device)
        elif class_labels.shape[-1] != self.label_dim:
            raise ValueError(f"class_labels: width {class_labels.shape[-1]}, must be {self.label_dim}")
        else:
            class_labels = class_labels.to(torch.float32).reshape(-1, self.label_dim)
        c_skip, c_out, c_in, c_noise = self.coefs(sigma)
        output = self.model((c_in * x).to(dtype), c_noise.flatten(), class_labels, augment_labels)
        return c_skip * x + c_out * output[:, : self.img_channels].to(torch.float32)


@persistent_class
class VPPrecond(Precond):
    """Denoiser of the variance-preserving process, DDPM in continuous time (Song et al. 2021)."""

    network_kind = "denoiser"

    def __init__(self,
        img_resolution: int,                # height and width in pixels
        img_channels: int,
        label_dim: int      = 0,            # number of classes; 0: unconditional
        use_fp16: bool      = False,        # run the U-Net in float16 on CUDA
        beta_d: float       = 19.9,         # slope of the noise schedule beta(t) = beta_min + beta_d t
        beta_min: float     = 0.1,          # value of the noise schedule at t = 0
        M: int              = 1000,         # time steps of the discrete process
        epsilon_t: float    = 1e-5,         # lowest time
        model_type: str     = "SongUNet",   # SongUNet, DhariwalUNet
        **model_kwargs,                     # further arguments of the U-Net
    ):  # fmt: skip
        low, high = vp_sigma(torch.tensor([epsilon_t, 1], dtype=torch.float64), beta_d, beta_min).tolist()
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, low, high, model_type, model_kwargs)
        self.beta_d, self.beta_min, self.M = beta_d, beta_min, M

    def coefs(self, sigma: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return (c_skip, c_out, c_in, c_noise)."""
        return vp_coefs(sigma, self.beta_d, self.beta_min, self.M)


@persistent_class
class VEPrecond(Precond):
    """Denoiser of the variance-exploding process, score matching in continuous time (Song et al. 2021)."""

    network_kind = "denoiser"

    def __init__(self,
        img_resolution: int,                # height and width in pixels
        img_channels: int,
        label_dim: int      = 0,            # number of classes; 0: unconditional
        use_fp16: bool      = False,        # run the U-Net in float16 on CUDA
        sigma_min: float    = 0.02,         # lowest noise level
        sigma_max: float    = 100,          # highest noise level
        model_type: str     = "SongUNet",   # SongUNet, DhariwalUNet
        **model_kwargs,                     # further arguments of the U-Net
    ):  # fmt: skip
        super().__init__(
            img_resolution, img_channels, label_dim, use_fp16, sigma_min, sigma_max, model_type, model_kwargs
        )

    def coefs(self, sigma: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return (c_skip, c_out, c_in, c_noise)."""
        return ve_coefs(sigma)


@persistent_class
class iDDPMPrecond(Precond):
    """Denoiser of improved DDPM (Nichol and Dhariwal 2021), with M noise levels u_0 > ... > u_{M-1}.

    The network also predicts variances, which the denoiser ignores.
    """

    network_kind = "denoiser"

    def __init__(self,
        img_resolution: int,                    # height and width in pixels
        img_channels: int,
        label_dim: int      = 0,                # number of classes; 0: unconditional
        use_fp16: bool      = False,            # run the U-Net in float16 on CUDA
        C_1: float          = 0.001,            # lower limit of abar(j-1)/abar(j)
        C_2: float          = 0.008,            # shift of the cosine schedule
        M: int              = 1000,             # number of noise levels
        model_type: str     = "DhariwalUNet",   # SongUNet, DhariwalUNet
        **model_kwargs,                         # further arguments of the U-Net
    ):  # fmt: skip
        # Everything is float32, so the levels are rounded as in the training of the published models.
        abar = (0.5 * np.pi * torch.arange(M + 1) / M / (C_2 + 1)).sin() ** 2
        ratio = (abar[:-1] / abar[1:]).clamp(min=C_1)
        u = torch.zeros(M + 1)
        for j in range(M, 0, -1):
            u[j - 1] = ((u[j] ** 2 + 1) / ratio[j - 1] - 1).sqrt()
        super().__init__(
            img_resolution,
            img_channels,
            label_dim,
            use_fp16,
            float(u[M - 1]),
            float(u[0]),
            model_type,
            model_kwargs,
            out_channels=img_channels * 2,
        )
        self.M = M
        self.register_buffer("u", u)

    def _nearest(self, sigma: torch.Tensor) -> torch.Tensor:
        # type_as() also moves to the device of u, and does not name it in a traced graph.
        return (self.u - sigma.type_as(self.u)[..., None]).abs().argmin(dim=-1)

    def round_sigma(self, sigma: torch.Tensor | float) -> torch.Tensor:
        """Return the nearest u_j, in the shape and dtype and on the device of sigma."""
        sigma = torch.as_tensor(sigma)
        return self.u[self._nearest(sigma)].to(sigma.device, sigma.dtype)

    def coefs(self, sigma: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return (c_skip, c_out, c_in, c_noise)."""
        c_skip, c_out, c_in, _ = vp_coefs(sigma)
        return c_skip, c_out, c_in, (self.M - 1 - self._nearest(sigma)).to(torch.float32)


@persistent_class
class EDMPrecond(Precond):
    """Denoiser with the preconditioning that EDM proposes (Karras et al. 2022, section 5)."""

    network_kind = "denoiser"

    def __init__(self,
        img_resolution: int,                    # height and width in pixels
        img_channels: int,
        label_dim: int      = 0,                # number of classes; 0: unconditional
        use_fp16: bool      = False,            # run the U-Net in float16 on CUDA
        sigma_min: float    = 0,                # lowest noise level
        sigma_max: float    = float("inf"),     # highest noise level
        sigma_data: float   = 0.5,              # standard deviation of the training images
        model_type: str     = "DhariwalUNet",   # SongUNet, DhariwalUNet
        **model_kwargs,                         # further arguments of the U-Net
    ):  # fmt: skip
        super().__init__(
            img_resolution, img_channels, label_dim, use_fp16, sigma_min, sigma_max, model_type, model_kwargs
        )
        self.sigma_data = sigma_data

    def coefs(self, sigma: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return (c_skip, c_out, c_in, c_noise)."""
        return edm_coefs(sigma, self.sigma_data)
