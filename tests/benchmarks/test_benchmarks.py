"""Test the benchmarks: their arithmetic, how forms take turns, and that the plain form computes the same numbers.

Nothing here depends on how long something takes.
"""

import json
import math
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import dnnlib
from benchmarks import __main__ as cli
from benchmarks import denoising_error, gpu, metrics_rows, outlier_costs, plain, roofline, scaling, steps, table
from benchmarks.archives import write_archive
from benchmarks.core import FormProcess, Row, compare, processes
from benchmarks.metrics_rows import prdc_plain
from benchmarks.roofline import Peaks, bound, count
from metrics.prdc import prdc
from tests.support import synth
from training.networks import EDMPrecond
from training.objectives.dsm import DSM
from training.presets import network_kwargs

TOY_SERVER = """
import sys, time
from benchmarks.core import Turns
turns, log = Turns(), open(sys.argv[1].strip('"'), "a")
print("this is not an answer")
def form():
    for word in ("in", "out"):
        print(f"{__name__ and sys.argv[0]} {word}", file=log, flush=True)
        time.sleep(0.02)
    return 0.5
turns.serve(form, dict(flops=7))
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Write modules toy_a and toy_b, whose forms log their turns in a common file and claim to take half a second."""
    for name in ("toy_a", "toy_b"):
        (tmp_path / f"{name}.py").write_text(TOY_SERVER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(filter(None, sys.path))}")
    return tmp_path


def test_flops_and_bytes_of_a_linear_layer():
    n, i, o = 5, 7, 11
    layer, x = torch.nn.Linear(i, o, bias=False), torch.randn(n, i, requires_grad=True)
    work = count(lambda: layer(x).sum().backward(), parameters=i * o)
    assert work.flops == 3 * 2 * n * i * o  # One product is for the output, two are for gradients.
    # Each of the three products reads two of the matrices x, w, y and writes the third.
    assert work.bytes == 3 * 4 * (n * i + i * o + n * o) + 4 * 9 * i * o


def test_convolution_counts_and_pointwise_operations_do_not():
    layer, x = torch.nn.Conv2d(3, 4, 3, padding=1), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        work = count(lambda: torch.nn.functional.silu(layer(x) * 2))
    assert work.flops == 2 * (2 * 64) * 4 * 3 * 9
    assert work.bytes == 4 * (x.numel() + 4 * 3 * 9 + 4 + 2 * 4 * 64)


@pytest.mark.parametrize(
    "row, seconds",
    [
        (Row("products", 1.0, flops=100, bytes=10), 5.0),
        (Row("memory", 1.0, flops=10, bytes=100), 25.0),
        (Row("half", 1.0, flops=100, bytes=10, precision="bf16"), 2.5),
        (Row("bytes", 1.0, bytes=8), 2.0),
        (Row("unknown", 1.0), None),
        (Row("not measured", 1.0, flops=1, precision="tf32"), None),
    ],
)
def test_bound(row, seconds):
    assert bound(row, Peaks(dict(fp32=20, bf16=40), bandwidth=4)) == seconds


def test_peaks_are_measured():
    peaks = roofline.measure_peaks(torch.device("cpu"), size=64, elements=1000)
    assert set(peaks.flops) == {"fp32", "bf16"}
    assert all(0 < x < math.inf for x in (*peaks.flops.values(), peaks.bandwidth))


def test_record_and_line():
    found = table.record("training", Row("step", 0.5, 2.0, 10, 4, "batch 8", 8), Peaks(dict(fp32=100), 20))
    assert (found["ratio"], found["images_per_second"], found["bound_seconds"], found["reached"]) == (4, 16, 0.2, 0.4)
    words = table.line(found).split()
    assert words == ["step", "500.0", "ms", "2.00", "s", "4.00", "16.0", "200.0", "ms", "40%", "batch", "8"]
    bare = table.record("x", Row("alone", 0.5), Peaks({}, 20))
    assert bare["ratio"] is bare["reached"] is bare["images_per_second"] is None
    assert table.line(bare).split() == ["alone", "500.0", "ms"]


