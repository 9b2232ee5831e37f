"""Other labels for a source, without taking the old ones for the truth; original paths stay with the images."""

import json

import numpy as np
import pytest
import torch

import dnnlib
from archives.dataset import ImageDataset
from archives.label_file import LabelFile
from archives.label_table import load_labels_or_table, save_label_table
from archives.relabel import declare_clean, replace_labels
from tests.support import synth
from tests.support.sources import LABELS, NAMES, build, folder, make_source, write
from tests.support.synth import run_dataset_tool as run


def test_replaced_labels_are_kept_but_are_not_the_truth(tmp_path):
    source = folder(tmp_path)
    table = write(tmp_path / "l.csv", "file,label\ncat/a.png,dog\ndog/b.png,dog\nowl/d.png,owl\ndog/c.png,cat\n")
    data, record, shown = build(tmp_path, source, f"--labels={table}")
    assert data.labels.tolist() == [1, 1, 0, 2] and data.clean_labels is None and "clean_labels" not in record
    assert [label for _, label in record["previous_labels"]] == LABELS.tolist()
    assert record["corruption"]["noise_type"] == "imported" and record["corruption"]["realised_rate"] is None
    assert "2 of 4 labels differ" in shown and "do not count as clean" in shown
    # The old labels stay on record when the archive is copied.
    (tmp_path / "out.zip").rename(tmp_path / "first.zip")
    _, again, _ = build(tmp_path, tmp_path / "first.zip")
    assert again["previous_labels"] == record["previous_labels"] and again["source_names"] == record["source_names"]


@pytest.mark.parametrize("clean", ["source", "file"])
def test_clean_labels_are_those_that_are_declared(tmp_path, clean):
    source = folder(tmp_path)
    table = write(
        tmp_path / "l.csv",
        "file,label,true_label\ncat/a.png,dog,cat\ndog/b.png,dog,dog\nowl/d.png,owl,owl\ndog/c.png,cat,dog\n",
    )
    declared = f"--clean_labels={'source' if clean == 'source' else table}"
    data, record, _ = build(tmp_path, source, f"--labels={table}", declared)
    assert data.labels.tolist() == [1, 1, 0, 2] and data.clean_labels.tolist() == [0, 1, 1, 2]
    assert record["corruption"]["clean_labels"] == "declared" and record["corruption"]["realised_rate"] == 0.5
    assert data.truth == "clean labels, as declared"


def test_cifar_n_with_its_clean_labels(tmp_path):
    cifar, _, labels = synth.make_cifar10(tmp_path / "c.tar.gz", per_batch=4)
    torch.save(dict(clean_label=labels, worse_label=(labels + 1) % 10), tmp_path / "human.pt")
    args = [f"--labels={tmp_path}/human.pt", "--label_key=worse_label", f"--clean_labels={tmp_path}/human.pt"]
    data, _, _ = build(tmp_path, cifar, *args)
    assert data.labels.tolist() == ((labels + 1) % 10).tolist() and data.clean_labels.tolist() == labels.tolist()


def test_suggestions_of_a_label_file_are_matched_by_name(tmp_path):
    path = synth.make_archive(tmp_path / "a.zip", synth.pictures(3), [0, 1, 1])
    names = [f"00000/img{i:08d}.png" for i in (2, 1, 0, 9)]
    np.savez(tmp_path / "l.npz", names=names, labels=[1, 1, 0, 0], suggested=[0, 1, 1, 0], is_clean=[0, 1, 0, 1])
    data, record, _ = build(tmp_path, path, f"--labels={tmp_path}/l.npz", "--label_key=suggested")
    assert data.labels.tolist() == [1, 1, 0] and data.clean_labels is None
    assert [label for _, label in record["previous_labels"]] == [0, 1, 1]


def test_noise_on_top_of_replaced_labels_has_these_as_truth(tmp_path):
    np.save(tmp_path / "l.npy", LABELS[::-1])
    data, _, _ = build(tmp_path, folder(tmp_path), f"--labels={tmp_path}/l.npy", "--noise_type=pair", "--noise_rate=1")
    assert data.clean_labels.tolist() == LABELS[::-1].tolist() and data.truth == "clean labels, from before the noise"


