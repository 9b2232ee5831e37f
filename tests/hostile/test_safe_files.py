"""The readers of label, matrix and reference files: honest files load, files that grow or lie are refused."""

import collections
import io
import json
import os
import pickle
import re
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dnnlib import UserError, read_bytes
from tests.support.pickles import Raw
from torch_utils import safe_files, safe_pickle


def saved(value, new=True):
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz(save=np.savez, **arrays):
    buffer = io.BytesIO()
    save(buffer, **arrays)
    return buffer.getvalue()


def zipped(members, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


def refuse(read, data, match):
    with pytest.raises(UserError, match=match) as e:
        read(data, "x")
    assert e.value.message.startswith("x: ") and "\n" not in e.value.message


# ---- JSON


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.recursive(
        st.none() | st.floats(allow_nan=False) | st.text('[{"]}\\aé', max_size=5),
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text('[{"]\\a', max_size=4), x, max_size=3),
    ),
    st.booleans(),
)
def test_json_and_its_depth(value, ascii):
    def depth(v):
        items = v.values() if isinstance(v, dict) else v if isinstance(v, list) else None
        return 0 if items is None else 1 + max(map(depth, items), default=0)

    data = json.dumps(value, ensure_ascii=ascii).encode()
    assert safe_files.load_json(data, "x") == value
    assert max((int(levels.max()) for _, levels, _ in safe_files.json_levels(data)), default=0) == depth(value)


def test_json_depth_beyond_a_chunk():
    data = b'["' + b"[" * (1 << 20) + b'",' + b"[" * 30 + b"]" * 30 + b"]"
    assert max((int(levels.max()) for _, levels, _ in safe_files.json_levels(data)), default=0) == 31


@pytest.mark.parametrize(
    "data, match",
    [
        (b"[" * 10**6, "nested more than 64"),
        (b"[" * 10**6 + b"]" * 10**6, "nested more than 64"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "nested"),
        (b"[" + b"[]," * 9_000_000 + b"[]]", "too large"),
        ("[]é".encode("latin1"), "not valid"),
        ("[]".encode("utf-16"), "not valid"),
        (b"9" * 10**5, "not valid"),
        (b"", "not valid"),
    ],
)
def test_json_that_is_refused(data, match):
    refuse(safe_files.load_json, data, match)


# ---- NumPy


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array(["a", "äö"]),
        np.zeros(0),
        np.array(5, ">i2"),
        np.array([True]),
        np.zeros([0, 1]),
    ],
)
def test_arrays(array):
    for found in (
        safe_files.load_npy(npy(array), "x"),
        safe_files.load_npz(npz(a=array), "x")["a"],
        safe_files.load_npz(npz(np.savez_compressed, a=array), "x")["a"],
    ):
        assert found.dtype == array.dtype and np.array_equal(found, array) and found.flags.writeable


def header(shape, descr="'<f8'"):
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    "data, match",
    [
        (npy(np.arange(5))[:-1], "39 bytes for shape"),
        (npy(np.arange(5)) + b"x", "41 bytes"),
        (b"", "not a readable"),
        (header("(10**9,)") + bytes(8), "not a readable"),
        (header("(1000000000000,)") + bytes(8), "8 bytes for shape"),
        (header("(-1,)"), "for shape"),
        (header("(1000000000000, 0)"), "empty"),
        (header("(1,)", "'O'") + bytes(8), "object"),
        (header("(1,)", "'<M8[s]'") + bytes(8), "expected"),
        (header("(1,)", "[('a', '<f8')]") + bytes(8), "expected numbers"),
        (header("(1,)", "'<U1'") + b"\xff" * 4, "impossible characters"),
        (header("(" * 200 + ")" * 200), "not a readable"),
        (npy(np.arange(5)).replace(b"NUMPY\1", b"NUMPY\3"), "version"),
    ],
)
def test_arrays_that_are_refused(data, match):
    refuse(safe_files.load_npy, data, match)
    refuse(safe_files.load_npz, zipped([("a.npy", data)]), match)


def patched(data, old, new, count=1):
    assert data.count(old) >= count
    return data.replace(old, new)


def test_archives_of_arrays_that_are_refused():
    one = npy(np.zeros(8))
    size = len(one).to_bytes(4, "little")
    refuse(safe_files.load_npz, patched(zipped([("a.npy", one)], zipfile.ZIP_DEFLATED), size, b"\0\0\0\x40", 2), "too")
    with pytest.warns(UserWarning, match="Duplicate"):
        twice = zipped([("a.npy", one), ("a.npy", one)])
    refuse(safe_files.load_npz, twice, "occurs twice")
    refuse(safe_files.load_npz, zipped([("a.txt", one)]), "files other than arrays")
    for kind in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        lies = zipped([("a.npy", bytes(10**6))], kind)  # states a thousandth of its size
        lies = patched(lies, (10**6).to_bytes(4, "little"), (10**3).to_bytes(4, "little"), 2)
        refuse(safe_files.load_npz, lies, "not a readable")
    data = zipped([("a.npy", one)])
    refuse(safe_files.load_npz, data[:-30], "not a readable")
    refuse(safe_files.load_npz, patched(data, one, one[:-1] + b"x"), "CRC")


