"""Reading pickles without trust: a list of allowed names, each standing for an inert record made for one load.

Nothing a pickle names is imported, nothing it calls exists: every allowed global becomes a fresh class whose instances
only hold their arguments, so that no opcode (REDUCE, BUILD, NEWOBJ, ...) reaches a real function or class. What the
records mean is worked out afterwards, from a pickle that was read to its end.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from dnnlib import UserError

__all__ = ["ARRAYS", "CONTAINERS", "TENSORS", "Record", "Resolver", "end_of_pickle", "load", "load_cifar_batch",
           "parse", "refuse"]

# What the published network snapshots ask for, beside their persistent objects and plain data.
TENSORS = frozenset({"torch._utils._rebuild_parameter", "torch._utils._rebuild_tensor_v2",
                     "torch.storage._load_from_bytes"})
CONTAINERS = frozenset(f"torch.nn.modules.container.{name}" for name in ("ModuleDict", "ModuleList", "Sequential"))
_SCALARS = frozenset({"numpy.dtype", "numpy.core.multiarray.scalar"})
_DICTS = frozenset({"collections.OrderedDict", "dnnlib.util.EasyDict"})
# What CIFAR's archives, written by Python 2 and NumPy 1 or any later ones, ask for.
ARRAYS = frozenset({"numpy.core.multiarray._reconstruct", "numpy.core.numeric._frombuffer", "numpy.ndarray",
                    "_codecs.encode"})

MAX_DEPTH = 200
_LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # how torch begins a storage inside a pickle
# What reading a record raises when its arguments are not of the kind they should be.
_MALFORMED = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


class Record:
    """What a pickle said about one object: `args` it was called with, `state` it was given. `path` names its class."""

    __slots__ = ("args", "state")
    path = ""

    def __new__(cls, *args: Any) -> Record:
        self = object.__new__(cls)
        self.args, self.state = args, None
        return self

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def _ignore(self, *args: Any) -> None:
        pass

    __setitem__ = append = extend = add = _ignore  # of containers that are refused in the end, by name


class _RecordDict(dict):
    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass  # attributes of a dict, such as a state dict's version numbers


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, allowed: frozenset[str], encoding: str):
        super().__init__(io.BytesIO(data), encoding=encoding)
        self._allowed = allowed
        self._classes: dict[str, type] = {}
        self.refused: list[str] = []

    def find_class(self, module: str, name: str) -> type:
        path = re.sub(r"^numpy\._core\.", "numpy.core.", f"{module}.{name}")
        if path not in self._classes:
            if path not in self._allowed:
                # Read on with a record: the caller may have a better explanation than the first strange name.
                self.refused.append(f"{module}.{name}")
            base = _RecordDict if path in _DICTS else Record
            self._classes[path] = type("Inert", (base,), {"__slots__": (), "path": path})
        return self._classes[path]


def end_of_pickle(data: bytes, name: str) -> int:
    """Offset after a pickle's last opcode, found without reading it. Raises UserError when it is cut off or none."""
    count, end = 0, 0
    try:
        for opcode, arg, pos in pickletools.genops(data):
            count += 1
            # The C reader allocates its memo up to the largest index before it looks further.
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and arg > count:
                raise ValueError(f"memo index {arg} in operation {count}")
            end = pos + 1
    except Exception as e:  # pickletools raises a dozen kinds; all of them mean this
        raise UserError(f"{name}: {'truncated or corrupt' if count else 'not a'} pickle ({e})") from e
    return end


def parse(data: bytes, name: str, extra: Iterable[str] = (), encoding: str = "ASCII") -> tuple[Any, list[str], int]:
    """Read a pickle into plain containers and `Record`s. Nothing in it runs and nothing it names is built.

    `extra`: dotted names allowed beside plain data, NumPy scalars and dictionaries. Returns the object, the names that
    are not allowed (the caller refuses, or explains better), and the offset after the last opcode.
    Raises UserError naming the file `name` when it is truncated or corrupt.
    """
    end = end_of_pickle(data, name)
    reader = _Unpickler(data, _SCALARS | _DICTS | frozenset(extra), encoding)
    try:
        tree = reader.load()
    except Exception as e:  # any misuse of an inert record ends here: TypeError, AttributeError, KeyError, ...
        refuse(reader.refused, name)
        raise UserError(f"{name}: corrupt pickle ({e})") from e
    return tree, reader.refused, end


