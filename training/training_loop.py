"""The training loop: data, steps, ticks, logs, abort. It knows no method."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import psutil
import torch

import dnnlib
from archives.dataset import BatchStream, ImageDataset
from dnnlib.signals import ENDING, catching, leave_terminal
from torch_utils import distributed
from torch_utils.distributed import print0
from torch_utils.precision import tf32
from torch_utils.training_stats import Stats
from training.config import RunConfig
from training.objective import Objective
from training.saver import Best, DrawSamples, Saver
from training.trackers import Trackers

__all__ = ["last_nimg", "last_seconds", "training_loop"]

LOSS_TOLERANCE = 0.05  # of the losses' root mean square; machines round differently, most of all in half precision


def training_loop(
    objective: Objective,
    dataset: ImageDataset,
    config: RunConfig,
    run_dir: str,
    device: torch.device,
    nimg: int = 0,
    best: Best | None = None,
    draw_samples: DrawSamples | None = None,
) -> None:
    """Train `objective` to `config.total_nimg` images, and write logs, snapshots and states into `run_dir`.

    A run that resumes has seen `nimg` images, its objective has loaded the state, and `best` comes from the state: it
    continues bit for bit. Ctrl-C, SIGTERM and SIGHUP finish the step, save a state and a snapshot and exit with 130,
    143 or 129.
    `draw_samples(net, path, class_names)` writes a picture of samples beside each snapshot.
    """
    torch.backends.cudnn.benchmark = config.cudnn_bench
    rank, world = distributed.get_rank(), distributed.get_world_size()
    batch, total, tick_nimg = config.batch_size, config.total_nimg, max(int(config.kimg_per_tick * 1000), 1)

    if nimg:
        print0(f"Resuming at {nimg / 1000:.1f} kimg.")
    trackers = distributed.together(lambda: Trackers(config, run_dir, nimg) if rank == 0 else None)
    saver = Saver(objective, config, run_dir, best or Best(), draw_samples, trackers)
    log = distributed.together(lambda: TickLog(run_dir, device, nimg, trackers) if rank == 0 else None)
    stats, start_time = Stats(device), time.time()
    tick_time, start_nimg, tick_start, maintenance = start_time, nimg, nimg, 0.0
    print0(f"Training for {total / 1000:g} kimg...\n")
    with (
        tf32(config.precision != "fp32"),
        distributed.guard(lambda: f"at {nimg / 1000:.1f} kimg", lone=True),
        StopRequest() as stop,
        contextlib.closing(trackers) if trackers is not None else contextlib.nullcontext(),
        contextlib.closing(
            BatchStream(
                dataset,
                batch // world,
                rank,
                world,
                config.seed,
                nimg,
                device,
                config.workers,
                indices=objective.train_indices,
                choose_companions=objective.companions,
            )
        ) as stream,
        distributed.progress_bar(total=total, initial=nimg, unit="img", desc=objective.method) as bar,
    ):
        while nimg < total:
            images, labels = next(stream)
            try:
                objective.step(images, labels, nimg, stats, stream.items, stream.companions)
            except torch.OutOfMemoryError:
                at_a_time = config.batch_gpu or batch // world
                hint = "choose a smaller --batch-gpu" if at_a_time > 1 else "it needs a smaller network"
                message = f"{device} has too little memory for {at_a_time} images at a time; {hint}"
                raise dnnlib.UserError(message) from None
            first, before, nimg = nimg == 0, nimg // tick_nimg, nimg + batch
            bar.update(batch)
            stopping = stop.agreed()
            done = nimg >= total
            tick = nimg // tick_nimg
            full = first or done or tick > before  # the tick was not cut short by a signal
            due = full or stopping
            # Looking at the device's count waits for it: a tenth of the allowed bad steps is often enough.
            few = max(config.max_bad_steps // 10, 1)
            bad = int(distributed.all_reduce_max(objective.bad_steps)) if due or nimg // batch % few == 0 else 0
            failed = bad >= config.max_bad_steps or (done and bad >= few)
            if not (due or failed):
                continue

            # A tick: report, then save what is due. Tick numbers follow from nimg, so that a resumed run has the same.
            values = stats.reduce()
            now = time.time()
            line = None
            if log is not None:
                pace = Pace(
                    elapsed=log.before + now - start_time,
                    tick_seconds=now - tick_time,
                    tick_nimg=nimg - tick_start,
                    maintenance=maintenance,
                    left=max(total - nimg, 0) * (now - start_time) / (nimg - start_nimg),
                )
                line = functools.partial(log.write, values, tick, nimg, pace)
            # A step may be longer than a tick: what counts is that a multiple was reached.
            snapshot = done or first or tick // config.snapshot_ticks > before // config.snapshot_ticks
            keep = stopping or done or tick // config.state_ticks > before // config.state_ticks
            if snapshot and bad < few:
                check_agreement(objective, nimg)
            report = line and (lambda line=line: bar.write(line(), file=sys.stdout))
            saver.tick(nimg, report, snapshot and bad < few, keep and bad < few)
            if stopping and not snapshot and bad < few:  # the state is safe by now
                check_agreement(objective, nimg)
                saver.save_interim(nimg)
            if failed:
                raise distributed.shared(
                    dnnlib.UserError(
                        f"the last {bad} steps, to {nimg / 1000:.1f} kimg, had non-finite losses or gradients "
                        f"(max_bad_steps is {config.max_bad_steps}); {saver.newest()}"
                    )
                )
            if bad >= few and (snapshot or keep):
                print0(f"Nothing was saved: the last {bad} steps had non-finite losses or gradients.")
            if stopping and not done:
                bar.close()
                print0(f"Stopped by {signal.Signals(stopping).name} at {nimg / 1000:.1f} kimg; {saver.newest()}")
                sys.exit(128 + stopping)
            tick_time, tick_start, maintenance = time.time(), nimg, time.time() - now
    print0(f"\nDone: {nimg / 1000:g} kimg in {dnnlib.format_time(time.time() - start_time)}.")


def check_agreement(objective: Objective, nimg: int) -> None:
    """Raise UserError on every process when their weights, or what they compute from them, have drifted apart."""
    if distributed.get_world_size() == 1:
        return
    ours, *others = distributed.all_gather_object(objective.probe(nimg))
    for rank, theirs in enumerate(others, start=1):
        a, b = max(zip(ours[1:], theirs[1:], strict=True), key=lambda losses: _difference(*losses))
        if theirs[0] != ours[0]:
            found = "their weights differ"
        elif _difference(a, b) > LOSS_TOLERANCE:
            found = f"their losses on the same images are {a.mean():.6g} and {b.mean():.6g} on average"
        else:
            continue
        raise distributed.shared(
            dnnlib.UserError(
                f"processes 0 and {rank} have drifted apart at {nimg / 1000:.1f} kimg: {found}. One of the machines "
                "computes wrongly. Older states may be sound: resume from one of them, on other machines"
            )
        )


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    """Return the root mean square of a - b in units of that of a, for losses [n] of the same images.

    The mean of a is no such unit: some methods have losses of either sign, whose mean may be any small number.
    """
    finite = np.isfinite(a)
    if (finite != np.isfinite(b)).any():
        return float("inf")
    return float(np.linalg.norm((a - b)[finite]) / max(np.linalg.norm(a[finite]), 1e-30))


class StopRequest:
    """Ctrl-C, SIGTERM or SIGHUP, noticed at the same step by all ranks. A second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.signal = 0
        self._handlers = contextlib.ExitStack()
        self._handlers.enter_context(catching(self._catch, signal.SIGINT, *ENDING))
        self._pending: tuple | None = None

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        """Put back the handlers that were there before and, unless something failed, finish the exchange of signals."""
        self._handlers.close()
        if self._pending is not None and kind in (None, SystemExit):
            self._pending[0].wait()

    def _catch(self, number: int, _frame) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        leave_terminal(number)
        self.signal = number

    def agreed(self) -> int:
        """Return the signal's number once all ranks know of it, else 0. Ranks compare asynchronously, one step late."""
        if distributed.get_world_size() == 1:
            return self.signal
        result = 0
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            result = int(flag)
        flag = torch.tensor(self.signal)  # on the host: its messages do not wait for a GPU
        self._pending = (torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, async_op=True), flag)
        return result


