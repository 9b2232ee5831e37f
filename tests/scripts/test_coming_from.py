"""docs/coming-from.md: every cell says something, and what it says of our scripts is true."""

import re
from pathlib import Path

import click
import pytest

import dataset_tool
import detect_noise
import fid
import generate
import train
import train_classifier
import train_discriminator
import train_noise
import train_rduot
from metrics.evaluation import evaluate  # noqa: F401  (loads all metrics)
from tests.support.paths import ROOT

PAGE = (ROOT / "docs/coming-from.md").read_text()
MODULES = (
    dataset_tool,
    detect_noise,
    fid,
    generate,
    train,
    train_classifier,
    train_discriminator,
    train_noise,
    train_rduot,
)
SCRIPTS = {f"{module.__name__}.py": module.main for module in MODULES}


def tables():
    """Return (heading, [cells of a row]) of each table."""
    found, heading = [], ""
    for line in PAGE.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("|"):
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if not set("".join(cells)) <= set("-| ") and cells[0] != "theirs":
                found.append((heading, cells))
    return found


ROWS = tables()


def options(script):
    """Return all spellings of all options of a script, with dashes."""
    command = SCRIPTS[script]
    leaves = command.commands.values() if isinstance(command, click.Group) else [command]
    return {
        opt.replace("_", "-")
        for leaf in leaves
        for param in leaf.params
        for opt in (*param.opts, *param.secondary_opts)
    }


def named(text):
    """Return the options that a text names, with dashes."""
    return [option.replace("_", "-") for option in re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", text)]


def test_the_page_has_all_its_parts():
    headings = {heading for heading, _ in ROWS}
    assert {"Scripts", "Data sets", "Metrics"} <= headings and len(ROWS) > 100
    for system in ("EDM", "TDSM", "SBDC", "RDUOT", "DDGAN"):
        assert sum(system in cells[0] for _, cells in ROWS) >= 2, system


@pytest.mark.parametrize("heading, cells", ROWS, ids=[cells[0][:40] for _, cells in ROWS])
def test_no_cell_is_empty_without_a_reason(heading, cells):
    theirs, ours, remark = cells
    assert theirs
    if not re.search(r"`[^`]+`", ours):
        assert re.match(r"No: \w+", ours) and remark, cells


@pytest.mark.parametrize(
    "heading, cells", [row for row in ROWS if row[0].startswith("Options of")], ids=lambda value: str(value)[:40]
)
def test_options_are_those_of_the_scripts_named(heading, cells):
    """Ours exist in one of the heading's scripts, and published ones keep their names unless another is given."""
    theirs, ours, _ = cells
    scripts = re.findall(r"`(\w+\.py)`", heading)
    known = set().union(*(options(script) for script in scripts)) - {"--help"}
    here = named(ours)
    assert set(here) <= known, set(here) - known
    if set(named(theirs)) & set(here):
        assert named(theirs) == here  # a row renames all of its options, or none


def published(script, text):
    assert set(named(text)) <= options(script), set(named(text)) - options(script)


def test_published_spellings_are_accepted():
    """What the published READMEs and --help texts list, and no reason excludes."""
    edm = "--outdir --data --cond --arch --precond --duration --batch --batch-gpu --cbase --cres --lr --ema --dropout "
    edm += "--augment --xflip --fp16 --ls --bench --cache --workers --desc --nosubdir --tick --snap --dump --seed "
    edm += "--transfer --resume --dry-run"
    for script in ("train.py", "train_classifier.py", "train_noise.py", "train_discriminator.py"):
        published(script, edm)
    published("train_noise.py", "--cls --noise_type --noise_rate --resume_sub")
    published("train_discriminator.py", "--label-path --simix --wandb-project --wandb-resume --wandb-api-key")
    rduot = "--centered --use_geometric --beta_min --beta_max --num_channels_dae --n_mlp --ch_mult --num_res_blocks "
    rduot += (
        "--attn_resolutions --dropout --embedding_type --not_use_tanh --nz --num_timesteps --z_emb_dim --t_emb_dim "
    )
    rduot += "--batch_size --num_epoch --ngf --lr_g --lr_d --beta1 --beta2 --no_lr_decay --use_ema --ema_decay "
    rduot += "--r1_gamma --lazy_reg --seed --resume --tau --phi1 --phi2 --schedule"
    published("train_rduot.py", rduot)
    table = {option for _, cells in ROWS for option in named(cells[0])}
    assert set(named(f"{edm} {rduot}")) <= table | {"--resume"}


def test_metrics_exist():
    sources = "\n".join(path.read_text() for path in Path(ROOT, "metrics").glob("*.py"))
    for heading, cells in ROWS:
        if heading == "Metrics":
            for name in re.findall(r"`(\w+)`", cells[1]):
                base = name.removeprefix("cw_")
                assert re.search(rf'"{name}"|"{base}"|\b{base}=', sources), name
