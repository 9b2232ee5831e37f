"""What people do to messy sets without noticing: labels that would go to another image, or mean another class."""

import json
import unicodedata
import zipfile

import numpy as np
import pytest

import dnnlib
from archives.dataset import ImageDataset
from archives.label_file import flagged_labels, load_label_file, save_label_file
from archives.relabel import declare_clean, replace_labels
from tests.support import synth
from tests.support.sources import LABELS, build, folder, make_source, write
from tests.support.synth import run_dataset_tool as run


def classes_of(path):
    data = ImageDataset(str(path))
    return dict(zip(data.source_names, [data.class_names[c] for c in data.labels], strict=True))


@pytest.mark.parametrize("kind", ["label file", "dataset.json"])
def test_labels_of_an_archive_with_more_images_go_to_the_images_that_they_are_about(tmp_path, kind):
    """The names in the archive are numbers, which mean other images there."""
    first = tmp_path / "first.zip"
    data, _, _ = build(tmp_path, folder(tmp_path))
    (tmp_path / "out.zip").rename(first)
    decisions = write(tmp_path / "d.csv", "file,label,decision,new_label\ndog/b.png,dog,drop,\n")
    build(tmp_path, first, f"--labels={decisions}")
    (tmp_path / "out.zip").rename(tmp_path / "fewer.zip")
    if kind == "label file":
        found = flagged_labels(data.file_names, data.labels, np.ones(4, bool), 3)
        found.source_names, found.suggested = data.source_names, np.array([1, 1, 2, 0])
        save_label_file(tmp_path / "l.npz", found)
        args = [f"--labels={tmp_path}/l.npz", "--label_key=suggested"]
    else:
        with zipfile.ZipFile(first) as archive:
            record = json.loads(archive.read("dataset.json"))
        record["labels"] = [[name, c] for (name, _), c in zip(record["labels"], [1, 1, 2, 0], strict=True)]
        args = [f"--labels={write(tmp_path / 'l.json', json.dumps(record))}"]
    for source in (tmp_path / "fewer.zip", first):
        build(tmp_path, source, *args)
        whole = {"cat/a.png": "dog", "dog/b.png": "dog", "dog/c.png": "owl", "owl/d.png": "cat"}
        there = {"cat/a.png", "dog/c.png", "owl/d.png"} | ({"dog/b.png"} if source == first else set())
        assert classes_of(tmp_path / "out.zip") == {name: whole[name] for name in there}


@pytest.mark.parametrize("pairs", ["x", [["a"]], [["a.jpg", 1]]])
def test_original_paths_that_are_none_are_refused_in_one_line(tmp_path, pairs):
    labels = [[name, 0] for name in ("cat/a.png", "dog/b.png", "dog/c.png", "owl/d.png")]
    path = write(tmp_path / "l.json", json.dumps(dict(labels=labels, source_names=pairs)))
    with pytest.raises(dnnlib.UserError, match='l.json: "source_names": must be a list'):
        replace_labels(make_source(), path)


def test_the_numbers_of_an_archive_are_not_the_files_of_a_folder(tmp_path):
    """An archive that left out damaged files counts the others."""
    table = write(tmp_path / "l.csv", "file,label\n00000/img00000000.png,cat\n00000/img00000001.png,dog\n")
    code, _, err = run(
        f"--source={folder(tmp_path)}", f"--dest={tmp_path}/o.zip", f"--labels={table}", "--skip_unlabeled"
    )
    assert code == 1 and "none of its 2 file names is among the 4 images" in err


@pytest.mark.parametrize("form", ["csv", "jsonl", "list", "mapping"])
def test_whole_numbers_are_names_of_classes_in_any_table(tmp_path, form):
    names = [str(c) for c in range(12)]  # in alphabetical order: 0, 1, 10, 11, 2, ...
    pairs = [(f"{name}/a.png", int(name)) for name in names]
    for (file, _), image in zip(pairs, synth.pictures(12), strict=True):
        (tmp_path / "in" / file).parent.mkdir(parents=True)
        (tmp_path / "in" / file).write_bytes(synth.png(image))
    objects = [dict(file_name=file, label=label) for file, label in pairs]
    name, text = {
        "csv": ("l.csv", "file,label\n" + "".join(f"{file},{label}\n" for file, label in pairs)),
        "jsonl": ("l.jsonl", "".join(json.dumps(x) + "\n" for x in objects)),
        "list": ("l.json", json.dumps(objects)),
        "mapping": ("l.json", json.dumps(dict(pairs))),
    }[form]
    table = write(tmp_path / name, text)
    build(tmp_path, tmp_path / "in", f"--labels={table}")
    assert all(file == f"{name}/a.png" for file, name in classes_of(tmp_path / "out.zip").items())


def test_clean_labels_stay_with_their_images_where_some_are_left_out(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=synth.pictures(6), arr_1=np.arange(6) % 2)
    labels = [f"00000/img{i:08d}.png,{i % 2}\n" for i in range(6)]
    noisy, clean = write(tmp_path / "l.csv", "".join(labels[1:])), write(tmp_path / "c.csv", "".join(labels))
    args = f"--labels={noisy}", "--skip_unlabeled", f"--clean_labels={clean}"
    data, _, _ = build(tmp_path, tmp_path / "a.npz", *args)
    assert data.labels.tolist() == data.clean_labels.tolist() == [1, 0, 1, 0, 1]


