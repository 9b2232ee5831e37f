"""Snapshots in both directions: other programs run the source code in ours, and ours reads those of other programs."""

import collections
import copy
import importlib.util
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from dnnlib import EasyDict, UserError
from tests.support.paths import FIXTURES
from tests.support.pickles import TOY, Raw, import_source, module_state, persistent, published, write
from torch_utils.persistence import load_snapshot, save_snapshot
from training import networks
from training.presets import network_kwargs

# All that another program needs: it makes classes from the source code in the file.
STOCK = {
    "dnnlib/__init__.py": """
class EasyDict(dict):
    def __getattr__(self, name):
        return self[name]
""",
    "torch_utils/__init__.py": "",
    "torch_utils/persistence.py": """
import types
import dnnlib

modules = {}

def persistent_class(cls):
    class Wrapped(cls):
        def __init__(self, *args, **kwargs):
            self._init_args, self._init_kwargs = args, kwargs
            super().__init__(*args, **kwargs)
    Wrapped.__name__ = cls.__name__
    return Wrapped

def _reconstruct_persistent_obj(meta):
    meta = dnnlib.EasyDict(meta)
    assert meta.type == "class" and meta.version == 6
    if meta.module_src not in modules:
        modules[meta.module_src] = types.ModuleType("embedded")
        exec(meta.module_src, vars(modules[meta.module_src]))
    cls = vars(modules[meta.module_src])[meta.class_name]
    obj = cls.__new__(cls)
    obj.__setstate__(dnnlib.EasyDict(meta.state))
    return obj
""",
}

USE = """
import importlib.util, pathlib, pickle, sys
stock, packages, folder = map(pathlib.Path, sys.argv[1:])
sys.path += [str(stock), str(packages)]
for name in ("training", "sampling", "metrics", "click", "PIL", "scipy", "requests", "sklearn", "safetensors"):
    assert importlib.util.find_spec(name) is None, name
import torch
for path in sorted(folder.glob("*.pkl")):
    with open(path, "rb") as f:
        net = pickle.load(f)["ema"]
    assert type(net).__mro__[1].__module__ == "embedded" and not net.training
    assert net._init_kwargs["img_resolution"] == net.img_resolution
    arguments = torch.load(path.with_suffix(".in"))
    with torch.no_grad():
        torch.save((type(net).__name__, net(*arguments)), path.with_suffix(".out"))
"""
# Only the packages that torch and NumPy import.
PACKAGES = [
    "torch", "torchgen", "functorch", "numpy", "numpy.libs", "typing_extensions", "sympy", "mpmath", "networkx",
    "jinja2", "markupsafe", "filelock", "fsspec", "nvidia", "triton", "setuptools",
]  # fmt: skip


def bare_interpreter(root):
    """Return a folder with the modules of STOCK and a folder of links to the packages above."""
    for name, text in STOCK.items():
        (root / "stock" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "stock" / name).write_text(text)
    (root / "packages").mkdir()
    site = pathlib.Path(torch.__file__).parent.parent
    for name in PACKAGES:
        for path in (site / name, site / f"{name}.py"):
            if path.exists():
                (root / "packages" / path.name).symlink_to(path)
    return root / "stock", root / "packages"


def shaken(net):
    """Return the network with random weights, because layers that begin at zero would hide the layers before them."""
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return net.eval().requires_grad_(False)


def our_networks():
    """Yield every preconditioner with every U-Net, some of them with classes and augmentation labels."""
    tiny = dict(channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4])
    for i, arch in enumerate(("ddpmpp", "ncsnpp", "adm")):
        for j, name in enumerate(("VPPrecond", "VEPrecond", "iDDPMPrecond", "EDMPrecond")):
            kwargs = {**network_kwargs(arch, cbase=64 if arch == "adm" else 8), **tiny}
            extra = dict(label_dim=5, augment_dim=9, dropout=0.1, label_dropout=0.1) if (i + j) % 2 else {}
            yield f"{arch}-{name}", getattr(networks, name)(8, 3, **kwargs, **extra)


def test_programs_that_run_embedded_source_load_our_networks(tmp_path):
    expected = {}
    (tmp_path / "files").mkdir()
    for name, net in [*our_networks(), ("fixture", load_snapshot(os.path.join(FIXTURES, "edm_snapshot.pkl"))["ema"])]:
        path = tmp_path / "files" / f"{name}.pkl"
        recorded = copy.deepcopy(net.init_kwargs)
        kwargs = {"img_resolution": net.img_resolution, "img_channels": net.img_channels, "label_dim": net.label_dim}
        net = shaken(type(net)(**{**kwargs, **recorded}))
        save_snapshot(path, {"ema": net, "info": {"T": np.eye(2)}, "loss_fn": {"class_name": "x"}})
        n = net.img_resolution
        arguments = (
            torch.randn(2, net.img_channels, n, n),
            torch.tensor([0.5, 5.0]),
            torch.eye(net.label_dim)[:2] if net.label_dim else None,
        )
        torch.save(arguments, path.with_suffix(".in"))
        expected[name] = (type(net).__name__, net(*arguments))
    args = [*bare_interpreter(tmp_path), tmp_path / "files"]
    subprocess.run([sys.executable, "-I", "-S", "-c", USE, *map(str, args)], check=True)
    for name, (cls, output) in expected.items():
        found = torch.load(tmp_path / "files" / f"{name}.out", weights_only=True)
        assert found[0] == cls and output.abs().mean() > 0.01 and torch.equal(found[1], output), name
    assert len(expected) == 13 and importlib.util.find_spec("click") is not None


