"""Print what runs cost on many GPUs according to a model, and check the model on two processes of this machine.

\b
  python -m benchmarks.scaling
  python -m benchmarks.scaling --measure=0 --gpus=64 --peak=312e12 --memory=80e9

docs/scaling.md explains the tables.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable

import click
import numpy as np
import psutil
import torch

import dnnlib.cli
from benchmarks import cost_model, scaling_data
from benchmarks.cost_model import Hardware, Workload
from benchmarks.data import RandomImages, train_config
from benchmarks.table import RESULTS
from dnnlib.cli import BOOL, INT_LIST, FloatRange
from torch_utils import checkpoint, distributed
from torch_utils.training_stats import Stats
from training.networks import EDMPrecond, UNetBlock
from training.networks_resnet import Classifier, ResBlock, resnet_kwargs
from training.objectives.dsm import DSM
from training.presets import network_kwargs
from training.trained_network import TrainedNetwork

WORKLOADS = (
    Workload("CIFAR-10", 50_000, 32, 3, 10, "ddpmpp", 512, 200e6),
    Workload("ImageNet-64", 1_281_167, 64, 3, 1000, "adm", 4096, 2500e6),
    Workload("100M images", 100_000_000, 64, 3, 1000, "adm", 4096, 2500e6),
)
PAIRS = (1, 3, 10)  # other classes that TDSM keeps per image (--pairs=K)
AUGMENT = 9  # width of the augmentation label vector
SIZES = [1 << k for k in range(10, 25, 2)]  # bytes of the all-reduces that are measured
ARCH, RESOLUTION, BATCH, CLASSES = "ddpmpp_tiny", 16, 16, 10  # the step that is measured; BATCH images per process


def counts_of(arch: str, resolution: int, channels: int, classes: int) -> cost_model.Counts:
    """Count the costs of the denoiser of a preset."""
    net = EDMPrecond(resolution, channels, classes, augment_dim=AUGMENT, **network_kwargs(arch))
    args = (
        torch.empty(1, channels, resolution, resolution),
        torch.empty(1),
        torch.empty(1, classes),
        False,
        torch.empty(1, AUGMENT),
    )
    return cost_model.count(net, args, (UNetBlock,))


def classifier_flops(work: Workload) -> float:
    """Return the FLOPs of TDSM's classifier for one image."""
    kwargs = resnet_kwargs(work.arch, work.resolution, work.channels, work.classes)
    net = Classifier(work.resolution, work.channels, work.classes, **kwargs)
    args = (torch.empty(1, work.channels, work.resolution, work.resolution), torch.empty(1))
    return cost_model.count(net, args, (ResBlock,)).forward


def model_rows(hw: Hardware, gpus: list[int]) -> list[dict]:
    """Return a row for each workload, number of GPUs and method."""
    known: dict[tuple, cost_model.Counts] = {}
    rows = []
    for work in WORKLOADS:
        key = work.arch, work.resolution, work.channels, work.classes
        counts = known[key] = known.get(key) or counts_of(*key)
        classifier = classifier_flops(work)
        for n in gpus:
            for pairs in (0, *PAIRS):
                extra = pairs * counts.forward + classifier if pairs else 0.0
                rows.append(
                    dict(
                        work=work.name,
                        method=f"TDSM --pairs={pairs}" if pairs else "DSM",
                        params=counts.params,
                        flops_image=counts.train + extra,
                        **cost_model.cost(work, counts, n, hw, extra),
                    )
                )
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Two processes on this machine


def make_objective(data: RandomImages, shard: bool) -> DSM:
    """Return the objective of `train.py` on `data`, for all processes together."""
    batch = BATCH * distributed.get_world_size()
    config = train_config(data, f"--arch={ARCH}", "--augment=0", f"--batch={batch}", f"--shard={int(shard)}")
    objective = DSM(config, data, torch.device("cpu"))
    objective.setup()
    return objective


