"""One network in training: DDP, shards and memory layouts, bad gradients, the loss scale in float16."""

import copy
import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.support.objectives import CPU, Data, make_config, ready
from torch_utils import distributed
from torch_utils.training_stats import Stats
from training.learned_transition import LearnedTransition
from training.loss_scale import GROW_AFTER, START, LossScale
from training.objectives.classifier import ClassifierObjective
from training.objectives.discriminator import DiscriminatorObjective
from training.objectives.dsm import DSM
from training.trained_network import TrainedNetwork


@pytest.fixture
def alone(monkeypatch):
    """Let this process believe that it is one of two. Collectives reach itself only."""
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# Data parallelism.


def test_ddp_takes_a_network_without_inputs_on_cuda(alone, monkeypatch):
    """DDP that knows its device's number moves its first input there, and LearnedTransition has none."""

    @functools.wraps(DistributedDataParallel)
    def ddp_on_cuda(module, device_ids=None, **kwargs):
        with unset_fake_temporarily(), torch.device("cpu"):
            wrapped = DistributedDataParallel(LearnedTransition(3), **kwargs)
        wrapped.device_ids = device_ids and [device.index for device in device_ids]  # On the CPU it drops them.
        return wrapped

    class OnCuda(LearnedTransition):
        def to(self, *args, **kwargs):
            return self  # It was created there.

    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", ddp_on_cuda)
    with FakeTensorMode(), torch.device("cuda", 0):
        trained = TrainedNetwork(OnCuda(3), torch.device("cuda", 0), lr=0.1)
    torch.testing.assert_close(trained.forward().sum(dim=1), torch.ones(3))


def test_bad_gradients_are_counted_after_the_backward_pass(alone):
    """DDP's hooks run on several CUDA streams at a time. A counter that they share loses counts."""
    trained = TrainedNetwork(torch.nn.Sequential(*(torch.nn.Linear(600, 600) for _ in range(3))), CPU, lr=0.1)
    assert isinstance(trained.forward, DistributedDataParallel)
    for bad in (0, 1, 1):  # from the second step on in several buckets
        trained.forward(torch.randn(2, 600) / (1 - bad)).sum().backward()
        assert int(trained.take_bad_grads()) == 0
        trained.update(0, 2)
        assert int(trained.take_bad_grads()) == 3 * 600**2 * bad and int(trained.take_bad_grads()) == 0
        assert all(p.isfinite().all() for p in trained.params)


# Memory layouts.


class Convolutions(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 6, 1), torch.nn.Conv2d(6, 5, 3))


def network(layout):
    torch.manual_seed(0)
    kwargs = dict(channels_last=layout == "channels last", shard=layout == "sharded")
    return TrainedNetwork(Convolutions(), CPU, lr=0.1, ema_halflife=1e3, **kwargs)


def step(trained, number):
    """Take a step with gradients that follow from the number, the same in every layout."""
    generator = torch.Generator().manual_seed(number)
    for p, whole in zip(trained.params, network("contiguous").params, strict=True):
        gradient = torch.randn(whole.shape, generator=generator)
        p.grad.copy_(gradient if p.shape == whole.shape else gradient.chunk(2)[0])
    trained.update(1000 * number, 100)


