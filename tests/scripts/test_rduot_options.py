"""train_rduot.py's published options of networks, noise schedule and optimizer: each changes what it says."""

import json
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import generate
import train_rduot
from sampling.ddgan import ddgan_sampler
from tests.support.runs import final_weights
from tests.support.synth import make_archive, pictures
from torch_utils import persistence
from training.networks_ddgan import DDGANGenerator
from training.noise_levels import DiffusionSteps
from training.presets import presets_of

TINY = "--num_channels_dae=8 --ch_mult=1,2 --num_res_blocks=1 --ngf=4 --nz=6 --z_emb_dim=8 --n_mlp=1 --batch=8".split()
SHORT = [*TINY, "--duration=0.000016", "--tick=0.008", "--snap=1", "--dump=1", "--seed=3"]
RARE = "--beta1 0.3 --beta2 0.95 --attn_resolutions 4 --use_geometric --beta_max 0.9 --no_lr_decay --t_emb_dim 6"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_archive(tmp_path_factory.mktemp("data") / "d.zip", pictures(16, channels=1))


def run(module, *args):
    result = CliRunner().invoke(module.main, [str(a) for a in args])
    return result.exit_code, result.output


def configuration(data, *args):
    code, output = run(train_rduot, f"--outdir={data}.out", f"--data={data}", "--dry-run", "--seed=0", *args)
    assert code == 0, output
    return json.loads(re.search(r"Training options:\n(\{.*?\n\})", output, re.S)[1])


def test_a_run_with_all_published_options(data, tmp_path):
    command = [
        f"--outdir={tmp_path}",
        f"--data={data}",
        *SHORT,
        *RARE.split(),
        "--lr_g=2e-3",
        "--not_use_tanh",
        "--centered",
    ]
    code, output = run(train_rduot, *command)
    assert code == 0, output
    run_dir = next(tmp_path.iterdir())
    net = persistence.load_snapshot(persistence.find_snapshot(str(run_dir)))["ema"]
    assert (net.geometric, net.beta_max, net.tanh, net.centered) == (True, 0.9, False, False)
    blocks = {name: block.num_heads for name, block in net.model.enc.items() if "block" in name}
    assert blocks["8x8_block0"] == 0 and blocks["4x4_block0"] == 1
    state = final_weights(run_dir)["objective"]
    for name, rate in (("net", 2e-3), ("potential", 1.25e-4)):
        (group,) = state[name]["optimizer"]["param_groups"]
        assert tuple(group["betas"]) == (0.3, 0.95) and group["lr"] == rate  # after the last step, without decay
    assert state["potential"]["net"]["map_layer0.weight"].shape == (6, 6)
    code, output = run(generate, f"--network={run_dir}", f"--outdir={tmp_path}/images", "--seeds=0-1")
    assert code == 0, output


def test_centered_and_tanh():
    """Xiao et al.'s generator without centering sees 2x - 1, without tanh gives what tanh would get."""
    torch.manual_seed(0)
    sizes = dict(model_channels=8, channel_mult=[1, 2], num_blocks=1, z_emb_dim=8, nz=6, n_mlp=1)
    usual, plain, uncentered = (
        DDGANGenerator(8, 1, **sizes, **own) for own in ({}, dict(tanh=False), dict(centered=False))
    )
    for p in usual.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    plain.load_state_dict(usual.state_dict())
    uncentered.load_state_dict(usual.state_dict())
    x, t, z = torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 3]), torch.randn(3, 6)
    assert plain(x, t, z).abs().max() > 1
    torch.testing.assert_close(usual(x, t, z), plain(x, t, z).tanh())
    torch.testing.assert_close(uncentered(x, t, z), usual(2 * x - 1, t, z))


def test_geometric_schedule():
    """The variance after time u is beta_min (beta_max / beta_min)^u, relative to that at the start."""
    steps = DiffusionSteps(3, 0.04, 0.36, geometric=True)
    u = np.arange(4) / 3 * (1 - 1e-3) + 1e-3
    kept = 1 - 0.04 * 9**u
    np.testing.assert_allclose(steps.abar.square(), kept / kept[0], rtol=1e-5)
    assert DiffusionSteps(**steps.settings()).geometric
    net = DDGANGenerator(8, 1, model_channels=8, channel_mult=[1], num_blocks=1, z_emb_dim=8, nz=6, **steps.settings())

    def sample():
        rng = torch.Generator().manual_seed(0)
        return ddgan_sampler(net, torch.zeros(2, 1, 8, 8), randn_like=lambda x: torch.randn(x.shape, generator=rng))

    geometric = sample()
    net.geometric = False
    assert (sample() != geometric).any()


