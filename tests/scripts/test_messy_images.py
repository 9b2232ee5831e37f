"""Images as people have them: turned, transparent, oblong, damaged. What dataset_tool.py makes of them, and refuses."""

import csv
import re
import zipfile

import numpy as np
import PIL.Image
import pytest

import dnnlib
from archives import encoder
from archives.build import build_archive
from archives.dataset import ImageDataset
from archives.decode import DamagedFile
from archives.relabel import replace_labels
from archives.source import Source
from archives.sources import open_source
from archives.writer import ArchiveWriter, make_transform
from tests.support import synth
from tests.support.synth import run_dataset_tool as run

RGB = synth.pictures(4)
RED_ON_TOP = np.zeros((16, 16, 3), np.uint8)
RED_ON_TOP[:8] = 255, 0, 0


def put(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = image if isinstance(image, PIL.Image.Image) else PIL.Image.fromarray(image)
    picture.save(path, **options)


def exif(orientation):
    found = PIL.Image.Exif()
    found[0x0112] = orientation
    return found


def build(source, *args, dest=None):
    """Return the pixels [N, H, W, C] of the archive that the tool makes, and what it prints on stdout and stderr."""
    dest = dest or source.parent / "out.zip"
    code, out, err = run(f"--source={source}", f"--dest={dest}", *args)
    assert code == 0, err
    return pixels_of(dest), out, err


def pixels_of(path):
    data = ImageDataset(str(path))
    return data.images(range(len(data))).numpy().transpose(0, 2, 3, 1)


def refused(*args):
    code, out, err = run(*args)
    assert code == 1 and not out and err.count("\n") == 1, err
    return err


# ---- orientation


TURNS = {3: "ROTATE_180", 6: "ROTATE_90", 8: "ROTATE_270", 5: "TRANSPOSE"}


@pytest.mark.parametrize("tag, kind", [(3, "jpg"), (6, "jpg"), (3, "png"), (8, "webp"), (5, "tif")])
def test_images_are_upright_in_archives_and_in_folders(tmp_path, tag, kind):
    picture = PIL.Image.fromarray(RED_ON_TOP).transpose(PIL.Image.Transpose[TURNS[tag]])
    put(tmp_path / f"in/0.{kind}", picture, exif=exif(tag))
    pixels, _, _ = build(tmp_path / "in")
    np.testing.assert_allclose(pixels[0].astype(int)[[2, 13]], RED_ON_TOP.astype(int)[[2, 13]], atol=10)
    # Training can read a folder that never was an archive.
    np.testing.assert_array_equal(pixels_of(tmp_path / "in"), pixels)


def test_images_are_turned_before_they_are_cut_and_measured(tmp_path):
    tall = np.zeros((32, 16, 3), np.uint8)
    tall[8:24] = 255, 0, 0
    put(tmp_path / "in/0.png", PIL.Image.fromarray(tall).transpose(PIL.Image.Transpose.ROTATE_90), exif=exif(6))
    assert "0.png: is 16x32, images must be square" in refused(f"--source={tmp_path}/in", f"--dest={tmp_path}/a.zip")
    pixels, _, _ = build(tmp_path / "in", "--transform=center-crop-wide", "--resolution=16x8")
    assert pixels.shape == (1, 16, 16, 3) and (pixels[0, 4:12] == [255, 0, 0]).all()


# ---- transparency


def test_alpha_that_hides_nothing_is_dropped(tmp_path):
    put(tmp_path / "in/0.png", PIL.Image.fromarray(RGB[0]).convert("RGBA"))
    pixels, _, _ = build(tmp_path / "in")
    np.testing.assert_array_equal(pixels[0], RGB[0])


def with_hidden_magenta():
    picture = PIL.Image.new("P", (8, 8), 1)
    picture.putpalette([255, 0, 255, 255, 255, 255])
    picture.putpixel((0, 0), 0)
    return picture


@pytest.mark.parametrize("color, value", [("white", [255] * 3), ("black", [0] * 3), ("1,20,255", [1, 20, 255]),
                                          ("WHITE", [255] * 3), (" 7, 8 ,9", [7, 8, 9])])  # fmt: skip
def test_transparent_pixels_show_the_background(tmp_path, color, value):
    put(tmp_path / "in/0.png", with_hidden_magenta(), transparency=0)
    put(tmp_path / "in/1.png", np.dstack([RGB[1], np.full((8, 8), 0, np.uint8)]))
    pixels, _, _ = build(tmp_path / "in", f"--background={color}")
    assert pixels[0, 0, 0].tolist() == value and (pixels[0].reshape(-1, 3)[1:] == 255).all()
    assert (pixels[1] == value).all()


def test_without_a_background_transparent_pixels_are_refused(tmp_path):
    put(tmp_path / "in/0.png", RGB[0])
    put(tmp_path / "in/1.png", with_hidden_magenta(), transparency=0)
    err = refused(f"--source={tmp_path}/in", f"--dest={tmp_path}/a.zip", "--skip_damaged")
    assert "1.png: has transparent pixels" in err and "--background=white" in err
    with pytest.raises(dnnlib.UserError, match="1.png: has transparent pixels.*dataset_tool.py --background"):
        ImageDataset(str(tmp_path / "in")).load()


@pytest.mark.parametrize("color", ["red", "1,2", "1,2,256", "-1,0,0", "1.5,2,3", ""])
def test_colors_that_are_none(tmp_path, color):
    code, _, err = run("--source=digits", f"--dest={tmp_path}/a.zip", f"--background={color}")
    assert code == 2 and "--background" in err and err.count("\n") == 1


def test_outliers_show_the_background(tmp_path):
    put(tmp_path / "in/0.png", RGB[0])
    put(tmp_path / "other/0.png", np.dstack([RGB[1], np.zeros((8, 8), np.uint8)]))
    args = [f"--outliers={tmp_path}/other", "--perturb_percent=100"]
    assert "0.png: has transparent" in refused(f"--source={tmp_path}/in", f"--dest={tmp_path}/a.zip", *args)
    pixels, _, _ = build(tmp_path / "in", *args, "--background=1,2,3")
    assert (pixels[0] == [1, 2, 3]).all()


def test_shards_show_the_background(tmp_path):
    for i in range(2):
        put(tmp_path / f"in{i}/0.png", np.dstack([RGB[i], np.zeros((8, 8), np.uint8)]))
    pixels, _, _ = build(tmp_path / "in*", "--background=1,2,3", dest=tmp_path / "out.zip")
    assert (pixels == [1, 2, 3]).all() and len(pixels) == 2


# ---- other shapes


def test_squashing_is_mentioned_and_padding_keeps_the_shape(tmp_path):
    put(tmp_path / "in/0.png", np.full((8, 16, 3), 200, np.uint8))
    put(tmp_path / "in/1.png", np.full((16, 16, 3), 200, np.uint8))
    put(tmp_path / "in/2.png", np.full((16, 4, 3), 200, np.uint8))
    _, _, err = build(tmp_path / "in", "--resolution=8x8")
    assert (
        err.startswith("Note: 2 of 3 images are not square and were squashed") and "pad" in err and "center-crop" in err
    )
    for args, color in (((), 0), (("--background=9,9,9",), 9)):
        pixels, _, err = build(tmp_path / "in", "--transform=pad", "--resolution=8x8", *args, "--overwrite")
        assert not err
        wide, square, tall = (pixels == 200).all(axis=3)
        assert wide[2:6].all() and wide.sum() == 32 and square.all() and tall[:, 3:5].all() and tall.sum() == 16
        assert set(np.unique(pixels)) == {color, 200}
    (tmp_path / "in/2.png").unlink()
    for transform in ("center-crop", "pad"):
        assert not build(tmp_path / "in", f"--transform={transform}", "--resolution=8x8", "--overwrite")[2]
    assert (
        "squashed" not in build(synth.make_archive(tmp_path / "square.zip", RGB), "--resolution=4x4", "--overwrite")[2]
    )


@pytest.mark.parametrize("transform, number", [("center-crop", 2), ("center-crop-wide", 0), ("pad", 1), (None, 2)])
def test_enlarging_is_mentioned(tmp_path, transform, number):
    for i, shape in enumerate([(8, 8, 3), (8, 16, 3), (16, 16, 3), (20, 40, 3)]):
        put(tmp_path / f"in/{i}.png", np.full(shape, 200, np.uint8))
    _, out, err = build(tmp_path / "in", "--resolution=16x16", *([f"--transform={transform}"] if transform else []))
    note = f"{number} of 4 images are smaller than the resolution and were enlarged (a lower --resolution avoids that)"
    assert note in err if number else ("enlarged" not in err and "1 (3 too small)" in out)


def test_padding_of_extreme_shapes_and_of_gray():
    pad = make_transform("pad", (8, 8), (255, 0, 0))
    assert (pad(np.full((1, 100, 3), 5, np.uint8)) == 5).all(axis=2).sum() == 8  # one row at least
    assert (pad(np.full((2, 2, 3), 5, np.uint8)) == 5).all()  # small images grow
    gray = pad(np.full((4, 8, 1), 5, np.uint8))
    assert gray.shape == (8, 8, 1) and (gray[:2] == 76).all() and (gray[2:6] == 5).all()  # 0.299 * 255


@pytest.mark.parametrize("args, message", [(["--transform=pad"], "--transform=pad needs --resolution"),
                                           (["--transform=pad", "--resolution=16x8"], "must be square")])  # fmt: skip
def test_padding_needs_a_square(tmp_path, args, message):
    code, _, err = run("--source=digits", f"--dest={tmp_path}/a.zip", *args)
    assert code == 2 and message in err


# ---- damage

DAMAGE = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "another format": lambda data: b"<html>not found</html>",
    "one bit": lambda data: data[:60] + bytes([data[60] ^ 4]) + data[61:],
}


