"""Snapshots whose numbers, names and references ask for more than is stored, read in a process with little memory."""

import pickle

import pytest
import torch

import training.networks
import training.networks_ddgan
from tests.support.forks import run_apart
from tests.support.pickles import persistent
from torch_utils import build_limits
from torch_utils.persistence import load_snapshot, save_snapshot

SMALL = dict(img_resolution=8, img_channels=1, model_channels=32, channel_mult=[1], num_blocks=1, attn_resolutions=[])


def refused(path, words):
    status, err = run_apart(lambda: load_snapshot(path))
    assert b"UserError" in err and words in err, (status, err[-300:])


@pytest.mark.parametrize(
    "build, kwargs",
    [
        (training.networks.iDDPMPrecond, dict(M=100_000_000)),
        (training.networks.iDDPMPrecond, dict(M=3_000_000)),
        (training.networks.EDMPrecond, dict(model_type="SongUNet", channel_mult_noise=20_000_000)),
        (training.networks.EDMPrecond, dict(model_type="SongUNet", model_channels=90_000, channel_mult_noise=90_000)),
        (training.networks.EDMPrecond, dict(model_type="SongUNet", model_channels=2, channel_mult_noise=1e10)),
        (training.networks.EDMPrecond, dict(model_type="SongUNet", resample_filter=[1] * 100_000, channel_mult=[1, 1])),
        (training.networks_ddgan.DDGANGenerator, dict(n_mlp=30_000_000)),
        (training.networks_ddgan.DDGANGenerator, dict(n_mlp=90_000)),
    ],
)
def test_numbers_that_ask_for_time_and_memory(build, kwargs, tmp_path):
    path = tmp_path / "a.pkl"
    net = build(**SMALL)
    net._init_kwargs.update(kwargs)
    save_snapshot(path, {"ema": net})
    refused(path, b"items)" if "resample_filter" in kwargs else b"far larger network than is stored)")


def test_numbers_of_real_networks(tmp_path):
    net = training.networks.iDDPMPrecond(label_dim=30_000, M=4000, C_1=1e-9, **SMALL)
    save_snapshot(tmp_path / "a.pkl", {"ema": net})
    assert load_snapshot(tmp_path / "a.pkl")["ema"].M == 4000
    wide = torch.empty(1, 10**6)
    build_limits.check_arguments(dict(label_dim=10**6, sigma_max=float("inf"), beta=1e9, n=[1, (2, {"a": 3})]), [wide])
    for value in (2 * 10**6, -(10**8), [[10**8]], {"a": (10**8,)}, [0] * 101):
        with pytest.raises(ValueError, match="far larger|101 items"):
            build_limits.check_arguments((value,), [wide, torch.empty(10**9, 0)])


def doubled(levels):
    value = []
    for _ in range(levels):
        value = [value, value]
    return value


def module(**contents):
    return persistent("EDMPrecond", dict(_parameters={}, _buffers={}, _modules={}) | contents)


def chain(levels, name):
    inner = module(_parameters={str(i): torch.ones(()) for i in range(300)})
    for _ in range(levels):
        inner = module(_modules={name: inner})
    return inner


def shared(count):
    inner = module(_parameters=dict.fromkeys(map(str, range(count)), None))
    return module(_modules=dict.fromkeys(map(str, range(count)), inner))


@pytest.mark.parametrize(
    "record, words",
    [
        (lambda: chain(60, "a" * 90_000), b"300 characters"),
        (lambda: shared(5000), b"repeat themselves"),
        (lambda: persistent("EDMPrecond", {}, version=doubled(60)), b"type or version"),
        (lambda: module(_buffers=dict.fromkeys(map(str, range(9)), 5), _non_persistent_buffers_set=[]), b"left out"),
    ],
)
def test_names_and_modules_do_not_multiply(record, words, tmp_path):
    path, kwargs = tmp_path / "a.pkl", dict(_init_args=(), _init_kwargs=SMALL)
    ema = record()
    ema.args[0]["state"].update(kwargs)
    path.write_bytes(pickle.dumps({"ema": ema}))
    refused(path, words)
