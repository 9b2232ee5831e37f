"""What the options of generate.py mean: lists of classes, and what has no effect and is said to have none."""

import click
import pytest
import torch

from sampling.options import find_classes
from tests.support.generated import make, random_network, run
from tests.support.pickles import module_state, persistent, write
from torch_utils import persistence

NAMES = ["zero", "one", "two"]


@pytest.mark.parametrize(
    "text, found",
    [
        ("1", [1]),
        ("two", [2]),
        ("TWO,zero", [2, 0]),
        ("0-1, two", [0, 1, 2]),
        ("a, b,zero", [3, 0]),
        ("2", [2]),
        ("9", [4]),
        ("3", [3]),
        ("x", [5]),
        ("X", [6]),
        ("A, B,ONE", [3, 1]),
        ("3,2", [3, 2]),
        ("3,9", [7, 4]),  # 9 can only be a name
        ("2,9", [2, 4]),  # and 2 only a number
        ("3,x", [3, 5]),
    ],
)
def test_classes_have_names_and_numbers(text, found):
    assert find_classes(text, 8, [*NAMES, "a, b", "9", "x", "X", "3"]) == found


@pytest.mark.parametrize("text", ["1,2,3", "1-3", "1,2-3"])
def test_numbers_that_are_names_from_one_on(text):
    assert find_classes(text, 3, ["1", "2", "3"]) == [0, 1, 2]
    assert find_classes("1,2", 3, ["1", "2", "3"]) == [1, 2]


def test_a_list_that_may_mean_two_things_is_refused():
    with pytest.raises(click.UsageError, match="--class=0,1,3: some of these are names only"):
        find_classes("0,1,3", 3, ["1", "2", "3"])


@pytest.mark.parametrize(
    "text, words",
    [("nul", "--class=nul: this network knows classes 0 to 2, "), ("tow", "two"), ("1,3", "--class=3: this network"),
     ("-1", "--class=-1"), ("5-1", "--class=5-1"), ("1,,2", "--class=: ")],
)  # fmt: skip
def test_unknown_classes_are_named(text, words):
    with pytest.raises(click.UsageError, match=words):
        find_classes(text, 3, NAMES)


@pytest.mark.parametrize(
    ("dropout", "mode", "cfg", "warned"),
    [(0, None, 2, True), (0, "relabel", 0, True), (0.1, None, 2, False), (0, "null", 2, False), (0, None, 1, False)],
)
def test_guidance_by_what_a_network_never_learned_is_noticed(tmp_path, dropout, mode, cfg, warned):
    info = dict(options=dict(posterior=mode and dict(mode=mode)))
    persistence.save_snapshot(tmp_path / "net.pkl", dict(ema=random_network(label_dropout=dropout), info=info))
    text = make(tmp_path / "out", f"--network={tmp_path / 'net.pkl'}", "--seeds=0", f"--cfg={cfg}")
    assert ("has learned no image without its label" in text) == warned


def test_settings_of_noise_that_is_not_added_are_noticed(tmp_path):
    persistence.save_snapshot(tmp_path / "net.pkl", dict(ema=random_network(), info={}))
    args = [f"--network={tmp_path / 'net.pkl'}", "--seeds=0", "--S_min=0.05", "--S_noise=1.003"]
    assert "--S_min and --S_noise change nothing" in make(tmp_path / "a", *args)
    assert "--S_min changes nothing" in make(tmp_path / "c", *args[:-1])
    assert "Note" not in make(tmp_path / "b", *args, "--S_churn=40")


def test_the_gate_may_be_open_at_the_top(tmp_path):
    """The value is the default that --help states."""
    result = run("--network=network.pkl", f"--outdir={tmp_path}/out", "--S_clip_max=inf")
    assert result.exit_code == 2 and "--S_clip_max=inf: needs --discriminator" in result.output


FOREIGN = """
import torch
class Foreign(torch.nn.Module):
    pass
"""


@pytest.mark.parametrize(
    "option, lacking",
    [
        ("network", "model, img_resolution, sigma_min, sigma_max, round_sigma"),
        ("discriminator", "img_resolution"),
    ],
)
def test_a_network_of_another_family_is_refused(tmp_path, option, lacking):
    """As those of EDM2, whose code runs when it is trusted."""
    persistence.save_snapshot(tmp_path / "network.pkl", dict(ema=random_network()))
    net = torch.nn.Module()
    net.img_channels, net.label_dim, net.unet = 1, 3, torch.nn.Conv2d(1, 1, 1)
    write(tmp_path / "foreign.pkl", dict(ema=persistent("Foreign", module_state(net), FOREIGN)))
    files = dict(network="network.pkl") | {option: "foreign.pkl"}
    options = [f"--{name}={tmp_path / file}" for name, file in files.items()]
    result = run(*options, f"--outdir={tmp_path}/out", "--trust_pickle", "--device=cpu")
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == 1 and f"Foreign lacks {lacking}; networks of other families" in line
    assert line.startswith(f"Error: --{option}: ")