@pytest.fixture
def first_of_two():
    """The first of two processes whose collectives do nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "get_world_size", lambda: 2)
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        yield patch
        dist.destroy_process_group()


@pytest.mark.parametrize("saved, resumed", [("channels last", "contiguous"), ("contiguous", "channels last")])
def test_a_state_resumes_in_another_memory_layout(saved, resumed):
    interrupted, whole = network(saved), network(resumed)
    for number in (1, 2):
        step(interrupted, number)
        step(whole, number)
    state = copy.deepcopy(interrupted.state_dict())
    trained = network(resumed)
    trained.load_state_dict(state)
    step(trained, 3)
    step(whole, 3)
    for part in ("net", "ema"):
        for name, expected in getattr(whole, part).state_dict().items():
            torch.testing.assert_close(getattr(trained, part).state_dict()[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("saved", ["contiguous", "channels last"])
def test_a_whole_state_resumes_in_shards(saved, first_of_two):
    with first_of_two.context() as patch:
        patch.setattr(distributed, "get_world_size", lambda: 1)
        whole = network(saved)
    for number in (1, 2):
        step(whole, number)
    trained = network("sharded")
    trained.load_state_dict(copy.deepcopy(whole.state_dict()))
    step(trained, 3)
    step(whole, 3)
    for p, expected in zip(trained.params, whole.params, strict=True):
        torch.testing.assert_close(p.data, expected.data.chunk(2)[0], rtol=1e-5, atol=1e-6)


# float16.

RESNET = dict(depth="small", model_channels=16, channel_mult=[1, 2], dropout=0.0)


def classifier(config, data):
    return ready(ClassifierObjective, config, data, CPU, transition=None)


def discriminator(config, data):
    known = torch.arange(len(data)).numpy() % 3 > 0
    return ready(DiscriminatorObjective, config, data, CPU, right=known, noise_rates=known[:4] * 0.3)


def config_of(precision, **changes):
    config = make_config(precision=precision, discriminator=dict(label_path="x"), **changes)
    config.network.kwargs = dict(RESNET)
    return config


class Pairs(Data):
    def images_on(self, device, items):
        return self.pixels[items]


def gradients(make, precision):
    """Gradients of the first step as the optimizer gets them, in one vector."""
    objective, seen = make(config_of(precision), Pairs(n=128)), []
    data, trained = objective.dataset, objective.trained["net"]
    trained.optimizer.step = lambda: seen.append(torch.cat([p.grad.flatten().clone() for p in trained.params]))
    objective.step(data.pixels, data.onehot(torch.arange(len(data))), 0, Stats(CPU), torch.arange(len(data)))
    return seen[0]


@pytest.mark.parametrize("make", [classifier, discriminator])
def test_gradients_do_not_vanish_in_float16(make):
    full, half = (gradients(make, precision) for precision in ("fp32", "fp16"))
    assert full.count_nonzero() > 0.99 * full.numel()
    assert half.count_nonzero() > 0.99 * full.count_nonzero()
    assert (half - full).norm() < 0.01 * full.norm()


def test_a_step_that_overflows_is_skipped_and_halves_the_scale():
    for optimizer in ("adam", "adamw", "sgd"):
        scale = LossScale(1.0, CPU)
        trained = TrainedNetwork(torch.nn.Linear(3, 2), CPU, lr=0.1, optimizer=optimizer, loss_scale=scale)
        plain = TrainedNetwork(copy.deepcopy(trained.net), CPU, lr=0.1, optimizer=optimizer)
        for number, overflows in enumerate((True, False, True, False)):
            g = torch.randn(2, 3)
            trained.net.weight.grad.copy_(g * scale.factor)
            plain.net.weight.grad.copy_(g)
            if overflows:
                trained.net.weight.grad[0, 0] = float("inf")
            else:
                plain.update(number, 1)
            trained.update(number, 1)
            bad = trained.take_bad_grads()
            assert int(bad) == overflows and int(scale.update(bad)) == 0
            assert torch.equal(trained.net.weight, plain.net.weight), (optimizer, number)
        assert float(scale.factor) == START / 4


def test_the_scale_grows_and_reports_what_it_cannot_help():
    scale = LossScale(1.0, CPU)
    for _ in range(GROW_AFTER):
        scale.update(torch.tensor(0))
    assert float(scale.factor) == 2 * START
    faults = [int(scale.update(torch.tensor(5))) for _ in range(20)]
    assert faults == [0] * 17 + [5] * 3 and float(scale.factor) == 1
    other = LossScale(1.0, CPU)
    other.load_state_dict(scale.state_dict())
    for bad in itertools.chain([0] * (GROW_AFTER - 1), [7]):
        assert int(other.update(torch.tensor(bad))) == int(scale.update(torch.tensor(bad)))
    assert other.state_dict() == scale.state_dict() == dict(factor=1.0, good_steps=0)


def test_the_scale_is_part_of_the_state():
    data = Data()
    objective = classifier(config_of("fp16"), data)
    objective.loss_scale.update(torch.tensor(1))
    resumed = classifier(config_of("fp16"), data)
    resumed.load_state_dict(objective.state_dict())
    assert float(resumed.loss_scale.factor) == START / 2
    old = {name: part for name, part in objective.state_dict().items() if name == "net"}  # as version 0.1 wrote it
    resumed.load_state_dict(old)


def test_unets_keep_the_fixed_scale():
    objective = ready(DSM, make_config(precision="fp16", loss_scaling=100.0), Data(), CPU)
    assert objective.loss_scale.factor == 100.0 and not objective.loss_scale.adapts
    assert list(objective.state_dict()) == ["net"] and objective.trained["net"].loss_scale is objective.loss_scale
