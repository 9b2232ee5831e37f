"""Running a training script after its options are parsed: configuration, run directory, resume, the loop."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

import dnnlib
from archives.classes import check_class_numbers
from archives.dataset import ImageDataset
from dnnlib.cli import blame
from torch_utils import checkpoint, distributed, persistence
from torch_utils.distributed import print0
from training import options
from training.config import RunConfig, differences, named_files, settle, to_dict
from training.objective import Objective
from training.published_ddgan import build_generator, build_potential, is_checkpoint, load_checkpoint
from training.saver import Best, DrawSamples, fetch_best
from training.sharding import check_pytorch
from training.trackers import check_wandb
from training.training_loop import last_nimg, training_loop

__all__ = ["start"]


@distributed.guard(lambda: "before training began or after it")
def start(
    opts: dict[str, Any],
    method: str,
    make_objective: Callable[[RunConfig, ImageDataset, torch.device], Objective],
    settings: Callable[[dict[str, Any], ImageDataset], dict[str, Any]] = options.unet,
    *,
    network_options: str = "--arch, --cbase, --cres",
    require_labels: bool = False,
    draw_samples: DrawSamples | None = None,
    **sections: Any,
) -> str | None:
    """Train as the options `opts` say. Returns the run directory; None after --dry-run.

    `settings` and `sections` make the configuration (`options.make_config`). `network_options`: the options that choose
    the networks, for errors. `draw_samples(net, path, class_names)` writes a picture of samples beside each snapshot.
    """
    options.check_usage(opts, method, require_labels)
    with contextlib.ExitStack() as at_end:
        at_end.callback(distributed.shutdown)
        # Steps take seconds. A process that waits longer waits for one that hangs.
        device = distributed.init(opts["device"], datetime.timedelta(minutes=30))
        options.check_precision(opts, device)
        if opts["shard"] and distributed.get_world_size() > 1:
            with blame("--shard=1"):
                check_pytorch()
        if opts["wandb"] and not opts["dry_run"]:
            with blame("--wandb"):
                distributed.on_rank0(lambda: check_wandb(opts["wandb_mode"], opts["wandb_api_key"]))
        with blame("--data"):
            dataset = ImageDataset(opts["data"], use_labels=opts["cond"], xflip=opts["xflip"], cache=opts["cache"])
        if opts["cond"] and not dataset.has_labels:
            raise dnnlib.UserError(f"--cond=1: {opts['data']} has no labels")
        if require_labels and dataset.labels is None:
            raise dnnlib.UserError(
                f"--data: the labels of {opts['data']} are vectors of {dataset.label_dim} numbers; this method needs "
                "one class per image"
            )
        with blame("--data"):
            notes = [*dataset.notes, *dataset.class_notes()]

        config = options.make_config(opts, method, dataset, settings(opts, dataset), **sections)
        config.contents = find_contents(config, dataset)
        with blame("--resume"):
            state, path, run_dir = find_state(opts["resume"], opts["outdir"], opts["nosubdir"])
            config.seed = choose_seed(opts["seed"], state)
            settle(config, None if state is None else state["config"])
            fresh = state is None
            if state is not None:
                if config.transfer is None:  # the weights come from the state, which remembers where they began
                    config.transfer = state["config"].get("transfer")
                check_same_run(state["config"], config, opts["resume"])
        named = path is not None and run_dir is None  # the user wants this state, and not the newest one of a run
        numbered = run_dir is None and not opts["nosubdir"]
        if run_dir is None:
            run_dir = new_run_dir(opts["outdir"], dataset, config) if numbered else opts["outdir"]
        if opts["dry_run"]:
            print_summary(config, dataset, run_dir, device, notes)
            print0("Dry run; exiting.")
            return None

        objective = make_objective(config, dataset, device)
        at_end.callback(objective.close)
        with blame(network_options):
            objective.setup()
        nimg, best = 0, Best()
        if state is not None:
            with blame("--resume"):
                nimg, best = load_state(objective, state)
            state = None  # it is as large as the networks and the optimizers
        if opts["transfer"] and fresh:
            with blame("--transfer"):
                transfer(objective, opts["transfer"], opts["trust_pickle"])
        with blame("--outdir"):
            home = None if path is None else os.path.dirname(os.path.realpath(path))

            def make() -> str:
                elsewhere = home != os.path.realpath(run_dir)
                made = make_run_dir(run_dir, config, at_end, elsewhere, opts["resume"] == "latest", numbered)
                if not elsewhere:
                    checkpoint.set_aside_later_states(made, nimg, damaged_only=not named)
                return made

            run_dir = distributed.from_rank0(make)
            best = distributed.from_rank0(lambda: fetch_best(best, home, run_dir))
        log_file = os.path.join(run_dir, "log.txt") if distributed.get_rank() == 0 else None
        with dnnlib.Logger(log_file, mode="a"):
            print_summary(config, dataset, run_dir, device, notes)
            if fresh:
                objective.begin()
            print0("".join(f"{line}\n" for line in objective.notes()), end="")
            training_loop(objective, dataset, config, run_dir, device, nimg, best, draw_samples)

            def finish() -> None:
                snapshot = os.path.join(run_dir, best.name or "")
                lines = objective.results(snapshot) if os.path.isfile(snapshot) else []
                print0("".join(f"{line}\n" for line in [*lines, *objective.finish(run_dir)]), end="")

            distributed.on_rank0(finish)
    return run_dir


def transfer(objective: Objective, pattern: str, trust_pickle: bool) -> None:
    """Start from the weights of a snapshot or of a published X.pth, as far as names and shapes agree."""

    def read() -> tuple[str, dict[str, torch.nn.Module], dict[str, Any]]:
        path = persistence.find_snapshot(pattern)
        if not is_checkpoint(path):
            snapshot = persistence.load_snapshot(path, trust_pickle=trust_pickle)
            return path, {"net": snapshot["ema"]}, snapshot
        published = load_checkpoint(path)
        sources = {"net": build_generator(published, image_size=objective.dataset.resolution)}
        if published.potential is not None and "potential" in objective.trained:
            sources["potential"] = build_potential(published.potential, path)
        return path, sources, {}

    path, sources, snapshot = distributed.together(read, rank0_first=True)  # one process downloads, all read
    data = objective.dataset
    if snapshot:
        if getattr(snapshot["ema"], "label_dim", 0) == data.label_dim:  # else it has no embeddings to transfer
            try:
                check_class_numbers(snapshot["info"].get("class_names"), path, data.class_names, data.name)
            except dnnlib.UserError as error:
                print0(f"Warning: {error}, or the new run first has to unlearn it")
    copied, left = {}, {}  # sizes of parameters by name
    for name, trained in objective.trained.items():
        source = sources.get(name, torch.nn.Module())
        for found, sizes in zip((copied, left), trained.transfer(source), strict=True):
            found |= {f"{name}.{key}": size for key, size in sizes.items()}
    if not copied:
        raise dnnlib.UserError(f"{path} has no parameter of the same name and shape as the new network")
    values, more = sum(copied.values()), sum(left.values())
    print0(f"Transferred {len(copied)} tensors with {values:,} values from {path}")
    if left:
        some = ", ".join(list(left)[:3]) + (", ..." if len(left) > 3 else "")
        kind = "Warning" if values < more else "Note"
        print0(f"{kind}: {len(left)} tensors with {more:,} values of the new networks begin at random: {some}")


# Resuming.


def find_state(resume: str | None, outdir: str, nosubdir: bool) -> tuple[dict[str, Any] | None, str | None, str | None]:
    """Return the state to continue from, its path, and the run directory to continue in; all None for a fresh run.

    `resume`: a state, a run directory, a glob of one of them, 'latest' (the newest run in `outdir`) or None. A state
    outside a run directory continues in a new one: its directory is None. Rank 0 looks; all ranks get the same answer.
    UserError: no such state, or one of another program.
    """
    found = None if resume is None else distributed.from_rank0(lambda: _search_state(resume, outdir, nosubdir))
    if found is None:
        return None, None, None
    path, run_dir = found
    print0(f"Resuming from {path}")
    state = distributed.together(lambda: checkpoint.load_state(path))
    kinds = dict(config=dict, nimg=int, best=dict, objective=dict)
    if (
        any(type(state.get(k)) is not kind for k, kind in kinds.items())
        or state["nimg"] < 0
        or state["best"].keys() != {"value", "name"}
        or not re.fullmatch(r"None|network-snapshot-[0-9]+\.pkl", str(state["best"]["name"]))
    ):
        raise dnnlib.UserError(f"{path} is not the state of a run of this program")
    return state, path, run_dir


def _search_state(resume: str, outdir: str, nosubdir: bool) -> tuple[str, str | None] | None:
    if resume == "latest":
        path = checkpoint.latest_state(outdir) if nosubdir else checkpoint.latest_state_of_runs(outdir)
        if path is None:
            print0(f"--resume=latest: {outdir} has no complete training state; starting a new run")
            return None
        return path, os.path.dirname(path) or "."
    if not os.path.exists(resume):
        found = dnnlib.match_paths(resume)
        if len(found) > 1:
            raise dnnlib.UserError(f"{resume}: matches {found[0]} and {len(found) - 1} others; name one of them")
        resume = found[0] if found else resume
    if os.path.isdir(resume):
        path = checkpoint.latest_state(resume)
        if path is None:
            raise dnnlib.UserError(f"{resume} holds no complete training-state-*.pt")
        return path, resume
    if not os.path.isfile(resume):
        raise dnnlib.UserError(f"{resume} is neither a training state, nor a run directory, nor 'latest'")
    return resume, None


def choose_seed(seed: int | None, state: dict[str, Any] | None) -> int:
    """Return the run's seed: the given one, else the state's, else a random one, the same on all ranks."""
    if seed is not None:
        return seed
    if state is not None:
        return state["config"]["seed"]
    return distributed.broadcast_object(int(torch.randint(1 << 31, [])))


def find_contents(config: RunConfig, dataset: ImageDataset) -> dict[str, dict[str, Any]]:
    """Return what identifies the data, and every file that the configuration names, by the field that names it."""

    def find() -> dict[str, dict[str, Any]]:
        by_record = config.outliers is not None and config.outliers.path is None
        found = {"dataset.path": dataset.contents(*(["outliers"] if by_record else []))}
        for name, path in named_files(config).items():
            with contextlib.suppress(dnnlib.UserError):  # whoever reads the file says what is wrong with it
                found[name] = dict(hash=dnnlib.content_hash(path))
        return found

    return distributed.from_rank0(find)


def check_same_run(old: dict[str, Any], config: RunConfig, name: str) -> None:
    """Raise UserError that lists every setting in which the resumed run would not be the same run.

    `old`: the configuration in the state; `name`: what the user asked to resume.
    """
    found = differences(old, to_dict(config))
    if found:
        raise dnnlib.UserError(
            f"{name}: that run had other options or data ({'; '.join(found)}); give the same ones, or start a new run "
            "from its weights: this command with --transfer=network-snapshot-*.pkl in place of --resume"
        )
    before = old.get("num_processes")
    if before != config.num_processes:
        print0(
            f"{config.num_processes} processes continue where {before} were: the random numbers change from here on."
        )
    elif old.get("batch_gpu") != config.batch_gpu:
        print0(
            f"A process sees {config.batch_gpu or 'all its'} images of a batch at a time, where it saw "
            f"{old.get('batch_gpu') or 'all its'}: dropout draws other random numbers from here on, and sums round "
            "differently."
        )


def load_state(objective: Objective, state: dict[str, Any]) -> tuple[int, Best]:
    """Continue the objective from a state. Returns the images seen, and the best snapshot so far."""
    try:
        objective.load_state_dict(state["objective"])
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # What modules and optimizers raise for parts of another size, or for missing parts.
        raise dnnlib.UserError(f"the training state does not fit this run ({error})") from None
    return state["nimg"], Best(**state["best"])


# The run directory.


def new_run_dir(outdir: str, dataset: ImageDataset, config: RunConfig) -> str:
    """Return `NNNNN-<dataset>-<cond>-<arch>-<precond>-gpus<N>-batch<B>-<dtype>[-desc]` with the next free number."""
    parts = [
        dataset.name,
        "cond" if config.dataset.use_labels else "uncond",
        config.network.arch,
        config.network.precond,
        f"gpus{config.num_processes}",
        f"batch{config.batch_size}",
        config.precision,
        config.desc,
    ]
    return distributed.from_rank0(lambda: next_path(outdir, "-".join(filter(None, parts))))


def next_path(outdir: str, name: str) -> str:
    """Return `NNNNN-<name>` in `outdir` with the next free number."""
    entries = os.listdir(outdir) if os.path.isdir(outdir) else []
    taken = [int(match.group()) for entry in entries if (match := re.match(r"\d+", entry))]
    return os.path.join(outdir, f"{max(taken, default=-1) + 1:05d}-{name}")


def make_run_dir(
    run_dir: str,
    config: RunConfig,
    at_end: contextlib.ExitStack,
    fresh: bool,
    again: bool = False,
    numbered: bool = False,
) -> str:
    """Create the directory with `training_options.json` and return it. It is this run's alone until `at_end`.

    A `numbered` directory that another run has taken meanwhile gets the next free number. UserError: a run that is
    `fresh` here, where another run's files are, or a run that is not over. `again` allows the files of this very run,
    interrupted before its first state.
    """
    while numbered:
        outdir, name = os.path.split(run_dir)
        os.makedirs(outdir or ".", exist_ok=True)
        try:
            os.mkdir(run_dir)
            break
        except FileExistsError:
            run_dir = next_path(outdir, name.partition("-")[2])
    if fresh and os.path.isdir(run_dir):
        used = any(re.match(r"(network-snapshot|training-state)-", entry) for entry in os.listdir(run_dir))
        if used and not (again and interrupted_early(run_dir, config)):
            raise dnnlib.UserError(
                f"{run_dir} already holds a run; choose another folder, or continue the run: the same command with "
                f"--resume={run_dir}"
            )
    os.makedirs(run_dir, exist_ok=True)
    try:
        at_end.enter_context(dnnlib.locked(os.path.join(run_dir, "run"), wait=False))
    except BlockingIOError:
        message = f"{run_dir}: another training is running here; stop it first (if there is none, delete .run.lock)"
        raise dnnlib.UserError(message) from None
    checkpoint.remove_leftovers(run_dir)
    with dnnlib.atomic_open(os.path.join(run_dir, "training_options.json"), "wt") as f:
        json.dump(to_dict(config), f, indent=2)
    return run_dir


def interrupted_early(run_dir: str, config: RunConfig) -> bool:
    """Return whether `run_dir` holds a run of this configuration that neither saved a state nor reached its end."""
    try:
        with open(os.path.join(run_dir, "training_options.json")) as f:
            same = not differences(json.load(f), to_dict(config), besides=["seed"])
    except (OSError, ValueError):
        return False
    return same and not checkpoint.states(run_dir) and last_nimg(run_dir) < config.total_nimg


def print_summary(
    config: RunConfig, dataset: ImageDataset, run_dir: str, device: torch.device, notes: Sequence[str]
) -> None:
    """Print the configuration, the facts that a person looks for first, and notes about the data."""
    shape = f"{dataset.num_channels} x {dataset.resolution} x {dataset.resolution}"
    rows = {
        "Output directory": run_dir,
        "Data set": f"{dataset.path} ({len(dataset)} images, {shape})",
        "Classes": dataset.label_dim or "unconditional",
        "Method": config.method,
        "Architecture": config.network.arch,
        "Preconditioning": config.network.precond or "none",
        "Processes": f"{config.num_processes} on {device.type}",
        "Batch size": config.batch_size,
        "Precision": config.precision,
        "Seed": config.seed,
    }
    print0(f"\nTraining options:\n{json.dumps(to_dict(config), indent=2)}\n")
    print0("\n".join(f"{k + ':':<18s} {v}" for k, v in rows.items()) + "\n")
    print0("".join(f"Note: {dnnlib.one_line(note)}\n" for note in notes), end="")
