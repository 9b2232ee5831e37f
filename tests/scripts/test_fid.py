"""fid.py on small archives that are written here: the table, the reference format, two processes, bad input."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner

import fid
from metrics import prdc
from metrics.fid import fid_from_features
from metrics.format import short
from metrics.label_accuracy import SvmJudge
from tests.support.paths import ROOT
from torch_utils.persistence import persistent_class, save_snapshot
from training.networks_resnet import Classifier

CLASSES = 3


@persistent_class(embed_source=False)
class ToyImageClassifier(torch.nn.Module):
    """Features are the brightness of the three thirds of an image. The brightest third is the class."""

    network_kind = "classifier"

    def __init__(self, img_resolution=8, img_channels=1, label_dim=CLASSES):
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.logits = torch.nn.Linear(3, label_dim, bias=False)
        self.logits.weight.data = 10 * torch.eye(label_dim, 3)

    def features(self, x, sigma):
        assert torch.allclose(sigma, torch.tensor(0.002)) and sigma.shape == x.shape[:1]
        return torch.stack([part.mean(dim=[1, 2, 3]) for part in x.split([3, 3, 2], dim=2)], dim=1)

    def forward(self, x, sigma):
        return self.logits(self.features(x, sigma))


@persistent_class(embed_source=False)
class ToyDenoiserOfFid(torch.nn.Module):
    network_kind = "denoiser"


def make_images(n, seed, noise=40):
    """Return images [n,8,8] uint8 with a band of light in one of three places, and their classes, the places."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % CLASSES
    images = rng.integers(0, noise, [n, 8, 8])
    for image, label in zip(images, labels, strict=True):
        image[3 * label : 3 * label + 3] += 180
    return images.astype(np.uint8), labels


