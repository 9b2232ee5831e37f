"""Decisions about single images: the CSV's rules and errors, and what dataset_tool.py and label files make of them."""

import json
import zipfile

import numpy as np
import pytest

import dnnlib
from archives.dataset import ImageDataset
from archives.decisions import Decisions, addresses, apply_to_labels, class_keys, holds_decisions, load_decisions
from archives.label_file import LabelFile, class_noise_rates, load_label_file
from archives.relabel import clean_source
from archives.sources import Source
from tests.support.synth import make_archive, pictures, run_dataset_tool
from training.objectives.discriminator import believed

NAMES = [f"img{i}.png" for i in range(6)]
LABELS = np.array([0, 1, 2, 1, 0, 1])
CLASSES = ["cat", "dog", "=1+1"]
HEADER = "file,label,decision,new_label\n"


def write(tmp_path, text, header=HEADER):
    path = tmp_path / "decisions.csv"
    path.write_bytes((header + text).encode())
    return str(path)


def load(path, names=NAMES, classes=CLASSES):
    return load_decisions(path, names, LABELS, classes, 3)


def test_lines_become_rows(tmp_path):
    text = "img4.png,cat,relabel,dog\r\nimg1.png,1,Keep,\r\n\r\nimg2.png,'=1+1,drop,\r\nimg5.png,dog,relabel,dog\r\n"
    found = load(write(tmp_path, text, "\ufeff" + HEADER))
    assert [found.keep.tolist(), found.relabel.tolist(), found.new_labels.tolist(), found.drop.tolist()] == [
        [1, 5], [4], [1], [2],
    ]  # fmt: skip


def test_tables_that_are_not_text_have_numbers_and_empty_cells(tmp_path):
    lines = [dict(file="img1.png", label=1, decision="keep"), dict(file="img0.png", label=0, decision="relabel")]
    lines[1]["new_label"] = 1
    path = tmp_path / "decisions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = load(str(path))
    assert [found.keep.tolist(), found.relabel.tolist(), found.new_labels.tolist()] == [[1], [0], [1]]


def test_names_may_hold_anything(tmp_path):
    names = ['a,"b".png', "=1.png", "'=1.png", "two\r\nlines.png", "'tis.png", "\u00e4.png"]
    guarded = ['a,""b"".png', "'=1.png", "''=1.png", "two\r\nlines.png", "'tis.png", "\u00e4.png"]
    lines = [f'"{name}",{label},drop,\n' for name, label in zip(guarded, LABELS, strict=True)]
    assert load(write(tmp_path, "".join(lines)), names, None).drop.tolist() == list(range(6))


def test_names_that_are_no_utf_8_are_what_the_browser_saves(tmp_path):
    names = ["\udce9t\udce9.png", "\udce8.png", "\udcea.png", "\ufffd.jpg", "\udce9.jpg", "x.png"]
    path = write(tmp_path, '"\ufffdt\ufffd.png",cat,drop,\n"\ufffd.jpg",dog,keep,\n')
    found = load(path, names)
    assert found.drop.tolist() == [0] and found.keep.tolist() == [3]
    with pytest.raises(dnnlib.UserError, match="not among"):  # may be two images
        load(write(tmp_path, '"\ufffd.png",dog,keep,\n'), names)


def test_a_number_is_no_class_where_names_are_numbers(tmp_path):
    path = write(tmp_path, "img0.png,001,relabel,1\n")  # what a spreadsheet makes of 001
    with pytest.raises(dnnlib.UserError, match="unknown class"):
        load(path, classes=["001", "002", "x"])


def test_classes_without_usable_names_go_by_number():
    assert class_keys(["a", "b"], 2) == ["a", "b"]
    for names in (None, ["a", "a"], ["a", ""], ["a", "b\n"], ["a", "\ud800"]):
        assert class_keys(names, 2) == ["0", "1"]


