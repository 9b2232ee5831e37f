"""A CUDA device without a GPU: real numbers on the CPU, with labels that say which tensors are "on the GPU".

PyTorch's own FakeTensorMode has no backward passes in builds without CUDA. Here C++ sees tensors of the CPU, Python
sees a device `cuda:0`, and every operation is checked as a GPU would check it:

* tensors of the CPU and of the GPU in one operation (numbers without dimensions may mix) are a DeviceMistake, and so
  are NumPy's reads of a tensor of the GPU and a generator of the other device;
* what makes the host wait for the GPU (.item(), bool(tensor), nonzero, a mask as an index, copies between the devices
  from or to memory that is not pinned, events) is a wait: a DeviceMistake unless `allowed` names its place.

What this cannot see: operations that PyTorch implements in another way on CUDA, kernels, streams and precision.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.paths import ROOT

__all__ = ["CUDA", "DeviceMistake", "FakeCuda"]

_ROOT = str(ROOT) + os.sep
_OUTSIDE = (os.path.join(ROOT, ".venv"), os.path.join(ROOT, "tests"))
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
# Operations whose result, or the shape of it, the host must know.
WAITS = set(
    "_local_scalar_dense nonzero masked_select _unique2 unique_dim unique_consecutive bincount equal is_nonzero "
    "_linalg_eigh _linalg_svd linalg_eig linalg_lstsq multinomial".split()
)
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "convolution", "convolution_backward"}
MOVES = {"_to_copy", "copy_", "set_", "set_data", "detach", "alias", "lift_fresh"}
READS = {"numpy", "__array__", "tolist"}
# On CUDA these do not look at their input, on the CPU they do.
CHECKED_ON_CPU = {"one_hot"}


# Storages by address, for all FakeCudas, since a module may cache tensors. Weak references keep addresses from reuse.
_ON_GPU: dict[int, StorageWeakRef] = {}
_PINNED: dict[int, StorageWeakRef] = {}


class DeviceMistake(AssertionError):
    """What would fail, wait or be slow on a GPU."""


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class _Generator(torch.Generator):
    """A generator of the CPU that says it is of the device it was made for."""

    def __new__(cls, device: Any = "cpu"):
        generator = super().__new__(cls, CPU)
        generator.place = CUDA if _is_cuda(device) else CPU
        return generator

    @property
    def device(self) -> torch.device:
        return self.place


class _Functions(TorchFunctionMode):
    # What Python asks of PyTorch: devices are translated, answers about devices come from the labels.

    def __init__(self, fake: FakeCuda):
        super().__init__()
        self.fake = fake

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.fake.call(func, args, dict(kwargs or {}))


class _Operations(TorchDispatchMode):
    # What C++ computes: operands are checked, and results get the label of the operands.

    def __init__(self, fake: FakeCuda):
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return self.fake.compute(func, args, kwargs or {})


class FakeCuda:
    """Context in which `torch.device("cuda")` exists.

    `allowed`: (file in the repository, function) -> reason, places where the host may wait. `used` collects those that
    did. Inside `setting_up()` every wait is allowed.
    """

    def __init__(self, allowed: dict[tuple[str, str], str] | None = None, double: set[tuple[str, str]] = frozenset()):
        self.allowed, self.double, self.used, self.free = allowed or {}, double, set(), 0
        self.on_gpu, self.pinned = _ON_GPU, _PINNED
        self.calls: list[tuple[str, bool]] = []  # running calls from Python: name, is an argument on the GPU

    def __enter__(self) -> FakeCuda:
        with contextlib.ExitStack() as stack:
            for name, value in self._replacements().items():
                stack.enter_context(mock.patch(name, value))
            stack.enter_context(_Operations(self))
            stack.enter_context(_Functions(self))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    @contextlib.contextmanager
    def setting_up(self) -> Iterator[None]:
        """Allow waiting, as when objects are built."""
        self.free += 1
        try:
            yield
        finally:
            self.free -= 1

    def has(self, x: torch.Tensor) -> bool:
        """Return whether a tensor is on the GPU."""
        return _address(x) in self.on_gpu

    # What is patched.

    def _replacements(self) -> dict[str, Any]:
        fake, autocast = self, torch.autocast

        class Event:
            def __init__(self, *args: Any, **kwargs: Any):
                pass

            def record(self, stream: Any = None) -> None:
                pass

            def synchronize(self) -> None:
                fake.wait("the host waits for an event")

            def elapsed_time(self, other: Event) -> float:
                return 0.0

        def on_cpu(device_type: str) -> str:
            return "cpu" if device_type == "cuda" else device_type

        group = torch.optim.Optimizer._group_tensors_by_device_and_dtype

        def grouped(lists: Any, with_indices: bool = False) -> dict:
            # Fused optimizers move what they need to the device that C++ finds here.
            found = group(lists, with_indices)
            return {(CUDA if fake.has(v[0][0][0]) else place, dtype): v for (place, dtype), v in found.items()}

        enabled = torch.is_autocast_enabled
        return {
            "torch.Generator": _Generator,
            "torch.optim.Optimizer._group_tensors_by_device_and_dtype": staticmethod(grouped),
            "torch.autocast": lambda device_type, *a, **k: autocast(on_cpu(device_type), *a, **k),
            "torch.is_autocast_enabled": lambda *a: enabled(*map(on_cpu, a)),
            "torch.cuda.Event": Event,
            "torch.cuda.current_stream": lambda device=None: None,
            "torch.cuda.synchronize": lambda device=None: fake.wait("the host waits for the GPU"),
            "torch.cuda.mem_get_info": lambda device=None: (1 << 40, 1 << 40),
            "torch.cuda.manual_seed_all": lambda seed: None,
            # Threads that read data pin it too, where no mode is active.
            "torch.Tensor.pin_memory": lambda x: fake._mark(fake.pinned, x.clone()),
            "torch.Tensor.is_pinned": lambda x: _address(x) in fake.pinned,
        }

    # What happens in a call from Python.

    def call(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            answer = _GETTERS.get(func.__self__)
            return func(*args) if answer is None else answer(self.has(args[0]))
        if func is torch.device or name == "_parse_to":
            return func(*args, **kwargs)
        tensors = _tensors((args, kwargs))
        on_gpu = [self.has(x) for x in tensors]
        if name in READS and any(on_gpu):
            if name == "tolist":
                self.wait("tolist()")
            else:
                self.fail(f"{name}() of a tensor on the GPU")
        want, args, kwargs = self._destination(name, args, kwargs)
        generator = kwargs.get("generator")
        if generator is not None:
            place = want or (CUDA if any(on_gpu) else CPU)
            if generator.device.type != place.type:
                self.fail(f"{name}: a generator on {generator.device} for numbers on {place}")
        pinned = kwargs.pop("pin_memory", False)
        if name in ("to", "cuda", "cpu", "type_as"):
            return self._move(name, want, args, kwargs)
        if name in ("tensor", "as_tensor", "asarray") and _is_cuda(want):
            if not any(on_gpu):
                self.wait(f"torch.{name} copies numbers of the host to the GPU")
            if tensors and not any(on_gpu):
                args = (tensors[0].clone(), *args[1:])
        self.calls.append((name, any(on_gpu)))
        try:
            result = func(*args, **kwargs)
        finally:
            self.calls.pop()
        if name == "__deepcopy__" and on_gpu[0]:  # This copies the storage of a buffer without an operation.
            want = CUDA
        if want is not None:
            for x in _tensors(result):
                self._mark(self.on_gpu, x) if _is_cuda(want) else self.on_gpu.pop(_address(x), None)
        if pinned:
            self._mark(self.pinned, result)
        return result

    def _destination(self, name: str, args: tuple, kwargs: dict) -> tuple[torch.device | None, tuple, dict]:
        """Return the device that the call names, and the arguments with the CPU in its place."""
        named = [x for x in (*args[1:], kwargs.get("device")) if isinstance(x, torch.device)]
        if isinstance(kwargs.get("device"), str):
            named.append(torch.device(kwargs["device"]))
        if name == "to":
            named += [torch.device(x) for x in args[1:2] if isinstance(x, str)]
            other = args[1] if len(args) > 1 else kwargs.get("other")
            if isinstance(other, torch.Tensor):
                named.append(CUDA if self.has(other) else CPU)
            args = (*args[:1], *(CPU if isinstance(x, (str, torch.device)) else x for x in args[1:]))
        elif name in ("cpu", "cuda"):
            named.append(CUDA if name == "cuda" else CPU)
        elif name == "type_as":
            named.append(CUDA if self.has(args[1]) else CPU)
        else:
            args = tuple(CPU if isinstance(x, torch.device) else x for x in args)
        if kwargs.get("device") is not None:
            kwargs["device"] = CPU
        return (named[0] if named else None), args, kwargs

    def _move(self, name: str, want: torch.device | None, args: tuple, kwargs: dict) -> torch.Tensor:
        """Convert a tensor, with a copy if it changes its device."""
        x, rest = args[0], args[1:]
        if name in ("cpu", "cuda"):
            rest = (CPU,)
        elif name == "type_as":
            rest = (rest[0].dtype,)
        source = CUDA if self.has(x) else CPU
        self.calls.append((name, source == CUDA))
        try:
            if want is None or _is_cuda(want) == (source == CUDA):
                return x.to(*rest, **kwargs)
            pinned = _address(x) in self.pinned
            if source == CUDA or not (pinned and (kwargs.get("non_blocking") or True in rest)):
                self.wait("a copy to the CPU" if source == CUDA else "a copy of memory that is not pinned to the GPU")
            with self.setting_up():  # This copy has been judged.
                moved = x.to(*rest, **(kwargs | dict(copy=True)))
        finally:
            self.calls.pop()
        if _is_cuda(want):
            return self._mark(self.on_gpu, moved)
        self.on_gpu.pop(_address(moved), None)
        return moved

    # What happens in an operation.

    def compute(self, func: Any, args: tuple, kwargs: dict) -> Any:
        name = func.overloadpacket.__name__
        tensors = _tensors((args, kwargs))
        on_gpu = [self.has(x) for x in tensors]
        if any(on_gpu):
            self._check(name, func, args, tensors, on_gpu)
        result = func(*args, **kwargs)
        # Factories without operands are part of a call from Python, and belong where its arguments are.
        if any(on_gpu) if tensors else (self.calls and self.calls[-1][1]):
            known = {_address(x) for x in tensors}
            for x in _tensors(result):
                if _address(x) not in known:
                    self._mark(self.on_gpu, x)
        return result

    def _check(self, name: str, func: Any, args: tuple, tensors: list, on_gpu: list[bool]) -> None:
        caller = self.calls[-1][0] if self.calls else ""
        if name in PRODUCTS and any(x.dtype == torch.float64 for x in tensors):
            # A backward pass multiplies as the forward pass did, which has been judged.
            if not self.free and caller not in ("backward", "grad") and self._place() not in self.double:
                self.fail(f"{name} in float64")
        if name in WAITS and caller not in CHECKED_ON_CPU:
            self.wait(name)
        if name == "copy_":
            to, of = args[:2]
            if on_gpu[0] != on_gpu[1] and of.ndim + to.ndim:
                host = of if on_gpu[0] else to
                if not (_address(host) in self.pinned and (True in args[2:])):
                    self.wait("a copy between GPU and memory that is not pinned")
            return
        if name in MOVES:
            return
        if name in INDEXING:
            indices = [x for x in args[1] if x is not None]
            if not on_gpu[0] and any(map(self.has, indices)):
                self.fail("indices on the GPU for a tensor of the CPU")
            if any(not self.has(x) for x in indices if x.ndim):
                self.wait("indices on the CPU for a tensor of the GPU")
            if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
                self.wait("a mask as an index")
            tensors = [x for x in tensors if not any(x is y for y in indices)]
        if any(x.ndim and not self.has(x) for x in tensors):
            shapes = ", ".join(f"{'cuda' if self.has(x) else 'cpu'}{list(x.shape)}" for x in tensors)
            self.fail(f"{name} of tensors on several devices: {shapes}")

    # What is done about it.

    def _mark(self, marks: dict[int, StorageWeakRef], x: torch.Tensor) -> torch.Tensor:
        with torch._C.DisableTorchFunction():
            storage = x.untyped_storage()
            marks[storage._cdata] = StorageWeakRef(storage)
        return x

    def _place(self) -> tuple[str, str]:
        frame: FrameType | None = inspect.currentframe()
        while frame is not None:
            path = frame.f_code.co_filename
            if path.startswith(_ROOT) and not path.startswith(_OUTSIDE):
                return os.path.relpath(path, _ROOT), frame.f_code.co_name
            frame = frame.f_back
        return "", ""

    def wait(self, what: str) -> None:
        """Note that the host waits; a mistake unless its place is allowed."""
        if self.free:
            return
        place = self._place()
        if place not in self.allowed:
            self.fail(f"{what}: the host waits for the GPU")
        self.used.add(place)

    def fail(self, what: str) -> None:
        """Raise DeviceMistake with the place in the repository."""
        raise DeviceMistake("{}: {}: {}".format(*self._place(), what))


def _tensors(tree: Any) -> list[torch.Tensor]:
    # PyTorch's own function for trees takes half the time of these tests.
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        return []
    found = []
    for x in tree:
        if isinstance(x, torch.Tensor):
            found.append(x)
        elif isinstance(x, (tuple, list, dict)):
            found += _tensors(x)
    return found


def _address(x: torch.Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return x.untyped_storage()._cdata


_GETTERS = {
    torch.Tensor.device: lambda on_gpu: CUDA if on_gpu else CPU,
    torch.Tensor.is_cuda: lambda on_gpu: on_gpu,
    torch.Tensor.is_cpu: lambda on_gpu: not on_gpu,
}
