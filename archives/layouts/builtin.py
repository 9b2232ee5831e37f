"""The images that come with scikit-learn: `digits` and `photos`."""

from __future__ import annotations

import os

import numpy as np

from archives.source import Source

__all__ = ["BUILT_IN", "PHOTO_CROPS", "open_digits", "open_photos"]

BUILT_IN = ("digits", "photos")
PHOTO_CROPS = 2000  # images of `photos` where no number is given
CROP_SIDES = (64, 256)  # pixels of a 640 x 427 photograph: smaller crops are mostly flat, larger ones all look alike


def open_digits() -> Source:
    """Return the 1,797 handwritten digits, 8x8 gray."""
    from sklearn.datasets import load_digits  # imported here because it takes a second

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]  # 17 gray levels: 0..16
    return Source.in_memory("digits", images, digits.target.astype(np.int64), "digits", [str(i) for i in range(10)])


def open_photos(number: int, seed: int) -> Source:
    """Cut random squares out of scikit-learn's two RGB photographs; the class is the photograph.

    The same `seed` gives the same squares at every resolution, and a larger `number` only adds squares.
    """
    from sklearn.datasets import load_sample_images  # imported here because it takes a second

    bundle = load_sample_images()
    draws = np.random.default_rng(seed).random([number, 4])  # one row per image
    classes = (draws[:, 0] * len(bundle.images)).astype(np.int64)
    low, high = CROP_SIDES
    sides = (low + draws[:, 1] * (high + 1 - low)).astype(np.int64)

    def image(index: int) -> np.ndarray:
        photo, side = bundle.images[classes[index]], sides[index]
        top, left = (int(u * (n + 1 - side)) for u, n in zip(draws[index, 2:], photo.shape[:2], strict=True))
        return photo[top : top + side, left : left + side]

    names = [os.path.splitext(os.path.basename(name))[0] for name in bundle.filenames]
    return Source("photos", number, image, classes, class_names=names, corruption=dict(family="photos", seed=seed))
