"""Snapshots: EDM's layout both ways, and files that lie, are damaged or attack."""

import collections
import contextlib
import copy
import functools
import glob
import hashlib
import os
import pickle
import resource
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import training.networks  # noqa: F401  (the class of the fixture)
from dnnlib import EasyDict, UserError
from tests.support.paths import FIXTURES
from tests.support.pickles import TOY, Raw, import_source, module_state, persistent, published, write
from torch_utils import persistence, safe_pickle
from torch_utils.persistence import find_snapshot, load_snapshot, persistent_class, save_snapshot


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return import_source("toy_networks", TOY, tmp_path_factory.mktemp("toy"))


@pytest.fixture
def net(toy):
    torch.manual_seed(0)
    return toy.ToyPrecond(4, depth=2)


@pytest.fixture
def snapshot(net, tmp_path):
    path = tmp_path / "network-snapshot-000001.pkl"
    info = {"T": np.eye(2), "kimg": np.int64(1), "shape": torch.Size([3])}
    save_snapshot(
        path,
        {
            "ema": net,
            "info": info,
            "loss_fn": {"class_name": "L"},
            "augment_pipe": None,
            "dataset_kwargs": {"path": "a.zip"},
        },
    )
    return path


def same(a, b):
    x = torch.linspace(-1, 1, 8).reshape(2, 4)
    return torch.equal(a(x), b(x))


def refuse(path, match, **kwargs):
    with pytest.raises(UserError) as e:
        load_snapshot(path, **kwargs)
    assert str(path) in e.value.message and "\n" not in e.value.message
    assert match in e.value.message
    return e.value.message


# ---- the decorator


def test_constructor_arguments_are_recorded_as_they_were(toy):
    kwargs = {"depth": 1}
    net = toy.ToyPrecond(4, **kwargs)
    assert net.init_args == (4,) and net.init_kwargs == {"depth": 1}
    net.init_kwargs["depth"] = 5
    assert net.init_kwargs == {"depth": 1} and net.model.init_args == (4,)
    width = [4]

    @persistent_class(embed_source=False)
    class Changes:
        def __init__(self, width):
            width.append(5)

    assert Changes(width).init_args == ([4],)


def test_subclasses(toy):
    @persistent_class(embed_source=False)
    class ToyChild(toy.ToyLayer):
        def __init__(self, size):
            super().__init__(size, bias=False)

    child = ToyChild(3)
    assert child.init_args == (3,) and toy.ToyLayer(3).init_args == (3,)
    assert persistent_class(ToyChild) is ToyChild
    assert type(pickle.loads(pickle.dumps(child))) is ToyChild

    class Undecorated(toy.ToyLayer):
        pass

    assert type(copy.deepcopy(Undecorated(2))) is Undecorated
    with pytest.raises(TypeError, match="Undecorated is not decorated"):
        pickle.dumps(Undecorated(2))


def test_one_name_one_class(toy):
    with pytest.raises(TypeError, match="already defined in toy_networks"):

        @persistent_class(embed_source=False)
        class ToyNet:
            pass

    assert persistence._classes["ToyNet"] is toy.ToyNet


def test_copies_pickles_and_compiled_networks(net):
    net.train()
    net.compile(backend="eager")
    ema = copy.deepcopy(net).eval()
    assert same(ema, net) and net.training and not ema.training
    assert ema.model.layers["1x"].weight.data_ptr() != net.model.layers["1x"].weight.data_ptr()
    again = pickle.loads(pickle.dumps(net))
    assert type(again) is type(net) and same(again, net) and again.training and again.init_args == (4,)
    assert same(torch.compile(net, backend="eager"), net)


# ---- round trips


def test_snapshot_round_trip(net, snapshot):
    net.train()
    data = load_snapshot(snapshot, kind="denoiser")
    ema = data.pop("ema")
    assert type(ema) is type(net) and same(ema, net)
    assert not ema.training and not any(p.requires_grad for p in ema.parameters())
    assert data == {
        "info": {"T": [[1.0, 0.0], [0.0, 1.0]], "kimg": 1, "shape": (3,)},
        "loss_fn": {"class_name": "L"},
        "augment_pipe": None,
        "dataset_kwargs": {"path": "a.zip"},
    }
    payload = snapshot.read_bytes()
    assert hashlib.sha256(payload[:-32]).digest() == payload[-32:]
    assert pickle.loads(payload)["ema"].init_args == (4,)  # other readers ignore what follows the pickle


