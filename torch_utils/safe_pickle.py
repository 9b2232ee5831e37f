"""Read pickles without trusting them (docs/security.md).

Nothing that a pickle names is imported. Every global becomes a new, inert class, whose instances only remember their
arguments. So no opcode (REDUCE, BUILD, NEWOBJ, ...) reaches a real function or class, and names that are not on a list
are refused. A `Resolver` turns these records into values after the whole pickle has been read.

This module also reads the files of torch.save. torch.load(weights_only=True) does not run the code in a file either,
but it calls what is on its list, and bytearray(10**12) in a file of a kilobyte takes all memory of the machine.
"""

from __future__ import annotations

import functools
import io
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from dnnlib import UserError
from torch_utils.pickle_scan import end_of_pickle

if TYPE_CHECKING:  # imported where there are tensors to read, so that other programs do not wait for it
    import torch

__all__ = [
    "ARRAYS",
    "CONTAINERS",
    "MODULES",
    "NAMESPACES",
    "TENSORS",
    "Record",
    "Resolver",
    "end_of_pickle",
    "load",
    "load_cifar_batch",
    "load_torch",
    "on_list",
    "parse",
    "refuse",
]

# The names that published network snapshots need, besides persistent objects and plain data.
TENSORS = frozenset(
    {"torch._utils._rebuild_parameter", "torch._utils._rebuild_tensor_v2", "torch.storage._load_from_bytes"}
)
CONTAINERS = frozenset(f"torch.nn.modules.container.{name}" for name in ("ModuleDict", "ModuleList", "Sequential"))
# Other modules that published snapshots hold as plain objects: layers, and whatever classes the authors have in their
# package `training` (TDSM's is training.resnet_cond.ResNet_cond).
MODULES = CONTAINERS | frozenset(
    f"{module}.{name}"
    for module, names in {
        "torch.nn.modules.activation": "ReLU SiLU Sigmoid",
        "torch.nn.modules.batchnorm": "BatchNorm2d",
        "torch.nn.modules.conv": "Conv2d",
        "torch.nn.modules.dropout": "Dropout",
        "torch.nn.modules.flatten": "Flatten",
        "torch.nn.modules.linear": "Identity Linear",
        "torch.nn.modules.pooling": "AdaptiveAvgPool2d AvgPool2d MaxPool2d",
        "training": "*",
    }.items()
    for name in names.split()
)
NAMESPACES = frozenset({"argparse.Namespace"})  # the options that training scripts of others save
_SCALARS = frozenset({"numpy.dtype", "numpy.core.multiarray.scalar"})
_DICTS = frozenset({"collections.OrderedDict", "dnnlib.util.EasyDict"})
# The names that arrays in CIFAR's archives need, whichever versions of Python and NumPy wrote them.
ARRAYS = frozenset(
    {"numpy.core.multiarray._reconstruct", "numpy.core.numeric._frombuffer", "numpy.ndarray", "_codecs.encode"}
)

# Files of torch.save name a class for each kind of storage. These are the corresponding dtypes.
_KINDS = {f"torch.{name}Storage": dtype for name, dtype in dict(
    Double="float64", Float="float32", Half="float16", BFloat16="bfloat16", Long="int64", Int="int32", Short="int16",
    Char="int8", Byte="uint8", Bool="bool", ComplexDouble="complex128", ComplexFloat="complex64").items()}  # fmt: skip

MAX_DEPTH = 200
MAX_NAME, MAX_CLASSES = 300, 1000  # characters of a dotted name, names; a real file has a few dozen
SHOWN = 4  # tensors may share a storage, but not so many that their copies are far larger than the file
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # how files of torch.save begin that are not ZIPs
_ReadStorage = Callable[[Any, memoryview], int]  # fills memory from the storage with this key; returns the bytes read
# What reading a record raises when its arguments have wrong types or values.
_MALFORMED = (ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError, TypeError,
              ValueError, zipfile.BadZipFile)  # fmt: skip


class Record:
    """What a pickle says about one object: the arguments `args` of its class, called `path`, and its `state`."""

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

    __setitem__ = append = extend = add = (
        _ignore  # what fills a container of a forbidden class, which `refuse` refuses later
    )


