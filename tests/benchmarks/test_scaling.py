"""Test the cost model against closed forms, its simulation in extreme cases, and the data order on many processes."""

import json
import os
import zipfile

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import dataset_tool
from archives.dataset import ImageDataset
from benchmarks import cost_model, scaling, scaling_data
from benchmarks.cost_model import Counts, Hardware, Workload
from tests.support.synth import make_archive, pictures
from training.networks import UNetBlock
from training.presets import network_kwargs

LAYERS = ((1000, 5.0), (2000, 3.0), (3000, 2.0))


def test_flops_weights_and_activations_of_layers_counted_by_hand():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(8, 4, 1))
    counts = cost_model.count(net, (torch.empty(1, 3, 16, 16, device="meta", requires_grad=True),), (torch.nn.Conv2d,))
    first, second = 2 * 256 * 27 * 8, 2 * 256 * 8 * 4
    assert counts.layers == ((27 * 8 + 8, first), (8 * 4 + 4, second))
    assert (counts.params, counts.forward, counts.train) == (260, first + second, 3 * (first + second))
    assert counts.activations == 4 * 256 * (3 + 8 + 8) and counts.largest == 224


def test_counts_are_of_a_real_denoiser():
    counts = scaling.counts_of("ddpmpp_tiny", 8, 3, 10)
    assert sum(params for params, _ in counts.layers) == counts.params
    assert sum(flops for _, flops in counts.layers) == pytest.approx(counts.forward, rel=0.01)  # Attention is the rest.
    assert 2.9 < counts.train / counts.forward < 3.01
    blocks = [
        m for m in scaling.EDMPrecond(8, 3, 10, **network_kwargs("ddpmpp_tiny")).modules() if isinstance(m, UNetBlock)
    ]
    assert counts.largest == max(sum(p.numel() for p in block.parameters()) for block in blocks)


def test_bytes_on_the_network():
    assert cost_model.ddp_bytes(1000, 1) == 0 and cost_model.ddp_bytes(1000, 2) == 4000
    assert cost_model.ddp_bytes(1000, 1000) == pytest.approx(7992)
    assert cost_model.fsdp_bytes(1000, 8, 8) == (pytest.approx(3 * 7 / 8 * 4000), 0)
    assert cost_model.fsdp_bytes(1000, 16, 8) == (pytest.approx(10_500), pytest.approx(500))  # 4000 / 8 for 2 machines
    assert cost_model.fsdp_bytes(1000, 2, 8, scatter=2)[0] == 8000


@given(st.integers(2, 4096), st.floats(1, 1e10), st.floats(1e-7, 1e-3))
def test_an_all_reduce_is_never_faster_than_its_bytes_and_one_message_there_and_back(n, size, latency):
    seconds = cost_model.all_reduce_seconds(size, n, Hardware(machine=4096, link=1e9, latency=latency))
    assert seconds >= 2 * latency + 2 * (n - 1) / n * size / 1e9 * (1 - 1e-9)
    ring = 2 * (n - 1) * latency + 2 * (n - 1) / n * size / 1e9
    tree = 2 * (n - 1).bit_length() * latency + 2 * size / 1e9
    assert seconds == pytest.approx(min(ring, tree))


def test_an_all_reduce_over_machines_sends_a_share_of_the_bytes_between_them():
    hw = Hardware(machine=8, link=4e9, network=1e9, latency=0.0)
    within, between = 2 * 7 / 8 * 8e9 / 4e9, 2 * 124 / 125 * 1e9 / 1e9
    assert cost_model.all_reduce_seconds(8e9, 1000, hw) == pytest.approx(within + between)
    assert cost_model.all_reduce_seconds(8e9, 8, hw) == pytest.approx(within)
    assert 7 / 8 * 2 + 124 / 125 / 8 * 2 == pytest.approx(cost_model.ddp_bytes(1, 1000) / 4)  # the same bytes in all


def test_memory_and_what_sharding_saves():
    counts = Counts(params=10**9, forward=1, train=3, activations=2e8, largest=10**7, layers=LAYERS)
    assert cost_model.ddp_memory(counts) == 20e9 and cost_model.fsdp_memory(counts, 8) == 3e9 + 16e7
    assert cost_model.images_at_a_time(counts, 20e9, Hardware(memory=100e9)) == 700
    assert cost_model.images_at_a_time(counts, 120e9, Hardware(memory=100e9)) == 0


@pytest.mark.parametrize(("size", "channels"), [(8, 3), (16, 1), (256, 3)])  # The last needs several deflate blocks.
def test_an_archive_has_the_bytes_that_the_model_says(tmp_path, size, channels):
    from_tool = tmp_path / "tool.zip"
    source = make_archive(tmp_path / "d.zip", pictures(5, size=size, channels=channels))
    assert CliRunner().invoke(dataset_tool.main, [f"--source={source}", f"--dest={from_tool}"]).exit_code == 0
    with zipfile.ZipFile(from_tool) as file:
        labels = file.getinfo("dataset.json")
        rest = labels.compress_size + 30 + 46 + 2 * len(labels.filename) + 22
    assert os.path.getsize(from_tool) - rest == cost_model.archive_bytes(5, size, channels)


def test_states_are_best_written_as_young_says():
    interval, lost = cost_model.checkpointing(write=50.0, mtbf=10_000.0, restart=100.0)
    assert interval == 1000 and lost == pytest.approx(0.05 + 0.05 + 0.01)
    for other in (900, 1100):
        assert 50 / other + (other / 2 + 100) / 10_000 > lost