def refuse(refused: list[str], name: str, hint: str = "") -> None:
    """Raise UserError when `refused` names any global."""
    if refused:
        raise UserError(f"{name}: refused, it asks for '{refused[0][:100]}', which no such file needs{hint}")


def load(data: bytes, name: str, extra: Iterable[str] = (), encoding: str = "ASCII") -> Any:
    """The plain data in a pickle (containers, numbers, text, NumPy scalars; with `extra` ARRAYS or TENSORS those too).

    Raises UserError naming the file `name` and what is wrong with it.
    """
    tree, refused, _ = parse(data, name, extra, encoding)
    refuse(refused, name)
    return Resolver(name, len(data)).plain(tree)


class Resolver:
    """Turns the records of a file of `size` bytes into values. Every method raises UserError naming the file."""

    def __init__(self, name: str, size: int):
        self._name = name
        # Shared references let a small file unfold into a huge object. An honest one has a few bytes for each value.
        self._left = size + 1000
        self._storages: dict[int, tuple[Record, torch.dtype, torch.UntypedStorage]] = {}

    def fail(self, why: str) -> UserError:
        """The error to raise."""
        return UserError(f"{self._name}: {why}")

    def plain(self, value: Any) -> Any:
        """`value` with dict kinds as dict, NumPy scalars as Python numbers, arrays and tensors as such."""
        try:
            return self._plain(value, 0)
        except TypeError as e:  # a value that cannot be a key
            raise self.fail(f"malformed ({e})") from e

    def spend(self, depth: int) -> None:
        """Count one value met at `depth`; refuse the file when there are more than its size explains."""
        self._left -= 1
        if self._left < 0 or depth > MAX_DEPTH:
            raise self.fail("refused, its contents repeat themselves or are nested beyond reason")

    def _plain(self, value: Any, depth: int) -> Any:
        self.spend(depth)
        if isinstance(value, dict):
            return {self._plain(k, depth + 1): self._plain(v, depth + 1) for k, v in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return type(value)(self._plain(v, depth + 1) for v in value)
        if isinstance(value, Record):
            return self._value(value, depth)
        if isinstance(value, type):
            raise self.fail(f"holds the bare name '{value.path}'")
        return value  # None, bool, int, float, complex, str, bytes, bytearray: pickle makes nothing else by itself

    def _value(self, record: Record, depth: int) -> Any:
        reader = {
            "numpy.core.multiarray.scalar": self._scalar,
            "numpy.core.multiarray._reconstruct": self._reconstructed,
            "numpy.core.numeric._frombuffer": self._frombuffer,
            "_codecs.encode": self._encoded,
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_parameter": self.tensor,
        }.get(type(record).path)
        if reader is None:
            raise self.fail(f"holds a '{type(record).path}' where plain data belongs")
        try:
            return reader(record)
        except _MALFORMED as e:
            raise self.fail(f"malformed '{type(record).path}' ({e})") from e

    def _dtype(self, record: Any) -> np.dtype:
        if not (isinstance(record, Record) and type(record).path == "numpy.dtype"):
            raise ValueError("no dtype")
        code = record.args[0]
        code = code.decode("ascii") if isinstance(code, bytes) else code
        if not re.fullmatch(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16)", code):
            raise ValueError(f"dtype {code!r} is not numeric")
        order = record.state[1] if record.state else "="
        return np.dtype(code).newbyteorder(order.decode("ascii") if isinstance(order, bytes) else order)

    def _scalar(self, record: Record) -> Any:
        dtype, data = record.args
        return self._array(data, self._dtype(dtype), ()).item()

    def _reconstructed(self, record: Record) -> np.ndarray:
        _version, shape, dtype, fortran, data = record.state
        return self._array(data, self._dtype(dtype), shape, "F" if fortran else "C")

    def _frombuffer(self, record: Record) -> np.ndarray:
        data, dtype, shape, order = record.args
        return self._array(data, self._dtype(dtype), shape, order)

    def _array(self, data: Any, dtype: np.dtype, shape: Any, order: str = "C") -> np.ndarray:
        if isinstance(data, Record):
            data = self._encoded(data)
        data = data.encode("latin1") if isinstance(data, str) else data
        if len(data) != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{len(data)} bytes for shape {shape} of {dtype}")
        return np.frombuffer(bytearray(data), dtype).reshape(shape, order=order)

    def _encoded(self, record: Record) -> bytes:
        # How Python 3 writes bytes in the older pickle protocols.
        text, encoding = record.args
        if type(record).path != "_codecs.encode" or encoding not in ("latin1", "latin-1"):
            raise ValueError("unknown encoding")
        return text.encode("latin1")

    def tensor(self, record: Any) -> torch.Tensor:
        """The tensor of a parameter or tensor record, on the CPU, sharing memory within this file as it did."""
        try:
            if type(record).path == "torch._utils._rebuild_parameter":
                record = record.args[0]
            if type(record).path != "torch._utils._rebuild_tensor_v2":
                raise ValueError(f"a '{type(record).path}'")
            storage, offset, size, stride = record.args[:4]
            dtype, memory = self._storage(storage)
            if any(type(n) is not int or n < 0 for n in (offset, *size, *stride)) or len(size) != len(stride):
                raise ValueError(f"offset {offset}, size {size}, stride {stride}")
            last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
            room = memory.nbytes() // dtype.itemsize
            # set_() would enlarge the storage, and strides of 0 would make much out of little.
            if math.prod(size) > room or (0 not in size and last >= room):
                raise ValueError(f"offset {offset}, size {size}, stride {stride} in a storage of {room}")
            return torch.empty(0, dtype=dtype).set_(memory, offset, tuple(size), tuple(stride))
        except _MALFORMED as e:
            raise self.fail(f"malformed tensor ({e})") from e

    def _storage(self, record: Any) -> tuple[torch.dtype, torch.UntypedStorage]:
        if id(record) not in self._storages:
            if not (isinstance(record, Record) and type(record).path == "torch.storage._load_from_bytes"):
                raise ValueError("no storage")
            (blob,) = record.args
            if not blob.startswith(_LEGACY_MAGIC):
                raise ValueError("not a storage")
            try:
                # What torch.storage._load_from_bytes does, without its trust.
                storage = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
            except Exception as e:
                raise ValueError(f"unreadable storage: {str(e).splitlines()[0][:100] if str(e) else e!r}") from e
            if not isinstance(storage, torch.storage.TypedStorage):
                raise ValueError(f"a {type(storage).__name__} where a storage belongs")
            # The record is kept, so that no other one can get its id.
            self._storages[id(record)] = (record, storage.dtype, storage._untyped_storage)  # untyped() warns
        return self._storages[id(record)][1:]


def load_cifar_batch(data: bytes, name: str) -> dict[str, Any]:
    """A batch or meta file of the CIFAR-10 / CIFAR-100 archives (their Python version) as a dict with text keys.

    `data` [N,3072] uint8 in batches; lists of labels are lists of int, file and class names lists of str. Accepts the
    original files (Python 2) and ones written again by Python 3. Raises UserError naming the file `name`.
    """
    batch = load(data, name, ARRAYS, encoding="latin1")
    if not isinstance(batch, dict):
        raise UserError(f"{name}: not a CIFAR batch, it holds a {type(batch).__name__} instead of a dict")
    return {_text(key): _text(value) for key, value in batch.items()}


def _text(value: Any) -> Any:
    if isinstance(value, list):
        return [_text(v) for v in value]
    return value.decode("latin1") if isinstance(value, bytes) else value
