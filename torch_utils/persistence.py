"""Networks that remember how they were built, and snapshots of them, which are pickles in EDM's layout.

Reading a snapshot runs nothing in it, unless the caller asks for that. See docs/formats.md, section "Network snapshot",
and docs/security.md.

Every script that reads snapshots has the option --trust_pickle, the only way to run the code in a file, and passes it
on as `trust_pickle`. So the messages of this module name that option.
"""

from __future__ import annotations

import copy
import functools
import glob
import hashlib
import inspect
import io
import os
import pickle
import re
import sys
import types
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch

from dnnlib import UserError, atomic_open, is_url, match_paths, read_bytes
from torch_utils import build_limits, distributed, portable, safe_pickle

__all__ = ["build_network", "find_snapshot", "load_snapshot", "persistent_class", "save_snapshot"]

_VERSION = 6
_classes: dict[str, type] = {}  # the persistent classes of this program, by name
_sources: dict[str, str] = {}  # source code by module, as it was when the module was imported
_executed: set[str] = set()  # modules made from the source code in trusted snapshots; their classes are not ours
_EDM2 = "Precond"  # the network in EDM2's snapshots; our class of this name is abstract
_MAX_NAME = 300  # characters of a tensor's name; real ones have up to 80
_OBJECT = "torch_utils.persistence._reconstruct_persistent_obj"
_WRITTEN = safe_pickle.TENSORS | safe_pickle.CONTAINERS | {_OBJECT}
_ALLOWED = _WRITTEN | safe_pickle.MODULES


def _module_source(module_name: str) -> str:
    # Read the source when the class is defined, not when it is saved: somebody may edit the file during a long run.
    # There is one string object per module, so that a pickle stores it once.
    if module_name not in _sources:
        _sources[module_name] = inspect.getsource(sys.modules[module_name])
    return _sources[module_name]


def persistent_class(cls: type | None = None, /, *, embed_source: bool = True) -> Any:
    """Decorate a class so that its objects record their constructor arguments and pickle in EDM's layout.

    Objects gain `init_args` and `init_kwargs`, copies of the constructor's arguments. `load_snapshot` finds the class
    by its name. With `embed_source`, pickles carry the source code of the defining module, so that other programs can
    rebuild the object. Without it (`@persistent_class(embed_source=False)`), they carry only tensors and constructor
    arguments. Subclasses need the decorator too. Raises TypeError when a class of another module has the same name.
    """
    if cls is None:
        return functools.partial(persistent_class, embed_source=embed_source)
    if "_persistent_source" in vars(cls):
        return cls
    if cls.__module__ not in _executed:
        _register(cls)
    cls._persistent_source = _module_source(cls.__module__) if embed_source else ""
    cls.__init__ = _recording(cls, cls.__init__)
    cls.__reduce__ = _reduce
    cls.__deepcopy__ = _deepcopy
    cls.init_args = property(lambda self: copy.deepcopy(self._init_args))
    cls.init_kwargs = property(lambda self: copy.deepcopy(self._init_kwargs))
    return cls


def _register(cls: type) -> None:
    known = _classes.setdefault(cls.__name__, cls)
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise TypeError(
            f"persistent class {cls.__name__!r} of {cls.__module__} is already defined in {known.__module__}"
        )
    _classes[cls.__name__] = cls  # a reloaded module replaces its classes


