"""Labels from folders, and names in archives: what messy collections become, what is said, what is refused."""

import json
import os
import struct
import unicodedata
import zipfile
import zlib

import pytest

import dnnlib
from archives import reader
from archives.archive_set import open_archives
from archives.dataset import ImageDataset
from archives.reader import ArchiveReader
from tests.support import synth
from tests.support.synth import run_dataset_tool as run

PNG = synth.png(synth.pictures(1)[0])


def put(folder, *names, data=PNG):
    """Write files; names that end in '/' are empty folders. Return the folder as text."""
    for name in names:
        path = folder / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_bytes(data)
    return str(folder)


def make(tmp_path, kind, *names, **texts):
    """Return the path of a folder or a ZIP with images and empty folders of these names, and texts."""
    if kind == "folder":
        put(tmp_path / "set", *names)
        for name, text in texts.items():
            put(tmp_path / "set", name, data=text.encode())
        return str(tmp_path / "set")
    tmp_path.mkdir(exist_ok=True)
    members = {name: b"" if name.endswith("/") else PNG for name in names}
    members |= {name: text.encode() for name, text in texts.items()}
    return str(synth.make_zip(tmp_path / "set.zip", members))


def opened(path):
    """Return (names, labels, class names, notes without the path) of an archive, all of whose images can be read."""
    archive = ArchiveReader(path)
    for row in range(len(archive)):
        assert archive.image(row).shape == (8, 8, 3)
    labels = archive.labels()
    notes = [note.removeprefix(f"{path}: ") for note in archive.notes]
    return list(archive.names), None if labels is None else labels.tolist(), archive.class_names(), notes


def refused(path):
    with pytest.raises(dnnlib.UserError) as error:
        opened(str(path))
    assert error.value.message.startswith(str(path)) and "\n" not in error.value.message
    return error.value.message.removeprefix(f"{path}: ")


both = pytest.mark.parametrize("kind", ["folder", "zip"])


# ---------------------------------------------------------------------------------------------------------------------
# What is left out is said.


@both
def test_images_beside_the_classes_do_not_erase_the_labels(tmp_path, kind):
    path = make(tmp_path, kind, "cat/0.png", "dog/0.png", "preview.png")
    names, labels, classes, (note,) = opened(path)
    assert (names, labels, classes) == (["cat/0.png", "dog/0.png"], [0, 1], ["cat", "dog"])
    assert "1 image beside the class folders cat, dog is left out: preview.png" in note


@both
def test_images_beside_shared_folders_of_the_classes(tmp_path, kind):
    path = make(tmp_path, kind, "a/x.png", "z.png", *(f"a/b/{c}/{i}.png" for c in ("cat", "dog") for i in "01"))
    names, labels, classes, (note,) = opened(path)
    assert (len(names), labels, classes) == (4, [0, 0, 1, 1], ["cat", "dog"])
    assert "2 images beside" in note and "a/x.png" in note and "z.png" in note


@both
def test_a_few_folders_in_a_flat_set_are_no_classes(tmp_path, kind):
    """As many images lie beside the folders as in them: nothing is left out, and nobody has labels in silence."""
    path = make(tmp_path, kind, "0.png", "1.png", "a/2.png", "b/3.png")
    names, labels, classes, (note,) = opened(path)
    assert (len(names), labels, classes) == (4, None, None) and "so these are no classes" in note
    path = make(tmp_path / "one", kind, "0.png", "a/2.png")
    assert opened(path)[1:] == (None, None, [])


@both
def test_classes_without_readable_images_are_named(tmp_path, kind):
    path = make(tmp_path, kind, "cat/0.png", "dog/0.png", "fish/", "bird/0.heic", ".git/x/", "owl/Thumbs.db")
    names, labels, classes, (note,) = opened(path)
    assert (names, labels, classes) == (["cat/0.png", "dog/0.png"], [0, 1], ["cat", "dog"])
    assert note.endswith("bird (1 .heic), fish (empty), owl (1 .db)")


