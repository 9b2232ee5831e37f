"""The convolutional classifier: its shapes, its normalization over several processes, the EMA of its statistics."""

import pytest
import torch

from torch_utils import distributed
from training import networks_conv
from training.networks_conv import BatchNorm, ConvClassifier, conv_kwargs
from training.trained_network import TrainedNetwork


@pytest.mark.parametrize(
    "resolution, channels, maps", [(8, 1, [8, 4, 2]), (16, 1, [16, 8, 4]), (64, 3, [64, 32, 16, 8, 4])]
)
def test_shapes(resolution, channels, maps):
    net = ConvClassifier(resolution, channels, 5, **conv_kwargs(channels))
    seen = []
    for layer in net.body:
        if isinstance(layer, torch.nn.ReLU):
            layer.register_forward_hook(lambda _module, _args, out: seen.append(out.shape[-1]))
    assert net(torch.randn(3, channels, resolution, resolution), torch.full([3], 0.002)).shape == (3, 5)
    assert list(dict.fromkeys(seen)) == maps
    assert net.features(torch.randn(2, channels, resolution, resolution)).shape[0] == 2


def test_two_processes_normalize_as_one(monkeypatch):
    """Both processes hold the same images here, so that sums over both are twice the sums of one."""
    x = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 + 1
    whole, shared = torch.nn.BatchNorm2d(3), BatchNorm(3)
    both = torch.cat([x, x]).requires_grad_()
    weight = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    expected = whole(both)
    (expected[:6] * weight).sum().backward()
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(networks_conv, "all_reduce", lambda value: value + value.detach())
    found = shared(x)
    torch.testing.assert_close(found, expected[:6])
    torch.testing.assert_close(shared.running_mean, whole.running_mean)
    torch.testing.assert_close(shared.running_var, whole.running_var)
    (found * weight).sum().backward()  # the statistics carry gradients, too
    torch.testing.assert_close(shared.weight.grad, whole.weight.grad)


def test_the_ema_averages_the_statistics():
    net = ConvClassifier(8, 1, 2, model_channels=4)
    trained = TrainedNetwork(net, torch.device("cpu"), lr=1e-3, ema_halflife=10.0, ema_rampup=1e9)
    before = trained.ema.body[1].running_mean.clone()
    trained.forward(torch.randn(10, 1, 8, 8) + 3).sum().backward()
    trained.update(1, 10)  # a half-life of 10 images, and 10 images
    now = trained.net.body[1].running_mean
    torch.testing.assert_close(trained.ema.body[1].running_mean, (before + now) / 2)
    assert not torch.equal(now, before)
