"""generate.py in-process on tiny random networks, and once under torchrun; where images go; image sheets."""

import errno
import io
import json
import os
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import dnnlib
import generate
from archives import writer
from archives.writer import ArchiveWriter
from sampling import output, sheet
from sampling.arrival import Arrival
from sampling.generation import generate_images
from sampling.grid import image_sheet, save_class_grid, save_grid
from sampling.output import save_images
from tests.support.generated import FAST, assert_same_images, make, random_network, read, run
from tests.support.runs import torchrun
from torch_utils import distributed, persistence
from training.networks_resnet import Classifier

NAMES = ["zero", "one", "two"]


@pytest.fixture(scope="module")
def pkl(tmp_path_factory):
    """name -> path of a snapshot: 'cond' and others that differ from it in one respect."""
    folder = tmp_path_factory.mktemp("networks")
    networks = {
        "cond": random_network(),
        "weak": random_network(1),
        "uncond": random_network(label_dim=0),
        "rgb": random_network(img_channels=3),
        "large": random_network(img_resolution=16),
        "four_classes": random_network(label_dim=4),
        "two_channels": random_network(img_channels=2),
        "classifier": Classifier(img_resolution=8, img_channels=1, label_dim=3, depth="small", model_channels=8),
    }
    paths = {name: str(folder / f"{name}.pkl") for name in networks}
    for name, net in networks.items():
        info = dict(class_names=NAMES if net.label_dim == 3 else None)
        persistence.save_snapshot(paths[name], dict(ema=net, info=info))
    broken = random_network()
    for p in broken.parameters():
        p.data.fill_(float("nan"))
    paths["broken"] = str(folder / "broken.pkl")
    persistence.save_snapshot(paths["broken"], dict(ema=broken, info={}))
    return paths


@pytest.fixture(scope="module")
def reference(pkl, tmp_path_factory):
    outdir = tmp_path_factory.mktemp("reference") / "out"
    make(outdir, f"--network={pkl['cond']}", "--seeds=0-19", "--batch=7", "--S_churn=20")
    return read(outdir)


# What comes out.


def test_folder_is_a_labeled_data_set(pkl, tmp_path):
    text = make(tmp_path / "out", f"--network={pkl['cond']}", "--seeds=3,0-1,1000", "--grid", tmp_path / "sheet.png")
    names = ["000003.png", "000000.png", "000001.png", "001000.png"]
    assert sorted(os.listdir(tmp_path / "out")) == sorted([*names, "dataset.json"])
    metadata = json.loads((tmp_path / "out/dataset.json").read_text())
    assert [name for name, _ in metadata["labels"]] == names and metadata["class_names"] == NAMES
    for name, label in metadata["labels"]:
        rnd = torch.Generator().manual_seed(int(name[:6]))
        torch.randn([1, 8, 8], generator=rnd)
        assert label == int(torch.randint(3, [], generator=rnd))
    assert "4 images" in text and "5 network evaluations per image" in text
    images, labels = read(tmp_path / "out")
    assert images.shape == (4, 1, 8, 8) and len(np.unique(images)) > 50
    assert np.array(Image.open(tmp_path / "sheet.png")).ndim == 2


@pytest.mark.parametrize("batch", [1, 64])
def test_images_do_not_depend_on_the_batch(pkl, reference, tmp_path, batch):
    make(tmp_path / "out", f"--network={pkl['cond']}", "--seeds=0-19", f"--batch={batch}", "--S_churn=20")
    images, labels = read(tmp_path / "out")
    assert_same_images(images, reference[0])
    assert np.array_equal(labels, reference[1]) and len(set(labels)) == 3


@pytest.mark.parametrize("outdir", [pytest.param("out", marks=pytest.mark.long), "out.zip"])
def test_images_do_not_depend_on_the_number_of_processes(pkl, reference, tmp_path, outdir):
    result = torchrun(
        "generate.py",
        *FAST,
        f"--network={pkl['cond']}",
        "--seeds=0-19",
        "--batch=4",
        "--S_churn=20",
        f"--outdir={tmp_path / outdir}",
    )
    assert os.listdir(tmp_path) == [outdir]
    images, labels = read(tmp_path / outdir)
    assert_same_images(images, reference[0])
    assert np.array_equal(labels, reference[1])
    assert result.stdout.count("evaluations per image") == 1


