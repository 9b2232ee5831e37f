"""Generator and potential of RDUOT and DDGAN, built from the U-Net's layers (Xiao et al., ICLR 2022, appendix C).

See docs/methods/rduot.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import leaky_relu, silu

from torch_utils.persistence import persistent_class
from torch_utils.precision import no_autocast
from training.networks import EMBEDDINGS, Conv2d, GroupNorm, Linear, SongUNet, UNetBlock

__all__ = ["GROUP", "DDGANGenerator", "Potential"]

GROUP = 4  # number of consecutive images that share a minibatch standard deviation
FIR = (1, 3, 3, 1)  # low-pass filter of all resampling layers


class LatentGroupNorm(GroupNorm):
    """Group normalization whose scale and shift are linear functions of the embedded latent [N,latent_channels]."""

    def __init__(self, num_channels: int, latent_channels: int, eps: float):
        super().__init__(num_channels, eps=eps)
        self.weight = self.bias = None
        self.affine = Linear(latent_channels, 2 * num_channels)
        torch.nn.init.ones_(self.affine.bias.data[:num_channels])

    def forward(self, x: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        scale, shift = self.affine(latent)[:, :, None, None].to(x.dtype).chunk(2, dim=1)
        return torch.addcmul(shift, x, scale)


class LatentBlock(UNetBlock):
    """U-Net block whose norms depend on the latent. Its embedding is the pair (embedded time, embedded latent)."""

    def __init__(self, in_channels: int, out_channels: int, *, latent_channels: int, **kwargs):
        super().__init__(in_channels, out_channels, **kwargs)
        for name, norm in list(self.named_children()):
            if isinstance(norm, GroupNorm):
                channels = in_channels if name == "norm0" else out_channels
                setattr(self, name, LatentGroupNorm(channels, latent_channels, norm.eps))

    def forward(self, x: torch.Tensor, emb: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return super().forward(x, *emb)


class LatentUNet(SongUNet):
    """NCSN++ whose blocks also receive a latent: `noise_labels` is the pair (time [N], embedded latent)."""

    def __init__(self, *args, latent_channels: int, **kwargs):
        self.latent_channels = latent_channels  # The base class needs it to build the blocks.
        super().__init__(*args, **kwargs)

    def _block(self, in_channels: int, out_channels: int, **kwargs) -> UNetBlock:
        return LatentBlock(in_channels, out_channels, latent_channels=self.latent_channels, **kwargs)

    def _embed(self, noise_labels, class_labels, augment_labels) -> tuple[torch.Tensor, torch.Tensor]:
        time, latent = noise_labels
        return super()._embed(time, class_labels, augment_labels), latent


@persistent_class(embed_source=False)
class DDGANGenerator(torch.nn.Module):
    """Generator G(x_{t+1}, t, z) -> x_0 (Xiao et al. 2022, Eq. 4).

    It is a U-Net whose group norms depend on the latent z. It records the settings of its diffusion, so its snapshot is
    enough for sampling. Raises ValueError if the resolution cannot be halved for all levels of `channel_mult`.
    """

    network_kind = "generator"

    def __init__(self,
        img_resolution: int,                            # height and width in pixels
        img_channels: int,
        label_dim: int                  = 0,            # number of classes; 0: unconditional
        num_timesteps: int              = 4,            # steps T of the diffusion
        beta_min: float                 = 0.1,          # noise schedule: rate at the start
        beta_max: float                 = 20.0,         # noise schedule: rate at the end
        nz: int                         = 100,          # width of the latent
        z_emb_dim: int                  = 256,          # width of the embedded latent
        n_mlp: int                      = 4,            # layers that embed the latent, besides the first
        model_channels: int             = 128,          # width of the first convolution
        channel_mult: Sequence[int]     = (1, 2, 2, 2), # width of each level, in multiples of model_channels
        num_blocks: int                 = 2,            # residual blocks per level
        attn_resolutions: Sequence[int] = (16,),        # resolutions with self-attention
        dropout: float                  = 0,            # dropout probability in the blocks
        embedding_type: str             = "positional", # time embedding: positional, fourier
        channel_mult_noise: int         = 1,            # its width in multiples of model_channels; published fourier: 2
        geometric: bool                 = False,        # noise schedule: geometric variances in place of VP's
        log_time: bool                  = False,        # embed ln t, as published fourier does; t = 0 counts as 1/2
        centered: bool                  = True,         # False: the U-Net sees 2x - 1 in place of x
        tanh: bool                      = True,         # False: the image is what the U-Net returns
    ):  # fmt: skip
        if img_resolution % 2 ** (len(channel_mult) - 1):
            raise ValueError(
                f"channel_mult: images of {img_resolution} pixels cannot be halved {len(channel_mult) - 1} times"
            )
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim, self.nz = img_resolution, img_channels, label_dim, nz
        self.num_timesteps, self.beta_min, self.beta_max = num_timesteps, beta_min, beta_max
        self.geometric, self.log_time, self.centered, self.tanh = geometric, log_time, centered, tanh
        widths = [nz] + [z_emb_dim] * (n_mlp + 1)
        self.map_latent = torch.nn.ModuleList(Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.model = LatentUNet(
            img_resolution,
            img_channels,
            img_channels,
            label_dim,
            latent_channels=z_emb_dim,
            model_channels=model_channels,
            channel_mult=channel_mult,
            num_blocks=num_blocks,
            attn_resolutions=attn_resolutions,
            dropout=dropout,
            embedding_type=embedding_type,
            channel_mult_noise=channel_mult_noise,
            encoder_type="residual",
            resample_filter=FIR,
        )

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, z: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the clean images x_0, float32 [N,C,H,W], in [-1,1] with `tanh`.

        x: x_{t+1} [N,C,H,W], t: [N] in 0..T-1, z: [N,nz], class_labels: one-hot [N,label_dim].
        """
        latent = z * (z.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()
        for layer in self.map_latent:
            latent = silu(layer(latent))
        labels = class_labels if self.label_dim else None
        time = t.to(torch.float32)
        if self.log_time:
            time = time.clamp(min=0.5).log()  # the published code takes ln 0, which is no number
        image = self.model(x if self.centered else 2 * x - 1, (time, latent), labels).to(torch.float32)
        return image.tanh() if self.tanh else image


class PotentialBlock(torch.nn.Module):
    """Residual block of the potential: [N,C_in,H,W], [N,emb_channels] -> [N,C_out,H',W'].

    With `down` the output has half the size of the input.
    """

    def __init__(self, in_channels: int, out_channels: int, emb_channels: int, down: bool):
        super().__init__()
        resampling = dict(down=down, resample_filter=FIR)
        self.conv0 = Conv2d(in_channels, out_channels, 3)
        self.affine = Linear(emb_channels, out_channels)
        self.conv1 = Conv2d(out_channels, out_channels, 3, **resampling)
        self.skip = Conv2d(in_channels, out_channels, 1, bias=False, **resampling)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = self.conv0(leaky_relu(x, 0.2))
        h = self.conv1(leaky_relu(h + self.affine(emb)[:, :, None, None].to(h.dtype), 0.2))
        return (h + self.skip(x)) * 0.5**0.5


@persistent_class(embed_source=False)
class Potential(torch.nn.Module):
    """Potential D(x_t, t, x_{t+1}) -> one number per image. DDGAN calls it the discriminator.

    It has one block at full size and one for each halving down to 4x4, so the resolution alone decides how many.
    """

    network_kind = "potential"

    def __init__(self,
        img_resolution: int,                    # height and width in pixels
        img_channels: int,
        label_dim: int      = 0,                # number of classes; 0: unconditional
        model_channels: int = 64,               # unit of all widths: 2, 4, 8, 8, ... times this
        embedding_type: str = "positional",     # time embedding: positional, fourier
        t_emb_dim: int      = 0,                # its width; 0: 2 model_channels
        strided: bool       = False,            # how images share their minibatch deviation, see `minibatch_std`
    ):  # fmt: skip
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.strided = strided
        emb = t_emb_dim or 2 * model_channels
        self.map_noise = EMBEDDINGS[embedding_type](emb)
        self.map_label = Linear(label_dim, emb) if label_dim else None
        self.map_layer0, self.map_layer1 = Linear(emb, emb), Linear(emb, emb)
        halvings = max((img_resolution - 1) // 4, 0).bit_length()
        widths = [model_channels * 2 ** min(i + 1, 3) for i in range(halvings + 1)]
        self.stem = Conv2d(2 * img_channels, 2 * model_channels, 1)
        self.blocks = torch.nn.ModuleList(
            PotentialBlock(widths[max(i - 1, 0)], width, emb, down=i > 0) for i, width in enumerate(widths)
        )
        self.conv = Conv2d(widths[-1] + 1, widths[-1], 3)
        self.head = Linear(widths[-1], 1)

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, x_next: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the potential, float32 [N], of x_t and x_{t+1} [N,C,H,W], t [N] in 0..T-1, labels [N,label_dim]."""
        emb = self.map_noise(t.to(torch.float32))
        if self.label_dim:
            emb = emb + self.map_label(class_labels * self.label_dim**0.5)
        emb = leaky_relu(self.map_layer1(leaky_relu(self.map_layer0(emb), 0.2)), 0.2)
        h = self.stem(torch.cat([x, x_next], dim=1))
        for block in self.blocks:
            h = block(h, emb)
        h = leaky_relu(self.conv(torch.cat([h, minibatch_std(h, self.strided).to(h.dtype)], dim=1)), 0.2)
        with no_autocast(h.device):  # 8 bits are too few for a potential
            return self.head(h.sum(dim=[2, 3], dtype=torch.float32)).flatten()


def minibatch_std(x: torch.Tensor, strided: bool = False) -> torch.Tensor:
    """Return the minibatch standard deviation of features [N,C,H,W] as a channel [N,1,H,W] (Karras et al., ICLR 2018,
    section 3).

    It is the standard deviation over `GROUP` consecutive images, averaged over all features. The last group may be
    smaller. If `strided`, the images are sorted by i mod G first, where G is the number of groups: of 8 images, 0, 2, 4
    and 6 are a group, as in the published code.
    """
    if strided:
        groups = -(-len(x) // GROUP)
        order = torch.argsort(torch.arange(len(x), device=x.device) % groups, stable=True)
        return minibatch_std(x[order])[torch.argsort(order)]
    x = x.to(torch.float32)
    whole = len(x) // GROUP * GROUP
    values = []
    for part in (x[:whole], x[whole:]):
        if len(part):
            groups = part.unflatten(0, (-1, min(GROUP, len(part))))
            # This replaces var(), which takes a tenth of a training step on a CPU.
            variance = (groups - groups.mean(dim=1, keepdim=True)).square().mean(dim=1)
            std = (variance + 1e-8).sqrt().mean(dim=[1, 2, 3])
            values.append(std.repeat_interleave(groups.shape[1]))
    return torch.cat(values).reshape(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
