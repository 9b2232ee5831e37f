"""Networks as two files that any program reads: tensors in `model.safetensors`, all else in `config.json`.

Nothing in them can run. See docs/export.md. `torch_utils.persistence` builds a network from what `read` returns.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import safetensors.torch
import torch
from safetensors import SafetensorError

import dnnlib
from torch_utils import safe_files

__all__ = ["CONFIG", "FORMAT", "WEIGHTS", "is_portable", "plain_json", "read", "write"]

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_PIN = "config.json.sha256"  # in the metadata of the tensors
FORMAT = "cleanscore network 1"
DESCRIBES = ("class_name", "init_args", "init_kwargs")  # the network: its class and the constructor's arguments


def is_portable(path: str) -> bool:
    """Return whether a path or URL is a `.safetensors` file."""
    return (urlsplit(path).path if dnnlib.is_url(path) else path).endswith(".safetensors")


def write(folder: Path, net: torch.nn.Module, settings: Mapping[str, Any]) -> None:
    """Write a network on the CPU and the plain `settings` of its snapshot into a folder.

    Tuples become lists. UserError: JSON cannot hold the settings.
    """
    described = dict(class_name=type(net).__name__, init_args=net.init_args, init_kwargs=net.init_kwargs)
    config = dict(format=FORMAT, kind=net.network_kind, **described, **settings)
    text = plain_json(config).encode()
    tensors = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    metadata = {"format": "pt", _PIN: hashlib.sha256(text).hexdigest()}
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata=metadata)
    (folder / CONFIG).write_bytes(text)


def plain_json(settings: dict[str, Any]) -> str:
    """Return plain data as JSON that reads back the same, but for tuples, which become lists.

    UserError: there are bytes, or keys that are no text.
    """
    try:
        return json.dumps(_plain(settings), indent=2) + "\n"
    except TypeError as e:
        raise dnnlib.UserError(f"its settings do not fit into JSON ({e})") from None


def _plain(value: Any) -> Any:
    """Return plain data with lists in place of tuples. TypeError: a key is not a string."""
    if isinstance(value, dict):
        if other := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"the key {other[0]!r} is not a string")
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def read(path_or_url: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the settings and the tensors of a `.safetensors` file or URL that has its `config.json` beside it.

    A URL with `#sha256=` pins both files, if that of the tensors holds the hash of the settings. UserError: one of the
    two files is missing or damaged, or is not what `write` has written.
    """
    data = dnnlib.read_bytes(path_or_url)
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as e:
        raise dnnlib.UserError(f"{path_or_url}: damaged, or not a safetensors file ({e})") from None
    name = os.path.join(os.path.dirname(path_or_url), CONFIG)
    pin = ""
    if dnnlib.is_url(path_or_url):
        url = urlsplit(path_or_url)
        name = urljoin(path_or_url, CONFIG) + (f"?{url.query}" if url.query else "")
        header = safe_files.load_json(data[8 : 8 + int.from_bytes(data[:8], "little")], path_or_url)
        stated = (header.get("__metadata__") or {}).get(_PIN)
        pin = f"#sha256={stated}" if url.fragment and stated else ""
    config = safe_files.load_json(dnnlib.read_bytes(name + pin), name)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise dnnlib.UserError(f'{name}: does not say "format": "{FORMAT}", so export.py has not written it')
    kinds = dict(class_name=str, init_args=list, init_kwargs=dict)
    for key in DESCRIBES:
        if not isinstance(config.get(key), kinds[key]):
            raise dnnlib.UserError(f"{name}: {key!r} is missing or of the wrong type")
    return config, tensors