def test_images_without_a_label_are_left_out_when_asked_for(tmp_path):
    source = folder(tmp_path)
    table = write(tmp_path / "l.csv", "file,label\nowl/d.png,owl\ncat/a.png,dog\n")
    code, _, err = run(f"--source={source}", f"--dest={tmp_path}/o.zip", f"--labels={table}")
    assert code == 1 and "no label for 2 of the 4 images: 'dog/b.png', 'dog/c.png'" in err and err.count("\n") == 1
    data, record, shown = build(tmp_path, source, f"--labels={table}", "--skip_unlabeled")
    assert data.labels.tolist() == [1, 2] and "2 images without a label left out" in shown
    assert [path for _, path in record["source_names"]] == ["cat/a.png", "owl/d.png"]


def test_other_classes_replace_folders_but_not_a_record(tmp_path):
    table = write(tmp_path / "l.csv", "a.jpg,red\nb.jpg,blue\nc.jpg,blue\nd.jpg,red\n")
    source = make_source()
    replace_labels(source, table)
    assert source.class_names == ["blue", "red"] and source.labels.tolist() == [1, 0, 0, 1]
    assert source.previous_labels is None and "given up: 'cat', 'dog', 'owl'" in " ".join(source.notes)
    with pytest.raises(dnnlib.UserError, match="to which the clean labels on record belong"):
        replace_labels(make_source(clean_labels=LABELS), table)
    # Numbers without names: nobody knows whether class 0 was "blue", so they are not compared with the new ones.
    source = make_source(class_names=None)
    replace_labels(source, table)
    assert source.previous_labels is None and "given up: numbers from 0 to 2" in " ".join(source.notes)
    with pytest.raises(dnnlib.UserError, match="had no labels of these classes"):
        declare_clean(source, "source", None, replaced=True)
    with pytest.raises(dnnlib.UserError, match="its classes are numbers from 0 to 2"):
        replace_labels(make_source(class_names=None, clean_labels=LABELS), table)
    typo = write(tmp_path / "t.csv", "a.jpg,cat\nb.jpg,dgo\nc.jpg,dog\nd.jpg,owl\n")
    with pytest.raises(dnnlib.UserError, match="1 of 4 different labels are none of the 3 classes: 'dgo'"):
        replace_labels(make_source(), typo)


def test_clean_labels_may_have_a_class_that_no_label_has(tmp_path):
    source = make_source()
    declare_clean(source, write(tmp_path / "c.csv", "a.jpg,cat\nb.jpg,ant\nc.jpg,dog\nd.jpg,owl\n"), None, False)
    assert source.class_names == ["cat", "dog", "owl", "ant"] and source.clean_labels.tolist() == [0, 3, 1, 2]
    assert source.labels.tolist() == LABELS.tolist()


def test_lines_without_names_count_only_where_images_have_none(tmp_path):
    table = write(tmp_path / "l.csv", "label\n2\n1\n0\n1\n")
    source = make_source(names=None)
    replace_labels(source, table)
    assert source.labels.tolist() == [2, 1, 0, 1] and "in the order of the images" in source.notes[0]
    with pytest.raises(dnnlib.UserError, match="names no files"):
        replace_labels(make_source(), table)


@pytest.mark.parametrize("options, words", [
    ("--clean_label_key=a", "needs --clean_labels=FILE"),
    ("--clean_label_key=a --clean_labels=source", "needs --clean_labels=FILE"),
    ("--skip_unlabeled", "--skip_unlabeled needs --labels=FILE"),
])  # fmt: skip
def test_options_that_need_others(tmp_path, options, words):
    code, _, err = run("--source=digits", f"--dest={tmp_path}/o.zip", *options.split())
    assert code == 2 and words in err


