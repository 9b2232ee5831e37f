"""Test published generators and discriminators of RDUOT and DDGAN: the numbers, and every tensor in its place."""

import argparse
import re

import pytest
import torch

from dnnlib import UserError
from tests.support import rduot
from tests.support.published_checkpoints import content, fixture, parallel
from torch_utils.persistence import find_snapshot
from training import run
from training.published_ddgan import Checkpoint, build_generator, build_potential, load_checkpoint


@pytest.fixture(scope="module", params=[1, 2])
def generator(request):
    return fixture(f"rduot_generator_{request.param}")


@pytest.fixture(scope="module")
def potential():
    return fixture("rduot_discriminator")


def save(path, tree, **kwargs):
    torch.save(tree, path, **kwargs)
    return str(path)


def build(path, **given):
    return build_generator(load_checkpoint(str(path)), **given)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("told", ["by hand", "by content.pth", "in content.pth"])
def test_generators(generator, zipped, told, tmp_path, capfd):
    arrays, config, state = generator
    path = save(tmp_path / "netG_1200.pth", parallel(state), _use_new_zipfile_serialization=zipped)
    given = dict(image_size=config["image_size"]) if told == "by hand" else {}
    if told != "by hand":
        save(tmp_path / "content.pth", content(state, **config), _use_new_zipfile_serialization=zipped)
    if told == "in content.pth":
        path = str(tmp_path / "content.pth")
    net = build(path, **given)
    close = dict(rtol=0, atol=1e-5 if config["embedding_type"] == "positional" else 1e-4)
    torch.testing.assert_close(net(arrays["x"], arrays["t"], arrays["z"]), arrays["x_0"], **close)
    assert (net.num_timesteps, net.beta_min, net.beta_max, net.nz) == (4, 0.1, 20.0, 20)
    printed = capfd.readouterr().out
    assert f"generator of {config['image_size']}x{config['image_size']} images" in printed
    assert ("the average of netG" in printed) == (told == "in content.pth")
    assert ("t = 0 counts as 1/2" in printed) == (config["embedding_type"] == "fourier")
    assert net(arrays["x"], torch.zeros(4), arrays["z"]).isfinite().all()


def test_discriminator(potential):
    arrays, _, state = potential
    net = build_potential(state, "x")
    for batch in ("", "batch8_"):  # groups of 4 images that are strided
        inputs = [arrays[f"{batch}{name}"] for name in ("x", "t", "x_next")]
        torch.testing.assert_close(net(*inputs)[:, None], arrays[f"{batch}logits"], rtol=0, atol=1e-5)


def test_every_tensor_has_its_place(generator, potential):
    """Each published number is in the network once: other numbers make another network, and back again."""
    sources = [(generator, lambda s: build_generator(checkpoint(s), image_size=generator[1]["image_size"]))]
    for (_, _, state), make in [*sources, (potential, lambda s: build_potential(s, "x"))]:
        numbered = {name: torch.full_like(value, i + 1) for i, (name, value) in enumerate(state.items())}
        found = {name: value for name, value in make(numbered).state_dict().items() if "resample_filter" not in name}
        counts = torch.bincount(torch.cat([value.flatten() for value in found.values()]).round().int())
        assert counts[1:].tolist() == [value.numel() for value in state.values()]


def checkpoint(state, path="x/netG_1.pth", **args):
    return Checkpoint(path, dict(state), averaged=True, args=args or None)


def test_a_missing_or_unknown_tensor_is_named():
    _, config, state = fixture("rduot_generator_1")
    kinds = {re.sub("[0-9]+", "0", name): name for name in state}  # one of each kind
    for name in kinds.values():
        less = {key: value for key, value in state.items() if key != name}
        with pytest.raises(
            UserError, match=r"x/netG_1.pth: (lacks|its DDGANGenerator (lacks|has)|its modules|not a network)"
        ):
            build_generator(checkpoint(less), image_size=config["image_size"])
        wrong = {**state, name: torch.zeros(*state[name].shape, 2)}
        with pytest.raises(UserError, match="x/netG_1.pth: "):
            build_generator(checkpoint(wrong), image_size=config["image_size"])
    for name in ("all_modules.7.extra", "z_transform.99.bias", "other"):
        with pytest.raises(UserError, match=f"has unknown {name}"):
            build_generator(checkpoint({**state, name: torch.ones(1)}), image_size=config["image_size"])


def test_a_missing_or_unknown_tensor_of_a_discriminator_is_named(potential):
    _, _, state = potential
    for name in state:
        with pytest.raises(UserError, match="x: (lacks|its modules|its Potential has unknown conv)"):
            build_potential({key: value for key, value in state.items() if key != name}, "x")
        with pytest.raises(UserError, match="x: "):
            build_potential({**state, name: torch.zeros(*state[name].shape, 2)}, "x")
    with pytest.raises(UserError, match="x: .* has unknown other"):
        build_potential({**state, "other": torch.ones(1)}, "x")


