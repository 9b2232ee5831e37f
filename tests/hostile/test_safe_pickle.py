"""The unpickler with a list of allowed names: it returns plain data, tensors and arrays, and refuses all else."""

import _codecs
import collections
import io
import pickle

import numpy as np
import pytest
import torch

from dnnlib import UserError
from tests.support.forks import run_apart
from tests.support.pickles import Raw
from torch_utils import safe_pickle


def nested(levels):
    value = []
    for _ in range(levels):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    "name, data",
    [
        ("unfolding", pickle.dumps({"a": nested(60)})),
        ("deep", b"]" * 100000 + b"a" * 99999 + b"."),
        ("self", b"]q\x00h\x00a."),
        ("memo", b"\x80\x02]r\xff\xff\xff\x7f."),
        ("bytes", b"\x80\x04\x8e" + b"\xff" * 7 + b"\x0f."),
        ("bytearray", b"\x80\x05\x96" + b"\xff" * 5 + b"\0\0\0."),
        ("digits", b"I" + b"9" * 100000 + b"\n."),
        ("key", b"}cnumpy\ndtype\n(]tRI1\ns."),
        ("class", b"cnumpy\ndtype\n."),
        ("extension", b"\x80\x02\x82\x01."),
        ("persistent id", b"Pabc\n."),
        ("keywords", b"\x80\x04cnumpy\ndtype\n)}\x8c\x01aK\x01s\x92."),
    ],
)
def test_bombs_are_refused(name, data):
    with pytest.raises(UserError, match="^x: "):
        safe_pickle.load(data, "x")


LEGACY = torch.ones(3)._typed_storage().__reduce__()[1][0]
ORDERED = b"\x80\x04ccollections\nOrderedDict\nq\x01"


def tuples(wrap, times):
    return b")" + wrap * times


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04}" + tuples(b"2\x86", 60) + b"Ns.",
        b"\x80\x04}" + tuples(b"q\x01h\x01\x86", 60) + b"Ns.",
        b"\x80\x04})" + b"".join(b"\x94h%c\x86" % i for i in range(60)) + b"Ns.",
        b"\x80\x04}" + tuples(b"\x85", 10**6) + b"Ns.",
        b"\x80\x04}(K\x01N" + tuples(b"2\x86", 60) + b"Nu.",
        b"(" + tuples(b"2\x86", 60) + b"Nd.",
        b"\x80\x04\x8f(" + tuples(b"2\x86", 60) + b"\x90.",
        b"\x80\x04(" + tuples(b"2\x86", 60) + b"\x91.",
        b"\x80\x04}(0" + tuples(b"2\x86", 60) + b"Ns.",
        b"\x80\x04}(N1" + tuples(b"2\x86", 60) + b"Ns.",
        b"\x80\x04}(" + b"".join(b"\x8a\x0b" + (((1 << 61) - 1) * (1 << 20 | i)).to_bytes(11, "little") + b"N"
                                 for i in range(200000)) + b"u.",
        b"\x80\x04}(" + b"".join(b"J" + i.to_bytes(4, "little") + b"\x85N" for i in range(6000)) + b"u.",
        ORDERED + b"](" + tuples(b"2\x86", 60) + b"N\x86e\x85R.",
        ORDERED + b"0](" + b"h\x01}(" + b"".join(b"\x8c\x06%06dN" % i for i in range(10**5)) + b"uq\x02\x85R"
        + b"h\x01h\x02\x85R" * 3000 + b"e.",
        b"\x80\x04](" + b"".join(b"ca\n%d\n" % i for i in range(10**5)) + b"e.",
        b"\x80\x04\x8d" + (10**6).to_bytes(8, "little") + b"a" * 10**6 + b"q\x01](" + b"".join(
            b"h\x01\x8c\x05%05d\x93" % i for i in range(10**4)) + b"e.",
    ],
)  # fmt: skip
def test_what_pickle_hashes_copies_or_names_is_bounded(data):
    """A process of its own: the unpickler, in C, would never end, end the process, or take gigabytes."""
    status, err = run_apart(lambda: print(safe_pickle.load(data, "x", {"a.*"})))
    assert b"UserError: x: " in err and b"pickle (" in err, (status, err[-300:])


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
def test_keys_of_real_files(kind):
    keys = ["a" * 300, b"b", 1, -(1 << 60), True, 2.5, None, (), ("a", 1, (2, 3)), frozenset({1, ("x", 2)})]
    value = kind(zip([*keys, *map(str, range(10**4)), *range(2, 10**4)], range(10**5), strict=False))
    for protocol in (4, 5):  # earlier ones have no sets
        assert safe_pickle.load(pickle.dumps([value, set(value)], protocol), "x") == [value, set(value)]


