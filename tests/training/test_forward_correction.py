"""The classifier's forward correction ln (T^T p): exact for tiny probabilities, with memory for one product only."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from archives.label_noise import transition_matrix
from tests.support.objectives import CPU, Data, make_config, ready
from training.objectives import classifier
from training.objectives.classifier import ClassifierObjective


def make(data=None, transition=None, **changes):
    config = make_config(**changes)
    config.network.kwargs = dict(depth="small", model_channels=8, channel_mult=[1, 2, 4], dropout=0.0)
    return ready(ClassifierObjective, config, data or Data(), CPU, transition=transition)


class Largest(TorchDispatchMode):
    """Remembers how many elements the largest tensor has that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *(x.numel() for x in tensors)])
        return out


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("noise", ["pair", "sym"])
def test_matches_float64_for_tiny_probabilities(noise, autocast):
    t = torch.from_numpy(transition_matrix(noise, 0.3, 10))
    # Logarithms from 0 down to about -500, far below what float32 holds.
    log_p = torch.log_softmax(torch.randn(40, 10, generator=torch.Generator().manual_seed(0)) * 100, dim=1)
    assert log_p.min() < -400
    observed = torch.arange(40) % 10
    log_p.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = make().noisy_log_probs(log_p, t.float())
        found.gather(1, observed[:, None]).sum().backward()
    exact = log_p.detach().double().requires_grad_()
    wanted = torch.logsumexp(exact[:, :, None] + t.log(), dim=1)
    wanted.gather(1, observed[:, None]).sum().backward()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_p.grad.double(), exact.grad, rtol=1e-6, atol=1e-6)


def test_memory_does_not_grow_with_images_times_classes_squared():
    n, classes, objective = 64, 100, make()
    t = torch.from_numpy(transition_matrix("sym", 0.4, classes)).float().requires_grad_()
    log_p = torch.log_softmax(torch.randn(n, classes), dim=1).requires_grad_()
    with Largest() as largest:
        objective.noisy_log_probs(log_p, t).sum().backward()
    assert largest.elements == classes**2


def test_validation_takes_as_many_images_at_a_time_as_stated(monkeypatch):
    monkeypatch.setattr(classifier, "VALIDATION_DRAWS", 100)
    values, sizes = [], []
    for batch_gpu in (None, 5):
        objective = make(transition=np.eye(4), batch_gpu=batch_gpu)
        ema = objective.trained["net"].ema
        torch.nn.init.normal_(ema.head.weight, generator=torch.Generator().manual_seed(0))
        seen = []
        ema.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(len(args[0])))
        values.append(objective.validate())
        sizes.append(seen)
    assert max(sizes[0]) == 104 and max(sizes[1]) == 5 and sum(sizes[0]) == sum(sizes[1]) == 104
    assert values[1] == pytest.approx(values[0], rel=1e-5) and values[0] > 1
