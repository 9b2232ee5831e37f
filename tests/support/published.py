"""Small samples of published data sets, in the layouts in which they are published."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image

CLOTHES = [
    "T-Shirt", "Shirt", "Knitwear", "Chiffon", "Sweater", "Hoodie", "Windbreaker", "Jacket", "Downcoat", "Suit",
    "Shawl", "Dress", "Vest", "Underwear",
]  # fmt: skip


def jpeg(shade: int, size: int = 8) -> bytes:
    """Return a JPEG of one shade of gray, in RGB: its pixels stay what they are."""
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (size, size), (shade, shade, shade)).save(buffer, "jpeg", quality=95)
    return buffer.getvalue()


def write(root: Path, files: dict[str, bytes | str]) -> Path:
    """Write files below a folder."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def lines(rows) -> str:
    return "".join(" ".join(map(str, row)) + "\n" for row in rows)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def make_idx(folder: Path, n: int = 20, dot: bool = True, part: str = "train", seed: int = 0) -> np.ndarray:
    """Write images and labels 0 .. 9 of MNIST, unpacked. Return the images."""
    images = np.random.default_rng(seed).integers(0, 256, [n, 28, 28], dtype=np.uint8)
    mark = "." if dot else "-"
    write(folder, {f"{part}-images{mark}idx3-ubyte": idx(images),
                   f"{part}-labels{mark}idx1-ubyte": idx(np.arange(n) % 10)})  # fmt: skip
    return images


def make_stl10(folder: Path, n: int = 4) -> np.ndarray:
    """Write STL-10 with n training, n - 1 test and n + 1 unlabeled images. Return the n + 1 [N, row, column, 3]."""
    images = np.random.default_rng(1).integers(0, 256, [n + 1, 96, 96, 3], dtype=np.uint8)
    stored = images.transpose(0, 3, 2, 1)  # channel, column, row
    write(folder, {
        "train_X.bin": stored[:n].tobytes(), "train_y.bin": bytes(1 + i % 10 for i in range(n)),
        "test_X.bin": stored[: n - 1].tobytes(), "test_y.bin": bytes(10 - i % 10 for i in range(n - 1)),
        "unlabeled_X.bin": stored.tobytes(), "fold_indices.txt": "0 1\n",
        "class_names.txt": "\n".join("airplane bird car cat deer dog horse monkey ship truck".split()),
    })  # fmt: skip
    return images


def make_celeba(root: Path, n: int = 6, zipped: bool = False) -> Path:
    """Write CelebA: image i has the shade 40 i; Male alternates, the last two are the test part."""
    names = [f"{i + 1:06d}.jpg" for i in range(n)]
    if zipped:
        root.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(root / "img_align_celeba.zip", "w") as archive:
            for i, name in enumerate(names):
                archive.writestr(f"img_align_celeba/{name}", jpeg(40 * i))
    else:
        write(root, {f"img_align_celeba/{name}": jpeg(40 * i) for i, name in enumerate(names)})
    rows = [(name, -1 if i % 2 else 1, 1, -1) for i, name in enumerate(names)]
    return write(root, {
        "list_attr_celeba.txt": f"{n}\nMale Smiling Young \n" + lines(rows).replace(" 1", "  1"),
        "identity_CelebA.txt": lines((name, 2880 + i) for i, name in enumerate(names)),
        "list_eval_partition.txt": lines((name, 0 if i < n - 3 else 1 if i < n - 2 else 2)
                                         for i, name in enumerate(names)),
    })  # fmt: skip


def make_clothing1m(root: Path, lists: str = "") -> Path:
    """Write Clothing1M with six images; images 2 and 3 have both kinds of labels, their noisy ones are one too large.

    Image i has the shade 40 i and the clean label i. `lists` is the folder of the lists, 'annotations/' or none.
    """
    keys = [f"images/{i}/{i}{i}/{i},{i}99.jpg" for i in range(6)]
    texts = {
        "noisy_label_kv.txt": lines((keys[i], i + 1 if i > 1 else i) for i in range(4)),
        "clean_label_kv.txt": lines((keys[i], i) for i in (5, 4, 3, 2)),
        "noisy_train_key_list.txt": lines([[keys[1]], [keys[0]]]),
        "clean_train_key_list.txt": lines([[keys[2]], [keys[4]]]),
        "clean_val_key_list.txt": lines([[keys[3]]]),
        "clean_test_key_list.txt": lines([[keys[5]]]),
        "category_names_eng.txt": "\n".join(CLOTHES),
    }
    write(root, {lists + name: text for name, text in texts.items()})
    return write(root, {key: jpeg(40 * i) for i, key in enumerate(keys)})


def make_webvision(root: Path) -> Path:
    """Write WebVision: classes 3, 60, 134 from Google, 7, 517 from Flickr, 4 and 70 in the validation set."""
    names = [f"thing {i}" for i in range(1000)]
    names[134] = names[517] = "crane"
    return write(root, {
        "info/train_filelist_google.txt": "google/q0001/a.jpg 3\ngoogle/q0002/b.jpg 60\ngoogle/q0003/c.jpg 134\n",
        "info/train_filelist_flickr.txt": "flickr/q0001/d.jpg 7\nflickr/q0002/e.jpg 517\n",
        "info/val_filelist.txt": "val000001.jpg 4\nval000002.jpg 70\n",
        "info/synsets.txt": "".join(f"n{i:08d} {name}\n" for i, name in enumerate(names)),
        **{f"google/q000{i + 1}/{letter}.jpg": jpeg(40 * i) for i, letter in enumerate("abc")},
        **{f"flickr/q000{i + 1}/{letter}.jpg": jpeg(120 + 40 * i) for i, letter in enumerate("de")},
        **{f"val_images_256/val00000{i + 1}.jpg": jpeg(200 + 40 * i) for i in range(2)},
    })  # fmt: skip


def make_food101n(root: Path) -> Path:
    """Write Food-101N with three classes; of the image 'tacos/y' people found the label wrong, of 'sushi/a' right."""
    keys = ["sushi/a", "sushi/b", "tacos/x", "tacos/y"]
    return write(root, {
        "meta/imagelist.tsv": "class_name/key\n" + "".join(f"{key}.jpg\n" for key in keys),
        "meta/verified_train.tsv": "class_name/key\tverification_label\ntacos/y.jpg\t0\nsushi/a.jpg\t1\n",
        "meta/verified_val.tsv": "class_name/key\tverification_label\ntacos/x.jpg\t1\n",
        "meta/classes.txt": "class_name\napple_pie\nsushi\ntacos\n",
        **{f"images/{key}.jpg": jpeg(40 * i) for i, key in enumerate(keys)},
    })  # fmt: skip


def make_animal10n(root: Path) -> Path:
    """Write ANIMAL-10N: its training images have the labels 0, 0, 3, its test images 9, 1."""
    return write(root, {
        **{f"training/{name}.jpg": jpeg(40 * i) for i, name in enumerate(["0_12", "0_7", "3_1"])},
        **{f"testing/{name}.jpg": jpeg(200 + 20 * i) for i, name in enumerate(["1_5", "9_2"])},
    })  # fmt: skip