def test_decisions_and_the_labels_that_they_correct_are_not_both_right(tmp_path):
    """Labels that an earlier file replaced are on record here. They must not be taken for the source's own."""
    source = folder(tmp_path)
    names = [name.replace(".jpg", ".png") for name in NAMES]
    labels = write(tmp_path / "l.csv", "".join(f"{name},{i % 3}\n" for i, name in enumerate(names)))
    build(tmp_path, source, f"--labels={labels}")
    (tmp_path / "out.zip").rename(tmp_path / "first.zip")
    decisions = write(tmp_path / "d.csv", f"file,label,decision,new_label\n{names[0]},0,relabel,1\n")
    args = [f"--source={tmp_path}/first.zip", f"--dest={tmp_path}/o.zip", f"--labels={decisions}"]
    code, _, err = run(*args, "--skip_unlabeled")
    assert code == 1 and "images without one keep their labels: call dataset_tool.py without" in err
    code, _, err = run(*args, "--clean_labels=source")
    assert code == 1 and "holds decisions, which correct labels of the source" in err and err.count("\n") == 1
    clean = write(tmp_path / "c.csv", "".join(f"{name},{i % 3}\n" for i, name in enumerate(names)))
    assert run(*args, f"--clean_labels={clean}")[0] == 0
    (tmp_path / "o.zip").unlink()
    line = json.dumps(dict(file=names[0], label=0, decision="drop", new_label=None))
    args[2] = f"--labels={write(tmp_path / 'd.jsonl', line)}"
    assert run(*args)[0] == 0 and len(ImageDataset(str(tmp_path / "o.zip"))) == 3


def test_original_paths_stay_through_everything(tmp_path):
    source = folder(tmp_path)
    data, record, _ = build(tmp_path, source)
    paths = [name.replace(".jpg", ".png") for name in NAMES]
    assert data.source_names == paths and set(record) == {"labels", "class_names", "corruption", "source_names"}
    (tmp_path / "out.zip").rename(tmp_path / "first.zip")
    decisions = write(tmp_path / "d.csv", "file,label,decision,new_label\ndog/c.png,dog,drop,\n")
    data, _, _ = build(tmp_path, tmp_path / "first.zip", f"--labels={decisions}")
    assert data.source_names == [paths[i] for i in (0, 1, 3)] and data.file_names[2] == "00000/img00000002.png"
    labels = write(tmp_path / "l.csv", "".join(f"{path},{i % 3}\n" for i, path in enumerate(paths)))
    data, _, _ = build(tmp_path, tmp_path / "first.zip", f"--labels={labels}")
    assert data.labels.tolist() == [0, 1, 2, 0]


def test_an_archive_in_an_archive_keeps_the_first_names(tmp_path):
    build(tmp_path, folder(tmp_path))
    (tmp_path / "out.zip").rename(tmp_path / "first.zip")
    both = ImageDataset(f"{tmp_path}/first.zip,{synth.make_archive(tmp_path / 'b.zip', synth.pictures(2), [0, 1], class_names=['cat', 'dog', 'owl'])}")  # fmt: skip # noqa: E501
    assert both.source_names[3:] == [
        "first.zip/owl/d.png",
        "b.zip/00000/img00000000.png",
        "b.zip/00000/img00000001.png",
    ]
    assert both.shown_name(0) == f"{tmp_path}/first.zip: 00000/img00000000.png (cat/a.png)"


def test_messages_name_the_original_path(tmp_path):
    pairs = [["00000/img00000001.png", "cat/x.jpg"], ["gone.png", "y"]]
    images = {f"00000/img{i:08d}.png": synth.png(image) for i, image in enumerate(synth.pictures(2))}
    images["00000/img00000001.png"] = images["00000/img00000001.png"][:60]
    images["dataset.json"] = json.dumps({"labels": None, "source_names": pairs}).encode()
    data = ImageDataset(str(synth.make_zip(tmp_path / "a.zip", images)))
    assert data.source_names == ["00000/img00000000.png", "cat/x.jpg"]
    with pytest.raises(dnnlib.UserError, match=r"a.zip: 00000/img00000001.png \(cat/x.jpg\): truncated"):
        data.image(1)


