"""Small networks, and pickles of them as other programs make them."""

import importlib.util
import os
import pickle
import sys

from torch_utils import persistence

TOY = """
import torch
from torch_utils.persistence import persistent_class

@persistent_class
class ToyLayer(torch.nn.Module):
    def __init__(self, width, bias=True):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(width, width))
        self.bias = torch.nn.Parameter(torch.randn(width)) if bias else None
        self.register_buffer("gain", torch.full([], 0.5))
        self.register_buffer("cache", torch.zeros(3), persistent=False)

    def forward(self, x):
        x = x @ self.weight.t() * self.gain
        return x if self.bias is None else x + self.bias

@persistent_class
class ToyNet(torch.nn.Module):
    def __init__(self, width, depth=2):
        super().__init__()
        self.layers = torch.nn.ModuleDict({f"{i}x": ToyLayer(width, bias=i > 0) for i in range(depth)})

    def forward(self, x):
        for layer in self.layers.values():
            x = torch.tanh(layer(x))
        return x

@persistent_class
class ToyPrecond(torch.nn.Module):
    network_kind = "denoiser"

    def __init__(self, width, model_type="ToyNet", sigma_max=float("inf"), **model_kwargs):
        super().__init__()
        self.sigma_max = sigma_max
        self.register_buffer("extra", torch.zeros(2))
        self.model = globals()[model_type](width, **model_kwargs)

    def forward(self, x):
        return x - self.model(x)
"""


def import_source(name, source, folder):
    path = os.path.join(folder, f"{name}.py")
    with open(path, "w") as f:
        f.write(source)
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Raw:
    """An object that pickles as a call of a function, like the objects of other programs."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def persistent(class_name, state, source="raise RuntimeError('executed')", **changes):
    meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name, "state": state}
    return Raw(persistence._reconstruct_persistent_obj, {**meta, **changes})


def module_state(module, **changes):
    state = module.__getstate__()
    state["_modules"] = {
        name: persistent(type(child).__name__, module_state(child)) if hasattr(child, "init_args") else child
        for name, child in module._modules.items()
    }
    return {**state, **changes}


def published(net, state=None, **others):
    """Return a snapshot as another program writes it: without a checksum and without plain settings."""
    return {"ema": persistent(type(net).__name__, {**module_state(net), **(state or {})}), **others}


def write(path, obj, protocol=4):
    path.write_bytes(obj if isinstance(obj, bytes) else pickle.dumps(obj, protocol))
    return path
