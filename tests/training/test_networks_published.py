"""Test TDSM's classifiers and SBDC's discriminators, read from snapshots in the published layout."""

import contextlib
import copyreg
import json
import math
import pickle

import numpy as np
import pytest
import torch

from dnnlib import UserError
from sampling.loading import TrainedDiscriminator, guide
from tests.support.paths import FIXTURES
from tests.support.pickles import Raw, persistent
from tests.support.published_checkpoints import authors, build, fixture, recorded, write_snapshot
from torch_utils.persistence import load_snapshot, save_snapshot
from training import networks_published

CPU = torch.device("cpu")
CLOSE = dict(rtol=0, atol=1e-5)
SHAPES = sorted(path.stem.removeprefix("published_") for path in FIXTURES.glob("published_*_shapes.npz"))


@pytest.fixture(scope="module")
def sbdc(tmp_path_factory):
    """SBDC's discriminator, through a file."""
    arrays, net = build("sbdc_discriminator")
    path = write_snapshot(tmp_path_factory.mktemp("sbdc") / "network-snapshot-000200.pkl", net)
    return arrays, load_snapshot(path, kind="discriminator")["ema"]


@pytest.mark.parametrize("name", ["cifar10", "mnist", "mnist_vm"])
def test_classifiers_of_published_snapshots(name, tmp_path):
    arrays, net = build(f"tdsm_classifier_{name}")
    snapshot = load_snapshot(write_snapshot(tmp_path / "network-snapshot-010000.pkl", net), kind="classifier")
    found, (_, config, state) = snapshot["ema"], fixture(f"tdsm_classifier_{name}")
    assert type(found).__name__ == config["class_name"].rpartition(".")[2]
    assert found.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor.float(), state[key]) for key, tensor in found.state_dict().items())
    x, sigma, augment_labels = arrays["x"], arrays["sigma"], arrays["augment_labels"]
    torch.testing.assert_close(found(x, sigma), arrays["logits"], **CLOSE)
    labels = torch.eye(10)[:4]  # do nothing
    torch.testing.assert_close(found(x, sigma, labels, augment_labels), arrays["logits_augment"], **CLOSE)
    torch.testing.assert_close(found.logits(found.features(x[:1], sigma[0])), arrays["logits"][:1], **CLOSE)
    if name == "mnist_vm":
        assert snapshot["info"]["posterior"] == "clean"
        T = torch.tensor(snapshot["info"]["transition"])
        torch.testing.assert_close(T, arrays["transition"], **CLOSE)
        assert (T.sum(dim=1) - 1).abs().max() < 1e-6
    else:
        assert snapshot["info"] == {}
    assert snapshot["loss_fn"] == {"class_name": "EDMLoss_classifier", "noise_type": "sym"}


def test_discriminator_of_a_published_snapshot(sbdc):
    arrays, net = sbdc
    _, config, state = fixture("sbdc_discriminator")
    assert type(net).__name__ == config["class_name"].rpartition(".")[2] and net.state_dict().keys() == state.keys()
    x, sigma, labels = arrays["x"], arrays["sigma"], arrays["class_labels"]
    for logits, published in {
        net(x, sigma, labels): "probability",
        net(x, sigma, labels, arrays["augment_labels"]): "probability_augment",
        net(x, sigma): "probability_no_label",
    }.items():
        assert logits.shape == (4,)
        torch.testing.assert_close(logits.sigmoid()[:, None], arrays[published], **CLOSE)
    vp = networks_published.VPPrecondDiscriminator(**net.init_kwargs).eval().requires_grad_(False)
    vp.load_state_dict(net.state_dict())
    torch.testing.assert_close(vp(x, sigma, labels).sigmoid()[:, None], arrays["probability_vp"], **CLOSE)


class Nothing:
    """A denoiser that returns zeros, so that the corrected one shows the correction."""

    img_resolution, img_channels, label_dim, sigma_min, sigma_max = 32, 3, 10, 0, math.inf

    def __call__(self, x, sigma, class_labels):
        return torch.zeros_like(x)


def test_guidance_as_published(sbdc):
    arrays, net = sbdc
    settings = dict(weights=(1, 1), gate=(0, math.inf))
    found = TrainedDiscriminator("x.pkl", net, None, None)
    published, ours = (guide(Nothing(), found, CPU, published=value, **settings) for value in (True, False))
    turned = 0
    for x, sigma, expected in zip(arrays["guidance_x"], arrays["guidance_t_hat"], arrays["guidance"], strict=True):
        correction = published.at_step(1, float(sigma))(x, sigma, arrays["guidance_class_labels"])
        difference = (-correction.float() - expected).flatten(1)  # published is D - D', not D' - D
        # By rounding, which differs between processors, a ReLU of one image may be on its other side.
        assert (difference.norm(dim=1) < 0.02 * expected.flatten(1).norm(dim=1)).all()
        turned += int((difference.abs().amax(dim=1) > CLOSE["atol"]).sum())
        other = ours.at_step(1, float(sigma))(x, sigma, arrays["guidance_class_labels"])
        assert (other - correction).abs().max() > 1e-3
    assert turned <= 1


