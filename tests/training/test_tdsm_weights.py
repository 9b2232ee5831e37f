"""The weights of TDSM and clean posteriors from noisy ones (docs/methods/tdsm.md)."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import dnnlib
from archives import label_noise as tr
from tests.support.paths import FIXTURES
from training.objectives import tdsm as weights


def fixture_cases():
    data = np.load(FIXTURES / "tdsm_weights.npz")
    for name, config in json.loads(str(data["config"])).items():
        yield pytest.param({k.split("/")[1]: data[k] for k in data.files if k.startswith(f"{name}/")}, config, id=name)


@pytest.mark.parametrize("case, config", fixture_cases())
def test_weights_fixture(case, config):
    observed = torch.from_numpy(case["noisy_labels"])
    w = weights.posterior_weights(
        torch.log_softmax(torch.from_numpy(case["clean_logits"]), 1), torch.from_numpy(case["transition"]), observed
    )
    assert torch.allclose(w.sum(1), torch.ones(len(w)), atol=1e-6)
    np.testing.assert_allclose(weights.cut_weights(w, observed, config["tau"]), case["weights"], atol=1e-5)


def test_weights_are_bayes_rule():
    rng = np.random.default_rng(0)
    T = rng.dirichlet(np.ones(6), 6)
    p = rng.dirichlet(np.ones(6), 50)
    observed = rng.integers(0, 6, 50)
    expected = T[:, observed].T * p
    expected /= expected.sum(1, keepdims=True)
    w = weights.posterior_weights(torch.from_numpy(p).log(), torch.from_numpy(T), torch.from_numpy(observed))
    np.testing.assert_allclose(w, expected, atol=1e-12)
    eye = weights.posterior_weights(torch.from_numpy(p).log(), torch.eye(6), torch.from_numpy(observed))
    np.testing.assert_array_equal(eye, np.eye(6)[observed])
    far = weights.posterior_weights(torch.tensor([[-1e4, 0.0, -1e4]]), torch.from_numpy(T[:3, :3]), torch.tensor([0]))
    assert torch.isfinite(far).all()


def test_tau_keeps_the_own_label():
    w = torch.tensor([[0.001, 0.989, 0.01]])
    cut = weights.cut_weights(w, torch.tensor([0]), 0.01)
    np.testing.assert_array_equal(cut, [[w[0, 0], w[0, 1], 0]])
    np.testing.assert_array_equal(weights.survivors(w, torch.tensor([0]), 0.01), [[True, True, False]])


def test_impossible_label_is_named():
    T = torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    with pytest.raises(dnnlib.UserError, match="label 1 .*column 1"):
        weights.posterior_weights(torch.zeros(2, 3), T, torch.tensor([0, 1]))


@settings(max_examples=40, deadline=None)
@given(arrays(np.float64, [5, 4], elements=st.floats(0.01, 1)), st.floats(0, 0.6))
def test_clean_posterior_inverts_the_noise(p, rate):
    p /= p.sum(1, keepdims=True)
    T = tr.transition_matrix("sym", rate, 4)
    found = weights.clean_posterior(torch.from_numpy(p @ T).log(), T)
    np.testing.assert_allclose(found, p, atol=1e-9)
    again = weights.clean_posterior(torch.from_numpy(p @ T).log(), None, inverse=tr.inverse_transition(T))
    np.testing.assert_array_equal(found, again)


def test_clean_posterior_clips_and_renormalizes():
    T = tr.transition_matrix("sym", 0.4, 3)
    found = weights.clean_posterior(torch.tensor([[0.9, 0.09, 0.01]]).log(), torch.from_numpy(T))
    np.testing.assert_allclose(found, [[1, 0, 0]], atol=1e-6)