def test_compare_alternates_and_drops_the_first_round():
    calls, times = [], dict(a=iter([100, 1, 9, 2]), b=iter([100, 5, 5, 7]))

    def form(name):
        def call():
            calls.append(name)
            return next(times[name])

        return call

    assert compare(dict(a=form("a"), b=form("b")), 3) == dict(a=2, b=5)
    assert calls == ["a", "b"] * 4


def test_processes_take_turns_and_only_one_computes(toy):
    log = str(toy / "log")
    with processes(a=("toy_a", log), b=("toy_b", log)) as forms:
        assert forms["a"].facts == dict(flops=7)
        assert compare(dict(forms), 2) == dict(a=0.5, b=0.5)
        pids = [form._process for form in forms.values()]
    assert [process.returncode for process in pids] == [0, 0]
    lines = [line.split() for line in open(log)]
    assert [word for _, word in lines] == ["in", "out"] * 6
    assert [path.split("/")[-1] for path, _ in lines] == ["toy_a.py"] * 2 + ["toy_b.py"] * 2 + (
        ["toy_a.py"] * 2 + ["toy_b.py"] * 2
    ) * 2


def test_a_process_that_fails_is_one_line(toy):
    (toy / "toy_a.py").write_text("raise SystemExit('the reason')")
    with pytest.raises(dnnlib.UserError, match=r"toy_a .*ended with code 1: the reason"):
        FormProcess("toy_a", {})


@pytest.mark.parametrize("arch, resolution", [("ddpmpp_tiny", 8), ("ddpmpp", 16), ("adm", 16)])
def test_plain_layers_give_the_same_and_are_put_away(arch, resolution, monkeypatch):
    torch.manual_seed(0)
    net = EDMPrecond(resolution, 3, 4, **network_kwargs(arch, 16), dropout=0.5)
    for p in net.parameters():
        p.data.copy_(torch.randn_like(p) * 0.3)  # Attention is then far from uniform.
    x, y = torch.randn(2, 3, resolution, resolution), torch.eye(4)[:2]
    drops = []
    monkeypatch.setattr(plain.F, "dropout", lambda x, p, training: drops.append((p, training)) or x)
    expected = net.eval()(x, torch.tensor([0.5, 2.0]), y)
    before = len(drops)
    with plain.plain_layers():
        found = net(x, torch.tensor([0.5, 2.0]), y)
        assert len(drops) - before == sum("Block" in type(m).__name__ for m in net.modules())
        assert set(drops[before:]) == {(0.5, False)}
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert net(x, torch.tensor([0.5, 2.0]), y).equal(expected)


def test_plain_network_is_adam_and_an_average():
    net = torch.nn.Linear(3, 1)
    torch.nn.init.ones_(net.weight)
    trained = plain.PlainNetwork(net, torch.device("cpu"), lr=0.1)
    net.weight.grad, net.bias.grad = torch.tensor([[2.0, float("nan"), -5.0]]), torch.zeros(1)
    trained.update()
    # Adam's first step is lr times the sign of the gradient, and NaN counts as zero.
    assert torch.allclose(net.weight, torch.tensor([[0.9, 1.0, 1.1]]))
    assert torch.allclose(trained.ema.weight, 0.999 + 0.001 * net.weight, atol=1e-6)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    return write_archive(str(folder / "data.zip"), 8, 1, 8, 4), folder


def test_ours_is_the_script_itself_and_stops(archive):
    data, folder = archive
    answers, seen = [], []

    def turn(answer):
        answers.append(answer)
        return len(answers) < 4

    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        step = DSM.step
        patch.setattr(DSM, "step", lambda self, images, *rest: seen.append(images.shape) or step(self, images, *rest))
        steps.ours(
            "train",
            [f"--outdir={folder}", f"--data={data}", "--arch=ddpmpp_tiny", "--cbase=8", "--batch=4", "--device=cpu"],
            turn,
        )
    assert answers[0] is None and all(x > 0 for x in answers[1:]) and len(answers) == 4
    assert seen == [(4, 1, 8, 8)] * 3
    assert not list(folder.rglob("*.png"))