def test_buckets_hold_all_gradients_the_last_layers_first():
    assert cost_model.buckets(LAYERS, (1, 1)) == [(12_000, 0.2), (8000, 0.5), (4000, 1.0)]
    assert cost_model.buckets(LAYERS, (12_000, 12_000)) == [(12_000, 0.2), (12_000, 1.0)]
    assert cost_model.buckets(LAYERS) == [(24_000, 1.0)]


def simulate(compute=1.0, n=8, bandwidth=1e9, jitter=0.0, **kwargs):
    hw = Hardware(link=bandwidth, network=bandwidth, latency=0.0, jitter=jitter)
    return cost_model.simulate_steps(LAYERS, compute, n, hw, **kwargs)


def test_a_step_without_network_waits_for_the_slowest_of_exponential_delays():
    for n in (8, 1000):
        found = simulate(n=n, bandwidth=1e30, jitter=0.01, steps=4000)
        assert found["waiting"] == pytest.approx(0.01 * sum(1 / k for k in range(1, n + 1)), rel=0.03)
        assert found["exposed"] == pytest.approx(0, abs=1e-9)


def test_network_hides_behind_backward_until_it_is_slower(monkeypatch):
    monkeypatch.setattr(cost_model, "buckets", lambda layers: [(12e6, 0.2), (8e6, 0.5), (4e6, 1.0)])
    whole = [2 * 7 / 8 * size / 1e9 for size in (12e6, 8e6, 4e6)]
    found = simulate(compute=30.0)  # Only the last bucket shows.
    assert found["step"] == pytest.approx(30 + whole[2]) and found["exposed"] == pytest.approx(whole[2])
    found = simulate(compute=1e-9)  # There is nothing to hide behind.
    assert found["step"] == pytest.approx(sum(whole), rel=1e-6)
    assert simulate(compute=30.0, n=1)["step"] == 30


def test_a_run_is_its_steps(monkeypatch):
    work = Workload("w", 1000, 8, 3, 0, "x", batch=100, total=1e6)
    counts = Counts(params=10**6, forward=1e9, train=3e9, activations=1e6, largest=10, layers=LAYERS)
    hw = Hardware(peak=1e12, utilization=0.5, jitter=0.0, link=1e30, latency=0.0, gpu_mtbf=3600.0, disk=1e9)
    row = cost_model.cost(work, counts, 8, hw)
    assert (row["per_gpu"], row["batch"], row["steps"]) == (13, 104, 9616)
    assert row["step"] == pytest.approx(13 * 3e9 / 5e11) and row["hours"] == pytest.approx(9616 * row["step"] / 3600)
    assert row["flops_run"] == 9616 * 104 * 3e9 and row["gpu_hours"] == pytest.approx(8 * row["hours"])
    assert row["state"] == 16e6 and row["snapshots"] == 4e6 and row["failures"] == pytest.approx(8 * row["hours"])
    twice = cost_model.cost(work, counts, 8, hw, extra=3e9)
    assert twice["hours"] == pytest.approx(2 * row["hours"])


def test_data_order_gives_every_image_once_to_one_of_the_processes(monkeypatch):
    assert scaling_data.each_image_once(101, 7, 3, epochs=4)
    order = scaling_data.BatchStream._order
    monkeypatch.setattr(scaling_data.BatchStream, "_order", lambda self, epoch: order(self, self._position % 2))
    assert not scaling_data.each_image_once(101, 7, 3, epochs=4)


@pytest.mark.parametrize("labels", [False, True])
def test_synthetic_archives_are_read_like_any_others(tmp_path, labels):
    size = scaling_data.synthetic_archive(tmp_path / "a.zip", 70_000, labels)  # Counting them takes more than 16 bits.
    dataset = ImageDataset(str(tmp_path / "a.zip"))
    assert len(dataset) == 70_000 and dataset.image(69_999).tolist() == [[[0]]] and dataset.has_labels == labels
    with zipfile.ZipFile(tmp_path / "a.zip") as file:
        assert file.start_dir + size <= os.path.getsize(tmp_path / "a.zip") and len(file.infolist()) == 70_000 + labels


def test_a_line_is_fitted_through_times():
    latency, bandwidth = scaling.fit_line({str(size): 2e-4 + size / 1e9 for size in scaling.SIZES})
    assert (latency, bandwidth) == (pytest.approx(1e-4), pytest.approx(1e9))


def test_the_command_without_measuring(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "WORKLOADS", (Workload("small", 1000, 8, 3, 10, "ddpmpp_tiny", 128, 1e6),))
    out = tmp_path / "r.json"
    result = CliRunner().invoke(scaling.main, ["--measure=0", f"--out={out}", "--gpus=8,1000", "--utilization=0.1"])
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["model"]
    assert [(row["n"], row["method"]) for row in rows[:2]] == [(8, "DSM"), (8, "TDSM --pairs=1")] and len(rows) == 8
    assert rows[4]["batch"] == 1000 and rows[3]["flops_image"] > rows[2]["flops_image"] > rows[0]["flops_image"]
    lines = [line for line in result.output.splitlines() if line.startswith("| small | 8 | TDSM --pairs=3 |")]
    assert len(lines) == 1 and lines[0].count("|") == 1 + len(scaling.COMPUTE)
    assert np.isclose(rows[0]["compute"], 16 * rows[0]["flops_image"] / 98.9e12)