def test_a_dictionary_of_python_2():
    data = ORDERED + b"](](U\x01aK\x01e](U\x01bK\x02ee\x85R."
    assert safe_pickle.load(data, "x") == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    "args",
    [
        (0, (10**9,), (0,)),
        (0, (2,), (3,)),
        (3, (1,), (1,)),
        (-1, (1,), (1,)),
        (0, (2, 2), (1,)),
        (0, (-1,), (1,)),
        (0, 5, 5),
        (0, (1.5,), (1,)),
        (None, (1,), (1,)),
    ],
)
def test_tensors_stay_inside_their_storage(args):
    storage = Raw(torch.storage._load_from_bytes, torch.ones(3)._typed_storage().__reduce__()[1][0])
    data = pickle.dumps([Raw(torch._utils._rebuild_tensor_v2, storage, *args, False, None)])
    with pytest.raises(UserError, match="x: malformed"):
        safe_pickle.load(data, "x", safe_pickle.TENSORS)


@pytest.mark.parametrize(
    "args",
    [
        (0, ("a" * 10**6,) + (10**4,) * 3, (1,) * 4),
        (0, (1 << 40,) * 100, (1,) * 100),
        (0, (1,), (1,) * 10**6),
        (nested(60), (1,), (1,)),
        (0, nested(60), (1,)),
        (0, (1,), nested(60)),
    ],
)
def test_numbers_of_tensors_and_arrays_are_numbers(args):
    """In a process of its own, because a number times a text is a longer text, and a message would never end."""
    tensor = Raw(torch._utils._rebuild_tensor_v2, Raw(torch.storage._load_from_bytes, LEGACY), *args, False, None)
    array = Raw(np._core.numeric._frombuffer, b"", np.dtype("u1"), args[1], "C")
    names = safe_pickle.TENSORS | safe_pickle.ARRAYS
    for record in (tensor, array)[: 1 if args[1] == (1,) else 2]:
        data = pickle.dumps([record])
        status, err = run_apart(lambda data=data: print(safe_pickle.load(data, "x", names)))
        assert b"UserError: x: malformed" in err and len(err) < 5000, (status, err[-300:])


def test_bytes_of_older_protocols_do_not_multiply():
    record = Raw(_codecs.encode, "\xe9" * 10**5, "latin1")
    assert safe_pickle.load(pickle.dumps([record]), "x", safe_pickle.ARRAYS) == [b"\xe9" * 10**5]
    with pytest.raises(UserError, match="repeat themselves"):
        safe_pickle.load(pickle.dumps([record] * 1000), "x", safe_pickle.ARRAYS)


def test_texts_of_cifar_do_not_multiply():
    names = safe_pickle.load_cifar_batch(pickle.dumps({b"names": [b"a" * 10**5] * 100}), "x")["names"]
    assert names == ["a" * 10**5] * 100 and len({*map(id, names)}) == 1


def test_complex_numbers_are_no_keys():
    number = np.complex128(1)
    assert safe_pickle.load(pickle.dumps([number]), "x") == [1]
    for value in ({number: 1}, {number}):
        with pytest.raises(UserError, match="complex"):
            safe_pickle.load(pickle.dumps(value), "x")


