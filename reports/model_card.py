"""The page that goes with an exported network: what it makes, from which data, how noisy they were, how it was trained.

README.md in the form of a model card, as the Hugging Face Hub shows it. See docs/export.md.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

import dnnlib
from reports.page import markdown_table
from torch_utils import safe_files

__all__ = ["USES", "model_card", "read_noise_rate", "read_results"]

METHODS = {  # name in a snapshot: what it is, and the page that describes it
    "cep": ("denoising score matching with noise on the embeddings of labels (CEP)", "posterior"),
    "classifier": ("a time-dependent classifier", "tdsm"),
    "ddgan": ("denoising diffusion GAN (DDGAN)", "rduot"),
    "discriminator": ("a discriminator of right and wrong labels (SBDC)", "sbdc"),
    "dmis": ("a denoiser that is its own classifier (DMIS)", "posterior"),
    "dsm": ("denoising score matching, as in EDM", "edm"),
    "rduot": ("robust diffusion by unbalanced optimal transport (RDUOT)", "rduot"),
    "tdsm": ("transition-aware weighted denoising score matching (TDSM)", "tdsm"),
}
_TENSORS = (
    "# x: noisy images [N,C,H,W]; sigma: their noise levels [N]; class_labels: one-hot [N,classes], if there are any"
)
_PYTHON = """import cleanscore

net = cleanscore.load("PATH_OF_THIS_FOLDER")
cleanscore.sample(net, 16).save("out")"""
USES = {  # how the files of each format are used
    "safetensors": _PYTHON,
    "snapshot": _PYTHON,
    "diffusers": """from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("PATH_OF_THIS_FOLDER", trust_remote_code=True)
images = pipe(batch_size=16).images""",
    "torchscript": f"""import torch

{_TENSORS}
net = torch.jit.load("model.pt")
denoised = net(x, sigma, class_labels)""",
    "onnx": f"""import onnxruntime

