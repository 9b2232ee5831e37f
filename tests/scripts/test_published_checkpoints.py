"""The scripts on checkpoints that others publish: generate.py, train_noise.py and detect_noise.py."""

import pickle

import numpy as np
import pytest
import torch

import detect_noise
import generate
import train_noise
from archives.label_noise import transition_matrix
from sampling.ddgan import ddgan_sampler
from sampling.generation import generate_images
from tests.support import synth
from tests.support.commands import callers
from tests.support.generated import read
from tests.support.pickles import persistent, published
from tests.support.published_checkpoints import build, content, fixture, parallel, write_snapshot
from torch_utils.persistence import find_snapshot, load_snapshot, save_snapshot
from training.networks import EDMPrecond
from training.published_ddgan import build_generator, load_checkpoint

make, refuse = callers(generate.main)
TINY = "--arch=ddpmpp_tiny --cbase=8 --batch=8 --duration=0.00001 --augment=0 --device=cpu".split()


@pytest.fixture
def run_dir(tmp_path):
    """A folder as RDUOT leaves it, without its options."""
    folder = tmp_path / "run"
    folder.mkdir()
    for epoch in (25, 1200):
        torch.save(parallel(fixture("rduot_generator_1")[2]), folder / f"netG_{epoch}.pth")
    return folder


def sample(tmp_path, *args):
    outdir = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
    text = make(f"--outdir={outdir}", "--seeds=0-2", "--device=cpu", *args)
    return read(outdir)[0], text


def test_a_published_generator_makes_images(run_dir, tmp_path):
    _, config, state = fixture("rduot_generator_1")
    told, text = sample(tmp_path, f"--network={run_dir}/netG_25.pth", "--image_size=16")
    assert "a published generator of 16x16 images with 3 channel(s) in 4 steps, attention at 8" in text
    net = build_generator(load_checkpoint(str(run_dir / "netG_1200.pth")), image_size=16)
    expected = [x for _, x, _ in generate_images(net, range(3), device=torch.device("cpu"), sampler=ddgan_sampler)]
    assert np.array_equal(told.transpose(0, 2, 3, 1), np.concatenate(expected)) and told.std() > 10
    torch.save(content(state, **config), run_dir / "content.pth")
    assert np.array_equal(told, sample(tmp_path, f"--network={run_dir}")[0])
    assert np.array_equal(told, sample(tmp_path, f"--network={run_dir}/content.pth")[0])
    low = ["--beta_min=0.01", "--beta_max=0.9"]
    vp = sample(tmp_path, f"--network={run_dir}", *low)[0]
    geometric = sample(tmp_path, f"--network={run_dir}", *low, "--use_geometric=1")[0]
    other = sample(tmp_path, f"--network={run_dir}", "--num_timesteps=2", "--centered=0", "--not_use_tanh=1")[0]
    assert not any(np.array_equal(a, b) for a, b in ((told, vp), (vp, geometric), (told, other)))


def test_what_a_published_generator_cannot_do(run_dir, tmp_path):
    out, network = f"--outdir={tmp_path}/out", f"--network={run_dir}/netG_25.pth"
    refuse(1, out, network, "--device=cpu", "--network|netG_25.pth|how large its images are|--image_size=32")
    refuse(2, out, network, "--image_size=16", "--steps=4", "--device=cpu", "--steps|generator")
    refuse(1, out, network, "--image_size=17", "--device=cpu", "--network|17 pixels")
    save_snapshot(tmp_path / "a.pkl", {"ema": denoiser()})
    refuse(1, out, f"--network={tmp_path}/a.pkl", "--image_size=32", "--device=cpu", "a.pkl|records its image_size")
    two = ["--network_2", str(run_dir / "netG_25.pth"), "--affine_weight=1"]
    refuse(1, out, f"--network={tmp_path}/a.pkl", *two, "--device=cpu", "--network_2|not a denoiser")


def denoiser(**kwargs):
    torch.manual_seed(0)
    tiny = dict(model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[])
    net = EDMPrecond(32, 3, label_dim=10, model_type="SongUNet", **{**tiny, **kwargs})
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return net.eval().requires_grad_(False)