def logged_ticks(path: str) -> Iterator[tuple[str, int, float]]:
    """Yield (line, images seen, seconds of training) of every tick in a `stats.jsonl`, without lines that were cut off.

    Nothing is yielded when there is no such file.
    """
    if os.path.exists(path):
        with open(path, errors="replace") as f:
            for line in f:
                with contextlib.suppress(AttributeError, ValueError, KeyError, TypeError):
                    values = json.loads(line)
                    seconds = float(values.get("Timing/total_sec", {}).get("mean", 0))
                    yield line, round(values["Progress/kimg"]["mean"] * 1000), seconds


def last_nimg(run_dir: str) -> int:
    """Return how many images the run in `run_dir` had seen at its last report; 0 without a report."""
    return max((nimg for _, nimg, _ in logged_ticks(os.path.join(run_dir, "stats.jsonl"))), default=0)


def last_seconds(run_dir: str) -> float:
    """Return how long the run in `run_dir` had trained at its last report; 0 without a report."""
    return max((seconds for *_, seconds in logged_ticks(os.path.join(run_dir, "stats.jsonl"))), default=0.0)


@dataclass
class Pace:
    """How fast a run is, in seconds."""

    elapsed: float  # since the start of the run, without the time between an interruption and its continuation
    tick_seconds: float  # of this tick
    tick_nimg: int  # images of this tick
    maintenance: float  # spent on reporting and saving after the tick before
    left: float  # expected until the end of the training