def _recording(cls: type, init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if type(self) is cls:  # an object of a subclass records the arguments of the subclass
            vars(self).update(_init_args=copy.deepcopy(args), _init_kwargs=copy.deepcopy(kwargs))
        init(self, *args, **kwargs)

    return __init__


def _state(self: Any) -> dict[str, Any]:
    return dict(self.__getstate__()) if isinstance(self, torch.nn.Module) else dict(vars(self))


def _restore(cls: type, state: dict[str, Any]) -> Any:
    obj = cls.__new__(cls)
    if isinstance(obj, torch.nn.Module):
        obj.__setstate__(state)
    else:
        vars(obj).update(state)
    return obj


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    result = memo[id(self)] = type(self).__new__(type(self))
    vars(result).update(copy.deepcopy(_state(self), memo))
    return result


def _reduce(self: Any) -> tuple[Callable[..., Any], tuple[dict[str, Any]]]:
    cls = type(self)
    if "_persistent_source" not in vars(cls):
        raise TypeError(f"{cls.__name__} is not decorated with @persistent_class, only a class it derives from is")
    state = _state(self)
    if not cls._persistent_source and isinstance(self, torch.nn.Module):
        # Only this program reads such a pickle. Tensors by full name allow any torch layers inside.
        state = {
            "training": self.training,
            "_parameters": dict(self.state_dict()),
            "_buffers": {},
            "_modules": {},
            "_init_args": self._init_args,
            "_init_kwargs": self._init_kwargs,
        }
    meta = {
        "type": "class",
        "version": _VERSION,
        "module_src": cls._persistent_source,
        "class_name": cls.__name__,
        "state": state,
    }
    return _reconstruct_persistent_obj, (meta,)


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> Any:
    """Rebuild an object of one of our classes when pickle.load reads what this program has written."""
    cls = _classes.get(meta["class_name"])
    if cls is None:
        raise UserError(f"{meta['class_name']!r} is not a class of this program")
    state = meta["state"]
    if cls._persistent_source or not issubclass(cls, torch.nn.Module):
        return _restore(cls, state)
    obj = cls(*state["_init_args"], **state["_init_kwargs"]).train(state["training"])
    obj.load_state_dict(state["_parameters"])
    return obj


def save_snapshot(path: str | os.PathLike[str], data: dict[str, Any]) -> None:
    """Write a snapshot. `data` holds networks, which are saved on the CPU and in eval mode, and plain data.

    NumPy numbers and arrays are stored as numbers and lists. The file appears under `path` only when it is complete,
    with its SHA-256 after the last opcode. Raises OSError when the disk refuses, and TypeError for data that
    `load_snapshot` would refuse.
    """
    payload = pickle.dumps({key: _savable(value, key) for key, value in data.items()}, protocol=4)
    refused = safe_pickle.parse(payload, str(path), _WRITTEN)[1]
    if refused:
        raise TypeError(f"the snapshot would hold a {refused[0]}, which ours do not")
    with atomic_open(path) as file:
        file.write(payload)
        file.write(hashlib.sha256(payload).digest())


def _savable(value: Any, where: str) -> Any:
    if isinstance(value, torch.nn.Module):
        return copy.deepcopy(value).cpu().eval().requires_grad_(False)
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, dict):
        return {_savable(k, f"a key of {where}"): _savable(v, f"{where}[{k!r}]") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_savable(v, f"{where}[{i}]") for i, v in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    raise TypeError(f"{where} of the snapshot is a {type(value).__name__}, neither a network nor plain data")


def find_snapshot(pattern: str | os.PathLike[str]) -> str:
    """Return the path of the snapshot that `pattern` means.

    `pattern` is a file, a URL, a run directory, or a glob of one, such as `runs/00000-*` or
    `dir/network-snapshot-*.pkl`, since shells do not expand a glob inside an option. Of several files, the one with the
    highest kimg number is chosen. A folder without snapshots may be one that export.py has written (docs/export.md).
    Raises UserError when nothing matches, or several run directories or files in several folders do.
    """
    pattern = os.fspath(pattern)
    if is_url(pattern) or os.path.isfile(pattern):
        return pattern
    folders = [path for path in match_paths(pattern) if os.path.isdir(path)]
    files = [] if folders else [path for path in match_paths(pattern) if os.path.isfile(path)]
    places = folders or [*dict.fromkeys(map(os.path.dirname, files))]
    if len(places) > 1:
        found = "" if folders else "files in "
        raise UserError(f"{pattern}: matches {found}{len(places)} folders, {places[0]} and others; name one of them")
    if folders:
        found = match_paths(os.path.join(folders[0], "network-snapshot-*.pkl"))
        weights = os.path.join(folders[0], portable.WEIGHTS)
        found = found or ([weights] if os.path.isfile(weights) else [])
        found = found or match_paths(os.path.join(folders[0], "netG_*.pth"))  # RDUOT's (training/published_ddgan.py)
        missing = "no network-snapshot-*.pkl in this folder"
    else:
        found = files
        missing = "no file matches" if glob.has_magic(pattern) else "no such file"
    if not found:
        raise UserError(f"{pattern}: {missing}")
    return max(found, key=lambda path: (_kimg(path), path))


def _kimg(path: str) -> float:
    match = re.search(r"([0-9]+(?:\.[0-9]+)?)\.(?:pkl|pth)$", path)
    return float(match[1]) if match else -1.0


def load_snapshot(
    path_or_url: str | os.PathLike[str], trust_pickle: bool = False, kind: str | tuple[str, ...] | None = None
) -> dict[str, Any]:
    """Return the contents of a snapshot, ours, EDM's or a `.safetensors` file, without running anything in it.

    The result is a dict. `ema` is an object of our class with the recorded name, in eval mode, without gradients, on
    the CPU. `info` and `dataset_kwargs` are dicts. `loss_fn` and `augment_pipe` are dicts with a `class_name`, or None.
    `kind` (denoiser, classifier, discriminator, generator, or several of them) refuses networks of any other kind.
    `trust_pickle` instead runs the code in the file, which may do anything, and prints a warning. Another
    warning is about snapshots of less than one kimg.
    Raises UserError that names the file and says what is wrong: it is missing, truncated or corrupt, holds a network of
    another kind, or asks for something that no snapshot needs.
    """
    name = os.fspath(path_or_url)
    if portable.is_portable(name):
        return _load_portable(name, kind)
    data = read_bytes(name)
    if trust_pickle:
        end = safe_pickle.end_of_pickle(data, name)
    else:
        tree, refused, end = safe_pickle.parse(data, name, _ALLOWED)
    if len(data) > end and data[end:] != hashlib.sha256(memoryview(data)[:end]).digest():
        raise UserError(f"{name}: corrupt, its checksum does not match")
    if trust_pickle:
        return _load_trusted(data, name, kind)
    hint = "; if you trust whoever made it, --trust_pickle runs the code in it"
    if not isinstance(tree, dict) or getattr(type(tree.get("ema")), "path", None) != _OBJECT:
        safe_pickle.refuse(refused, name, hint)
        raise UserError(f"{name}: not a network snapshot, it holds no network under 'ema'")
    reader = _Reader(name, len(data))
    cls = reader.network_class(tree["ema"], kind)  # this error explains more than the name of a refused global
    safe_pickle.refuse(refused, name, hint)
    return reader.contents(tree, lambda: reader.build(cls, tree["ema"]))


def build_network(name: str, cls: type, kwargs: dict[str, Any], tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Return a network in eval mode with exactly these tensors. UserError that names the file: they do not fit."""
    return _Reader(name, sys.maxsize).construct(cls, (), kwargs, tensors)


def _load_portable(name: str, kind: str | tuple[str, ...] | None) -> dict[str, Any]:
    config, tensors = portable.read(name)
    reader = _Reader(name, sys.maxsize)
    cls = reader.named_class(config["class_name"], kind)
    args, kwargs = tuple(config["init_args"]), config["init_kwargs"]
    return reader.contents(config, lambda: reader.construct(cls, args, kwargs, tensors))


def _check_kind(name: str, cls: type, kind: str | tuple[str, ...] | None) -> None:
    found = getattr(_classes.get(cls.__name__, cls), "network_kind", None)
    wanted = (kind,) if isinstance(kind, str) else kind
    if wanted is not None and found not in wanted and not (found is None and cls.__module__ in _executed):
        raise UserError(
            f"{name}: holds a {found or 'network of another kind'} ({cls.__name__}), not a {' or '.join(wanted)}"
        )


class _Reader(safe_pickle.Resolver):
    """Builds persistent objects from the records of one snapshot."""

    def _meta(self, record: Any) -> tuple[str, dict[str, Any]]:
        # Return the class name and the state of a persistent object.
        try:
            if type(record).path != _OBJECT:
                raise TypeError(type(record).path)
            (meta,) = record.args
            version, class_name, state = meta["version"], meta["class_name"], meta["state"]
            if meta["type"] != "class" or type(version) is not int:
                raise TypeError("type or version")  # not shown: they may be of any size
            if not 1 <= version <= _VERSION:
                raise ValueError(f"version {version}")
            if not isinstance(class_name, str) or not isinstance(state, dict):
                raise TypeError("class_name or state")
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise self.fail(f"holds no persistent object where one is expected ({type(e).__name__}: {e})") from e
        return class_name, state

    def network_class(self, record: Any, kind: str | tuple[str, ...] | None) -> type:
        """Return our class with the recorded name. Raise UserError when there is none or its kind is wrong."""
        return self.named_class(self._meta(record)[0], kind)

    def named_class(self, class_name: str, kind: str | tuple[str, ...] | None) -> type:
        """Return our class of this name. Raise UserError when there is none or its kind is wrong."""
        cls = _classes.get(class_name)
        if class_name == _EDM2:
            raise self.fail("holds a network of EDM2 or autoguidance ('Precond'); this program has those of EDM")
        if cls is None or not issubclass(cls, torch.nn.Module):
            raise self.fail(
                f"holds a network of class {class_name[:100]!r}, which this program does not have; it has "
                f"{', '.join(sorted(n for n, c in _classes.items() if hasattr(c, 'network_kind')))}"
            )
        _check_kind(self._name, cls, kind)
        return cls

    def build(self, cls: type, record: Any) -> torch.nn.Module:
        """Return a network that is built from its recorded constructor arguments and tensors."""
        state = self._meta(record)[1]
        args, kwargs = self.plain(state.get("_init_args", ())), self.plain(state.get("_init_kwargs"))
        if not isinstance(args, tuple) or not isinstance(kwargs, dict):
            raise self.fail(f"does not record how its {cls.__name__} was built")
        tensors: dict[str, torch.Tensor] = {}
        buffers: set[str] = set()  # names of the tensors that are buffers
        self._collect(record, "", tensors, buffers)
        return self.construct(cls, args, kwargs, tensors, buffers)

    def construct(
        self,
        cls: type,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: dict[str, torch.Tensor],
        buffers: Collection[str] = (),
    ) -> torch.nn.Module:
        """Return a network that is built from constructor arguments and takes exactly the tensors, given by full name.

        `buffers` names the tensors that are buffers.
        """
        inner = kwargs.get("model_type")  # the class of the network inside a preconditioner, by name
        if inner is not None and hasattr(_classes.get(str(inner), torch.nn.Module), "network_kind"):
            raise self.fail(f"names {inner!r} as the model inside its {cls.__name__}")
        if inner is not None and str(inner) not in _classes:
            raise self.fail(f"names a model of type {str(inner)[:100]!r}, which this program does not have")
        try:
            build_limits.check_arguments((args, kwargs), tensors.values())
            # Numbers together may ask for any size. Building creates a few times as many values as it keeps.
            with build_limits.ValueLimit(4_000_000 + 16 * sum(tensor.numel() for tensor in tensors.values())):
                net = cls(*args, **kwargs).eval().requires_grad_(False)
        except Exception as e:  # constructors check little, and the arguments come from a stranger
            raise self.fail(f"no {cls.__name__} can be built from the recorded arguments ({e})") from e
        _rename_buffers(net, tensors, set(buffers))
        self._load(net, tensors)
        return net

    def contents(self, tree: dict[str, Any], build: Callable[[], torch.nn.Module]) -> dict[str, Any]:
        """Return the contents of a snapshot, whose network `build` makes, after a look at what they say about it."""
        info = self.settings(tree.get("info")) or {}
        names = info.get("class_names")
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise self.fail("its class_names are not a list of strings")
        nimg = info.get("nimg")
        if isinstance(nimg, int) and nimg < 1000:
            distributed.print0(f"Warning: {self._name} has seen only {nimg} images, so it has learned nearly nothing")
        net = build()
        if names is not None and len(names) < (getattr(net, "label_dim", 0) or 0):
            raise self.fail(f"it has {net.label_dim} classes, but {len(names)} class_names")
        return {
            "ema": net,
            "info": getattr(net, "snapshot_info", dict)() | info,  # published classifiers hold T as a parameter
            "dataset_kwargs": self.settings(tree.get("dataset_kwargs")) or {},
            "loss_fn": self.settings(tree.get("loss_fn")),
            "augment_pipe": self.settings(tree.get("augment_pipe")),
        }

    def _collect(self, record: Any, prefix: str, tensors: dict[str, torch.Tensor], buffers: set[str]) -> None:
        self.spend(prefix.count("."))
        path = getattr(type(record), "path", None)
        if path and safe_pickle.on_list(path, safe_pickle.MODULES) and isinstance(record.state, dict):
            state = record.state
        else:
            state = self._meta(record)[1]
        try:
            named = {**state["_parameters"], **state["_buffers"]}
            left_out = state.get("_non_persistent_buffers_set", set())
            if not isinstance(left_out, set):
                raise TypeError("buffers that are left out")
            # A small file may hold the same module under very many names.
            self.spend(0, len(named))
            if max(map(len, (*named, *state["_modules"])), default=0) + len(prefix) > _MAX_NAME:
                raise ValueError(f"a name of over {_MAX_NAME} characters")
            for name, tensor in named.items():
                if tensor is not None and name not in left_out:
                    tensors[prefix + name] = self.tensor(tensor)
            buffers.update(prefix + name for name in state["_buffers"])
            children = {prefix + name + ".": child for name, child in state["_modules"].items() if child is not None}
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise self.fail(f"malformed module {prefix.rstrip('.')!r} ({type(e).__name__}: {e})") from e
        for name, child in children.items():
            self._collect(child, name, tensors, buffers)

    def _load(self, net: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        expected = net.state_dict()
        sizes = [
            f"{name} {list(tensors[name].shape)} instead of {list(expected[name].shape)}"
            for name in expected.keys() & tensors.keys()
            if tensors[name].shape != expected[name].shape
        ]
        for what, names in {
            "lacks": expected.keys() - tensors.keys(),
            "has unknown": tensors.keys() - expected.keys(),
            "has other sizes:": sizes,
        }.items():
            if names:
                listed = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
                raise self.fail(f"its {type(net).__name__} {what} {listed}")
        net.load_state_dict(tensors)

    def settings(self, value: Any) -> dict[str, Any] | None:
        """Return settings as a plain dict. Those of an object, such as a loss, include its `class_name`."""
        class_name = None
        if getattr(type(value), "path", None) == _OBJECT:
            class_name, state = self._meta(value)
            value = state.get("_init_kwargs", {})
        value = self.plain(value)
        if not (value is None or isinstance(value, dict)):
            raise self.fail(f"holds a {type(value).__name__} where settings are expected")
        return value if class_name is None else {"class_name": class_name, **(value or {})}


def _rename_buffers(net: torch.nn.Module, tensors: dict[str, torch.Tensor], buffers: set[str]) -> None:
    """Rename buffers that other versions call by another name, if there is only one way to do so.

    That is the case when a module lacks exactly one buffer and has exactly one unknown buffer of the same shape.
    """
    expected = net.state_dict()
    ours = {name for name, _ in net.named_buffers() if name in expected and name not in tensors}
    theirs = buffers & (tensors.keys() - expected.keys())
    for name in ours:
        prefix = name.rpartition(".")[0]
        missing = [n for n in ours if n.rpartition(".")[0] == prefix]
        unknown = [n for n in theirs if n.rpartition(".")[0] == prefix]
        if len(missing) == len(unknown) == 1 and tensors[unknown[0]].shape == expected[name].shape:
            tensors[name] = tensors.pop(unknown[0])


class _TrustedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" == _OBJECT:
            return _execute_source
        if f"{module}.{name}" == "torch.storage._load_from_bytes":  # load tensors of a GPU on any machine
            return lambda data: torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
        return super().find_class(module, name)


def _execute_source(meta: dict[str, Any]) -> Any:
    source = meta["module_src"]
    if not source:
        return _reconstruct_persistent_obj(meta)
    name = "snapshot_source_" + hashlib.sha256(source.encode()).hexdigest()[:16]
    if name not in _executed:
        module = types.ModuleType(name)
        _executed.add(name)
        _sources[name] = source
        sys.modules[name] = module
        try:
            exec(compile(source, f"<{name}>", "exec"), vars(module))
        except BaseException:
            _executed.discard(name)
            del sys.modules[name]
            raise
    cls = getattr(sys.modules[name], meta["class_name"])
    return _restore(cls, meta["state"])


def _load_trusted(data: bytes, name: str, kind: str | tuple[str, ...] | None) -> dict[str, Any]:
    distributed.print0(f"Warning: --trust_pickle: running the code inside {name}")
    try:
        tree = _TrustedUnpickler(io.BytesIO(data)).load()
        net = tree["ema"].eval().requires_grad_(False)
    except Exception as e:
        raise UserError(f"{name}: the code in it fails here ({type(e).__name__}: {e})") from e
    _check_kind(name, type(net), kind)

    def settings(obj: Any) -> Any:
        if obj is None or isinstance(obj, dict):
            return obj
        return {"class_name": type(obj).__name__, **getattr(obj, "_init_kwargs", {})}

    return {
        "ema": net,
        "info": tree.get("info") or {},
        "dataset_kwargs": dict(tree.get("dataset_kwargs") or {}),
        "loss_fn": settings(tree.get("loss_fn")),
        "augment_pipe": settings(tree.get("augment_pipe")),
    }
