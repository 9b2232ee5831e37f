"""Checkpoints of TDSM, SBDC, RDUOT and DDGAN in their published layouts, made of the numbers in the fixtures."""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import pickle
import sys
import types

import numpy as np
import torch

from tests.support.paths import FIXTURES
from tests.support.pickles import persistent
from training import networks_published

# Where the authors' plain classes are; ours have other names.
PLAIN = {"ResNet": "ResNet_cond", "BasicBlock": "BasicBlock", "ConvNet": "CNN_cond"}
KEPT = (
    "training _parameters _buffers _non_persistent_buffers_set _modules _init_args _init_kwargs "
    "_backward_hooks _is_full_backward_hook _forward_hooks"
).split()


def fixture(name):
    """Return the arrays, the configuration and the parameters, float32, of a published network."""
    arrays = dict(np.load(FIXTURES / f"published_{name}.npz"))
    config = json.loads(str(arrays.pop("config")))
    tensors = {key: torch.from_numpy(value) for key, value in arrays.items() if value.dtype.kind != "U"}
    state = {key[len("state/") :]: value.float() for key, value in tensors.items() if key.startswith("state/")}
    return {key: value for key, value in tensors.items() if not key.startswith("state/")}, config, state


def build(name):
    """Return the arrays of a fixture and our network with its parameters."""
    arrays, config, state = fixture(name)
    net = getattr(networks_published, config.pop("class_name").rpartition(".")[2])(**config)
    net.load_state_dict({key: value.to(net.state_dict()[key].dtype) for key, value in state.items()})
    return arrays, net.eval().requires_grad_(False)


@contextlib.contextmanager
def authors():
    """Have the authors' module of plain classes at hand, in which pickle looks them up."""
    module = types.ModuleType("training.resnet_cond")
    for name in PLAIN.values():
        setattr(module, name, type(name, (torch.nn.Module,), {"__module__": module.__name__}))
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


def recorded(module, plain):
    """Return a module as the authors' programs pickle it: with its own class if that is plain, else as persistent."""
    children = {name: recorded(child, plain) for name, child in module._modules.items()}
    if hasattr(module, "init_args"):
        state = {key: value for key, value in module.__getstate__().items() if key in KEPT}
        return persistent(type(module).__name__, {**state, "_modules": children})
    name = type(module).__name__
    cls = getattr(plain, PLAIN[name]) if name in PLAIN else type(module)
    found = cls.__new__(cls)
    vars(found).update(module.__getstate__(), _modules=children)
    return found


def write_snapshot(path, net, **others):
    """Write a snapshot as TDSM's and SBDC's training does."""
    settings = dict(loss_fn=persistent("EDMLoss_classifier", {"_init_kwargs": {"noise_type": "sym"}}))
    settings |= dict(augment_pipe=persistent("AugmentPipe", {"_init_kwargs": {"p": 0.12, "xflip": 1e8}}))
    settings |= dict(dataset_kwargs={"class_name": "training.dataset.ImageFolderDataset", "path": "/data/x.zip"})
    with authors() as plain:
        path.write_bytes(pickle.dumps({"ema": recorded(net, plain), **settings, **others}))
    return path


def parallel(state):
    """Return a state dict as PyTorch's modules have it, with the prefix of DataParallel."""
    found = collections.OrderedDict((f"module.{name}", value) for name, value in state.items())
    found._metadata = collections.OrderedDict({"": {"version": 1}})
    return found


def content(generator, potential=None, **args):
    """Return what RDUOT and DDGAN write to content.pth."""
    tree = dict(epoch=1200, global_step=9, args=argparse.Namespace(**args), netG_dict=parallel(generator))
    if potential is not None:
        tree["netD_dict"] = parallel(potential)
    optimizer = {"state": {0: {"exp_avg": torch.ones(3), "step": 9}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    return tree | dict(optimizerG=optimizer, schedulerG={"T_max": 1200, "base_lrs": [1e-4]})