def png(image):
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def write_zip(path, images, **metadata):
    """Write an archive as dataset_tool.py does. Arrays among the metadata, like labels, become [name, label] pairs."""
    names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(len(images))]
    pairs = {
        key: [[n, int(v)] for n, v in zip(names, value, strict=True)] if isinstance(value, np.ndarray) else value
        for key, value in metadata.items()
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, image in zip(names, images, strict=True):
            archive.writestr(name, image if isinstance(image, bytes) else png(image))
        if metadata:
            archive.writestr("dataset.json", json.dumps(pairs))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A reference with noisy and clean labels, and generated images in all forms, of which some show another class."""
    root = tmp_path_factory.mktemp("fid")
    real, clean = make_images(60, seed=0)
    noisy = np.where(np.arange(60) % 4 == 0, (clean + 1) % CLASSES, clean)
    fake, drawn = make_images(37, seed=1, noise=60)
    asked = np.where(np.arange(37) < 5, (drawn + 1) % CLASSES, drawn)
    found = {"root": root, "fake": fake, "asked": asked, "real": real, "clean": clean}
    found["data"] = write_zip(root / "data.zip", real, labels=noisy, clean_labels=clean, class_names=["a", "b", "c"])
    found["noisy"] = write_zip(root / "noisy.zip", real, labels=noisy)
    found["zip"] = write_zip(root / "fake.zip", fake, labels=asked)
    found["npz"] = str(root / "fake.npz")
    np.savez(found["npz"], fake[..., None], asked)
    found["folder"] = str(root / "fake")
    with zipfile.ZipFile(found["zip"]) as archive:
        archive.extractall(found["folder"])
    torch.manual_seed(0)
    small = Classifier(8, 1, CLASSES, depth="small", model_channels=8, channel_mult=(1, 2, 4))
    torch.nn.init.normal_(small.head.weight)
    for name, net in (
        ("classifier", ToyImageClassifier()),
        ("small", small),
        ("denoiser", ToyDenoiserOfFid()),
        ("rgb", ToyImageClassifier(img_channels=3)),
        ("two", ToyImageClassifier(label_dim=2)),
    ):
        found[name] = str(root / f"network-snapshot-{name}.pkl")
        save_snapshot(found[name], {"ema": net})
    return found


def run(*args):
    result = CliRunner().invoke(fid.main, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def evaluate(files, images, *args, data="data", detector="pixels"):
    out = files["root"] / "table.json"
    text = run(
        "evaluate",
        f"--images={files[images]}",
        f"--data={files[data]}",
        f"--detector={detector}",
        f"--out={out}",
        "--device=cpu",
        *args,
    )
    return json.loads(out.read_text()), text


def numbers(result):
    metrics = dict(result["metrics"])
    assert [metrics.pop(name) for name in ("is", "cw_is", "sfid", "cw_sfid")] == [None] * 4  # what pixels cannot give
    return metrics


def scaled(images):
    return images.reshape(len(images), -1) / 127.5 - 1


# ---------------------------------------------------------------------------------------------------------------------


def test_table_of_pixels(files):
    result, text = evaluate(files, "zip", "--nearest_k=3")
    metrics = result["metrics"]
    real, fake = scaled(files["real"]), scaled(files["fake"])
    of_classes = [fid_from_features(real[files["clean"] == c], fake[files["asked"] == c]) for c in range(CLASSES)]
    assert metrics["fid"] == pytest.approx(fid_from_features(real, fake), rel=1e-4)
    assert metrics["cw_fid"] == pytest.approx(np.mean(of_classes), rel=1e-4)
    assert result["classes"]["1"]["fid"] == pytest.approx(of_classes[1], rel=1e-4)
    assert result["classes"]["1"]["name"] == "b"
    assert metrics["label_accuracy"] == pytest.approx(32 / 37)  # five images show another class than the one asked for
    assert result["judge"]["accuracy"] == 1 and result["judge"]["num"] == 12
    assert metrics["is"] is None and "probabilities" in result["notes"]["is"]
    assert {"kid", "precision_k3", "recall_k3", "density_k3", "coverage_k3", "cw_kid", "cw_coverage_k3"} < set(metrics)
    assert result["reference_labels"].startswith("clean labels")
    assert (result["num_images"], result["num_reference"], result["num_features"]) == (37, 60, 64)
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert set(metrics) < set(lines)
    assert lines["fid"][1:] == ["↓", short(metrics["fid"])] and lines["is"][1:] == ["↑", "n/a"]


def test_folder_and_npz_give_what_the_zip_gives(files):
    expected, _ = evaluate(files, "zip", "--batch=64")
    for images, batch in (("folder", 5), ("npz", 1)):
        result, _ = evaluate(files, images, f"--batch={batch}")
        assert numbers(result) == pytest.approx(numbers(expected), rel=1e-12), images
    some, _ = evaluate(files, "zip", "--num=20", "--seed=3")
    assert some["num_images"] == 20
    assert evaluate(files, "npz", "--num=20", "--seed=3")[0]["metrics"] == some["metrics"]
    assert evaluate(files, "zip", "--num=20", "--seed=4")[0]["metrics"]["fid"] != some["metrics"]["fid"]


def test_reference_without_clean_labels_says_so(files):
    result, text = evaluate(files, "zip", data="noisy")
    assert "no clean ones" in result["reference_labels"] and "no clean ones" in text
    assert result["judge"]["accuracy"] < 1


def test_without_labels_no_class_wise_values(files, tmp_path):
    plain = write_zip(tmp_path / "plain.zip", files["fake"])
    result, text = evaluate({**files, "plain": plain}, "plain")
    assert result["metrics"]["cw_fid"] is result["metrics"]["label_accuracy"] is None
    assert "the images have no labels" in text
    assert result["metrics"]["fid"] > 0 and result["classes"] == {}


def test_small_class_is_listed(files, tmp_path):
    images, labels = make_images(13, seed=2)
    small = write_zip(tmp_path / "small.zip", images[labels < 2], labels=labels[labels < 2])
    result, text = evaluate({**files, "small": small}, "small", "--nearest_k=4")
    assert result["notes"]["cw_fid"].startswith("mean of 2 of 3 classes") and result["notes"]["cw_fid"].endswith(": c")
    # Class a has 5 images. Class b has only 4, which is too few for 4 neighbors.
    assert "mean of 1 of 3 classes" in text and result["notes"]["cw_density_k4"].endswith(": b, c")
    assert result["metrics"]["cw_density_k4"] == result["classes"]["0"]["density_k4"]
    assert "fid" not in result["classes"]["2"]


def test_classifier_as_detector_and_as_judge(files):
    result, _ = evaluate(files, "zip", f"--judge={files['classifier']}", detector=files["classifier"])
    assert result["num_features"] == 3
    assert 1 < result["metrics"]["is"] < CLASSES
    assert result["metrics"]["label_accuracy"] == pytest.approx(32 / 37)
    assert result["judge"]["name"] == files["classifier"] and result["judge"]["num"] == 60
    assert result["classes"]["0"]["label_accuracy"] < 1
    result, _ = evaluate(files, "zip", "--judge=none")
    assert result["metrics"]["label_accuracy"] is result["judge"] is None


def test_intervals_splits_and_cas(files):
    args = [
        f"--judge={files['classifier']}",
        "--splits=10",
        "--bootstrap=30",
        "--seed=7",
        f"--test={files['data']}",
        "--cas_arch=small",
    ]
    result, text = evaluate(files, "zip", *args, detector=files["classifier"])
    for name in ("fid", "cw_fid", "label_accuracy", "cw_density_k5"):
        low, high = result["intervals"][name]
        assert low < result["metrics"][name] < high, name
        assert f"[{short(low)}, {short(high)}]" in next(x for x in text.splitlines() if x.startswith(f"{name} "))
    assert result["bootstrap"]["seed"] == 7 and "95% of 30 bootstrap draws" in text
    whole, _ = evaluate(files, "zip", detector=files["classifier"])
    assert whole["intervals"] == {} and whole["bootstrap"] is None and "cas" not in whole["metrics"]
    assert result["metrics"]["is"] != whole["metrics"]["is"] and result["metrics"]["fid"] == whole["metrics"]["fid"]
    assert result["metrics"]["cas"] == result["cas"]["accuracy"] > 0.5 and result["cas"]["num_test"] == 60
    assert "cas        small trained on 37 images" in text


def test_compare(files, tmp_path, monkeypatch):
    """The tables are those of `evaluate`, one after the other. What follows from the reference is computed once."""
    calls, radii, fit = [], prdc._radii, SvmJudge._fit
    monkeypatch.setattr(prdc, "_radii", lambda *args: (calls.append("radii"), radii(*args))[1])
    monkeypatch.setattr(SvmJudge, "_fit", lambda *args: (calls.append("fit"), fit(*args))[1])
    out, chart, cache = (tmp_path / "new" / name for name in ("tables.json", "chart.png", "features.npz"))
    text = run(
        "compare",
        *(f"--images={files[name]}" for name in ("zip", "data")),
        f"--data={files['noisy']}",
        "--detector=pixels",
        f"--out={out}",
        f"--chart={chart}",
        f"--features={cache}",
        "--bootstrap=10",
        "--device=cpu",
    )
    # Whole and three classes: the reference once, each set of images for its values and for its resampled values.
    assert calls.count("radii") == 4 + 2 * 8 and calls.count("fit") == 2
    tables = json.loads(out.read_text())
    assert tables == [evaluate(files, name, "--bootstrap=10", data="noisy")[0] for name in ("zip", "data")]
    rows = {line.split()[0]: line for line in text.splitlines() if line}
    assert rows["fake"].split() == ["fake", "data"] and rows["num_images"].split()[1:] == ["37", "60"]
    for table in tables:
        low, high = map(short, table["intervals"]["fid"])
        assert f"{short(table['metrics']['fid'])} [{low}, {high}]" in rows["fid"].replace("*", "")
    assert "is, cw_is: n/a, the detector gives no class probabilities" in text
    with PIL.Image.open(chart) as picture:
        assert picture.format == "PNG" and picture.width > 500
    with np.load(cache) as file:
        assert [what["count"] for what in json.loads(str(file["sets"]))] == [60, 37, 60]


def test_features_are_kept_and_used_again(files, tmp_path):
    cache, images, net = tmp_path / "new" / "features.npz", tmp_path / "images", tmp_path / "network-snapshot-1.pkl"
    shutil.copytree(files["folder"], images)
    shutil.copy(files["classifier"], net)
    args = dict(files=files | {"images": images}, images="images", detector=net)

    def used(*more):
        result, text = evaluate(*args.values(), *more, f"--judge={net}", f"--features={cache}")
        return result["metrics"], [
            line.split(": ", 1)[1].split(" ")[0] for line in text.splitlines() if line.startswith("Features of ")
        ]

    def evaluate(files, images, detector, *more):
        return globals()["evaluate"](files, images, *more, detector=detector)

    first = used()
    assert first[1] == []
    assert used() == (first[0], ["from", "from"])
    assert used("--nearest_k=3", "--bootstrap=10")[1] == ["from", "from"]
    assert used("--num=20")[1] == ["from"] and used("--num=20")[1] == ["from", "from"]
    assert used("--num=20", "--seed=1")[1] == ["from"]  # other images
    write_image = images / "00000" / "img00000003.png"
    write_image.write_bytes(png(files["fake"][4]))
    changed = used()
    assert changed[1] == ["from", "computed"] and changed[0] != first[0]
    assert used() == (changed[0], ["from", "from"])
    save_snapshot(str(net), {"ema": ToyImageClassifier(), "info": {"note": "trained on"}})
    assert used()[1] == []  # another detector


def test_ref_and_calc(files, tmp_path):
    ref = tmp_path / "refs" / "data.npz"
    run("ref", f"--data={files['data']}", f"--dest={ref}", "--detector=pixels", "--batch=7")
    with np.load(ref) as file:
        assert set(file.files) == {"mu", "sigma"}
        mu, sigma = file["mu"], file["sigma"]
    np.testing.assert_allclose(mu, scaled(files["real"]).mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(sigma, np.cov(scaled(files["real"]), rowvar=False), atol=1e-6)

    def calc(images, *args):
        return float(run("calc", f"--images={images}", f"--ref={ref}", "--detector=pixels", *args).splitlines()[-1])

    assert abs(calc(files["data"], "--num=60")) < 1e-6
    expected = evaluate(files, "zip")[0]["metrics"]["fid"]
    assert calc(files["zip"], "--num", 37, "--batch", 10) == pytest.approx(expected, rel=1e-5)
    assert calc(files["npz"], "--num", 20, "--seed", 5) != calc(files["npz"], "--num", 20, "--seed", 6)


# ---------------------------------------------------------------------------------------------------------------------
# Two processes.


def run_two(*args):
    """Run fid.py as two processes. Return exit codes, stdouts and stderrs of rank 0 and rank 1."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "fid.py", *args],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**env, "RANK": str(r), "LOCAL_RANK": str(r)},
        )
        for r in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in ranks]
    return [process.returncode for process in ranks], *zip(*outputs, strict=True)


