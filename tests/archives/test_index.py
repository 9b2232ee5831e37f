"""The index of an archive: what its file holds, when it is believed, and that its size has no fixed limit."""

import json
import multiprocessing
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest

import dnnlib
from archives import index_file, json_lists, reader, zip_directory
from archives.dataset import ImageDataset
from archives.reader import ArchiveReader
from tests.support import synth
from torch_utils import safe_files

IMAGES = synth.pictures(9)
NAMES = [f"00000/img{i:08d}.png" for i in range(9)]
CLEAN = [[name, i % 2] for i, name in enumerate(NAMES)]


@pytest.fixture(autouse=True)
def always(monkeypatch, tmp_path):
    """Keep an index of every ZIP, however small."""
    monkeypatch.setattr(reader, "INDEX_FROM", 0)
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))


def make(path, labels=(0, 1, 2) * 3, **extra):
    return str(synth.make_archive(path, IMAGES, None if labels is None else list(labels), **extra))


def nested(path):
    return str(synth.make_zip(path, {f"a/b/{name}": data for name, data in members().items()}, zipfile.ZIP_DEFLATED))


def by_folder(path):
    names = [f"{'cat' if i % 3 else 'dög'}/{i}.png" for i in range(9)]
    return str(synth.make_zip(path, {name: synth.png(image) for name, image in zip(names, IMAGES, strict=True)}))


def members():
    pngs = {name: synth.png(image) for name, image in zip(NAMES, IMAGES, strict=True)}
    return pngs | {"dataset.json": json.dumps({"labels": CLEAN}).encode()}


KINDS = {
    "labels": make,
    "everything": lambda path: make(
        path,
        clean_labels=CLEAN,
        outliers=NAMES[3:5],
        class_names=["a", "b", "c"],
        corruption=dict(family="digits"),
        previous_labels=CLEAN[::-1],
        source_names=[[name, f"x/{i}.jpg"] for i, name in enumerate(NAMES)],
    ),
    "class names as labels": lambda path: make(path, ["cat", "dog", "owl"] * 3),
    "vectors": lambda path: make(path, [[0.5, i] for i in range(9)]),
    "no labels": lambda path: make(path, None),
    "nested": nested,
    "by folder": by_folder,
    "lzma": lambda path: str(synth.make_zip(path, members(), zipfile.ZIP_LZMA)),
}


def content(archive):
    arrays = [*map(archive.labels, reader.LABELS), archive.outliers()]
    arrays = [None if array is None else (array.dtype.str, array.tolist()) for array in arrays]
    images = [archive.image(row).tolist() for row in range(len(archive))]
    return list(archive.names), arrays, archive.class_names(), archive.corruption(), images, archive.source_names()


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_opening_reads_only_the_index(kind, tmp_path, monkeypatch):
    path = KINDS[kind](tmp_path / "a.zip")
    with monkeypatch.context() as without:
        without.setattr(reader, "INDEX_FROM", 1 << 62)
        expected = content(ArchiveReader(path))
    assert os.listdir(tmp_path) == ["a.zip"]
    assert content(ArchiveReader(path)) == expected
    assert sorted(os.listdir(tmp_path)) == ["a.zip", "a.zip.index"]
    monkeypatch.setattr(reader, "read_members", None)
    with monkeypatch.context() as without:
        without.setattr(reader, "load_lists", None)
        assert ArchiveReader(path).labels() is None or expected[1][0][1] == ArchiveReader(path).labels().tolist()
    assert content(ArchiveReader(path)) == expected


def test_arrays_are_mapped_and_may_be_changed(tmp_path):
    path = make(tmp_path / "a.zip")
    before = (tmp_path / "a.zip.index").exists(), ImageDataset(path).labels
    before[1][:] = 7
    data = ImageDataset(path)
    assert before[0] is False and data.labels.tolist() == [0, 1, 2] * 3 and data.labels.flags.writeable
    assert not data.labels.flags.owndata and type(data.labels) is np.ndarray


def test_an_archive_that_changed_is_read_again(tmp_path):
    """Size, time and name are those of the old archive."""
    path = make(tmp_path / "a.zip")
    assert ArchiveReader(path).labels().tolist() == [0, 1, 2] * 3
    status = os.stat(path)
    make(tmp_path / "a.zip", [2, 1, 0] * 3)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert os.path.getsize(path) == status.st_size
    assert ArchiveReader(path).labels().tolist() == [2, 1, 0] * 3
    assert ArchiveReader(path).labels().tolist() == [2, 1, 0] * 3


