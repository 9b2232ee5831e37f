"""fid.py sweep and fid.py ppl on random networks; --protocol; classes by name; Inception-v3 by default."""

import json
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner

import fid
from dnnlib import UserError
from metrics import curve
from metrics.curve import Snapshot, choose_snapshots, list_snapshots
from metrics.detectors import PixelDetector
from tests.support.generated import FAST, make, random_network
from tests.support.synth import make_archive, pictures
from torch_utils.persistence import save_snapshot
from training.networks_ddgan import DDGANGenerator


def run(*args, code=0):
    result = CliRunner().invoke(fid.main, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == code, result.output
    if code:
        assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr if code else result.stdout


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("networks")
    names = ["a", "b", "c"]
    for i in range(3):
        net = random_network(i)
        save_snapshot(
            str(root / f"network-snapshot-{100 * (i + 1):06d}.pkl"), dict(ema=net, info=dict(class_names=names))
        )
    torch.manual_seed(0)
    generator = DDGANGenerator(8, 1, num_timesteps=2, nz=4, z_emb_dim=8, n_mlp=1, model_channels=8, channel_mult=[1, 2],
                               num_blocks=1)  # fmt: skip
    for p in generator.parameters():
        p.data += 0.05 * torch.randn_like(p)
    (root / "gan").mkdir()
    save_snapshot(str(root / "gan" / "network-snapshot-000050.pkl"), dict(ema=generator))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, [30, 8, 8, 1], dtype=np.uint8)
    labels = (np.arange(30) % 3).tolist()
    found = dict(root=root, run=root, gan=root / "gan")
    found["noisy"] = make_archive(root / "noisy.zip", images, labels)
    clean = [[f"00000/img{i:08d}.png", label] for i, label in enumerate(labels)]
    found["data"] = make_archive(
        root / "data.zip",
        images,
        labels,
        class_names=names,
        clean_labels=clean,
        corruption=dict(clean_labels="declared"),
    )
    return found


def sweep(files, *args, network="run", data="data", code=0):
    options = [f"--network={files[network]}", f"--data={files[data]}", "--detector=pixels", *FAST, "--num=20"]
    return run("sweep", *options, *args, code=code)


def test_sweep_gives_what_generate_and_evaluate_give(files, tmp_path):
    out, chart = tmp_path / "new" / "curve.json", tmp_path / "new" / "curve.png"
    text = sweep(files, f"--out={out}", f"--chart={chart}", "--metric=cw_fid", "--batch=7")
    found = json.loads(out.read_text())
    assert [point["number"] for point in found["curve"]] == [100, 200, 300] and found["metric"] == "cw_fid"
    table = tmp_path / "table.json"
    snapshot = files["run"] / "network-snapshot-000200.pkl"
    make(tmp_path / "images.zip", f"--network={snapshot}", "--seeds=0-19")
    run(
        "evaluate",
        f"--images={tmp_path / 'images.zip'}",
        f"--data={files['data']}",
        "--detector=pixels",
        f"--out={table}",
    )
    expected = json.loads(table.read_text())["metrics"]["cw_fid"]
    assert found["curve"][1]["value"] == pytest.approx(expected, rel=1e-6)
    best = min(found["curve"], key=lambda point: point["value"])
    assert [line.split()[0] for line in text.splitlines() if line.endswith("*")] == [f"{best['number']:g}"]
    with PIL.Image.open(chart) as picture:
        assert picture.format == "PNG"


def test_sweep_says_which_classes_are_left_out_and_how_they_are_matched(files, tmp_path):
    few = make_archive(tmp_path / "few.zip", pictures(13, channels=1), [0, 1] * 6 + [2], class_names=["b", "a", "d"])
    out = tmp_path / "curve.json"
    for _ in range(2):  # the second call measures nothing
        text = sweep(files | dict(few=few), f"--out={out}", "--metric=cw_fid", "--kimg_end=200", data="few")
        assert text.count("mean of 2 of 4 classes; fewer than 2 images on one side: d, c") == 1
        assert text.count("classes matched by name; the reference has no c") == 1
    assert "matched" not in sweep(files | dict(few=few), "--metric=fid", "--kimg_end=100", data="few")


