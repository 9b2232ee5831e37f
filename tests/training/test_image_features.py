"""Features of images that mean the same at every resolution, in closed form."""

import pytest
import torch

from training.image_features import block_means, image_features, texture


def images(n=4, channels=3, size=8, seed=0):
    return 2 * torch.rand([n, channels, size, size], generator=torch.Generator().manual_seed(seed)) - 1


def test_block_means_weigh_pixels_by_area():
    image = torch.tensor([[[[0.0, 3.0, 6.0]]]])
    torch.testing.assert_close(block_means(image, 2)[0, 0], torch.tensor([[1.0, 5], [1, 5]]))  # (0 + 3/2) / 1.5, ...
    whole = images(2, size=28)
    torch.testing.assert_close(block_means(whole, 7), whole.reshape(2, 3, 7, 4, 7, 4).mean(dim=(3, 5)))


def test_features_mean_the_same_at_every_size():
    """An enlarged image has the features of the small one, and those of details that the small one cannot have."""
    small, large = (image_features(images().repeat_interleave(k, 2).repeat_interleave(k, 3)) for k in (1, 8))
    assert small.shape == (4, 64 + 16 + 16 + 33) and large.shape[1] - small.shape[1] == 2 * 16 + 33
    torch.testing.assert_close(large[:, :80], small[:, :80], atol=1e-4, rtol=0)  # block means and coarse contrast
    torch.testing.assert_close(large[:, 112:161], small[:, 80:], atol=1e-4, rtol=0)  # color, texture
    sizes = [image_features(images(size=size)).shape[1] for size in (16, 32, 64)]
    assert sizes == [64 + 32 + 16 + 66, 64 + 48 + 16 + 66, 64 + 48 + 16 + 66]


def test_texture_does_not_know_the_place():
    image = torch.zeros(1, 1, 16, 16)
    image[0, 0, 4:8, 5:7] = 1
    moved = image.roll((3, 4), dims=(2, 3))
    torch.testing.assert_close(texture(moved), texture(image))
    half = torch.zeros(1, 1, 16, 16)
    half[..., 8:] = 1  # an edge: half of the pixels are white, 1/15 of the neighbors in a row differ, none in a column
    shares = texture(half)[0, 16:].square() - 1e-3
    want = torch.zeros(17)
    want[[0, 6, 7, 11, 12]] = torch.tensor([0.5, 0.5, 14 / 15, 1 / 15, 1.0])
    torch.testing.assert_close(shares, want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("channels, size", [(1, 8), (3, 16)])
def test_gradients_are_finite_also_for_flat_images(channels, size):
    x = images(6, channels, size)
    x[0], x[1] = 0.0, -1.0
    x.requires_grad_()
    weights = torch.randn(image_features(x).shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((weights * image_features(x)).sum(), x)
    assert gradient.isfinite().all() and (gradient[2:].flatten(1).abs().amax(dim=1) > 0).all()