# ---- snapshots of other programs


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return import_source("toy_networks_compat", TOY.replace("Toy", "Compat"), tmp_path_factory.mktemp("toy"))


@pytest.fixture
def net(toy):
    torch.manual_seed(0)
    return toy.CompatPrecond(4, depth=2)


def same(a, b):
    x = torch.linspace(-1, 1, 8).reshape(2, 4)
    return torch.equal(a(x), b(x))


def compat(net, change, **meta):
    """Return the network as another program writes it, with the state of every module changed by `change`."""

    def state(module):
        found = module.__getstate__()
        found["_modules"] = {name: record(child) for name, child in module._modules.items()}
        change(found)
        return found

    def record(module):
        if hasattr(module, "init_args"):
            return persistent(type(module).__name__, state(module), **meta)
        container = type(module).__new__(type(module))
        vars(container).update(state(module))
        return container

    return {"ema": record(net)}


@pytest.mark.parametrize("version", range(1, 7))
def test_older_versions(net, tmp_path, version):
    assert same(load_snapshot(write(tmp_path / "a.pkl", compat(net, lambda s: None, version=version)))["ema"], net)


def minimal(state):
    """Keep only what every version of PyTorch has: no hooks, no flags, no list of buffers that are not stored."""
    for key in set(state) - {"_parameters", "_buffers", "_modules", "_init_kwargs", "_init_args"}:
        del state[key]
    state["_buffers"].pop("cache", None)


def ordered(state):
    """Use ordered dictionaries, as PyTorch before 2.5 did, and attribute dictionaries, as other programs do."""
    for key in ("_parameters", "_buffers", "_modules"):
        state[key] = collections.OrderedDict(state[key])
    if "_init_kwargs" in state:
        state["_init_kwargs"] = EasyDict(state["_init_kwargs"])


def renamed(state):
    for old, new in (("extra", "extra_v1"), ("gain", "_gain")):
        if old in state["_buffers"]:
            state["_buffers"] = {new if name == old else name: value for name, value in state["_buffers"].items()}


def halved(state):
    for group in ("_parameters", "_buffers"):
        for name, value in state[group].items():
            if value is not None and value.is_floating_point():
                kind = torch.nn.Parameter if group == "_parameters" else torch.Tensor.detach
                state[group][name] = kind(value.detach().half())


def with_more(state):
    """Add attributes that later programs have, among them some that are not plain data."""
    state.update(added_later={1}, _is_full_backward_hook=None, _compiled_call_impl=None, call_super_init=False)


@pytest.mark.parametrize("change", [minimal, ordered, renamed, with_more])
@pytest.mark.parametrize("protocol", [4, 5])
def test_layouts_of_other_programs(net, tmp_path, change, protocol):
    path = write(tmp_path / "a.pkl", compat(copy.deepcopy(net), change), protocol)
    assert same(load_snapshot(path)["ema"], net)


def test_half_precision(net, tmp_path):
    found = load_snapshot(write(tmp_path / "a.pkl", compat(copy.deepcopy(net), halved)))["ema"]
    assert same(found, copy.deepcopy(net).half().float()) and next(found.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    "buffers, message",
    [
        ({"extra_v1": torch.zeros(3)}, "lacks extra"),
        ({"a": torch.zeros(2), "b": torch.zeros(2)}, "lacks extra"),
        ({}, "lacks extra"),
    ],
)
def test_a_buffer_under_another_name_must_be_unambiguous(net, tmp_path, buffers, message):
    state = module_state(net, _buffers=buffers)
    with pytest.raises(UserError, match=message):
        load_snapshot(write(tmp_path / "a.pkl", {"ema": persistent("CompatPrecond", state)}))
    parameter = module_state(net, _buffers={}, _parameters={"extra_v1": torch.nn.Parameter(torch.zeros(2))})
    with pytest.raises(UserError, match=message):
        load_snapshot(write(tmp_path / "a.pkl", {"ema": persistent("CompatPrecond", parameter)}))


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
@pytest.mark.parametrize("dtype", ["f2", "<f4", ">f4", "f8", "i4", "<i8", "u1", "?"])
def test_numbers_of_numpy_1_and_2(net, tmp_path, monkeypatch, module, dtype):
    def scalar():
        """Stand for NumPy's function under either name."""

    scalar.__module__, scalar.__qualname__ = module, "scalar"
    monkeypatch.setitem(sys.modules, module, type(sys)(module))
    sys.modules[module].scalar = scalar
    value = np.array(1).astype(dtype)
    settings = {"a": Raw(scalar, np.dtype(dtype), value.tobytes())}
    found = load_snapshot(write(tmp_path / "a.pkl", published(net, dataset_kwargs=settings)))["dataset_kwargs"]["a"]
    assert found == 1 and type(found) is type(value.item())