def spoil(data, name):
    if name == "cut":
        return data[:-10]
    if name == "empty":
        return b""
    if name == "version":
        return data.replace(index_file.MAGIC, b"CSINDEX0")
    place = len(data) // 2 if name == "label" else {"checksum": 17, "header": 40}.get(name, len(data) - 1)
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize("name", ["cut", "empty", "version", "label", "checksum", "header", "end"])
def test_a_damaged_index_is_not_believed(name, tmp_path):
    path = make(tmp_path / "a.zip")
    expected = content(ArchiveReader(path))
    index = tmp_path / "a.zip.index"
    right = index.read_bytes()
    index.write_bytes(spoil(right, name))
    assert content(ArchiveReader(path)) == expected
    assert index.read_bytes() == right or not index_file._is_index(index)


def test_foreign_indexes_are_not_believed(tmp_path, monkeypatch):
    paths = [make(tmp_path / "a.zip"), make(tmp_path / "b.zip", [2, 1, 0] * 3)]
    expected = [content(ArchiveReader(path)) for path in paths]
    index = tmp_path / "b.zip.index"
    index.write_bytes((tmp_path / "a.zip.index").read_bytes())
    assert content(ArchiveReader(paths[1])) == expected[1]
    data = index.read_bytes()
    size = index_file.HEAD.size
    key = json.loads(data[size : size + index_file.HEAD.unpack(data[:size])[1]])["archive"]
    assert index_file._load(index, key, os.getuid())
    index.chmod(0o666)  # anybody may have written it
    with pytest.raises(ValueError):
        index_file._load(index, key, os.getuid())
    index.chmod(0o644)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    os.chown(index, 54321, -1) if os.getuid() == 0 else pytest.skip("needs another user's file")
    with pytest.raises(ValueError):
        index_file._load(index, key, 12345)


def test_where_the_index_goes(tmp_path, monkeypatch):
    """Beside the archive, else into the user's cache, else nowhere; never over a file that is something else."""
    path = make(tmp_path / "a.zip")
    expected = content(ArchiveReader(path))
    os.remove(path + ".index")
    (tmp_path / "a.zip.index").write_text("mine")
    assert content(ArchiveReader(path)) == expected
    found = list((tmp_path / "cache").iterdir())
    assert (tmp_path / "a.zip.index").read_text() == "mine" and len(found) == 1
    with monkeypatch.context() as patched:
        patched.setattr(reader, "read_members", None)
        assert content(ArchiveReader(path)) == expected
    found[0].unlink()
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_text("a file")
    assert content(ArchiveReader(path)) == expected

    def refuse(*_):
        raise OSError(28, "No space left on device")

    os.remove(path + ".index")
    monkeypatch.setattr(os, "fsync", refuse)
    assert content(ArchiveReader(path)) == expected and sorted(os.listdir(tmp_path)) == ["a.zip", "cache"]


def _open_and_report(path, barrier, queue):
    calls, read = [], reader.read_members
    reader.read_members = lambda *args: (calls.append(1), read(*args))[1]
    barrier.wait()
    queue.put((len(calls), ArchiveReader(path).labels().tolist(), len(calls)))