def test_two_processes_and_one_seed(pkl, tmp_path, monkeypatch):
    """Rank 0 has no image then; the other process tells it what the image took."""

    def gather(mine):
        return [mine, (5, 0.0, 0.0, 0, 0)] if isinstance(mine, tuple) else [mine]

    monkeypatch.setattr(generate.distributed, "share", lambda count: range(0))
    monkeypatch.setattr(generate.distributed, "all_gather_object", gather)
    assert "5 network evaluations per image" in make(tmp_path / "out", f"--network={pkl['cond']}", "--seeds=7")


def test_archive_equals_the_folder_and_itself(pkl, tmp_path):
    for out in ("out", "a.zip", "b.zip"):
        make(tmp_path / out, f"--network={pkl['rgb']}", "--seeds=998-1001", "--subdirs")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.namelist() == [
            "000000/000998.png",
            "000000/000999.png",
            "001000/001000.png",
            "001000/001001.png",
            "dataset.json",
        ]
        for name in archive.namelist():
            assert archive.getinfo(name).date_time == (1980, 1, 1, 0, 0, 0)
            assert archive.read(name) == (tmp_path / "out" / name).read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.zip", "b.zip", "out"]
    assert read(tmp_path / "a.zip")[0].shape == (4, 3, 8, 8)


def test_unconditional_networks_have_no_labels(pkl, tmp_path):
    make(tmp_path / "out", f"--network={pkl['uncond']}", "--seeds=0-1")
    assert json.loads((tmp_path / "out/dataset.json").read_text()) == {"labels": None}


def test_class_overrides_the_label_but_not_the_noise(pkl, reference, tmp_path):
    make(
        tmp_path / "out", f"--network={pkl['cond']}", "--seeds=0-19", "--class=1", "--S_churn=20", "--save_each_sample"
    )
    images, labels = read(tmp_path / "out")
    assert set(labels) == {1}
    same = reference[1] == 1
    assert_same_images(images[same], reference[0][same])
    assert np.abs(images[~same].astype(int) - reference[0][~same]).max() > 5


def test_a_class_by_its_name(pkl, tmp_path):
    text = make(tmp_path / "out", f"--network={pkl['cond']}", "--seeds=0-3", "--class=One")
    assert set(read(tmp_path / "out")[1]) == {1} and "Classes: one (1)" in text


def test_several_classes_take_turns_by_seed(pkl, tmp_path):
    make(tmp_path / "all", f"--network={pkl['cond']}", "--seeds=0-6", "--class=2,0")
    make(tmp_path / "some", f"--network={pkl['cond']}", "--seeds=3,4", "--class=2,0")
    labels = dict(json.loads((tmp_path / "all" / "dataset.json").read_text())["labels"])
    assert labels == {f"{s:06d}.png": (2, 0)[s % 2] for s in range(7)}
    for name in ("000003.png", "000004.png"):
        assert (tmp_path / "all" / name).read_bytes() == (tmp_path / "some" / name).read_bytes()


def test_ablation_options_choose_the_general_sampler(pkl, tmp_path):
    network = f"--network={pkl['cond']}"
    make(tmp_path / "heun", network, "--seeds=0-3")
    make(tmp_path / "same", network, "--seeds=0-3", "--disc=edm")
    text = make(
        tmp_path / "euler",
        network,
        "--seeds=0-3",
        "--solver=euler",
        "--schedule=vp",
        "--scaling=vp",
        "--disc=vp",
        "--S-noise=1.007",
        "--sigma-min=0.01",
        "--sigma_max=50",
        "--rho=5",
        "--S_min=0.1",
        "--S_max=10",
    )
    assert_same_images(read(tmp_path / "heun")[0], read(tmp_path / "same")[0])
    assert not np.array_equal(read(tmp_path / "heun")[0], read(tmp_path / "euler")[0])
    assert "3 network evaluations per image" in text


def test_guidance_options(pkl, tmp_path):
    args = [f"--network={pkl['cond']}", "--seeds=0-3"]
    weak = f"--network_2={pkl['weak']}"
    make(tmp_path / "plain", *args)
    assert "5 network evaluations" in make(tmp_path / "none", *args, "--cfg=1", weak, "--affine_weight=0")
    assert_same_images(read(tmp_path / "plain")[0], read(tmp_path / "none")[0])
    assert "15 network evaluations" in make(tmp_path / "both", *args, "--cfg=2", weak, "--affine_weight=1.5")
    assert not np.array_equal(read(tmp_path / "plain")[0], read(tmp_path / "both")[0])