@pytest.mark.parametrize(
    "text, words",
    [
        ("x.png,cat,keep,\nimg0.png,cat,keep,\ny.png,cat,keep,\n", ["2 of 3 lines", "line 2", "x.png", "6 images"]),
        ("img0.png,cat,keep,\nimg1.png,cat,drop,\n", ["1 of 2", "line 3", "'cat' of 'img1.png'", "another archive"]),
        ("img0.png,lion,keep,\n", ["'lion'", "another archive"]),
        ("img0.png,cat,relabel,lion\n", ["unknown class", "lion", "cat, dog"]),
        ("img0.png,cat,relabel,\n", ["unknown class", "img0.png"]),
        ("img0.png,cat,relabel,3\n", ["unknown class", "'3'"]),
        ("img0.png,cat,delete,\n", ["delete", "keep, relabel, drop"]),
        ("img0.png,cat,keep,dog\n", ["'dog'", "not 'relabel'"]),
        ("img0.png,cat,keep,\nimg0.png,cat,drop,\n", ["1 of 2", "img0.png", "before"]),
        ("img0.png,cat,keep\n", ["line 2", "3 cells"]),
        ("", ["no decisions"]),
        ('img0.png,"cat,keep,\n', ["not a CSV"]),
        ("img0.png,cat,keep,\0\n", ["decisions.csv"]),
    ],
)
def test_what_is_refused(tmp_path, text, words):
    path = write(tmp_path, text)
    with pytest.raises(dnnlib.UserError) as error:
        load(path)
    assert path in error.value.message and all(word in error.value.message for word in words), error.value.message


def test_a_spreadsheet_may_use_semicolons_and_add_columns(tmp_path):
    path = write(tmp_path, "img1.png;dog;drop;;not a dog\n;;;;\n", "file;label;Decision;new_label;note\n")
    assert load(path).drop.tolist() == [1]


def test_images_are_called_by_original_paths_that_differ():
    paths = [f"dogs/{i}.jpg" for i in range(6)]
    assert addresses(NAMES, paths) == paths
    assert addresses(NAMES, None) == addresses(NAMES, ["dogs/0.jpg"] * 6) == NAMES


def test_decisions_that_were_applied_are_refused(tmp_path):
    """An archive without an image calls the images behind it as those before them were called."""
    source = make_archive(tmp_path / "a.zip", pictures(6), [0, 0, 0, 1, 1, 1])
    csv = write(tmp_path, "00000/img00000001.png,0,drop,\n")
    args = f"--dest={tmp_path / 'b.zip'}", f"--labels={csv}"
    assert run_dataset_tool(f"--source={source}", *args)[0] == 0
    (tmp_path / "b.zip").rename(tmp_path / "first.zip")
    code, _, err = run_dataset_tool(f"--source={tmp_path / 'first.zip'}", *args)
    assert code == 1 and "file '00000/img00000001.png'; images are called as '00000/img00000000.png' is" in err


def test_decisions_behind_the_line_that_excel_writes(tmp_path):
    path = tmp_path / "d.csv"
    for head in ("sep=,\r\n", '\ufeff"sep=,"\n'):
        path.write_text(f"{head}{HEADER}img0.png,0,drop,\n", encoding="utf-8")
        assert holds_decisions(str(path))
    path.write_text("sep=,\nfile,label\ndecision,1\n", encoding="utf-8")
    assert not holds_decisions(str(path))


@pytest.mark.parametrize("header", ["", "file,label,decision\n"])
def test_other_columns_are_refused(tmp_path, header):
    with pytest.raises(dnnlib.UserError, match="file, label, decision, new_label"):
        load(write(tmp_path, "", header))


def found_labels(**fields) -> LabelFile:
    is_clean = np.array([True, False, True, False, True, True])
    score = np.array([0.9, 0.1, 0.8, 0.3, 0.7, 1.0], np.float32)
    rates = class_noise_rates(LABELS, score, 3)
    return LabelFile(NAMES, LABELS, is_clean, score, np.array([0, 2, 2, 0, 0, 1]), 2.2 / 6, rates, **fields)


