"""The configuration of a training run: plain data, one commented line per field.

A run prints it, writes it to `training_options.json`, stores it in snapshots and states (`to_dict`), and compares it
with the state's when it resumes (`differences`). Sizes are in images, rates per step. Fields made with `changeable`
may differ between an interrupted run and its continuation; a difference in any other field makes it another run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from archives.contents import what_differs

__all__ = [
    "CEPConfig",
    "ClassifierConfig",
    "DatasetConfig",
    "DiscriminatorConfig",
    "NetworkConfig",
    "OptimizerConfig",
    "OutlierConfig",
    "PosteriorConfig",
    "RDUOTConfig",
    "RunConfig",
    "TDSMConfig",
    "differences",
    "flatten",
    "named_files",
    "settle",
    "to_dict",
]


TAU = {"robust": 10.0}  # by cost, else the published 1e-3 for sums over pixels: `robust` is between 0 and about 4


def changeable(**kwargs: Any) -> Any:
    """Declare a field that a resumed run may change. `kwargs` as in `dataclasses.field`."""
    return dataclasses.field(metadata={"changeable": True}, **kwargs)


def named_file(default: Any = None) -> Any:
    """Declare a field that names a file. A continued run compares the file's contents, wherever it lies now."""
    return dataclasses.field(default=default, metadata={"file": True})


def settled(fresh: Any, before: Any) -> Any:
    """Declare a field of a section that is None until `settle` chooses: `fresh` is its value in a fresh run, or a
    function of the section that returns it.

    `before` is what runs did before there was the field.
    """
    return dataclasses.field(default=None, metadata={"fresh": fresh, "before": before})


@dataclass
class DatasetConfig:
    """The training images."""

    path: str  # archive: ZIP or folder; the archives of a set, with commas between them
    use_labels: bool = True  # train a class-conditional network
    xflip: bool = False  # add the mirror image of every image
    cache: bool = changeable(default=True)  # keep decoded images in memory


@dataclass
class NetworkConfig:
    """The networks in training."""

    arch: str  # name of the architecture: a U-Net, or the U-Net that a classifier goes with
    precond: str | None  # preconditioning: vp, ve, edm; None for networks without noise levels sigma
    kwargs: dict[str, Any]  # further arguments of the network's constructor
    potential_kwargs: dict[str, Any] | None = None  # those of RDUOT's potential


@dataclass
class OptimizerConfig:
    """The optimizer of all networks."""

    name: str = "adam"  # adam, adamw or sgd
    lr: float | dict[str, float] = 1e-3  # learning rate, or one for each network
    betas: list[float] | None = None  # Adam's; None: 0.9 and 0.999


@dataclass
class PosteriorConfig:
    """Labels by the posterior, in place of the data set's (docs/methods/posterior.md)."""

    path: str = named_file("")  # label file that holds the posterior
    mode: str | None = settled(fresh="relabel", before="sample")  # of the labels: sample, relabel, drop or null
    # Null: the least probability of a label that stays.
    limit: float | None = settled(fresh=lambda section: 0.5 if section.mode == "null" else None, before=None)


@dataclass
class OutlierConfig:
    """Images that do not belong (docs/methods/posterior.md)."""

    mode: str = "drop"  # what becomes of them: drop or ambient
    path: str | None = named_file()  # label file that says which ones these are; None: the archive's record


@dataclass
class CEPConfig:
    """What `train.py --method=cep` adds (docs/methods/posterior.md)."""

    gamma: float = 1.0  # length of the perturbation of a label's embedding


@dataclass
class ClassifierConfig:
    """What `train_classifier.py` adds (docs/methods/tdsm.md)."""

    noise_type: str = "clean"  # how the labels were corrupted; clean: learn the noisy posterior; auto, learn: find T
    noise_rate: float | None = None  # share of wrong labels
    noise_matrix: str | None = named_file()  # file that holds T
    label_path: str | None = named_file()  # label file that says what T is, or where it starts
    warm_start: bool | None = settled(fresh=True, before=False)  # a learned T starts at an estimate, not at 52%
    val: float = 0.05  # share of the images held out to choose the best snapshot and its temperature
    shift: float = 0.125  # largest random shift, as a share of the image size