def test_other_classes_have_no_pairs_that_look_alike(tmp_path):
    digits = tmp_path / "digits.zip"
    assert run("--source=digits", f"--dest={digits}", "--max-images=40")[0] == 0
    data = ImageDataset(str(digits))
    words = "zero one two three four five six seven eight nine".split()
    table = write(tmp_path / "l.csv", "".join(f"{n},{words[c]}\n" for n, c in zip(data.file_names, data.labels)))  # noqa: B905
    args = [f"--source={digits}", f"--dest={tmp_path}/o.zip", "--noise_type=asym", "--noise_rate=0.4"]
    assert run(*args)[0] == 0  # the digits' own classes have such pairs
    code, _, err = run(*args, f"--labels={table}", "--overwrite")
    assert code == 1 and err.startswith("Error: --noise_type=asym: ")


def test_contradictory_lines_about_an_image_are_refused(tmp_path):
    data = ImageDataset(str(synth.make_archive(tmp_path / "a.zip", synth.pictures(3), [0, 1, 0])))
    found = flagged_labels(data.file_names, data.labels, np.ones(3, bool), 2)
    for name in ("names", "labels", "is_clean", "score", "suggested"):
        values = getattr(found, name)
        setattr(found, name, [*values, values[1]] if name == "names" else np.append(values, values[1]))
    found.is_clean[3] = False
    save_label_file(tmp_path / "l.npz", found)
    with pytest.raises(dnnlib.UserError, match="has several lines about '00000/img00000001.png'"):
        load_label_file(tmp_path / "l.npz", data)


def test_clean_labels_that_are_spelled_otherwise_add_no_class(tmp_path):
    with pytest.raises(dnnlib.UserError, match="'cat', 'Cat' are different classes, although they look alike"):
        declare_clean(
            make_source(), write(tmp_path / "c.csv", "a.jpg,Cat\nb.jpg,dog\nc.jpg,dog\nd.jpg,owl\n"), None, False
        )
    one, two = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))  # macOS writes the second
    for there, here in ((one, two), (two, one)):
        source = make_source(class_names=[there, "dog", "owl"])
        table = write(tmp_path / "c.csv", f"a.jpg,{here}\nb.jpg,dog\nc.jpg,dog\nd.jpg,owl\n")
        declare_clean(source, table, None, False)
        assert source.clean_labels.tolist() == LABELS.tolist() and source.class_names == [there, "dog", "owl"]
        replace_labels(source, table)
        assert source.labels.tolist() == LABELS.tolist()
    source = make_source()
    declare_clean(source, write(tmp_path / "c.csv", "a.jpg,ant\nb.jpg,dog\nc.jpg,dog\nd.jpg,owl\n"), None, False)
    assert source.notes[-1].endswith("c.csv: no label is 'ant', these classes are added")


def test_recorded_clean_labels_are_not_replaced_by_noisy_ones(tmp_path):
    source = make_source(clean_labels=LABELS[::-1].copy(), corruption=dict(noise_type="sym"))
    with pytest.raises(dnnlib.UserError, match="has clean labels on record already, and its labels differ"):
        declare_clean(source, "source", None, False)
    declare_clean(make_source(clean_labels=LABELS), "source", None, False)


@pytest.mark.parametrize(
    "record, said",
    [
        (dict(noise_type="sym"), "from before the noise"),
        ({}, "on record"),
        (dict(clean_labels="declared"), "as declared"),
    ],
)
def test_labels_from_elsewhere_change_nothing_about_the_clean_ones(tmp_path, record, said):
    names = [f"00000/img{i:08d}.png" for i in range(4)]
    clean = [[name, int(c)] for name, c in zip(names, LABELS, strict=True)]
    path = synth.make_archive(
        tmp_path / "a.zip", synth.pictures(4), [1, 1, 0, 2], clean_labels=clean, corruption=record
    )
    table = write(tmp_path / "l.csv", "".join(f"{name},{c}\n" for name, c in zip(names, [2, 1, 0, 2], strict=True)))
    data, _, _ = build(tmp_path, path, f"--labels={table}")
    assert (
        data.truth.startswith("clean labels") and said in data.truth and data.clean_labels.tolist() == LABELS.tolist()
    )


def test_files_beside_the_images(tmp_path):
    """A table says what the labels are, a coordinate does not; a packed class is missed; an old list of damage goes."""
    for name, image in zip(("1_001.png", "2_001.png"), synth.pictures(2), strict=True):
        (tmp_path / "flat").mkdir(exist_ok=True)
        (tmp_path / "flat" / name).write_bytes(synth.png(image))
    write(tmp_path / "flat" / "metadata.csv", "file_name,label\n1_001.png,ok\n2_001.png,bad\n")
    data, _, _ = build(tmp_path, tmp_path / "flat")
    assert [data.class_names[c] for c in data.labels] == ["ok", "bad"]

    source = folder(tmp_path)
    write(source / "metadata.csv", "file_name,x,y\n" + "".join(f"{n},1.5,{i}.25\n" for i, n in enumerate("abcd")))
    (source / "owl" / "more.zip").write_bytes(b"PK")
    (tmp_path / "out-skipped.csv").write_text("file,problem\n")
    code, out, err = run(f"--source={source}", f"--dest={tmp_path}/out.zip", "--overwrite")
    assert code == 0 and ImageDataset(str(tmp_path / "out.zip")).class_names == ["cat", "dog", "owl"], err
    assert "1 .zip, such as owl/more.zip" in out + err and not (tmp_path / "out-skipped.csv").exists()
