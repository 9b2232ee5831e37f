"""ImageDataset and BatchStream: what is read, in which order, and which archives are refused."""

import json
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dnnlib
from archives import reader
from archives.dataset import BatchStream, ImageDataset
from tests.support import synth


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Return (path, images, labels) of 11 RGB images in 3 classes."""
    images, labels = synth.pictures(11), [2, 0, 1, 1, 0, 2, 2, 1, 0, 0, 1]
    return synth.make_archive(tmp_path_factory.mktemp("data") / "rgb.zip", images, labels), images, np.array(labels)


def chw(images):
    return images.transpose(0, 3, 1, 2)


def all_images(dataset):
    return dataset.images(range(len(dataset))).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# What is read.


def test_attributes(archive):
    path, images, labels = archive
    data = ImageDataset(str(path), resolution=8)
    assert (len(data), data.name, data.num_channels, data.resolution) == (11, "rgb", 3, 8)
    assert data.image_shape == (3, 8, 8) and data.label_dim == 3 and data.has_labels
    assert data.labels.dtype == np.int64 and data.clean_labels is None and data.class_names is None
    assert data.corruption == {} and data.family is None and data.file_names[10] == "00000/img00000010.png"
    np.testing.assert_array_equal(data.labels, labels)
    np.testing.assert_array_equal(data.image(3), chw(images)[3])
    np.testing.assert_array_equal(data.image(-1), chw(images)[10])
    np.testing.assert_array_equal(data.onehot([1, 0]), [[1, 0, 0], [0, 0, 1]])
    np.testing.assert_array_equal(data.images(torch.tensor([4, 4])), chw(images)[[4, 4]])
    assert data.images([]).shape == (0, 3, 8, 8) and data.onehot([]).shape == (0, 3)
    np.testing.assert_array_equal(data.load(workers=2), chw(images))
    np.testing.assert_array_equal(data.image(3), chw(images)[3])
    kwargs = data.kwargs()
    assert json.loads(json.dumps(kwargs)) == kwargs
    assert len(ImageDataset(**kwargs)) == 11
    with pytest.raises(IndexError):
        data.image(11)


def test_own_metadata(tmp_path):
    path = synth.make_archive(
        tmp_path / "a.zip", synth.pictures(4, channels=1), [0, 1, 1, 0], class_names=["no", "yes", "perhaps"],
        clean_labels=[[f"00000/img0000000{i}.png", i % 3] for i in range(4)], corruption=dict(family="digits", T=[[1]]),
    )  # fmt: skip
    data = ImageDataset(str(path))
    assert data.label_dim == 3 and data.class_names == ["no", "yes", "perhaps"] and data.num_channels == 1
    assert data.family == "digits" and data.corruption["T"] == [[1]]
    np.testing.assert_array_equal(data.clean_labels, [0, 1, 2, 0])


def test_unlabeled(archive, tmp_path):
    plain = synth.make_archive(tmp_path / "plain.zip", synth.pictures(3))
    for data in (ImageDataset(str(plain)), ImageDataset(str(archive[0]), use_labels=False)):
        assert not data.has_labels and data.label_dim == 0 and data.labels is None
        assert data.onehot([0, 1]).shape == (2, 0)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(6)), windows=st.booleans())
def test_label_lists_in_any_order(tmp_path, order, windows):
    images, labels = synth.pictures(6), [3, 1, 0, 2, 2, 1]
    names = [f"00000/img{i:08d}.png" for i in range(6)]
    members = {name: synth.png(image) for name, image in zip(names, images, strict=True)}
    sep = "\\" if windows else "/"
    members["dataset.json"] = json.dumps({"labels": [[names[i].replace("/", sep), labels[i]] for i in order]}).encode()
    path = synth.make_zip(tmp_path / "a.zip", {name: members[name] for name in sorted(members, reverse=windows)})
    data = ImageDataset(str(path))
    np.testing.assert_array_equal(data.labels, labels)
    np.testing.assert_array_equal(all_images(data), chw(images))


def test_vector_labels(tmp_path):
    vectors = [[0.5, 0.25, -1.0], [0.0, 1.0, 2.0]]
    data = ImageDataset(str(synth.make_archive(tmp_path / "v.zip", synth.pictures(2), vectors)))
    assert data.label_dim == 3 and data.has_labels and data.labels is None
    np.testing.assert_array_equal(data.onehot([1, 0]), vectors[::-1])
    images, labels = next(BatchStream(data, 2))
    assert sorted(labels.tolist()) == sorted(vectors)
    onehot = ImageDataset(str(synth.make_archive(tmp_path / "o.zip", synth.pictures(2), [[0, 1, 0], [1, 0, 0]])))
    np.testing.assert_array_equal(onehot.labels, [1, 0])
    whole = ImageDataset(str(synth.make_archive(tmp_path / "w.zip", synth.pictures(2), [1.0, 0.0])))
    np.testing.assert_array_equal(whole.labels, [1, 0])


@pytest.mark.parametrize("kind", ["folder", "zip", "nested"])
def test_folders_named_by_class(tmp_path, kind):
    images = synth.pictures(4)
    names = ["cat/b.png", "cat/x/a.png", "dog/a.jpeg.png", "emu/z.png"]
    prefix = "photos/train/" if kind == "nested" else ""
    members = {prefix + name: synth.png(image) for name, image in zip(names, images, strict=True)}
    members |= {"notes.txt": b"hello", "__MACOSX/cat/._b.png": b"", prefix + "dog/.hidden.png": b""}
    if kind == "zip":
        path = synth.make_zip(tmp_path / "a.zip", members, zipfile.ZIP_DEFLATED)
    else:
        path = tmp_path / "data"
        for name, content in members.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    data = ImageDataset(str(path))
    assert data.class_names == ["cat", "dog", "emu"]
    np.testing.assert_array_equal(data.labels, [0, 0, 1, 2])
    np.testing.assert_array_equal(all_images(data), chw(images))


def test_shards_and_flat_folders_are_not_classes(tmp_path):
    members = {f"0000{i}/img0000000{i}.png": synth.png(image) for i, image in enumerate(synth.pictures(3))}
    assert not ImageDataset(str(synth.make_zip(tmp_path / "a.zip", members))).has_labels
    (tmp_path / "flat").mkdir()
    for i, image in enumerate(synth.pictures(3)):
        (tmp_path / "flat" / f"{i}.png").write_bytes(synth.png(image))
    assert not ImageDataset(str(tmp_path / "flat")).has_labels


def test_zipped_folder_and_rare_compression(tmp_path):
    members = {f"out/{i:06d}.png": synth.png(image) for i, image in enumerate(synth.pictures(2))}
    members["out/dataset.json"] = json.dumps({"labels": [["000001.png", 1], ["000000.png", 0]]}).encode()
    data = ImageDataset(str(synth.make_zip(tmp_path / "a.zip", members, zipfile.ZIP_BZIP2)))
    np.testing.assert_array_equal(data.labels, [0, 1])
    np.testing.assert_array_equal(all_images(data), chw(synth.pictures(2)))


def test_subset_and_mirrors(archive):
    path, images, labels = archive
    part = ImageDataset(str(path), max_size=5, seed=3)
    assert len(part) == 5 and part.label_dim == 3
    again, other = (ImageDataset(str(path), max_size=5, seed=seed) for seed in (3, 4))
    assert part.file_names == again.file_names != other.file_names
    rows = [int(name[-6:-4]) for name in part.file_names]
    np.testing.assert_array_equal(part.labels, labels[rows])
    double = ImageDataset(str(path), max_size=5, seed=3, xflip=True)
    assert len(double) == 10 and double.file_names == part.file_names * 2
    expected = np.concatenate([chw(images)[rows], chw(images)[rows][..., ::-1]])
    np.testing.assert_array_equal(all_images(double), expected)
    np.testing.assert_array_equal(double.labels, np.tile(labels[rows], 2))
    double.load()
    np.testing.assert_array_equal(all_images(double), expected)
    np.testing.assert_array_equal(double.image(7), expected[7])


def test_opening_reads_one_image(archive, monkeypatch):
    read, original = [], reader.ArchiveReader._read_zip

    def spy(self, entry, member, limit):
        read.append(member)
        return original(self, entry, member, limit)

    monkeypatch.setattr(reader.ArchiveReader, "_read_zip", spy)
    ImageDataset(str(archive[0]))
    assert read == ["dataset.json", 0]


# ---------------------------------------------------------------------------------------------------------------------
# The stream.


def take(stream, n):
    batches = [next(stream) for _ in range(n)]
    stream.close()
    return torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("xflip", [False, True])
def test_stream_visits_all_once_per_epoch(archive, xflip):
    data = ImageDataset(str(archive[0]), xflip=xflip)
    n = len(data)
    images, labels = take(BatchStream(data, 1, seed=5), 3 * n)
    everything = sorted(x.numpy().tobytes() for x in data.images(range(n)))
    orders = []
    for epoch in range(3):
        part = [x.numpy().tobytes() for x in images[epoch * n : (epoch + 1) * n]]
        assert sorted(part) == everything
        orders.append(tuple(part))
    assert len(set(orders)) == 3
    table = {data.image(i).tobytes(): data.onehot([i])[0].tolist() for i in range(n)}
    assert all(table[x.numpy().tobytes()] == y.tolist() for x, y in zip(images, labels, strict=True))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    start=st.integers(0, 60), batch=st.integers(1, 25), world=st.integers(1, 4), seed=st.integers(0, 2**40),
    workers=st.integers(1, 3), cache=st.booleans(), limit=st.sampled_from([0, 1 << 30]), xflip=st.booleans(),
)  # fmt: skip
def test_stream_is_independent_of_everything_but_seed_and_position(
    archive, start, batch, world, seed, workers, cache, limit, xflip
):
    data = ImageDataset(str(archive[0]), xflip=xflip)
    n = 3 * batch * world
    images, labels = take(BatchStream(data, 1, seed=seed), start + n)
    expected = images[start:], labels[start:]
    data = ImageDataset(str(archive[0]), xflip=xflip, cache=cache)
    streams = [BatchStream(data, batch, rank, world, seed, start, "cpu", workers, limit) for rank in range(world)]
    steps = [[(*next(stream), stream.items) for stream in streams] for _ in range(3)]
    for step in steps:  # `items` names the items of a batch, whether the images are kept or not
        assert all(same((images, labels), (data.images_on("cpu", i), data.onehot(i))) for images, labels, i in step)
    for stream in streams:
        stream.close()
    found = tuple(torch.cat([share[i] for step in steps for share in step]) for i in (0, 1))
    assert same(found, expected)
    assert found[0].dtype == torch.uint8 and found[1].dtype == torch.float32


def test_stream_of_chosen_items(archive):
    data = ImageDataset(str(archive[0]))
    images, _ = take(BatchStream(data, 2, indices=torch.tensor([1, 4, 7])), 3)
    assert sorted(x.tolist() for x in images) == sorted(data.images([1, 4, 7] * 2).tolist())
    with pytest.raises(dnnlib.UserError, match="no images"):
        BatchStream(data, 2, indices=[])


def test_stream_reports_a_damaged_image(archive, tmp_path):
    content = archive[0].read_bytes()
    where = content.index(synth.png(archive[1][6])) + 60
    (tmp_path / "bad.zip").write_bytes(content[:where] + bytes([content[where] ^ 255]) + content[where + 1 :])
    data = ImageDataset(str(tmp_path / "bad.zip"))
    for limit in (0, 1 << 30):
        with pytest.raises(dnnlib.UserError, match=r"bad\.zip: 00000/img00000006\.png: damaged"):
            take(BatchStream(data, 11, memory_limit=limit, workers=2), 1)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused. The message names the file, and the image if one image is at fault.

NAMES = ["00000/img00000000.png", "00000/img00000001.png"]


def with_labels(labels, **extra):
    return json.dumps({"labels": labels, **extra}).encode()


def two_images(**changes):
    members = {name: synth.png(image) for name, image in zip(NAMES, synth.pictures(2), strict=True)}
    members["dataset.json"] = with_labels([[NAMES[0], 0], [NAMES[1], 1]])
    return members | {name.replace("img1", NAMES[1]).replace("json", "dataset.json"): v for name, v in changes.items()}


BOMB = synth.png(synth.pictures(1)[0])
BOMB = BOMB[:16] + (60000).to_bytes(4, "big") * 2 + BOMB[24:]

BAD = {
    "no images": ({"readme.txt": b""}, "ZIP without images"),
    "json": (two_images(json=b"{"), "dataset.json: not valid JSON"),
    "json encoding": (two_images(json=b"\xff\xfe{"), "dataset.json: not valid JSON"),
    "no labels key": (two_images(json=b'{"classes": []}'), 'dataset.json: lacks "labels"'),
    "list": (two_images(json=b"[]"), 'dataset.json: lacks "labels"'),
    "comma": (two_images(json=b'{"labels": [["a.png", 0],\n ["b.png", 1],]}'), "not valid JSON, line 2, column 1"),
    "UTF-16": (two_images(json='{"labels": null}'.encode("utf-16")), "UTF-16, save as UTF-8"),
    "labels kind": (two_images(json=with_labels(5)), "must be a list of"),
    "pair": (two_images(json=with_labels([[NAMES[0], 0], [NAMES[1]]])), "must be a list of"),
    "absent file": (
        two_images(json=with_labels([[NAMES[0], 0], ["no.png", 1]])), f"1 labels for 2 images, none for '{NAMES[1]}'"),
    "missing file": (two_images(json=with_labels([[NAMES[0], 0]])), f"1 labels for 2 images, none for '{NAMES[1]}'"),
    "twice": (two_images(json=with_labels([[NAMES[0], 0], [NAMES[1], 1], [NAMES[1], 0]])), "listed twice"),
    "negative": (two_images(json=with_labels([[NAMES[0], 0], [NAMES[1], -1]])), "label -1 is negative"),
    "fraction": (two_images(json=with_labels([[NAMES[0], 0], [NAMES[1], 1.5]])), "label 1.5 is not an integer"),
    "text": (two_images(json=with_labels([[NAMES[0], 0], [NAMES[1], "cat"]])), 'label "cat" is not an integer'),
    "null": (two_images(json=with_labels([[NAMES[0], 0], [NAMES[1], None]])), "label null is not an integer"),
    "bool": (two_images(json=with_labels([[NAMES[0], 0], [NAMES[1], True]])), "label true is not an integer"),
    "huge": (two_images(json=with_labels([[NAMES[0], 0], [NAMES[1], 10**20]])), "too large"),
    "ragged": (two_images(json=with_labels([[NAMES[0], [0, 1]], [NAMES[1], [1]]])), "ragged"),
    "half ragged": (two_images(json=with_labels([[NAMES[0], 0], [NAMES[1], [1]]])), "ragged"),
    "vector text": (two_images(json=with_labels([[NAMES[0], ["a"]], [NAMES[1], ["b"]]])), "finite numbers"),
    "class names": (
        two_images(json=with_labels([[NAMES[0], 0], [NAMES[1], 2]], class_names=["a", "b"])), "has 2 names"),
    "class names kind": (two_images(json=with_labels([[NAMES[0], 0], [NAMES[1], 1]], class_names=3)), "list of str"),
    "size": (two_images(img1=synth.png(synth.pictures(1, 16)[0])), f"{NAMES[1]}: image is 16x16 with 3 channels"),
    "channels": (two_images(img1=synth.png(synth.pictures(1)[0], "L")), f"{NAMES[1]}: image is 8x8 with 1 channels"),
    "alpha": (two_images(img1=synth.png(synth.pictures(1, channels=4)[0])), f"{NAMES[1]}: has transparent pixels"),
    "gray alpha": (two_images(img1=synth.png(synth.pictures(1, channels=4)[0], "LA")), f"{NAMES[1]}: has transparent"),
    "16 bits": (two_images(img1=synth.png(synth.pictures(1)[0], "I;16")), f"{NAMES[1]}: has 16 bits"),
    "truncated": (two_images(img1=synth.png(synth.pictures(1)[0])[:100]), f"{NAMES[1]}: truncated"),
    "empty": (two_images(img1=b""), f"{NAMES[1]}: truncated"),
    "bomb": (two_images(img1=BOMB), f"{NAMES[1]}: 60000x60000 is more than"),
    "shape": ({"a.png": synth.png(synth.pictures(1)[0][:4])}, "images are 8x4, expected square"),
    "power of two": ({"a.png": synth.png(synth.pictures(1, 12)[0])}, "images are 12x12, expected square"),
}  # fmt: skip


@pytest.mark.parametrize(
    "labels, numbers, names",
    [
        ({NAMES[0]: 0, NAMES[1]: 1}, [0, 1], None),
        ({NAMES[0]: "dog", NAMES[1]: "cat"}, [1, 0], ["cat", "dog"]),
        ([[NAMES[1], "7"], [NAMES[0], "0"]], [0, 7], None),
        ([[NAMES[1], "07"], [NAMES[0], "10"]], [1, 0], ["07", "10"]),
        ([[NAMES[0], 0], ["gone.png", 5], [NAMES[1], 1]], [0, 1], None),
    ],
)
def test_labels_may_be_a_mapping_and_names_and_know_more(tmp_path, labels, numbers, names):
    data = ImageDataset(str(synth.make_zip(tmp_path / "a.zip", two_images(json=with_labels(labels)))))
    assert data.labels.tolist() == numbers and data.class_names == names
    said = ["has 1 name without an image" in note and "'gone.png'" in note for note in data.notes]
    assert said == [True] * ("gone.png" in str(labels))


def test_named_labels_follow_the_class_names_and_clean_labels_share_them(tmp_path):
    clean = {NAMES[0]: "owl", NAMES[1]: "cat"}
    json_text = with_labels({NAMES[0]: "dog", NAMES[1]: "cat"}, clean_labels=clean)
    data = ImageDataset(str(synth.make_zip(tmp_path / "a.zip", two_images(json=json_text))))
    assert data.class_names == ["cat", "dog", "owl"] and data.labels.tolist() == [1, 0]
    assert data.clean_labels.tolist() == [2, 0]
    json_text = with_labels({NAMES[0]: "dog", NAMES[1]: "cat"}, class_names=["dog", "owl", "cat"])
    data = ImageDataset(str(synth.make_zip(tmp_path / "b.zip", two_images(json=json_text))))
    assert data.labels.tolist() == [0, 2]
    json_text = with_labels({NAMES[0]: "dog", NAMES[1]: "cow"}, class_names=["dog", "owl", "cat"])
    with pytest.raises(dnnlib.UserError, match="1 of 2 different labels are none of the 3 classes: 'cow'"):
        ImageDataset(str(synth.make_zip(tmp_path / "c.zip", two_images(json=json_text))))


@pytest.mark.parametrize("name", BAD)
def test_bad_archives(tmp_path, name):
    members, message = BAD[name]
    path = synth.make_zip(tmp_path / "bad.zip", members)
    with pytest.raises(dnnlib.UserError) as caught:
        ImageDataset(str(path)).load()
    assert message in caught.value.message and str(path) in caught.value.message and "\n" not in caught.value.message


def test_bad_paths(tmp_path, archive):
    (tmp_path / "text.zip").write_text("hello")
    (tmp_path / "half.zip").write_bytes(archive[0].read_bytes()[:-50])
    (tmp_path / "empty").mkdir()
    for name, message in [("absent.zip", "No such file"), ("text.zip", "not a ZIP"), ("half.zip", "not a ZIP"),
                          ("empty", "folder without images"), ("text.zip/a.zip", "cannot be read")]:  # fmt: skip
        with pytest.raises(dnnlib.UserError, match=f"{name}.*{message}"):
            ImageDataset(str(tmp_path / name))
    with pytest.raises(dnnlib.UserError, match="8x8, expected 16x16"):
        ImageDataset(str(archive[0]), resolution=16)
    with pytest.raises(dnnlib.UserError, match="at least 1 image"):
        ImageDataset(str(archive[0]), max_size=0)
    odd = synth.make_archive(tmp_path / "odd.zip", synth.pictures(2, 12))
    assert ImageDataset(str(odd), square=False).image_shape == (3, 12, 12)


def test_nothing_travels_to_a_device_that_holds_the_data(archive, monkeypatch):
    """The device `meta` stands for any device. Between epochs no tensor is moved there."""
    data = ImageDataset(str(archive[0]))
    stream = BatchStream(data, 3, seed=1, device="meta")
    next(stream)
    monkeypatch.setattr(torch, "from_numpy", None)
    moved = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: moved.append(self.device.type) or self)
    for _ in range(2):
        images, labels = next(stream)
        assert (images.device.type, labels.device.type, stream.items.device.type) == ("meta",) * 3
    assert set(moved) <= {"meta"}


def test_a_gpu_gives_images_a_part_of_its_free_memory(archive, monkeypatch):
    data = ImageDataset(str(archive[0]))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * data.nbytes - 1, 1 << 40))
    assert not data.hold("cuda")
    monkeypatch.setattr(data, "load", lambda workers: torch.empty(0, device="meta"))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: self)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * data.nbytes, 1 << 40))
    assert data.hold("cuda")