@dataclass
class TDSMConfig:
    """What `train_noise.py` adds (docs/methods/tdsm.md)."""

    cls: str = named_file("")  # snapshot of the classifier; empty: class-level weights, which need none
    weights: str | None = settled(fresh="image", before="image")  # of the classes: by image, or class (S-DSM)
    tau: float = 0.01  # classes whose weight is at most this leave the sum, except the observed one
    pairs: int | None = None  # how many other classes each image keeps at most; None: all above tau
    others: str | None = settled(fresh="sample", before="all")  # the sum over other classes: one draw, or all
    temp: float | str | None = settled(fresh="auto", before=1.0)  # divides the classifier's logits; auto: its own
    noise_type: str | None = None  # how the labels were corrupted, where the classifier's snapshot does not say
    noise_rate: float | None = None  # share of wrong labels
    noise_matrix: str | None = named_file()  # file that holds T


@dataclass
class DiscriminatorConfig:
    """What `train_discriminator.py` adds (docs/methods/sbdc.md)."""

    label_path: str = named_file("")  # label file: which labels are believed right
    shuffle: str | None = None  # new labels of right pairs: uniform, transition, None: transition where T is known
    suggested: bool | None = settled(fresh=True, before=False)  # suggested classes are right pairs
    simix: bool = True  # mix half of each batch with similar images, instead of any images
    embed: str | None = None  # features that define "similar"
    cls: str | None = named_file()  # snapshot of the classifier that gives those features
    shift: float = 0.125  # largest random shift, as a share of the image size
    calibrate: float | None = settled(fresh=0.1, before=0.0)  # share of the images held out to calibrate the logits
    noise_type: str | None = None  # how the labels were corrupted
    noise_rate: float | None = None  # share of wrong labels
    noise_matrix: str | None = named_file()  # file that holds T


@dataclass
class RDUOTConfig:
    """What `train_rduot.py` adds (docs/methods/rduot.md)."""

    num_timesteps: int = 4  # steps of the diffusion
    beta_min: float = 0.1  # noise schedule: rate at the start
    beta_max: float = 20.0  # noise schedule: rate at the end
    geometric: bool | None = None  # noise schedule: the variance rises geometrically from beta_min to beta_max
    cost: str = "pixels"  # what the transport cost compares
    distance: str | None = settled(fresh="features", before="pixels")  # what the robust cost measures distances of
    tau: float | None = settled(fresh=lambda section: TAU.get(section.cost, 1e-3), before=1e-3)  # weight of the cost
    balanced: bool | None = settled(fresh=True, before=False)  # once the cost has left out images, train as DDGAN does
    phi1: str = "softplus"  # conjugate on generated images
    phi2: str = "softplus"  # conjugate on real images
    r1_gamma: float = 0.02  # weight of the gradient penalty R1
    lazy_reg: int = 15  # steps from one penalty to the next
    schedule_nimg: int | None = None  # images over which the learning rates fall; None: the whole training, 0: never


@dataclass
class RunConfig:
    """One training run."""

    method: str  # name of the objective
    dataset: DatasetConfig
    network: NetworkConfig
    optimizer: OptimizerConfig
    noise_levels: dict[str, Any] | None  # arguments of NoiseLevels; None: the method has steps instead
    augment: dict[str, Any] | None  # arguments of AugmentPipe; None: no augmentation
    batch_size: int  # images per step, over all processes
    batch_gpu: int | None = changeable(default=None)  # images at a time on one process; None: its whole share
    ema_halflife_nimg: int = 500_000  # half-life of the weights' moving average
    lr_rampup_nimg: int = 0  # images over which the learning rate rises from zero
    loss_scaling: float = 1.0  # factor on the loss while gradients are computed
    precision: str = "fp32"  # arithmetic inside the networks: fp32, tf32, bf16, fp16
    compile: bool = False  # compile the networks with torch.compile
    seed: int | None = None  # of all randomness; None until the run chooses one
    transfer: str | None = None  # snapshot whose weights the run starts from
    total_nimg: int = changeable(default=200_000_000)  # length of the training
    kimg_per_tick: float = changeable(default=50.0)  # thousands of images from one report to the next
    snapshot_ticks: int = changeable(default=50)  # ticks from one snapshot to the next
    state_ticks: int = changeable(default=500)  # ticks from one training state to the next
    keep: int = changeable(default=2)  # training states to keep
    num_processes: int = changeable(default=1)  # processes that share each batch
    shard: bool = changeable(default=False)  # share weights and optimizer state between the processes (FSDP2)
    cudnn_bench: bool = changeable(default=True)  # let cuDNN search for the fastest algorithms
    workers: int = changeable(default=1)  # threads that read images ahead
    max_bad_steps: int = changeable(default=100)  # steps in a row with non-finite values that end the run
    desc: str | None = changeable(default=None)  # text at the end of the run directory's name
    tensorboard: bool = changeable(default=False)  # write the statistics for TensorBoard too
    wandb: str | None = changeable(default=None)  # project on Weights & Biases that gets the statistics too
    wandb_mode: str | None = changeable(default=None)  # online or offline; None: as its environment variables say
    wandb_resume: str | None = changeable(default=None)  # the run there that goes on; None: that of the run directory
    contents: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # of the files, by the field of each
    posterior: PosteriorConfig | None = None  # labels by a posterior; None: the data set's labels
    outliers: OutlierConfig | None = None  # images that do not belong; None: they are learned like the others
    cep: CEPConfig | None = None  # one section per method that has settings of its own
    classifier: ClassifierConfig | None = None
    tdsm: TDSMConfig | None = None
    discriminator: DiscriminatorConfig | None = None
    rduot: RDUOTConfig | None = None


