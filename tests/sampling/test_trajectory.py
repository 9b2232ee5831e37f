"""generate.py --trajectory: the states of sampling, from noise to image."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import generate
from sampling.samplers import ablation_sampler, heun_sampler
from sampling.trajectory import Trajectories
from tests.support.generated import read
from tests.support.runs import torchrun
from torch_utils import persistence
from training.networks import EDMPrecond
from training.networks_ddgan import DDGANGenerator
from training.noise_levels import DiffusionSteps


class Gaussian:
    """The denoiser of images that are all 0: its states are the noise alone."""

    label_dim, img_channels, img_resolution, sigma_min, sigma_max = 0, 1, 2, 0, float("inf")

    @staticmethod
    def round_sigma(sigma):
        return torch.as_tensor(sigma)

    def __call__(self, x, sigma, class_labels=None):
        return torch.zeros_like(x)


@pytest.mark.parametrize(
    "sampler, settings",
    [
        (heun_sampler, dict(S_churn=2)),
        (ablation_sampler, {}),
        (ablation_sampler, dict(discretization="vp", schedule="vp", scaling="vp", sigma_max=5)),
    ],
)
def test_states_over_scale_have_the_stated_noise(sampler, settings):
    """All images are 0 here, so the standard deviation of state / scale is sigma."""
    seen = []
    torch.manual_seed(0)
    latents = torch.randn(4000, 1, 1, 1)
    curved = settings.get("scaling") == "vp"  # such a path is followed with an error that grows
    settings |= dict(num_steps=60 if curved else 6)
    images = sampler(Gaussian(), latents, observe=lambda *a: seen.append(a), **settings)
    assert len(seen) == settings["num_steps"] + 1 and torch.equal(seen[-1][0], images) and seen[-1][1:] == (0.0, 1.0)
    for x, sigma, scale in seen[: -20 if curved else None]:
        assert float((x / scale).std()) == pytest.approx(sigma, rel=0.08, abs=1e-9)
    assert [s for _, s, _ in seen] == sorted((s for _, s, _ in seen), reverse=True)
    torch.manual_seed(0)
    torch.randn(4000, 1, 1, 1)
    assert torch.equal(sampler(Gaussian(), latents, **settings), images)  # watching changes nothing


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """The snapshot of a tiny denoiser of three classes."""
    path = tmp_path_factory.mktemp("network") / "net.pkl"
    torch.manual_seed(0)
    net = EDMPrecond(8, 1, 3, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[])
    save(path, net, "dsm")
    return path


def save(path, net, method):
    snapshot = dict(ema=net.eval(), loss_fn=None, augment_pipe=None, dataset_kwargs={}, info=dict(method=method))
    persistence.save_snapshot(str(path), snapshot)


def run(*args):
    result = CliRunner().invoke(generate.main, [str(a) for a in args])
    return result.exit_code, result.output


def test_the_file_of_a_denoiser(network, tmp_path):
    command = [f"--network={network}", "--steps=3", "--seeds=5,2,9-11", "--class=1", "--batch=2", "--device=cpu"]
    path = tmp_path / "new" / "t.npz"
    code, output = run(*command, f"--outdir={tmp_path}/a", f"--trajectory={path}")
    assert code == 0, output
    with np.load(path) as file:
        found = dict(file)
    assert found["seeds"].tolist() == [5, 2, 9, 10, 11] and found["classes"].tolist() == [1] * 5
    states = found["states"]
    assert states.dtype == np.float32 and states.shape == (5, 4, 1, 8, 8)
    assert found["sigma"][0] == 80 and found["sigma"][-1] == 0 and (found["scale"] == 1).all()
    first = torch.randn(states.shape[2:], generator=torch.Generator().manual_seed(2))
    np.testing.assert_allclose(states[1, 0], first * 80, rtol=1e-5)
    images, _ = read(tmp_path / "a")  # in the order of their names: 2, 5, 9, 10, 11
    last = np.clip(states[[1, 0, 2, 3, 4], -1] * 127.5 + 128, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(last, images)
    assert sorted(p.name for p in path.parent.iterdir()) == ["t.npz"]


def test_the_file_of_a_generator(tmp_path):
    """Its first state is noise of standard deviation 1 and its last one is the image."""
    steps = DiffusionSteps(2)
    net = DDGANGenerator(
        8, 1, model_channels=8, channel_mult=[1], num_blocks=1, z_emb_dim=8, nz=6, n_mlp=1, **steps.settings()
    )
    save(tmp_path / "net.pkl", net, "ddgan")
    args = [f"--network={tmp_path}/net.pkl", "--seeds=0-2", f"--outdir={tmp_path}/a.zip"]
    code, output = run(*args, f"--trajectory={tmp_path}/t.npz", "--device=cpu")
    assert code == 0, output
    found = np.load(tmp_path / "t.npz")
    assert found["states"].shape == (3, 3, 1, 8, 8) and "classes" not in found
    np.testing.assert_allclose(found["scale"], [steps.abar[2], steps.abar[1], 1], rtol=1e-6)
    np.testing.assert_allclose((found["sigma"] * found["scale"])[:2], (1 - steps.abar[[2, 1]] ** 2).sqrt(), rtol=1e-5)
    assert np.abs(found["states"][:, -1]).max() <= 1 and found["sigma"][-1] == 0


def test_what_does_not_fit_is_refused_before_the_work(network, tmp_path):
    for args, message in [
        (["--trajectory=t.txt"], "ends in .npz"),
        (["--trajectory=t.npz", "--resume"], "leave out --resume"),
        ([f"--trajectory={network}/t.npz"], "--trajectory"),
    ]:
        code, output = run("--network=nowhere.pkl", f"--outdir={tmp_path}/a", *args)
        assert code == 2 and message in output, output


@pytest.mark.long
def test_two_processes_write_the_same_file(network, tmp_path):
    command = [f"--network={network}", "--steps=2", "--seeds=0-2", "--class=0", "--batch=1", "--device=cpu"]
    code, output = run(*command, f"--outdir={tmp_path}/a", f"--trajectory={tmp_path}/a.npz")
    assert code == 0, output
    torchrun("generate.py", *command, f"--outdir={tmp_path}/b", f"--trajectory={tmp_path}/b.npz")
    one, two = np.load(tmp_path / "a.npz"), np.load(tmp_path / "b.npz")
    for name in one.files:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-4, atol=1e-4)
    assert not [p for p in tmp_path.iterdir() if "part" in p.name]


def test_batches_that_wait_keep_their_order(tmp_path):
    """A GPU makes the next batch before the last one arrives."""
    trajectories = Trajectories(str(tmp_path / "t.npz"))
    sampler = trajectories.record(heun_sampler)
    for value in (1.0, 2.0, 3.0):
        sampler(Gaussian(), torch.full([1, 1, 2, 2], value), num_steps=2)
    list(trajectories.watch([([7], None, None), ([5], None, None), ([6], None, None)]))
    trajectories.save()
    found = np.load(tmp_path / "t.npz")
    assert found["seeds"].tolist() == [7, 5, 6]
    np.testing.assert_allclose(found["states"][:, 0, 0, 0, 0], [80, 160, 240])


def test_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    trajectories = Trajectories(str(tmp_path / "t.npz"))
    sampler = trajectories.record(heun_sampler)
    sampler(Gaussian(), torch.randn(2, 1, 2, 2), num_steps=2)
    assert len(list(trajectories.watch([([0, 1], None, None)]))) == 1

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(OSError, match="No space"):
        trajectories.save()
    assert not list(tmp_path.glob("*.npz"))
