"""Image sheets: many images in one PNG, for people to look at."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dnnlib import atomic_open

__all__ = ["image_sheet", "save_class_grid", "save_grid"]

CELL, SHEET = 64, 4096  # pixels: images with shorter sides are enlarged, as long as the sheet is not larger
WHITE, RED = 255, (214, 39, 40)
LINES = 3  # of a heading


def save_grid(
    images: np.ndarray | Sequence[np.ndarray],
    path: str,
    columns: int | None = None,
    scale: int | None = None,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    captions: Sequence[str] | None = None,
    framed: Sequence[bool] | None = None,
) -> None:
    """Write `image_sheet` of the same arguments to `path` as a PNG (atomically)."""
    sheet = image_sheet(images, columns, scale, row_labels, column_labels, captions, framed)
    with atomic_open(path) as file:
        sheet.save(file, format="png")


def save_class_grid(
    images: Sequence[np.ndarray],
    path: str,
    classes: Sequence[int] | None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write N images as one PNG with a column per class under its name, or as a plain sheet without `classes`.

    `classes` [N] are the images' classes, `class_names` those of all classes; without them a class is a number. Images
    stay in their order. The sheet is plain, too, where columns would be mostly empty or the picture very large.
    """
    images = np.asarray(images)
    if classes is None:
        save_grid(images, path)
        return
    present, column = np.unique(classes, return_inverse=True)
    names = [class_names[c] if class_names else str(c) for c in present.tolist()]
    counts = np.bincount(column)
    rows, height, width = counts.max(), *images.shape[1:3]
    if len(present) == 1:
        save_grid(images, path, column_labels=names)
        return
    if rows * len(present) > 2 * len(images) or max(rows * height, len(present) * width) > SHEET:
        save_grid(images, path)
        return
    order = np.argsort(column, kind="stable")
    row = np.arange(len(images)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.full([rows, len(present), *images.shape[1:]], WHITE, np.uint8)
    table[row, column[order]] = images[order]
    save_grid(table.reshape(-1, *images.shape[1:]), path, columns=len(present), column_labels=names)


def image_sheet(
    images: np.ndarray | Sequence[np.ndarray],
    columns: int | None = None,
    scale: int | None = None,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    captions: Sequence[str] | None = None,
    framed: Sequence[bool] | None = None,
) -> Image.Image:
    """Return one picture of all images, row by row with thin gaps between them.

    images         uint8 [N,H,W,C], or N arrays [H,W,C] of the same shape; C = 1 or 3
    columns        images in each row; None: about as many columns as rows
    scale          whole factor by which images are enlarged, pixel by pixel; None: small images grow to about 64 pixels
    row_labels     texts left of the rows
    column_labels  texts above the columns, in up to three lines
    captions       one text per image below it, of one or more lines
    framed         one flag per image: whether it gets a red frame

    ValueError: there are no images, or they do not have 1 or 3 channels.
    """
    images = np.asarray(images)
    if images.ndim != 4 or not len(images) or images.shape[-1] not in (1, 3):
        raise ValueError(f"an image sheet needs images [N,H,W,C] with 1 or 3 channels, not {list(images.shape)}")
    n, height, width, channels = images.shape
    columns = min(columns or math.ceil(math.sqrt(n)), n)
    rows = math.ceil(n / columns)
    if scale is None:
        room = SHEET // max(columns * width, rows * height)
        scale = max(1, min(room, CELL // max(height, width)))

    font = ImageFont.load_default()
    line = math.ceil(font.getbbox("|")[3]) + 1
    below = line * max((text.count("\n") + 1 for text in captions or ()), default=0)
    gap = max(1, scale * max(height, width) // 12)
    gap *= 1 if framed is None else 2  # half of it is the frame's, so the frames of neighbors frame nothing else
    cell_h, cell_w = scale * height + gap + below, scale * width + gap
    cells = np.full([rows * columns, cell_h, cell_w, channels], WHITE, np.uint8)
    cells[:n, gap : gap + scale * height, gap:] = images.repeat(scale, axis=1).repeat(scale, axis=2)
    cells = cells.reshape(rows, columns, cell_h, cell_w, channels).transpose(0, 2, 1, 3, 4)
    pixels = cells.reshape(rows * cell_h, columns * cell_w, channels)
    body = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)

    def fit(text: str) -> str:  # cuts off what is wider than an image
        while text and font.getlength(text) > cell_w - gap:
            text = text[:-1]
        return text

    def lines(text: str) -> list[str]:
        found = [""]
        for word in text.split():
            longer = f"{found[-1]} {word}".strip()
            if fit(longer) == longer or not found[-1]:
                found[-1] = longer
            else:
                found.append(word)
        return found[:LINES]

    headings = [lines(text) for text in (column_labels or ())[:columns]]
    left = max((math.ceil(font.getlength(text)) + gap for text in row_labels or ()), default=0)
    above = max((len(heading) * line + gap for heading in headings), default=0)
    red = framed is not None and np.any(framed[:n])
    sheet = Image.new("RGB" if red else body.mode, (left + body.width + gap, above + body.height + gap), "white")
    sheet.paste(body, (left, above))
    draw = ImageDraw.Draw(sheet)
    for row, text in enumerate((row_labels or ())[:rows]):
        draw.text((gap, above + row * cell_h + cell_h // 2), text, fill="black", font=font, anchor="lm")

    def write(x: int, y: int, text: str) -> None:
        draw.text((x, y), fit(text), fill="black", font=font)

    for column, heading in enumerate(headings):
        for k, text in enumerate(heading):
            write(left + gap + column * cell_w, gap + k * line, text)
    for i, text in enumerate((captions or ())[:n]):
        for k, part in enumerate(text.split("\n")):
            write(left + gap + i % columns * cell_w, above + (i // columns + 1) * cell_h - below + k * line, part)
    rim = gap // 2
    for i in np.flatnonzero(framed[:n]) if red else ():
        x, y = left + gap - rim + i % columns * cell_w, above + gap - rim + i // columns * cell_h
        corner = (x + scale * width + 2 * rim - 1, y + scale * height + 2 * rim - 1)
        draw.rectangle(((x, y), corner), outline=RED, width=rim)
    return sheet