def test_networks_only_we_read_may_be_made_of_any_layers(tmp_path):
    @persistent_class(embed_source=False)
    class ToyJudge(torch.nn.Module):
        network_kind = "classifier"

        def __init__(self, width):
            super().__init__()
            self.body = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.BatchNorm1d(width), torch.nn.ReLU())
            self.register_forward_hook(lambda *args: None)

        def forward(self, x):
            return self.body(x)

    net = ToyJudge(4).eval()
    save_snapshot(tmp_path / "a.pkl", {"ema": net})
    data = load_snapshot(tmp_path / "a.pkl")
    assert same(data["ema"], net) and data["info"] == {} and data["loss_fn"] is None
    assert type(pickle.loads(pickle.dumps(net.train()))) is ToyJudge
    refuse(tmp_path / "a.pkl", "holds a classifier (ToyJudge), not a denoiser", kind="denoiser")


def test_data_that_cannot_be_read_again_is_not_written(toy, tmp_path):
    @persistent_class
    class ToyWrong(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

    with pytest.raises(TypeError, match="torch.nn.modules.linear.Linear"):
        save_snapshot(tmp_path / "a.pkl", {"ema": ToyWrong()})
    with pytest.raises(TypeError, match=r"info\['f'\]"):
        save_snapshot(tmp_path / "a.pkl", {"ema": toy.ToyNet(2), "info": {"f": len}})
    assert os.listdir(tmp_path) == []


def test_views_do_not_drag_their_storage_into_the_file(toy, tmp_path):
    layer = toy.ToyLayer(2)
    layer.weight.data = torch.randn(1000, 1000)[:2, :2]
    save_snapshot(tmp_path / "a.pkl", {"ema": layer})
    assert (tmp_path / "a.pkl").stat().st_size < 20000
    assert torch.equal(load_snapshot(tmp_path / "a.pkl")["ema"].weight, layer.weight)


def test_a_full_disk_leaves_the_previous_snapshot(toy, snapshot):
    before = snapshot.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limits[1]))
    try:
        with pytest.raises(OSError) as e:
            save_snapshot(snapshot, {"ema": toy.ToyPrecond(100)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert e.value.filename == str(snapshot)
    assert snapshot.read_bytes() == before and os.listdir(snapshot.parent) == [snapshot.name]


# ---- published files


@pytest.mark.parametrize("numpy_name", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_published_layout(net, tmp_path, monkeypatch, numpy_name):
    monkeypatch.setitem(sys.modules, numpy_name, types.ModuleType(numpy_name))

    def scalar():
        pass

    scalar.__module__, scalar.__qualname__ = numpy_name, "scalar"
    sys.modules[numpy_name].scalar = scalar

    half = copy.deepcopy(net).half()
    state = {
        "_init_kwargs": {
            "depth": Raw(scalar, np.dtype("i8"), b"\2" + b"\0" * 7),
            "model_type": "ToyNet",
            "sigma_max": Raw(scalar, np.dtype(">f4"), b"\x42\xa0\0\0"),
        },
        "added_later": {1},
    }
    number = Raw(scalar, np.dtype("f8"), np.float64(-1.2).tobytes())
    loss = persistent("EDMLoss", {"P_mean": 9, "_init_args": (), "_init_kwargs": EasyDict(P_mean=number)})
    path = write(
        tmp_path / "a.pkl",
        published(
            half,
            state,
            loss_fn=loss,
            augment_pipe=None,
            more=1,
            dataset_kwargs=EasyDict(class_name="training.dataset.X", resolution=8),
        ),
    )
    data = load_snapshot(path)
    ema = data.pop("ema")
    assert same(ema, half.float()) and ema.sigma_max == 80
    assert data == {
        "loss_fn": {"class_name": "EDMLoss", "P_mean": -1.2},
        "augment_pipe": None,
        "info": {},
        "dataset_kwargs": {"class_name": "training.dataset.X", "resolution": 8},
    }
    assert type(data["loss_fn"]["P_mean"]) is float and type(data["dataset_kwargs"]) is dict


def test_published_fixture(capsys):
    path = os.path.join(FIXTURES, "edm_snapshot.pkl")  # the source code in it raises when somebody runs it
    data = load_snapshot(path, kind="denoiser")
    with np.load(os.path.join(FIXTURES, "edm_snapshot_expected.npz")) as f:
        expected = f["denoised"]
        inputs = [torch.from_numpy(f[name]) for name in ("x", "sigma", "class_labels")]
    assert np.abs(data["ema"](*inputs).numpy() - expected).max() < 1e-4 * np.abs(expected).max()
    assert data["ema"].init_kwargs["img_resolution"] == 8 and data["ema"].sigma_max == float("inf")
    assert data["loss_fn"] == {"class_name": "EDMLoss"} and data["augment_pipe"]["p"] == 0.12
    assert data["dataset_kwargs"]["class_name"] == "training.dataset.ImageFolderDataset"
    assert capsys.readouterr().out == ""
    refuse(path, "RuntimeError: source code embedded in a snapshot was executed", trust_pickle=True)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s["_buffers"].pop("extra"), "its ToyPrecond lacks extra"),
        (lambda s: s["_parameters"].update(w=torch.nn.Parameter(torch.ones(2))), "its ToyPrecond has unknown w"),
        (lambda s: s["_buffers"].update(extra=torch.ones(3)), "has other sizes: extra [3] instead of [2]"),
        (lambda s: s["_init_kwargs"].update(depth=7), "its ToyPrecond lacks model.layers.2x.bias"),
        (lambda s: s["_init_kwargs"].update(depth=10**9), "a far larger network than is stored"),
        (lambda s: s.update(_init_args=(10**5,)), "a far larger network than is stored"),
        (lambda s: s["_init_kwargs"].update(unknown=7), "no ToyPrecond can be built from the recorded arguments"),
        (lambda s: s["_init_kwargs"].update(model_type="os"), "names a model of type 'os'"),
        (lambda s: s["_init_kwargs"].update(model_type="ToyPrecond"), "names 'ToyPrecond' as the model inside"),
        (lambda s: s["_init_kwargs"].update(model_type=[]), "names a model of type '[]'"),
        (lambda s: s.pop("_init_kwargs"), "does not record how its ToyPrecond was built"),
        (lambda s: s.update(_init_args=5), "does not record"),
        (lambda s: s.update(_modules=5), "malformed module ''"),
        (lambda s: s.update(_modules={"model": 5}), "no persistent object where one is expected"),
        (lambda s: s.update(_parameters={"w": "text"}), "malformed tensor"),
        (lambda s: s.update(_parameters={5: torch.ones(2)}), "malformed module"),
    ],
)
def test_other_contents_are_explained(net, tmp_path, change, message):
    state = module_state(net, _init_kwargs={"depth": 2})
    change(state)
    refuse(write(tmp_path / "a.pkl", {"ema": persistent("ToyPrecond", state)}), message)


