"""Look through a pickle before anything loads it (docs/security.md).

Python's unpickler hashes the keys of dictionaries and the members of sets while it reads. A tuple of 100 bytes that
holds itself twice, 60 times over, takes 2^60 steps, a tuple nested a million deep ends the process, and chosen numbers
all have the same hash. So the stack is followed here with the weight of each value instead of the value.
"""

from __future__ import annotations

import pickletools
from typing import IO, Any

from dnnlib import UserError

__all__ = ["end_of_pickle"]

_MAX_OPERATIONS = 4_000_000  # the largest published file (CIFAR-100) has half a million
_TUPLE, _MAX_KEY = 10, 100  # the weight of an empty tuple, and of the heaviest key: tuples of small numbers and names
_MAX_TUPLES = 5000  # keys that are tuples, since tuples with the same hash are easy to make
_UNFIT = 1 << 32  # the weight of what cannot be a key
_MODULUS = (1 << 61) - 1  # Python hashes a number as its remainder: distinct for smaller numbers
_HASHED = {  # which of the values that an operation takes from the stack it hashes
    "SETITEM": slice(1, 2),
    "SETITEMS": slice(0, None, 2),
    "DICT": slice(0, None, 2),
    "ADDITEMS": slice(None),
    "FROZENSET": slice(None),
    "BINPERSID": slice(None),
}
_TUPLES = {"EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET"}
_PUT, _GET = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}
_REFUSED = {  # pickle caches registered extensions, so after the first use they bypass find_class
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), "a registered extension"),
    **dict.fromkeys(("NEXT_BUFFER", "READONLY_BUFFER"), "a buffer outside"),
}


def _effect(op: pickletools.OpcodeInfo) -> tuple[bool, int, int, slice | None, bool]:
    # Whether `op` takes all above the last mark, or how many values, how many it puts back, which it hashes, if tuples.
    before, after = op.stack_before, op.stack_after
    marked = pickletools.markobject in before
    # A container below the mark stays where it is.
    pushed = len(after) - (before.index(pickletools.markobject) if marked else 0)
    return marked, len(before), pushed, _HASHED.get(op.name), op.name in _TUPLES


_EFFECTS = {op.name: _effect(op) for op in pickletools.opcodes}
_VALUES = {name for name, effect in _EFFECTS.items() if effect == (False, 0, 1, None, False)} - _GET - {"MARK"}


class _Stack:
    def __init__(self) -> None:
        self._weights: list[int] = []
        self._marks: list[int] = []
        self._memo: dict[int, int] = {}
        self._tuples = 0  # keys so far

    def step(self, name: str, arg: Any) -> None:
        """Follow one operation. Raise ValueError for a key that takes long to hash; LookupError: it must fail."""
        weights, marks = self._weights, self._marks
        if name in _VALUES:
            weights.append(_weight(arg))
        elif name in _GET:
            weights.append(self._memo[arg])
        elif name == "MEMOIZE" or name in _PUT:
            self._memo[len(self._memo) if arg is None else arg] = weights[-1]
        elif name == "DUP":
            weights.append(weights[-1])
        elif name == "MARK":
            marks.append(len(weights))
        else:
            marked, count, pushed, hashed, is_tuple = _EFFECTS[name]
            fence = marks[-1] if marks else 0
            if marked or (name == "POP" and marks and fence == len(weights)):
                start = marks.pop()
            elif (start := len(weights) - count) < fence:
                raise IndexError("nothing is left on the stack")
            taken = weights[start:]
            del weights[start:]
            if hashed is not None and max(taken[hashed], default=0) >= _TUPLE:
                self._check(taken[hashed])
            if pushed:
                weights.append(min(_TUPLE + sum(taken), _UNFIT) if is_tuple else _weight(arg))

    def _check(self, keys: list[int]) -> None:
        self._tuples += sum(weight >= _TUPLE for weight in keys)
        if max(keys) > _MAX_KEY or self._tuples > _MAX_TUPLES:
            raise ValueError("a key of a dictionary or a member of a set is too large")


def _weight(arg: Any) -> int:
    # Only numbers and texts get weight here. Objects, lists and dictionaries are hashed by identity or not at all.
    if isinstance(arg, int):
        return 1 if -_MODULUS < arg < _MODULUS else _UNFIT
    return 1 + len(arg) // 1000 if isinstance(arg, (str, bytes)) else 1


def end_of_pickle(data: bytes | IO[bytes], name: str) -> int:
    """Return the offset after a pickle's last opcode, without loading the pickle.

    Raise UserError when the data is cut off or not a pickle, or would take long to load.
    """
    count, end, stack = 0, 0, _Stack()
    try:
        for opcode, arg, pos in pickletools.genops(data):
            count += 1
            # pickle allocates its memo up to the largest index at once.
            if opcode.name in _PUT and arg > count:
                raise ValueError(f"memo index {arg} in operation {count}")
            if opcode.name in _REFUSED:
                raise ValueError(f"it asks for {_REFUSED[opcode.name]}")
            if count > _MAX_OPERATIONS:
                raise ValueError(f"more than {_MAX_OPERATIONS:,} operations")
            stack.step(opcode.name, arg)
            end = pos + 1
    except Exception as e:  # pickletools raises a dozen kinds of errors; all of them mean this
        why = str(e) or type(e).__name__
        raise UserError(f"{name}: {'truncated or corrupt' if count else 'not a'} pickle ({why[:200]})") from e
    return end