def scrape(folder, broken, count=6):
    """Write labeled images, of which some are `broken`: {index: kind of damage}."""
    for i in range(count):
        data = synth.png(synth.pictures(1, seed=i)[0])
        path = folder / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(DAMAGE[broken[i]](data) if i in broken else data)
    return folder


@pytest.mark.parametrize("workers", [1, 3])
def test_damaged_images_are_counted_before_the_refusal(tmp_path, workers, monkeypatch):
    source = scrape(tmp_path / "in", dict(enumerate(DAMAGE, 1)))
    monkeypatch.setattr(encoder, "PART", 1)  # each image is a task
    args = [f"--source={source}", f"--dest={tmp_path}/a.zip", f"--workers={workers}"]
    err = refused(*args)
    assert "in: cat/2.png: truncated or damaged image; of 6 images 4 are damaged: leave them out with" in err
    assert "--skip_damaged" in err and [p.name for p in tmp_path.iterdir()] == ["in"]
    (source / "dog/1.png").write_bytes(synth.png(RGB[0]))
    (source / "dog/3.png").unlink()
    (source / "cat/4.png").unlink()
    assert "cat/2.png: truncated or damaged image; of 4 images it is the only damaged one: leave it out" in refused(
        *args
    )


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_damaged_images_are_left_out_and_listed(tmp_path, kind):
    source = scrape(tmp_path / "in", {0: "truncated", 3: "another format"})  # cat/0, cat/2, cat/4, dog/1, dog/3, dog/5
    dest = tmp_path / ("out.zip" if kind == "zip" else "out")
    pixels, out, err = build(source, "--skip_damaged", dest=dest)
    assert not err and "Images:      4\n" in out and "Damaged:     2 more, left out, see" in out
    assert str(tmp_path / "out-skipped.csv") in out
    expected = [synth.pictures(1, seed=i)[0] for i in (2, 4, 1, 5)]
    np.testing.assert_array_equal(pixels, expected)
    np.testing.assert_array_equal(ImageDataset(str(dest)).labels, [0, 0, 1, 1])
    rows = list(csv.reader((tmp_path / "out-skipped.csv").open()))
    assert rows[:2] == [["file", "problem"], ["cat/0.png", "truncated or damaged image"]] and len(rows) == 3
    assert rows[2][0] == "dog/3.png" and rows[2][1].startswith("not an image in a supported format (PNG, JPEG, ")