def test_other_files_are_explained(net, snapshot, tmp_path):
    path = tmp_path / "a.pkl"
    refuse(tmp_path / "none.pkl", "No such file")
    refuse(write(path, b"PK\3\4zip"), "not a pickle")
    refuse(write(path, b""), "not a pickle")
    refuse(write(path, {"net": 1}), "no network under 'ema'")
    refuse(write(path, [1]), "no network under 'ema'")
    refuse(write(path, {"ema": None}), "no network under 'ema'")
    refuse(write(path, {"ema": persistent("ToyPrecond", {}, version=7)}), "version 7")
    write(path, {"ema": persistent("ToyLayer", {})})
    refuse(path, "holds a network of another kind (ToyLayer)", kind="denoiser")
    write(path, {"ema": persistent("Discriminator2", {}), "x": subprocess.run})
    message = refuse(path, "class 'Discriminator2'")  # this says more than the first forbidden name
    assert "ToyPrecond" in message
    refuse(write(path, published(net, info=[1])), "holds a list where settings are expected")
    refuse(write(path, published(net, loss_fn=persistent("L", {"_init_kwargs": 1}))), "where settings are expected")
    refuse(write(path, published(net, info=collections.Counter("a"))), "refused, it asks for 'collections.Counter'")
    refuse(write(path, published(net, info=collections.deque("a"))), "refused, it asks for 'collections.deque'")

    @persistent_class(embed_source=False)
    class ToySettings:
        pass

    refuse(write(path, {"ema": persistent("ToySettings", {})}), "class 'ToySettings'")
    refuse(snapshot, "holds a denoiser (ToyPrecond), not a discriminator", kind="discriminator")


