"""The training loop: data, steps, ticks, logs, snapshots, states, resume, abort. It knows no method."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import psutil
import torch
from tqdm import tqdm

import dnnlib
from archives.dataset import BatchStream, ImageDataset
from torch_utils import checkpoint, distributed, persistence
from torch_utils.distributed import print0
from torch_utils.training_stats import Stats
from training.objective import Objective

__all__ = ["last_nimg", "training_loop"]

LOSS_TOLERANCE = 0.05  # relative; machines round differently, in half precision most


def training_loop(
    objective: Objective,
    dataset: ImageDataset,
    config: dict,
    run_dir: str,
    device: torch.device,
    state: dict | None = None,
    draw_samples: Callable[[torch.nn.Module, str], None] | None = None,
) -> None:
    """Train `objective` to `config['total_nimg']` images, writing logs, snapshots and states into `run_dir`.

    `state` (from `checkpoint.load_state`) continues an interrupted run bit for bit. SIGTERM and Ctrl-C finish the step,
    save a state and exit with 143 or 130. `draw_samples(net, path)` writes a picture of samples beside each snapshot.
    """
    torch.backends.cudnn.benchmark = config["cudnn_bench"]
    tf32 = config["precision"] != "fp32"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    rank, world = distributed.get_rank(), distributed.get_world_size()
    batch, total, tick_nimg = config["batch_size"], config["total_nimg"], max(int(config["kimg_per_tick"] * 1000), 1)

    nimg, best = 0, dict(value=None, name=None)
    if state is not None:
        nimg, best = state["nimg"], state["best"]
        try:
            objective.load_state_dict(state["objective"])
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            # What modules and optimizers say to parts of another size, or of none.
            raise dnnlib.UserError(f"--resume: the state does not fit this run ({error})") from None
        print0(f"Resuming at {nimg / 1000:.1f} kimg.")
    saver = Saver(objective, config, run_dir, best, draw_samples)
    log = distributed.together(lambda: TickLog(run_dir, config, nimg) if rank == 0 else None)
    stats, start_time = Stats(device), time.time()
    tick_time, start_nimg, tick_start, maintenance = start_time, nimg, nimg, 0.0
    print0(f"Training for {total / 1000:g} kimg...\n")
    hidden = None if rank == 0 else True  # None: on a terminal only
    with (
        distributed.guard(lambda: f"at {nimg / 1000:.1f} kimg", lone=True),
        StopRequest() as stop,
        contextlib.closing(
            BatchStream(
                dataset,
                batch // world,
                rank,
                world,
                config["seed"],
                nimg,
                device,
                config["workers"],
                indices=objective.train_indices,
            )
        ) as stream,
        tqdm(total=total, initial=nimg, unit="img", desc=objective.method, disable=hidden, leave=False) as bar,
    ):
        while nimg < total:
            images, labels = next(stream)
            objective.step(images, labels, nimg, stats, stream.items)
            first, previous, nimg = nimg == 0, nimg, nimg + batch
            bar.update(batch)
            stopping = stop.agreed()
            done = nimg >= total
            tick = nimg // tick_nimg
            full = first or done or tick > previous // tick_nimg  # not cut short by a signal
            due = full or stopping
            # Looking costs a synchronisation: a tenth of the steps that are borne will do.
            few = max(config["max_bad_steps"] // 10, 1)
            bad = int(distributed.all_reduce_max(objective.bad_steps)) if due or nimg // batch % few == 0 else 0
            failed = bad >= config["max_bad_steps"] or (done and bad >= few)
            if not (due or failed):
                continue

            # A tick: report, then save what is due. Tick numbers follow from nimg, so a resumed run has the same ones.
            values = stats.reduce()
            now = time.time()
            line = (
                None
                if log is None
                else functools.partial(
                    log.write,
                    values,
                    tick=tick,
                    nimg=nimg,
                    total=total,
                    elapsed=now - start_time,
                    tick_seconds=now - tick_time,
                    tick_nimg=nimg - tick_start,
                    maintenance=maintenance,
                    rate=(nimg - start_nimg) / (now - start_time),
                )
            )
            snapshot = done or (full and tick % config["snapshot_ticks"] == 0)
            keep = stopping or done or (tick > 0 and tick % config["state_ticks"] == 0)
            saver.tick(
                nimg,
                line and (lambda line=line: bar.write(line(), file=sys.stdout)),
                snapshot and bad < few,
                keep and bad < few,
            )
            if failed:
                raise distributed.shared(
                    dnnlib.UserError(
                        f"the last {bad} steps, to {nimg / 1000:.1f} kimg, had non-finite losses or gradients "
                        f"(--max_bad_steps={config['max_bad_steps']}); {saver.newest()}"
                    )
                )
            if bad >= few and (snapshot or keep):
                print0(f"Nothing was saved: the last {bad} steps had non-finite losses or gradients.")
            if stopping and not done:
                bar.close()
                print0(f"Stopped by {signal.Signals(stopping).name} at {nimg / 1000:.1f} kimg; {saver.newest()}")
                sys.exit(130 if stopping == signal.SIGINT else 143)
            tick_time, tick_start, maintenance = time.time(), nimg, time.time() - now
    print0(f"\nDone: {nimg / 1000:g} kimg in {dnnlib.format_time(time.time() - start_time)}.")


class Saver:
    """Snapshots and states of a run: what is written when, in which order, and what is deleted after it."""

    def __init__(
        self,
        objective: Objective,
        config: dict,
        run_dir: str,
        best: dict,
        draw_samples: Callable[[torch.nn.Module, str], None] | None = None,
    ):
        self.objective, self.config, self.run_dir, self.best = objective, config, run_dir, best
        self.draw_samples = draw_samples
        self._best_of_state = best["name"]  # the snapshot that the newest state takes for the best: it stays
        if best["name"] is not None and distributed.get_rank() == 0:
            self.remove_outdated()

    def tick(self, nimg: int, report: Callable[[], None] | None, snapshot: bool, state: bool) -> None:
        """Report, then save what is due: rank 0, whose failure all ranks raise."""
        value = None
        if snapshot:
            check_agreement(self.objective, nimg)
            value = self.objective.validate()
        # All ranks: what is sharded is put together here.
        data = self.objective.snapshot() if snapshot else None
        weights = self.objective.state_dict() if state else None

        def rank0() -> None:
            try:
                report()
                if snapshot:
                    self.save_snapshot(nimg, value, data)
                if state:
                    self.save_state(nimg, weights)
            except OSError as e:
                message = f"{e.filename or self.run_dir}: {e.strerror or e}; {self.newest()}"
                raise dnnlib.UserError(message) from e

        distributed.together(rank0 if distributed.get_rank() == 0 else lambda: None)

    def save_snapshot(self, nimg: int, value: float | None, data: dict) -> None:
        """Write `network-snapshot-NNNNNN.pkl` and a picture; with a validation value, only the best one is kept."""
        best, name = self.best, f"network-snapshot-{nimg // 1000:06d}.pkl"
        if self.objective.snapshot_on_best:
            if best["value"] is not None and not value < best["value"]:
                print0(f"Validation loss {value:.4f}; the best stays {best['value']:.4f} ({best['name']})")
                return
            print0(f"Validation loss {value:.4f}: {name} is the best so far")
        data["info"].update(nimg=nimg, validation_loss=value, version=dnnlib.__version__, options=self.config)
        path = os.path.join(self.run_dir, name)
        checkpoint.require_space(path, checkpoint.size_of(data))
        persistence.save_snapshot(path, data)
        outdated, best["value"], best["name"] = best["name"], value, name
        if self.objective.snapshot_on_best and outdated not in (None, name, self._best_of_state):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(self.run_dir, outdated))
        if self.draw_samples is not None and nimg > self.config["batch_size"]:
            with self.objective.trained["net"].exported_here() as net:
                self.draw_samples(net, os.path.join(self.run_dir, f"samples-{nimg // 1000:06d}.png"))

    def save_state(self, nimg: int, weights: dict) -> None:
        """Write `training-state-NNNNNN.pt` and keep the newest `config['keep']`."""
        checkpoint.save_state(
            os.path.join(self.run_dir, f"training-state-{nimg // 1000:06d}.pt"),
            dict(config=self.config, nimg=nimg, best=self.best, objective=weights),
        )
        checkpoint.prune_states(self.run_dir, self.config["keep"])
        self.remove_outdated()

    def remove_outdated(self) -> None:
        """Once a state says which snapshot is the best, delete those before it; a run resumed before needed them."""
        self._best_of_state = best = self.best["name"]
        if self.objective.snapshot_on_best and best is not None and os.path.exists(os.path.join(self.run_dir, best)):
            for name in os.listdir(self.run_dir):
                match = re.fullmatch(r"network-snapshot-([0-9]+)\.pkl", name)
                if match and int(match[1]) < int(best[17:-4]):
                    os.remove(os.path.join(self.run_dir, name))

    def newest(self) -> str:
        """What a run that ends here can be continued from, for the last line on the screen."""
        states = checkpoint.states(self.run_dir)
        if not states:
            return "no state had been saved yet"
        return f"{states[0].name} is saved. To go on: the same command with --resume={self.run_dir}"


def check_agreement(objective: Objective, nimg: int) -> None:
    """Raise UserError on every process when their weights, or what they compute from them, have drifted apart."""
    if distributed.get_world_size() == 1:
        return
    ours, *others = distributed.all_gather_object(objective.probe(nimg))
    for rank, theirs in enumerate(others, start=1):
        if theirs[0] != ours[0]:
            found = "their weights differ"
        elif not np.allclose(theirs, ours, rtol=LOSS_TOLERANCE, equal_nan=True):
            found = f"on the same images they find the losses {ours[1:]} and {theirs[1:]}"
        else:
            continue
        raise distributed.shared(
            dnnlib.UserError(
                f"processes 0 and {rank} have drifted apart at {nimg / 1000:.1f} kimg: {found}. One of the machines "
                "computes wrongly; states saved before may be sound: continue from one with --resume, elsewhere"
            )
        )


class StopRequest:
    """SIGTERM or Ctrl-C, noticed at the same step by all ranks. A second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.signal = 0
        self._previous = {number: signal.signal(number, self._catch) for number in (signal.SIGTERM, signal.SIGINT)}
        self._pending: tuple | None = None

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        """Put back the handlers found and, unless something failed, take leave of the other ranks."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._pending is not None and kind in (None, SystemExit):
            self._pending[0].wait()

    def _catch(self, number: int, _frame) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.signal = number

    def agreed(self) -> int:
        """The signal's number once every rank knows of it, else 0. Ranks compare asynchronously, one step late."""
        if distributed.get_world_size() == 1:
            return self.signal
        result = 0
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            result = int(flag)
        flag = torch.tensor(self.signal)  # On the host, whose messages no GPU has to be waited for.
        self._pending = (torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, async_op=True), flag)
        return result