{_TENSORS}
net = onnxruntime.InferenceSession("model.onnx")
denoised = net.run(["denoised"], dict(x=x, sigma=sigma, class_labels=class_labels))[0]""",
}
SHOWN = 20  # names of classes


def model_card(
    name: str,
    snapshot: Mapping[str, Any],
    form: str,
    *,
    results: Mapping[str, Any] | None = None,
    noise_rate: tuple[float, tuple[float, float] | None] | None = None,
    sheet: str | None = None,
    license: str = "unknown",
) -> str:
    """Return the page in Markdown.

    snapshot    as `load_snapshot` returns it
    form        what the network was exported as, one of USES
    results     what `read_results` returns; None: not measured
    noise_rate  what `read_noise_rate` returns; None: not measured
    sheet       file name of a picture of samples beside the page
    license     name of the license of the weights, as the Hub spells it

    UserError: what the snapshot says about its training cannot be shown.
    """
    net, info = snapshot["ema"], snapshot["info"]
    try:
        told = {"Data": _data(snapshot), "Noise found": _noise(info, noise_rate), "Method": _method(info)}
    except (ArithmeticError, TypeError, ValueError) as e:
        raise dnnlib.UserError(f"what the snapshot says about its training cannot be shown: {e}") from None
    channels = {1: "gray", 3: "RGB"}.get(net.img_channels, f"{net.img_channels}-channel")
    size = sum(parameter.numel() for parameter in net.parameters())
    library = "diffusers" if form == "diffusers" else "cleanscore"
    head = [
        "---",
        f"license: {license}",
        f"library_name: {library}",
        "tags: [diffusion, noisy-labels, cleanscore]",
        "---",
    ]
    what = (
        f"A {net.network_kind} ({type(net).__name__}, {size:,} parameters) for {net.img_resolution}x"
        f"{net.img_resolution} {channels} images with {net.label_dim or 'no'} classes, exported by cleanscore "
        f"{dnnlib.__version__}."
    )
    picture = [] if sheet is None else ["", f"![Samples: one column per class]({sheet})"]
    sections = {
        **told,
        "Results": _results(results),
        "Use": ["```python", *USES[form].splitlines(), "```"],
        "License": [f"Weights: {license}. The code of cleanscore is under the Apache License 2.0."],
    }
    body = [line for title, lines in sections.items() for line in ("", f"## {title}", "", *lines)]
    return "\n".join([*head, "", f"# {_plain(name)}", "", what, *picture, *body, ""])


def _plain(text: Any) -> str:
    """Return a name from a file of a stranger as one line that Markdown shows as it is."""
    return "".join(f"\\{c}" if c in r"\`*_[]<>#|!" else c for c in dnnlib.one_line(str(text)))


def _dict(value: Any) -> dict[str, Any]:
    """Return a value from a file of a stranger, an empty dict in place of one that is no dict."""
    return value if isinstance(value, dict) else {}


def _data(snapshot: Mapping[str, Any]) -> list[str]:
    info = snapshot["info"]
    options = _dict(info.get("options"))
    path = _dict(options.get("dataset")).get("path") or snapshot["dataset_kwargs"].get("path")
    lines = ["The snapshot does not say which images it was trained on."]
    if path:
        count = _dict(_dict(options.get("contents")).get("dataset.path")).get("images")
        lines = [f"{_plain(os.path.basename(str(path)))}" + (f", {count:,} images." if isinstance(count, int) else ".")]
    names = info.get("class_names")
    if names:
        more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
        lines += ["", f"Classes, from number 0: {', '.join(map(_plain, names[:SHOWN]))}{more}."]
    return lines


def _noise(info: Mapping[str, Any], found: tuple[float, tuple[float, float] | None] | None) -> list[str]:
    lines = []
    if found is not None:
        rate, interval = found
        between = "" if interval is None else f", between {interval[0]:.1%} and {interval[1]:.1%}"
        lines.append(f"About {rate:.1%} of the labels are wrong{between}, by a label file of detect_noise.py.")
    if info.get("transition") is not None:
        T = np.asarray(info["transition"], dtype=float)
        if T.ndim != 2 or not T.size or T.shape[0] != T.shape[1] or not np.isfinite(T).all():
            raise ValueError("its transition is no square matrix of finite numbers")
        wrong = 1 - np.trace(T) / len(T)
        lines.append(f"The training counted on {wrong:.1%} wrong labels, on average over the classes.")
    return lines or ["Not on record: how many labels are wrong was neither stated nor estimated."]


def _method(info: Mapping[str, Any]) -> list[str]:
    method, o = info.get("method"), _dict(info.get("options"))
    text, page = METHODS.get(str(method), (_plain(method) if method else "not on record", None))
    lines = [f"Trained by {text}" + (f": docs/methods/{page}.md of cleanscore." if page else ".")]
    posterior = _dict(o.get("posterior"))
    if posterior:
        lines.append(f"Labels came from a posterior, mode {_plain(posterior.get('mode'))}.")
    if isinstance(info.get("nimg"), int):
        batch, precision = o.get("batch_size"), o.get("precision")
        lines.append(f"Length: {info['nimg'] / 1000:,.1f} thousand images" + (
            f" in batches of {_plain(batch)}, {_plain(precision)}." if batch else "."
        ))  # fmt: skip
    return lines


def _results(results: Mapping[str, Any] | None) -> list[str]:
    if results is None:
        return [
            "Not measured. `fid.py evaluate --out=X.json` of cleanscore measures, `export.py --results=X.json` shows."
        ]
    values = [[_plain(name), "-" if value is None else f"{value:.4g}"] for name, value in results["metrics"].items()]
    reference = _plain(os.path.basename(str(results.get("data", "unknown"))))
    count, detector = _plain(results.get("num_images", "?")), _plain(results.get("detector"))
    about = f"{count} images against {reference}, detector {detector}."
    return [*markdown_table(["metric", "value"], values), "", about]


def read_results(path: str) -> dict[str, Any]:
    """Return the values in a file of `fid.py evaluate --out`. UserError: it is another file."""
    results = safe_files.load_json(dnnlib.read_bytes(path), path)
    metrics = results.get("metrics") if isinstance(results, dict) else None
    if not isinstance(metrics, dict) or not all(v is None or _finite(v) for v in metrics.values()):
        raise dnnlib.UserError(f"{path}: holds no metrics; expected a file of fid.py evaluate --out=X.json")
    return results


def _finite(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:  # an integer beyond any float
        return False


def read_noise_rate(path: str) -> tuple[float, tuple[float, float] | None]:
    """Return the share of wrong labels in a label file of detect_noise.py, and its interval if it has one."""
    expected = "expected a label file of detect_noise.py"
    arrays = safe_files.read_npz(path, expected)
    rate, interval = arrays.get("noise_rate"), arrays.get("noise_interval")

    def holds(value: np.ndarray, shape: tuple[int, ...]) -> bool:
        return value.shape == shape and value.dtype.kind in "iuf" and bool(((value >= 0) & (value <= 1)).all())

    if rate is None or not holds(rate, ()) or (interval is not None and not holds(interval, (2,))):
        raise dnnlib.UserError(f"{path}: holds no noise_rate from 0 to 1; {expected}")
    return float(rate), None if interval is None else tuple(interval.tolist())