def test_bytes_of_the_rest_do_not_change(tmp_path):
    """Leaving out a damaged image gives the same archive as deleting its file."""
    source = scrape(tmp_path / "in", {0: "truncated", 3: "empty"})
    build(source, "--skip_damaged", "--noise_type=sym", "--noise_rate=0.5", dest=tmp_path / "a.zip")
    for name in ("cat/0.png", "dog/3.png"):
        (source / name).unlink()
    build(source, "--noise_type=sym", "--noise_rate=0.5", dest=tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    mine = tmp_path / "c-skipped.csv"
    mine.write_text("date,mood\n")
    build(source, dest=tmp_path / "c.zip")
    build(source, "--overwrite", dest=tmp_path / "c.zip")
    code, _, err = synth.run_dataset_tool(
        f"--source={source}", f"--dest={tmp_path}/c.zip", *("--skip_damaged", "--overwrite")
    )
    assert code == 1 and "c-skipped.csv: exists already" in err and mine.read_text() == "date,mood\n"
    mine.unlink()
    build(source, "--skip_damaged", "--overwrite", dest=tmp_path / "c.zip")
    assert not mine.exists()


def test_a_member_that_a_zip_has_lost(tmp_path):
    path = synth.make_archive(tmp_path / "in.zip", RGB)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.infolist()[1]
    data[info.header_offset + 100] ^= 1  # its checksum no longer fits
    path.write_bytes(data)
    assert f"{info.filename}: damaged (or encrypted) in the ZIP; of 4 images it is the only" in refused(
        f"--source={path}", f"--dest={tmp_path}/out.zip"
    )
    pixels, _, _ = build(path, "--skip_damaged")
    np.testing.assert_array_equal(pixels, RGB[[0, 2, 3]])
    with pytest.raises(dnnlib.UserError, match="img00000001.png: damaged"):
        ImageDataset(str(path)).load()


def test_damaged_outliers_are_refused(tmp_path):
    """Leaving them out would leave out images that are not damaged, and change the share of outliers."""
    source, other = synth.make_archive(tmp_path / "in.zip", RGB), scrape(tmp_path / "other", {3: "empty"}, 4)
    args = [f"--source={source}", f"--dest={tmp_path}/out.zip", f"--outliers={other}", "--perturb_percent=100"]
    for more in ([], ["--skip_damaged"]):
        assert "other: dog/3.png: truncated or damaged image; make an archive of the outliers" in refused(*args, *more)


def test_the_first_image_of_a_shard_is_damaged(tmp_path):
    scrape(tmp_path / "in0", {})
    scrape(tmp_path / "in1", {0: "empty"})
    pixels, _, _ = build(tmp_path / "in*", "--skip_damaged", dest=tmp_path / "out.zip")
    assert len(pixels) == 11


def test_all_images_are_damaged(tmp_path):
    source = scrape(tmp_path / "in", dict.fromkeys(range(6), "empty"))
    for args in ((), ("--skip_damaged",)):
        err = refused(f"--source={source}", f"--dest={tmp_path}/a.zip", *args)
        assert "cat/0.png: truncated or damaged image, and so are all 6 images" in err


def test_after_the_first_damage_images_are_only_counted(tmp_path, monkeypatch):
    """What would be thrown away is not encoded: a large set is counted faster than built."""
    encoded = []
    monkeypatch.setattr(encoder, "encode_png", lambda image: encoded.append(image) or b"")

    def image(index):
        if index % 10 == 5:
            raise DamagedFile(f"x: {index}")
        return RGB[0]

    with pytest.raises(dnnlib.UserError, match="x: 5: truncated or damaged image; of 40 images 4 are damaged"):
        build_archive(Source("x", 40, image), str(tmp_path / "a.zip"), make_transform(None, None), workers=1)
    assert len(encoded) == 5


# ---- archives that are there


def test_an_archive_is_replaced_only_on_request(tmp_path):
    for dest in (tmp_path / "a.zip", tmp_path / "a"):
        build(synth.make_archive(tmp_path / "in.zip", RGB), dest=dest)
        before = sorted((p.name, p.stat().st_mtime_ns) for p in [dest, *dest.rglob("*")])
        err = refused("--source=digits", f"--dest={dest}")
        assert err.startswith(f"Error: --dest: {dest}: ") and "--overwrite" in err
        assert sorted((p.name, p.stat().st_mtime_ns) for p in [dest, *dest.rglob("*")]) == before
        pixels, _, _ = build(tmp_path / "in.zip", "--max-images=2", "--overwrite", dest=dest)
        assert len(pixels) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "a.zip", "in.zip"]


