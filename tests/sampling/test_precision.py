"""TF32 in sampling: only the network that asked for it uses it, and what guides the network is float32."""

import copy

import pytest
import torch

from sampling.guidance import DiscriminatorGuidance
from sampling.loading import prepare
from tests.support.generated import random_network
from tests.support.tf32 import SimulatedTF32
from torch_utils.precision import tf32
from training.networks_resnet import Discriminator

SIGMA, LABELS = torch.tensor(1.0), torch.eye(3)
X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def allowed():
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("precision", [None, "fp32", "tf32", "bf16"])
def test_a_network_uses_tf32_only_where_it_asked_for_it(precision, outside):
    with tf32(outside):
        net = prepare(copy.deepcopy(random_network()), precision)
        with SimulatedTF32() as products:
            denoised = net(X, SIGMA, LABELS)
        torch.testing.assert_close(denoised, random_network()(X, SIGMA, LABELS), rtol=0.1, atol=0.1)
        assert len(products.seen) > 5 and set(products.seen) == {precision in ("tf32", "bf16")}
        with pytest.raises(ValueError, match="width 2"):
            net(X, SIGMA, torch.zeros(3, 2))
        assert allowed() == (outside, outside)


def test_the_gradient_of_a_discriminator_is_float32_beside_any_network():
    torch.manual_seed(0)
    discriminator = Discriminator(8, 1, 3, depth="small", model_channels=8, channel_mult=(1, 2)).eval()
    torch.nn.init.normal_(discriminator.head.weight)
    exact = DiscriminatorGuidance(random_network(), discriminator).correction(X, SIGMA, LABELS)
    guided = DiscriminatorGuidance(prepare(random_network(), "bf16"), discriminator)
    found, correction = [], guided.correction
    guided.correction = lambda *args: found.append(correction(*args)) or found[0]
    with tf32(True), SimulatedTF32() as products:
        guided(X, SIGMA, LABELS)
    assert set(products.seen) == {False, True}
    assert torch.equal(found[0], exact) and exact.abs().max() > 0
