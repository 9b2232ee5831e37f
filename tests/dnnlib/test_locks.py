"""Locks: calls that change the same file do so one after the other, and nothing stays behind."""

import errno
import fcntl
import multiprocessing
import os

import pytest

from dnnlib import locked


def add_one(path, times):
    for _ in range(times):
        with locked(path):
            with open(path) as f:
                number = int(f.read())
            with open(path, "w") as f:
                f.write(str(number + 1))


def test_no_change_is_lost(tmp_path):
    path = tmp_path / "number"
    path.write_text("0")
    others = [multiprocessing.get_context("fork").Process(target=add_one, args=(path, 300)) for _ in range(3)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert path.read_text() == "900" and os.listdir(tmp_path) == ["number"]


@pytest.mark.parametrize("where", ["", "missing"])
def test_without_locks_the_block_runs(tmp_path, monkeypatch, where):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ValueError, match="inside"), locked(tmp_path / where / "number"):
        raise ValueError("inside")
    assert os.listdir(tmp_path) == []
