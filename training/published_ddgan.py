"""Generators and discriminators of RDUOT and DDGAN as their authors publish them, as networks of ours.

`netG_<epoch>.pth` holds the averaged weights of a generator and nothing else; `content.pth` holds a training state: the
generator without averaging, the discriminator and the script's options. Parameters are mapped by name. Nothing in the
files runs. See docs/formats.md, Published checkpoints.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import dnnlib
from torch_utils import persistence, safe_pickle
from torch_utils.distributed import print0
from training.networks_ddgan import FIR, DDGANGenerator, Potential

__all__ = ["SETTINGS", "Checkpoint", "build_generator", "build_potential", "is_checkpoint", "load_checkpoint"]

CONTENT = "content.pth"  # the training state beside netG_<epoch>.pth
# What the weights do not show, by the published name of the option, with its published default.
SETTINGS = dict(
    image_size=None, num_timesteps=4, beta_min=0.1, beta_max=20.0, centered=True, not_use_tanh=False,
    use_geometric=False,
)  # fmt: skip
# Published options that change the network in other ways than its names and shapes show, and the value that ours has.
FIXED = dict(
    fir=True, fir_kernel=FIR, skip_rescale=True, resblock_type="biggan",
    progressive="none", progressive_input="residual", progressive_combine="sum", conditional=True,
)  # fmt: skip
MAX_STEPS = 1000  # of the diffusion; published are 2 to 8

State = dict[str, torch.Tensor]


def is_checkpoint(path: str) -> bool:
    """Return whether the name of a file or URL is that of a published checkpoint, X.pth."""
    return (re.split("[?#]", path)[0] if dnnlib.is_url(path) else path).endswith(".pth")


@dataclass(frozen=True)
class Checkpoint:
    """What a published file holds."""

    path: str
    generator: State
    averaged: bool  # the generator's weights are an average over the training
    potential: State | None = None  # the discriminator
    args: Mapping[str, Any] | None = None  # the options of the training script


def load_checkpoint(path: str) -> Checkpoint:
    """Return the contents of a published file. Its options may also stand in the `content.pth` beside it.

    UserError: the file is missing, damaged, or no generator or training state of RDUOT or DDGAN.
    """
    tree = _load(path, lambda tree: {"netG_dict", "netD_dict", "args"} & tree.keys() or tree)
    if isinstance(tree, dict) and "netG_dict" in tree:
        args = tree.get("args")
        if not isinstance(args, dict):
            raise dnnlib.UserError(f"{path}: does not hold the options of its training under 'args'")
        potential = tree.get("netD_dict")
        return Checkpoint(
            path,
            _weights(tree["netG_dict"], "all_modules.0.", path),
            averaged=False,
            potential=None if potential is None else _weights(potential, "t_embed.", path),
            args=args,
        )
    generator = _weights(tree, "all_modules.0.", path)
    beside = os.path.join(os.path.dirname(path), CONTENT)
    args = None
    if not dnnlib.is_url(path) and os.path.isfile(beside):
        found = _load(beside, lambda tree: {"args"} & tree.keys())
        args = found.get("args") if isinstance(found, dict) else None
        if not isinstance(args, dict):
            raise dnnlib.UserError(f"{beside}: does not hold the options of its training under 'args'")
    return Checkpoint(path, generator, averaged=True, args=args)


def _load(path: str, wanted: Callable) -> Any:
    with dnnlib.open_url(path) if dnnlib.is_url(path) else dnnlib.open_file(path) as file:
        return safe_pickle.load_torch(file, path, safe_pickle.NAMESPACES, wanted)


def _weights(value: Any, begins: str, path: str) -> State:
    """Return tensors by name, without the prefix of DataParallel. UserError: they are nothing of the kind."""
    if not isinstance(value, dict) or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in value.items()):
        raise dnnlib.UserError(f"{path}: neither the weights of a generator of RDUOT or DDGAN nor their {CONTENT}")
    state = {name.removeprefix("module."): tensor for name, tensor in value.items()}
    if not any(name.startswith(begins) for name in state):
        raise dnnlib.UserError(f"{path}: not a network of RDUOT or DDGAN, it has no tensor '{begins}...'")
    return state


class _Mover:
    """Moves published tensors to our names."""

    def __init__(self, state: State, path: str):
        self.left, self.path, self.placed = dict(state), path, {}

    def take(self, name: str, axes: int | None = None) -> torch.Tensor:
        """Return a published tensor, float32, and count it as used."""
        if name not in self.left:
            raise dnnlib.UserError(f"{self.path}: lacks {name}")
        if axes not in (None, self.left[name].ndim):
            raise dnnlib.UserError(f"{self.path}: {name} has {self.left[name].ndim} axes, expected {axes}")
        return self.left.pop(name).to(torch.float32)

    def layer(self, ours: str, theirs: str, bias: bool = True) -> None:
        """Move weight and bias of a layer."""
        for kind in ("weight", "bias")[: 1 + bias]:
            self.placed[f"{ours}.{kind}"] = self.take(f"{theirs}.{kind}")

    def filters(self, *layers: str) -> None:
        """Place the low-pass filters of our layers, which the published files do not hold."""
        f = torch.tensor(FIR, dtype=torch.float32)
        self.placed |= {f"{layer}.resample_filter": f.outer(f)[None, None] / f.sum() ** 2 for layer in layers}

    def build(self, cls: type, kwargs: dict[str, Any]) -> torch.nn.Module:
        """Return our network with exactly these tensors. UserError: some are left, missing or of another shape."""
        return persistence.build_network(self.path, cls, kwargs, {**self.placed, **self.left})


# The generator.


def build_generator(checkpoint: Checkpoint, **given: Any) -> DDGANGenerator:
    """Return the generator of a published file, in eval mode on the CPU.

    Its widths follow from the weights. What they do not show (SETTINGS) is `given`, or stands in the file's options, or
    is the published default; None counts as not given.

    UserError: nothing states the size of the images, or the file is of another kind of network than ours.
    """
    path, args = checkpoint.path, checkpoint.args or {}
    settings = _settings(args, given, path)
    shape = _shape(checkpoint.generator, path)
    known = dict(num_channels=shape.img_channels, num_channels_dae=shape.model_channels, nz=shape.nz, n_mlp=shape.n_mlp,
                 z_emb_dim=shape.z_emb_dim, ch_mult=shape.channel_mult, num_res_blocks=shape.num_blocks)  # fmt: skip
    for option, value in known.items():
        stated = _plain(args.get(option, value))
        if stated != value:
            raise dnnlib.UserError(
                f"{path}: the options beside its weights are those of another network, their {option} is {stated}, "
                f"that of the weights is {value}"
            )
    size = settings["image_size"]
    if size is None:
        raise dnnlib.UserError(
            f"{path}: does not say how large its images are, and there is no {CONTENT} beside it that does; state it, "
            "as in generate.py --image_size=32"
        )
    attended = [size >> level for level, attention in enumerate(shape.attention) if attention]
    print0(
        f"{path}: a published generator of {size}x{size} images with {shape.img_channels} channel(s) in "
        f"{settings['num_timesteps']} steps, attention at {', '.join(map(str, attended)) or 'no resolution'}"
    )
    if shape.fourier:
        print0(f"Note: {path}: published Fourier features are no numbers at t = 0, so t = 0 counts as 1/2 here")
    if not checkpoint.averaged:
        print0(f"Warning: {path} holds the generator of the last step, not the average of netG_*.pth, which is better")
    mover = _Mover(checkpoint.generator, path)
    _move_generator(mover, shape, size)
    return mover.build(
        DDGANGenerator,
        dict(
            img_resolution=size,
            img_channels=shape.img_channels,
            num_timesteps=settings["num_timesteps"],
            beta_min=settings["beta_min"],
            beta_max=settings["beta_max"],
            geometric=settings["use_geometric"],
            nz=shape.nz,
            z_emb_dim=shape.z_emb_dim,
            n_mlp=shape.n_mlp,
            model_channels=shape.model_channels,
            channel_mult=shape.channel_mult,
            num_blocks=shape.num_blocks,
            attn_resolutions=attended,
            embedding_type="fourier" if shape.fourier else "positional",
            channel_mult_noise=2 if shape.fourier else 1,
            log_time=shape.fourier,
            centered=settings["centered"],
            tanh=not settings["not_use_tanh"],
        ),
    )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _settings(args: Mapping[str, Any], given: Mapping[str, Any], path: str) -> dict[str, Any]:
    if unknown := given.keys() - SETTINGS.keys():
        raise dnnlib.UserError(f"{path}: there is no setting {min(unknown)}; there are {', '.join(SETTINGS)}")
    found = dict(SETTINGS)
    for stated in (args, given):  # what is given counts most
        found |= {name: value for name, value in stated.items() if name in SETTINGS and value is not None}
    for name, default in SETTINGS.items():
        kind = int if default is None else type(default)
        value = found[name]
        if value is not None and not isinstance(value, (int, float) if kind is float else kind):
            raise dnnlib.UserError(f"{path}: its option {name} is {value!r}, expected {kind.__name__}")
    if not 1 <= found["num_timesteps"] <= MAX_STEPS:
        raise dnnlib.UserError(f"{path}: its diffusion has {found['num_timesteps']} steps, expected 1 to {MAX_STEPS}")
    if found["image_size"] is not None and not 1 <= found["image_size"] <= 65536:
        raise dnnlib.UserError(f"{path}: images of {found['image_size']} pixels")
    for name, value in FIXED.items():
        stated = args.get(name, value)
        if _plain(stated) != value:
            raise dnnlib.UserError(f"{path}: trained with {name} = {stated}; this program has only {value}")
    return found


@dataclass(frozen=True)
class _Shape:
    fourier: bool
    stem: int  # number of the module that is the first convolution
    img_channels: int
    model_channels: int
    channel_mult: tuple[int, ...]
    num_blocks: int
    attention: tuple[bool, ...]  # for each level
    nz: int
    z_emb_dim: int
    n_mlp: int


def _shape(state: State, path: str) -> _Shape:
    """Return what names and shapes of a generator's tensors say about its architecture."""
    other = dnnlib.UserError(f"{path}: its modules are not those of the published generator")
    signs = {"Conv_0.weight": "B", "NIN_0.W": "A", "Conv2d_0.weight": "D"}  # block, attention, halving of the image
    modules = {int(m[1]): "-" for name in state if (m := re.match(r"all_modules\.([0-9]{1,4})\.", name))}
    for number in modules:
        found = [sign for name, sign in signs.items() if f"all_modules.{number}.{name}" in state]
        modules[number] = found[0] if found else "-"
    plan = "".join(modules[number] for number in sorted(modules))
    fourier = "all_modules.0.W" in state
    stem, levels = 2 + fourier, plan.count("D") + 1
    # n blocks in each level of the encoder, n + 1 in the decoder, 2 between them, one for each halving and doubling.
    blocks = plan.count("B")
    num_blocks = (blocks // levels - 3) // 2
    if not re.fullmatch(r"-+B[BAD]*--", plan) or num_blocks < 1 or blocks != levels * (2 * num_blocks + 3):
        raise other
    try:
        model_channels = len(state[f"all_modules.{stem}.weight"])
        widths, attention, number = [], [], stem
        for level in range(levels):
            number += 1 if level == 0 else 3  # after the block and the layer that halve the image
            widths.append(len(state[f"all_modules.{number}.Conv_0.weight"]))
            attention.append(plan[number + 1] == "A")
            number += num_blocks * (1 + attention[-1]) - 1
        latent = sorted(int(m[1]) for name in state if (m := re.fullmatch(r"z_transform\.([0-9]{1,3})\.weight", name)))
        z_emb_dim, nz = state["z_transform.1.weight"].shape
        img_channels = len(state[f"all_modules.{len(plan) - 1}.weight"])
    except (IndexError, KeyError, ValueError) as e:
        raise other from e
    if not latent or model_channels < 1 or any(width % model_channels for width in widths):
        raise other
    mult = tuple(width // model_channels for width in widths)
    return _Shape(fourier, stem, img_channels, model_channels, mult, num_blocks, tuple(attention), nz, z_emb_dim,
                  len(latent) - 1)  # fmt: skip


def _move_generator(mover: _Mover, shape: _Shape, size: int) -> None:
    """Move all tensors of a generator, in the order in which the published code numbers its modules."""
    numbers = iter(range(1_000_000))

    def following() -> str:
        return f"all_modules.{next(numbers)}"

    def block(ours: str, resampled: bool = False) -> None:
        theirs = following()
        if resampled:
            mover.filters(f"{ours}.conv0", f"{ours}.skip")
        for norm in (0, 1):
            mover.layer(f"{ours}.norm{norm}.affine", f"{theirs}.GroupNorm_{norm}.style")
            mover.layer(f"{ours}.conv{norm}", f"{theirs}.Conv_{norm}")
        mover.layer(f"{ours}.affine", f"{theirs}.Dense_0")
        if f"{theirs}.Conv_2.weight" in mover.left:
            mover.layer(f"{ours}.skip", f"{theirs}.Conv_2")

    def attention(ours: str) -> None:
        theirs = following()
        scale, shift = (mover.take(f"{theirs}.GroupNorm_0.{kind}", axes=1) for kind in ("weight", "bias"))
        # This norm does not depend on the latent. Ours can, but need not.
        mover.placed[f"{ours}.norm2.affine.weight"] = torch.zeros(2 * len(scale), shape.z_emb_dim)
        mover.placed[f"{ours}.norm2.affine.bias"] = torch.cat([scale, shift])
        weights = [
            mover.take(f"{theirs}.NIN_{k}.W", axes=2).T[:, :, None, None] for k in range(4)
        ]  # stored as [in,out]
        biases = [mover.take(f"{theirs}.NIN_{k}.b") for k in range(4)]
        for kind, values in dict(weight=weights, bias=biases).items():
            same = values[0].shape == values[1].shape == values[2].shape
            # Ours keeps query, key and value of each channel together. Other shapes are refused when they are loaded.
            mover.placed[f"{ours}.qkv.{kind}"] = torch.stack(values[:3], dim=1).flatten(0, 1) if same else values[0]
            mover.placed[f"{ours}.proj.{kind}"] = values[3]

    levels = [f"{size >> level}x{size >> level}" for level in range(len(shape.channel_mult))]
    if shape.fourier:
        mover.placed["model.map_noise.freqs"] = mover.take(f"{following()}.W")
    mover.layer("model.map_layer0", following())
    mover.layer("model.map_layer1", following())
    mover.layer(f"model.enc.{levels[0]}_conv", following())
    for level, name in enumerate(levels):
        if level > 0:
            block(f"model.enc.{name}_down", resampled=True)
            mover.layer(f"model.enc.{name}_aux_residual", f"{following()}.Conv2d_0")
            mover.filters(f"model.enc.{name}_aux_residual")
        for i in range(shape.num_blocks):
            block(f"model.enc.{name}_block{i}")
            if shape.attention[level]:
                attention(f"model.enc.{name}_block{i}")
    block(f"model.dec.{levels[-1]}_in0")
    attention(f"model.dec.{levels[-1]}_in0")
    block(f"model.dec.{levels[-1]}_in1")
    for level, name in reversed([*enumerate(levels)]):
        if name != levels[-1]:
            block(f"model.dec.{name}_up", resampled=True)
        for i in range(shape.num_blocks + 1):
            block(f"model.dec.{name}_block{i}")
        if shape.attention[level]:
            attention(f"model.dec.{name}_block{shape.num_blocks}")
    mover.layer(f"model.dec.{levels[0]}_aux_norm", following())
    mover.layer(f"model.dec.{levels[0]}_aux_conv", following())
    for i in range(shape.n_mlp + 1):
        mover.layer(f"map_latent.{i}", f"z_transform.{2 * i + 1}")


# The discriminator, which we call the potential.


def build_potential(state: State, path: str) -> Potential:
    """Return a published discriminator, in eval mode on the CPU. UserError: it is of another kind than ours."""
    mover = _Mover(state, path)
    mover.layer("map_layer0", "t_embed.main.0")
    mover.layer("map_layer1", "t_embed.main.2")
    mover.layer("stem", "start_conv")
    blocks = 0
    while f"conv{blocks + 1}.dense_t1.weight" in state:
        ours, theirs = f"blocks.{blocks}", f"conv{blocks + 1}"
        mover.layer(f"{ours}.conv0", f"{theirs}.conv1.0")
        mover.layer(f"{ours}.affine", f"{theirs}.dense_t1")
        mover.layer(f"{ours}.conv1", f"{theirs}.conv2.0")
        mover.layer(f"{ours}.skip", f"{theirs}.skip.0", bias=False)
        if blocks > 0:
            mover.filters(f"{ours}.conv1", f"{ours}.skip")
        blocks += 1
    mover.layer("conv", "final_conv")
    mover.layer("head", "end_linear")
    first, stem = mover.placed["map_layer0.weight"], mover.placed["stem.weight"]
    if not 1 <= blocks <= 12 or first.ndim != 2 or stem.ndim != 4 or stem.shape[0] % 2 or stem.shape[1] % 2:
        raise dnnlib.UserError(f"{path}: its modules are not those of the published discriminator")
    width = first.shape[1]
    # The published embedding is [sin, cos], ours is [cos, sin].
    mover.placed["map_layer0.weight"] = first.roll(width // 2, dims=1)
    return mover.build(
        Potential,
        dict(
            img_resolution=4 << (blocks - 1),  # it halves the image down to 4x4
            img_channels=stem.shape[1] // 2,
            model_channels=stem.shape[0] // 2,
            t_emb_dim=width,
            strided=True,
        ),
    )