@both
def test_one_class_that_can_be_read_among_others_that_cannot(tmp_path, kind):
    path = make(tmp_path, kind, "set/cat/0.png", "set/dog/0.heic", "set/cat/raw/0.dng")
    names, labels, _, (note,) = opened(path)
    assert len(names) == 1 and labels is None and "dog (1 .heic)" in note and "raw (1 .dng)" in note


@both
def test_files_that_may_be_images_are_mentioned_and_others_are_not(tmp_path, kind):
    junk = ["Thumbs.db", "cat/.DS_Store", "notes.txt", "__MACOSX/cat/._0.png", "cat/@eaDir/0.png/thumb.jpg", ".x/0.png"]
    path = make(tmp_path, kind, "cat/0.png", "dog/0.PNG", *junk)
    assert opened(path) == (["cat/0.png", "dog/0.PNG"], [0, 1], ["cat", "dog"], [])
    path = make(tmp_path / "more", kind, "cat/0.png", "dog/0.png", "cat/1.heic", "cat/2.HEIC", "dog/img")
    (note,) = opened(path)[3]
    assert "2 .heic, 1 without an extension, such as cat/1.heic" in note
    assert "holds 2 .avif" in refused(make(tmp_path / "none", kind, "a/0.avif", "b/0.avif"))


@both
def test_names_of_classes_that_look_alike_are_mentioned(tmp_path, kind):
    accent = [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]
    path = make(tmp_path, kind, "Cat/0.png", "cat/0.png", "dog/0.png", *(f"{name}/0.png" for name in accent))
    _, labels, classes, notes = opened(path)
    assert len(classes) == 5 and sorted(labels) == list(range(5))
    assert len(notes) == 2 and "'Cat', 'cat'" in notes[0]


@both
def test_folders_that_are_numbers_are_numbered_in_alphabetical_order(tmp_path, kind):
    path = make(tmp_path, kind, *(f"{i}/0.png" for i in range(11)))
    _, labels, classes, (note,) = opened(path)
    assert classes[:3] == ["0", "1", "10"] and labels == list(range(11)) and "10 has the label 2" in note
    assert opened(make(tmp_path / "b", kind, *(f"{i:02d}/0.png" for i in range(11))))[3] == []


@both
def test_classes_are_the_first_folders(tmp_path, kind):
    path = make(tmp_path, kind, *(f"{a}/{b}/0.png" for a, b in [("pet", "cat"), ("pet", "dog"), ("car", "bus")]))
    _, labels, classes, (note,) = opened(path)
    assert (labels, classes) == ([0, 1, 1], ["car", "pet"]) and "not those below them (bus, cat, dog)" in note


@both
@pytest.mark.parametrize(
    "parts", [("train", "val"), ("Training", "TEST"), ("train2017", "val2017"), ("valid_images", "test", "other")]
)
def test_parts_of_a_set_are_no_classes(tmp_path, kind, parts):
    path = make(tmp_path, kind, *(f"data/{part}/{c}/0.png" for part in parts for c in ("cat", "dog")))
    assert not ImageDataset(path, use_labels=False).has_labels
    message = refused(path)
    assert all(part in message for part in parts[:2]) and "name one of them" in message
    if kind == "folder":
        assert f"such as {path}/data/{parts[0]}" in message
        assert opened(f"{path}/data/{parts[0]}")[2] == ["cat", "dog"]


@both
def test_a_class_may_be_called_like_a_part(tmp_path, kind):
    assert opened(make(tmp_path, kind, "train/0.png", "car/0.png", "train/1.png"))[2] == ["car", "train"]


# ---------------------------------------------------------------------------------------------------------------------
# Numbered folders.

SHARDS = {
    "edm": [f"{i // 1000:05d}/img{i:08d}.png" for i in (0, 999, 1000, 54321)],
    "generate.py": [f"{i - i % 1000:06d}/{i:06d}.png" for i in (0, 7, 1000, 54321)],
    "ffhq": [f"{i - i % 1000:05d}/{i:05d}.png" for i in (0, 7, 1000, 54321)],
}


