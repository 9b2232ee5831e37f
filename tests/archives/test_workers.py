"""Several processes write one archive: order, errors, interruptions, and which processes end with which."""

import errno
import io
import os
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import psutil
import pytest

import dnnlib
from archives import build, zip_writer
from archives.reader import ArchiveReader
from archives.sources import Source, open_source
from archives.workers import AHEAD, work_in_order
from archives.writer import Transform, make_transform
from archives.zip_writer import ZipWriter
from tests.support import synth
from tests.support.paths import ROOT

PLAIN = make_transform(None, None)


def collect(parts, make, workers, finish=lambda data, decision: None):
    """Return the pairs (part, summary) in the order of the decisions, and what `finish` returned."""
    seen = []

    def decide(part, summary):
        seen.append((part, summary))
        return len(seen) - 1

    return seen, work_in_order(parts, make, decide, finish, workers)


@pytest.mark.parametrize("workers", [1, 2, 3, 50])
def test_parts_are_decided_in_order_and_finished_where_they_were_made(tmp_path, workers):
    def finish(data, decision):
        (tmp_path / f"{decision}").write_text(f"{data} {os.getpid()}")
        return f"{data} done"

    seen, finished = collect(range(0, 70, 10), lambda part: (part + 1, f"data{part}"), workers, finish)
    assert seen == [(part, part + 1) for part in range(0, 70, 10)]
    assert finished == [f"data{part} done" for part in range(0, 70, 10)]
    found = [(tmp_path / f"{i}").read_text().split() for i in range(7)]
    assert [data for data, _ in found] == [f"data{part}" for part in range(0, 70, 10)]
    assert len({process for _, process in found}) == min(workers, 7)
    assert found[0][1] == str(os.getpid())
    assert not psutil.Process().children()


def test_summaries_may_be_larger_than_a_pipe():
    seen, _ = collect(range(20), lambda part: (bytes(1 << 20), part), 3)
    assert [part for part, summary in seen if len(summary) == 1 << 20] == list(range(20))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("place", ["make", "decide", "finish"])
def test_errors_come_in_their_turn(workers, place):
    decided = []

    def fail(where, part):
        if where == place and part >= 3:
            raise dnnlib.UserError(f"part {part} in {where}")

    def decide(part, summary):
        fail("decide", part)
        decided.append(part)
        return part

    turn = (
        r"\d+" if place == "finish" and workers > 1 else "3"
    )  # with several processes, chance decides which one reports first
    with pytest.raises(dnnlib.UserError, match=f"^part {turn} in {place}$"):
        work_in_order(
            range(60),
            lambda part: (fail("make", part), part),
            decide,
            lambda data, decision: fail("finish", data),
            workers,
        )
    late = workers * (AHEAD + 2) if place == "finish" else 0  # parts that are decided before the error is known
    assert decided[:3] == [0, 1, 2] and len(decided) <= 4 + late
    assert not psutil.Process().children()


def test_a_process_that_is_gone_is_reported():
    with pytest.raises(dnnlib.UserError, match="a worker process was ended .*fewer workers"):
        collect(range(4), lambda part: os.kill(os.getpid(), signal.SIGKILL) if part == 3 else (part, part), 2)


