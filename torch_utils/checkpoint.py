"""Training states: saved so that no interruption loses them, found again, loaded without trust."""

from __future__ import annotations

import collections
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError, atomic_open
from torch_utils import distributed, safe_pickle

__all__ = ["atomic_open", "latest_run", "latest_state", "load_state", "prune_states", "save_state"]

_LEFTOVER = re.compile(r"\.(training-state|network-snapshot)-.*\.tmp")


def save_state(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write a state that appears under `path` only when complete and on disk.

    `state`: nested dicts, lists and tuples of tensors, numbers, strings, None. Raises OSError naming `path` when the
    disk refuses (an older file of that name stays valid), TypeError for anything that `load_state` would refuse.
    """
    _check_plain(state, "state")
    with atomic_open(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as e:
            # The ZIP writer trips over its own bookkeeping after a failed write and hides what happened.
            if isinstance(e.__context__, OSError):
                raise e.__context__ from None
            raise


def _check_plain(value: Any, where: str) -> None:
    if type(value) in (dict, collections.OrderedDict):
        for key, item in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            _check_plain(item, f"{where}[{i}]")
    elif not (value is None or isinstance(value, torch.Tensor) or type(value) in (bool, int, float, str, bytes)):
        raise TypeError(f"{where} is a {type(value).__name__}, which load_state would refuse")


def _damage(path: str | os.PathLike[str]) -> str | None:
    # torch.load does not compare the container's checksums.
    try:
        with zipfile.ZipFile(path) as archive:
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                return "not a state (its parts are compressed)"  # and could unfold into any size
            bad = archive.testzip()
    except (zipfile.BadZipFile, EOFError, ValueError, RuntimeError, OverflowError) as e:
        return f"truncated or not a state ({str(e).rstrip('.')})"
    return None if bad is None else f"damaged (checksum of its part {bad} differs)"


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a state, tensors on the CPU. Raises UserError when it is missing, damaged or of another program."""
    try:
        damage = _damage(path)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror or e}") from e
    if damage is not None:
        raise UserError(f"{path}: {damage}")
    try:
        with open(path, "rb") as file:
            state = safe_pickle.load_torch(file, str(path))
    except UserError as e:
        raise UserError(f"{path}: not a training state of this program ({e.message.removeprefix(f'{path}: ')}); to go "
                        "on from a snapshot's weights, give the network-snapshot-*.pkl beside it to --transfer") from e
    if not isinstance(state, dict):
        raise UserError(f"{path}: not a training state, it holds a {type(state).__name__}")
    return state


def _states(run_dir: str | os.PathLike[str]) -> list[Path]:
    """States in `run_dir`, newest first."""
    found = []
    if os.path.isdir(run_dir):
        for path in Path(run_dir).iterdir():
            match = re.fullmatch(r"training-state-([0-9]+)\.pt", path.name)
            if match and path.is_file():
                found.append((int(match[1]), path))
    return [path for _, path in sorted(found, reverse=True)]


def latest_state(run_dir: str | os.PathLike[str]) -> str | None:
    """Path of the newest complete state in a run directory, None without one; says which newer ones are damaged."""
    for path in _states(run_dir):
        damage = _damage(path)
        if damage is None:
            return str(path)
        distributed.print0(f"Warning: {path} is {damage}; trying the one before it")
    return None


def latest_run(outdir: str | os.PathLike[str]) -> str | None:
    """Newest run directory `NNNNN-...` under `outdir` with a complete state, else `outdir` if it is one, else None."""
    runs = []
    if os.path.isdir(outdir):
        for path in Path(outdir).iterdir():
            match = re.match(r"[0-9]+(?=-)", path.name)
            if match and path.is_dir():
                runs.append((int(match[0]), path))
    for path in [path for _, path in sorted(runs, reverse=True)] + [Path(outdir)]:
        if latest_state(path) is not None:
            return str(path)
    return None


def prune_states(run_dir: str | os.PathLike[str], keep: int) -> None:
    """Delete all but the newest `keep` (at least 1) states, and what interrupted saves left behind."""
    for path in _states(run_dir)[max(keep, 1):]:
        path.unlink(missing_ok=True)
    for path in Path(run_dir).iterdir():
        if _LEFTOVER.fullmatch(path.name):
            path.unlink(missing_ok=True)