def median_seconds(step: Callable[[], object], repeats: int) -> float:
    """Return the median seconds of `repeats` calls, after one that does not count."""
    step()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def sent(step: Callable[[], object], repeats: int) -> float:
    """Return the bytes that all processes send over this machine's loopback in a call.

    The traffic of other programs is included.
    """
    step()
    distributed.barrier()
    before = psutil.net_io_counters(pernic=True)["lo"].bytes_sent
    for _ in range(repeats):
        step()
    distributed.barrier()
    return (psutil.net_io_counters(pernic=True)["lo"].bytes_sent - before) / repeats


def worker(rank: int, world: int, port: int, repeats: int, path: str) -> None:
    """Measure steps as one of `world` processes, and with several also the bytes that they send and their all-reduces.

    Rank 0 writes the results to `path`, as JSON.
    """
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    distributed.init("cpu")
    found: dict = dict(world=world)
    data = RandomImages(BATCH, 3, RESOLUTION, CLASSES)
    labels = data.onehot()
    reduced = []
    reduce_bucket = TrainedNetwork._reduce_bucket

    def counting(self, state, bucket):
        reduced.append(bucket.buffer().nbytes)
        return reduce_bucket(self, state, bucket)

    TrainedNetwork._reduce_bucket = counting
    for form in ("ddp", "shard") if world > 1 else ("ddp",):
        objective, stats = make_objective(data, form == "shard"), Stats(torch.device("cpu"))

        def step(objective=objective, stats=stats) -> None:
            objective.step(data.pixels, labels, 10_000, stats)

        found[form] = dict(seconds=median_seconds(step, repeats))
        if world > 1:
            reduced.clear()
            step()
            found[form].update(hook_bytes=sum(reduced), loopback=sent(step, repeats))
        found["params"] = sum(p.numel() for p in objective.trained["net"].net.parameters())
        objective.close()
    if world > 1:
        found["all_reduce"] = {}
        for size in SIZES:
            tensor = torch.zeros(size // 4)
            found["all_reduce"][size] = median_seconds(
                lambda tensor=tensor: torch.distributed.all_reduce(tensor), 2 * repeats
            )
    distributed.barrier()
    if rank == 0:
        with open(path, "w") as file:
            json.dump(found, file)
    distributed.shutdown()


def run_processes(world: int, repeats: int) -> dict:
    """Return what `worker` measures on `world` processes."""
    with socket.socket() as s, tempfile.TemporaryDirectory() as folder:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
        s.close()
        path = os.path.join(folder, "found.json")
        torch.multiprocessing.spawn(worker, (world, port, repeats, path), nprocs=world)
        with open(path) as file:
            return json.load(file)


def fit_line(times: dict[str, float]) -> tuple[float, float]:
    """Fit t = 2 latency + size / bandwidth to the seconds t of each size, and return (latency, bandwidth).

    The fit minimizes relative errors.
    """
    sizes, seconds = np.array([float(size) for size in times]), np.array(list(times.values()))
    design = np.stack([2 / seconds, sizes / seconds], axis=1)
    (latency, inverse), *_ = np.linalg.lstsq(design, np.ones(len(sizes)), rcond=None)
    return float(latency), float(1 / inverse)


def compare_processes(repeats: int) -> list[dict]:
    """Return rows (what, model, measured) about steps on one and two processes, bytes, and all-reduces."""
    one, two = run_processes(1, repeats), run_processes(2, repeats)
    params = one["params"]
    size = cost_model.WEIGHT * params
    latency, bandwidth = fit_line(two["all_reduce"])
    counts = counts_of(ARCH, RESOLUTION, 3, CLASSES)
    here = Hardware(link=bandwidth, latency=latency, jitter=0.0)
    model = cost_model.simulate_steps(counts.layers, one["ddp"]["seconds"], 2, here, steps=1)
    middle = str(SIZES[len(SIZES) // 2])
    rows = [
        ("bytes that DDP reduces per step and process (counted in its hook)", size, two["ddp"]["hook_bytes"]),
        ("bytes sent per step with DDP, both processes", 2 * cost_model.ddp_bytes(params, 2), two["ddp"]["loopback"]),
        (
            "bytes sent per step with --shard, both processes",
            2 * cost_model.fsdp_bytes(params, 2, 2, scatter=2)[0],
            two["shard"]["loopback"],
        ),
        (
            f"seconds of an all-reduce of {int(middle) // 1024} KiB, from the fitted line",
            cost_model.all_reduce_seconds(int(middle), 2, here),
            two["all_reduce"][middle],
        ),
        ("seconds of a step on 2 processes, from 1 process and the fitted line", model["step"], two["ddp"]["seconds"]),
    ]
    return [dict(what=what, model=m, measured=found) for what, m, found in rows] + [
        dict(what="seconds of a step on 1 process", model=None, measured=one["ddp"]["seconds"]),
        dict(what="seconds of a step on 2 processes with --shard", model=None, measured=two["shard"]["seconds"]),
        dict(what="latency of a message between 2 processes, seconds", model=None, measured=latency),
        dict(what="bandwidth between 2 processes, bytes/s", model=None, measured=bandwidth),
    ]


def state_rate(size: int = 128 << 20) -> float:
    """Measure the bytes/s at which `checkpoint.save_state` writes, hashes and reads back a state."""
    with tempfile.TemporaryDirectory() as folder:
        state = dict(weights=torch.zeros(size // 4))
        seconds = median_seconds(lambda: checkpoint.save_state(os.path.join(folder, "s.pt"), state), 3)
    return size / seconds


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def number(value: float | str | None) -> str:
    """Return a cell of a table: numbers with three digits or more, texts as they are, None as nothing."""
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(rows: list[dict], columns: dict[str, tuple[str, float]]) -> str:
    """Return a Markdown table. `columns` maps a heading to (key of a row, unit to divide by)."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = (
            row[key] if isinstance(row[key], (str, type(None))) else row[key] / unit for key, unit in columns.values()
        )
        lines.append("| " + " | ".join(map(number, cells)) + " |")
    return "\n".join(lines) + "\n"


COMPUTE = {
    "data": ("work", 1),
    "GPUs": ("n", 1),
    "method": ("method", 1),
    "batch": ("batch", 1),
    "images per GPU": ("per_gpu", 1),
    "steps": ("steps", 1),
    "GFLOP per image": ("flops_image", 1e9),
    "EFLOP per run": ("flops_run", 1e18),
    "step, ms": ("step", 1e-3),
    "waiting, ms": ("waiting", 1e-3),
    "network, ms": ("exposed", 1e-3),
    "hours": ("hours", 1),
    "GPU hours": ("gpu_hours", 1),
}
BYTES = {
    "data": ("work", 1),
    "GPUs": ("n", 1),
    "M weights": ("params", 1e6),
    "DDP sends, MB per step": ("ddp_bytes", 1e6),
    "--shard: in the machine": ("fsdp_within", 1e6),
    "between machines": ("fsdp_between", 1e6),
    "weights and optimizer, GB": ("ddp_memory", 1e9),
    "--shard": ("fsdp_memory", 1e9),
    "activations per image, MB": ("activations", 1e6),
    "images at a time": ("ddp_images", 1),
    "archive, GB": ("archive", 1e9),
    "read, MB/s": ("read", 1e6),
    "state, GB": ("state", 1e9),
    "snapshots, GB": ("snapshots", 1e9),
}
FAILURES = {
    "data": ("work", 1),
    "GPUs": ("n", 1),
    "state written in, s": ("write", 1),
    "failures per run": ("failures", 1),
    "a state every, min": ("dump_seconds", 60),
    "--dump at --tick=50": ("dump_ticks", 1),
    "time lost, %": ("lost", 1e-2),
}
CHECKED = {"what": ("what", 1), "model": ("model", 1), "measured": ("measured", 1)}
ORDER = {
    "images": ("images", 1),
    "CPU seconds per epoch": ("seconds", 1),
    "MB per process": ("bytes", 1e6),
    "MB between two epochs": ("peak", 1e6),
}
OPENING = {
    "images in the ZIP": ("images", 1),
    "labels": ("labels", 1),
    "directory, MB": ("directory", 1e6),
    "first opened in, CPU s": ("first", 1),
    "with at most, MB": ("peak", 1e6),
    "later opened in, CPU s": ("seconds", 1),
    "memory per process, MB": ("bytes", 1e6),
}


def hardware_options(command: Callable) -> Callable:
    """Decorate a command with one option for each assumption about hardware."""
    for field in reversed(dataclasses.fields(Hardware)):
        kind = click.IntRange(min=1) if field.name == "machine" else FloatRange(min=0, min_open=field.name != "jitter")
        command = click.option(
            f"--{field.name.replace('_', '-')}",
            *(["--utilisation"] if field.name == "utilization" else []),  # its name in version 0.1
            field.name,
            metavar="NUMBER",
            type=kind,
            default=field.default,
            help=field.metadata["help"],
        )(command)
    return command


@click.command(cls=dnnlib.cli.Command, help=__doc__)
@click.option("--gpus", metavar="LIST", type=INT_LIST, default="8,1000", help="Numbers of GPUs")
@click.option("--measure", type=BOOL, default=True, help="Also measure on this machine, which takes about five minutes")
@click.option("--repeats", metavar="INT", type=click.IntRange(min=3), default=15, help="How many times to measure")
@click.option("--entries", metavar="LIST", type=INT_LIST, default="100000,1000000", help="Images in the synthetic ZIPs")
@click.option(
    "--orders",
    metavar="LIST",
    type=INT_LIST,
    default="1000000,10000000,100000000",
    help="Sizes of the data sets whose order is measured",
)
@click.option(
    "--out",
    metavar="JSON",
    callback=dnnlib.cli.output_file,
    default=lambda: os.path.join(RESULTS, f"{datetime.date.today()}-scaling.json"),
    show_default=False,
    help="Where to save the tables  [default: benchmarks/results/DATE-scaling.json]",
)
@hardware_options
def main(
    gpus: list[int], measure: bool, repeats: int, entries: list[int], orders: list[int], out: str, **hardware
) -> None:
    hw = Hardware(**hardware)
    result: dict = dict(
        machine=dict(cpus=os.cpu_count(), torch=torch.__version__, load=os.getloadavg()),
        hardware=dataclasses.asdict(hw),
        model=model_rows(hw, gpus),
    )
    plain = [row for row in result["model"] if row["method"] == "DSM"]
    sections = [("Time", result["model"], COMPUTE), ("Bytes", plain, BYTES), ("Failures", plain, FAILURES)]
    if measure:
        result["checked"] = compare_processes(repeats)
        result["state_bytes_per_second"] = state_rate()
        result["orders"] = [scaling_data.order_cost(n) for n in orders]
        result["opening"] = [scaling_data.opening_cost(n, labels) for n in entries for labels in (False, True)]
        result["every_image_once"] = scaling_data.each_image_once(20_011, 1000, 7)
        sections += [
            ("Two processes here", result["checked"], CHECKED),
            ("Order", result["orders"], ORDER),
            ("Opening an archive", result["opening"], OPENING),
        ]
    for title, rows, columns in sections:
        click.echo(f"\n### {title}\n\n{table(rows, columns)}")
    if measure:
        click.echo(
            f"States: {result['state_bytes_per_second'] / 1e6:,.0f} MB/s. 1,000 processes, 3 epochs: "
            f"{'every image once per epoch' if result['every_image_once'] else 'IMAGES WERE LOST OR REPEATED'}."
        )
    with dnnlib.atomic_open(out, "w") as file:
        json.dump(result, file, indent=1)
    click.echo(f"Saved to {out}.")


if __name__ == "__main__":
    main()
