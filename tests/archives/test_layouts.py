"""Published data sets in their layouts: labels, clean labels, names and pixels of small samples; what is refused."""

import os
import pickle
import tarfile

import numpy as np
import pytest
import torch

from archives import sources
from archives.dataset import ImageDataset
from archives.label_file import load_label_file
from archives.sources import open_source
from dnnlib import UserError
from tests.support import published, synth


def shades(source):
    """Return the gray value of each image of a source, which a JPEG keeps within one step."""
    images = [source.image(i) for i in range(source.length)]
    return np.array([image.mean() for image in images]).round(-1).astype(int).tolist()


def refused(path, **options):
    with pytest.raises(UserError) as caught:
        source = open_source(str(path), **options)
        [source.image(i) for i in range(source.length)]
    return caught.value.message


# ---------------------------------------------------------------------------------------------------------------------
# MNIST.


@pytest.mark.parametrize("where", ["", "raw", "MNIST/raw"])
@pytest.mark.parametrize("dot", [True, False])
def test_mnist_with_dots_and_in_torchvisions_folder(tmp_path, where, dot):
    images = published.make_idx(tmp_path / where, dot=dot)
    source = open_source(str(tmp_path))
    np.testing.assert_array_equal(source.labels, np.arange(20) % 10)
    np.testing.assert_array_equal(source.image(7)[2:-2, 2:-2, 0], images[7])
    assert source.corruption == {"family": "mnist"} and source.class_names == list("0123456789")


def test_mnist_parts_files_and_families(tmp_path, monkeypatch):
    train = published.make_idx(tmp_path / "FashionMNIST/raw", dot=False)
    published.make_idx(tmp_path / "FashionMNIST/raw", 10, part="t10k", seed=3)  # with dots, beside files without
    assert open_source(str(tmp_path / "FashionMNIST"), test=True).length == 10
    (tmp_path / "FashionMNIST/raw/train-images-idx3-ubyte.gz").mkdir()  # a folder is no file
    assert open_source(str(tmp_path)).corruption == {"family": "fashion-mnist"}
    monkeypatch.chdir(tmp_path / "FashionMNIST/raw")
    for path in (".", "train-images-idx3-ubyte"):
        source = open_source(path)
        assert source.corruption == {"family": "fashion-mnist"} and source.length == 20
        np.testing.assert_array_equal(source.image(3)[2:-2, 2:-2, 0], train[3])
    assert (
        open_source("t10k-images.idx3-ubyte").length == open_source("train-images-idx3-ubyte", test=True).length == 10
    )
    monkeypatch.chdir(tmp_path)
    assert open_source(str(published.make_idx(tmp_path / "kmnist/raw") is None or "kmnist")).class_names[1] == "ki"
    # Two files of one part: the one that the path names.
    other = published.make_idx(tmp_path / "both", seed=5)
    published.make_idx(tmp_path / "both", dot=False, seed=6)
    np.testing.assert_array_equal(open_source("both/train-images.idx3-ubyte").image(0)[2:-2, 2:-2, 0], other[0])


def test_mnist_without_labels(tmp_path):
    published.make_idx(tmp_path)
    os.remove(tmp_path / "train-labels.idx1-ubyte")
    assert "lacks train-labels-idx1-ubyte.gz or train-labels-idx1-ubyte or" in refused(tmp_path)
    assert "lacks t10k-images-idx3-ubyte.gz" in refused(tmp_path, test=True)


# ---------------------------------------------------------------------------------------------------------------------
# CIFAR.


def unpack(path, folder):
    with tarfile.open(path) as tar:
        tar.extractall(folder, filter="data")


