"""What follows from the reference alone: computed for the first set of generated images, kept for the next ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Memo"]


class Memo:
    """Values by name, for one reference. `of(part)` is the memo of a part of it, for example a class."""

    def __init__(self) -> None:
        self._values: dict[Any, Any] = {}

    def get(self, name: Any, compute: Callable[[], Any]) -> Any:
        """Return the value `name`, or else what `compute()` returns, and keep that."""
        if name not in self._values:
            self._values[name] = compute()
        return self._values[name]

    def of(self, part: int | str) -> Memo:
        """Return the memo of a part."""
        return self.get(("part", part), Memo)
