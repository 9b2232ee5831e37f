"""Training states: an incomplete file is never mistaken for a state."""

import copy
import errno
import os
import pickle
import resource
import time
import types
import zipfile

import numpy as np
import pytest
import torch

from dnnlib import EasyDict, UserError
from torch_utils import checkpoint
from torch_utils.checkpoint import (
    latest_state,
    latest_state_of_runs,
    load_state,
    prune_states,
    remove_leftovers,
    save_state,
    set_aside_later_states,
    states,
    warn_if_older,
)

pytestmark = pytest.mark.slow


def state(value=1.0, size=100):
    net = torch.nn.Linear(size, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(size)).sum().backward()
    optimizer.step()
    best = {"value": value, "name": None}
    return {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "nimg": 5, "best": best}


def save(run_dir, *numbers):
    os.makedirs(run_dir, exist_ok=True)
    for number in numbers:
        save_state(run_dir / f"training-state-{number}.pt", {"number": number})


def names(run_dir):
    return sorted(os.listdir(run_dir))


def test_round_trip(tmp_path):
    before = state()
    save_state(tmp_path / "a.pt", before)
    after = load_state(tmp_path / "a.pt")
    assert after["best"] == before["best"] and after["nimg"] == 5
    for a, b in zip(after["optimizer"]["state"][0].values(), before["optimizer"]["state"][0].values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(after["net"]["weight"], before["net"]["weight"]) and names(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("value", [np.float64(1), np.zeros(2), {1, 2}, EasyDict(a=1), len])
def test_what_cannot_be_loaded_is_not_saved(tmp_path, value):
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\] is a"):
        save_state(tmp_path / "a.pt", {"a": [0, value]})
    assert names(tmp_path) == []


@pytest.mark.parametrize("limit", [0, 100, 5000, 50000])
def test_a_full_disk_leaves_the_previous_state(tmp_path, limit):
    path = tmp_path / "training-state-000001.pt"
    save_state(path, {"number": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(OSError) as e:
            save_state(path, state(size=10000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert e.value.filename == str(path) and e.value.strerror
    assert load_state(path) == {"number": 1} and names(tmp_path) == [path.name]


def test_every_cut_and_every_altered_byte_is_noticed(tmp_path):
    path = tmp_path / "training-state-000001.pt"
    save_state(path, state(size=20))
    data = path.read_bytes()
    for cut in range(0, len(data) - 64, len(data) // 100):
        path.write_bytes(data[:cut])
        assert latest_state(tmp_path) is None
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :])
        assert latest_state(tmp_path) is None, position
    with pytest.raises(UserError, match="truncated, damaged or not a state .*checksum") as e:
        load_state(path)
    assert str(path) in e.value.message and "\n" not in e.value.message


def test_states_of_earlier_versions_rely_on_the_container(tmp_path):
    path = tmp_path / "training-state-000001.pt"
    weight = torch.arange(100.0)
    torch.save({"weight": weight}, path)
    assert latest_state(tmp_path) == str(path) and torch.equal(load_state(path)["weight"], weight)
    data = path.read_bytes()
    start = data.index(weight.numpy().tobytes())
    for position in range(start, start + weight.nbytes, 40):
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        with pytest.raises(UserError, match="damaged .checksum"):
            load_state(path)


@pytest.mark.parametrize("same_name", [True, False])
def test_parts_that_overlap_are_not_read(same_name, tmp_path):
    """Reading each part of a small file would take the square of its size."""
    path = tmp_path / "training-state-000001.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", bytes(10**6))
        for i in range(1, 1000):
            archive.filelist.append(copy.copy(archive.filelist[0]))
            if not same_name:
                archive.filelist[i].filename = f"{i}"
    start = time.process_time()
    with pytest.raises(UserError, match="its parts overlap"):
        load_state(path)
    assert time.process_time() - start < 0.5
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        for _ in range(2):
            archive.writestr("a", b"")
    with pytest.raises(UserError, match="its parts overlap"):
        load_state(path)


def test_what_reads_back_differently_replaces_nothing(tmp_path, monkeypatch):
    path = tmp_path / "training-state-000001.pt"
    save_state(path, {"number": 1})
    sync = os.fsync

    def lying_disk(fd):
        sync(fd)
        os.pwrite(fd, b"?", 700)

    monkeypatch.setattr(os, "fsync", lying_disk)
    with pytest.raises(OSError, match="reads back differently") as e:
        save_state(path, state())
    assert e.value.filename == str(path) and load_state(path) == {"number": 1} and names(tmp_path) == [path.name]


def test_a_save_that_cannot_fit_is_not_begun(tmp_path, monkeypatch):
    path = tmp_path / "training-state-000001.pt"
    save_state(path, state(size=5000))
    expected, size = checkpoint.size_of(state(size=5000)), path.stat().st_size
    assert size <= expected < 1.1 * size
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda where: EasyDict(free=expected - 1))
    with pytest.raises(OSError, match="needs 0.1 MiB and 0.1 MiB are free") as e:
        save_state(tmp_path / "b.pt", state(size=5000))
    assert e.value.filename == str(tmp_path / "b.pt") and names(tmp_path) == [path.name]
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda where: EasyDict(free=expected))
    save_state(tmp_path / "b.pt", state(size=5000))


class _Network:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_foreign_and_hostile_states_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"net": _Network(), "optimizer_state": {}}, "edm.pt")
    with pytest.raises(UserError, match=r"^edm.pt: not a training state .*'posix.mkdir'.*--transfer"):
        load_state("edm.pt")
    with zipfile.ZipFile("other.pt", "w") as archive:
        archive.writestr("a", "b")
    torch.save([1], "list.pt")
    with pytest.raises(UserError, match="holds a list"):
        load_state("list.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(_Network()))
    for path, message in (
        ("other.pt", "not a training state"),
        ("pickle.pt", "truncated, damaged or not a state"),
        ("none.pt", "No such file"),
        (".", "directory"),
    ):
        with pytest.raises(UserError, match=message):
            load_state(path)
    assert names(tmp_path) == ["edm.pt", "list.pt", "other.pt", "pickle.pt"]


def test_latest_state_skips_what_is_broken(tmp_path, capsys):
    assert latest_state(tmp_path) is None and latest_state(tmp_path / "none") is None
    save(tmp_path, "000009", "000010", "1000000", "200000")
    (tmp_path / "training-state-2000000.pt").write_bytes((tmp_path / "training-state-1000000.pt").read_bytes()[:-9])
    (tmp_path / ".training-state-3000000.pt.1234abcd.tmp").write_bytes(b"half")
    (tmp_path / "training-state-x.pt").touch()
    (tmp_path / "training-state-4000000.pt").mkdir()
    assert latest_state(tmp_path) == str(tmp_path / "training-state-1000000.pt")
    out = capsys.readouterr().out
    assert out.startswith("Warning: ") and "training-state-2000000.pt" in out and out.count("\n") == 1


def test_latest_state_skips_what_cannot_be_read(tmp_path, monkeypatch, capsys):
    save(tmp_path, "000001", "000002")

    def bad_sector(path, *args):
        if path == tmp_path / "training-state-000002.pt":
            raise OSError(errno.EIO, "Input/output error")
        return open(path, *args)

    monkeypatch.setattr(checkpoint, "open", bad_sector, raising=False)
    assert latest_state(tmp_path) == str(tmp_path / "training-state-000001.pt")
    assert "unreadable (Input/output error)" in capsys.readouterr().out


def test_latest_run(tmp_path):
    def latest_run(outdir):
        path = latest_state_of_runs(outdir)
        return path and os.path.dirname(path)

    assert latest_run(tmp_path) is None and latest_run(tmp_path / "none") is None
    save(tmp_path / "00002-a", "000001")
    save(tmp_path / "00010-b", "000001")
    save(tmp_path / "00011-c")
    save(tmp_path / "other", "000001")
    (tmp_path / "00012-d").touch()
    assert latest_run(tmp_path) == str(tmp_path / "00010-b")
    (tmp_path / "00010-b" / "training-state-000001.pt").write_bytes(b"")
    assert latest_run(tmp_path) == str(tmp_path / "00002-a")
    assert latest_run(tmp_path / "other") == str(tmp_path / "other")  # a run that has no folder of its own (--nosubdir)


def test_prune_states(tmp_path):
    save(tmp_path, "000009", "000010", "1000000")
    prune_states(tmp_path, 2)
    assert names(tmp_path) == ["training-state-000010.pt", "training-state-1000000.pt"]
    prune_states(tmp_path, 0)
    assert checkpoint.latest_state(tmp_path) == str(tmp_path / "training-state-1000000.pt")


def test_newer_states_that_are_damaged_or_cannot_be_read_are_set_aside(tmp_path, monkeypatch):
    for number in (100, 150, 200):
        save_state(tmp_path / f"training-state-{number:06d}.pt", {"a": number})
    (tmp_path / "training-state-000150.pt").write_bytes(b"damaged")
    damage = checkpoint._damage

    def fail(path):
        if "000200" in str(path):
            raise OSError(5, "Input/output error")
        return damage(path)

    monkeypatch.setattr(checkpoint, "_damage", fail)
    assert latest_state(tmp_path).endswith("training-state-000100.pt")
    set_aside_later_states(tmp_path, 100_000, damaged_only=True)
    assert [path.name for path in states(tmp_path)] == ["training-state-000100.pt"]


def test_states_beyond_the_point_where_a_run_goes_on_are_set_aside(tmp_path, capsys):
    """A damaged one, or one of a branch that the user left, would otherwise outlive the new states."""
    for number in (100, 150, 200):
        save_state(tmp_path / f"training-state-{number:06d}.pt", {"a": number})
    with pytest.raises(UserError, match="another training has gone on here meanwhile"):
        set_aside_later_states(tmp_path, 100_900, damaged_only=True)
    set_aside_later_states(tmp_path, 100_900)
    assert [path.name for path in states(tmp_path)] == ["training-state-000100.pt"]
    assert load_state(tmp_path / "outdated-training-state-000200.pt") == {"a": 200}
    assert capsys.readouterr().out.count("lies beyond this point") == 2


def test_remove_leftovers(tmp_path):
    others = [".a.tmp", ".training-state-000001.pt.tmp", "network-snapshot-000001.pkl", "stats.jsonl"]
    for name in [
        *others,
        ".network-snapshot-000001.pkl.1234abcd.tmp",
        ".training-state-000001.pt.1234abcd.tmp",
        ".samples-000001.png.00000000.tmp",
        ".training_options.json.ffffffff.tmp",
        ".stats.jsonl.01234567.tmp",
    ]:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == others


@pytest.mark.parametrize(
    "snapshot, state, older",
    [("network-snapshot-000003.pkl", 5, True), ("network-snapshot-000005.pkl", 5, False),
     ("network-snapshot-000005.pkl", None, False), ("best.pkl", 5, False)],
)  # fmt: skip
def test_a_snapshot_older_than_the_newest_state_is_noticed(tmp_path, capsys, snapshot, state, older):
    for number in () if state is None else (1, state):
        (tmp_path / f"training-state-{number:06d}.pt").write_bytes(b"")
    warn_if_older(tmp_path / snapshot, types.SimpleNamespace(network_kind="denoiser"))
    printed = capsys.readouterr().out
    assert printed.startswith(f"Warning: {tmp_path / snapshot} is older than training-state-000005.pt") == older
    assert bool(printed) == older
    warn_if_older("https://example.org/network-snapshot-000001.pkl", torch.nn.Module())
    warn_if_older(tmp_path / snapshot, types.SimpleNamespace(network_kind="classifier"))  # the best one may be older
    assert not capsys.readouterr().out
