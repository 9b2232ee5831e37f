"""Test augmentation: published numbers, the effect of each parameter, and independence of how a batch is split."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.paths import FIXTURES
from tests.support.tf32 import SimulatedTF32
from torch_utils.precision import tf32
from training.augment import AugmentPipe, default_augment

DATA = {k: torch.from_numpy(v) for k, v in np.load(FIXTURES / "augment.npz").items()}
CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def params_of(kind):
    """Return the parameters that the published label vectors stand for."""
    labels = DATA[f"{kind}/labels"]
    names = dict(
        flips=["xflip", "yflip"],
        scale=["scale"],
        rotate=["cos", "sin"],
        translate=["tx", "ty"],
        all=["xflip", "yflip", "scale", "cos", "sin", "tx", "ty"],
        aniso=["a", "b"],
    )[kind]
    column = dict(zip(names, labels.unbind(1), strict=True))
    params = {name: column[name] for name in ("xflip", "yflip", "scale") if name in column}
    if "cos" in column:
        params["rotate_frac"] = torch.atan2(column["sin"], column["cos"] + 1)
    if "tx" in column:
        params["translate_frac"] = labels[:, -2:]
    if kind == "aniso":
        params.update(aniso=DATA["aniso/w"], aniso_axis=DATA["aniso/r"])
    return params


def blobs(size, scale_x=1.0, scale_y=1.0):
    """Return two broad blobs off the center, [1,1,size,size], in closed form at any scale.

    They are so smooth that filters hardly change them.
    """
    x, y = torch.linspace(-1, 1, size)[None, :] / scale_x, torch.linspace(-1, 1, size)[:, None] / scale_y
    bright, dark = (x - 0.3) ** 2 + (y + 0.15) ** 2, (x + 0.2) ** 2 + (y - 0.3) ** 2
    return (torch.exp(-8 * bright) - 0.6 * torch.exp(-8 * dark))[None, None]


@pytest.mark.parametrize("kind", ["flips", "scale", "rotate", "translate", "all", "aniso"])
def test_published_augmentations(kind):
    images, labels = default_augment(1).apply(DATA["images"], params_of(kind))
    assert (images - DATA[f"{kind}/out"]).abs().max() < 2e-4
    torch.testing.assert_close(labels, DATA[f"{kind}/labels"])


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([8, 9, 16, 28, 32]), st.sampled_from([1, 3]), st.integers(0, 99), st.sampled_from([0, 0.12, 1]))
def test_any_size_and_any_split_of_the_batch(size, channels, seed, p):
    pipe = default_augment(p)
    images = torch.rand(6, channels, size, size, generator=generator(seed)) * 2 - 1
    params = pipe.draw(6, generator(seed), CPU)
    whole, labels = pipe.apply(images, params)
    assert whole.shape == images.shape and whole.dtype == torch.float32 and whole.isfinite().all()
    assert labels.shape == (6, pipe.label_dim) == (6, 9) and labels.dtype == torch.float32
    for part in (slice(0, 1), slice(1, 6)):
        some, some_labels = pipe.apply(images[part], {name: value[part] for name, value in params.items()})
        torch.testing.assert_close(some, whole[part], rtol=0, atol=1e-5)
        assert torch.equal(some_labels, labels[part])


def test_nothing_drawn_changes_nothing():
    images = torch.rand(5, 3, 16, 16, generator=generator()) * 2 - 1
    pipe = AugmentPipe(p=0, xflip=1, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1)
    same, labels = pipe.apply(images, pipe.draw(5, generator(), CPU))
    torch.testing.assert_close(same, images, rtol=0, atol=2e-5)
    assert labels.shape == (5, 9) and not labels.any()
    none = AugmentPipe()
    same, labels = none.apply(images, none.draw(5, generator(), CPU))
    assert torch.equal(same, images) and labels.shape == (5, 0) and none.label_dim == 0


def test_flips_and_quarter_turns():
    images, pipe = blobs(32), default_augment(1)

    def apply(**params):
        return pipe.apply(images, {name: torch.tensor(value).float()[None] for name, value in params.items()})[0]

    assert torch.equal(apply(xflip=1), images.flip(3)) and torch.equal(apply(yflip=1), images.flip(2))
    for turns in (1, 2, 3):
        turned = apply(rotate_frac=turns * math.pi / 2)  # Positive angles turn counterclockwise.
        want = images.rot90(turns, [2, 3])  # The tolerance is for sym6, whose asymmetry shifts by a tenth of a pixel.
        torch.testing.assert_close(turned[..., 2:-2, 2:-2], want[..., 2:-2, 2:-2], rtol=0, atol=0.025)
    moved = apply(translate_frac=[2 / 32 / 0.125, 3 / 32 / 0.125])  # Positive numbers shift right and down.
    torch.testing.assert_close(moved[..., 3:, 2:], images[..., :-3, :-2], rtol=0, atol=1e-4)
    reflected = images[..., [3, 2, 1], :]  # These rows come in from above. Reflection does not repeat the border.
    torch.testing.assert_close(moved[..., :3, 2:], reflected[..., :-2], rtol=0, atol=1e-4)


def test_scale_and_stretch():
    w, s = torch.tensor([1.5]), 2 ** (0.2 * 1.5)
    for params, want in (
        (dict(scale=w), blobs(32, s, s)),
        (dict(aniso=w, aniso_axis=torch.zeros(1)), blobs(32, s, 1 / s)),
        (dict(aniso=w, aniso_axis=torch.tensor([math.pi / 2])), blobs(32, 1 / s, s)),
    ):
        got = default_augment(1).apply(blobs(32), params)[0]
        torch.testing.assert_close(got[..., 4:-4, 4:-4], want[..., 4:-4, 4:-4], rtol=0, atol=0.02)


def test_probabilities_and_distributions():
    n, p = 50_000, 0.3
    params = default_augment(p).draw(n, generator(), CPU)
    assert params["xflip"].mean().item() == pytest.approx(0.5, abs=0.02)  # always drawn
    assert params["yflip"].mean().item() == pytest.approx(p / 2, abs=0.02)
    for name in ("scale", "aniso", "rotate_frac", "translate_frac"):
        assert len(params[name]) == n
        drawn = params[name].reshape(n, -1)[:, 0] != 0
        assert drawn.float().mean().item() == pytest.approx(p, abs=0.02), name
        values = params[name][drawn]
        std = math.pi / math.sqrt(3) if name == "rotate_frac" else 1
        assert values.mean().item() == pytest.approx(0, abs=0.1) and values.std().item() == pytest.approx(std, rel=0.05)
    assert params["rotate_frac"].abs().max() <= math.pi
    both = params["translate_frac"] != 0
    assert torch.equal(both[:, 0], both[:, 1])
    axis = params["aniso_axis"]
    assert (axis == 0).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert axis[axis != 0].std().item() == pytest.approx(math.pi / math.sqrt(3), rel=0.05)


def test_draws_depend_only_on_the_generator_and_settings_make_an_equal_pipe():
    pipe = default_augment(0.4)
    assert pipe.settings() == dict(p=0.4, xflip=1e8, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1)
    a = pipe.draw(7, generator(1), CPU)
    torch.manual_seed(9)
    b = AugmentPipe(**pipe.settings()).draw(7, generator(1), CPU)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert all(value.dtype == torch.float32 for value in a.values())
    some = AugmentPipe(xflip=1, translate_frac=1)
    assert some.label_dim == 3 and some.draw(2, generator(), CPU).keys() == {"xflip", "translate_frac"}


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_coordinates_are_float32_whatever_the_precision(precision):
    images, params = DATA["images"], params_of("all")
    with tf32(precision == "tf32"), SimulatedTF32(), torch.autocast("cpu", torch.bfloat16, precision == "bf16"):
        got = default_augment(1).apply(images, params)[0]
    assert (got - DATA["all/out"]).abs().max() < 2e-4