def test_plain_takes_the_options_of_the_script(archive):
    data, folder = archive
    served = []
    steps.plain(
        "train",
        [
            f"--outdir={folder}",
            f"--data={data}",
            "--arch=ddpmpp_tiny",
            "--cbase=8",
            "--batch=4",
            "--batch-gpu=2",
            "--cond=1",
            "--device=cpu",
            "--lr=0.25",
        ],
        lambda *work: served.append(work),
    )
    ((step, facts),) = served
    objective = next(cell.cell_contents for cell in step.__closure__ if hasattr(cell.cell_contents, "trained"))
    trained = objective.trained["net"]
    assert isinstance(trained, plain.PlainNetwork) and trained.net.label_dim == 4
    assert trained.optimizer.param_groups[0]["lr"] == 0.25
    before = [p.clone() for p in trained.net.parameters()]
    step()
    assert any(not p.equal(q) for p, q in zip(trained.net.parameters(), before, strict=True))
    assert facts["parameters"] == sum(p.numel() for p in before)
    assert facts["flops"] > 0 and facts["bytes"] > 36 * facts["parameters"]
    assert DSM.trained_network is not type(objective).trained_network  # The method itself is unchanged.


def test_plain_prdc_is_prdc():
    rng = np.random.default_rng(0)
    real, fake = (torch.from_numpy(rng.standard_normal((50, 3)) + shift) for shift in (0, 0.7))
    assert prdc_plain(real, fake) == pytest.approx(prdc(real, fake))


def test_metrics_rows():
    trace, neighbors = metrics_rows.rows(1, features=8, images=40, width=4)
    assert int(trace.note.split()[-2]) >= 10  # Both ways to the root agree to so many digits.
    assert trace.plain_seconds > 0 and trace.flops is None
    # Distances within each set and between the two sets need a multiply-add for each pair and feature, at least once.
    assert neighbors.flops >= 3 * 2 * 40 * 40 * 4 and neighbors.images == 80


class FakeTopic:
    SECONDS = 1

    def __init__(self, name):
        self.name, self.repeats = name, None

    def rows(self, repeats):
        self.repeats = repeats
        yield Row(f"row of {self.name}", 1.0, 3.0, flops=10, images=2)


def run(*args):
    return CliRunner().invoke(cli.main, [str(arg) for arg in args])


@pytest.fixture
def topics(monkeypatch):
    fakes = {name: FakeTopic(name) for name in ("one", "two", "three")}
    monkeypatch.setattr(cli, "TOPICS", fakes)
    monkeypatch.setattr(cli, "measure_peaks", lambda device: Peaks(dict(fp32=40.0), 1e9))
    return fakes


def test_only_filters_and_the_file_holds_the_table(topics, tmp_path):
    out = tmp_path / "results" / "x.json"
    result = run("--only=three,one", "--repeats=7", f"--out={out}")
    assert result.exit_code == 0, result.output
    assert [topic.repeats for topic in topics.values()] == [7, None, 7]
    assert [line.split(" s")[0].split() for line in result.output.splitlines() if line.startswith("row of")] == [
        ["row", "of", "one", "1.00"],
        ["row", "of", "three", "1.00"],
    ]
    found = json.loads(out.read_text())
    assert set(found["machine"]) == {
        "date",
        "device",
        "processor",
        "cpus",
        "threads",
        "load",
        "torch",
        "python",
        "peak_flops",
        "bandwidth",
    }
    assert found["rows"] == [
        dict(
            topic=name,
            name=f"row of {name}",
            ours_seconds=1.0,
            plain_seconds=3.0,
            flops=10,
            bytes=None,
            note="",
            images=2,
            precision="fp32",
            ratio=3.0,
            images_per_second=2.0,
            bound_seconds=0.25,
            reached=0.25,
        )
        for name in ("one", "three")
    ]


def test_results_are_dated_and_never_replaced(topics, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "RESULTS", str(tmp_path))
    for _ in range(2):
        assert run("--only=two").exit_code == 0
    first, second = sorted(path.name for path in tmp_path.iterdir())
    assert first[10:] == "-cpu-2.json" and second[10:] == "-cpu.json" and first[:10] == second[:10]