def test_zip_is_what_zipfile_writes(monkeypatch):
    members = {f"{i // 3:05d}/img{i:08d}.png": bytes([i]) * (30 * i) for i in range(9)} | {"ä/é.png": b"x", "e": b""}
    for limits in ((), (300, 5), (1 << 31, 5), (1000, 1 << 16)):
        for offset_or_count, limit in enumerate(limits):
            monkeypatch.setattr(zip_writer, ("LIMIT", "COUNT_LIMIT")[offset_or_count], limit)
            monkeypatch.setattr(zipfile, ("ZIP64_LIMIT", "ZIP_FILECOUNT_LIMIT")[offset_or_count], limit)
        expected = io.BytesIO()
        with zipfile.ZipFile(expected, "w") as file:
            for name, data in members.items():
                info = zipfile.ZipInfo(name)
                info.create_system, info.external_attr = 3, 0o100644 << 16
                file.writestr(info, data)
        with open(os.memfd_create("zip"), "r+b") as file:
            writer = ZipWriter(file.fileno())
            names = list(members)
            for part in (names[:4], names[4:5], names[5:]):
                contents = [members[name] for name in part]
                where = writer.reserve(len(part), sum(map(len, contents)) + sum(len(name.encode()) for name in part))
                writer.record([writer.write(where, part, contents)])
            writer.close()
            assert file.read() == expected.getvalue(), limits


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_the_disk_during_the_work_leaves_no_archive(tmp_path, monkeypatch, workers):
    refusals = iter([OSError(errno.EIO, "Input/output error")])  # the system reports it once, and later calls succeed

    def refuse(fd):
        for error in refusals:
            raise error

    images = synth.pictures(60, 64)
    monkeypatch.setattr(zip_writer, "SYNC", 100_000)
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        build.build_archive(Source("x", 60, images.__getitem__), str(tmp_path / "a.zip"), PLAIN, workers=workers)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dest", ["a.zip", "folder"])
def test_images_move_up_when_others_are_left_out(tmp_path, dest):
    """The number and place of an image depend on how many before it were left out, in any process."""
    images = synth.pictures(40, 64)
    source = lambda: Source("x", 40, images.__getitem__, np.arange(40))  # noqa: E731

    def apply(image):
        return None if int(image.sum()) % 3 == 0 else image

    transform = Transform(apply, enlarges=lambda rows, columns: False)
    kept = [i for i in range(40) if int(images[i].sum()) % 3]
    assert 5 < len(kept) < 35
    for workers in (1, 3):
        path = str(tmp_path / f"{workers}{dest}")
        summary = build.build_archive(source(), path, transform, workers=workers)
        reader = ArchiveReader(path)
        assert summary.images == len(reader) == len(kept)
        np.testing.assert_array_equal(reader.labels(), kept)
        np.testing.assert_array_equal([reader.image(row) for row in range(len(reader))], images[kept])


def test_rare_compression_is_read_by_every_process(tmp_path):
    """zipfile's reader moves the position of its file, which forked processes share."""
    plain = synth.make_archive(tmp_path / "plain.zip", synth.pictures(60, 64))
    with zipfile.ZipFile(plain) as file, zipfile.ZipFile(tmp_path / "rare.zip", "w", zipfile.ZIP_LZMA) as rare:
        for name in file.namelist():
            rare.writestr(name, file.read(name))
    for name, workers in (("rare", 3), ("plain", 1)):
        build.build_archive(
            open_source(str(tmp_path / f"{name}.zip")), str(tmp_path / f"{name}-out.zip"), PLAIN, workers=workers
        )
    assert (tmp_path / "rare-out.zip").read_bytes() == (tmp_path / "plain-out.zip").read_bytes()


@pytest.mark.slow
def test_interrupted_workers_end_too(tmp_path):
    """A Ctrl-C reaches all processes, as from a terminal; a kill reaches only the first process."""
    script = (
        "import os, time, dataset_tool\n"
        "from archives import encoder\n"
        "encode = encoder.encode_png\n"
        "def slow(image):\n"
        "    os.write(1, b'%d\\n' % os.getpid())\n"
        "    time.sleep(0.2)\n"
        "    return encode(image)\n"
        "encoder.encode_png = slow\n"
        "dataset_tool.main()\n"
    )
    source = synth.make_archive(tmp_path / "in.zip", synth.pictures(200, 128))
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    processes = []
    for name in ("killed.zip", "interrupted.zip"):
        command = [sys.executable, "-c", script, f"--source={source}", f"--dest={tmp_path / name}", "--workers=2"]
        processes.append(subprocess.Popen(command, cwd=ROOT, text=True, **pipes))
    workers: list[set[int]] = [set(), set()]
    for process, pids in zip(processes, workers, strict=True):
        while len(pids) < 2:
            pids.add(int(process.stdout.readline()))
    os.kill(processes[0].pid, signal.SIGKILL)
    os.killpg(processes[1].pid, signal.SIGINT)
    found = [(process.communicate()[1], process.returncode) for process in processes]
    assert found == [("", -signal.SIGKILL), ("Error: interrupted\n", 130)]
    deadline = time.monotonic() + 60
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
              for pids in workers for pid in pids):  # fmt: skip
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".killed.zip.")} == {"in.zip"}
