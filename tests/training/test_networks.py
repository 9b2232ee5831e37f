"""Test U-Nets and preconditioners: published numbers, closed forms, and all that users may pass."""

import ast
import inspect
import json
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.support.paths import FIXTURES
from training import networks
from training.networks import (
    Conv2d,
    DhariwalUNet,
    EDMPrecond,
    FourierEmbedding,
    GroupNorm,
    Linear,
    PositionalEmbedding,
    SongUNet,
    UNetBlock,
    VEPrecond,
    VPPrecond,
    _dropout,
    edm_coefs,
    iDDPMPrecond,
    ve_coefs,
    vp_coefs,
    vp_sigma,
    vp_sigma_inv,
)
from training.presets import ARCHS, network_kwargs, precond_class

NETWORKS = sorted(FIXTURES.glob("network_*.npz"))
SMALL = dict(
    img_resolution=8,
    img_channels=1,
    model_type="SongUNet",
    model_channels=8,
    channel_mult=[1, 2],
    num_blocks=1,
    attn_resolutions=[4],
    dropout=0,
)


def small(cls=EDMPrecond, seed=0, **kwargs):
    """Return a tiny network whose output depends on all inputs, unlike that of a newly initialized one."""
    torch.manual_seed(seed)
    net = cls(**(SMALL | dict(label_dim=3) | kwargs))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return net.eval()


def inputs(n=4, channels=1, resolution=8, classes=3):
    rng = torch.Generator().manual_seed(5)
    x = torch.randn(n, channels, resolution, resolution, generator=rng)
    return x, torch.rand(n, generator=rng) + 0.3, F.one_hot(torch.arange(n) % classes, classes)


def from_fixture(path, module=networks):
    data = np.load(path)
    config = json.loads(str(data["config"]))
    net = getattr(module, config["precond"])(**config["kwargs"])
    names = [name for name in data if name.startswith("state/")]
    net.load_state_dict({name[6:]: torch.from_numpy(data[name].astype(np.float32)) for name in names})
    args = {k: torch.from_numpy(data[k]) for k in ("x", "sigma", "class_labels", "augment_labels") if k in data}
    return net.eval(), args, torch.from_numpy(data["denoised"])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("path", NETWORKS, ids=lambda path: path.stem)
@torch.no_grad()
def test_published_networks(path, memory_format):
    net, args, want = from_fixture(path)
    got = net.to(memory_format=memory_format)(**args)
    for i in range(len(got)):
        assert (got[i] - want[i]).norm() <= 2e-5 * want[i].norm(), args["sigma"][i]


def test_all_published_networks_are_here():
    assert len(NETWORKS) == 7


def test_the_levels_of_iddpm_are_the_published_floats():
    path = next(path for path in NETWORKS if "iddpm" in path.stem)
    built = iDDPMPrecond(**SMALL).u
    np.testing.assert_allclose(built.numpy(), np.load(path)["state/u"], rtol=1e-6)  # Sines differ in the last bit.


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(ARCHS),
    st.sampled_from([VPPrecond, VEPrecond, EDMPrecond, iDDPMPrecond]),
    st.sampled_from([8, 12, 16, 28, 32]),
    st.sampled_from([1, 3]),
    st.sampled_from([0, 4]),
    st.sampled_from([4, 10, 14, 64]),
)
def test_any_architecture_resolution_and_width(arch, cls, resolution, channels, classes, width):
    width = width if resolution == 8 else min(width, 14)
    kwargs = network_kwargs(arch, cbase=width, cres=[1, 2]) | dict(num_blocks=1)
    net = cls(img_resolution=resolution, img_channels=channels, label_dim=classes, **kwargs)
    assert (net.img_resolution, net.img_channels, net.label_dim) == (resolution, channels, classes)
    assert net.network_kind == "denoiser" and 0 <= net.sigma_min < net.sigma_max
    x, sigma, labels = inputs(2, channels, resolution, 4)
    denoised = net(x.double(), sigma.double(), labels)
    assert denoised.shape == x.shape and denoised.dtype == torch.float32 and denoised.isfinite().all()
    denoised.square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())  # DDP waits for the gradients of all parameters.


