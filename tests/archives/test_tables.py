"""Labels from tables: CSV, TSV, JSON lines, parquet, JSON; how files are matched; what is refused, in one line."""

import json
import sys
import time

import numpy as np
import pytest

import dnnlib
from archives.imported_labels import load_labels
from archives.name_matching import match_names
from archives.tables import read_table

NAMES = ["cat/1.png", "cat/2.png", "dog/3.png", "owl/4.png"]


def load(tmp_path, file, content, names=NAMES, **options):
    path = tmp_path / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    lists = names if isinstance(names[0], list) else [names]
    return load_labels(str(path), lists, len(lists[0]), **options)


ROWS = [("owl/4.png", "owl"), ("cat/1.png", "cat"), ("cat/2.png", "cat"), ("dog/3.png", "dog")]


def csv_of(rows, header="file,label", comma=","):
    return "\n".join([header.replace(",", comma), *(comma.join(row) for row in rows), ""])


KINDS = {
    "a.csv": csv_of(ROWS),
    "b.csv": "\ufeff" + csv_of(ROWS, "File Name,class").replace("\n", "\r\n"),
    "semicolons.csv": csv_of(ROWS, comma=";"),
    "excel.csv": "\ufeffsep=;\r\n" + csv_of(ROWS, "path;label", comma=";").replace("\n", "\r\n"),
    "quotes.csv": '"path","label"\n' + "".join(f'"{name}"," {label} "\n\n' for name, label in ROWS),
    "no_header.csv": csv_of(ROWS[1:], ",".join(ROWS[0])),
    "label_first.csv": csv_of([row[::-1] for row in ROWS], "species,photo"),
    "pandas.csv": ",filename,label,note\n" + "".join(f"{i},{n},{c},x\n" for i, (n, c) in enumerate(ROWS)),
    "a.tsv": csv_of(ROWS, comma="\t"),
    "a.jsonl": "".join(json.dumps({"file_name": n, "label": c}) + "\n" for n, c in ROWS),
    "b.ndjson": "\n".join(json.dumps({"note": 1, "image": n, "label": c}) for n, c in ROWS),
    "pairs.json": json.dumps({"labels": ROWS}),
    "list.json": json.dumps(ROWS),
    "mapping.json": json.dumps(dict(ROWS)),
    "inner.json": json.dumps({"labels": dict(ROWS), "info": {}}),
    "records.json": json.dumps([{"file": n, "category": c} for n, c in ROWS]),
    "backslashes.csv": csv_of([(n.replace("/", "\\"), c) for n, c in ROWS]),
}


@pytest.mark.parametrize("file", KINDS)
def test_every_kind_of_table_says_the_same(tmp_path, file):
    found = load(tmp_path, file, KINDS[file])
    assert found.labels.tolist() == [0, 0, 1, 2] and found.class_names == ["cat", "dog", "owl"]
    assert found.labels.dtype == np.int64 and not found.missing.any()
    assert all("column 'label'" in note for note in found.notes)  # said where there are more columns than needed


@pytest.mark.parametrize("rows, message", [
    ("a.png;cat\n\nb.png\n", "a.csv: line 5 has 1 cells, but the header has 2"),
    ('a.png;cat\nb.png;"c"x\n', "a.csv: is not a CSV in UTF-8: line 4: "),
])  # fmt: skip
def test_lines_are_counted_behind_the_one_that_excel_writes(tmp_path, rows, message):
    with pytest.raises(dnnlib.UserError, match=message):
        load(tmp_path, "a.csv", f"sep=;\nfile;label\n{rows}")


def test_parquet(tmp_path):
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    names, labels = ([row[i] for row in ROWS] for i in (0, 1))
    for label in (labels, pyarrow.array(labels).dictionary_encode(), [2, 0, 0, 1]):
        table = pyarrow.table({"image": [b"x" * 1000] * 4, "file_name": names, "label": label})
        parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
        found = load_labels(str(tmp_path / "a.parquet"), [NAMES], 4)
        assert found.labels.tolist() == [0, 0, 1, 2]
    data = (tmp_path / "a.parquet").read_bytes()
    for bad in (b"", data[:-9], data[:-60] + bytes(40) + data[-20:], b"PAR1" * 9):
        with pytest.raises(dnnlib.UserError, match="a.parquet: .*readable"):
            load(tmp_path, "a.parquet", bad)


