"""Training states: save them so that no interruption loses one, find them, load them without trusting the file.

See docs/reliability.md.
"""

from __future__ import annotations

import collections
import errno
import hashlib
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from dnnlib import UserError, atomic_open
from torch_utils import distributed, safe_pickle

__all__ = [
    "latest_state",
    "latest_state_of_runs",
    "load_state",
    "prune_states",
    "remove_leftovers",
    "require_space",
    "save_state",
    "set_aside_later_states",
    "size_of",
    "states",
    "warn_if_older",
]

_LEFTOVER = re.compile(r"\.(training-state|network-snapshot|samples|training_options|stats)\b.*\.[0-9a-f]{8}\.tmp")
_DIGEST = 64  # hexadecimal digits of the SHA-256, which follows a state's ZIP container
_END_RECORD = 22  # bytes of the record at the end of a ZIP container without a comment


def save_state(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write a state. It appears under `path` only when it is complete, on disk, and read back without an error.

    `state` consists of nested dicts, lists and tuples of tensors, numbers, strings and None. Raises OSError that names
    `path` when the disk refuses; an older file of that name then stays valid. Raises TypeError for anything that
    `load_state` would refuse.
    """
    _check_plain(state, "state")
    require_space(path, size_of(state))
    with atomic_open(path) as file:
        hashed = _HashedFile(file)
        try:
            torch.save(state, hashed)
        except RuntimeError as e:
            # After a failed write, the ZIP writer fails again in its own bookkeeping and hides the first error.
            if isinstance(e.__context__, OSError):
                raise e.__context__ from None
            raise
        file.write(hashed.sha256.hexdigest().encode())
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # drop the cache, so that reading back reads the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if _damage(file.name) is not None:
            raise OSError(errno.EIO, "what was written reads back differently", str(path))


class _HashedFile:
    """A file with the methods that torch.save needs, which also computes the SHA-256 of what is written."""

    def __init__(self, file: IO[bytes]):
        self._file, self.sha256 = file, hashlib.sha256()
        self.flush: Callable[[], None] = file.flush

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self._file.write(data)


def size_of(value: Any) -> int:
    """Return the size on disk of a state or snapshot in bytes, slightly overestimated, from all its tensors."""
    if isinstance(value, torch.nn.Module):
        value = value.state_dict()
    if isinstance(value, torch.Tensor):
        return 512 + value.numel() * value.element_size()
    if isinstance(value, dict):
        return 64 + sum(64 + size_of(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return 64 + sum(size_of(item) for item in value)
    return 64 + len(value) if isinstance(value, (str, bytes)) else 64


def require_space(path: str | os.PathLike[str], size: int) -> None:
    """Raise OSError that names `path` when its disk has fewer than `size` bytes free."""
    free = shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free
    if free < size:
        raise OSError(
            errno.ENOSPC,
            f"needs {size / 2**20:.1f} MiB and {free / 2**20:.1f} MiB are free, so it was not begun",
            str(path),
        )


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
    """Return what is wrong with the bytes of a state, or None. Raise OSError when they cannot be read.

    The checksums of a ZIP container do not cover most of its directory, which says where the tensors are and how large
    they are, and torch.load compares no checksum at all. So a SHA-256 of the whole container follows it.
    """
    sha256, size = hashlib.sha256(), os.path.getsize(path)
    with open(path, "rb") as file:
        left = size - _DIGEST
        while left > 0 and (chunk := file.read(min(left, 1 << 20))):
            sha256.update(chunk)
            left -= len(chunk)
        if left == 0 and file.read() == sha256.hexdigest().encode():
            return None
        file.seek(max(size - _END_RECORD, 0))
        if not file.read().startswith(b"PK\5\6"):
            return "truncated, damaged or not a state (its checksum differs)"
    try:  # no SHA-256 follows the container: an earlier version or another program wrote it
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            if any(info.compress_type != zipfile.ZIP_STORED for info in parts):
                return "not a state (its parts are compressed)"  # and could unpack to any size
            if sum(info.file_size for info in parts) > size or len({info.filename for info in parts}) < len(parts):
                return "not a state (its parts overlap)"  # and would take the square of its size to read
            bad = archive.testzip()
    except Exception as e:  # wrong bytes can make the reader raise anything
        return f"truncated or not a state ({str(e).rstrip('.')})"
    return None if bad is None else f"damaged (checksum of its part {bad} differs)"


def _damage_or_error(path: str | os.PathLike[str]) -> str | None:
    """Return what is wrong with a state, also that it cannot be read, as behind a bad sector; or None."""
    try:
        return _damage(path)
    except OSError as e:
        return f"unreadable ({e.strerror or e})"


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the state in a file, with tensors on the CPU.

    Raise UserError when the file is missing or damaged, or comes from another program.
    """
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
        raise UserError(
            f"{path}: not a training state of this program ({e.message.removeprefix(f'{path}: ')}); a new run can "
            "start from the weights of the snapshot beside it: train.py --transfer=network-snapshot-XXXXXX.pkl"
        ) from e
    if not isinstance(state, dict):
        raise UserError(f"{path}: not a training state, it holds a {type(state).__name__}")
    return state


def states(run_dir: str | os.PathLike[str]) -> list[Path]:
    """Return the files in `run_dir` that are named like states, newest first."""
    found = []
    if os.path.isdir(run_dir):
        for path in Path(run_dir).iterdir():
            match = re.fullmatch(r"training-state-([0-9]+)\.pt", path.name)
            if match and path.is_file():
                found.append((int(match[1]), path))
    return [path for _, path in sorted(found, reverse=True)]


def latest_state(run_dir: str | os.PathLike[str]) -> str | None:
    """Return the path of the newest undamaged state in a run directory, or None. Print which newer ones are damaged."""
    for path in states(run_dir):
        damage = _damage_or_error(path)
        if damage is None:
            return str(path)
        distributed.print0(f"Warning: {path} is {damage}; trying the one before it")
    return None


def warn_if_older(path: str | os.PathLike[str], net: torch.nn.Module) -> None:
    """Print a warning when a training state beside the snapshot `path` of `net` is newer than it.

    Classifiers keep their best snapshot, which is usually older than the last state.
    """
    if getattr(net, "network_kind", None) == "classifier":
        return
    name, found = os.path.basename(path), states(os.path.dirname(path) or ".")
    if found and re.fullmatch(r"network-snapshot-[0-9]+\.pkl", name):
        snapshot, state = (int(re.search("[0-9]+", text)[0]) for text in (name, found[0].name))
        if state > snapshot:
            distributed.print0(
                f"Warning: {path} is older than {found[0].name} beside it: the run has gone on to {state} kimg, and "
                "continuing it makes a newer snapshot"
            )


def latest_state_of_runs(outdir: str | os.PathLike[str]) -> str | None:
    """Return the newest undamaged state of the newest run directory `NNNNN-...` under `outdir` that has one.

    Without one, return that of `outdir` itself, or None.
    """
    runs = []
    if os.path.isdir(outdir):
        for path in Path(outdir).iterdir():
            match = re.match(r"[0-9]+(?=-)", path.name)
            if match and path.is_dir():
                runs.append((int(match[0]), path))
    for path in [path for _, path in sorted(runs, reverse=True)] + [Path(outdir)]:
        if (state := latest_state(path)) is not None:
            return state
    return None


def prune_states(run_dir: str | os.PathLike[str], keep: int) -> None:
    """Delete all states in `run_dir` but the newest `keep`, or the newest one if `keep` is 0."""
    for path in states(run_dir)[max(keep, 1) :]:
        path.unlink(missing_ok=True)


def set_aside_later_states(run_dir: str | os.PathLike[str], nimg: int, damaged_only: bool = False) -> None:
    """Rename the states beyond `nimg` images, from where the run in this folder goes on.

    They are damaged, or the user went back on purpose. `prune_states` and the next resume must not prefer them.
    With `damaged_only` the user wanted the newest one. UserError: then one of them is undamaged, so that another
    process has written it since this one looked.
    """
    for path in states(run_dir):
        if int(path.stem.rpartition("-")[2]) > nimg // 1000:
            if damaged_only and _damage_or_error(path) is None:
                raise UserError(f"{path}: another training has gone on here meanwhile; give the command again")
            aside = path.with_name(f"outdated-{path.name}")
            os.replace(path, aside)
            distributed.print0(f"{path.name} lies beyond this point; it is now {aside.name}")


def remove_leftovers(run_dir: str | os.PathLike[str]) -> None:
    """Delete the temporary files of saves that were killed. No other run may be writing to the folder."""
    for path in Path(run_dir).iterdir():
        if _LEFTOVER.fullmatch(path.name):
            path.unlink(missing_ok=True)
