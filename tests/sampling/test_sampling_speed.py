"""The fast forms of sampling make the same images: precision, compilation, batches of one size, guidance, writing."""

import copy
import errno
import functools
import os
import re
import threading

import numpy as np
import pytest
import torch

from archives.writer import ArchiveWriter
from benchmarks import sampling_rows
from sampling.generation import batch_size, generate_images
from sampling.guidance import ClassifierFreeGuidance, gated_discriminator
from sampling.loading import prepare
from sampling.output import save_images
from sampling.samplers import ablation_sampler, heun_sampler
from tests.support.denoisers import Recorder, denoise, linear
from tests.support.generated import FAST, assert_same_images, make, random_network, read, run
from torch_utils import persistence
from training.networks_ddgan import DDGANGenerator

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    path = tmp_path_factory.mktemp("network") / "cond.pkl"
    persistence.save_snapshot(str(path), dict(ema=random_network(), info={}))
    return f"--network={path}"


def images_of(net, n=20, **kwargs):
    return np.concatenate([x for _, x, _ in generate_images(net, range(n), device=CPU, **kwargs)])


# Precision and compilation.


def test_bf16_stays_within_a_gray_level_where_it_runs(network, tmp_path):
    make(tmp_path / "plain", network, "--seeds=0-39", "--steps=18")
    make(tmp_path / "bf16", network, "--seeds=0-39", "--steps=18", "--precision=bf16")
    plain, bf16 = (read(tmp_path / name)[0].astype(int) for name in ("plain", "bf16"))
    assert (np.abs(plain - bf16) <= 1).mean() >= 0.999 and (plain != bf16).any()


def test_bf16_is_for_the_branches_alone():
    net = prepare(random_network(), "bf16")
    lowered = {
        name.rpartition(".")[0].rpartition(".")[2] for name, p in net.named_parameters() if p.dtype == torch.bfloat16
    }
    assert lowered == {"conv0", "conv1", "qkv", "proj"}
    seen = []
    for name, layer in net.named_modules():
        if "norm" in name or name.endswith(("_block0", "_in0")):
            layer.register_forward_hook(lambda _, args, output: seen.extend([args[0].dtype, output.dtype]))
    assert net(torch.randn(2, 1, 8, 8), torch.tensor(1.0), torch.eye(3)[:2]).dtype == torch.float32
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_what_only_cuda_has_is_refused_elsewhere(network, tmp_path, precision):
    result = run(f"--outdir={tmp_path / 'out'}", network, *FAST, f"--precision={precision}")
    assert result.exit_code == 2 and f"--precision={precision}: for CUDA only, this is cpu" in result.output
    assert os.listdir(tmp_path) == []


def test_a_compiled_network_is_one_graph_for_all_batches(network, tmp_path, monkeypatch):
    graphs = []

    def compile(module, **kwargs):
        options = {k: v for k, v in kwargs.items() if k != "options"}
        module._compiled_call_impl = torch.compile(
            module._call_impl, **options, backend=lambda graph, _: (graphs.append(graph), graph.forward)[1]
        )

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    args = [network, "--seeds=0-9", "--batch=4"]
    make(tmp_path / "compiled", *args, "--compile", "--precision=bf16", "--cfg=2")
    make(tmp_path / "eager", *args, "--precision=bf16", "--cfg=2")
    assert len(graphs) == 1
    assert_same_images(read(tmp_path / "compiled")[0], read(tmp_path / "eager")[0])


@pytest.mark.long
@pytest.mark.parametrize("precision", [None, "bf16"])
def test_compiled_networks_make_the_same_images(precision):
    net = random_network()
    compiled = prepare(copy.deepcopy(net), precision, compile=True)
    plain, fast = images_of(prepare(net, precision)), images_of(compiled, batch=8, same_shape=True)
    assert (np.abs(plain.astype(int) - fast) <= 1).mean() >= 0.999


def test_generators_of_few_steps_take_the_same_forms():
    torch.manual_seed(0)
    net = (
        DDGANGenerator(
            8,
            1,
            3,
            num_timesteps=2,
            nz=8,
            z_emb_dim=16,
            n_mlp=1,
            model_channels=16,
            channel_mult=[1, 2],
            num_blocks=1,
            attn_resolutions=[],
        )
        .eval()
        .requires_grad_(False)
    )
    fast = prepare(copy.deepcopy(net), "bf16")
    x, t, z, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 0, 1]), torch.randn(4, 8), torch.eye(3)[[0, 1, 2, 0]]
    expected, found = net(x, t, z, labels), fast(x, t, z, labels)
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().max() < 0.02 * expected.abs().max()


# Batches of one size.


@pytest.mark.parametrize("n, batch, size", [(10, 4, 4), (65, 64, 33), (3, 64, 3), (64, 64, 64), (1, 1, 1), (0, 4, 1)])
def test_batches_of_one_size_waste_little(n, batch, size):
    assert batch_size(n, batch) == size