@both
@pytest.mark.parametrize("name", SHARDS)
def test_numbered_folders_of_images_are_no_classes(tmp_path, kind, name):
    assert opened(make(tmp_path, kind, *SHARDS[name]))[1:] == (None, None, [])


@both
@pytest.mark.parametrize("file", ["a.png", "00000.png", "00000_00000.ppm", "img1.png"])
def test_numbered_folders_may_be_classes(tmp_path, kind, file):
    path = make(tmp_path, kind, f"00000/{file}", f"00001/{file}", f"00042/{file}")
    assert opened(path)[1:3] == ([0, 1, 2], ["00000", "00001", "00042"])


# ---------------------------------------------------------------------------------------------------------------------
# `dataset.json` in a folder.

PAIRS = {"labels": [["1.png", 1], ["sub\\0.png", 0]]}


@both
def test_dataset_json_one_folder_down(tmp_path, kind):
    path = make(tmp_path, kind, "data/1.png", "data/sub/0.png", **{"data/dataset.json": json.dumps(PAIRS)})
    assert opened(path) == (["1.png", "sub/0.png"], [1, 0], None, [])
    path = make(
        tmp_path / "b", kind, "data/1.png", "data/sub/0.png", "x.png", **{"data/dataset.json": json.dumps(PAIRS)}
    )
    names, labels, _, (note,) = opened(path)
    assert labels == [1, 0] and "1 image outside that folder is left out, such as x.png" in note


@both
def test_dataset_json_that_describes_a_small_part_is_refused(tmp_path, kind):
    """Before, a ZIP with such a file in one of its class folders lost all images of the others."""
    path = make(tmp_path, kind, "cat/0.png", "cat/1.png", "dog/1.png", **{"dog/dataset.json": json.dumps(PAIRS)})
    assert "dataset.json lies in dog/, which holds 1 of the 3 images" in refused(path)


@both
def test_several_dataset_json(tmp_path, kind):
    texts = {f"{part}/dataset.json": json.dumps(PAIRS) for part in "ab"}
    path = make(tmp_path, kind, *(f"{part}/{name}" for part in "ab" for name in ("1.png", "sub/0.png")), **texts)
    assert "dataset.json lies in several folders (a/, b/)" in refused(path)
    put(tmp_path / "set", "dataset.json", data=json.dumps({"labels": None}).encode())
    if kind == "folder":
        assert opened(path)[1] is None and len(opened(path)[0]) == 4


def test_outliers_may_be_named_with_backslashes(tmp_path):
    text = json.dumps(PAIRS | {"outliers": ["sub\\0.png"]})
    path = make(tmp_path, "zip", "1.png", "sub/0.png", **{"dataset.json": text})
    assert ArchiveReader(path).outliers().tolist() == [False, True]


# ---------------------------------------------------------------------------------------------------------------------
# Links.


