"""export.py: what goes out is what was trained, whatever the format, and comes back bit for bit."""

import importlib.util
import json
import re
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import dnnlib
import export
from reports.model_card import model_card
from sampling.export import graph
from sampling.export.unet2d import unet2d_config
from sampling.generation import generate_images
from tests.support.commands import callers
from tests.support.generated import make, random_network, read
from tests.support.paths import FIXTURES
from tests.support.runs import assert_same
from torch_utils import persistence
from training.networks import EDMPrecond, VEPrecond, VPPrecond, iDDPMPrecond

succeed, fail = callers(export.main)
NAMES = ["cat", "dog", "a|b*"]
INFO = dict(
    method="tdsm",
    class_names=NAMES,
    nimg=280_064,
    validation_loss=float("inf"),
    transition=[[0.6, 0.2, 0.2], [0.2, 0.6, 0.2], [0.2, 0.2, 0.6]],
    options=dict(batch_size=128, precision="fp32", dataset=dict(path="/home/me/digits_sym40.zip")),
)
SMALL = dict(img_resolution=8, img_channels=3, label_dim=3, model_channels=16, channel_mult=[1, 2], num_blocks=1)
SONG = dict(model_type="SongUNet", attn_resolutions=[4]) | SMALL


def moved(net, seed=0):
    """Return the network with weights that are all different from the first ones, most of which are zero."""
    torch.manual_seed(seed)
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return net.eval().requires_grad_(False)