def test_batches_of_one_size_make_the_same_images():
    net, sizes = random_network(), []
    sampler = functools.partial(heun_sampler, num_steps=3, S_churn=20)
    plain = images_of(net, 11, batch=11, sampler=sampler, class_idx=[i % 3 for i in range(11)])
    net.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    parts = list(
        generate_images(
            net, range(11), device=CPU, batch=5, sampler=sampler, same_shape=True, class_idx=[i % 3 for i in range(11)]
        )
    )
    assert set(sizes) == {4} and [len(part) for part, _, _ in parts] == [4, 4, 3]
    assert np.concatenate([classes for _, _, classes in parts]).tolist() == [i % 3 for i in range(11)]
    assert_same_images(np.concatenate([images for _, images, _ in parts]), plain)


# Guidance.


@pytest.mark.parametrize("sampler", [heun_sampler, functools.partial(ablation_sampler, schedule="vp", scaling="vp")])
def test_no_step_asks_the_device_for_a_number(monkeypatch, sampler):
    probe = Recorder(linear)
    net = gated_discriminator(Recorder(denoise), probe, weights=(0.01, 0.01), gate=(1.5, 50))
    calls = []

    def counted(read):
        return lambda *args, **kwargs: (calls.append(read), read(*args, **kwargs))[1]

    for name in ("__bool__", "__float__", "__int__", "item", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))

    def sample(steps):
        calls.clear()
        sampler(net, torch.ones([2, 1, 2, 2]), torch.eye(3)[:2], num_steps=steps)
        return len(calls)

    assert sample(4) == sample(9)
    assert probe.calls and all(1.5 <= sigma <= 50 for _, sigma, _ in probe.calls)


@pytest.mark.parametrize("sigma", [torch.tensor(2.0), torch.tensor([1.0, 2.0, 3.0])])
def test_classifier_free_guidance_is_one_batch(sigma):
    def level(y):
        return (y @ torch.arange(1.0, 4)).reshape(-1, 1, 1, 1)

    net = Recorder(lambda x, sigma, y: x / (1 + sigma.reshape(-1, 1, 1, 1)) + level(y))
    x, labels = torch.randn(3, 1, 2, 2), torch.eye(3)
    found = ClassifierFreeGuidance(net, 2.5)(x, sigma, labels)
    assert [len(x) for x, _, _ in net.calls] == [6]
    plain = [Recorder(net.function)(x, sigma, y) for y in (torch.zeros_like(labels), labels)]
    torch.testing.assert_close(found, plain[0] + 2.5 * (plain[1] - plain[0]))


# Where the images go.


def test_batches_are_written_in_order_while_the_next_is_made(tmp_path, monkeypatch):
    threads, stored, made = set(), [], []
    add = ArchiveWriter.add

    def slow(self, name, data):
        threads.add(threading.current_thread())
        stored.append(name)
        add(self, name, data)

    def batches():
        for i in range(6):
            made.append(i)
            assert len(stored) >= 2 * (i - 1)  # no more than the batch before waits in memory
            yield [2 * i, 2 * i + 1], np.full([2, 8, 8, 1], i, np.uint8), None

    monkeypatch.setattr(ArchiveWriter, "add", slow)
    save_images(batches(), str(tmp_path / "out.zip"))
    assert stored == [f"{i:06d}.png" for i in range(12)] + ["dataset.json"]
    assert len(threads) == 2 and threading.main_thread() in threads  # it adds dataset.json alone
    assert read(tmp_path / "out.zip")[0][:, 0, 0, 0].tolist() == [i // 2 for i in range(12)]


def test_an_archive_that_cannot_grow_ends_the_run(tmp_path, monkeypatch):
    def full(self, name, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ArchiveWriter, "add", full)
    batches = (([i], np.zeros([1, 8, 8, 1], np.uint8), None) for i in range(100))
    with pytest.raises(OSError, match="No space left"):
        save_images(batches, str(tmp_path / "out.zip"))
    assert os.listdir(tmp_path) == [] and next(batches)[0][0] < 4


# The benchmark.


@pytest.mark.long
def test_benchmark_rows(monkeypatch):
    monkeypatch.setattr(sampling_rows, "CASES", [("ddpmpp_tiny", None, 1, 8, 8)])
    default, bf16 = sampling_rows.rows(1, forms=("default", "bf16"), steps=3)
    assert default.name == "sampling, default, ddpmpp_tiny, 8x8" and "100.000% of pixels" in default.note
    assert (bf16.precision, bf16.images) == ("bf16", 8) and float(re.search(r"([\d.]+)% of", bf16.note)[1]) > 99
    assert default.flops == bf16.flops > 0 and min(default.ours_seconds, default.plain_seconds) > 0