@pytest.mark.parametrize("name", ["a.zip", "a"])
def test_a_failure_leaves_the_old_archive(tmp_path, name):
    build(synth.make_archive(tmp_path / "in.zip", RGB), dest=tmp_path / name)
    source = scrape(tmp_path / "in", {3: "empty"})
    refused(f"--source={source}", f"--dest={tmp_path / name}", "--overwrite")
    np.testing.assert_array_equal(pixels_of(tmp_path / name), RGB)
    with pytest.raises(OSError, match="full"), ArchiveWriter(str(tmp_path / name), overwrite=True) as archive:
        archive.add("00000/img00000000.png", synth.png(RGB[0]))
        raise OSError("full")
    np.testing.assert_array_equal(pixels_of(tmp_path / name), RGB)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, "in", "in.zip"])


def test_an_archive_can_replace_its_own_source(tmp_path):
    for dest in (tmp_path / "a.zip", tmp_path / "a"):
        build(synth.make_archive(tmp_path / "in.zip", RGB), dest=dest)
        pixels, _, _ = build(dest, "--channels=1", "--overwrite", dest=dest)
        assert pixels.shape == (4, 8, 8, 1)


# ---- the summary


def test_label_noise_that_nobody_added(tmp_path):
    source = scrape(tmp_path / "in", {})
    assert "Label noise: none added\n" in build(source)[1]
    assert "Label noise: none added\n" in build(tmp_path / "out.zip", dest=tmp_path / "again.zip")[1]
    noisy = build(source, "--noise_type=sym", "--noise_rate=1", dest=tmp_path / "noisy.zip")[1]
    assert "Label noise: 100.00% of the labels" in noisy
    assert "100.00%" in build(tmp_path / "noisy.zip", dest=tmp_path / "noisy again.zip")[1]


