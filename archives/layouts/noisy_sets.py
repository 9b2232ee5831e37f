"""Sets with real label noise whose files list the images: Clothing1M, WebVision 1.0 and Food-101N."""

from __future__ import annotations

import os

import numpy as np

import dnnlib
from archives.layouts.lists import (
    check_distinct,
    find_below,
    find_file,
    listed_source,
    read_class_names,
    read_lines,
    read_pairs,
)
from archives.source import Choice, Source

__all__ = ["find_clothing1m", "find_food101n", "find_webvision", "open_clothing1m", "open_food101n", "open_webvision"]

# ---------------------------------------------------------------------------------------------------------------------
# Clothing1M: a million images with noisy labels, others with clean labels, some with both.

NOISY, CLEAN = "noisy_label_kv.txt", "clean_label_kv.txt"
KEY_LISTS = {"noisy": "noisy_train", "clean": "clean_train", "validation": "clean_val", "test": "clean_test"}
BOTH = "both"  # the images that have both kinds of labels


def find_clothing1m(path: str) -> list[str]:
    """Return where Clothing1M is: at this path, or nowhere. Its lists may lie in the folder `annotations`."""
    return [path] if find_below(path, ["", "annotations"], [NOISY, CLEAN]) else []


def open_clothing1m(path: str, choice: Choice) -> Source:
    """Open one part of Clothing1M: `noisy` (noisy labels), `clean`, `validation` or the test part (clean labels), or
    `both`, all images that have both kinds of labels.

    UserError: a list is missing or of another form, or an image of the part has no label.
    """
    choice.check(path, test=True, parts=[] if choice.test else [*list(KEY_LISTS)[:3], BOTH])
    part = "test" if choice.test else choice.part or "noisy"

    def file(name: str, use: str) -> str:
        return find_file(path, [name, f"annotations/{name}"], use)

    def table(name: str) -> dict[str, int]:
        names, numbers = read_pairs(file(name, f"labels that the part '{part}' needs"))
        return dict(zip(names, numbers.tolist(), strict=True))

    clean = None if part == "noisy" else table(CLEAN)
    noisy = table(NOISY) if part in ("noisy", BOTH) else None
    if part == BOTH:
        listed = file(CLEAN, "")
        keys = [key for key in clean if key in noisy]
    else:
        listed = file(f"{KEY_LISTS[part]}_key_list.txt", f"the images of the part '{part}'")
        keys = read_lines(listed)
    check_distinct(keys, listed)

    def labels_of(known: dict[str, int], name: str) -> np.ndarray:
        missing = [key for key in keys if key not in known]
        if missing:
            raise dnnlib.UserError(f"{path}: {name} lacks {len(missing)} of {len(keys)} images of {listed}, "
                                   f"first '{missing[0]}'")  # fmt: skip
        return np.array([known[key] for key in keys], dtype=np.int64)

    labels = labels_of(clean if noisy is None else noisy, CLEAN if noisy is None else NOISY)
    source = listed_source(path, "", keys, labels, listed, "clothing1m", choice)
    if clean is not None:
        source.clean_labels, source.corruption["clean_labels"] = labels_of(clean, CLEAN), "published"
    for name in ("category_names_eng.txt", "annotations/category_names_eng.txt"):
        known = np.concatenate([labels, source.clean_labels if clean is not None else labels])
        source.class_names = source.class_names or read_class_names(os.path.join(path, name), known)
    return source


# ---------------------------------------------------------------------------------------------------------------------
# WebVision 1.0: 2.4 million images found by Google and Flickr, a validation set labeled by people.

LISTS = {part: f"info/train_filelist_{part}.txt" for part in ("google", "flickr")}
VALIDATION = "info/val_filelist.txt"
MINI = 50  # classes of mini-WebVision: the first 50, of Google's images


def find_webvision(path: str) -> list[str]:
    """Return where WebVision is: at this path, or nowhere."""
    return find_below(path, [""], [*LISTS.values(), VALIDATION])