def test_generate_images_takes_one_class_per_seed():
    net = random_network()
    parts = list(generate_images(net, range(5), device=torch.device("cpu"), class_idx=[0, 1, 2, 1, 0], batch=2))
    assert [(p[0], p[1].shape, p[2].tolist()) for p in parts] == [
        ([0, 1], (2, 8, 8, 1), [0, 1]),
        ([2, 3], (2, 8, 8, 1), [2, 1]),
        ([4], (1, 8, 8, 1), [0]),
    ]
    with pytest.raises(ValueError, match="3 classes"):
        next(generate_images(net, range(5), device=torch.device("cpu"), class_idx=3))


def test_rounding_to_gray_levels():
    x = torch.tensor([-2, -1, -1 + 0.5 / 127.5, 0, 1, 2]).reshape(6, 1, 1, 1)
    assert Arrival(x).wait()[0].ravel().tolist() == [0, 0, 1, 128, 255, 255]


@pytest.mark.parametrize("n, world_size", [(20, 3), (1, 4), (7, 7)])
def test_shares_cover_everything_once_and_evenly(n, world_size, monkeypatch):
    monkeypatch.setattr(distributed, "get_world_size", lambda: world_size)
    shares = [distributed.share(n, rank) for rank in range(world_size)]
    assert [i for share in shares for i in share] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# Bad input: one line, the right exit code, nothing written.


@pytest.mark.parametrize(
    "code, message, args",
    [
        (2, "--seeds", ["--seeds="]),
        (2, "--seeds", ["--seeds=5-1"]),
        (2, "--batch", ["--batch=0"]),
        (2, "--steps", ["--steps=0"]),
        (2, "--class", ["--class=-1"]),
        (2, "--class=3: this network knows classes 0 to 2", ["--class=3"]),
        (2, "--class=0: this network was trained without labels", ["--network=uncond", "--class=0"]),
        (2, "--cfg=2: needs a network trained with labels", ["--network=uncond", "--cfg=2"]),
        (2, "--cfg", ["--cfg=nan"]),
        (2, "constant weights; leave out --noise_rate", ["--discriminator=x", "--dg_published=1", "--noise_rate=0.3"]),
        (2, "one evaluation per step", ["--discriminator=x", "--solver=euler", "--dg_weight_2nd_order=1"]),
        (2, "--affine_weight=1: needs a second network", ["--affine_weight=1"]),
        (2, "needs its weight", ["--network_2=weak"]),
        (2, "--grid=x.jpg: the picture is a PNG", ["--grid=x.jpg"]),
        (2, "inside --outdir", ["--grid=OUT/sheet.png"]),
        (2, "cannot be written in /dev/null", ["--grid=/dev/null/sheet.png"]),
        (1, "16x16 images", ["--network_2=large", "--affine_weight=1"]),
        (1, "3 channel(s)", ["--network_2=rgb", "--affine_weight=1"]),
        (1, "4 classes", ["--network_2=four_classes", "--affine_weight=1"]),
        (1, "no classes", ["--network_2=uncond", "--affine_weight=1"]),
        (1, "missing.pkl", ["--network=missing.pkl"]),
        (1, "classifier", ["--network=classifier"]),
        (1, "classifier", ["--network_2=classifier", "--affine_weight=1"]),
        (1, "2 channels", ["--network=two_channels"]),
        (1, "sigma_min=90", ["--sigma_min=90"]),
        (1, "not finite", ["--network=broken"]),
    ],
)
@pytest.mark.parametrize("outdir", ["out", "out.zip"])
def test_bad_input(pkl, tmp_path, monkeypatch, code, message, args, outdir):
    monkeypatch.chdir(tmp_path)

    def real(arg):
        option, _, value = arg.partition("=")
        return f"{option}={pkl.get(value, value).replace('OUT', 'out')}"

    if message == "inside --outdir" and outdir == "out.zip":
        outdir = "out"
    result = run(f"--outdir={outdir}", "--seeds=0-3", f"--network={pkl['cond']}", *FAST, *map(real, args))
    errors = [line for line in result.output.splitlines() if not line.startswith("Generating")]
    assert result.exit_code == code, result.output
    assert len(errors) == 1 and errors[0].startswith("Error: ") and message in errors[0]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "there, outdir, message",
    [
        ("out/000009.png", "out", "holds 000009.png"),
        ("out/a/b.jpg", "out", "holds a/b.jpg"),
        ("out/dataset.json", "out", "holds dataset.json"),
        ("out", "out", "is a file"),
        ("out.zip", "out.zip", "exists already"),
    ],
)
def test_other_runs_are_neither_mixed_in_nor_replaced(pkl, tmp_path, there, outdir, message):
    (tmp_path / there).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / there).write_text("theirs")
    result = run(f"--outdir={tmp_path / outdir}", "--seeds=0-3", f"--network={pkl['cond']}", *FAST)
    assert result.exit_code == 1 and f"--outdir: {tmp_path / outdir}: {message}" in result.output
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()] == [there]
    assert (tmp_path / there).read_text() == "theirs"


