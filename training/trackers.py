"""Trackers: TensorBoard and Weights & Biases, which show a run while it trains.

Both get the scalars of `stats.jsonl`, the sheets of samples, the hyperparameters, and the transition matrix T where
the method knows one. A tracker that fails is left out for the rest of the run; the training goes on.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import dnnlib
from torch_utils.distributed import print0
from training.config import RunConfig, flatten, to_dict

__all__ = ["WANDB_MODES", "Trackers", "check_package", "check_wandb", "transition_picture"]

WANDB_MODES = ("online", "offline")
WANDB_ID = "wandb-run-id.txt"  # in the run directory: the run at Weights & Biases that a continued run goes on with
CELL, WIDEST = 28, 1024  # pixels: side of an entry of T, and of the largest picture
PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
PAPER, INK = np.array([255, 255, 255]), np.array([8, 48, 107])  # the colors of 0 and 1


def check_package(tracker: str) -> None:
    """Raise UserError, which names the package, unless that of a tracker, 'tensorboard' or 'wandb', can be imported."""
    try:
        importlib.import_module(PACKAGES[tracker])
    except ImportError:
        raise dnnlib.UserError(f"needs the package {tracker}: pip install {tracker}") from None


def check_wandb(mode: str | None, key: str | None) -> None:
    """Make sure that Weights & Biases lets a run in, as far as that can be known beforehand.

    `mode`: one of WANDB_MODES; None: what the environment variable WANDB_MODE says. `key`: None for the one in the
    environment variable WANDB_API_KEY or the one that `wandb login` has stored. UserError: there is no valid key, or
    the server cannot be reached.
    """
    import wandb  # optional dependency

    if key is not None:
        os.environ["WANDB_API_KEY"] = key  # not through `login`, which would store it in a file
    if (mode or os.environ.get("WANDB_MODE", "online")) not in ("online", "run", "shared"):
        return
    try:
        quiet = dict(prompt=False) if "prompt" in inspect.signature(wandb.login).parameters else {}  # older ones ask
        fine = wandb.login(verify=True, timeout=30, **quiet)
        reason = "there is no API key"
    except Exception as e:  # wandb's own errors, those of its requests, those of its service
        fine, reason = False, str(e) or type(e).__name__
    if not fine:
        raise dnnlib.UserError(
            f"Weights & Biases does not let this run in ({dnnlib.one_line(reason).rstrip('.')}); set the environment "
            "variable WANDB_API_KEY, or record offline (WANDB_MODE=offline) and send the run later with `wandb sync`"
        )


class Trackers:
    """The trackers that a configuration asks for, for a run in `run_dir` that has seen `nimg` images.

    One process has them. Any failure is printed once, and its tracker gets nothing more.
    """

    def __init__(self, config: RunConfig, run_dir: str, nimg: int = 0):
        self._trackers: list[TensorBoard | WandB] = []
        for wanted, tracker in ((config.tensorboard, TensorBoard), (config.wandb, WandB)):
            if wanted:
                self._guarded(tracker.__name__, lambda tracker=tracker: self._add(tracker(config, run_dir, nimg)))

    def _add(self, tracker: TensorBoard | WandB) -> None:
        self._trackers.append(tracker)

    def _guarded(self, name: str, action: Callable[[], Any]) -> bool:
        try:
            action()
        except Exception as e:  # whatever it is, the training is worth more
            print0(f"Warning: {name} failed and gets nothing more: {dnnlib.one_line(str(e) or type(e).__name__)}")
            return False
        return True

    def _all(self, action: Callable[[Any], Any]) -> None:
        self._trackers = [t for t in self._trackers if self._guarded(type(t).__name__, lambda t=t: action(t))]

    def scalars(self, values: dict[str, float], nimg: int) -> None:
        """Report statistics by name after `nimg` images."""
        self._all(lambda tracker: tracker.scalars(values, nimg))

    def picture(self, name: str, image: np.ndarray, nimg: int) -> None:
        """Report a picture, uint8 [H,W,3], after `nimg` images."""
        self._all(lambda tracker: tracker.picture(name, image, nimg))

    def snapshot(self, info: dict[str, Any], sheet: str | None, nimg: int) -> None:
        """Report what a snapshot shows: the sheet of samples beside it, a PNG or None, and T where `info` has it."""
        if self._trackers and sheet is not None:
            with Image.open(sheet) as image:
                self.picture("samples", np.asarray(image.convert("RGB")), nimg)
        if self._trackers and info.get("transition") is not None:
            self.picture("transition", transition_picture(info["transition"], info.get("class_names")), nimg)

    def close(self) -> None:
        """Finish everything that is under way."""
        self._all(lambda tracker: tracker.close())
        self._trackers = []


class TensorBoard:
    """Writes event files into the run directory. A continued run replaces what comes after its state."""

    def __init__(self, config: RunConfig, run_dir: str, nimg: int):
        from torch.utils.tensorboard import SummaryWriter  # optional dependency
        from torch.utils.tensorboard.summary import hparams  # optional dependency

        # TensorBoard purges from this step on. The events at `nimg` came before the state was saved, and stay.
        self._writer = SummaryWriter(run_dir, purge_step=nimg + 1 if nimg else None)
        plain = {k: v if isinstance(v, (bool, int, float, str)) else json.dumps(v) for k, v in flat(config).items()}
        # Not `add_hparams`, which makes a run of its own in a folder of its own.
        for summary in hparams(plain, {"Loss/loss": 0.0}):
            self._writer.file_writer.add_summary(summary)
        self._writer.add_text("options", f"    {json.dumps(to_dict(config), indent=2)}".replace("\n", "\n    "), nimg)
        self._writer.flush()

    def scalars(self, values: dict[str, float], nimg: int) -> None:
        """See `Trackers`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, nimg)
        self._writer.flush()

    def picture(self, name: str, image: np.ndarray, nimg: int) -> None:
        """See `Trackers`."""
        self._writer.add_image(name, image, nimg, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """See `Trackers`."""
        self._writer.close()


class WandB:
    """Sends the run to Weights & Biases, or records it offline for `wandb sync`. A continued run goes on there too."""

    def __init__(self, config: RunConfig, run_dir: str, nimg: int):
        import wandb  # optional dependency

        self._wandb, path = wandb, os.path.join(run_dir, WANDB_ID)
        number, resume = config.wandb_resume, "must"
        if number is None:
            resume = "allow"
            if nimg and os.path.exists(path):
                with open(path) as f:
                    number = f.read().strip() or None
        self._run = wandb.init(
            project=config.wandb,
            dir=run_dir,
            config=to_dict(config),
            name=os.path.basename(os.path.abspath(run_dir)),
            id=number,
            resume=resume if number else None,
            mode=config.wandb_mode,
        )
        with dnnlib.atomic_open(path, "wt") as f:
            f.write(f"{self._run.id}\n")

    def scalars(self, values: dict[str, float], nimg: int) -> None:
        """See `Trackers`."""
        self._run.log(values, step=nimg)

    def picture(self, name: str, image: np.ndarray, nimg: int) -> None:
        """See `Trackers`."""
        self._run.log({name: self._wandb.Image(Image.fromarray(image))}, step=nimg)

    def close(self) -> None:
        """See `Trackers`."""
        self._run.finish()


def flat(config: RunConfig) -> dict[str, Any]:
    """Return the hyperparameters by 'section.field', without what is not set."""
    return {name: value for name, value in flatten(to_dict(config)).items() if value is not None}


def transition_picture(T: Any, class_names: list[str] | None = None) -> np.ndarray:
    """Return T [C,C] as a picture, uint8 [H,W,3]: one row per clean class, one column per label, darker for more.

    Up to 20 classes have names and percentages; the entries of more classes are plain cells.
    """
    T = np.clip(np.nan_to_num(np.asarray(T, dtype=np.float64)), 0, 1)
    c = len(T)
    shades = (PAPER + T[:, :, None] * (INK - PAPER)).round().astype(np.uint8)
    side = min(CELL, max(WIDEST // max(c, 1), 1))
    cells = Image.fromarray(shades.repeat(side, axis=0).repeat(side, axis=1))
    if side < CELL or c > 20:
        return np.asarray(cells)
    font = ImageFont.load_default()
    names = [str(name)[:16] for name in (class_names or range(c))]
    left = 6 + max(int(font.getlength(name)) for name in names)
    picture = Image.new("RGB", (left + c * side, (c + 1) * side), "white")
    picture.paste(cells, (left, side))
    draw = ImageDraw.Draw(picture)
    for i, name in enumerate(names):
        draw.text((left - 4, int((i + 1.5) * side)), name, fill="black", font=font, anchor="rm")
        draw.text((left + int((i + 0.5) * side), side // 2), name[:4], fill="black", font=font, anchor="mm")
        for j in range(c):
            at = (left + int((j + 0.5) * side), int((i + 1.5) * side))
            fill = "white" if T[i, j] > 0.5 else "black"
            draw.text(at, f"{100 * T[i, j]:.0f}", fill=fill, font=font, anchor="mm")
    return np.asarray(picture)