def test_a_published_discriminator_guides(tmp_path):
    path = write_snapshot(tmp_path / "discriminator.pkl", build("sbdc_discriminator")[1])
    save_snapshot(tmp_path / "a.pkl", {"ema": denoiser()})
    args = [f"--network={tmp_path}/a.pkl", "--seeds=0", "--steps=2"]
    guided = [*args, f"--discriminator={path}", "--dg_weight_1st_order=50"]
    images, texts = zip(
        *(sample(tmp_path, *a) for a in (args, guided, [*guided, "--dg_published=1"])), strict=True
    )  # fmt: skip
    assert not any(np.array_equal(images[i], images[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert "Guidance: constant (not fitted" in texts[1] and "as in SBDC's published sampling" in texts[2]
    out = f"--outdir={tmp_path}/out"
    refuse(2, out, *guided, "--dg_published=1", "--dg_mode=calibrated", "--dg_published|constant")
    refuse(2, out, *args, "--dg_published=1", "--dg_published|--discriminator")
    refuse(1, out, *guided, "--dg_mode=calibrated", "--device=cpu", "does not say what it was trained on")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    images = synth.pictures(20, size=32, channels=1)
    return synth.make_archive(folder / "digits.zip", images, [i % 10 for i in range(20)])


def test_a_published_classifier_serves_tdsm(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(train_noise, "save_samples", None)
    plain = write_snapshot(tmp_path / "plain.pkl", build("tdsm_classifier_mnist")[1])
    learned = write_snapshot(tmp_path / "learned.pkl", build("tdsm_classifier_mnist_vm")[1])
    train, refuse_training = callers(train_noise.main)
    out = [f"--outdir={tmp_path}/runs", f"--data={digits}", *TINY]
    train(*out, f"--cls={learned}")  # its T is a parameter
    refuse_training(1, *out, f"--cls={plain}", "plain.pkl|without a transition matrix")
    train(*out, f"--cls={plain}", "--noise_type=sym", "--noise_rate=0.4")
    expected = fixture("tdsm_classifier_mnist_vm")[0]["transition"].numpy(), transition_matrix("sym", 0.4, 10)
    for run, T in zip(sorted((tmp_path / "runs").iterdir()), expected, strict=True):
        info = load_snapshot(find_snapshot(run))["info"]
        assert np.allclose(info["transition"], T, atol=1e-5) and info["method"] == "tdsm"


def test_a_published_classifier_finds_wrong_labels(digits, tmp_path):
    learned = write_snapshot(tmp_path / "learned.pkl", build("tdsm_classifier_mnist_vm")[1])
    detect, refuse_detection = callers(detect_noise.main)
    text = detect(f"--data={digits}", f"--dest={tmp_path}/labels.npz", f"--cls={learned}", "--device=cpu")
    assert "Noise rate" in text and (tmp_path / "labels.npz").exists()
    color = write_snapshot(tmp_path / "color.pkl", build("sbdc_discriminator")[1])
    refuse_detection(1, f"--data={digits}", f"--dest={tmp_path}/b.npz", f"--cls={color}", "--device=cpu",
                     "color.pkl: holds a discriminator (EDMPrecondDiscriminator), not a classifier")  # fmt: skip


def test_diffusion_models_of_tdsm_are_edms(tmp_path):
    """TDSM's train_noise.py records EDM's classes, with the settings of its options, and a loss of its own."""
    settings = dict(
        use_fp16=False, augment_dim=9, dropout=0.13, embedding_type="positional", encoder_type="standard",
        decoder_type="standard", channel_mult_noise=1, resample_filter=[1, 1],
    )  # fmt: skip
    net = denoiser(**settings)
    data = dict(class_name="training.dataset.ImageFolderDataset", path="cifar10_sym_40-32x32.zip", use_labels=True,
                xflip=False, cache=True, resolution=32, max_size=50000)  # fmt: skip
    loss = persistent("EDMLoss_noise", {"_init_kwargs": dict(noise_type="sym", noise_rate=0.4, tau=0.01)})
    pipe = persistent("AugmentPipe", {"_init_kwargs": dict(p=0.12, xflip=1e8, yflip=1, scale=1, aniso=1)})
    tree = published(net, loss_fn=loss, augment_pipe=pipe, dataset_kwargs=data)
    (tmp_path / "network-snapshot-200000.pkl").write_bytes(pickle.dumps(tree))
    save_snapshot(tmp_path / "ours.pkl", {"ema": net})
    args = ["--steps=2", "--class=3", "--batch=64", "--seeds=0-1"]  # as in TDSM's README
    theirs = sample(tmp_path, f"--network={tmp_path}/network-snapshot-*.pkl", *args)[0]
    assert np.array_equal(theirs, sample(tmp_path, f"--network={tmp_path}/ours.pkl", *args)[0])