class _RecordDict(dict):
    __slots__ = ()

    def __init__(self, *args: list[Any]):
        # Python 2 gives the items as a list of pairs. They move, as copies of one list could take all memory.
        for pairs in args:
            if type(pairs) is not list or any(type(key) is not str or len(key) > 1000 for key, _ in pairs):
                raise TypeError("not the items of a dictionary")
            self.update(pairs)
            pairs.clear()

    def __setstate__(self, state: Any) -> None:
        pass  # attributes of a dict, such as the version numbers of a state dict, are not needed


class _Stored(Record):
    """A storage outside the pickle, as torch.save refers to it. `args` are its kind, key and number of values."""

    __slots__ = ()
    path = "a storage"


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: IO[bytes], allowed: frozenset[str], encoding: str):
        super().__init__(stream, encoding=encoding)
        self._allowed = allowed
        self._classes: dict[str, type] = {}
        self.refused: list[str] = []
        self.stored: dict[Any, _Stored] = {}  # storages outside the pickle, by key

    def find_class(self, module: str, name: str) -> type:
        if len(module) + len(name) > MAX_NAME or len(self._classes) >= MAX_CLASSES:
            raise pickle.UnpicklingError("it asks for too many names, or for a very long one")
        path = re.sub(r"^numpy\._core\.", "numpy.core.", f"{module}.{name}")
        if path not in self._classes:
            if not on_list(path, self._allowed):
                # Continue with a record: the caller may have a better explanation than the first forbidden name.
                self.refused.append(f"{module}.{name}")
            base = _RecordDict if path in _DICTS else Record
            self._classes[path] = type("Inert", (base,), {"__slots__": (), "path": path})
        return self._classes[path]

    def persistent_load(self, pid: Any) -> Record:
        whole = isinstance(pid, tuple) and len(pid) in (5, 6) and pid[5:] in ((), (None,)) and pid[0] == "storage"
        kind = pid[1].path if whole and type(pid[2]) is str and type(pid[4]) is int else None
        if not _KINDS.keys() & self._allowed or kind not in _KINDS:
            raise pickle.UnpicklingError("it refers to an object outside")
        return self.stored.setdefault(pid[2], _Stored(kind, pid[2], pid[4]))


def on_list(path: str, allowed: frozenset[str]) -> bool:
    """Return whether the list has this dotted name, or 'package.*'."""
    return path in allowed or f"{path.partition('.')[0]}.*" in allowed


def parse(data: bytes, name: str, extra: Iterable[str] = (), encoding: str = "ASCII") -> tuple[Any, list[str], int]:
    """Read a pickle into plain containers and `Record`s. Nothing in it runs, and nothing that it names is built.

    `extra`: dotted names that are allowed besides plain data, NumPy scalars and dictionaries. Returns the object, the
    forbidden names in it, which the caller must `refuse` or explain better, and the offset after the last opcode.
    Raises UserError that names the file `name` when it is truncated or corrupt.
    """
    stream = io.BytesIO(data)
    tree, reader = _parse(stream, name, extra, encoding)
    return tree, reader.refused, stream.tell()


def _parse(stream: IO[bytes], name: str, extra: Iterable[str] = (), encoding: str = "ASCII") -> tuple[Any, _Unpickler]:
    # Read the pickle at the stream's position, and leave the stream after it.
    start, end = stream.tell(), end_of_pickle(stream, name)
    stream.seek(start)
    reader = _Unpickler(stream, _SCALARS | _DICTS | frozenset(extra), encoding)
    try:
        tree = reader.load()
    except Exception as e:  # misuse of an inert record raises TypeError, AttributeError, KeyError, ...
        refuse(reader.refused, name)
        raise UserError(f"{name}: corrupt pickle ({str(e)[:200]})") from e
    stream.seek(end)
    return tree, reader


def refuse(refused: list[str], name: str, hint: str = "") -> None:
    """Raise UserError that ends with `hint`, unless the list `refused` of forbidden names is empty."""
    if refused:
        raise UserError(f"{name}: refused, it asks for '{refused[0][:100]}', which no such file needs{hint}")