def logged_ticks(path: str) -> Iterator[tuple[str, int]]:
    """(line, images seen) of every tick in a `stats.jsonl`; lines that were cut off are left out."""
    with open(path, errors="replace") as f:
        for line in f:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                yield line, round(json.loads(line)["Progress/kimg"]["mean"] * 1000)


def last_nimg(run_dir: str) -> int:
    """Images that the run in `run_dir` had seen when it last reported; 0 when it never did."""
    path = os.path.join(run_dir, "stats.jsonl")
    return max((nimg for _, nimg in logged_ticks(path)), default=0) if os.path.exists(path) else 0


class TickLog:
    """A line on the screen and in `stats.jsonl` a tick, mirrored to TensorBoard and Weights & Biases when asked for."""

    def __init__(self, run_dir: str, config: dict, nimg: int):
        self.path = os.path.join(run_dir, "stats.jsonl")
        self.mirrors = []
        if os.path.exists(self.path):
            self._go_back(nimg)
        if config["tensorboard"]:
            try:
                from torch.utils.tensorboard import SummaryWriter  # optional dependency
            except ImportError:
                raise dnnlib.UserError(
                    "--tensorboard=1 needs the package tensorboard: pip install tensorboard"
                ) from None
            writer = SummaryWriter(run_dir)
            self.mirrors.append(lambda values, step: [writer.add_scalar(k, v, step) for k, v in values.items()])
        if config["wandb"]:
            try:
                import wandb  # optional dependency
            except ImportError:
                raise dnnlib.UserError("--wandb needs the package wandb: pip install wandb") from None
            run = wandb.init(project=config["wandb"], dir=run_dir, config=config, name=os.path.basename(run_dir))
            self.mirrors.append(lambda values, step: run.log(values, step=step))

    def _go_back(self, nimg: int) -> None:
        """Drop the ticks that a resumed run repeats, and a line that was cut off: one object a tick, and whole ones."""
        kept = [line for line, reached in logged_ticks(self.path) if reached <= nimg]
        with checkpoint.atomic_open(self.path, "w") as f:
            f.writelines(kept)

    def write(
        self,
        values: dict,
        *,
        tick: int,
        nimg: int,
        total: int,
        elapsed: float,
        tick_seconds: float,
        tick_nimg: int,
        maintenance: float,
        rate: float,
    ) -> str:
        """Append one object to stats.jsonl; returns the line for the screen."""
        fields = {
            "Progress/tick": tick,
            "Progress/kimg": nimg / 1000,
            "Timing/total_sec": elapsed,
            "Timing/sec_per_tick": tick_seconds,
            "Timing/sec_per_kimg": tick_seconds / max(tick_nimg, 1) * 1000,
            "Timing/maintenance_sec": maintenance,
            "Resources/cpu_mem_gb": psutil.Process().memory_info().rss / 2**30,
        }
        if torch.cuda.is_available():
            fields["Resources/peak_gpu_mem_gb"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()
        values = {**values, **{k: dict(num=1, mean=float(v), std=0.0) for k, v in fields.items()}}
        with open(self.path, "a") as f:
            f.write(json.dumps({**values, "timestamp": time.time()}) + "\n")
            f.flush()
            os.fsync(f.fileno())  # what a state continues from has its ticks on disk as well
        for mirror in self.mirrors:
            mirror({k: v["mean"] for k, v in values.items() if np.isfinite(v["mean"])}, nimg)
        bad = {what: values.get(f"Health/bad_{what}", dict(mean=0, num=0)) for what in ("losses", "gradients")}
        return "  ".join(
            [
                f"tick {tick:<5d}",
                f"kimg {nimg / 1000:<9.1f}",
                f"loss {values.get('Loss/loss', dict(mean=float('nan')))['mean']:<8.4f}",
                f"time {dnnlib.format_time(elapsed):<11s}",
                f"left {dnnlib.format_time(max(total - nimg, 0) / rate):<11s}",
                f"sec/tick {tick_seconds:<7.1f}",
                f"sec/kimg {fields['Timing/sec_per_kimg']:<7.2f}",
                f"maintenance {maintenance:<6.1f}",
                f"cpumem {fields['Resources/cpu_mem_gb']:<6.2f}",
                *(
                    [f"gpumem {fields['Resources/peak_gpu_mem_gb']:<6.2f}"]
                    if "Resources/peak_gpu_mem_gb" in fields
                    else []
                ),
                *(f"non-finite {what} {v['mean'] * v['num']:.0f}" for what, v in bad.items() if v["mean"]),
            ]
        )