class TickLog:
    """Writes a line per tick to the screen and to `stats.jsonl`, and shows it to the trackers."""

    def __init__(self, run_dir: str, device: torch.device, nimg: int, trackers: Trackers):
        self.path, self.device, self.trackers = os.path.join(run_dir, "stats.jsonl"), device, trackers
        self.before = 0.0  # seconds that the run took until it was interrupted
        if os.path.exists(self.path):
            self._go_back(nimg)

    def _go_back(self, nimg: int) -> None:
        # Drop the ticks that a resumed run repeats, and a line that was cut off: one whole object per tick remains.
        kept = [tick for tick in logged_ticks(self.path) if tick[1] <= nimg]
        self.before = kept[-1][2] if kept else 0.0
        with dnnlib.atomic_open(self.path, "w") as f:
            f.writelines(line.rstrip("\n") + "\n" for line, *_ in kept)

    def write(self, values: dict[str, dict[str, float]], tick: int, nimg: int, pace: Pace) -> str:
        """Append one object to `stats.jsonl` and return the line for the screen."""
        fields = {
            "Progress/tick": tick,
            "Progress/kimg": nimg / 1000,
            "Timing/total_sec": pace.elapsed,
            "Timing/sec_per_tick": pace.tick_seconds,
            "Timing/sec_per_kimg": pace.tick_seconds / max(pace.tick_nimg, 1) * 1000,
            "Timing/maintenance_sec": pace.maintenance,
            "Resources/cpu_mem_gb": psutil.Process().memory_info().rss / 2**30,
        }
        if self.device.type == "cuda":  # elsewhere the question itself would create a CUDA context
            fields["Resources/peak_gpu_mem_gb"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()
        values = {**values, **{k: dict(num=1, mean=float(v), std=0.0) for k, v in fields.items()}}
        with open(self.path, "a") as f:
            f.write(json.dumps({**values, "timestamp": time.time()}) + "\n")
            f.flush()
            os.fsync(f.fileno())  # a state on disk has the ticks before it on disk too
        self.trackers.scalars({k: v["mean"] for k, v in values.items() if np.isfinite(v["mean"])}, nimg)
        parts = [
            f"tick {tick:<5d}",
            f"kimg {nimg / 1000:<9.1f}",
            f"loss {values.get('Loss/loss', dict(mean=float('nan')))['mean']:<8.4f}",
            f"time {dnnlib.format_time(pace.elapsed):<11s}",
            f"left {dnnlib.format_time(pace.left):<11s}",
            f"sec/tick {pace.tick_seconds:<7.1f}",
            f"sec/kimg {fields['Timing/sec_per_kimg']:<7.2f}",
            f"maintenance {pace.maintenance:<6.1f}",
            f"cpumem {fields['Resources/cpu_mem_gb']:<6.2f}",
        ]
        if "Resources/peak_gpu_mem_gb" in fields:
            parts.append(f"gpumem {fields['Resources/peak_gpu_mem_gb']:<6.2f}")
        for what in ("losses", "gradients"):
            bad = values.get(f"Health/bad_{what}", dict(mean=0, num=0))
            if bad["mean"]:
                parts.append(f"non-finite {what} {bad['mean'] * bad['num']:.0f}")
        return "  ".join(parts)
