"""What the fuzz test gives to the scripts: honest files and command lines, and ways to spoil them.

A target is a kind of file and the commands that read it. To add one, add an entry to `targets`, or a line to `COMMANDS`
for a command line.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable

import click
import numpy as np
import PIL.Image
import torch
from click.testing import CliRunner
from hypothesis import strategies as st

import dataset_tool
import detect_noise
import fid
import generate
import train
import train_classifier
import train_discriminator
import train_noise
from tests.support import hostile, published, synth
from torch_utils import checkpoint, persistence
from training.networks import EDMPrecond
from training.networks_resnet import Classifier

TINY = (
    "--arch=ddpmpp_tiny --cbase=8 --batch=8 --duration=0.00001 --tick=1 --augment=0 --seed=0 --lr_rampup_kimg=0 "
    "--device=cpu"
).split()
SCRIPTS = dict(
    dataset_tool=dataset_tool,
    fid=fid,
    generate=generate,
    train=train,
    train_classifier=train_classifier,
    train_noise=train_noise,
    train_discriminator=train_discriminator,
    detect_noise=detect_noise,
)
FAST = ["--seeds=0-1", "--steps=2", "--device=cpu"]

# ---------------------------------------------------------------------------------------------------------------------
# Ways to spoil bytes.

NUMBERS = st.sampled_from(
    [0, 1, 127, 128, 255, 256, 65535, 1 << 31, (1 << 31) - 1, (1 << 32) - 1, 1 << 62, (1 << 64) - 1]
)
PLACE = st.integers(0, 1 << 20)
EDITS = st.lists(st.one_of(
    st.tuples(st.just("byte"), PLACE, st.integers(0, 255)),
    st.tuples(st.just("bit"), PLACE, st.integers(0, 7)),
    st.tuples(st.just("number"), PLACE, st.tuples(NUMBERS, st.sampled_from([1, 2, 4, 8]), st.booleans())),
    st.tuples(st.just("cut"), PLACE, st.integers(1, 64)),
    st.tuples(st.just("end"), PLACE, st.none()),
    st.tuples(st.just("repeat"), PLACE, st.integers(1, 64)),
    st.tuples(st.just("insert"), PLACE, st.binary(min_size=1, max_size=8)),
), min_size=1, max_size=4)  # fmt: skip


def spoil(data: bytes, edits) -> bytes:
    """Return `data` after the edits. Places are taken modulo its length."""
    data = bytearray(data)
    for kind, place, value in edits:
        i = place % (len(data) or 1)
        if kind == "byte":
            data[i : i + 1] = bytes([value])
        elif kind == "bit" and data:
            data[i] ^= 1 << value
        elif kind == "number":
            number, size, little = value
            data[i : i + size] = (number % (1 << 8 * size)).to_bytes(size, "little" if little else "big")
        elif kind == "cut":
            del data[i : i + value]
        elif kind == "end":
            del data[i:]
        elif kind == "repeat":
            data[i:i] = data[i : i + value] * 3
        elif kind == "insert":
            data[i:i] = value
    return bytes(data)


def inside_zip(data: bytes, edits) -> bytes:
    """Return a ZIP with one spoiled member and correct checksums."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = list(members)[edits[0][1] % len(members)]
    return hostile.zip_of({**members, name: repaired(spoil(members[name], edits))})


def repaired(data: bytes) -> bytes:
    """Return a PNG with correct checksums of its chunks. Other bytes stay as they are."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return data
    parts, start = [data[:8]], 8
    while start + 12 <= len(data):
        size = int.from_bytes(data[start : start + 4], "big")
        if start + 12 + size > len(data):
            break
        parts.append(hostile.chunk(data[start + 4 : start + 8], data[start + 8 : start + 8 + size]))
        start += 12 + size
    return b"".join([*parts, data[start:]])


def inside_gzip(data: bytes, edits) -> bytes:
    return gzip.compress(spoil(gzip.decompress(data), edits))


def inside_tar(data: bytes, edits) -> bytes:
    """Return a CIFAR archive with one spoiled batch."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    name = list(members)[edits[0][1] % len(members)]
    members[name] = spoil(members[name], edits)
    return hostile.tar_of(*((n, tarfile.REGTYPE, len(d), d, "") for n, d in members.items()))


def without_checksum(data: bytes, edits) -> bytes:
    """Return a spoiled snapshot as other programs write it, without a checksum that shows the change."""
    return spoil(data[:-32], edits)


