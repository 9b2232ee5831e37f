"""Test generator and potential of DDGAN: sizes, norms that depend on the latent, minibatch deviation, snapshots."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dnnlib import UserError
from torch_utils import persistence
from training.networks import SongUNet
from training.networks_ddgan import DDGANGenerator, LatentGroupNorm, Potential, minibatch_std

SMALL = dict(model_channels=8, z_emb_dim=8, nz=6, n_mlp=1, channel_mult=[1, 2], num_blocks=1)


def shaken(net, seed=0):
    """Move the weights away from their initial values, with which the last layers return nearly nothing."""
    rng = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=rng)
    return net


def inputs(n, size=8, channels=1, labels=0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x, x_next = torch.randn([2, n, channels, size, size], generator=rng)
    onehot = torch.eye(labels)[torch.arange(n) % labels] if labels else None
    return x, torch.arange(n) % 4, x_next, torch.randn([n, SMALL["nz"]], generator=rng), onehot


@pytest.mark.slow
@pytest.mark.parametrize("size, channels", itertools.product([8, 16, 32, 64], [1, 3]))
def test_any_batch_resolution_and_channels(size, channels):
    generator = shaken(DDGANGenerator(size, channels, **SMALL))
    potential = shaken(Potential(size, channels, model_channels=4))
    for n in (1, 3, 5, 64 if size == 8 else 6):
        x, t, x_next, z, _ = inputs(n, size, channels)
        image = generator(x_next, t, z)
        assert image.shape == x.shape and image.dtype == torch.float32 and 0.01 < image.abs().max() <= 1
        value = potential(image, t, x_next)
        assert value.shape == (n,)
        value.sum().backward()
        assert all(p.grad.isfinite().all() for p in generator.parameters())


def test_the_resolution_chooses_the_blocks():
    for size, widths in {
        4: [2],
        8: [2, 4],
        16: [2, 4, 8],
        32: [2, 4, 8, 8],
        64: [2, 4, 8, 8, 8],
        128: [2, 4, 8, 8, 8, 8],
    }.items():
        potential = Potential(size, 1, model_channels=4)
        assert [b.conv0.out_channels for b in potential.blocks] == [4 * w for w in widths]
        seen = []
        potential.conv.register_forward_hook(lambda _m, args, _out, seen=seen: seen.append(args[0].shape))
        x, t, x_next, *_ = inputs(2, size)
        potential(x, t, x_next)
        assert seen == [(2, 4 * widths[-1] + 1, 4, 4)]
    DDGANGenerator(8, 1, **SMALL | dict(channel_mult=[1, 1, 1, 1]))  # The four levels of the paper fit 8x8.
    with pytest.raises(ValueError, match="channel_mult.*8 pixels.*4 times"):
        DDGANGenerator(8, 1, **SMALL | dict(channel_mult=[1] * 5))


def test_generator_is_the_u_net_with_other_norms():
    """Without the influence of the latent the generator computes what SongUNet does, with the same parameters."""
    generator = shaken(DDGANGenerator(8, 1, label_dim=3, **SMALL, attn_resolutions=[4]))
    for module in generator.modules():
        if isinstance(module, LatentGroupNorm):
            c = len(module.affine.bias) // 2
            module.affine.weight.data.zero_()
            module.affine.bias.data = torch.cat([torch.ones(c), torch.zeros(c)])
    u_net = SongUNet(
        8,
        1,
        1,
        label_dim=3,
        model_channels=8,
        channel_mult=[1, 2],
        num_blocks=1,
        attn_resolutions=[4],
        dropout=0,
        encoder_type="residual",
        resample_filter=[1, 3, 3, 1],
    )
    missing, unexpected = u_net.load_state_dict(generator.model.state_dict(), strict=False)
    assert missing and all(".norm" in name for name in missing)
    assert all(".norm" in name and ".affine." in name for name in unexpected) and len(missing) == len(unexpected)
    x, t, _, z, labels = inputs(3, labels=3)
    torch.testing.assert_close(generator(x, t, z, labels), u_net(x, t.float(), labels).tanh(), rtol=1e-4, atol=1e-5)


def test_latent_scales_and_shifts():
    norm = LatentGroupNorm(8, 5, eps=1e-6)
    assert norm.affine.bias.tolist() == [1] * 8 + [0] * 8  # before training
    shaken(norm)
    x, latent = torch.randn(3, 8, 4, 4), torch.randn(3, 5)
    p = latent @ norm.affine.weight.T + norm.affine.bias
    plain = torch.nn.functional.group_norm(x, 2, eps=1e-6)
    torch.testing.assert_close(norm(x, latent), plain * p[:, :8, None, None] + p[:, 8:, None, None])

    generator = shaken(DDGANGenerator(8, 1, label_dim=3, **SMALL))
    x, t, _, z, labels = inputs(4, labels=3)
    image = generator(x, t, z, labels)
    torch.testing.assert_close(generator(x, t, 3 * z, labels), image)  # Only the direction of z matters.
    for other in (
        generator(x, t, z.flip(0), labels),
        generator(x, (t + 1) % 4, z, labels),
        generator(x, t, z, labels.roll(1, 1)),
        generator(x.flip(0), t, z, labels),
    ):
        assert (other - image).abs().amax(dim=[1, 2, 3]).min() > 1e-3


def test_potential_sees_all_its_inputs():
    potential = shaken(Potential(8, 1, label_dim=3, model_channels=4))
    x, t, x_next, _, labels = inputs(4, labels=3)
    value = potential(x, t, x_next, labels)
    for other in (
        potential(x.flip(3), t, x_next, labels),
        potential(x, (t + 1) % 4, x_next, labels),
        potential(x, t, x_next.flip(3), labels),
        potential(x, t, x_next, labels.roll(1, 1)),
    ):
        assert (other - value).abs().min() > 1e-3


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 14), st.integers(0, 99))
def test_minibatch_deviation(n, seed):
    x = np.random.default_rng(seed).standard_normal([n, 3, 2, 2]).astype(np.float32)
    want = [np.sqrt(x[i // 4 * 4 : i // 4 * 4 + 4].var(axis=0) + 1e-8).mean() for i in range(n)]
    got = minibatch_std(torch.from_numpy(x))
    assert got.shape == (n, 1, 2, 2) and (got == got[:, :, :1, :1]).all()
    np.testing.assert_allclose(got[:, 0, 0, 0], want, rtol=1e-5)


def test_groups_of_four_are_apart():
    potential = shaken(Potential(8, 1, model_channels=4))
    x, t, x_next, *_ = inputs(8)
    value = potential(x, t, x_next)
    torch.testing.assert_close(value[4:], potential(x[4:], t[4:], x_next[4:]))
    changed = torch.cat([x[:1] * 3, x[1:]])
    difference = (potential(changed, t, x_next) - value).abs()
    assert difference[1:4].min() > 0 and difference[4:].max() == 0


def test_snapshots(tmp_path):
    generator = shaken(DDGANGenerator(8, 1, label_dim=3, num_timesteps=2, **SMALL)).eval().requires_grad_(False)
    for name, net in dict(g=generator, d=Potential(8, 1, model_channels=4)).items():
        persistence.save_snapshot(tmp_path / f"{name}.pkl", dict(ema=net, info={}))
    assert b"persistent_class(embed_source" not in (tmp_path / "g.pkl").read_bytes()
    net = persistence.load_snapshot(tmp_path / "g.pkl", kind=("denoiser", "generator"))["ema"]
    assert (net.num_timesteps, net.nz, net.label_dim, net.network_kind) == (2, 6, 3, "generator")
    x, t, _, z, labels = inputs(3, labels=3)
    assert torch.equal(net(x, t, z, labels), generator(x, t, z, labels))
    with pytest.raises(UserError, match="d.pkl: holds a potential.*not a denoiser or generator"):
        persistence.load_snapshot(tmp_path / "d.pkl", kind=("denoiser", "generator"))
    with pytest.raises(UserError, match="g.pkl: holds a generator.*not a classifier"):
        persistence.load_snapshot(tmp_path / "g.pkl", kind="classifier")