def test_a_label_file_believes_decisions():
    rows = [np.array(part) for part in ([3], [0], [2], [1, 2])]
    sure = np.full(6, 0.9, np.float32)
    before = found_labels(
        noise_interval=(0.3, 0.4), is_outlier=np.array([0, 0, 0, 1, 0, 1], bool), suggested_score=sure
    )
    after = apply_to_labels(before, Decisions(*rows))
    np.testing.assert_allclose(after.suggested_score, [1, 0, 0, 1, 0.9, 0.9])
    assert after.is_clean.tolist() == [False, False, False, True, True, True]
    assert after.suggested.tolist() == [2, 1, 2, 1, 0, 1]
    np.testing.assert_allclose(after.score, [0, 0, 0, 1, 0.7, 1])
    assert after.is_outlier.tolist() == [False, True, True, False, False, True]
    assert after.noise_rate == pytest.approx(1 - 2.7 / 6)  # the expected share of wrong labels
    np.testing.assert_allclose(after.per_class_noise_rate, [1.3 / 2, 1 / 3, 1], rtol=1e-6)
    np.testing.assert_allclose(after.noise_interval, (0.3 + 0.1833, 0.4 + 0.1833), atol=1e-4)
    assert before.score[0] == np.float32(0.9) and before.is_outlier.tolist() == [0, 0, 0, 1, 0, 1]  # unchanged


def test_decisions_move_rates_that_were_counted_by_what_they_change():
    """Scores of cleanlab's tables are no probabilities: there the flags count, and two of six are wrong."""
    none = np.zeros(0, np.int64)
    flags = found_labels()
    flags.noise_rate, flags.per_class_noise_rate = 2 / 6, class_noise_rates(LABELS, flags.is_clean, 3)
    after = apply_to_labels(flags, Decisions(np.array([1]), none, none, none))
    assert after.noise_rate == pytest.approx(1 / 6)
    np.testing.assert_allclose(after.per_class_noise_rate, class_noise_rates(LABELS, after.is_clean, 3))


def test_a_dropped_image_teaches_no_class():
    none = np.zeros(0, np.int64)
    found = found_labels(suggested_score=np.full(6, 0.9, np.float32))
    row = int(np.flatnonzero(found.suggested != found.labels)[0])
    taught = believed(apply_to_labels(found, Decisions(none, none, none, np.array([row]))), suggested=True)
    assert believed(found, suggested=True)["right"][row]
    assert not taught["right"][row] and taught["labels"][row] == LABELS[row] and taught["doubt"][row] == 0


def test_a_label_file_learns_of_outliers_only_when_images_are_dropped():
    none = np.zeros(0, np.int64)
    assert apply_to_labels(found_labels(), Decisions(np.array([0]), none, none, none)).is_outlier is None
    assert apply_to_labels(found_labels(), Decisions(none, none, none, np.array([4]))).is_outlier[4]


def test_dataset_tool_applies_decisions(tmp_path):
    images = pictures(6)
    names = [f"00000/img{i:08d}.png" for i in range(6)]
    extra = dict(clean_labels=[[n, 0] for n in names], class_names=CLASSES, outliers=[names[2], names[5]],
                 corruption=dict(family="pets", noise_type="sym", outlier_rate=0.3))  # fmt: skip
    source = make_archive(tmp_path / "a.zip", images, LABELS.tolist(), **extra)
    csv = write(tmp_path, f"{names[4]},cat,relabel,'=1+1\n{names[1]},dog,drop,\n{names[0]},cat,keep,\n")
    code, out, err = run_dataset_tool(f"--source={source}", f"--dest={tmp_path / 'b.zip'}", f"--labels={csv}")
    assert code == 0 and "5" in out, err
    data = ImageDataset(str(tmp_path / "b.zip"))
    np.testing.assert_array_equal(data.labels, [0, 2, 1, 2, 1])
    np.testing.assert_array_equal(data.images(range(5)).permute(0, 2, 3, 1), images[[0, 2, 3, 4, 5]])
    assert data.outliers.tolist() == [False, True, False, False, True] and data.clean_labels.tolist() == [0] * 5
    with zipfile.ZipFile(tmp_path / "b.zip") as archive:
        record = json.loads(archive.read("dataset.json"))["corruption"]
    assert record["cleaned"] == dict(
        fix="decisions", kept=1, relabeled=1, dropped=1, before=dict(noise_type="sym", outlier_rate=0.3)
    )
    assert record["family"] == "pets" and record["noise_type"] is None


