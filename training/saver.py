"""Snapshots and states of a run: what is written when, in which order, and what is deleted after it."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

import dnnlib
from torch_utils import checkpoint, distributed, persistence
from torch_utils.distributed import print0
from training.config import RunConfig, to_dict
from training.objective import Objective
from training.trackers import Trackers

__all__ = ["Best", "DrawSamples", "Saver", "fetch_best"]

# Writes a picture of what a network makes to a path; the last argument: the names of its classes, or None.
DrawSamples = Callable[[torch.nn.Module, str, "list[str] | None"], None]


@dataclass
class Best:
    """The snapshot with the lowest validation value so far."""

    value: float | None = None  # None: there was no validation yet
    name: str | None = None  # file name of the snapshot


def fetch_best(best: Best, home: str | None, run_dir: str) -> Best:
    """Make sure that the `best` snapshot of a state is in `run_dir`: copy it from `home`. Return none if it is gone."""
    if best.name is None or os.path.isfile(target := os.path.join(run_dir, best.name)):
        return best
    if not os.path.isfile(source := os.path.join(home, best.name)):
        print0(f"{source} is gone: the next snapshot counts as the best so far")
        return Best()
    with dnnlib.atomic_open(target) as file:
        file.write(dnnlib.read_bytes(source))
    return best


class Saver:
    """Writes snapshots and states into `run_dir`, and a picture of samples beside each snapshot.

    `best` comes from the state that the run continues. Every rank calls `tick`; rank 0 writes, and its `trackers` show
    what the snapshots show.
    """

    def __init__(
        self,
        objective: Objective,
        config: RunConfig,
        run_dir: str,
        best: Best,
        draw_samples: DrawSamples | None = None,
        trackers: Trackers | None = None,
    ):
        self.objective, self.config, self.run_dir, self.best = objective, config, run_dir, best
        self.draw_samples, self.trackers = draw_samples, trackers
        self._best_of_state = best.name  # the newest state counts on this snapshot, so it stays
        if best.name is not None and distributed.get_rank() == 0:
            self.remove_outdated(resumed=True)

    def tick(self, nimg: int, report: Callable[[], None] | None, snapshot: bool, state: bool) -> None:
        """Report (on rank 0), then save what is due. When rank 0 fails, all ranks raise."""
        value = self.objective.validate() if snapshot else None
        # On all ranks: sharded networks are put together here.
        data = self.objective.snapshot() if snapshot else None
        weights = self.objective.state_dict() if state else None

        def save() -> None:
            report()
            if snapshot and self.save_snapshot(nimg, value, data):
                self.show(nimg, data)
            if state:
                self.save_state(nimg, weights)

        self._on_rank0(save)

    def save_interim(self, nimg: int) -> None:
        """Write a snapshot of a run that a signal stops between two snapshots, unless a better one is kept.

        The state does not know of it, so that the run that continues chooses the same best snapshot as one that nobody
        stopped.
        """
        value, data = self.objective.validate(), self.objective.snapshot()
        self._on_rank0(lambda: self.save_snapshot(nimg, value, data, interim=True))

    def _on_rank0(self, save: Callable[[], None]) -> None:
        def rank0() -> None:
            try:
                save()
            except OSError as e:
                message = f"{e.filename or self.run_dir}: {e.strerror or e}; {self.newest()}"
                raise dnnlib.UserError(message) from e

        distributed.on_rank0(rank0)

    def save_snapshot(self, nimg: int, value: float | None, data: dict, interim: bool = False) -> bool:
        """Write `network-snapshot-NNNNNN.pkl`; with a validation value, keep only the best. Return whether it is kept.

        An `interim` snapshot never becomes the best.
        """
        best, name = self.best, f"network-snapshot-{nimg // 1000:06d}.pkl"
        if self.objective.snapshot_on_best:
            if best.value is not None and not value < best.value and not math.isnan(best.value):
                print0(f"Validation loss {value:.4f}; the best stays {best.value:.4f} ({best.name})")
                return False
            print0(f"Validation loss {value:.4f}: {name} is the best so far")
        data["info"].update(nimg=nimg, validation_loss=value, version=dnnlib.__version__, options=to_dict(self.config))
        path = os.path.join(self.run_dir, name)
        checkpoint.require_space(path, checkpoint.size_of(data))
        persistence.save_snapshot(path, data)
        if interim:
            return True
        outdated, best.value, best.name = best.name, value, name
        if self.objective.snapshot_on_best and outdated not in (None, name, self._best_of_state):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(self.run_dir, outdated))
        return True

    def show(self, nimg: int, data: dict) -> None:
        """Write a picture of samples, and show a snapshot to the trackers.

        A network that makes no picture, such as one with infinite values for a while, may still be trained further.
        """
        picture = None
        if self.draw_samples is not None and nimg > self.config.batch_size:
            path = os.path.join(self.run_dir, f"samples-{nimg // 1000:06d}.png")
            try:
                with self.objective.trained["net"].exported_here() as net:
                    self.draw_samples(net, path, self.objective.dataset.class_names)
                picture = path
            except (dnnlib.UserError, RuntimeError, MemoryError, OSError) as e:  # memory: also a RuntimeError
                print0(f"Warning: no picture of samples: {dnnlib.one_line(e) or type(e).__name__}")
        if self.trackers is not None:
            self.trackers.snapshot(data["info"], picture, nimg)

    def save_state(self, nimg: int, weights: dict) -> None:
        """Write `training-state-NNNNNN.pt`, and keep the newest `config.keep` states."""
        checkpoint.save_state(
            os.path.join(self.run_dir, f"training-state-{nimg // 1000:06d}.pt"),
            dict(config=to_dict(self.config), nimg=nimg, best=asdict(self.best), objective=weights),
        )
        checkpoint.prune_states(self.run_dir, self.config.keep)
        self.remove_outdated()

    def remove_outdated(self, resumed: bool = False) -> None:
        """Delete the snapshots before the best one, once a state says which is the best.

        Until then a run that resumes from an older state still needs them. A run that is `resumed` also deletes those
        after the best one: its state does not know them, and no better one may follow.
        """
        self._best_of_state = best = self.best.name
        if self.objective.snapshot_on_best and best is not None and os.path.exists(os.path.join(self.run_dir, best)):
            for name in os.listdir(self.run_dir):
                match = re.fullmatch(r"network-snapshot-([0-9]+)\.pkl", name)
                if match and (int(match[1]) < int(best[17:-4]) or (resumed and int(match[1]) > int(best[17:-4]))):
                    os.remove(os.path.join(self.run_dir, name))

    def newest(self) -> str:
        """Say what a run that ends here can continue from, for the last line on the screen."""
        states = checkpoint.states(self.run_dir)
        if not states:
            return "no state had been saved yet"
        return f"{states[0].name} is saved. To continue: the same command with --resume={self.run_dir}"