def test_an_empty_folder_and_one_with_other_files_are_used(pkl, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    make(tmp_path, f"--network={pkl['cond']}", "--seeds=0")
    assert sorted(os.listdir(tmp_path)) == ["000000.png", "dataset.json", "notes.txt"]


@pytest.mark.parametrize(
    "error, code, message",
    [(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 1, "No space left"), (KeyboardInterrupt(), 130, "interrupted")],
)
@pytest.mark.parametrize("path", ["new/out", "old", "empty/", "new/out.zip"])
def test_a_run_that_is_interrupted_takes_back_what_it_wrote(pkl, tmp_path, monkeypatch, path, error, code, message):
    (tmp_path / "old").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "old/notes.txt").write_text("mine")
    encode, calls = output._png, []

    def fail_at_the_sixth(image):
        calls.append(image)
        if len(calls) == 6:
            raise error
        return encode(image)

    monkeypatch.setattr(output, "_png", fail_at_the_sixth)
    result = run(
        f"--outdir={tmp_path}/{path}", "--seeds=0-9", "--subdirs", "--batch=4", f"--network={pkl['cond']}", *FAST
    )
    assert result.exit_code == code and "Error: " in result.output and message in result.output
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["notes.txt"]
    assert (tmp_path / "empty").is_dir() and not (tmp_path / "new/out").exists()


def test_a_failure_of_another_process_is_everyones(tmp_path, monkeypatch):
    # What rank 0 is told when rank 1 meets a full disk; it takes its own images back and says why.
    monkeypatch.setattr(output.distributed, "all_gather_object", lambda mine: [mine, "/disk: No space left"])
    batches = [([0], np.zeros([1, 8, 8, 1], np.uint8), np.array([1]))]
    for path in ("out", "out.zip"):
        with pytest.raises(dnnlib.UserError, match="process 1: /disk: No space left"):
            save_images(batches, str(tmp_path / path))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("in_place", [False, True])
def test_a_full_disk_names_the_file(tmp_path, monkeypatch, in_place):
    def full(path, mode):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer, "open", full, raising=False)
    with pytest.raises(OSError, match="No space left") as error, ArchiveWriter(str(tmp_path / "out"), in_place) as out:
        out.add("a/b.png", b"")
    assert error.value.filename == str(tmp_path / "out/a/b.png")
    assert os.listdir(tmp_path) == []


def test_several_writers_share_a_new_folder_and_leave_nothing_when_they_fail(tmp_path):
    writers = [ArchiveWriter(str(tmp_path / "out"), in_place=True) for _ in range(2)]
    with pytest.raises(KeyboardInterrupt), writers[0] as first, writers[1] as second:
        first.add("000000/a.png", b"a")
        second.add("000000/b.png", b"b")
        first.add_metadata({})
        assert sorted(os.listdir(tmp_path / "out")) == ["000000", "dataset.json"]
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_out_of_memory_names_the_option():
    def sampler(*_args, **_kwargs):
        raise torch.OutOfMemoryError

    with pytest.raises(dnnlib.UserError, match="cpu has too little memory for 5 images at a time.*--batch"):
        next(generate_images(random_network(), range(5), device=torch.device("cpu"), sampler=sampler))


# Image sheets.