def load(data: bytes, name: str, extra: Iterable[str] = (), encoding: str = "ASCII") -> Any:
    """Return the plain data in a pickle: containers, numbers, text, NumPy scalars.

    With `extra` ARRAYS or TENSORS, these are allowed too. Raises UserError that names the file `name` and says what is
    wrong with it.
    """
    tree, refused, _ = parse(data, name, extra, encoding)
    refuse(refused, name)
    return Resolver(name, len(data)).plain(tree)


def load_torch(
    file: IO[bytes], name: str, extra: Iterable[str] = (), wanted: Callable[[dict], Iterable[Any]] | None = None
) -> Any:
    """Return the plain data and tensors (on the CPU) in a file of torch.save, in its ZIP form or its older form.

    `extra`: names that are allowed besides, such as ARRAYS or NAMESPACES (which become dicts). `wanted`, given the
    file's dictionary before its tensors are read, returns the keys that matter. Raises UserError that names the file
    `name` when it is truncated or corrupt, or asks for anything else.
    """
    extra = frozenset(extra) | TENSORS | _KINDS.keys()
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    zipped = file.read(4) == b"PK\3\4"
    file.seek(0)
    try:
        tree, refused, read = (_open_zip if zipped else _open_legacy)(file, name, extra)
    except _MALFORMED as e:
        raise UserError(f"{name}: malformed ({e})") from e
    refuse(refused, name)
    if wanted is not None and isinstance(tree, dict):
        tree = {key: tree[key] for key in wanted(tree)}
    return Resolver(name, size, read).plain(tree)


def _open_zip(file: IO[bytes], name: str, extra: Iterable[str]) -> tuple[Any, list[str], _ReadStorage]:
    try:
        archive = zipfile.ZipFile(file)
        entries = {info.filename: info for info in archive.infolist()}
        pickles = [entry for entry in entries if entry.endswith("/data.pkl")]
        # torch.save does not compress its entries, so they cannot become larger than the file.
        if (
            len(pickles) != 1
            or len(entries) != len(archive.infolist())
            or any(
                info.compress_type or info.flag_bits & 1 or info.compress_size != info.file_size
                for info in entries.values()
            )
        ):
            raise ValueError("not the ZIP that torch.save writes")
        prefix = pickles[0].removesuffix("data.pkl")
        if prefix + "byteorder" in entries and archive.read(prefix + "byteorder") != b"little":
            raise ValueError("not little-endian")
        data = archive.read(pickles[0])
    except Exception as e:  # zipfile raises a dozen kinds of errors; all of them mean this
        raise UserError(f"{name}: truncated or corrupt ({str(e)[:200]})") from e
    tree, refused, _ = parse(data, name, extra)

    def read(key: Any, memory: memoryview) -> int:
        with archive.open(entries[f"{prefix}data/{key}"]) as source:
            filled = source.readinto(memory)
            if source.read(1):  # at the end, zipfile also compares the checksum
                raise ValueError(f"storage {key} is larger")
            return filled

    return tree, refused, read


def _open_legacy(file: IO[bytes], name: str, extra: Iterable[str]) -> tuple[Any, list[str], _ReadStorage]:
    magic, protocol, system = (_parse(file, name)[0] for _ in range(3))
    if (magic, protocol) != (_LEGACY_MAGIC, _LEGACY_PROTOCOL) or not (
        isinstance(system, dict) and system.get("little_endian") is True
    ):
        raise UserError(f"{name}: not a file of torch.save, or not little-endian")
    tree, reader = _parse(file, name, extra)
    keys = _parse(file, name)[0]
    texts = isinstance(keys, list) and all(type(key) is str for key in keys)
    if not texts or len(keys) != len(reader.stored) or set(keys) != reader.stored.keys():
        raise UserError(f"{name}: corrupt, it does not list the storages that it uses")
    # After the pickles, each storage follows: the number of values and the values.
    places, end = {}, file.tell()
    for key in keys:
        kind, _, count = reader.stored[key].args
        places[key] = end
        end += 8 + count * _dtype(kind).itemsize

    def read(key: Any, memory: memoryview) -> int:
        file.seek(places[key])
        if int.from_bytes(file.read(8), "little") != reader.stored[key].args[2]:
            raise ValueError(f"storage {key} has another size")
        return file.readinto(memory)

    return tree, reader.refused, read


