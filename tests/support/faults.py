"""A server, for tests, of training runs that die, or whose disk fails, at a chosen operation.

It reads one JSON object per line. For each it forks the processes of a run, which can really die and take only a few
hundredths of a second to start. It answers with what they left: the exit code, stdout and stderr of every rank.
"""

import builtins
import contextlib
import errno
import functools
import io
import json
import os
import pathlib
import signal
import socket
import sys
import time
import traceback

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import click
import numpy as np
import torch

import dnnlib
import dnnlib.cli
import train
import train_classifier
import train_discriminator
import train_noise
import train_rduot
from dnnlib.signals import ENDING
from sampling.grid import save_grid
from tests.support.quick import quicken
from torch_utils import checkpoint
from torch_utils.persistence import persistent_class
from training import options, run
from training.objective import Objective

KILLED = 137
TIMEOUT = 600  # seconds; long, for machines that are busy with other work


@persistent_class(embed_source=False)
class TinyNet(torch.nn.Module):
    """Two small layers between pixels."""

    network_kind = "denoiser"

    def __init__(self, pixels):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(pixels, 2), torch.nn.Tanh(), torch.nn.Linear(2, pixels))

    def forward(self, x):
        return self.layers(x)


class Tiny(Objective):
    """Denoising at one noise level. `hook` says what happens to rank `rank` (default: all) at step `at`."""

    method = "tiny"
    hook = {}
    best = False

    def build(self):
        self.snapshot_on_best = self.best
        return {"net": self.trained_network(TinyNet(self.dataset.resolution**2))}

    def hooked(self, what):
        return what in self.hook and self.hook.get("rank", int(os.environ["RANK"])) == int(os.environ["RANK"])

    def step(self, images, labels, nimg, stats, *more):
        number = nimg // self.config.batch_size
        self.bad = self.hooked("nan") and number in self.hook["nan"]
        if self.hooked("signal") and number == self.hook["at"]:
            os.kill(os.getpid(), self.hook["signal"])
            time.sleep(0)  # the handler runs between two lines of Python
        if self.hooked("error") and number == self.hook["at"]:
            raise getattr(builtins, self.hook["error"])(errno.EIO, "Input/output error", "digits.zip")
        if self.hooked("free") and number == self.hook["at"]:
            checkpoint.shutil.disk_usage = lambda path: dnnlib.EasyDict(free=self.hook["free"])
        super().step(images, labels, nimg, stats, *more)
        if self.hooked("drift") and number == self.hook["at"]:
            next(self.trained["net"].net.parameters()).data[0, 0] += 1e-6

    def probe(self, nimg):
        values = super().probe(nimg)
        return [values[0], *(v * self.hook["miscompute"] for v in values[1:])] if self.hooked("miscompute") else values

    def loss(self, images, labels, draws, stats):
        y, _ = self.prepare(images, draws)
        loss = (self.trained["net"].forward((y + draws["noise"]).flatten(1)) - y.flatten(1)).square()
        return loss * float("nan") if getattr(self, "bad", False) else loss

    @torch.no_grad()
    def validate(self):
        if not self.snapshot_on_best:
            return None
        # The value goes up and down, so that some snapshots are the best so far and others are not.
        return float(self.trained["net"].ema(torch.ones(1, self.dataset.resolution**2)).sum() * 1e4 % 1)


def draw_samples(net, path, class_names):
    save_grid(np.zeros([1, 4, 4, 1], np.uint8), path)


@click.command(cls=dnnlib.cli.Command)
@options.run_options("train.py")
@options.denoiser_options()
@click.option("--best", is_flag=True)
def main(best, **opts):
    def make(config, dataset, device):
        objective = Tiny(config, dataset, device)
        objective.best = best
        return objective

    run.start(opts, "tiny", make, draw_samples=draw_samples)


SCRIPTS = dict(
    tiny=main,
    **{
        script.__name__: script.main
        for script in (train, train_classifier, train_discriminator, train_noise, train_rduot)
    },
)