def test_processes_that_open_at_once_do_the_work_once(tmp_path):
    path, context = make(tmp_path / "a.zip"), multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(4), context.SimpleQueue()
    processes = [context.Process(target=_open_and_report, args=(path, barrier, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    assert [labels for _, labels, _ in found] == [[0, 1, 2] * 3] * 4
    assert sum(calls for _, _, calls in found) == 1 and sorted(os.listdir(tmp_path)) == ["a.zip", "a.zip.index"]


def forge(path, change):
    """Write an index of the archive whose key and checksum are right."""
    header, arrays = change
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        key = index_file.fingerprint(file.fileno(), *zip_directory.find_directory(file.fileno(), size)[:2], size)
    honest, record = index_file.load_index(path, key)
    index_file.save_index(path, key, {name: arrays.get(name, array) for name, array in honest.items()}, record | header)
    return {name: array.copy() for name, array in honest.items()}


def entries(**fields):
    found = np.zeros(9, zip_directory.ENTRY)
    for name, value in fields.items():
        found[name] = value
    return dict(entries=found)


FORGED = {
    "offset behind the end": ({}, entries(offset=1 << 62, size=9, packed=9)),
    "negative offset": ({}, entries(offset=-5, size=9, packed=9)),
    "size of 4 GiB": ({}, entries(size=0xFFFFFFFF, packed=0xFFFFFFFF)),
    "rare compression": ({}, entries(method=14)),
    "names without ends": ({}, dict(names=np.full(9 * 23, 65, np.uint8))),
    "names far away": ({}, dict(starts=np.arange(10) << 60)),
    "names backwards": ({}, dict(starts=-np.arange(10))),
    "fewer names": ({}, dict(starts=np.arange(9))),
    "negative labels": ({}, dict(labels=np.full(9, -1))),
    "large labels": ({}, dict(labels=np.full(9, 1 << 40))),
    "fewer labels": ({}, dict(labels=np.zeros(8, np.int64))),
    "no number": ({}, dict(labels=np.full([9, 2], np.nan, np.float32))),
    "three axes": ({}, dict(labels=np.zeros([9, 2, 2], np.float32))),
    "other type": ({}, dict(labels=np.zeros(9, np.complex64))),
    "class names": (dict(class_names=[1, 2]), {}),
    "corruption": (dict(corruption=3), {}),
    "root": (dict(root=None), {}),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_index_does_no_harm(name, tmp_path):
    """It ends in the truth or in one line."""
    path = make(tmp_path / "a.zip")
    expected = content(ArchiveReader(path))
    forge(path, FORGED[name])
    try:
        assert content(ArchiveReader(path)) == expected
    except dnnlib.UserError as error:
        assert "\n" not in error.message and ("a.zip" in error.message or "index" in error.message)


# ---------------------------------------------------------------------------------------------------------------------
# No fixed limits.


def test_limits_grow_with_the_archive(tmp_path, monkeypatch):
    """The limits here are to this archive as the real ones are to millions of images."""
    images, count = synth.pictures(1)[0], 400
    names = [f"00000/img{i:08d}.png" for i in range(count)]
    pairs = [[name, i % 7] for i, name in enumerate(names)]
    metadata = dict(labels=pairs, clean_labels=pairs[::-1], outliers=names[::3], class_names=[str(i) for i in range(7)])
    pngs = dict.fromkeys(names, synth.png(images))
    path = synth.make_zip(tmp_path / "a.zip", pngs | {"dataset.json": json.dumps(metadata).encode()})
    monkeypatch.setattr(safe_files, "_CHUNK", 1000)
    monkeypatch.setattr(safe_files, "MAX_JSON", 20_000)
    monkeypatch.setattr(safe_files.load_json, "__defaults__", (20_000,))
    monkeypatch.setattr(reader, "MAX_JSON", 20_000)
    monkeypatch.setattr(reader, "MEMBER_LIMIT", 1000)
    for _ in range(2):  # without and with the index
        data = ImageDataset(str(path))
        assert data.labels.tolist() == [i % 7 for i in range(count)] == data.clean_labels.tolist()
        assert np.flatnonzero(data.outliers).tolist() == list(range(0, count, 3)) and data.label_dim == 7
    labels = {"labels": pairs, "rest": [[[i] for i in range(9)] for _ in range(9000)]}
    other = synth.make_zip(
        tmp_path / "b.zip", pngs | {"dataset.json": json.dumps(labels).encode()}, zipfile.ZIP_DEFLATED
    )
    assert ImageDataset(str(other)).label_dim == 7


MISTAKES = {
    "absent": (lambda pairs: [*pairs[:-1], ["no.png", 1]], "8 labels for 9 images, none for '00000/img00000008.png'"),
    "missing": (lambda pairs: pairs[:-1], "8 labels for 9 images, none for '00000/img00000008.png'"),
    "most missing": (
        lambda pairs: pairs[:2],
        "none for '00000/img00000002.png', '00000/img00000003.png', '00000/img00000004.png' and 4 more",
    ),
    "many absent": (lambda pairs: [*([f"{i}.png", 1] for i in range(99)), *pairs, pairs[0]], "listed twice"),
    "text among numbers": (lambda pairs: [*pairs[:-1], [NAMES[8], "cat"]], "is not an integer"),
    "twice": (lambda pairs: [*pairs, pairs[0]], "1 entry too many, of files that are listed twice"),
    "many times": (lambda pairs: pairs * 50, "listed twice"),
    "negative": (lambda pairs: [*pairs[:-1], [NAMES[8], -1]], "label -1 is negative"),
    "ragged": (lambda pairs: [*pairs[:-1], [NAMES[8], [1, 2]]], "ragged"),
    "pair": (lambda pairs: [*pairs, 5], "must be a list of"),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("chunk", [50, 1 << 20])
def test_mistakes_in_long_lists(name, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(safe_files, "_CHUNK", chunk)
    change, message = MISTAKES[name]
    path = synth.make_zip(
        tmp_path / "a.zip", members() | {"dataset.json": json.dumps({"labels": change(CLEAN)}).encode()}
    )
    with pytest.raises(dnnlib.UserError) as error:
        ArchiveReader(str(path)).labels()
    assert message in error.value.message
    assert not (tmp_path / "a.zip.index").exists() and len(ImageDataset(str(path), use_labels=False)) == 9


TEXTS = [
    '{"a": [1, [2, {"b": ["],[", "\\\\", "\\"]"]}], "x,y"], "c": [], "d": {"e": [3, 4]}, "a,[": [["p", 0], ["q", 1]]}',
    '{"labels":[["é",1],["b\\\\",2]],"labels":[["last",3]],"n":null}',
    "[[1, 2], [3, 4]]", "7", '"[,]"', "{}",
]  # fmt: skip
BROKEN = [
    '{"a": [1, 2',
    '{"a": [1, 2,]}',
    '{"a": [,1, 2]}',
    '{"a": [1,, 2]}',
    '{"a": [1 2]}',
    '{"a": [1, 2]]}',
    '{"a" [1]}',
]


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 8, 13, 1000])
def test_pieces_are_the_list(chunk, monkeypatch):
    monkeypatch.setattr(safe_files, "_CHUNK", chunk)

    def whole(value):
        pieces = json_lists.in_pieces(value)
        items = value if pieces is None else [item for piece in pieces for item in piece]
        if isinstance(value, json_lists.LongList) and items:
            assert value.first() == items[0]
        return items

    for text in TEXTS:
        found = json_lists.load_lists(text.encode(), "x")
        found = {key: whole(value) for key, value in found.items()} if isinstance(found, dict) else found
        assert found == json.loads(text) or not isinstance(found, (dict, int, str))
    for text in BROKEN:
        with pytest.raises(dnnlib.UserError, match="x: not valid JSON"):
            {key: whole(value) for key, value in json_lists.load_lists(text.encode(), "x").items()}


# ---------------------------------------------------------------------------------------------------------------------
# The directory of a ZIP.


def odd_zip(path, front=b"", comment=b"", big=False):
    """Write a ZIP with everything that the format allows, by `zipfile`."""
    with open(path, "wb") as file:
        file.write(front)
        with zipfile.ZipFile(file, "w") as archive:
            archive.comment = comment
            for i, name in enumerate(["z.png", "b/é.png", "folder/", "b/a.png", "a.txt", "Ü/x.png"]):
                info = zipfile.ZipInfo(name)
                info.extra, info.comment = struct.pack("<HHB", 0x5455, 1, 7) * (i % 3), b"c" * i
                info.compress_type = zipfile.ZIP_DEFLATED if i % 2 else zipfile.ZIP_STORED
                with archive.open(info, "w", force_zip64=big) as member:
                    member.write(b"" if name.endswith("/") else bytes(i + 5))
    return path


@pytest.mark.parametrize("front", [b"", b"#!/bin/sh\n" * 9])
@pytest.mark.parametrize("comment", [b"", b"PK\5\6 or not", b"x" * 65535])
@pytest.mark.parametrize("big", [False, True])
def test_the_directory_is_read_as_by_zipfile(tmp_path, front, comment, big):
    if b"PK" in comment:
        comment = comment[:2]  # zipfile finds the last mark too
    path = odd_zip(tmp_path / "a.zip", front, comment, big)
    data = path.read_bytes()
    with open(path, "rb") as file:
        start, length, ahead = zip_directory.find_directory(file.fileno(), len(data))
    found = zip_directory.read_members(data[start : start + length], "a.zip", ahead)
    with zipfile.ZipFile(path) as archive:
        expected = sorted((info for info in archive.infolist() if not info.is_dir()), key=lambda info: info.filename)
        fields = ("header_offset", "compress_size", "file_size", "CRC", "compress_type", "flag_bits")
        assert [name.decode() for name in found.names] == [info.filename for info in expected]
        assert found.entries.tolist() == [tuple(getattr(info, field) for field in fields) for info in expected]


def test_places_behind_4_gib(tmp_path):
    """The file is sparse: 5 GiB of nothing lie in front of the archive."""
    path = synth.make_archive(tmp_path / "a.zip", IMAGES, list(range(9)))
    data, front = path.read_bytes(), 5 << 30
    with open(path, "wb") as file:
        file.seek(front)
        file.write(data)
    archive = ArchiveReader(str(path))
    np.testing.assert_array_equal(archive.image(8), IMAGES[8])
    entry = struct.pack("<4s2B5H3I5H2I", b"PK\1\2", 45, 3, 45, 0, 0, 0, 33, 0, 5, 5, 5, 12, 0, 0, 0, 0, 0xFFFFFFFF)
    entry += b"a.png" + struct.pack("<HHQ", 1, 8, front)
    assert zip_directory.read_members(entry, "a.zip").entries["offset"].tolist() == [front]


def test_old_names_and_their_checksums(tmp_path):
    """Without the flag of UTF-8, names are in the alphabet of the first PCs."""
    path = synth.make_zip(tmp_path / "a.zip", {"xx.png": synth.png(IMAGES[0]), "b.png": synth.png(IMAGES[1])})
    path.write_bytes(path.read_bytes().replace(b"xx.png", b"\x81\x84.png"))
    assert list(ArchiveReader(str(path)).names) == ["b.png", "üä.png"]
    assert zlib.crc32(ArchiveReader(str(path)).read(1)) == zlib.crc32(synth.png(IMAGES[0]))
