"""Limits on building a network from constructor arguments that a stranger recorded (docs/security.md)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["ValueLimit", "check_arguments"]

MAX_NUMBER = 100_000  # loops of constructors up to here take seconds; real widths, sizes, classes and steps are smaller
MAX_ITEMS = 100  # of a list or dictionary: some are multiplied with themselves
_TOO_LARGE = "they ask for a far larger network than is stored"
_SEQUENCES = {getattr(torch.ops.aten, name) for name in ("arange", "linspace", "logspace", "eye")}


class ValueLimit(TorchDispatchMode):
    """Allows torch.empty, rand, arange and similar functions to create at most `limit` tensor values inside."""

    def __init__(self, limit: int):
        super().__init__()
        self._left = limit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, size = kwargs or {}, None
        if args and isinstance(args[0], (list, torch.Size)):
            size = math.prod(n for n in args[0] if isinstance(n, int))
        elif func.overloadpacket in _SEQUENCES:
            size = func(*args, **kwargs | {"device": "meta"}).numel()  # this device stores no values
        if size is not None:
            # Every tensor counts as 1000 values more, because building very many small ones takes forever too.
            self._left -= 1000 + size
            if self._left < 0:
                raise ValueError(_TOO_LARGE)
        return func(*args, **kwargs)


def check_arguments(arguments: Any, tensors: Iterable[torch.Tensor]) -> None:
    """Raise ValueError for arguments with a number that is far larger than every side of the tensors, or a long list.

    Some of these numbers become loops or the sizes of what is not a tensor.
    """
    limit = MAX_NUMBER + max((n for tensor in tensors if tensor.numel() for n in tensor.shape), default=0)

    def check(value: Any) -> None:
        if isinstance(value, int) and abs(value) > limit:
            raise ValueError(_TOO_LARGE)
        if isinstance(value, (list, tuple, dict, set, frozenset)):
            if len(value) > MAX_ITEMS:
                raise ValueError(f"one of them has {len(value)} items")
            for item in value.values() if isinstance(value, dict) else value:
                check(item)

    check(arguments)
