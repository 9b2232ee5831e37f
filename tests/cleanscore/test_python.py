"""cleanscore from Python: the examples of the page run, and the functions do what the scripts do."""

import ast
import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile

import numpy as np
import pytest
import torch

import cleanscore
import detect_noise
import dnnlib
import fid
from archives.dataset import ImageDataset
from detection.trainer import TrainingState
from dnnlib import downloads
from sampling.guidance import Evidence
from sampling.rejection import Rejection
from tests.support.commands import callers
from tests.support.generated import make, random_network, read
from tests.support.paths import FIXTURES, ROOT
from tests.support.published_checkpoints import fixture, parallel
from tests.support.synth import make_archive
from torch_utils import persistence
from training.networks_resnet import Discriminator
from training.temperature import Temperature

NAMES = ["cat", "dog", "7"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Folder with an archive of three easy classes, a run that was trained on it, and a discriminator."""
    folder = tmp_path_factory.mktemp("home")
    rng, labels = np.random.default_rng(0), np.arange(90) % 3
    images = (rng.random([90, 8, 8, 1]) * 80 + 80 * labels.reshape(-1, 1, 1, 1)).astype(np.uint8)
    (folder / "datasets").mkdir()
    pets = make_archive(folder / "datasets" / "pets.zip", images, labels.tolist(), class_names=NAMES)
    make_archive(folder / "plain.zip", images)
    run = folder / "training-runs" / "00000-pets"
    run.mkdir(parents=True)
    save(run / "network-snapshot-000001.pkl", random_network(), class_names=NAMES)
    (run / "training_options.json").write_text(json.dumps(dict(dataset=dict(path=str(pets)))))
    judge = folder / "discriminator-runs" / "00000-pets"
    judge.mkdir(parents=True)
    torch.manual_seed(1)
    net = Discriminator(img_resolution=8, img_channels=1, label_dim=3, depth="small", model_channels=8)
    save(judge / "network-snapshot-000001.pkl", net.eval())
    return folder


def save(path, net, **info):
    persistence.save_snapshot(path, dict(ema=net, info=info))


@pytest.fixture(scope="module")
def net(home):
    return cleanscore.load(home / "training-runs" / "00000-*", device="cpu")


def examples(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_the_examples_of_the_page_run_in_order(home, tmp_path, monkeypatch):
    shutil.copytree(home, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    names = {}
    for example in examples("docs/python.md"):
        exec(compile(example, "docs/python.md", "exec"), names)
    assert names["images"].labels[:4].tolist() == [0, 1, 0, 1] and names["right"].labels[:4].tolist() == [0, 1, 2, 0]
    assert names["strong"].seeds[0] == 100 and names["result"]["metrics"]["fid"] > 0
    assert {"cats-and-dogs.png", "out", "labels.npz", "labels.csv"} <= {p.name for p in (tmp_path / "here").iterdir()}


def test_the_example_of_readme_runs(home, tmp_path, monkeypatch, capsys):
    (example,) = examples("README.md")
    assert sum(map(bool, example.splitlines())) <= 8  # what a stranger reads at a glance
    shutil.copytree(home, tmp_path / "here")
    for name in re.findall(r"datasets/([\w-]+\.zip)", example):
        shutil.copy(pets(home), tmp_path / "here" / "datasets" / name)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(cleanscore, "detect", functools.partial(cleanscore.detect, epochs=2))  # it says no length
    exec(compile(example, "README.md", "exec"), {})
    assert "'cw_fid':" in (text := capsys.readouterr().out) and re.search(r"^\d+% of the labels", text, re.MULTILINE)
    assert (tmp_path / "here" / "samples.png").exists()


def test_every_public_function_has_an_example_on_the_page():
    called = {
        node.func.attr
        for example in examples("docs/python.md")
        for node in ast.walk(ast.parse(example))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    public = {*cleanscore.__all__, *(name for name in vars(cleanscore.Samples) if not name.startswith("_"))}
    fields = {"Samples", "images", "labels", "seeds", "class_names"}
    assert public - fields <= called


# load and sample


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ([], {}),
        (["--class=7,cat"], dict(classes=["7", "cat"])),
        (["--class=0-2"], dict(classes="0-2")),
        (["--class=1"], dict(classes="dog")),
        (["--class=1"], dict(classes=1)),
        (["--class=1", "--cfg=2"], dict(classes=1, guidance=2)),
        (["--S_churn=20", "--rho=5"], dict(S_churn=20, rho=5)),
        (["--solver=euler"], dict(solver="euler")),
        (["--discriminator=DISC"], dict(guidance="DISC")),
        (["--discriminator=DISC", "--cfg=2"], dict(guidance=["DISC", 2.0])),
    ],
)
def test_sample_makes_what_generate_makes(home, net, tmp_path, options, arguments):
    run, judge = (home / folder / "00000-pets" for folder in ("training-runs", "discriminator-runs"))
    text = json.loads(json.dumps(arguments, default=int).replace("DISC", str(judge)))
    found = cleanscore.sample(net, 5, seed=3, steps=3, **text)
    make(tmp_path / "out", f"--network={run}", "--seeds=3-7", *(o.replace("DISC", str(judge)) for o in options))
    images, labels = read(tmp_path / "out")
    assert np.array_equal(found.images, images.transpose(0, 2, 3, 1)) and found.labels.tolist() == labels.tolist()
    assert found.seeds == [3, 4, 5, 6, 7] and len(found) == 5 and found.class_names == NAMES


def test_numbers_may_be_numpys(net):
    plain, numpys = (
        cleanscore.sample(net, 2, steps=2, classes=number, guidance=weight).images
        for number, weight in ((1, 2.5), (np.int64(1), np.float32(2.5)))
    )
    assert np.array_equal(plain, numpys) and not np.array_equal(plain, cleanscore.sample(net, 2, steps=2).images)


def test_a_number_is_never_a_name(net):
    assert cleanscore.sample(net, 1, steps=1, classes="7").labels.tolist() == [NAMES.index("7")]
    numbers = cleanscore.api._numbers
    assert numbers(["1", "3"], 3, "123") == [0, 2] and numbers([1, "3"], 3, "123") == [1, 2]
    with pytest.raises(dnnlib.UserError, match="classes: 7: this network knows classes 0 to 2"):
        cleanscore.sample(net, 1, steps=1, classes=7)


def test_a_published_generator_is_told_the_size_of_its_images(tmp_path):
    torch.save(parallel(fixture("rduot_generator_1")[2]), tmp_path / "netG_1200.pth")
    found = cleanscore.load(tmp_path, device="cpu", published=dict(image_size=16))
    assert cleanscore.sample(found, 1).images.shape == (1, 16, 16, 3)
    with pytest.raises(dnnlib.UserError, match="no setting size; there are image_size, "):
        cleanscore.load(tmp_path, device="cpu", published=dict(size=16))


def test_saved_samples_are_what_generate_writes(home, net, tmp_path):
    cleanscore.sample(net, 4, steps=3).save(tmp_path / "a.zip")
    make(tmp_path / "b.zip", f"--network={home}/training-runs/00000-pets", "--seeds=0-3")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with pytest.raises(dnnlib.UserError, match="exists already"):
        cleanscore.sample(net, 1, steps=1).save(tmp_path / "a.zip")


def test_images_that_no_draw_was_accepted_for_are_counted(net, capsys):
    judge = Discriminator(img_resolution=8, img_channels=1, label_dim=3, depth="small", model_channels=8).eval()
    never = Evidence(torch.ones(3), torch.full([3], 0.5))
    rejecting = Rejection(net, judge, evidence=never, sigma=0.1)
    for _ in range(2):
        cleanscore.sample(rejecting, 2, steps=1)
        assert "WARNING: 2 images were not accepted in 100 draws" in capsys.readouterr().out


@pytest.mark.parametrize("guidance", ["number", "judge", "two judges"])
def test_nothing_guides_what_draws_by_rejection(home, net, guidance):
    judge = cleanscore.api.load_discriminator(str(home / "discriminator-runs" / "00000-pets"), torch.device("cpu"))
    facts = dict(noise_rates=[0.5] * 3, right_shares=[0.5] * 3, temperature=Temperature((0.0,), 0.002, 80.0))
    judge = dataclasses.replace(judge, **facts)
    rejecting = Rejection(net, judge.net, evidence=Evidence(*torch.full([2, 3], 0.5)), sigma=0.1)
    given = {"number": (rejecting, 2.0), "judge": (rejecting, judge), "two judges": (net, [judge, judge])}
    with pytest.raises(dnnlib.UserError, match="draws by rejection already"):
        cleanscore.sample(given[guidance][0], 1, steps=1, guidance=given[guidance][1])


def test_samples_show_themselves(net, tmp_path):
    images = cleanscore.sample(net, 2, steps=1)
    images.sheet(tmp_path / "new" / "sheet.png")
    assert images._repr_png_() == (tmp_path / "new" / "sheet.png").read_bytes()


def test_a_generator_and_a_network_without_classes(tmp_path):
    with zipfile.ZipFile(FIXTURES / "v0.1.zip") as archive:
        path = archive.extract("runs/rduot/network-snapshot-000000.pkl", tmp_path)
    generator = cleanscore.load(path, device="cpu")
    assert cleanscore.sample(generator, 2).images.dtype == np.uint8
    for wrong in (dict(steps=3), dict(S_churn=1), dict(guidance=2)):
        with pytest.raises(dnnlib.UserError, match="steps are fixed"):
            cleanscore.sample(generator, 2, **wrong)
    save(tmp_path / "plain.pkl", random_network(label_dim=0))
    plain = cleanscore.load(tmp_path / "plain.pkl", device="cpu")
    assert cleanscore.sample(plain, 2, steps=1).labels is None
    with pytest.raises(dnnlib.UserError, match="without labels"):
        cleanscore.sample(plain, 2, classes=0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda home, net: cleanscore.load(home / "nothing.pkl"), "nothing.pkl: no such file"),
        (lambda home, net: cleanscore.load(home / "discriminator-runs" / "00000-pets"), "discriminator"),
        (lambda home, net: cleanscore.load(home, device="abacus"), "abacus"),
        (lambda home, net: cleanscore.sample(net, 1, classes="cow"), "classes: cow: this network knows classes 0 to 2"),
        (lambda home, net: cleanscore.sample(net, 1, classes=3), "classes: 3: this network"),
        (lambda home, net: cleanscore.sample(net, 1, classes=[]), "is empty"),
        (lambda home, net: cleanscore.sample(net, 0), "n is 0"),
        (lambda home, net: cleanscore.sample(net, 1, steps=0), "steps is 0"),
        (lambda home, net: cleanscore.sample(net, 1, seed=-1), "seed is -1, expected 0 or more"),
        (lambda home, net: cleanscore.load(home, precision="int8"), "int8"),
        (lambda home, net: cleanscore.load(home, precision="tf32", device="cpu"), "precision: tf32: for CUDA only"),
        (lambda home, net: cleanscore.sample(net, 1, guidance=home / "nothing"), "nothing: no such file"),
        (lambda home, net: cleanscore.evaluate(home / "nothing.zip", pets(home), **PIXELS), "nothing.zip"),
        (
            lambda home, net: cleanscore.evaluate(home / "training-runs" / "00000-pets", pets(home), **PIXELS),
            "sample it",
        ),
        (
            lambda home, net: cleanscore.evaluate(np.zeros([4, 9, 9, 1], np.uint8), pets(home), **PIXELS),
            "8x8 gray images, but images has 9x9 gray",
        ),
        (
            lambda home, net: cleanscore.evaluate(np.zeros([4, 8, 8, 1]), pets(home), **PIXELS),
            "images: arr_0 is float64",
        ),
        (lambda home, net: cleanscore.evaluate(pets(home), pets(home), detector="none"), "no detector"),
        (lambda home, net: cleanscore.detect(home / "plain.zip"), "class labels"),
        (lambda home, net: cleanscore.detect(pets(home), method="dowsing"), "gce, cores"),
        (lambda home, net: cleanscore.detect(pets(home), epochs=0), "epochs is 0"),
        (lambda home, net: cleanscore.detect(pets(home), dest=home / "labels.csv"), "labels.csv: the name of a label"),
        (lambda home, net: cleanscore.detect(pets(home), cls="a.pkl", epochs=3), "leave out preset, method and"),
        (
            lambda home, net: cleanscore.detect(pets(home), preset="fingers"),
            "preset 'fingers' is unknown; there are digits",
        ),
        (lambda home, net: cleanscore.detect(pets(home), cls=home / "training-runs" / "00000-pets"), "classifier"),
    ],
)
def test_a_mistake_is_an_error_that_names_no_option(home, net, call, words):
    with pytest.raises(dnnlib.UserError) as error:
        call(home, net)
    assert words in error.value.message and not re.search(r"(?<!\S)--\w+: ", error.value.message), error.value.message


def test_detect_replaces_no_table_of_somebody_else(home, tmp_path):
    (tmp_path / "mine.csv").write_text("file,label\n")
    with pytest.raises(dnnlib.UserError, match="mine.csv: exists"):
        cleanscore.detect(pets(home), epochs=1, dest=tmp_path / "mine.npz")


def test_detect_learns_before_the_work_that_it_cannot_write(home, tmp_path, monkeypatch):
    monkeypatch.setattr(cleanscore.api, "find_wrong_labels", lambda *_: 1 / 0)
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "file").write_text("")
    for name, words in (("folder.npz", "folder.npz: is a folder"), ("file/a.npz", "a.npz: cannot be written in")):
        with pytest.raises(dnnlib.UserError, match=words):
            cleanscore.detect(pets(home), dest=tmp_path / name)


# evaluate and detect

PIXELS = dict(detector="pixels", judge="none")
evaluated, _ = callers(fid.main)
detected, _ = callers(detect_noise.main)


def pets(home):
    return home / "datasets" / "pets.zip"


def test_evaluate_gives_the_numbers_of_fid(home, net, tmp_path):
    images = cleanscore.sample(net, 30, steps=2)
    images.save(tmp_path / "out")
    args = [f"--images={tmp_path}/out", f"--data={pets(home)}", "--detector=pixels", "--judge=none", "--device=cpu"]
    evaluated("evaluate", *args, f"--out={tmp_path}/out.json")
    theirs = json.loads((tmp_path / "out.json").read_text())
    for given in (images, tmp_path / "out", str(tmp_path / "out")):
        for reference in (pets(home), home / "training-runs" / "00000-*"):
            assert cleanscore.evaluate(given, reference, **PIXELS)["metrics"] == pytest.approx(theirs["metrics"])
    without = cleanscore.evaluate(images.images, pets(home), **PIXELS)
    assert without["metrics"]["fid"] == pytest.approx(theirs["metrics"]["fid"]) and without["images"] == "images"


def test_a_protocol_chooses_settings(home, monkeypatch):
    used = []
    monkeypatch.setattr(
        cleanscore.api, "evaluate_files", lambda paths, device, **settings: used.append(settings) or [{}]
    )
    cleanscore.evaluate(pets(home), pets(home), protocol="tdsm", num=30, **PIXELS)
    assert used[0]["nearest_k"] == 3 and used[0]["num"] == 30
    with pytest.raises(dnnlib.UserError, match="no 'fid'.*edm, tdsm"):
        cleanscore.evaluate(pets(home), pets(home), protocol="fid", **PIXELS)


def test_evaluate_matches_classes_by_name(home, net, tmp_path):
    """The reference numbers them in another order."""
    dataset = ImageDataset(str(pets(home)))
    order = [2, 0, 1]  # number in the archive -> number in the reference
    names = [name for _, name in sorted(zip(order, NAMES, strict=True))]
    images = dataset.images(np.arange(len(dataset))).numpy().transpose(0, 2, 3, 1)
    labels = [order[label] for label in dataset.labels]
    reference = make_archive(tmp_path / "reference.zip", images, labels, class_names=names)
    real = cleanscore.Samples(images, dataset.labels, list(range(len(images))), NAMES)
    assert cleanscore.evaluate(real, reference, **PIXELS)["metrics"]["cw_fid"] == pytest.approx(0, abs=1e-6)


def test_a_url_stands_for_an_archive_and_a_network(home, tmp_path, monkeypatch):
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path))
    run = home / "training-runs" / "00000-pets" / "network-snapshot-000001.pkl"
    for name, path in (("pets.zip", pets(home)), ("a.pkl", run)):
        shutil.copy(path, downloads._cache_path(f"https://example.com/{name}", None, None))
    net = cleanscore.load("https://example.com/a.pkl", device="cpu")
    url = "https://example.com/pets.zip"
    result = cleanscore.evaluate(url, url, **PIXELS)
    assert result["metrics"]["fid"] == pytest.approx(0, abs=1e-6) and net.class_names == NAMES


def test_detect_finds_what_detect_noise_finds(home, tmp_path, monkeypatch):
    arguments = dict(epochs=2, dest=tmp_path / "new" / "a.npz")
    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "due", lambda self: bool(self.path))
        patch.setattr(cleanscore.api, "look_for_foreign", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cleanscore.detect(pets(home), **arguments)
    assert (tmp_path / "new" / "a-training.pt").exists()  # so that the next call trains nothing
    found = cleanscore.detect(home / "training-runs" / "00000-pets", **arguments)
    assert sorted(os.listdir(tmp_path / "new")) == ["a-classifier.pkl", "a.csv", "a.npz"]
    detected(f"--data={pets(home)}", f"--dest={tmp_path}/b.npz", "--epochs=2", "--device=cpu")
    a, b = (np.load(path) for path in (tmp_path / "new" / "a.npz", tmp_path / "b.npz"))
    assert set(a) == set(b) and "is_outlier" in a
    for name in set(a) - {"classifier"}:  # whose snapshot records another path of the set
        np.testing.assert_array_equal(a[name], b[name])
    assert a["classifier"] == dnnlib.content_hash(tmp_path / "new" / "a-classifier.pkl")
    assert found.names == b["names"].tolist() and found.noise_rate == b["noise_rate"]


def test_detect_takes_the_settings_of_a_preset(home, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(cleanscore.api, "find_wrong_labels", lambda o, *rest: asked.append(o) or 1 / 0)
    for arguments in ({}, dict(preset="digits"), dict(preset="digits", epochs=3)):
        with pytest.raises(ZeroDivisionError):
            cleanscore.detect(pets(home), **arguments)
    found = [(o.method, o.arch, o.epochs) for o in asked]
    assert found == [("gce", None, None), ("cores", "ddpmpp_tiny", 60), ("cores", "ddpmpp_tiny", 3)]


# Installation


def test_an_ordinary_install_is_refused_in_one_line(monkeypatch):
    pytest.importorskip("setuptools")
    monkeypatch.syspath_prepend(ROOT / "cleanscore")
    import build_backend

    for hook in (build_backend.build_wheel, build_backend.build_sdist, build_backend.get_requires_for_build_wheel):
        with pytest.raises(SystemExit, match=r"^[^\n]*pip install -e \.$"):
            hook("anywhere")


@pytest.mark.long
def test_editable_install_in_an_empty_environment(home, tmp_path):
    """The packages that are needed come from this environment, whose folder the new one reads after its own."""
    venv.create(tmp_path / "venv", with_pip=True)
    pip, python = (str(tmp_path / "venv" / "bin" / name) for name in ("pip", "python"))
    (site,) = (tmp_path / "venv").glob("lib/python3*/site-packages")
    here = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "needed.pth").write_text(f"{here}\n")
    refused = subprocess.run([pip, "install", str(ROOT)], capture_output=True, text=True)
    assert refused.returncode and "pip install -e ." in refused.stderr, refused.stderr
    installed = subprocess.run([pip, "install", "--no-deps", "-e", str(ROOT)], capture_output=True, text=True)
    if "setuptools" in installed.stderr and installed.returncode:
        pytest.skip("pip cannot reach a registry for setuptools")
    assert installed.returncode == 0, installed.stderr
    assert not (site / "training").exists() and not (site / "metrics").exists()
    code = "import cleanscore; print(cleanscore.sample('training-runs/00000-*', 2, classes='cat', steps=1).labels)"
    result = subprocess.run([python, "-c", code], cwd=home, capture_output=True, text=True)
    assert result.stdout.strip().endswith("[0 0]"), result.stderr


@pytest.mark.long
def test_the_notebook_runs(tmp_path):
    """Its cells are plain Python. They run in one process, in an empty folder."""
    notebook = json.loads((ROOT / "examples" / "tour.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    code = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\ndisplay = print\n" + "\n".join(cells)
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
