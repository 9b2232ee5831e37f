"""What a killed process leaves of a file goes when the file is written again; what a living one writes stays."""

import os
import pathlib
import shutil

import pytest

import dnnlib
from archives.writer import ArchiveWriter
from dnnlib import util


def test_leftovers_of_the_same_file_are_deleted(tmp_path):
    for name in (".a.zip.0123abcd.tmp", ".a.zip.tmp", ".b.zip.0123abcd.tmp", ".a.zip.0123abcd.tmp.bak", "a.zip"):
        (tmp_path / name).write_bytes(b"old")
    with dnnlib.atomic_open(tmp_path / "a.zip") as file:
        file.write(b"new")
    assert sorted(os.listdir(tmp_path)) == [".a.zip.0123abcd.tmp.bak", ".a.zip.tmp", ".b.zip.0123abcd.tmp", "a.zip"]
    assert (tmp_path / "a.zip").read_bytes() == b"new"


def test_two_writers_of_one_file_leave_each_other_alone(tmp_path):
    path = tmp_path / "a[1].txt"
    with dnnlib.atomic_open(path, "w") as first:
        with dnnlib.atomic_open(path, "w") as second:
            assert len(os.listdir(tmp_path)) == 2
            second.write("second")
        first.write("first")
    assert os.listdir(tmp_path) == ["a[1].txt"] and path.read_text() == "first"


def test_a_file_that_another_process_deletes_at_once_is_made_again(tmp_path, monkeypatch):
    hold, deleted = util._hold, []

    def late(fd):
        if not deleted:
            deleted.append(os.readlink(f"/proc/self/fd/{fd}"))
            os.unlink(deleted[0])
        return hold(fd)

    monkeypatch.setattr(util, "_hold", late)
    with dnnlib.atomic_open(tmp_path / "a") as file:
        file.write(b"x")
    assert deleted and os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"x"


@pytest.mark.parametrize("name", ["out", "out.zip"])
def test_leftovers_of_an_archive_are_deleted(tmp_path, name):
    stale = tmp_path / f".{name}.0123abcd.tmp"
    if name == "out":
        (stale / "00000").mkdir(parents=True)
        (stale / "00000/a.png").write_bytes(b"x")
    else:
        stale.write_bytes(b"x")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / f".{name}.76543210.tmp").symlink_to(elsewhere)  # which nobody here makes
    with ArchiveWriter(str(tmp_path / name)) as archive:
        archive.add("a.png", b"y")
    assert not stale.exists() and elsewhere.is_dir()
    assert pathlib.Path(tmp_path, name).exists()
    with pytest.raises(KeyboardInterrupt), ArchiveWriter(str(tmp_path / f"2{name}")):
        raise KeyboardInterrupt
    assert not list(tmp_path.glob(".2*"))


def write_set(folder, data, **options):
    with ArchiveWriter(str(folder), **options) as archive:
        archive.add("00000/a.png", data)
        archive.add_metadata(dict(labels=None))


def test_an_archive_that_was_being_deleted_when_the_process_was_killed_goes_with_the_next_call(tmp_path, monkeypatch):
    write_set(tmp_path / "set", b"1")
    if not (call := os.fork()):
        monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: os._exit(9))
        write_set(tmp_path / "set", b"2", overwrite=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(call, 0)[1]) == 9
    assert len(os.listdir(tmp_path)) == 2 and (tmp_path / "set/00000/a.png").read_bytes() == b"2"
    write_set(tmp_path / "set", b"3", overwrite=True)
    assert os.listdir(tmp_path) == ["set"] and (tmp_path / "set/00000/a.png").read_bytes() == b"3"


def test_an_archive_in_place_of_a_link_leaves_the_linked_folder_alone(tmp_path):
    write_set(tmp_path / "real", b"1")
    (tmp_path / "set").symlink_to("real")
    write_set(tmp_path / "set", b"2", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["real", "set"] and not (tmp_path / "set").is_symlink()
    assert [(tmp_path / name / "00000/a.png").read_bytes() for name in ("real", "set")] == [b"1", b"2"]


def test_brackets_in_a_path_are_letters_where_they_exist(tmp_path, monkeypatch):
    for name in ("runs [1]/0-a/x.pkl", "runs 1/0-a/x.pkl", "runs [1]/1-b/y.pkl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = {
        "runs [1]/*": ["runs [1]/0-a", "runs [1]/1-b"],
        "runs [[]1]/*": ["runs [1]/0-a", "runs [1]/1-b"],
        "*/0-*/*.pkl": ["runs 1/0-a/x.pkl", "runs [1]/0-a/x.pkl"],
        "runs [1]/[01]-?/[xy].pkl": ["runs [1]/0-a/x.pkl", "runs [1]/1-b/y.pkl"],
        "runs [1]/**/*.pkl": ["runs [1]/0-a/x.pkl", "runs [1]/1-b/y.pkl"],
        "runs [1]/0-a": ["runs [1]/0-a"],
        "missing/*": [],
        "runs [2]": [],
    }
    for pattern, expected in found.items():
        assert dnnlib.match_paths(f"{tmp_path}/{pattern}") == [f"{tmp_path}/{name}" for name in expected], pattern
    monkeypatch.chdir(tmp_path)
    assert dnnlib.match_paths("runs*/1-*") == ["runs [1]/1-b"] and dnnlib.match_paths("") == []


def test_a_folder_with_files_of_the_operating_system_is_empty(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".DS_Store").write_bytes(b"")
    with dnnlib.atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("")
    assert os.listdir(tmp_path / "out") == ["a"] and os.listdir(tmp_path) == ["out"]


def test_what_comes_into_the_folder_meanwhile_stays(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="not empty"), dnnlib.atomic_folder(tmp_path / "out"):
        (tmp_path / "out" / "mine.txt").write_text("keep me")
    assert os.listdir(tmp_path / "out") == ["mine.txt"] and os.listdir(tmp_path) == ["out"]