ARCHITECTURE = dict(fir=True, fir_kernel=[1, 3, 3, 1], resblock_type="biggan", ch_mult=[1, 2], nz=20)


@pytest.mark.parametrize(
    "args, message",
    [
        (dict(image_size=16, fir=False), "trained with fir = False; this program has only True"),
        (dict(image_size=16, resblock_type="ddpm"), "trained with resblock_type = ddpm"),
        (dict(image_size=16, fir_kernel=[1, 2, 1]), "trained with fir_kernel"),
        (dict(image_size=16, nz=100), "their nz is 100, that of the weights is 20"),
        (dict(image_size=16, ch_mult=[1, 2, 2]), "another network, their ch_mult"),
        (dict(image_size="16"), "its option image_size is '16', expected int"),
        (dict(image_size=16, beta_max="x"), "its option beta_max is 'x', expected float"),
        (dict(image_size=0), "images of 0 pixels"),
        (dict(image_size=16, num_timesteps=10**9), "1000000000 steps"),
        (dict(image_size=17), "17 pixels"),
        (dict(nz=20), "does not say how large its images are.*generate.py --image_size=32"),
    ],
)
def test_other_options_are_refused(args, message):
    _, _, state = fixture("rduot_generator_1")
    with pytest.raises(UserError, match=f"x/netG_1.pth: .*{message}"):
        build_generator(checkpoint(state, **{**ARCHITECTURE, **args}))


def test_options_that_the_weights_do_not_show():
    arrays, config, state = fixture("rduot_generator_1")
    x, t, z = arrays["x"], arrays["t"], arrays["z"]
    plain = build_generator(checkpoint(state, **config))
    linear = build_generator(checkpoint(state, **{**config, "not_use_tanh": True}))
    torch.testing.assert_close(linear(x, t, z).tanh(), plain(x, t, z))
    assert not torch.allclose(linear(x, t, z), plain(x, t, z))
    shifted = build_generator(checkpoint(state, **{**config, "centered": False}))
    torch.testing.assert_close(shifted((x + 1) / 2, t, z), plain(x, t, z), rtol=0, atol=1e-5)
    given = build_generator(checkpoint(state, **config), num_timesteps=2, beta_max=10.0, beta_min=None)
    assert (given.num_timesteps, given.beta_min, given.beta_max) == (2, 0.1, 10.0)  # what is given comes first


def test_options_of_a_stranger_are_data(tmp_path):
    _, config, state = fixture("rduot_generator_1")

    class Odd(argparse.Namespace):
        pass

    Odd.__module__, Odd.__qualname__ = "argparse", "BooleanOptionalAction"  # a class that is there, and not on the list
    argparse_class = argparse.BooleanOptionalAction
    argparse.BooleanOptionalAction = Odd
    try:
        path = save(tmp_path / "content.pth", content(state) | {"args": Odd(**config)})
    finally:
        argparse.BooleanOptionalAction = argparse_class
    with pytest.raises(UserError, match="content.pth: refused, it asks for 'argparse.BooleanOptionalAction'"):
        build(path)
    save(tmp_path / "content.pth", content(state) | {"args": [1]})
    with pytest.raises(UserError, match="content.pth: does not hold the options"):
        build(path)
    save(tmp_path / "netG_1.pth", parallel(state))
    with pytest.raises(UserError, match="content.pth: does not hold the options"):
        build(tmp_path / "netG_1.pth")


@pytest.mark.parametrize("tree", [{}, [1], {"a": torch.ones(2)}, {"a": 1}, {1: torch.ones(2)}, torch.ones(3), None])
def test_other_files_are_refused(tree, tmp_path):
    path = save(tmp_path / "netG_7.pth", tree)
    with pytest.raises(UserError, match="netG_7.pth: (neither the weights|not a network)"):
        build(path)


def test_the_last_epoch_of_a_folder_is_found(tmp_path):
    for epoch in (200, 1000, 75):
        (tmp_path / f"netG_{epoch}.pth").touch()
    assert find_snapshot(tmp_path).endswith("netG_1000.pth")
    assert find_snapshot(tmp_path / "netG_*.pth").endswith("netG_1000.pth")


def test_training_starts_from_published_weights(tmp_path, capfd):
    objective = rduot.make()
    net, potential = (objective.trained[name].net for name in ("net", "potential"))
    size = objective.dataset.resolution
    published = fixture("rduot_generator_1")[2], fixture("rduot_discriminator")[2]
    path = save(tmp_path / "content.pth", content(*published, image_size=16))
    before = {key: value.clone() for key, value in [*net.state_dict().items(), *potential.state_dict().items()]}
    run.transfer(objective, path, trust_pickle=False)
    count = int(re.search("Transferred ([0-9]+) tensors", capfd.readouterr().out)[1])
    state = {**net.state_dict(), **potential.state_dict()}
    assert 0 < sum(not torch.equal(before[key], state[key]) for key in state) <= count and size == 8
