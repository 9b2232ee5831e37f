"""train_rduot.py and generate.py on what it makes, through their command lines."""

import json
import re

import numpy as np
import pytest
from click.testing import CliRunner

import dataset_tool
import generate
import train_rduot
from archives.dataset import ImageDataset
from tests.support.generated import assert_same_images, read
from tests.support.runs import assert_same, final_weights, torchrun
from tests.support.synth import make_archive, pictures
from torch_utils import persistence

PUBLISHED = (
    "--num_channels_dae 128 --num_timesteps 4 --num_res_blocks 2 --batch_size 64 --ngf 64 --nz 100 "
    "--z_emb_dim 256 --n_mlp 4 --embedding_type positional --use_ema --ema_decay 0.9999 --r1_gamma 0.02 "
    "--lr_d 1.25e-4 --lr_g 1.6e-4 --lazy_reg 15 --ch_mult 1 2 2 2 --phi1 softplus --phi2 softplus "
    "--num_epoch 3"
).split()
TINY = [
    "--num_channels_dae=8",
    "--ch_mult",
    "1",
    "2",
    "--num_res_blocks=1",
    "--ngf=4",
    "--nz=6",
    "--z_emb_dim=8",
    "--n_mlp=1",
    "--batch=8",
    "--tick=0.016",
    "--snap=1",
    "--dump=1",
    "--seed=3",
    "--lazy_reg=4",
    "--ema_decay=0.9",
]


def invoke(script, *args):
    return CliRunner().invoke(script.main, [str(a) for a in args])


def succeed(script, *args):
    result = invoke(script, *args)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