def save(folder, net, info=None):
    folder.mkdir(exist_ok=True)
    path = folder / "network-snapshot-000280.pkl"
    data = dict(loss_fn=dict(class_name="EDMLoss"), augment_pipe=None, dataset_kwargs={}, info=info or {})
    persistence.save_snapshot(path, dict(ema=net, **data))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run directory with a snapshot and its sheet of samples."""
    folder = tmp_path_factory.mktemp("run")
    save(folder, random_network(), INFO)
    Image.new("L", (4, 4), 77).save(folder / "samples-000280.png")
    return folder


def old(name, tmp_path):
    with zipfile.ZipFile(FIXTURES / "v0.1.zip") as archive:
        return archive.extract(f"runs/{name}/network-snapshot-000000.pkl", tmp_path)


# safetensors


@pytest.mark.parametrize("name", ["edm", "dsm", "classifier", "learned", "discriminator", "rduot"])
def test_a_snapshot_comes_back_from_safetensors_bit_for_bit(name, tmp_path):
    path = FIXTURES / "edm_snapshot.pkl" if name == "edm" else old(name, tmp_path)
    succeed(f"--network={path}", f"--dest={tmp_path}/there", "--sheet=0")
    succeed(f"--network={tmp_path}/there", f"--dest={tmp_path}/back", "--sheet=0", "--format=snapshot")
    before, after = (persistence.load_snapshot(persistence.find_snapshot(p)) for p in (path, tmp_path / "back"))
    a, b = before.pop("ema"), after.pop("ema")
    assert_same(dict(a.state_dict()), dict(b.state_dict()))
    assert type(a) is type(b)
    assert json.dumps(before) == json.dumps(after)
    assert json.dumps([a.init_args, a.init_kwargs]) == json.dumps([b.init_args, b.init_kwargs])


def test_scripts_take_the_folder_in_place_of_a_snapshot(run, tmp_path):
    succeed(f"--network={run}", f"--dest={tmp_path}/there")
    make(tmp_path / "a.zip", f"--network={run}", "--seeds=0-5", "--class=a|b*,cat")
    make(tmp_path / "b.zip", f"--network={tmp_path}/there", "--seeds=0-5", "--class=a|b*,cat")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_values_that_are_no_numbers_come_back(run, tmp_path):
    succeed(f"--network={run}", f"--dest={tmp_path}/there")
    assert persistence.load_snapshot(tmp_path / "there" / "model.safetensors")["info"] == INFO


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json|cannot be read"),
        (lambda f: (f / "config.json").write_text("{}"), "config.json|format"),
        (lambda f: change(f, class_name="Evil"), "Evil|does not have"),
        (lambda f: change(f, class_name=["EDMPrecond"]), "class_name|wrong type"),
        (lambda f: change(f, class_name="UNet"), "of another kind"),
        (lambda f: change(f, init_kwargs=dict(img_resolution=8, img_channels=1)), "model.safetensors"),
        (lambda f: change(f, info=dict(class_names=[1])), "class_names"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 100), "model.safetensors|damaged"),
        (lambda f: cut(f / "model.safetensors"), "model.safetensors|damaged"),
    ],
)
def test_what_is_wrong_with_a_folder_is_one_line(run, tmp_path, damage, words):
    folder = tmp_path / "there"
    succeed(f"--network={run}", f"--dest={folder}")
    damage(folder)
    fail(1, f"--network={folder}", f"--dest={tmp_path}/back", f"--network: |{words}")
    assert not (tmp_path / "back").exists()


def change(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])


# Graphs


GRAPHS = {
    "edm": lambda: random_network(),
    "unconditional": lambda: random_network(label_dim=0),
    "vp": lambda: moved(VPPrecond(**SONG)),
    "ncsnpp": lambda: moved(
        VEPrecond(**SONG, embedding_type="fourier", encoder_type="residual", decoder_type="skip", channel_mult_noise=2)
    ),
    "adm": lambda: moved(iDDPMPrecond(**SMALL, attn_resolutions=[4])),
}


def noisy(net, n, sigma):
    torch.manual_seed(n)
    x = torch.randn(n, net.img_channels, net.img_resolution, net.img_resolution) * sigma
    labels = torch.eye(net.label_dim or 1)[torch.arange(n) % max(net.label_dim, 1)]
    return (x, torch.full([n], sigma), labels)[: 3 if net.label_dim else 2]


@pytest.mark.parametrize("name", ["edm", *(pytest.param(g, marks=pytest.mark.long) for g in GRAPHS if g != "edm")])
def test_torchscript_gives_what_the_network_gives(name, tmp_path):
    net = GRAPHS[name]()
    save(tmp_path / "run", net)
    succeed(f"--network={tmp_path}/run", f"--dest={tmp_path}/there", "--format=torchscript", "--sheet=0")
    loaded = torch.jit.load(str(tmp_path / "there" / "model.pt"))
    for n, sigma in ((1, 0.1), (4, 3.0), (3, 40.0)):
        with torch.jit.optimized_execution(False):
            found = loaded(*noisy(net, n, sigma))
        torch.testing.assert_close(found, net(*noisy(net, n, sigma)), atol=1e-4, rtol=0)
    assert 'value="cpu"' not in str(loaded.inlined_graph)  # a graph that names a device runs on no other


@pytest.mark.parametrize("name", ["edm", pytest.param("adm", marks=pytest.mark.long)])
def test_onnx_gives_what_the_network_gives(name, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason="needs pip install onnx onnxscript onnxruntime")
    onnxruntime = pytest.importorskip("onnxruntime")
    net = GRAPHS[name]()
    save(tmp_path / "run", net)
    succeed(f"--network={tmp_path}/run", f"--dest={tmp_path}/there", "--format=onnx", "--sheet=0")
    session = onnxruntime.InferenceSession(tmp_path / "there" / "model.onnx", providers=["CPUExecutionProvider"])
    for n, sigma in ((1, 0.1), (4, 3.0)):
        inputs = noisy(net, n, sigma)
        (found,) = session.run(None, dict(zip(("x", "sigma", "class_labels"), map(torch.Tensor.numpy, inputs))))  # noqa: B905
        np.testing.assert_allclose(found, net(*inputs).numpy(), atol=1e-4)


def test_onnx_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    fail(1, f"--network={run}", f"--dest={tmp_path}/there", "--format=onnx", "--format=onnx|pip install onnx")
    assert not list(tmp_path.iterdir())


def test_a_graph_that_differs_is_refused():
    net = random_network()
    assert graph._compare(net, net) == 0
    with pytest.raises(dnnlib.UserError, match="differs from the network by 2.0e-04"):
        graph._compare(net, lambda *inputs: net(*inputs) + 2e-4)
    with pytest.raises(dnnlib.UserError, match="differs"):  # a graph of one noise level, or for one batch size
        graph._compare(net, lambda x, sigma, labels: net(x, sigma[:1], labels))
    with pytest.raises(dnnlib.UserError, match="nan"):
        graph._compare(net, lambda *inputs: net(*inputs) * float("nan"))


# diffusers


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    """The run as a folder for diffusers."""
    dest = tmp_path_factory.mktemp("diffusers") / "there"
    succeed(f"--network={run}", f"--dest={dest}", "--format=diffusers")
    return dest


def test_the_network_in_the_folder_for_diffusers_stands_alone(folder):
    code = folder / "denoiser" / "networks.py"
    assert "torch_utils" not in code.read_text()
    spec = importlib.util.spec_from_file_location("networks_alone", code)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = json.loads((folder / "denoiser" / "config.json").read_text())
    theirs, ours = getattr(module, config["precond"])(**config["arguments"]).eval(), random_network()
    assert type(theirs) is not type(ours)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs(*noisy(ours, 2, 1.0)), ours(*noisy(ours, 2, 1.0)))


@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_diffusers_makes_the_same_images(folder, run, tmp_path, solver):
    diffusers = pytest.importorskip("diffusers", reason="needs pip install diffusers")
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(6)]
    ours = make(tmp_path / "a", f"--network={run}", "--seeds=0-5", f"--solver={solver}") and read(tmp_path / "a")[0]
    theirs = pipe(generator=generators, num_inference_steps=3, solver=solver).images
    theirs = np.stack([np.asarray(image)[None] for image in theirs])
    assert np.abs(theirs.astype(int) - ours.astype(int)).max() <= 1 and ours.std() > 10
    named = pipe(class_labels=["dog", 2], num_inference_steps=2, output_type="pt")
    assert named.images.shape == (2, 1, 8, 8) and 0 <= named.images.min() <= named.images.max() <= 1
    for wrong in (3, "cow", [0, -1]):
        with pytest.raises(ValueError, match="class_labels"):
            pipe(class_labels=wrong, num_inference_steps=1)


@pytest.mark.parametrize("name", ["unconditional", "vp", "ncsnpp", "adm"])
def test_diffusers_makes_the_same_images_with_every_preconditioner(name, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="needs pip install diffusers")
    net = GRAPHS[name]()
    save(tmp_path / "run", net)
    succeed(f"--network={tmp_path}/run", f"--dest={tmp_path}/there", "--format=diffusers", "--sheet=0")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "there", trust_remote_code=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    theirs = np.stack([np.asarray(image) for image in pipe(generator=generators).images])
    ((_, ours, _),) = generate_images(net, range(3), device=torch.device("cpu"))
    assert np.abs(theirs.reshape(ours.shape).astype(int) - ours.astype(int)).max() <= 1
    if not net.label_dim:
        for wrong in (dict(guidance_scale=2), dict(class_labels=0)):
            with pytest.raises(ValueError, match=f"{[*wrong][0]}: this network was trained without classes"):
                pipe(**wrong)


def test_adm_becomes_a_unet2dmodel_that_makes_the_same_images(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="needs pip install diffusers")
    wide = dict(model_channels=128, channel_mult=[1, 2], attn_resolutions=[4], img_channels=1)
    net = moved(EDMPrecond(**SMALL | wide))
    save(tmp_path / "run", net, dict(class_names=NAMES))
    succeed(f"--network={tmp_path}/run", f"--dest={tmp_path}/there", "--format=diffusers", "--sheet=0")
    assert sorted(p.suffix for p in (tmp_path / "there" / "denoiser").iterdir()) == [".json", ".safetensors"]
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "there", trust_remote_code=True)
    assert type(pipe.denoiser) is diffusers.UNet2DModel
    for guidance in (1.0, 2.0):
        generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
        theirs = pipe(generator=generators, num_inference_steps=3, guidance_scale=guidance).images
        make(tmp_path / f"{guidance}", f"--network={tmp_path}/run", "--seeds=0-2", f"--cfg={guidance}")
        ours = read(tmp_path / f"{guidance}")[0]
        assert np.abs(np.stack(theirs).reshape(ours.shape).astype(int) - ours.astype(int)).max() <= 1


def test_only_the_shape_of_a_unet2dmodel_becomes_one():
    wide = dict(model_channels=128, channel_mult=[1], attn_resolutions=[8])
    assert unet2d_config(EDMPrecond(**SMALL | wide)) is not None
    for other in (random_network(), GRAPHS["adm"](), EDMPrecond(**SMALL | wide | dict(model_channels=32))):
        assert unet2d_config(other) is None


# The card and the folder


def test_the_card_says_what_is_known(run, tmp_path):
    np.savez(tmp_path / "labels.npz", noise_rate=0.398, noise_interval=[0.37, 0.41])
    table = dict(metrics=dict(fid=1.2345678, cas=None), data="/home/me/digits.zip", detector="pixels", num_images=900)
    (tmp_path / "out.json").write_text(json.dumps(table))
    more = [f"--results={tmp_path}/out.json", f"--label-path={tmp_path}/labels.npz", "--license=cc-by-4.0"]
    printed = succeed(f"--network={run}", f"--dest={tmp_path}/there", *more)
    card = (tmp_path / "there" / "README.md").read_text()
    for words in (
        "license: cc-by-4.0",
        "digits\\_sym40.zip",
        "cat, dog, a\\|b\\*",
        "About 39.8% of the labels are wrong",
    ):
        assert words in card
    for words in (
        "between 37.0% and 41.0%",
        "40.0% wrong labels",
        "(TDSM)",
        "280.1 thousand images",
        "| fid | 1.235 |",
    ):
        assert words in card
    assert "/home/me" not in card and "| cas | - |" in card and "900 images against digits.zip" in card
    assert (tmp_path / "there" / "samples.png").read_bytes() == (run / "samples-000280.png").read_bytes()
    assert re.search(r"Written to .*/there in [\d.]+ s: README.md .*model.safetensors", printed)


def test_the_card_of_a_stranger_says_what_it_does_not_know(tmp_path):
    succeed(f"--network={FIXTURES}/edm_snapshot.pkl", f"--dest={tmp_path}/there", "--sheet=0")
    card = (tmp_path / "there" / "README.md").read_text()
    for words in ("license: unknown", "Not on record", "not on record", "Not measured"):
        assert words in card
    assert "samples.png" not in card and "None" not in card


@pytest.mark.parametrize(
    "info",
    [
        dict(options=["dataset"]),
        dict(options=dict(dataset="/home/me/x.zip", contents=3, posterior="drop")),
        dict(options=dict(dataset=dict(path="x.zip"), contents={"dataset.path": [1]})),
        dict(method=["tdsm"]),
    ],
)
def test_the_card_leaves_out_what_has_another_form(info):
    card = model_card("name", dict(ema=random_network(), info=info, dataset_kwargs={}), "safetensors")
    assert "# name" in card and "Trained by" in card


@pytest.mark.parametrize(
    "info",
    [
        dict(transition="abc"),
        dict(transition=[0.5, 0.5]),
        dict(transition=[[1.0], [0.5, 0.5]]),
        dict(transition=[[0.5, 0.5]]),
        dict(transition=[[float("nan")]]),
        dict(transition=[[10**400]]),
        dict(nimg=10**400),
        dict(nimg=10**5000),
        dict(options=dict(dataset=dict(path="x.zip"), contents={"dataset.path": dict(images=10**5000)})),
    ],
    ids=lambda info: str(*info),
)
def test_facts_that_cannot_be_shown_are_one_line(tmp_path, info):
    save(tmp_path / "run", random_network(), info)
    args = f"--network={tmp_path}/run", f"--dest={tmp_path}/there", "--format=snapshot"
    fail(1, *args, "--network: what the snapshot says about its training cannot be shown")
    assert not (tmp_path / "there").exists()


def test_the_card_escapes_what_strangers_wrote(run, tmp_path):
    options = dict(batch_size="<b>\n# 8", precision="fp32")
    save(tmp_path / "run", random_network(), dict(nimg=1000, options=options))
    (tmp_path / "out.json").write_text(json.dumps(dict(metrics={}, num_images="<script>\n# x")))
    succeed(f"--network={tmp_path}/run", f"--dest={tmp_path}/there", "--sheet=0", f"--results={tmp_path}/out.json")
    card = (tmp_path / "there" / "README.md").read_text()
    assert "batches of \\<b\\> \\# 8" in card and "\\<script\\> \\# x images" in card


@pytest.mark.parametrize("form", export.USES)
def test_the_card_shows_code_that_python_accepts(form):
    card = model_card("name", dict(ema=random_network(), info={}, dataset_kwargs={}), form)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    compile(code, "card", "exec")


def test_a_new_sheet_is_drawn_where_the_run_has_none(tmp_path):
    path = save(tmp_path / "run", random_network(), INFO)
    succeed(f"--network={path}", f"--dest={tmp_path}/there")
    assert Image.open(tmp_path / "there" / "samples.png").size[0] > 3 * 64


@pytest.mark.parametrize("form", ["diffusers", "torchscript", "onnx"])
def test_only_denoisers_become_pipelines_and_graphs(form, tmp_path):
    path = old("rduot", tmp_path)
    fail(1, f"--network={path}", f"--dest={tmp_path}/there", f"--format={form}", "--network|generator|not a denoiser")


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--network=nothing.pkl", "--dest=there"], 1, "--network|no such file"),
        (["--network=full/netG_25.pth", "--dest=there"], 1, "--network|is a published generator"),
        (["--network=RUN", "--dest=full"], 1, "--dest|exists already"),
        (["--network=RUN", "--dest=full/file"], 1, "--dest|exists already"),
        (["--network=RUN", "--dest=there", "--license=a b"], 2, "--license|apache-2.0"),
        (["--network=RUN", "--dest=there", "--license=a\nb: c"], 2, "--license|apache-2.0"),
        (["--network=RUN", "--dest=there", "--results=full/file"], 1, "--results|not valid JSON"),
        (["--network=RUN", "--dest=there", "--results=full/list.json"], 1, "--results|fid.py evaluate"),
        (["--network=RUN", "--dest=there", "--results=full/digits.json"], 1, "--results|fid.py evaluate"),
        (["--network=RUN", "--dest=there", "--results=full/infinite.json"], 1, "--results|fid.py evaluate"),
        (["--network=RUN", "--dest=there", "--label-path=full/file"], 1, "--label-path|detect_noise.py"),
        (["--network=RUN", "--dest=there", "--label-path=full/text.npz"], 1, "--label-path|from 0 to 1"),
        (["--network=RUN", "--dest=there", "--label-path=full/seven.npz"], 1, "--label-path|from 0 to 1"),
        (["--network=RUN", "--dest=there", "--label-path=full/limits.npz"], 1, "--label-path|from 0 to 1"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(run, tmp_path, monkeypatch, args, code, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    (tmp_path / "full" / "list.json").write_text("[1]")
    (tmp_path / "full" / "digits.json").write_text(json.dumps(dict(metrics=dict(fid=10**400))))
    (tmp_path / "full" / "infinite.json").write_text('{"metrics": {"fid": 1e999}}')
    (tmp_path / "full" / "netG_25.pth").touch()
    np.savez(tmp_path / "full" / "text.npz", noise_rate="abc")
    np.savez(tmp_path / "full" / "seven.npz", noise_rate=7.0)
    np.savez(tmp_path / "full" / "limits.npz", noise_rate=0.4, noise_interval=["a", "b"])
    there = sorted(p.name for p in tmp_path.rglob("*"))
    fail(code, *(arg.replace("RUN", str(run)) for arg in args), words)
    assert sorted(p.name for p in tmp_path.rglob("*")) == there


def test_nothing_half_written_stays(run, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(export.portable.safetensors.torch, "save_file", full)
    fail(1, f"--network={run}", f"--dest={tmp_path}/there", "No space left")
    assert not list(tmp_path.iterdir())