@pytest.mark.parametrize("name", SHAPES)
def test_full_size_networks_have_the_published_tensors(name):
    arrays = np.load(FIXTURES / f"published_{name}.npz")
    config = json.loads(str(arrays["config"]))
    with torch.device("meta"):
        net = getattr(networks_published, config.pop("class_name").rpartition(".")[2])(**config)
    assert {key: list(t.shape) for key, t in net.state_dict().items()} == json.loads(str(arrays["shapes"]))
    augment = torch.zeros(2, 9, device="meta")
    x, labels = torch.zeros(2, net.img_channels, 32, 32, device="meta"), torch.zeros(2, net.label_dim, device="meta")
    logits = net.eval()(x, torch.ones(2, device="meta"), labels, augment_labels=augment)
    assert logits.shape == ((2,) if "discriminator" in name else (2, net.label_dim))


def test_ours_again(tmp_path):
    """A published network that we save is read again."""
    arrays, net = build("tdsm_classifier_mnist_vm")
    save_snapshot(tmp_path / "a.pkl", {"ema": net})
    found = load_snapshot(tmp_path / "a.pkl")["ema"]
    assert torch.equal(found(arrays["x"], arrays["sigma"]), net(arrays["x"], arrays["sigma"]))


def narrowed(state, name):
    state[name] = torch.nn.Parameter(state[name][:-1])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda net: narrowed(net.model.classifier.linear._parameters, "weight"),
         r"has other sizes: model.classifier.linear.weight \[9, 2048\] instead of \[10, 2048\]"),
        (lambda net: net._parameters.pop("transition_matrix"), "lacks transition_matrix"),
        (lambda net: net.model.register_buffer("extra", torch.zeros(2)), "has unknown model.extra"),
        (lambda net: net._init_kwargs.update(model_type="ClassifierDhariwal"), "a far larger network"),
        (lambda net: net._init_kwargs.update(model_type="DiscriminatorSong"), "must be one of ClassifierSong"),
        (lambda net: net._init_kwargs.update(model_type="SongUNet"), "must be one of ClassifierSong"),
        (lambda net: net._init_kwargs.update(img_resolution=16), "model.classifier.linear.weight"),
        (lambda net: net._init_kwargs.update(label_dim=1000), r"transition_matrix \[10, 10\] instead of"),
        (lambda net: net._init_kwargs.update(label_dim=10**6), "far larger network"),
        (lambda net: net._init_kwargs.update(model_type="ClassifierVGG"), "'ClassifierVGG', which this program does"),
    ],
)  # fmt: skip
def test_wrong_shapes_are_explained(change, message, tmp_path):
    _, net = build("tdsm_classifier_mnist_vm")
    change(net)
    with pytest.raises(UserError, match=message) as e:
        load_snapshot(write_snapshot(tmp_path / "a.pkl", net))
    assert "a.pkl: " in e.value.message


def test_kinds_are_told_apart(tmp_path):
    _, net = build("tdsm_classifier_mnist")
    path = write_snapshot(tmp_path / "a.pkl", net)
    with pytest.raises(UserError, match=r"holds a classifier \(EDMPrecond_classifier\), not a denoiser"):
        load_snapshot(path, kind="denoiser")


def test_networks_of_edm2_are_named(tmp_path):
    state = dict(_init_args=(), _init_kwargs=dict(img_resolution=64, img_channels=4, label_dim=1000))
    (tmp_path / "edm2.pkl").write_bytes(pickle.dumps({"ema": persistent("Precond", state), "encoder": None}))
    with pytest.raises(UserError, match="edm2.pkl: holds a network of EDM2 or autoguidance"):
        load_snapshot(tmp_path / "edm2.pkl")


@pytest.mark.parametrize("place", ["_parameters", "_buffers", "_modules", "act", "state"])
def test_plain_modules_are_data(place, tmp_path):
    """Whatever a plain module of the authors holds, nothing in it runs."""
    marker = tmp_path / "ran"
    attack = Raw(exec, f"open({str(marker)!r}, 'w').close()")
    with authors() as plain:
        ema = recorded(build("tdsm_classifier_mnist")[1], plain)
        (meta,) = ema.args
        network = meta["state"]["_modules"]["model"].args[0]["state"]["_modules"]["classifier"]
        if place == "state":  # BUILD with an object in place of a dictionary
            type(network).__reduce_ex__ = lambda self, _: (copyreg.__newobj__, (type(self),), attack)
        elif place == "act":
            vars(network)["act"] = attack
        else:
            getattr(network, place)["x"] = attack
        (tmp_path / "a.pkl").write_bytes(pickle.dumps({"ema": ema}))
        with contextlib.suppress(Exception):
            pickle.loads((tmp_path / "a.pkl").read_bytes())
    assert marker.exists()
    marker.unlink()
    with pytest.raises(UserError, match="a.pkl: refused, it asks for 'builtins.exec'"):
        load_snapshot(tmp_path / "a.pkl")
    assert not marker.exists()
