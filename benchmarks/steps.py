"""Run training steps in a process of their own, one step per turn (see `benchmarks.core.FormProcess`).

python -m benchmarks.steps '{"form": "ours", "script": "train", "args": ["--data=...", ...]}'

The form 'ours' is the script itself, with its loop, data and process settings; it waits before every step. The form
'plain' is the same method without the loop, on a batch that is already in memory.
"""

from __future__ import annotations

import dnnlib.before_torch  # noqa: F401  (PyTorch reads once what it sets)

import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch

import train
import train_discriminator
import train_noise
from archives.dataset import ImageDataset
from benchmarks.core import Turns
from benchmarks.plain import plain_objective
from benchmarks.roofline import count
from torch_utils.misc import count_parameters
from torch_utils.training_stats import Stats
from training import options, run
from training.objective import Objective

__all__ = ["OBJECTIVES", "ours", "plain"]

OBJECTIVES = {
    "train": (train, "DSM"),
    "train_noise": (train_noise, "TDSM"),
    "train_discriminator": (train_discriminator, "DiscriminatorObjective"),
}
# The run lasts until it is stopped from outside, and no tick interrupts it.
ENDLESS = ["--duration=1000", "--tick=1e9", "--snap=1000000", "--dump=1000000", "--seed=0"]
NIMG = 10_000


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _paced(cls: type[Objective], turn: Callable[[Any], bool]) -> type[Objective]:
    class Paced(cls):
        _start: float | None = None

        def step(self, *args: Any, **kwargs: Any) -> None:
            # The time from one call to the next is a whole step, with the loop's work around it.
            _wait_for(self.device)
            if not turn(None if self._start is None else time.perf_counter() - self._start):
                sys.exit(0)
            self._start = time.perf_counter()
            super().step(*args, **kwargs)

    return Paced


def ours(script: str, args: Sequence[str], turn: Callable[[Any], bool]) -> None:
    """Train as `python script.py ARGS` does.

    Before every step, `turn(seconds of the last step, or None)` decides whether the training continues.
    """
    module, name = OBJECTIVES[script]
    with mock.patch.object(module, name, _paced(getattr(module, name), turn)):
        module.main([*args, *ENDLESS], standalone_mode=False)


def plain(script: str, args: Sequence[str], serve: Callable[[Callable[[], None], dict], None]) -> None:
    """Build the method of `script` in the plain form, with the script's options, and call `serve(step, facts)`.

    `facts`: FLOPs and bytes of a step, and the number of parameters.
    """
    module, name = OBJECTIVES[script]

    def start(
        opts: dict[str, Any],
        method: str,
        make_objective: Callable[..., Objective],
        settings: Callable[..., dict[str, Any]] = options.unet,
        *,
        require_labels: bool = False,
        draw_samples: Any = None,
        **sections: Any,
    ) -> None:
        # What `run.start` does, without anything that it sets in the process.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        device = torch.device(opts["device"])
        dataset = ImageDataset(opts["data"], use_labels=opts["cond"])
        config = options.make_config(opts, method, dataset, settings(opts, dataset), **sections)
        config.seed = opts["seed"]
        objective, stats = make_objective(config, dataset, device), Stats(device)
        objective.setup()
        items = torch.arange(opts["batch"]) % len(dataset)
        images, labels = dataset.images(items).to(device), dataset.onehot(items).to(device)
        items, nimg = items.to(device), itertools.count(NIMG, opts["batch"])

        def step() -> None:
            objective.step(images, labels, next(nimg), stats, items)
            _wait_for(device)

        parameters = count_parameters(objective.trained["net"].net)
        work = count(step, parameters)
        serve(step, dict(flops=work.flops, bytes=work.bytes, parameters=parameters))

    with (
        mock.patch.object(module, name, plain_objective(getattr(module, name))),
        mock.patch.object(run, "start", start),
    ):
        module.main([*args, *ENDLESS, "--precision=fp32", "--compile=0"], standalone_mode=False)


if __name__ == "__main__":
    turns, wanted = Turns(), json.loads(sys.argv[1])
    if wanted["form"] == "ours":
        ours(wanted["script"], wanted["args"], turns.wait)
    else:
        plain(wanted["script"], wanted["args"], turns.serve)
