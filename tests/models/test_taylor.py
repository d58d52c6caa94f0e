"""Taylor attention against its formula, and how far it is from softmax."""

import math

import pytest

from .test_kernels import SCALING, draw, make, softmax


@pytest.mark.parametrize("causal", [False, True])
def test_it_is_the_polynomial_pair_by_pair(causal):
    q, k, v = draw(37)
    scores = SCALING * q @ k.transpose(2, 3)
    similar = 1 + scores + scores**2 / 2
    assert similar.min() >= 0.5
    similar = similar.tril() if causal else similar
    expected = similar @ v / similar.sum(-1, keepdim=True)
    assert (make("taylor", causal)(q, k, v, SCALING) - expected).abs().max() < 1e-12


def test_small_scores_are_softmax_within_the_rest_of_the_series():
    q, k, v = draw(64, size=0.25)
    largest = float((SCALING * q @ k.transpose(2, 3)).abs().max())
    # of numerator and denominator, each off by so much of itself at most
    rest = largest**3 * math.exp(2 * largest) / 6
    off = (make("taylor")(q, k, v, SCALING) - softmax(q, k, v)).abs().max()
    assert off <= 2 * rest / (1 - rest) * v.abs().max() and rest < 0.1
