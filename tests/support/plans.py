"""Plans of commands: do they parse, and does each read only what an earlier one has made?"""

import shlex

import click

from quickstart import SCRIPTS

READ = (
    "data", "network", "cls", "posterior", "label-path", "discriminator", "images", "detector", "judge", "test",
    "outlier_data", "source", "outliers", "noise_matrix", "labels",
)  # fmt: skip
WRITTEN = ("dest", "outdir", "out", "features", "cleaned")


def options(step):
    """Return the script of a step, its arguments, and its options by name."""
    script, *words = shlex.split(step.command)
    return script, [word for word in words if not word.startswith("--")], dict(
        word[2:].partition("=")[::2] for word in words if word.startswith("--")
    )  # fmt: skip


def parse(steps):
    """Let the scripts read the options of all steps, and run nothing."""
    for step in steps:
        script, *words = shlex.split(step.command)
        command = SCRIPTS[script].main
        if isinstance(command, click.Group):
            command, words = command.commands[words[0]], words[1:]
        command.make_context(script, words)


def check_order(steps, given):
    """Assert that each step reads only what is `given`, or what an earlier one has made. Return all of that."""
    made = {*given}
    for step in steps:
        _, _, found = options(step)
        for name in READ:
            if name in found and found[name] not in ("drop", "ambient"):
                assert found[name] in made, f"{step.name} reads {found[name]}"
        made |= {found[name] for name in WRITTEN if name in found}
        if step.command.startswith("detect_noise.py"):
            made.add(found["dest"].replace(".npz", "-classifier.pkl"))
    return made
