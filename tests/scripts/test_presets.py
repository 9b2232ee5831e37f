"""--preset: every preset of every script gives the configuration it says, and every option overrides it."""

import json
import re

import click
import pytest
from click.testing import CliRunner

import detect_noise
import train
import train_classifier
import train_discriminator
import train_noise
import train_rduot
from tests.support.synth import make_archive, pictures
from training.presets import PRESETS

SCRIPTS = {
    f"{module.__name__}.py": module.main
    for module in (train, train_classifier, train_noise, detect_noise, train_discriminator, train_rduot)
}
# Where the configuration has an option, for those that all runs share.
PLACES = dict(
    batch=("batch_size",),
    arch=("network", "arch"),
    lr=("optimizer", "lr"),
    P_mean=("noise_levels", "P_mean"),
    P_std=("noise_levels", "P_std"),
    dropout=("network", "kwargs", "dropout"),
    snap=("snapshot_ticks",),
    dump=("state_ticks",),
    tick=("kimg_per_tick",),
    temp=("tdsm", "temp"),
    tau=("tdsm", "tau"),
    cost=("rduot", "cost"),
    r1_gamma=("rduot", "r1_gamma"),
    num_timesteps=("rduot", "num_timesteps"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_archive(tmp_path_factory.mktemp("presets") / "d.zip", pictures(32), [i % 4 for i in range(32)])


def configuration(script, data, *args):
    needed = {"train_noise.py": [f"--cls={data}"], "train_discriminator.py": [f"--label-path={data}"]}
    command = [f"--outdir={data}.out", f"--data={data}", "--dry-run", "--seed=0", *needed.get(script, []), *args]
    result = CliRunner().invoke(SCRIPTS[script], command)
    assert result.exit_code == 0, result.output
    return json.loads(re.search(r"Training options:\n(\{.*?\n\})", result.output, re.S)[1])


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: f"{preset.script}-{preset.name}")
def test_presets_are_options_that_the_script_accepts(preset):
    params = {param.name: param for param in SCRIPTS[preset.script].params}
    assert preset.options.keys() <= params.keys()
    for name, value in preset.options.items():
        converted = params[name].type.convert(value, params[name], click.Context(SCRIPTS[preset.script]))
        assert converted == value or name == "ch_mult"
    assert preset.result


@pytest.mark.parametrize(
    "preset", [p for p in PRESETS if p.script != "detect_noise.py"], ids=lambda preset: f"{preset.script}-{preset.name}"
)
def test_presets_reach_the_configuration(preset, data):
    config = configuration(preset.script, data, f"--preset={preset.name}")
    assert config["total_nimg"] == round(preset.options["duration"] * 1e6)
    compared = 0
    for name, place in PLACES.items():
        if name in preset.options:
            value = config
            if preset.script == "train_rduot.py" and name == "tau":
                place = ("rduot", "tau")
            for key in place:
                value = value[key]
            assert value == preset.options[name], name
            compared += 1
    assert compared >= 3


@pytest.mark.parametrize(
    "preset", [p for p in PRESETS if p.options.get("duration", 10) < 1], ids=lambda preset: preset.script
)
def test_short_runs_save_states_on_the_way(preset):
    """With the default of --dump, which is for long runs, a killed run would have none to continue from."""
    assert preset.options["tick"] * preset.options["dump"] <= preset.options["duration"] * 1000 / 4


def test_options_override_presets(data):
    config = configuration("train.py", data, "--preset=digits", "--batch=64", "--P_mean=-1")
    assert config["batch_size"] == 64 and config["noise_levels"]["P_mean"] == -1
    assert config["optimizer"]["lr"] == 3e-3  # the rest is the preset's
    assert configuration("train.py", data, "--batch=64", "--preset=digits")["batch_size"] == 64
    # The noise levels of a preset are for its preconditioning.
    assert "P_mean" not in configuration("train.py", data, "--preset=digits", "--precond=vp")["noise_levels"]
    # A preset's length gives way to a number of epochs, its cost to the baseline.
    config = configuration("train_rduot.py", data, "--preset=photos", "--num_epoch=3", "--method=ddgan")
    assert config["total_nimg"] == 96 and config["rduot"]["cost"] == "pixels" and config["rduot"]["tau"] == 0


def test_a_presets_weight_of_the_cost_goes_with_its_own_cost(data):
    cases = [([], 0.001), (["--cost=robust"], 10), (["--cost=robust", "--tau=3"], 3), (["--cost=standardized"], 0.001)]
    for args, tau in cases:
        assert configuration("train_rduot.py", data, "--preset=cifar10", *args)["rduot"]["tau"] == tau
    assert configuration("train_rduot.py", data, "--preset=celeba64", "--cost=features")["rduot"]["tau"] == 0.001


def test_help_shows_presets_with_their_results():
    for script, command in SCRIPTS.items():
        text = CliRunner().invoke(command, ["--help"]).output
        for preset in PRESETS:
            if preset.script == script:
                assert preset.result.split(";")[0] in re.sub(r"\s+", " ", text)
                assert all(f"--{name}=" in text for name in preset.options)