def link(tmp_path, name, target):
    (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
    os.symlink(target, tmp_path / "set" / name)


def test_linked_class_folders_inside_the_root_are_followed(tmp_path):
    path = put(tmp_path / "set", "all/ant/0.png", "all/bee/0.png", "by/owl/0.png")
    link(tmp_path, "by/ant", "../all/ant")
    link(tmp_path, "by/bee", tmp_path / "set/all/bee")
    names, _, classes, _ = opened(path)
    assert names == ["all/ant/0.png", "all/bee/0.png", "by/ant/0.png", "by/bee/0.png", "by/owl/0.png"]
    link(tmp_path, "top", "all")
    assert "top/ant/0.png" in opened(path)[0]
    (tmp_path / "other").symlink_to(tmp_path / "set/all")
    assert opened(str(tmp_path / "other"))[2] == ["ant", "bee"]  # the root itself may be a link


@pytest.mark.parametrize("name, target, found", [
    ("cat", "../elsewhere/cat", "cat: is a link to a folder outside"),
    ("cat", "/", "cat: is a link to a folder outside"),
    ("cat", "../set2", "cat: is a link to a folder outside"),
    ("ant/again", "..", "ant/again: is a link to a folder that holds it"),
    ("ant/again", ".", "ant/again: is a link to a folder that holds it"),
    ("cat", "gone", "cat: is a link to nothing"),
    ("cat.png", "gone", "cat.png: cannot be read"),
    ("cat.png", "../elsewhere/cat/0.png", "cat.png: is a link to a file outside"),
    ("dataset.json", "../elsewhere/cat/0.png", "dataset.json: is a link to a file outside"),
    ("ant/metadata.csv", "/etc/passwd", "metadata.csv: is a link to a file outside"),
    ("cat", "cat", "cannot be read"),
])  # fmt: skip
def test_links_that_are_not_followed(tmp_path, name, target, found):
    path = put(tmp_path / "set", "ant/0.png", "bee/0.png")
    put(tmp_path / "elsewhere", "cat/0.png")
    put(tmp_path / "set2", "0.png")
    link(tmp_path, name, target)
    assert found in refused(path)


def test_links_cannot_lead_in_circles(tmp_path):
    """Each of the two linked folders holds a link to the other, so following all would never end."""
    path = put(tmp_path / "set", "ant/0.png", "bee/0.png")
    link(tmp_path, "ant/bee", "../bee")
    link(tmp_path, "bee/ant", "../ant")
    assert "inside a linked folder" in refused(path)


def test_hidden_links_and_links_of_text_files_do_not_matter(tmp_path):
    path = put(tmp_path / "set", "ant/0.png", "bee/0.png")
    link(tmp_path, ".cache", "/")
    link(tmp_path, "ant/README.txt", "gone")
    link(tmp_path, "ant/1.png", "../bee/0.png")
    assert opened(path)[1:] == ([0, 0, 1], ["ant", "bee"], [])


# ---------------------------------------------------------------------------------------------------------------------
# Names.


def zip_of_odd_names(path, names, compression=zipfile.ZIP_STORED, **others):
    """Write a ZIP whose names `zipfile` would change or refuse: bytes without the flag of UTF-8, '\\', './'."""
    places = {bytes([97 + i]) * len(name): name for i, name in enumerate(names)}
    synth.make_zip(path, {place.decode(): PNG for place in places} | others, compression)
    data = path.read_bytes()
    for place, name in places.items():
        assert data.count(place) >= 2
        data = data.replace(place, name)
    path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_LZMA])
def test_backslashes_in_a_zip_are_separators(tmp_path, compression):
    path = zip_of_odd_names(tmp_path / "a.zip", [b"cat_x\\a\\0.png", b"dog_x\\b\\00.png"], compression)
    assert opened(path)[:3] == (["cat_x/a/0.png", "dog_x/b/00.png"], [0, 1], ["cat_x", "dog_x"])
    text = json.dumps({"labels": [["dog_x\\b\\00.png", 3], ["cat_x\\a\\0.png", 2]]}).encode()
    names = [b"cat_x\\a\\0.png", b"dog_x\\b\\00.png"]
    path = zip_of_odd_names(tmp_path / "b.zip", names, compression, **{"dataset.json": text})
    assert opened(path)[:2] == (["cat_x/a/0.png", "dog_x/b/00.png"], [2, 3])


def test_dots_and_double_slashes_in_a_zip_do_not_matter(tmp_path):
    path = zip_of_odd_names(tmp_path / "a.zip", [b"./cat_x/0.png", b"./dog_x//00.png", b"dog_x/./01234.png"])
    assert opened(path)[:3] == (["cat_x/0.png", "dog_x/00.png", "dog_x/01234.png"], [0, 1, 1], ["cat_x", "dog_x"])


