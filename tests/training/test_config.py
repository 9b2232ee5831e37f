"""The configuration of a run: what may change on resume, and files of other versions."""

import json

from tests.support.objectives import make_config
from training.config import differences, settle, to_dict


def changed(**changes):
    return differences(to_dict(make_config()), to_dict(make_config(**changes)))


def test_only_changeable_fields_may_differ():
    assert not changed(total_nimg=5, keep=9, num_processes=4, desc="again", wandb="project")
    assert not changed(dataset=dict(path="toy", cache=False))
    assert changed(batch_size=64) == ["batch_size: 32 there, 64 here"]
    assert changed(dataset=dict(path="other")) == ["dataset.path: toy there, other here"]
    assert changed(tdsm=dict(tau=0.5, temp=1.0)) == ["tdsm.tau: 0.01 there, 0.5 here"]
    assert not differences(to_dict(make_config(seed=1)), to_dict(make_config(seed=2)), besides=["seed"])


def test_sections_and_keys_of_other_versions():
    config = json.loads(json.dumps(to_dict(make_config())))  # as a file holds it: lists for tuples
    older = {key: value for key, value in config.items() if value is not None}
    assert not differences(older, config) and not differences(config, older)
    assert differences(config | dict(new_in_a_later_version=1), config)
    later = config | dict(discriminator=dict(shift=0.5))
    assert differences(config, later) == ["discriminator.shift: None there, 0.5 here"]


def test_contents_that_a_damaged_state_records():
    config, known = to_dict(make_config()), dict(images=9, labels="a")

    def resumed(contents):
        return differences(config | dict(contents=contents), config | dict(contents={"dataset.path": known}))

    assert resumed({"dataset.path": dict(images=8)}) == ["dataset.path: toy holds 9 images instead of 8"]
    assert resumed({"dataset.path": dict(images="x")}) == ["dataset.path: toy holds other images"]
    for nothing in (None, True, 7, [1], {"dataset.path": 3}):  # then paths are compared
        assert resumed(nothing) == []


def test_settled_fields_are_those_of_the_run_that_continues():
    """A run that began before there was calibration goes on without it, unless somebody asks for another run."""

    def settled(old, **given):
        config = make_config(discriminator=given)
        settle(config, old)
        return config.discriminator.calibrate, [] if old is None else differences(old, to_dict(config))

    def state(**known):
        old = json.loads(json.dumps(to_dict(make_config(discriminator={}))))
        del old["discriminator"]["calibrate"]
        old["discriminator"].update(known)
        return old

    assert settled(None) == (0.1, []) and settled(None, calibrate=0.0) == (0.0, [])
    assert settled(state()) == settled(state(), calibrate=0.0) == settled(state(calibrate=0.0)) == (0.0, [])
    assert settled(state(calibrate=0.3)) == (0.3, [])
    assert settled(state(), calibrate=0.2) == (0.2, ["discriminator.calibrate: 0.0 there, 0.2 here"])