@pytest.mark.parametrize("command", [cli.main, gpu.main, scaling.main])
@pytest.mark.parametrize("given", [True, False])
def test_a_file_that_cannot_be_written_is_refused_before_the_measurement(command, given, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "RESULTS", str(tmp_path / "file/results"))
    monkeypatch.setattr(scaling, "RESULTS", table.RESULTS)
    for module, name in ((cli, "measure_peaks"), (gpu, "run_part"), (scaling, "model_rows")):
        monkeypatch.setattr(module, name, None)
    (tmp_path / "file").touch()
    options = ["--tiny"] if command is gpu.main else []
    result = CliRunner().invoke(command, options + [f"--out={tmp_path}/file/out"] * given)
    assert result.exit_code == 2 and "cannot be written in" in result.stderr and "--out" in result.stderr
    assert (given or "results" in result.stderr) and len(result.stderr.splitlines()) == 1


def test_unknown_topic(topics):
    result = run("--only=one,speed")
    assert result.exit_code == 2
    assert "Error: Invalid value for '--only': 'speed' is not one of one, two, three" in result.output


def test_every_topic_has_rows():
    assert {"training", "metrics"} <= set(cli.TOPICS)
    assert all(callable(topic.rows) for topic in cli.TOPICS.values())


def test_the_costs_of_outliers_have_a_row_per_share(monkeypatch):
    monkeypatch.setattr(outlier_costs, "NUM", 300)
    monkeypatch.setattr(outlier_costs, "SHARES", (0.1, 0.2))
    result = CliRunner().invoke(outlier_costs.main, ["--sizes=8", "--only=digits+photos"])
    assert result.exit_code == 0, result.output
    rows = [line.split(" | ") for line in result.output.splitlines()[2:]]
    assert [row[2] for row in rows] == ["10%", "20%, of one class"] and all(row[3] == "0.00%" for row in rows)
    assert all(float(row[6]) > 20 for row in rows)
    result = CliRunner().invoke(outlier_costs.main, ["--only=fashion+mnist"])
    assert result.exit_code == 2 and "--only=fashion+mnist: needs --fashion or --mnist" in result.output


def test_the_denoising_error_of_two_networks_in_closed_form(monkeypatch, tmp_path):
    class Shrink:  # answers with a share of the noisy image: E || a (x + n) - x ||^2 = (1 - a)^2 x^2 + a^2 sigma^2
        label_dim, img_resolution, img_channels = 3, 8, 3

        def __init__(self, share):
            self.share, self.classes = share, []

        def __call__(self, x, sigma, labels):
            self.classes += labels.argmax(dim=1).tolist()
            return self.share * x

    networks = {"runs/all": Shrink(1.0), "runs/half": Shrink(0.5)}
    monkeypatch.setattr(denoising_error, "load_denoiser", lambda path, device: (networks[path], None))
    images = synth.pictures(250)
    clean = (np.arange(250) % 3).tolist()
    data = synth.make_archive(
        tmp_path / "x.zip", images, [0] * 250, clean_labels=[[f"00000/img{i:08d}.png", c] for i, c in enumerate(clean)]
    )
    args = [f"--data={data}", "--sigmas=0.5,2", "--num=230", "--device=cpu"]
    result = CliRunner().invoke(denoising_error.main, [*args, *networks])
    assert result.exit_code == 0, result.output
    x = float(np.square(images[:230] / 127.5 - 1).mean())
    first, second = (line.strip("| ").split(" | ") for line in result.output.splitlines()[2:4])
    assert [first[0], second[0]] == ["all", "half"]
    for a, b, sigma in zip(first[1:], second[1:], (0.5, 2), strict=True):
        assert float(a) == pytest.approx(sigma**2, rel=0.02)
        assert float(b.rstrip("%")) / 100 == pytest.approx((x + sigma**2) / 4 / sigma**2 - 1, abs=0.02)
    assert networks["runs/all"].classes == 2 * clean[:230]  # not the wrong labels
    for name, words in (("label_dim", "classes"), ("img_resolution", "resolution"), ("img_channels", "channels")):
        setattr(networks["runs/half"], name, 4)
        result = CliRunner().invoke(denoising_error.main, [*args, *networks])
        assert f"runs/half: {words} 4, but" in result.output
        delattr(networks["runs/half"], name)
    unlabeled = synth.make_archive(tmp_path / "u.zip", images)
    assert "has no class labels" in CliRunner().invoke(denoising_error.main, [f"--data={unlabeled}", "x"]).output