def test_paths_of_strangers_can_be_written(tmp_path):
    """JSON can hold halves of characters and null characters, which no CSV holds."""
    names = [f"00000/img{i:08d}.png" for i in range(3)]
    odd = ["\ud800.png", "a\0b.png", "caf\u00e9.png"]
    pairs = [list(pair) for pair in zip(names, odd, strict=True)]
    data = ImageDataset(str(synth.make_archive(tmp_path / "a.zip", synth.pictures(3), [0, 1, 1], source_names=pairs)))
    assert data.source_names == ["?.png", "a?b.png", odd[2]]
    flags = np.ones(3, bool)
    file = LabelFile(
        names, data.labels, flags, flags.astype(np.float32), data.labels, 0, np.zeros(2), data.source_names
    )
    save_label_table(tmp_path / "t.csv", file, None)
    assert load_labels_or_table(tmp_path / "t.csv", data).is_clean.all()


def test_the_table_of_a_detector_is_a_table_of_labels(tmp_path):
    """Cells that spreadsheets would take for formulas are guarded in it."""
    pairs = [["00000/img00000000.png", "=1.png"], ["00000/img00000001.png", "-2.png"]]
    path = synth.make_archive(
        tmp_path / "a.zip", synth.pictures(2), [0, 1], source_names=pairs, class_names=["+a", "b"]
    )
    data = ImageDataset(str(path))
    file = LabelFile(data.file_names, data.labels, np.zeros(2, bool), np.zeros(2, np.float32), 1 - data.labels, 1,
                     np.zeros(2), data.source_names)  # fmt: skip
    save_label_table(tmp_path / "t.csv", file, data.class_names)
    assert "'=1.png" in (tmp_path / "t.csv").read_text()
    data, record, _ = build(tmp_path, path, f"--labels={tmp_path}/t.csv", "--label_key=suggested_label")
    assert data.labels.tolist() == [1, 0] and data.source_names == ["=1.png", "-2.png"]


@pytest.mark.parametrize("value", [5, [["a"]], [["a.png", 5]], ["a"]])
def test_a_damaged_list_of_paths_hurts_only_those_who_need_it(tmp_path, value):
    path = synth.make_archive(tmp_path / "a.zip", synth.pictures(2), [0, 1], source_names=value)
    data = ImageDataset(str(path))
    assert data.labels.tolist() == [0, 1] and data.shown_name(0) == "00000/img00000000.png"
    with pytest.raises(dnnlib.UserError, match='"source_names": must be a list of'):
        assert data.source_names


def test_outliers_have_the_name_of_the_image_that_is_there(tmp_path):
    data, record, _ = build(
        tmp_path, folder(tmp_path), "--outliers=digits", "--perturb_percent=50", "--resolution=8x8", "--seed=1"
    )
    paths = np.array(data.source_names)
    assert all(path.startswith("digits: image ") for path in paths[data.outliers])
    assert all(path.endswith(".png") for path in paths[~data.outliers])


def test_a_flat_folder_with_a_table_beside_it(tmp_path):
    """As people scrape: images/ and labels.csv, whose names have no folders, with a damaged image and other files."""
    for i, image in enumerate(synth.pictures(4)):
        (tmp_path / "flat/images").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"flat/images/{i}.png").write_bytes(synth.png(image))
    (tmp_path / "flat/.DS_Store").write_bytes(b"\0\0\0\1Bud1")
    lines = ["file,label", "0.png,Dress", "1.png,Bag", "2.png,Dress", "3.png,Shirt", ""]
    table = write(tmp_path / "flat/labels.csv", "\r\n".join(lines))
    data, _, shown = build(tmp_path, tmp_path / "flat")
    assert not data.has_labels and "'labels.csv' is not read" in shown and "flat/labels.csv" in shown
    for source in ("flat", "flat/images"):
        data, _, shown = build(tmp_path, tmp_path / source, f"--labels={table}")
        assert data.class_names == ["Bag", "Dress", "Shirt"] and data.labels.tolist() == [1, 0, 1, 2]
        assert ("compared without folders" in shown) == (source == "flat")
        assert data.source_names[0] == ("images/0.png" if source == "flat" else "0.png")