class Disk:
    """Intercepts all operations on files below `root`. Operation number `at` (from 1) meets the fault `kind`.

    kill    the process ends before the operation
    torn    the process ends in the middle of a write
    power   like kill, and everything is undone that was not synced: data and renames
    ENOSPC  from here on the disk is full: this write stops half-way, and new files cannot be created
    EROFS   from here on the disk is read-only
    EACCES  from here on the folder is read-only (open files stay writable)
    EIO     this one operation fails
    short   from here on every write takes only half of what it is given, as write(2) may

    Operations on log.txt do not count, because it is written all the time, but they fail like the others.
    """

    def __init__(self, root, kind=None, at=0):
        self.root, self.kind, self.at = os.path.abspath(root), kind, at
        self.operations, self.failing = [], False
        self.synced, self.renames = {}, []  # length on disk by name; (from, to, copy of the older file)

    def install(self):
        self.real = {name: getattr(os, name) for name in ("fsync", "replace", "unlink", "remove")}
        self.open, builtins.open = builtins.open, self.opened
        os.fsync, os.replace = self.fsync, self.replace
        os.unlink, os.remove = (functools.partial(self.deleted, name) for name in ("unlink", "remove"))

    def ours(self, path):
        return isinstance(path, (str, os.PathLike)) and os.path.abspath(path).startswith(self.root + os.sep)

    def operation(self, what, path, mid_write=None):
        """Count an operation, and fail or die if it is due. Return the share of a write that succeeds: 1 or 0.5."""
        path = os.fspath(path)
        name = os.path.basename(path)
        half = 1.0
        if name != "log.txt":
            self.operations.append(what)
            if len(self.operations) == self.at:
                if self.kind in ("kill", "power"):
                    self.die()
                if self.kind == "torn" and mid_write:
                    mid_write()
                    self.die()
                if self.kind == "EIO":
                    raise OSError(errno.EIO, os.strerror(errno.EIO), path)
                self.failing, half = True, 0.5
        if not self.failing:
            return 1.0
        refused = {
            "ENOSPC": ("open", "write"),
            "EROFS": ("open", "write", "fsync", "replace", "unlink"),
            "EACCES": ("open", "replace", "unlink"),
        }.get(self.kind, ())
        if what in refused:
            if mid_write and half < 1:
                mid_write()
            number = getattr(errno, self.kind)
            raise OSError(number, os.strerror(number), None if what == "write" else path)
        return 0.5 if self.kind == "short" else 1.0

    def die(self):
        if self.kind == "power":
            for path, length in self.synced.items():
                if os.path.exists(path):
                    os.truncate(path, length)
            for source, target, older in reversed(self.renames):
                self.real["replace"](target, source)
                if older is not None:
                    self.real["replace"](older, target)
        os._exit(KILLED)

    def opened(self, path, mode="r", buffering=-1, encoding=None, errors=None, *args, **kwargs):
        if not self.ours(path) or not set(mode) & set("wxa"):
            return self.open(path, mode, buffering, encoding, errors, *args, **kwargs)
        self.operation("open", path)
        raw = RawFile(self, path, mode.replace("b", "").replace("t", ""))
        self.synced.setdefault(os.path.abspath(path), os.path.getsize(path))
        file = io.BufferedWriter(raw, 512)
        if "b" in mode:
            return file
        return io.TextIOWrapper(file, encoding or "utf-8", errors, line_buffering=buffering == 1)

    def fsync(self, fd):
        path = os.readlink(f"/proc/self/fd/{fd}")
        self.operation("fsync", path)
        self.real["fsync"](fd)
        if os.path.isdir(path):
            self.renames.clear()
        else:
            self.synced[path] = os.path.getsize(path)

    def replace(self, source, target):
        source, target = os.path.abspath(source), os.path.abspath(target)
        self.operation("replace", target)
        older = None
        if self.kind == "power" and os.path.exists(target):
            older = f"{self.root}.older{len(self.operations)}"
            os.link(target, older)
        self.renames.append((source, target, older))
        self.real["replace"](source, target)
        self.synced[target] = self.synced.pop(source, 0)

    def deleted(self, name, path, **kwargs):
        if self.ours(path):
            self.operation("unlink", path)
        self.real[name](path, **kwargs)


class RawFile(io.FileIO):
    """The file below Python's buffers, where the failures of a disk appear."""

    def __init__(self, disk, path, mode):
        self._disk = disk
        super().__init__(path, mode)

    def write(self, data):
        data = bytes(data)
        half = data[: max(len(data) // 2, 1)]
        whole = self._disk.operation("write", self.name, mid_write=lambda: super(RawFile, self).write(half))
        return super().write(data if whole == 1 else half)


def child(request, rank, port, folder):
    """Be one rank of a run, then end the process."""
    for fd, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(request["ranks"]),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        **request.get("env", {}),
    )
    Tiny.hook = request.get("hook", {})
    code, disk = 70, Disk(request["root"], **request.get("fault", {}))
    if rank == 0:
        disk.install()
        save = checkpoint.save_state

        def promising(path, state):
            save(path, state)
            os.write(promises, f"{state['nimg']}\n".encode())

        promises = os.open(f"{folder}/promised", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        checkpoint.save_state = promising
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, *ENDING)]
    try:
        SCRIPTS[request.get("script", "tiny")](request["args"])
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        traceback.print_exc()
    if handlers != [signal.getsignal(number) for number in (signal.SIGINT, *ENDING)]:
        print("signal handlers were left behind", file=sys.stderr)
    if rank == 0:
        pathlib.Path(f"{folder}/operations").write_text(json.dumps(disk.operations))
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def answer(request, folder):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for name in ("operations", "promised"):
        pathlib.Path(folder, name).write_text("")
    pids = []
    for rank in range(request["ranks"]):
        pid = os.fork()
        if pid == 0:
            child(request, rank, port, folder)
        pids.append(pid)
    codes, deadline = {}, time.monotonic() + TIMEOUT
    while len(codes) < len(pids) and time.monotonic() < deadline:
        for pid in pids:
            if pid not in codes and (done := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(done[1])
        time.sleep(0.005)
    for pid in pids:
        if pid not in codes:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            codes[pid] = "hangs"
    read = {name: pathlib.Path(folder, name).read_text() for name in ("operations", "promised")}
    return dict(
        codes=[codes[pid] for pid in pids],
        out=[pathlib.Path(folder, f"out{rank}").read_text() for rank in range(len(pids))],
        err=[pathlib.Path(folder, f"err{rank}").read_text() for rank in range(len(pids))],
        operations=json.loads(read["operations"] or "null"),
        promised=[int(nimg) for nimg in read["promised"].split()],
    )


if __name__ == "__main__":
    quicken()
    torch.optim.Adam([torch.zeros(1)])  # its imports take a second or two, which the children then need not repeat
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), sys.argv[1])), flush=True)