def test_parquet_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(dnnlib.UserError, match="pip install pyarrow"):
        load(tmp_path, "a.parquet", b"PAR1")


NUMBERS = [
    ("1 2 0 9", None, [1, 2, 0, 9], None),
    ("1.0 2.0 0.0 9.0", None, [1, 2, 0, 9], None),  # what a spreadsheet makes of a column with an empty cell
    ("01 02 00 10", None, [1, 2, 0, 3], ["00", "01", "02", "10"]),
    ("cat dog 2 cat", None, [1, 2, 0, 1], ["2", "cat", "dog"]),
    ("1 2 0 0", ["cat", "dog", "owl"], [1, 2, 0, 0], ["cat", "dog", "owl"]),
    ("owl dog owl cat", ["owl", "cat", "dog"], [0, 2, 0, 1], ["owl", "cat", "dog"]),
    ("1 2 3 3", ["3", "2", "1"], [2, 1, 0, 0], ["3", "2", "1"]),
]


@pytest.mark.parametrize("texts, class_names, numbers, expected", NUMBERS)
def test_names_come_before_numbers(tmp_path, texts, class_names, numbers, expected):
    rows = zip(NAMES, texts.split(), strict=True)
    found = load(tmp_path, "a.csv", csv_of(rows), class_names=class_names)
    assert found.labels.tolist() == numbers and found.class_names == expected


CALLED = {  # what the table calls the images -> what the images are called
    "folders below": (["1.png", "2.png", "3.png", "4.png"], NAMES),
    "folders above": ([f"/data/photos/{name}" for name in NAMES], NAMES),
    "other folders": ([f"old/{name}" for name in NAMES], [f"new/all/{name}" for name in NAMES]),
    "same names in two folders": (["cat/1.png", "dog/1.png", "cat/2.png", "dog/2.png"],
                                  ["x/cat/1.png", "x/dog/1.png", "x/cat/2.png", "x/dog/2.png"]),
    "without endings": (["1", "2", "3", "4"], NAMES),
    "archive names": ([f"img{i}.png" for i in range(4)], [NAMES, [f"img{i}.png" for i in range(4)]]),
    "own names first": (["b", "c", "d", "a"], [["b", "c", "d", "a"], ["a", "b", "c", "d"]]),
}  # fmt: skip


@pytest.mark.parametrize("kind", CALLED)
def test_images_are_found_under_other_names(tmp_path, kind):
    given, names = CALLED[kind]
    found = load(tmp_path, "a.csv", csv_of(zip(given[::-1], "3210", strict=True)), names)
    assert found.labels.tolist() == [0, 1, 2, 3]
    assert ("compared" in " ".join(found.notes)) == (kind not in ("archive names", "own names first"))


@pytest.mark.parametrize(("given", "names", "rows", "said"), [
    (["e\u0301.png", "a.png"], ["\u00e9.png", "a.png"], [0, 1], None),  # macOS writes an accent behind its letter
    (["IMG_1.jpg", "IMG_2.JPG"], ["img_1.JPG", "img_2.jpg"], [0, 1], "regardless of case, such as 'IMG_1.jpg'"),
    (["x/IMG_2.jpg", "x/IMG_1.jpg"], ["img_1.JPG", "img_2.jpg"], [1, 0], "without folders and regardless of case"),
    (["a.png", "B.PNG", "C.png"], ["a.png", "b.png", "d.png"], [0, 1, -1], "1 name found regardless of case"),
    (["x/a.png", "x/B.PNG"], ["b.png", "a.png"], [1, 0], "1 name found regardless of case and blanks, such as 'B.PNG'"),
    (["a.png ", "b.png"], ["a.png", "b.png"], [0, 1], "1 name found regardless of case and blanks, such as"),
    (["a.png", "A.png"], ["a.png", "A.png", "b.png"], [0, 1], None),
    (["a.png", "B.png"], ["a.png", "b.png", "b.PNG"], [0, -1], None),  # it may be either
    (["e\u0301.png", "\u00e9.png"], ["\u00e9.png", "e\u0301.png", "c"], [1, 0], None),  # two files
])  # fmt: skip
def test_case_and_the_writing_of_accents_do_not_matter_where_it_is_clear(given, names, rows, said):
    found, notes = match_names(given, [names], "x.csv")
    assert found.tolist() == rows
    assert (said in " ".join(notes)) if said else not notes