def test_unpacked_cifar(tmp_path):
    path, images, labels = synth.make_cifar10(tmp_path / "c10.tar.gz", per_batch=4)
    unpack(path, tmp_path / "data")
    for place in ("data", "data/cifar-10-batches-py"):
        source, packed = open_source(str(tmp_path / place)), open_source(str(path))
        np.testing.assert_array_equal(source.labels, labels)
        np.testing.assert_array_equal([source.image(i) for i in range(20)], images)
        assert source.class_names == packed.class_names == synth.CIFAR10_NAMES
        assert source.corruption == packed.corruption == {"family": "cifar10"}
        assert open_source(str(tmp_path / place), test=True).length == 4
    (tmp_path / "data/cifar-10-batches-py/data_batch_3").unlink()
    assert "lacks or adds data_batch_3; CIFAR-10 has 5" in refused(tmp_path / "data")


def test_unpacked_cifar100_and_its_superclasses(tmp_path):
    path, images, fine = synth.make_cifar100(tmp_path / "c100.tar.gz")
    unpack(path, tmp_path)
    for place in (path, tmp_path, tmp_path / "cifar-100-python"):
        source = open_source(str(place), label_kind="coarse")
        np.testing.assert_array_equal(source.labels, fine % 20)
        assert source.class_names[19] == "coarse19" and source.corruption == {"family": None}
    source = open_source(str(tmp_path), label_kind="fine")
    np.testing.assert_array_equal(source.labels, fine)
    np.testing.assert_array_equal(source.image(9), images[9])
    assert "no kind of labels 'rough' (there are: fine, coarse)" in refused(path, label_kind="rough")
    assert "(there are: fine, coarse)" in refused(path, label_kind="rough", test=True)


def test_several_data_sets_in_one_folder(tmp_path):
    unpack(synth.make_cifar10(tmp_path / "c10.tar.gz", per_batch=2)[0], tmp_path)
    unpack(synth.make_cifar100(tmp_path / "c100.tar.gz", n=100)[0], tmp_path)
    published.make_idx(tmp_path / "MNIST/raw")
    message = refused(tmp_path)
    assert "holds several data sets, name one" in message
    assert all(f"{tmp_path}/{name}" in message for name in ("MNIST/raw", "cifar-10-batches-py", "cifar-100-python"))


# ---------------------------------------------------------------------------------------------------------------------
# STL-10.


def test_stl10(tmp_path):
    images = published.make_stl10(tmp_path / "stl10_binary")
    for place in (tmp_path, tmp_path / "stl10_binary", tmp_path / "stl10_binary/train_X.bin"):
        source = open_source(str(place))
        np.testing.assert_array_equal(source.labels, [0, 1, 2, 3])
        np.testing.assert_array_equal([source.image(i) for i in range(4)], images[:4])
        assert source.class_names[7] == "monkey" and source.corruption == {"family": "stl10"}
    np.testing.assert_array_equal(open_source(str(tmp_path), test=True).labels, [9, 8, 7])
    for source in (open_source(str(tmp_path), part="unlabeled"),
                   open_source(str(tmp_path / "stl10_binary/unlabeled_X.bin"))):  # fmt: skip
        assert source.length == 5 and source.labels is None and source.class_names is None
        np.testing.assert_array_equal(source.image(4), images[4])