# ---- files of torch.save

PLAIN = {
    "a": torch.arange(6.0).reshape(2, 3).t(),
    "b": [torch.tensor(5, dtype=torch.bfloat16), torch.zeros(0, 3), None],
    "n": 1.5,
    "t": (True, "x"),
    "o": collections.OrderedDict(w=torch.ones(2, dtype=torch.bool)),
    b"k": b"v",
}


@pytest.mark.parametrize("new", [True, False])
def test_torch_files_are_what_torch_load_makes_of_them(new):
    base = torch.arange(12.0)
    data = saved({**PLAIN, "shared": [base[:6], base[6:]], "numpy": np.arange(3), "p": torch.nn.Parameter(base)}, new)
    found, expected = safe_files.load_pt(data, "x"), torch.load(io.BytesIO(data), weights_only=False)
    assert found["n"] == 1.5 and found["t"] == (True, "x") and found[b"k"] == b"v" and type(found["o"]) is dict
    assert found["numpy"].tolist() == [0, 1, 2]
    for get in (lambda x: x["a"], lambda x: x["b"][0], lambda x: x["b"][1], lambda x: x["o"]["w"], lambda x: x["p"]):
        assert torch.equal(get(found), get(expected)) and get(found).dtype == get(expected).dtype
        assert get(found).stride() == get(expected).stride()
    found["shared"][0].zero_()
    assert found["shared"][1].untyped_storage().data_ptr() == found["shared"][0].untyped_storage().data_ptr()
    for cut in range(0, len(data), len(data) // 60):
        refuse(safe_files.load_pt, data[:cut], "not a readable .pt")


@pytest.mark.parametrize(
    "value, match",
    [
        (Raw(bytearray, 10**12), "bytearray'"),  # torch.load(weights_only=True) would make one
        (Raw(os.getcwd), "asks for 'posix.getcwd'"),
        (torch.Size([1]), "torch.Size"),
        (torch.nn.Linear(1, 1), "Linear"),
        (torch.ones(2).to_sparse(), "asks for"),
        (np.array([{}], dtype=object), "malformed"),
    ],
)
@pytest.mark.parametrize("new", [True, False])
def test_torch_files_that_ask_for_more_are_refused(value, match, new):
    refuse(safe_files.load_pt, saved({"a": value}, new), match)


def rewritten(data, change):
    """Return a ZIP whose members are changed by `change(name, bytes)`, stored, with correct checksums."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return zipped([(name, change(name, archive.read(name))) for name in archive.namelist()])


def test_torch_files_that_lie_are_refused():
    values = torch.arange(4.0)
    data = saved(values)
    assert torch.equal(safe_files.load_pt(rewritten(data, lambda n, d: d), "x"), values)
    for change, match in [
        (lambda n, d: d[:-1] if n.endswith("data/0") else d, "cut off"),
        (lambda n, d: d + b"x" if n.endswith("data/0") else d, "larger"),
        (lambda n, d: b"big" if n.endswith("byteorder") else d, "little-endian"),
    ]:
        refuse(safe_files.load_pt, rewritten(data, change), match)
    huge = rewritten(data, lambda n, d: re.sub(rb"(cpuq.)K\x04", b"\\1J\0\0\0\x70", d) if n.endswith(".pkl") else d)
    refuse(safe_files.load_pt, huge, "storage of 1879048192 values")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        compressed = zipped([(n, archive.read(n)) for n in archive.namelist()], zipfile.ZIP_DEFLATED)
    refuse(safe_files.load_pt, compressed, "not the ZIP")
    position = data.index(values.numpy().tobytes())
    refuse(safe_files.load_pt, data[:position] + b"\1" + data[position + 1 :], "CRC")
    legacy = saved(values, new=False)
    count = legacy.rindex((4).to_bytes(8, "little"))
    refuse(safe_files.load_pt, legacy[:count] + b"\5" + legacy[count + 1 :], "another size")


def test_one_storage_read_again_and_again_is_refused():
    blob = saved(torch.zeros(10**5)._typed_storage(), new=False)

    class Again:
        def __init__(self, data):
            self.data = data

        def __reduce__(self):
            return torch.storage._load_from_bytes, (self.data,)

    tensors = [Raw(torch._utils._rebuild_tensor_v2, Again(blob), 0, (1,), (1,), False, None) for _ in range(3)]
    with pytest.raises(UserError, match="repeat themselves"):
        safe_pickle.load(pickle.dumps(tensors), "x", safe_pickle.TENSORS)


# ---- files


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(UserError, match="not a regular file"):
            read_bytes(path)


def test_members_of_zips_are_bounded():
    data = zipped([("a", zlib.compress(bytes(100)))])
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        member = archive.infolist()[0]
        assert zlib.decompress(safe_files.read_member(archive, member, 100)) == bytes(100)
        with pytest.raises(zipfile.BadZipFile):
            safe_files.read_member(archive, member, 1)