@pytest.mark.parametrize(
    "n, channels, columns, size, side",
    [
        (1, 1, None, 8, (1, 1)),
        (5, 3, None, 8, (2, 3)),
        (7, 1, 7, 8, (1, 7)),
        (11, 1, 4, 8, (3, 4)),
        (3, 1, 9, 8, (1, 3)),
        (2, 3, None, 100, (1, 2)),
    ],
)
def test_sheet_shows_every_image_enlarged_by_whole_pixels(n, channels, columns, size, side):
    images = np.random.default_rng(0).integers(0, 250, [n, size, size, channels], np.uint8)
    sheet = np.array(image_sheet(images, columns=columns)).reshape(-1, 1, channels)
    scale, gap = (8, 5) if size == 8 else (1, 8)
    cell = scale * size + gap
    width = side[1] * cell + gap
    sheet = sheet.reshape(-1, width, channels)
    assert sheet.shape == (side[0] * cell + gap, width, channels)
    covered = np.zeros(sheet.shape[:2], bool)
    for i, image in enumerate(images):
        y, x = gap + i // side[1] * cell, gap + i % side[1] * cell
        window = (slice(y, y + scale * size), slice(x, x + scale * size))
        assert np.array_equal(sheet[window], image.repeat(scale, 0).repeat(scale, 1))
        covered[window] = True
    assert (sheet[~covered] == 255).all()


def test_sheet_has_a_column_per_class_under_its_name(tmp_path):
    images = np.random.default_rng(0).integers(0, 200, [5, 8, 8, 1], np.uint8)
    save_class_grid(images, tmp_path / "s.png", [4, 1, 4, 2, 2], ["a", "b b", "long name of a class", "x", "Shirt"])
    picture = np.array(Image.open(tmp_path / "s.png"))
    cell, gap = 69, 5
    top = len(picture) - 2 * cell - gap
    assert picture.shape[1] == 3 * cell + gap and 30 < top < 50  # three columns; three lines of a long name fit
    for i, (row, column) in enumerate([(0, 2), (0, 0), (1, 2), (0, 1), (1, 1)]):
        y, x = top + gap + row * cell, gap + column * cell
        assert np.array_equal(picture[y : y + 64 : 8, x : x + 64 : 8], images[i, :, :, 0])
    assert (picture[top + cell :, : cell - 1] == 255).all()  # class 1 has one image
    heads = [(picture[:top, c * cell : (c + 1) * cell] < 128).sum() for c in range(3)]
    assert heads[1] > heads[2] > heads[0] > 0
    save_class_grid(np.zeros([40, 8, 8, 1], np.uint8), tmp_path / "one.png", [*[0] * 38, 1, 2])  # mostly empty columns
    assert Image.open(tmp_path / "one.png").size == (7 * cell + gap, 6 * cell + gap)


def test_sheet_of_a_run_has_as_many_columns_as_classes(tmp_path, monkeypatch):
    monkeypatch.setattr(sheet, "heun_sampler", lambda net, latents, labels, randn_like: latents)
    for classes, rows in ((3, 8), (20, 4), (100, 2)):
        sheet.save_samples(random_network(label_dim=classes), tmp_path / "s.png", None)
        width, height = Image.open(tmp_path / "s.png").size
        columns = min(classes, 40)
        cell = (width - 5) // columns
        assert cell * columns + 5 == width and (height - 5) // cell == rows, (classes, width, height)


def test_sheet_of_very_many_images_stays_a_picture():
    assert max(image_sheet(np.zeros([20000, 8, 8, 1], np.uint8)).size) <= 4096 * 1.2


def test_sheet_labels_stand_in_the_margin(tmp_path):
    images = np.full([4, 8, 8, 3], 100, np.uint8)
    save_grid(images, tmp_path / "plain.png", columns=2)
    save_grid(
        list(images), tmp_path / "labels.png", columns=2, row_labels=["cat", "dog"], column_labels=["a" * 99, "b"]
    )
    plain, labels = (np.array(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("plain", "labels"))
    top, left = np.subtract(labels.shape, plain.shape)[:2]
    assert top > 0 and left > 0 and np.array_equal(labels[top:, left:], plain)
    assert (labels[top:, :left] < 128).any() and (labels[:top, left:] < 128).any()


@pytest.mark.parametrize("shape", [(0, 8, 8, 1), (4, 8, 8), (4, 8, 8, 2)])
def test_sheet_refuses_what_is_no_image(shape):
    with pytest.raises(ValueError, match="N,H,W,C"):
        image_sheet(np.zeros(shape, np.uint8))


def test_png_encoding_is_lossless(tmp_path):
    for channels in (1, 3):
        image = np.random.default_rng(0).integers(0, 256, [2, 8, 8, channels], np.uint8)
        save_images([([4, 5], image, np.array([1, 0]))], str(tmp_path / f"{channels}.zip"))
        with zipfile.ZipFile(tmp_path / f"{channels}.zip") as archive:
            back = np.array(Image.open(io.BytesIO(archive.read("000005.png")))).reshape(8, 8, channels)
        assert np.array_equal(back, image[1])
