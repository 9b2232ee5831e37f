"""The training loop: data, steps, ticks, logs, snapshots, states, resume, abort. It knows no method."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import numpy as np
import psutil
import torch
from tqdm import tqdm

import dnnlib
from torch_utils import checkpoint, distributed, persistence
from torch_utils.distributed import print0
from torch_utils.training_stats import Stats
from training.dataset import BatchStream, ImageDataset
from training.objectives.base import Objective

__all__ = ["training_loop"]


def training_loop(
    objective: Objective,
    dataset: ImageDataset,
    config: dict,
    run_dir: str,
    device: torch.device,
    state: dict | None = None,
) -> None:
    """Train `objective` to `config['total_nimg']` images, writing logs, snapshots and states into `run_dir`.

    `state` (from `checkpoint.load_state`) continues an interrupted run bit for bit. SIGTERM and Ctrl-C finish the step,
    save a state and exit with 143 or 130.
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
    stream = BatchStream(dataset, batch // world, rank, world, config["seed"], nimg, device, config["workers"],
                         indices=objective.train_indices)
    stats, log = Stats(device), distributed.together(lambda: TickLog(run_dir, config) if rank == 0 else None)
    stop = StopRequest()
    start_time = tick_time = time.time()
    start_nimg = tick_start = nimg
    maintenance = 0.0
    print0(f"Training for {total / 1000:g} kimg...\n")
    hidden = None if rank == 0 else True    # None: on a terminal only
    bar = tqdm(total=total, initial=nimg, unit="img", desc=objective.method, disable=hidden, leave=False)

    while nimg < total:
        images, labels = next(stream)
        objective.step(images, labels, nimg, stats, stream.items)
        first, previous, nimg = nimg == 0, nimg, nimg + batch
        bar.update(batch)
        stopping = stop.agreed(device)
        done = nimg >= total
        tick = nimg // tick_nimg
        if not (first or done or stopping or tick > previous // tick_nimg):
            continue

        # A tick: report, then save what is due. Tick numbers follow from nimg, so a resumed run has the same ones.
        values = stats.reduce()
        now = time.time()
        if log is not None:
            line = log.write(values, tick=tick, nimg=nimg, total=total, elapsed=now - start_time,
                             tick_seconds=now - tick_time, tick_nimg=nimg - tick_start, maintenance=maintenance,
                             rate=(nimg - start_nimg) / (now - start_time))
            bar.write(line, file=sys.stdout)
        if done or (tick % config["snapshot_ticks"] == 0 and not stopping):
            save_snapshot(objective, config, run_dir, nimg, best)
        if stopping or done or (tick > 0 and tick % config["state_ticks"] == 0):
            save_state(objective, config, run_dir, nimg, best)
        if stopping and not done:
            bar.close()
            print0(f"Stopped by {signal.Signals(stopping).name} at {nimg / 1000:.1f} kimg; the state is saved. "
                   f"To go on: the same command with --resume={run_dir}")
            stop.restore()
            sys.exit(130 if stopping == signal.SIGINT else 143)
        tick_time, tick_start, maintenance = time.time(), nimg, time.time() - now
    bar.close()
    stream.close()
    stop.restore()
    print0(f"\nDone: {nimg / 1000:g} kimg in {dnnlib.format_time(time.time() - start_time)}.")


def save_snapshot(objective: Objective, config: dict, run_dir: str, nimg: int, best: dict) -> None:
    """Write `network-snapshot-NNNNNN.pkl` and a picture; with a validation value, only the best snapshot is kept."""
    value = objective.validate()
    name = f"network-snapshot-{nimg // 1000:06d}.pkl"
    if objective.snapshot_on_best:
        if best["value"] is not None and not value < best["value"]:
            print0(f"Validation loss {value:.4f}; the best stays {best['value']:.4f} ({best['name']})")
            return
        print0(f"Validation loss {value:.4f}: {name} is the best so far")
    outdated, best["value"], best["name"] = best["name"], value, name
    if distributed.get_rank() != 0:
        return
    data = objective.snapshot()
    data["info"].update(nimg=nimg, validation_loss=value, version=dnnlib.__version__, options=config)
    persistence.save_snapshot(os.path.join(run_dir, name), data)
    if objective.snapshot_on_best and outdated not in (None, name) and os.path.exists(os.path.join(run_dir, outdated)):
        os.remove(os.path.join(run_dir, outdated))
    if nimg > config["batch_size"]:
        objective.sheet(os.path.join(run_dir, f"samples-{nimg // 1000:06d}.png"))


def save_state(objective: Objective, config: dict, run_dir: str, nimg: int, best: dict) -> None:
    """Write `training-state-NNNNNN.pt` (rank 0) and keep the newest `config['keep']`."""
    if distributed.get_rank() == 0:
        checkpoint.save_state(
            os.path.join(run_dir, f"training-state-{nimg // 1000:06d}.pt"),
            dict(config=config, nimg=nimg, best=best, objective=objective.state_dict()),
        )
        checkpoint.prune_states(run_dir, config["keep"])
    distributed.barrier()


class StopRequest:
    """SIGTERM or Ctrl-C, noticed at the same step by all ranks. A second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.signal = 0
        self._previous = {number: signal.signal(number, self._catch) for number in (signal.SIGTERM, signal.SIGINT)}
        self._pending: tuple | None = None

    def restore(self) -> None:
        """Put back the handlers found, and take leave of the other ranks."""
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _catch(self, number: int, _frame) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.signal = number

    def agreed(self, device: torch.device) -> int:
        """The signal's number once every rank knows of it, else 0. Ranks compare asynchronously, one step late."""
        if distributed.get_world_size() == 1:
            return self.signal
        result = 0
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            result = int(flag)
        flag = torch.tensor(self.signal, device=device)
        self._pending = (torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, async_op=True), flag)
        return result


class TickLog:
    """A line on the screen and in `stats.jsonl` a tick, mirrored to TensorBoard and Weights & Biases when asked for."""

    def __init__(self, run_dir: str, config: dict):
        self.path = os.path.join(run_dir, "stats.jsonl")
        self.mirrors = []
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
        for mirror in self.mirrors:
            mirror({k: v["mean"] for k, v in values.items() if np.isfinite(v["mean"])}, nimg)
        bad = values.get("Health/bad_gradients", dict(mean=0, num=0))
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
                *([f"non-finite gradients {bad['mean'] * bad['num']:.0f}"] if bad["mean"] else []),
            ]
        )
