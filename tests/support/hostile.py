"""Files that attack programs that open them: pickles that call functions, archives with names that lead outside, bombs.

Every pickle does something harmless: it creates an empty file, the marker. To add a file, add a line to one of the
lists.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import torch

from tests.support import synth
from tests.support.pickles import Raw, persistent

EXTENSION_CODES = (201, 0x3201, 0x01003201)  # of EXT1, EXT2 and EXT4, for three names of os.system
system = os.system


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def named(path):
    """Return the opcode GLOBAL for `path`, module:name."""
    module, name = path.split(":")
    return f"c{module}\n{name}\n".encode()


def stacked(path):
    """Return the opcode STACK_GLOBAL for `path`, module:name."""
    module, name = path.split(":")
    return text(module) + text(name) + b"\x93"


def gadgets(marker):
    """Return {name: a pickle that creates the file `marker` when pickle.load reads it}, for every opcode that calls."""
    touch = f"touch {marker}"
    arg, path, system = text(touch), text(str(marker)), named("posix:system")
    args = b"(" + arg + b"t"
    memmap = named("numpy:memmap")
    codes = [
        b"\x82" + struct.pack("<B", EXTENSION_CODES[0]),
        b"\x83" + struct.pack("<H", EXTENSION_CODES[1]),
        b"\x84" + struct.pack("<i", EXTENSION_CODES[2]),
    ]
    namespace = named("types:SimpleNamespace") + b")R}"  # an object whose methods BUILD can choose
    raw = b"\x80\x02" + system + args + b"R."
    layer = torch.nn.ReLU()
    layer.act = Raw(os.system, touch)
    return {
        # GLOBAL, REDUCE and the other opcodes that find or call a function
        "REDUCE": system + args + b"R.",
        "REDUCE, protocol 0": b"cposix\nsystem\n(S'" + touch.encode() + b"'\ntR.",
        "REDUCE, protocol 5": pickle.dumps(Raw(os.system, touch), 5),
        "STACK_GLOBAL": b"\x80\x04" + stacked("posix:system") + arg + b"\x85R.",
        "STACK_GLOBAL, dotted": b"\x80\x04" + stacked("torch:os.system") + arg + b"\x85R.",
        "STACK_GLOBAL, through sys.modules": b"\x80\x04" + stacked("sys:modules") + b"0"
                                             + stacked("torch_utils.persistence:os.system") + arg + b"\x85R.",
        "INST": b"(S'" + touch.encode() + b"'\niposix\nsystem\n.",
        "OBJ": b"(" + system + arg + b"o.",
        "NEWOBJ": b"\x80\x02" + memmap + b"(" + path + text("uint8") + text("w+") + b"K\0K\1t\x81.",
        "NEWOBJ_EX": b"\x80\x04" + memmap + b")}(" + text("filename") + path + text("mode") + text("w+")
                     + text("shape") + b"K\1u\x92.",
        "NEWOBJ of map": b"cbuiltins\nlist\ncbuiltins\nmap\n(" + system + b"(" + arg + b"lt\x81\x85R.",
        "BUILD": named("functools:partial") + b"(cbuiltins\nprint\ntR(" + system + args + b"}Ntb(tR.",
        "BUILD, then APPEND": namespace + text("append") + system + b"sb" + arg + b"a.",
        "BUILD, then APPENDS": namespace + text("append") + system + b"sb(" + arg + b"e.",
        "BUILD, then ADDITEMS": b"\x80\x04" + namespace + text("add") + system + b"sb(" + arg + b"\x90.",
        **{f"EXT{n}": b"\x80\x02" + code + args + b"R." for n, code in zip((1, 2, 4), codes, strict=True)},
        # pickles that plain pickle.load refuses, but only after the call
        "PERSID": system + args + b"R0Psecret\n.",
        "BINPERSID": system + args + b"RQ.",
        "no STOP": system + args + b"R",
        "rubbish behind": system + args + b"R\xff\xff",
        # the memo, marks and copies
        "PUT and GET": system + b"p7\n0g7\n" + args + b"R.",
        "BINPUT and BINGET": system + b"q\x070h\x07" + args + b"R.",
        "LONG_BINPUT and LONG_BINGET": system + b"r\7\0\0\0000j\7\0\0\0" + args + b"R.",
        "MEMOIZE": b"\x80\x04" + system + b"\x940h\0" + args + b"R.",
        "memo overwritten": b"cbuiltins\nlen\nq\0000" + system + b"q\0000h\0" + args + b"R.",
        "DUP": system + b"2" + args + b"R.",
        "POP_MARK": system + b"(K\1K\0021" + args + b"R.",
        "FRAME": b"\x80\x04\x95" + struct.pack("<Q", len(raw) - 2) + raw[2:],
        # names that reach a function indirectly
        "eval": pickle.dumps(Raw(eval, f"__import__('os').system({touch!r})")),
        "exec": pickle.dumps(Raw(exec, f"open({str(marker)!r}, 'w').close()")),
        "open": pickle.dumps(Raw(open, str(marker), "w")),
        "Python 2 name": b"c__builtin__\nopen\n(" + path + text("w") + b"tR.",
        "getattr": named("builtins:getattr") + b"(" + named("builtins:__import__") + b"(" + text("os") + b"tR"
                   + text("system") + b"tR" + args + b"R.",
        "methodcaller": named("operator:methodcaller") + b"(" + text("system") + arg + b"tR("
                        + named("importlib:import_module") + b"(" + text("os") + b"tRtR.",
        "partial": pickle.dumps(Raw(functools.partial(os.system, touch))),
        "subprocess": named("subprocess:check_call") + b"((" + text("touch") + path + b"ltR.",
        "code object": named("builtins:exec") + b"(" + named("builtins:compile") + b"("
                       + text(f"open({str(marker)!r}, 'w')") + text("x") + text("exec") + b"tRtR.",
        "pickle in a pickle": pickle.dumps(Raw(pickle.loads, raw)),
        "pickle in NumPy's load": pickle.dumps(Raw(np.load, io.BytesIO(npy_of_objects(raw)), None, True)),
        "torch.load": pickle.dumps(Raw(functools.partial(torch.load, weights_only=False), io.BytesIO(legacy(raw)))),
        # the places where snapshots, states and batches hold their contents
        "network": pickle.dumps({"ema": Raw(os.system, touch)}),
        "key": b"}" + system + args + b"RK\1s.",
        "settings": pickle.dumps({"ema": 1, "loss_fn": persistent("EDMLoss", {"a": Raw(os.system, touch)})}),
        "module": pickle.dumps({"ema": persistent("EDMPrecond", {"_modules": {"model": Raw(os.system, touch)}})}),
        "plain module": pickle.dumps({"ema": persistent("EDMPrecond_classifier", {"_modules": {"model": layer}})}),
        "namespace": pickle.dumps({"netG_dict": {}, "args": argparse.Namespace(nz=Raw(os.system, touch))}),
        "optimizer": pickle.dumps({"netG_dict": {}, "args": argparse.Namespace(), "optimizerG": Raw(os.system, touch)}),
        "class name": pickle.dumps({"ema": persistent(Raw(os.system, touch), {})}),
        "dtype": named("numpy:dtype") + b"(" + system + args + b"RtR" + b".",
        "object array": pickle.dumps({"data": np.array([Raw(os.system, touch)], dtype=object)}),
        "dict subclass": named("collections:OrderedDict") + b")R}(" + text("x") + system + args + b"Rub" + b".",
        "tensor's storage, legacy": storage(legacy(raw)),
        "tensor's storage, ZIP": storage(torch_zip(raw)),
        "tensor's size": tensor_with(b"(" + system + args + b"Rt"),
    }  # fmt: skip


def legacy(pickled):
    """Return what torch.save writes without a ZIP, with `pickled` as the object."""
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    return b"".join([*parts, pickled, pickle.dumps([], 2)])


def legacy_of(value):
    """Return what torch.save writes for `value` without a ZIP."""
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def torch_zip(pickled):
    """Return what torch.save writes, with `pickled` as the object."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n"}.items():
            archive.writestr(f"archive/{name}", data)
    return buffer.getvalue()


