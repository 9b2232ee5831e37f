"""The states of sampling, from noise to image, as one .npz (docs/formats.md, Trajectories)."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import zipfile
from collections import deque
from collections.abc import Callable
from typing import IO

import numpy as np
import torch

import dnnlib
from sampling.output import Batches
from torch_utils import distributed

__all__ = ["Trajectories"]


class Trajectories:
    """Keeps what a sampler passes through and writes it to the file `path`. Every process has one.

    Only two batches are in memory: the states wait on disk until all are there.
    """

    def __init__(self, path: str):
        self._path, self._folder = path, os.path.dirname(os.path.abspath(path))
        self._spool = tempfile.TemporaryFile(dir=self._folder if os.path.isdir(self._folder) else None)
        self._waiting: deque[np.ndarray] = deque()
        self._seeds: list[int] = []
        self._classes: list[int] = []
        self._shape: tuple[int, ...] = ()
        self._levels: list[tuple[float, float]] = []

    def record(self, sampler: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """Return the same sampler, whose states are kept."""

        def run(*args, **kwargs) -> torch.Tensor:
            states, levels = [], []

            def observe(x: torch.Tensor, sigma: float, scale: float) -> None:
                states.append(x.to(torch.float32))
                levels.append((sigma, scale))

            images = sampler(*args, **kwargs, observe=observe)
            self._waiting.append(torch.stack(states, dim=1).cpu().numpy())
            self._levels = levels
            return images

        return run

    def watch(self, batches: Batches) -> Batches:
        """Yield the same batches; note down which states are those of which seeds and classes."""
        for seeds, images, classes in batches:
            states = self._waiting.popleft()[: len(seeds)]  # a compiled network makes more images than asked for
            self._shape = states.shape[1:]
            self._spool.write(np.ascontiguousarray(states, dtype="<f4"))
            self._seeds += seeds
            self._classes += [] if classes is None else classes.tolist()
            yield seeds, images, classes

    def save(self) -> None:
        """Write the file: `states` float32 [N,T+1,C,H,W] from noise to image, `sigma` and `scale` [T+1], `seeds` [N].

        state / scale = image + sigma noise. Conditional networks have `classes` [N], too. Collective. OSError: the disk
        refuses.
        """
        parts = [self._part(rank) for rank in range(1, distributed.get_world_size())]
        everything = distributed.all_gather_object((self._seeds, self._classes, self._shape, self._levels))
        with contextlib.ExitStack() as end:
            distributed.on_rank0(lambda: os.makedirs(self._folder, exist_ok=True))
            distributed.together(lambda: self._write_part(end))
            distributed.on_rank0(lambda: self._write(everything, parts))

    def _part(self, rank: int) -> str:
        return os.path.join(self._folder, f".{os.path.basename(self._path)}.part{rank}")

    def _write_part(self, end: contextlib.ExitStack) -> None:
        """Give rank 0 the states of this process."""
        rank = distributed.get_rank()
        if rank > 0:
            end.callback(_remove, self._part(rank))
            with open(self._part(rank), "wb") as file:
                self._copy_spool(file)

    def _copy_spool(self, file: IO[bytes]) -> None:
        self._spool.seek(0)
        shutil.copyfileobj(self._spool, file, 2**22)

    def _write(self, everything: list[tuple], parts: list[str]) -> None:
        seeds, classes, shapes, levels = zip(*everything, strict=True)
        shape, steps = max(shapes, key=len), max(levels, key=len)  # a process without images knows neither
        small = dict(
            sigma=np.array([sigma for sigma, _ in steps]),
            scale=np.array([scale for _, scale in steps]),
            seeds=np.array(sum(seeds, []), dtype=np.int64),
        )
        if any(classes):
            small["classes"] = np.array(sum(classes, []), dtype=np.int64)
        with dnnlib.atomic_open(self._path) as file, zipfile.ZipFile(file, "w") as archive:
            with archive.open("states.npy", "w", force_zip64=True) as member:
                header = dict(descr="<f4", fortran_order=False, shape=(len(small["seeds"]), *shape))
                np.lib.format.write_array_header_1_0(member, header)
                self._copy_spool(member)
                for part in parts:
                    with open(part, "rb") as states:
                        shutil.copyfileobj(states, member, 2**22)
            for name, array in small.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)