class Resolver:
    """Turns the records of a file of `size` bytes into values. Its methods raise UserError that names the file.

    `read` reads the storages outside the pickle.
    """

    def __init__(self, name: str, size: int, read: _ReadStorage | None = None):
        self._name, self._size, self._read = name, size, read
        # Shared references let a small file become a huge object. An honest file has a few bytes for each value.
        self._left = size + 1000
        self._shown = SHOWN * size  # bytes that the file's tensors may show of its storages
        self._storages: dict[int, tuple[Record, torch.dtype, torch.UntypedStorage]] = {}

    def fail(self, why: str) -> UserError:
        """Return the error to raise."""
        return UserError(f"{self._name}: {why}")

    def plain(self, value: Any) -> Any:
        """Return `value` without records. Dictionaries of any kind become dicts, NumPy scalars become numbers."""
        try:
            return self._plain(value, 0)
        except TypeError as e:  # a value that cannot be a key
            raise self.fail(f"malformed ({e})") from e

    def spend(self, depth: int, nbytes: int = 1) -> None:
        """Count one value of `nbytes` at `depth`. Refuse the file when it has more values than its size can explain."""
        self._left -= nbytes
        if self._left < 0 or depth > MAX_DEPTH:
            raise self.fail("refused, its contents repeat themselves or are nested too deeply")

    def _plain(self, value: Any, depth: int) -> Any:
        self.spend(depth)
        if isinstance(value, dict):
            return {self._key(k, depth + 1): self._plain(v, depth + 1) for k, v in value.items()}
        if isinstance(value, (set, frozenset)):
            return type(value)(self._key(v, depth + 1) for v in value)
        if isinstance(value, (list, tuple)):
            return type(value)(self._plain(v, depth + 1) for v in value)
        if isinstance(value, Record):
            return self._value(value, depth)
        if isinstance(value, type):
            raise self.fail(f"holds the bare name '{value.path}'")
        return value  # None, bool, int, float, complex, str, bytes or bytearray: pickle itself makes nothing else

    def _key(self, value: Any, depth: int) -> Any:
        key = self._plain(value, depth)
        if isinstance(key, complex):
            raise self.fail("refused, it has a complex number as a key")  # many such numbers have the same hash
        return key

    def _value(self, record: Record, depth: int) -> Any:
        reader = {
            "numpy.core.multiarray.scalar": self._scalar,
            "numpy.core.multiarray._reconstruct": self._reconstructed,
            "numpy.core.numeric._frombuffer": self._frombuffer,
            "_codecs.encode": self._bytes,
            "argparse.Namespace": lambda namespace: self._plain(namespace.state or {}, depth + 1),
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_parameter": self.tensor,
        }.get(type(record).path)
        if reader is None:
            raise self.fail(f"holds a '{type(record).path}' where plain data is expected")
        try:
            return reader(record)
        except _MALFORMED as e:
            raise self.fail(f"malformed '{type(record).path}' ({e})") from e

    def _dtype(self, record: Any) -> np.dtype:
        if not (isinstance(record, Record) and type(record).path == "numpy.dtype"):
            raise ValueError("not a dtype")
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
        if len(data) != _count(shape) * dtype.itemsize:
            raise ValueError(f"{len(data)} bytes for shape {shape} of {dtype}")
        self.spend(0, len(data))
        return np.frombuffer(bytearray(data), dtype).reshape(shape, order=order)

    def _bytes(self, record: Record) -> bytes:
        data = self._encoded(record)
        self.spend(0, len(data))  # each reference to the record makes new bytes
        return data

    def _encoded(self, record: Record) -> bytes:
        # Python 3 writes bytes like this in the older pickle protocols.
        text, encoding = record.args
        if type(record).path != "_codecs.encode" or encoding not in ("latin1", "latin-1"):
            raise ValueError("unknown encoding")
        return text.encode("latin1")

    def tensor(self, record: Any) -> torch.Tensor:
        """Return the tensor of a parameter or tensor record, on the CPU. Tensors share memory as in the file."""
        try:
            if type(record).path == "torch._utils._rebuild_parameter":
                record = record.args[0]
            if type(record).path != "torch._utils._rebuild_tensor_v2":
                raise ValueError(f"a '{type(record).path}'")
            storage, offset, size, stride = record.args[:4]
            dtype, memory = self._storage(storage)
            values = _count(size)
            if len(size) != len(stride):
                raise ValueError(f"{len(size)} sizes and {len(stride)} strides")
            _count(stride)  # only for the check
            _count((offset,))
            last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
            room = memory.nbytes() // dtype.itemsize
            # Otherwise set_() would enlarge the storage, and strides of 0 would make a huge tensor of a few bytes.
            if values > room or (0 not in size and last >= room):
                raise ValueError(f"offset {offset}, size {size}, stride {stride} in a storage of {room}")
            self._shown -= values * dtype.itemsize
            if self._shown < 0:
                raise ValueError(f"tensors of more than {SHOWN} times the size of the file")
            import torch

            return torch.empty(0, dtype=dtype).set_(memory, offset, tuple(size), tuple(stride))
        except _MALFORMED as e:
            raise self.fail(f"malformed tensor ({e})") from e

    def _storage(self, record: Any) -> tuple[torch.dtype, torch.UntypedStorage]:
        if id(record) not in self._storages:
            # Keep the record, so that no other record can get its id.
            self._storages[id(record)] = (record, *self._load_storage(record))
        return self._storages[id(record)][1:]

    def _load_storage(self, record: Any) -> tuple[torch.dtype, torch.UntypedStorage]:
        read = self._read
        if isinstance(record, Record) and type(record).path == "torch.storage._load_from_bytes":
            # This is a file of torch.save inside the pickle. It holds one storage and nothing else.
            (blob,) = record.args
            self.spend(0, len(blob))
            try:
                record, refused, read = _open_legacy(io.BytesIO(blob), "storage", _KINDS)
                refuse(refused, "storage")
            except UserError as e:
                raise ValueError(e.message) from e
        if not isinstance(record, _Stored):
            raise ValueError("not a storage")
        kind, key, count = record.args
        dtype = _dtype(kind)
        if not 0 <= count * dtype.itemsize <= self._size:
            raise ValueError(f"storage of {count} values in a file of {self._size} bytes")
        nbytes = count * dtype.itemsize
        if read is self._read:
            self.spend(0, nbytes)
        import torch

        memory = torch.empty(nbytes, dtype=torch.uint8)
        if nbytes and read(key, memoryview(memory.numpy())) != nbytes:
            raise ValueError("a storage is cut off")
        return dtype, memory.untyped_storage()