OUTSIDE = [b"..\\abcdefg.png", b"a/../bcdefgh.png", b"\\\\host\\share\\a.png", b"C:\\abcdefgh.png", b"c:abcdefghi.png",
           b"/abs/abcdefg.png", b"a\\..\\..\\bcde.png"]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out_stay_refused(tmp_path, name):
    path = zip_of_odd_names(tmp_path / "a.zip", [b"cat_x/0123456.png", name])
    assert "leads out of the archive" in refused(path)


def test_names_that_differ_only_in_their_separators(tmp_path):
    path = zip_of_odd_names(tmp_path / "a.zip", [b"cat_x\\abcdefg.png", b"cat_x/abcdefg.png"])
    assert "occurs twice" in refused(path)


def test_a_folder_unpacked_with_backslashes_in_its_names(tmp_path):
    path = put(tmp_path / "set", "cat\\0.png", "dog\\0.png", "dog\\1.png")
    assert opened(path)[:3] == (["cat/0.png", "dog/0.png", "dog/1.png"], [0, 1, 1], ["cat", "dog"])
    put(tmp_path / "set", "cat/0.png")
    assert "same name" in refused(path)
    assert "leads out" in refused(put(tmp_path / "out", "a\\..\\..\\0.png"))


def test_names_without_the_flag_of_utf8(tmp_path):
    """UTF-8 as on a Mac, the alphabet of the first PCs, and what Info-ZIP says in its extra field."""
    path = zip_of_odd_names(tmp_path / "a.zip", ["Dögß/é0.png".encode(), b"\x84\x94\x81_abc/0.png"])
    assert opened(path)[2] == ["Dögß", "äöü_abc"]
    known = struct.pack("<BI", 1, zlib.crc32(b"?og0123/0.png")) + "Dög/0.png".encode()
    for crc_of, expected in ((b"d\x99g0123/0.png", "Dög"), (b"other", "dÖg0123")):
        known = struct.pack("<BI", 1, zlib.crc32(crc_of)) + "Dög/0.png".encode()
        info = zipfile.ZipInfo("d_g0123/0.png")
        info.extra = struct.pack("<HH", 0x7075, len(known)) + known
        with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
            archive.writestr(info, PNG)
            archive.writestr("cat/0.png", PNG)
        (tmp_path / "b.zip").write_bytes((tmp_path / "b.zip").read_bytes().replace(b"d_g0123", b"d\x99g0123"))
        assert sorted(opened(str(tmp_path / "b.zip"))[2]) == sorted(["cat", expected])


# ---------------------------------------------------------------------------------------------------------------------
# The whole way.


def test_the_index_keeps_what_was_found(tmp_path, monkeypatch):
    path = make(tmp_path, "zip", "cat/0.png", "dog/0.png", "preview.png", "bird/0.heic")
    expected = opened(path)
    monkeypatch.setattr(reader, "INDEX_FROM", 0)
    assert opened(path) == expected
    monkeypatch.setattr(reader, "read_members", None)
    assert opened(path) == expected and len(expected[3]) == 2


def test_notes_of_a_set_of_archives(tmp_path):
    paths = [make(tmp_path / name, "folder", "cat/0.png", "dog/0.png", "preview.png") for name in "ab"]
    archives = open_archives(",".join(paths))
    assert len(archives) == 4 and [note.split(":")[0] for note in archives.notes] == paths


def test_dataset_tool_tells_what_it_left_out(tmp_path):
    path = make(tmp_path, "folder", "cat/0.png", "cat/1.png", "dog/0.png", "preview.png", "bird/0.heic")
    code, out, err = run(f"--source={path}", f"--dest={tmp_path}/a.zip")
    assert code == 0 and err.count("Note: ") == 2 and "preview.png" in err and "bird" in err
    assert "cat (2), dog (1)" in " ".join(out.split())
    code, _, err = run(
        f"--source={make(tmp_path / 's', 'folder', 'train/a/0.png', 'val/a/0.png')}", f"--dest={tmp_path}/b.zip"
    )
    assert code == 1 and err.startswith("Error: --source: ") and err.count("\n") == 1