def test_sweep_goes_on_after_an_interruption(files, tmp_path, monkeypatch):
    out, made = tmp_path / "curve.json", []
    generated = curve.generate_images

    def interrupted(net, seeds, **kwargs):
        made.append(len(seeds))
        if len(made) == 2:
            raise KeyboardInterrupt
        return generated(net, seeds, **kwargs)

    monkeypatch.setattr(curve, "generate_images", interrupted)
    run_dir = f"--out={out}"
    assert CliRunner().invoke(fid.main, ["sweep", f"--network={files['run']}", f"--data={files['data']}", *FAST,
                                         "--detector=pixels", "--num=20", run_dir]).exit_code == 130  # fmt: skip
    assert [point["number"] for point in json.loads(out.read_text())["curve"]] == [100]
    text = sweep(files, run_dir)
    assert len(made) == 4 and text.count("network-snapshot-000100.pkl") == 0
    sweep(files, run_dir)
    assert len(made) == 4
    assert "--out: " in sweep(files, run_dir, "--metric=kid", code=1)
    out.write_text('{"curve": [{"value": 1}]}')
    assert "is not the result of a sweep" in sweep(files, run_dir, code=1)


def test_snapshots_are_chosen_by_number(files, tmp_path):
    pattern = str(files["run"] / "network-snapshot-*.pkl")
    assert list_snapshots(pattern) == list_snapshots(str(files["run"]))
    some = [Snapshot(f"{n}.pkl", n) for n in (50, 100, 150, 200, 250, 300)]

    def numbers(*args):
        return [snapshot.number for snapshot in choose_snapshots(some, *args)]

    assert numbers(None, None, None) == [50, 100, 150, 200, 250, 300]
    assert numbers(100, 300, 100) == [100, 200, 300] and numbers(60, 250, None) == [100, 150, 200, 250]
    for name in ("a_1.pkl", "a_2.pth"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="count different things"):
        list_snapshots(str(tmp_path / "a_*"))
    assert "--kimg_start" in sweep(files, "--kimg_start=400", code=1)
    assert "100 to 300" in sweep(files, "--kimg_start=400", code=1)
    assert "count kimg" in sweep(files, "--epoch_start=1", code=1)


@pytest.mark.parametrize(
    "args, data, words",
    [
        (["--metric=fd"], "data", ["--metric: no metric 'fd'", "cw_", "density"]),
        (["--metric=cw_mifid"], "data", ["--metric: "]),
        (["--metric=is"], "data", ["pixels gives no class probabilities"]),
        (["--metric=sfid"], "data", ["pixels gives no spatial features"]),
        (["--metric=density_k25"], "data", ["no density_k25", "needs 26 images"]),
        (["--metric=label_accuracy", "--judge=none"], "data", ["no judge was asked for"]),
        (["--metric=cw_density_k25"], "data", ["no class of ", "needs 26"]),
        (["--network=nowhere"], "data", ["--network: ", "nowhere"]),
    ],
)
def test_bad_sweeps(files, args, data, words):
    error = sweep(files, *args, data=data, code=1)
    assert all(word in error for word in words) and "kimg 100" not in error, error  # before images are made


def test_sweep_by_labels_that_may_be_wrong_ranks_nothing(files):
    text = sweep(files, "--metric=cw_fid", "--kimg_end=200", data="noisy")
    assert "*\n" not in text.partition("better when")[0] and "labels may be wrong" in text
    assert "*" in sweep(files, "--kimg_end=200", data="noisy").partition("better when")[0]  # FID needs no labels


def test_sweep_of_generators(files):
    options = [f"--network={files['gan']}", f"--data={files['data']}", "--detector=pixels", "--num=12", "--device=cpu"]
    assert "50" in run("sweep", *options, "--metric=density_k3")
    assert "--rho: " in run("sweep", *options, "--rho=5", code=1)
    assert "was trained without labels" in run("sweep", *options, "--metric=label_accuracy", code=1)


def test_ppl(files, tmp_path):
    out = tmp_path / "ppl.json"
    options = [f"--network={files['gan']}", "--detector=pixels", "--num=10", "--device=cpu"]
    text = run("ppl", *options, f"--out={out}", "--epsilon=0.01")
    found = json.loads(out.read_text())
    assert set(found["metrics"]) == {"ppl_full", "ppl_end"} and min(found["metrics"].values()) > 0
    assert "ppl_full ↓" in text and "ppl_end ↓" in text
    more = json.loads(out.read_text())["metrics"]["ppl_end"]
    run("ppl", *options, f"--out={out}", "--epsilon=0.01", "--sampling=end", "--batch=3")
    assert json.loads(out.read_text())["metrics"] == {"ppl_end": pytest.approx(more, rel=1e-3)}
    assert "--network: " in run("ppl", f"--network={files['run']}", *options[1:], code=1)
    assert "--detector: " in run("ppl", options[0], "--detector=nowhere", *options[2:], code=1)