def _count(shape: Any) -> int:
    # Return the number of values. A text times a number is a longer text, and Python's numbers may have any length.
    if len(shape) > 64 or any(type(n) is not int or not 0 <= n < 1 << 48 for n in shape):
        raise ValueError("a shape, stride or offset that no array has")  # not shown: it may be of any size
    return math.prod(shape)


def _dtype(kind: str) -> torch.dtype:
    import torch

    return getattr(torch, _KINDS[kind])


def load_cifar_batch(data: bytes, name: str) -> dict[str, Any]:
    """Return a batch or meta file of CIFAR-10 or CIFAR-100 (the archives for Python) as a dict with text keys.

    In batches, `data` is uint8 [N,3072]. Labels are lists of int; names of files and classes are lists of str. Accepts
    the original files of Python 2 and files that Python 3 has written again. Raises UserError that names the file.
    """
    batch = load(data, name, ARRAYS, encoding="latin1")
    if not isinstance(batch, dict):
        raise UserError(f"{name}: not a CIFAR batch, it holds a {type(batch).__name__} instead of a dict")
    decode = functools.cache(lambda text: text.decode("latin1"))  # once, however often the file refers to a text

    def text(value: Any) -> Any:
        if isinstance(value, list):
            return [text(v) for v in value]
        return decode(value) if isinstance(value, bytes) else value

    return {text(key): text(value) for key, value in batch.items()}