def test_absent_names_are_counted_and_few_are_shown(tmp_path):
    rows = [*ROWS, *((f"gone/{i}.png", "cat") for i in range(500))]
    found = load(tmp_path, "a.csv", csv_of(rows))
    assert found.labels.tolist() == [0, 0, 1, 2]
    assert found.notes == [f"{tmp_path}/a.csv: has 500 names without an image, of 504: 'gone/0.png', "
                           "'gone/1.png', 'gone/2.png' and 497 more"]  # fmt: skip
    names = [*NAMES, *(f"more/{i}.png" for i in range(500))]
    with pytest.raises(dnnlib.UserError) as error:
        load(tmp_path, "a.csv", csv_of(rows[:4]), names)
    assert "no label for 500 of the 504 images: 'more/0.png'" in error.value.message and len(error.value.message) < 300
    found = load(tmp_path, "a.csv", csv_of(rows[:4]), names, may_lack=lambda _row: True)
    assert found.labels[:4].tolist() == [0, 0, 1, 2] and found.missing.tolist() == [False] * 4 + [True] * 500


def test_an_empty_label_is_none(tmp_path):
    rows = [*ROWS[:3], (ROWS[3][0], " ")]
    with pytest.raises(dnnlib.UserError, match=f"no label for 1 of the 4 images: '{ROWS[3][0]}'"):
        load(tmp_path, "a.csv", csv_of(rows))
    found = load(tmp_path, "a.csv", csv_of(rows), may_lack=lambda _row: True)
    assert found.missing.tolist() == [name == ROWS[3][0] for name in NAMES]
    lines = "".join(json.dumps({"file": name, "label": label.strip() or None}) + "\n" for name, label in rows)
    assert load(tmp_path, "a.jsonl", lines, may_lack=lambda _row: True).labels.tolist() == found.labels.tolist()


def test_lines_that_say_the_same_count_once(tmp_path):
    found = load(tmp_path, "a.csv", csv_of([*ROWS, ROWS[0], ROWS[0]]))
    assert found.labels.tolist() == [0, 0, 1, 2]
    assert found.notes == [f"{tmp_path}/a.csv: 1 file listed several times, with one label: '{ROWS[0][0]}'"]


