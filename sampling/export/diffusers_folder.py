"""Write a denoiser as a folder that `diffusers.DiffusionPipeline.from_pretrained` loads. See docs/export.md.

The pipeline is code of our own, `pipeline.py`. The network is a `UNet2DModel` where it has that shape (`unet2d`).
Otherwise its code goes into the folder, too: `training/networks.py` as it is, and `denoiser.py`, which fits it in.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from sampling.export.unet2d import unet2d_config, unet2d_state
from sampling.schedules import overlap
from torch_utils.portable import plain_json
from training import networks

__all__ = ["write_diffusers"]

CODE = Path(__file__).parent  # of the files that the folder gets
OLDEST = "0.30.0"  # version of diffusers
SIGMAS, RHO = (0.002, 80.0), 7.0  # EDM's sampler
IMPORTED = "from torch_utils.persistence import persistent_class\n"
STANDS_ALONE = '''

def persistent_class(cls):
    """Return the class as it is. In cleanscore, its objects remember how they were built."""
    return cls
'''


def write_diffusers(net: torch.nn.Module, folder: Path, class_names: Sequence[str] | None = None) -> None:
    """Write a denoiser on the CPU into a folder: code, weights, scheduler, and the index of the pipeline.

    UserError: EDM's noise levels are outside the network's range.
    """
    low, high = overlap(net, *SIGMAS)
    unet = unet2d_config(net)
    index: dict[str, Any] = dict(
        denoiser=["denoiser", "CleanscoreDenoiser"] if unet is None else ["diffusers", "UNet2DModel"],
        scheduler=["diffusers", "EDMEulerScheduler"],
        id2label=class_names and {str(number): name for number, name in enumerate(class_names)},
    )
    _write_json(folder / "model_index.json", ["pipeline", "CleanscorePipeline"], index)
    (folder / "pipeline.py").write_text((CODE / "pipeline.py").read_text(encoding="utf-8"), encoding="utf-8")

    (folder / "scheduler").mkdir()
    sigma_data = getattr(net, "sigma_data", 0.5)
    scheduler = dict(sigma_min=low, sigma_max=high, sigma_data=sigma_data, sigma_schedule="karras", rho=RHO)
    _write_json(folder / "scheduler" / "scheduler_config.json", "EDMEulerScheduler", scheduler)

    place = folder / "denoiser"
    place.mkdir()
    if unet is not None:
        _write_model(place, "UNet2DModel", unet, unet2d_state(net))
        return
    names = list(inspect.signature(type(net)).parameters)
    arguments = dict(zip(names, net.init_args, strict=False)) | net.init_kwargs
    tensors = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    _write_model(place, "CleanscoreDenoiser", dict(precond=type(net).__name__, arguments=arguments), tensors)
    source = inspect.getsource(networks)
    (place / "networks.py").write_text(_replaced(source, IMPORTED, STANDS_ALONE), encoding="utf-8")
    wrapper = (CODE / "denoiser.py").read_text(encoding="utf-8")
    (place / "denoiser.py").write_text(_replaced(wrapper, "from training.networks", "from .networks"), encoding="utf-8")


def _write_model(folder: Path, class_name: str, settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    _write_json(folder / "config.json", class_name, settings)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def _replaced(source: str, old: str, new: str) -> str:
    if source.count(old) != 1:
        raise ValueError(f"{old.strip()!r} occurs {source.count(old)} times, expected once")
    return source.replace(old, new)


def _write_json(path: Path, class_name: str | list[str], settings: dict[str, Any]) -> None:
    text = plain_json(dict(_class_name=class_name, _diffusers_version=OLDEST, **settings))
    path.write_text(text, encoding="utf-8")