def test_protocol_sets_defaults_that_options_override(files, tmp_path):
    images = tmp_path / "images.npz"
    np.savez(images, np.random.default_rng(1).integers(0, 256, [12, 8, 8, 1], dtype=np.uint8), np.arange(12) % 3)
    args = [f"--images={images}", f"--data={files['data']}", "--detector=pixels", "--judge=none"]
    assert "--protocol=tdsm: found 12 images" in run("evaluate", *args, "--protocol=tdsm", code=1)
    out = tmp_path / "out.json"
    text = run("evaluate", *args, "--num=12", "--protocol=sbdc", f"--out={out}")
    metrics = json.loads(out.read_text())["metrics"]
    assert "density_k3" in metrics and "sbdc: num = 50,000, nearest_k = 3" in text and "but here num = 12" in text
    text = run("compare", "--protocol=rduot", *args, "--nearest_k=2", "--num=12")
    assert "density_k2" in text and "but here num = 12, nearest_k = 2" in text
    assert "density_k5" in run("evaluate", *args)


def test_classes_are_matched_by_name(files, tmp_path):
    """The same images with other numbers for the classes give the same figures; by number they would be worse."""
    rng = np.random.default_rng(2)
    shown = np.arange(30) % 3
    images = (rng.integers(0, 40, [30, 8, 8, 1]) + 80 * shown[:, None, None, None]).astype(np.uint8)
    data = make_archive(tmp_path / "data.zip", images, shown.tolist(), class_names=["a", "b", "c"])
    same = make_archive(tmp_path / "same.zip", images[::-1], shown[::-1].tolist(), class_names=["a", "b", "c"])
    turned = make_archive(
        tmp_path / "turned.zip", images[::-1], [(c + 1) % 3 for c in shown[::-1].tolist()], class_names=["c", "a", "b"]
    )
    tables = []
    for path in (same, turned):
        out = tmp_path / "out.json"
        text = run("evaluate", f"--images={path}", f"--data={data}", f"--test={data}", "--cas_arch=small",
                   "--cas_epochs=1", "--detector=pixels", f"--out={out}", "--device=cpu")  # fmt: skip
        tables.append((json.loads(out.read_text()), text))
    (expected, plain), (found, text) = tables
    assert found["metrics"] == pytest.approx(expected["metrics"], nan_ok=True) and found["metrics"]["cw_fid"] < 1e-6
    assert found["metrics"]["label_accuracy"] == 1
    assert "classes    matched by name" in text and "classes    matched" not in plain
    assert {c: v["name"] for c, v in found["classes"].items()} == {"0": "a", "1": "b", "2": "c"}


def test_gray_and_rgb_name_the_conversion(files, tmp_path):
    color = make_archive(tmp_path / "color.zip", pictures(4, size=8, channels=3), [0, 1, 2, 0])
    error = run("evaluate", f"--images={color}", f"--data={files['data']}", "--detector=pixels", code=1)
    assert "8x8 gray" in error and f"dataset_tool.py --source={files['data']} --channels=3" in error


def test_calc_says_how_to_get_inception(files, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch_fidelity.registry", None)
    error = run("ref", f"--data={files['data']}", f"--dest={tmp_path / 'r.npz'}", code=2)
    assert "--detector is missing" in error and "inception-v3-2015-12-05.pkl" in error
    assert "pip install torch-fidelity" in error and "'pixels'" in error
    assert not (tmp_path / "r.npz").exists()


def test_calc_uses_inception_of_torch_fidelity(files, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        "metrics.detectors.FidelityDetector", lambda name, device: asked.append(name) or PixelDetector()
    )
    text = run("ref", f"--data={files['data']}", f"--dest={tmp_path / 'r.npz'}", "--device=cpu")
    assert asked == ["fidelity:inception-v3-compat"] and "Detector: pixels" in text
    run("calc", f"--images={files['data']}", f"--ref={tmp_path / 'r.npz'}", "--num=30", "--device=cpu")
    assert len(asked) == 2


def test_gray_images_among_rgb_ones_name_the_conversion(files, tmp_path):
    (tmp_path / "mixed").mkdir()
    for i, image in enumerate(pictures(4)):
        PIL.Image.fromarray(image if i < 3 else image[:, :, 0]).save(tmp_path / "mixed" / f"{i}.png")
    error = run("ref", f"--data={tmp_path / 'mixed'}", f"--dest={tmp_path / 'r.npz'}", "--detector=pixels", code=1)
    assert "3.png" in error and "dataset_tool.py --channels=1 (gray) or --channels=3 (RGB)" in error