def test_channels_that_do_not_divide_still_form_groups_and_heads():
    assert [GroupNorm(c).num_groups for c in (2, 8, 14, 16, 128, 132, 512)] == [1, 2, 2, 4, 32, 22, 32]
    heads = {c: UNetBlock(8, c, 4, attention=True).num_heads for c in (32, 64, 96, 192, 224)}
    assert heads == {32: 0, 64: 1, 96: 1, 192: 3, 224: 2}
    assert not hasattr(UNetBlock(8, 32, 4, attention=True), "qkv")


@torch.no_grad()
def test_one_sigma_or_label_for_all_is_the_same_as_many():
    net = small(augment_dim=2)
    x, _, labels = inputs()
    augment = torch.randn(4, 2)
    want = net(x, torch.full([4], 0.7), labels[:1].repeat(4, 1), augment_labels=augment)
    for sigma in (0.7, torch.tensor(0.7), torch.tensor([0.7], dtype=torch.float64), torch.full([4, 1, 1, 1], 0.7)):
        torch.testing.assert_close(net(x, sigma, labels[0], augment_labels=augment), want)
    alone = torch.cat([net(x[i : i + 1], 0.7, labels[:1], augment_labels=augment[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(alone, want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_no_label_is_zeros():
    net, (x, sigma, labels) = small(augment_dim=2), inputs()
    torch.testing.assert_close(net(x, sigma), net(x, sigma, torch.zeros(4, 3), augment_labels=torch.zeros(4, 2)))
    assert not torch.allclose(net(x, sigma), net(x, sigma, labels))
    assert not torch.allclose(net(x, sigma), net(x, sigma, augment_labels=torch.ones(4, 2)))
    with pytest.raises(ValueError, match="width 2, must be 3"):
        net(x, sigma, torch.zeros(6, 2))
    uncond = small(label_dim=0)
    torch.testing.assert_close(uncond(x, sigma, labels), uncond(x, sigma))


@pytest.mark.parametrize("shape, p", [([8, 64, 16, 16], 0.13), ([7, 3, 5, 3], 0.5)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_and_scales_as_it_should(shape, p, layout, dtype):
    """Elements become 0 with probability p, independently, and 1/(1-p) otherwise. Gradients have the same mask."""
    torch.manual_seed(0)
    x = torch.ones(shape, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    y = _dropout(x, p, True)
    y.sum().backward()
    assert y.dtype == dtype and y.is_contiguous(memory_format=layout) and x.grad.equal(y)
    kept = y != 0
    assert torch.allclose(y[kept].float(), torch.tensor(1 / (1 - p)), rtol=1e-2 if dtype == torch.bfloat16 else 1e-4)
    n = x.numel()
    assert abs(kept.float().mean() - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
    # Neighbors in memory share 64 random bits. Pairs must survive as often as if they were independent.
    flat = kept.permute(0, 2, 3, 1).flatten() if layout == torch.channels_last else kept.flatten()
    for lag in (1, 2, 3):
        both = (flat[:-lag] & flat[lag:]).float().mean()
        assert abs(both - (1 - p) ** 2) < 6 * ((1 - p) ** 2 / n) ** 0.5
    assert _dropout(x, p, False) is x or _dropout(x, p, False).equal(x)
    assert not _dropout(x, 1.0, True).any() and _dropout(x, 0.0, True).equal(x)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_attention_keeps_the_layout_of_its_input(layout):
    """Otherwise all later layers would run in the layout that attention happens to return."""
    block = UNetBlock(8, 8, 4, attention=True, num_heads=1).eval()
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=layout)
    assert block._attend(x).is_contiguous(memory_format=layout)


def test_dropout_only_in_training():
    net, (x, sigma, labels) = small(dropout=0.5), inputs()
    assert torch.equal(net(x, sigma, labels), net(x, sigma, labels))
    net.train()
    assert not torch.allclose(net(x, sigma, labels), net(x, sigma, labels))


@torch.no_grad()
def test_precision():
    net, (x, sigma, labels) = small(), inputs()
    want = net(x, sigma, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, forced = net(x, sigma, labels), net(x, sigma, labels, force_fp32=True)
    assert got.dtype == torch.float32 and not torch.equal(got, want)
    torch.testing.assert_close(got, want, rtol=0.1, atol=0.1)
    assert torch.equal(forced, want)
    assert torch.equal(small(use_fp16=True)(x, sigma, labels), want)  # float16 is for CUDA only.


def test_half_precision_layers_follow_their_input():
    block = UNetBlock(8, 16, 4, attention=True, num_heads=2)
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 4)
    got = block(x.bfloat16(), emb)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), block(x, emb), rtol=0.05, atol=0.05)


# Preconditioning


def test_edm_coefficients_give_unit_variance():
    sigma = torch.tensor([0.002, 0.1, 0.5, 3.0, 80.0], dtype=torch.float64)
    c_skip, c_out, c_in, c_noise = edm_coefs(sigma, 0.5)
    torch.testing.assert_close(c_in**2 * (sigma**2 + 0.25), torch.ones_like(sigma))
    # For data of standard deviation 0.5 the target (y - c_skip (y + n)) / c_out has variance 1 (Eq. 116).
    torch.testing.assert_close(((1 - c_skip) ** 2 * 0.25 + c_skip**2 * sigma**2) / c_out**2, torch.ones_like(sigma))
    torch.testing.assert_close((4 * c_noise).exp(), sigma)


def test_vp_and_ve_coefficients():
    sigma = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)
    for c_skip, c_out, *_ in (vp_coefs(sigma), ve_coefs(sigma)):
        assert (c_skip == 1).all() and torch.equal(c_out.abs(), sigma)
    assert (vp_coefs(sigma)[1] < 0).all() and (ve_coefs(sigma)[1] > 0).all()
    torch.testing.assert_close(vp_coefs(sigma)[2], 1 / (1 + sigma**2).sqrt())
    assert torch.equal(ve_coefs(sigma)[2], torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(vp_sigma(vp_coefs(sigma, M=11)[3] / 10), sigma)
    torch.testing.assert_close(2 * ve_coefs(sigma)[3].exp(), sigma)


def test_vp_sigma_in_float32_is_exact_at_low_noise():
    t = torch.tensor([1e-5, 1e-3, 0.1, 1.0])
    exact = np.sqrt(np.expm1(9.95 * t.double().numpy() ** 2 + 0.1 * t.double().numpy()))
    np.testing.assert_allclose(vp_sigma(t).numpy(), exact, rtol=2e-6)
    np.testing.assert_allclose(vp_sigma_inv(vp_sigma(t)).numpy(), t.numpy(), rtol=1e-3)
    np.testing.assert_allclose(vp_sigma_inv(vp_sigma(t.double())).numpy(), t.double().numpy(), rtol=1e-9)


def test_sigma_ranges():
    vp = VPPrecond(**SMALL)
    assert vp.sigma_min == pytest.approx(np.sqrt(np.expm1(9.95e-10 + 1e-6)), rel=1e-6)
    assert vp.sigma_max == pytest.approx(np.sqrt(np.expm1(10.05)), rel=1e-6)
    ranges = {cls: (cls(**SMALL).sigma_min, cls(**SMALL).sigma_max) for cls in (VEPrecond, EDMPrecond, iDDPMPrecond)}
    assert ranges[VEPrecond] == (0.02, 100) and ranges[EDMPrecond] == (0, float("inf"))
    assert ranges[iDDPMPrecond] == pytest.approx((0.0064223, 20291.17), rel=1e-4)


def test_round_sigma():
    net = iDDPMPrecond(**SMALL, M=50)
    u = net.u.double()
    sigma = torch.cat([u, u[:-1] * 1.001, (u[1:-1] + u[2:]) / 2 + 1e-4]).reshape(-1, 1)
    rounded = net.round_sigma(sigma)
    assert rounded.shape == sigma.shape and rounded.dtype == torch.float64
    assert torch.equal(rounded.flatten()[:51], u)
    nearest = (u[None] - sigma).abs().amin(dim=1)
    torch.testing.assert_close((rounded - sigma).abs().flatten(), nearest, rtol=0, atol=1e-3)
    assert torch.equal(net.coefs(net.u[:50])[3], torch.arange(49, -1, -1).float())
    assert net.round_sigma(0.5).shape == ()
    for cls in (VPPrecond, VEPrecond, EDMPrecond):
        assert torch.equal(small(cls).round_sigma(sigma), sigma)


def test_fresh_networks_predict_nearly_nothing():
    x, sigma, labels = inputs()
    c_skip, c_out, *_ = edm_coefs(sigma.reshape(-1, 1, 1, 1))
    adm = EDMPrecond(**SMALL | dict(label_dim=3, model_type="DhariwalUNet"))
    torch.testing.assert_close(adm(x, sigma, labels), c_skip * x)
    assert 0 < (EDMPrecond(**SMALL, label_dim=3)(x, sigma, labels) - c_skip * x).abs().max() < 1e-3


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match="model_type='os.system': must be one of SongUNet, DhariwalUNet"):
        EDMPrecond(8, 1, model_type="os.system")
    for option in ("embedding_type", "encoder_type", "decoder_type"):
        with pytest.raises(ValueError, match=f"{option}='x'"):
            SongUNet(8, 1, 1, **{option: "x"})
    with pytest.raises(ValueError, match="channel_mult: 5 levels do not fit images of 8 pixels"):
        SongUNet(8, 1, 1, channel_mult=[1] * 5, model_channels=4)
    with pytest.raises(ValueError, match="init_mode='normal'"):
        Linear(2, 2, init_mode="normal")
    with pytest.raises(ValueError, match="cannot do both"):
        Conv2d(1, 1, 0, up=True, down=True)


# Layers


@pytest.mark.parametrize("mode", ["xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal"])
def test_initialization(mode):
    torch.manual_seed(0)
    variance = 2 / 500 if mode.startswith("xavier") else 1 / 300
    layer = Linear(300, 200, init_mode=mode, init_weight=3, init_bias=0.5)
    assert layer.weight.var().item() == pytest.approx(9 * variance, rel=0.05)
    assert layer.bias.var().item() == pytest.approx(variance / 4, rel=0.3)
    assert (layer.weight.abs().max() <= 3 * (3 * variance) ** 0.5) == mode.endswith("uniform")
    conv = Conv2d(300 // 4, 200 // 4, 2, init_mode=mode)
    assert conv.weight.var().item() == pytest.approx(variance, rel=0.1) and not conv.bias.any()


def test_initial_gains():
    torch.manual_seed(0)

    def gain(p, fan_in, fan_out=None):  # relative to the variance 2/(fan_in + fan_out), or 1/fan_in
        return p.std().item() * ((fan_in + fan_out) / 2 if fan_out else fan_in) ** 0.5

    def near(value):
        return pytest.approx(value, rel=0.1)

    song = SongUNet(16, 3, 3, label_dim=9, augment_dim=9, model_channels=64, channel_mult=[1], num_blocks=1).enc
    block = song["16x16_block0"]
    assert gain(song["16x16_conv"].weight, 27, 576) == near(1) and gain(block.conv0.weight, 576, 576) == near(1)
    assert gain(block.affine.weight, 256, 64) == near(1) and gain(block.qkv.weight, 64, 192) == near(0.2**0.5)
    assert gain(block.conv1.weight, 576, 576) == near(1e-5) and gain(block.proj.weight, 64, 64) == near(1e-5)
    assert not any(p.any() for name, p in song.named_parameters() if name.endswith("bias"))
    adm = DhariwalUNet(16, 3, 3, label_dim=9, model_channels=64, channel_mult=[1], num_blocks=1, attn_resolutions=[16])
    block = adm.enc["16x16_block0"]
    for p, fan in (
        (block.conv0.weight, 576),
        (block.conv0.bias, 576),
        (block.affine.weight, 256),
        (block.qkv.weight, 64),
        (adm.map_layer1.bias, 256),
    ):
        assert gain(p, fan) == pytest.approx(3**-0.5, rel=0.1 if p.dim() > 1 else 0.4)
    assert gain(adm.map_label.weight, 9) == near(9**0.5)
    for layer in (block.conv1, block.proj, adm.out_conv):
        assert not layer.weight.any() and not layer.bias.any()


@pytest.mark.parametrize("kernel", [0, 1, 3])
@pytest.mark.parametrize("taps", [[1, 1], [1, 3, 3, 1]])
@pytest.mark.parametrize("direction", ["up", "down"])
@torch.no_grad()
def test_resampling_is_filtering(direction, taps, kernel):
    conv = Conv2d(3, 3 if kernel == 0 else 5, kernel, **{direction: True}, resample_filter=taps, init_bias=1)
    x = torch.randn(2, 3, 8, 8)
    f = torch.tensor(taps, dtype=torch.float32)
    f = (f[:, None] * f / f.sum() ** 2).expand(3, 1, -1, -1)
    assert torch.equal(conv.resample_filter, f[:1])
    pad = (len(taps) - 1) // 2
    if direction == "up":
        want = F.conv_transpose2d(x, 4 * f, stride=2, padding=pad, groups=3)
    else:
        want = F.conv2d(x, f, stride=2, padding=pad, groups=3)
    if kernel:
        want = F.conv2d(want, conv.weight, conv.bias, padding=kernel // 2)
    torch.testing.assert_close(conv(x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("taps", [[1, 1], [1, 3, 3, 1]])
@torch.no_grad()
def test_fused_resampling_is_the_same_away_from_the_border(taps):
    x = torch.randn(2, 3, 16, 16)
    for direction in ("up", "down"):
        fused = Conv2d(3, 5, 3, **{direction: True}, resample_filter=taps, fused_resample=True, init_bias=1)
        plain = F.conv2d(x, fused.weight, fused.bias, padding=1)  # `down` convolves first.
        if direction == "down":
            want = Conv2d(5, 5, 0, down=True, resample_filter=taps)(plain)
        else:
            want = F.conv2d(Conv2d(3, 3, 0, up=True, resample_filter=taps)(x), fused.weight, fused.bias, padding=1)
        got = fused(x)
        assert got.shape == want.shape
        torch.testing.assert_close(got[..., 2:-2, 2:-2], want[..., 2:-2, 2:-2], rtol=1e-5, atol=1e-5)


def test_embeddings():
    x = torch.tensor([0.0, 0.3, 7.0])
    emb = PositionalEmbedding(8, endpoint=True)(x)
    torch.testing.assert_close(emb[:, 3], (x / 10000).cos())
    torch.testing.assert_close(emb[:, 4], x.sin())
    torch.testing.assert_close(PositionalEmbedding(8)(x)[:, 5], (x / 10).sin())
    fourier = FourierEmbedding(6)
    assert list(fourier.state_dict()) == ["freqs"] and not PositionalEmbedding(8).state_dict()
    angles = 2 * np.pi * x[:, None].double() * fourier.freqs
    torch.testing.assert_close(fourier(x), torch.cat([angles.cos(), angles.sin()], dim=1).float(), rtol=0, atol=1e-3)
    assert FourierEmbedding(20000).freqs.std().item() == pytest.approx(16, rel=0.05)


@torch.no_grad()
def test_skip_paths_add_up():
    x, sigma, labels = inputs(resolution=16)
    kwargs = dict(img_resolution=16, channel_mult=[1, 2, 2])
    plain, skip = small(**kwargs), small(**kwargs, encoder_type="skip", decoder_type="skip")
    assert plain.state_dict().keys() < skip.state_dict().keys()
    skip.load_state_dict(plain.state_dict(), strict=False)
    layers = ["4x4_aux_conv", "4x4_aux_skip", "8x8_aux_conv", "8x8_aux_skip"]
    aux = {name: p for name, p in skip.named_parameters() if name.split(".")[2] in layers}
    assert sorted({name.split(".")[2] for name in aux}) == layers
    saved = {name: p.clone() for name, p in aux.items()}
    for p in aux.values():
        p.zero_()
    want = plain(x, sigma, labels)
    torch.testing.assert_close(skip(x, sigma, labels), want)
    seen = []
    for name in ("8x8", "4x4"):  # The second path carries the input at lower resolution.
        skip.model.enc[f"{name}_aux_skip"].register_forward_hook(lambda module, args, output: seen.append(args[0]))
    skip(x, sigma, labels)
    for image, factor in zip(seen, (2, 4), strict=True):
        torch.testing.assert_close(image, F.avg_pool2d(edm_coefs(sigma.reshape(-1, 1, 1, 1))[2] * x, factor))
    for name, p in aux.items():  # Each path reaches the output, coarse images as blocks of 2x2 or 4x4 pixels.
        p.copy_(saved[name])
        change = skip(x, sigma, labels) - want
        assert change.abs().max() > 1e-4, name
        if "aux_conv" in name:
            block = 4 if "4x4" in name else 2
            coarse = F.avg_pool2d(change, block).repeat_interleave(block, 2).repeat_interleave(block, 3)
            torch.testing.assert_close(change, coarse, rtol=1e-3, atol=1e-4)
        p.zero_()


# Snapshots and compilers


def test_the_source_is_self_contained():
    tree = ast.parse(inspect.getsource(networks))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported == {"__future__", "collections.abc", "numpy", "torch", "torch.nn", "torch_utils.persistence"}
    modules = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert len(modules) > 10
    for node in modules:
        assert [ast.unparse(decorator) for decorator in node.decorator_list] == ["persistent_class"], node.name


@torch.no_grad()
def test_the_source_runs_where_persistent_class_derives_a_class(monkeypatch):
    def persistent_class(cls):
        class Derived(cls):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self._init_args = args

        return Derived

    stub = types.ModuleType("torch_utils.persistence")
    stub.persistent_class = persistent_class
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", stub)
    module = types.ModuleType("embedded_networks")
    exec(compile(inspect.getsource(networks), "embedded", "exec"), vars(module))
    net, args, want = from_fixture(NETWORKS[-1], module)
    assert type(net.model).__name__ == "Derived"
    torch.testing.assert_close(net(**args), want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kwargs", [{}, dict(model_type="DhariwalUNet", model_channels=32)])
def test_compiles_without_graph_breaks(kwargs):
    net, (x, sigma, labels) = small(augment_dim=2, label_dropout=0.5, **kwargs), inputs()
    want = net(x, sigma, labels)
    got = torch.compile(net, fullgraph=True, backend="eager")(x, sigma, labels)
    torch.testing.assert_close(got, want)


# Presets


def test_presets():
    assert ARCHS == ("ddpmpp", "ncsnpp", "adm", "ddpmpp_mnist", "ddpmpp_tiny")
    tiny = network_kwargs("ddpmpp_tiny")
    assert (tiny["model_channels"], tiny["channel_mult"], tiny["attn_resolutions"]) == (32, [1, 2], [])
    tiny["channel_mult"].append(3)
    assert network_kwargs("ddpmpp_tiny")["channel_mult"] == [1, 2]
    changed = network_kwargs("ddpmpp", cbase=16, cres=(1, 3))
    assert (changed["model_channels"], changed["channel_mult"]) == (16, [1, 3])
    assert json.loads(json.dumps(changed)) == changed
    net = EDMPrecond(16, 1, **network_kwargs("ddpmpp_tiny"))
    assert [name for name, part in net.model.named_modules() if getattr(part, "num_heads", 0)] == ["dec.8x8_in0"]
    assert isinstance(EDMPrecond(8, 1, **network_kwargs("adm", 8, [1])).model, DhariwalUNet)
    assert precond_class("vp") is VPPrecond and precond_class("ve") is VEPrecond and precond_class("edm") is EDMPrecond
    for call in (lambda: network_kwargs("vgg"), lambda: precond_class("iddpm")):
        with pytest.raises(ValueError, match="must be one of"):
            call()
