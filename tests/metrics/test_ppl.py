"""Perceptual path length: by its formula on generators that are simple enough for it."""

import math

import numpy as np
import pytest
import torch

import dnnlib
from metrics.detectors import PixelDetector
from metrics.network_detectors import FidelityDetector, TorchScriptDetector
from metrics.ppl import image_distance, path_distances, path_length, slerp
from sampling.seeds import StackedRandomGenerator
from training.networks_ddgan import DDGANGenerator

CPU = torch.device("cpu")


class Linear(torch.nn.Module):
    """One step, whose image is z times `gain`."""

    img_channels, img_resolution, label_dim, nz, num_timesteps, beta_min, beta_max = 1, 2, 3, 4, 1, 0.1, 20.0
    geometric = False

    def __init__(self, gain):
        super().__init__()
        self.gain = torch.as_tensor(gain, dtype=torch.float64)

    def forward(self, x, t, z, class_labels=None):
        assert class_labels.shape == (len(x), 3) and (class_labels.sum(dim=1) == 1).all()
        return (z.double() * self.gain).float().view(-1, 1, 2, 2)


def squares(a, b):
    return (a.double() - b.double()).square().flatten(1).sum(dim=1)


def draws(seeds):
    """What each seed draws: noise, class, t, both ends of the path."""
    rnd = StackedRandomGenerator("cpu", seeds)
    rnd.randn([len(seeds), 1, 2, 2])
    rnd.randint(3, size=[len(seeds)])
    t = torch.stack([torch.rand([], generator=g, dtype=torch.float64) for g in rnd.generators])
    return t.numpy(), *(rnd.randn([len(seeds), 4], dtype=torch.float64).numpy() for _ in range(2))


def test_slerp():
    a, b = torch.tensor([[3.0, 0.0]] * 3), torch.tensor([[0.0, 0.5]] * 3)
    found = slerp(a, b, torch.tensor([0.0, 1 / 3, 1.0]))
    expected = math.sqrt(2) * torch.tensor([[1, 0], [math.cos(math.pi / 6), math.sin(math.pi / 6)], [0, 1]])
    torch.testing.assert_close(found, expected)
    same = torch.ones([1, 4])
    torch.testing.assert_close(slerp(same, same, torch.tensor([0.3])), same)  # no path, no division by 0


def test_path_length_by_its_formula():
    """With the identity, a step is the chord of an arc. With gains, the formula is computed with NumPy."""
    seeds, epsilon = range(5, 25), 0.25
    t, a, b = draws(seeds)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    angle = np.arccos((a * b).sum(axis=1))
    chords = 4 * (2 - 2 * np.cos(epsilon * angle)) / epsilon**2
    found = path_distances(Linear(np.ones(4)), seeds, squares, CPU, batch=7, epsilon=epsilon)
    for values in found.values():
        np.testing.assert_allclose(values, chords, rtol=1e-6)

    gain = np.array([0.1, 1.0, 2.0, 0.5])

    def point(t):
        s = np.sin(angle)[:, None]
        return 2 * (np.sin((1 - t) * angle)[:, None] * a + np.sin(t * angle)[:, None] * b) / s * gain

    found = path_distances(Linear(gain), seeds, squares, CPU, batch=20, epsilon=epsilon)
    for end, start in (("full", t), ("end", 0 * t)):
        expected = ((point(start + epsilon) - point(start)) ** 2).sum(axis=1) / epsilon**2
        np.testing.assert_allclose(found[end], expected, rtol=1e-6)
        assert path_length(found[end]) == pytest.approx(np.sort(expected)[1:-1].mean(), rel=0.2)


def test_the_lowest_and_the_highest_percent_are_left_out():
    values = np.random.default_rng(0).permutation(np.arange(1.0, 1001))
    values[values == 1000] = 1e9
    assert path_length(values) == pytest.approx(np.arange(10.0, 992).mean(), abs=0.6)
    assert path_length(np.array([1.0, 2.0])) == 1.5


def test_all_but_z_stays_the_same():
    """A generator that does not look at z has paths of length 0, though each of its steps adds noise."""
    torch.manual_seed(0)
    net = DDGANGenerator(8, 1, label_dim=3, num_timesteps=3, nz=6, z_emb_dim=8, n_mlp=1, model_channels=8,
                         channel_mult=[1, 2], num_blocks=1).eval()  # fmt: skip
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    seen = path_distances(net, range(6), squares, CPU, batch=4)
    assert all((values > 0).all() for values in seen.values())
    alone = path_distances(net, [2], squares, CPU, ends=["full"])
    np.testing.assert_allclose(alone["full"], seen["full"][2:3], rtol=0.05)  # float32, and epsilon is 1e-4
    net.map_latent[0].weight.data.zero_()
    for values in path_distances(net, range(6), squares, CPU, batch=4).values():
        assert (values == 0).all()


def test_distances():
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.rand([3, 1, 4, 4], generator=rng) * 2 - 1 for _ in range(2))
    pixels = image_distance(PixelDetector(), (1, 4, 4), "net.pkl")
    torch.testing.assert_close(pixels(a, b), squares(a, b), rtol=1e-5, atol=1e-6)
    large = torch.rand([2, 1, 512, 512], generator=rng)  # averaged to 256 first
    small = torch.nn.functional.avg_pool2d(large, 2)
    found = image_distance(PixelDetector(), (1, 512, 512), "net.pkl")(large, -large)
    torch.testing.assert_close(found, squares(small, -small), rtol=1e-5, atol=1e-3)
    fidelity = object.__new__(FidelityDetector)
    fidelity.name = "fidelity:vgg16"
    with pytest.raises(dnnlib.UserError, match="fidelity:vgg16 takes whole gray levels only.*vgg16.pkl"):
        image_distance(fidelity, (1, 4, 4), "net.pkl")


def test_the_published_vgg16_gives_lpips():
    class Toy(torch.nn.Module):
        def forward(self, img: torch.Tensor, resize_images: bool = True, return_lpips: bool = False) -> torch.Tensor:
            assert return_lpips and not resize_images and img.shape[1] == 3
            return img.mean(dim=[2, 3])

    detector = TorchScriptDetector(torch.jit.script(Toy()), "vgg16", "cpu")
    a = torch.full([2, 1, 4, 4], -1.0)
    expected = torch.tensor([3 * 255.0**2] * 2, dtype=torch.float64)
    torch.testing.assert_close(image_distance(detector, (1, 4, 4), "net.pkl")(a, -a), expected)