def fail(exit_code, match, script, *args):
    result = invoke(script, *args)
    assert result.exit_code == exit_code, result.output + repr(result.exception)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: ") and re.search(match, lines[0]), lines


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """64 gray images of two classes, every eighth of them nearly uniform and recorded as an outlier."""
    images = pictures(64, channels=1)
    images[::8] = images[::8] // 8 + 112
    names = [f"00000/img{i:08d}.png" for i in range(0, 64, 8)]
    path = tmp_path_factory.mktemp("data") / "mixed.zip"
    return make_archive(path, images, [i % 2 for i in range(64)], outliers=names)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The run directory of an uninterrupted conditional run of 12 steps."""
    outdir = tmp_path_factory.mktemp("trained")
    succeed(train_rduot, f"--outdir={outdir}", f"--data={data}", "--cond=1", "--duration=0.000096", *TINY)
    return outdir / "00000-mixed-cond-rduot-gpus1-batch8-fp32"


def test_archive_knows_its_outliers(data):
    outliers = ImageDataset(str(data), xflip=True, use_labels=False).outliers
    assert outliers.dtype == bool and np.array_equal(outliers.nonzero()[0], np.arange(0, 128, 8))


def test_run_directory(trained):
    row = json.loads((trained / "stats.jsonl").read_text().splitlines()[0])  # the first step, which has R1
    for name in ("Loss/loss", "Loss/potential", "Potential/tau_cost", "Potential/size", "Potential/r1"):
        assert np.isfinite(row[name]["mean"]), name
    log = (trained / "log.txt").read_text()
    assert re.search(r"Transport cost \(pixels\), mean: \S+ for clean images, \S+ for outliers", log)
    assert "Warning: the outliers cost less" in log
    assert (trained / "samples-000000.png").exists()
    snapshot = persistence.load_snapshot(persistence.find_snapshot(str(trained)), kind="generator")
    assert snapshot["info"]["method"] == "rduot" and snapshot["loss_fn"]["tau"] == 0.001
    assert snapshot["ema"].label_dim == 2 and snapshot["ema"].num_timesteps == 4
    state = final_weights(trained)["objective"]
    assert state.keys() == {"net", "potential"}
    weights = state["net"]
    assert any((weights["net"][k] != weights["ema"][k]).any() for k in weights["net"])


def test_outliers_of_a_label_file_replace_those_on_record(data, tmp_path):
    """The file calls the usual images outliers, and these are the expensive ones: the warning goes away."""
    names = [f"00000/img{i:08d}.png" for i in range(64)]
    np.savez(tmp_path / "l.npz", names=names, is_outlier=np.arange(64) % 8 != 0)  # all but the outliers on record
    args = [f"--data={data}", "--duration=0.000008", "--cond=1", *TINY]
    output = succeed(train_rduot, f"--outdir={tmp_path}", f"--outlier_data={tmp_path}/l.npz", *args)
    assert "Transport cost (pixels), mean" in output and "Warning: the outliers cost less" not in output
    np.savez(tmp_path / "l.npz", names=names[1:], is_outlier=np.zeros(63, bool))
    result = CliRunner().invoke(train_rduot.main, [f"--outdir={tmp_path}/b", f"--outlier_data={tmp_path}/l.npz", *args])
    assert result.exit_code == 1 and f"--outlier_data: {tmp_path}/l.npz: lacks 1 of the 64 images" in result.output


def options(output):
    return json.loads(re.search(r"Training options:\n(\{.*?\n\})", output, re.S).group(1))


def test_published_flags(data, tmp_path):
    args = [f"--outdir={tmp_path}/out", f"--data={data}", *PUBLISHED]
    config = options(succeed(train_rduot, *args, "--seed=1", "-n"))
    kwargs = config["network"]["kwargs"]
    assert config["network"]["potential_kwargs"]["model_channels"] == 64 and kwargs["channel_mult"] == [1, 2, 2, 2]
    assert (kwargs["model_channels"], kwargs["nz"], kwargs["z_emb_dim"], kwargs["n_mlp"]) == (128, 100, 256, 4)
    assert config["optimizer"] == dict(name="adam", lr=dict(net=1.6e-4, potential=1.25e-4), betas=[0.5, 0.9])
    assert config["rduot"] == dict(
        num_timesteps=4,
        beta_min=0.1,
        beta_max=20.0,
        geometric=None,
        phi1="softplus",
        phi2="softplus",
        cost="pixels",
        distance="features",
        tau=1e-3,
        balanced=True,
        r1_gamma=0.02,
        lazy_reg=15,
        schedule_nimg=None,
    )
    assert config["total_nimg"] == 3 * 64 and config["batch_size"] == 64  # three passes over the data
    assert not {"lr", "arch", "precond"} & config.keys() and not (tmp_path / "out").exists()
    # Dashes and underscores alike; lists with commas too.
    dashes = [arg.replace("_", "-") for arg in PUBLISHED]
    assert options(succeed(train_rduot, *args[:2], *dashes, "--seed=1", "-n")) == config
    kwargs = options(succeed(train_rduot, *args[:2], "--ch_mult=1,3", "-n"))["network"]["kwargs"]
    assert kwargs["channel_mult"] == [1, 3]


def test_other_methods_and_settings(data, tmp_path):
    args = [f"--data={data}", *(option for option in TINY if not option.startswith("--ema")), "--tick=1"]
    succeed(
        train_rduot,
        *args,
        "--num_epoch=1",
        f"--outdir={tmp_path}/a",
        "--method=ddgan",
        "--num_timesteps=2",
        "--xflip=1",
        "--no_use_ema",
        "--embedding_type=fourier",
        "--precision=bf16",
        "--beta_min=0.2",
        "--beta_max=10",
    )
    run_dir = tmp_path / "a" / "00000-mixed-uncond-ddgan-gpus1-batch8-bf16"
    net = persistence.load_snapshot(persistence.find_snapshot(str(run_dir)))["ema"]
    assert (net.num_timesteps, net.beta_min, net.beta_max) == (2, 0.2, 10)
    state = final_weights(run_dir)
    assert state["nimg"] == 128  # a pass over images and mirror images
    assert_same(state["objective"]["net"]["net"], state["objective"]["net"]["ema"])
    assert "Warning" not in (run_dir / "log.txt").read_text()  # the baseline prices nothing
    output = succeed(generate, f"--network={run_dir}", f"--outdir={tmp_path}/images", "--seeds=0-2")
    assert "2 network evaluations per image" in output
    for cost, tau in (("standardized", 0.001), ("features", 0.001), ("robust", 10)):
        succeed(
            train_rduot,
            *args,
            f"--outdir={tmp_path}/{cost}",
            f"--cost={cost}",
            "--duration=0.000016",
            "--phi1=kl",
            "--phi2=chi",
            "--batch_gpu=4",
            "--dropout=0.1",
        )
        log = next((tmp_path / cost).iterdir()) / "log.txt"
        assert f"Transport cost ({cost})" in log.read_text() and f'"tau": {tau}' in log.read_text()
        assert ("The cost leaves out" in log.read_text()) == (cost == "robust")
    snapshot = persistence.find_snapshot(str(run_dir))
    other = [f"--data={data}", f"--outdir={tmp_path}/b", "--duration=0.000008", *TINY, f"--transfer={snapshot}"]
    assert re.search(r"Transferred \d+ tensors", succeed(train_rduot, *other))


def test_on_clean_images_the_robust_cost_trains_as_ddgan_does(tmp_path):
    data, weights = tmp_path / "digits.zip", {}
    succeed(dataset_tool, "--source=digits", f"--dest={data}")
    for name, option in (("ddgan", "--method=ddgan"), ("robust", "--cost=robust")):
        succeed(train_rduot, f"--outdir={tmp_path}/{name}", f"--data={data}", "--duration=0.000024", *TINY, option)
        run_dir = next((tmp_path / name).iterdir())
        weights[name] = final_weights(run_dir)["objective"]
        if name == "robust":
            assert "leaves out 0.0% of 1,797 training images.\nThe set looks clean" in (run_dir / "log.txt").read_text()
    for net in ("net", "potential"):
        assert_same(weights["robust"][net]["net"], weights["ddgan"][net]["net"])


@pytest.mark.parametrize("steps", [5, 8])
def test_resume_inside_a_lazy_cycle_is_bit_exact(data, trained, tmp_path, steps):
    """R1 comes in steps 0, 4, 8; states are written between and at them. The rate's schedule is that of the whole."""
    args = [f"--outdir={tmp_path}", f"--data={data}", "--cond=1", "--schedule=0.000096", *TINY]
    succeed(train_rduot, *args, f"--duration={steps * 8 / 1e6:.6f}")
    run_dir = next(tmp_path.iterdir())
    assert final_weights(run_dir)["nimg"] == steps * 8
    succeed(train_rduot, *args, "--duration=0.000096", "--resume=latest")
    assert "Resuming at" in (run_dir / "log.txt").read_text()
    assert_same(final_weights(run_dir)["objective"], final_weights(trained)["objective"])