def test_stl10_refused(tmp_path):
    published.make_stl10(tmp_path)
    assert "no part 'extra' (there are: train, unlabeled)" in refused(tmp_path, part="extra")
    for content, message in ((bytes([1, 2, 3, 0]), "labels from 0 to 3, expected 1 to 10"),
                             (bytes([1, 2, 3, 11]), "labels from 1 to 11"), (b"\1", "has 1 labels, but there are 4"),
                             (None, "lacks train_y.bin")):  # fmt: skip
        (tmp_path / "train_y.bin").unlink()
        if content is not None:
            (tmp_path / "train_y.bin").write_bytes(content)
        assert message in refused(tmp_path)
    with open(tmp_path / "test_X.bin", "ab") as file:
        file.write(b"x")
    assert "not whole images" in refused(tmp_path, test=True)
    (tmp_path / "unlabeled_X.bin").write_bytes(b"")
    assert "not whole images" in refused(tmp_path, part="unlabeled")
    with tarfile.open(tmp_path / "stl.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "train_X.bin", "stl10_binary/train_X.bin")
    assert "stl.tar.gz: holds STL-10: unpack it" in refused(tmp_path / "stl.tar.gz")


# ---------------------------------------------------------------------------------------------------------------------
# CelebA.


@pytest.mark.parametrize("zipped", [False, True])
def test_celeba(tmp_path, zipped):
    root = published.make_celeba(tmp_path / "celeba", zipped=zipped)
    images = root / ("img_align_celeba.zip" if zipped else "img_align_celeba")
    for place in (root, tmp_path, images):
        source = open_source(str(place), label_kind="Male")
        np.testing.assert_array_equal(source.labels, [1, 0, 1, 0])
        assert source.class_names == ["not Male", "Male"] and source.corruption == {"family": "celeba"}
        assert shades(source) == [0, 40, 80, 120] and "2 images of the test part are left out" in source.notes[-1]
        assert [name.split("/")[-1] for name in source.names] == [f"{i:06d}.jpg" for i in (1, 2, 3, 4)]
    test = open_source(str(root), test=True, label_kind="identity")
    np.testing.assert_array_equal(test.labels, [2884, 2885])
    assert shades(test) == [160, 200] and test.class_names is None
    plain = open_source(str(root))
    assert plain.labels is None and "--label_key=Young" in plain.notes[0]


def test_celeba_without_lists_and_as_csv(tmp_path):
    root = published.make_celeba(tmp_path)
    message = refused(root, label_kind="Hat")
    assert "no kind of labels 'Hat' (there are: Male, Smiling, Young, identity)" in message
    lists = {name: (root / name).read_text() for name in ("list_attr_celeba.txt", "identity_CelebA.txt")}
    os.remove(root / "list_eval_partition.txt")
    assert open_source(str(root)).length == 6
    assert "lacks list_eval_partition.txt" in refused(root, test=True)
    (root / "list_attr_celeba.txt").write_text(lists["list_attr_celeba.txt"].replace("000003.jpg", "x.jpg"))
    assert "lacks 1 of 6 images, first '000003.jpg'" in refused(root, label_kind="Male")
    (root / "identity_CelebA.txt").write_text(lists["identity_CelebA.txt"].replace("2883", "-3"))
    assert "says '-3' of '000004.jpg', expected a number" in refused(root, label_kind="identity")
    for name in lists:
        os.remove(root / name)
    assert "lacks list_attr_celeba.txt" in refused(root, label_kind="Male")
    assert "lacks identity_CelebA.txt" in refused(root, label_kind="identity")
    assert open_source(str(root)).notes == []
    rows = [line.split() for line in lists["list_attr_celeba.txt"].splitlines()[1:]]
    (root / "list_attr_celeba.csv").write_text("".join(
        ",".join(["image_id", *row] if len(row) == 3 else row) + "\n" for row in rows))  # fmt: skip
    np.testing.assert_array_equal(open_source(str(root), label_kind="Male").labels, [1, 0] * 3)


# ---------------------------------------------------------------------------------------------------------------------
# Arrays.


def test_arrays(tmp_path):
    images, labels, flags = synth.pictures(6), np.arange(6) % 3, np.array([1, 0, 1, 1, 0, 1])
    first = images.transpose(0, 3, 1, 2)
    onehot = np.eye(3, dtype=np.float32)[labels]
    np.savez(tmp_path / "a.npz", images, labels, flags)
    np.savez(tmp_path / "b.npz", images=first, labels=onehot, is_clean=flags.astype(bool)[:, None])
    values = {
        "c.pk": {"data": images.transpose(0, 3, 1, 2).reshape(6, -1), "labels": labels.tolist(), "flags": flags},
        "d.pkl": (images, labels, flags),
        "e.pk": {b"images": torch.from_numpy(first.copy()), b"label": torch.from_numpy(labels), b"flags": flags},
        "f.pickle": [images, onehot, flags.tolist()],
    }
    for name, value in values.items():
        (tmp_path / name).write_bytes(pickle.dumps(value, protocol=4 if name == "e.pk" else 2))
    for name in ("a.npz", "b.npz", *values):
        source = open_source(str(tmp_path / name))
        np.testing.assert_array_equal([source.image(i) for i in range(6)], images, err_msg=name)
        np.testing.assert_array_equal(source.labels, labels)
        np.testing.assert_array_equal(source.verified, flags == 1)
        assert source.labels.dtype == np.int64 and source.clean_labels is None and source.notes == []


def test_arrays_without_labels_in_gray_and_in_pairs(tmp_path):
    gray = synth.pictures(4, channels=1)
    pairs = [(image, int(i)) for i, image in enumerate(gray[..., 0])]
    for value in (gray, gray[..., 0], gray.reshape(4, -1), pairs, {"x": gray, "extra": 3}):
        (tmp_path / "a.pk").write_bytes(pickle.dumps(value))
        source = open_source(str(tmp_path / "a.pk"))
        np.testing.assert_array_equal([source.image(i) for i in range(4)], gray)
        assert source.labels is None if value is not pairs else source.labels.tolist() == [0, 1, 2, 3]
        assert ("not used: extra" in "".join(source.notes)) == isinstance(value, dict)
    np.savez(tmp_path / "c.npz", images=gray, labels=[1, 0, 1, 0], clean_labels=[0, 0, 1, 1])
    np.testing.assert_array_equal(open_source(str(tmp_path / "c.npz")).clean_labels, [0, 0, 1, 1])


def test_arrays_refused(tmp_path):
    images = synth.pictures(4)
    bad = [
        ({"names": np.array(["a"]), "score": np.ones(1)}, "holds names, score; expected images"),
        ({"arr_0": images / 255.0}, "images are float64 [4, 8, 8, 3]; expected images uint8"),
        ({"arr_0": images, "arr_1": np.arange(3)}, "labels: there are 3, but 4 images"),
        ({"arr_0": images, "arr_1": np.arange(4), "arr_2": np.arange(4)}, "flags holds 2"),
        ({"arr_0": images, "arr_1": np.arange(4) - 1}, "label -1 is negative"),
        ({"arr_0": images[:, :3], "arr_1": np.arange(4)}, "which are the channels?"),
        ({"arr_0": np.arange(4), "arr_1": np.arange(4)}, "images are int64 [4]; expected images"),
        ({"arr_0": images, "arr_2": np.ones(4)}, "has clean labels or flags, but no labels"),
    ]
    for value, message in bad:
        np.savez(tmp_path / "a.npz", **value)
        assert message in refused(tmp_path / "a.npz"), message
        (tmp_path / "a.pk").write_bytes(pickle.dumps(value))
        if "names" not in value:
            assert message in refused(tmp_path / "a.pk"), message
    for value in ("text", None, [], {}, {"images": "x"}, {"images": [[1], [2, 3]]}, [1, 2], ("a", "b")):
        (tmp_path / "a.pk").write_bytes(pickle.dumps(value))
        assert "expected images" in refused(tmp_path / "a.pk")


# ---------------------------------------------------------------------------------------------------------------------
# Sets with real noise.


@pytest.mark.parametrize("lists", ["", "annotations/"])
def test_clothing1m(tmp_path, lists):
    root = str(published.make_clothing1m(tmp_path, lists))
    for part, labels, clean, gray in ((None, [1, 0], None, [40, 0]), ("noisy", [1, 0], None, [40, 0]),
                                      ("clean", [2, 4], [2, 4], [80, 160]), ("validation", [3], [3], [120]),
                                      ("both", [4, 3], [3, 2], [120, 80])):  # fmt: skip
        source = open_source(root, part=part)
        assert source.labels.tolist() == labels and shades(source) == gray
        assert clean is None if source.clean_labels is None else source.clean_labels.tolist() == clean
        assert source.class_names == published.CLOTHES and source.corruption["family"] == "clothing1m"
    test = open_source(root, test=True)
    assert test.labels.tolist() == test.clean_labels.tolist() == [5] and test.names == ["images/5/55/5,599.jpg"]


def test_clothing1m_refused(tmp_path):
    root = published.make_clothing1m(tmp_path)
    assert "no part 'all' (there are: noisy, clean, validation, both)" in refused(root, part="all")
    assert "no part 'both'" in refused(root, part="both", test=True)
    (root / "images/0/00/0,099.jpg").unlink()
    assert "0,099.jpg: cannot be read (No such file" in refused(root)
    (root / "images/0/00/0,099.jpg").symlink_to("/dev/zero")
    assert "not a regular file" in refused(root)
    with open(root / "noisy_train_key_list.txt", "a") as file:
        file.write("images/9/9.jpg\n")
    assert "noisy_label_kv.txt lacks 1 of 3 images" in refused(root) and "'images/9/9.jpg'" in refused(root)
    for text, message in (("images/1/11/1,199.jpg\n" * 2, "lists 1 images twice"), ("", "is empty"),
                          ("../secret.jpg\n", "leads out"), ("images/none.jpg\n", "lacks")):  # fmt: skip
        (root / "noisy_train_key_list.txt").write_text(text)
        with open(root / "noisy_label_kv.txt", "a") as file:
            file.write(f"{text.splitlines()[0]} 3\n" if message in ("leads out", "lacks") else "")
        assert message in refused(root)
    (root / "noisy_label_kv.txt").write_text("images/1.jpg cat\n")
    assert "has the line 'images/1.jpg cat', expected a name and a number" in refused(root)
    (root / "category_names_eng.txt").write_text("a\nb\n")
    assert "names 2 classes, but there is a label 4" in refused(root, part="clean")
    (root / "clean_test_key_list.txt").unlink()
    assert "lacks clean_test_key_list.txt or annotations/clean_test_key_list.txt" in refused(root, test=True)


def test_a_listed_image_outside_of_the_folder(tmp_path):
    root = published.make_clothing1m(tmp_path / "set")
    (tmp_path / "private.jpg").write_bytes(published.jpeg(3))
    (root / "images/0/00/0,099.jpg").unlink()
    (root / "images/0/00/0,099.jpg").symlink_to(tmp_path / "private.jpg")
    assert "0,099.jpg: is a link to a file outside the folder" in refused(root)


def test_webvision(tmp_path):
    root = str(published.make_webvision(tmp_path))
    for options, labels, gray in (({}, [3, 60, 134, 7, 517], [0, 40, 80, 120, 160]),
                                  (dict(part="google"), [3, 60, 134], [0, 40, 80]),
                                  (dict(part="flickr"), [7, 517], [120, 160]), (dict(part="mini"), [3], [0]),
                                  (dict(test=True), [4, 70], [200, 240]),
                                  (dict(test=True, part="mini"), [4], [200])):  # fmt: skip
        source = open_source(root, **options)
        assert source.labels.tolist() == labels and shades(source) == gray and source.clean_labels is None
        assert len(source.class_names) == (50 if options.get("part") == "mini" else 1000)
        assert source.class_names[3] == "thing 3" and source.corruption == {"family": "webvision"}
    assert source.names == ["val000001.jpg"]
    assert open_source(root).class_names[134] == "n00000134 crane" != open_source(root).class_names[517]
    os.remove(tmp_path / "info/train_filelist_flickr.txt")
    assert "lacks info/train_filelist_flickr.txt" in refused(root) and "--part" in refused(root)
    assert open_source(root, part="mini").length == 1
    (tmp_path / "info/train_filelist_google.txt").write_text("google/q0002/b.jpg 60\n")
    assert "no image of the first 50 classes" in refused(root, part="mini")


def test_food101n(tmp_path):
    root = str(published.make_food101n(tmp_path / "Food-101N_release"))
    source = open_source(str(tmp_path))
    assert source.labels.tolist() == [1, 1, 2, 2] and shades(source) == [0, 40, 80, 120]
    assert source.class_names == ["apple_pie", "sushi", "tacos"] and source.verified is None
    verified = open_source(root, part="verified")
    assert verified.labels.tolist() == [2, 1] and verified.verified.tolist() == [False, True]
    assert shades(verified) == [120, 0] and verified.names == ["tacos/y.jpg", "sushi/a.jpg"]
    assert open_source(root, part="verified_validation").verified.tolist() == [True]
    meta = tmp_path / "Food-101N_release/meta"
    (meta / "imagelist.tsv").write_text("class_name/key\nsushi/a\ntacos/x\n")  # keys without their ending
    assert open_source(root).names == ["sushi/a.jpg", "tacos/x.jpg"]
    (meta / "verified_train.tsv").write_text("class_name/key\tverification_label\nsushi/a.jpg\t2\n")
    assert "expected class_name/key and 0 or 1" in refused(root, part="verified")
    (meta / "classes.txt").write_text("sushi\n")
    assert "'tacos' is missing" in refused(root)
    (meta / "imagelist.tsv").unlink()
    assert "lacks meta/imagelist.tsv" in refused(root)


def test_animal10n(tmp_path):
    root = published.make_animal10n(tmp_path / "raw_image")
    for place in (tmp_path, root, root / "training"):
        source = open_source(str(place))
        assert source.labels.tolist() == [0, 0, 3] and list(source.names) == ["0_12.jpg", "0_7.jpg", "3_1.jpg"]
        assert source.class_names[3] == "coyote" and shades(source) == [0, 40, 80] and len(source.notes) == 1
    assert open_source(str(root), test=True).labels.tolist() == [1, 9]
    root.joinpath("training").rename(tmp_path / "flat")
    source = open_source(str(tmp_path / "flat"))
    assert source.labels.tolist() == [0, 0, 3] and source.class_names is None
    assert "training: is missing" in refused(root)
    (root / "testing/other.jpg").write_bytes(published.jpeg(0))  # now these are just images
    assert not open_source(str(root / "testing")).notes


# ---------------------------------------------------------------------------------------------------------------------
# All of them.


def test_nothing_that_is_chosen_is_ignored(tmp_path):
    """A part or a kind of labels that a source does not have is refused, whatever the source is."""
    makers = [published.make_idx, published.make_stl10, published.make_celeba, published.make_clothing1m,
              published.make_webvision, published.make_food101n, published.make_animal10n]  # fmt: skip
    places = ["digits", str(synth.make_archive(tmp_path / "a.zip", synth.pictures(2))),
              str(synth.make_cifar10(tmp_path / "c.tar.gz", per_batch=1)[0])]  # fmt: skip
    for number, make in enumerate(makers):
        make(tmp_path / str(number))
        places.append(str(tmp_path / str(number)))
    for place in places:
        assert "has no part 'nonsense'" in refused(place, part="nonsense")
        assert "has no kind of labels 'nonsense'" in refused(place, label_kind="nonsense") or "lacks" in refused(
            place, label_kind="nonsense"
        )
    assert len(places) >= len(sources.LAYOUTS)


def test_an_archive_with_a_dataset_json_is_an_archive(tmp_path):
    published.make_animal10n(tmp_path)
    published.write(tmp_path, {"training/dataset.json": '{"labels": null}'})
    assert open_source(str(tmp_path / "training")).labels is None


# ---------------------------------------------------------------------------------------------------------------------
# From the command line: what only an archive shows.


def build(tmp_path, source, *args, code=0):
    result = synth.run_dataset_tool(f"--source={source}", f"--dest={tmp_path / 'out.zip'}", "--overwrite", *args)
    assert result[0] == code, result[2]
    return (result[1], result[2], ImageDataset(str(tmp_path / "out.zip"))) if code == 0 else result[2]


def test_clean_labels_and_original_names_go_on_record(tmp_path):
    root = published.make_clothing1m(tmp_path / "set")
    out, _, data = build(tmp_path, root, "--part=both")
    assert data.labels.tolist() == [4, 3] and data.clean_labels.tolist() == [3, 2]
    assert "100.00% of the labels are wrong" in out and data.truth == "clean labels, as published"
    assert data.source_names == ["images/3/33/3,399.jpg", "images/2/22/2,299.jpg"]
    assert "--source --part=none: " in build(tmp_path, root, "--part=none", code=1)
    assert "--source --eval --part=both: " in build(tmp_path, root, "--eval", "--part=both", code=1)


def test_labels_that_people_looked_at_become_a_label_file(tmp_path):
    root = published.make_food101n(tmp_path / "set")
    out, _, data = build(tmp_path, root, "--part=verified", "--noise_type=pair", "--noise_rate=0")
    found = load_label_file(tmp_path / "out-labels.npz", data)
    assert found.is_clean.tolist() == [False, True] and found.labels.tolist() == [2, 1] and found.noise_rate == 0.5
    assert f"{tmp_path}/out-labels.npz" in out
    _, _, data = build(tmp_path, root, "--part=verified", "--noise_type=pair", "--noise_rate=1")
    assert not load_label_file(tmp_path / "out-labels.npz", data).is_clean.any()  # noise changed them all
    code, _, err = synth.run_dataset_tool(f"--source={root}", f"--dest={tmp_path / 'new' / 'out.zip'}")
    assert code == 0 and not (tmp_path / "new/out-labels.npz").exists()
    (tmp_path / "out.zip").unlink()
    code, _, err = synth.run_dataset_tool(f"--source={root}", f"--dest={tmp_path / 'out.zip'}", "--part=verified")
    assert code == 1 and "out-labels.npz: exists already" in err and not (tmp_path / "out.zip").exists()
    np.save(tmp_path / "l.npy", [1, 2])
    build(tmp_path, root, "--part=verified_validation", "--max-images=1")
    (tmp_path / "out-labels.npz").unlink()
    build(tmp_path, root, "--part=verified", f"--labels={tmp_path / 'l.npy'}")
    assert not (tmp_path / "out-labels.npz").exists()  # people said nothing of these labels


def test_an_attribute_is_chosen_by_label_key(tmp_path):
    root = published.make_celeba(tmp_path / "set")
    _, err, data = build(tmp_path, root, "--label_key=Male")
    assert data.labels.tolist() == [1, 0, 1, 0] and data.class_names == ["not Male", "Male"]
    assert "Note: " in err and "2 images of the test part" in err
    assert "--source --label_key=Hat: " in build(tmp_path, root, "--label_key=Hat", code=1)


def test_cifar_n(tmp_path):
    path, _, labels = synth.make_cifar10(tmp_path / "c.tar.gz", per_batch=4)
    human = dict(clean_label=labels, worse_label=(labels + 1) % 10, random_label1=labels)
    torch.save(human, tmp_path / "human.pt")
    args = [f"--labels={tmp_path / 'human.pt'}", "--label_key=worse_label"]
    out, _, data = build(tmp_path, path, *args)
    assert data.labels.tolist() == human["worse_label"].tolist() and data.clean_labels.tolist() == labels.tolist()
    assert data.truth == "clean labels, as published" and "100.00% of the labels are wrong" in out
    assert "--label_key=NAME" in build(tmp_path, path, args[0], code=1)
    for clean, message in (
        (np.roll(labels, 1), "differs from the labels"),
        (labels[:5], "has 5 labels, but the source"),
    ):
        torch.save({**human, "clean_label": clean}, tmp_path / "human.pt")
        assert message in build(tmp_path, path, *args, code=1)