_SECTIONS = {"dataset": DatasetConfig}  # sections with changeable fields


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as nested plain data."""
    return dataclasses.asdict(config)


def settle(config: RunConfig, old: dict[str, Any] | None) -> None:
    """Choose every `settled` field that nobody has set: a continued run does what it did, a fresh run what is best now.

    `old`: the configuration in the state, as a result of `to_dict`; None for a fresh run. Fields that it lacks because
    it is older are added to it.
    """
    for name, section in vars(config).items():
        known = (old or {}).get(name)
        for field in dataclasses.fields(section) if dataclasses.is_dataclass(section) else ():
            if "fresh" not in field.metadata:
                continue
            if known is not None and known.get(field.name) is None:
                known[field.name] = field.metadata["before"]
            if getattr(section, field.name) is None:
                fresh = field.metadata["fresh"]
                fresh = fresh(section) if callable(fresh) else fresh
                chosen = fresh if known is None else known[field.name]
                setattr(section, field.name, chosen)


def differences(old: dict[str, Any], new: dict[str, Any], besides: Collection[str] = ()) -> list[str]:
    """Return every setting in which a continued run would not be the same run, as text.

    `old` and `new` are results of `to_dict`; a missing key means None, so that older files compare too. Files compare
    by contents, or by path where one side does not know the contents. `besides` names further fields that may differ.
    """
    old, new = (json.loads(json.dumps(config)) for config in (old, new))
    there, here = (config.pop("contents", None) for config in (old, new))
    there, here = (known if isinstance(known, dict) else {} for known in (there, here))
    old, new = flatten(old), flatten(new)
    ignored = {*_changeable_fields(), *besides}
    found = []
    for key in sorted(old | new):
        a, b = old.get(key), new.get(key)
        if isinstance(there.get(key), dict) and key in here:
            other = what_differs(there[key], here[key])
            if other is not None:
                found.append(f"{key}: {b} holds {other}" + ("" if a == b else f" (it was {a})"))
        elif key not in ignored and a != b:
            found.append(f"{key}: {a} there, {b} here")
    return found


def named_files(config: RunConfig) -> dict[str, str]:
    """Return the files that the configuration names beside the data, by field: 'section.field' -> path or URL."""
    sections = {name: value for name, value in vars(config).items() if dataclasses.is_dataclass(value)}
    return {
        f"{name}.{field.name}": path
        for name, section in sections.items()
        for field in dataclasses.fields(section)
        if field.metadata.get("file") and (path := getattr(section, field.name))
    }


def _changeable_fields() -> set[str]:
    names = {field.name for field in dataclasses.fields(RunConfig) if field.metadata.get("changeable")}
    for section, cls in _SECTIONS.items():
        names |= {f"{section}.{field.name}" for field in dataclasses.fields(cls) if field.metadata.get("changeable")}
    return names


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested dictionary as a flat one: {'a': {'b': 1}} becomes {'a.b': 1}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
