"""What stays float32 in every precision: the last layers of classifiers, discriminators and potentials."""

import pytest
import torch

from torch_utils.precision import tf32
from training.networks_ddgan import Potential
from training.networks_resnet import Classifier, Discriminator

X, LABELS = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.eye(4)[torch.arange(16) % 4]
SMALL = dict(depth="small", model_channels=8, channel_mult=(1, 2, 4))
HEADS = {
    "classifier": (lambda: Classifier(8, 1, 4, **SMALL), (X, torch.ones(16))),
    "discriminator": (lambda: Discriminator(8, 1, 4, **SMALL), (X, torch.ones(16), LABELS)),
    "potential": (lambda: Potential(8, 1, 4, model_channels=8), (X, torch.zeros(16), X, LABELS)),
}


@pytest.mark.parametrize("name", HEADS)
def test_last_layers_do_not_round_under_autocast(name):
    make, inputs = HEADS[name]
    torch.manual_seed(0)
    net = make().eval()
    torch.nn.init.normal_(net.head.weight)
    seen = []
    net.head.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = net(*inputs)
    ((features, output),) = seen
    assert logits.dtype == features.dtype == output.dtype == torch.float32
    assert (features != features.bfloat16()).any()  # also the average before the last layer is a float32 one
    exact = features.double() @ net.head.weight.T.double() + net.head.bias
    torch.testing.assert_close(output.double(), exact, rtol=1e-5, atol=1e-5)


def test_tf32_is_as_before_afterwards():
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    for allowed in (True, False):
        with pytest.raises(ZeroDivisionError), tf32(allowed):
            assert [backend.allow_tf32 for backend in backends] == [allowed, allowed]
            raise ZeroDivisionError
        assert [backend.allow_tf32 for backend in backends] == before


def test_products_of_half_precision_are_summed_in_float32_inside_only():
    matmul, names = (
        torch.backends.cuda.matmul,
        [f"allow_{kind}_reduced_precision_reduction" for kind in ("fp16", "bf16")],
    )
    before = [getattr(matmul, name) for name in names]
    for allowed in (True, False):
        with tf32(allowed):
            assert [getattr(matmul, name) for name in names] == [False, False]
        assert [getattr(matmul, name) for name in names] == before == [True, True]