def test_two_processes_give_the_same_table(files, tmp_path):
    """37 images in batches of 8 make unequal shares."""
    args = [
        "--batch=8",
        f"--judge={files['small']}",
        "--bootstrap=20",
        "--splits=9",
        f"--test={files['data']}",
        *"--cas_arch=small --cas_epochs=2".split(),
    ]
    one, _ = evaluate(files, "zip", *args, detector=files["small"])
    out, cache = tmp_path / "two.json", tmp_path / "features.npz"
    args.append(f"--features={cache}")
    evaluate(files, "data", *args[:2], args[-1], detector=files["small"])  # keeps the features of the reference
    codes, stdout, stderr = run_two(
        "evaluate",
        f"--images={files['zip']}",
        f"--data={files['data']}",
        f"--detector={files['small']}",
        *args,
        f"--out={out}",
        "--device=cpu",
    )
    assert codes == [0, 0], stderr
    two = json.loads(out.read_text())
    assert two["metrics"].pop("sfid") is two["metrics"].pop("cw_sfid") is None is one["metrics"].pop("sfid")
    assert two["metrics"] == pytest.approx({k: v for k, v in one["metrics"].items() if v is not None}, rel=1e-9)
    assert two["intervals"].keys() == one["intervals"].keys()
    for name, interval in one["intervals"].items():
        assert two["intervals"][name] == pytest.approx(interval, rel=1e-9)
    assert two["classes"] == one["classes"] and two["cas"] == one["cas"]
    assert stdout[1] == "" and "fid" in stdout[0] and stdout[0].count("Features of ") == 1


