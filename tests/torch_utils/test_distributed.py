"""Devices and processes: one process here, two in subprocesses."""

import json
import os
import socket
import subprocess
import sys

import click
import pytest
import torch

from tests.support.paths import ROOT
from torch_utils import distributed


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    distributed.shutdown()
    yield
    distributed.shutdown()


def test_one_process(capsys):
    assert distributed.init("cpu") == torch.device("cpu")
    assert distributed.init("cuda") == torch.device("cpu")  # the first call counts
    assert (distributed.get_rank(), distributed.get_world_size()) == (0, 1)
    assert not torch.distributed.is_initialized()
    x = torch.ones(2)
    assert distributed.all_reduce_sum(x) is x and distributed.broadcast_object("a") == "a"
    assert distributed.all_gather_object(3) == [3]
    distributed.barrier()
    distributed.print0("a", "b", sep="-")
    assert capsys.readouterr().out == "a-b\n"


def test_auto_chooses_an_available_device(monkeypatch):
    for cuda, mps, expected in ((False, False, "cpu"), (False, True, "mps"), (True, True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert distributed._choose_device("auto", 0, 1).type == expected
    assert distributed._choose_device("cuda", 1, 2) == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed._choose_device("auto", 0, 2).type == "cpu"  # MPS runs one process


@pytest.mark.parametrize("cuda, words", [(None, "it is built for CPUs"), ("13.0", "CUDA 13.0 may need a newer driver")])
def test_a_gpu_that_pytorch_does_not_find_is_mentioned(monkeypatch, capsys, tmp_path, cuda, words):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(distributed, "_NVIDIA_DRIVER", str(tmp_path / "none"))
    assert distributed._choose_device("auto", 0, 2).type == "cpu" and capsys.readouterr().out == ""
    monkeypatch.setattr(distributed, "_NVIDIA_DRIVER", str(tmp_path))
    assert distributed._choose_device("auto", 0, 2).type == "cpu" and words in capsys.readouterr().out
    distributed._choose_device("cpu", 0, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    distributed._choose_device("auto", 0, 2)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "name, cuda, mps, processes, message",
    [
        ("cuda", False, False, 1, "no CUDA device"),
        ("mps", False, False, 1, "no MPS device"),
        ("mps", False, True, 2, "one process"),
        ("cuda", True, False, 4, "process 3 of this machine has no GPU, there are 2"),
        ("gpu", True, True, 1, "choose auto, cpu, cuda or mps"),
    ],
)
def test_missing_devices_are_usage_errors(monkeypatch, name, cuda, mps, processes, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    with pytest.raises(click.UsageError, match=message) as e:
        distributed._choose_device(name, processes - 1, processes)
    assert f"--device={name}: " in e.value.message


PROGRAM = """
import json, sys, time
import torch
import dnnlib, dnnlib.cli
from torch_utils import distributed as d
from torch_utils.training_stats import Stats

before = d.get_rank(), d.get_world_size()
device = d.init("cpu")
rank = d.get_rank()
x = torch.full([2], rank + 1.0)
result = dict(before=before, backend=torch.distributed.get_backend(), rank=rank, device=str(device),
              broadcast=d.broadcast_object({"rank": rank}), gathered=d.all_gather_object([rank]),
              summed=d.all_reduce_sum(x).tolist(), x=x.tolist())
table = torch.arange(10.0).reshape(5, 2)
own = torch.zeros(len(d.share(5)), 2)
d.rows_from_rank0(table if rank == 0 else None, own, 5)
whole = d.rows_to_rank0(own, 5)
result.update(own=own.tolist(), whole=whole is not None and torch.equal(whole, table), made=d.from_rank0(lambda: rank))
d.barrier()
d.print0("only once")
stats = Stats(device)
stats.add("a", torch.arange(3.0) + 10 * rank)
if rank == 0:
    stats.add("b", 1)
try:
    stats.reduce()
except RuntimeError as e:
    result["error"] = str(e)
stats = Stats(device)
stats.add("a", torch.arange(3.0) + 10 * rank)
result["stats"] = stats.reduce()
json.dump(result, open(sys.argv[1] + str(rank), "w"))
if rank == 0:
    d.shutdown()
else:  # As NCCL does, the group waits for the others, which never come.
    torch.distributed.destroy_process_group = lambda: time.sleep(1000)

    @dnnlib.cli.click.command(cls=dnnlib.cli.Command)
    def main():
        try:
            print("begins")
            raise d._LoneError("the disk of process 1 is full")
        finally:
            d.shutdown()

    sys.argv = sys.argv[:1]
    main()
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    """The second one ends by an error, at once: it does not wait for the first, which may be waiting for it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = []
    for rank in range(2):
        env = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, tmp_path / "rank"],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=120) for process in processes]
    assert outputs == [("only once\n", ""), ("begins\n", "Error: the disk of process 1 is full\n")]
    assert [process.returncode for process in processes] == [0, 1]
    for rank in range(2):
        result = json.loads((tmp_path / f"rank{rank}").read_text())
        assert result.pop("before") == [rank, 2] and result.pop("rank") == rank
        assert result.pop("x") == [rank + 1.0] * 2  # the argument does not change
        assert result.pop("own") == [[[0, 1], [2, 3]], [[4, 5], [6, 7], [8, 9]]][rank]
        assert result.pop("whole") == (rank == 0) and result.pop("made") == 0
        assert "different statistics" in result.pop("error")
        assert result.pop("stats")["a"] == {"num": 6, "mean": 6.0, "std": pytest.approx((2 / 3 + 25) ** 0.5)}
        assert result == {
            "backend": "gloo",
            "device": "cpu",
            "broadcast": {"rank": 0},
            "gathered": [[0], [1]],
            "summed": [3.0, 3.0],
        }
