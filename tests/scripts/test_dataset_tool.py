"""dataset_tool.py as a user runs it: all sources, labels and noise, transforms, the bytes it writes, its help."""

import io
import json
import shlex
import signal
import subprocess
import sys
import zipfile

import numpy as np
import PIL.Image
import pytest
import torch

import dataset_tool
import dnnlib
from archives import encoder, label_noise, writer
from archives.dataset import ImageDataset
from archives.sources import open_source
from archives.workers import ordered_map
from tests.support import synth
from tests.support.paths import ROOT
from tests.support.synth import run_dataset_tool as run


def build(source, dest, *args):
    """Run the tool, which must succeed. Return the archive, with images [N, C, H, W] as `pixels`, output as `out`."""
    code, out, err = run(f"--source={source}", f"--dest={dest}", *args)
    assert code == 0, err
    data = ImageDataset(str(dest))
    data.pixels = data.images(range(len(data))).numpy()
    data.out = out
    return data


def metadata(path):
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("dataset.json"))


def chw(images):
    return images.transpose(0, 3, 1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Sources.


def test_digits(tmp_path):
    data = build("digits", tmp_path / "digits.zip")
    assert len(data) == 1797 and data.image_shape == (1, 8, 8) and data.label_dim == 10 and data.family == "digits"
    assert set(np.unique(data.pixels)) == {round(v * 255 / 16) for v in range(17)}
    assert data.class_names == list("0123456789") and data.clean_labels is None
    assert "1,797" in data.out and "10" in data.out and "8x8" in data.out and "digits.zip" in data.out


def test_a_folder_that_is_called_like_a_built_in_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = synth.pictures(3)
    (tmp_path / "photos").mkdir()
    for i in range(3):
        (tmp_path / "photos" / f"{i}.png").write_bytes(synth.png(images[i]))
    for args in (["--source=photos"], ["--source=digits", "--outliers=photos", "--perturb_percent=5"]):
        code, _, err = run(*args, "--dest=a.zip")
        assert (
            code == 1 and "photos: is a built-in source, and also a folder here: write ./photos for the folder" in err
        )
    np.testing.assert_array_equal(build("./photos", "a.zip").pixels, chw(images))


def test_the_readme_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, images, labels = synth.make_cifar10(tmp_path / "downloads/cifar10/cifar-10-python.tar.gz", per_batch=60)
    command = ("--source=downloads/cifar10/cifar-10-python.tar.gz --dest=datasets/cifar10_sym_40-32x32.zip "
               "--noise_type=sym --noise_rate=0.4")  # fmt: skip
    code, out, err = run(*command.split())
    assert code == 0, err
    data = ImageDataset("datasets/cifar10_sym_40-32x32.zip")
    np.testing.assert_array_equal(data.images(range(300)), chw(images))
    np.testing.assert_array_equal(data.clean_labels, labels)
    rate = (data.labels != labels).mean()
    assert 0.25 < rate < 0.55 and f"{rate:.2%}" in out
    np.testing.assert_array_equal(
        data.labels, label_noise.corrupt_labels(labels, label_noise.transition_matrix("sym", 0.4, 10), 0)
    )
    assert data.class_names == synth.CIFAR10_NAMES
    c = data.corruption
    assert set(c) == {"family", "noise_type", "noise_rate", "T", "seed", "version", "realised_rate", "clean_labels"}
    assert c["clean_labels"] == "before noise"
    assert (c["family"], c["noise_type"], c["noise_rate"], c["seed"]) == ("cifar10", "sym", 0.4, 0)
    assert c["realised_rate"] == rate
    np.testing.assert_allclose(c["T"], label_noise.transition_matrix("sym", 0.4, 10))


def test_cifar_test_part_and_cifar100(tmp_path):
    path, _, _ = synth.make_cifar10(tmp_path / "c10.tar.gz", per_batch=10)
    assert len(build(path, tmp_path / "test.zip", "--eval")) == 10
    path, images, fine = synth.make_cifar100(tmp_path / "c100.tar.gz")
    data = build(path, tmp_path / "c100.zip", "--noise_type=asym", "--noise_rate=1")
    assert data.family == "cifar100" and data.label_dim == 100 and data.class_names[7] == "fine7"
    np.testing.assert_array_equal(data.pixels, chw(images))
    np.testing.assert_array_equal(data.labels, label_noise.asym_targets("cifar100", 100)[fine])
    assert len(build(path, tmp_path / "c100t.zip", "--eval")) == 50


@pytest.mark.parametrize("family", ["mnist", "fashion-mnist"])
def test_mnist(tmp_path, family):
    folder, images, labels = synth.make_mnist(tmp_path / family.replace("-", "_"))
    data = build(folder / "train-images-idx3-ubyte.gz", tmp_path / "a.zip")
    assert data.family == family and data.image_shape == (1, 32, 32) and data.label_dim == 10
    np.testing.assert_array_equal(data.pixels[:, 0, 2:-2, 2:-2], images)
    assert data.pixels.astype(int).sum() == images.astype(int).sum()
    np.testing.assert_array_equal(data.labels, labels)
    assert len(build(folder, tmp_path / "b.zip", "--max-images=17")) == 17
    assert len(build(folder, tmp_path / "t.zip", "--eval")) == 10
    test = build(folder / "t10k-images-idx3-ubyte.gz", tmp_path / "c.zip")
    np.testing.assert_array_equal(test.pixels[:, 0, 2:-2, 2:-2], images[:10])


def test_lsun(tmp_path):
    pytest.importorskip("lmdb")
    images = [np.full([20 + 4 * i, 40, 3], 50 * i, dtype=np.uint8) for i in range(3)]
    folder = synth.make_lsun(tmp_path / "lsun", images)
    data = build(folder, tmp_path / "a.zip", "--transform=center-crop", "--resolution=16x16", "--workers=2")
    assert data.family == "lsun" and not data.has_labels and metadata(tmp_path / "a.zip")["labels"] is None
    np.testing.assert_allclose(data.pixels.mean((1, 2, 3)), [0, 50, 100], atol=2)


def test_lsun_is_read_by_several_processes_and_threads(tmp_path, monkeypatch):
    lmdb = pytest.importorskip("lmdb")
    monkeypatch.setattr(encoder, "PART", 1)  # each image is a task
    images = [np.full([16, 16, 3], 20 * i, dtype=np.uint8) for i in range(6)]
    folder = synth.make_lsun(tmp_path / "lsun", images)
    data = build(folder, tmp_path / "a.zip", "--workers=3")
    np.testing.assert_allclose(data.pixels.mean((1, 2, 3)), range(0, 120, 20), atol=2)
    source = open_source(str(folder))
    threads = ordered_map(source.image, range(6), 3)
    np.testing.assert_allclose([image.mean() for image in threads], range(0, 120, 20), atol=2)
    with lmdb.open(str(folder)) as env, env.begin(write=True) as transaction:
        transaction.delete(f"{3:040x}".encode())
    with pytest.raises(dnnlib.UserError, match="0003: is no longer in the LMDB"):
        source.image(3)
    (folder / "data.mdb").write_bytes(b"x")
    with pytest.raises(dnnlib.UserError, match="lsun: not a readable LMDB"):
        source.image(0)


def test_lsun_without_lmdb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    (tmp_path / "data.mdb").write_bytes(b"")
    code, _, err = run(f"--source={tmp_path}", f"--dest={tmp_path}/a.zip")
    assert code == 1 and "pip install lmdb" in err and err.count("\n") == 1


def test_folder_of_classes_with_mixed_formats(tmp_path):
    images = synth.pictures(3, 16)
    for i, (name, picture) in enumerate([("cat/a.png", images[0]), ("cat/b.bmp", images[1]), ("dog/c.png", images[2])]):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        mode = "L" if i == 2 else "RGB"
        PIL.Image.fromarray(picture).convert(mode).save(tmp_path / "in" / name)
    data = build(tmp_path / "in", tmp_path / "out", "--noise_type=pair", "--noise_rate=1")
    assert data.class_names == ["cat", "dog"] and data.family is None
    np.testing.assert_array_equal(data.clean_labels, [0, 0, 1])
    np.testing.assert_array_equal(data.labels, [1, 1, 0])
    np.testing.assert_array_equal(data.pixels[:2], chw(images[:2]))
    assert (data.pixels[2, 0] == data.pixels[2, 1]).all()  # gray among RGB becomes RGB
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["00000", "dataset.json"]
    assert (tmp_path / "out/00000/img00000002.png").exists()


def test_a_resolution_as_edm_spells_it(tmp_path):
    for name, size in (("a.zip", "16x16"), ("b.zip", "16,16")):
        build("digits", tmp_path / name, f"--resolution={size}", "--max-images=5")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_an_archive_passes_through_unchanged(tmp_path):
    first = build("digits", tmp_path / "a.zip", "--noise_type=asym", "--noise_rate=0.4", "--max-images=300", "--seed=5")
    second = build(tmp_path / "a.zip", tmp_path / "b")
    third = build(tmp_path / "b", tmp_path / "c.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "c.zip").read_bytes()
    assert second.corruption == first.corruption and first.family == "digits"
    np.testing.assert_array_equal(third.clean_labels, first.clean_labels)
    np.testing.assert_array_equal(third.pixels, first.pixels)
    vectors = synth.make_archive(tmp_path / "v.zip", synth.pictures(2), [[0.5, 1.0], [2.0, 0.25]])
    np.testing.assert_array_equal(build(vectors, tmp_path / "w.zip").onehot([0, 1]), [[0.5, 1.0], [2.0, 0.25]])
    assert not build(synth.make_archive(tmp_path / "u.zip", synth.pictures(2)), tmp_path / "x.zip").has_labels
    assert metadata(tmp_path / "x.zip")["labels"] is None


# ---------------------------------------------------------------------------------------------------------------------
# Noise and labels.


def test_noise_kinds(tmp_path):
    T = np.roll(np.eye(10), 3, axis=1)
    (tmp_path / "T.json").write_text(json.dumps(T.tolist()))
    data = build("digits", tmp_path / "m.zip", "--noise_type=matrix", f"--noise_matrix={tmp_path}/T.json")
    np.testing.assert_array_equal(data.labels, (data.clean_labels + 3) % 10)
    assert data.corruption["noise_rate"] is None and data.corruption["T"] == T.tolist()
    data = build("digits", tmp_path / "i.zip", "--noise-type=instance", "--noise-rate=0.3", "--seed=2")
    assert abs(data.corruption["realised_rate"] - 0.3) < 0.05 and data.corruption["T"] is None
    expected = label_noise.instance_noise(data.pixels.transpose(0, 2, 3, 1), data.clean_labels, 0.3, 10, 2)
    np.testing.assert_array_equal(data.labels, expected)


def test_label_files(tmp_path):
    source = build("digits", tmp_path / "a.zip", "--max-images=50")
    labels = (source.labels + 1) % 10
    np.save(tmp_path / "l.npy", labels)
    np.savez(tmp_path / "l.npz", first=labels * 0, second=labels.astype(np.float64))
    torch.save({"aggre_label": labels, "clean_label": labels * 0}, tmp_path / "cifar_n.pt")
    torch.save(torch.from_numpy(labels), tmp_path / "l.pt")
    pairs = [[name, int(label)] for name, label in zip(source.file_names, labels, strict=True)]
    (tmp_path / "l.json").write_text(json.dumps({"labels": pairs[::-1]}))
    old_numpy = (tmp_path / "cifar_n.pt").read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert old_numpy != (tmp_path / "cifar_n.pt").read_bytes()
    for name, key in [("l.npy", None), ("l.npz", "second"), ("cifar_n.pt", "aggre_label"), ("l.pt", None),
                      ("l.json", None)]:  # fmt: skip
        args = [f"--labels={tmp_path / name}", "--overwrite"] + ([f"--label_key={key}"] if key else [])
        data = build(tmp_path / "a.zip", tmp_path / "out.zip", *args)
        np.testing.assert_array_equal(data.labels, labels)
        assert data.clean_labels is None and data.family == "digits"  # nobody said that the old labels are right
        assert data.corruption["noise_type"] == "imported" and data.corruption["realised_rate"] is None
    # An import keeps the clean labels that the archive has; labels for unlabeled images are just labels.
    build(tmp_path / "a.zip", tmp_path / "noisy.zip", "--noise_type=sym", "--noise_rate=0.3")
    data = build(tmp_path / "noisy.zip", tmp_path / "again.zip", f"--labels={tmp_path / 'l.npz'}", "--label_key=second")
    np.testing.assert_array_equal(data.clean_labels, source.labels)
    assert data.corruption["realised_rate"] == 1
    plain = synth.make_archive(tmp_path / "plain.zip", synth.pictures(50))
    data = build(plain, tmp_path / "p.zip", f"--labels={tmp_path / 'l.npy'}", "--noise_type=sym", "--noise_rate=0.5")
    np.testing.assert_array_equal(data.clean_labels, labels)
    data = build(plain, tmp_path / "q.zip", f"--labels={tmp_path / 'l.npy'}")
    assert data.clean_labels is None and data.corruption["noise_type"] is None


def test_cifar_n_file_of_an_old_numpy(tmp_path):
    labels = np.arange(20) % 10
    torch.save({"worse_label": labels}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "old.pt").read_bytes().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    assert b"numpy.core" in data
    (tmp_path / "old.pt").write_bytes(data)
    plain = synth.make_archive(tmp_path / "plain.zip", synth.pictures(20))
    built = build(plain, tmp_path / "q.zip", f"--labels={tmp_path / 'old.pt'}")
    np.testing.assert_array_equal(built.labels, labels)


# ---------------------------------------------------------------------------------------------------------------------
# Transforms, bytes, durability.


def test_transforms():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, [20, 33, 3], dtype=np.uint8)
    crop = writer.make_transform("center-crop", (20, 20))(image)
    np.testing.assert_array_equal(crop, image[:, 6:26])
    resized = writer.make_transform(None, (16, 8))(image)
    expected = PIL.Image.fromarray(image).resize((16, 8), PIL.Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(resized, expected)
    assert writer.make_transform(None, None)(image) is image
    wide = writer.make_transform("center-crop-wide", (16, 8))
    out = wide(rng.integers(1, 256, [20, 32, 1], dtype=np.uint8))
    assert out.shape == (16, 16, 1) and (out[:4] == 0).all() and (out[12:] == 0).all() and (out[4:12] > 0).all()
    gradient = np.repeat(np.arange(0, 100, 5, dtype=np.uint8)[:, None, None], 32, 1)  # rows 2..17 of 20 are kept
    np.testing.assert_allclose(wide(gradient)[5:11, 0, 0], np.arange(2, 18).reshape(8, 2).mean(1)[1:7] * 5, atol=1)
    assert wide(image[:7]) is None and wide(image[:, :15]) is None


def test_wide_leaves_out_small_images_with_their_labels(tmp_path):
    for i, size in enumerate([(20, 32), (20, 10), (20, 40), (7, 32)]):
        (tmp_path / f"in/{i}").mkdir(parents=True)
        PIL.Image.fromarray(np.full([*size, 3], i, np.uint8)).save(tmp_path / f"in/{i}/a.png")
    data = build(tmp_path / "in", tmp_path / "a.zip", "--transform=center-crop-wide", "--resolution=16x8")
    np.testing.assert_array_equal(data.labels, [0, 2])
    assert data.label_dim == 4 and "2 too small" in data.out
    np.testing.assert_array_equal(data.pixels[:, 0, 8, 8], [0, 2])


@pytest.mark.parametrize("shape", [(8, 8, 1), (5, 7, 3), (300, 260, 3)])
def test_png(shape):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    data = writer.encode_png(image)
    with PIL.Image.open(io.BytesIO(data)) as picture:
        picture.verify()
    with PIL.Image.open(io.BytesIO(data)) as picture:
        np.testing.assert_array_equal(np.asarray(picture).reshape(shape), image)
    assert 0 < len(data) - image.size < 100 + shape[0] + 5 * (image.size // 60000 + 1)


def test_bytes_do_not_depend_on_workers(tmp_path):
    for workers in (1, 2):
        PIL.Image.fromarray(synth.pictures(1, 300)[0]).save(tmp_path / "a.png")
        args = ["--noise_type=instance", "--noise_rate=0.4", f"--workers={workers}"]
        build("digits", tmp_path / f"{workers}.zip", *args)
        large = synth.make_archive(tmp_path / "large.zip", synth.pictures(20, 256))
        build(large, tmp_path / f"large{workers}.zip", "--resolution=128x128", f"--workers={workers}")
    for name in ("", "large"):
        assert (tmp_path / f"{name}1.zip").read_bytes() == (tmp_path / f"{name}2.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "1.zip") as archive:
        info = archive.infolist()[-2]
        assert info.filename == "00001/img00001796.png" and info.date_time == (1980, 1, 1, 0, 0, 0)
        assert {i.compress_type for i in archive.infolist()} == {zipfile.ZIP_STORED} and archive.testzip() is None


def test_kill_in_the_middle_leaves_nothing(tmp_path):
    """The process is killed while it writes: the old archive stays, and no new archive appears."""
    script = (
        "import time, dataset_tool\n"
        "from archives.build import ArchiveWriter\n"
        "write = ArchiveWriter.write\n"
        "def write_some(self, offset, members, contents):\n"
        "    write(self, offset, members[:1500], contents[:1500])\n"
        "    print('here', flush=True)\n"
        "    time.sleep(600)\n"
        "ArchiveWriter.write = write_some\n"
        "dataset_tool.main()\n"
    )
    old = build("digits", tmp_path / "old.zip", "--max-images=10")
    processes = []
    for name in ("old.zip", "new"):
        command = [sys.executable, "-c", script, "--source=digits", f"--dest={tmp_path / name}", "--overwrite"]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        processes.append(subprocess.Popen(command, cwd=ROOT, text=True, **pipes))
    for process, how in zip(processes, (signal.SIGKILL, signal.SIGINT), strict=True):
        assert process.stdout.readline() == "here\n"
        process.send_signal(how)
    codes = [(process.communicate()[1], process.returncode) for process in processes]
    assert codes[0][1] == -signal.SIGKILL
    assert codes[1] == ("Error: interrupted\n", 130)
    assert {p.name for p in tmp_path.iterdir() if not p.name.startswith(".old")} == {"old.zip"}
    assert len(ImageDataset(str(tmp_path / "old.zip"))) == len(old) == 10


def test_help_names_every_option():
    code, out, _ = run("--help")
    assert code == 0
    for option in ("--source", "--dest", "--eval", "--max-images", "--transform", "--resolution", "--labels",
                   "--label_key", "--noise_type", "--noise_rate", "--noise_matrix", "--seed", "--workers",
                   "--overwrite", "--background", "--skip_damaged"):  # fmt: skip
        assert option in out


def test_examples_of_the_help_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    synth.make_cifar10(tmp_path / "downloads/cifar10/cifar-10-python.tar.gz", per_batch=4)
    for name in ("cat", "dog"):
        (tmp_path / "my_images" / name).mkdir(parents=True)
        PIL.Image.fromarray(synth.pictures(1, 80)[0]).save(tmp_path / "my_images" / name / "a.png")
    lines = (dataset_tool.__doc__ + dataset_tool.EPILOG).replace("\\\n", " ").splitlines()
    commands = {line.strip() for line in lines if line.strip().startswith("python dataset_tool.py")}
    assert len(commands) >= 6
    for command in commands:
        code, _, err = run(*shlex.split(command)[2:], "--max-images=200")
        assert code == 0, f"{command}: {err}"