# ---- several frames


def animate(folder, frames=3):
    """Write images of one and of several frames in every format that has them: {name: whether it has several}."""
    first, *rest = (PIL.Image.fromarray(image) for image in synth.pictures(frames))
    found = {}
    for kind, options in (("gif", {}), ("webp", dict(lossless=True)), ("png", {}), ("tif", {})):
        put(folder / f"a.{kind}", first, save_all=True, append_images=rest, **options)
        put(folder / f"b.{kind}", first, **options)
        found |= {f"a.{kind}": True, f"b.{kind}": False}
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_of_several_frames_the_first_is_taken_and_that_is_said_once(tmp_path, workers, monkeypatch):
    names = animate(tmp_path / "in")
    monkeypatch.setattr(encoder, "PART", 1)  # each image is a task
    pixels, _, err = build(tmp_path / "in", f"--workers={workers}")
    for name, found in zip(sorted(names), pixels, strict=True):
        if not name.endswith("gif"):  # a palette loses colors
            np.testing.assert_array_equal(found, RGB[0], err_msg=name)
    several = sorted(name for name in names if names[name])
    shown = ", ".join(f"'{name}'" for name in several[:3])
    assert err.splitlines() == [
        f"Note: {tmp_path}/in: 4 files with several frames or pages, of which the first was taken: {shown} and 1 more"
    ]


def test_a_photograph_with_a_preview_has_one_frame(tmp_path):
    """Phones write maps and previews behind the photograph (MPO), in files called .jpg."""
    first, second = map(PIL.Image.fromarray, RGB[:2])
    put(tmp_path / "in/0.jpg", first, format="MPO", save_all=True, append_images=[second])
    assert not build(tmp_path / "in")[2]


