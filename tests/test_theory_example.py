"""The example of two weights in docs/theory.md: the package finds what is computed there by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlimit

WEIGHTS = jnp.array([[1.0], [2.0]])
EXAMPLES = jnp.sqrt(3.0) * jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])


def test_limits_and_dimensions_are_those_computed_by_hand():
    def loss(w, x):
        return jnp.mean((x @ (w - WEIGHTS)) ** 2) / 2

    curvature = jaxlimit.hessian(loss, WEIGHTS, jaxlimit.batched(EXAMPLES, 3))
    np.testing.assert_allclose(curvature.dense(), [[2, 1], [1, 2]], rtol=1e-6)
    limit = jaxlimit.pruning_limit(curvature, jax.random.key(0), loss_tolerance=0.8)
    found = {name: estimate.value for name, estimate in limit.estimates().items()}
    assert found == {"one_shot": 0.0, "width": 0.0, "cone": 0.5, "readjusted": 0.5}
    assert limit.rises["cone"] == pytest.approx(1.0, rel=1e-5)
    curve = limit.curve([0.5])
    assert 2 * curve.width_dimension[0] == pytest.approx(1.6 / 2.6 + 1.6 / 4.6, rel=1e-5)
    ridge = max(np.roots([0.4, -3.4, -4.8]))
    assert ridge * (0.5 / (1 + ridge) + 1.5 / (3 + ridge)) == pytest.approx(1.6)
    cone = ridge / (ridge + 1) + ridge / (ridge + 3)
    assert 2 * curve.cone_dimension[0] == pytest.approx(cone, rel=1e-4)