def test_sampling(trained, data, tmp_path):
    base = [f"--network={trained}", "--device=cpu"]
    output = succeed(generate, *base, f"--outdir={tmp_path}/a", "--seeds=0-12", f"--grid={tmp_path}/sheet.png")
    assert "4 network evaluations per image" in output and (tmp_path / "sheet.png").exists()
    images, labels = read(tmp_path / "a")
    assert images.shape == (13, 1, 8, 8) and set(labels) == {0, 1}
    assert len({image.tobytes() for image in images}) == 13
    succeed(generate, *base, f"--outdir={tmp_path}/b.zip", "--seeds=0-12", "--batch=3")
    again = read(tmp_path / "b.zip")
    assert_same_images(again[0], images)
    assert np.array_equal(again[1], labels)
    succeed(generate, *base, f"--outdir={tmp_path}/c", "--seeds=0-12", "--class=1")
    ones = read(tmp_path / "c")
    assert (ones[1] == 1).all() and np.array_equal(ones[0][labels == 1], images[labels == 1])  # the same noise
    assert (ones[0][labels == 0] != images[labels == 0]).any()


@pytest.mark.long  # tests/scripts/test_generate.py has it for the sampler of denoisers
def test_images_do_not_depend_on_the_number_of_processes(trained, tmp_path):
    args = [f"--network={trained}", "--device=cpu", "--seeds=0-12"]
    succeed(generate, *args, f"--outdir={tmp_path}/one")
    torchrun("generate.py", *args, "--batch=4", f"--outdir={tmp_path}/two")
    assert_same_images(read(tmp_path / "two")[0], read(tmp_path / "one")[0])


@pytest.mark.parametrize(
    "option",
    [
        "--steps=18",
        "--sigma_max=80",
        "--S_churn=0",
        "--solver=heun",
        "--disc=vp",
        "--rho=7",
        "--cfg=2",
        "--schedule=vp",
        "--network_2=x.pkl --affine_weight=1",
    ],
)
def test_options_of_denoisers_are_refused(trained, tmp_path, option):
    fail(
        2,
        f"^Error: {option.split('=')[0]}: .*{trained.name} holds a generator",
        generate,
        f"--network={trained}",
        f"--outdir={tmp_path}/out",
        *option.split(),
    )
    assert not (tmp_path / "out").exists()


def test_bad_options(trained, data, tmp_path):
    good = [f"--outdir={tmp_path}/out", f"--data={data}"]
    fail(2, "--tau=0.1.*--method=rduot", train_rduot, *good, "--method=ddgan", "--tau=0.1")
    fail(2, "--phi1=kl.*has softplus", train_rduot, *good, "--method=ddgan", "--phi1=kl")
    fail(2, "--cost=features", train_rduot, *good, "--method=ddgan", "--cost=features")
    fail(2, "--batch-gpu=6.*multiple of 4", train_rduot, *good, "--batch-gpu=6")
    fail(2, "--num_epoch and --duration", train_rduot, *good, "--num_epoch=1", "--duration=1")
    fail(2, "--precision=fp16", train_rduot, *good, "--precision=fp16")
    fail(2, "--tau.*nan", train_rduot, *good, "--tau=nan")
    fail(2, "--phi2.*'relu'", train_rduot, *good, "--phi2=relu")
    fail(2, "--lr\\b", train_rduot, *good, "--lr=1e-3")  # there are two
    fail(2, "--arch", train_rduot, *good, "--arch=ddpmpp")
    fail(1, "--ch_mult: .*8 pixels", train_rduot, *good, "--ch_mult", 1, 1, 1, 1, 1)
    fail(2, "unexpected extra", train_rduot, *good, "--tau", "0.1", "0.2")
    fail(
        1,
        "rduot.tau: 0.001 there, 0.002 here",
        train_rduot,
        *good,
        "--cond=1",
        *TINY,
        "--tau=0.002",
        f"--resume={trained}",
        "--duration=0.000096",
    )
    fail(
        2,
        "--class=2: this network knows classes 0 to 1",
        generate,
        f"--network={trained}",
        f"--outdir={tmp_path}/out",
        "--class=2",
    )
    fail(1, "other options", train_rduot, *good, *TINY, f"--resume={trained}")
    assert not (tmp_path / "out").exists()
