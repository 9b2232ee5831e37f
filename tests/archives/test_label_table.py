"""Label files as CSV in cleanlab's columns: both ways, matching, and errors for other files."""

import csv
from dataclasses import replace

import numpy as np
import pytest

import dnnlib
from archives.dataset import ImageDataset
from archives.label_file import LabelFile, save_label_file
from archives.label_table import load_labels_or_table, load_outliers, save_label_table
from tests.support.synth import make_archive, pictures

LABELS = np.array([0, 1, 2, 1])
HEADER = "is_label_issue,label_score,given_label,predicted_label"
ROWS = ["False,0.9,a,a", "True,0.1,b,c", "False,1,c,c", "False,0.5,b,b"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = make_archive(tmp_path_factory.mktemp("t") / "a.zip", pictures(4), LABELS.tolist(), class_names=list("abc"))
    return ImageDataset(str(path))


def found(dataset) -> LabelFile:
    return LabelFile(
        dataset.file_names,
        LABELS,
        np.array([True, False, True, True]),
        np.array([0.9, 1 / 3, 1, 1e-7], np.float32),
        np.array([0, 2, 2, 0]),
        0.25,
        np.array([0, 0.5, 0], np.float32),
        is_outlier=np.array([False, False, True, False]),
    )


def write(tmp_path, *lines) -> str:
    path = tmp_path / "table.csv"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.mark.parametrize("class_names, given", [(["a", "b", "c"], "abcb"), (None, "0121"), (["x", "x", "y"], "0121")])
@pytest.mark.parametrize("outliers", [True, False])
def test_round_trip(dataset, tmp_path, class_names, given, outliers):
    file = found(dataset)
    file.is_outlier = file.is_outlier if outliers else None
    save_label_table(tmp_path / "t.csv", file, class_names)
    with open(tmp_path / "t.csv", newline="") as f:
        lines = list(csv.DictReader(f))
    own = ["file", "label", "suggested_label", "probability_wrong"]
    assert list(lines[0]) == [*own, *HEADER.split(","), *(["is_outlier_issue"] if outliers else [])]
    assert [line["label"] for line in lines] == list(given)
    assert all(line["suggested_label"] == line["predicted_label"] for line in lines)
    assert [round(float(line["probability_wrong"]), 6) for line in lines] == [0.1, 0.666667, 0, 1]
    assert [line["given_label"] for line in lines] == list(given)
    assert [line["is_label_issue"] for line in lines] == ["False", "True", "False", "False"]
    loaded = load_labels_or_table(tmp_path / "t.csv", dataset)
    for name, value in vars(file).items():
        np.testing.assert_array_equal(getattr(loaded, name), value, err_msg=name)
    assert (loaded.score.dtype, loaded.labels.dtype, loaded.is_clean.dtype) == (np.float32, np.int64, bool)


def test_original_paths_come_first_and_the_archive_names_still_match(tmp_path):
    origins = ["cat/1.jpg", "dog/=1.jpg", "cat/2.jpg", "dog/1.jpg"]
    names = [f"00000/img{i:08d}.png" for i in range(4)]
    pairs = [list(pair) for pair in zip(names, origins, strict=True)]
    path = make_archive(tmp_path / "a.zip", pictures(4), LABELS.tolist(), class_names=list("abc"), source_names=pairs)
    data = ImageDataset(str(path))
    assert data.source_names == origins
    file = replace(found(data), source_names=data.source_names)
    save_label_table(tmp_path / "t.csv", file, data.class_names)
    with open(tmp_path / "t.csv", newline="") as f:
        lines = list(csv.DictReader(f))
    assert [line["file"] for line in lines] == origins and [line["archive_name"] for line in lines] == names
    # A person sorts the lines and deletes the last column.
    kept = [list(line.values())[:-1] for line in [lines[i] for i in (2, 0, 3, 1)]]
    write(tmp_path, ",".join(list(lines[0])[:-1]), *(",".join(cells) for cells in kept))
    for name in ("t.csv", "table.csv"):
        loaded = load_labels_or_table(tmp_path / name, ImageDataset(str(path), xflip=True))
        np.testing.assert_array_equal(loaded.score, np.tile(file.score, 2))
    with pytest.raises(dnnlib.UserError, match=r"first '00000/img00000001.png \(dog/=1.jpg\)'"):
        load_labels_or_table(write(tmp_path, ",".join(list(lines[0])[:-1]), *(",".join(c) for c in kept[:2])), data)


def test_a_table_of_cleanlab_is_matched_by_position(dataset, tmp_path):
    """pandas writes an index without a name; Datalab adds further columns; CleanLearning calls the score a quality."""
    lines = [f",{HEADER},is_non_iid_issue".replace("label_score", "label_quality")]
    lines += [f"{i},{row},True" for i, row in enumerate(ROWS)]
    loaded = load_labels_or_table(write(tmp_path, *lines), ImageDataset(dataset.path, xflip=True))
    assert loaded.is_clean.tolist() == [True, False, True, True] * 2 and loaded.suggested.tolist() == [0, 2, 2, 1] * 2
    np.testing.assert_array_equal(loaded.score, np.array([0.9, 0.1, 1, 0.5] * 2, np.float32))
    assert loaded.noise_rate == 0.25 and loaded.per_class_noise_rate.tolist() == [0, 0.5, 0]
    assert loaded.is_outlier is None


def test_a_table_with_names_may_be_in_any_order_and_know_more(dataset, tmp_path):
    named = [f"{row},{name}" for row, name in zip(ROWS, dataset.file_names, strict=True)]
    lines = [f"{HEADER},file", "True,0,c,a,other.png", *named[::-1]]
    loaded = load_labels_or_table(write(tmp_path, *lines), dataset)
    np.testing.assert_array_equal(loaded.score, np.array([0.9, 0.1, 1, 0.5], np.float32))


@pytest.mark.parametrize("lines, words", [
    (["file,label,decision,new_label", "a,b,keep,"], ["lacks is_label_issue, label_score", "of cleanlab"]),
    ([], ["lacks is_label_issue"]),
    ([HEADER, *ROWS[:3]], ["has 3 lines", "4 images"]),
    ([HEADER, *ROWS[:3], "False,0.5,b"], ["line 5 has 3 cells"]),
    ([HEADER, *ROWS[:3], "maybe,0.5,b,b"], ["line 5: is_label_issue is 'maybe'", "True or False"]),
    ([HEADER, *ROWS[:3], "False,1.5,b,b"], ["line 5: label_score is '1.5'", "0 to 1"]),
    ([HEADER, *ROWS[:3], "False,nan,b,b"], ["label_score is 'nan'"]),
    ([HEADER, *ROWS[:3], "False,x,b,b"], ["label_score is 'x'"]),
    ([HEADER, *ROWS[:3], "False,0.5,b,3"], ["line 5: predicted_label is '3'", "a.zip by name or number"]),
    ([HEADER, *ROWS[:3], "False,0.5,c,b"], ["1 of 4 labels are not those", "2 here, 1 there"]),
    ([HEADER + ",file", *(f"{row},x.png" for row in ROWS)], ["lacks 4 of the 4 images", "img00000000.png"]),
    ([HEADER, 'False,"0.9'], ["not a CSV in UTF-8"]),
])  # fmt: skip
def test_other_tables_are_refused(dataset, tmp_path, lines, words):
    path = write(tmp_path, *lines)
    with pytest.raises(dnnlib.UserError) as error:
        load_labels_or_table(path, dataset)
    message = error.value.message
    assert path in message and "\n" not in message and all(word in message for word in words), message


def test_bytes_that_are_no_text_are_refused(dataset, tmp_path):
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(dnnlib.UserError, match="not a CSV in UTF-8"):
        load_labels_or_table(tmp_path / "t.csv", dataset)


@pytest.mark.parametrize("use_labels", [True, False])
def test_outliers_come_from_either_file_and_need_no_labels(dataset, tmp_path, use_labels):
    data = ImageDataset(dataset.path, use_labels=use_labels, xflip=True)
    save_label_table(tmp_path / "t.csv", found(dataset), None)
    save_label_file(tmp_path / "t.npz", found(dataset))
    for name in ("t.csv", "t.npz"):
        assert load_outliers(tmp_path / name, data).tolist() == [False, False, True, False] * 2


def test_files_that_do_not_tell_outliers_are_refused(dataset, tmp_path):
    file = found(dataset)
    file.labels = np.array([0, 1, 2, 2])
    save_label_file(tmp_path / "other.npz", file)
    with pytest.raises(dnnlib.UserError, match="1 of 4 labels are not those"):  # the file of another archive
        load_outliers(tmp_path / "other.npz", dataset)
    file.is_outlier = None
    save_label_file(tmp_path / "none.npz", file)
    with pytest.raises(dnnlib.UserError, match="none.npz: lacks is_outlier, so it does not say"):
        load_outliers(tmp_path / "none.npz", dataset)
    with pytest.raises(dnnlib.UserError, match="lacks is_outlier_issue"):
        load_outliers(write(tmp_path, HEADER, *ROWS), dataset)