@pytest.mark.long
def test_two_processes_reduce_the_statistics(files, tmp_path):
    refs = [tmp_path / "one.npz", tmp_path / "two.npz"]
    args = ["ref", f"--data={files['zip']}", "--detector=pixels", "--batch=8", "--device=cpu"]
    run(*args, f"--dest={refs[0]}")
    codes, _, stderr = run_two(*args, f"--dest={refs[1]}")
    assert codes == [0, 0], stderr
    one, two = (np.load(ref) for ref in refs)
    for name in ("mu", "sigma"):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-9, atol=1e-12)


def test_broken_image_ends_both_processes(files, tmp_path):
    """Only rank 1 meets the broken image. Rank 0 must neither wait forever nor stay silent."""
    images = [*files["fake"][:12], png(files["fake"][12])[:60]]
    broken = write_zip(tmp_path / "broken.zip", images)
    codes, _, stderr = run_two(
        "ref", f"--data={broken}", "--detector=pixels", f"--dest={tmp_path / 'x.npz'}", "--batch=8", "--device=cpu"
    )
    assert codes == [1, 1]
    assert stderr[0].startswith("Error:") and "img00000012.png" in stderr[0] and stderr[0].count("\n") == 1
    assert stderr[1] == ""
    assert not (tmp_path / "x.npz").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Bad input.