def test_the_length_of_the_schedule_has_the_unit_of_the_training(data):
    for given, expected in {
        "--num_epoch=3": None,
        "--num_epoch=3 --schedule=5": 5 * 16,
        "--num_epoch=3 --schedule=2.5 --xflip=1": 2.5 * 32,
        "--duration=1 --schedule=0.5": 500_000,
        "--no_lr_decay": 0,
    }.items():
        assert configuration(data, *given.split())["rduot"]["schedule_nimg"] == expected, given
    args = [f"--outdir={data}.out", f"--data={data}", "-n"]
    assert (
        "over 80 images, and the training ends after 48" in run(train_rduot, *args, "--num_epoch=3", "--schedule=5")[1]
    )
    assert "Note" not in run(train_rduot, *args, "--num_epoch=5", "--schedule=5")[1]


def test_what_a_preset_says_in_vain_is_not_refused(data):
    """--preset=photos sets --ema_decay, --lazy_reg and --cost=robust."""
    found = configuration(data, "--preset=photos", "--no_use_ema", "--r1_gamma=0")
    assert found["ema_halflife_nimg"] == 0 and found["rduot"]["r1_gamma"] == 0


def test_centered_may_have_a_value(data):
    assert "centered" not in configuration(data, "--centered=1")["network"]["kwargs"]
    for given in (["--centered"], ["--centered=0"], ["--centered", "--use_ema"]):
        assert configuration(data, *given)["network"]["kwargs"]["centered"] is False


def test_what_does_not_fit_is_refused_before_there_is_a_run(data, tmp_path):
    for given, code, message in [
        ("--no_lr_decay --schedule=1", 2, "--no_lr_decay: then --schedule=1 means nothing"),
        ("--no_use_ema --ema_decay=0.9", 2, "--no_use_ema: then --ema_decay=0.9 means nothing"),
        ("--r1_gamma=0 --lazy_reg=3", 2, "--r1_gamma=0: then --lazy_reg=3 means nothing"),
        ("--cost=robust --phi2=linear", 2, "--phi2=linear: leaves no image out"),
        ("--use_geometric", 2, "beta_max=20: a geometric schedule needs 0 < beta_min < beta_max < 1"),
        ("--use_geometric --beta_max=0.05", 2, "0 < beta_min < beta_max < 1"),
        ("--beta_max=5000", 2, "beta_max=5000: too much noise"),
        ("--attn_resolutions 4 3", 2, r"--attn_resolutions=3: there are levels of \[8, 4\] pixels"),
        ("--beta1=1", 2, "--beta1"),
        ("--t_emb_dim=5", 1, "--t_emb_dim.*5 channels.*even"),
        ("--num_channels_dae=7", 1, "--num_channels_dae.*7 channels.*even"),
    ]:
        found, output = run(train_rduot, f"--outdir={tmp_path}/out", f"--data={data}", *SHORT, *given.split())
        assert found == code and re.search(rf"^Error: .*{message}", output, re.M), output
    assert not (tmp_path / "out").exists()


def test_published_settings():
    """Dao et al. 2024: what their paper states for each data set."""
    found = {name: preset.options for name, preset in presets_of("train_rduot.py").items()}
    for name in ("cifar10", "celeba64", "stl10", "celebahq256", "lsun256"):
        options = found[name]
        assert (options["phi1"], options["phi2"], options["cost"]) == ("softplus", "softplus", "pixels")
    assert (found["cifar10"]["tau"], found["cifar10"]["num_timesteps"], found["celeba64"]["tau"]) == (1e-3, 4, 3e-4)
    for name in ("celebahq256", "lsun256"):
        options = found[name]
        assert (options["ch_mult"], options["tau"]) == ("1,1,2,2,4,4", 1e-7)
        assert (options["r1_gamma"], options["lazy_reg"]) == (2.0, 10)


@pytest.mark.long
def test_one_step_at_256_pixels(tmp_path):
    data = make_archive(tmp_path / "large.zip", pictures(2, size=256))
    length = ["--batch=1", "--duration=0.000001", "--seed=0", "--workers=1"]
    code, output = run(train_rduot, f"--outdir={tmp_path}/out", f"--data={data}", "--preset=celebahq256", *length)
    assert code == 0, output
    net = persistence.load_snapshot(persistence.find_snapshot(str(next((tmp_path / "out").iterdir()))))["ema"]
    assert net.img_resolution == 256 and len([name for name in net.model.enc if name.endswith("_down")]) == 5
