"""The committed networks of `digits.py` are what their training gives."""

import digits
import numpy as np
import pytest

from jaxlimit.core.trees import flatten


@pytest.mark.slow
@pytest.mark.parametrize("name", digits.NETWORKS)
def test_training_gives_the_committed_weights(name):
    """400 epochs enlarge a difference in rounding of 1e-7, by processor or compiler, some 10,000 times."""
    committed, trained = digits.trained(name), digits.trained_again(*digits.NETWORKS[name])
    expected, found = flatten(committed.params), flatten(trained.params)
    assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)
    assert trained.tolerance == pytest.approx(committed.tolerance, rel=0.02)
    losses = [float(network.loss(network.params, digits.arrays())) for network in (committed, trained)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