def open_webvision(path: str, choice: Choice) -> Source:
    """Open WebVision 1.0: all training images, a part of them (`google`, `flickr`, `mini`), or the validation set as
    test part, with `mini` that of its classes.

    UserError: a list is missing or of another form.
    """
    mini = choice.part == "mini"
    choice.check(path, test=True, parts=["mini"] if choice.test else [*LISTS, "mini"])
    if choice.test:
        wanted = {"validation": VALIDATION}
    else:
        wanted = {
            part: name for part, name in LISTS.items() if choice.part in (None, part) or mini and part == "google"
        }
    use = "the images of one part (dataset_tool.py --part takes another one alone)"
    files = [find_file(path, [name], use) for name in wanted.values()]
    lists = [read_pairs(file) for file in files]
    names, labels = [name for names, _ in lists for name in names], np.concatenate([numbers for _, numbers in lists])
    if mini:
        rows = np.flatnonzero(labels < MINI)
        if not len(rows):
            raise dnnlib.UserError(f"{files[0]}: lists no image of the first {MINI} classes")
        names, labels = [names[row] for row in rows], labels[rows]
    folder = "val_images_256" if choice.test else ""
    source = listed_source(path, folder, names, labels, " and ".join(files), "webvision", choice)
    classes = read_class_names(os.path.join(path, "info/synsets.txt"), labels)
    if classes is not None:
        source.class_names = _synset_names(classes)[: MINI if mini else None]
    return source


def _synset_names(lines: list[str]) -> list[str]:
    """Return the names of classes from lines 'n01440764 tench, Tinca tinca'. Equal names keep their number."""
    names = [line.split(None, 1)[-1] for line in lines]
    return [line if names.count(name) > 1 else name for name, line in zip(names, lines, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Food-101N: 310,000 images from the web, some of whose labels people found right or wrong.

VERIFIED = {"verified": "meta/verified_train.tsv", "verified_validation": "meta/verified_val.tsv"}
IMAGE_LIST = "meta/imagelist.tsv"


def find_food101n(path: str) -> list[str]:
    """Return where Food-101N is: at this path, or in the folder that its archive makes."""
    return find_below(path, ["", "Food-101N_release"], [IMAGE_LIST, *VERIFIED.values()])


def open_food101n(path: str, choice: Choice) -> Source:
    """Open Food-101N: all images, or those whose labels people looked at (`verified`, `verified_validation`).

    The label is the folder. UserError: a list is missing or of another form.
    """
    choice.check(path, parts=list(VERIFIED))
    listed = find_file(path, [VERIFIED[choice.part] if choice.part else IMAGE_LIST], "which lists the images")
    lines, verified = [line for line in read_lines(listed) if not line.startswith("class_name")], None
    if choice.part:
        cells = [line.rsplit(None, 1) for line in lines]
        bad = next((line for line, cell in zip(lines, cells, strict=True) if cell[1:] not in (["0"], ["1"])), None)
        if bad is not None:
            raise dnnlib.UserError(f"{listed}: has the line '{bad}', expected class_name/key and 0 or 1")
        lines, verified = [cell[0] for cell in cells], np.array([cell[1] == "1" for cell in cells])
    check_distinct(lines, listed)
    bad = next((line for line in lines if line.count("/") != 1), None)
    if bad is not None:
        raise dnnlib.UserError(f"{listed}: has the line '{bad}', expected class_name/key")
    names = [line if line.lower().endswith((".jpg", ".jpeg", ".png")) else f"{line}.jpg" for line in lines]
    folders = [line.split("/")[0] for line in lines]
    classes = _food_classes(path, folders)
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[folder] for folder in folders], dtype=np.int64)
    source = listed_source(path, "images", names, labels, listed, "food101n", choice)
    source.class_names, source.verified = classes, verified
    return source


def _food_classes(path: str, folders: list[str]) -> list[str]:
    """Return the names of the classes: all of `meta/classes.txt`, or those of the images."""
    found = sorted(set(folders))
    file = os.path.join(path, "meta/classes.txt")
    if not os.path.isfile(file):
        return found
    classes = [line for line in read_lines(file) if line != "class_name"]
    odd = sorted(set(found) - set(classes))
    if odd or len(set(classes)) < len(classes):
        raise dnnlib.UserError(f"{file}: does not list each class once" + (f", '{odd[0]}' is missing" if odd else ""))
    return classes