def storage(blob):
    """Return a pickled tensor whose storage is `blob`."""
    load = named("torch.storage:_load_from_bytes") + b"(B" + struct.pack("<I", len(blob)) + blob + b"tR"
    return b"\x80\x03" + named("torch._utils:_rebuild_tensor_v2") + b"(" + load + b"K\0(K\1t(K\1t\x89}tR."


def tensor_with(size):
    """Return a pickled tensor whose size is given by the opcodes `size`."""
    blob = legacy_of(torch.zeros(1)._typed_storage())
    load = named("torch.storage:_load_from_bytes") + b"(B" + struct.pack("<I", len(blob)) + blob + b"tR"
    return b"\x80\x03" + named("torch._utils:_rebuild_tensor_v2") + b"(" + load + b"K\0" + size + b"(K\1t\x89}tR."


def npy_of_objects(pickled):
    """Return a .npy file whose array is the pickle `pickled`."""
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + pickled


def npz_of_objects(pickled):
    return zip_of(
        {"arr_0.npy": npy_of_objects(pickled), "mu.npy": npy_of_objects(pickled), "sigma.npy": npy_of_objects(pickled)}
    )


# ---------------------------------------------------------------------------------------------------------------------
# Archives.


def zip_of(members, compression=zipfile.ZIP_STORED, **info):
    """Return a ZIP of {name: bytes} or [(name, bytes)]. `info` sets fields of every entry."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members.items() if isinstance(members, dict) else members:
            entry = zipfile.ZipInfo(name)
            entry.compress_type = compression
            for field, value in info.items():
                setattr(entry, field, value)
            archive.writestr(entry, data)
    return buffer.getvalue()


def with_size(data, old, new):
    """Return a ZIP whose entries claim another unpacked size."""
    assert data.count(struct.pack("<I", old)) >= 2
    return data.replace(struct.pack("<I", old), struct.pack("<I", new))


def central(data, offset, value):
    """Return a ZIP with `value` at an offset of its first entry in the directory."""
    start = data.index(b"PK\1\2") + offset
    return data[:start] + value + data[start + len(value) :]


def overlapping(names, png):
    """Return a ZIP with the bytes of one image under many names."""
    data = zip_of({names[0]: png})
    end = data.rindex(b"PK\5\6")
    start = data.index(b"PK\1\2")
    entry = data[start:end]
    entries = b"".join(entry.replace(names[0].encode(), name.encode()) for name in names)
    tail = bytearray(data[end:])
    struct.pack_into("<HHII", tail, 8, len(names), len(names), len(entries), start)
    return data[:start] + entries + bytes(tail)


def renamed(data, old, new):
    """Return a ZIP with another name of the same length, which zipfile itself would not write."""
    assert len(old) == len(new) and data.count(old.encode()) == 2
    return data.replace(old.encode(), new.encode())


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_claiming(width, height, bits=8, color=0, data=None, *before):
    """Return a PNG with correct checksums that claims to be this large."""
    data = zlib.compress(bytes(1000)) if data is None else data
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join([chunk(b"IHDR", header), *before, chunk(b"IDAT", data), chunk(b"IEND", b"")])


PNG = synth.png(synth.pictures(1)[0])
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) (w) file closefile\nshowpage\n%%EOF\n"
ZEROS = bytes(1 << 20)
LINK, DEVICE = 0o120777 << 16, 0o020666 << 16
BRACKETS = b"[" * 10**6


def dataset(json_text):
    return zip_of({"a.png": PNG, "dataset.json": json_text})


@functools.cache
def archives():
    """Return {name: ZIP} for ZIPs that dataset readers must refuse."""
    bomb = zip_of({"a.png": ZEROS}, zipfile.ZIP_DEFLATED)
    traversals = ["../a.png", "/tmp/a.png", "a/../../b.png", "C:/a.png", "..\\a.png", "\\\\host\\a.png", "./../a.png"]
    return {
        **{f"name {name}": renamed(zip_of({"x" * len(name): PNG, "b.png": PNG}), "x" * len(name), name)
           for name in traversals},
        # their bytes are correct, so only the kind of the member shows what they are
        "link": zip_of({"a.png": PNG}, external_attr=LINK, create_system=3),
        "device": zip_of({"a.png": PNG}, external_attr=DEVICE, create_system=3),
        "link as dataset.json": zip_of({"dataset.json": b'{"labels": null}', "b.png": PNG}, external_attr=LINK),
        "a name twice": renamed(zip_of({"a.png": PNG, "b.png": PNG, "c.png": PNG}), "b.png", "a.png"),
        "overlapping": overlapping([f"{i:03d}.png" for i in range(500)], PNG),
        "deflate bomb": with_size(bomb, 1 << 20, 0xFFFFFFF0),
        "deflate bomb that claims little": with_size(bomb, 1 << 20, 1 << 10),
        "bzip2 bomb that claims little": with_size(zip_of({"a.png": ZEROS}, zipfile.ZIP_BZIP2), 1 << 20, 1 << 10),
        "lzma bomb that claims little": with_size(zip_of({"a.png": ZEROS}, zipfile.ZIP_LZMA), 1 << 20, 1 << 10),
        "bzip2 bomb": with_size(zip_of({"a.png": ZEROS}, zipfile.ZIP_BZIP2), 1 << 20, 0xFFFFFFF0),
        "encrypted": central(zip_of({"a.png": PNG}), 8, b"\1"),
        "unknown compression": central(zip_of({"a.png": PNG}), 10, b"\x63"),
        "PNG of 100,000 x 100,000": zip_of({"a.png": png_claiming(100_000, 100_000)}),
        "PNG of 65,536 x 65,536": zip_of({"a.png": png_claiming(65536, 65536)}),
        "palette of 65,536 x 65,536": zip_of({"a.png": png_claiming(
            65536, 65536, 8, 3, None, chunk(b"PLTE", bytes(3)))}),
        "PNG of 0 x 0": zip_of({"a.png": png_claiming(0, 0)}),
        "PNG bomb in its text": zip_of({"a.png": png_claiming(
            8, 8, 8, 3, None, chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(10 ** 8), 9)), chunk(b"PLTE", bytes(3)))}),
        "PNG with too little data": zip_of({"a.png": png_claiming(4096, 4096)}),
        "PostScript as PNG": zip_of({"a.png": EPS}),
        "PostScript": zip_of({"a.eps": EPS}),
        "million brackets": dataset(BRACKETS),
        "million brackets, closed": dataset(BRACKETS + b"]" * 10 ** 6),
        "million brackets, deflated": zip_of({"a.png": PNG, "dataset.json": BRACKETS}, zipfile.ZIP_DEFLATED),
        "million objects": dataset(b'{"labels":' * 10 ** 6),
        "JSON of many empty lists": zip_of({"a.png": PNG, "dataset.json": b"[" + b"[]," * 12_000_000 + b"[]]"},
                                           zipfile.ZIP_DEFLATED),
        "JSON number of a million digits": dataset(b'{"labels": [["a.png", ' + b"9" * 10 ** 6 + b"]]}"),
        "JSON name of a million letters": dataset(b'{"labels": [["' + b"x" * 10 ** 6 + b'", 1]]}'),
        "JSON name that steers the terminal": dataset(json.dumps({"labels": [["\x1b[2J\r\nOK", 1]]}).encode()),
        "JSON label of nested lists": dataset(b'{"labels": [["a.png", ' + b"[" * 50 + b"]" * 50 + b"]]}"),
        "JSON in UTF-16": dataset('{"labels": null}'.encode("utf-16")),
    }  # fmt: skip


@functools.cache
def tables():
    """Return {name: (file name, bytes)} for tables of labels that must be refused."""
    row, csv = b"00000/img00000000.png,0\n", b"file,label\n"
    lines = {
        "null character": b"00000/img00000000.png,\0\n",
        "open quote": b'"00000/img00000000.png,0\n' * 1000,
        "quote in the middle": b'"00000/img"00000000.png,0\n',
        "cell of a megabyte": b"x" * 10**6 + b",0\n",
        "line of a million cells": b"," * 10**6 + b"\n",
        "ragged": row + b"00000/img00000001.png\n",
        "the same line very often": row * 100_000,
        "name that steers the terminal": b"\x1b[2J\x1b]0;x\x07,0\n",
        "name that leads outside": b"../../../../etc/passwd,0\n",
        "formula": b'=cmd|"/C calc"!A0,0\n',
        "code as label": b"00000/img00000000.png,__import__('os').system('true')\n",
        "label of a million digits": b"00000/img00000000.png," + b"9" * 100_000 + b"\n",
        "cp1252": "gr\u00f6\u00dfe.png,0\n".encode("cp1252"),
    }
    brackets = b'{"file": ' + b"[" * 10**6 + b"\n"
    found = {
        **{f"{name}, CSV": ("t.csv", csv + data) for name, data in lines.items()},
        **{f"{name}, TSV": ("t.tsv", (csv + data).replace(b",", b"\t")) for name, data in lines.items()},
        "million columns": ("t.csv", b"a," * 10**6 + b"b\n"),
        "header twice": ("t.csv", b"file,label,label\n" + row),
        "no header": ("t.csv", b"\n\n"),
        "UTF-16": ("t.csv", (csv + row).decode().encode("utf-16")),
        "UTF-16, JSON lines": ("t.jsonl", '{"file": "a"}'.encode("utf-16-le")),
        "million brackets": ("t.jsonl", brackets),
        "many empty lists": ("t.jsonl", b'{"file": [' + b"[]," * 9_000_000 + b"[]]}\n"),
        "million different keys": ("t.jsonl", b"".join(b'{"k%d": 0}\n' % i for i in range(100_000))),
        "lines that are one value": ("t.jsonl", b'{"file": "a\nb", "label": 0}\n'),
        "several values in a line": ("t.jsonl", b'{"file": "a"}, {"file": "b"}\n' * 3),
        "numbers of many digits": ("t.jsonl", b'{"file": ' + b"9" * 10**6 + b"}\n"),
        "parquet of rubbish": ("t.parquet", b"PAR1" + bytes(1000) + b"PAR1"),
        "parquet without an end": ("t.parquet", b"PAR1" * 100 + b"\xff\xff\xff\x7fPAR1"),
        "pickle as parquet": ("t.parquet", pickle.dumps(Raw(os.getcwd))),
    }
    with contextlib.suppress(ImportError):
        found |= _parquets()
    return found


def _parquets():
    """Return parquet files that unpack into far more than they hold."""
    import pyarrow.parquet  # optional dependency

    def write(**columns):
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(columns), buffer, compression="zstd")
        return buffer.getvalue()

    zeros = pyarrow.array(np.zeros(5_000_000, dtype=np.int8))
    many = pyarrow.DictionaryArray.from_arrays(zeros, ["00000/img00000000.png"])
    return {
        "parquet of 5 million rows in few bytes": ("t.parquet", write(file=many, label=zeros)),
        "parquet of long texts": ("t.parquet", write(file=["x" * 10**7] * 3, label=[0, 1, 2])),
        "parquet of lists": ("t.parquet", write(file=[["a"]], label=[[0]])),
    }


def folders():
    """Return {name: function that makes a hostile folder}."""

    def fill(action):
        def make(folder):
            folder.mkdir()
            (folder / "a.png").write_bytes(PNG)
            (folder.parent / "private.png").write_bytes(PNG)
            (folder.parent / "private.json").write_text('{"labels": null}')
            action(folder)

        return make

    return {
        "link that leaves the folder": fill(lambda f: (f / "b.png").symlink_to("../private.png")),
        "link to a device": fill(lambda f: (f / "b.png").symlink_to("/dev/zero")),
        "link to itself": fill(lambda f: (f / "b.png").symlink_to(f / "b.png")),
        "pipe": fill(lambda f: os.mkfifo(f / "b.png")),
        "pipe as dataset.json": fill(lambda f: os.mkfifo(f / "dataset.json")),
        "dataset.json that leaves the folder": fill(lambda f: (f / "dataset.json").symlink_to("../private.json")),
    }


def tar_of(*members, compress=gzip.compress):
    """Return a CIFAR archive with members (name, type, stated size, bytes, link)."""
    buffer = io.BytesIO()
    for name, kind, size, data, link in members:
        info = tarfile.TarInfo(name)
        info.type, info.size, info.linkname = kind, size, link
        buffer.write(info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512))
    return compress(buffer.getvalue() + bytes(1024))


@functools.cache
def tars():
    """Return {name: .tar.gz} for archives that the CIFAR reader must refuse."""
    regular = tarfile.REGTYPE
    return {
        "symbolic link": tar_of(("data_batch_1", tarfile.SYMTYPE, 0, b"", "/etc/passwd")),
        "hard link": tar_of(("data_batch_1", tarfile.LNKTYPE, 0, b"", "/etc/passwd")),
        "device": tar_of(("data_batch_1", tarfile.CHRTYPE, 0, b"", "")),
        "name that leads outside": tar_of(("../../data_batch_1", regular, 4, b"N...", "")),
        "batch of 6 GiB": tar_of(("data_batch_1", regular, 6 << 30, ZEROS, "")),
        "long name of 6 GiB": tar_of(("x", tarfile.GNUTYPE_LONGNAME, 6 << 30, ZEROS, "")),
        "header of 6 GiB": tar_of(("x", tarfile.XHDTYPE, 6 << 30, ZEROS, "")),
        "something else of 600 MiB before the batch": tar_of(
            ("x", regular, 600 << 20, b"", ""), compress=lambda x: gzip.compress(x[:512]) + gzip.compress(ZEROS) * 600
        ),
    }


def npy_claiming(shape, descr="'<f8'"):
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + bytes(8)


NPY = {
    "a terabyte": npy_claiming("(1000000000000,)"),
    "no bytes, many rows": npy_claiming("(1000000000000, 0)"),
    "negative": npy_claiming("(-1,)"),
    "text of 4 GB": npy_claiming("(1,)", "'<U1000000000'"),
    "nested header": npy_claiming("(" * 3000),
    "code as header": npy_claiming("__import__('os').getcwd()"),
}
TORCH = {
    "bytearray of 3 GB": pickle.dumps(Raw(bytearray, 3 << 30), 2),
    "list of a range": pickle.dumps(Raw(list, Raw(range, 10**9)), 2),
    "tensor of 4 GB in 4 bytes": tensor_with(b"(J\0\0\0\x40t"),
}
