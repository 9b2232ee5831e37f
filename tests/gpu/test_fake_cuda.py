"""Test the fake CUDA device itself: what it lets through, and what it calls a mistake."""

import os

import numpy as np
import pytest
import torch

from tests.support.fake_cuda import CUDA, DeviceMistake, FakeCuda
from tests.support.paths import ROOT
from tests.support.waits import DOUBLE, WAITS


@pytest.fixture
def x():
    with FakeCuda() as fake:
        with fake.setting_up():
            x = torch.arange(12.0).reshape(3, 4).to(CUDA)
        yield x


RIGHT = {
    "arithmetic": lambda x: (x + 1) * torch.tensor(2.0),
    "new tensors": lambda x: torch.zeros(3, device="cuda") + x.new_ones(3) + torch.full([3], 1.0, device=x.device),
    "a module": lambda x: torch.nn.functional.linear(x, torch.ones([2, 4], device=CUDA)),
    "a copy from pinned memory": lambda x: torch.ones(3).pin_memory().to(CUDA, non_blocking=True),
    "a copy to pinned memory": lambda x: torch.empty([3, 4], pin_memory=True).copy_(x, non_blocking=True),
    "its generator": lambda x: torch.rand(3, generator=torch.Generator(CUDA), device=CUDA),
    "its indices": lambda x: x[torch.arange(2, device=CUDA)],
    "autocast": lambda x: torch.autocast(x.device.type, dtype=torch.bfloat16),
    "one_hot": lambda x: torch.nn.functional.one_hot(torch.arange(3, device=CUDA), 4),
}
WRONG = {
    "a tensor of the CPU": lambda x: x + torch.zeros(4),
    "a concatenation": lambda x: torch.cat([x, torch.zeros(1, 4)]),
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).all()),
    "float": lambda x: float(x.sum()),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: (x > 0).nonzero(),
    "a mask": lambda x: x[x > 0],
    "cpu": lambda x: x.cpu(),
    "a copy to the CPU": lambda x: x.to("cpu", non_blocking=True),
    "numpy": lambda x: np.asarray(x),
    "indices of the CPU": lambda x: x[torch.tensor([0, 1])],
    "indices of the GPU for the CPU": lambda x: torch.ones(3)[torch.arange(2, device=CUDA)],
    "numbers of the host": lambda x: torch.tensor([1.0, 2.0], device=CUDA),
    "memory that is not pinned": lambda x: torch.ones(3).to(CUDA, non_blocking=True),
    "a generator of the CPU": lambda x: torch.rand(3, generator=torch.Generator(), device=CUDA),
    "a product in float64": lambda x: x.double() @ x.double().T,
    "an event": lambda x: torch.cuda.Event().synchronize(),
    "a module of the CPU": lambda x: torch.nn.Linear(4, 2)(x),
}


@pytest.mark.parametrize("name", RIGHT)
def test_lets_through(x, name):
    RIGHT[name](x)


@pytest.mark.parametrize("name", WRONG)
def test_finds_mistake(x, name):
    with pytest.raises(DeviceMistake):
        WRONG[name](x)


def test_numbers_and_gradients_are_real():
    x = torch.arange(12.0).reshape(3, 4)
    values = []
    for device in ("cpu", CUDA):
        with FakeCuda() as fake, fake.setting_up():
            net = torch.nn.Linear(4, 2)
            with torch.no_grad():
                net.weight.fill_(0.5), net.bias.zero_()
            net.to(device)
            net(x.to(device)).square().sum().backward()
            torch.optim.Adam(net.parameters(), fused=True).step()
            assert fake.has(net.weight) is fake.has(net.weight.grad) is (device == CUDA)
            values.append(net.weight.detach().cpu())
    assert torch.equal(*values) and not torch.equal(values[0], torch.full([2, 4], 0.5))


def test_a_wait_counts_only_outside_its_place():
    with FakeCuda({("", ""): "the test itself"}) as fake:
        assert torch.ones([], device=CUDA).item() == 1 and fake.used == {("", "")}


def test_every_allowed_place_exists():
    for file, function in (*WAITS, *DOUBLE):
        with open(os.path.join(ROOT, file)) as source:
            assert f"def {function}(" in source.read(), (file, function)