# ---- broken files


def test_every_truncation_and_flip_is_noticed(snapshot):
    data = snapshot.read_bytes()
    for cut in [*range(0, len(data) - 33, len(data) // 40), *range(len(data) - 31, len(data))]:
        snapshot.write_bytes(data[:cut])
        refuse(snapshot, "pickle" if cut < len(data) - 32 else "checksum")
    for position in range(3, len(data), len(data) // 40):
        snapshot.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(UserError):
            load_snapshot(snapshot)


@pytest.fixture(scope="module")
def bare(toy):
    return pickle.dumps(
        published(
            toy.ToyPrecond(2, depth=1),
            loss_fn=persistent("L", {"_init_kwargs": {"a": 1}}),
            dataset_kwargs=EasyDict(a=np.float64(3)),
        )
    )


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(changes=st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=4))
def test_altered_pickles_load_or_are_explained(bare, tmp_path, changes):
    data = bytearray(bare)
    for position, value in changes:
        data[position % len(data)] = value
    path = write(tmp_path / "a.pkl", bytes(data))
    try:
        load_snapshot(path)
    except UserError as e:
        assert e.message.startswith(str(path)) and "\n" not in e.message


# ---- hostile files


class Key(Raw):
    def __hash__(self):
        return 0


def legacy_storage(description):
    """Return the bytes of a storage as torch writes them inside pickles, with `description` in place of its own."""
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    return b"".join([*parts, description, pickle.dumps([], 2)])


def gadgets(marker):
    """Yield pickles that create the file `marker` when pickle.load reads them."""
    touch = f"touch {marker}"
    call = Raw(os.system, touch)
    system, text = b"cposix\nsystem\n", f"S'{touch}'\n".encode()
    yield "plain, protocol 0", pickle.dumps(call, 0)
    yield "plain, protocol 4", pickle.dumps(call, 4)
    yield "INST", b"(" + text + b"iposix\nsystem\n."
    yield "OBJ", b"(" + system + text + b"o."
    yield "NEWOBJ", b"cbuiltins\nlist\ncbuiltins\nmap\n(" + system + b"(" + text + b"lt\x81\x85R."
    yield "BUILD", b"cfunctools\npartial\n(cbuiltins\nprint\ntR(" + system + b"(" + text + b"t}Ntb(tR."
    yield "dotted name", b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93" + text + b"\x85R."
    yield "eval", pickle.dumps(Raw(eval, f"__import__('os').system({touch!r})"))
    yield "partial", pickle.dumps(Raw(functools.partial(os.system, touch)))
    yield "network", pickle.dumps({"ema": call})
    yield "key", pickle.dumps({Key(os.system, touch): 1, "ema": 1})
    yield "settings", pickle.dumps({"ema": 1, "loss_fn": persistent("ToyNet", {"a": call})})
    yield "module", pickle.dumps({"ema": persistent("ToyPrecond", {"_modules": {"model": call}})})
    yield (
        "storage",
        pickle.dumps(
            {
                "ema": persistent(
                    "ToyLayer",
                    {
                        "_parameters": {
                            "weight": Raw(
                                torch._utils._rebuild_tensor_v2,
                                Raw(torch.storage._load_from_bytes, legacy_storage(pickle.dumps(call, 2))),
                                0,
                                (1,),
                                (1,),
                                False,
                                {},
                            )
                        },
                        "_buffers": {},
                        "_modules": {},
                        "_init_args": (1,),
                        "_init_kwargs": {},
                    },
                )
            }
        ),
    )
    yield "object array", pickle.dumps({"ema": 1, "info": np.array([call], dtype=object)})


@pytest.mark.parametrize("name", [name for name, _ in gadgets("")])
def test_gadgets_do_nothing(toy, tmp_path, name):
    marker = tmp_path / "ran"
    gadget = dict(gadgets(marker))[name]
    with contextlib.suppress(Exception):
        pickle.loads(gadget)
    assert marker.exists(), "not a gadget: pickle.load does not run it"
    marker.unlink()
    for data in (gadget, gadget + hashlib.sha256(gadget).digest()):
        refuse(write(tmp_path / "a.pkl", data), "malformed tensor" if name == "storage" else "refused, it asks for '")
    with pytest.raises(UserError):
        safe_pickle.load_cifar_batch(gadget, "data_batch_1")
    assert not marker.exists()


def test_embedded_source_runs_only_on_request(toy, net, tmp_path, capsys):
    marker = tmp_path / "ran"
    source = TOY + f"open({str(marker)!r}, 'w').close()\n"
    state = module_state(net)
    inner = module_state(net.model, _modules={"layers": net.model.layers})
    state["_modules"] = {"model": persistent("ToyNet", inner, source)}
    loss = persistent("ToyNet", {"_init_kwargs": {"a": 1}, **module_state(toy.ToyNet(1))}, source)
    path = write(tmp_path / "a.pkl", {"ema": persistent("ToyPrecond", state, source), "loss_fn": loss})
    assert type(load_snapshot(path)["ema"]) is toy.ToyPrecond and not marker.exists()
    assert capsys.readouterr().out == ""

    data = load_snapshot(path, trust_pickle=True, kind="denoiser")
    assert marker.exists() and capsys.readouterr().out.count("\n") == 1
    assert type(data["ema"]) is not toy.ToyPrecond and same(data["ema"], net)
    assert same(copy.deepcopy(data["ema"]), net) and data["loss_fn"]["class_name"] == "ToyNet"
    assert persistence._classes["ToyPrecond"] is toy.ToyPrecond
    refuse(path, "not a classifier", trust_pickle=True, kind="classifier")


def test_real_functions_stay_as_they_are(tmp_path):
    build = b"ctorch._utils\n_rebuild_tensor_v2\n}S'hacked'\nI1\nsb."
    pickle.loads(build)
    assert vars(torch._utils._rebuild_tensor_v2).pop("hacked") == 1  # pickle.load allows this
    refuse(write(tmp_path / "a.pkl", build), "corrupt pickle")
    assert not hasattr(torch._utils._rebuild_tensor_v2, "hacked") and not hasattr(safe_pickle.Record, "hacked")


# ---- finding snapshots


def test_find_snapshot(tmp_path):
    run = tmp_path / "00000-[x]"
    run.mkdir()
    for kimg in ("000009", "1000000", "200000"):
        (run / f"network-snapshot-{kimg}.pkl").touch()
    (run / "zzz.pkl").touch()
    newest = str(run / "network-snapshot-1000000.pkl")
    assert find_snapshot(run) == newest
    assert find_snapshot(glob.escape(str(run)) + "/network-snapshot-*.pkl") == newest
    assert find_snapshot(f"{tmp_path}/*/*-0*.pkl") == str(run / "network-snapshot-000009.pkl")
    assert find_snapshot(run / "zzz.pkl") == str(run / "zzz.pkl")
    assert find_snapshot(f"{tmp_path}/00000-*") == newest  # a glob of one run directory
    (tmp_path / "00000-other").mkdir()
    with pytest.raises(UserError, match="matches 2 folders"):
        find_snapshot(f"{tmp_path}/00000-*")
    assert find_snapshot("https://x.org/a*.pkl") == "https://x.org/a*.pkl"
    for missing, message in (
        (tmp_path, "no network-snapshot"),
        (tmp_path / "*.pkl", "no file matches"),
        (tmp_path / "a.pkl", "no such file"),
    ):
        with pytest.raises(UserError, match=message) as e:
            find_snapshot(missing)
        assert str(missing) in e.value.message
