"""A part of the reference for the metrics whose time grows with its square."""

import numpy as np
import pytest
import torch

from metrics.features import Features
from metrics.format import format_table
from metrics.kid import kid_from_features
from metrics.prdc import prdc
from metrics.settings import EvaluationSettings
from metrics.table import evaluate_features


def table(num_reference, seed=3):
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    sets = [Features(torch.from_numpy(rng.standard_normal([90, 4]) + i), None, None) for i in range(2)]
    settings = EvaluationSettings("data.zip", "pixels", num_reference=num_reference, seed=seed)
    return evaluate_features(*sets, labels, labels, settings), *(x.features for x in sets)


def test_only_pairs_of_the_whole_sets_are_fewer():
    all_of_it, real, fake = table(None)
    part, *_ = table(40)
    chosen = real[np.sort(np.random.default_rng(3).permutation(90)[:40])]
    expected = dict(kid=kid_from_features(chosen, fake))
    expected |= {f"{name}_k5": value for name, value in prdc(chosen, fake, 5).items()}
    assert {name: part["metrics"][name] for name in expected} == expected
    assert part["metrics"]["kid"] != all_of_it["metrics"]["kid"] != table(40, seed=4)[0]["metrics"]["kid"]
    for name, value in all_of_it["metrics"].items():
        if name not in expected:
            assert part["metrics"][name] == value
    assert (part["num_reference"], part["reference_subset"]) == (90, 40)


@pytest.mark.parametrize("number, said", [(40, "90, clean labels, 40 for KID and neighbors"), (90, "90, clean labels")])
def test_the_table_says_so(number, said):
    result, *_ = table(number)
    about = dict(images="out", data="data.zip", detector="pixels", precision="fp32", reference_labels="clean labels")
    about |= dict(reference_outliers=0, outliers=None, class_matching=None, unranked=[], protocol=None)
    lines = format_table(about | result | dict(judge=None)).splitlines()
    assert lines[1] == f"reference  data.zip: {said}"