def test_a_label_file_beside_the_archive_believes_decisions(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=pictures(6), arr_1=LABELS, arr_2=np.array([0, 0, 0, 1, 1, 1]))
    names = [f"00000/img{i:08d}.png" for i in range(6)]
    csv = write(tmp_path, f"{names[0]},0,keep,\n{names[1]},1,relabel,2\n{names[3]},1,drop,\n")
    code, _, err = run_dataset_tool(f"--source={tmp_path / 'a.npz'}", f"--dest={tmp_path / 'b.zip'}", f"--labels={csv}")
    assert code == 0, err
    found = load_label_file(tmp_path / "b-labels.npz", ImageDataset(str(tmp_path / "b.zip")))
    assert found.labels.tolist() == [0, 2, 2, 0, 1] and found.is_clean.tolist() == [True, True, False, True, True]


@pytest.mark.parametrize("fix, left", [("drop", [0, 2, 4, 5]), ("relabel", range(6))])
def test_cleaning_keeps_the_record_of_outliers_in_step(fix, left):
    outliers = np.array([False, False, True, False, False, True])
    source = Source("a.zip", 6, lambda i: i, LABELS, names=NAMES, outliers=outliers)
    clean_source(source, found_labels(), 3, fix)
    assert source.outliers.tolist() == outliers[list(left)].tolist()
    assert [source.image(i) for i in range(source.length)] == list(left)


def test_a_decided_label_is_given_whatever_becomes_of_the_others():
    relabel = Decisions(np.zeros(0, np.int64), np.array([1]), np.array([2]), np.zeros(0, np.int64))
    found = apply_to_labels(found_labels(suggested_score=np.full(6, 0.6, np.float32)), relabel)
    for fix, left in (("drop", [0, 1, 2, 4, 5]), ("relabel", [0, 1, 2, 4, 5])):
        source = Source("a.zip", 6, lambda i: i, LABELS, names=NAMES)
        cleaned = clean_source(source, found, 3, fix, decided=relabel.relabel)
        assert [source.image(i) for i in range(source.length)] == left and source.labels.tolist() == [0, 2, 2, 0, 1]
        assert (cleaned.relabeled, cleaned.left_out) == (1, 1) and source.corruption["cleaned"]["relabeled"] == 1


def test_what_is_right_by_a_table_is_counted_by_its_flags():
    """The scores of cleanlab's tables are no probabilities."""
    cleaned = clean_source(Source("a.zip", 6, lambda i: i, LABELS, names=NAMES), found_labels(), 3, "drop")
    assert (cleaned.before, cleaned.after) == (4 / 6, 1)


@pytest.mark.parametrize(
    "decision, words",
    [("drop", ["no image would be left"]), ("keep", ["no labels with one class"])],
)
def test_dataset_tool_refuses_decisions_in_one_line(tmp_path, decision, words):
    labels = [0, 1] if decision == "drop" else None
    source = make_archive(tmp_path / "a.zip", pictures(2), labels)
    csv = write(tmp_path, "".join(f"00000/img{i:08d}.png,{i},{decision},\n" for i in range(2)))
    code, _, err = run_dataset_tool(f"--source={source}", f"--dest={tmp_path / 'b.zip'}", f"--labels={csv}")
    assert code == 1 and err.startswith("Error: --labels: ") and err.count("\n") == 1, err
    assert all(word in err for word in words) and not (tmp_path / "b.zip").exists()
