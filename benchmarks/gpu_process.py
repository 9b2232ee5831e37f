"""The process that works through the lines of `python -m benchmarks.gpu`.

python -m benchmarks.gpu_process '{"part": "correct", "tiny": false, "first": 0}'

A device that fails can take its process with it. So the lines have a process of their own, which the command replaces.
"""

from __future__ import annotations

import dnnlib.before_torch  # noqa: F401  (PyTorch reads once what it sets)

import json
import sys
from typing import Any

import torch

from benchmarks import table
from benchmarks.core import Turns
from benchmarks.gpu_lines import device_of, lines_of, perform
from benchmarks.roofline import measure_peaks


def main() -> None:
    """Perform one line per turn, from number `first` on. The facts are a description of the machine."""
    turns, wanted = Turns(), json.loads(sys.argv[1])
    device = device_of(wanted["tiny"])
    torch.backends.cudnn.benchmark = wanted["part"] == "speed"  # as training does
    peaks = measure_peaks(device, *([128, 1 << 16] if wanted["tiny"] else []))
    answer: Any = table.machine(device, peaks)
    for line in lines_of(wanted["part"], wanted["tiny"])[wanted["first"] :]:
        if not turns.wait(answer):
            return
        answer = perform(line)
        if answer["row"] is not None:
            answer["row"] = table.record(wanted["part"], answer["row"], peaks)
    turns.wait(answer)


if __name__ == "__main__":
    main()