@pytest.fixture(scope="module")
def bad(files, tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    found = {**files, "none": str(root / "none"), "out": str(root / "new" / "out.npz"), "dir": str(root)}
    found["evaluate"] = f"evaluate --data={files['data']} --detector=pixels --out={found['out']}"
    found["calc"] = f"calc --images={files['zip']} --num=37 --detector=pixels"
    found["text"] = str(root / "text.npz")
    Path(found["text"]).write_text("no archive")
    found["truncated"] = str(root / "truncated.npz")
    Path(found["truncated"]).write_bytes(Path(files["npz"]).read_bytes()[:-200])
    found["pickled"] = str(root / "pickled.npz")
    np.savez(found["pickled"], mu=np.array([{}], dtype=object), sigma=np.eye(1))
    found["floats"] = str(root / "floats.npz")
    np.savez(found["floats"], files["fake"][..., None] / 255)
    found["unequal"] = str(root / "unequal.npz")
    np.savez(found["unequal"], files["fake"][..., None], files["asked"][:5])
    found["shapes"] = str(root / "shapes.npz")
    np.savez(found["shapes"], mu=np.zeros(5), sigma=np.eye(6))
    found["nan"] = str(root / "nan.npz")
    np.savez(found["nan"], mu=np.full(64, np.nan), sigma=np.eye(64))
    found["inception"] = str(root / "inception.npz")
    np.savez(found["inception"], mu=np.zeros(2048), sigma=np.zeros([2048, 2048], dtype="f4"))
    found["one"] = write_zip(root / "one.zip", files["fake"][:1])
    found["color"] = write_zip(root / "color.zip", np.repeat(files["fake"][:4, :, :, None], 3, axis=3))
    found["damaged"] = write_zip(root / "damaged.zip", [*files["fake"][:5], png(files["fake"][5])[:60]])
    found["tiny"] = write_zip(root / "tiny.zip", files["fake"][:, :4, :4], labels=files["asked"])
    found["negative"] = write_zip(root / "negative.zip", files["fake"], labels=-1 - files["asked"])
    return found


@pytest.mark.parametrize(
    "command, code, words",
    [
        ("", 2, ["calc", "evaluate"]),
        ("measure", 2, ["measure", "evaluate"]),
        ("calc --images={zip} --ref={inception}", 2, ["--detector", "pixels", "snapshot"]),
        ("calc --images={zip} --ref={inception} --num=37 --detector=fidelity:no", 1, ["--detector", "torch-fidelity"]),
        ("calc --images={zip} --ref={inception} --num=37 --detector={none}/*.pkl", 1, ["--detector: ", "*.pkl"]),
        ("calc --images={zip} --ref={inception} --detector=pixels", 1, ["--images: found 37", "num = 50000"]),
        ("{calc} --ref={inception}", 1, ["--ref: ", "2048", "64", "inception.npz"]),
        ("{calc} --ref={shapes}", 1, ["[5]", "[6, 6]"]),
        ("{calc} --ref={nan}", 1, ["nan.npz", "finite"]),
        ("{calc} --ref={none}", 1, ["none"]),
        ("{calc} --ref={text}", 1, ["--ref: ", "text.npz", "mu [d]"]),
        ("{calc} --ref={pickled}", 1, ["pickled.npz"]),
        ("{calc} --ref={npz}", 1, ["arr_0", "mu"]),
        ("calc --images={zip} --ref={shapes} --detector=pixels --num=1", 2, ["--num"]),
        ("calc --images={zip} --ref={shapes} --detector=pixels --batch=0", 2, ["--batch"]),
        ("ref --data={none} --dest={out} --detector=pixels", 1, ["none"]),
        ("ref --data={one} --dest={out} --detector=pixels", 1, ["--data", "found 1", "one.zip"]),
        ("ref --data={damaged} --dest={out} --detector=pixels", 1, ["img00000005.png"]),
        ("ref --data={data} --dest={dir} --detector=pixels", 2, ["folder"]),
        ("ref --data={data} --dest={text}/x.npz --detector=pixels", 2, ["text.npz"]),
        ("ref --data={data} --dest={out} --detector={denoiser}", 1, ["denoiser", "classifier"]),
        ("ref --data={data} --dest={out} --detector={zip}", 1, ["fake.zip"]),
        ("ref --data={data} --dest={out} --detector={rgb}", 1, ["8x8 RGB", "8x8 gray"]),
        ("{evaluate} --images={color}", 1, ["--data: ", "8x8 RGB", "8x8 gray"]),
        ("{evaluate} --images={floats}", 1, ["float64", "uint8"]),
        ("{evaluate} --images={unequal}", 1, ["[5]", "37"]),
        ("{evaluate} --images={truncated}", 1, ["truncated.npz"]),
        ("{evaluate} --images={shapes}", 1, ["mu, sigma", "arr_0"]),
        ("{evaluate} --images={negative}", 1, ["negative"]),
        ("{evaluate} --images={zip} --num=38", 1, ["--images: found 37", "38"]),
        ("{evaluate} --images={zip} --judge=pixels", 1, ["--judge", "svm"]),
        ("{evaluate} --images={zip} --judge=best", 1, ["--judge", "best"]),
        ("{evaluate} --images={zip} --judge={two}", 1, ["--judge: ", "2 classes", "it lacks c"]),
        ("{evaluate} --images={zip} --judge={rgb}", 1, ["8x8 RGB"]),
        ("evaluate --images={zip} --data={data} --detector=pixels --nearest-k=0", 2, ["nearest"]),
        ("evaluate --images={zip} --data={data} --detector=pixels --splits=0", 2, ["--splits"]),
        ("evaluate --images={zip} --data={data} --detector=pixels --bootstrap=3", 2, ["--bootstrap", "10"]),
        ("{evaluate} --images={zip} --features={npz}", 1, ["--features: ", "arr_0", "features"]),
        ("{evaluate} --images={zip} --features={text}", 1, ["--features: ", "text.npz"]),
        ("evaluate --images={zip} --data={data} --detector=pixels --features={dir}", 2, ["folder"]),
        ("{evaluate} --images={zip} --test={none} --cas_arch=small", 1, ["--test: ", "none"]),
        ("{evaluate} --images={zip} --test={color} --cas_arch=small", 1, ["--test: ", "no lab"]),
        ("{evaluate} --images={tiny} --data={tiny} --test={tiny} --cas_arch=resnet18", 1, ["--cas_arch: ", "small"]),
        ("compare --data={data} --detector=pixels", 2, ["--images"]),
        (
            "compare --images={zip} --images={color} --data={data} --detector=pixels --out={out}",
            1,
            ["--data: ", "8x8 RGB"],
        ),
    ],
)
def test_bad_input_gets_one_line(bad, command, code, words):
    result = CliRunner().invoke(fid.main, command.format(**bad).split(), catch_exceptions=False)
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr
    assert not Path(bad["out"]).parent.exists()