def test_a_damaged_second_frame_does_not_matter_and_outliers_count(tmp_path):
    animate(tmp_path / "other")
    for path in (tmp_path / "other").iterdir():
        if path.name != "a.gif":
            path.unlink()
    data = (tmp_path / "other/a.gif").read_bytes()
    (tmp_path / "other/a.gif").write_bytes(data[: len(data) * 2 // 3])
    source = synth.make_archive(tmp_path / "in.zip", RGB)
    _, _, err = build(source, f"--outliers={tmp_path}/other", "--perturb_percent=25")
    assert f"1 file with several frames or pages, of which the first was taken: '{tmp_path}/other: a.gif'" in err


# ---- what is said, and when


def test_a_failed_run_says_nothing_but_the_error(tmp_path):
    source = scrape(tmp_path / "in", {})
    put(source / "preview.png", RGB[0])
    note = "Note: .*preview.png"
    _, _, err = build(source)
    assert re.match(note, err)
    (source / "cat/2.png").write_bytes(b"")
    assert refused(f"--source={source}", f"--dest={tmp_path}/a.zip").startswith("Error: ")


# ---- tables that name only the good files


def listed(folder, names, label=lambda name: name.split("/")[0], file="labels.csv"):
    (folder / file).write_text("file,label\n" + "".join(f"{name},{label(name)}\n" for name in names))
    return folder / file


def test_a_damaged_file_that_is_left_out_needs_no_label(tmp_path):
    source = scrape(tmp_path / "in", {0: "truncated", 3: "empty"})
    good = ["cat/2.png", "cat/4.png", "dog/1.png", "dog/5.png"]
    table = listed(tmp_path, good)
    args = [f"--source={source}", f"--dest={tmp_path}/out.zip"]
    for option in ("--labels", "--clean_labels"):
        assert "has no label for 2 of the 6 images: 'cat/0.png', 'dog/3.png'" in refused(
            *args, f"{option}={table}", "--overwrite"
        )
        pixels, out, _ = build(source, f"{option}={table}", "--skip_damaged", "--overwrite")
        assert len(pixels) == 4 and "Damaged:     2 more" in out and "cat (2), dog (2)" in out
    assert "0.00% of the labels are wrong, by the clean labels, as declared" in out
    # An image that could be had still needs one.
    fewer = listed(tmp_path, good[:3], file="fewer.csv")
    assert "has no label for 3 of the 6 images" in refused(*args, f"--labels={fewer}", "--skip_damaged", "--overwrite")
    # Labels that equal the clean ones are not noisy: damaged images must not make them so.
    build(source, f"--clean_labels={table}", "--skip_damaged", "--noise_type=sym", "--noise_rate=0.5", "--overwrite")


def test_a_damaged_file_brings_no_class(tmp_path):
    for i in range(4):
        put(tmp_path / f"in/{i}.png", RGB[i])
    (tmp_path / "in/0.png").write_bytes(b"")
    table = listed(tmp_path, ["1.png", "2.png", "3.png"], lambda name: name[0])
    source = open_source(str(tmp_path / "in"))
    replace_labels(source, str(table), skip_damaged=True)
    assert source.length == 4 and source.labels[1:].tolist() == [1, 2, 3] and source.labels[0] in (1, 2, 3)


# ---- labels that are replaced need not be right


def test_a_table_replaces_labels_that_are_no_good(tmp_path):
    """What an error recommends must work: here the tables' advice, and naming the labels of a set with parts."""
    source = scrape(tmp_path / "in", {}, 4)
    table = listed(source, ["cat/0.png", "cat/2.png", "dog/1.png"], file="metadata.csv")
    table.write_text(table.read_text().replace("file,", "file_name,"))
    args = [f"--source={source}", f"--dest={tmp_path}/out.zip"]
    assert "leave them out with dataset_tool.py --labels=FILE --skip_unlabeled" in refused(*args)
    pixels, out, err = build(source, f"--labels={table}", "--skip_unlabeled")
    assert len(pixels) == 3 and "cat (2), dog (1)" in out and "so these labels are not used" in err
    table.unlink()
    for old, new in (("cat", "train"), ("dog", "test")):
        (source / old).rename(source / new)
    assert "are parts of a data set" in refused(*args, "--overwrite")
    names = ["test/1.png", "test/3.png", "train/0.png", "train/2.png"]
    table = listed(tmp_path, names, lambda name: "cat" if name[-5] in "12" else "dog")
    _, out, _ = build(source, f"--labels={table}", "--overwrite")
    assert "cat (2), dog (2)" in out


def test_outliers_need_no_labels(tmp_path):
    other = scrape(tmp_path / "other", {}, 4)
    for old, new in (("cat", "train"), ("dog", "test")):
        (other / old).rename(other / new)
    pixels, _, _ = build(synth.make_archive(tmp_path / "in.zip", RGB), f"--outliers={other}", "--perturb_percent=50")
    assert len(pixels) == 4
