"""The options all training scripts share, the run's configuration, and the run directory."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Collection

import click
import numpy as np
import torch

import dnnlib
from archives.dataset import ImageDataset
from archives.label_noise import load_matrix, transition_matrix
from dnnlib.cli import BOOL, INT_LIST, FloatRange
from torch_utils import checkpoint, distributed, persistence
from torch_utils.distributed import print0
from training.augment import default_augment
from training.networks_resnet import resnet_kwargs
from training.noise_levels import NoiseLevels
from training.objective import Objective
from training.presets import ARCHS, network_kwargs
from training.training_loop import last_nimg, training_loop

__all__ = ["noise_options", "run", "stated_transition", "training_options"]

# What a resumed run may change; any other difference would make it another run.
MAY_DIFFER = {
    "num_processes",
    "shard",
    "total_nimg",
    "kimg_per_tick",
    "snapshot_ticks",
    "state_ticks",
    "keep",
    "workers",
    "dataset.cache",
    "cudnn_bench",
    "max_bad_steps",
    "desc",
    "tensorboard",
    "wandb",
}


def training_options(leave_out: Collection[str] = (), **defaults) -> Callable:
    """Decorator that adds the common options; `defaults` overrides defaults by parameter name (duration in Mimg, ...).

    `leave_out`: parameter names of those that mean nothing to the script; what they stand for in the configuration it
    gives to `run` itself.
    """
    d = dict(cond=False, duration=200.0, batch=512, lr=1e-3, ema=0.5, dropout=0.13, augment=0.12) | defaults
    positive, share = FloatRange(min=0, min_open=True), FloatRange(min=0, max=1)
    length, length_or_0 = (
        FloatRange(min=0, min_open=True, max=1e12),
        FloatRange(min=0, max=1e12),
    )  # become counts of images
    # fmt: off
    options = [
        click.option("--outdir", metavar="DIR", required=True, help="Where the run directory is made"),
        click.option("--data", metavar="ZIP|DIR", required=True, help="Training images: a dataset_tool.py archive or a folder"),
        click.option("--cond", type=BOOL, default=d["cond"], help="Train a class-conditional model on the archive's labels"),
        click.option("--arch", type=click.Choice(ARCHS), default="ddpmpp", help="Network architecture"),
        click.option("--precond", type=click.Choice(["vp", "ve", "edm"]), default="edm",
                     help="Preconditioning and noise distribution"),
        click.option("--P_mean", "P_mean", metavar="FLOAT", type=FloatRange(), help="Mean of ln sigma in training, --precond=edm only; small images want more noise [default: -1.2]"),
        click.option("--P_std", "P_std", metavar="FLOAT", type=positive, help="Standard deviation of ln sigma in training, --precond=edm only [default: 1.2]"),
        click.option("--duration", metavar="MIMG", type=length, default=d["duration"], help="Length of training, millions of images"),
        click.option("--batch", "--batch_size", "batch", metavar="INT", type=click.IntRange(min=1), default=d["batch"], help="Batch size over all processes"),
        click.option("--batch-gpu", metavar="INT", type=click.IntRange(min=1), help="Images at a time on one process [default: its whole share]"),
        click.option("--cbase", metavar="INT", type=click.IntRange(min=1), help="Width: channels of the network's first level [default: by architecture]"),
        click.option("--cres", metavar="LIST", type=INT_LIST, help="Width multiplier of each level, e.g. 1,2,2 [default: by architecture]"),
        click.option("--lr", metavar="FLOAT", type=positive, default=d["lr"], help="Learning rate"),
        click.option("--ema", metavar="MIMG", type=length_or_0, default=d["ema"], help="Half-life of the weights' moving average, millions of images"),
        click.option("--dropout", metavar="P", type=share, default=d["dropout"], help="Dropout probability"),
        click.option("--augment", metavar="P", type=share, default=d["augment"], help="Probability of each non-leaking augmentation; 0 is none"),
        click.option("--xflip", type=BOOL, default=False, help="Add every image's mirror image to the data set"),
        click.option("--precision", type=click.Choice(["fp32", "tf32", "bf16", "fp16"]), help="Arithmetic inside the networks; fp16 is for CUDA only [default: fp32]"),
        click.option("--fp16", type=BOOL, default=False, help="The same as --precision=fp16"),
        click.option("--ls", metavar="FLOAT", type=positive, default=1.0, help="Loss scaling"),
        click.option("--bench", type=BOOL, default=True, help="Let cuDNN search for the fastest algorithms"),
        click.option("--compile", type=BOOL, default=False, help="Compile the network with torch.compile"),
        click.option("--shard", type=BOOL, default=False,
                     help="Shard weights, gradients and optimizer state over the processes of a machine (FSDP2); one process: no effect"),
        click.option("--cache", type=BOOL, default=True, help="Keep decoded images in memory (on the device when they fit)"),
        click.option("--workers", metavar="INT", type=click.IntRange(min=1), default=1, help="Threads that read images when they are not cached"),
        click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", help="Where to train"),
        click.option("--desc", metavar="STR", help="Text for the end of the run directory's name"),
        click.option("--nosubdir", is_flag=True, help="Write into --outdir itself instead of a new run directory"),
        click.option("--tick", metavar="KIMG", type=length, default=50.0, help="Report every so many thousand images"),
        click.option("--snap", metavar="TICKS", type=click.IntRange(min=1), default=50, help="Save a network snapshot every so many ticks"),
        click.option("--dump", metavar="TICKS", type=click.IntRange(min=1), default=500, help="Save the training state every so many ticks"),
        click.option("--keep", metavar="INT", type=click.IntRange(min=1), default=2, help="How many training states to keep"),
        click.option("--max_bad_steps", metavar="INT", type=click.IntRange(min=1), default=100, help="Stop after so many steps in a row with non-finite losses or gradients"),
        click.option("--seed", metavar="INT", type=click.IntRange(min=0, max=2**63 - 1), help="Random seed [default: random]"),
        click.option("--lr_rampup_kimg", metavar="KIMG", type=length_or_0, default=10000.0, help="Learning-rate ramp-up, thousands of images"),
        click.option("--label-dropout", metavar="P", type=share, default=0.0, help="Drop the label this often (for --cfg in generate.py)"),
        click.option("--transfer", metavar="PKL|URL", help="Start from the weights of a snapshot"),
        click.option("--resume", metavar="PT|DIR|latest", help="Continue a run: a training state, a run directory, or the newest run below --outdir"),
        click.option("--tensorboard", type=BOOL, default=False, help="Write the statistics for TensorBoard too"),
        click.option("--wandb", metavar="PROJECT", help="Send the statistics to this Weights & Biases project too"),
        click.option("--trust_pickle", is_flag=True, help="Run the code embedded in snapshots that are not ours. Only for files you would execute"),
        click.option("-n", "--dry-run", is_flag=True, help="Print the configuration and stop"),
    ]
    # fmt: on

    def decorate(f):
        for option in reversed(options):
            f = option(f)
        f.__click_params__ = [p for p in f.__click_params__ if p.name not in leave_out]
        return f

    return decorate


def noise_options(*names: str) -> Callable:
    """Decorator for --noise_type (of the given names), --noise_rate, --noise_matrix."""
    options = [
        click.option("--noise_type", type=click.Choice(names), help="How labels were corrupted"),
        click.option("--noise_rate", metavar="R", type=FloatRange(min=0, max=1), help="Share of wrong labels"),
        click.option(
            "--noise_matrix",
            metavar="FILE",
            help="T [C,C] as .npy, .json or a label file of detect_noise.py, rows: clean label; for --noise_type=matrix",
        ),
    ]

    def decorate(f):
        for option in reversed(options):
            f = option(f)
        return f

    return decorate


def stated_transition(
    noise_type: str | None, rate: float | None, matrix: str | None, dataset: ImageDataset
) -> np.ndarray | None:
    """T [C,C] that --noise_type, --noise_rate and --noise_matrix describe for this data set; None: nothing stated."""
    if (noise_type == "matrix") != (matrix is not None):
        raise click.UsageError("--noise_type=matrix and --noise_matrix=FILE go together")
    if (noise_type in ("sym", "asym", "pair")) != (rate is not None):
        raise click.UsageError("--noise_rate goes with --noise_type=sym, asym or pair, and they with it")
    if noise_type in (None, "learn"):
        return None
    if noise_type == "clean":
        return np.eye(dataset.label_dim)
    return transition_matrix(
        noise_type,
        rate,
        dataset.label_dim,
        family=dataset.family,
        matrix=load_matrix(matrix, dataset.label_dim) if matrix else None,
    )


@distributed.guard(lambda: "before training began or after it")
def run(
    opts: dict,
    method: str,
    make_objective: Callable[[dict, ImageDataset, torch.device], Objective],
    *,
    require_labels: bool = False,
    draw_samples: Callable[[torch.nn.Module, str], None] | None = None,
    **extra,
) -> str | None:
    """Everything a training script does after parsing: configuration, run directory, resume, the loop.

    `extra` are the method's own settings (nested plain data), which may replace common ones. An option `num_epoch`
    counts passes over the data in place of --duration. `draw_samples`: see `training_loop`. Returns the run directory (None after --dry-run).
    """
    o = dnnlib.EasyDict(opts)
    if require_labels and not o.cond:
        raise click.UsageError(f"--cond=0: {method} trains on labels; leave --cond at 1")
    if o.get("fp16") and o.precision not in (None, "fp16"):
        raise click.UsageError(f"--fp16=1 contradicts --precision={o.precision}")
    if o.get("precond", "edm") != "edm" and (o.P_mean, o.P_std) != (None, None):
        raise click.UsageError(f"--P_mean and --P_std belong to --precond=edm, not {o.precond}")
    world = distributed.get_world_size()
    if o.batch % world:
        raise click.UsageError(f"--batch={o.batch} must be divisible by the number of processes ({world})")
    device = distributed.init(o.device)
    dataset = ImageDataset(o.data, use_labels=o.cond, xflip=o.xflip, cache=o.cache)
    if o.cond and not dataset.has_labels:
        raise dnnlib.UserError(f"--cond=1: {o.data} has no labels")

    if o.get("num_epoch") is not None:
        o.duration = o.num_epoch * len(dataset) / 1e6
    state, run_dir = find_state(o)
    config = make_config(o, method, dataset, extra)
    if state is None:
        config["seed"] = distributed.broadcast_object(int(torch.randint(1 << 31, [])) if o.seed is None else o.seed)
    else:
        config["seed"] = state["config"]["seed"] if o.seed is None else o.seed
        compare_configs(state["config"], config, o.resume)
        if (before := state["config"].get("num_processes")) != world:
            print0(f"{world} processes go on where {before} were: from here on with other random numbers.")
    if run_dir is None:
        run_dir = o.outdir if o.nosubdir else new_run_dir(o, dataset, config)
    if o.dry_run:
        print_summary(o, config, dataset, run_dir, device)
        print0("Dry run; exiting.")
        return None

    objective = make_objective(config, dataset, device)
    if o.transfer and state is None:
        transfer(objective, o)
    try:
        make = functools.partial(make_run_dir, run_dir, config, state is None, again=o.resume == "latest")
        distributed.together(lambda: make() if distributed.get_rank() == 0 else None)
        log_file = os.path.join(run_dir, "log.txt") if distributed.get_rank() == 0 else None
        with dnnlib.Logger(log_file, mode="a"):
            print_summary(o, config, dataset, run_dir, device)
            print0("".join(f"{line}\n" for line in objective.notes()), end="")
            training_loop(objective, dataset, config, run_dir, device, state, draw_samples)
        distributed.barrier()
    finally:
        objective.close()
        distributed.shutdown()
    return run_dir


def transfer(objective: Objective, o: dnnlib.EasyDict) -> None:
    """Start from the weights of --transfer."""
    path = persistence.find_snapshot(o.transfer)
    source = persistence.load_snapshot(path, trust_pickle=o.trust_pickle)["ema"]
    print0(f"Transferred {objective.trained['net'].transfer(source, path)} tensors from {path}")


def denoiser_config(o: dnnlib.EasyDict, method: str, dataset: ImageDataset) -> dict:
    """What the options of networks that know noise levels sigma say, for `make_config`."""
    if method in ("classifier", "discriminator"):
        kwargs = resnet_kwargs(o.arch, dataset.resolution, dataset.num_channels, dataset.label_dim, o.cbase, o.cres)
        kwargs["dropout"] = o.dropout
    else:
        kwargs = network_kwargs(o.arch, o.cbase, o.cres) | dict(dropout=o.dropout, label_dropout=o.label_dropout)
    return dict(
        network=dict(arch=o.arch, precond=o.precond, kwargs=kwargs),
        noise_levels=NoiseLevels(o.precond, **{k: o[k] for k in ("P_mean", "P_std") if o[k] is not None}).settings(),
        augment=default_augment(o.augment).settings() if o.augment else None,
        optimizer=dict(name=o.get("optimizer") or "adam", lr=o.lr),
        ema_halflife_nimg=round(o.ema * 1e6),
        lr_rampup_nimg=round(o.lr_rampup_kimg * 1e3),
        loss_scaling=o.ls,
    )


def make_config(o: dnnlib.EasyDict, method: str, dataset: ImageDataset, extra: dict) -> dict:
    """The run as one nested dict of plain data; sizes in images."""
    common = dict(
        method=method,
        dataset=dict(path=o.data, use_labels=o.cond, xflip=o.xflip, cache=o.cache),
        batch_size=o.batch,
        batch_gpu=o.batch_gpu,
        num_processes=distributed.get_world_size(),
        total_nimg=max(round(o.duration * 1e6), 1),
        kimg_per_tick=o.tick,
        snapshot_ticks=o.snap,
        state_ticks=o.dump,
        keep=o.keep,
        precision=o.precision or ("fp16" if o.get("fp16") else "fp32"),
        cudnn_bench=o.bench,
        compile=o.compile,
        shard=o.shard,
        workers=o.workers,
        max_bad_steps=o.max_bad_steps,
        seed=None,
        transfer=o.transfer,
        desc=o.desc,
        tensorboard=o.tensorboard,
        wandb=o.wandb,
    )
    return common | (denoiser_config(o, method, dataset) if "arch" in o else {}) | extra


def find_state(o: dnnlib.EasyDict) -> tuple[dict | None, str | None]:
    """The state that --resume names and the run directory to go on in; rank 0 looks, all ranks get the same answer."""
    find = o.resume and distributed.get_rank() == 0
    found = distributed.broadcast_object(distributed.together(lambda: _find_state(o) if find else None))
    if found is None:
        return None, None
    path, run_dir = found
    print0(f"Resuming from {path}")
    state = distributed.together(lambda: checkpoint.load_state(path))
    kinds = dict(config=dict, nimg=int, best=dict, objective=dict)
    if (
        any(type(state.get(k)) is not kind for k, kind in kinds.items())
        or state["nimg"] < 0
        or state["best"].keys() != {"value", "name"}
    ):
        raise dnnlib.UserError(f"--resume: {path} is not the state of a run of this program")
    return state, run_dir


def _find_state(o: dnnlib.EasyDict) -> tuple[str, str | None] | None:
    if o.resume == "latest":
        run_dir = o.outdir if o.nosubdir else checkpoint.latest_run(o.outdir)
        path = checkpoint.latest_state(run_dir) if run_dir else None
        if path is None:
            print0(f"--resume=latest: no complete training state below {o.outdir}; starting afresh")
            return None
        return path, run_dir
    if os.path.isdir(o.resume):
        path = checkpoint.latest_state(o.resume)
        if path is None:
            raise dnnlib.UserError(f"--resume: {o.resume} holds no complete training-state-*.pt")
        return path, o.resume
    if not os.path.isfile(o.resume):
        raise dnnlib.UserError(f"--resume: {o.resume} is neither a training state, nor a run directory, nor 'latest'")
    return o.resume, None


def flatten(config: dict, prefix: str = "") -> dict:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    flat = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def differing(old: dict, new: dict, besides: Collection[str] = ()) -> list[str]:
    """Every setting in which a continued run would not be the same run, in words."""
    old, new = flatten(json.loads(json.dumps(old))), flatten(json.loads(json.dumps(new)))
    return [
        f"{k}: {old.get(k)} there, {new.get(k)} here"
        for k in sorted(old | new)
        if k not in MAY_DIFFER and k not in besides and old.get(k) != new.get(k)
    ]


def compare_configs(old: dict, new: dict, name: str) -> None:
    """Raise UserError listing every setting in which the resumed run would not be the same run."""
    found = differing(old, new)
    if found:
        raise dnnlib.UserError(
            f"--resume={name}: that run had other options ({'; '.join(found)}); give the same, or start a "
            "new run from its weights with --transfer"
        )


def new_run_dir(o: dnnlib.EasyDict, dataset: ImageDataset, config: dict) -> str:
    """`00000-<dataset>-<cond>-<arch>-<precond>-gpus<N>-batch<B>-<dtype>[-desc]` with the next free number."""
    if distributed.get_rank() != 0:
        return distributed.broadcast_object(None)
    taken = [
        int(m.group()) for x in (os.listdir(o.outdir) if os.path.isdir(o.outdir) else []) if (m := re.match(r"\d+", x))
    ]
    parts = [
        f"{max(taken, default=-1) + 1:05d}",
        dataset.name,
        "cond" if o.cond else "uncond",
        config["network"]["arch"],
        config["network"]["precond"],
        f"gpus{distributed.get_world_size()}",
        f"batch{o.batch}",
        config["precision"],
        o.desc,
    ]
    return distributed.broadcast_object(os.path.join(o.outdir, "-".join(filter(None, parts))))


def make_run_dir(run_dir: str, config: dict, fresh: bool, again: bool = False) -> None:
    """Create the directory with training_options.json; a fresh run is refused where another run's files are.

    `again`: but not where this very run was interrupted before its first state.
    """
    if (
        fresh
        and os.path.isdir(run_dir)
        and any(re.match(r"(network-snapshot|training-state)-", x) for x in os.listdir(run_dir))
    ):
        if not (again and interrupted_early(run_dir, config)):
            raise dnnlib.UserError(
                f"--outdir: {run_dir} already holds a run; choose another folder, or continue it with --resume={run_dir}"
            )
    os.makedirs(run_dir, exist_ok=True)
    checkpoint.remove_leftovers(run_dir)
    with checkpoint.atomic_open(os.path.join(run_dir, "training_options.json"), "wt") as f:
        json.dump(config, f, indent=2)


def interrupted_early(run_dir: str, config: dict) -> bool:
    """Whether `run_dir` holds a run of these options that never came to save a state, nor to its end."""
    try:
        with open(os.path.join(run_dir, "training_options.json")) as f:
            same = not differing(json.load(f), config, besides=["seed"])
    except (OSError, ValueError):
        return False
    return same and not checkpoint.states(run_dir) and last_nimg(run_dir) < config["total_nimg"]


def print_summary(o: dnnlib.EasyDict, config: dict, dataset: ImageDataset, run_dir: str, device: torch.device) -> None:
    rows = {
        "Output directory": run_dir,
        "Data set": f"{o.data} ({len(dataset)} images, {dataset.num_channels} x {dataset.resolution}"
        f" x {dataset.resolution})",
        "Classes": dataset.label_dim or "unconditional",
        "Method": config["method"],
        "Architecture": config["network"]["arch"],
        "Preconditioning": config["network"]["precond"] or "none",
        "Processes": f"{distributed.get_world_size()} on {device.type}",
        "Batch size": o.batch,
        "Precision": config["precision"],
        "Seed": config["seed"],
    }
    print0(f"\nTraining options:\n{json.dumps(config, indent=2)}\n")
    print0("\n".join(f"{k + ':':<18s} {v}" for k, v in rows.items()) + "\n")