BAD = {
    "none": ("a.csv", csv_of([("x.png", "1")]), ["none of its 1 file names", "'x.png'", "'cat/1.png'"]),
    "twice": ("a.csv", csv_of([*ROWS, (ROWS[0][0], "dog")]), ["1 file with several different labels", ROWS[0][0]]),
    "two images": ("a.csv", csv_of([("1.png", "0")]), ["'1.png' may be several", "a/1.png", "b/1.png"]),
    "empty labels": ("a.csv", csv_of([("dog/3.png", " "), ("dog/4.png", "")]), ["all labels are empty"]),
    "no lines": ("a.csv", csv_of([]), ["holds no labels"]),
    "ragged": ("a.csv", csv_of([*ROWS[:2], ("a", "b", "c")]), ["line 4 has 3 cells", "header has 2"]),
    "ragged behind a long cell": ("a.csv", 'file,label\n"a\nb",1\nc\n', ["line 4 has 1 cells"]),
    "open quote": ("a.csv", 'file,label\n"cat/1.png,1\n', ["line 2", "unexpected end"]),
    "giant cell": ("a.csv", "file,label\n" + "x" * 200_000 + ",1\n", ["line 2", "field larger"]),
    "null character": ("a.csv", "file,label\ncat/1.png,\0\n", ["line 2 holds a null"]),
    "UTF-16": ("a.csv", csv_of(ROWS).encode("utf-16"), ["UTF-16, save as UTF-8"]),
    "UTF-16 without a mark": ("a.csv", csv_of(ROWS).encode("utf-16-le"), ["UTF-16, save as UTF-8"]),
    "cp1252": ("a.csv", csv_of([("cat/1.png", "größe")]).encode("cp1252"), ["line 2, column 13 is not UTF-8"]),
    "empty": ("a.csv", "", ["no column of labels", "none"]),
    "header twice": ("a.csv", "file,label,label\ncat/1.png,1,1\n", ["2 columns 'label'"]),
    "no label": ("a.csv", "file,a,b\ncat/1.png,1,1\n", ["no column of labels", "--label_key", "file, a, b"]),
    "no key": ("a.csv", csv_of(ROWS), ["no columns 'x'", "file, label"]),
    "a million columns": ("a.csv", "a," * 1_000_000 + "b\n", ["1,000,001 columns"]),
    "order only": ("a.csv", "label\n1\n", ["names no files"]),
    "line": ("a.jsonl", '{"file": "a"}\n\n{"file": }\n', ["a.jsonl: line 3: not valid JSON, line 1, column 10"]),
    "two objects": ("a.jsonl", '{"file": "a"},{"file": "b"}\n', ["line 1: not valid JSON"]),
    "no object": ("a.jsonl", '{"file": "a"}\n[1]\n', ["line 2: expected an object"]),
    "deep": ("a.jsonl", '{"file": ' + "[" * 100 + "\n", ["nested"]),
    "broken over lines": ("a.jsonl", '{"file":\n"a"}\n', ["line 1: not valid JSON"]),
    "no name": ("a.jsonl", '{"file": 1.5, "label": 1}\n', ["file name is 1.5"]),
    "mixed": ("a.json", '{"labels": [["cat/1.png", 1], ["cat/2.png", "a"]]}', ["some labels are"]),
    "bool": ("a.jsonl", '{"file": "cat/1.png", "label": true}\n', ["label true is not an integer"]),
    "JSON": ("a.json", '{"labels": [["cat/1.png", 0],\n ["cat/2.png", 1],]}', ["not valid JSON, line 2, column"]),
    "JSON that is none": ("a.json", "[1, 2]", ["must hold"]),
    "negative": ("a.csv", csv_of([("cat/1.png", "-1")]), ["label -1 is negative"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_is_refused(tmp_path, kind):
    file, content, words = BAD[kind]
    names = ["a/1.png", "b/1.png"] if kind == "two images" else NAMES
    with pytest.raises(dnnlib.UserError) as error:
        load(tmp_path, file, content, names, may_lack=lambda _row: True, key="x" if kind == "no key" else None)
    message = error.value.message
    assert f"{tmp_path}/{file}" in message and "\n" not in message and len(message) < 500, message
    assert all(word in message for word in words), message


def test_a_million_lines_are_read_soon(tmp_path):
    count = 100_000
    names = [f"images/{i:07d}.jpg" for i in range(count)]
    content = csv_of(((name, str(i % 100)) for i, name in enumerate(names[::-1])), "file,label")
    start = time.process_time()
    found = load(tmp_path, "a.csv", content, names)
    seconds = time.process_time() - start
    assert found.labels[0] == (count - 1) % 100 and seconds < 2.5


def test_lines_are_those_of_the_file():
    table = read_table(b'\nfile,label\n"a\nb",1\n\nc,2\n', "a.csv")
    assert table.column("label") == ["1", "2"] and [table.line(0), table.line(1)] == ["line 3", "line 6"]
