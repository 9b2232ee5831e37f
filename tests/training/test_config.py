"""The configuration of a run: what may change on resume, and files of other versions."""

import json

from tests.support.objectives import make_config
from training.config import differences, to_dict


def changed(**changes):
    return differences(to_dict(make_config()), to_dict(make_config(**changes)))


def test_only_changeable_fields_may_differ():
    assert not changed(total_nimg=5, keep=9, num_processes=4, desc="again", wandb="project")
    assert not changed(dataset=dict(path="toy", cache=False))
    assert changed(batch_size=64) == ["batch_size: 32 there, 64 here"]
    assert changed(dataset=dict(path="other")) == ["dataset.path: toy there, other here"]
    assert changed(tdsm=dict(tau=0.5)) == ["tdsm.tau: 0.01 there, 0.5 here"]
    assert not differences(to_dict(make_config(seed=1)), to_dict(make_config(seed=2)), besides=["seed"])


def test_sections_and_keys_of_other_versions():
    config = json.loads(json.dumps(to_dict(make_config())))  # as a file holds it: lists for tuples
    older = {key: value for key, value in config.items() if value is not None}
    assert not differences(older, config) and not differences(config, older)
    assert differences(config | dict(new_in_a_later_version=1), config)
    later = config | dict(discriminator=dict(shift=0.5))
    assert differences(config, later) == ["discriminator.shift: None there, 0.5 here"]