# ---------------------------------------------------------------------------------------------------------------------
# Ways to spoil values.

ODD = st.one_of(
    st.sampled_from([
        None, True, False, -1, 0, 1, 7, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"),
        "", "0", "a", "../../x", "\x00", "\x1b[2J", "\ud800", "é" * 300,
        [], [[]], {}, [None], ["a"], [[0, 1]], {"a": {}}, [[["a"]]], [-1], [1e99],
    ]),
    st.integers(), st.floats(), st.text(max_size=5),
)  # fmt: skip
CHANGES = st.lists(
    st.tuples(PLACE, st.sampled_from(["replace", "replace", "delete", "repeat"]), ODD), min_size=1, max_size=2
)


def change(value, changes):
    """Return a nested value of dicts and lists in which some nodes are replaced, deleted or repeated."""
    for place, kind, odd in changes:
        box = [value]
        nodes = []

        def visit(holder, key, nodes=nodes):
            nodes.append((holder, key))
            item = holder[key]
            if isinstance(item, dict):
                item = holder[key] = dict(item)
            elif isinstance(item, list):
                item = holder[key] = list(item)
            else:
                return
            for inner in list(item) if isinstance(item, dict) else range(len(item)):
                visit(item, inner)

        visit(box, 0)
        holder, key = nodes[place % len(nodes)]
        if kind == "delete" and holder is not box:
            del holder[key]
        elif kind == "repeat" and isinstance(holder, list) and holder is not box:
            holder.insert(key, holder[key])
        else:
            holder[key] = odd
        value = box[0]
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Files and where they go.


@dataclasses.dataclass
class Target:
    """Honest bytes, ways to spoil them, and commands that read the file: {file} is the file, {new} a free name."""

    file: str
    data: bytes
    spoil: Callable
    how: st.SearchStrategy
    doors: list[tuple[str, str]]


def saved(writer, value) -> bytes:
    buffer = io.BytesIO()
    writer(buffer, value)
    return buffer.getvalue()


def json_bytes(value) -> bytes:
    return json.dumps(value).encode("utf-8", "replace")


def lines_of(values) -> bytes:
    """Return JSON lines of a list; another value is one line."""
    return b"\n".join(map(json_bytes, values if isinstance(values, list) else [values]))


def parquet_of(rows) -> bytes:
    """Return a parquet file of rows, or what is none without the package pyarrow."""
    try:
        import pyarrow.parquet  # optional dependency
    except ImportError:
        return b"PAR1"
    return saved(lambda file, table: pyarrow.parquet.write_table(table, file), pyarrow.Table.from_pylist(rows))


def snapshot_bytes(root, net, info) -> bytes:
    persistence.save_snapshot(root / "made.pkl", {"ema": net, "info": info})
    return (root / "made.pkl").read_bytes()


def torch_bytes(value) -> bytes:
    return saved(lambda file, v: torch.save(v, file), value)


def honest(root) -> dict[str, object]:
    """Return correct files, by the names that commands use for them."""
    torch.manual_seed(0)
    images = synth.pictures(8)
    zip_file = synth.make_archive(root / "ok.zip", images, [0, 1] * 4, class_names=["a", "b"])
    denoiser = EDMPrecond(
        8, 3, 2, model_type="SongUNet", model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[]
    )
    classifier = Classifier(8, 3, 2, depth="small", model_channels=8, channel_mult=[1])
    for name, net in (("pkl", denoiser), ("cls", classifier)):
        persistence.save_snapshot(
            root / f"{name}.pkl",
            {
                "ema": net,
                "info": {"class_names": ["a", "b"], "transition": [[0.9, 0.1], [0.2, 0.8]], "posterior": "noisy"},
            },
        )
    np.savez(root / "ref.npz", mu=np.zeros(192), sigma=np.eye(192))
    args = ["--outdir", root / "run", "--nosubdir", "--data", zip_file, *TINY]
    assert CliRunner().invoke(train.main, [str(a) for a in args]).exit_code == 0
    state = checkpoint.latest_state(root / "run")
    return dict(
        zip=zip_file,
        pkl=root / "pkl.pkl",
        cls=root / "cls.pkl",
        ref=root / "ref.npz",
        state=state,
        denoiser=denoiser,
        classifier=classifier,
        images=images,
    )