@pytest.mark.parametrize("content", [torch.ones(3)._typed_storage(), torch.ones(3), {"a": 1}])
@pytest.mark.parametrize("as_zip", [True, False])
def test_storages_are_nothing_else(content, as_zip):
    blob = io.BytesIO()
    torch.save(content, blob, _use_new_zipfile_serialization=as_zip)
    storage = Raw(torch.storage._load_from_bytes, blob.getvalue())
    tensor = Raw(torch._utils._rebuild_tensor_v2, storage, 0, (3,), (1,), False, None)
    if isinstance(content, torch.TypedStorage) and not as_zip:
        assert torch.equal(safe_pickle.load(pickle.dumps(tensor), "x", safe_pickle.TENSORS), torch.ones(3))
    else:
        with pytest.raises(UserError, match="storage"):
            safe_pickle.load(pickle.dumps(tensor), "x", safe_pickle.TENSORS)


def test_tensors_in_plain_data():
    base = torch.arange(12.0).reshape(3, 4)
    tensors = [base[:, 1:], base.t(), torch.tensor(5, dtype=torch.bfloat16), torch.zeros(0, 3)]
    data = safe_pickle.load(pickle.dumps(tensors), "x", safe_pickle.TENSORS)
    assert torch.equal(data[0], base[:, 1:]) and torch.equal(data[1], base.t()) and data[1].stride() == (1, 4)
    assert data[2] == 5 and data[2].dtype == torch.bfloat16 and data[3].shape == (0, 3)


def test_arrays_that_share_their_bytes_do_not_multiply():
    content = bytes(10**5)
    arrays = [Raw(np._core.numeric._frombuffer, content, np.dtype("u1"), (10**5,), "C") for _ in range(3)]
    assert len(safe_pickle.load(pickle.dumps(arrays[:1]), "x", safe_pickle.ARRAYS)[0]) == 10**5
    with pytest.raises(UserError, match="repeat themselves"):
        safe_pickle.load(pickle.dumps(arrays), "x", safe_pickle.ARRAYS)


@pytest.mark.parametrize("as_zip", [True, False])
def test_tensors_that_share_a_storage_do_not_multiply(as_zip):
    """A network has its own copy of each tensor, so a small file could make a huge one."""
    values = torch.ones(10**4)
    for count, fine in ((3, True), (50, False)):
        file = io.BytesIO()
        torch.save([values.view(100, 100) for _ in range(count)], file, _use_new_zipfile_serialization=as_zip)
        if fine:
            assert len(safe_pickle.load_torch(file, "x")) == count
        else:
            with pytest.raises(UserError, match="x: malformed .*more than 4 times the size of the file"):
                safe_pickle.load_torch(file, "x")


# ---- CIFAR's archives

PYTHON_2 = (
    b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\n"
    b"q\x04K\x00\x85U\x01b\x87Rq\x05(K\x01K\x02K\x03\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xff"
    b"J\xff\xff\xff\xffK\x00tb\x89U\x06\x00\x01\x02\xfd\xfe\xfftbU\x06labels]q\x08(K\x06K\x09eU\tfilenames]"
    b"q\x09U\x05a.pngau."
)


def test_cifar_batches_of_python_2_and_3():
    data = np.array([[0, 1, 2], [253, 254, 255]], dtype=np.uint8)
    batch = {b"data": data, b"labels": [6, 9], b"filenames": [b"a.png"]}
    for pickled in (
        PYTHON_2,
        *(pickle.dumps(b, p) for b in (batch, {k.decode(): v for k, v in batch.items()}) for p in range(6)),
    ):
        loaded = safe_pickle.load_cifar_batch(pickled, "x")
        assert loaded["data"].dtype == np.uint8 and np.array_equal(loaded.pop("data"), data)
        assert loaded == {"labels": [6, 9], "filenames": ["a.png"]}


@pytest.mark.parametrize(
    "value",
    [
        np.array([None]),
        np.array(["a"]),
        np.array([(1, 2)], dtype="i4,i4"),
        np.datetime64("2020-01-01"),
        [1],
        torch.ones(1),
        Raw(np._core.multiarray.scalar, Raw(np.dtype, "i4,O"), bytes(12)),
    ],
)
def test_cifar_batches_with_other_arrays_are_refused(value):
    with pytest.raises(UserError, match="^batch_1: "):
        safe_pickle.load_cifar_batch(pickle.dumps(value if isinstance(value, list) else {"data": value}), "batch_1")