def frames(pictures) -> dict[str, bytes]:
    """Return images of several frames or pages in every format that has them, and a turned JPEG, by name."""
    first, *rest = map(PIL.Image.fromarray, pictures[:3])
    found = {}
    for kind in ("GIF", "PNG", "TIFF", "WEBP"):
        buffer = io.BytesIO()
        first.save(buffer, kind, save_all=True, append_images=rest)
        found[f"a.{kind.lower()}"] = buffer.getvalue()
    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    first.save(buffer := io.BytesIO(), "JPEG", exif=turned)
    return found | {"a.jpg": buffer.getvalue()}


def targets(root, files) -> dict[str, Target]:
    """Return all targets by name."""
    zipped, pictures = files["zip"].read_bytes(), files["images"]
    with zipfile.ZipFile(files["zip"]) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    metadata = json.loads(members["dataset.json"])
    labels = np.arange(8) % 2
    info = {"class_names": ["a", "b"], "transition": [[0.9, 0.1], [0.2, 0.8]], "posterior": "noisy", "method": "x"}
    state = checkpoint.load_state(files["state"])
    cifar = synth.make_cifar10(root / "c.tar.gz", per_batch=2)[0].read_bytes()
    idx = synth.make_mnist(root / "mnist", 6)[0] / "train-images-idx3-ubyte.gz"
    pack = hostile.zip_of({"arr_0.npy": saved(np.save, pictures), "arr_1.npy": saved(np.save, labels)})
    published.make_stl10(root / "stl10_labels", 2)
    stl10 = published.make_stl10(root / "stl10", 2)[:2].tobytes()
    for make in (published.make_clothing1m, published.make_webvision, published.make_food101n, published.make_celeba):
        make(root / make.__name__)

    def listed(make, name, options=""):
        file = f"{make.__name__}/{name}"
        door = ("dataset_tool", f"--source={{root}}/{make.__name__} --dest={{new}} {options}")
        return Target(file, (root / file).read_bytes(), spoil, EDITS, [door])

    build, measure = (
        ("dataset_tool", "--source={file} --dest={new}"),
        ("fid", "evaluate --images={file} --data={zip} --detector=pixels --nearest_k=1 --device=cpu"),
    )
    relabel = [("dataset_tool", "--source={zip} --labels={file} --dest={new}")]
    relabel.append(("dataset_tool", "--source={zip} --clean_labels={file} --skip_damaged --dest={new}"))
    matrix = [("dataset_tool", "--source={zip} --noise_type=matrix --noise_matrix={file} --dest={new}")]
    sample = [("generate", "--network={file} --outdir={new} " + " ".join(FAST))]
    judge = [
        ("fid", "evaluate --images={zip} --data={zip} --detector={file} --nearest_k=1 --device=cpu"),
        ("train_noise", "--data={zip} --outdir={new} --cls={file} " + " ".join(TINY)),
    ]
    train_on = ("train", "--data={file} --outdir={new} --cond=1 " + " ".join(TINY))
    resume = [("train", "--data={zip} --outdir={new} --resume={file} " + " ".join(TINY))]
    spoil_json = lambda base, changes: json_bytes(change(base, changes))  # noqa: E731

    def spoil_metadata(base, changes):
        return hostile.zip_of({**members, "dataset.json": json_bytes(change(base, changes))})

    def spoil_table(base, edits):
        return hostile.zip_of({**pngs, "metadata.csv": spoil(base, edits)})

    rows = [{"file_name": name, "label": "ab"[c]} for name, c in metadata["labels"]]
    table = b"file_name,label\n" + b"".join(f"{r['file_name']},{r['label']}\n".encode() for r in rows)
    pngs = {name: data for name, data in members.items() if name != "dataset.json"}
    published.make_celeba(root / "kaggle")
    rows_of = (line.split() for line in (root / "kaggle/list_attr_celeba.txt").read_text().splitlines()[1:])
    attributes = "\n".join(",".join(r if len(r) == 4 else ["image_id", *r]) for r in rows_of).encode()
    (root / "kaggle/list_attr_celeba.txt").unlink()
    human = dict(worse_label=np.arange(10) % 9, clean_label=synth.make_cifar10(root / "n.tar.gz", per_batch=2)[2])
    return {
        "ZIP": Target("a.zip", zipped, spoil, EDITS, [build, train_on, measure]),
        "member of a ZIP": Target("a.zip", zipped, inside_zip, EDITS, [build, train_on, measure]),
        "frames": Target("f.zip", hostile.zip_of(frames(pictures)), inside_zip, EDITS, [
            ("dataset_tool", "--source={file} --dest={new} --background=white"),
            ("dataset_tool", "--source={file} --dest={new} --skip_damaged --background=white --workers=1")]),
        "dataset.json": Target("a.zip", metadata, spoil_metadata, CHANGES, [build, train_on, measure]),
        "labels .json": Target("l.json", {"labels": metadata["labels"]}, spoil_json, CHANGES, relabel),
        "labels .json, bytes": Target("l.json", members["dataset.json"], spoil, EDITS, relabel),
        "labels .npy": Target("l.npy", saved(np.save, labels), spoil, EDITS, relabel),
        "labels .npz": Target("l.npz", saved(np.savez, labels), inside_zip, EDITS, relabel),
        "labels .pt": Target("l.pt", torch_bytes({"a": torch.from_numpy(labels)}), inside_zip, EDITS, relabel),
        "labels .pt, older": Target("l.pt", hostile.legacy_of({"a": labels}), spoil, EDITS, relabel),
        "labels .csv": Target("l.csv", table, spoil, EDITS, relabel),
        "labels .tsv": Target("l.tsv", table.replace(b",", b"\t"), spoil, EDITS, relabel),
        "labels .jsonl": Target("l.jsonl", lines_of(rows), spoil, EDITS, relabel),
        "labels .jsonl, values": Target("l.jsonl", rows, lambda base, changes: lines_of(change(base, changes)), CHANGES,
                                        relabel),
        "labels .parquet": Target("l.parquet", parquet_of(rows), spoil, EDITS, relabel),
        "metadata.csv": Target("a.zip", table, spoil_table, EDITS, [build, train_on, measure]),
        "labels of CIFAR-10N": Target("CIFAR-10_human.pt", torch_bytes(human), inside_zip, EDITS, [
            ("dataset_tool", "--source={root}/n.tar.gz --labels={file} --label_key=worse_label --dest={new}")]),
        "decisions": Target("d.csv", b"file,label,decision,new_label\n00000/img00000000.png,a,relabel,b\n", spoil,
                            EDITS, relabel),
        "label table": Target("t.csv", b"file,is_label_issue,label_score,given_label,predicted_label\n" + b"".join(
            f"{name},False,0.5,{c},{c}\n".encode() for name, c in metadata["labels"]), spoil, EDITS, [
                ("detect_noise", "--data={zip} --dest={new}.npz --labels={file} --foreign=0 --device=cpu")]),
        "matrix .npy": Target("m.npy", saved(np.save, np.eye(2)), spoil, EDITS, matrix),
        "matrix .json": Target("m.json", [[0.9, 0.1], [0.2, 0.8]], spoil_json, CHANGES, matrix),
        "snapshot": Target("s.pkl", files["pkl"].read_bytes(), without_checksum, EDITS, sample),
        "classifier": Target("s.pkl", files["cls"].read_bytes(), without_checksum, EDITS, judge),
        "snapshot's info": Target("s.pkl", info, lambda base, changes: snapshot_bytes(
            root, files["denoiser"], change(base, changes)), CHANGES, sample),
        "classifier's info": Target("s.pkl", info, lambda base, changes: snapshot_bytes(
            root, files["classifier"], change(base, changes)), CHANGES, judge),
        "state": Target("s.pt", torch_bytes(state), inside_zip, EDITS, resume),
        "state's content": Target("s.pt", state, lambda base, changes: torch_bytes(change(base, changes)), CHANGES,
                                  resume),
        "reference": Target("r.npz", files["ref"].read_bytes(), inside_zip, EDITS, [
            ("fid", "calc --images={zip} --ref={file} --num=8 --detector=pixels --device=cpu")]),
        "images .npz": Target("i.npz", pack, inside_zip, EDITS, [measure, build]),
        "images .pk": Target("i.pk", pickle.dumps({"images": pictures, "labels": labels.tolist()}, 4), spoil, EDITS,
                             [build]),
        "images .pk, content": Target(
            "i.pk", {"images": pictures, "labels": [0, 1] * 4, "flags": [1] * 8},
            lambda base, changes: pickle.dumps(change(base, changes)), CHANGES, [build]),
        "STL-10": Target("stl10/train_X.bin", stl10, spoil, EDITS, [
            ("dataset_tool", "--source={file} --dest={new} --resolution=32x32")]),
        "STL-10, labels": Target("stl10_labels/train_y.bin", b"\1\2", spoil, EDITS, [
            ("dataset_tool", "--source={root}/stl10_labels --dest={new} --resolution=32x32")]),
        "list of Clothing1M": listed(published.make_clothing1m, "noisy_label_kv.txt"),
        "keys of Clothing1M": listed(published.make_clothing1m, "clean_train_key_list.txt", "--part=clean"),
        "list of WebVision": listed(published.make_webvision, "info/train_filelist_google.txt"),
        "list of Food-101N": listed(published.make_food101n, "meta/verified_train.tsv", "--part=verified"),
        "attributes of CelebA": listed(published.make_celeba, "list_attr_celeba.txt", "--label_key=Male"),
        "attributes of CelebA, CSV": Target("kaggle/list_attr_celeba.csv", attributes, spoil, EDITS, [
            ("dataset_tool", "--source={root}/kaggle --dest={new} --label_key=Male")]),
        "CIFAR": Target("c.tar.gz", cifar, inside_tar, EDITS, [build]),
        "CIFAR, packed": Target("c.tar.gz", cifar, spoil, EDITS, [build]),
        "MNIST": Target("mnist/train-images-idx3-ubyte.gz", idx.read_bytes(), inside_gzip, EDITS, [build]),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Command lines.

COMMANDS = [
    ("dataset_tool", [], "--source={zip} --dest={new}"),
    ("dataset_tool", [], "--source=digits --dest={new} --max-images=5"),
    ("generate", [], "--network={pkl} --outdir={new} " + " ".join(FAST)),
    ("generate", [], "--network={pkl} --outdir={new} --solver=euler --disc=vp " + " ".join(FAST)),
    ("fid", ["calc"], "--images={zip} --ref={ref} --num=8 --detector=pixels --device=cpu"),
    ("fid", ["evaluate"], "--images={zip} --data={zip} --detector=pixels --nearest_k=1 --device=cpu"),
    ("fid", ["ref"], "--data={zip} --dest={new} --detector=pixels --device=cpu"),
    ("train", [], "--data={zip} --outdir={new} -n " + " ".join(TINY)),
    ("train_classifier", [], "--data={zip} --outdir={new} -n " + " ".join(TINY)),
    ("train_noise", [], "--data={zip} --outdir={new} --cls={cls} -n " + " ".join(TINY)),
    ("train_discriminator", [], "--data={zip} --outdir={new} --label-path={ref} -n " + " ".join(TINY)),
    ("detect_noise", [], "--data={zip} --dest={new}.npz --epochs=1 --device=cpu"),
]  # fmt: skip
VALUES = [
    "", "0", "1", "-1", "2", "3", "0.5", "nan", "inf", "-inf", "1e308", "1e-320", "1e30", "99999999999999999999",
    "4294967296", "abc", "a,b", "0-3", "5-1", "0-99999999999", "é", "\x1b[2J", "*", "[", "no such file", ".",
    "/dev/null", "/dev/zero", "http://127.0.0.1:1/x", "https://127.0.0.1:1/x.pkl", "https://", "latest", "{zip}",
    "{pkl}", "{cls}", "{ref}", "{state}", "1x1", "64x64", "99999x99999", "sym", "matrix", "true",
]  # fmt: skip
WRITES = ["", "{new}", "{zip}", ".", "/dev/null", "/dev/null/x", "{new}/x", "{new}.zip", "{new}.png", "no\x1b[2J"]
# --wandb and --tensorboard need other packages, --compile takes minutes.
LEFT_OUT = {"--wandb", "--tensorboard", "--compile", "--help"}


def options(name: str, path: list[str]) -> list[click.Option]:
    command = SCRIPTS[name].main
    for part in path:
        command = command.commands[part]
    return [p for p in command.params if isinstance(p, click.Option) and not LEFT_OUT & set(p.opts)]


@st.composite
def command_lines(draw) -> tuple[str, str, list[str]]:
    """Draw a correct command, and options to add to it. Most of their values are wrong."""
    name, path, base = draw(st.sampled_from(COMMANDS))
    added = []
    for _ in range(draw(st.integers(1, 3))):
        option = draw(st.sampled_from(options(name, path)))
        spelling = option.opts[0]
        if option.is_flag:
            added.append(spelling)
            continue
        values = WRITES if spelling in ("--outdir", "--dest", "--out", "--grid") else VALUES
        if isinstance(option.type, click.Choice):
            values = [*option.type.choices, "abc"]
        value = draw(st.sampled_from(values))
        forms = [f"{spelling}={value}"] * 9 + [f"{spelling.replace('_', '-')}={value}", f"--x{spelling}", spelling]
        added.append(draw(st.sampled_from(forms)))
    return name, " ".join([*path, base]), added
